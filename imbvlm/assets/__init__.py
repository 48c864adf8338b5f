"""Data and a small tower that come with the package; NOTICE.md has their licences, tests/tools remakes them."""

from importlib import resources
from pathlib import Path

from imbvlm.base.errors import ImbvlmError, suggest_name

MANIFESTS = ("emoji_lt", "fashion_mnist_lt")
TOWERS = ("tinylit-lite0",)


def manifest_path(name: str) -> Path:
    """Where the Parquet file of an embedded manifest lies; raises ImbvlmError for an unknown name."""
    if name not in MANIFESTS:
        raise ImbvlmError(f"no embedded manifest is named {name!r}; {suggest_name(name, MANIFESTS)}")
    return _folder() / f"{name}.parquet"


def tower_path(name: str) -> Path:
    """The folder of an embedded tower, as open_clip's `local-dir:` reads it; raises ImbvlmError for an unknown name."""
    if name not in TOWERS:
        raise ImbvlmError(f"no embedded tower is named {name!r}; {suggest_name(name, TOWERS)}")
    return _folder() / name


def _folder() -> Path:
    return Path(str(resources.files("imbvlm.assets")))
