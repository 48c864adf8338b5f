"""An exported classifier in memory: images to probabilities, without Ray."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.image_stream import map_rows
from imbvlm.data.images.decode_budget import DecodeBudget
from imbvlm.data.images.decoding import ImageError, Pixels, decode_picture, picture_pixels
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.features.store_layout import Precision
from imbvlm.inference.calibration_file import Decided, Decisions, ModelCalibration, Prevalence, decide_for
from imbvlm.inference.possible_classes import possible_labels
from imbvlm.inference.taxonomy_file import ModelTaxonomy, RolledUp, learn_for
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.longtail.roll_up import RollUp
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.classifier import ZeroShotClassifier
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.training.checkpoint import read_tensors, write_tensors

ZERO_SHOT_FILE = "zero_shot.safetensors"
BATCH_SIZE = 64
DECIDES_AMONG_ALL = (
    "decisions and sets are promised for all classes of a model, and it is limited to some. Leave out either the "
    "promises or the limit."
)
ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | npt.NDArray[np.uint8]
_IMAGE_FORMS = "a path, a URI, the bytes of an encoded file, a Pillow image, or an H x W x 3 array of uint8"


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the best first; `error` is the reason if there are none.

    `roll_up` is the name at the lowest rank that is sure enough, of a model that rolls up. A model that decides gives
    `decision`, `accept` or `review`, and the names in `class_set`, the most probable first.
    """

    source: str
    class_names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None
    roll_up: RolledUp | None = None
    decision: str | None = None
    class_set: tuple[str, ...] | None = None

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """Class names with their probabilities, the best first."""
        return list(zip(self.class_names, self.probabilities, strict=True))


@dataclass(frozen=True)
class LogitPostprocessor:
    """The adjustment of a model's logits that validation selected, and the data that it needs.

    `class_counts` (C,) are those that the model was trained on. `class_embeddings` (C, E) are present if zero-shot
    logits are mixed in.
    """

    adjustment: PostHocAdjustment
    class_counts: tuple[int, ...]
    class_embeddings: Tensor | None = None

    def write(self, folder: str, digests: dict[str, str]) -> dict[str, Any]:
        """Write the class embeddings into a model's folder, add their digest, and return the rest as plain data."""
        if self.class_embeddings is not None:
            write_tensors(folder, ZERO_SHOT_FILE, {"class_embeddings": self.class_embeddings.float()}, digests)
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Adjustment and class counts as plain data, without the class embeddings."""
        return {**asdict(self.adjustment), "class_counts": list(self.class_counts)}

    @staticmethod
    def read(
        folder: str, data: Mapping[str, Any], num_classes: int, embedding_width: int | None, digests: Mapping[str, str]
    ) -> LogitPostprocessor:
        """Read what `write` wrote; raises KeyError, TypeError, ValueError, StorageError or CheckpointError."""
        values = dict(data)
        counts = tuple(operator.index(count) for count in values.pop("class_counts"))
        if len(counts) != num_classes or min(counts) < 0:
            raise ValueError(f"class_counts has {len(counts):,} numbers from 0 up, and there are {num_classes} classes")
        adjustment = PostHocAdjustment(**{name: float(value) for name, value in values.items()})
        if not (np.isfinite([adjustment.tau, adjustment.alpha]).all() and 0 < adjustment.temperature < np.inf):
            raise ValueError(f"tau and alpha must be finite and temperature above 0, got {adjustment}")
        embeddings = None
        if adjustment.alpha:
            embeddings = read_tensors(folder, ZERO_SHOT_FILE, digests)["class_embeddings"]
            if embeddings.shape != (num_classes, embedding_width):
                raise ValueError(
                    f"{ZERO_SHOT_FILE} has {' x '.join(map(str, embeddings.shape))} numbers, and there are "
                    f"{num_classes:,} classes in {embedding_width} dimensions"
                )
        return LogitPostprocessor(adjustment, counts, embeddings)


def as_stored(features: Tensor, precision: Precision) -> Tensor:
    """An encoder output in the precision of the stored features that a classifier was trained on."""
    return features.half().float() if precision == "float16" else features


def crop_means(logits: Tensor, images: Tensor) -> Tensor:
    """Logits of all crops as the mean (B, C) of each image's, for crops (B, 3, S, S) or (B, V, 3, S, S)."""
    return logits if images.ndim == 4 else logits.view(*images.shape[:2], -1).mean(dim=1)


class InferenceModule(nn.Module):
    """Encoder, classifier and logit adjustment in one module, with one input."""

    def __init__(
        self, encoder: Encoder, classifier: nn.Module, config: TrialConfig, post_hoc: LogitPostprocessor | None
    ) -> None:
        super().__init__()
        self.tower, self.classifier = encoder.image_tower, classifier
        self._encoder, self._config, self._post_hoc = encoder, config, post_hoc
        self._reads = METHODS[config.method].reads
        self.zero_shot = None
        if post_hoc is not None and post_hoc.class_embeddings is not None and post_hoc.adjustment.alpha:
            self.zero_shot = ZeroShotClassifier(post_hoc.class_embeddings, encoder.info.text_space.logit_scale)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) in float32, without and with the adjustments, of crops in bytes.

        Crops are (B, 3, S, S), or (B, V, 3, S, S) whose logits are averaged.
        """
        logits, adjusted = self._logits(images.flatten(0, -4))
        return crop_means(logits, images), crop_means(adjusted, images)

    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier's own logits and the adjusted ones of crops (B, 3, S, S)."""
        outputs, precision = None, self._config.features.precision
        if self.zero_shot is not None or not self._config.reads_images:
            outputs = self._encoder.outputs(images)
        if self._config.reads_images:
            logits = self.classifier(images)
        else:
            logits = self.classifier(as_stored(getattr(outputs, self._reads), precision))
        logits = logits.float()
        if self._post_hoc is None:
            return logits, logits
        zero_shot = None
        if self.zero_shot is not None and outputs is not None and outputs.image_embedding is not None:
            zero_shot = self.zero_shot(as_stored(outputs.image_embedding, precision))
        counts = torch.tensor(self._post_hoc.class_counts, device=logits.device)
        return logits, self._post_hoc.adjustment.apply(logits, counts, zero_shot)


class Model:
    """An exported classifier with its encoders, class names, and the preprocessing of each of its inputs.

    `network` maps a tensor of crops for each input to two logits (B, C), as `InferenceModule.forward`.
    """

    def __init__(
        self, network: nn.Module, inputs: Sequence[Preprocess], class_names: tuple[str, ...], device: torch.device
    ) -> None:
        self.network, self.inputs = network.eval(), tuple(inputs)
        self.class_names, self._device = class_names, device
        self._is_possible = torch.ones(len(class_names), dtype=torch.bool, device=device)
        self._tree: ModelTaxonomy | None = None
        self._roll_up: RollUp | None = None
        self._calibration: ModelCalibration | None = None
        self._decisions: Decisions | None = None

    @property
    def taxonomy(self) -> Taxonomy | None:
        """The tree over the classes; None without one."""
        return None if self._tree is None else self._tree.taxonomy

    def completed(self, tree: ModelTaxonomy | None, calibration: ModelCalibration | None) -> Model:
        """The same model with a tree over its classes, and scores to decide by."""
        model = copy.copy(self)
        model._tree, model._calibration = tree, calibration
        return model

    def rolling_up(self, precision: float) -> Model:
        """The same model, whose predictions also have the name at the lowest rank of the taxonomy that is sure enough.

        Of what is named at a rank, at least a share `precision` is right, as validation images show at 95 %. Raises
        ImbvlmError where no rank can promise it, with the reason.
        """
        model = copy.copy(self)
        model._roll_up = learn_for(self._tree, precision)
        return model

    def deciding(
        self, accept: float | None = None, sets: float | None = None, prevalence: Prevalence | None = None
    ) -> Model:
        """This model with decisions: its predictions also have a decision, a set of classes, or both.

        Of the predictions of a class that it accepts, at least a share `accept` is right, as validation images show at
        95 %; the others are for review. Sets have a share `sets` of images' classes among them. `prevalence` says how
        classes come in the images to predict: `training`, `even`, or shares by class name; by default as in validation.
        Raises ImbvlmError for a model without such scores, with the reason, and for a limited one.
        """
        if self.num_possible < len(self.class_names):
            raise ImbvlmError(DECIDES_AMONG_ALL)
        model = copy.copy(self)
        model._decisions = decide_for(self._calibration, accept, sets, prevalence)
        return model

    def limited_to(self, class_names: Iterable[str]) -> Model:
        """The same model for images of these classes alone, such as a region's species: others have probability 0.

        Raises ImbvlmError for unknown names, with the nearest, without any name, and for a model that decides.
        """
        if self._decisions is not None:
            raise ImbvlmError(DECIDES_AMONG_ALL)
        names = [class_names] if isinstance(class_names, str) else [*map(str, class_names)]
        labels = possible_labels(names, self.class_names)
        model = copy.copy(self)
        model._is_possible = torch.zeros_like(self._is_possible)
        model._is_possible[labels] = True
        return model

    @property
    def num_possible(self) -> int:
        """The number of classes that are predicted."""
        return int(self._is_possible.sum())

    def predict(self, images: ImageLike | Iterable[ImageLike], top: int = 5) -> list[Prediction]:
        """Classify one image or several; an unreadable image gets an error in place of classes.

        An image is a path, a URI, an encoded file's bytes, a Pillow image, or an H x W x 3 array of uint8. Raises
        ImbvlmError for a `top` below 1, and for a value that is neither an image nor an iterable of images.
        """
        return list(self.predict_stream(images, top))

    def predict_stream(self, images: ImageLike | Iterable[ImageLike], top: int = 5) -> Iterator[Prediction]:
        """Classify images as `predict` does, lazily and batch by batch, in order."""
        return self._stream(enumerate(_several(images)), _checked_top(top))

    def _stream(self, iterator: Iterator[tuple[int, ImageLike]], top: int) -> Iterator[Prediction]:
        num_crops = max(preprocess.num_crops for preprocess in self.inputs)
        while batch := list(islice(iterator, max(1, BATCH_SIZE // num_crops))):
            yield from self._predict_batch(batch, top)

    def classify(self, crops: Sequence[Pixels], top: int = 5) -> list[tuple[list[int], list[float]]]:
        """Labels and probabilities of the most probable classes, the best first, of each input's crops (B, ...)."""
        top = min(_checked_top(top), self.num_possible)
        values, labels = self._all_probabilities(crops).topk(top, dim=1)
        return list(zip(labels.tolist(), values.tolist(), strict=True))

    def _all_probabilities(self, crops: Sequence[Pixels]) -> Tensor:
        """Probabilities (B, C) on the CPU; of no crops none."""
        if not len(crops[0]):
            return torch.empty(0, len(self.class_names))
        return self.probabilities(*map(torch.from_numpy, crops)).cpu()

    def logits(self, *crops: Tensor) -> Tensor:
        """Logits (B, C) before adjustments; those of a blend have its members' adjustments.

        Each input's crops are (B, 3, S, S) in bytes, or (B, V, 3, S, S) with the mean over V crops.
        """
        return self._run(crops)[0]

    def probabilities(self, *crops: Tensor) -> Tensor:
        """Adjusted probabilities (B, C) of crops as `logits` takes them."""
        return self._run(crops)[1].masked_fill(~self._is_possible, -torch.inf).softmax(dim=1)

    @torch.inference_mode()
    def _run(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        logits, adjusted = self.network(*(part.to(self._device) for part in crops))
        return logits, adjusted

    def _predict_batch(self, batch: Sequence[tuple[int, ImageLike]], top: int) -> list[Prediction]:
        crops: list[list[Pixels] | None] = [None] * len(batch)
        budget = DecodeBudget()

        def load(number: int) -> str | None:
            try:
                crops[number] = self._crops(batch[number][1], budget)
            except (ImageError, storage.StorageError) as error:
                return str(error)
            return None

        names = [os.fspath(image) if isinstance(image, (str, os.PathLike)) else None for _, image in batch]
        reasons = map_rows(load, names)
        sources = [name or f"image {index}" for name, (index, _) in zip(names, batch, strict=True)]
        good = [parts for parts in crops if parts is not None]
        batches = [np.stack(parts) for parts in zip(*good, strict=True)] or [np.empty(0, np.uint8)]
        return self.predictions(sources, batches, reasons, top)

    def _crops(self, image: ImageLike, budget: DecodeBudget) -> list[Pixels]:
        if isinstance(image, (str, os.PathLike)):
            with budget.fetched(os.fspath(image), None) as data:
                return crops_of_file(self.inputs, data)
        if isinstance(image, (bytes, bytearray, memoryview)):
            return crops_of_file(self.inputs, bytes(image))
        picture = _checked_picture(image)
        return [crops_of(preprocess, picture) for preprocess in self.inputs]

    def random_crops(self, number: int, num_images: int) -> Tensor:
        """Random crops of images for an input, (B, 3, S, S) or (B, V, 3, S, S), on the model's device."""
        preprocess, generator = self.inputs[number], torch.Generator().manual_seed(num_images)
        several = () if preprocess.num_crops == 1 else (preprocess.num_crops,)
        shape = (num_images, *several, 3, preprocess.image_size, preprocess.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(self._device)

    def predictions(
        self, sources: Sequence[str], crops: Sequence[Pixels], reasons: Sequence[str | None], top: int
    ) -> list[Prediction]:
        """A prediction for each source: its error if it has a reason, else the classes of each input's next crops."""
        probabilities = self._all_probabilities(crops)
        values, labels = probabilities.topk(min(top, self.num_possible), dim=1)
        rolled_up: Sequence[RolledUp | None] = [None] * len(probabilities)
        if self._tree is not None and self._roll_up is not None:
            rolled_up = self._tree.rolled_up(self._roll_up, probabilities.double().numpy())
        decided: Sequence[Decided] = [(None, None)] * len(probabilities)
        if self._decisions is not None:
            decided = self._decisions.decided(labels[:, 0].numpy(), probabilities.double().numpy())
        rows = iter(zip(labels.tolist(), values.tolist(), rolled_up, decided, strict=True))
        return [
            self._prediction(source, *next(rows)) if reason is None else Prediction(source, error=reason)
            for source, reason in zip(sources, reasons, strict=True)
        ]

    def _prediction(
        self,
        source: str,
        labels: Sequence[int],
        probabilities: Sequence[float],
        rolled_up: RolledUp | None,
        decided: Decided,
    ) -> Prediction:
        """Labels with their names."""
        names = tuple(self.class_names[label] for label in labels)
        return Prediction(source, names, tuple(labels), tuple(probabilities), None, rolled_up, *decided)


def crops_of(preprocess: Preprocess, image: Pixels | Image.Image) -> Pixels:
    """The crops (V, 3, S, S) of one image that a model's input takes."""
    return np.stack([preprocess.apply(image, crop) for crop in range(preprocess.num_crops)])


def crops_of_file(inputs: Sequence[Preprocess], data: bytes) -> list[Pixels]:
    """The crops of an image's file for each input; raises ImageError.

    Inputs that need the same pixels share a decoded image.
    """
    pictures = {side: decode_picture(data, min_side=side) for side in {each.min_side() for each in inputs}}
    return [crops_of(preprocess, pictures[preprocess.min_side()]) for preprocess in inputs]


def _several(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """The images as an iterable; a text, bytes or an array of one image is iterable but one image."""
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim < 4:
        return [images]
    if isinstance(images, Iterable):
        return images
    raise ImbvlmError(f"predict takes an image or several: {_IMAGE_FORMS}. It got {type(images).__name__}.")


def _checked_top(top: int) -> int:
    if isinstance(top, bool) or not hasattr(top, "__index__") or operator.index(top) < 1:
        raise ImbvlmError(
            f"top, the number of classes per image, must be a whole number from 1 up, got {top!r}. Give one such as 5."
        )
    return operator.index(top)


def _checked_picture(image: Image.Image | npt.NDArray[np.uint8]) -> Pixels | Image.Image:
    """A Pillow image or an array as crops are made from it; raises ImageError for anything else."""
    if isinstance(image, Image.Image):
        return picture_pixels(image)
    if not isinstance(image, np.ndarray):
        raise ImageError(f"an image is {_IMAGE_FORMS}, and this is {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ImageError(f"an array must be H x W x 3 of uint8, got {image.shape} of {image.dtype}; convert it to RGB")
    return image
