"""How a trial computes: its threads, its precision, and memory that runs out named with what asked for it."""

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
    """Contexts for a trial of `num_classes` on `num_workers`; `train` is None for a method without training.

    `is_decoder` where it trains one on stored tokens.

    It knows nothing of the run itself, whose parts hold it: a run that is part of a circle would keep its tensors, and
    validation features with them, until Python looks for circles, hundreds of trials later.
    """

    train: TrainConfig | None
    device: torch.device
    num_workers: int
    num_classes: int
    is_decoder: bool
    # A decoder's configuration, and the number and width of an image's tokens.
    decoder: DecoderConfig | None = None
    num_tokens: int = 0
    token_width: int = 0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Where modules run without gradients."""
        with self.working(), self.autocast():
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Where the trial computes anything; raises ImbvlmError where memory runs out."""
        with self._threads(), self._explained_memory():
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of its modules."""
        precision = "float32" if self.train is None else self.train.precision
        wanted = self._pays() if precision == "auto" else precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def _pays(self) -> bool:
        """Whether the device has instructions for bfloat16, and the trial is faster by them.

        On a CPU that is a decoder alone: what is frozen in a tower would be converted at each use.
        """
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return self.device.type == "cpu" and self.is_decoder and torch.cpu._is_avx512_bf16_supported()

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """train.num_threads while this trial computes, the process's own number again afterwards."""
        wanted = None if self.train is None else self.train.num_threads
        before = torch.get_num_threads()
        if wanted is None or wanted == before:
            yield
            return
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def _explained_memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            # On a GPU an error of its own; torch's allocator on CPUs has only these sentences.
            its_own = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not its_own and not any(sign in str(error) for sign in _CPU_SIGNS):
                raise
            cause = (str(error) or "Python's allocator").splitlines()[0]
            raise ImbvlmError(f"out of memory with {self._sizes()}: {cause} {self._fix()}") from None

    def _fix(self) -> str:
        """The fix by what takes most of the memory: a decoder's weights, or the batch's activations."""
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
# Linux forgets the peak so far when it is told so.
_FORGET_PEAK = "5"


class PeakMemory:
    """The peak since its start: bytes of tensors on a GPU, resident bytes of the process on a CPU."""

    def __init__(self, device: torch.device, *, is_counted: bool) -> None:
        self._device, self._counts = device, is_counted

    @staticmethod
    def start(device: torch.device) -> PeakMemory:
        """Reset the peak and count from now on."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return PeakMemory(device, is_counted=True)
        return PeakMemory(device, is_counted=_forget_peak())

    def bytes(self) -> int | None:
        """The peak so far; None where the system doesn't tell it."""
        if not self._counts:
            return None
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident_peak()


def _forget_peak() -> bool:
    try:
        (_PROCESS / "clear_refs").write_text(_FORGET_PEAK)
    except OSError:
        return False
    return _resident_peak() is not None


def _resident_peak() -> int | None:
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
