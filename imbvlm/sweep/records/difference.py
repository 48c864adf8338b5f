"""A model's gain over the baselines with its 95 % interval, worded alike for terminal, report and model card."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from imbvlm.base.formatting import Z95
from imbvlm.sweep.records.trial_log import WINNER, TrialLog, TrialRecord, last_values

# The test split as trained, over five crops per image, and with adjusted logits: first parts of metrics' names.
TEST, FIVE_CROPS, POST_HOC = ALL_SPLITS = ("test", "test_tte", "test_post_hoc")
POST_HOC_MEANS = "Post hoc: logits adjusted after training by what validation chose."


@dataclass(frozen=True)
class Difference:
    """A gain over another model (fractions) and the standard error of the difference, None if unknown."""

    other: str
    gain: float
    standard_error: float | None

    @staticmethod
    def of(other: str, gain: float, errors: Sequence[float | None]) -> Difference:
        """Make a difference from the standard errors of both accuracies."""
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
        """The interval, such as `95 % interval +0.4 to +5.8`."""
        if self.standard_error is None:
            return "its 95 % interval isn't known"
        return f"95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"


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
    ours: Sequence[TrialRecord], theirs: Sequence[TrialRecord], split: str, name: str
) -> Difference | None:
    """Balanced accuracy of a model as exported, minus another's on `split`; None if one of them was not scored."""
    pairs = ((ours, splits_of(ours)[-1]), (theirs, split))
    accuracies = [values_in(records, side, "balanced_accuracy") for records, side in pairs]
    if not all(accuracies):
        return None
    # All seeds score the same images, so more seeds don't reduce the error.
    errors = [next(iter(values_in(records, side, "balanced_standard_error")), None) for records, side in pairs]
    gain = statistics.fmean(accuracies[0]) - statistics.fmean(accuracies[1])
    return Difference.of(title_in(name, split), gain, errors)


def verdict_on_test(log: TrialLog, ours: Sequence[TrialRecord], who: str) -> Verdict | None:
    """Compare an exported model with each baseline, as trained and as adjusted; None without a test split.

    A plain probe's logits can be adjusted without training, so a winner must beat the adjusted probe too.
    """
    names = dict.fromkeys(record.name for record in log.of("baseline"))
    winner = None if log.winner_id is None else log.records.get(log.winner_id)
    if winner is not None and winner.kind == "baseline" and ours and ours[0].name == WINNER:
        return Verdict(f"No win is shown: validation selected the baseline {winner.name} itself.", "", False)
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
        f"{subject} is {first.text}{comma} in balanced accuracy on the test split ({first.interval_text}{seeds})."
    )
    statement = f"{sentence[0].upper()}{sentence[1:]}" if first.is_win else f"No win is shown: {sentence}"
    # The report's table has all of them.
    other_texts = " and ".join(f"{difference.text} ({difference.interval_text})" for difference in rest[:2])
    details = f"It is {other_texts}." if rest else ""
    if split == POST_HOC or any(difference.other.endswith("post hoc") for difference in differences):
        details = f"{details} {POST_HOC_MEANS}".strip()
    return Verdict(statement, details, first.is_win)
