"""What a sweep may use: trials, hours and money, counted over all its resumptions."""

from __future__ import annotations

import json
import time

from imbvlm import storage
from imbvlm.errors import ConfigError, ImbvlmError, Problem
from imbvlm.sweep.console import duration
from imbvlm.sweep.spec import SweepSpec

SPENT_FILE = "spent.json"
SAVE_AFTER_SECONDS = 20.0


class Budget:
    """Time and money that a sweep has used, kept in its folder, against the limits of its spec.

    Time is that of the driver, from when Ray is there to the end; money is for all GPUs of the cluster in that time.
    """

    def __init__(self, spec: SweepSpec, folder: str, num_gpus: float) -> None:
        """Raises ConfigError where money is limited and nothing costs any."""
        if spec.max_cost is not None and not num_gpus:
            message = "max_cost counts GPU-hours, and this cluster has no GPU; set max_hours instead"
            raise ConfigError([Problem(message, spec.where("max_cost"))])
        self._spec, self._uri, self._num_gpus = spec, storage.join(folder, SPENT_FILE), num_gpus
        self._seconds_before, self._gpu_seconds_before = _read(self._uri)
        self._started = self._saved = time.monotonic()
        # Told by whoever knows how long the refits will take: they are part of what is limited.
        self.refit_seconds = 0.0

    @property
    def is_limited(self) -> bool:
        """Whether time or money is."""
        return self._spec.max_hours is not None or self._spec.max_cost is not None

    @property
    def seconds(self) -> float:
        """Used so far, earlier runs included."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def gpu_hours(self) -> float:
        return (self._gpu_seconds_before + (time.monotonic() - self._started) * self._num_gpus) / 3600

    @property
    def cost(self) -> float | None:
        """None without a price."""
        price = self._spec.price_per_gpu_hour
        return None if price is None else self.gpu_hours * price

    def exhausted(self, *, keep_for_refits: bool = False) -> str | None:
        """Which limit on time or money is used up, with its value; None while there is some left."""
        kept = self.refit_seconds if keep_for_refits else 0.0
        spec, cost = self._spec, self.cost
        if spec.max_hours is not None and self.seconds + kept >= 3600 * spec.max_hours:
            return f"max_hours {spec.max_hours:g}"
        price = spec.price_per_gpu_hour or 0.0
        if spec.max_cost is not None and (cost or 0.0) + kept * self._num_gpus / 3600 * price >= spec.max_cost:
            return f"max_cost {spec.max_cost:g}"
        return None

    def trials_exhausted(self, num_started: int) -> str | None:
        """max_trials, where so many trials of the search are all that it allows."""
        most = self._spec.max_trials
        return f"max_trials {most}" if most is not None and num_started >= most else None

    def describe(self) -> str:
        """What is used of what is limited, in a few words; empty without limits on time or money."""
        spec, parts = self._spec, []
        if spec.max_hours is not None:
            parts.append(f"{duration(self.seconds)} of {duration(3600 * spec.max_hours)}")
        if spec.max_cost is not None:
            parts.append(f"{self.cost or 0.0:.2f} of {spec.max_cost:g}")
        return ", ".join(parts)

    def keep(self, *, now: bool = False) -> None:
        """Write what is used, at most so often: a crash loses no more than that."""
        if not now and time.monotonic() - self._saved < SAVE_AFTER_SECONDS:
            return
        self._saved = time.monotonic()
        used = {"seconds": self.seconds, "gpu_seconds": 3600 * self.gpu_hours}
        storage.write_bytes(self._uri, json.dumps(used).encode())


def _read(uri: str) -> tuple[float, float]:
    if not storage.exists(uri):
        return 0.0, 0.0
    try:
        found = json.loads(storage.read_bytes(uri))
        return float(found["seconds"]), float(found["gpu_seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ImbvlmError(f"{uri} is damaged ({error}); remove it to count from nothing") from None
