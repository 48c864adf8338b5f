"""A figure's SVG as PNG, with a font that comes along, so that it looks alike on machines without any."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import ImageFont

ZOOM = 3


def png(svg: str) -> bytes:
    """PNG at three pixels a unit, some 300 to the inch where a figure is a column wide."""
    import resvg_py

    family, content = _font()
    if not content:
        return resvg_py.svg_to_bytes(svg, zoom=ZOOM)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "font.ttf"
        path.write_bytes(content)
        # The machine's own fonts come after it, for letters that it lacks.
        return resvg_py.svg_to_bytes(svg, zoom=ZOOM, font_files=[str(path)], sans_serif_family=family)


@lru_cache(maxsize=1)
def _font() -> tuple[str, bytes]:
    """Pillow's own font: its family and file; nothing where this Pillow was built without it."""
    font = ImageFont.load_default(12)
    if not isinstance(font, ImageFont.FreeTypeFont) or not isinstance(font.path, io.BytesIO):
        return "", b""
    return font.getname()[0] or "", font.path.getvalue()
