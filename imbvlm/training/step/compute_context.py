"""A trial's threads and precision, and errors that name the sizes where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize, size_text
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.training_sections import TrainConfig
from imbvlm.models.decoder import num_parameters

_CPU_SIGNS = ("can't allocate memory", "Storage size calculation overflowed")


@dataclass(frozen=True)
class ComputeContext:
    """Contexts for a trial of `num_classes` on `num_workers`; `train` is None for a method that does not train.

    `is_decoder` tells that it trains a decoder on stored tokens. `decoder` is a decoder's configuration, `num_tokens`
    and `token_width` describe an image's tokens.

    Holds no reference to the run: a reference cycle would keep its tensors, and validation features, until garbage
    collection, hundreds of trials later.
    """

    train: TrainConfig | None
    device: torch.device
    num_workers: int
    num_classes: int
    is_decoder: bool
    decoder: DecoderConfig | None = None
    num_tokens: int = 0
    token_width: int = 0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """As `working`, and within, modules compute in the configured precision."""
        with self.working(), self.autocast():
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within, the trial computes with its threads; raises ImbvlmError where memory runs out."""
        with self._threads(), self._memory_errors():
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the configured precision."""
        precision = "float32" if self.train is None else self.train.precision
        is_bfloat16 = self._is_bfloat16_faster() if precision == "auto" else precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bfloat16)

    def _is_bfloat16_faster(self) -> bool:
        """Whether the device has instructions for bfloat16 that speed up this trial.

        On a CPU only a decoder gains: an encoder's frozen weights would be converted at each use.
        """
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return self.device.type == "cpu" and self.is_decoder and torch.cpu._is_avx512_bf16_supported()

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Within, torch uses train.num_threads; the process's own number is restored afterwards."""
        num_threads = None if self.train is None else self.train.num_threads
        before = torch.get_num_threads()
        if num_threads is None or num_threads == before:
            yield
            return
        torch.set_num_threads(num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            # torch has an exception for GPUs; its allocator for CPUs has only these sentences.
            is_memory_error = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not is_memory_error and not any(sign in str(error) for sign in _CPU_SIGNS):
                raise
            cause = (str(error) or "Python's allocator").splitlines()[0]
            raise ImbvlmError(f"out of memory with {self._sizes()}: {cause} {self._fix()}.") from None

    def _fix(self) -> str:
        """The fix for the largest part of the memory: a decoder's weights, or the batch's activations."""
        batch = "train.batch_size, or give the trial more workers"
        if self.decoder is None or self.train is None:
            return f"Lower {batch}"
        width = self.decoder.width or self.token_width
        # Weights, their gradients and two moments; of a token in each block about 16 activations of the width.
        num_weights = 4 * num_parameters(self.token_width, self.decoder)
        num_activations = 16 * self.train.batch_size * self.num_tokens * width * max(1, self.decoder.depth)
        if num_weights < num_activations:
            return f"Lower {batch}; or set decoder.width below {width}"
        return f"Set decoder.width below {width}, whose weights take {size_text(4 * num_weights)} in training"

    def _sizes(self) -> str:
        batch_size = "" if self.train is None else f"train.batch_size {self.train.batch_size} over "
        size = f"{pluralize(self.num_workers, 'worker')}, {pluralize(self.num_classes, 'class')}"
        return f"{batch_size}{size}, on {self.device}"


_PROCESS = Path("/proc/self")
# Value for clear_refs with which Linux resets the peak.
_RESET_PEAK = "5"


class PeakMemory:
    """Peak memory since its start: bytes of tensors on a GPU, resident bytes of the process on a CPU."""

    def __init__(self, device: torch.device, *, is_counted: bool) -> None:
        self._device, self._is_counted = device, is_counted

    @staticmethod
    def start(device: torch.device) -> PeakMemory:
        """Reset the peak and count from now on."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return PeakMemory(device, is_counted=True)
        return PeakMemory(device, is_counted=_reset_peak())

    def bytes(self) -> int | None:
        """The peak so far; None where the system doesn't report it."""
        if not self._is_counted:
            return None
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident_peak()


def _reset_peak() -> bool:
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return _resident_peak() is not None


def _resident_peak() -> int | None:
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
