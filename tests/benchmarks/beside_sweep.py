"""This side of `beside`: a sweep's search over probes on stored features, from the command to its last trial.

`python beside_sweep.py SETTINGS.json` starts Ray, searches by TPE and ASHA, with trials packed as in a sweep, and
writes `out`: each finished trial's end in seconds, its validation accuracy and its parameters. The side `recipes`
begins with learned ones.
"""

import time

BEGIN = time.time()

import json  # noqa: E402
import pickle  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import made  # noqa: E402
import torch  # noqa: E402

# The command of a sweep imports it, too.
import imbvlm.sweep.run.run_phases  # noqa: E402, F401
from imbvlm.data.manifest import Manifest  # noqa: E402
from imbvlm.features.feature_set import FeatureSet  # noqa: E402
from imbvlm.sweep.plan.feasibility import packing  # noqa: E402
from imbvlm.sweep.spec.learned_recipes import PROBES  # noqa: E402
from imbvlm.sweep.spec.search_space import Params  # noqa: E402
from imbvlm.sweep.spec.spec_checks import check_spec  # noqa: E402
from imbvlm.sweep.spec.sweep_spec import AshaConfig, SweepSpec  # noqa: E402
from imbvlm.sweep.tune.asha_brackets import AshaBrackets  # noqa: E402
from imbvlm.sweep.tune.study_search import StudySearch  # noqa: E402

SPACE = {
    "loss.name": {"choice": ["cross_entropy", "focal", "balanced_softmax", "logit_adjustment"]},
    "loss.gamma": {"uniform": [0.5, 3.0], "when": {"loss.name": "focal"}},
    "loss.tau": {"uniform": [0.5, 1.5], "when": {"loss.name": "logit_adjustment"}},
    "classifier.kind": {"choice": ["linear", "cosine"]},
    "classifier.temperature": {"loguniform": [0.015, 0.08], "when": {"classifier.kind": "cosine"}},
    "data.class_sampling": {"choice": ["instance_balanced", "square_root"]},
    "optim.lr": {"loguniform": [2e-3, 0.5]},
    "optim.weight_decay": {"loguniform": [1e-5, 2e-3]},
    "train.num_epochs": {"choice": [5, 10]},
}


def recipes() -> list[Params]:
    """The learned recipes that the space contains, as the sweeps of the benchmarks begin with."""
    within = [{key: value for key, value in probe.items() if key in SPACE} for probe in PROBES]
    losses = SPACE["loss.name"]["choice"]
    return [{**params, "train.num_epochs": 10} for params in within if params["loss.name"] in losses]


def make_spec(manifest: str, num_trials: int, seed: int, first_trials: Sequence[Params] = ()) -> SweepSpec:
    return SweepSpec.from_tree({
        "name": "beside", "space": {"parameters": SPACE}, "num_trials": num_trials, "first_trials": [*first_trials],
        "base": {"data": {"manifest": manifest}, "encoder": {"name": "made"}, "method": "linear_probe",
                 "train": {"batch_size": 128}},
        "searcher": {"name": "tpe", "seed": seed}})  # fmt: skip


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder, at_once = Path(settings["folder"]), torch.get_num_threads()
    features: FeatureSet = pickle.loads(Path(settings["features"]).read_bytes())
    first = recipes() if settings["side"] == "recipes" else []
    spec = make_spec(features.manifest, settings["num_trials"], settings["seed"], first)
    sweep, asha = check_spec(spec), spec.trial_scheduler
    assert isinstance(asha, AshaConfig), "the default stops trials"
    log, _ = made.run_through(
        folder,
        spec,
        features,
        settings["num_trials"],
        lambda budget: StudySearch.open(sweep, [], [], budget, journal=folder / "optuna.log"),
        at_once=at_once,
        brackets=AshaBrackets(asha, spec.best_objective),
        pack_size=packing(sweep, [features.info], Manifest.read(features.manifest), at_once).size,
    )
    seconds = time.time() - BEGIN
    trials = [
        {
            "end": (record.ended_at or 0.0) - BEGIN,
            "seen": record.best_value(spec.best_objective),
            "params": record.draw,
        }
        for record in log.of("search")
        if record.state == "finished"
    ]
    Path(settings["out"]).write_text(json.dumps({"trials": trials, "seconds": seconds}))


if __name__ == "__main__":
    main()
