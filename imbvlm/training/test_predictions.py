"""A refit's predictions of the test split row by row, for paired comparisons and for blends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError

PREDICTIONS_FILE, LOGITS_FILE = "test.safetensors", "test_logits.safetensors"
# The test split as trained, and with adjusted logits: first parts of metrics' names.
TEST, POST_HOC = "test", "test_post_hoc"
_PREFIX = "predicted."


@dataclass(frozen=True)
class TestPredictions:
    """The test split's labels, manifest rows, and predicted classes (N,), -1 for unreadable images.

    `predicted` has them as trained, and as adjusted where validation chose an adjustment, by the first parts of the
    metrics' names. `groups` (N,) are those of the images, None where the manifest has none.
    """

    # pytest collects classes by their names.
    __test__ = False

    labels: Tensor
    rows: Tensor
    predicted: Mapping[str, Tensor]
    groups: Tensor | None = None

    def write(self, folder: str) -> None:
        """Write the predictions into a refit's folder."""
        tensors = {"labels": self.labels, "rows": self.rows}
        tensors |= {} if self.groups is None else {"groups": self.groups}
        tensors |= {f"{_PREFIX}{split}": classes for split, classes in self.predicted.items()}
        storage.write_bytes(storage.join(folder, PREDICTIONS_FILE), save_safetensors(tensors))

    @staticmethod
    def read(folder: str) -> TestPredictions | None:
        """The predictions in a refit's folder; None without them. Raises ImbvlmError for a damaged file."""
        tensors = _read(folder, PREDICTIONS_FILE)
        if tensors is None:
            return None
        predicted = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        return TestPredictions(tensors["labels"], tensors["rows"], predicted, tensors.get("groups"))

    def correct(self, split: str) -> Tensor:
        """Which rows (N,) are predicted correctly, as trained where there is no adjustment."""
        return self.predicted.get(split, self.predicted[TEST]) == self.labels

    def has_rows_of(self, other: TestPredictions) -> bool:
        """Whether both are of the same images."""
        return torch.equal(self.rows, other.rows) and torch.equal(self.labels, other.labels)


def write_test_logits(folder: str, logits: Tensor) -> None:
    """Write the test split's logits (N, C) of a refit as adjusted, apart from its predictions, which are small.

    They are in half precision, relative to each row's largest; rows of unreadable images are NaN.
    """
    storage.write_bytes(storage.join(folder, LOGITS_FILE), save_safetensors({"logits": logits.contiguous()}))


def has_test_logits(folder: str) -> bool:
    """Whether a refit's folder has the test split's logits."""
    return storage.exists(storage.join(folder, LOGITS_FILE))


def read_test_logits(folder: str) -> Tensor:
    """The logits that `write_test_logits` wrote; raises ImbvlmError for a damaged file."""
    tensors = _read(folder, LOGITS_FILE)
    assert tensors is not None, "has_test_logits tells where there are none"
    return tensors["logits"]


def _read(folder: str, name: str) -> dict[str, Tensor] | None:
    uri = storage.join(folder, name)
    if not storage.exists(uri):
        return None
    try:
        return load_safetensors(storage.read_bytes(uri))
    except SafetensorError as error:
        raise ImbvlmError(f"{uri} is damaged ({error}). Remove it to go on without it.") from None
