"""A finished sweep's folder without having run one, for tests of what reads such folders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from imbvlm.config.trial_config import apply_overrides
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.metrics import shot_group_accuracies
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.per_class_results import confusions

OBJECTIVE = "val/balanced_accuracy"
SPACE = {
    "parameters": {
        "method": {"choice": ["linear_probe", "decoder"]},
        "decoder.depth": {"choice": [1, 2], "when": {"method": "decoder"}},
        "loss.name": {"choice": ["cross_entropy", "balanced_softmax"]},
        "optim.lr": {"loguniform": [0.01, 0.5]},
    }
}
TEST_PER_CLASS = 5


def sweep_spec(**fields: Any) -> SweepSpec:
    base = {"data": {"manifest": "gone.parquet"}, "encoder": {"name": "tinylit_lite0"}, "train": {"num_epochs": 12}}
    return SweepSpec.from_tree(
        {"name": "made", "base": base, "space": SPACE, "num_trials": 24, "refit_seeds": [0, 1], **fields}
    )


def write_sweep(
    folder: Path,
    class_counts: list[int],
    *,
    num_trials: int = 24,
    gain: float = 0.2,
    adjusted: dict[str, float] | None = None,
    refits: bool = True,
    class_names: list[str] | None = None,
    **fields: Any,
) -> Path:
    """A folder in which the winner is `gain` better than the linear probe on the test split.

    `adjusted` is the accuracy of some refits, by name, with their logits adjusted post hoc.
    """
    spec, chance, log = sweep_spec(**fields), random.Random(0), TrialLog(str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    spec.to_yaml(folder / "sweep.yaml")
    for number in range(1, num_trials + 1):
        log.save(_search_record(spec, number, chance))
    for number, (name, method, value) in enumerate(
        (("zero-shot", "zero_shot", 0.3), ("linear probe", "linear_probe", 0.5)), 1
    ):
        config = spec.trial({"method": "linear_probe", "loss.name": "cross_entropy", "optim.lr": 0.1}).to_tree()
        if method == "zero_shot":
            config = _zero_shot(config)
        log.save(_record(f"b{number:05d}", "baseline", config, [value], name=name))
    if refits:
        names = class_names or [f"class {number}" for number in range(len(class_counts))]
        for name, accuracy, seeds in (
            ("winner", 0.5 + gain, (0, 1)),
            ("linear probe", 0.5, (0, 1)),
            ("zero-shot", 0.3, (0,)),
        ):
            for seed in seeds:
                splits = {"test": accuracy} | ({"test_post_hoc": adjusted[name]} if name in (adjusted or {}) else {})
                _write_refit(folder, log, name, seed, splits, class_counts, names)
    write_results_table(log)
    return folder


def _search_record(spec: SweepSpec, number: int, chance: random.Random) -> TrialRecord:
    draw = {
        "method": chance.choice(["linear_probe", "decoder"]),
        "loss.name": chance.choice(["cross_entropy", "balanced_softmax"]),
        "optim.lr": 10 ** chance.uniform(-2, -0.31),
    }
    if draw["method"] == "decoder":
        draw["decoder.depth"] = chance.choice([1, 2])
    value = 0.5 + 0.2 * (draw["loss.name"] == "balanced_softmax") + 0.05 * chance.random()
    stopped = number % 4 == 0
    values = [value * (0.7 + 0.3 * epoch / 12) for epoch in range(1, 5 if stopped else 13)]
    config = spec.trial(draw).to_tree()
    return _record(
        f"t{number:05d}", "search", config, values, draw=draw, state="stopped" if stopped else "finished",
        stop_reason="by the trial scheduler after epoch 4" if stopped else "trained to its end",
    )  # fmt: skip


def _record(trial_id: str, kind: str, config: dict, values: list[float], **fields: Any) -> TrialRecord:
    best, epochs = 0.0, []
    for number, value in enumerate(values, 1):
        best = max(best, value)
        metrics = {"val/top1_accuracy": value + 0.05, "val/few_shot_accuracy": value - 0.2,
                   "val/balanced_standard_error": 0.02}  # fmt: skip
        epochs.append({"epoch": float(number), OBJECTIVE: value, "val/best_balanced_accuracy": best, **metrics})
    given = {"state": "finished", "started_at": 1e9, "ended_at": 1e9 + 2 * len(values), **fields}
    return TrialRecord.model_validate({"trial_id": trial_id, "kind": kind, "config": config, "epochs": epochs, **given})


def _zero_shot(config: dict) -> dict:
    kept = {key: value for key, value in config.items() if key in ("data", "encoder", "features", "eval")}
    return apply_overrides({**kept, "data": {"manifest": config["data"]["manifest"]}}, {"method": "zero_shot"})


def _write_refit(
    folder: Path,
    log: TrialLog,
    name: str,
    seed: int,
    splits: dict[str, float],
    class_counts: list[int],
    names: list[str],
) -> None:
    """`splits` has the accuracy as trained, under test, and as adjusted, under test_post_hoc."""
    found = {split: _scored(seed, accuracy, class_counts) for split, accuracy in splits.items()}
    trial_id = f"refit-{name.replace(' ', '-')}-seed{seed}"
    source = {"zero-shot": "b00001", "linear probe": "b00002"}.get(name, "t00001")
    config = log.records[source].config
    if name != "zero-shot":
        config = apply_overrides(config, {"train.seed": seed})
    record = _record(trial_id, "refit", config, [], name=name)
    record.epochs = [{"epoch": 1.0, **{f"{split}/{key}": float(value) for split, (metrics, _) in found.items()
                                       for key, value in metrics.items()}}]  # fmt: skip
    log.save(record)
    counts = found["test"][1]
    if "test_post_hoc" in found:
        after = found["test_post_hoc"][1]
        counts |= {"adjusted": after, "adjusted_confidence_bins": after["confidence_bins"]}
    content = {
        "format": 1,
        "class_names": names,
        "split_counts": class_counts,
        "class_counts": class_counts,
        "num_parameters": 1000,
        "num_trained_parameters": 0 if name == "zero-shot" else 900,
        "splits": {"test": counts},
    }
    (folder / "refits" / trial_id).mkdir(parents=True)
    (folder / "refits" / trial_id / "per_class.json").write_text(json.dumps(content))


def _scored(seed: int, accuracy: float, class_counts: list[int]) -> tuple[dict, dict]:
    """Metrics, and counts per class."""
    generator = np.random.default_rng(seed)
    num_classes, stats = len(class_counts), ClassStats.from_counts(class_counts)
    labels = np.repeat(np.arange(num_classes), TEST_PER_CLASS)
    right = generator.random(len(labels)) < accuracy
    predicted = np.where(
        right, labels, (labels + generator.integers(1, max(2, num_classes), len(labels))) % num_classes
    )
    total = np.bincount(labels, minlength=num_classes)
    correct = np.bincount(labels[labels == predicted], minlength=num_classes)
    per_class = correct / total
    metrics = {"top1_accuracy": correct.sum() / total.sum(), "balanced_accuracy": per_class.mean(),
               "balanced_standard_error": 0.01, "expected_calibration_error": 0.1}  # fmt: skip
    metrics |= shot_group_accuracies(per_class, stats)
    rows = np.arange(len(labels))
    return metrics, {
        "correct": correct.tolist(),
        "total": total.tolist(),
        "predicted": np.bincount(predicted, minlength=num_classes).tolist(),
        "confidence_bins": np.array([[9.0] * 15, [9 * accuracy] * 15, [7.0] * 15]).tolist(),
        "confusions": confusions(labels, predicted, rows),
    }
