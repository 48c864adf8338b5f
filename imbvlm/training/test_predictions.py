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

FILE = "test.safetensors"
# The test split as trained, and with adjusted logits: first parts of metrics' names.
TEST, POST_HOC = "test", "test_post_hoc"
_PREFIX = "predicted."


@dataclass(frozen=True)
class TestPredictions:
    """The test split's labels, manifest rows, and predicted classes (N,), -1 for unreadable images.

    `predicted` has them as trained, and as adjusted where validation chose an adjustment, by the first parts of the
    metrics' names. `logits` (N, C) are those of the model as exported, in half precision relative to each row's
    largest; None where they weren't kept.
    """

    # pytest collects classes by their names.
    __test__ = False

    labels: Tensor
    rows: Tensor
    predicted: Mapping[str, Tensor]
    logits: Tensor | None = None

    def write(self, folder: str) -> None:
        """Write the predictions into a refit's folder."""
        tensors = {"labels": self.labels, "rows": self.rows}
        tensors |= {f"{_PREFIX}{split}": classes for split, classes in self.predicted.items()}
        tensors |= {} if self.logits is None else {"logits": self.logits}
        data = save_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()})
        storage.write_bytes(storage.join(folder, FILE), data)

    @staticmethod
    def read(folder: str) -> TestPredictions | None:
        """The predictions in a refit's folder; None without them. Raises ImbvlmError for a damaged file."""
        uri = storage.join(folder, FILE)
        if not storage.exists(uri):
            return None
        try:
            tensors = load_safetensors(storage.read_bytes(uri))
        except SafetensorError as error:
            raise ImbvlmError(f"{uri} is damaged ({error}). Remove it to go on without its predictions.") from None
        predicted = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        return TestPredictions(tensors["labels"], tensors["rows"], predicted, tensors.get("logits"))

    def correct(self, split: str) -> Tensor:
        """Which rows (N,) are predicted correctly, as trained where there is no adjustment."""
        return self.predicted.get(split, self.predicted[TEST]) == self.labels

    def has_rows_of(self, other: TestPredictions) -> bool:
        """Whether both are of the same images."""
        return torch.equal(self.rows, other.rows) and torch.equal(self.labels, other.labels)
