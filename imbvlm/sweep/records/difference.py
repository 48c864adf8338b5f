"""A model's gain over the baselines with its 95 % interval, worded alike for terminal, report and model card."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from imbvlm.base.formatting import Z95
from imbvlm.longtail.claims import PairedDifference, paired_difference
from imbvlm.longtail.group_gap import group_note
from imbvlm.sweep.records.trial_log import BLEND, WINNER, TrialLog, TrialRecord, last_values, refit_folder
from imbvlm.training.test_predictions import POST_HOC, TEST, TestPredictions

# The test split over five crops per image.
FIVE_CROPS = "test_tte"
ALL_SPLITS = (TEST, FIVE_CROPS, POST_HOC)
POST_HOC_MEANS = "Post hoc: logits adjusted after training by what validation chose."


@dataclass(frozen=True)
class Difference:
    """A gain over another model (fractions) and its 95 % interval, infinite if unknown.

    `num_groups` are the groups of images that the interval resamples; None where images have none.
    """

    other: str
    gain: float
    low: float = -math.inf
    high: float = math.inf
    num_groups: int | None = None

    @staticmethod
    def of(other: str, gain: float, errors: Sequence[float | None]) -> Difference:
        """Make a difference from the standard errors of both accuracies, as of independent images."""
        if None in errors:
            return Difference(other, gain)
        half_width = Z95 * math.hypot(*(error or 0.0 for error in errors))
        return Difference(other, gain, gain - half_width, gain + half_width)

    @property
    def is_win(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def text(self) -> str:
        """The gain: `3.1 points above linear probe`, or `+1.0 points from linear probe` if the interval includes 0."""
        if self.low > 0 or self.high < 0:
            return f"{100 * abs(self.gain):.1f} points {'above' if self.gain > 0 else 'below'} {self.other}"
        return f"{100 * self.gain:+.1f} points from {self.other}"

    @property
    def interval_text(self) -> str:
        """The interval, such as `95 % interval +0.4 to +5.8`, and the groups of images that it resamples."""
        groups = group_note(self.num_groups)
        if math.isinf(self.low):
            return f"its 95 % interval isn't known{f': {groups}' if groups else ''}"
        return f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}{f', {groups}' if groups else ''}"


@dataclass(frozen=True)
class Verdict:
    """A model compared with its nearest baseline (`statement`) and the others (`details`), and whether it beats all."""

    statement: str
    details: str
    is_win: bool

    def __str__(self) -> str:
        return f"{self.statement} {self.details}".strip()


def refits_of(log: TrialLog, name: str) -> list[TrialRecord]:
    """The finished refits of a name, one per seed; an export takes the first."""
    return [
        record for record in log.of("refit") if record.name == name and record.epochs and record.state == "finished"
    ]


def values_in(records: Sequence[TrialRecord], split: str, metric: str) -> list[float]:
    """A metric of each seed, adjusted if `split` says so and the refits were adjusted, else as trained."""
    return last_values(records, f"{split}/{metric}") or last_values(records, f"{TEST}/{metric}")


def splits_of(
    records: Sequence[TrialRecord],
    metrics: Sequence[str] = ("balanced_accuracy",),
    splits: Sequence[str] = (TEST, POST_HOC),
) -> list[str]:
    """TEST and the other splits that were scored, POST_HOC only if the adjustment changes one of the metrics.

    `imbvlm export` writes the model as it is on the last one.
    """
    values = {split: [last_values(records, f"{split}/{metric}") for metric in metrics] for split in splits}

    def is_shown(split: str) -> bool:
        return split == TEST or (any(values[split]) and not (split == POST_HOC and values[split] == values[TEST]))

    return list(filter(is_shown, splits))


def title_in(name: str, split: str) -> str:
    """A refit's name with the kind of its scores on a split, such as `winner, post hoc`."""
    return name + {FIVE_CROPS: ", five crops", POST_HOC: ", post hoc"}.get(split, "")


def difference_on_test(
    log: TrialLog, ours: Sequence[TrialRecord], theirs: Sequence[TrialRecord], split: str, name: str
) -> Difference | None:
    """Balanced accuracy of a model as exported, minus another's on `split`; None if one of them was not scored.

    The interval is that of a paired bootstrap within classes, and of whole groups where images have some, seeds
    averaged inside; of sweeps of version 0.1, which kept no predictions, that of independent images.
    """
    own_split, title = splits_of(ours)[-1], title_in(name, split)
    accuracies = [
        values_in(records, side, "balanced_accuracy") for records, side in ((ours, own_split), (theirs, split))
    ]
    if not all(accuracies):
        return None
    paired = _paired(log, ours, own_split, theirs, split)
    if paired is not None:
        return Difference(title, paired.difference, paired.low, paired.high, paired.num_groups)
    # All seeds score the same images, so more seeds don't reduce the error.
    errors = [
        next(iter(values_in(records, side, "balanced_standard_error")), None)
        for records, side in ((ours, own_split), (theirs, split))
    ]
    return Difference.of(title, statistics.fmean(accuracies[0]) - statistics.fmean(accuracies[1]), errors)


def _paired(
    log: TrialLog, ours: Sequence[TrialRecord], own_split: str, theirs: Sequence[TrialRecord], split: str
) -> PairedDifference | None:
    """The difference on the images that all runs could read; None where predictions are missing."""
    read = [TestPredictions.read(refit_folder(log.folder, record.trial_id)) for record in (*ours, *theirs)]
    predicted = [predictions for predictions in read if predictions is not None]
    if len(predicted) < len(read) or not all(predictions.has_rows_of(predicted[0]) for predictions in predicted):
        return None
    is_read = torch.stack([predictions.predicted[TEST] >= 0 for predictions in predicted]).all(dim=0)
    if not is_read.any():
        return None
    own, other = (
        torch.stack([predictions.correct(side)[is_read] for predictions in runs]).numpy()
        for runs, side in ((predicted[: len(ours)], own_split), (predicted[len(ours) :], split))
    )
    groups = predicted[0].groups
    return paired_difference(
        own,
        other,
        predicted[0].labels[is_read].numpy(),
        groups=None if groups is None else groups[is_read].numpy(),
    )


def delivered_runs(log: TrialLog) -> list[TrialRecord]:
    """The delivered model's runs, one per seed: a blend's, or the winner's refits."""
    return [record for record in log.of("delivered") if record.name == BLEND] or refits_of(log, WINNER)


def baseline_differences(log: TrialLog, ours: Sequence[TrialRecord]) -> dict[tuple[str, str], Difference]:
    """A model's differences from each baseline that was scored, as trained and as adjusted, by name and split."""
    return {
        (name, split): difference
        for name in dict.fromkeys(record.name for record in log.of("baseline"))
        for theirs in [refits_of(log, name)]
        for split in splits_of(theirs)
        if (difference := difference_on_test(log, ours, theirs, split, name)) is not None
    }


def delivered_verdict(
    log: TrialLog, objective: str, differences: Mapping[tuple[str, str], Difference] | None = None
) -> Verdict | None:
    """Compare the delivered model's runs with the baselines; None without a test split.

    `differences` are those of the runs where they were computed already, which takes seconds for many classes.
    """
    runs = delivered_runs(log)
    who = "the blend" if runs and runs[0].name == BLEND else "the winner"
    return verdict_on_test(log, runs, who, objective, differences)


def verdict_on_test(
    log: TrialLog,
    ours: Sequence[TrialRecord],
    who: str,
    objective: str,
    differences: Mapping[tuple[str, str], Difference] | None = None,
) -> Verdict | None:
    """Compare an exported model with the best baseline on validation, and with all others; None without a test split.

    Logits can be adjusted without training, so a winner must beat the best baseline as adjusted.
    """
    if not ours:
        return None
    winner = None if log.selected is None else log.records.get(log.selected.winner)
    if winner is not None and winner.kind == "baseline" and ours[0].name == WINNER:
        return Verdict(f"No win is shown: validation selected the baseline {winner.name} itself.", "", False)
    best = next(iter(log.best_baselines(objective)), None)
    differences = baseline_differences(log, ours) if differences is None else differences
    if best is None or not differences:
        return None
    reference = best.name, splits_of(refits_of(log, best.name))[-1]
    ranked = sorted(differences, key=lambda key: (key != reference, differences[key].low))
    first, *rest = (differences[key] for key in ranked)
    split = splits_of(ours)[-1]
    values = values_in(ours, split, "balanced_accuracy")
    seeds = f"; mean of {len(values)} seeds, their spread {100 * statistics.stdev(values):.1f}" if values[1:] else ""
    subject = f"{who}, post hoc," if split == POST_HOC else who
    comma = "," if first.other.endswith("post hoc") else ""
    sentence = (
        f"{subject} is {first.text}{comma} in balanced accuracy on the test split ({first.interval_text}{seeds})."
    )
    statement = f"{sentence[0].upper()}{sentence[1:]}" if first.is_win else f"No win is shown: {sentence}"
    # The report's table has all of them.
    other_texts = " and ".join(f"{difference.text} ({difference.interval_text})" for difference in rest[:2])
    details = f"It is {other_texts}." if rest else ""
    if split == POST_HOC or any(other == POST_HOC for _, other in differences):
        details = f"{details} {POST_HOC_MEANS}".strip()
    return Verdict(statement, details, first.is_win)
