"""Recorded curves of a table: which rows of a pool each configuration has right by epoch, and its true accuracy.

A searcher sees the balanced accuracy of 500 rows of the pool, which each seed draws anew. The true one is that of at
least 5,000 other rows. `record_curves.py` writes the tables, `quality.py` replays searches over them.
"""

import io
import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imbvlm.base.schema import Tree
from imbvlm.base.yaml_file import read_yaml
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.sweep_spec import SweepSpec

FOLDER = Path(__file__).parent / "recorded"
NUM_SEEN = 500
# A curve is recorded at the ends of these fractions of its epochs.
FRACTIONS = (1 / 12, 1 / 6, 1 / 3, 2 / 3, 1.0)
# Each shipped space without the keys that the tables' features fix, and the methods that train on stored features.
FIXED_KEYS: Mapping[str, tuple[str, ...]] = {
    "quickstart": ("encoder.image_size",),
    "imagenet_lt": (
        "encoder.name", "adapter.width", "classifier.init", "optim.lr_schedule", "optim.warmup_fraction",
        "optim.nesterov", "train.clip_grad_norm",
    ),
}  # fmt: skip
METHODS = ("linear_probe", "decoder")
Array = np.ndarray


@dataclass(frozen=True)
class Table:
    """M configurations of a space at P points of their training, on a pool of R rows.

    `epochs` (M, P) are the epochs of the points, `right` (M, P, R) the rows that are right, `labels` (R,) their
    classes, `truth` (M, P) true balanced accuracies, and `seconds` (M,) CPU seconds of an epoch.
    """

    family: str
    space: str
    params: tuple[Params, ...]
    epochs: Array
    labels: Array
    right: Array
    truth: Array
    seconds: Array

    def draw_seen(self, seed: int) -> Array:
        """Balanced accuracies (M, P) on NUM_SEEN rows of the pool, as many of each class as they allow."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self.labels))
        order = order[np.argsort(self.labels[order], kind="stable")]
        starts = np.searchsorted(self.labels[order], self.labels[order])
        # The first rows of all classes, then the second ones; classes in random order within each round.
        round_of_row = np.arange(len(order)) - starts
        rows = order[np.lexsort((rng.random(len(order)), round_of_row))][:NUM_SEEN]
        return balanced_accuracy(self.right[..., rows], self.labels[rows])

    def write(self, path: Path) -> None:
        """Write a compressed file."""
        # A point's rows differ little from those of the point before.
        changes = self.right.copy()
        changes[:, 1:] ^= self.right[:, :-1]
        stream = io.BytesIO()
        about = json.dumps({"family": self.family, "space": self.space, "params": self.params})
        np.savez(
            stream, about=np.array(about), epochs=self.epochs.astype(np.uint8), labels=self.labels.astype(np.uint16),
            changes=np.packbits(changes, axis=0), num=len(self.params), truth=self.truth.astype(np.float32),
            seconds=self.seconds.astype(np.float32),
        )  # fmt: skip
        path.write_bytes(lzma.compress(stream.getvalue(), preset=9))

    @staticmethod
    def read(path: Path) -> "Table":
        """Read what `write` wrote."""
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as file:
            about = json.loads(str(file["about"]))
            changes = np.unpackbits(file["changes"], axis=0, count=int(file["num"])).astype(bool)
            right = np.logical_xor.accumulate(changes, axis=1)
            rest = {name: file[name] for name in ("epochs", "labels", "truth", "seconds")}
        return Table(about["family"], about["space"], tuple(about["params"]), right=right, **rest)


def read_tables(folder: Path = FOLDER) -> dict[str, Table]:
    """Every recorded table by its name."""
    return {path.name.partition(".")[0]: Table.read(path) for path in sorted(folder.glob("*.npz.xz"))}


def balanced_accuracy(right: Array, labels: Array) -> Array:
    """The mean over the classes of labels (R,) of their rows' shares of `right` (..., R)."""
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return right @ (1 / (len(classes) * counts[index]))


def recorded_space(name: str) -> Tree:
    """The parameters of a shipped space that the tables vary."""
    tree: Tree = read_yaml(str(Path(__file__).parents[2] / "search_spaces" / f"{name}.yaml")).data["parameters"]
    parameters: Tree = {}
    for key, ranges in tree.items():
        branches = [_within_methods(each) for each in (ranges if isinstance(ranges, list) else [ranges])]
        if key == "method":
            parameters[key] = {"choice": list(METHODS)}
        elif key not in FIXED_KEYS[name] and (present := [each for each in branches if each is not None]):
            parameters[key] = present if isinstance(ranges, list) else present[0]
    return parameters


def _within_methods(branch: Tree) -> Tree | None:
    """A range, unless it is that of other methods alone."""
    method = branch.get("when", {}).get("method")
    methods = method if isinstance(method, list) else [method]
    return branch if method is None or any(each in METHODS for each in methods) else None


def make_spec(
    space: str, searcher: Mapping[str, object], first_trials: Sequence[Params] = (), **keys: object
) -> SweepSpec:
    """A sweep over a recorded space."""
    base: Tree = {
        "data": {"manifest": "made"}, "encoder": {"name": "made"}, "eval": {"resize": 1.0},
        "train": {"batch_size": 128, **({"num_epochs": 12} if space == "quickstart" else {})},
        "decoder": {"width": 64},
    }  # fmt: skip
    return SweepSpec.from_tree({
        "name": "quality", "base": base, "space": {"parameters": recorded_space(space)}, "searcher": dict(searcher),
        "first_trials": list(first_trials), **keys})  # fmt: skip
