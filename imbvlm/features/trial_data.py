"""The rows that a trial reads: labels, counts and stored outputs. Needs no encoder and no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.folds import deal_folds, fold_pairs
from imbvlm.data.image_stream import ImageRows
from imbvlm.data.images.preprocess import FIVE_CROPS
from imbvlm.data.manifest import LabelRows, label_rows
from imbvlm.data.manifest_schema import Rows
from imbvlm.data.splits import carve_validation
from imbvlm.features.feature_set import FeatureSet, load_tensors
from imbvlm.features.store_layout import StoreError
from imbvlm.features.stored_split import StoredSplit
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.model_inputs import ModelInputs


@dataclass(frozen=True)
class StoredRows:
    """Rows of one split with their labels (N,); index i of a batch is the i-th of these rows.

    Training draws from the first `num_views` stored views of each. `groups` (N,) are those of the manifest, if any.
    """

    store: StoredSplit
    rows: Rows
    labels: Rows
    num_views: int = 1
    groups: Rows | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, keep: npt.NDArray[np.bool_], num_views: int) -> StoredRows:
        """The rows that a mask (N,) keeps."""
        groups = None if self.groups is None else self.groups[keep]
        return replace(self, rows=self.rows[keep], labels=self.labels[keep], num_views=num_views, groups=groups)

    def batch(self, output: OutputName, index: Rows, views: Rows | None = None, pinned: bool = False) -> Tensor:
        """Outputs (B, ...) of rows (B,) in the store's precision; views (B,), by default the evaluation crops."""
        return self.store.gather(output, self.rows[index], views, pinned)


# The rows that a trial trains on or is evaluated on.
RowSource = StoredRows | ImageRows


@dataclass(frozen=True)
class TrialData:
    """Everything a trial learns from. `class_stats` counts the rows in `train`; its shot groups are the official ones.

    `encoder_tensors` are those of the FeatureSet. `class_embeddings` (C, E) is None where no text was encoded.
    For a trial that reads images, `train` and `val` are rows of the manifest, `stored` has the same training rows in
    the store, and `encoder` is the encoder to run. A fold has the official validation rows, if there are any, as
    `official`.
    """

    class_names: tuple[str, ...]
    class_stats: ClassStats
    train: RowSource
    val: RowSource
    info: EncoderInfo
    encoder_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    class_embeddings: Tensor | None = None
    stored: StoredRows | None = None
    encoder: EncoderConfig | None = None
    official: StoredRows | None = None
    taxonomy: Taxonomy | None = None

    @property
    def model_inputs(self) -> ModelInputs:
        """The parts that a trial's model is built from."""
        stored = self.train if isinstance(self.train, StoredRows) else self.stored
        return ModelInputs(
            self.info,
            self.class_names,
            self.class_embeddings,
            self.encoder_tensors,
            stored,
            self.encoder,
            self.taxonomy,
        )

    @staticmethod
    def open(
        config: TrialConfig, features: FeatureSet, *, refit: bool = False, table: LabelRows | None = None
    ) -> TrialData:
        """Open the training and validation rows that have an image; raises StoreError, StorageError.

        Validation is the official split, or else held out from training. A `refit` trains on held-out rows too, and its
        `val` is then empty. `table` has the manifest's rows where they were read already.
        """
        _check_encoder(config, features)
        table = label_rows(features.manifest) if table is None else table
        train_store = features.store("train")
        train_rows = table.rows_of("train")
        is_val = np.isin(train_rows, carve_validation(table, config.data.split_seed))
        stored = _stored_rows(train_store, table, train_rows, ~is_val | refit, train_store.num_views)
        if len(table.rows_of("val")):
            val = _split_source(config, features, table, "val")
        else:
            held_out = _stored_rows(train_store, table, train_rows, is_val & (not refit), 1)
            val = _row_source(config, features, held_out, train_rows)
        train = _row_source(config, features, stored, train_rows)
        return TrialData(
            class_names=table.class_names,
            class_stats=_class_stats(table, train),
            train=train,
            val=val,
            info=features.info,
            encoder_tensors=features.encoder_tensors(),
            class_embeddings=_class_embeddings(features),
            stored=stored,
            encoder=features.encoder or config.encoder,
            taxonomy=table.taxonomy,
        )

    @staticmethod
    def open_folds(
        config: TrialConfig,
        features: FeatureSet,
        num_folds: int,
        *,
        in_pairs: bool = False,
        at_random: bool = False,
        table: LabelRows | None = None,
    ) -> tuple[TrialData, ...]:
        """The data of each fold of the training rows (data/folds.py), for a trial on stored features.

        `in_pairs`: of each two folds, without official rows. `at_random` as in `deal_folds`, `table` as in `open`.
        Raises StoreError, StorageError.
        """
        table = label_rows(features.manifest) if table is None else table
        whole = TrialData.open(config, features, refit=True, table=table)
        assert isinstance(whole.train, StoredRows), "a trial that reads images is scored on held-out rows"
        row_numbers = table.rows_of("train")[whole.train.rows]
        official = whole.val if isinstance(whole.val, StoredRows) and len(whole.val) and not in_pairs else None
        folds, opened = deal_folds(table, num_folds, config.data.split_seed, at_random=at_random), []
        for fold in fold_pairs(folds) if in_pairs else folds.folds:
            is_val = np.isin(row_numbers, fold.val)
            train, val = whole.train.subset(~is_val, whole.train.num_views), whole.train.subset(is_val, 1)
            stats = _class_stats(table, train)
            opened.append(replace(whole, class_stats=stats, train=train, val=val, stored=train, official=official))
        return tuple(opened)

    @staticmethod
    def open_split(config: TrialConfig, features: FeatureSet, split: str) -> RowSource:
        """All rows of an official split that have an image, in manifest order; raises StoreError, StorageError."""
        return _split_source(config, features, label_rows(features.manifest), split)

    @staticmethod
    def open_five_crops(config: TrialConfig, features: FeatureSet, split: str) -> RowSource:
        """As `open_split`, each image as five crops: stored views, or the views of an image stream."""
        source = TrialData.open_split(config, features, split)
        if isinstance(source, StoredRows):
            store = features.five_crops(split)
            return replace(source, store=store, num_views=store.num_views)
        return replace(source, num_views=len(FIVE_CROPS))

    @staticmethod
    def open_stored(config: TrialConfig, features: FeatureSet, split: str) -> StoredRows:
        """As `open_split`, but always as stored, also for a trial that runs the encoder itself; in the same order."""
        return _stored_split(config, features, label_rows(features.manifest), split)


def _class_stats(table: LabelRows, train: RowSource) -> ClassStats:
    counts = np.bincount(train.labels, minlength=len(table.class_names))
    return ClassStats.from_counts(counts, table.split_counts)


def _split_source(config: TrialConfig, features: FeatureSet, table: LabelRows, split: str) -> RowSource:
    return _row_source(config, features, _stored_split(config, features, table, split), table.rows_of(split))


def _stored_split(config: TrialConfig, features: FeatureSet, table: LabelRows, split: str) -> StoredRows:
    _check_encoder(config, features)
    rows = table.rows_of(split)
    return _stored_rows(features.store(split), table, rows, np.ones(len(rows), dtype=np.bool_), 1)


def _row_source(config: TrialConfig, features: FeatureSet, stored: StoredRows, split_rows: Rows) -> RowSource:
    """The stored rows, or the same rows as images for a trial that runs the encoder itself."""
    if not config.reads_images:
        return stored
    return ImageRows(features.manifest, stored.rows, split_rows[stored.rows], stored.labels, groups=stored.groups)


def _check_encoder(config: TrialConfig, features: FeatureSet) -> None:
    wanted, stored = config.encoder, features.info
    if wanted.name != stored.name or wanted.image_size not in (None, stored.image_size):
        raise StoreError(
            f"the configuration asks for encoder {wanted.name} at {wanted.image_size or stored.image_size} px, and "
            f"these features are of {stored.name} at {stored.image_size} px. Extract again with this configuration."
        )
    if wanted.token_pooling != stored.token_pooling:
        raise StoreError(
            f"the configuration asks for encoder.token_pooling {wanted.token_pooling}, and these features were stored "
            f"with {stored.token_pooling}. Extract again with this configuration."
        )


def _stored_rows(
    store: StoredSplit, table: LabelRows, split_rows: Rows, keep: npt.NDArray[np.bool_], num_views: int
) -> StoredRows:
    if store.num_rows != len(split_rows):
        raise StoreError(
            f"the manifest has {len(split_rows)} rows where {store.path} has {store.num_rows}: it was "
            "changed after extraction. Start again to extract anew."
        )
    rows = np.flatnonzero(keep & store.ok)
    groups = None if table.groups is None else table.groups[split_rows[rows]]
    return StoredRows(store, rows, table.labels[split_rows[rows]], num_views, groups)


def _class_embeddings(features: FeatureSet) -> Tensor | None:
    if features.class_embeddings is None:
        return None
    return load_tensors(features.class_embeddings)["class_embeddings"]
