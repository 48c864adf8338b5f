"""Addresses in the package's metadata: from the environment, so that no file has to name the project's host."""

from __future__ import annotations

import os
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Addresses(MetadataHookInterface):
    """`Repository` and `Documentation`, each where its variable is set."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the project's URLs."""
        variables = {"Repository": "IMBVLM_REPOSITORY", "Documentation": "IMBVLM_SITE"}
        metadata["urls"] = {name: os.environ[key] for name, key in variables.items() if os.environ.get(key)}
