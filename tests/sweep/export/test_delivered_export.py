"""The delivered model from a search's logits to predictions: blends and single winners, scored as they are exported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_images import TinyImages, extraction_in_this_process

import imbvlm
from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.yaml_file import read_yaml
from imbvlm.cli.sweep_listing import compare_text, show_text
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.inference.calibration_file import CALIBRATION_FILE, ModelCalibration
from imbvlm.inference.taxonomy_file import ModelTaxonomy, read_rank_scores
from imbvlm.longtail.blending import BlendDecision, BlendMember
from imbvlm.longtail.decisions.scored_rows import ScoredRows
from imbvlm.longtail.metrics import per_class_accuracy
from imbvlm.longtail.roll_up import RankScores
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.sweep.export.exporter import export_sweep
from imbvlm.sweep.records.adjustment_selection import (
    logits_file,
    read_validation,
    select_adjustments,
    write_post_hoc,
)
from imbvlm.sweep.records.delivered_model import (
    delivered_members,
    delivered_names,
    exported_refits,
    score_delivered,
    write_decision_scores,
)
from imbvlm.sweep.records.difference import refits_of
from imbvlm.sweep.records.provenance import provenance, write_provenance
from imbvlm.sweep.records.refit_selection import mark_superseded, refits
from imbvlm.sweep.records.sweep_folder import (
    SUSPECTS_FILE,
    SuspectLabel,
    SweepState,
    read_suspects,
    write_suspects,
)
from imbvlm.sweep.records.trial_log import BLEND, DELIVERED, TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.records.winner_selection import Selection, select_winner, write_selection
from imbvlm.sweep.report.rendering import page
from imbvlm.sweep.report.report_content import build
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.test_predictions import TestPredictions
from imbvlm.training.trial_session import TrialSession, TrialSettings
from imbvlm.training.validation_logits import VAL_LOGITS_FILE

OBJECTIVE = "val/balanced_accuracy"
SEEDS = [0, 1]
TREE = Taxonomy(("order", "family", "species"), (("a", "b"), ("a", "b"), ("a", "c"), ("d", "e"), ("d", "e")))
CANDIDATES: list[tuple[str, TrialKind, str, str, dict[str, Any]]] = [
    ("b00001", "baseline", "zero-shot", "zero_shot", {}),
    ("b00002", "baseline", "linear probe", "linear_probe", {"optim__lr": 0.05}),
    ("t00001", "search", "", "linear_probe", {"optim__lr": 0.3, "classifier__kind": "cosine"}),
    ("t00002", "search", "", "decoder", {"decoder__width": 32, "decoder__num_heads": 2, "decoder__depth": 1}),
]


@dataclass(frozen=True)
class MadeSweep:
    """A sweep's folder after its refits, with the problem that it was run on."""

    folder: str
    problem: TinyImages
    spec: SweepSpec
    log: TrialLog

    def settings(self, config: TrialConfig, **fields: Any) -> TrialSettings:
        return TrialSettings(config, self.problem.features(config), OBJECTIVE, **fields)

    def run(self, trial_id: str, kind: TrialKind, name: str, config: TrialConfig, **fields: Any) -> None:
        """Run a trial in this process and keep its record."""
        draw = {} if config.optim is None or kind != "search" else {"optim.lr": config.optim.lr}
        tree = config.to_tree()
        record = TrialRecord(trial_id=trial_id, kind=kind, name=name, config=tree, draw=draw, started_at=1.0)
        for report in TrialSession(torch.device("cpu")).reports(self.settings(config, **fields)):
            assert report.failure is None
            record.epochs.append(report.values)
        record.state, record.ended_at = "finished", 2.0
        self.log.save(record)

    def deliver(self, members: dict[str, float] | None = None, winner: str = "t00002") -> Selection:
        """Select, refit and score as a sweep does; winner and members, a blend's weights, are given."""
        num_test = 15
        selection = select_winner(self.folder, self.log, self.spec, num_test)
        assert selection is not None
        blend = tuple(BlendMember(name, "", weight, 1.5, 0.1) for name, weight in (members or {}).items())
        decisions = (BlendDecision(1, 0.02, 0.01),)
        selection = replace(selection, winner=winner, members=blend, decisions=decisions, temperature=0.8)
        write_selection(self.folder, selection)
        self.log.selected = selection.selected
        chosen = refits(self.log, self.spec)
        adjustments = select_adjustments(self.folder, chosen, self.log, self.spec)
        write_post_hoc(self.folder, adjustments)
        delivered, names = delivered_members(self.folder, self.log, self.spec, selection), {}
        for refit in chosen:
            for seed, config in refit.seeded():
                trial_id = refit.trial_id(seed, self.log)
                names[trial_id] = refit.name
                if trial_id not in self.log.records:
                    adjustment, own_folder = adjustments.get(refit.name), storage.join(self.folder, "refits", trial_id)
                    self.run(
                        trial_id,
                        "refit",
                        refit.name,
                        config,
                        refit=True,
                        score_test=True,
                        keeps_test_logits=True,
                        model_folder=own_folder,
                        logits_file=storage.join(own_folder, VAL_LOGITS_FILE),
                        post_hoc=None if adjustment is None else adjustment.adjustment,
                    )
        mark_superseded(self.log, {**names, **delivered_names(delivered)})
        reason = score_delivered(self.folder, self.log, delivered, lambda config: self.problem.features(config).info)
        assert reason is None
        runs = [refits_of(self.log, member.refit.name) for member in delivered]
        manifest = Manifest.read(self.problem.manifest)
        exported = [
            exported_refits(self.folder, own, lambda config: self.problem.features(config).info, 5) for own in runs
        ]
        write_decision_scores(self.folder, self.folder, self.log, self.spec, delivered, manifest, exported)
        return selection

    def record(self, name: str) -> TrialRecord:
        """The delivered model's record of a name, of several the first."""
        return next(record for record in self.log.of("delivered") if record.name == name)


def made_sweep(home: Path, **fields: Any) -> MadeSweep:
    problem = TinyImages(home, taxonomy=TREE)
    base = problem.config("linear_probe").to_tree()
    space = {"parameters": {"optim.lr": {"loguniform": [0.01, 0.5]}}}
    tree = {"name": "made", "base": base, "space": space, "refit_seeds": SEEDS, "storage": str(home / "runs"), **fields}
    spec, folder = SweepSpec.from_tree(tree), str(home / "runs" / "made-1")
    Path(folder).mkdir(parents=True)
    spec.to_yaml(Path(folder) / "sweep.yaml")
    write_provenance(folder, provenance(Manifest.read(problem.manifest)))
    made = MadeSweep(folder, problem, spec, TrialLog(folder))
    for trial_id, kind, name, method, overrides in CANDIDATES:
        config = problem.config(method, **overrides)
        made.run(trial_id, kind, name, config, logits_file=logits_file(folder, trial_id))
    return made


@pytest.fixture(scope="module")
def blended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeSweep]:
    """A sweep that delivers a blend of a baseline, a cosine probe and a decoder."""
    with extraction_in_this_process():
        made = made_sweep(tmp_path_factory.mktemp("blended"))
        made.deliver({"t00002": 0.5, "t00001": 0.3, "b00002": 0.2})
        yield made


def predicted(model: imbvlm.Model, manifest: Manifest) -> list[int]:
    images = [row.as_py() for row in manifest.table["bytes"]]
    return [prediction.labels[0] for prediction in model.predict(images)]


def balanced(labels: np.ndarray, classes: list[int]) -> float:
    right = np.bincount(labels[labels == np.array(classes)], minlength=5)
    return float(np.nanmean(per_class_accuracy(right, np.bincount(labels, minlength=5))))


def test_the_row_in_large_type_is_of_the_exported_blend(blended: MadeSweep, tmp_path: Path) -> None:
    """Counted from predictions of the test images, as a user would."""
    said: list[str] = []
    (exported,) = export_sweep(blended.folder, str(tmp_path / "out"), onnx=True, say=said.append)
    assert said == []
    assert exported.name == "a blend of t00002, t00001, b00002"
    assert exported.onnx_difference is not None
    assert exported.onnx_difference < 1e-3
    model, test = imbvlm.load(tmp_path / "out", "cpu"), Manifest.read(blended.problem.manifest).split("test")
    classes = predicted(model, test)
    assert model.taxonomy == TREE
    record = blended.record(DELIVERED)
    scored = TestPredictions.read(storage.join(blended.folder, "refits", record.trial_id))
    assert scored is not None
    assert scored.predicted["test"].tolist() == classes
    value = record.epochs[-1]["test/balanced_accuracy"]
    assert value == pytest.approx(balanced(test.labels, classes))
    report = build(ReportData.read(blended.folder))
    # All members have one encoder of one size.
    assert list(report.encoders) == [blended.log.records["t00002"].config["encoder"]["name"]]
    assert len(report.image_sizes) == 1
    assert report.facts[0].value.startswith(f"{100 * value:.1f} ± ")
    assert report.facts[0].notes[0] == "15 test images in 5 classes"
    assert report.facts[0].notes[1].startswith("over 2 seeds ")
    (table,) = [table for table in report.all_tables if table.name == "blend"]
    assert [row[0] for row in table.rows] == ["t00002", "t00001", "b00002"]
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "A blend of 3 of 2 trials and 2 baselines" in card
    assert "| b00002 | linear probe | 0.2 | 1.2 |" in card
    assert "| what | species | family | order | height |" in card
    assert "Promises are for images that come as 15 validation images, which the exported weights have scored." in card
    assert "- accept 0.9: 0 classes with a promise each, 0 with one of their shot group, 5 without" in card
    assert "- roll-up 0.9: names of no rank have a promise" in card
    assert f"| this model | {100 * (1 - value):.1f} |" in card
    assert str(blended.problem.folder) not in card, "a card is published"
    members = read_yaml(tmp_path / "out" / "blend.yaml").data["members"]
    assert [(member["trial"], member["weight"]) for member in members] == [
        ("t00002", 0.5), ("t00001", 0.3), ("b00002", 0.2)
    ]  # fmt: skip


def test_each_seed_of_a_blend_is_scored_and_the_comparison_is_of_seeds(blended: MadeSweep) -> None:
    seeds = [record for record in blended.log.of("delivered") if record.name == BLEND]
    assert len(seeds) == len(SEEDS)
    state = SweepState.read(blended.folder)
    text = show_text(state)
    assert "delivered is a blend of t00002 0.50, t00001 0.30, b00002 0.20" in text
    assert "the blend is " in text.lower()
    assert "mean of 2 seeds" in text
    assert "blend of t00002, t00001, b00002" in compare_text([state])
    assert set(state.to_dict()["test"]) >= {DELIVERED, BLEND, "winner", "linear probe"}


def test_errors_by_rank_are_of_the_model_as_exported(blended: MadeSweep) -> None:
    """By hand: classes 0 and 1 are one family, 2 is of their order, 3 and 4 are of the other."""
    record = blended.record(DELIVERED)
    rows = TestPredictions.read(storage.join(blended.folder, "refits", record.trial_id))
    assert rows is not None
    pairs = list(zip(rows.labels.tolist(), rows.predicted["test"].tolist(), strict=True))
    families, orders = "bbcee", "aaadd"
    wrong = [[label != other for label, other in pairs]]
    wrong += [[names[label] != names[other] for label, other in pairs] for names in (families, orders)]
    # Each class has three test images, so that the mean over classes is that over images.
    errors = [float(np.mean(row)) for row in wrong]
    epoch = record.epochs[-1]
    keys = ["test/rank_error/species", "test/rank_error/family", "test/rank_error/order"]
    assert [epoch[key] for key in keys] == pytest.approx(errors)
    assert epoch["test/lca_height"] == pytest.approx(sum(errors))
    (table,) = [table for table in build(ReportData.read(blended.folder)).all_tables if table.name == "rank_errors"]
    assert table.header == ["what", "species", "family", "order", "height"]
    assert table.rows[0] == [DELIVERED, *(f"{100 * error:.1f}" for error in errors), f"{sum(errors):.2f}"]
    assert len(table.rows) == len({own.name for own in SweepState.read(blended.folder).scored})
    state = SweepState.read(blended.folder)
    assert "errors by rank on the test split" in show_text(state)
    scores = state.to_dict()["test"]
    assert scores[DELIVERED]["rank_error/family"] == pytest.approx([errors[1]])
    assert all(own["rank_error/species"] == pytest.approx([1 - x for x in own["balanced_accuracy"]])
               for own in scores.values())  # fmt: skip


def test_a_roll_up_is_learned_on_the_exports_own_scores_of_official_validation_images(
    blended: MadeSweep, tmp_path: Path
) -> None:
    """They are the probabilities that a user gets for these images; 15 of them are too few for 0.95."""
    export_sweep(blended.folder, str(tmp_path / "out"))
    model, val = imbvlm.load(tmp_path / "out", "cpu"), Manifest.read(blended.problem.manifest).split("val")
    tree = ModelTaxonomy.read(str(tmp_path / "out" / "model"), model.class_names)
    assert tree is not None
    assert tree.is_exported
    assert isinstance(tree.scores, RankScores)
    probabilities = np.zeros((len(val.labels), 5))
    for row, own in enumerate(model.predict([image.as_py() for image in val.table["bytes"]])):
        probabilities[row, list(own.labels)] = own.probabilities
    expected = RankScores.from_logits(TREE, torch.from_numpy(probabilities).log(), torch.from_numpy(val.labels))
    np.testing.assert_allclose(tree.scores.probabilities, expected.probabilities, atol=2e-3)
    assert (tree.scores.is_right == expected.is_right).mean() > 0.9
    (table,) = [table for table in build(ReportData.read(blended.folder)).all_tables if table.name == "roll_up"]
    assert table.header == ["precision", "rank", "validation images", "right", "test images", "right"]
    reason = "no rank can promise a precision of 0.95: that takes 59 validation images that are all right"
    assert table.rows[0][1].startswith(reason)
    earlier = shutil.copytree(blended.folder, tmp_path / "earlier")
    (earlier / "taxonomy.json").unlink()
    (table,) = [table for table in build(ReportData.read(str(earlier))).all_tables if table.name == "roll_up"]
    resume = f"imbvlm sweep resume {earlier}"
    assert table.rows == [["-", f"not computed by an earlier version; this adds it: {resume}"]]
    folder = storage.join(blended.folder, "refits", blended.record(DELIVERED).trial_id)
    on_test = read_rank_scores(folder, 3, {})
    assert on_test.is_right[:, 2].mean() == pytest.approx(
        blended.record(DELIVERED).epochs[-1]["test/balanced_accuracy"]
    )


@pytest.mark.parametrize("single", [False, True])
def test_an_export_decides_by_its_own_scores_of_official_validation_images(
    blended: MadeSweep, tmp_path: Path, single: bool
) -> None:
    """They are the probabilities that a user gets for these images, of a blend and of a single trial."""
    export_sweep(blended.folder, str(tmp_path / "out"), single=single)
    model, val = imbvlm.load(tmp_path / "out", "cpu"), Manifest.read(blended.problem.manifest).split("val")
    calibration = ModelCalibration.read(str(tmp_path / "out" / "model"), model.class_names)
    assert calibration is not None
    assert calibration.is_exported
    assert isinstance(calibration.rows, ScoredRows)
    predictions = model.predict([row.as_py() for row in val.table["bytes"]])
    assert calibration.rows.labels.tolist() == val.labels.tolist()
    assert calibration.rows.predicted.tolist() == [own.labels[0] for own in predictions]
    np.testing.assert_allclose(calibration.rows.confidence, [own.probabilities[0] for own in predictions], atol=2e-3)
    by_label = [dict(zip(own.labels, own.probabilities, strict=True)) for own in predictions]
    expected = [own[label] for own, label in zip(by_label, val.labels.tolist(), strict=True)]
    np.testing.assert_allclose(calibration.rows.label_probability, expected, atol=2e-3)
    assert calibration.rows.stats.split_counts.tolist() == [30, 12, 6, 3, 0]
    sets = model.deciding(accept=0.95, sets=0.5).predict(val.table["bytes"][0].as_py())[0]
    assert sets.decision == "review", "15 images promise nothing at 0.95"
    assert sets.class_set


def test_the_review_sheet_is_of_the_exported_model_on_validation_and_test(blended: MadeSweep) -> None:
    report = build(ReportData.read(blended.folder))
    assert report.review is not None
    assert "accept nothing yet. Look at all images, or add " in report.review.sentences[0]
    assert "learned on 15 validation images, for images that come as these do. " in report.review.sentences[-1]
    review, sets = report.tables["review"]
    assert sorted(row[0] for row in review.rows) == [f"class {label}" for label in range(5)]
    assert all(row[1] == "nothing yet" for row in review.rows)
    calibration = ModelCalibration.read(blended.folder, tuple(f"class {label}" for label in range(5)))
    assert calibration is not None
    assert isinstance(calibration.rows, ScoredRows)
    wrong = np.bincount(calibration.rows.predicted[~calibration.rows.is_right], minlength=5)
    assert [int(row[4]) for row in review.rows] == sorted(wrong.tolist(), reverse=True)
    # The test split is scored as the model is exported: the coverage at no classes more is at least its accuracy.
    accuracy = blended.record(DELIVERED).epochs[-1]["test/top1_accuracy"]
    assert all(float(row[5]) >= 100 * accuracy - 0.05 for row in sets.rows if row[1] == "overall")
    assert [row[:2] for row in sets.rows[:3]] == [
        ["95.0", "overall"], ["95.0", "medium-shot"], ["95.0", "few-shot"]
    ]  # fmt: skip
    html = page(report)
    assert '<section id="review"><h2>Review</h2>' in html
    assert "imbvlm predict my-model PHOTOS/ --accept 0.95 --sets 0.9" in html


def test_labels_that_look_wrong_have_their_image_on_the_page(blended: MadeSweep) -> None:
    assert "Labels that look wrong" not in page(build(ReportData.read(blended.folder))), "they weren't checked"
    row = int(Manifest.read(blended.problem.manifest).rows_of("train")[3])
    suspect = SuspectLabel("=a.png", row, "train", "class <0>", "class 1", 0.015, 0.9)
    gone = SuspectLabel("b.png", 10**6, "val", "class 2", "class 0", 1e-5, 0.75)
    try:
        write_suspects(blended.folder, [suspect, gone])
        assert read_suspects(blended.folder) == [suspect, gone]
        html = page(build(ReportData.read(blended.folder)))
        write_suspects(blended.folder, [])
        none = page(build(ReportData.read(blended.folder)))
        (Path(blended.folder) / SUSPECTS_FILE).write_text("image\nb.png,1\n")
        with pytest.raises(ImbvlmError, match="is damaged"):
            read_suspects(blended.folder)
    finally:
        storage.delete(storage.join(blended.folder, SUSPECTS_FILE))
    assert html.count('alt="labeled ') == 1, "an image that is gone is left out"
    assert 'alt="labeled class &lt;0&gt;, looks like class 1"' in html
    assert "90.0 % against 1.5 %; =a.png" in html
    assert "No label looks wrong." in none


def test_a_sweep_without_scores_says_so_on_its_page(blended: MadeSweep, tmp_path: Path) -> None:
    location = Path(blended.folder) / CALIBRATION_FILE
    content = location.read_bytes()
    try:
        location.unlink()
        missing = build(ReportData.read(blended.folder)).review
        ModelCalibration((), "its members were validated on different images").write(blended.folder)
        without = build(ReportData.read(blended.folder)).review
    finally:
        location.write_bytes(content)
    assert missing is not None
    assert missing.sentences[0].endswith(f"imbvlm sweep resume {blended.folder}")
    assert without is not None
    assert without.sentences == ["There is no review sheet: its members were validated on different images."]
    assert without.tables == ()


def test_without_logits_of_its_refits_an_export_decides_by_an_estimate(blended: MadeSweep, tmp_path: Path) -> None:
    """As of sweeps of earlier versions: models of the search have scored the rows that chose."""
    refits_folder = Path(blended.folder) / "refits"
    shutil.move(refits_folder, tmp_path / "refits")
    shutil.copytree(tmp_path / "refits", refits_folder, ignore=shutil.ignore_patterns(VAL_LOGITS_FILE))
    try:
        export_sweep(blended.folder, str(tmp_path / "out"))
    finally:
        shutil.rmtree(refits_folder)
        shutil.move(tmp_path / "refits", refits_folder)
    calibration = ModelCalibration.read(str(tmp_path / "out" / "model"), tuple(f"class {label}" for label in range(5)))
    assert calibration is not None
    assert not calibration.is_exported
    assert isinstance(calibration.rows, ScoredRows)
    rows = read_validation(blended.folder, blended.log.records["t00002"], blended.log, {})
    assert rows is not None
    assert calibration.rows.labels.tolist() == rows.targets.tolist()


def test_the_best_single_trial_is_exported_where_it_is_asked_for(blended: MadeSweep, tmp_path: Path) -> None:
    (exported,) = export_sweep(blended.folder, str(tmp_path / "out"), single=True)
    assert exported.name == "t00002"
    assert not (tmp_path / "out" / "blend.yaml").exists()
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert imbvlm.load(tmp_path / "out", "cpu").taxonomy == TREE


def test_a_blend_without_its_refits_says_how_to_get_them(blended: MadeSweep, tmp_path: Path) -> None:
    lost = [record for record in blended.log.of("refit") if record.name == "member t00001"]
    originals = [record.model_copy() for record in lost]
    try:
        for record in lost:
            blended.log.save(record.model_copy(update={"state": "error"}))
        said: list[str] = []
        (exported,) = export_sweep(blended.folder, str(tmp_path / "out"), say=said.append)
    finally:
        for record in originals:
            blended.log.save(record)
    assert said == [
        "the best single trial is exported, since members of the blend aren't refitted: t00001. Refit them with: "
        f"imbvlm sweep resume {blended.folder}"
    ]
    assert exported.name == "t00002"


def test_a_single_winner_with_a_matrix_is_the_mean_of_its_refits_and_scored_as_such(tmp_path: Path) -> None:
    with extraction_in_this_process():
        made = made_sweep(tmp_path, blend=None)
        made.deliver(winner="t00001")
        export_sweep(made.folder, str(tmp_path / "out"))
    test = Manifest.read(made.problem.manifest).split("test")
    classes = predicted(imbvlm.load(tmp_path / "out", "cpu"), test)
    assert made.record(DELIVERED).epochs[-1]["test/balanced_accuracy"] == pytest.approx(balanced(test.labels, classes))
    assert not [record for record in made.log.of("delivered") if record.name == BLEND]


@pytest.mark.slow
def test_another_blend_leaves_the_scores_of_the_one_before(tmp_path: Path) -> None:
    """They were read on the test split, so they stay and are shown."""
    with extraction_in_this_process():
        made = made_sweep(tmp_path)
        made.deliver({"t00001": 0.5, "b00002": 0.5})
        before = made.record(DELIVERED).trial_id
        made.deliver({"t00001": 0.6, "b00002": 0.4})
    assert made.log.records[before].name == f"earlier {DELIVERED}"
    assert made.record(DELIVERED).trial_id != before


@pytest.mark.slow
def test_a_delivered_model_that_cannot_be_scored_leaves_no_score_of_another(tmp_path: Path) -> None:
    """The report showed the earlier model's numbers as those of the present one."""
    with extraction_in_this_process():
        made = made_sweep(tmp_path)
        made.deliver({"t00001": 0.5, "b00002": 0.5})
        selection = made.deliver({"t00002": 0.5, "b00002": 0.5})
        members = delivered_members(made.folder, made.log, made.spec, selection)
        for path in Path(made.folder).glob("refits/refit-winner-*/test_logits.safetensors"):
            path.unlink()
        other = [replace(members[0], weight=0.7), members[1]]
        present = {record.trial_id: record.name for record in made.log.of("refit")}
        mark_superseded(made.log, {**present, **delivered_names(other)})
        reason = score_delivered(made.folder, made.log, other, lambda config: made.problem.features(config).info)
    assert reason == "winner has no refit with logits of the test split"
    assert {record.name for record in made.log.of("delivered")} == {f"earlier {DELIVERED}", f"earlier {BLEND}"}
    shown = ReportData.read(made.folder).delivered
    assert shown is not None
    assert shown.name == "winner"
