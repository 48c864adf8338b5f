"""The quickstart on re-splits of its training and validation images: is what it delivers above its best baseline?

Each draw deals the images of both splits anew: of each class 25 validate, 25 tell the truth, the others train. The
quickstart runs on them as a user runs it. The data set's own test split isn't read.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pyarrow as pa
from table import Line, Options, shown

from imbvlm.base.formatting import pluralize
from imbvlm.data.manifest import Manifest
from imbvlm.sweep.records.difference import baseline_differences, delivered_runs, refits_of, splits_of, values_in
from imbvlm.sweep.records.trial_log import BLEND, DELIVERED, TrialLog
from imbvlm.sweep.spec.sweep_spec import SweepSpec

ROOT = Path(__file__).parents[2]
NUM_DRAWS = 20
NUM_VALIDATED = NUM_TRUE = 25


def resplit(seed: int) -> Manifest:
    """The embedded images of training and validation, dealt to three splits."""
    whole = Manifest.read("embedded:fashion_mnist_lt")
    images = whole.take(np.sort(np.concatenate([whole.rows_of("train"), whole.rows_of("val")])))
    rng = np.random.default_rng(seed)
    splits = np.full(len(images), "train", dtype=object)
    for label in range(len(images.class_names)):
        rows = rng.permutation(np.flatnonzero(images.labels == label))
        splits[rows[:NUM_TRUE]] = "test"
        splits[rows[NUM_TRUE : NUM_TRUE + NUM_VALIDATED]] = "val"
    column = images.table.schema.get_field_index("split")
    table = images.table.set_column(column, "split", pa.array(splits, pa.string()).dictionary_encode())
    return Manifest.build(table, images.class_names, f"draw-{seed}")


@dataclass(frozen=True)
class Draw:
    """The accuracy of a draw's delivered model and its differences from adjusted baselines, in points.

    `best` is from the baseline that validation ranks first, `nearest` from that of the highest accuracy on the truth;
    both compare means over seeds. `exported` compares the exported model with the mean of the former.
    """

    accuracy: float
    best: float
    nearest: float
    exported: float
    num_passes: int
    is_blend: bool


def run_quickstart(manifest: Manifest, folder: Path) -> str:
    """Run the sweep as a user does, and return its folder."""
    folder.mkdir(parents=True)
    manifest.write(str(folder / "images.parquet"))
    command = [sys.executable, str(ROOT / "sweeps" / "quickstart.py"), "--manifest", "images.parquet"]
    environment = {**os.environ, "CI": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return str(next((folder / "runs").glob("quickstart-*")))


def measured(sweep: str) -> Draw:
    """The scores of a sweep on its test split."""
    log = TrialLog.read(sweep)
    runs = delivered_runs(log)
    differences = baseline_differences(log, runs)
    best = log.best_baselines(SweepSpec.from_yaml(Path(sweep) / "sweep.yaml").objective)[0]
    split = splits_of(refits_of(log, best.name))[-1]
    (exported,) = (record for record in log.of("delivered") if record.name == DELIVERED)
    accuracy = values_in([exported], splits_of([exported])[-1], "balanced_accuracy")[0]
    theirs = fmean(values_in(refits_of(log, best.name), split, "balanced_accuracy"))
    selection = json.loads((Path(sweep) / "selection.json").read_text())
    return Draw(
        accuracy=100 * accuracy,
        best=100 * differences[best.name, split].gain,
        nearest=100 * min(difference.gain for difference in differences.values()),
        exported=100 * (accuracy - theirs),
        num_passes=len({member["pass_name"] for member in selection["members"]}),
        is_blend=runs[0].name == BLEND,
    )


def lines(options: Options) -> Iterator[Line]:
    draws = []
    for seed in range(NUM_DRAWS):
        draws.append(draw := measured(run_quickstart(resplit(seed), options.folder / str(seed))))
        what = f"a blend of {pluralize(draw.num_passes, 'pass')}" if draw.is_blend else "a single model"
        yield shown(f"draw {seed}: {what}, {draw.accuracy:.1f} %; to the best baseline", f"{draw.best:+.2f} points")
    for what, gains in {
        "the baseline that validation ranks first": [draw.best for draw in draws],
        "the same, of the exported model": [draw.exported for draw in draws],
        "the baseline of the highest accuracy": [draw.nearest for draw in draws],
    }.items():
        error = stdev(gains) / len(gains) ** 0.5
        value = f"{fmean(gains):+.2f} ± {error:.2f}"
        yield Line(f"gain over {what}", value, "", None, f"> {2 * error:.2f}", fmean(gains) > 2 * error)
