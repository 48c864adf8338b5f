"""Tables that a person can read at any width, and that names can't break."""

from __future__ import annotations

import pytest

from imbvlm.base.text_tables import labeled, table

HEADER = ["sweep", "state", "best", "data"]
ROWS = [
    ["runs/quickstart-20261124-120000", "unfinished", "74.5", "emoji_lt: 100 classes, 4,980 images"],
    ["runs/b", "finished", "-", "gone"],
]


def test_words_are_to_the_left_and_numbers_to_the_right() -> None:
    assert table(["what", "n"], [["a", "1.0"], ["bcd", "-"]]) == "what    n\n----  ---\na     1.0\nbcd     -"
    assert table(["what"], []) == "what\n----"
    assert table(["gain"], [["+1.5 ± 0.2"], ["-10.0 ± 0.1"]]).splitlines()[2] == " +1.5 ± 0.2"


@pytest.mark.parametrize("width", [60, 70, 80])
def test_a_table_that_is_too_wide_is_wrapped_at_words_and_a_path_stays_whole(width: int) -> None:
    lines = table(HEADER, ROWS, width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == HEADER
    assert lines[2].startswith("runs/quickstart-20261124-120000 unfinished 74.5 emoji_lt:")
    # No letter is lost, and a gap shows where the next row begins.
    first, second = "\n".join(lines[2:]).split("\n\n")
    assert first.split() == " ".join(ROWS[0]).split()
    assert second.split() == ROWS[1]


def test_a_table_of_too_many_columns_is_a_list_for_each_row() -> None:
    first, second = table(HEADER, ROWS, 50).split("\n\n")
    assert first.splitlines() == [
        "  sweep       runs/quickstart-20261124-120000",
        "  state       unfinished",
        "  best        74.5",
        "  data        emoji_lt: 100 classes, 4,980 images",
    ]
    assert second.split() == ["sweep", "runs/b", "state", "finished", "best", "-", "data", "gone"]


def test_a_table_that_fits_has_one_line_for_each_row() -> None:
    assert table(HEADER, ROWS, 200) == table(HEADER, ROWS)
    assert len(table(HEADER, ROWS, 200).splitlines()) == 4


def test_a_name_forges_no_row_and_is_no_markup() -> None:
    lines = table(["sweep"], [["a\nrun/b  finished\x1b[2J"], ["[red]c[/red]"]]).splitlines()
    assert lines[2:] == [r"a\nrun/b  finished\x1b[2J", "[red]c[/red]"]
    assert labeled([("x\ny", "a\tb")]) == r"  x\ny        a\tb"


def test_labeled_lines_continue_below_their_beginning_and_those_without_a_text_are_left_out() -> None:
    rows = [("driver", "ray_train; a trial has 2 workers of 1 CPU"), ("seeds", ""), ("warm start", "runs/a")]
    assert labeled(rows, 34) == (
        "  driver      ray_train; a trial\n              has 2 workers of 1\n              CPU\n  warm start  runs/a"
    )
    assert labeled(rows).splitlines()[0] == "  driver      ray_train; a trial has 2 workers of 1 CPU"
    assert labeled([]) == ""
