"""Registries: entries by name, the nearest name in errors, implementations that are imported on first use."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from pydantic import TypeAdapter, ValidationError

from imbvlm.base.errors import ImbvlmError
from imbvlm.base.registry import Lazy, Registry
from imbvlm.base.schema import Section


class SquareConfig(Section):
    name: Literal["square"] = "square"
    side: float = 1.0


class CircleConfig(Section):
    name: Literal["circle"] = "circle"
    radius: float = 1.0


@dataclass(frozen=True)
class Shape:
    config: type[Section]


SHAPES = Registry("shape", {"square": Shape(SquareConfig), "circle": Shape(CircleConfig)})


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ImbvlmError, match=r"^'sqare' is no shape; did you mean 'square'\?$"):
        SHAPES["sqare"]


def test_a_registry_is_a_mapping_in_the_order_of_its_entries() -> None:
    assert list(SHAPES) == ["square", "circle"]
    assert SHAPES.get("sphere") is None
    assert len(SHAPES) == 2


def test_the_union_takes_each_entry_s_section_and_no_other() -> None:
    union = TypeAdapter(SHAPES.union())
    assert union.validate_python({"name": "circle", "radius": 2.0}) == CircleConfig(radius=2.0)
    with pytest.raises(ValidationError):
        union.validate_python({"name": "sphere"})


def test_naming_an_implementation_imports_nothing() -> None:
    code = (
        "import sys; from imbvlm.base.registry import Lazy; focal = Lazy('imbvlm.longtail.losses:focal'); "
        "assert 'torch' not in sys.modules; assert focal.load().__name__ == 'focal'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert Lazy("math:sqrt")(9.0) == 3.0
