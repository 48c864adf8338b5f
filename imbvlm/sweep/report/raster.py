"""A figure's SVG as PNG, with a font that comes along, so that it looks alike on machines without any."""

from __future__ import annotations

import atexit
import io
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import ImageFont

ZOOM = 3


def png(svg: str) -> bytes:
    """PNG at three pixels a unit, some 300 to the inch where a figure is a column wide."""
    import resvg_py

    family, path = _font()
    if path is None:
        return resvg_py.svg_to_bytes(svg, zoom=ZOOM)
    # The machine's own fonts come after it, for letters that it lacks.
    return resvg_py.svg_to_bytes(svg, zoom=ZOOM, font_files=[str(path)], sans_serif_family=family)


@cache
def _font() -> tuple[str, Path | None]:
    """Pillow's own font: its family and a file of it while this process runs; None where this Pillow has none."""
    font = ImageFont.load_default(12)
    if not isinstance(font, ImageFont.FreeTypeFont) or not isinstance(font.path, io.BytesIO):
        return "", None
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "font.ttf"
    path.write_bytes(font.path.getvalue())
    return font.getname()[0] or "", path
