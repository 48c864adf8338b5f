"""Adjustments after training, selected on validation: logit adjustment, mixed-in zero-shot logits, calibration."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import percent, size_text
from imbvlm.base.json_file import read_json
from imbvlm.config.method_registry import METHODS
from imbvlm.longtail.likelihood_selection import select_by_likelihood, select_tau_by_likelihood
from imbvlm.longtail.post_hoc_adjustment import (
    ALPHAS,
    PostHocAdjustment,
    TemperatureFit,
    ValueSelection,
    accuracy_weights,
    calibration_error,
    fit_temperature,
    mix_logits,
    select_alpha,
    select_tau,
    uncalibrated_note,
)
from imbvlm.sweep.records.refit_selection import Refit, confirmed, refits
from imbvlm.sweep.records.trial_log import ENDED, TrialLog, TrialRecord, last_values, resume_fix
from imbvlm.sweep.spec.baselines import baselines, feature_key
from imbvlm.sweep.spec.sweep_spec import ResolvedSweep, SweepSpec
from imbvlm.training.test_predictions import POST_HOC, TEST
from imbvlm.training.validation_logits import SavedValLogits, read_logits

LOGITS_FOLDER = "logits"
POST_HOC_FILE = "post_hoc.json"
# The metric of adjustments that are selected by class-balanced log-likelihood.
LIKELIHOOD = "log_likelihood"
# The best trials, which tables show and whose logits stay.
NUM_BEST = 8
# Limits on the trials with the highest objectives among which the log-likelihood selects, and on their logits.
MAX_CANDIDATES, MAX_CANDIDATE_BYTES = 30, 4_000_000_000


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


def max_candidates(spec: SweepSpec, file_bytes: int) -> int:
    """How many trials the log-likelihood selects among, each with so many bytes of logits; 0 if the objective does."""
    if not spec.selects_by_likelihood:
        return 0
    limit = MAX_CANDIDATE_BYTES if spec.blend is None else int(1e9 * spec.blend.max_gigabytes)
    return min(MAX_CANDIDATES, max(NUM_BEST, limit // max(1, file_bytes)))


def trials_to_choose_from(log: TrialLog, spec: SweepSpec, file_bytes: int) -> set[str]:
    """Ids of the trials whose validation logits a selection may still read, now or after others have ended.

    These are the baselines, the trials that would be refitted now, and the best by the objective: among
    `max_candidates` of those that ran to their end the log-likelihood selects the winner, further seeds may change the
    order of the best few, and `export --top` reads them. A trial that falls behind them stays behind, because no other
    trial's end changes its value.
    """
    best, ranked = log.best(spec.objective), log.ranked(spec.objective)
    needed = [record for kind in ("baseline", "confirm", "folds", "pairs", "gap") for record in log.of(kind)]
    needed += [*best[:NUM_BEST], *ranked[: spec.confirm_trials]]
    needed += [record for record in ranked if record.state == "finished"][: max_candidates(spec, file_bytes)]
    needed += [refit.record for refit in refits(log, spec)] if best else []
    return {record.trial_id for record in needed}


def max_logit_files(sweep: ResolvedSweep, num_running: int, file_bytes: int) -> int:
    """The maximum number of files of validation logits at one time while `num_running` trials run."""
    spec = sweep.spec
    num_methods = len(set(sweep.space.values_of("method", spec.base)))
    retained = NUM_BEST + spec.confirm_trials + (num_methods if spec.fresh_crops else 0)
    retained += max_candidates(spec, file_bytes)
    num_trials = sweep.num_trials if spec.study else min(sweep.num_trials, retained + num_running)
    num_seeds = spec.confirm_trials * len(spec.more_seeds) if spec.selects_by_likelihood else 0
    return len(baselines(sweep)) + num_trials + num_seeds


def prune_logits(folder: str, log: TrialLog, spec: SweepSpec, *, is_over: bool = False) -> None:
    """Delete the validation logits of ended trials that no selection will read.

    They are large: 133 MB for one epoch of iNaturalist's validation. `is_over` says that no trial runs, so that
    unfinished files of killed writers are deleted too.
    """
    files = storage.file_states(storage.join(folder, LOGITS_FOLDER))
    ended = [name for name in files if (record := log.records.get(_trial_of(name))) and record.state in ENDED]
    unfinished = [name for name in files if is_over and _trial_of(name) not in log.records]
    largest = max((state.size for state in files.values()), default=0)
    needed = trials_to_choose_from(log, spec, largest) if ended else set()
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
    folder: str, selected: Sequence[Refit], log: TrialLog, spec: SweepSpec
) -> dict[str, AdjustmentSelection]:
    """The adjustments of each refit but zero-shot ones, by its name, selected on its trial's validation logits.

    Refits on fresh crops and trials without logits have none.
    """
    selections, runs = {}, confirmed(log, spec)
    for refit in selected:
        if METHODS[refit.config.method].learns and not refit.is_fresh:
            validation = read_validation(folder, refit.record, log, runs)
            if validation is not None:
                selections[refit.name] = select_adjustment(validation, spec)[0]
    return selections


def write_post_hoc(folder: str, selections: Mapping[str, AdjustmentSelection]) -> None:
    """Write post_hoc.json into a sweep's folder."""
    content = {name: selection.to_dict() for name, selection in selections.items()}
    storage.write_json(storage.join(folder, POST_HOC_FILE), content)


def read_adjustment(folder: str, name: str) -> PostHocAdjustment | None:
    """The accepted adjustment of a refit's logits, None if there was no selection; raises ImbvlmError."""

    def parse(content: Any) -> PostHocAdjustment | None:
        selection = content.get(name)
        return None if selection is None else PostHocAdjustment(**selection["adjustment"])

    return read_json(storage.join(folder, POST_HOC_FILE), parse, resume_fix(folder))


def read_uncalibrated_note(folder: str) -> str:
    """Why probabilities of a sweep's models may not be called calibrated, or ""; raises ImbvlmError."""

    def parse(content: Any) -> str:
        # All are selected on the same images.
        return next((uncalibrated_note(own["calibration"].get("num_uncalibrated", 0)) for own in content.values()), "")

    return read_json(storage.join(folder, POST_HOC_FILE), parse, resume_fix(folder)) or ""


def describe_post_hoc(name: str, selection: AdjustmentSelection, scored: Sequence[TrialRecord]) -> str:
    """Lines on a refit's adjustments: candidates, gains, calibration before and after."""
    calibration = selection.calibration
    metric = selection.metric if selection.metric == LIKELIHOOD else selection.metric.replace("_", " ")
    lines = [
        f"after training, chosen on {selection.num_rows:,} rows of validation, {name}:",
        f"  logit adjustment: {_describe_value('tau', selection.tau, metric)}",
    ]
    if selection.alpha is not None:
        lines.append(f"  zero-shot logits mixed in: {_describe_value('alpha', selection.alpha, metric)}")
    records = [record for record in scored if record.name == name]
    errors = [last_values(records, f"{split}/expected_calibration_error") for split in (TEST, POST_HOC)]
    on_test = f", on test {_before_and_after(*map(statistics.fmean, errors))}" if all(errors) else ""
    stays = "" if calibration.objection is None else f" {calibration.objection}, so that it stays at 1"
    doubt = uncalibrated_note(calibration.num_uncalibrated)
    lines.append(
        f"  calibration: temperature {calibration.temperature:.3g}{stays}; expected calibration error (%) on "
        f"validation {_before_and_after(selection.plain_error, calibration.accepted_calibration_error)}{on_test}"
        f"{f'; {doubt}' if doubt else ''}"
    )
    return "\n".join(lines)


def _before_and_after(before: float, after: float) -> str:
    return f"{percent(before)} before and {percent(after)} after"


def _describe_value(name: str, selection: ValueSelection, metric: str) -> str:
    values = [value for value, _ in selection.candidates]
    candidates = f"{name} of {len(values)} values from {min(values):g} to {max(values):g}"
    if metric == LIKELIHOOD and name == "tau":
        candidates = f"{name} of highest log-likelihood"
    if selection.value == selection.neutral:
        return f"{candidates}: none is better than {selection.neutral:g}"
    scale, digits, unit = (1, 3, "log-likelihood") if metric == LIKELIHOOD else (100, 1, f"points of {metric}")
    gain = f"{name} {selection.value:.3g} gains {scale * selection.gain:.{digits}f} {unit}"
    error = f"standard error {scale * selection.standard_error:.{digits}f}"
    if selection.accepted == selection.value:
        return f"{candidates}: {gain} ({error})"
    return f"{candidates}: {gain}, within its {error}, so that it stays at {selection.neutral:g}"


@dataclass(frozen=True)
class Validation:
    """A trial's validation rows of the epoch at which its refit ends: a baseline's best epoch, a trial's last one.

    They are rows of all folds and of official validation, at the last epoch, where `confirm_folds` has scored the
    trial. `logits` (N, C) and `zero_shot` (N, C), None without text, are of the rows of both; `class_counts` are those
    of the training, (C,), or of each row's fold (N, C). `saved` has all rows, and `seen` says which have logits.
    """

    saved: SavedValLogits
    logits: Tensor
    targets: Tensor
    class_counts: Tensor
    zero_shot: Tensor | None
    seen: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether every row has logits."""
        return len(self.targets) == len(self.saved.targets)


def read_validation(
    folder: str, record: TrialRecord, log: TrialLog, runs: Mapping[str, TrialRecord]
) -> Validation | None:
    """A trial's validation rows with those of its encoder's zero-shot baseline; None without logits.

    `runs` are those of `confirmed`.
    """
    runs = runs if record.trial_id in runs else {}
    scored = runs.get(record.trial_id, record)
    saved = read_logits(logits_file(folder, scored.trial_id))
    if saved is None:
        return None
    logits = saved.best() if scored.kind == "baseline" or saved.last() is None else saved.last()
    if logits is None:
        return None
    zero_shot = _zero_shot_logits(folder, record, log, runs)
    other = None if zero_shot is None or not torch.equal(zero_shot.targets, saved.targets) else zero_shot.best()
    seen = ~logits.isnan().any(dim=1)
    if other is not None:
        seen &= ~other.isnan().any(dim=1)
    if not seen.any():
        return None
    mixed = None if other is None else other[seen].float()
    return Validation(saved, logits[seen].float(), saved.targets[seen], saved.class_counts(seen), mixed, seen)


def select_adjustment(rows: Validation, spec: SweepSpec) -> tuple[AdjustmentSelection, Tensor]:
    """The adjustments that validation supports, by likelihood or by the objective, and the logits that they give.

    The logits (N, C) are without the temperature.
    """
    metric = LIKELIHOOD if spec.selects_by_likelihood else spec.objective.removeprefix("val/")
    logits, targets, other = rows.logits, rows.targets, rows.zero_shot
    weights = None if metric == LIKELIHOOD else accuracy_weights(metric, targets, rows.saved.stats[0])
    if weights is None:
        tau = select_tau_by_likelihood(logits, targets, rows.class_counts)
    else:
        tau = select_tau(logits, targets, rows.class_counts, weights=weights)
    adjusted = PostHocAdjustment(tau=tau.accepted).apply(logits, rows.class_counts)
    alpha = None
    if other is not None:
        if weights is None:
            alpha = select_by_likelihood(ALPHAS, targets, partial(mix_logits, adjusted, other))
        else:
            alpha = select_alpha(adjusted, other, targets, weights=weights)
        if alpha.accepted:
            adjusted = mix_logits(adjusted, other, alpha.accepted)
    plain = calibration_error(logits, targets)
    selection = AdjustmentSelection(metric, tau, alpha, fit_temperature(adjusted, targets), plain, len(targets))
    return selection, adjusted


def _zero_shot_logits(
    folder: str, record: TrialRecord, log: TrialLog, runs: Mapping[str, TrialRecord]
) -> SavedValLogits | None:
    """The logits of `zero_shot_baseline`, in its place those of its run over folds in `runs`."""
    baseline = zero_shot_baseline(record, log)
    if baseline is None:
        return None
    return read_logits(logits_file(folder, runs.get(baseline.trial_id, baseline).trial_id))


def zero_shot_baseline(record: TrialRecord, log: TrialLog) -> TrialRecord | None:
    """The baseline whose logits may be mixed into a trial's; None if the encoder itself was trained."""
    config = record.trial_config()
    if METHODS[config.method].trains_encoder or not METHODS[config.method].learns:
        return None
    of_encoder = (
        other
        for other in log.of("baseline")
        if not METHODS[other.config["method"]].learns and feature_key(other.trial_config()) == feature_key(config)
    )
    return next(of_encoder, None)
