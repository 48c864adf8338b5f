"""The review sheet of a report: what may be accepted without a look, what is left, and which classes come first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imbvlm.base.formatting import join_limited, percent, pluralize
from imbvlm.data.manifest import Manifest
from imbvlm.inference.calibration_file import ModelCalibration
from imbvlm.longtail.decisions.acceptance import Acceptance, Promise, learn_acceptance
from imbvlm.longtail.decisions.prediction_sets import PredictionSets, learn_sets
from imbvlm.longtail.decisions.scored_rows import ScoredRows
from imbvlm.longtail.post_hoc_adjustment import CHUNK_SIZE
from imbvlm.longtail.roll_up import is_broken
from imbvlm.sweep.records.trial_log import refit_folder
from imbvlm.sweep.report.plotting import Table
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.score_tables import BROKEN, MAX_ROWS, group_name
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
    sentences = [_opening(own, rows, None if test is None else test.rows, names) for own in learned]
    sentences.append(_basis(calibration, len(rows)))
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


def _basis(calibration: ModelCalibration, num_rows: int) -> str:
    """Sentences on what the limits rest on, and how far they can be trusted."""
    images = pluralize(num_rows, "validation image")
    text = f"The limits are learned on {images}, for images that come as these do"
    if not calibration.is_exported:
        text += ", and are estimates: models of the search scored them, which trained on fewer images than this one"
    return f"{text}. One limit in twenty may let more mistakes through than it should."


def _opening(acceptance: Acceptance, rows: ScoredRows, test: ScoredRows | None, names: Sequence[str]) -> str:
    """Sentences on the share that is accepted for a precision, and on what is left to look at."""
    taken = acceptance.accepts(rows.predicted, rows.confidence)
    precision = acceptance.precision
    accepting = [name for name, promise in zip(names, acceptance.promise_of, strict=True) if promise.is_given]
    rule = f"At least {100 * precision:g} % right:"
    if not accepting:
        missing = min(promise.num_missing for promise in acceptance.promises)
        return (
            f"{rule} accept nothing yet. Look at all images, or add {pluralize(missing, 'validation image')} of one "
            "class, which are enough if the model is right on them."
        )
    classes = f"{len(accepting):,} of {pluralize(acceptance.num_classes, 'class')} ({join_limited(accepting, 5)})"
    text = f"{rule} accept {_share(taken)} % of the images without a look, in {classes}. "
    text += f"Look at the other {_share(~taken)} %."
    if test is None:
        return text
    on_test = acceptance.accepts(test.predicted, test.confidence)
    if not on_test.any():
        return f"{text} Of the test images none would be accepted."
    is_right = test.is_right[on_test]
    text += f" Of the test images {_share(on_test)} % would be accepted, and {_share(is_right)} % of these are right."
    if is_broken(int(is_right.sum()), len(is_right), precision):
        text += (
            f" {100 * precision:g} % were promised: test images don't come as those of validation. Look at more of "
            "the images from such a source."
        )
    return text


def _share(values: np.ndarray) -> str:
    return percent(float(values.mean())) if len(values) else "-"


def _limit(promise: Promise) -> list[str]:
    """From which probability on a class's predictions are accepted, and how many images are missing to accept any."""
    is_shared = promise.group is not None and len(promise.labels) > 1
    of_group = f" for {len(promise.labels):,} {group_name(promise.group or '')}" if is_shared else ""
    if promise.is_given:
        limit = f"above {100 * promise.threshold:.1f} %" if promise.threshold > 0 else "always"
        return [f"{limit}{of_group}", "-"]
    return ["nothing yet", f"{promise.num_missing:,}{of_group}"]


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
            *_limit(promise),
            f"{num_left[label]:,}",
            f"{num_wrong[label]:,}",
            *(cell for column in columns for cell in column[label]),
        ]
        for label in order.tolist()
        for promise in [promise_of[label]]
    ]
    caption = (
        "Begin at the top: predictions of these classes have the most mistakes among the validation images that are "
        "left to look at. A prediction whose probability is above the limit needs no look; nothing yet means that more "
        "validation images are needed, all of which the model gets right. Classes with few images share one limit: "
        "then one of them may have more mistakes. Accepted and right are in percent."
    )
    header = ["predicted class", "accept", "images needed", "left to look at", "wrong of these"]
    header += [cell for name in ("validation", "test")[: len(columns)] for cell in (f"accepted, {name}", "right")]
    title = f"Where to look first, so that {100 * acceptance.precision:g} % of the accepted are right"
    return Table("review", title, header, cells, 3, caption)


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
    cells, broken = [], []
    for level in LEVELS:
        sets = learn_sets(rows, level)
        columns = [] if test is None else [sets.covers(test.rows), test.mean_sizes(sets)]
        if columns and is_broken(int(columns[0].sum()), len(columns[0]), level):
            broken.append(f"{_share(columns[0])} % for {percent(level)} %")
        for group, labels in groups.items():
            row = [percent(level), group_name(group), f"{len(labels):,}", f"{int(sets.has_own[labels].sum()):,}"]
            if test is not None:
                own = np.isin(test.rows.labels, labels)
                covered, sizes = (column[own] for column in columns)
                row += [f"{len(sizes):,}", _share(covered), f"{sizes.mean():.1f}" if len(sizes) else "-"]
            cells += [row] if len(labels) else []
    caption = (
        "A set names the few classes that an image may be of. The promise is the share of images whose own class is "
        "in their set, on average: test may lie a little below. Each class with 19 validation images or more has a "
        "promise of its own, the others have one together."
    )
    if broken:
        caption += f" {BROKEN} {', '.join(broken)}."
    header = ["promise (%)", "classes of", "classes", "with one of their own"]
    header += [] if test is None else ["test images", "with their class in the set (%)", "classes in a set"]
    return Table("sets", "Sets of classes", header, cells, 2, caption)
