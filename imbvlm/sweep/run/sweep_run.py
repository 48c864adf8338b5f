"""The phases of a sweep: extract, baselines and search, refit, one reading of the test split."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial

from imbvlm.base import interrupts, storage
from imbvlm.base.console import Console
from imbvlm.base.errors import ImbvlmError, StorageError
from imbvlm.base.formatting import duration, pluralize, table
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features, seconds_per_image
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.store_sizes import check_disk_space, num_crops, pending_images
from imbvlm.ray_runtime.cluster_resources import Cluster
from imbvlm.sweep.export.exporter import best_config, write_best
from imbvlm.sweep.plan.feasibility import (
    Packing,
    at_a_time,
    check_shared,
    logit_file_bytes,
    max_logit_bytes,
    needed_outputs,
    packing,
    trials_at_once,
    untried_methods,
)
from imbvlm.sweep.records.adjustment_selection import (
    AdjustmentSelection,
    check_logits_fit,
    describe_post_hoc,
    logit_bytes,
    logits_file,
    select_adjustments,
    write_post_hoc,
)
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.difference import refits_of, verdict_on_test
from imbvlm.sweep.records.earlier_sweeps import WarmStart, WarmTrial, warm_trials
from imbvlm.sweep.records.provenance import check_tower
from imbvlm.sweep.records.quarantine_list import describe_quarantine, quarantined_rows, write_quarantine
from imbvlm.sweep.records.refit_selection import SUPERSEDED, mark_superseded, refits
from imbvlm.sweep.records.resource_usage import ImageThroughput, ResourceUsage, compute_text, throughput_key
from imbvlm.sweep.records.summary_tables import (
    failure_causes,
    pareto_records,
    pareto_table,
    scores_table,
    search_table,
    seeds_table,
    verdict,
)
from imbvlm.sweep.records.sweep_folder import TEST_FILE, UNFINISHED_FILE, read_readings
from imbvlm.sweep.records.trial_log import (
    CHECKPOINTS_FOLDER,
    ENDED,
    SPEC_FILE,
    WINNER,
    TrialKind,
    TrialLog,
    TrialRecord,
)
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.report.report_data import ReportData
from imbvlm.sweep.report.report_writer import write_report
from imbvlm.sweep.report.study_tables import fresh_gap, study_tables, write_tables
from imbvlm.sweep.spec.baselines import Baseline, baselines, encoder_configs, feature_key
from imbvlm.sweep.spec.sweep_spec import AshaConfig, ResolvedSweep
from imbvlm.sweep.tune.asha_brackets import AshaBrackets, asha
from imbvlm.sweep.tune.jobs import FixedJobs, Job, RunContext, local_folder, payload
from imbvlm.sweep.tune.study_search import StudySearch
from imbvlm.sweep.tune.tune_runner import run_jobs
from imbvlm.training.trial_session import TrialSettings

PARETO_FOLDER = "pareto"
OPTUNA_FILE = "optuna.log"
# Kinds of trials that leave validation logits.
LOGIT_KINDS: tuple[TrialKind, ...] = ("baseline", "search")


@contextmanager
def removed_if_rejected(folder: str) -> Iterator[None]:
    """Within, a folder that is new is removed again where the sweep ends before its sweep.yaml is written."""
    local_dir = local_folder(folder)
    is_new = not storage.exists(folder)
    new_parents = [parent for parent in local_dir.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        # What ended the sweep is raised, also where the store is away by now.
        with suppress(StorageError, OSError):
            if is_new and storage.exists(folder) and not storage.exists(storage.join(folder, SPEC_FILE)):
                storage.delete(folder)
                storage.delete(str(local_dir))
                for parent in new_parents:
                    parent.rmdir()
        raise


class SweepRun:
    """One run of a sweep's phases; each skips what an earlier run has finished."""

    def __init__(
        self,
        sweep: ResolvedSweep,
        manifest: Manifest,
        folder: str,
        log: TrialLog,
        console: Console,
        cluster: Cluster,
        started: float,
        models: Mapping[str, EncoderInfo],
    ) -> None:
        spec = sweep.spec
        self.sweep, self.spec, self.manifest, self.folder, self.log, self.console = (
            sweep,
            spec,
            manifest,
            folder,
            log,
            console,
        )
        concurrent = trials_at_once(sweep, cluster)
        self.budget = Budget(spec, folder, cluster.max_gpus, len(cluster.max_nodes), started)
        self.lane = RunContext(sweep, folder, log, console, concurrent, self.budget, len(manifest.class_names))
        joined = "" if cluster.started_here else " (a cluster that was running already)"
        if cluster.can_grow:
            joined += f", growing to {pluralize(cluster.max_cpus, 'CPU')} and {pluralize(cluster.max_gpus, 'GPU')}"
        packs = packing(sweep, models.values(), manifest, concurrent)
        trials = at_a_time(concurrent, packs.largest(sweep))
        console.print(
            f"Ray: {pluralize(cluster.num_cpus, 'CPU')}, {pluralize(cluster.num_gpus, 'GPU')}{joined}, dashboard "
            f"{cluster.dashboard or 'off'}; driver {self.lane.driver}, {trials}"
        )
        if not cluster.started_here:
            check_shared([folder, storage.absolute(spec.feature_root)])
        self._quarantined: list[dict[str, str | int]] = []
        self.budget.enter("features")
        towers, outputs = encoder_configs(sweep), needed_outputs(sweep)
        # An earlier run may have been killed before it came to this.
        self.lane.prune_logits(is_over=True)
        logits = self._logit_bytes_to_come(packs)
        check_logits_fit(folder, logits)
        others = logits if storage.is_same_disk(folder, spec.feature_root) else 0
        check_disk_space(
            towers, manifest, spec.feature_root, outputs, copies=spec.feature_copies, other_bytes=others
        )  # fmt: skip
        # The last check is behind us: `removed_if_rejected` keeps a folder with these.
        storage.write_bytes(storage.join(folder, UNFINISHED_FILE), b"a run has begun here and not come to its end\n")
        storage.write_bytes(storage.join(folder, SPEC_FILE), spec.to_yaml_text().encode())
        began, splits = time.monotonic(), ("train", "val") if "val" in manifest.splits else ("train",)
        self.features = self._extract(splits)
        if self.budget.is_limited and "test" in manifest.splits:
            seconds = time.monotonic() - began
            self.budget.test_feature_seconds = self._test_feature_seconds(seconds, splits)
        self.scored: list[TrialRecord] = []
        # The limit that is used up, such as `max_hours 8`.
        self.limit: str | None = None
        self.num_refits_left = 0
        self.post_hoc: dict[str, AdjustmentSelection] = {}

    # ------------------------------------------------------------------------------------------------ phases

    def search(self, starts: Sequence[WarmStart]) -> None:
        """Baselines, then trials of the space until the budget is used; the sampler is told of other sweeps first."""
        self.budget.enter("trials")
        for start in starts:
            self.console.print(start.describe())
        # Once more than a trial's restarts: those of a pack that was lost go on alone.
        for _ in range(2 + self.spec.max_failures):
            searcher, num_lost = self._search_once(warm_trials(starts))
            if not num_lost:
                break
        write_results_table(self.log)
        self.console.end_live()
        ended = [record for record in self.log.of("search") if record.is_over]
        self._say_limit(len(ended))
        if searcher.exhausted:
            self.console.print(
                f"the space has no further configuration: {len(ended)} trials instead of {self.sweep.num_trials}"
            )
        if searcher.num_repeats:
            proposals = pluralize(searcher.num_repeats, "proposal")
            self.console.print(f"{proposals} had been drawn before, took the known value and didn't count")
        self.lane.prune_logits(is_over=True)
        failed = [record for record in ended if record.state in ("failed", "error")]
        if failed:
            self.console.print(failure_causes(failed))
        if not self.log.best(self.spec.objective):
            if self.limit is not None:
                raise ImbvlmError(f"{self.limit} is used up, and no trial has ended yet; {self._go_on()}")
            raise ImbvlmError(
                f"no trial of {len(ended)} gave a result, so there is no best configuration; "
                f"{self.folder} has their records"
            )

    def _search_once(self, warm: Sequence[WarmTrial]) -> tuple[StudySearch, int]:
        """What has not ended yet, as after a resumption; with the number of trials that were lost too early."""
        jobs = [*self._baseline_jobs(), *self._unfinished_jobs()]
        known = [record for record in self.log.of("search") if record.state in ENDED]
        make, journal = payload(self.lane, self._search_settings), self.lane.local_folder / OPTUNA_FILE
        self.lane.count_spent()
        searcher = StudySearch(
            self.sweep, jobs, known, make, self.budget,
            lambda trial_id: self.log.records[trial_id].epochs if trial_id in self.log.records else (), warm, journal,
        )  # fmt: skip
        if (jobs or len(known) < self.sweep.num_trials) and not self.budget.exhausted(keep_for_refits=True):
            total, towers = self.sweep.num_trials, [one.info for one in self.features.values()]
            size = packing(self.sweep, towers, self.manifest, self.lane.max_concurrent).size
            return searcher, run_jobs(self.lane, searcher, self._scheduler(), "search", total, size)
        return searcher, 0

    def confirm(self) -> None:
        """Run the best few again with more seeds, so that the winner is the best mean (docs/protocol.md)."""
        few = [
            one for one in self.log.ranked(self.spec.objective)[: self.spec.confirm_trials] if one.config.get("train")
        ]
        jobs = [
            Job(
                f"{record.trial_id}-seed{seed}",
                "confirm",
                record.trial_id,
                record.trial_config().with_overrides({"train.seed": seed}),
            )
            for record in few
            for seed in self.spec.more_seeds
        ]
        waiting = self._not_ended(jobs)
        if waiting and self.budget.exhausted(keep_for_refits=True) is None:
            self.console.print(f"running the best {len(few)} again with more seeds: {pluralize(len(waiting), 'run')}")
            self._run_fixed(
                waiting, lambda job: self._settings(job, self.features[feature_key(job.config)]), "confirm", len(jobs)
            )
            write_results_table(self.log)
        if jobs:
            self.console.print(seeds_table(self.log, self.spec))

    def refit_and_score(self) -> None:
        """Train winner and baselines again on all training rows over the seeds; read the test split once for each."""
        self.budget.enter("features")
        test_features = self._extract(("test",)) if "test" in self.manifest.splits else {}
        self.budget.enter("refits")
        chosen = refits(self.log, self.spec)
        jobs = [
            Job(refit.trial_id(seed, self.log), "refit", refit.name, config)
            for refit in chosen
            for seed, config in refit.seeded()
        ]
        mark_superseded(self.log, {job.trial_id: job.name for job in jobs})
        waiting = self._not_ended(jobs)
        self.post_hoc = select_adjustments(self.folder, chosen, self.log, self.spec.objective)
        write_post_hoc(self.folder, self.post_hoc)

        def settings(job: Job) -> TrialSettings:
            features = self.features[feature_key(job.config)]
            test = test_features.get(feature_key(job.config))
            if test is not None:
                features = replace(features, folders={**features.folders, **test.folders}, five_crop=test.five_crop)
            model = storage.join(self.folder, "refits", job.trial_id)
            adjusted = self.post_hoc.get(job.name)
            return replace(
                self._settings(job, features),
                refit=True,
                score_test=test is not None,
                model_folder=model,
                post_hoc=None if adjusted is None else asdict(adjusted.adjustment),
            )

        if waiting and self.budget.exhausted() is None:
            what = "everything" if self.spec.study else "the winner and the baselines"
            self.console.print(f"refitting {what} on all training images: {pluralize(len(waiting), 'run')}")
            self._run_fixed(waiting, settings, "refit", len(jobs))
        left = self._not_ended(jobs)
        self.num_refits_left = len(left)
        if left and (limit := self.budget.exhausted()):
            self.limit = limit
            self.console.print(
                f"{limit} is used up: {len(left)} of {len(jobs)} refits are left, and the test split was not read for "
                f"them; {self._go_on()}"
            )
        elif left:
            self.console.print(
                f"{pluralize(len(left), 'refit')} lost with a machine; go on with: imbvlm sweep resume {self.folder}"
            )
        failed = [one for one in self.log.of("refit") if one.state == "failed"]
        if failed:
            self.console.print(failure_causes(failed, "refit"))
        self.scored = [self.log.records[job.trial_id] for job in jobs if job.trial_id in self.log.records]
        self.scored += [one for one in self.log.of("refit") if one.name.startswith(SUPERSEDED) and one.state in ENDED]
        write_results_table(self.log)
        if test_features:
            self._record_reading()
        self.budget.keep(now=True)

    def _run_fixed(
        self, waiting: list[Job], settings: Callable[[Job], TrialSettings], kind: TrialKind, total: int
    ) -> None:
        """Run some jobs, and those again that Tune gave up before their restarts were spent."""
        make = payload(self.lane, settings)
        for _ in range(1 + self.spec.max_failures):
            num_lost = run_jobs(self.lane, FixedJobs(waiting, make, self.budget), None, kind, total)
            waiting = self._not_ended(waiting)
            if not num_lost:
                break
        self.console.end_live()

    def conclude(self, seconds: float) -> None:
        """The tables, where everything is, and what to type next."""
        say, best = self.console.print, self.log.best(self.spec.objective)[0]
        say()
        say(search_table(self.log, self.spec))
        say(verdict(self.log, self.spec))
        if self.spec.other_objectives:
            self._keep_pareto()
        self._say_scores()
        write_best(self.folder, best, self.spec.base["data"]["manifest"])
        if not self.num_refits_left:
            storage.delete(storage.join(self.folder, UNFINISHED_FILE))
        report = self._report()
        say()
        say(f"best: {best.trial_id} of {self.folder}, after {duration(seconds)}")
        for name, what in (
            ("best.yaml", "its configuration"),
            *([(report.rpartition("/")[2], "what was found, in one page for a browser")] if report else []),
            ("results.parquet", "every trial"),
            *([("tables/", "the tables above as CSV and LaTeX")] if self.spec.study else []),
            ("refits/", "the refitted weights"),
        ):
            say(f"  {storage.join(self.folder, name)}  {what}")
        say(compute_text(ResourceUsage.read(self.folder, self.spec, self.log)))
        say("next:")
        say(f"  imbvlm export {self.folder} -o my-model")
        say("  imbvlm predict my-model PHOTO.jpg")
        say(f"  imbvlm train {storage.join(self.folder, 'best.yaml')}")
        untried = untried_methods(self.sweep, [one.info for one in self.features.values()])
        if untried:
            say(f'not tried: {", ".join(untried)}; README, "What is searched", says when each pays')

    def _keep_pareto(self) -> None:
        """The trials that none beats in every objective: shown, and each one's configuration under pareto/."""
        records = pareto_records(self.log, self.spec)
        self.console.print()
        self.console.print(pareto_table(records, self.spec))
        for record in records:
            uri = storage.join(self.folder, PARETO_FOLDER, f"{record.trial_id}.yaml")
            storage.write_bytes(
                uri, dump_yaml(best_config(record, self.spec.base["data"]["manifest"]).to_tree()).encode()
            )
        self.console.print(f"their configurations: {storage.join(self.folder, PARETO_FOLDER)}/TRIAL.yaml")

    def _say_scores(self) -> None:
        """What the test split answered: winner and baselines, a study's tables, what fresh crops change."""
        say, source = self.console.print, ReportData.read(self.folder)
        names = [one.name for one in source.headline]
        if source.has_test:
            say()
            say(
                scores_table(
                    [one for one in self.scored if one.name in names or one.name.startswith(SUPERSEDED)], self.spec
                )
            )
            on_test = verdict_on_test(self.log, refits_of(self.log, WINNER), "the winner")
            if on_test is not None:
                say(str(on_test))
            if source.classes is not None and source.classes.averaged_over:
                say(source.classes.averaged_over)
        if "test" not in self.manifest.splits:
            say(
                "no test split, so nothing is scored on images that selection hasn't seen; for that keep some apart by "
                "`imbvlm manifest build --test-share 0.2`, in a folder test/ beside train/, or as rows of that split"
            )
        for name, one in self.post_hoc.items():
            if name in names:
                say(describe_post_hoc(name, one, self.scored))
        gap = fresh_gap(source)
        tables = [*study_tables(source), *([] if gap is None else [gap])]
        for found in tables:
            say()
            say(f"{found.title} ({found.caption}):")
            say(table(list(found.header), [list(row) for row in found.rows]))
        write_tables(self.folder, tables)

    def _report(self) -> str | None:
        """The page's location; None, and a sentence, where it can't be drawn: a night's result must not hang on it."""
        try:
            return write_report(self.folder)
        except Exception as error:  # noqa: BLE001
            # A library may have made it of one.
            interrupts.check()
            self.console.print(f"the report could not be written ({type(error).__name__}: {error}); all else is there")
            return None

    # -------------------------------------------------------------------------------------------------- parts

    def _extract(self, splits: tuple[str, ...]) -> dict[str, FeatureSet]:
        """The stored features of each tower of the space, computed where they are missing."""
        outputs = needed_outputs(self.sweep)
        root = self.spec.feature_root
        found, paces = dict[str, FeatureSet](), dict[str, float]()
        for config in encoder_configs(self.sweep):
            five_crop = tuple(split for split in splits if split == "test")
            features = ensure_features(
                config, self.manifest, root, outputs, splits, report=self.console.update_live, five_crop=five_crop,
                copies=self.spec.feature_copies,
                check_tower=partial(check_tower, self.folder, config.encoder),
            )  # fmt: skip
            self.console.end_live()
            found[feature_key(config)] = features
            folder = features.folders.get("train")
            if folder is not None and (seconds := seconds_per_image(folder)) is not None:
                paces[throughput_key(config)] = seconds
        self._say_quarantined(next(iter(found.values())))
        if "train" in splits:
            ImageThroughput(len(self.manifest.rows_of("train")), paces).write(self.folder)
        return found

    def _test_feature_seconds(self, seconds: float, splits: tuple[str, ...]) -> float:
        """Of the test split's pass: as that over `splits` took, longer where it has more crops; 0 where it is there."""
        outputs, root, missing, seen = needed_outputs(self.sweep), self.spec.feature_root, 0, 0
        for config in encoder_configs(self.sweep):
            missing += pending_images(config, self.manifest, storage.absolute(root), outputs, ("test",))[0]
            seen += num_crops(config, self.manifest, splits)
        return seconds * max(1.0, missing / seen) if missing else 0.0

    def _logit_bytes_to_come(self, packs: Packing) -> int:
        """What validation logits will take at most, beside those of an earlier run: all trials may have ended in it."""
        spec, manifest = self.spec, self.manifest
        largest = max_logit_bytes(self.sweep, manifest, packs, self.lane.max_concurrent)
        num_ended = sum(record.state in ENDED for kind in LOGIT_KINDS for record in self.log.of(kind))
        num_left = max(0, len(baselines(self.sweep)) + self.sweep.num_trials - num_ended)
        return max(0, min(largest - logit_bytes(self.folder), num_left * logit_file_bytes(spec, manifest)))

    def _say_quarantined(self, features: FeatureSet) -> None:
        """Towers decode the same files, so the first one's list is everybody's."""
        bad = quarantined_rows(self.manifest, features)
        if bad:
            self._quarantined += bad
            self.console.print(describe_quarantine(bad, write_quarantine(self.folder, self._quarantined)))

    def _baseline_jobs(self) -> list[Job]:
        self._baselines = {f"b{number:05d}": one for number, one in enumerate(baselines(self.sweep), 1)}
        return [
            Job(trial_id, "baseline", one.name, one.config, alone=self._was_lost(trial_id))
            for trial_id, one in self._baselines.items()
            if not self._has_ended(trial_id)
        ]

    def _unfinished_jobs(self) -> list[Job]:
        return [
            Job(one.trial_id, "search", "", one.trial_config(), one.draw, alone=self._was_lost(one.trial_id))
            for one in self.log.of("search")
            if one.state not in ENDED
        ]

    def _search_settings(self, job: Job) -> TrialSettings:
        baseline: Baseline | None = self._baselines.get(job.trial_id)
        return replace(
            self._settings(job, self.features[feature_key(job.config)]),
            patience=None if baseline is None else baseline.patience,
            logits_file=logits_file(self.folder, job.trial_id),
        )

    def _settings(self, job: Job, features: FeatureSet) -> TrialSettings:
        return TrialSettings(
            config=job.config.to_tree(),
            feature_set=features.to_dict(),
            checkpoint_folder=storage.join(self.folder, CHECKPOINTS_FOLDER, job.trial_id),
            objective=self.spec.objective,
            num_threads=self.lane.num_threads,
            marker=storage.join(self.folder, SPEC_FILE),
        )

    def _scheduler(self) -> AshaBrackets | None:
        config = self.spec.trial_scheduler
        if not isinstance(config, AshaConfig):
            return None
        return asha(config, self.spec.best_objective)

    def _record_reading(self) -> None:
        """Say in the folder what the test split has answered, and when it was last read; every refit reads it once."""
        scores = {
            record.trial_id: {key: value for key, value in record.epochs[-1].items() if key.startswith("test")}
            for record in self.scored
            if record.epochs
        }
        uri = storage.join(self.folder, TEST_FILE)
        known = read_readings(self.folder) or {"scores": {}, "readings": []}
        new = {trial_id: answer for trial_id, answer in scores.items() if trial_id not in known["scores"]}
        if new:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            readings = [*known["readings"], {"read_at": now, "trials": sorted(new)}]
            reading = {"read_at": now, "scores": {**known["scores"], **new}, "readings": readings}
            storage.write_bytes(uri, json.dumps(reading, indent=1).encode())

    def _say_limit(self, num_ended: int) -> None:
        """Which limit has ended the search before all its trials were run, and how to go on."""
        if num_ended >= self.sweep.num_trials:
            return
        self.limit = self.budget.exhausted(keep_for_refits=True) or self.budget.trials_exhausted(num_ended)
        if self.limit is None:
            return
        paused = sum(not record.is_over for record in self.log.of("search"))
        kept = f", {paused} paused" if paused else ""
        self.console.print(
            f"{self.limit} is used up: {num_ended} of {self.sweep.num_trials} trials have ended{kept}; {self._go_on()}"
        )

    def _go_on(self) -> str:
        name = "max_hours" if self.limit is None else self.limit.split()[0]
        return f"go on with: imbvlm sweep resume {self.folder} --set {name}=MORE"

    def _not_ended(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if not self._has_ended(job.trial_id)]

    def _was_lost(self, trial_id: str) -> bool:
        """Whether its process ended before it did."""
        record = self.log.records.get(trial_id)
        return record is not None and record.state == "error"

    def _has_ended(self, trial_id: str) -> bool:
        record = self.log.records.get(trial_id)
        return record is not None and record.state in ENDED
