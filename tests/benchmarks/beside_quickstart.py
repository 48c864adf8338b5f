"""Time to quality of the quickstart beside a script of a hundred lines, from the command, with no features known.

    PYTHONPATH=tests/helpers:. python tests/benchmarks/beside_quickstart.py [--fashion FOLDER]

Both train on the quickstart's images and choose by its validation split. The truth is 5,000 images of Debian's package
dataset-fashion-mnist (`dpkg-deb -x`) that are in none of its splits; the shipped test split isn't read. The best, and
who is through when, are those of `beside`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from beside import Trials, choices, run_side, through, truth
from record_curves import fashion_images
from tiny_images import extraction_in_this_process

from imbvlm.assets import encoder_path
from imbvlm.config.encoder_info import OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.feature_set import FeatureSet
from imbvlm.sweep.records.sweep_folder import read_spec
from imbvlm.sweep.records.trial_log import TrialLog

ROOT = Path(__file__).parents[2]
NUM_TRUE_PER_CLASS, NUM_TRIALS, ENCODER = 500, 30, "tinylit-lite0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=Path("/"))
    with tempfile.TemporaryDirectory(prefix="imbvlm-beside-") as home:
        folder = Path(home)
        manifest = folder / "photos.parquet"
        write_manifest(manifest, parser.parse_args().fashion)
        settings = {"manifest": str(manifest), "encoder": str(encoder_path(ENCODER)), "num_trials": NUM_TRIALS}
        script: Trials = run_side("quickstart_script", folder / "script", settings)["trials"]
        sides = {"script": script, "sweep": run_sweep(folder, manifest)}
    best = max(trial["true"] for trials in sides.values() for trial in trials)
    print(f"best true accuracy {100 * best:.1f}")
    for side, trials in sides.items():
        last = max(trials, key=lambda trial: trial["seen"])
        print(
            f"{side}: within 0.5 points of it after {through(trials, best):.1f} s, first trial after "
            f"{min(trial['end'] for trial in trials):.1f} s, last change of its choice after {last['end']:.1f} s; its "
            f"choice is {100 * last['true']:.1f}"
        )


def write_manifest(path: Path, fashion: Path) -> None:
    """The quickstart's manifest with other test images."""
    shipped = Manifest.read("embedded:fashion_mnist_lt")
    table = shipped.table.take(pa.array(np.concatenate([shipped.rows_of("train"), shipped.rows_of("val")])))
    columns = {name: table.column(name).to_pylist() for name in ("bytes", "label", "split")}
    for label, images in enumerate(fashion_images(fashion, without=("train", "val", "test"))):
        columns["bytes"] += [image() for image in images[-NUM_TRUE_PER_CLASS:]]
        columns["label"] += [label] * NUM_TRUE_PER_CLASS
        columns["split"] += ["test"] * NUM_TRUE_PER_CLASS
    columns["label"] = np.array(columns["label"], dtype=np.int32)
    Manifest.build(pa.table(columns), shipped.class_names, "fashion").write(str(path))


def run_sweep(folder: Path, manifest: Path) -> Trials:
    begin = time.time()
    command = [sys.executable, str(ROOT / "sweeps" / "quickstart.py"), "--manifest", str(manifest)]
    subprocess.run([*command, "--set", f"storage={folder / 'runs'}"], check=True, cwd=folder, capture_output=True)
    (sweep,) = (folder / "runs").glob("quickstart-*")
    spec, log = read_spec(str(sweep)), TrialLog.read(str(sweep))
    ended = [
        {"end": (record.ended_at or 0.0) - begin, "seen": record.best_value(spec.best_objective), "id": record.trial_id}
        for record in log.of("search")
        if record.state == "finished"
    ]
    chosen = []
    for trial in choices(ended):
        config = log.records[trial["id"]].trial_config()
        chosen.append({**trial, "true": truth(config, stored(config, spec.feature_root), "cpu")})
    return chosen


def stored(config: TrialConfig, root: str) -> FeatureSet:
    """The features of all splits that a sweep has stored."""
    outputs = frozenset[OutputName]({"tokens", "pooled", "image_embedding"})
    manifest = Manifest.read(config.data.manifest)
    with extraction_in_this_process():
        return ensure_features(
            config, manifest, root, outputs, ("train", "val", "test"), report=lambda line: None
        )  # fmt: skip


if __name__ == "__main__":
    main()
