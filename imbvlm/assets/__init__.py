"""Embedded manifests and a small encoder; NOTICE.md has their licenses, tests/tools their build scripts."""

from importlib import resources
from pathlib import Path

from imbvlm.base.errors import ImbvlmError, suggest_name

MANIFESTS = ("emoji_lt", "fashion_mnist_lt")
ENCODERS = ("tinylit-lite0",)


def manifest_path(name: str) -> Path:
    """The Parquet file of an embedded manifest; raises ImbvlmError for an unknown name."""
    if name not in MANIFESTS:
        raise ImbvlmError(f"{name!r} is no embedded manifest; {suggest_name(name, MANIFESTS)}")
    return _folder() / f"{name}.parquet"


def encoder_path(name: str) -> Path:
    """The folder of an embedded encoder, as `local-dir:` takes it; raises ImbvlmError for an unknown name."""
    if name not in ENCODERS:
        raise ImbvlmError(f"{name!r} is no embedded encoder; {suggest_name(name, ENCODERS)}")
    return _folder() / name


def _folder() -> Path:
    return Path(str(resources.files("imbvlm.assets")))
