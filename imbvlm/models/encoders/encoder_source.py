"""An encoder's name resolved to everything but its weights."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_entries import ORIGIN_KEY, Loader, published_name
from imbvlm.config.input_sections import LOCAL_DIR
from imbvlm.models.encoders.hub_files import HubFile, fetch_command, offline_sentence, unreachable

TRANSFORMERS_FIX = "pip install 'imbvlm[siglip]'"
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")
_PUBLISHED, _COMMIT = re.compile(r"[A-Za-z0-9][\w.:@/-]*"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class WeightsState:
    """Whether an encoder's files are on this machine, where they come from, and why they can't be had."""

    present: bool
    address: str
    problem: str | None = None
    fix: str = ""


def check_pixel_scale(preprocess: Mapping[str, Any]) -> None:
    """Raise ValueError where a description's `mean` or `std` isn't three numbers; deviations must be above 0."""
    for key in ("mean", "std"):
        values = preprocess[key]
        is_three = isinstance(values, list | tuple) and len(values) == 3
        if not (is_three and all(isinstance(value, int | float) and math.isfinite(value) for value in values)):
            raise ValueError(f"{key} must be three numbers, got {values!r}")
    if min(preprocess["std"]) <= 0:
        raise ValueError(f"std must be above 0, got {preprocess['std']!r}")


@dataclass(frozen=True)
class Origin:
    """The published encoder that a folder was written from: its name, and the commit of the hub."""

    name: str
    revision: str


def read_origin(description: Mapping[str, Any]) -> Origin | None:
    """The origin in the description of a folder that `Encoder.save` wrote, None without a well-formed one."""
    match description.get(ORIGIN_KEY):
        case {"name": str(name), "revision": str(revision)} if _PUBLISHED.fullmatch(name) and _COMMIT.fullmatch(
            revision
        ):
            return Origin(name, revision)
    return None


@dataclass(frozen=True)
class EncoderSource:
    """An encoder's name resolved to everything but its weights.

    `model` is what the library builds: an architecture, or for open_clip a local folder behind LOCAL_DIR. `weights` is
    the user's own file; without one `hub` is the file of the published weights, and `tokenizer` one of the tokenizer's
    where it is on the hub, too.
    """

    name: str
    loader: Loader
    model: str
    weights: str | None
    hub: HubFile | None
    model_config: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    quick_gelu: bool
    tokenizer: HubFile | None = None
    # From the description of a local folder.
    stated_origin: Origin | None = None

    @property
    def is_local(self) -> bool:
        """Whether open_clip is given a local folder."""
        return self.model.startswith(LOCAL_DIR)

    def weights_file(self) -> str | None:
        """The file to load, downloaded if necessary; None for a folder, which open_clip searches itself.

        Raises ImbvlmError where there is none or the download fails.
        """
        if self.weights is not None:
            return self.weights
        if self.hub is not None:
            path = self.hub.fetch(self.name)
            return None if self.is_local else path
        if not self._folder_files():
            raise ImbvlmError(
                f"encoder.name is {self.name!r}, and {self.model.removeprefix(LOCAL_DIR)} has no weights "
                f"({', '.join(f'*{suffix}' for suffix in _WEIGHTS_SUFFIXES)}); copy them there."
            )
        return None

    def weights_bytes(self) -> int | None:
        """Bytes of the weights, of the largest file in a folder; None where they aren't on this machine."""
        path = self.weights if self.hub is None or self.weights is not None else self.hub.cached()
        if path is not None:
            return os.path.getsize(path)
        return max((path.stat().st_size for path in self._folder_files()), default=None)

    def _folder_files(self) -> list[Path]:
        """Weights in a user's folder; none where there is no folder. Raises ImbvlmError for a pipe or a device."""
        folder = Path(self.model.removeprefix(LOCAL_DIR))
        if not self.is_local or self.hub is not None or not folder.is_dir():
            return []
        paths = [path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES]
        for path in paths:
            # open_clip would open it, and wait for ever.
            if not path.is_file():
                raise ImbvlmError(f"encoder.name is {self.name!r}, and {path} is no file with weights; remove it.")
        return paths

    @property
    def origin(self) -> Origin | None:
        """The published encoder that the weights on this machine are of; None for the user's own."""
        path = None if self.hub is None or self.weights is not None else self.hub.cached()
        return self.stated_origin if path is None else Origin(published_name(self.name), Path(path).parent.name)

    @property
    def needs_transformers(self) -> bool:
        """Whether the text side is one of transformers: its tower or its tokenizer."""
        text_config = self.model_config.get("text_cfg", {})
        return bool(text_config.get("hf_tokenizer_name") or text_config.get("hf_model_name"))

    @property
    def has_weights(self) -> bool:
        """Whether the weights are on this machine; asks no network, raises ImbvlmError for a folder without."""
        if self.weights is None and self.hub is not None:
            return self.hub.cached() is not None
        self.weights_file()
        return True

    def weights_state(self) -> WeightsState:
        """Where the files are or would be fetched from, without doing so; raises ImbvlmError for a folder without."""
        needed = [None if self.weights is not None else self.hub, self.tokenizer]
        missing = [file for file in needed if file is not None and file.cached() is None]
        problems, fixes = list[str](), list[str]()
        if self.needs_transformers and importlib.util.find_spec("transformers") is None:
            problems.append(
                f"{self.name} needs the package transformers for its texts; {TRANSFORMERS_FIX} installs it."
            )
            fixes.append(TRANSFORMERS_FIX)
        address = missing[0].address if missing else ""
        if missing and (cause := unreachable(address)) is not None:
            problems.append(offline_sentence(self.name, missing, address, cause))
            fixes.append(f"where there is a network: {fetch_command(self.name)}; here: local-dir:DIR")
        if missing or problems:
            return WeightsState(False, address, " ".join(problems) or None, "; ".join(fixes))
        self.weights_file()
        return WeightsState(True, self.weights or (self.model if self.hub is None else self.hub.address))
