"""Finds the best long-tailed image classifier that a vision-language model can give on your images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from imbvlm.base.interrupts import from_first_line
from imbvlm.base.version import __version__ as __version__

if TYPE_CHECKING:
    from imbvlm.base.plugin_files import use_plugins as use_plugins
    from imbvlm.cli.sweep_script import run_script as run_script
    from imbvlm.config.trial_config import TrialConfig as TrialConfig
    from imbvlm.data.manifest import Manifest as Manifest
    from imbvlm.inference.model_folder import load as load
    from imbvlm.sweep.spec.sweep_spec import SweepSpec as SweepSpec

# Imported on first use: the command line starts without torch.
_MODULES = {
    "Manifest": "imbvlm.data.manifest",
    "SweepSpec": "imbvlm.sweep.spec.sweep_spec",
    "TrialConfig": "imbvlm.config.trial_config",
    "load": "imbvlm.inference.model_folder",
    "run_script": "imbvlm.cli.sweep_script",
    "use_plugins": "imbvlm.base.plugin_files",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "run_script":
        # A sweep's file handles Ctrl-C from its first line on, while it imports the rest.
        from_first_line()
    return getattr(importlib.import_module(_MODULES[name]), name)
