"""The benchmarks by name: official files -> manifest, checked against the known sizes; BENCHMARKS."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imbvlm.base import storage
from imbvlm.data.class_list import plain_name
from imbvlm.data.manifest import EMBEDDED, Manifest, ManifestError
from imbvlm.data.sources.folders_and_lists import from_lists
from imbvlm.data.sources.inaturalist import from_inaturalist


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its annotation files and image folders below the root, what it must come to, how it is read."""

    build: Callable[[str], Manifest]
    files: tuple[str, ...]
    folders: tuple[str, ...]
    download: str
    sizes: Mapping[str, int]
    num_classes: int
    # Fewest and most training images of a class.
    class_range: tuple[int, int]


def build_dataset(name: str, root: str) -> Manifest:
    """Read a benchmark's official files below `root`.

    Raises ManifestError where files are missing (all named, with where to get them) or sizes aren't the known ones.
    """
    dataset = BENCHMARKS[name]
    missing = [file for file in dataset.files if not storage.exists(storage.join(root, file))]
    if missing:
        raise ManifestError(
            name, [*(f"{storage.join(root, file)} is not there" for file in missing), f"get it so: {dataset.download}"]
        )
    manifest = dataset.build(root)
    findings = _size_findings(manifest, dataset)
    if findings:
        raise ManifestError(name, findings)
    absent = [folder for folder in dataset.folders if not storage.exists(storage.join(root, folder))]
    notes = [f"{storage.join(root, folder)} is not there; get it so: {dataset.download}" for folder in absent]
    return replace(manifest, notes=(*manifest.notes, *notes))


def benchmark_of(manifest: Manifest) -> str | None:
    """The benchmark that a manifest is, by its name and all of its sizes; None for any other data."""
    dataset = BENCHMARKS.get(manifest.name)
    return manifest.name if dataset is not None and not _size_findings(manifest, dataset) else None


def _size_findings(manifest: Manifest, dataset: Benchmark) -> list[str]:
    found = {split: len(manifest.rows_of(split)) for split in dataset.sizes}
    findings = [
        f"{split} has {found[split]:,} images, and the official list has {size:,}"
        for split, size in dataset.sizes.items()
        if found[split] != size
    ]
    num_classes, counts = len(manifest.class_names), manifest.class_stats().counts
    if num_classes != dataset.num_classes:
        findings.append(f"it has {num_classes:,} classes, and the official list has {dataset.num_classes:,}")
    least, most = dataset.class_range
    smallest, largest = int(counts.min()), int(counts.max())
    if (smallest, largest) != (least, most):
        findings.append(
            f"classes have {smallest:,} to {largest:,} training images, and the official list has {least:,} to {most:,}"
        )
    return findings


def _inat2018(root: str) -> Manifest:
    # Its official validation set is the test set: selection must never see it.
    annotations = {"train": storage.join(root, "train2018.json"), "test": storage.join(root, "val2018.json")}
    categories = storage.join(root, "categories.json")
    return from_inaturalist(
        annotations, root, "inat2018", categories=categories if storage.exists(categories) else None
    )


def _imagenet_lt(root: str) -> Manifest:
    return from_lists(_lists(root, "ImageNet_LT"), root, "imagenet_lt", class_names=_imagenet_names())


def _places_lt(root: str) -> Manifest:
    manifest = from_lists(_lists(root, "Places_LT"), root, "places_lt")
    return Manifest.build(
        manifest.table, [_place_name(name) for name in manifest.class_names], "places_lt", notes=manifest.notes
    )


def _lists(root: str, prefix: str) -> dict[str, str]:
    return {split: storage.join(root, f"{prefix}_{split}.txt") for split in ("train", "val", "test")}


def _place_name(folder: str) -> str:
    """`arena-hockey` -> `arena hockey`: the lists' folders are the names."""
    return plain_name(folder)


def _imagenet_names() -> list[str]:
    """open_clip's names of ImageNet's classes, read from their file alone: importing open_clip takes seconds."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ManifestError("imagenet_lt", ["open_clip is not installed, and ImageNet's class names are in it"])
    path = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("imbvlm_imagenet_names", path)
    if spec is None or spec.loader is None:
        raise ManifestError("imagenet_lt", [f"{path} can't be read"])
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.IMAGENET_CLASSNAMES)


BENCHMARKS: Mapping[str, Benchmark] = {
    "fashion_mnist_lt": Benchmark(
        build=lambda root: Manifest.read(f"{EMBEDDED}fashion_mnist_lt"),
        files=(),
        folders=(),
        download="it comes with the package",
        sizes={"train": 2_480, "val": 500, "test": 2_000},
        num_classes=10,
        class_range=(10, 1_000),
    ),
    "inat2018": Benchmark(
        build=_inat2018,
        files=("train2018.json", "val2018.json"),
        folders=("train_val2018",),
        download="train2018.json, val2018.json, categories.json and train_val2018.tar.gz (120 GB) of iNaturalist 2018 "
        "from https://github.com/visipedia/inat_comp/tree/master/2018, unpacked into the root",
        sizes={"train": 437_513, "test": 24_426},
        num_classes=8_142,
        class_range=(2, 1_000),
    ),
    "imagenet_lt": Benchmark(
        build=_imagenet_lt,
        files=("ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt"),
        folders=("train", "val"),
        download="the lists ImageNet_LT_train.txt, ..._val.txt, ..._test.txt from "
        "https://liuziwei7.github.io/projects/LongTail.html, and ILSVRC 2012's images from https://image-net.org as "
        "train/WNID/*.JPEG and val/WNID/*.JPEG, all in the root",
        sizes={"train": 115_846, "val": 20_000, "test": 50_000},
        num_classes=1_000,
        class_range=(5, 1_280),
    ),
    "places_lt": Benchmark(
        build=_places_lt,
        files=("Places_LT_train.txt", "Places_LT_val.txt", "Places_LT_test.txt"),
        folders=("train", "val"),
        download="the lists Places_LT_train.txt, ..._val.txt, ..._test.txt from "
        "https://liuziwei7.github.io/projects/LongTail.html, and places365standard_easyformat.tar from "
        "http://places2.csail.mit.edu/download.html, whose train and val folders go into the root",
        sizes={"train": 62_500, "val": 7_300, "test": 36_500},
        num_classes=365,
        class_range=(5, 4_980),
    ),
}
