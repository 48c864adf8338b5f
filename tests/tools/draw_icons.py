"""Draw icons as images of a folder per class, for the tables of `tests/benchmarks/record_curves.py`.

    npm pack @iconify/json@2.2.535 && tar xzf iconify-json-*.tgz
    python -m tests.tools.draw_icons package/json FOLDER

A class is a name without its suffixes of style, such as `home` for `home-outline` and `home-24-filled`. Icons are black
on white. Of equal drawings one is kept.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import resvg_py

SIDE, MIN_IMAGES = 64, 100
_SUFFIX = re.compile(
    r"-(outlined?|fill(ed)?|bold|solid|line|linear|duotone|light|thin|sharp|round(ed)?|two-?tone|broken|regular|alt|bulk"
    r"|line-duotone|bold-duotone|stroke|off|\d+)$"
)


def class_of(name: str) -> str:
    """An icon's name without its suffixes of style."""
    while (shorter := _SUFFIX.sub("", name)) != name:
        name = shorter
    return name


def drawings(source: Path) -> Iterator[tuple[str, str]]:
    """The class and the SVG text of each icon of all sets."""
    for path in sorted(source.glob("*.json")):
        icons = json.loads(path.read_text(encoding="utf-8"))
        for name, icon in icons["icons"].items():
            left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
            width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
            box = f'viewBox="{left} {top} {width} {height}" color="black"'
            yield class_of(name), f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{icon["body"]}</svg>'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder of the sets")
    parser.add_argument("folder", type=Path, help="a new folder for the images")
    arguments = parser.parse_args()
    texts: dict[str, list[str]] = {}
    for name, text in drawings(arguments.source):
        texts.setdefault(name, []).append(text)
    for name, of_class in texts.items():
        if len(of_class) < MIN_IMAGES:
            continue
        images: dict[bytes, None] = {}
        for text in of_class:
            images[bytes(resvg_py.svg_to_bytes(svg_string=text, width=SIDE, height=SIDE, background="white"))] = None
        if len(images) >= MIN_IMAGES:
            (arguments.folder / name).mkdir(parents=True)
            for number, image in enumerate(images):
                (arguments.folder / name / f"{number:04}.png").write_bytes(image)


if __name__ == "__main__":
    main()
