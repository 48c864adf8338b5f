"""Predictions of many images, in this process or through Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.data.files.file_listing import IMAGE_SUFFIXES, list_tree, printable_path
from imbvlm.data.image_stream import read_images
from imbvlm.data.images.decoding import Pixels
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.data.manifest import EMBEDDED, Manifest
from imbvlm.inference.calibration_file import ModelCalibration, Prevalence, decide_for
from imbvlm.inference.model_folder import load, model_folder, read_description, read_record
from imbvlm.inference.possible_classes import possible_labels
from imbvlm.inference.predictor import DECIDES_AMONG_ALL, Model, Prediction, crops_of_file
from imbvlm.inference.taxonomy_file import ModelTaxonomy, roll_up_notes

# With fewer images the start of Ray Data's processes takes longer than it saves.
MIN_RAY_IMAGES = 5_000
BLOCK_SIZE = 256


@dataclass(frozen=True)
class Images:
    """Images to classify, in order: each has a location, or its bytes if a manifest embeds it.

    `names` are valid text for tables, although a location may contain bytes that aren't UTF-8.
    """

    names: Sequence[str]
    uris: Sequence[str | None]
    contents: Sequence[bytes | None]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class PredictionOptions:
    """The options of a prediction: `only` has the names of possible classes, by default all.

    `roll_up` is the precision of names at ranks of the taxonomy, `accept` that of accepted predictions, and `sets` the
    coverage of sets, each None without them. `prevalence` is that of the images to predict, None as in validation.
    """

    only: tuple[str, ...] = ()
    roll_up: float | None = None
    accept: float | None = None
    sets: float | None = None
    prevalence: Prevalence | None = None

    @property
    def decides(self) -> bool:
        """Whether a decision, a set or both are asked for."""
        return (self.accept, self.sets, self.prevalence) != (None, None, None)

    def applied_to(self, model: Model) -> Model:
        """The model as asked for; raises ImbvlmError as `limited_to`, `rolling_up` and `deciding` do."""
        model = model.limited_to(self.only) if self.only else model
        model = model if self.roll_up is None else model.rolling_up(self.roll_up)
        return model.deciding(self.accept, self.sets, self.prevalence) if self.decides else model

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that predictions have beside their classes."""
        asked = {("decision",): self.accept, ("set",): self.sets, ("roll_up", "roll_up_rank"): self.roll_up}
        return tuple(name for names, value in asked.items() if value is not None for name in names)


PLAIN = PredictionOptions()


@dataclass(frozen=True)
class PredictionBlock:
    """Some of the images, from number `start` on, and how they are read for each input of a model."""

    start: int
    images: Images
    inputs: tuple[Preprocess, ...]


@dataclass(frozen=True)
class LoadedCrops:
    """The crops (N, V, 3, S, S) of a block's images for each input, with an error or None per image."""

    start: int
    names: Sequence[str]
    crops: Sequence[Pixels]
    reasons: Sequence[str | None]


@dataclass(frozen=True)
class PredictedBlock:
    """The predictions of a block's images, in order."""

    start: int
    predictions: list[Prediction]


def find_images(locations: Sequence[str], split: str | None = None) -> Images:
    """The images at locations: files, images below folders and s3:// prefixes, rows of manifests, of one `split`.

    Images of a folder are sorted. Raises ImbvlmError if there are none.
    """
    names, uris, contents = list[str](), list[str | None](), list[bytes | None]()
    for location in locations:
        if location.startswith(EMBEDDED) or location.endswith(".parquet"):
            manifest = Manifest.read(location)
            if split is not None:
                _check_split(location, manifest, split)
                manifest = manifest.split(split)
            table = manifest.table
            rows = zip(table.column("uri").to_pylist(), table.column("bytes").to_pylist(), strict=True)
            for number, (uri, data) in enumerate(rows):
                names.append(uri or f"{location} row {number}")
                uris.append(uri)
                contents.append(data)
            continue
        paths = _files(location)
        names += paths
        uris += paths
        contents += [None] * len(paths)
    if not names:
        raise ImbvlmError(
            f"no image in {', '.join(locations)}. Name files or folders with {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return Images([printable_path(name) for name in names], uris, contents)


def _check_split(location: str, manifest: Manifest, split: str) -> None:
    if split not in manifest.splits:
        raise ImbvlmError(
            f"{location} has no {split} images; it has {', '.join(manifest.splits)}. "
            "Name one of these, or leave --split out."
        )


def _files(location: str) -> list[str]:
    if storage.is_local(location):
        if not storage.exists(location):
            raise ImbvlmError(f"{location} does not exist. Name an image, a folder, a manifest or an s3:// prefix.")
        if not storage.local_path(location).is_dir():
            # A file by any name: its content shows whether it is an image.
            return [location]
    elif PurePosixPath(location).suffix.lower() in IMAGE_SUFFIXES:
        return [location]
    paths = (file.path for file in list_tree(location))
    return [storage.join(location, path) for path in paths if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]


# ----------------------------------------------------------------------------------------------- predicting


def predictions(
    folder: str,
    images: Images,
    top: int,
    *,
    use_ray: bool,
    notify: Callable[[str], None],
    options: PredictionOptions = PLAIN,
) -> Iterator[Prediction]:
    """Predict all images in order, in this process or through Ray Data on every GPU or CPU.

    `notify` is called from another thread if prediction waits for machines that the cluster lacks. Raises ImbvlmError
    if the model can't be loaded or would prepare images differently than in training.
    """
    if use_ray:
        yield from _in_ray(folder, images, top, options, notify)
        return
    model = options.applied_to(load(folder))
    worker = ModelWorker(model, top)
    for block in _blocks(images, model.inputs):
        yield from worker(load_crops(block)).predictions


def load_crops(block: PredictionBlock) -> LoadedCrops:
    """Fetch, decode and crop the images of a block. Raises StorageError if the storage doesn't answer."""
    images = block.images
    shapes = [(each.num_crops, 3, each.image_size, each.image_size) for each in block.inputs]
    crops = [np.zeros((len(images), *shape), dtype=np.uint8) for shape in shapes]

    def crop(number: int, data: bytes) -> None:
        for part, pixels in zip(crops, crops_of_file(block.inputs, data), strict=True):
            part[number] = pixels

    reasons = [reason and printable_path(reason) for reason in read_images(images.uris, images.contents, crop)]
    return LoadedCrops(block.start, images.names, crops, reasons)


class ModelWorker:
    """An exported model in a process of Ray Data; it maps a loaded block to predictions."""

    def __init__(self, model: Model, top: int) -> None:
        self._model, self._top = model, top

    def __call__(self, block: LoadedCrops) -> PredictedBlock:
        good = np.array([reason is None for reason in block.reasons])
        crops = [part[good] for part in block.crops]
        predicted = self._model.predictions(block.names, crops, block.reasons, self._top)
        return PredictedBlock(block.start, predicted)


def make_model_worker(
    folder: str, top: int, options: PredictionOptions, num_threads: int, use_gpu: bool
) -> ModelWorker:
    """Load an exported model in a worker's process."""
    if not use_gpu:
        torch.set_num_threads(num_threads)
    return ModelWorker(options.applied_to(load(folder, "cuda" if use_gpu else "cpu")), top)


def _blocks(images: Images, inputs: tuple[Preprocess, ...]) -> Iterator[PredictionBlock]:
    for start in range(0, len(images), BLOCK_SIZE):
        part = slice(start, start + BLOCK_SIZE)
        some = Images(images.names[part], images.uris[part], images.contents[part])
        yield PredictionBlock(start, some, inputs)


def _in_ray(
    folder: str, images: Images, top: int, options: PredictionOptions, notify: Callable[[str], None]
) -> Iterator[Prediction]:
    # Imported here, since a handful of images needs no cluster.
    from imbvlm.ray_runtime.connection import ray_session
    from imbvlm.ray_runtime.image_pipeline import map_images

    location = storage.absolute(model_folder(folder))
    inputs = read_record(location).inputs
    located = Images(images.names, [uri and storage.absolute(uri) for uri in images.uris], images.contents)
    blocks = list(_blocks(located, inputs))
    waiting: dict[int, list[Prediction]] = {}
    written = 0
    with ray_session() as cluster:
        use_gpu = cluster.num_gpus > 0
        num_encoder_workers = int(cluster.num_gpus) if use_gpu else max(1, int(cluster.num_cpus) // 4)
        threads = 1 if use_gpu else max(1, int(cluster.num_cpus) // (2 * num_encoder_workers))
        done = map_images(
            blocks,
            load_crops,
            make_model_worker,
            (location, top, options, threads, use_gpu),
            images_per_block=BLOCK_SIZE,
            num_encoder_workers=num_encoder_workers,
            notify=notify,
            cpus_per_worker=1 if use_gpu else threads,
            gpus_per_worker=1.0 if use_gpu else 0.0,
        )
        for block in done:
            waiting[block.start] = block.predictions
            while written in waiting:
                yield from waiting.pop(written)
                written += BLOCK_SIZE


def check_options(folder: str, top: int, options: PredictionOptions = PLAIN) -> tuple[int, Sequence[str]]:
    """`top`, limited to the number of possible classes, and sentences on what is promised, before any image is read.

    A table thus has no empty columns. Raises ImbvlmError as `PredictionOptions.applied_to` does.
    """
    location, notes = model_folder(folder), tuple[str, ...]()
    names = read_description(location).get("class_names")
    if not isinstance(names, list) or not names:
        return top, ()
    if options.roll_up is not None:
        notes = roll_up_notes(ModelTaxonomy.read(location, names), options.roll_up)
    if options.decides:
        if options.only:
            raise ImbvlmError(DECIDES_AMONG_ALL)
        calibration = ModelCalibration.read(location, names)
        notes += decide_for(calibration, options.accept, options.sets, options.prevalence).notes
    return min(top, len(possible_labels(options.only or names, names))), tuple(dict.fromkeys(notes))
