"""Where an encoder's weights are: cached, downloaded, or unreachable."""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.pretrained import download_pretrained

from imbvlm.base.errors import ImbvlmError

_PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class WeightsState:
    """Whether an encoder's weights are on this machine, where they come from, and why that place doesn't answer."""

    present: bool
    address: str
    cause: str | None

    @property
    def problem(self) -> str | None:
        """Why the weights can't be had, and the fix; None where they are here or can be fetched."""
        if self.present or self.cause is None:
            return None
        return (
            f"its weights are not here, and {self.address} doesn't answer ({self.cause}); fetch them where there is a "
            "network and name them as encoder.weights or local-dir:PATH, or set HF_ENDPOINT or HTTPS_PROXY"
        )


def download_weights(name: str, published: Mapping[str, Any]) -> str:
    """The file with published weights, fetched unless it is cached; raises ImbvlmError where that fails."""
    cached = cached_weights(published)
    if cached is not None:
        return cached
    address = weights_address(published)
    cause = unreachable(address)
    if cause is None:
        try:
            return str(download_pretrained(published))
        except (OSError, RuntimeError, ValueError) as error:
            cause = str(error).splitlines()[0]
    raise ImbvlmError(
        f"can't download the weights of {name} from {address} ({cause}); fetch them beforehand where there is a "
        "network, or set encoder.weights to a file, or encoder.name to local-dir:PATH."
    )


def weights_address(published: Mapping[str, Any]) -> str:
    """The page or file that the weights are fetched from."""
    hub = published.get("hf_hub")
    return f"{huggingface_hub.constants.ENDPOINT}/{hub}" if hub else str(published.get("url", ""))


def cached_weights(published: Mapping[str, Any]) -> str | None:
    """A file of the hub's cache, found without asking the hub: that takes a minute where there is no network."""
    repository, filename = os.path.split(published.get("hf_hub", ""))
    if not repository:
        return None
    names = [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    if filename:
        names = [str(Path(filename).with_suffix(".safetensors")), filename]
    return cached_file(repository, names)


def cached_file(repository: str, names: list[str]) -> str | None:
    """The first of some files of a hub repository that is on this machine."""
    paths = (huggingface_hub.try_to_load_from_cache(repository, name) for name in names)
    return next((path for path in paths if isinstance(path, str)), None)


def unreachable(address: str) -> str | None:
    """Why a server can't be reached, or None where it answers with anything; takes seconds, not retries."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PROBE_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)


def require_transformers(name: str, side: str) -> None:
    """Raise ImbvlmError with the fix where the text side needs a package that isn't installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ImbvlmError(
            f"{side} of {name} needs the package transformers; install it with pip install 'imbvlm[siglip]'."
        )
