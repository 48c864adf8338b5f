"""What a sweep may use: trials, hours and money, counted over all its resumptions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, ImbvlmError, Problem
from imbvlm.base.formatting import duration
from imbvlm.sweep.spec.sweep_spec import SweepSpec

SPENT_FILE = "spent.json"
Phase = Literal["start", "features", "trials", "refits"]
SAVE_AFTER_SECONDS = 20.0


@dataclass(frozen=True)
class UsedBudget:
    """Seconds of the driver, of all GPUs and of all machines of its cluster; the driver's by phase, too."""

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    machine_seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)

    def later(self, seconds: float, num_gpus: float, num_machines: int) -> UsedBudget:
        """After so many seconds more on so many GPUs and machines."""
        return UsedBudget(
            self.seconds + seconds,
            self.gpu_seconds + seconds * num_gpus,
            self.machine_seconds + seconds * num_machines,
            self.phases,
        )

    def in_phase(self, phase: Phase, seconds: float) -> UsedBudget:
        """With so many of its seconds in a phase."""
        return replace(self, phases={**self.phases, phase: self.phases.get(phase, 0.0) + seconds})

    def cost(self, spec: SweepSpec) -> float | None:
        """At the prices of a spec; None without one."""
        if spec.price_per_machine_hour is not None:
            return spec.price_per_machine_hour * self.machine_seconds / 3600
        return None if spec.price_per_gpu_hour is None else spec.price_per_gpu_hour * self.gpu_seconds / 3600


def cost_of_an_hour(spec: SweepSpec, num_gpus: float, num_machines: int) -> float | None:
    """Of so many GPUs and machines, at the prices of a spec; None without one."""
    return UsedBudget().later(3600, num_gpus, num_machines).cost(spec)


class Budget:
    """Time and money that a sweep has used, kept in its folder, against the limits of its spec.

    Time is that of the driver, until the test split was scored; money is for all GPUs or machines of the cluster in
    that time.
    """

    def __init__(
        self, spec: SweepSpec, folder: str, num_gpus: float, num_machines: int = 1, started: float | None = None
    ) -> None:
        """`started` is when it began, by the monotonic clock; now without. Raises ConfigError where nothing costs."""
        if spec.max_cost is not None and not cost_of_an_hour(spec, num_gpus, num_machines):
            message = (
                "max_cost counts GPU-hours at price_per_gpu_hour, and this cluster has no GPU; set "
                "price_per_machine_hour in its place"
            )
            raise ConfigError([Problem(message, spec.where("max_cost"))])
        self._spec, self._uri = spec, storage.join(folder, SPENT_FILE)
        self._num_gpus, self._num_machines = num_gpus, num_machines
        self._before = read_spent(folder)
        self._saved = time.monotonic()
        self._started = self._entered = self._saved if started is None else started
        self._phase: Phase = "start"
        # Told by whoever knows how long the refits and the test split's features will take: they are limited, too.
        self.refit_seconds = 0.0
        self.test_feature_seconds = 0.0

    @property
    def is_limited(self) -> bool:
        """Whether time or money is."""
        return self._spec.max_hours is not None or self._spec.max_cost is not None

    @property
    def seconds(self) -> float:
        """Used so far, earlier runs included."""
        return self._spent().seconds

    @property
    def cost(self) -> float | None:
        """None without a price."""
        return self._spent().cost(self._spec)

    def enter(self, phase: Phase) -> None:
        """From now on time goes to another phase."""
        now = time.monotonic()
        self._before = self._before.in_phase(self._phase, now - self._entered)
        self._entered, self._phase = now, phase

    def _spent(self, more_seconds: float = 0.0) -> UsedBudget:
        seconds = time.monotonic() - self._started + more_seconds
        return self._before.later(seconds, self._num_gpus, self._num_machines)

    def exhausted(self, *, keep_for_refits: bool = False) -> str | None:
        """Which limit on time or money is used up, with its value; None while there is some left."""
        kept = self.refit_seconds + self.test_feature_seconds if keep_for_refits else 0.0
        spec, spent = self._spec, self._spent(kept)
        if spec.max_hours is not None and spent.seconds >= 3600 * spec.max_hours:
            return f"max_hours {spec.max_hours:g}"
        if spec.max_cost is not None and (spent.cost(spec) or 0.0) >= spec.max_cost:
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
        spent = self._spent().in_phase(self._phase, self._saved - self._entered)
        storage.write_bytes(self._uri, json.dumps(asdict(spent)).encode())


def read_spent(folder: str) -> UsedBudget:
    """What a sweep's folder says is used, nothing without a word of it; raises ImbvlmError for a damaged file."""
    uri = storage.join(folder, SPENT_FILE)
    if not storage.exists(uri):
        return UsedBudget()
    try:
        found = json.loads(storage.read_bytes(uri))
        phases = {str(phase): float(seconds) for phase, seconds in found["phases"].items()}
        return UsedBudget(float(found["seconds"]), float(found["gpu_seconds"]), float(found["machine_seconds"]), phases)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImbvlmError(f"{uri} is damaged ({error}); remove it to count from nothing") from None
