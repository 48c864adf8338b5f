"""The sentences and the order of classes on a review sheet, which a curator reads first."""

from __future__ import annotations

import numpy as np

from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.decisions.acceptance import learn_acceptance
from imbvlm.longtail.decisions.scored_rows import ScoredRows
from imbvlm.sweep.report.review_sheet import _classes, _opening

NAMES = ("cat", "dog", "fox", "owl")


def made_rows(num_wrong: dict[int, int]) -> ScoredRows:
    """100 predictions of each of the first two classes and 10 of the others, whose least probable are wrong."""
    predicted = np.repeat(np.arange(4), [100, 100, 10, 10])
    confidence = np.concatenate([np.linspace(0.99, 0.5, number) for number in (100, 100, 10, 10)])
    labels = predicted.copy()
    for label, number in num_wrong.items():
        rows = np.flatnonzero(predicted == label)[-number:]
        labels[rows] = (label + 1) % 4
    stats = ClassStats.from_counts([300, 200, 9, 5])
    return ScoredRows(labels, predicted, confidence, confidence, np.full(4, 0.25), stats)


def test_classes_with_the_most_mistakes_left_come_first() -> None:
    rows = made_rows({0: 3, 1: 20, 3: 4})
    acceptance = learn_acceptance(rows, 0.95)
    table = _classes(acceptance, rows, rows, NAMES)
    assert [row[0] for row in table.rows] == ["dog", "owl", "cat", "fox"]
    by_name = {row[0]: row for row in table.rows}
    assert by_name["cat"][1:3] == [f"above {100 * acceptance.thresholds[0]:.1f} %", "-"]
    accepted = acceptance.accepts(rows.predicted, rows.confidence)
    left = int((~accepted & (rows.predicted == 1)).sum())
    assert by_name["dog"][3] == str(left)
    assert float(by_name["dog"][5]) == 100 - left
    # With 4 wrong it takes 181 images, and both have 20.
    assert by_name["fox"][1:3] == ["nothing yet", "161 for 2 few-shot"]
    assert by_name["fox"][5:7] == ["0.0", "-"]
    always = _classes(learn_acceptance(made_rows({}), 0.95), rows, None, NAMES)
    assert [row[1:3] for row in always.rows if row[0] == "cat"] == [["always", "-"]]
    assert by_name["cat"][5:7] == by_name["cat"][7:9], "validation and test are the same rows here"


def test_the_opening_says_what_is_accepted_and_what_is_left() -> None:
    rows = made_rows({0: 3, 1: 20, 3: 4})
    acceptance = learn_acceptance(rows, 0.95)
    share = float(acceptance.accepts(rows.predicted, rows.confidence).mean())
    text = _opening(acceptance, rows, None, NAMES)
    assert f"right: accept {100 * share:.1f} % of the images without a look, in 2 of 4 classes (cat, dog)." in text
    assert text.endswith(f"Look at the other {100 - 100 * share:.1f} %.")
    on_itself = _opening(acceptance, rows, rows, NAMES)
    assert f"Of the test images {100 * share:.1f} % would be accepted" in on_itself
    assert "were promised" not in on_itself
    worse = made_rows({0: 40, 1: 60, 3: 4})
    assert "95 % were promised: test images don't come as those of validation." in _opening(
        acceptance, rows, worse, NAMES
    )
    few = made_rows({}).subset(np.arange(220) % 4 == 0)
    assert _opening(learn_acceptance(few, 0.95), few, None, NAMES) == (
        "At least 95 % right: accept nothing yet. Look at all images, or add 9 validation images of one class, which "
        "are enough if the model is right on them."
    )
