"""`imbvlm train`: one configuration, without a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.errors import ConfigError, ImbvlmError, Problem
from imbvlm.base.formatting import percent, pluralize
from imbvlm.config.encoder_entries import score_notes
from imbvlm.config.encoder_info import OutputName
from imbvlm.config.trial_config import TrialConfig, needs_text
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.feature_set import FeatureSet
from imbvlm.models.encoders.encoder_factory import describe_encoder
from imbvlm.models.model_builder import stored_outputs
from imbvlm.ray_runtime.connection import on_this_machine
from imbvlm.sweep.plan.feasibility import check_model, data_counts, one_class_problem, validation_problem
from imbvlm.training.trial_session import TrialSession, TrialSettings, default_device

OBJECTIVE = "val/balanced_accuracy"
LOG_FILE = "train.log"


def train_one(
    config: TrialConfig, storage_folder: str, out: str | None, *, quiet: bool = False
) -> tuple[dict[str, float], list[str]]:
    """Extract missing features and train; returns the metrics of the last epoch and the best, and notes on scores.

    Training uses this machine. Features are extracted on a cluster only if RAY_ADDRESS names one. Raises ImbvlmError.
    """
    storage.check_folder(storage_folder)
    if out is not None:
        storage.check_folder(out)
    console = Console()
    echo = (lambda text: None) if quiet else console.print
    manifest = Manifest.read(config.data.manifest)
    stats, val_counts = data_counts(manifest, config.data.split_seed)
    problem = one_class_problem(stats) or validation_problem(stats, val_counts, [OBJECTIVE])
    if problem is not None:
        raise ConfigError([Problem(problem, config.data.manifest)])
    if problems := check_model(config, describe_encoder(config.encoder)):
        raise ConfigError(problems)
    with console.redirect_output(_log_file(storage_folder)), on_this_machine():
        features = _extract(config, manifest, storage.join(storage_folder, "features"), echo)
    threads = config.train.num_threads if config.train else None
    settings = TrialSettings(
        config=config,
        feature_set=features,
        objective=OBJECTIVE,
        num_threads=threads,
        model_folder=out,
    )
    last: dict[str, float] = {}
    for report in TrialSession(default_device()).reports(settings):
        if report.failure is not None:
            raise ImbvlmError(report.failure)
        last = {**report.values, "progress": report.progress}
        loss = f"train loss {last['train/loss']:.4f}, " if "train/loss" in last else ""
        echo(
            f"epoch {int(last['epoch'])}: {loss}validation balanced {percent(last.get(OBJECTIVE))}, "
            f"overall {percent(last.get('val/top1_accuracy'))}"
        )
    echo(f"best validation balanced accuracy {percent(last.get('val/best_balanced_accuracy'))}")
    notes = score_notes([config.encoder.name], manifest.name)
    for line in [*_notes(config, last), *notes]:
        echo(line)
    return last, notes


def _log_file(storage_folder: str) -> Path | None:
    return storage.local_path(storage_folder) / LOG_FILE if storage.is_local(storage_folder) else None


def _extract(config: TrialConfig, manifest: Manifest, root: str, report: Callable[[str], None]) -> FeatureSet:
    splits = tuple(split for split in manifest.splits if split != "test")
    outputs = stored_outputs(config)
    if not outputs:
        # For streamed images one pass of the encoder finds unreadable files before training starts.
        ensure_features(config, manifest, root, frozenset[OutputName]({"pooled"}), splits, report=report)
    return ensure_features(
        config,
        manifest,
        root,
        outputs,
        splits,
        report=report,
        text=needs_text(config),
        five_crop=tuple(split for split in splits if split == "val"),
    )


def _notes(config: TrialConfig, last: Mapping[str, float]) -> Iterator[str]:
    """Iterate over sentences on five crops and on unreadable images."""
    if config.eval.tte == "five_crop":
        if "val_tte/balanced_accuracy" in last:
            yield (
                f"with five crops: validation balanced {percent(last['val_tte/balanced_accuracy'])}, overall "
                f"{percent(last['val_tte/top1_accuracy'])} in the last epoch"
            )
        else:
            yield "five crops are not scored: the data has no validation split of its own"
    if last.get("data/unreadable_images"):
        yield (
            f"{pluralize(int(last['data/unreadable_images']), 'image')} could not be read and left out; "
            f"`imbvlm manifest check {config.data.manifest} --decode` names them"
        )
