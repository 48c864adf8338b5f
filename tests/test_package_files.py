"""An installed package has every file that its code reads, not only the code."""

from __future__ import annotations

from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("builder", [WheelBuilder, SdistBuilder])
def test_wheel_and_sdist_have_every_file_of_the_package(builder: type[WheelBuilder] | type[SdistBuilder]) -> None:
    """Without its templates and its style no report could be written after installation."""
    packaged = {file.distribution_path for file in builder(str(ROOT)).recurse_included_files()}
    paths = [path for path in (ROOT / "imbvlm").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in paths} > {".css", ".html", ".py", ".tex"}
    assert {path.relative_to(ROOT).as_posix() for path in paths} <= packaged
