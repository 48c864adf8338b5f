"""A model's gain over the baselines with its 95 % interval, in one wording for terminal, report and card."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord

TEST, POST_HOC = "test", "test_post_hoc"
POST_HOC_MEANS = "Post hoc: logits adjusted after training by what validation chose."
# Standard errors to either side that hold 95 % of a normal distribution.
Z95 = 1.96


@dataclass(frozen=True)
class Difference:
    """A gain over another model (fractions) and the standard error of the difference, None where it isn't known."""

    other: str
    gain: float
    standard_error: float | None

    @staticmethod
    def of(other: str, gain: float, errors: Sequence[float | None]) -> Difference:
        """From the standard errors of both accuracies."""
        available = [error for error in errors if error is not None]
        return Difference(other, gain, math.hypot(*available) if len(available) == len(errors) else None)

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return -math.inf if self.standard_error is None else self.gain - Z95 * self.standard_error

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        return math.inf if self.standard_error is None else self.gain + Z95 * self.standard_error

    @property
    def is_win(self) -> bool:
        """Whether all of the interval is above 0."""
        return self.low > 0

    @property
    def words(self) -> str:
        """Such as `3.1 points above linear probe`; `points from` where the interval includes 0."""
        if self.low > 0 or self.high < 0:
            return f"{100 * abs(self.gain):.1f} points {'above' if self.gain > 0 else 'below'} {self.other}"
        return f"{100 * self.gain:+.1f} points from {self.other}"

    @property
    def interval_words(self) -> str:
        """Such as `95 % interval +0.4 to +5.8`."""
        if self.standard_error is None:
            return "its 95 % interval isn't known"
        return f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"


@dataclass(frozen=True)
class Verdict:
    """A model against its nearest baseline (`statement`) and the others (`beside`), and whether it beats all."""

    statement: str
    beside: str
    is_win: bool

    def __str__(self) -> str:
        return f"{self.statement} {self.beside}".strip()


def refits_of(log: TrialLog, name: str) -> list[TrialRecord]:
    """The finished refits of a name, one for each seed; an export takes the first."""
    return [
        record for record in log.of("refit") if record.name == name and record.epochs and record.state == "finished"
    ]


def values_in(records: Sequence[TrialRecord], split: str, metric: str) -> list[float]:
    """Each seed's metric as adjusted where `split` says so and there is an adjustment, else as trained."""
    for key in (f"{split}/{metric}", f"{TEST}/{metric}"):
        values = [record.epochs[-1][key] for record in records if key in record.epochs[-1]]
        if values:
            return values
    return []


def splits_of(records: Sequence[TrialRecord]) -> list[str]:
    """As trained, and where an adjustment changes its accuracy as adjusted; the last is what an export gives."""
    as_trained, adjusted = (values_in(records, split, "balanced_accuracy") for split in (TEST, POST_HOC))
    return [TEST, POST_HOC] if adjusted != as_trained else [TEST]


def title_in(name: str, split: str) -> str:
    """A refit's name, with what was done to it."""
    return f"{name}, post hoc" if split == POST_HOC else name


def difference_on_test(
    ours: Sequence[TrialRecord], theirs: Sequence[TrialRecord], split: str, name: str
) -> Difference | None:
    """A model as it is exported less another as `split` has it, in balanced accuracy; None where one wasn't scored."""
    pairs = ((ours, splits_of(ours)[-1]), (theirs, split))
    accuracies = [values_in(records, side, "balanced_accuracy") for records, side in pairs]
    if not all(accuracies):
        return None
    # Seeds score the same images, so more of them don't make the error smaller.
    errors = [next(iter(values_in(records, side, "balanced_standard_error")), None) for records, side in pairs]
    gain = statistics.fmean(accuracies[0]) - statistics.fmean(accuracies[1])
    return Difference.of(title_in(name, split), gain, errors)


def verdict_on_test(log: TrialLog, ours: Sequence[TrialRecord], who: str) -> Verdict | None:
    """Compare an exported model with each baseline, as trained and as adjusted; None without a test split.

    Adjusting a plain probe's logits after training costs nothing, so a winner must beat the adjusted probe, too.
    """
    names = dict.fromkeys(record.name for record in log.of("baseline"))
    others = [(name, refits_of(log, name)) for name in names]
    differences = [
        difference
        for name, theirs in others
        for split in splits_of(theirs)
        if (difference := difference_on_test(ours, theirs, split, name)) is not None
    ]
    if not differences:
        return None
    first, *rest = sorted(differences, key=lambda difference: difference.low)
    split = splits_of(ours)[-1]
    values = values_in(ours, split, "balanced_accuracy")
    seeds = f"; mean of {len(values)} seeds, their spread {100 * statistics.stdev(values):.1f}" if values[1:] else ""
    subject = f"{who}, post hoc," if split == POST_HOC else who
    comma = "," if first.other.endswith("post hoc") else ""
    sentence = (
        f"{subject} is {first.words}{comma} in balanced accuracy on the test split ({first.interval_words}{seeds})."
    )
    statement = f"{sentence[0].upper()}{sentence[1:]}" if first.is_win else f"No win is shown: {sentence}"
    others_text = " and ".join(f"{difference.words} ({difference.interval_words})" for difference in rest)
    beside = f"It is {others_text}." if rest else ""
    if split == POST_HOC or any(difference.other.endswith("post hoc") for difference in differences):
        beside = f"{beside} {POST_HOC_MEANS}".strip()
    return Verdict(statement, beside, first.is_win)
