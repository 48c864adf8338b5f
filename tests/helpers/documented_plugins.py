"""The plug-ins of docs/plugins.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")


def documented(name: str) -> str:
    """The plug-in of that name, such as `losses.py`."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if code.startswith(f'"""{name}"""'))
    return str(code)
