"""The origins of a sweep's numbers besides its spec, written when it begins: training code, torch, data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import imbvlm
from imbvlm.base import storage
from imbvlm.base.errors import ConfigError, Problem
from imbvlm.base.json_file import read_json
from imbvlm.base.plugin_files import plugin_change, read_digests, require_plugins, write_copies
from imbvlm.base.plugins import active_plugins
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.files.file_listing import file_states
from imbvlm.data.manifest import Manifest

PROVENANCE_FILE = "provenance.json"
# Folders whose files an extracting or training worker imports: a trial's numbers may change with them.
_PARTS = (
    "base",
    "config",
    "longtail",
    "data/files",
    "data/images",
    "data",
    "ray_runtime",
    "models/encoders",
    "models",
    "features",
    "training/step",
    "training",
)

# Digests of whole sets of code files whose trials have the numbers of this code's, bit by bit, as `python -m
# tests.golden compare COMMIT` shows. A commit that changes a number empties the table.
_SAME_NUMBERS = {
    "e7cd71b5c38fbf67": "138099d (version 0.1)",
    "879f900390eb4b36": "the code that tests/golden/recorded.json was recorded with",
}


def provenance(manifest: Manifest) -> dict[str, Any]:
    """Digests of the code that extracts and trains and of the data, torch's version, numbers of classes and images."""
    root = Path(imbvlm.__file__).parent
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py"))}
    code = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in files.items() if has_part(name)}
    size = {"num_classes": len(manifest.class_names), "num_images": len(manifest)}
    data = {**_of_data(manifest), **size, "data_name": manifest.name}
    origin = {"code": code, "torch": torch.__version__, **data}
    plugins = active_plugins().digests
    return {**origin, "plugins": plugins} if plugins else origin


def code_digest(code: Mapping[str, str]) -> str:
    """One digest of the digests of code files by name."""
    return hashlib.sha256(json.dumps(dict(code), sort_keys=True).encode()).hexdigest()[:16]


def has_part(name: str) -> bool:
    """Whether a trial's numbers may change with a file, such as `training/step/optimizers.py`."""
    return name.rpartition("/")[0] in _PARTS and name != "base/version.py"


def write_provenance(folder: str, content: dict[str, Any]) -> None:
    """Write provenance.json into a sweep's folder."""
    storage.write_json(storage.join(folder, PROVENANCE_FILE), content)


def begin_provenance(folder: str, content: dict[str, Any]) -> None:
    """Write provenance.json and the code of the active plug-ins into the folder of a sweep that begins."""
    write_provenance(folder, content)
    write_copies(folder, active_plugins().sources)


def require_sweep_plugins(folder: str, *, check: bool = True) -> None:
    """Raise PluginNeededError where a plug-in of a sweep isn't active, or, with `check`, has other code."""
    require_plugins(folder, plugin_digests(folder), check=check)


def plugin_digests(folder: str) -> dict[str, str]:
    """The digests of the plug-ins that a sweep began with, by name; raises ImbvlmError if its file is damaged."""
    return dict((_written(folder) or {}).get("plugins", {}))


def provenance_changes(folder: str, now: dict[str, Any]) -> list[str]:
    """A clause for each change since a sweep began; raises ImbvlmError if its file is damaged."""
    before = _written(folder)
    if before is None:
        return [f"{PROVENANCE_FILE} is gone, so it is unknown with which code its trials ran"]
    code = {name: digest for name, digest in before["code"].items() if has_part(name)}
    if code_digest(before["code"]) in _SAME_NUMBERS:
        code = now["code"]
    changes = [
        f"imbvlm/{name} {_change(name in code, name in now['code'])}"
        for name in sorted({*code, *now["code"]})
        if code.get(name) != now["code"].get(name)
    ]
    plugins, active = before.get("plugins", {}), now.get("plugins", {})
    changes += [f"the plug-in {name} is gone" for name in plugins.keys() - active]
    changes += [f"the plug-in {name} is new" for name in active.keys() - plugins]
    changes += [
        f"the plug-in {plugin_change(folder, name)}"
        for name in plugins
        if plugins[name] != active.get(name, plugins[name])
    ]
    if before["torch"] != now["torch"]:
        changes.append(f"torch was {before['torch']} and is {now['torch']}")
    return [*changes, *_data_changes(before, now)]


def data_changes(folder: str, manifest: Manifest) -> list[str]:
    """Changes of the manifest and its image files; none without a provenance file. Raises ImbvlmError."""
    before = _written(folder)
    return [] if before is None else _data_changes(before, _of_data(manifest))


def has_rows_of(folder: str, manifest: Manifest) -> bool:
    """Whether a manifest still has the rows, labels, splits and groups that a sweep began with. Raises ImbvlmError."""
    before = _written(folder)
    return before is not None and before["data"] == _data_digest(manifest)


def check_encoder_weights(folder: str, encoder: EncoderConfig, info: EncoderInfo, *, keep: bool = True) -> None:
    """Raise ConfigError if an encoder's weights have changed since the sweep first used it; `keep` records a new one.

    Raises ImbvlmError if the provenance file is damaged.
    """
    before = _written(folder) or {}
    name = " ".join(filter(None, (encoder.name, encoder.weights)))
    towers, revisions = before.get("towers", {}), before.get("revisions", {})
    if towers.get(name, info.weights_fingerprint) != info.weights_fingerprint:
        began = f": revision {revisions[name]} of the hub" if name in revisions else ""
        raise ConfigError([Problem(
            f"the weights of the encoder {name} are not those that the sweep began with{began}. Restore them, or start "
            "a new sweep.", folder)])  # fmt: skip
    if keep and name not in towers:
        revisions = {**revisions, name: info.revision} if info.revision else revisions
        towers = {**towers, name: info.weights_fingerprint}
        write_provenance(folder, {**before, "towers": towers, "revisions": revisions})


def check_class_texts(folder: str, config: TrialConfig, *, keep: bool = True) -> None:
    """Raise ConfigError if the file of class texts has changed since the sweep first used it; `keep` records a new one.

    Raises ImbvlmError if the provenance file is damaged, StorageError where the texts can't be read.
    """
    path = None if config.prompts is None else config.prompts.texts
    if path is None:
        return
    before = _written(folder) or {}
    digest = hashlib.sha256(storage.read_bytes(path)).hexdigest()[:16]
    texts = dict(before.get("texts", {}))
    if texts.get(path, digest) != digest:
        message = f"{path} is not the file of class texts that the sweep began with. Restore it, or start a new sweep."
        raise ConfigError([Problem(message, folder)])
    if keep and path not in texts:
        write_provenance(folder, {**before, "texts": {**texts, path: digest}})


def inputs_used(folder: str) -> dict[str, dict[str, str]]:
    """Fingerprints and revisions of a sweep's encoders, and digests of its class texts; raises ImbvlmError."""
    before = _written(folder) or {}
    return {key: dict(before[key]) for key in ("towers", "revisions", "texts") if key in before}


def data_name(folder: str) -> str:
    """The name of a sweep's data; empty if an earlier version has begun it. Raises ImbvlmError."""
    return str((_written(folder) or {}).get("data_name", ""))


def data_size(folder: str) -> tuple[int, int] | None:
    """Numbers of classes and images of a sweep; None if an earlier version has begun it. Raises ImbvlmError."""
    before = _written(folder) or {}
    num_classes, num_images = before.get("num_classes"), before.get("num_images")
    return (num_classes, num_images) if isinstance(num_classes, int) and isinstance(num_images, int) else None


def _written(folder: str) -> dict[str, Any] | None:
    """The provenance that was written as the sweep began, None without a file; raises ImbvlmError for a damaged one."""

    def parse(content: Any) -> dict[str, Any]:
        required = {"code": dict(content["code"]), "torch": str(content["torch"]), "data": str(content["data"])}
        plugins = {"plugins": read_digests(content["plugins"])} if "plugins" in content else {}
        return {**content, **required, "towers": dict(content.get("towers", {})), **plugins}

    return read_json(storage.join(folder, PROVENANCE_FILE), parse, "Start a new sweep.")


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if before["data"] != now["data"]:
        return ["the manifest's rows, labels, splits or groups have changed"]
    if before.get("taxonomy") != now.get("taxonomy"):
        return ["the manifest's taxonomy has changed"]
    # The first versions did not write this digest.
    is_same = before.get("files", now["files"]) == now["files"]
    return [] if is_same else ["image files are gone, or have changed in size"]


def _change(was_there: bool, is_there: bool) -> str:
    return "has changed" if was_there and is_there else "is new" if is_there else "is gone"


def _of_data(manifest: Manifest) -> dict[str, str]:
    digests = {"data": _data_digest(manifest), "files": _sizes_digest(manifest)}
    if manifest.taxonomy is None:
        return digests
    tree = json.dumps(manifest.taxonomy.to_dict()).encode()
    return {**digests, "taxonomy": hashlib.blake2b(tree, digest_size=16).hexdigest()}


def _data_digest(manifest: Manifest) -> str:
    """A digest that moving images does not change: of labels, splits, class names and, where there are any, contents.

    Groups belong to it where there are any, since folds follow them.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(list(manifest.class_names)).encode())
    digest.update(np.ascontiguousarray(manifest.labels).tobytes())
    for split in manifest.splits:
        digest.update(f"{split} ".encode() + np.ascontiguousarray(manifest.rows_of(split)).tobytes())
    digest.update(b"".join(content or b"-" for content in manifest.table.column("content").to_pylist()))
    if manifest.has_groups:
        digest.update(json.dumps(manifest.table.column("group").to_pylist()).encode())
    return digest.hexdigest()


def _sizes_digest(manifest: Manifest) -> str:
    """A digest of local files' sizes, which moving images does not change."""
    uris = [uri for uri in manifest.table.column("uri").to_pylist() if uri is not None]
    return hashlib.blake2b(file_states(uris)[:, 0].tobytes(), digest_size=16).hexdigest()
