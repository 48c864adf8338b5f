"""What `--smoke` sets: what the sweep says under `smoke`, or else a few short trials of one seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imbvlm.config.method_registry import METHODS
from imbvlm.sweep.spec.search_space import ListedSpace, SearchSpace, get_dotted
from imbvlm.sweep.spec.sweep_spec import SweepSpec

NUM_TRIALS = 4
# At most so long a trial, in the unit that the sweep counts in.
LENGTHS = {"train.num_epochs": 2, "train.num_steps": 20}


def smoke_settings(spec: SweepSpec) -> Mapping[str, Any]:
    """Keys and values as `--set` takes them; raises ConfigError for a space that can't be read."""
    if spec.smoke:
        return spec.smoke
    space = spec.read_space()
    found = {"refit_seeds": spec.refit_seeds[:1], "confirm_trials": 0, **_length(spec, space)}
    if isinstance(space, ListedSpace):
        # A list of configurations is run as a whole.
        return found
    return {"num_trials": min(spec.num_trials or NUM_TRIALS, NUM_TRIALS), **found}


def _length(spec: SweepSpec, space: SearchSpace) -> dict[str, int]:
    """No longer than the sweep's own; nothing where no method of the space trains."""
    methods = {value for one in space.of("method") for value in one.values} or {spec.base.get("method")}
    if not any(method not in METHODS or METHODS[method].trains for method in methods):
        return {}
    known = {key: get_dotted(spec.base, key) for key in LENGTHS}
    used = [key for key in LENGTHS if isinstance(known[key], int) or space.of(key)] or ["train.num_epochs"]
    # A trial can't have both: where branches of the space differ in their unit, they are left as they are.
    if len(used) > 1:
        return {}
    own = known[used[0]]
    return {used[0]: min(LENGTHS[used[0]], own if isinstance(own, int) else LENGTHS[used[0]])}
