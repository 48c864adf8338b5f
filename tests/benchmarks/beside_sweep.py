"""This side of `beside`: a sweep's search over probes on stored features, from the command to its last trial.

`python beside_sweep.py SETTINGS.json` starts Ray, searches by TPE and ASHA, with trials packed as in a sweep, and
writes `out`: each finished trial's end in seconds, its validation accuracy and its parameters.
"""

import time

BEGIN = time.time()

import io  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from imbvlm.base.console import Console  # noqa: E402
from imbvlm.config.encoder_info import EncoderInfo  # noqa: E402
from imbvlm.data.manifest import Manifest  # noqa: E402
from imbvlm.features.feature_set import FeatureSet  # noqa: E402
from imbvlm.ray_runtime.connection import ray_session  # noqa: E402
from imbvlm.sweep.plan.feasibility import packing, trials_at_once  # noqa: E402
from imbvlm.sweep.records.budget import Budget  # noqa: E402
from imbvlm.sweep.records.trial_log import TrialLog  # noqa: E402
from imbvlm.sweep.spec.spec_checks import check_spec  # noqa: E402
from imbvlm.sweep.spec.sweep_spec import AshaConfig, SweepSpec  # noqa: E402
from imbvlm.sweep.tune.asha_brackets import AshaBrackets  # noqa: E402
from imbvlm.sweep.tune.jobs import Job, RunContext  # noqa: E402
from imbvlm.sweep.tune.study_search import StudySearch  # noqa: E402
from imbvlm.sweep.tune.tune_runner import run_jobs  # noqa: E402
from imbvlm.training.trial_session import TrialSettings  # noqa: E402

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


def make_spec(manifest: str, num_trials: int, seed: int) -> SweepSpec:
    return SweepSpec.from_tree({
        "name": "beside", "space": {"parameters": SPACE}, "num_trials": num_trials,
        "base": {"data": {"manifest": manifest}, "encoder": {"name": "made"}, "method": "linear_probe",
                 "train": {"batch_size": 128}},
        "searcher": {"name": "tpe", "seed": seed}})  # fmt: skip


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder, features = settings["folder"], FeatureSet(**{**settings["features"], "info": _info(settings)})
    spec = make_spec(features.manifest, settings["num_trials"], settings["seed"])
    sweep, console, manifest = check_spec(spec), Console(io.StringIO()), Manifest.read(features.manifest)
    budget, asha = Budget.open(spec, folder, 0.0), spec.trial_scheduler
    assert isinstance(asha, AshaConfig), "the default stops trials"

    def trial_settings(job: Job) -> TrialSettings:
        return TrialSettings(job.config, features, spec.objective, num_threads=1, trial_id=job.trial_id)

    with console.redirect_output(Path(folder) / "ray.log"), ray_session() as cluster:
        at_once = trials_at_once(sweep, cluster)
        context = RunContext(sweep, folder, TrialLog(folder), console, at_once, budget, len(manifest.class_names))
        search = StudySearch.open(sweep, [], [], budget, journal=Path(folder) / "optuna.log")
        run_jobs(
            context, search, trial_settings, AshaBrackets(asha, spec.best_objective), "search", spec.num_trials or 0,
            packing(sweep, [features.info], manifest, at_once).size,
        )  # fmt: skip
        seconds = time.time() - BEGIN
    trials = [
        {
            "end": (record.ended_at or 0.0) - BEGIN,
            "seen": record.best_value(spec.best_objective),
            "params": record.draw,
        }
        for record in context.log.of("search")
        if record.state == "finished"
    ]
    Path(settings["out"]).write_text(json.dumps({"trials": trials, "seconds": seconds}))


def _info(settings: dict[str, dict[str, object]]) -> EncoderInfo:
    return EncoderInfo(**settings["features"]["info"])


if __name__ == "__main__":
    main()
