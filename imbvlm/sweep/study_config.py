"""Tables of a study: rows of listed configurations, all of which are trained again and scored, none selected."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from imbvlm.schema import Section


class StudyRow(Section):
    """One row: what it is called in its table, and the listed configuration that it shows."""

    label: str
    configuration: str


class StudyTable(Section):
    """One table; the same configuration may stand in several."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="of its files")
    title: str
    columns: Literal["scores", "cost"] = "scores"
    rows: list[StudyRow]
