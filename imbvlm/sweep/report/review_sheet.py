"""The review sheet of a report: what may be accepted without a look, what is left, and which classes come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imbvlm.base.formatting import percent, pluralize
from imbvlm.data.manifest import Manifest
from imbvlm.inference.calibration_file import ModelCalibration
from imbvlm.longtail.decisions.acceptance import Acceptance, Promise, learn_acceptance
from imbvlm.longtail.decisions.prediction_sets import PredictionSets, learn_sets
from imbvlm.longtail.decisions.scored_rows import ScoredRows
from imbvlm.longtail.post_hoc_adjustment import CHUNK_SIZE
from imbvlm.sweep.records.trial_log import refit_folder
from imbvlm.sweep.report.plotting import Table
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.score_tables import MAX_ROWS, group_name
from imbvlm.training.test_predictions import TestPredictions, has_test_logits, read_test_logits

# Precisions and coverages that are shown.
LEVELS = (0.95, 0.9)


@dataclass(frozen=True)
class ReviewSheet:
    """Sentences for a curator, or the reason why there is no sheet as the only one; and tables."""

    sentences: Sequence[str]
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class _Scored:
    """Test rows with their logits (N, C)."""

    rows: ScoredRows
    logits: Tensor

    def mean_sizes(self, sets: PredictionSets) -> np.ndarray:
        """The number of classes (N,) in the set of each row."""
        parts = torch.split(self.logits, CHUNK_SIZE)
        return np.concatenate([sets.members(part.double().softmax(dim=1).numpy()).sum(axis=1) for part in parts])


def review_sheet(source: ReportData, manifest: Manifest | str) -> ReviewSheet | None:
    """The sheet of the delivered model; None before its refits."""
    if source.delivered is None and not source.log.of("refit"):
        return None
    names = source.classes.class_names if source.classes is not None else None
    names = names if isinstance(manifest, str) else manifest.class_names
    if names is None:
        return ReviewSheet([f"There is no review sheet: {manifest}"])
    calibration = ModelCalibration.read(source.folder, names)
    if calibration is None:
        again = f"It adds one: imbvlm sweep resume {source.folder}"
        return ReviewSheet(
            [f"There is no review sheet, since the refits haven't ended or are an earlier version's. {again}"]
        )
    rows = calibration.rows
    if isinstance(rows, str):
        return ReviewSheet([f"There is no review sheet: {rows}."])
    learned = [learn_acceptance(rows, level) for level in LEVELS]
    shown = next((own for own in learned if any(promise.is_given for promise in own.promises)), learned[-1])
    test = _scored_on_test(source, rows)
    sentences = [_opening(own, rows, None if test is None else test.rows) for own in learned]
    basis = calibration.basis
    sentences.append(f"{basis[0].upper()}{basis[1:]}. Each promise holds at 95 %, so that 1 in 20 may be broken.")
    tables = [_classes(shown, rows, None if test is None else test.rows, names), _sets(rows, test)]
    return ReviewSheet(sentences, tables)


def _scored_on_test(source: ReportData, rows: ScoredRows) -> _Scored | None:
    """The delivered model's scores of the test split; None in sweeps without its logits."""
    record = None if source.delivered is None else source.delivered.records[0]
    folder = "" if record is None else refit_folder(source.folder, record.trial_id)
    predictions = TestPredictions.read(folder) if record is not None and record.kind == "delivered" else None
    if predictions is None or not has_test_logits(folder):
        return None
    logits = read_test_logits(folder)
    is_read = ~logits.isnan().any(dim=1)
    logits = logits[is_read]
    return _Scored(ScoredRows.from_logits(logits, predictions.labels[is_read], rows.stats), logits)


def _opening(acceptance: Acceptance, rows: ScoredRows, test: ScoredRows | None) -> str:
    """A sentence on the share that is accepted for a precision, and on what is left to look at."""
    taken = acceptance.accepts(rows.predicted, rows.confidence)
    level, num_given = f"{100 * acceptance.precision:g} %", sum(own.is_given for own in acceptance.promise_of)
    if not num_given:
        missing = min(promise.num_missing for promise in acceptance.promises)
        more = pluralize(missing, "more validation image")
        return (
            f"So that {level} are right, nothing may be accepted without a look: at least {more} of a class are needed."
        )
    tested = ""
    if test is not None:
        on_test = acceptance.accepts(test.predicted, test.confidence)
        right = f", of which {_share(test.is_right[on_test])} % are right" if on_test.any() else ""
        tested = f" On test images it is {_share(on_test)} %{right}."
    classes = f"{num_given:,} of {pluralize(acceptance.num_classes, 'class')}"
    return (
        f"So that {level} are right, {_share(taken)} % of the images may be accepted without a look, in {classes}; "
        f"{_share(~taken)} % are left to look at.{tested}"
    )


def _share(values: np.ndarray) -> str:
    return percent(float(values.mean())) if len(values) else "-"


def _promised(promise: Promise) -> str:
    """A promise in a few words."""
    others = len(promise.labels) - 1
    group = "" if promise.group is None else f"with {others:,} other {group_name(promise.group)}" if others else "alone"
    if promise.is_given:
        return group or "its own"
    return f"no promise{', ' * bool(group)}{group}: {promise.num_missing:,} more validation images needed"


def _classes(acceptance: Acceptance, rows: ScoredRows, test: ScoredRows | None, names: Sequence[str]) -> Table:
    """The classes by the wrong predictions among those that are left to look at, the most first."""
    accepted, promise_of = acceptance.accepts(rows.predicted, rows.confidence), acceptance.promise_of
    num_wrong = np.bincount(rows.predicted[~accepted & ~rows.is_right], minlength=len(names))
    num_left = np.bincount(rows.predicted[~accepted], minlength=len(names))
    order = np.lexsort((-num_left, -num_wrong))[:MAX_ROWS]
    columns = [_by_class(acceptance, own) for own in (rows, test) if own is not None]
    cells = [
        [
            names[label],
            _promised(promise),
            f"{100 * promise.threshold:.1f}" if promise.is_given else "-",
            f"{num_left[label]:,}",
            f"{num_wrong[label]:,}",
            *(cell for column in columns for cell in column[label]),
        ]
        for label in order.tolist()
        for promise in [promise_of[label]]
    ]
    caption = (
        "The classes that the model predicts, first those with the most mistakes among the validation images that are "
        "left. Predictions above the probability are accepted. Accepted and right are in percent. A promise with other "
        "classes is for all of them together: predictions of one may be wrong more often."
    )
    header = ["look first at", "promise", "accept above (%)", "left to look at", "wrong among them"]
    header += [cell for name in ("validation", "test")[: len(columns)] for cell in (f"accepted, {name}", "right")]
    title = f"What to look at, with {100 * acceptance.precision:g} % of the accepted right"
    return Table("review", title, header, cells, 2, caption)


def _by_class(acceptance: Acceptance, rows: ScoredRows) -> list[tuple[str, str]]:
    """The share of each predicted class's rows that is accepted, and the share of these that is right."""
    taken, num_classes = acceptance.accepts(rows.predicted, rows.confidence), acceptance.num_classes
    counts = (
        np.bincount(rows.predicted[of], minlength=num_classes) for of in (taken | True, taken, taken & rows.is_right)
    )
    return [
        (percent(accepted / total) if total else "-", percent(right / accepted) if accepted else "-")
        for total, accepted, right in zip(*counts, strict=True)
    ]


def _sets(rows: ScoredRows, test: _Scored | None) -> Table:
    """The coverage of sets by shot group next to the promise."""
    groups = {"overall": np.arange(rows.stats.num_classes), **rows.stats.shot_groups}
    cells = []
    for level in LEVELS:
        sets = learn_sets(rows, level)
        columns = [] if test is None else [sets.covers(test.rows), test.mean_sizes(sets)]
        for group, labels in groups.items():
            row = [percent(level), group_name(group), f"{len(labels):,}", f"{int(sets.has_own[labels].sum()):,}"]
            if test is not None:
                own = np.isin(test.rows.labels, labels)
                covered, sizes = (column[own] for column in columns)
                row += [f"{len(sizes):,}", _share(covered), f"{sizes.mean():.1f}" if len(sizes) else "-"]
            cells += [row] if len(labels) else []
    caption = (
        "Percent. So large a share of the images has its class in its set, on average: test may lie a little below. "
        "Classes with 19 validation images or more have the promise one by one, the others together."
    )
    header = ["promise", "classes of", "classes", "one by one"]
    header += [] if test is None else ["test images", "covered on test", "classes in a set"]
    return Table("sets", "Sets of classes", header, cells, 2, caption)
