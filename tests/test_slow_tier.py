"""The slow tests are packed by measured seconds, and a part that runs says what it leaves out."""

from __future__ import annotations

import json
from math import fsum
from pathlib import Path

import pytest

from tests import slow_tier

SLOW = "import pytest\n\npytestmark = pytest.mark.slow\n\n\n"


def test_every_slow_test_stands_in_a_part() -> None:
    seconds = slow_tier.read_seconds()
    missing, gone = set(slow_tier.slow_units()) - set(seconds), set(seconds) - set(slow_tier.slow_units())
    assert not missing, f"not in slow_seconds.json; run: python -m tests.slow_tier measure {' '.join(sorted(missing))}"
    assert not gone, "slow_seconds.json has tests that are gone; run: python -m tests.slow_tier record"
    parts = slow_tier.pack(slow_tier.packed_seconds())
    assert sorted(unit for part in parts for unit in part) == sorted(seconds)
    for part in parts:
        assert fsum(slow_tier.packed_seconds()[unit] for unit in part) <= slow_tier.MAX_PART_SECONDS, part


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two files with slow tests, one of which is packed by test."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("import pytest\n\n\n@pytest.mark.slow\ndef test_x(): ...\n")
    (tmp_path / "tests" / "test_b.py").write_text(f"{SLOW}def test_x(): ...\n\n\ndef test_y(): ...\n")
    mixed = "import pytest\n\n\ndef test_x(): ...\n\n\n@pytest.mark.slow\ndef test_y(): ...\n"
    (tmp_path / "tests" / "test_mixed.py").write_text(mixed)
    (tmp_path / "tests" / "test_fast.py").write_text("def test_x(): ...\n")
    monkeypatch.setattr(slow_tier, "ROOT", tmp_path)
    monkeypatch.setattr(slow_tier, "SPLIT", ("tests/test_b.py", "tests/test_mixed.py"))
    monkeypatch.setattr(slow_tier, "SECONDS", tmp_path / "slow_seconds.json")
    return tmp_path


def test_files_with_slow_tests_are_units_and_so_is_each_test_of_a_split_file(root: Path) -> None:
    split = ["tests/test_b.py::test_x", "tests/test_b.py::test_y", "tests/test_mixed.py::test_y"]
    assert slow_tier.slow_units() == ["tests/test_a.py", *split]


def test_the_seconds_of_junit_files_are_added_by_unit_and_merged(root: Path) -> None:
    (root / "slow_seconds.json").write_text(json.dumps({"tests/test_a.py": 5.0, "tests/test_gone.py": 7.0}))
    cases = [("tests.test_b", "test_x[1]", 2), ("tests.test_b", "test_x[2]", 3), ("tests.test_fast", "test_x", 1)]
    xml = "".join(f'<testcase classname="{file}" name="{name}" time="{time}"/>' for file, name, time in cases)
    (root / "junit.xml").write_text(f"<testsuites><testsuite>{xml}</testsuite></testsuites>")
    slow_tier.record([root / "junit.xml"])
    seconds = {"tests/test_a.py": 5.0, "tests/test_b.py::test_x": 5.0}
    seconds |= {"tests/test_b.py::test_y": None, "tests/test_mixed.py::test_y": None}
    assert slow_tier.read_seconds() == seconds
    assert slow_tier.packed_seconds()["tests/test_b.py::test_y"] == slow_tier.ASSUMED_SECONDS


def test_the_longest_unit_comes_first_and_each_goes_into_the_first_part_with_room() -> None:
    seconds = {"a": 200.0, "b": 900.0, "c": 950.0, "d": 250.0, "e": 1000.0}
    assert slow_tier.pack(seconds) == [["a", "e"], ["c", "d"], ["b"]]


def test_a_part_names_what_failed_what_was_skipped_and_what_was_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\n")
    (root / "tests" / "test_a.py").write_text(f'{SLOW}def test_x():\n    pytest.skip("no browser")\n')
    failing = f"{SLOW}def test_x():\n    raise AssertionError\n\n\ndef test_y(): ...\n"
    (root / "tests" / "test_b.py").write_text(failing)
    slow_tier.record([])
    assert slow_tier.run(0) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("part 0 of the slow tests, of 1; to repeat it: ")
    assert "skipped: 1\n  tests.test_a::test_x: no browser\n" in printed
    assert "left out after 25 minutes: 0\nfailed: 1\n  tests/test_b.py::test_x\n" in printed
    monkeypatch.setattr(slow_tier, "MAX_START_SECONDS", -60)
    assert slow_tier.run(0) == 0
    assert "left out after -1 minutes: 4\n  tests/test_a.py\n" in capsys.readouterr().out
    assert slow_tier.run(1) == 2
