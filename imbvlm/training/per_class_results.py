"""A refit's results for reports, stored next to its weights: per-class counts, confused pairs, calibration."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from imbvlm.base import storage
from imbvlm.features.trial_data import RowSource
from imbvlm.training.evaluator import EvalResult
from imbvlm.training.trial_run import TrialRun

PER_CLASS_FILE = "per_class.json"
FORMAT = 1
MAX_PAIRS = 200
# Images of a confused pair that are listed for reports.
MAX_ROWS = 4


def per_class_results(run: TrialRun, scored: dict[str, tuple[RowSource, EvalResult]]) -> dict[str, Any]:
    """Plain data of a trained run: class names, taxonomy and counts, and the results of each scored split."""
    taxonomy = run.data.taxonomy
    return {
        "format": FORMAT,
        "class_names": list(run.data.class_names),
        **({} if taxonomy is None else {"taxonomy": taxonomy.to_dict()}),
        "tower": run.data.info.weights_fingerprint,
        "split_counts": run.data.class_stats.split_counts.tolist(),
        "class_counts": run.data.class_stats.counts.tolist(),
        "num_parameters": run.parameters.total,
        "num_trained_parameters": run.parameters.trained,
        "splits": {split: split_results(rows.labels, rows.rows, result) for split, (rows, result) in scored.items()},
    }


def write_per_class_results(folder: str, results: dict[str, Any]) -> None:
    """Write per_class.json into a refit's folder."""
    uri = storage.join(folder, PER_CLASS_FILE)
    storage.write_bytes(uri, json.dumps(results, ensure_ascii=False, separators=(",", ":")).encode())


def read_per_class_results(folder: str) -> dict[str, Any]:
    """The content of a refit's per_class.json."""
    return dict(storage.read_json(storage.join(folder, PER_CLASS_FILE)))


def split_results(labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], result: EvalResult) -> dict[str, Any]:
    """Plain data of a split's results, with the labels (N,) and rows (N,) of its images."""
    if result.adjusted is None:
        return _counts(labels, rows, result)
    after = _counts(labels, rows, result.adjusted)
    # Version 0.1 reads the bins under a key of their own.
    return {**_counts(labels, rows, result), "adjusted_confidence_bins": after["confidence_bins"], "adjusted": after}


def _counts(labels: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], result: EvalResult) -> dict[str, Any]:
    counters = result.counters
    return {
        "correct": counters.correct.tolist(),
        "total": counters.total.tolist(),
        "predicted": counters.predicted.tolist(),
        # Rows, correct rows and summed confidence, per bin of confidence.
        "confidence_bins": result.bins.counts.tolist(),
        "confusions": confusions(labels, result.predicted.numpy(), rows),
    }


def confusions(
    labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> list[dict[str, Any]]:
    """The most frequent pairs (label, predicted) of different classes, with some of their rows; ties by label."""
    # Unreadable images have no prediction.
    wrong = np.flatnonzero((labels != predicted) & (predicted >= 0))
    if not wrong.size:
        return []
    pairs = np.stack([labels[wrong], predicted[wrong]], axis=1)
    distinct, pair_of, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    return [
        {
            "label": int(distinct[pair, 0]),
            "predicted": int(distinct[pair, 1]),
            "count": int(counts[pair]),
            "rows": rows[wrong[pair_of.reshape(-1) == pair][:MAX_ROWS]].tolist(),
        }
        for pair in np.argsort(-counts, kind="stable")[:MAX_PAIRS]
    ]
