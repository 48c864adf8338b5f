"""Time to quality beside what a user would write: two searches of a sweep, three scripts, the same features and space.

Each side is a process of its own, timed from its command. Its choice at a time is the finished trial of the highest
validation accuracy so far. The best is the highest true accuracy that any trial of any side has; a side is through when
its choice is within WITHIN points of it and stays so.
"""

import itertools
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import made
import numpy as np
from beside_sweep import make_spec
from curves import balanced_accuracy
from record_curves import predict, stored_rows
from table import Line, Options, shown, times

from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.training.trial_run import build_trial

NUM_ROWS, WIDTH, NUM_VAL, NUM_TRUE, NUM_TRIALS = 50_000, 512, 500, 5_000, 64
# Noise at which the best probes have about three quarters right.
NOISE = {10: 9.0, 100: 6.0}
WITHIN, WANTED = 0.5, 2.0
# A sweep's search, and one that begins with learned recipes.
SWEEPS = ("sweep", "recipes")
SCRIPTS = {
    "optuna": "features in memory and Optuna",
    "grid": "a grid of 80 in that script",
    "tune": "Ray Tune, Optuna, ASHA",
}
Trials = Sequence[Mapping[str, Any]]


def lines(options: Options) -> Iterator[Line]:
    for num_classes, noise in NOISE.items():
        yield from _beside(options, options.folder / f"classes{num_classes}", num_classes, noise)


def _beside(options: Options, folder: Path, num_classes: int, noise: float) -> Iterator[Line]:
    num_rows = NUM_ROWS if options.large else NUM_ROWS // 5
    features = made.stored_features(
        folder / "features", num_rows, num_classes=num_classes, width=WIDTH, noise=noise, num_val=NUM_VAL,
        num_true=NUM_TRUE,
    )  # fmt: skip
    arrays = dict[str, np.ndarray]()
    for split in ("train", "val", "test"):
        arrays[f"{split}_x"], arrays[f"{split}_y"] = _rows_of(features, split)
    np.savez(folder / "features.npz", **arrays)
    (folder / "features.pickle").write_bytes(pickle.dumps(features))
    results = dict[str, dict[str, Any]]()
    for side in (*SWEEPS, *SCRIPTS):
        script, file = ("beside_sweep", "features.pickle") if side in SWEEPS else ("features_script", "features.npz")
        settings = {"side": side, "features": str(folder / file), "num_trials": NUM_TRIALS}
        results[side] = run_side(script, folder / side, settings)
    seconds = {side: result["seconds"] for side, result in results.items()}
    trials: dict[str, Trials] = {side: result["trials"] for side, result in results.items()}
    for side in SWEEPS:
        trials[side] = _with_truth(trials[side], features, options.device)
    best = max(trial["true"] for of_side in trials.values() for trial in of_side)
    yield shown(f"{num_rows:,} rows, {num_classes} classes, {NUM_TRIALS} trials: best true accuracy", 100 * best)
    until = {side: through(of_side, best) for side, of_side in trials.items()}
    for ours, side in itertools.product(SWEEPS, SCRIPTS):
        words = f"{ours}, and {SCRIPTS[side]}"
        if min(until[ours], until[side]) < math.inf:
            yield times(f"  within {WITHIN} points: {words}", until[ours], until[side], wanted=WANTED)
        yield times("    all trials of both", seconds[ours], seconds[side])
    for side, of_side in trials.items():
        last = max(of_side, key=lambda trial: trial["seen"])
        yield shown(f"  {side}: its choice lies below by", 100 * (best - last["true"]), "points")
        ends = sorted(trial["end"] for trial in results[side]["trials"])
        before = sum(end <= until[side] for end in ends)
        yield shown("    its first trial finished after, and trials finished by then", f"{ends[0]:.1f} s, {before}")


def _rows_of(features: FeatureSet, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pooled outputs (N, D) and labels (N,) of a split."""
    rows = stored_rows(made.trial("linear_probe"), features, split)
    return rows.batch("pooled", np.arange(len(rows))).numpy(), rows.labels


def run_side(script: str, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run a script of this folder by its own process in a new folder, and return what it writes."""
    folder.mkdir()
    file, out = folder / "settings.json", folder / "out.json"
    file.write_text(json.dumps({**settings, "folder": str(folder), "out": str(out), "seed": 0}))
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name(f"{script}.py")), str(file)], check=True, capture_output=True
    )
    return json.loads(out.read_text())


def _with_truth(trials: Trials, features: FeatureSet, device: str) -> Trials:
    spec = make_spec(features.manifest, NUM_TRIALS, 0)
    return [{**trial, "true": truth(spec.trial(trial["params"]), features, device)} for trial in choices(trials)]


def choices(trials: Trials) -> Trials:
    """The trials that were the choice at some time, in the order in which they ended."""
    chosen: list[Mapping[str, Any]] = []
    for trial in sorted(trials, key=lambda trial: trial["end"]):
        if not chosen or trial["seen"] > chosen[-1]["seen"]:
            chosen.append(trial)
    return chosen


def truth(config: TrialConfig, features: FeatureSet, device: str) -> float:
    """Balanced accuracy on the stored test split of a configuration, which is trained again."""
    run = build_trial(config, TrialData.open(config, features), device)
    for _ in run.epochs():
        pass
    test = stored_rows(config, features, "test")
    inputs = test.batch(run.entry.reads, np.arange(len(test))).float().to(device)
    return float(balanced_accuracy(predict(run, inputs) == test.labels, test.labels))


def through(trials: Trials, best: float) -> float:
    """Seconds until the choice is near the best and stays so; infinite if it never is."""
    since = math.inf
    for trial in choices(trials):
        is_near = 100 * (best - trial["true"]) <= WITHIN
        since = min(since, trial["end"]) if is_near else math.inf
    return since
