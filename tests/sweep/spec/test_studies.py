"""A study trains what it lists, each once, scores all of it, and shows it in tables; nothing is searched."""

from __future__ import annotations

import csv
import importlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from towers import write_tower
from trial_epochs import set_metrics

from imbvlm.base.errors import ConfigError
from imbvlm.data.manifest import Manifest
from imbvlm.sweep.plan.feasibility import concurrent_trials
from imbvlm.sweep.plan.plan_text import describe_plan
from imbvlm.sweep.plan.sweep_plan import make_plan
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.refit_selection import listed_names, refits
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.report import report_writer, study_tables
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.spec.equivalence import canonical_key, untrained_configurations
from imbvlm.sweep.spec.published_recipes import LIFT, PUBLISHED, published_scores
from imbvlm.sweep.spec.search_space import ListedSpace
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.spec_overrides import with_settings
from imbvlm.sweep.spec.studies import Part, Row, study_fields
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.jobs import Job
from imbvlm.sweep.tune.study_search import StudySearch

ROOT = Path(__file__).parents[3]
BASE: dict[str, Any] = {"data": {"manifest": "m"}, "encoder": {"name": "tower"}, "train": {"num_epochs": 2}}
BEST = "val/best_balanced_accuracy"
ZERO_SHOT = Row("Zero-shot", "zero-shot", {"method": "zero_shot"})
PROBE = Row("Probe", "probe", {"method": "linear_probe", "loss.name": "cross_entropy"})
DECODER = Row("Decoder", "decoder", {"method": "decoder", "loss.name": "balanced_softmax"})
MARC = Row("MARC", "marc", {"method": "decoder", "classifier.kind": "linear", "second_stage.name": "marc"})
# The same as the decoder by another name: logit adjustment with tau 1.
ALIAS = Row("LA", "decoder-la", {"method": "decoder", "loss.name": "logit_adjustment", "loss.tau": 1.0})
PARTS = [
    Part("scores", "Scores", [ZERO_SHOT, PROBE, DECODER, MARC]),
    Part("again", "Again", [ALIAS, PROBE]),
    Part("cost", "Cost", [PROBE, DECODER], "cost"),
]


def spec(parts: Sequence[Part] = PARTS, **fields: Any) -> SweepSpec:
    return SweepSpec.from_tree({"name": "s", **study_fields(parts, BASE), **fields})


# ----------------------------------------------------------------------------------------------- what it lists


def test_what_trains_the_same_stands_once_and_in_every_table() -> None:
    made = spec()
    sweep = check_spec(made)
    space = sweep.space
    assert isinstance(space, ListedSpace)
    assert list(space.configurations) == ["zero-shot", "probe", "decoder", "marc"]
    assert (sweep.num_trials, sweep.spec.num_trials) == (4, 4)
    assert [row.configuration for row in made.study[1].rows] == ["decoder", "probe"]
    assert SweepSpec.from_tree(json.loads(json.dumps(made.to_tree()))) == made


def test_every_listed_trial_comes_once_in_its_order_and_a_resumed_study_repeats_none() -> None:
    made = spec()
    search = StudySearch.open(made.resolve(), [], [], Budget.open(made, "nowhere", 0.0))
    jobs = drive(search)
    assert [made.read_space().to_optuna_params(job.draw, BASE)["configuration"] for job in jobs] == [
        "zero-shot", "probe", "decoder", "marc",
    ]  # fmt: skip
    assert not search.exhausted
    known = [finished(job) for job in jobs[:2]]
    going_on = StudySearch.open(made.resolve(), [], known, Budget.open(made, "nowhere", 0.0))
    assert [job.trial_id for job in drive(going_on)] == ["t00003", "t00004"]
    assert going_on.num_repeats == 0


def a_list(number: int) -> dict[str, Any]:
    return {"configurations": {f"rate-{rate}": {"optim.lr": rate / 100} for rate in range(1, number + 1)}}


def test_a_list_is_run_whole_however_long_it_is(tmp_path: Path) -> None:
    base = {**BASE, "method": "linear_probe"}
    made = SweepSpec(name="s", base=base, space=a_list(30))
    search = StudySearch.open(made.resolve(), [], [], Budget.open(made, "nowhere", 0.0))
    assert len(drive(search)) == 30
    (tmp_path / "list.yaml").write_text(json.dumps(a_list(30)))
    from_file = SweepSpec(name="s", base=base, space=str(tmp_path / "list.yaml"))
    assert with_settings(from_file, {"train.num_epochs": 1}).resolve().num_trials == 30
    # What `sweep list` counts up to.
    assert SweepSpec(name="s", base=base, space=a_list(3), num_trials=24).resolve().num_trials == 3
    assert untrained_configurations(check_spec(made)) == []


def test_listed_configurations_that_are_not_run_are_named() -> None:
    made = spec(space={"configurations": {row.name: row.draw for row in (PROBE, DECODER, ALIAS, MARC)}}, study=[])
    assert untrained_configurations(check_spec(made)) == [
        "decoder-la trains the same as decoder, and only decoder is run"
    ]
    fewer = with_settings(made, {"num_trials": 2})
    assert (
        untrained_configurations(fewer.resolve())[1]
        == "num_trials is 2 of 3 listed: marc will not run; set num_trials=4 to run all"
    )


def drive(search: StudySearch) -> list[Job]:
    jobs: list[Job] = []
    while (job := search.next_job()) is not None:
        search.finished(job, [{"epoch": 1.0, BEST: 0.5}])
        jobs.append(job)
    return jobs


def finished(job: Job) -> TrialRecord:
    epochs = [{"epoch": 1.0, BEST: 0.5}]
    return TrialRecord(
        trial_id=job.trial_id,
        kind="search",
        state="finished",
        config=job.config.to_tree(),
        draw=job.draw,
        epochs=epochs,
    )


def test_a_setting_fixes_its_key_in_every_listed_trial() -> None:
    made = with_settings(spec(), {"loss.name": "focal", "train.num_epochs": 1})
    space = check_spec(made).space
    assert all("loss.name" not in draw for draw in space.enumerate_params(made.base) or [])
    trained = [made.trial(draw) for draw in space.enumerate_params(made.base) or []]
    assert {config.loss.name for config in trained if config.loss is not None} == {"focal"}


def listed(configurations: Any) -> dict[str, Any]:
    return {"space": {"configurations": configurations}, "study": []}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (listed({"A b": {}}), "lower-case letters, digits and hyphens, got 'A b'"),
        (listed({"a": {"optim.lrr": 1}}), "a: 'optim.lrr' is no key of a trial; did you mean 'optim.lr'?"),
        (listed({"a": {"optim.lr": -1}}), "a: optim.lr must be greater than 0"),
        (listed({"a": {"train.seed": 1}}), "can't be searched: the best seed is luck"),
        (listed([]), "'configurations' has names"),
        ({"space": {"configurations": {"prob": {}}}}, "'probe', which the space doesn't list; did you mean 'prob'?"),
        ({"space": {"parameters": {}}, "base": {**BASE, "method": "decoder"}}, "rows are listed configurations"),
        ({"stratify": ["method"]}, "the space lists its configurations; remove it"),
        ({"warm_start": ["x"], "study": []}, "warm_start guides a search, and the space lists its configurations"),
        (
            listed({"a": {**ZERO_SHOT.draw, "loss.name": "focal"}, "b": PROBE.draw}),
            "loss.name is searched when method = zero_shot, which doesn't read 'loss'; remove it",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_a_list_are_sentences(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_spec(SweepSpec.from_tree({**spec().to_tree(), **fields}))
    assert says in str(error.value)


# ------------------------------------------------------------------------------------------------ what it scores

CLASS_COUNTS = [200, 50, 5]


def write_study(folder: Path, **fields: Any) -> tuple[SweepSpec, TrialLog]:
    """A finished study in which configurations come later the better they are, and the refits' folders."""
    made, log = spec(**fields), TrialLog(str(folder))
    folder.mkdir()
    made.to_yaml(folder / "sweep.yaml")
    for number, draw in enumerate(made.read_space().enumerate_params(made.base) or [], 1):
        value = number / 10
        epochs = [{"epoch": 1.0, "val/balanced_accuracy": value, BEST: value}]
        log.save(record(f"t{number:05d}", "search", made.trial(draw).to_tree(), epochs, draw=draw))
    for refit in refits(log, made):
        for seed, config in refit.seeded():
            score = int(refit.record.trial_id[1:]) / 10 + seed / 100 + (0.05 if refit.is_fresh else 0)
            names = ("top1_accuracy", "many_shot_accuracy", "macro_f1", "balanced_accuracy")
            epochs = [{"epoch": 1.0, "memory/peak_bytes": 2e9, **{f"test/{name}": score for name in names}}]
            log.save(record(refit.trial_id(seed, log), "refit", config.to_tree(), epochs, name=refit.name))
            (folder / "refits" / refit.trial_id(seed, log)).mkdir(parents=True)
            content = {
                "class_names": ["a", "b", "c"], "class_counts": CLASS_COUNTS, "split_counts": CLASS_COUNTS,
                "num_parameters": 1000, "num_trained_parameters": 10,
                "splits": {"test": {"correct": [1, 1, 1], "total": [2, 2, 2], "predicted": [2, 2, 2],
                                    "confidence_bins": [[1.0] * 15] * 3, "confusions": []}},
            }  # fmt: skip
            (folder / "refits" / refit.trial_id(seed, log) / "per_class.json").write_text(json.dumps(content))
    return made, log


def record(
    trial_id: str, kind: Any, config: dict[str, Any], epochs: list[dict[str, float]], **fields: Any
) -> TrialRecord:
    return TrialRecord(
        trial_id=trial_id, kind=kind, state="finished", config=config, epochs=epochs, started_at=1e9, ended_at=1e9 + 36,
        **fields,
    )  # fmt: skip


def test_every_configuration_is_refitted_and_the_best_one_once(tmp_path: Path) -> None:
    made, log = write_study(tmp_path / "s")
    selected = refits(log, made)
    assert [(refit.name, refit.seeds) for refit in selected] == [
        ("winner", (0, 1, 2)),
        ("study: zero-shot", (0,)),
        ("study: probe", (0, 1, 2)),
        ("study: decoder", (0, 1, 2)),
    ]
    assert listed_names(log, made)["t00004"] == "winner"
    ids = [refit.trial_id(seed, log) for refit in selected for seed in refit.seeds]
    assert len(set(ids)) == len(ids)


def test_tables_have_means_spreads_views_and_aliases(tmp_path: Path) -> None:
    write_study(tmp_path / "s")
    scores, again, cost = study_tables.study_tables(ReportData.read(str(tmp_path / "s")))
    spread = f"± {100 * statistics.stdev([0.2, 0.21, 0.22]):.1f}"
    cells = {row[0]: row[1:] for row in scores.rows}
    assert scores.header[3:] == ["overall", "many", "medium", "few", "precision", "recall", "F1"]
    # No class is medium-shot in these records, and nothing was measured there: a dash and not 0.
    assert cells["Probe"] == ["1", "3", f"21.0 {spread}", f"21.0 {spread}", "-", "-", "-", "-", f"21.0 {spread}"]
    assert cells["Zero-shot"][:3] == ["1", "1", "10.0"]
    assert cells["MARC"][2].startswith("41.0")
    assert again.rows[0][1:] == list(cells["Decoder"])
    assert cost.header[2] == "CPU-hours"
    assert list(cost.rows[0]) == ["Probe", "1", "0.01", "2.00", "1,000", "10", "1"]


def test_five_crops_have_a_row_of_their_own(tmp_path: Path) -> None:
    _, log = write_study(tmp_path / "s")
    for record in log.of("refit"):
        if record.name == "study: probe":
            set_metrics(record, {"test_tte/top1_accuracy": 0.5})
            log.save(record)
    rows = study_tables.study_tables(ReportData.read(str(tmp_path / "s")))[0].rows
    assert [row[0] for row in rows] == ["Zero-shot", "Probe", "  five crops", "Decoder", "MARC"]
    assert list(rows[2][1:5]) == ["1", "3", "50.0 ± 0.0", "-"]


def test_cost_counts_every_gpu(tmp_path: Path) -> None:
    write_study(tmp_path / "s", gpus_per_worker=2.0, num_workers=4)
    cost = study_tables.study_tables(ReportData.read(str(tmp_path / "s")))[2]
    assert (cost.header[2], cost.rows[0][2]) == ("GPU-hours", "0.08")


def test_tables_lie_beside_as_csv_and_latex(tmp_path: Path) -> None:
    write_study(tmp_path / "s")
    report_writer.write_tables(str(tmp_path / "s"), study_tables.study_tables(ReportData.read(str(tmp_path / "s"))))
    rows = list(csv.reader((tmp_path / "s" / "tables" / "scores.csv").open()))
    assert rows[1][:4] == ["Zero-shot", "1", "1", "10.0"]
    assert "$\\pm$" in (tmp_path / "s" / "tables" / "scores.tex").read_text()


def test_a_configuration_that_gave_nothing_has_dashes(tmp_path: Path) -> None:
    write_study(tmp_path / "s")
    for path in (tmp_path / "s" / "trials").glob("refit-study--probe-*"):
        path.unlink()
    table = study_tables.study_tables(ReportData.read(str(tmp_path / "s")))[0]
    assert list(table.rows[1]) == ["Probe", "1", "0", *["-"] * 7]


def test_fresh_crops_are_compared_with_the_same_configuration_on_stored_views(tmp_path: Path) -> None:
    """The best of all has a second stage, which stands on stored features: its method's next best shows the gap."""
    made, log = write_study(tmp_path / "s", fresh_crops=True)
    fresh = [refit for refit in refits(log, made) if refit.is_fresh]
    assert [refit.name for refit in fresh] == ["study: decoder, fresh crops", "study: probe, fresh crops"]
    assert all(not refit.config.features.store and refit.config.reads_images for refit in fresh)
    table = study_tables.fresh_gap(ReportData.read(str(tmp_path / "s")))
    assert table is not None
    by_name = {row[0]: row[1:] for row in table.rows[:3]}
    assert by_name["study: decoder"][0] == "1"
    assert by_name["study: decoder, fresh crops"][0] == "fresh"
    deviation = 100 * (2 * statistics.variance([0.3, 0.31, 0.32])) ** 0.5
    assert by_name["difference"][2] == f"+5.0 ± {deviation:.1f}"


def test_a_search_compares_its_winner_and_each_methods_best_with_fresh_crops(tmp_path: Path) -> None:
    space = {"parameters": {"method": {"choice": ["linear_probe", "decoder"]}}}
    made, log = SweepSpec(name="s", base=BASE, space=space, fresh_crops=True), TrialLog(str(tmp_path))
    for number, method in enumerate(("linear_probe", "decoder", "linear_probe"), 1):
        epochs = [{"epoch": 1.0, "val/balanced_accuracy": number / 10, BEST: number / 10}]
        log.save(record(f"t{number}", "search", made.trial({"method": method}).to_tree(), epochs))
    assert [refit.name for refit in refits(log, made)] == [
        "winner", "winner, fresh crops", "best decoder", "best decoder, fresh crops",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------- published


def test_published_numbers_stand_only_beside_their_data_and_tower(tmp_path: Path) -> None:
    assert published_scores("embedded:fashion_mnist_lt") == []
    assert published_scores("nowhere.parquet") == []
    # The name alone isn't the benchmark.
    renamed = Manifest.read("embedded:emoji_lt")
    renamed = Manifest.build(renamed.table, renamed.class_names, "imagenet_lt")
    renamed.write(str(tmp_path / "m.parquet"))
    assert published_scores(str(tmp_path / "m.parquet")) == []
    recipe = spec().trial({**LIFT, "train.num_epochs": 10})
    assert {entry.dataset for entry in PUBLISHED if entry.matches(recipe)} == {"imagenet_lt", "places_lt"}
    for other in ({"loss.name": "focal"}, {"encoder.name": "laion2b_vit_b16"}, {"classifier.init": "random"}):
        assert not any(entry.matches(recipe.with_overrides(other)) for entry in PUBLISHED)


# --------------------------------------------------------------------------------------------- sweeps/paper.py


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("sweeps.paper")


@pytest.mark.parametrize("manifest", ["embedded:fashion_mnist_lt", "data/imagenet_lt/manifest.parquet"])
def test_all_parts_of_the_study_can_be_built(paper: Any, manifest: str) -> None:
    made, left_out = paper.study(paper.PARTS, manifest)
    space = check_spec(made).space
    configs = {name: made.trial(draw) for name, draw in space.configurations.items()}  # type: ignore[attr-defined]
    assert len({canonical_key(config) for config in configs.values()}) == len(configs)
    rows = {table.name: [configs[row.configuration] for row in table.rows] for table in made.study}
    losses = rows["losses"]
    assert len(losses) == len({canonical_key(config) for config in losses}) == 12
    assert all(config.method == "decoder" for config in losses)
    # The study's losses; those that are added to LOSSES are no part of it.
    assert {config.loss.name for config in rows["prompt_losses"]} == {
        "cross_entropy", "focal", "inverse_frequency", "generalized_reweight", "balanced_softmax", "ldam", "lade",
    }  # fmt: skip
    assert [config.decoder.depth for config in rows["depth"]] == list(range(7))
    assert rows["cost"] == rows["methods"]
    assert made.refit_seeds == [0, 1, 2]
    if manifest.startswith("embedded:"):
        assert [sentence.split()[1] for sentence in left_out] == ["towers", "since", "pretraining"]
        assert "pretraining" not in rows
    else:
        assert left_out == []
        assert {"adapter", "lora", "bias_tuning"} <= {config.method for config in rows["since"]}
        assert {config.encoder.name for config in rows["towers"]} == {"openai_vit_b16", "openai_vit_l14"}
        assert {config.encoder.name for config in rows["pretraining"]} == {
            "openai_vit_b16", "laion400m_vit_b16", "laion2b_vit_b16",
        }  # fmt: skip
        steps = {config.train.num_steps for config in losses}
        assert steps == {8192}


def test_the_study_runs_on_what_there_is(paper: Any) -> None:
    """Own photos on a laptop meant a ViT-B/16 with one GPU and four CPUs a trial, for `--smoke` as well."""
    here, said = paper.study(paper.PARTS, "photos.parquet", 2, 0)
    assert (here.gpus_per_worker, here.cpus_per_worker, here.driver) == (0, 1, "in_process")
    assert here.base["data"]["manifest"] == "photos.parquet"
    assert said[0].startswith("there is no GPU: the study runs in small")
    for made in (here, with_settings(here, here.smoke, "--smoke")):
        assert concurrent_trials(check_spec(made), 2, 0) == 2
        assert made.base["encoder"]["name"] == "tinylit_lite0"
    # A trial takes as many of four CPUs as each GPU's share has beside the trial's driver.
    shares = [(2, 1, 1), (4, 1, 3), (8, 1, 4), (32, 8, 3), (64, 8, 4)]
    for num_cpus, num_gpus, cpus_per_worker in shares:
        there, said = paper.study(["methods"], "photos.parquet", num_cpus, num_gpus)
        assert (there.gpus_per_worker, there.cpus_per_worker, said) == (1, cpus_per_worker, [])
        assert concurrent_trials(there.resolve(), num_cpus, num_gpus) == num_gpus
    assert paper.study(["methods"], "photos.parquet")[0].cpus_per_worker == 4


@pytest.mark.usefixtures("own_machine")
def test_a_part_alone_has_its_rows_and_a_dry_run_names_them(paper: Any) -> None:
    made, left_out = paper.study(["depth"])
    assert [table.name for table in made.study] == ["depth"]
    assert left_out == []
    said = describe_plan(make_plan(made, None))
    assert "7 listed configurations, after 5 baselines" in said
    assert re.search("decoder-depth-6 +method decoder, loss.name cross_entropy, decoder.depth 6", said)
    assert re.search("Depth of the decoder +0 blocks; 1 blocks", said)


@pytest.mark.parametrize("manifest", ["embedded:fashion_mnist_lt", "data/imagenet_lt/manifest.parquet"])
def test_every_part_can_be_asked_for_alone(paper: Any, manifest: str) -> None:
    for part in paper.PARTS:
        made, _ = paper.study([part], manifest)
        if made.study:
            check_spec(made)


@pytest.mark.slow
def test_a_part_of_which_nothing_is_left_ends_in_a_sentence() -> None:
    command = [sys.executable, str(ROOT / "sweeps" / "paper.py"), "--part", "pretraining", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "leaves out OpenAI" in done.stdout
    what = "imbvlm: nothing remains of the parts of --part. Name other parts, or give --manifest."
    assert done.stderr.strip() == what


# ---------------------------------------------------------------------------------------------- sweeps/lift.py


@pytest.mark.usefixtures("own_machine")
@pytest.mark.parametrize(
    ("recipe", "epochs", "plus"), [("imagenet_lt", 10, 5), ("places_lt", 10, 5), ("inat2018", 20, 15)]
)
def test_lifts_recipe_for_each_data_set(
    recipe: str, epochs: int, plus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    lift = importlib.import_module("sweeps.lift")
    for part in lift.PARTS:
        check_spec(lift.study([part], recipe))
    made = lift.study(lift.PARTS, recipe)
    space = check_spec(made).space
    configs = {name: made.trial(draw) for name, draw in space.configurations.items()}  # type: ignore[attr-defined]
    lengths = {name: configs[name].train.num_epochs for name in ("lift-b16", "lift-l14", "lift-plus-b16")}
    assert lengths == {"lift-b16": epochs, "lift-l14": epochs, "lift-plus-b16": plus}
    config = configs["lift-b16"]
    assert (config.optim.lr, config.optim.lr_schedule, config.train.batch_size, config.adapter.width) == (
        0.01,
        "epoch_half_cosine",
        128,
        None,
    )
    assert config.classifier.temperature == 0.04
    # LIFT+'s "minimalist" augmentation is its crop alone: its code mirrors nothing, where LIFT's does.
    images = {name: configs[name].augmentation for name in ("lift-b16", "lift-plus-b16")}
    assert {name: (augmentation.crop, augmentation.flip) for name, augmentation in images.items()} == {
        "lift-b16": ("random_resized", True),
        "lift-plus-b16": ("growing", False),
    }
    assert all(config.reads_images and config.eval.tte == "five_crop" for config in configs.values())
    rows = {table.name: [row.configuration for row in table.rows] for table in made.study}
    # The last step of the ablation, and the last of the losses, are the recipe itself.
    assert rows["ablation"][-1] == rows["losses"][-1] == rows["recipe"][0] == "lift-b16"
    said = describe_plan(make_plan(made, None))
    assert f"data/{recipe}/manifest.parquet (NOT THERE" in said


@pytest.mark.usefixtures("own_machine")
def test_lift_on_the_towers_of_the_package_is_refused_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    lift = importlib.import_module("sweeps.lift")
    made = with_settings(lift.study(["ablation"], manifest="embedded:emoji_lt"), {"encoder.name": "tinylit_lite0"})
    with pytest.raises(ConfigError, match="adapter needs a transformer's blocks"):
        make_plan(made, None)


# ------------------------------------------------------------------------------------------- both, run for real


def sweep(script: str, *arguments: str, folder: Path) -> tuple[Path, str]:
    """A sweep of `sweeps/`, run to its end: its folder, and what it printed."""
    command = [sys.executable, str(ROOT / "sweeps" / script), "--storage", str(folder), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (path.parent for path in folder.glob("*/sweep.yaml"))
    return made, done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_method_of_the_study_is_trained_refitted_and_scored(ray_cluster: str, tmp_path: Path) -> None:
    made, printed = sweep("paper.py", "--smoke", "--part", "methods", "since", "cost", folder=tmp_path)
    records = TrialLog.read(str(made)).records.values()
    assert {record.state for record in records} == {"finished"}, printed
    searched, refitted = ([record for record in records if record.kind == kind] for kind in ("search", "refit"))
    # A baseline that a row names isn't trained twice; everything else is refitted and scored once.
    assert len(refitted) >= len(searched) >= 11
    assert all("test/balanced_accuracy" in record.epochs[-1] for record in refitted)
    for title in ("Methods", "What came since", "Cost"):
        assert title in printed
    for label in ("Full fine-tuning", "Bias tuning", "CoOp, context per class", "Decoder, LDAM-DRW"):
        rows = [line for line in printed.splitlines() if line.strip().startswith(label)]
        assert rows, f"no row for {label} in\n{printed}"
        assert any(cell.replace(".", "").isdigit() for cell in rows[0].split()), rows[0]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_lifts_ablation_trains_inside_a_vit_with_mixing_and_five_crops(ray_cluster: str, tmp_path: Path) -> None:
    tower = write_tower(tmp_path / "vit", "vit")
    made, printed = sweep(
        "lift.py",
        *("--smoke", "--part", "ablation", "--manifest", "embedded:emoji_lt"),
        *("--set", f"encoder.name={tower}", "--set", "mixing.mixup=0.4", "--set", "mixing.cutmix=1.0"),
        *("--set", "gpus_per_worker=0", "--set", "cpus_per_worker=1"),
        folder=tmp_path,
    )
    records = TrialLog.read(str(made)).records.values()
    assert {record.state for record in records} == {"finished"}, printed
    refitted = [record for record in records if record.kind == "refit" and record.config["method"] == "adapter"]
    assert len(refitted) == 3
    for record in refitted:
        assert (record.config["mixing"]["mixup"], record.config["mixing"]["cutmix"]) == (0.4, 1.0)
        assert {"test/balanced_accuracy", "test_tte/balanced_accuracy"} <= set(record.epochs[-1])
    assert "five crops" in printed
