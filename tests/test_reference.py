"""The reference pages are those of the present code, and every key of a configuration says what it means."""

from __future__ import annotations

import ast
import re
import tarfile
from pathlib import Path

import pytest

from imbvlm.base.schema import Section
from imbvlm.config.trial_config import TrialConfig, dotted_keys
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from tests.tools.reference import COMMAND, FILES, PAGES, REFERENCE, meaning_of, parts, plain_fields

ROOT = Path(__file__).parent.parent
SECTIONS = {part.section: part.path for root in (TrialConfig, SweepSpec) for part in parts(root)}
SWEEP = "runs/limited/"


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("section", [TrialConfig, SweepSpec, *SECTIONS], ids=lambda section: section.__name__)
def test_every_key_and_every_section_says_what_it_means(section: type[Section]) -> None:
    undescribed = [name for name, info in plain_fields(section).items() if not info.description]
    assert not undescribed, f"give {section.__name__}.{undescribed[0]} a description: Field(..., description=...)"
    assert meaning_of(section), f"{section.__name__} has neither a docstring nor a summary in its table"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_gives(name: str) -> None:
    assert page(name) == PAGES[name](), f"docs/reference/{name} is not current; run: {COMMAND}"


def test_no_page_is_left_of_what_is_gone() -> None:
    assert {path.name for path in REFERENCE.iterdir()} == set(PAGES)


def test_every_key_of_a_trial_and_of_a_sweep_can_be_looked_up() -> None:
    """Counted without the walk that writes the pages."""
    assert set(re.findall(r"^\| `([\w.]+)` \|", page("config.md"), re.MULTILINE)) == set(dotted_keys())
    sweep = page("sweep.md")
    assert [key for key in SweepSpec.model_fields if f"`{key}" not in sweep] == []


def test_limits_and_defaults_are_those_of_the_keys() -> None:
    config = page("config.md")
    for key, cells in {
        "data.max_bad_share": "number (>= 0, <= 1) | `0.5`",
        "loss.beta": "number (>= 0, < 1) | `0.9999`",
        "encoder.image_size": "whole number, `null` (>= 8, <= 2048) | `null`",
        "optim.betas": "list of number | `[0.9, 0.999]`",
        "classifier.init": "`random`, `text`, `class_mean` | `random`",
        "features.store": "`true`, `false` | `true`",
        "data.manifest": "text | required",
    }.items():
        assert re.search(rf"^\| `{key}` \| .+ \| {re.escape(cells)} \|$", config, re.MULTILINE)


def test_the_files_of_a_sweep_are_those_that_the_package_writes() -> None:
    texts = set[str]()
    for path in (ROOT / "imbvlm").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert [name for name in FILES if name.rstrip("/") not in texts] == []
    with tarfile.open(ROOT / "tests" / "compat" / "v0.1.tar.xz") as archive:
        names = [member.name.removeprefix("./") for member in archive if not member.isdir()]
    written = {name.removeprefix(SWEEP).partition("/")[0] for name in names if name.startswith(SWEEP)}
    assert written
    assert written <= {name.rstrip("/") for name in FILES}
