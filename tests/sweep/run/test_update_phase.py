"""An update: what of two models' answers is compared, and the whole way with real sweeps on grown data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from quickstart_sweep import QUICKSTART, imbvlm, newest, run, trials

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.manifest import Manifest
from imbvlm.sweep.report.update_comparison import UpdateComparison
from imbvlm.sweep.run.update_phase import NO_ANSWER, compare_answers


def manifest(names: list[str], train: dict[str, int], test: list[str], groups: list[str] | None = None) -> Manifest:
    """Training images by class, then test images of these classes."""
    labels = [names.index(name) for name, number in train.items() for _ in range(number)]
    splits = ["train"] * len(labels) + ["test"] * len(test)
    labels += [names.index(name) for name in test]
    columns = {"bytes": [b"%d" % row for row in range(len(labels))], "label": np.array(labels, np.int32)}
    columns |= {"split": splits} | ({} if groups is None else {"group": [None] * (len(labels) - len(test)) + groups})
    return Manifest.build(pa.table(columns), names, "made")


def compared(before: Manifest, now: Manifest, answers: list[tuple[str | None, str | None]]) -> UpdateComparison:
    """Each test image's answers by name, of the model before and of that now; None where it can't be read."""
    numbers = [
        [NO_ANSWER if name is None else data.class_names.index(name) for name in names]
        for data, names in zip((before, now), zip(*answers, strict=True), strict=True)
    ]
    return compare_answers(before, now, now.rows_of("test"), *map(np.array, numbers))


BEFORE = manifest(["cat", "dog", "owl"], {"cat": 120, "dog": 30, "owl": 5}, [])
TESTED = ["dog", "dog", "ant", "cat", "cat", "cat", "ant"]
NOW = manifest(["ant", "dog", "cat", "bee"], {"ant": 9, "dog": 80, "cat": 120}, TESTED)
ANSWERS = [
    ("owl", "dog"),
    ("dog", "dog"),
    ("dog", "ant"),
    ("cat", "ant"),
    ("cat", "cat"),
    (None, "cat"),
    ("cat", "bee"),
]


def test_answers_are_compared_by_class_name_among_images_that_both_can_read_and_name() -> None:
    result = compared(BEFORE, NOW, ANSWERS)
    balanced, many = result.accuracies["balanced"], result.accuracies["many_shot"]
    assert (balanced.before, balanced.after, balanced.num_images) == (0.75, 0.75, 4)
    assert (many.before, many.after, many.num_images) == (1.0, 0.5, 2)
    assert result.accuracies["medium_shot"].after == 1.0, "dog had 30 images before, and its group is that"
    assert "few_shot" not in result.accuracies
    by_name = {own.name: own for own in result.classes}
    assert (by_name["dog"].num_train_before, by_name["dog"].num_train_now) == (30, 80)
    assert (by_name["dog"].change.num_gained, by_name["cat"].change.num_lost) == (1, 1)
    assert [(new.name, new.num_images, new.num_right) for new in result.new] == [("ant", 2, 1), ("bee", 0, 0)]
    assert (result.gone, result.num_unread) == (["owl"], 1)


def test_the_terminal_says_what_was_compared_and_what_was_left_out() -> None:
    result = compared(BEFORE, NOW, ANSWERS)
    text = UpdateComparison(**{**vars(result), "earlier": "runs/old", "num_seen": 3}).describe(80)
    assert max(len(line) for line in text.splitlines() if "  " in line) <= 80, "tables fit a terminal"
    for words in (
        "runs/old delivered (before) and this one (now) on the same 4 test images",
        "no difference is shown",
        "left out: 3 test images that one of the models was trained or selected with",
        "left out: 1 test image that couldn't be read",
        "new classes, which the earlier model can't name, right now (%): ant 50.0.",
        "new classes without test images: bee.",
        "classes that are gone: owl.",
        "was medium-shot",
        "30 to 80",
    ):
        assert words in text


def test_a_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    groups = [f"g{number}" for number in range(len(TESTED))]
    grouped = manifest(list(NOW.class_names), {"ant": 9, "dog": 80, "cat": 120}, TESTED, groups)
    plain, of_groups = (compared(BEFORE, now, ANSWERS) for now in (NOW, grouped))
    for result in (plain, of_groups, UpdateComparison("runs/old", problem="the data has no test split.")):
        result.write(str(tmp_path))
        assert UpdateComparison.read(str(tmp_path)).describe(80) == result.describe(80)
    assert of_groups.accuracies["balanced"].interval is None, "four groups are too few"


def test_without_a_common_class_nothing_can_be_compared() -> None:
    with pytest.raises(ImbvlmError, match="no test image is left that the earlier one can name"):
        compared(manifest(["owl"], {"owl": 3}, []), NOW, [("owl", "ant")] * len(TESTED))


# ------------------------------------------------------------------------------------------ with real sweeps

SHORT = ("--smoke", "--set", "num_trials=2", "--set", "train.num_epochs=2")


@pytest.fixture(scope="module")
def home(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def earlier(home: Path) -> Path:
    """A finished sweep on photos that have grown since.

    more.parquet has the new photos, a new class, and in its test split a photo that the sweep was trained with.
    """
    add_photos(home / "photos", {0: 40, 1: 30, 2: 20})
    imbvlm("manifest", "build", "--folders", "photos", "--test-share", "0.3", "-o", "photos.parquet", cwd=home)
    run(QUICKSTART, *SHORT, "--manifest", "photos.parquet", cwd=home)
    sweep = newest(home)
    add_photos(home / "photos", {1: 20, 2: 20, 7: 20}, {1: 30, 2: 20})
    build = ("--folders", "photos", "--update", "photos.parquet", "--test-share", "0.3")
    imbvlm("manifest", "build", *build, "-o", "more.parquet", cwd=home)
    grown, old = Manifest.read(str(home / "more.parquet")), Manifest.read(str(home / "photos.parquet"))
    moved = old.table.column("uri")[int(old.rows_of("train")[0])]
    splits = pc.if_else(pc.equal(grown.table.column("uri"), moved), "test", grown.table.column("split").cast("string"))
    table = grown.table.set_column(grown.table.column_names.index("split"), "split", splits)
    Manifest.build(table, grown.class_names, grown.name).write(str(home / "more.parquet"))
    return sweep


def add_photos(folder: Path, counts: dict[int, int], after: dict[int, int] | None = None) -> None:
    source = Manifest.read("embedded:fashion_mnist_lt")
    for label, number in counts.items():
        start = (after or {}).get(label, 0)
        for row in [row for row in source.rows_of("train") if source.labels[row] == label][start : start + number]:
            place = folder / source.class_names[label] / f"{row}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(source.table.column("bytes")[int(row)].as_py())


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def right_by_class(model: str, home: Path) -> dict[str, int]:
    """How many of the photos tested in more.parquet a model names rightly, by class."""
    lines = imbvlm("predict", model, "more.parquet", "--split", "test", "--top", "1", "--json", cwd=home).splitlines()
    grown, right = Manifest.read(str(home / "more.parquet")).split("test"), Counter[str]()
    for label, line in zip(grown.labels, lines, strict=True):
        right[grown.class_names[label]] += json.loads(line)["classes"][0]["class"] == grown.class_names[label]
    return right


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_an_update_killed_and_resumed_compares_both_models_and_is_exported(earlier: Path, home: Path) -> None:
    before = files(earlier)
    driver = subprocess.Popen(
        [sys.executable, "-m", "imbvlm", "sweep", "update", str(earlier), "--manifest", "more.parquet"],
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    updated = earlier
    while updated == earlier or not any((updated / "trials").glob("*.json")):
        assert driver.poll() is None
        time.sleep(0.1)
        updated = newest(home)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    printed = imbvlm("sweep", "resume", str(updated), cwd=home)
    assert files(earlier) == before, "the earlier sweep stays as it is"
    assert f"update_of: {earlier}" in (updated / "sweep.yaml").read_text()

    grown = Manifest.read(str(home / "more.parquet"))
    tested = [grown.class_names[label] for label in grown.labels[grown.rows_of("test")]]
    num_old = sum(name != "sneaker" for name in tested) - 1
    assert f"{earlier} delivered (before) and this one (now) on the same {num_old} test images" in printed
    assert "left out: 1 test image that one of the models was trained or selected with" in printed
    assert "new classes, which the earlier model can't name, right now (%): sneaker" in printed
    result = UpdateComparison.read(str(updated))
    assert result is not None
    assert result.num_seen == 1
    imbvlm("export", str(earlier), "-o", "old-model", cwd=home)
    imbvlm("export", str(updated), "-o", "new-model", cwd=home)
    was_right, is_right = (right_by_class(model, home) for model in ("old-model", "new-model"))
    # The photo that was left out may be right or wrong.
    for own in result.classes:
        has_left_out = own.change.num_images < tested.count(own.name)
        assert 0 <= was_right[own.name] - own.change.num_before <= has_left_out
        assert 0 <= is_right[own.name] - own.change.num_after <= has_left_out
    assert sum(own.change.num_images for own in result.classes) == num_old
    assert [new.num_right for new in result.new] == [is_right["sneaker"]]

    again = imbvlm("sweep", "resume", str(updated), cwd=home)
    assert "the earlier model predicts" in printed
    assert "the earlier model predicts" not in again, "what is compared already isn't predicted again"
    assert result.describe(80) in again
    assert result.describe(80) in imbvlm("sweep", "show", str(updated), cwd=home)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_search_starts_from_the_earlier_trials(earlier: Path, home: Path) -> None:
    arguments = ("--manifest", "photos.parquet", "--search", "1", "--set", "refit_seeds=[0]")
    printed = imbvlm("sweep", "update", str(earlier), *arguments, cwd=home)
    assert "warm start: 2 of 2 trials" in printed
    members = {json.dumps(trial["draw"]) for trial in trials(earlier).values() if trial["kind"] == "search"}
    drawn = [json.dumps(trial["draw"]) for trial in trials(newest(home)).values() if trial["kind"] == "search"]
    assert members & set(drawn)
    assert len(set(drawn) - members) == 1
