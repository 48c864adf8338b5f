"""Batches on their way to the device: stored features or fresh crops, read ahead while one is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.data.image_stream import ImageBatch, ImageRows, ImageStream, StreamPlan
from imbvlm.data.images.augmentation import Augmentation
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.features.shard_file import as_tensor
from imbvlm.features.trial_data import RowSource, StoredRows
from imbvlm.longtail.class_sampling import EpochPlan
from imbvlm.longtail.worker_group import WorkerGroup
from imbvlm.training.step.batch_mixing import FeatureTransfer

Index = npt.NDArray[np.int64]

# Batches gathered ahead of the one in use.
READ_AHEAD = 2
# Limits on the evaluation features that the members of a pack cache in half precision, in main memory and on a GPU that
# others share. The pooled outputs of 50,000 images are 100 MB.
CACHED_BYTES, ON_DEVICE_BYTES = 512 * 2**20, 128 * 2**20


class Batch(NamedTuple):
    """A model's inputs (K, ...) in their stored precision, labels (K,), and indices (K,) of the examples."""

    inputs: Tensor
    labels: Tensor
    examples: Index


class BatchSource(Protocol):
    """A trial's batches, in main memory or cached on the device; closing an iterator ends its threads."""

    @property
    def numbers_per_example(self) -> int:
        """Numbers in one example's input."""

    @property
    def unreadable(self) -> dict[int, str]:
        """Reasons of the images that were left out so far, by their rows in the manifest."""

    def count_unreadable(self, workers: WorkerGroup) -> int:
        """Number of images that any worker has left out so far; every worker must call it."""

    def train(self, source: RowSource, plan: EpochPlan, shares: Sequence[Index], epoch: int) -> Iterator[Batch]:
        """The batches at positions (B,) of an epoch's plan."""

    def evaluate(self, source: RowSource, chunks: Sequence[Index], view: int | None = None) -> Iterator[Batch]:
        """Examples (B,) in order, as their evaluation crops or in another view."""


class StoredFeatureSource:
    """Reads stored outputs of the encoder; `transfer` changes those for training."""

    def __init__(
        self,
        info: EncoderInfo,
        output: OutputName,
        device: torch.device,
        transfer: FeatureTransfer | None = None,
    ) -> None:
        self._output, self._device, self._transfer = output, device, transfer
        self.numbers_per_example = int(np.prod(info.shapes[output]))
        self.unreadable: dict[int, str] = {}

    def count_unreadable(self, workers: WorkerGroup) -> int:
        return 0

    def train(self, source: RowSource, plan: EpochPlan, shares: Sequence[Index], epoch: int) -> Iterator[Batch]:
        def load(share: Index) -> Batch:
            batch = self._load(source, plan.rows[share], plan.views[share])
            if self._transfer is not None:
                self._transfer.add_to(batch.inputs, self._output, batch.examples, share, epoch)
            return batch

        return read_ahead(load, shares)

    def evaluate(self, source: RowSource, chunks: Sequence[Index], view: int | None = None) -> Iterator[Batch]:
        return read_ahead(
            lambda chunk: self._load(source, chunk, None if view is None else np.full_like(chunk, view)), chunks
        )

    def _load(self, source: RowSource, examples: Index, views: Index | None) -> Batch:
        assert isinstance(source, StoredRows), "a trial on stored features opens stored examples"
        inputs = source.batch(self._output, examples, views, self._device.type == "cuda")
        return _batch(inputs, source, examples, self._device)


class CachedFeatureSource(StoredFeatureSource):
    """Caches the evaluation features that were read last, on the device if they are few, for a pack's members."""

    def __init__(self, info: EncoderInfo, output: OutputName, device: torch.device) -> None:
        super().__init__(info, output, device)
        self._cached: tuple[RowSource, int, list[Batch]] | None = None

    def evaluate(self, source: RowSource, chunks: Sequence[Index], view: int | None = None) -> Iterator[Batch]:
        num_bytes = 2 * self.numbers_per_example * sum(map(len, chunks))
        if view is not None or num_bytes > CACHED_BYTES:
            return super().evaluate(source, chunks, view)
        if self._cached is None or self._cached[0] is not source or self._cached[1] != len(chunks):
            device = self._device if num_bytes <= ON_DEVICE_BYTES else torch.device("cpu")
            # In the stored precision, since widening half precision on the device takes no time.
            batches = [
                Batch(
                    batch.inputs.to(device, non_blocking=True),
                    batch.labels.to(device, non_blocking=True),
                    batch.examples,
                )
                for batch in super().evaluate(source, chunks)
            ]
            self._cached = (source, len(chunks), batches)
        return iter(self._cached[2])


class ImageSource:
    """Reads images through a stream, with new training crops in every epoch.

    Unreadable images are left out of their batches, or with `strict` raise ImbvlmError.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        augmentation: Augmentation,
        seed: int,
        num_epochs: int,
        stream: ImageStream,
        device: torch.device,
        *,
        strict: bool,
        expand: int = 0,
    ) -> None:
        # Test-time ensembling evaluates the five crops as views.
        self._five_crop = preprocess.five_crop(expand)
        self._preprocess, self._augmentation = preprocess, augmentation
        self._seed, self._num_epochs = seed, num_epochs
        self._stream, self._device, self._strict = stream, device, strict
        self.numbers_per_example = 3 * preprocess.image_size**2
        self.unreadable: dict[int, str] = {}

    def count_unreadable(self, workers: WorkerGroup) -> int:
        """As the protocol's; several workers may read the same image, whose row counts once."""
        rows = torch.tensor(sorted(self.unreadable), dtype=torch.int64)
        length = int(workers.max(torch.tensor([int(rows[-1]) + 1 if len(rows) else 0]))[0])
        if not length:
            return 0
        return int(workers.max(torch.zeros(length, dtype=torch.int64).index_fill_(0, rows, 1)).sum())

    def train(self, source: RowSource, plan: EpochPlan, shares: Sequence[Index], epoch: int) -> Iterator[Batch]:
        """As the protocol's; the crop at a position of an epoch is the same on every worker."""
        progress = min(1.0, epoch / max(1, self._num_epochs - 1))
        return self._read(
            source,
            plan.rows,
            StreamPlan(plan.rows, shares, self._preprocess, self._augmentation, self._seed, epoch, progress),
        )

    def evaluate(self, source: RowSource, chunks: Sequence[Index], view: int | None = None) -> Iterator[Batch]:
        """As the protocol's; a `view` is one of the five crops of test-time ensembling."""
        examples = np.arange(len(source))
        preprocess = self._preprocess if view is None else self._five_crop
        plan = StreamPlan(examples, chunks, preprocess, None, self._seed, 0, view=view or 0)
        return self._read(source, examples, plan)

    def _read(self, source: RowSource, examples: Index, plan: StreamPlan) -> Iterator[Batch]:
        """The batches of a plan whose rows are these examples (N,) of the source."""
        assert isinstance(source, ImageRows), "a trial on images opens rows of the manifest"
        plan, shares = replace(plan, rows=source.manifest_rows[examples]), plan.batches
        num_read = 0
        for share, batch in zip(shares, self._stream(source.manifest, plan), strict=True):
            self._note(batch)
            num_read += int(batch.ok.sum())
            images = as_tensor(batch.images if batch.ok.all() else batch.images[batch.ok])
            yield _batch(images, source, examples[share][batch.ok], self._device)
        if not num_read and any(len(share) for share in shares):
            row, reason = next(iter(self.unreadable.items()))
            raise ImbvlmError(
                f"no image of {source.manifest} could be read. The first (row {row}): {reason}. Move the images back, "
                "or build the manifest again where they lie now."
            )

    def _note(self, batch: ImageBatch) -> None:
        for row, reason in zip(batch.rows.tolist(), batch.reasons, strict=True):
            if reason is not None and self._strict:
                raise ImbvlmError(
                    f"the image in row {row} of the manifest can't be used: {reason}. data.on_bad_image is strict. "
                    "Set it to quarantine to leave such images out."
                )
            if reason is not None:
                self.unreadable[row] = reason


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and labels on the device, where half precision is widened to float32 after the copy."""
    inputs = batch.inputs.to(device, non_blocking=True)
    return inputs.float() if inputs.is_floating_point() else inputs, batch.labels.to(device, non_blocking=True)


def read_ahead(load: Callable[[Index], Batch], shares: Sequence[Index]) -> Iterator[Batch]:
    """load(share) for each of the shares in order; a thread loads some ahead.

    At most READ_AHEAD + 1 loaded batches exist at once. An error of `load` is raised in its turn. Closing the generator
    ends the thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        pending: deque[Future[Batch]] = deque()
        for share in shares:
            pending.append(pool.submit(load, share))
            if len(pending) > READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _batch(inputs: Tensor, source: RowSource, index: Index, device: torch.device) -> Batch:
    """A batch, in pinned memory if it goes to a GPU, so that nothing waits for the copy."""
    labels = torch.from_numpy(source.labels[index])
    if device.type == "cuda":
        return Batch(inputs.pin_memory(), labels.pin_memory(), index)
    return Batch(inputs, labels, index)
