"""What a user takes away: best.yaml, and model/ with weights, tower, class names and preprocessing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from imbvlm import storage
from imbvlm.config import PromptsConfig, TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.errors import ImbvlmError
from imbvlm.inference import PostHocStep, write_model
from imbvlm.models.encoder import Encoder
from imbvlm.models.prompts import class_embeddings, templates_of
from imbvlm.sweep.listing import read_spec
from imbvlm.sweep.post_hoc import read_adjustment
from imbvlm.sweep.refits import WINNER
from imbvlm.sweep.results import TrialLog, TrialRecord
from imbvlm.training.checkpoint import load_model_tensors
from imbvlm.training.class_record import CLASS_RECORD_FILE
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
    refit = next((r for r in log.of("refit") if r.name == WINNER and r.state == "finished"), None)
    if refit is None:
        raise ImbvlmError(f"the winner of {folder} was not refitted yet; go on with --resume {folder}")
    write_best(out, ranked[0])
    config = refit.trial_config()
    manifest = Manifest.read(config.data.manifest)
    encoder = Encoder.from_config(config.encoder, config.eval)
    weights = storage.join(folder, "refits", refit.trial_id)
    post_hoc = _post_hoc_step(folder, weights, config, manifest.class_names, encoder)
    scores = {
        "validation": ranked[0].best_epoch(spec.objective),
        "refit": refit.epochs[-1] if refit.epochs else None,
        "selected_by": spec.best_objective,
        "sweep": spec.name,
    }
    write_model(
        storage.join(out, "model"),
        config,
        load_model_tensors(weights),
        encoder,
        manifest.class_names,
        scores,
        post_hoc,
    )
    return ranked[0]


def _post_hoc_step(
    folder: str, weights: str, config: TrialConfig, class_names: Sequence[str], encoder: Encoder
) -> PostHocStep | None:
    """What the sweep chose to do to its winner's logits; None where nothing could be chosen."""
    chosen = read_adjustment(folder, WINNER)
    if chosen is None:
        return None
    embeddings = None
    if chosen.alpha:
        embeddings = class_embeddings(encoder, class_names, templates_of(config.prompts or PromptsConfig()))
    counts = json.loads(storage.read_bytes(storage.join(weights, CLASS_RECORD_FILE)))["class_counts"]
    return PostHocStep(chosen, tuple(counts), embeddings)
