"""Time and memory against the number of images, of classes and of trials: linear or better, no step in it."""

import itertools
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import made
from table import Line, Options, limited, shown

from imbvlm.features.examples import FeatureSet, TrialData
from imbvlm.sweep.budget import Budget
from imbvlm.sweep.engine.search import StudySearcher
from imbvlm.sweep.results import TrialLog, TrialRecord
from imbvlm.sweep.spec import SweepSpec, check_spec
from imbvlm.training.epochs import build_trial

# A step of the size may cost this much more than its share: what is fixed is paid by the small ones, caches end.
SLACK = 1.5


def lines(options: Options) -> Iterator[Line]:
    rows = (1_000, 5_000, 20_000, 50_000)
    measured = {n: apart(_epoch, options.folder / f"rows{n}", n, 100, options.device) for n in rows}
    yield from _growth("images", measured, "one epoch of linear_probe, opened, trained and validated")
    classes = (10, 100, 1_000, 8_142)
    measured = {n: apart(_epoch, options.folder / f"classes{n}", 10_000, n, options.device) for n in classes}
    yield from _growth("classes", measured, "the same with 10,000 images")
    trials = (10, 100, 1_000)
    measured = {n: apart(_searched, options.folder / f"trials{n}", n) for n in trials}
    yield from _growth("trials", measured, "proposed by TPE, told, recorded, tabled; nothing trained")


def _growth(of: str, measured: dict[int, tuple[float, float]], what: str) -> Iterator[Line]:
    yield shown(f"{of}: {what}", "")
    sizes = list(measured)
    for size, (taken, megabytes) in measured.items():
        yield shown(f"  {size:,} {of}", f"{taken:.2f} s, {megabytes:,.0f} MB")
    for small, large in itertools.pairwise(sizes):
        share = measured[large][0] / measured[small][0] / (large / small)
        yield limited(f"  {small:,} to {large:,} {of}: growth of time over growth of {of}", share, "", SLACK)


def apart(work: Callable[..., float], *arguments: object) -> tuple[float, float]:
    """What `work` returns, seconds, and the most memory (MB) that a process of its own took beyond its start."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_report, args=(there, work, arguments))
    process.start()
    result = here.recv()
    process.join()
    return result


def _report(pipe: object, work: Callable[..., float], arguments: tuple[object, ...]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = work(*arguments)
    pipe.send((taken, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def _epoch(folder: Path, num_rows: int, num_classes: int, device: str) -> float:
    """In a process that has not made the features itself: their making isn't counted in its memory."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_make, args=(folder, num_rows, num_classes))
    process.start()
    process.join()
    features = FeatureSet(
        str(folder / "manifest.parquet"),
        {s: str(folder / s) for s in ("train", "val")},
        ("pooled",),
        made.info(512, 50),
    )
    config = made.trial("linear_probe", train__num_epochs=2)
    begin = time.perf_counter()
    data = TrialData.open(config, features)
    epochs = build_trial(config, data, device).epochs()
    next(epochs)
    return time.perf_counter() - begin


def _make(folder: Path, num_rows: int, num_classes: int) -> None:
    made.stored_features(folder, num_rows, num_classes=num_classes, width=512, num_val=max(256, num_classes))


def _searched(folder: Path, num_trials: int) -> float:
    base = {"data": {"manifest": "made"}, "encoder": {"name": "made"}, "method": "linear_probe"}
    space = {"parameters": {
        "loss.name": {"choice": ["cross_entropy", "balanced_softmax", "focal"]},
        "loss.gamma": {"uniform": [0.5, 3.0], "when": {"loss.name": "focal"}},
        "classifier.temperature": {"loguniform": [0.01, 0.1]},
        "optim.lr": {"loguniform": [1e-3, 0.5]}}}  # fmt: skip
    spec = SweepSpec.from_tree({"name": "made", "base": base, "space": space, "num_trials": num_trials})
    log = TrialLog(str(folder))

    def payload(job: object) -> dict[str, object]:
        record = TrialRecord(trial_id=job.trial_id, kind="search", config=job.config.to_tree(), draw=job.draw)
        return {"record": record}

    begin = time.perf_counter()
    searcher = StudySearcher(spec, check_spec(spec), [], [], payload, Budget(spec, str(folder), 0.0))
    for number in range(num_trials):
        record = searcher.suggest(str(number))["record"]
        value = record.draw["optim.lr"]
        for epoch in range(1, 11):
            record.epochs.append({"epoch": float(epoch), "val/best_balanced_accuracy": value})
        record.state = "finished"
        log.save(record)
        searcher.on_trial_complete(str(number), {"val/best_balanced_accuracy": value})
    log.write_table()
    return time.perf_counter() - begin
