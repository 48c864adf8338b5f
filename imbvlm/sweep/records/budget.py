"""The budget of a sweep: trials, hours and money, counted over all its resumptions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, Problem
from imbvlm.base.formatting import duration
from imbvlm.base.json_file import read_json
from imbvlm.sweep.spec.sweep_spec import SweepSpec

SPENT_FILE = "spent.json"
Phase = Literal["start", "features", "trials", "refits"]
SAVE_AFTER_SECONDS = 20.0


@dataclass(frozen=True)
class UsedBudget:
    """Seconds of the driver, in total and by phase, of all GPUs and of all machines of its cluster."""

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    machine_seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def from_dict(data: Any) -> UsedBudget:
        """Read the content of spent.json; raises the error of a missing or malformed value."""
        phases = {str(phase): float(seconds) for phase, seconds in data["phases"].items()}
        return UsedBudget(float(data["seconds"]), float(data["gpu_seconds"]), float(data["machine_seconds"]), phases)

    def later(self, seconds: float, num_gpus: float, num_machines: int) -> UsedBudget:
        """The used budget after further seconds on a number of GPUs and machines."""
        return UsedBudget(
            self.seconds + seconds,
            self.gpu_seconds + seconds * num_gpus,
            self.machine_seconds + seconds * num_machines,
            self.phases,
        )

    def in_phase(self, phase: Phase, seconds: float) -> UsedBudget:
        """The used budget with further seconds attributed to a phase."""
        return replace(self, phases={**self.phases, phase: self.phases.get(phase, 0.0) + seconds})

    def cost(self, spec: SweepSpec) -> float | None:
        """The cost at the prices of a spec; None without a price."""
        if spec.price_per_machine_hour is not None:
            return spec.price_per_machine_hour * self.machine_seconds / 3600
        return None if spec.price_per_gpu_hour is None else spec.price_per_gpu_hour * self.gpu_seconds / 3600


def cost_of_an_hour(spec: SweepSpec, num_gpus: float, num_machines: int) -> float | None:
    """The cost of an hour on a number of GPUs and machines; None without a price in the spec."""
    return UsedBudget().later(3600, num_gpus, num_machines).cost(spec)


class Budget:
    """Time and money that a sweep has used, kept in its folder, and the limits of its spec.

    Time is the driver's, until the test split is scored. Money pays for all GPUs or machines of the cluster in that
    time.
    """

    def __init__(
        self, spec: SweepSpec, uri: str, before: UsedBudget, num_gpus: float, num_machines: int, started: float
    ) -> None:
        self._spec, self._uri, self._before = spec, uri, before
        self._num_gpus, self._num_machines = num_gpus, num_machines
        self._started = self._entered = started
        self._saved = time.monotonic()
        self._phase: Phase = "start"
        # The sweep's estimates of what follows its search, which count against the limits too: scores over folds,
        # refits, and the test split's features.
        self.confirm_seconds = 0.0
        self.refit_seconds = 0.0
        self.test_feature_seconds = 0.0

    @staticmethod
    def open(
        spec: SweepSpec, folder: str, num_gpus: float, num_machines: int = 1, started: float | None = None
    ) -> Budget:
        """Read what is used and count from `started` on (monotonic clock, default: now).

        Raises ConfigError if max_cost has no price.
        """
        if spec.max_cost is not None and not cost_of_an_hour(spec, num_gpus, num_machines):
            message = (
                "max_cost counts GPU-hours at price_per_gpu_hour, and this cluster has no GPU. Set "
                "price_per_machine_hour instead."
            )
            raise ConfigError([Problem(message, spec.where("max_cost"))])
        started = time.monotonic() if started is None else started
        return Budget(spec, storage.join(folder, SPENT_FILE), read_spent(folder), num_gpus, num_machines, started)

    @property
    def is_limited(self) -> bool:
        """Whether time or money is limited."""
        return self._spec.max_hours is not None or self._spec.max_cost is not None

    @property
    def seconds(self) -> float:
        """Seconds used so far, earlier runs included."""
        return self._spent().seconds

    @property
    def cost(self) -> float | None:
        """Cost so far, earlier runs included; None without a price."""
        return self._spent().cost(self._spec)

    def enter(self, phase: Phase) -> None:
        """Attribute the time from now on to another phase."""
        now = time.monotonic()
        self._before = self._before.in_phase(self._phase, now - self._entered)
        self._entered, self._phase = now, phase

    def _spent(self, more_seconds: float = 0.0) -> UsedBudget:
        seconds = time.monotonic() - self._started + more_seconds
        return self._before.later(seconds, self._num_gpus, self._num_machines)

    def exhausted(self, *, keep_for_refits: bool = False) -> str | None:
        """The limit on time or money that is used up, such as `max_hours 8`; None if there is budget left."""
        reserved = self.confirm_seconds + self.refit_seconds + self.test_feature_seconds if keep_for_refits else 0.0
        spec, spent = self._spec, self._spent(reserved)
        if spec.max_hours is not None and spent.seconds >= 3600 * spec.max_hours:
            return f"max_hours {spec.max_hours:g}"
        if spec.max_cost is not None and (spent.cost(spec) or 0.0) >= spec.max_cost:
            return f"max_cost {spec.max_cost:g}"
        return None

    def trials_exhausted(self, num_started: int) -> str | None:
        """`max_trials N` if the search has started all trials that the limit allows, else None."""
        max_trials = self._spec.max_trials
        return f"max_trials {max_trials}" if max_trials is not None and num_started >= max_trials else None

    def describe(self) -> str:
        """Used and allowed time and money in a few words; empty without limits on them."""
        spec, parts = self._spec, []
        if spec.max_hours is not None:
            parts.append(f"{duration(self.seconds)} of {duration(3600 * spec.max_hours)}")
        if spec.max_cost is not None:
            parts.append(f"{self.cost or 0.0:.2f} of {spec.max_cost:g}")
        return ", ".join(parts)

    def keep(self, *, now: bool = False) -> None:
        """Write spent.json, at most once per SAVE_AFTER_SECONDS unless `now`: a crash loses no more than that."""
        if not now and time.monotonic() - self._saved < SAVE_AFTER_SECONDS:
            return
        self._saved = time.monotonic()
        spent = self._spent().in_phase(self._phase, self._saved - self._entered)
        storage.write_json(self._uri, asdict(spent))


def read_spent(folder: str) -> UsedBudget:
    """The used budget in a sweep's folder, zero without spent.json; raises ImbvlmError for a damaged file."""
    uri, fix = storage.join(folder, SPENT_FILE), "Remove it to count from zero."
    return read_json(uri, UsedBudget.from_dict, fix) or UsedBudget()
