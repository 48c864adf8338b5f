"""Read benchmarks from their official files, and check them against their official sizes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from imbvlm.base import storage
from imbvlm.data.class_list import plain_name
from imbvlm.data.manifest import EMBEDDED, Manifest, ManifestError
from imbvlm.data.sources.benchmark_registry import BENCHMARKS, Benchmark
from imbvlm.data.sources.folders_and_lists import from_lists
from imbvlm.data.sources.inaturalist import from_inaturalist


def build_dataset(name: str, root: str) -> Manifest:
    """Read a benchmark's official files below `root`.

    Raises ManifestError where files are missing, with all of them and their source, or where sizes differ.
    """
    benchmark = BENCHMARKS[name]
    missing = [uri for file in benchmark.files if not storage.exists(uri := storage.join(root, file))]
    if missing:
        raise ManifestError(name, [*(f"{uri} is missing" for uri in missing), f"Download {benchmark.download}."])
    manifest: Manifest = benchmark.build(root)
    findings = _size_findings(manifest, benchmark)
    if findings:
        raise ManifestError(name, [f"{finding}; use the official lists as they are" for finding in findings])
    absent = [uri for folder in benchmark.folders if not storage.exists(uri := storage.join(root, folder))]
    notes = [f"{uri} is missing. Download {benchmark.download}." for uri in absent]
    return replace(manifest, notes=(*manifest.notes, *notes))


def benchmark_of(manifest: Manifest) -> str | None:
    """Return the benchmark with a manifest's name and sizes; None for other data."""
    benchmark = BENCHMARKS.get(manifest.name)
    return manifest.name if benchmark is not None and not _size_findings(manifest, benchmark) else None


def _size_findings(manifest: Manifest, benchmark: Benchmark) -> list[str]:
    sizes = {split: len(manifest.rows_of(split)) for split in benchmark.sizes}
    findings = [
        f"{split} has {sizes[split]:,} images, and the official list has {size:,}"
        for split, size in benchmark.sizes.items()
        if sizes[split] != size
    ]
    num_classes, counts = len(manifest.class_names), manifest.class_stats().counts
    if num_classes != benchmark.num_classes:
        findings.append(f"there are {num_classes:,} classes, and the official list has {benchmark.num_classes:,}")
    (low, high), smallest, largest = benchmark.class_range, int(counts.min()), int(counts.max())
    if (smallest, largest) != (low, high):
        findings.append(
            f"classes have {smallest:,} to {largest:,} training images, and the official list has {low:,} to {high:,}"
        )
    return findings


def read_fashion_mnist_lt(root: str) -> Manifest:
    """The manifest in the package; nothing is read below `root`."""
    return Manifest.read(f"{EMBEDDED}fashion_mnist_lt")


def read_emoji_lt(root: str) -> Manifest:
    """The manifest in the package; nothing is read below `root`."""
    return Manifest.read(f"{EMBEDDED}emoji_lt")


def build_inat2018(root: str) -> Manifest:
    """iNaturalist 2018 from its annotation files."""
    # The official validation set is the test split: selection must never see it.
    annotations = {"train": storage.join(root, "train2018.json"), "test": storage.join(root, "val2018.json")}
    categories = storage.join(root, "categories.json")
    return from_inaturalist(
        annotations, root, "inat2018", categories=categories if storage.exists(categories) else None
    )


def build_imagenet_lt(root: str) -> Manifest:
    """ImageNet-LT from its lists."""
    return from_lists(_lists(root, "ImageNet_LT"), root, "imagenet_lt", class_names=_imagenet_names())


def build_places_lt(root: str) -> Manifest:
    """Places-LT from its lists."""
    manifest = from_lists(_lists(root, "Places_LT"), root, "places_lt")
    # The lists name classes by their folders, such as `arena-hockey`.
    return Manifest.build(manifest.table, [*map(plain_name, manifest.class_names)], "places_lt", notes=manifest.notes)


def _lists(root: str, prefix: str) -> dict[str, str]:
    return {split: storage.join(root, f"{prefix}_{split}.txt") for split in ("train", "val", "test")}


def _imagenet_names() -> list[str]:
    """Return open_clip's names of ImageNet's classes, read from their file alone: importing open_clip takes seconds."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ManifestError(
            "imagenet_lt",
            ["ImageNet's class names come from open_clip, which is not installed. Run `pip install open_clip_torch`."],
        )
    path = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("imbvlm_imagenet_names", path)
    if spec is None or spec.loader is None:
        raise ManifestError("imagenet_lt", [f"{path} can't be read. Install open_clip_torch again."])
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.IMAGENET_CLASSNAMES)
