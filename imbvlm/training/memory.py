"""The most memory that a trial has held: of its GPU, or on a CPU of its process."""

from __future__ import annotations

from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
# Linux forgets the peak so far when it is told so.
_FORGET_PEAK = "5"


class PeakMemory:
    """Counts from when it is made: bytes of tensors on a GPU, resident bytes of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = device.type == "cuda" or _forget_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

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
