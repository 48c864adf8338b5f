"""Figures are legible and true in every browser and file, and one color is one thing in all of them."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sweep_folder import SPACE, sweep_spec, write_sweep

from imbvlm.config.method_registry import METHODS
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.report import search_plots
from imbvlm.sweep.report.plotting import PALETTE, WINNER, Figure, figure_css, finish, log_axis, method_look
from imbvlm.sweep.report.report_content import build
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.report_writer import write_report

COUNTS = [500, 200, 120, 60, 30, 20, 15, 8, 3, 0]
SVG = "{http://www.w3.org/2000/svg}"
SEARCH = ["history", "cost", "few_shot", "rung", "slice_method", "slice_optim.lr", "slice_decoder.depth", "parallel"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return ReportData.read(str(write_sweep(tmp_path_factory.mktemp("sweep") / "made", COUNTS)))


@pytest.fixture(scope="module")
def figures(source: ReportData) -> dict[str, Figure]:
    return {figure.name: figure for figure in build(source).all_figures}


def titles_by_color(svg: str) -> dict[str, list[str]]:
    """Titles of marks by the name of the color that the mark or its group has."""
    titles: dict[str, list[str]] = {}

    def visit(element: ElementTree.Element, color: str) -> None:
        names = re.findall(r"var\(--(\w+)", element.get("style", ""))
        color = names[-1] if names else color
        for child in element:
            if child.tag == "title" and element.tag != "svg":
                titles.setdefault(color, []).append(child.text or "")
            visit(child, color)

    visit(ElementTree.fromstring(svg), "")
    return titles


def test_the_winner_is_marked_in_every_figure_of_the_search(source: ReportData, figures: dict[str, Figure]) -> None:
    """Its blue was the first method's there, and no figure showed the winner."""
    assert set(SEARCH) <= figures.keys()
    for name in SEARCH:
        (title,) = titles_by_color(figures[name].svg())["c0"]
        assert title == "winner" if name == "slice_decoder.depth" else title.startswith("winner, "), name
        assert source.best.trial_id in title or name == "slice_decoder.depth"


def test_every_method_has_a_color_of_its_own_and_none_has_the_winners() -> None:
    assert len({method_look(method)[0] for method in METHODS} | {WINNER}) == len(METHODS) + 1


def test_one_color_is_one_thing_in_all_figures(figures: dict[str, Figure]) -> None:
    colors = {method: method_look(method)[0] for method in ("zero_shot", "linear_probe", "decoder")}
    names = {method: name for method, color in colors.items() for name, pair in PALETTE.items() if pair[0] == color}
    assert len({*colors.values(), WINNER}) == 4
    for name in SEARCH[:-1]:
        for color, titles in titles_by_color(figures[name].svg()).items():
            methods = {
                match[1] for title in titles if (match := re.match(r"t\d+: [^(]*\((linear probe|decoder)", title))
            }
            assert methods in ({"linear probe"}, {"decoder"}, set()), name
            assert all(names[method.replace(" ", "_")] == color for method in methods), name
    bars = titles_by_color(figures["shot_groups"].svg())
    for color, title in (("c0", "winner"), (names["linear_probe"], "linear probe"), (names["zero_shot"], "zero-shot")):
        assert {text.partition(",")[0] for text in bars[color]} == {title}


def test_every_color_of_a_page_follows_the_readers_setting_and_a_file_has_its_own(figures: dict[str, Figure]) -> None:
    defined = set(re.findall(r"--(\w+):", figure_css().partition("@media")[2]))
    for figure in figures.values():
        page, file = figure.svg(), figure.svg(alone=True)
        assert set(re.findall(r"var\(--(\w+)", page)) <= defined
        assert not re.findall("#[0-9a-f]{6}", re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", page)), figure.name
        assert "var(" not in file
        assert ElementTree.fromstring(file).tag == f"{SVG}svg"


def test_figures_can_be_read_aloud_and_searched(figures: dict[str, Figure]) -> None:
    for figure in figures.values():
        root = ElementTree.fromstring(figure.svg())
        assert root.get("role") == "img"
        assert [element.tag for element in root[:2]] == ["title", "desc"]
        assert root[0].text == figure.title
        assert root[1].text
        assert len(list(root.iter("text"))) >= 2
        # Pages have several figures: an id that two had would show the marks of the first.
        assert not re.findall(r"url\(|@import|<script|<style", figure.svg())
    ids = [name for figure in figures.values() for name in re.findall(r' id="([^"]+)"', figure.svg())]
    assert len(ids) == len(set(ids))


def test_no_letter_is_smaller_than_nine_pixels_on_a_phone(figures: dict[str, Figure]) -> None:
    """A page of 400 pixels has 368 for a figure; wide ones scroll below 860."""
    for figure in figures.values():
        shown = (860 if figure.wide else 368) / figure.size[0]
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", figure.svg())]
        assert min(sizes) * shown >= 9, figure.name


def test_the_same_data_give_the_same_bytes(source: ReportData, figures: dict[str, Figure]) -> None:
    again = {figure.name: figure for figure in build(source).all_figures}
    for name in ("history", "parallel", "calibration"):
        assert figures[name].svg() == again[name].svg()
        assert figures[name].svg(alone=True) == again[name].svg(alone=True)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5), st.booleans())
def test_axes_have_labels_whatever_the_values(values: list[float], is_log: bool) -> None:
    def draw(axes: search_plots.Axes) -> None:
        if is_log:
            log_axis(axes, "x", values)
        axes.plot(values, values, "o", label="a")
        finish(axes, "", "")

    texts = [element.text for element in ElementTree.fromstring(Figure("a", "a", "a", draw, []).svg()).iter("text")]
    numbers = [text for text in texts if re.fullmatch(r"[-+\d.,e]+", text or "")]
    assert len(numbers) >= 3


def test_names_in_any_letters_are_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = "<b>$x$ & 猫"
    figure = Figure("a", name, name, lambda axes: axes.set_title(name), [])
    texts = [element.text for element in ElementTree.fromstring(figure.svg()).iter("text")]
    assert name in texts
    assert figure.png()
    assert capfd.readouterr() == ("", "")


def test_a_file_has_words_of_the_sizes_that_were_drawn() -> None:
    heights = []
    for size in (6, 24):
        figure = Figure(
            "a", "a", "", lambda axes, size=size: (axes.axis("off"), axes.text(0.5, 0.5, "H", size=size)), []
        )
        ink = np.asarray(Image.open(io.BytesIO(figure.png())).convert("L")) < 128
        heights.append(ink.any(axis=1).sum())
    assert 3 * heights[0] < heights[1] < 5 * heights[0]


def test_a_home_that_cannot_be_written_to_is_no_line_on_the_screen() -> None:
    code = (
        "from imbvlm.sweep.report.plotting import Figure; Figure('a', 'a', 'a', lambda axes: axes.plot([1]), []).svg()"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("MPLCONFIGDIR", "XDG_CACHE_HOME")}
    environment |= {"HOME": "/dev/null", "XDG_CONFIG_HOME": "/dev/null"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_thousand_trials_are_drawn_in_time_and_more_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, num_trials=1000)
    # CPU seconds leave out the machine's other processes.
    started = time.process_time()
    page = Path(write_report(str(folder)))
    assert time.process_time() - started < 10
    assert page.stat().st_size < 3_000_000
    source = ReportData.read(str(folder))
    whole = search_plots.parallel(source, [])
    assert "Only the best" not in whole.caption
    monkeypatch.setattr(search_plots, "MAX_LINES", 100)
    best = search_plots.parallel(source, [])
    assert best.caption.endswith("Only the best 100 of 1,000 trials are drawn.")
    assert source.best.trial_id in titles_by_color(best.svg())["c0"][0]
    assert len(best.svg()) < len(whole.svg()) / 5


def test_parallel_coordinates_have_an_axis_per_key_as_the_space_scales_it(figures: dict[str, Figure]) -> None:
    texts = [element.text for element in ElementTree.fromstring(figures["parallel"].svg()).iter("text")]
    assert {"loss.name", "method", "decoder.depth", "optim.lr", "objective (%)", "not sampled"} <= set(texts)
    # Two lines of one label.
    assert {"linear probe", "decoder", "cross entropy", "0.1"} <= set(texts)
    titles = titles_by_color(figures["parallel"].svg())
    assert {f"r{level}" for level in range(8)} == titles.keys() - {"c0"}
    assert sum(map(len, titles.values())) == 24 + 1


def test_a_key_with_a_branch_of_choices_and_one_of_numbers_is_drawn(tmp_path: Path) -> None:
    branches = [
        {"choice": [0.1, 0.2], "when": {"method": "decoder"}},
        {"loguniform": [0.01, 0.5], "when": {"method": "linear_probe"}},
    ]
    space = {"parameters": {**SPACE["parameters"], "optim.lr": branches}}
    folder = write_sweep(tmp_path / "made", COUNTS, num_trials=12, refits=False)
    sweep_spec(space=space).to_yaml(folder / "sweep.yaml")
    log = TrialLog.read(str(folder))
    for index, record in enumerate(log.of("search")):
        if record.draw["method"] == "decoder":
            record.draw["optim.lr"] = [0.1, 0.2][index % 2]
            log.save(record)
    drawn = {figure.name: figure.svg() for figure in build(ReportData.read(str(folder))).all_figures}
    assert {"slice_optim.lr", "parallel"} <= drawn.keys()
