"""A pack is several trials to everybody but Tune: the same records, stops and values as for each alone."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from ray.tune import TuneError
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from tiny_data import tiny_config, tiny_features, tiny_info

from imbvlm.base.console import Console
from imbvlm.base.errors import DiskFullError
from imbvlm.base.schema import Tree
from imbvlm.config.method_registry import METHODS
from imbvlm.features.feature_set import FeatureSet
from imbvlm.sweep.records.adjustment_selection import NUM_BEST, logits_file
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialKind, TrialLog, TrialRecord
from imbvlm.sweep.spec.sweep_spec import AshaConfig, SweepSpec
from imbvlm.sweep.tune import in_process_trial
from imbvlm.sweep.tune.asha_brackets import AshaBrackets
from imbvlm.sweep.tune.in_process_trial import InProcessTrial, PackPayload
from imbvlm.sweep.tune.jobs import Job, RunContext
from imbvlm.sweep.tune.pack_members import Members
from imbvlm.sweep.tune.progress_callback import ProgressCallback, failure_cause, read_failures
from imbvlm.sweep.tune.study_search import StudySearch
from imbvlm.sweep.tune.tune_adapters import TuneScheduler, TuneSearcher
from imbvlm.sweep.tune.tune_runner import TUNE_SETTINGS, end_listener, find_storage_error, tune_settings
from imbvlm.training.trial_session import TrialReport, TrialSettings, from_result

BEST = "val/best_balanced_accuracy"
STOP = TrialScheduler.STOP
optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = {
    "loss.name": {"choice": ["cross_entropy", "balanced_softmax", "focal"]},
    "classifier.kind": {"choice": ["linear", "cosine"]},
    "optim.lr": {"loguniform": [1e-4, 0.5]},
}


def make_spec(num_trials: int = 12, method: str = "linear_probe", **fields: Any) -> SweepSpec:
    base = tiny_config(method, train__num_epochs=6).to_tree()
    base = {key: value for key, value in base.items() if key not in ("loss", "classifier")}
    return SweepSpec.from_tree(
        {"name": "packs", "base": base, "space": {"parameters": SPACE}, "num_trials": num_trials,
         "searcher": {"name": "random"}, **fields}
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No actor of Ray keeps a record of the processes."""
    monkeypatch.setattr(in_process_trial, "record_process", lambda trial_id: None)


class DrivenTrial(InProcessTrial):
    """A process's trainable without Tune, which would give it an id."""

    trial_id = "driven"


class Tune:
    """What Tune's controller does with a searcher, a scheduler, a callback and a trainable, in this process."""

    def __init__(
        self, folder: Path, features: FeatureSet, spec: SweepSpec, size: int, jobs: Sequence[Job] = ()
    ) -> None:
        self.log = TrialLog(str(folder))
        budget = Budget.open(spec, str(folder), 0.0)
        self.printed = io.StringIO()
        context = RunContext(spec.resolve(), str(folder), self.log, Console(self.printed), 1, budget, 10)

        def settings_of(job: Job) -> TrialSettings:
            return TrialSettings(
                job.config,
                features,
                spec.objective,
                checkpoint_folder=str(folder / "checkpoints" / job.trial_id),
                logits_file=logits_file(str(folder), job.trial_id),
                trial_id=job.trial_id,
            )

        self.study = StudySearch.open(spec.resolve(), list(jobs), [], budget)
        self.members, brackets = Members(str(folder / "ray"), settings_of), AshaBrackets(AshaConfig(), BEST)
        self.searcher = TuneSearcher(self.study, self.members, lambda config: size, {})
        self.scheduler = TuneScheduler(brackets, self.members)
        listeners = [end_listener(context, self.study, brackets)]
        self.callback = ProgressCallback(context, self.members, "search", 12, {}, listeners)
        self.sizes: list[int] = []
        self.logits, self.num_logits = folder / "logits", list[int]()
        self.ids = (f"tune{number}" for number in itertools.count())

    def run(self, at_once: int = 1) -> None:
        """So many Tune trials step by turns; the next ones start when all of them have ended."""
        while trials := [trial for trial in (self.start() for _ in range(at_once)) if trial is not None]:
            while trials:
                trials = [trial for trial in trials if not self.step(trial)]

    def start(self) -> SimpleNamespace | None:
        trial_id = next(self.ids)
        config = self.searcher.suggest(trial_id)
        if config == Searcher.FINISHED:
            return None
        trial = SimpleNamespace(trial_id=trial_id, config=config)
        self.sizes.append(len(config["trial_ids"]))
        self.scheduler.on_trial_add(None, trial)
        self.launch(trial)
        return trial

    def launch(self, trial: SimpleNamespace) -> None:
        """In a process of its own, also after one was lost."""
        trial.run = DrivenTrial.__new__(DrivenTrial)
        trial.run.setup(trial.config)
        self.callback.on_trial_start(0, [], trial)

    def step(self, trial: SimpleNamespace) -> bool:
        result: Tree = trial.run.step()
        decision = STOP if result["done"] else self.scheduler.on_trial_result(None, trial, result)
        if decision != STOP:
            self.searcher.on_trial_result(trial.trial_id, result)
        self.callback.on_trial_result(0, [], trial, result)
        if decision == STOP:
            self.scheduler.on_trial_complete(None, trial, result)
            self.searcher.on_trial_complete(trial.trial_id, result)
            self.callback.on_trial_complete(0, [], trial)
            trial.run.cleanup()
        self.callback.on_step_end(0, [])
        self.num_logits.append(len(list(self.logits.glob("*"))))
        return bool(decision == STOP)


def found(tune: Tune) -> dict[str, tuple[Any, ...]]:
    return {
        record.trial_id: (record.draw, record.state, record.stop_reason, len(record.epochs),
                          [pytest.approx(epoch["val/loss"], rel=5e-5) for epoch in record.epochs])
        for record in tune.log.of("search")
    }  # fmt: skip


def told(tune: Tune) -> list[tuple[Any, ...]]:
    return [(trial.params, trial.state, pytest.approx(trial.value, abs=1e-6)) for trial in tune.study.study.trials]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    return tiny_features(tmp_path_factory.mktemp("features"))


# ------------------------------------------------------------------------------------------------- the members


def job(trial_id: str, kind: TrialKind = "search", alone: bool = False) -> Job:
    return Job(trial_id, kind, "", tiny_config("linear_probe"), alone=alone)


FEATURES = FeatureSet("m", "store", {"train": "store.split"}, ("pooled",), tiny_info())


def members_of(folder: Path) -> Members:
    return Members(str(folder), lambda job: TrialSettings(job.config, FEATURES, "val/loss", trial_id=job.trial_id))


ENDS = {"epoch": {}, "finished": {"has_finished": True}, "failed": {"failure": "the loss is NaN"}}


class PackMachine(RuleBasedStateMachine):
    """Packs of which anything may be heard in any order: each trial ends once, and what it says afterwards is nothing.

    The model knows who runs, who is to stop, and who has ended, in each pack.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.members = members_of(Path(self.folder.name))
        self.running: dict[str, list[str]] = {}
        self.stopped: dict[str, set[str]] = {}
        self.ended: dict[str, list[str]] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(size=st.integers(1, 4), alone=st.booleans())
    def open(self, size: int, alone: bool) -> None:
        pack = f"tune{len(self.running)}"
        ids = [f"{pack}-t{number}" for number in range(size)]
        payload = self.members.open(pack, [job(trial_id, alone=alone) for trial_id in ids])
        self.running[pack], self.stopped[pack], self.ended[pack] = ids, set(), []
        assert PackPayload.decode(payload.encode()) == payload
        assert [settings.trial_id for settings in payload.settings] == ids
        assert payload.trains_together == (size > 1 and not alone)
        assert {(member.pack_size, member.pack) for member in self.members.of(pack)} == {
            (1 if alone else size, ids[0] if size > 1 else "")
        }

    packs = st.integers(0, 5).map(lambda number: f"tune{number}")

    @rule(pack=packs, number=st.integers(0, 4))
    def stop(self, pack: str, number: int) -> None:
        self.members.stop(pack, f"{pack}-t{number}")
        self.stopped.setdefault(pack, set()).add(f"{pack}-t{number}")

    @rule(
        pack=packs,
        heard=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(sorted(ENDS))), unique_by=lambda one: one[0]),
    )
    def report(self, pack: str, heard: list[tuple[int, str]]) -> None:
        reports = [TrialReport(f"{pack}-t{number}", 1, **ENDS[kind]) for number, kind in heard]
        expected = []
        for (_, kind), report in zip(heard, reports, strict=True):
            if report.trial_id in self.running.get(pack, ()):
                is_stopped = report.trial_id in self.stopped[pack]
                end = "stopped" if kind == "epoch" and is_stopped else None if kind == "epoch" else kind
                expected.append((report.trial_id, report, end))
        events = self.members.take(pack, reports)
        assert [(event.member.trial_id, event.report, event.end) for event in events] == expected
        ended = [trial_id for trial_id, _, end in expected if end is not None]
        if ended:
            self.running[pack] = [trial_id for trial_id in self.running[pack] if trial_id not in ended]
            self.ended[pack] += ended
            if self.running[pack]:
                # The process reads this file before its next epoch, and a new process before its first.
                assert json.loads((Path(self.folder.name) / f"ended-{pack}.json").read_text()) == self.ended[pack]

    @rule(pack=packs, is_lost=st.booleans())
    def close(self, pack: str, is_lost: bool) -> None:
        events = self.members.close(pack, is_lost=is_lost)
        end = "lost" if is_lost else "closed"
        assert [(event.member.trial_id, event.report, event.end) for event in events] == [
            (trial_id, None, end) for trial_id in self.running.get(pack, ())
        ]
        if pack in self.running:
            self.running[pack] = []

    @invariant()
    def those_that_have_not_ended_run(self) -> None:
        for pack, running in self.running.items():
            assert [member.trial_id for member in self.members.of(pack)] == running


PackMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
test_each_member_ends_once_in_any_order_of_reports_stops_and_losses = PackMachine.TestCase


@pytest.mark.parametrize(("kind", "alone"), [("baseline", False), ("refit", False), ("search", True)])
def test_what_has_a_reason_to_train_alone_does_and_still_shares_a_process(
    tmp_path: Path, kind: TrialKind, alone: bool
) -> None:
    members = members_of(tmp_path)
    payload = members.open("tune0", [job("t1"), job("t2", kind, alone)])
    assert not payload.trains_together
    assert [(member.pack_size, member.pack) for member in members.of("tune0")] == [(1, "t1")] * 2


def test_a_process_that_is_started_again_leaves_out_what_has_ended(tmp_path: Path, features: FeatureSet) -> None:
    """It would train from its first epoch once more: its checkpoint is gone."""
    first = [{"loss.name": "focal", "classifier.kind": "linear", "optim.lr": lr} for lr in (1e35, 0.1, 0.2)]
    spec = SweepSpec.from_tree(
        {**make_spec(3, first_trials=first).to_tree(),
         "space": {"parameters": {**SPACE, "optim.lr": {"loguniform": [1e-4, 1e36]}}}}
    )  # fmt: skip
    tune = Tune(tmp_path, features, spec, 3)
    trial = tune.start()
    assert trial is not None
    tune.step(trial)
    failed = tune.log.records["t00001"]
    assert failed.state == "failed"
    tune.launch(trial)
    assert [report.trial_id for report in from_result(trial.run.step())] == ["t00002", "t00003"]
    while not tune.step(trial):
        pass
    assert {record.state for record in tune.log.of("search")[1:]} <= {"finished", "stopped"}
    assert (tune.log.records["t00001"].state, len(failed.epochs)) == ("failed", 1)


# --------------------------------------------------------------------------------------------- a search in packs


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.packs])
def test_records_stops_and_values_are_those_of_each_trial_by_itself(
    tmp_path: Path, features: FeatureSet, method: str
) -> None:
    alone, packed = (Tune(tmp_path / str(size), features, make_spec(method=method), size) for size in (1, 4))
    for tune in (alone, packed):
        for trial_id in ("t00001", "t00099"):
            (Path(tune.log.folder) / "checkpoints" / trial_id).mkdir(parents=True)
    alone.run(at_once=4)
    packed.run()
    # What nothing goes on from takes no room.
    assert [path.name for path in tmp_path.rglob("checkpoints/t*")] == ["t00099"] * 2
    assert (alone.sizes, packed.sizes) == ([1] * 12, [4] * 3)
    assert found(packed) == found(alone)
    assert told(packed) == told(alone)
    states = [record.state for record in packed.log.of("search")]
    assert set(states) == {"finished", "stopped"}


def test_a_search_begins_with_small_packs(tmp_path: Path, features: FeatureSet) -> None:
    """All trials of a pack end at once: in packs of six the first result would take as long as the sixth."""
    tune = Tune(tmp_path, features, make_spec(24), 6)
    tune.searcher = TuneSearcher(tune.study, tune.members, lambda config: 6, {}, at_once=2)
    tune.run(at_once=2)
    assert tune.sizes == [1, 1, 4, 4, 6, 6, 2]


def test_one_whose_checkpoint_is_damaged_starts_again_and_the_console_and_its_record_say_so(
    tmp_path: Path, features: FeatureSet
) -> None:
    damaged = tmp_path / "checkpoints" / "t00003" / "state.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    tune = Tune(tmp_path, features, make_spec(6), 3)
    tune.run()
    records = TrialLog.read(str(tmp_path)).of("search")
    assert {record.state for record in records} <= {"finished", "stopped"}
    assert [record.trial_id for record in records if record.restart_reason] == ["t00003"]
    assert tune.printed.getvalue().count("t00003 starts again from its first epoch: the checkpoint's index ") == 1
    assert not damaged.exists()


@pytest.mark.parametrize("size", [1, 5])
def test_validation_logits_are_pruned_as_trials_end(tmp_path: Path, features: FeatureSet, size: int) -> None:
    """Else 64 trials of iNaturalist's size leave 8.5 GB until the search is over."""
    tune = Tune(tmp_path, features, make_spec(40, select_by="objective"), size)
    tune.run()
    best = [record.trial_id for record in tune.log.best("val/balanced_accuracy")[:NUM_BEST]]
    assert {path.stem for path in tune.logits.iterdir()} == set(best)
    assert len(tune.log.of("search")) == 40
    assert NUM_BEST <= max(tune.num_logits) <= NUM_BEST + size


def test_one_whose_numbers_run_away_ends_by_itself_with_its_sentence(tmp_path: Path, features: FeatureSet) -> None:
    spec = make_spec(4, first_trials=[{"loss.name": "focal", "classifier.kind": "linear", "optim.lr": 1e35}])
    spec = SweepSpec.from_tree(
        {**spec.to_tree(), "space": {"parameters": {**SPACE, "optim.lr": {"loguniform": [1e-4, 1e36]}}}}
    )
    tune = Tune(tmp_path, features, spec, 4)
    tune.run()
    first, *others = tune.log.of("search")
    assert first.state == "failed"
    assert "wasn't finite" in first.stop_reason
    assert {trial.state for trial in tune.study.study.trials if trial.params["optim.lr"] == 1e35} == {
        optuna.trial.TrialState.FAIL
    }
    assert len(others) == 3


def test_baselines_of_a_tower_share_a_process_and_other_shapes_dont(tmp_path: Path, features: FeatureSet) -> None:
    spec = make_spec(8, searcher={"name": "random", "seed": 1})
    spec = SweepSpec.from_tree({**spec.to_tree(), "space": {"parameters": {**SPACE,
        "data.class_sampling": {"choice": ["instance_balanced", "square_root"]}}}})  # fmt: skip
    probe = tiny_config("linear_probe", train__num_epochs=3)
    jobs = [
        Job("b00001", "baseline", "zero-shot", tiny_config("zero_shot")),
        Job("b00002", "baseline", "linear probe", probe),
        Job("b00004", "baseline", "class means", tiny_config("class_means")),
        Job("b00003", "baseline", "linear probe", probe, alone=True),
    ]
    tune = Tune(tmp_path, features, spec, 4, jobs)
    tune.run()
    assert tune.sizes[:2] == [3, 1]
    assert sum(tune.sizes) == 12
    assert max(tune.sizes[2:]) > 1
    assert sorted(tune.log.records) == [
        "b00001",
        "b00002",
        "b00003",
        "b00004",
        *(f"t{number:05d}" for number in range(1, 9)),
    ]
    assert all(record.state in ("finished", "stopped") for record in tune.log.records.values())
    beside, alone = (tune.log.records[trial_id] for trial_id in ("b00002", "b00003"))
    # The probe's seconds are its own, and nothing of it is batched with another's. The others end together.
    assert (beside.pack_size, alone.pack_size) == (1, 1)
    assert [tune.log.records[trial_id].pack_size for trial_id in ("b00001", "b00004")] == [2, 2]
    assert [epoch[BEST] for epoch in beside.epochs] == [epoch[BEST] for epoch in alone.epochs]
    assert [epoch["val/loss"] for epoch in beside.epochs] == [epoch["val/loss"] for epoch in alone.epochs]


def test_what_was_lost_with_its_pack_goes_on_alone(tmp_path: Path, features: FeatureSet) -> None:
    spec = make_spec(4)
    draws = [{"loss.name": "focal", "classifier.kind": "linear", "optim.lr": lr} for lr in (0.1, 0.2)]
    jobs = [
        Job(f"t{number:05d}", "search", "", spec.trial(draw), draw, alone=True) for number, draw in enumerate(draws, 1)
    ]
    tune = Tune(tmp_path, features, spec, 4, jobs)
    tune.run()
    assert tune.sizes == [1, 1, 2]
    assert [record.pack_size for record in tune.log.of("search")] == [1, 1, 2, 2]


def test_what_tune_reads_from_the_environment_is_its_users_again_behind_a_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process may run Tune for something else, too, whose results are files that a sweep has no use for."""
    first, *others = TUNE_SETTINGS
    monkeypatch.setenv(first, "0")
    for name in others:
        monkeypatch.delenv(name, raising=False)
    with tune_settings():
        assert {os.environ[name] for name in TUNE_SETTINGS} == {"1"}
    assert os.environ[first] == "0"
    assert not any(name in os.environ for name in others)


def test_what_ended_a_trial_is_read_from_the_last_failure(tmp_path: Path) -> None:
    """As Tune writes them; a machine without memory is named with what asked for it."""
    record = TrialRecord(trial_id="t1", kind="search", config={"train": {"batch_size": 64}})
    lost = "Failure # 1 (occurred at 2026-11-25_22-20-17)\nThe actor died unexpectedly.\n"
    memory = (
        "Failure # 2 (occurred at 2026-11-25_22-20-23)\nOutOfMemoryError: 1 worker(s) were killed due to the node "
        "running low on memory. Memory was 6.9GB used\nOOM kill reason: usage exceeded\nConsider more memory\n"
    )
    named = "its machine ran out of memory with train.batch_size 64 over 2 workers, 10 classes"
    for text, words in ((lost, "The actor died unexpectedly."), (lost + memory, named),
                        (memory + lost.replace("# 1", "# 3"), "The actor died unexpectedly."),
                        ("Failure # 1 (occurred at 2026-11-25_22-20-17)\n\n", "its worker was lost")):  # fmt: skip
        (tmp_path / "error.txt").write_text(text)
        failures = read_failures(SimpleNamespace(error_file=str(tmp_path / "error.txt")))
        assert failure_cause(failures, record, "2 workers, 10 classes").startswith(words)
    assert failure_cause(read_failures(SimpleNamespace(error_file=None)), record, "") == "its worker was lost"


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (DiskFullError("can't write /runs/spent.json: the disk is full"), "can't write /runs/spent.json"),
        (OSError(errno.ENOSPC, "No space left on device"), "can't write /runs: the disk is full"),
        (TimeoutError("Ray waited too long"), None),
        (ConnectionResetError(errno.ECONNRESET, "Ray has gone"), None),
        (ValueError("a mistake of ours"), None),
    ],
)
def test_what_a_callback_could_not_keep_is_told_where_tune_ends_over_it(cause: Exception, words: str | None) -> None:
    """Tune wraps what its callbacks, searcher and scheduler raise, and hides it behind a traceback's text."""
    wrapped = TuneError("Traceback of it")
    wrapped.__context__ = cause
    found = find_storage_error(wrapped, "/runs")
    assert (found is None) == (words is None)
    assert words is None or str(found).startswith(words)
