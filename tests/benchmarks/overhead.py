"""What a trial costs besides its own epochs, in process under Ray Tune."""

import io
from collections.abc import Iterator

import made
import numpy as np
from table import Line, Options, limited, shown

from imbvlm.data.cluster import connected
from imbvlm.sweep.budget import Budget
from imbvlm.sweep.console import Console
from imbvlm.sweep.engine.search import FixedSearcher, Job
from imbvlm.sweep.engine.tuner import Lane, payload, run_jobs
from imbvlm.sweep.results import TrialLog
from imbvlm.sweep.spec import SweepSpec
from imbvlm.training.session import TrialSettings


def lines(options: Options) -> Iterator[Line]:
    """One trial after another; from one's end to the next one's end, without what its epochs themselves take."""
    number = 200 if options.large else 25
    features = made.stored_features(options.folder / "overhead", 1000)
    base = {"data": {"manifest": features.manifest}, "encoder": {"name": "made"}, "method": "linear_probe"}
    gpus = 1.0 if options.device == "cuda" else 0.0
    spec = SweepSpec.from_tree({"name": "overhead", "base": base, "space": {"parameters": {
        "optim.lr": {"uniform": [0.01, 0.1]}}}, "gpus_per_worker": gpus})  # fmt: skip
    folder = str(options.folder / "overhead-sweep")
    log = TrialLog(folder)
    console, budget = Console(io.StringIO()), Budget(spec, folder, 0.0)
    lane = Lane(spec, folder, log, console, 1, budget, 1000)
    jobs = [
        Job(f"t{n:05d}", "search", "", made.trial("linear_probe", optim__lr=0.01 + n / 1e4, train__num_epochs=1))
        for n in range(number)
    ]

    def settings(job: Job) -> TrialSettings:
        return TrialSettings(job.config.to_tree(), features.to_dict(), spec.objective, num_threads=1)

    with console.others_to(options.folder / "ray.log"), connected():
        run_jobs(lane, FixedSearcher(jobs, payload(lane, settings), budget), None, "search", number)
    records = log.of("search")
    ends = np.array([record.ended_at for record in records])
    own = np.array(
        [record.epochs[-1]["time/train_seconds"] + record.epochs[-1]["time/eval_seconds"] for record in records]
    )
    between = np.diff(np.sort(ends)) - own[1:]
    yield limited(
        f"from one trial's end to the next one's first step, median of {number}", float(np.median(between)), "s", 0.5
    )
    yield shown("  the longest of them", float(between.max()), "s")
    yield shown("  an epoch's own time in these trials", float(own.mean()), "s")
