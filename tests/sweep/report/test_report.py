"""A report says what the sweep has found and no more, in one page that asks the network for nothing."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sweep_folder import SPACE, sweep_spec, write_sweep
from trial_epochs import set_metrics

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import duration
from imbvlm.cli.sweep_listing import show_text
from imbvlm.data.manifest import Manifest
from imbvlm.longtail.claims import Claim
from imbvlm.sweep.records.difference import Difference
from imbvlm.sweep.records.quarantine_list import write_quarantine
from imbvlm.sweep.records.resource_usage import (
    ResourceUsage,
    compute_text,
    saved_by_stopping,
    saved_by_store,
    throughput_key,
)
from imbvlm.sweep.records.summary_tables import pareto_records
from imbvlm.sweep.records.sweep_folder import GapReport, SweepState, write_gap
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.records.winner_selection import Selection, write_selection
from imbvlm.sweep.report.report_content import build
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.report_statistics import importances, rank_correlation, rungs
from imbvlm.sweep.report.report_writer import write_report
from imbvlm.sweep.report.score_tables import compared_classes, group_name
from imbvlm.training.test_predictions import TestPredictions

COUNTS = [500, 200, 120, 60, 30, 20, 15, 8, 3, 0]
LONG_TAIL = [max(1, int(1000 / (rank + 1))) for rank in range(8142)]


class Page(HTMLParser):
    """What a page refers to, and whether its tags close."""

    VOID = frozenset({"meta", "link", "img", "path", "circle", "polygon", "rect", "line", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value for key, value in attrs if key in ("src", "href", "srcset", "xlink:href", "data")]
        if tag not in self.VOID and tag != "li":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID and tag != "li":
            assert self.open.pop() == tag


def page_of(folder: Path) -> str:
    return Path(write_report(str(folder))).read_text(encoding="utf-8")


def first_screen(text: str) -> str:
    """What stands above the verdict."""
    return text[text.index("<header>") : text.index('<div class="statement')]


def test_a_page_refers_to_nothing_outside_and_runs_nothing(tmp_path: Path) -> None:
    text = page_of(write_sweep(tmp_path / "made", COUNTS))
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 1_000_000


@pytest.mark.parametrize("damage", ["{", "[]", '{"read_at": "today"}', '{"read_at": "", "scores": 3, "readings": []}'])
def test_a_damaged_record_of_the_test_split_is_a_sentence_and_no_traceback(tmp_path: Path, damage: str) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, num_trials=1)
    (folder / "test.json").write_text(damage)
    with pytest.raises(ImbvlmError, match=rf"test.json is damaged .*\. Remove it; .* imbvlm sweep resume {folder}"):
        ReportData.read(str(folder))


def test_a_gap_stands_with_the_groups_that_are_worst(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, num_trials=1)
    assert "unseen groups" not in page_of(folder)
    gap = GapReport(0.8, 0.701, (0.05, 0.151), 12, 3, (("cam<b>7", 9, 1 / 3), ("cam2", 1200, 0.5)))
    write_gap(str(folder), gap)
    text = page_of(folder)
    for cell in ("80.0", "70.1", "+9.9 [+5.0, +15.1]", "cam&lt;b&gt;7", "33.3", "1,200"):
        assert f">{cell}<" in text
    assert "too few for an interval" not in text
    assert "groups, such as cameras, of which a model has trained on no image" in text
    write_gap(str(folder), replace(gap, interval=None, num_groups=4))
    assert "Over 4 groups and 3 classes" in page_of(folder)
    assert "They are too few for an interval." in page_of(folder)
    (folder / "gap.json").write_text("{}")
    fix = f"Remove it and go on with: imbvlm sweep resume {folder}"
    with pytest.raises(ImbvlmError, match=rf"gap.json is damaged .*\. {fix}"):
        page_of(folder)


def remove_test_images_of_class_0(folder: Path) -> None:
    for path in (folder / "refits").glob("*/per_class.json"):
        content = json.loads(path.read_text())
        test = content["splits"]["test"]
        test["correct"][0] = test["total"][0] = 0
        test["confusions"] = [pair for pair in test["confusions"] if pair["label"]]
        path.write_text(json.dumps(content))


def test_averages_that_leave_classes_out_say_so(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, num_trials=1)
    assert "Averages are over" not in page_of(folder)
    remove_test_images_of_class_0(folder)
    (table,) = [table for table in build(ReportData.read(str(folder))).all_tables if table.name == "scores"]
    num_classes = len(COUNTS)
    assert f"over the {num_classes - 1} of {num_classes} classes that have test images" in table.caption


def test_a_win_is_stated_with_its_interval_and_its_spread(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, gain=0.4)
    report = build(ReportData.read(str(folder)))
    assert report.verdict.is_win
    assert re.fullmatch(
        r"The winner is \d+\.\d points above linear probe in balanced accuracy on the test split "
        r"\(95 % interval \+\d+\.\d to \+\d+\.\d; mean of 2 seeds, their spread \d\.\d\)\.", report.verdict.statement
    )  # fmt: skip
    # The error is 1.0 of each, so that 2.8 points of either side are in the interval.
    gain, low, high = (float(number) for number in re.findall(r"\d+\.\d", report.verdict.statement)[:3])
    assert (gain - low, high - gain) == pytest.approx((2.8, 2.8), abs=0.11)
    assert re.fullmatch(r"It is \d+\.\d points above zero-shot \(95 % interval .*\)\.", report.verdict.details)
    facts = {fact.label: fact for fact in report.facts}
    assert list(facts) == ["balanced", "overall", "many-shot", "medium-shot", "few-shot", "no training"]
    few = facts["few-shot"]
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d %", few.value)
    assert re.fullmatch(r"\d+ test images in \d+ classes", few.notes[0])
    assert [note.rpartition(" ")[0] for note in few.notes[1:]] == ["linear probe", "zero-shot"]
    shown = show_text(SweepState.read(str(folder)))
    assert f"{report.verdict.statement} {report.verdict.details}" in shown


def test_a_baseline_that_wins_is_named_as_the_winner(tmp_path: Path) -> None:
    """The page called the best trial of the search the winner."""
    folder = write_sweep(tmp_path / "made", COUNTS)
    likelihoods = {"b00002": -0.5, "t00001": -0.6}
    write_selection(str(folder), Selection("b00002", likelihoods, {}, num_rows=100))
    assert "Winner: the baseline linear probe (b00002); the best trial is t0" in page_of(folder)


@pytest.mark.parametrize(
    ("points", "words"), [(2.05, "+2.0 points from"), (2.9, "2.9 points above"), (-2.9, "2.9 points below")]
)
def test_above_and_below_are_beyond_the_95_percent_interval(points: float, words: str) -> None:
    """At 1.45 standard errors, 2.05 points here, nothing is shown."""
    difference = Difference.of("linear probe", points / 100, [0.01, 0.01])
    assert difference.text == f"{words} linear probe"
    assert difference.is_win == (points > 2.78)
    assert not Difference.of("linear probe", points / 100, [0.01, None]).is_win


def test_a_probe_that_an_adjustment_brings_up_to_the_winner_is_no_win(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, gain=0.4, adjusted={"linear probe": 0.99})
    report = build(ReportData.read(str(folder)))
    assert not report.verdict.is_win
    assert re.match(
        r"No win is shown: the winner is \d+\.\d points below linear probe, post hoc,", report.verdict.statement
    )
    assert "post hoc: logits adjusted after training" in report.verdict.details.lower()
    (bars,) = [figure for figure in report.all_figures if figure.name == "shot_groups"]
    assert "linear probe, post hoc" in {row[0] for row in bars.data}
    (table,) = [table for table in report.all_tables if table.name == "margins"]
    assert [row[0] for row in table.rows] == ["over linear probe", "over linear probe, post hoc", "over zero-shot"]


def test_figures_show_the_best_head_and_tables_all(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, gain=0.4)
    log = TrialLog.read(str(folder))
    for number, (name, method, value) in enumerate(
        [("class means", "class_means", 0.41), ("discriminant", "discriminant", 0.45)], 3
    ):
        for source_id, trial_id in (("b00001", f"b{number:05d}"), ("refit-zero-shot-seed0", f"refit-{method}-seed0")):
            record = log.records[source_id].model_copy(update={"trial_id": trial_id, "name": name}, deep=True)
            record.config = record.trial_config().with_overrides({"method": method}).to_tree()
            set_metrics(record, {"val/best_balanced_accuracy": value, f"{method}/shrinkage": 0.1})
            set_metrics(record, {f"{method}/temperature": 1.0, "val/balanced_accuracy": value})
            log.save(record)
        shutil.copytree(folder / "refits" / "refit-zero-shot-seed0", folder / "refits" / f"refit-{method}-seed0")
    source = ReportData.read(str(folder))
    assert [refit.name for refit in source.references] == ["linear probe", "discriminant", "class means", "zero-shot"]
    assert [refit.name for refit in source.headline] == ["winner", "linear probe", "discriminant", "zero-shot"]
    report = build(source)
    tables = {table.name: [row[0] for row in table.rows] for table in report.all_tables}
    assert {"class means", "discriminant"} <= set(tables["scores"])
    assert {"over class means", "over discriminant"} <= set(tables["margins"])
    assert report.verdict.details.count("95 % interval") == 2


def test_large_numbers_classes_and_verdict_are_of_the_model_that_is_exported(tmp_path: Path) -> None:
    """Tiles and class figures had the winner as trained while the verdict and `imbvlm export` have it adjusted."""
    adjusted = {"winner": 0.99, "linear probe": 0.6}
    source = ReportData.read(str(write_sweep(tmp_path / "made", COUNTS, gain=0.2, adjusted=adjusted)))
    report = build(source)
    figures, tables = ({item.name: item for item in items} for items in (report.all_figures, report.all_tables))
    ours = [record.epochs[-1]["test_post_hoc/balanced_accuracy"] for record in source.delivered.records]
    assert report.facts[0].value.startswith(f"{100 * np.mean(ours):.1f} ± ")
    names = ["as trained", "linear probe", "linear probe, post hoc", "zero-shot"]
    assert [note.rpartition(" ")[0] for note in report.facts[0].notes[1:]] == names
    assert report.verdict.statement.startswith("The winner, post hoc, is ")
    # A user who counts what predict says of the test images has one seed's model.
    text = page_of(tmp_path / "made")
    assert (
        f"those of seed 0: counting what imbvlm predict gives for the test images finds balanced {100 * ours[0]:.1f}"
        in text
    )
    for name in ("class_size", "sorted_classes"):
        assert [*dict.fromkeys(row[0] for row in figures[name].data[1:])] == (
            ["winner, post hoc", "linear probe, post hoc", "zero-shot"]
        )
    assert tables["class_groups"].caption.endswith("winner, post hoc compared with linear probe, post hoc.")
    mean = np.mean([float(cell) for cell in (row[4] for row in tables["per_class"].rows)])
    assert list(tables["per_class"].header[4:6]) == ["winner_accuracy", "winner, post hoc_accuracy"]
    assert mean == pytest.approx(np.mean(source.delivered.values("test/balanced_accuracy")), abs=1e-4)
    after = source.delivered.classes
    assert (after.correct / after.total).mean() == pytest.approx(np.mean(ours))
    assert source.classes is after
    assert text.count("Post hoc: logits adjusted after training") == 1


def test_a_sweep_that_kept_no_adjusted_classes_says_what_its_class_figures_are(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, adjusted={"winner": 0.99})
    for path in (folder / "refits").glob("*/per_class.json"):
        content = json.loads(path.read_text())
        content["splits"]["test"].pop("adjusted", None)
        path.write_text(json.dumps(content))
    figures = {figure.name: figure for figure in build(ReportData.read(str(folder))).all_figures}
    assert figures["class_size"].data[1][0] == "winner"
    assert "has stored its classes as trained" in figures["class_size"].caption


def test_a_gain_within_the_interval_is_no_win(tmp_path: Path) -> None:
    report = build(ReportData.read(str(write_sweep(tmp_path / "made", COUNTS, gain=0.0))))
    assert not report.verdict.is_win
    assert report.verdict.statement.startswith("No win is shown")


def test_before_the_test_split_is_read_validation_speaks_and_says_so(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, refits=False)
    report = build(ReportData.read(str(folder)))
    assert "on validation" in report.verdict.statement
    assert report.verdict.details.startswith("No test split has been scored: it takes images in a folder test/")
    facts = {fact.label: fact for fact in report.facts}
    assert list(facts) == ["balanced, validation", "overall, validation", "few-shot, validation"]
    assert facts["balanced, validation"].notes == ("linear probe 50.0", "zero-shot 30.0")
    assert "Test split" not in page_of(folder)


def test_a_page_is_there_though_no_trial_sampled_a_parameter_that_depends_on_another(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, refits=False, num_trials=2)
    other = {"classifier.temperature": {"loguniform": [0.01, 0.1], "when": {"loss.name": "lade"}}}
    losses = {"loss.name": {"choice": ["cross_entropy", "balanced_softmax", "lade"]}}
    sweep_spec(space={"parameters": {**SPACE["parameters"], **losses, **other}}).to_yaml(folder / "sweep.yaml")
    assert "Parallel coordinates" in page_of(folder)


def test_without_a_test_split_the_large_numbers_are_claims_and_none_where_too_little_is_known(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, refits=False)
    claims = {"balanced_accuracy": Claim(0.641, 0.03, 5, 300), "few_shot_accuracy": Claim(0.44, 0.08, 1, 6)}
    write_selection(str(folder), Selection("t00003", {"t00003": -0.5}, claims, 300, 5))
    facts = build(ReportData.read(str(folder))).facts
    assert [(fact.label, fact.value) for fact in facts] == [("balanced", "64.1 ± 5.9 %"), ("few-shot", "not known")]
    assert facts[0].notes == (
        "to expect, over 5 classes and 300 validation images",
        "corrected for the selection, by models of 80 % of the training images",
    )
    assert facts[1].notes[2] == "they tell it to ± 15.7 points"
    page = page_of(folder)
    assert "64.1 ± 5.9 %" in page
    assert "Selected by class-balanced log-likelihood on 300 validation images." in page


def test_a_sweep_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS, refits=False, num_trials=1)
    (folder / "trials" / "t00001.json").unlink()
    assert "No trial has given a result yet" in page_of(folder)


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImbvlmError, match=r"has no sweep\.yaml"):
        write_report(str(tmp_path))
    write_sweep(tmp_path / "made", COUNTS, refits=False)
    shutil.rmtree(tmp_path / "made" / "trials")
    with pytest.raises(ImbvlmError, match="no trial yet"):
        write_report(str(tmp_path / "made"))


def test_a_page_of_8142_classes_is_small_and_quick(tmp_path: Path) -> None:
    """With names as long as those of iNaturalist; outside of the tables of all classes none has a mark or a row."""
    names = [f"{number:05d}_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae" for number in range(8142)]
    folder = write_sweep(tmp_path / "made", LONG_TAIL, class_names=names)
    started = time.perf_counter()
    text = page_of(folder)
    assert time.perf_counter() - started < 20
    assert len(text) < 5_000_000
    rest = re.sub('<div class="order".*?</div>', "", text, flags=re.DOTALL)
    assert len(rest) < 1_000_000
    assert sum(f">{name}<" in rest for name in names) < 60


def test_links_lead_to_every_class_by_accuracy_by_size_and_by_change(tmp_path: Path) -> None:
    """Each order is a table that a link shows, since a page without a script can't sort one."""
    source = ReportData.read(str(write_sweep(tmp_path / "made", COUNTS)))
    report = build(source)
    text = page_of(tmp_path / "made")
    head = text[: text.index("<main>")]
    orders = {table.name: table for table in report.class_orders}
    assert list(orders) == ["by-accuracy", "by-size", "by-change"]
    for name in orders:
        assert f'<a href="#{name}">' in head
        assert f'<div class="order" id="{name}">' in text
    results, baseline = source.classes, source.references[0].classes
    accuracy, change = (
        results.correct / results.total,
        results.correct / results.total - baseline.correct / baseline.total,
    )
    assert [row[3] for row in orders["by-accuracy"].rows] == [f"{100 * value:.1f}" for value in sorted(accuracy)]
    assert [row[5] for row in orders["by-change"].rows] == [f"{100 * value:+.1f}" for value in sorted(change)]
    assert [int(row[1]) for row in orders["by-size"].rows] == COUNTS
    for table in orders.values():
        assert sorted(row[0] for row in table.rows) == sorted(results.class_names)
    # The same rows are in per_class.csv, so that no order has a file of its own.
    assert not {table.name for table in report.all_tables} & orders.keys()


def test_a_class_without_test_images_has_dashes_and_comes_last(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    remove_test_images_of_class_0(folder)
    by_accuracy, _, by_change = build(ReportData.read(str(folder))).class_orders
    assert list(by_accuracy.rows[-1]) == list(by_change.rows[-1]) == ["class 0", "500", "0", "-", "-", "-"]


def test_words_are_explained_where_they_first_stand_and_once(tmp_path: Path) -> None:
    text = page_of(write_sweep(tmp_path / "made", COUNTS))
    sections = re.split("<main>|<section", text)
    first = {
        term: index
        for index, section in reversed([*enumerate(sections)])
        for term in re.findall("<dt>([^<]*)</dt><dd>", section)
    }
    for term in ("balanced accuracy", "many-, medium-, few-shot", "95 % interval", "points", "encoder", "linear probe"):
        assert first[term] == 0, term
    for term in ("lr", "views", "balanced softmax", "decoder", "Pareto front", "rung", "imbalance factor"):
        assert first[term] > 0, term
    terms = [
        term
        for block in re.findall('<dl class="terms">(.*?)</dl>', text, flags=re.DOTALL)
        for term in re.findall("<dt>(.*?)</dt>", block)
    ]
    assert len(terms) == len(set(terms))
    # A definition's own words are explained, too.
    assert first["pooled output"] == first["linear probe"]
    # A word that the page doesn't use takes no room.
    assert "focal" not in first


def test_hostile_names_are_words(tmp_path: Path) -> None:
    names = [f"<script>alert({number})</script>\"'&" for number in range(len(COUNTS))]
    folder = write_sweep(tmp_path / "made", COUNTS, class_names=names)
    page = Page(page_of(folder))
    assert "script" not in page.tags
    assert page.open == []


def test_quarantined_files_are_counted_by_class(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    lines = ["split,row,path,reason,label,class_name,shot_group"]
    lines += [f"train,{row},p{row}.jpg,truncated file,8,rare bird,few_shot" for row in range(3)]
    (folder / "quarantine.csv").write_text("\n".join(lines) + "\n")
    (table,) = [
        table for table in build(ReportData.read(str(folder))).all_tables if table.name == "quarantine_by_class"
    ]
    assert list(table.rows) == [["rare bird", "few-shot", "3", "truncated file"]]
    assert "Left out: 3 files that could not be decoded." in page_of(folder)
    (folder / "quarantine.csv").write_text("\n".join(lines[:2]) + "\n")
    assert "Left out: 1 file that could not be decoded." in page_of(folder)


def test_texts_of_tables_are_no_formulas_and_numbers_stay(tmp_path: Path) -> None:
    """A spreadsheet would run a class called =1+1; -3.2 of a table is a number."""
    names = ["=1+1", "+1", "-2", "@sum", *(f"class {number}" for number in range(4, len(COUNTS)))]
    folder = write_sweep(tmp_path / "made", COUNTS, class_names=names)
    rows = [{"split": "train", "row": 3, "path": "-x.jpg", "reason": "cut", "label": 1, "class_name": "+1"}]
    write_quarantine(str(folder), [{**rows[0], "shot_group": "many_shot"}])
    assert (folder / "quarantine.csv").read_text().splitlines()[1] == "train,3,'-x.jpg,cut,1,'+1,many_shot"
    source = ReportData.read(str(folder))
    assert (source.quarantine[0]["path"], source.quarantine[0]["class_name"]) == ("-x.jpg", "+1")
    tables = {table.name: list(csv.reader(table.csv().splitlines())) for table in build(source).all_tables}
    assert [row[0] for row in tables["per_class"][1:5]] == ["'=1+1", "'+1", "'-2", "'@sum"]
    assert tables["quarantine_by_class"][1][0] == "'+1"
    assert all(cell.startswith("+") for row in tables["gained"][1:] for cell in row[-1:])
    assert all(re.match(r"[+-]\d", cell) for row in tables["margins"][1:] for cell in row[1:5])


def test_confused_images_are_shown_where_the_manifest_is_there(tmp_path: Path) -> None:
    manifest = Manifest.read("embedded:fashion_mnist_lt")
    counts = manifest.class_stats().split_counts.tolist()
    folder = write_sweep(tmp_path / "made", counts, class_names=list(manifest.class_names))
    assert "<img" not in page_of(folder)
    spec = (folder / "sweep.yaml").read_text().replace("gone.parquet", "embedded:fashion_mnist_lt")
    (folder / "sweep.yaml").write_text(spec)
    assert page_of(folder).count('<img src="data:image/webp;base64,') >= 12


def test_what_mattered_is_a_hint_unless_trials_had_equal_chances(tmp_path: Path) -> None:
    adaptive = page_of(write_sweep(tmp_path / "tpe", COUNTS))
    assert "What may have mattered" in adaptive
    assert "A hint, not a finding" in adaptive
    random = page_of(write_sweep(tmp_path / "random", COUNTS, searcher={"name": "random"}))
    assert "sampled by random search" in random
    assert "not a finding" not in random
    stratified = page_of(write_sweep(tmp_path / "even", COUNTS, stratify=["loss.name"]))
    assert "Each choice of loss.name got the same number of trials" in stratified
    assert "By loss.name" in stratified


def test_the_loss_that_makes_the_difference_is_the_most_important(tmp_path: Path) -> None:
    ranked = importances(ReportData.read(str(write_sweep(tmp_path / "made", COUNTS, num_trials=60))))
    assert ranked[0].key == "loss.name"
    assert sum(importance.share for importance in ranked) == pytest.approx(1)
    assert {importance.key for importance in ranked} == {"loss.name", "method", "decoder.depth", "optim.lr"}


def test_compute_saved_by_stopping_and_what_its_rung_foretold(tmp_path: Path) -> None:
    source = ReportData.read(str(write_sweep(tmp_path / "made", COUNTS)))
    saved = saved_by_stopping(source.log.of("search"))
    assert (saved.num_stopped, saved.epochs, saved.planned_epochs) == (6, 6 * 8, 24 * 12)
    assert saved.seconds == pytest.approx(6 * 8 * 2)
    (rung,) = rungs(source)
    assert rung.num_trials == 18
    assert rung.correlation == pytest.approx(1)


def test_where_the_time_went_what_the_store_spared_and_what_a_plan_had_said(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    log = TrialLog.read(str(folder))
    probes = [record for record in log.records.values() if record.config["method"] != "zero_shot"]
    (key,) = {throughput_key(record.trial_config()) for record in probes}
    phases = {"start": 10.0, "features": 20.0, "trials": 70.0, "refits": 30.0}
    spent = {"seconds": 130.0, "gpu_seconds": 520.0, "machine_seconds": 130.0, "phases": phases}
    plan = {
        "seconds": {
            "features": 15.0,
            "baselines": [2.0, 20.0],
            "trials": [40, 60],
            "refits": [9, 9],
            "total": [66, 104],
        }
    }
    assert "Where the time went" not in page_of(folder)
    for name, content in (("spent", spent), ("paces", {"num_train": 500, "seconds": {key: 0.01}}), ("plan", plan)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    compute = ResourceUsage.read(str(folder), sweep_spec(), log)
    saved = saved_by_store(compute)
    epochs = sum(len(record.epochs) for record in probes)
    assert (saved.num_read, saved.num_seen) == (500 * epochs, 500)
    assert saved.encoder_seconds == pytest.approx(5 * epochs)
    # Four GPUs stood by all the time.
    words = f"saved about {duration(5 * epochs - 20)} ({4 * (5 * epochs - 20) / 3600:.3g} GPU-hours): trials read "
    assert compute_text(compute).splitlines()[1].startswith(f"feature store: {words}")
    assert compute_text(compute).splitlines()[0] == (
        "time: planned 1 min 6 s to 1 min 44 s, took 2 min 10 s: start of Ray, checks 10 s, features 20 s, baselines "
        "and trials 1 min 10 s, refits and test split 30 s"
    )
    (table,) = [table for table in build(ReportData.read(str(folder))).all_tables if table.name == "time"]
    assert table.rows[2] == ["baselines and trials", "42 s to 1 min 20 s", "1 min 10 s"]
    assert words.replace("saved", "Saved", 1) in page_of(folder)
    # A store that costs more than it spares is no gain.
    (folder / "paces.json").write_text(json.dumps({"num_train": 1, "seconds": {key: 1e-6}}))
    assert "feature store: saved nothing here" in compute_text(ResourceUsage.read(str(folder), sweep_spec(), log))


def test_rank_correlation_takes_ties_and_says_when_it_cannot_tell() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [1, 1, 2]) == pytest.approx(1)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_a_folder_gets_every_figure_and_table(tmp_path: Path) -> None:
    names = ["50 % & more_or_less", *(f"class {number}" for number in range(1, len(COUNTS)))]
    folder = write_sweep(tmp_path / "made", COUNTS, class_names=names)
    page = Path(write_report(str(folder), str(tmp_path / "out")))
    assert page == tmp_path / "out" / "report.html"
    figures = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    wanted = {"shot_groups", "class_size", "sorted_classes", "calibration", "history", "cost", "few_shot", "rung"}
    assert wanted | {"importance", "parallel", "slice_optim_lr"} <= figures
    for name in figures:
        place = tmp_path / "out" / "figures" / name
        with Image.open(place.with_suffix(".png")) as picture:
            assert picture.width >= 1000
            # Drawn, not only a white page: text and marks have many shades.
            assert len(picture.convert("L").getcolors()) > 20
        with open(place.with_suffix(".csv"), newline="") as stream:
            header, *numbers = csv.reader(stream)
        assert numbers
        assert {len(row) for row in numbers} == {len(header)}
    with open(tmp_path / "out" / "tables" / "per_class.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["training_images"]) for row in rows] == COUNTS
    assert rows[0]["class"] == names[0]
    latex = (tmp_path / "out" / "tables" / "scores.tex").read_text()
    assert latex.startswith("\\begin{tabular}{lcccc")
    assert re.search(r"^winner & [\d.]+ \$\\pm\$ [\d.]+ .* & 2 & 1 \\\\$", latex, re.MULTILINE)


def test_a_figures_numbers_are_those_of_the_records(tmp_path: Path) -> None:
    source = ReportData.read(str(write_sweep(tmp_path / "made", COUNTS)))
    figures = {figure.name: list(csv.DictReader(figure.csv().splitlines())) for figure in build(source).all_figures}
    best = max(value for _, value in source.valued())
    assert max(float(row["objective"]) for row in figures["cost"]) == pytest.approx(best, abs=1e-5)
    front = [float(row["objective"]) for row in figures["cost"] if row["on_front"] == "True"]
    assert max(front) == pytest.approx(best, abs=1e-5)
    winner = [row for row in figures["shot_groups"] if row["what"] == "winner" and row["group"] == "few"]
    assert float(winner[0]["accuracy"]) == pytest.approx(
        sum(source.delivered.values("test/few_shot_accuracy")) / 2, abs=1e-5
    )


def test_margins_stand_beside_the_seeds_spread_and_the_interval(tmp_path: Path) -> None:
    source = ReportData.read(str(write_sweep(tmp_path / "made", COUNTS)))
    (table,) = [table for table in build(source).all_tables if table.name == "margins"]
    (probe,) = [reference for reference in source.references if reference.name == "linear probe"]
    row = dict(zip(table.header, next(row for row in table.rows if row[0] == "over linear probe"), strict=True))
    for group, heading in (("top1", "overall"), ("few_shot", "few")):
        ours, theirs = (scored.values(f"test/{group}_accuracy") for scored in (source.delivered, probe))
        gain, spread_ = (
            100 * (np.mean(ours) - np.mean(theirs)),
            100 * np.hypot(np.std(ours, ddof=1), np.std(theirs, ddof=1)),
        )
        assert row[heading] == f"{gain:+.1f} ± {spread_:.1f}"
    assert re.fullmatch(r"\[\+\d+\.\d, \+\d+\.\d\]", row["95 % interval (balanced)"])


@pytest.mark.parametrize("num_groups", [30, 4])
def test_intervals_of_test_images_in_groups_are_of_groups(tmp_path: Path, num_groups: int) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    plain = build(ReportData.read(str(folder)))
    for refit in (folder / "refits").iterdir():
        counts = json.loads((refit / "per_class.json").read_text(encoding="utf-8"))["splits"]["test"]
        labels = np.repeat(np.arange(len(COUNTS)), counts["total"])
        is_right = np.concatenate(
            [np.arange(total) < right for total, right in zip(counts["total"], counts["correct"], strict=True)]
        )
        predicted = np.where(is_right, labels, (labels + 1) % len(COUNTS))
        groups, rows = np.arange(len(labels)) % num_groups, np.arange(len(labels))
        tensors = [torch.from_numpy(values) for values in (labels, rows, predicted, groups)]
        TestPredictions(tensors[0], tensors[1], {"test": tensors[2]}, tensors[3]).write(str(refit))
    report = build(ReportData.read(str(folder)))
    note = f"{num_groups} groups resampled" if num_groups == 30 else "4 groups are too few for one, it takes 10"
    assert note in report.verdict.statement
    assert ("interval isn't known" in report.verdict.statement) == (num_groups == 4)
    assert report.verdict.is_win == (num_groups == 30)
    # A few classes can have images of fewer groups.
    for fact, before in list(zip(report.facts, plain.facts, strict=True))[:2]:
        assert fact.notes[0] == f"{before.notes[0]}, {note}"
        assert ("±" in fact.value) == (num_groups == 30)
        assert fact.value.split()[0] == before.value.split()[0]
    (margins,) = [table for table in report.all_tables if table.name == "margins"]
    assert f"Images have groups: {note}." in margins.caption


def test_several_objectives_have_their_pareto_set(tmp_path: Path) -> None:
    few = "val/few_shot_accuracy"
    assert "Pareto set" not in page_of(write_sweep(tmp_path / "one", COUNTS))
    source = ReportData.read(str(write_sweep(tmp_path / "two", COUNTS, other_objectives=[few])))
    (table,) = [table for table in build(source).all_tables if table.name == "pareto"]
    assert list(table.header[2:]) == ["val/balanced_accuracy", few]
    trial_ids = [record.trial_id for record in pareto_records(source.log, source.spec)]
    assert [row[0] for row in table.rows] == trial_ids
    assert trial_ids[0] == source.log.best("val/balanced_accuracy")[0].trial_id


def test_classes_that_gain_lose_and_are_never_right_are_counted_by_group(tmp_path: Path) -> None:
    source = ReportData.read(str(write_sweep(tmp_path / "made", COUNTS)))
    (table,) = [table for table in build(source).all_tables if table.name == "class_groups"]
    (_, ours), (_, theirs) = compared_classes(source)
    gain = ours.correct / ours.total - theirs.correct / theirs.total
    groups = {group_name(group): labels for group, labels in ours.stats.shot_groups.items()}
    for row in table.rows:
        labels = groups[row[0]]
        never = [int((results.correct[labels] == 0).sum()) for results in (ours, theirs)]
        expected = [len(labels), int((gain[labels] > 0).sum()), int((gain[labels] < 0).sum()), *never]
        assert [int(cell) for cell in row[1:]] == expected
    assert sum(int(row[1]) for row in table.rows) == len(COUNTS)


def test_the_best_few_stand_with_the_spread_of_their_seeds(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    assert "over several seeds" not in page_of(folder)
    log = TrialLog.read(str(folder))
    first = log.best("val/balanced_accuracy")[0]
    value = first.best_value("val/best_balanced_accuracy")
    again = first.model_copy(
        deep=True, update={"trial_id": f"{first.trial_id}-seed1", "kind": "confirm", "name": first.trial_id}
    )
    set_metrics(again, {"val/best_balanced_accuracy": value - 0.02})
    again.epochs = again.epochs[-1:]
    log.save(again)
    (table,) = [table for table in build(ReportData.read(str(folder))).all_tables if table.name == "over_seeds"]
    assert table.rows[0][0] == first.trial_id
    assert table.rows[0][2:] == ["2", f"{100 * value - 1:.1f} ± 1.4"]


def test_calibration_shows_the_winner_as_it_is_exported_too(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    assert "winner, post hoc" not in page_of(folder)
    for path in folder.glob("refits/refit-winner-*/per_class.json"):
        content = json.loads(path.read_text())
        content["splits"]["test"]["adjusted_confidence_bins"] = np.array([[9.0] * 15, [7.0] * 15, [7.0] * 15]).tolist()
        path.write_text(json.dumps(content))
    assert "winner, post hoc" in page_of(folder)


def test_the_command_prints_where_the_page_is(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    command = [sys.executable, "-m", "imbvlm", "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder}/report.html\n"
    # The manifest of this folder never was there.
    (note,) = done.stderr.splitlines()
    assert note.startswith("imbvlm: Not all images of confused pairs are shown: the manifest gone.parquet of the sweep")


def test_the_first_screen_names_the_encoder_and_the_page_has_no_jargon(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "made", COUNTS)
    text = page_of(folder)
    numbers = dict(re.findall("<div><dt>([a-z ]*)</dt><dd>([^<]*)</dd></div>", first_screen(text)))
    # The manifest is gone, and the refits have counted the test images.
    assert numbers == {"encoder": "tinylit_lite0", "image size": "128 x 128 pixels", "test images": "50"}
    spec = (folder / "sweep.yaml").read_text()
    (folder / "sweep.yaml").write_text(spec.replace("gone.parquet", "embedded:fashion_mnist_lt"))
    report = build(ReportData.read(str(folder)))
    assert report.num_images == {"training": 2480, "validation": 500, "test": 2000}
    assert "<dt>validation images</dt><dd>500</dd>" in page_of(folder)
    words = re.sub("<pre.*?</pre>|<style.*?</style>", "", text, flags=re.DOTALL)
    assert not re.findall("PED-ANOVA|by the trial scheduler|linear_probe|cross_entropy", words)
    folder = write_sweep(tmp_path / "gone", COUNTS, num_trials=1)
    record = folder / "trials" / "t00001.json"
    record.write_text(record.read_text().replace("tinylit_lite0", "local-dir:gone"))
    assert "<dd>local-dir:gone</dd>" in first_screen(page_of(folder))
    assert "image size" not in first_screen(page_of(folder))


def test_what_scrolls_shows_it() -> None:
    """On a phone tables were cut off without a sign: a shadow stays at the edge where there is more, and names stay."""
    style = files("imbvlm.sweep.report").joinpath("report.css").read_text()
    (rule,) = re.findall(r"^\.scroll\{[^}]*\}", style, flags=re.MULTILINE)
    assert rule.count(" local") == rule.count(" scroll") == 2
    assert "tr>:first-child{position:sticky;left:0" in style


# ------------------------------------------------------------------------------------------------- in a browser


def chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine; install it to see the report opened")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"]
    return subprocess.run([program, *quiet, *arguments], capture_output=True, text=True, timeout=100, check=True)


def opened(page: Path, tmp_path: Path) -> tuple[list[str], list[str]]:
    """Lines of the console, and URLs of http(s) that were asked for."""
    log = tmp_path / "net.json"
    done = chromium(f"--log-net-log={log}", "--dump-dom", page.as_uri())
    # Chromium's own pages complain of a slow network on a busy machine.
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    console = [line for line in lines if "source: chrome://" not in line]
    # Chromium asks for things of its own besides; what a page asks for has this annotation (blink_resource_loader).
    asked = re.findall(r'"traffic_annotation":101845102,"url":"(https?://[^"]+)"', log.read_text())
    return console, asked


@pytest.mark.slow
@pytest.mark.parametrize("counts", [COUNTS, LONG_TAIL], ids=["10 classes", "8142 classes"])
def test_chromium_opens_it_without_an_error_or_a_request(tmp_path: Path, counts: list[int]) -> None:
    folder = write_sweep(tmp_path / "made", counts)
    assert opened(Path(write_report(str(folder))), tmp_path) == ([], [])
    # The same look does see a page that asks and complains.
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>')
    console, asked = opened(bad, tmp_path)
    assert console
    assert "http://127.0.0.1:9/x.png" in asked


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(tmp_path: Path, width: int) -> None:
    """Wide tables and figures scroll by themselves; the page doesn't."""
    folder = write_sweep(tmp_path / "made", COUNTS)
    text = Path(write_report(str(folder))).read_text()
    probe = tmp_path / "probe.html"
    frame = json.dumps(text).replace("</", "<\\/")
    # A frame of that width: headless windows have a least width of their own.
    probe.write_text(
        f'<iframe id="f" width="{width}" height="900"></iframe><p id="out"></p><script>'
        f"const f=document.getElementById('f');f.onload=()=>{{const d=f.contentDocument.documentElement;"
        f"document.getElementById('out').textContent='widths '+d.scrollWidth+' '+d.clientWidth}};"
        f"f.srcdoc={frame}</script>"
    )
    done = chromium("--dump-dom", "--virtual-time-budget=5000", probe.as_uri())
    match = re.search(r"widths (\d+) (\d+)", done.stdout)
    assert match is not None
    assert int(match[1]) <= int(match[2]) <= width
