"""A model folder: written from a refit, loaded and asked without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from imbvlm import storage
from imbvlm.config import EncoderConfig, TrialConfig
from imbvlm.data.images import FIVE_CROPS, ImageError, Preprocess, decode
from imbvlm.errors import ImbvlmError
from imbvlm.models.encoder import Encoder
from imbvlm.models.encoder_info import OutputName
from imbvlm.models.methods import METHODS, ZeroShotClassifier, restore_model
from imbvlm.models.tower_folder import save_tower
from imbvlm.posthoc import Adjustment
from imbvlm.training.checkpoint import MODEL_FILE, load_model_tensors
from imbvlm.yaml_file import YamlTree

CONFIG_FILE = "config.json"
TOWER_FOLDER = "tower"
ZERO_SHOT_FILE = "zero_shot.safetensors"
FORMAT = 1
BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first; `error` says why there are none."""

    source: str
    class_names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class PostHocStep:
    """What is done to a model's logits before they become probabilities: an adjustment, chosen on validation.

    `class_counts` (C,) are those that the model was trained on; `class_embeddings` (C, E) are there where zero-shot
    logits are mixed in.
    """

    adjustment: Adjustment
    class_counts: tuple[int, ...]
    class_embeddings: Tensor | None = None

    def apply(self, logits: Tensor, image_embedding: Callable[[], Tensor], logit_scale: float) -> Tensor:
        """Adjusted logits (B, C); `image_embedding` gives the images' (B, E) where it is asked."""
        zero_shot = None
        if self.adjustment.alpha and self.class_embeddings is not None:
            classifier = ZeroShotClassifier(self.class_embeddings.to(logits.device), logit_scale).to(logits.device)
            zero_shot = classifier(image_embedding().to(logits.device))
        return self.adjustment.apply(logits, torch.tensor(self.class_counts), zero_shot)

    def write(self, folder: str) -> dict[str, Any]:
        """Write what is too large for a description; the rest as plain data."""
        if self.class_embeddings is not None:
            tensors = {"class_embeddings": self.class_embeddings.float().cpu().contiguous()}
            storage.write_bytes(storage.join(folder, ZERO_SHOT_FILE), save_safetensors(tensors))
        return {**asdict(self.adjustment), "class_counts": list(self.class_counts)}

    @staticmethod
    def read(folder: str, data: Mapping[str, Any]) -> PostHocStep:
        """Back from `write`; raises KeyError, TypeError or StorageError."""
        values = dict(data)
        counts = tuple(values.pop("class_counts"))
        embeddings = None
        if values["alpha"]:
            embeddings = load_safetensors(storage.read_bytes(storage.join(folder, ZERO_SHOT_FILE)))["class_embeddings"]
        return PostHocStep(Adjustment(**values), counts, embeddings)


class Model:
    """An exported classifier with its own tower, preprocessing and class names."""

    def __init__(
        self,
        encoder: Encoder,
        classifier: nn.Module,
        config: TrialConfig,
        class_names: tuple[str, ...],
        post_hoc: PostHocStep | None = None,
    ) -> None:
        self._encoder, self._classifier, self._config = encoder, classifier.eval(), config
        self._post_hoc, self.class_names = post_hoc, class_names
        # What an image is to this model: its evaluation crop, or five crops whose logits are averaged.
        self._preprocess, self._num_crops = encoder.preprocess, 1
        if config.eval.tte == "five_crop":
            self._preprocess, self._num_crops = encoder.preprocess.five_crop(config.eval.expand), len(FIVE_CROPS)

    def predict(self, images: Iterable[str | Path | bytes | npt.NDArray[np.uint8]], top: int = 5) -> list[Prediction]:
        """Classify paths, URIs, encoded bytes or H x W x 3 uint8 arrays; an image that can't be read gets an error."""
        return list(self.predict_stream(images, top))

    def predict_stream(
        self, images: Iterable[str | Path | bytes | npt.NDArray[np.uint8]], top: int = 5
    ) -> Iterator[Prediction]:
        """As `predict`, a batch at a time, in order."""
        iterator = enumerate(images)
        while batch := list(islice(iterator, max(1, BATCH_SIZE // self._num_crops))):
            yield from self._predict_batch(batch, min(top, len(self.class_names)))

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits (B, C) of preprocessed uint8 images (B, 3, S, S), or their means over V crops (B, V, 3, S, S)."""
        return _mean_over_crops(pixels, self._logits)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Probabilities (B, C) of images as `logits` takes them, after what was adjusted on validation."""
        return _mean_over_crops(pixels, self._adjusted_logits).softmax(dim=1)

    def _logits(self, pixels: Tensor) -> Tensor:
        if self._config.reads_images:
            with torch.inference_mode():
                return self._classifier(pixels.to(self._encoder.device)).float()
        stored = self._stored(pixels, METHODS[self._config.method].reads)
        with torch.inference_mode():
            logits: Tensor = self._classifier(stored)
        return logits.float()

    def _adjusted_logits(self, pixels: Tensor) -> Tensor:
        logits = self._logits(pixels)
        if self._post_hoc is None:
            return logits
        scale = self._encoder.info.logit_scale
        return self._post_hoc.apply(logits, lambda: self._stored(pixels, "image_embedding"), scale)

    def _stored(self, pixels: Tensor, output: OutputName) -> Tensor:
        """An output of the tower in the precision in which what was trained on was stored."""
        features: Tensor = getattr(self._encoder.forward_images(pixels), output)
        return features.to(torch.float16 if self._config.features.precision == "float16" else torch.float32).float()

    def _predict_batch(self, batch: Sequence[tuple[int, Any]], top: int) -> list[Prediction]:
        results: dict[int, Prediction] = {}
        pixels: list[npt.NDArray[np.uint8]] = []
        sources: list[tuple[int, str]] = []
        for index, image in batch:
            source = str(image) if isinstance(image, (str, Path)) else f"image {index}"
            try:
                picture = _load(image)
                pixels.append(np.stack([self._preprocess.apply(picture, crop) for crop in range(self._num_crops)]))
                sources.append((index, source))
            except (ImageError, storage.StorageError) as error:
                results[index] = Prediction(source, error=str(error))
        if pixels:
            probabilities = self.probabilities(torch.from_numpy(np.stack(pixels))).cpu()
            values, labels = probabilities.topk(top, dim=1)
            for (index, source), row, ids in zip(sources, values.tolist(), labels.tolist(), strict=True):
                results[index] = Prediction(source, tuple(self.class_names[i] for i in ids), tuple(ids), tuple(row))
        return [results[index] for index, _ in batch]


def _mean_over_crops(pixels: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits (B, C) of images (B, 3, S, S), or the means of those of crops (B, V, 3, S, S)."""
    if pixels.ndim == 4:
        return logits_of(pixels)
    num_images, num_crops = pixels.shape[:2]
    return logits_of(pixels.flatten(0, 1)).view(num_images, num_crops, -1).mean(dim=1)


def _load(image: str | Path | bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ImageError(f"an array must be H x W x 3 of uint8, and is {image.shape} of {image.dtype}")
        return image
    return decode(image if isinstance(image, bytes) else storage.read_bytes(str(image)))


def write_model(
    folder: str,
    config: TrialConfig,
    tensors: dict[str, Tensor],
    encoder: Encoder,
    class_names: Sequence[str],
    scores: dict[str, Any],
    post_hoc: PostHocStep | None = None,
) -> None:
    """Write weights, tower, class names, preprocessing and adjustment; the folder needs nothing else to predict."""
    tower = storage.join(folder, TOWER_FOLDER)
    save_tower(encoder, tower)
    # Read back: what is described is what a user will load.
    written = _load_tower(tower, config, encoder.device)
    storage.write_bytes(storage.join(folder, MODEL_FILE), save_safetensors(tensors))
    description = {
        "format": FORMAT,
        "class_names": list(class_names),
        "preprocess": written.preprocess.to_dict(),
        "encoder": written.info.to_dict(),
        "config": config.to_tree(),
        "scores": scores,
        "post_hoc": None if post_hoc is None else post_hoc.write(folder),
    }
    storage.write_bytes(
        storage.join(folder, CONFIG_FILE), json.dumps(description, indent=1, ensure_ascii=False).encode()
    )


def _load_tower(folder: str, config: TrialConfig, device: torch.device) -> Encoder:
    name = f"local-dir:{storage.local_path(folder)}"
    return Encoder.from_config(EncoderConfig(name=name), config.eval, device)


def load(folder: str | Path, device: str | torch.device | None = None) -> Model:
    """Load a model folder that `imbvlm export` wrote; raises ImbvlmError where it is incomplete or of other weights."""
    where = storage.join(str(folder), CONFIG_FILE)
    if not storage.exists(where) and storage.exists(storage.join(str(folder), "model", CONFIG_FILE)):
        return load(storage.join(str(folder), "model"), device)
    try:
        description = json.loads(storage.read_bytes(where))
        version = description["format"]
        class_names, preprocess = tuple(description["class_names"]), Preprocess.from_dict(description["preprocess"])
        tree, fingerprint = description["config"], description["encoder"]["weights_fingerprint"]
        adjusted = description.get("post_hoc")
        post_hoc = None if adjusted is None else PostHocStep.read(str(folder), adjusted)
    except (ValueError, KeyError, TypeError) as error:
        raise ImbvlmError(f"{where} is not a model's description ({error!r}); export the model again") from None
    if version != FORMAT:
        raise ImbvlmError(f"{where} has format {version}, and this version reads {FORMAT}; export the model again")
    config = TrialConfig.from_tree(YamlTree(tree, where))
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = _load_tower(storage.join(str(folder), TOWER_FOLDER), config, target)
    if encoder.info.weights_fingerprint != fingerprint:
        raise ImbvlmError(
            f"the tower in {folder} is not the one that the classifier was trained on; export the model again"
        )
    if encoder.preprocess != preprocess:
        raise ImbvlmError(
            f"this version prepares images otherwise than {folder} was trained with: {encoder.preprocess} instead of "
            f"{preprocess}"
        )
    classifier = restore_model(config, encoder.info, len(class_names), load_model_tensors(str(folder)), encoder)
    return Model(encoder, classifier.to(target), config, class_names, post_hoc)
