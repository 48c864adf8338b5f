"""One configuration trained on its own: `imbvlm train`."""

from __future__ import annotations

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.errors import ConfigError, ImbvlmError, Problem
from imbvlm.base.formatting import percent, pluralize
from imbvlm.config.encoder_info import OutputName
from imbvlm.config.trial_config import TrialConfig, needs_text
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.models.encoders.encoder_factory import describe_encoder
from imbvlm.models.model_builder import stored_outputs
from imbvlm.ray_runtime.connection import on_this_machine
from imbvlm.sweep.plan.feasibility import check_model, data_counts, one_class_problem, validation_problem
from imbvlm.training.trial_session import TrialSession, TrialSettings, default_device

OBJECTIVE = "val/balanced_accuracy"
LOG_FILE = "train.log"


def train_one(config: TrialConfig, storage_folder: str, out: str | None, *, quiet: bool = False) -> dict[str, float]:
    """Extract what is missing, train, and return the last epoch's metrics with the best so far; raises ImbvlmError.

    Training uses this machine; the features come from a cluster only where RAY_ADDRESS names it.
    """
    for location in (storage_folder, storage_folder if out is None else out):
        problem = storage.folder_problem(location)
        if problem is not None:
            raise storage.StorageError(problem)
    console = Console()
    say = (lambda text: None) if quiet else console.print
    manifest = Manifest.read(config.data.manifest)
    stats, val_counts = data_counts(manifest, config.data.split_seed)
    problem = one_class_problem(stats) or validation_problem(stats, val_counts, [OBJECTIVE])
    if problem is not None:
        raise ConfigError([Problem(problem, config.data.manifest)])
    if problems := check_model(config, describe_encoder(config.encoder)):
        raise ConfigError(problems)
    splits = tuple(split for split in manifest.splits if split != "test")
    root = storage.join(storage_folder, "features")
    log = storage.local_path(storage_folder) / LOG_FILE if storage.is_local(storage_folder) else None
    outputs = stored_outputs(config)
    with console.redirect_output(log), on_this_machine():
        if not outputs:
            # Streamed images: one pass of the tower finds what can't be read while nothing is lost yet.
            ensure_features(config, manifest, root, frozenset[OutputName]({"pooled"}), splits, report=say)
        features = ensure_features(
            config,
            manifest,
            root,
            outputs,
            splits,
            report=say,
            text=needs_text(config),
            five_crop=tuple(split for split in splits if split == "val"),
        )
    threads = config.train.num_threads if config.train else None
    settings = TrialSettings(
        config=config.to_tree(),
        feature_set=features.to_dict(),
        objective=OBJECTIVE,
        num_threads=threads,
        model_folder=out,
    )
    last: dict[str, float] = {}
    for report in TrialSession(default_device()).reports(settings):
        if report.get("failure"):
            raise ImbvlmError(str(report["failure"]))
        last = {
            key: float(value)
            for key, value in report.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        loss = f"train loss {last['train/loss']:.4f}, " if "train/loss" in last else ""
        say(
            f"epoch {int(last['epoch'])}: {loss}validation balanced {percent(last.get(OBJECTIVE))}, "
            f"overall {percent(last.get('val/top1_accuracy'))}"
        )
    say(f"best validation balanced accuracy {percent(last.get('val/best_balanced_accuracy'))}")
    if config.eval.tte == "five_crop":
        if "val_tte/balanced_accuracy" in last:
            say(
                f"with five crops: validation balanced {percent(last['val_tte/balanced_accuracy'])}, overall "
                f"{percent(last['val_tte/top1_accuracy'])} in the last epoch"
            )
        else:
            say("five crops are not scored: the data has no validation split of its own")
    if last.get("data/unreadable_images"):
        say(
            f"{pluralize(int(last['data/unreadable_images']), 'image')} could not be read and left out; "
            f"`imbvlm manifest check {config.data.manifest} --decode` names them"
        )
    return last
