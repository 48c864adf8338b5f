"""BENCHMARKS: public data sets by name, with their official files and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from imbvlm.base.registry import Lazy, Registry


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its official files below a root folder, how they are read, and the sizes to find in them.

    `build(root)` returns the Manifest.
    """

    build: Callable[[str], Any]
    # Annotation files and image folders below the root.
    files: tuple[str, ...]
    folders: tuple[str, ...]
    # What to download, where from, and where to put it.
    download: str
    # Images of each split.
    sizes: Mapping[str, int]
    num_classes: int
    # The smallest and the largest number of training images of a class.
    class_range: tuple[int, int]


BENCHMARKS = Registry(
    "benchmark",
    {
        "fashion_mnist_lt": Benchmark(
            build=Lazy("imbvlm.data.sources.benchmarks:read_fashion_mnist_lt"),
            files=(),
            folders=(),
            download="nothing: it is part of the package",
            sizes={"train": 2_480, "val": 500, "test": 2_000},
            num_classes=10,
            class_range=(10, 1_000),
        ),
        "emoji_lt": Benchmark(
            build=Lazy("imbvlm.data.sources.benchmarks:read_emoji_lt"),
            files=(),
            folders=(),
            download="nothing: it is part of the package",
            sizes={"train": 2_306, "test": 680},
            num_classes=68,
            class_range=(6, 154),
        ),
        "inat2018": Benchmark(
            build=Lazy("imbvlm.data.sources.benchmarks:build_inat2018"),
            files=("train2018.json", "val2018.json"),
            folders=("train_val2018",),
            download="train2018.json, val2018.json, categories.json and train_val2018.tar.gz (120 GB) of iNaturalist "
            "2018 from https://github.com/visipedia/inat_comp/tree/master/2018, unpacked into the root",
            sizes={"train": 437_513, "test": 24_426},
            num_classes=8_142,
            class_range=(2, 1_000),
        ),
        "imagenet_lt": Benchmark(
            build=Lazy("imbvlm.data.sources.benchmarks:build_imagenet_lt"),
            files=("ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt"),
            folders=("train", "val"),
            download="the lists ImageNet_LT_train.txt, ..._val.txt, ..._test.txt from "
            "https://liuziwei7.github.io/projects/LongTail.html, and ILSVRC 2012's images from https://image-net.org "
            "as train/WNID/*.JPEG and val/WNID/*.JPEG, all in the root",
            sizes={"train": 115_846, "val": 20_000, "test": 50_000},
            num_classes=1_000,
            class_range=(5, 1_280),
        ),
        "places_lt": Benchmark(
            build=Lazy("imbvlm.data.sources.benchmarks:build_places_lt"),
            files=("Places_LT_train.txt", "Places_LT_val.txt", "Places_LT_test.txt"),
            folders=("train", "val"),
            download="the lists Places_LT_train.txt, ..._val.txt, ..._test.txt from "
            "https://liuziwei7.github.io/projects/LongTail.html, and places365standard_easyformat.tar from "
            "http://places2.csail.mit.edu/download.html, whose train and val folders go into the root",
            sizes={"train": 62_500, "val": 7_300, "test": 36_500},
            num_classes=365,
            class_range=(5, 4_980),
        ),
    },
)
