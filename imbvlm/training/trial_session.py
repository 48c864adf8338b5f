"""One trial from its settings to its last report, for every driver: restore, train, checkpoint, save, score."""

from __future__ import annotations

import base64
import json
import socket
import time
import traceback
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, LostProcessesError, PackError, StorageError
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
from imbvlm.training.folded_run import FoldedRun
from imbvlm.training.per_class_results import per_class_results, write_per_class_results
from imbvlm.training.step.compute_context import PeakMemory
from imbvlm.training.test_predictions import POST_HOC, TEST, TestPredictions, write_test_logits
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_run import TrialRun, build_trial
from imbvlm.training.validation_logits import RowLogits, ValLogitsWriter


@dataclass(frozen=True)
class TrialReport:
    """An epoch of a trial; `progress` is the fraction of the trial, and names of `metrics` have a slash.

    `restart` is the reason why a trial with a damaged checkpoint has started again from its first epoch. A last report
    `has_finished`, or has a `failure` with a sentence: a retry would fail again.
    """

    trial_id: str
    epoch: int
    step: int | None = None
    progress: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    restart: str | None = None
    failure: str | None = None
    has_finished: bool = False

    @property
    def is_last(self) -> bool:
        return self.has_finished or self.failure is not None

    @property
    def values(self) -> dict[str, float]:
        """The numbers that a trial's record has of an epoch: `epoch`, `step` and the metrics."""
        step = {} if self.step is None else {"step": float(self.step)}
        return {"epoch": float(self.epoch), **step, **{name: float(value) for name, value in self.metrics.items()}}


def to_result(reports: Sequence[TrialReport]) -> dict[str, Any]:
    """The result for Ray Tune of an epoch of some trials, which ends their process if it is the last one of all.

    Reports are compressed there: Tune keeps the last result of each process, and its text, while the sweep runs.
    """
    epoch = max((report.epoch for report in reports), default=0)
    text = compress(json.dumps(list(map(vars, reports)), default=float).encode())
    return {"reports": text, "epoch": epoch, "done": all(report.is_last for report in reports)}


def from_result(result: Mapping[str, Any]) -> list[TrialReport]:
    """The reports of a result."""
    return [TrialReport(**report) for report in json.loads(decompress(result["reports"]))]


def compress(content: bytes) -> str:
    """Compressed content as text, since Ray Tune keeps JSON."""
    return base64.b64encode(zlib.compress(content)).decode()


def decompress(text: str) -> bytes:
    """The inverse of `compress`."""
    return zlib.decompress(base64.b64decode(text))


# A trial that trains with a pack reports this when it has joined, before its first epoch.
HAS_JOINED = TrialReport("", 0)


@dataclass(frozen=True)
class TrialSettings:
    """A driver's settings for one trial.

    A baseline ends after `patience` epochs without a new maximum of `objective`. A refit writes its weights and its
    results by class to `model_folder`. `score_test` evaluates the test split once, after the last epoch, also with
    logits adjusted by `post_hoc`. Validation logits go to `logits_file`. `marker` is a file of
    the sweep; a machine that lacks it doesn't share the sweep's folder. A trial on stored features is scored over
    `num_folds` of the training rows if they are more than one, `in_pairs` over each two of them; `folds_at_random`
    divide groups. `keeps_test_logits` also writes the test split's logits to `model_folder`, if they aren't too large.
    """

    config: TrialConfig
    feature_set: FeatureSet
    objective: str
    checkpoint_folder: str | None = None
    checkpoint_seconds: float = 60.0
    num_threads: int | None = None
    patience: int | None = None
    refit: bool = False
    score_test: bool = False
    keeps_test_logits: bool = False
    model_folder: str | None = None
    num_folds: int = 1
    in_pairs: bool = False
    folds_at_random: bool = False
    post_hoc: PostHocAdjustment | None = None
    logits_file: str | None = None
    marker: str | None = None
    trial_id: str = ""


@dataclass(frozen=True)
class _Opened:
    """The data of all trials with the same `key`, one for each fold; `pinned` are this machine's copies of it."""

    key: tuple[object, ...]
    features: FeatureSet
    data: tuple[TrialData, ...]
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
        """One report an epoch; a trial that trains with a pack first reports that it `HAS_JOINED`.

        Errors that a retry may avoid are raised: OSError, StorageError, LostProcessesError, and PackError, after which
        each trial of the pack may continue alone.
        """
        epoch = 0
        try:
            for report in self._reports(settings, pack):
                epoch = report.epoch
                yield report
        except (OSError, StorageError, LostProcessesError, PackError):
            raise
        except Exception as error:
            # Other workers may be waiting in a sum for this one; only an exception ends them.
            if self._workers.world_size > 1:
                raise
            yield TrialReport(settings.trial_id, epoch, failure=_sentence(error))

    def _reports(self, settings: TrialSettings, pack: TrialPack | None) -> Iterator[TrialReport]:
        config = settings.config
        if settings.marker is not None and not storage.exists(settings.marker):
            host = socket.gethostname()
            raise StorageError(
                f"{host} doesn't see {settings.marker}; all nodes must share the sweep's folder. "
                "Give a --storage that all see."
            )
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        memory = PeakMemory.start(self._device)
        opened = self._open(config, settings)
        data, feature_set = opened.data, opened.features
        run, restart = self._restored(config, data, settings.checkpoint_folder)
        logits_writer = None if settings.logits_file is None else ValLogitsWriter.open(settings.logits_file, data)
        try:
            if pack is not None:
                run.join(pack)
                yield HAS_JOINED
            for report in self._reports_of(run, feature_set, settings, logits_writer):
                peak = self._peak(memory) if report.has_finished else {}
                yield replace(report, restart=restart, metrics={**report.metrics, **peak})
                restart = None
        finally:
            # Also reached when the scheduler stops the trial.
            run.leave_pack()
            if logits_writer is not None and self._workers.rank == 0:
                logits_writer.flush()

    def _restored(
        self, config: TrialConfig, data: Sequence[TrialData], folder: str | None
    ) -> tuple[TrialRun | FoldedRun, str | None]:
        """A run in its checkpoint's state; a new one, with the reason, if any worker finds the checkpoint damaged."""

        def new_run() -> TrialRun | FoldedRun:
            runs = [build_trial(config, fold, self._device, self._workers, self._stream) for fold in data]
            return runs[0] if len(runs) == 1 else FoldedRun(runs)

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
        self,
        run: TrialRun | FoldedRun,
        feature_set: FeatureSet,
        settings: TrialSettings,
        logits_writer: ValLogitsWriter | None,
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
            report = TrialReport(
                settings.trial_id, result.epoch, result.step, progress, result.metrics, None, result.failure
            )
            best_epoch = run.best_epoch.get(objective, 0)
            has_patience = settings.patience is None or result.epoch - best_epoch < settings.patience
            if result.failure is not None:
                yield report
                return
            is_last = result.epoch == run.num_epochs or not has_patience
            if logits_writer is not None:
                self._keep_logits(logits_writer, run, result.epoch, is_best=result.epoch == best_epoch, is_last=is_last)
            if is_last:
                # Folds score a search, and no model of theirs is kept.
                scores = self._finish(run, feature_set, settings) if isinstance(run, TrialRun) else {}
                yield replace(report, metrics={**result.metrics, **scores}, has_finished=True)
                return
            save_when_due()
            yield report

    def _peak(self, memory: PeakMemory) -> dict[str, float]:
        """The peak memory of the worker with the largest; every worker must call it."""
        largest = int(self._workers.max(torch.tensor(memory.bytes() or 0)))
        return {"memory/peak_bytes": largest} if largest else {}

    def _keep_logits(
        self, logits_writer: ValLogitsWriter, run: TrialRun | FoldedRun, epoch: int, *, is_best: bool, is_last: bool
    ) -> None:
        """Save an epoch's logits; every worker must call it, since each has only its share of them."""
        if is_best or is_last:
            logits = run.gathered_logits(self._workers)
            if logits is not None and self._workers.rank == 0:
                logits_writer.keep(epoch, logits, is_best=is_best, is_last=is_last)

    def _open(self, config: TrialConfig, settings: TrialSettings) -> _Opened:
        outputs, of_test = stored_outputs(config), list[OutputName]()
        if settings.score_test and settings.post_hoc is not None and settings.post_hoc.alpha:
            of_test.append("image_embedding")
        features = settings.feature_set
        # Pinned copies of outputs that the next trial doesn't read would keep their space.
        copied = None if features.cache is None else (outputs, of_test)
        num_folds = 1 if config.reads_images or settings.refit else settings.num_folds
        in_pairs, at_random = settings.in_pairs, settings.folds_at_random
        key = (config.data, config.reads_images, features, settings.refit, num_folds, in_pairs, at_random, copied)
        if self._opened is None or self._opened.key != key:
            # Released first: this machine may have no space for copies of both.
            self._opened = None
            features, pinned = pin_features(features, outputs, of_test)
            if num_folds > 1:
                data = TrialData.open_folds(config, features, num_folds, in_pairs=in_pairs, at_random=at_random)
            else:
                data = (TrialData.open(config, features, refit=settings.refit),)
            self._opened = _Opened(key, features, data, pinned)
        return self._opened

    def _finish(self, run: TrialRun, feature_set: FeatureSet, settings: TrialSettings) -> dict[str, float]:
        scored: dict[str, float] = {}
        results, predictions, logits = {}, None, None
        if settings.score_test:
            examples = TrialData.open_split(run.config, feature_set, TEST)
            adjust = None
            if settings.post_hoc is not None:
                stored = TrialData.open_stored(run.config, feature_set, TEST)
                adjust = LogitAdjuster(settings.post_hoc, run.data, stored, self._device)
            keeps_logits = settings.keeps_test_logits and RowLogits.fits(len(examples), len(run.data.class_names))
            result = run.evaluate_full(examples, adjust, keeps_logits=keeps_logits)
            scored = {f"{TEST}/{name}": value for name, value in result.metrics(run.data.class_stats).items()}
            predicted, logits = {TEST: result.predicted}, result.logits
            if result.adjusted is not None:
                adjusted = result.adjusted.metrics(run.data.class_stats)
                scored |= {f"{POST_HOC}/{name}": value for name, value in adjusted.items()}
                predicted[POST_HOC], logits = result.adjusted.predicted, result.adjusted.logits
            results[TEST] = (examples, result)
            groups = None if examples.groups is None else torch.tensor(examples.groups)
            predictions = TestPredictions(torch.tensor(examples.labels), torch.tensor(examples.rows), predicted, groups)
        for split in feature_set.five_crop:
            if split != TEST or settings.score_test:
                crops = TrialData.open_five_crops(run.config, feature_set, split)
                result = run.evaluate_full(crops, views=range(crops.num_views))
                scored |= {f"{split}_tte/{name}": value for name, value in result.metrics(run.data.class_stats).items()}
        if settings.model_folder is not None and self._workers.rank == 0:
            save_model(settings.model_folder, run.model.eval())
            if predictions is not None:
                predictions.write(settings.model_folder)
            if logits is not None:
                write_test_logits(settings.model_folder, logits)
            write_per_class_results(settings.model_folder, per_class_results(run, results))
        return scored


def _sentence(error: Exception) -> str:
    """The error for the user; an unexpected error names its file and line."""
    if isinstance(error, ImbvlmError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
