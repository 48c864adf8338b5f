"""Studies: tables of named configurations, which become one list without repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from imbvlm.base.schema import Tree
from imbvlm.config.method_registry import METHODS, optional_sections
from imbvlm.config.trial_config import TrialConfig, apply_overrides, drop_unused_sections
from imbvlm.sweep.spec.equivalence import canonical_key
from imbvlm.sweep.spec.search_space import Params
from imbvlm.sweep.spec.sweep_spec import StudyRow, StudyTable


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, the name of its configuration, and the values that the configuration sets."""

    label: str
    name: str
    draw: Params


@dataclass(frozen=True)
class Part:
    """One table of a study."""

    name: str
    title: str
    rows: Sequence[Row]
    columns: Literal["scores", "cost"] = "scores"


def study_fields(parts: Sequence[Part], base: Tree) -> dict[str, Any]:
    """Return the fields `base`, `space`, `study` and `num_trials` of a SweepSpec.

    Configurations that train the same thing are listed once. The base keeps the sections that some row reads. Raises
    ConfigError for a row that can't be built on the base.
    """
    configurations: dict[str, Params] = {}
    read: set[str] = set()
    names: dict[str, str] = {}
    tables = []
    for part in parts:
        rows = []
        for row in part.rows:
            config = TrialConfig.from_tree(drop_unused_sections(apply_overrides(base, row.draw), keep=row.draw))
            read |= METHODS[config.method].sections
            name = names.setdefault(canonical_key(config), row.name)
            configurations.setdefault(name, row.draw)
            rows.append(StudyRow(label=row.label, configuration=name))
        tables.append(StudyTable(name=part.name, title=part.title, columns=part.columns, rows=rows))
    return {
        "base": {key: value for key, value in base.items() if key in read or key not in optional_sections()},
        "space": {"configurations": configurations},
        "study": [table.model_dump() for table in tables],
        "num_trials": max(1, len(configurations)),
    }
