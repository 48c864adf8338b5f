"""What a trial costs besides its own epochs, in process under Ray Tune."""

from collections.abc import Iterator

import made
import numpy as np
from table import Line, Options, limited, shown

from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.sweep.tune.jobs import FixedJobs, Job


def lines(options: Options) -> Iterator[Line]:
    """One trial after another; from one's end to the next one's end, without what its epochs themselves take."""
    number = 200 if options.large else 25
    features = made.stored_features(options.folder / "overhead", 1000)
    base = {"data": {"manifest": features.manifest}, "encoder": {"name": "made"}, "method": "linear_probe"}
    gpus = 1.0 if options.device == "cuda" else 0.0
    spec = SweepSpec.from_tree({"name": "overhead", "base": base, "space": {"parameters": {
        "optim.lr": {"uniform": [0.01, 0.1]}}}, "gpus_per_worker": gpus})  # fmt: skip
    jobs = [
        Job(f"t{n:05d}", "search", "", made.trial("linear_probe", optim__lr=0.01 + n / 1e4, train__num_epochs=1))
        for n in range(number)
    ]
    log, _ = made.run_through(
        options.folder / "overhead-sweep",
        spec,
        features,
        number,
        lambda budget: FixedJobs(jobs, budget),
    )
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
