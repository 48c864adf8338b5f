"""What is adjusted after training, chosen on validation: logit adjustment, zero-shot logits mixed in, calibration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import percent, size_text
from imbvlm.longtail.post_hoc_adjustment import (
    PostHocAdjustment,
    TemperatureFit,
    ValueSelection,
    accuracy_weights,
    calibration_error,
    fit_temperature,
    select_alpha,
    select_tau,
)
from imbvlm.models.model_builder import METHODS
from imbvlm.sweep.records.refit_selection import Refit, refits
from imbvlm.sweep.records.summary_tables import NUM_BEST
from imbvlm.sweep.records.trial_log import ENDED, TrialLog, TrialRecord
from imbvlm.sweep.spec.baselines import baselines, feature_key
from imbvlm.sweep.spec.search_space import SearchSpace
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.validation_logits import SavedValLogits, read_logits

LOGITS_FOLDER = "logits"
POST_HOC_FILE = "post_hoc.json"


@dataclass(frozen=True)
class AdjustmentSelection:
    """What validation says about adjusting a configuration's logits, with all that was tried.

    `adjustment` has what was shown to help: a choice whose gain is within its standard error is left at neutral, and so
    is a temperature that the rows don't support. `alpha` is None where there are no zero-shot logits of the same rows;
    `plain_error` is the expected calibration error of the model's own logits, `num_rows` how many rows chose.
    """

    metric: str
    tau: ValueSelection
    alpha: ValueSelection | None
    calibration: TemperatureFit
    plain_error: float
    num_rows: int

    @property
    def adjustment(self) -> PostHocAdjustment:
        """What is done to the logits."""
        alpha = 0.0 if self.alpha is None else self.alpha.accepted
        return PostHocAdjustment(self.tau.accepted, alpha, self.calibration.accepted)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "metric": self.metric,
            "tau": asdict(self.tau),
            "alpha": None if self.alpha is None else asdict(self.alpha),
            "calibration": asdict(self.calibration),
            "plain_error": self.plain_error,
            "num_rows": self.num_rows,
            "adjustment": asdict(self.adjustment),
        }


def logits_file(folder: str, trial_id: str) -> str:
    """Where a trial of a sweep keeps its validation logits."""
    return storage.join(folder, LOGITS_FOLDER, f"{trial_id}.safetensors")


def trials_to_choose_from(log: TrialLog, spec: SweepSpec) -> set[str]:
    """Ids of the trials whose validation logits `select_adjustments` may still read, now or when others have ended.

    Those are the baselines, what would be refitted by now, and the best few, which further seeds may put in another
    order and `export --top` asks for. A trial that falls behind them stays behind: no other trial's end changes its
    value.
    """
    best = log.best(spec.objective)
    needed = [*log.of("baseline"), *best[:NUM_BEST], *log.ranked(spec.objective)[: spec.confirm_trials]]
    needed += [refit.record for refit in refits(log, spec)] if best else []
    return {record.trial_id for record in needed}


def max_logit_files(spec: SweepSpec, space: SearchSpace, num_running: int) -> int:
    """How many trials' validation logits exist at one time, at most, while so many trials run."""
    methods = {value for parameter in space.parameters if parameter.key == "method" for value in parameter.values}
    retained = NUM_BEST + spec.confirm_trials + (max(1, len(methods)) if spec.fresh_crops else 0)
    num_trials = spec.num_trials if spec.study else min(spec.num_trials, retained + num_running)
    return len(baselines(spec, space)) + num_trials


def prune_logits(folder: str, log: TrialLog, spec: SweepSpec, *, is_over: bool = False) -> None:
    """Delete the validation logits of ended trials from which nothing will be chosen; a trial that goes on has its own.

    They are large: 133 MB for one epoch of iNaturalist's validation. `is_over` says that no trial runs: what killed
    writers have left goes, too.
    """
    names = storage.list_files(storage.join(folder, LOGITS_FOLDER))
    ended = [name for name in names if (record := log.records.get(_trial_of(name))) and record.state in ENDED]
    unfinished = [name for name in names if is_over and _trial_of(name) not in log.records]
    needed = trials_to_choose_from(log, spec) if ended else set()
    for name in [*unfinished, *(name for name in ended if _trial_of(name) not in needed)]:
        storage.delete(storage.join(folder, LOGITS_FOLDER, name))


def _trial_of(file_name: str) -> str:
    """Empty for a file that its writer has not renamed yet."""
    return file_name.partition(".")[0]


def logit_bytes(folder: str) -> int:
    """Bytes of the validation logits in a sweep's folder."""
    return sum(state.size for state in storage.file_states(storage.join(folder, LOGITS_FOLDER)).values())


def check_logits_fit(folder: str, num_bytes: int) -> None:
    """Refuse a sweep whose validation logits its folder's disk can't hold; raises ImbvlmError."""
    free = storage.free_bytes(folder)
    if free is not None and num_bytes > free:
        raise ImbvlmError(
            f"the validation logits of trials need up to {size_text(num_bytes)} at one time and {folder} has "
            f"{size_text(free)} free; lower max_concurrent_trials or max_pack_size, or choose a storage folder on a "
            "larger disk"
        )


def select_adjustments(
    folder: str, refits: Sequence[Refit], log: TrialLog, objective: str
) -> dict[str, AdjustmentSelection]:
    """For each refit that trains, by name, what its search's validation logits say.

    Absent are those whose trial left no logits, and those on fresh crops.
    """
    found = {}
    for refit in refits:
        if refit.config.train is not None and not refit.is_fresh:
            kept = read_logits(logits_file(folder, refit.record.trial_id))
            zero_shot = _zero_shot_logits(folder, refit, log)
            if kept is not None and (chosen := _choose(refit, kept, zero_shot, objective)) is not None:
                found[refit.name] = chosen
    return found


def write_post_hoc(folder: str, chosen: Mapping[str, AdjustmentSelection]) -> None:
    """Write post_hoc.json into a sweep's folder."""
    text = json.dumps({name: one.to_dict() for name, one in chosen.items()}, indent=1)
    storage.write_bytes(storage.join(folder, POST_HOC_FILE), text.encode())


def read_adjustment(folder: str, name: str) -> PostHocAdjustment | None:
    """What a sweep does to the logits of a refit; None where nothing could be chosen. Raises ImbvlmError."""
    uri = storage.join(folder, POST_HOC_FILE)
    if not storage.exists(uri):
        return None
    try:
        chosen = json.loads(storage.read_bytes(uri)).get(name)
        return None if chosen is None else PostHocAdjustment(**chosen["adjustment"])
    except (ValueError, KeyError, TypeError) as error:
        mend = f"remove it and go on with: imbvlm sweep resume {folder}"
        raise ImbvlmError(f"{uri} is damaged ({error!r}); {mend}") from None


def describe_post_hoc(name: str, chosen: AdjustmentSelection, scored: Sequence[TrialRecord]) -> str:
    """Lines on a refit's adjustments: which values were tried, what they gain, calibration before and after."""
    metric, tau, alpha, calibration = chosen.metric.replace("_", " "), chosen.tau, chosen.alpha, chosen.calibration
    lines = [
        f"after training, chosen on {chosen.num_rows:,} rows of validation, {name}:",
        f"  logit adjustment: {_choice('tau', tau, metric)}",
    ]
    if alpha is not None:
        lines.append(f"  zero-shot logits mixed in: {_choice('alpha', alpha, metric)}")
    errors = [
        _mean([r.epochs[-1].get(f"{split}/expected_calibration_error") for r in scored if r.name == name and r.epochs])
        for split in ("test", "test_post_hoc")
    ]
    on_test = "" if None in errors else f", on test {percent(errors[0])} to {percent(errors[1])}"
    stays = "" if calibration.objection is None else f" {calibration.objection}, so that it stays at 1"
    lines.append(
        f"  calibration: temperature {calibration.temperature:.3g}{stays}; expected calibration error (%) on "
        f"validation {percent(chosen.plain_error)} to {percent(calibration.calibration_error_taken)}{on_test}"
    )
    return "\n".join(lines)


def _choice(name: str, choice: ValueSelection, metric: str) -> str:
    values = [value for value, _ in choice.tried]
    tried = f"{name} of {len(values)} values from {min(values):g} to {max(values):g}"
    if choice.value == choice.neutral:
        return f"{tried}: none is better than {choice.neutral:g}"
    gain = f"{name} {choice.value:g} gains {100 * choice.gain:.1f} points of {metric}"
    error = f"standard error {100 * choice.standard_error:.1f}"
    if choice.accepted == choice.value:
        return f"{tried}: {gain} ({error})"
    return f"{tried}: {gain}, within its {error}, so that it stays at {choice.neutral:g}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _zero_shot_logits(folder: str, refit: Refit, log: TrialLog) -> SavedValLogits | None:
    """Those of the zero-shot baseline of the refit's tower; none where the tower itself was trained."""
    if METHODS[refit.config.method].trains_tower:
        return None
    same = (
        one
        for one in log.of("baseline")
        if one.config["method"] == "zero_shot" and feature_key(one.trial_config()) == feature_key(refit.config)
    )
    record = next(same, None)
    return None if record is None else read_logits(logits_file(folder, record.trial_id))


def _choose(
    refit: Refit, kept: SavedValLogits, zero_shot: SavedValLogits | None, objective: str
) -> AdjustmentSelection | None:
    """By the logits of the epoch that a refit ends at: a baseline's best, the last of a trial that came to its end."""
    logits = kept.best() if refit.record.kind == "baseline" or kept.last() is None else kept.last()
    if logits is None:
        return None
    other = None if zero_shot is None or not torch.equal(zero_shot.targets, kept.targets) else zero_shot.best()
    seen = ~logits.isnan().any(dim=1)
    if other is not None:
        seen &= ~other.isnan().any(dim=1)
    if not seen.any():
        return None
    logits, targets, metric = logits[seen].float(), kept.targets[seen], objective.removeprefix("val/")
    weights = accuracy_weights(metric, targets, kept.stats)
    counts = torch.from_numpy(kept.stats.counts)
    tau = select_tau(logits, targets, counts, weights=weights)
    mixed = None if other is None else other[seen].float()
    adjusted = PostHocAdjustment(tau=tau.accepted).apply(logits, counts)
    alpha = None if mixed is None else select_alpha(adjusted, mixed, targets, weights=weights)
    if mixed is not None and alpha is not None and alpha.accepted:
        adjusted = PostHocAdjustment(alpha=alpha.accepted).apply(adjusted, counts, mixed)
    plain = calibration_error(logits, targets)
    return AdjustmentSelection(metric, tau, alpha, fit_temperature(adjusted, targets), plain, len(targets))
