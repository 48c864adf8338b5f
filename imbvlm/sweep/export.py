"""What a user takes away: best.yaml, and model/ with weights, tower, class names and preprocessing."""

from __future__ import annotations

from imbvlm import storage
from imbvlm.config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.errors import ImbvlmError
from imbvlm.inference import write_model
from imbvlm.models.encoder import Encoder
from imbvlm.sweep.listing import read_spec
from imbvlm.sweep.results import TrialLog, TrialRecord
from imbvlm.training.checkpoint import load_model_tensors
from imbvlm.yaml_file import dump_yaml

BEST_FILE = "best.yaml"


def best_config(record: TrialRecord) -> TrialConfig:
    """A trial's configuration such that `imbvlm train` alone repeats it: with the threads that its numbers hang on."""
    config = record.trial_config()
    if config.train is not None and config.train.num_threads is None and record.num_threads is not None:
        config = config.with_overrides({"train.num_threads": record.num_threads})
    manifest = config.data.manifest
    if storage.is_local(manifest) and not manifest.startswith("embedded:"):
        config = config.with_overrides({"data.manifest": storage.absolute(manifest)})
    return config


def write_best(folder: str, record: TrialRecord) -> str:
    """Write best.yaml into a folder and return its location."""
    uri = storage.join(folder, BEST_FILE)
    storage.write_bytes(uri, dump_yaml(best_config(record).to_tree()).encode())
    return uri


def export_sweep(folder: str, out: str) -> TrialRecord:
    """Write best.yaml and model/ of a finished sweep; raises ImbvlmError where it has no refit of its winner yet."""
    spec = read_spec(folder)
    log = TrialLog.read(folder)
    ranked = log.best(spec.objective)
    if not ranked:
        raise ImbvlmError(f"no trial of {folder} has a result yet; go on with --resume {folder}")
    refit = next((r for r in log.of("refit") if r.name == "winner" and r.state == "finished"), None)
    if refit is None:
        raise ImbvlmError(f"the winner of {folder} was not refitted yet; go on with --resume {folder}")
    write_best(out, ranked[0])
    config = refit.trial_config()
    manifest = Manifest.read(config.data.manifest)
    encoder = Encoder.from_config(config.encoder, config.eval)
    scores = {
        "validation": ranked[0].best_epoch(spec.objective),
        "refit": refit.epochs[-1] if refit.epochs else None,
        "selected_by": spec.best_objective,
        "sweep": spec.name,
    }
    write_model(
        storage.join(out, "model"),
        config,
        load_model_tensors(storage.join(folder, "refits", refit.trial_id)),
        encoder,
        manifest.class_names,
        scores,
    )
    return ranked[0]
