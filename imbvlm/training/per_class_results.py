"""What a refit leaves beside its weights for reports: per-class counts, confused pairs, calibration, parameters."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from imbvlm.base import storage
from imbvlm.features.trial_data import RowSource
from imbvlm.training.evaluator import EvalResult
from imbvlm.training.trial_run import TrialRun

CLASS_RECORD_FILE = "per_class.json"
FORMAT = 1
MAX_PAIRS = 200
# So many images of a confused pair are named, for a report to show.
MAX_ROWS = 4


def class_record(run: TrialRun, scored: dict[str, tuple[RowSource, EvalResult]]) -> dict[str, Any]:
    """Plain data of a trained run: class names and counts, and what it made of each scored split."""
    return {
        "format": FORMAT,
        "class_names": list(run.data.class_names),
        "tower": run.data.info.weights_fingerprint,
        "split_counts": run.data.class_stats.split_counts.tolist(),
        "class_counts": run.data.class_stats.counts.tolist(),
        "num_parameters": run.parameters.total,
        "num_trained_parameters": run.parameters.trained,
        "splits": {split: _of_split(examples, found) for split, (examples, found) in scored.items()},
    }


def write_class_record(folder: str, record: dict[str, Any]) -> None:
    """Write per_class.json into a refit's folder."""
    uri = storage.join(folder, CLASS_RECORD_FILE)
    storage.write_bytes(uri, json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode())


def _of_split(examples: RowSource, found: EvalResult) -> dict[str, Any]:
    if found.adjusted is None:
        return _counts(examples, found)
    after = _counts(examples, found.adjusted)
    # Under a name of their own the bins stand for readers of version 0.1.
    return {**_counts(examples, found), "adjusted_confidence_bins": after["confidence_bins"], "adjusted": after}


def _counts(examples: RowSource, found: EvalResult) -> dict[str, Any]:
    counters = found.counters
    return {
        "correct": counters.correct.tolist(),
        "total": counters.total.tolist(),
        "predicted": counters.predicted.tolist(),
        # Rows, right rows and summed confidence, per bin of confidence.
        "confidence_bins": found.bins.counts.tolist(),
        "confusions": confusions(examples.labels, found.predicted.numpy(), examples.rows),
    }


def confusions(
    labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> list[dict[str, Any]]:
    """The pairs (label, predicted) of unlike classes that come up most, with some of their rows; ties by label."""
    # Images that couldn't be read have no prediction.
    wrong = np.flatnonzero((labels != predicted) & (predicted >= 0))
    if not wrong.size:
        return []
    pairs = np.stack([labels[wrong], predicted[wrong]], axis=1)
    found, pair_of, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    return [
        {
            "label": int(found[pair, 0]),
            "predicted": int(found[pair, 1]),
            "count": int(counts[pair]),
            "rows": rows[wrong[pair_of.reshape(-1) == pair][:MAX_ROWS]].tolist(),
        }
        for pair in np.argsort(-counts, kind="stable")[:MAX_PAIRS]
    ]
