"""Changes of a trial's epochs, whose metrics can't be assigned."""

from __future__ import annotations

from collections.abc import Mapping

from imbvlm.sweep.records.trial_log import TrialRecord


def set_metrics(record: TrialRecord, metrics: Mapping[str, float], index: int = -1) -> None:
    """Add metrics to an epoch of a record, or change them."""
    record.epochs[index] = {**record.epochs[index], **metrics}
