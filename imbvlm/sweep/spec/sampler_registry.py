"""The options of a sweep's sampler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from imbvlm.base.schema import Section
from imbvlm.config.input_sections import Seed


class SearcherConfig(Section):
    """How Optuna proposes configurations."""

    name: Literal["tpe", "random"] = "tpe"
    seed: Seed = 0
    num_startup_trials: int = Field(10, ge=1, description="random trials before TPE's model takes over")
