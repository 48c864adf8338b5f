"""Records of trials without having trained any, for tests of what reads a trial log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imbvlm.config.trial_config import TrialConfig
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord

BASE = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}}
OBJECTIVE, BEST = "val/balanced_accuracy", "val/best_balanced_accuracy"


def record(trial_id: str, values: list[float], sections: dict[str, Any] | None = None, **fields: Any) -> TrialRecord:
    """A trial with these values of the objective, epoch by epoch."""
    epochs = [
        {"epoch": float(number), OBJECTIVE: value, BEST: max(values[:number])} for number, value in enumerate(values, 1)
    ]
    tree = TrialConfig.from_tree({**BASE, "method": "decoder", **(sections or {})}).to_tree()
    given = {"kind": "search", "state": "finished", "config": tree, "epochs": epochs, **fields}
    return TrialRecord(trial_id=trial_id, **given)


def log_of(folder: Path, *records: TrialRecord) -> TrialLog:
    log = TrialLog(str(folder))
    for record in records:
        log.save(record)
    return log
