"""The second stage of a trial: keeps a frozen decoder's outputs in memory, and trains a classifier on them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.second_stage_registry import (
    SECOND_STAGES,
    StageSection,
    TrainedStage,
    loss_options,
    num_stage_epochs,
)
from imbvlm.config.training_sections import SgdConfig, TrainConfig
from imbvlm.config.trial_config import TrialConfig, selected_options
from imbvlm.features.trial_data import RowSource, StoredRows, TrialData
from imbvlm.longtail.class_sampling import Rows, epoch_plan
from imbvlm.longtail.losses import build_loss
from imbvlm.longtail.metrics import ClassCounters
from imbvlm.models.classifier import CosineClassifier, FeatureClassifier, LinearClassifier
from imbvlm.models.second_stage_modules import stage_module
from imbvlm.training.evaluator import Evaluator
from imbvlm.training.stage_trainer import Span, StageTrainer
from imbvlm.training.step.batch_source import Batch
from imbvlm.training.validation_logits import RowLogits

# Validation features whose logits are in memory at once.
CHUNK_SIZE = 4096


class FrozenFeatures:
    """A frozen decoder's outputs in memory on the device; each part is computed on first use.

    Every worker must use it. Trials of a pack with the same decoder share it.
    """

    def __init__(self, model: FeatureClassifier, evaluator: Evaluator) -> None:
        self._model, self._evaluator = model, evaluator
        self._width = _first_stage(model.classifier).weight.shape[1]

    @cached_property
    def train(self) -> Tensor:
        """Outputs (N * V, D) of all views of training rows, a row's views in consecutive rows."""
        return self._outputs(self._evaluator.data.train)

    @cached_property
    def val(self) -> Tensor:
        """Outputs (M, D) of the validation rows."""
        return self._outputs(self._evaluator.data.val)

    @cached_property
    def train_labels(self) -> Tensor:
        """Labels (N,) of the training rows."""
        return torch.from_numpy(self._evaluator.data.train.labels).to(self._evaluator.device)

    @cached_property
    def val_labels(self) -> Tensor:
        """Labels (M,) of the validation rows."""
        return torch.from_numpy(self._evaluator.data.val.labels).to(self._evaluator.device)

    def batch(self, rows: Rows, views: Rows) -> Batch:
        """Training rows (B,) in views (B,)."""
        entries = rows * self._evaluator.data.train.num_views + views
        inputs, index = (torch.from_numpy(array).to(self.train.device) for array in (entries, rows))
        return Batch(self.train[inputs], self.train_labels[index], rows)

    def _outputs(self, examples: RowSource) -> Tensor:
        self._model.eval()
        return self._evaluator.all_views(self._model.decoder, _stored(examples), self._width)


class SecondStageTrainer:
    """A second stage on a trial's model, whose decoder it freezes and whose classifier it replaces.

    The first stage need not be trained before `start`: a resumed trial loads its tensors later. Random numbers come
    from torch's global generator. `trainer` is None where nothing trains. `features` may be another trial's of the
    same pack.
    """

    def __init__(
        self,
        config: StageSection,
        train: TrainConfig,
        model: FeatureClassifier,
        span: Span,
        evaluator: Evaluator,
        features: FrozenFeatures | None = None,
    ) -> None:
        self._config, self._entry, self._train, self._model = config, SECOND_STAGES[config.name], train, model
        self._span, self._evaluator = span, evaluator
        self._first = model.classifier
        self.features = FrozenFeatures(model, evaluator) if features is None else features
        model.decoder.requires_grad_(False)
        model.classifier = stage_module(config, _first_stage(self._first)).to(evaluator.device)
        self.trainer = self._build_trainer()

    def start(self) -> dict[str, float]:
        """Select the classifier of a stage that trains nothing, after the first; returns its options as metrics."""
        if self._entry.select is None:
            return {}
        metrics: dict[str, float]
        targets = self.features.val_labels
        self._model.classifier, metrics = self._entry.select(self._first, self.features.val, targets, self._config)
        return metrics

    def validate(self, keep: RowLogits | None = None) -> ClassCounters:
        """Per-class counts of validation, the same for every worker; every worker must call it.

        `keep` is given this worker's share of the logits.
        """
        features, counters = self.features, ClassCounters(len(self._evaluator.data.class_names))
        workers = self._evaluator.workers
        self._model.eval()
        with torch.inference_mode():
            for start in range(0, len(features.val), CHUNK_SIZE):
                part = slice(start, start + CHUNK_SIZE)
                logits = self._model.classifier(features.val[part])
                counters.update(logits, features.val_labels[part])
                if keep is not None:
                    rows = np.arange(start, start + len(logits))
                    is_own = rows % workers.world_size == workers.rank
                    keep.add(rows[is_own], logits[torch.from_numpy(is_own)])
        return counters

    def prepare(self) -> None:
        """Compute the features; every worker must call it before training."""
        if self.trainer is not None:
            _ = self.features.train
        _ = self.features.val

    @property
    def pack_key(self) -> str:
        """Equal for stages that can train together: those of one name and length."""
        return f"{self._config.name} {num_stage_epochs(self._config)}"

    def _build_trainer(self) -> StageTrainer | None:
        """The paper's sampling and reweighting, by SGD with half a cosine."""
        config, entry, evaluator = self._config, self._entry, self._evaluator
        if not isinstance(config, TrainedStage) or entry.class_sampling is None or entry.loss is None:
            return None
        # A reference to self would be a cycle, which keeps the features in memory after the trial.
        data, span, features = evaluator.data, self._span, self.features
        counts = torch.as_tensor(data.class_stats.counts, device=evaluator.device)
        loss = build_loss(entry.loss, counts, workers=evaluator.workers, **loss_options(config, entry.loss))
        # Epochs continue the first stage's numbers, so that the stages' random orders are independent.
        plan_of = partial(
            epoch_plan,
            data.train.labels,
            len(data.class_names),
            entry.class_sampling,
            self._train.seed,
            num_epochs=span.end_epoch,
            num_views=data.train.num_views,
        )
        optim = SgdConfig(
            lr=config.lr, weight_decay=config.weight_decay, warmup_fraction=0.0, lr_schedule="half_cosine"
        )
        return StageTrainer(
            model=self._model.classifier,
            forward=self._model.classifier,
            optim=optim,
            train=self._train,
            span=span,
            steps_per_epoch=span.num_steps // span.num_epochs,
            plan_of=plan_of,
            read=lambda plan, shares, epoch: (features.batch(plan.rows[share], plan.views[share]) for share in shares),
            losses_of=lambda epoch: lambda step: loss,
            loss_name=f"{entry.loss} of second_stage {config.name}",
            fix="lower second_stage.lr",
            device=evaluator.device,
            workers=evaluator.workers,
            autocast=nullcontext,
        )


def check_can_select(config: TrialConfig, data: TrialData) -> None:
    """Raise ImbvlmError, before training, where options are selected on validation rows and there are none."""
    for key, value in selected_options(config.to_tree()).items():
        if value is None and not len(data.val):
            raise ImbvlmError(f"{key} is selected on validation rows, and there are none. Set {key}.")


def _first_stage(classifier: nn.Module) -> LinearClassifier | CosineClassifier:
    assert isinstance(classifier, (LinearClassifier, CosineClassifier)), "a first stage ends in one of these"
    return classifier


def _stored(examples: RowSource) -> StoredRows:
    assert isinstance(examples, StoredRows), "TrialConfig lets only trials on stored features have a second stage"
    return examples
