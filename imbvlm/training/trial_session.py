"""One trial from its settings to its last report, for every driver: restore, train, checkpoint, save, score."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, LostProcessesError, PackError, StorageError
from imbvlm.base.schema import Tree
from imbvlm.config.encoder_info import OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.image_stream import ImageStream, stream_in_threads
from imbvlm.features.feature_cache import PinnedCopy
from imbvlm.features.feature_set import FeatureSet, pin_features
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.longtail.worker_group import SINGLE_WORKER, WorkerGroup
from imbvlm.models.model_builder import stored_outputs
from imbvlm.training.checkpoint import CheckpointError, has_checkpoint, load_checkpoint, save_checkpoint, save_model
from imbvlm.training.evaluator import LogitAdjuster
from imbvlm.training.per_class_results import per_class_results, write_per_class_results
from imbvlm.training.step.compute_context import PeakMemory
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_run import TrialRun, build_trial
from imbvlm.training.validation_logits import ValLogitsWriter

TrialReport = dict[str, Any]


@dataclass(frozen=True)
class TrialSettings:
    """A driver's settings for one trial; plain data for JSON.

    A baseline ends after `patience` epochs without a new maximum of `objective`. A refit writes its weights and its
    results by class to `model_folder`. `score_test` evaluates the test split once, after the last epoch, also with
    logits adjusted by `post_hoc` (a PostHocAdjustment). Validation logits go to `logits_file`. `marker` is a file of
    the sweep; a machine that lacks it doesn't share the sweep's folder.
    """

    config: Tree
    feature_set: Tree
    objective: str
    checkpoint_folder: str | None = None
    checkpoint_seconds: float = 60.0
    num_threads: int | None = None
    patience: int | None = None
    refit: bool = False
    score_test: bool = False
    model_folder: str | None = None
    post_hoc: dict[str, float] | None = None
    logits_file: str | None = None
    marker: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TrialSettings:
        """The inverse of `to_dict`."""
        return TrialSettings(**data)


@dataclass(frozen=True)
class _Opened:
    """The data of all trials with the same `key`; `pinned` are this machine's copies of it."""

    key: str
    features: FeatureSet
    data: TrialData
    pinned: Sequence[PinnedCopy]


def default_device() -> torch.device:
    """The first GPU that this process sees, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TrialSession:
    """Opens a trial's data and yields its reports; data that the next trial shares stays open."""

    def __init__(
        self, device: torch.device, workers: WorkerGroup = SINGLE_WORKER, stream: ImageStream = stream_in_threads
    ) -> None:
        self._device, self._workers, self._stream = device, workers, stream
        self._opened: _Opened | None = None

    def reports(self, settings: TrialSettings, pack: TrialPack | None = None) -> Generator[TrialReport, None, None]:
        """One report an epoch with `epoch`, `progress` (fraction of the trial) and metrics.

        A trial that trains with a pack has an empty report before its first epoch, when it has joined. A trial with a
        damaged checkpoint starts again from its first epoch; its first report has the reason as `restart`. The last
        report has `done_training`, or `failure` with a sentence: a retry would fail again.

        Errors that a retry may avoid are raised: OSError, StorageError, LostProcessesError, and PackError, after which
        each trial of the pack may continue alone.
        """
        epoch = 0
        try:
            for report in self._reports(settings, pack):
                epoch = int(report.get("epoch", 0))
                yield report
        except (OSError, StorageError, LostProcessesError, PackError):
            raise
        except Exception as error:
            # Other workers may be waiting in a sum for this one; only an exception ends them.
            if self._workers.world_size > 1:
                raise
            yield {"epoch": epoch, "failure": _sentence(error), "done": True}

    def _reports(self, settings: TrialSettings, pack: TrialPack | None) -> Iterator[TrialReport]:
        config = TrialConfig.from_tree(settings.config)
        if settings.marker is not None and not storage.exists(settings.marker):
            host = socket.gethostname()
            raise StorageError(f"{host} doesn't see {settings.marker}; all nodes must share the sweep's folder")
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        memory = PeakMemory.start(self._device)
        opened = self._open(config, settings)
        data, feature_set = opened.data, opened.features
        run, damage = self._restored(config, data, settings.checkpoint_folder)
        restart: TrialReport = {} if damage is None else {"restart": damage}
        logits_writer = (
            None
            if settings.logits_file is None
            else ValLogitsWriter.open(settings.logits_file, data.val, data.class_stats)
        )
        try:
            if pack is not None:
                run.join(pack)
                yield {}
            for report in self._reports_of(run, feature_set, settings, logits_writer):
                yield {**report, **restart, **self._peak(memory)} if report.get("done_training") else report | restart
                restart = {}
        finally:
            # Also reached when the scheduler stops the trial.
            run.leave_pack()
            if logits_writer is not None and self._workers.rank == 0:
                logits_writer.flush()

    def _restored(self, config: TrialConfig, data: TrialData, folder: str | None) -> tuple[TrialRun, str | None]:
        """A run in its checkpoint's state; a new one, with the reason, if any worker finds the checkpoint damaged."""

        def new_run() -> TrialRun:
            return build_trial(config, data, self._device, self._workers, self._stream)

        run, damage = new_run(), None
        if folder is not None and has_checkpoint(folder):
            try:
                run.load_state_dict(load_checkpoint(folder, self._device))
            except CheckpointError as error:
                damage = str(error)
        if not int(self._workers.max(torch.tensor(int(damage is not None)))):
            return run, None
        # The run may have a part of the state already, and a GPU may have no space for two runs.
        del run
        return new_run(), damage or f"another worker of the trial found the checkpoint in {folder} damaged"

    def _reports_of(
        self, run: TrialRun, feature_set: FeatureSet, settings: TrialSettings, logits_writer: ValLogitsWriter | None
    ) -> Iterator[TrialReport]:
        objective, folder = settings.objective.removeprefix("val/"), settings.checkpoint_folder
        saved_at = time.monotonic()

        def save_when_due() -> None:
            nonlocal saved_at
            is_due = time.monotonic() - saved_at >= settings.checkpoint_seconds
            if folder is not None and self._workers.rank == 0 and is_due:
                save_checkpoint(folder, run.state_dict())
                saved_at = time.monotonic()

        for result in run.epochs(save_when_due):
            progress = result.epoch / run.num_epochs
            report: TrialReport = {"epoch": result.epoch, "step": result.step, "progress": progress, **result.metrics}
            best_epoch = run.best_epoch.get(objective, 0)
            has_patience = settings.patience is None or result.epoch - best_epoch < settings.patience
            if result.failure is not None:
                yield {**report, "failure": result.failure, "done": True}
                return
            is_last = result.epoch == run.num_epochs or not has_patience
            if logits_writer is not None:
                self._keep_logits(logits_writer, run, result.epoch, is_best=result.epoch == best_epoch, is_last=is_last)
            if is_last:
                yield {**report, **self._finish(run, feature_set, settings), "done_training": True, "done": True}
                return
            save_when_due()
            yield {**report, "done": False}

    def _peak(self, memory: PeakMemory) -> TrialReport:
        """The peak memory of the worker with the largest; every worker must call it."""
        largest = int(self._workers.max(torch.tensor(memory.bytes() or 0)))
        return {"memory/peak_bytes": largest} if largest else {}

    def _keep_logits(
        self, logits_writer: ValLogitsWriter, run: TrialRun, epoch: int, *, is_best: bool, is_last: bool
    ) -> None:
        """Save an epoch's logits; every worker must call it, since each has only its share of them."""
        if run.val_logits is not None and (is_best or is_last):
            logits = run.val_logits.gathered(self._workers)
            if self._workers.rank == 0:
                logits_writer.keep(epoch, logits, is_best=is_best, is_last=is_last)

    def _open(self, config: TrialConfig, settings: TrialSettings) -> _Opened:
        outputs, of_test = stored_outputs(config), list[OutputName]()
        if settings.score_test and (settings.post_hoc or {}).get("alpha"):
            of_test.append("image_embedding")
        features = FeatureSet.from_dict(settings.feature_set)
        # Pinned copies of outputs that the next trial doesn't read would keep their space.
        copied = "" if features.cache is None else f"{sorted(outputs)} {of_test}"
        key = f"{config.data.model_dump_json()} {config.reads_images} {features.to_dict()} {settings.refit} {copied}"
        if self._opened is None or self._opened.key != key:
            # Released first: this machine may have no space for copies of both.
            self._opened = None
            features, pinned = pin_features(features, outputs, of_test)
            self._opened = _Opened(key, features, TrialData.open(config, features, refit=settings.refit), pinned)
        return self._opened

    def _finish(self, run: TrialRun, feature_set: FeatureSet, settings: TrialSettings) -> TrialReport:
        scored: TrialReport = {}
        results = {}
        if settings.score_test:
            examples = TrialData.open_split(run.config, feature_set, "test")
            adjust = None
            if settings.post_hoc is not None:
                stored = TrialData.open_stored(run.config, feature_set, "test")
                adjust = LogitAdjuster(PostHocAdjustment(**settings.post_hoc), run.data, stored, self._device)
            result = run.evaluate_full(examples, adjust)
            scored = {f"test/{name}": value for name, value in result.metrics(run.data.class_stats).items()}
            if result.adjusted is not None:
                adjusted = result.adjusted.metrics(run.data.class_stats)
                scored |= {f"test_post_hoc/{name}": value for name, value in adjusted.items()}
            results["test"] = (examples, result)
        for split in feature_set.five_crop:
            if split != "test" or settings.score_test:
                crops = run.evaluate_views(TrialData.open_five_crops(run.config, feature_set, split))
                scored |= {f"{split}_tte/{name}": value for name, value in crops.metrics(run.data.class_stats).items()}
        if settings.model_folder is not None and self._workers.rank == 0:
            save_model(settings.model_folder, run.model.eval())
            write_per_class_results(settings.model_folder, per_class_results(run, results))
        return scored


def _sentence(error: Exception) -> str:
    """The error for the user; an unexpected error names its file and line."""
    if isinstance(error, ImbvlmError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
