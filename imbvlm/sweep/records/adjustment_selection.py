"""Adjustments after training, selected on validation: logit adjustment, mixed-in zero-shot logits, calibration."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import percent, size_text
from imbvlm.base.json_file import read_json
from imbvlm.config.method_registry import METHODS
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
from imbvlm.sweep.records.difference import POST_HOC, TEST
from imbvlm.sweep.records.refit_selection import Refit, refits
from imbvlm.sweep.records.summary_tables import NUM_BEST
from imbvlm.sweep.records.trial_log import ENDED, TrialLog, TrialRecord, last_values
from imbvlm.sweep.spec.baselines import baselines, feature_key
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.training.validation_logits import SavedValLogits, read_logits

LOGITS_FOLDER = "logits"
POST_HOC_FILE = "post_hoc.json"


@dataclass(frozen=True)
class AdjustmentSelection:
    """The adjustments of a configuration's logits that validation supports, with all candidates.

    `adjustment` keeps a value neutral if its gain is within its standard error, and the temperature if the rows don't
    support it. `alpha` is None without zero-shot logits of the same rows. `plain_error` is the expected calibration
    error of the model's own logits; `num_rows` is the number of validation rows.
    """

    metric: str
    tau: ValueSelection
    alpha: ValueSelection | None
    calibration: TemperatureFit
    plain_error: float
    num_rows: int

    @property
    def adjustment(self) -> PostHocAdjustment:
        """The accepted adjustment."""
        alpha = 0.0 if self.alpha is None else self.alpha.accepted
        return PostHocAdjustment(self.tau.accepted, alpha, self.calibration.accepted)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for post_hoc.json."""
        return {
            "metric": self.metric,
            "tau": self.tau.to_dict(),
            "alpha": None if self.alpha is None else self.alpha.to_dict(),
            "calibration": asdict(self.calibration),
            "plain_error": self.plain_error,
            "num_rows": self.num_rows,
            "adjustment": asdict(self.adjustment),
        }


def logits_file(folder: str, trial_id: str) -> str:
    """Location of the validation logits of a sweep's trial."""
    return storage.join(folder, LOGITS_FOLDER, f"{trial_id}.safetensors")


def trials_to_choose_from(log: TrialLog, spec: SweepSpec) -> set[str]:
    """Ids of the trials whose validation logits `select_adjustments` may still read, now or after others have ended.

    These are the baselines, the trials that would be refitted now, and the best few: further seeds may change their
    order, and `export --top` reads them. A trial that falls behind them stays behind, because no other trial's end
    changes its value.
    """
    best = log.best(spec.objective)
    needed = [*log.of("baseline"), *best[:NUM_BEST], *log.ranked(spec.objective)[: spec.confirm_trials]]
    needed += [refit.record for refit in refits(log, spec)] if best else []
    return {record.trial_id for record in needed}


def max_logit_files(sweep: ResolvedSweep, num_running: int) -> int:
    """The maximum number of files of validation logits at one time while `num_running` trials run."""
    spec = sweep.spec
    num_methods = len(set(sweep.space.values_of("method", spec.base)))
    retained = NUM_BEST + spec.confirm_trials + (num_methods if spec.fresh_crops else 0)
    num_trials = sweep.num_trials if spec.study else min(sweep.num_trials, retained + num_running)
    return len(baselines(sweep)) + num_trials


def prune_logits(folder: str, log: TrialLog, spec: SweepSpec, *, is_over: bool = False) -> None:
    """Delete the validation logits of ended trials that no selection will read.

    They are large: 133 MB for one epoch of iNaturalist's validation. `is_over` says that no trial runs, so that
    unfinished files of killed writers are deleted too.
    """
    names = storage.list_files(storage.join(folder, LOGITS_FOLDER))
    ended = [name for name in names if (record := log.records.get(_trial_of(name))) and record.state in ENDED]
    unfinished = [name for name in names if is_over and _trial_of(name) not in log.records]
    needed = trials_to_choose_from(log, spec) if ended else set()
    for name in [*unfinished, *(name for name in ended if _trial_of(name) not in needed)]:
        storage.delete(storage.join(folder, LOGITS_FOLDER, name))


def _trial_of(file_name: str) -> str:
    """The trial's id in a file's name; empty for a file that its writer has not renamed yet."""
    return file_name.partition(".")[0]


def logit_bytes(folder: str) -> int:
    """Bytes of the validation logits in a sweep's folder."""
    return sum(state.size for state in storage.file_states(storage.join(folder, LOGITS_FOLDER)).values())


def check_logits_fit(folder: str, num_bytes: int) -> None:
    """Raise ImbvlmError if the folder's disk can't hold the validation logits."""
    free = storage.free_bytes(folder)
    if free is not None and num_bytes > free:
        raise ImbvlmError(
            f"the validation logits of trials need up to {size_text(num_bytes)} at one time and {folder} has "
            f"{size_text(free)} free. Lower max_concurrent_trials or max_pack_size, or choose a storage folder on a "
            "larger disk."
        )


def select_adjustments(
    folder: str, selected: Sequence[Refit], log: TrialLog, objective: str
) -> dict[str, AdjustmentSelection]:
    """The adjustments of each refit but zero-shot ones, by its name, selected on its trial's validation logits.

    Refits on fresh crops and trials without logits have none.
    """
    selections = {}
    for refit in selected:
        if METHODS[refit.config.method].learns and not refit.is_fresh:
            saved = read_logits(logits_file(folder, refit.record.trial_id))
            zero_shot = _zero_shot_logits(folder, refit, log)
            if saved is not None and (selection := _select(refit, saved, zero_shot, objective)) is not None:
                selections[refit.name] = selection
    return selections


def write_post_hoc(folder: str, selections: Mapping[str, AdjustmentSelection]) -> None:
    """Write post_hoc.json into a sweep's folder."""
    text = json.dumps({name: selection.to_dict() for name, selection in selections.items()}, indent=1)
    storage.write_bytes(storage.join(folder, POST_HOC_FILE), text.encode())


def read_adjustment(folder: str, name: str) -> PostHocAdjustment | None:
    """The accepted adjustment of a refit's logits, None if there was no selection; raises ImbvlmError."""

    def parse(content: Any) -> PostHocAdjustment | None:
        selection = content.get(name)
        return None if selection is None else PostHocAdjustment(**selection["adjustment"])

    fix = f"Remove it and go on with: imbvlm sweep resume {folder}"
    return read_json(storage.join(folder, POST_HOC_FILE), parse, fix)


def describe_post_hoc(name: str, selection: AdjustmentSelection, scored: Sequence[TrialRecord]) -> str:
    """Lines on a refit's adjustments: candidates, gains, calibration before and after."""
    metric, calibration = selection.metric.replace("_", " "), selection.calibration
    lines = [
        f"after training, chosen on {selection.num_rows:,} rows of validation, {name}:",
        f"  logit adjustment: {_describe_value('tau', selection.tau, metric)}",
    ]
    if selection.alpha is not None:
        lines.append(f"  zero-shot logits mixed in: {_describe_value('alpha', selection.alpha, metric)}")
    records = [record for record in scored if record.name == name]
    errors = [last_values(records, f"{split}/expected_calibration_error") for split in (TEST, POST_HOC)]
    on_test = f", on test {' to '.join(percent(statistics.fmean(values)) for values in errors)}" if all(errors) else ""
    stays = "" if calibration.objection is None else f" {calibration.objection}, so that it stays at 1"
    lines.append(
        f"  calibration: temperature {calibration.temperature:.3g}{stays}; expected calibration error (%) on "
        f"validation {percent(selection.plain_error)} to {percent(calibration.accepted_calibration_error)}{on_test}"
    )
    return "\n".join(lines)


def _describe_value(name: str, selection: ValueSelection, metric: str) -> str:
    values = [value for value, _ in selection.candidates]
    candidates = f"{name} of {len(values)} values from {min(values):g} to {max(values):g}"
    if selection.value == selection.neutral:
        return f"{candidates}: none is better than {selection.neutral:g}"
    gain = f"{name} {selection.value:g} gains {100 * selection.gain:.1f} points of {metric}"
    error = f"standard error {100 * selection.standard_error:.1f}"
    if selection.accepted == selection.value:
        return f"{candidates}: {gain} ({error})"
    return f"{candidates}: {gain}, within its {error}, so that it stays at {selection.neutral:g}"


def _zero_shot_logits(folder: str, refit: Refit, log: TrialLog) -> SavedValLogits | None:
    """The logits of the zero-shot baseline of the refit's encoder; None if the encoder itself was trained."""
    if METHODS[refit.config.method].trains_encoder:
        return None
    of_encoder = (
        record
        for record in log.of("baseline")
        if not METHODS[record.config["method"]].learns
        and feature_key(record.trial_config()) == feature_key(refit.config)
    )
    record = next(of_encoder, None)
    return None if record is None else read_logits(logits_file(folder, record.trial_id))


def _select(
    refit: Refit, saved: SavedValLogits, zero_shot: SavedValLogits | None, objective: str
) -> AdjustmentSelection | None:
    """Select on the logits of the epoch where a refit ends: a baseline's best epoch, a finished trial's last one."""
    logits = saved.best() if refit.record.kind == "baseline" or saved.last() is None else saved.last()
    if logits is None:
        return None
    other = None if zero_shot is None or not torch.equal(zero_shot.targets, saved.targets) else zero_shot.best()
    seen = ~logits.isnan().any(dim=1)
    if other is not None:
        seen &= ~other.isnan().any(dim=1)
    if not seen.any():
        return None
    logits, targets, metric = logits[seen].float(), saved.targets[seen], objective.removeprefix("val/")
    weights = accuracy_weights(metric, targets, saved.stats)
    counts = torch.from_numpy(saved.stats.counts)
    tau = select_tau(logits, targets, counts, weights=weights)
    mixed = None if other is None else other[seen].float()
    adjusted = PostHocAdjustment(tau=tau.accepted).apply(logits, counts)
    alpha = None if mixed is None else select_alpha(adjusted, mixed, targets, weights=weights)
    if mixed is not None and alpha is not None and alpha.accepted:
        adjusted = PostHocAdjustment(alpha=alpha.accepted).apply(adjusted, counts, mixed)
    plain = calibration_error(logits, targets)
    return AdjustmentSelection(metric, tau, alpha, fit_temperature(adjusted, targets), plain, len(targets))
