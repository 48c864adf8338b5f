"""What earlier sweeps tell a new one's sampler: their trials that the new space contains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imbvlm.data.manifest import absolute_manifest
from imbvlm.errors import ConfigError
from imbvlm.sweep.listing import read_spec
from imbvlm.sweep.manifest_path import with_located_manifest
from imbvlm.sweep.results import TrialLog, TrialRecord
from imbvlm.sweep.space import NEVER_SET, Draw, SearchSpace, is_active, value_in
from imbvlm.sweep.spec import SweepSpec


@dataclass(frozen=True)
class WarmTrial:
    """An ended trial of an earlier sweep as a draw of the new space."""

    draw: Draw
    record: TrialRecord


@dataclass(frozen=True)
class WarmStart:
    """The trials of one earlier sweep that are told, of how many with a result, and its data where that was another."""

    folder: str
    trials: tuple[WarmTrial, ...]
    num_ended: int
    other_manifest: str | None

    def describe(self) -> str:
        """A sentence on what the search begins with."""
        text = f"warm start: {len(self.trials)} of {self.num_ended} trials of {self.folder} lie in this space"
        if self.other_manifest is not None:
            text += f"; they are of other data ({self.other_manifest}), so that they guide the search only roughly"
        return text


def warm_starts(spec: SweepSpec, space: SearchSpace) -> list[WarmStart]:
    """What each sweep of `warm_start` has to tell; raises ImbvlmError where one isn't a sweep's folder."""
    return [_warm_start(spec, space, folder) for folder in spec.warm_start]


def _warm_start(spec: SweepSpec, space: SearchSpace, folder: str) -> WarmStart:
    before = str(with_located_manifest(read_spec(folder), folder).base["data"]["manifest"])
    ended = [one for one in TrialLog.read(folder).of("search") if one.best_value(spec.best_objective) is not None]
    found = [WarmTrial(draw, one) for one in ended if (draw := _draw_of(one, spec, space)) is not None]
    is_same = absolute_manifest(before) == absolute_manifest(str(spec.base["data"]["manifest"]))
    return WarmStart(folder, tuple(found), len(ended), None if is_same else before)


def _draw_of(record: TrialRecord, spec: SweepSpec, space: SearchSpace) -> Draw | None:
    """The draw of this space with a trial's values, also of keys that its own sweep had fixed; None without one."""
    drawn: Draw = {}
    for parameter in space.parameters:
        if is_active(parameter, drawn, spec.base):
            value = value_in(record.config, parameter.key)
            if value is NEVER_SET or not parameter.contains(value):
                return None
            drawn[parameter.key] = value
    try:
        method = spec.trial(drawn).method
    except ConfigError:
        return None
    return drawn if method == record.config["method"] else None


def told(starts: Sequence[WarmStart]) -> list[WarmTrial]:
    """All of them."""
    return [trial for start in starts for trial in start.trials]
