"""Compares the claims of a sweep with the truth on photos that it never sees, on a folder of classes.

    python tests/benchmarks/kept_away.py FOLDER [--draws 10] [--val 25]

FOLDER has a folder of images for each class. A draw gives its classes, in random order, 300 to 5 training images, keeps
others away, and runs the quickstart, an export and a prediction by their commands.
"""

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from imbvlm.base.formatting import Z95

ROOT = Path(__file__).parents[2]
LARGEST, SMALLEST, NUM_KEPT = 300, 5, 220


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--val", type=int, default=0, help="validation images a class; 0 has folds instead")
    arguments = parser.parse_args()
    for number in range(arguments.draws):
        with tempfile.TemporaryDirectory(prefix="imbvlm-kept-away-") as home:
            print(f"draw {number}: {run_draw(arguments.folder, Path(home), arguments.val, number)}", flush=True)


def run_draw(folder: Path, home: Path, num_val: int, seed: int) -> str:
    """Run one draw in an empty folder; balanced accuracy as claimed and as counted, in percent."""
    classes = deal(folder, home, num_val, random.Random(seed))
    imbvlm = [sys.executable, "-m", "imbvlm"]
    run(home, *imbvlm, "manifest", "build", "--folders", "data", "-o", "photos.parquet")
    run(home, sys.executable, str(ROOT / "sweeps" / "quickstart.py"), "--manifest", "photos.parquet")
    (sweep,) = (home / "runs").glob("quickstart-*")
    run(home, *imbvlm, "export", str(sweep), "-o", "model")
    run(home, *imbvlm, "predict", "model", "kept", "-o", "predictions.csv")
    right: dict[str, list[bool]] = defaultdict(list)
    with (home / "predictions.csv").open() as file:
        for row in csv.DictReader(file):
            label = Path(row["image"]).parent.name
            right[label].append(row["class_1"] == label)
    assert set(right) == set(classes)
    truth = sum(sum(own) / len(own) for own in right.values()) / len(right)
    selection = json.loads((sweep / "selection.json").read_text())
    claim = selection["claims"]["balanced_accuracy"]
    half_width, error = Z95 * claim["standard_error"], claim["value"] - truth
    inside = "inside" if abs(error) <= half_width else "OUTSIDE"
    gain = selection["gain"]
    return (
        f"claimed {100 * claim['value']:.1f} ± {100 * half_width:.1f}, true {100 * truth:.1f}, {inside}; gain over "
        f"the best baseline on validation {100 * gain['difference']:+.1f} ({100 * gain['low']:+.1f} to "
        f"{100 * gain['high']:+.1f})"
    )


def deal(folder: Path, home: Path, num_val: int, rng: random.Random) -> list[str]:
    """Link the images of a draw into folders of `home`; the names of its classes."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    rng.shuffle(classes)
    for rank, name in enumerate(classes):
        images = sorted((folder / name).iterdir())
        rng.shuffle(images)
        number = round(LARGEST * (SMALLEST / LARGEST) ** (rank / max(len(classes) - 1, 1)))
        parts = {"data/train" if num_val else "data": images[:number], "kept": images[number + num_val :][:NUM_KEPT]}
        if num_val:
            parts["data/val"] = images[number : number + num_val]
        for part, own in parts.items():
            target = home / part / name
            target.mkdir(parents=True)
            for image in own:
                (target / image.name).symlink_to(image.resolve())
    return classes


def run(home: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    main()
