"""The plug-ins of docs/extend, a page for each table."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = sorted((Path(__file__).parents[2] / "docs" / "extend").glob("*.md"))


def documented(name: str) -> str:
    """The plug-in of that name, such as `losses.py`."""
    blocks = (block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    (code,) = (block for block in blocks if block.startswith(f'"""{name}"""'))
    return str(code)
