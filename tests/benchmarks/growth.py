"""Time and memory against the number of images, of classes and of trials: linear or better, no step in it."""

import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import made
from table import Line, Options, limited, shown

from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.sweep.records.budget import Budget
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.records.trial_parquet import write_results_table
from imbvlm.sweep.spec.spec_checks import check_spec
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.study_search import StudySearch
from imbvlm.training.trial_run import build_trial

# A step of the size may cost this much more than its share: what is fixed is paid by the small ones, caches end.
SLACK = 1.5
# Processes that do the same differ by several MB: growth from less than this can't be told from chance.
LEAST_MEGABYTES = 10
PACK_SIZE = 32


def lines(options: Options) -> Iterator[Line]:
    rows = (1_000, 5_000, 20_000, 50_000)
    measured = {n: apart(_epoch, options.folder / f"rows{n}", n, 100, 256, options.device) for n in rows}
    yield from _growth("images", measured, "one epoch of linear_probe, opened, trained and validated")
    classes = (10, 100, 1_000, 8_142)
    # Every class has a validation image where there are most, and the others as many, so that classes alone grow.
    made_of = {n: (options.folder / f"classes{n}", 10_000, n, classes[-1], options.device) for n in classes}
    measured = {n: apart(_epoch, *arguments) for n, arguments in made_of.items()}
    yield from _growth("classes", measured, f"the same with 10,000 images, and {classes[-1]:,} of validation")
    trials = (10, 100, 1_000)
    measured = {n: apart(_run_through, options.folder / f"through{n}", n, options.device) for n in trials}
    what = "proposed by TPE, run one after another by Ray Tune, recorded, tabled; a linear probe on 200 images each"
    yield from _growth("trials", measured, what)
    if options.large:
        measured = {n: apart(_run_packed, options.folder / f"packed{n}", n, options.device) for n in (1_000, 10_000)}
        yield from _growth("trials", measured, f"the same in packs of {PACK_SIZE}, five epochs each")
        most, least = measured[10_000][1], measured[1_000][1]
        yield limited("  10,000 trials: the driver's memory beyond that of 1,000", most - least, "MB", 100)
    measured = {n: apart(_searched, options.folder / f"searched{n}", n) for n in trials}
    yield from _growth("trials", measured, "proposed by TPE, told, recorded, tabled; nothing trained")


def _growth(of: str, measured: dict[int, tuple[float, float]], what: str) -> Iterator[Line]:
    """What the smallest size takes in memory is taken for fixed: libraries, buffers of a batch."""
    yield shown(f"{of}: {what}", "")
    sizes = list(measured)
    for size, (taken, megabytes) in measured.items():
        yield shown(f"  {size:,} {of}", f"{taken:.2f} s, {megabytes:,.0f} MB")
    for small, large in itertools.pairwise(sizes):
        share = measured[large][0] / measured[small][0] / (large / small)
        yield limited(f"  {small:,} to {large:,} {of}: growth of time over growth of {of}", share, "", SLACK)
    least, fixed = sizes[0], measured[sizes[0]][1]
    for small, large in itertools.pairwise(sizes[1:]):
        before, after = (measured[size][1] - fixed for size in (small, large))
        share = after / max(before, LEAST_MEGABYTES) / ((large - least) / (small - least))
        yield limited(f"  {small:,} to {large:,} {of}: growth of memory beyond that of {least:,}", share, "", SLACK)


def apart(work: Callable[..., float], *arguments: object) -> tuple[float, float]:
    """What `work` returns, seconds, and the most memory (MB) that a process of its own took beyond its start.

    All are forked from one that has imported the libraries, and nothing more.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe()
    process = context.Process(target=_report, args=(there, work, arguments))
    process.start()
    result = here.recv()
    process.join()
    return result


def _report(pipe: object, work: Callable[..., float], arguments: tuple[object, ...]) -> None:
    before = _peak_megabytes()
    taken = work(*arguments)
    pipe.send((taken, _peak_megabytes() - before))


def _peak_megabytes() -> float:
    """Of this program alone: getrusage counts what ran in the process before it, too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def _epoch(folder: Path, num_rows: int, num_classes: int, num_val: int, device: str) -> float:
    """In a process that has not made the features itself: their making isn't counted in its memory."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_make, args=(folder, num_rows, num_classes, num_val))
    process.start()
    process.join()
    splits = json.loads((folder / "splits.json").read_text())
    features = FeatureSet(
        str(folder / "manifest.parquet"), str(folder / "made"), splits, ("pooled",), made.info(512, 50)
    )
    config = made.trial("linear_probe", train__num_epochs=2)
    begin = time.perf_counter()
    data = TrialData.open(config, features)
    epochs = build_trial(config, data, device).epochs()
    next(epochs)
    return time.perf_counter() - begin


def _make(folder: Path, num_rows: int, num_classes: int, num_val: int) -> None:
    features = made.stored_features(folder, num_rows, num_classes=num_classes, width=512, num_val=num_val)
    (folder / "splits.json").write_text(json.dumps(dict(features.splits)))


def _run_through(folder: Path, num_trials: int, device: str, num_epochs: int = 1, pack_size: int = 1) -> float:
    features = made.stored_features(folder / "features", 200, num_classes=10)
    spec = _spec(num_trials, {"data": {"manifest": features.manifest}, "train": {"num_epochs": num_epochs}}, device)
    sweep, journal = check_spec(spec), folder / "optuna.log"

    def searching(budget: Budget) -> StudySearch:
        return StudySearch.open(sweep, [], [], budget, journal=journal)

    log, taken = made.run_through(folder, spec, features, num_trials, searching, pack_size=lambda config: pack_size)
    finished = sum(record.state == "finished" for record in log.of("search"))
    if finished != num_trials:
        raise RuntimeError(f"{finished} of {num_trials} trials were finished")
    return taken


def _run_packed(folder: Path, num_trials: int, device: str) -> float:
    return _run_through(folder, num_trials, device, num_epochs=5, pack_size=PACK_SIZE)


def _searched(folder: Path, num_trials: int) -> float:
    spec = _spec(num_trials, {"data": {"manifest": "made"}}, "cpu")
    log = TrialLog(str(folder))
    begin = time.perf_counter()
    searcher = StudySearch.open(
        check_spec(spec), [], [], Budget.open(spec, str(folder), 0.0), journal=folder / "optuna.log"
    )
    for _ in range(num_trials):
        job = searcher.next_job()
        record = TrialRecord(trial_id=job.trial_id, kind="search", config=job.config.to_tree(), draw=job.draw)
        value = record.draw["optim.lr"]
        for epoch in range(1, 11):
            record.epochs.append({"epoch": float(epoch), "val/best_balanced_accuracy": value})
        record.state = "finished"
        log.save(record)
        searcher.finished(job, record.epochs)
    write_results_table(log)
    return time.perf_counter() - begin


def _spec(num_trials: int, base: dict[str, object], device: str) -> SweepSpec:
    base = {"encoder": {"name": "made"}, "method": "linear_probe", **base}
    space = {"parameters": {
        "loss.name": {"choice": ["cross_entropy", "balanced_softmax", "focal"]},
        "loss.gamma": {"uniform": [0.5, 3.0], "when": {"loss.name": "focal"}},
        "classifier.temperature": {"loguniform": [0.01, 0.1]},
        "optim.lr": {"loguniform": [1e-3, 0.5]}}}  # fmt: skip
    return SweepSpec.from_tree({
        "name": "made", "base": base, "space": space, "num_trials": num_trials, "searcher": {"name": "tpe"},
        "gpus_per_worker": 1.0 if device == "cuda" else 0.0})  # fmt: skip
