"""What a trial reads: labels, counts and stored outputs of its rows. Needs no tower and no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.image_stream import ImageRows
from imbvlm.data.images.preprocess import FIVE_CROPS
from imbvlm.data.manifest import LabelRows, label_rows
from imbvlm.features.feature_set import FeatureSet, _load_tensors
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import StoreError
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.models.model_inputs import ModelInputs

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tail:
    """A store with more views of some rows of another: `places` (M,) has each of its rows' number here, or -1."""

    store: FeatureStore
    places: Rows

    def put(self, gathered: Tensor, output: OutputName, rows: Rows, views: Rows) -> None:
        """Change gathered outputs (B, ...) of rows (B,) to those of views (B,) where the row is here."""
        here = np.flatnonzero(self.places[rows] >= 0)
        if here.size:
            gathered[torch.from_numpy(here)] = self.store.gather(output, self.places[rows[here]], views[here])


@dataclass(frozen=True)
class StoredRows:
    """Rows of one store with their labels (N,); index i of a batch is the i-th of these rows.

    `num_views` of each are in that store, those of few-shot classes may have more in `tail`.
    """

    store: FeatureStore
    rows: Rows
    labels: Rows
    num_views: int = 1
    tail: Tail | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def views(self) -> int | Rows:
        """How many views there are of all, or of each (N,)."""
        if self.tail is None:
            return self.num_views
        return np.where(self.tail.places[self.rows] >= 0, self.tail.store.num_views, self.num_views)

    def batch(self, output: OutputName, index: Rows, views: Rows | None = None, pinned: bool = False) -> Tensor:
        """Outputs (B, ...) of examples (B,) in the store's precision; views (B,), the evaluation crop by default."""
        rows = self.rows[index]
        if self.tail is None or views is None:
            return self.store.gather(output, rows, views, pinned)
        gathered = self.store.gather(output, rows, np.where(self.tail.places[rows] >= 0, 0, views), pinned)
        self.tail.put(gathered, output, rows, views)
        return gathered


# What a trial trains on or is evaluated on.
RowSource = StoredRows | ImageRows


@dataclass(frozen=True)
class TrialData:
    """Everything a trial learns from. `class_stats` counts the rows in `train`, its shot groups are the official ones.

    `tower` has the tensors of `FeatureSet.tower_tensors`, `class_embeddings` (C, E) is None where text was not asked
    for, `warnings` are sentences for the user. Where the trial reads images, `train` and `val` are rows of the
    manifest, `stored` the same training rows in the store, and `encoder` is the tower to run.
    """

    class_names: tuple[str, ...]
    class_stats: ClassStats
    train: RowSource
    val: RowSource
    info: EncoderInfo
    tower: Mapping[str, Tensor] = field(default_factory=dict)
    class_embeddings: Tensor | None = None
    warnings: tuple[str, ...] = ()
    stored: StoredRows | None = None
    encoder: EncoderConfig | None = None

    @property
    def model_inputs(self) -> ModelInputs:
        """The parts that a trial's model is built from."""
        stored = self.train if isinstance(self.train, StoredRows) else self.stored
        return ModelInputs(self.info, self.class_names, self.class_embeddings, self.tower, stored, self.encoder)

    @staticmethod
    def open(config: TrialConfig, features: FeatureSet, *, refit: bool = False) -> TrialData:
        """Open training and validation rows without those that have no image; raises StoreError, StorageError.

        Validation is the official split, or else is carved from training; `refit` gives carved rows back to training
        and leaves `val` empty.
        """
        _check_tower(config, features)
        table = label_rows(features.manifest)
        train_store = features.store("train")
        train_rows = table.rows_of("train")
        carved = np.isin(train_rows, table.carve(config.data.split_seed))
        stored = _examples(train_store, table, train_rows, ~carved | refit, train_store.num_views)
        stored = replace(stored, tail=_tail(features, table, train_rows))
        if len(table.rows_of("val")):
            val = TrialData.open_split(config, features, "val")
        else:
            held_out = _examples(train_store, table, train_rows, carved & (not refit), 1)
            val = _source(config, features, held_out, train_rows)
        train = _source(config, features, stored, train_rows)
        counts = np.bincount(train.labels, minlength=len(table.class_names))
        stats = ClassStats.from_counts(counts, table.split_counts)
        return TrialData(
            class_names=table.class_names,
            class_stats=stats,
            train=train,
            val=val,
            info=features.info,
            tower=features.tower_tensors(),
            class_embeddings=_class_embeddings(features),
            warnings=_warnings(table, stats, train_store),
            stored=stored,
            encoder=config.encoder if features.encoder is None else EncoderConfig.model_validate(features.encoder),
        )

    @staticmethod
    def open_split(config: TrialConfig, features: FeatureSet, split: str) -> RowSource:
        """All rows of an official split that have an image, in manifest order; raises StoreError, StorageError."""
        rows = label_rows(features.manifest).rows_of(split)
        return _source(config, features, TrialData.open_stored(config, features, split), rows)

    @staticmethod
    def open_five_crops(config: TrialConfig, features: FeatureSet, split: str) -> RowSource:
        """As `open_split`, each image as five crops: views in the store, or numbers that the stream is given."""
        source = TrialData.open_split(config, features, split)
        if isinstance(source, StoredRows):
            store = features.five_crops(split)
            return replace(source, store=store, num_views=store.num_views)
        return replace(source, num_views=len(FIVE_CROPS))

    @staticmethod
    def open_stored(config: TrialConfig, features: FeatureSet, split: str) -> StoredRows:
        """As `open_split`, as they are stored, also where the trial runs the tower itself; in the same order."""
        _check_tower(config, features)
        table, store = label_rows(features.manifest), features.store(split)
        rows = table.rows_of(split)
        return _examples(store, table, rows, np.ones(len(rows), dtype=np.bool_), 1)


def _source(config: TrialConfig, features: FeatureSet, examples: StoredRows, split_rows: Rows) -> RowSource:
    """The examples as stored, or the same rows as images where the trial runs the tower itself."""
    if not config.reads_images:
        return examples
    return ImageRows(features.manifest, examples.rows, split_rows[examples.rows], examples.labels)


def _check_tower(config: TrialConfig, features: FeatureSet) -> None:
    asked, stored = config.encoder, features.info
    if asked.name != stored.name or asked.image_size not in (None, stored.image_size):
        raise StoreError(
            f"the configuration asks for encoder {asked.name} at {asked.image_size or stored.image_size} px, and these "
            f"features are of {stored.name} at {stored.image_size} px; extract again with this configuration"
        )
    if asked.token_pooling != stored.token_pooling:
        raise StoreError(
            f"the configuration asks for encoder.token_pooling {asked.token_pooling}, and these features were stored "
            f"with {stored.token_pooling}; extract again with this configuration"
        )


def _examples(
    store: FeatureStore, table: LabelRows, split_rows: Rows, keep: npt.NDArray[np.bool_], num_views: int
) -> StoredRows:
    if store.num_rows != len(split_rows):
        raise StoreError(
            f"the manifest has {len(split_rows)} rows where the store {store.folder} has {store.num_rows}: it was "
            "changed after extraction; start again and the store is made anew"
        )
    rows = np.flatnonzero(keep & store.ok)
    return StoredRows(store, rows, table.labels[split_rows[rows]], num_views)


def _tail(features: FeatureSet, table: LabelRows, train_rows: Rows) -> Tail | None:
    store = features.tail_store()
    if store is None:
        return None
    few_shot = ClassStats.from_counts(table.split_counts).few_shot
    chosen = np.isin(table.labels[train_rows], few_shot)
    if store.num_rows != np.count_nonzero(chosen):
        raise StoreError(
            f"the manifest has {np.count_nonzero(chosen)} rows of few-shot classes where the store {store.folder} has "
            f"{store.num_rows}: it was changed after extraction; start again and the store is made anew"
        )
    return Tail(store, np.where(chosen, np.cumsum(chosen) - 1, -1))


def _class_embeddings(features: FeatureSet) -> Tensor | None:
    if features.class_embeddings is None:
        return None
    return _load_tensors(features.class_embeddings)["class_embeddings"]


def _warnings(table: LabelRows, stats: ClassStats, store: FeatureStore) -> tuple[str, ...]:
    """Classes that have training images in the official list and none that could be decoded."""
    labels = table.labels[table.rows_of("train")]
    readable = np.bincount(labels[store.ok], minlength=stats.num_classes)
    lost = np.flatnonzero((readable == 0) & (np.bincount(labels, minlength=stats.num_classes) > 0))
    if not lost.size:
        return ()
    names = ", ".join(repr(table.class_names[label]) for label in lost[:5])
    more = f" and {lost.size - 5} more" if lost.size > 5 else ""
    return (f"no training image of {names}{more} could be decoded; they stay as classes and are never learnt",)
