"""The folder of an export: its files are listed, so that the next export can replace them and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.json_file import damage_named
from imbvlm.data.files.file_listing import list_tree

LIST_FILE = "export.json"
FORMAT = 1
MAX_NAMED = 5
# Names that `predict` and `train` look for, or that a person would take for an export's.
_OF_EXPORTS = re.compile(r"(best\.yaml|trials\.csv|config\.json|model/.*|\d+-[^/]+/(model/.*|best\.yaml))", re.DOTALL)
# The files of a model that version 0.1 exported, and the folder of the model's trial.
_MODEL_FILES = re.compile(
    r"README\.md|config\.json|(model|zero_shot)\.safetensors|tower/open_clip_(config\.json|model\.safetensors)"
    r"|onnx/model\.onnx(\.data)?"
)
_DESCRIPTION = re.compile(r"(\d+-[^/]+/)?model/config\.json")


@dataclass(frozen=True)
class ExportFolder:
    """A local folder or s3:// prefix: the files in it, and the digests of those that an earlier export has listed."""

    folder: str
    present: tuple[str, ...]
    listed: Mapping[str, Sequence[str]]

    @staticmethod
    def open(folder: str) -> ExportFolder:
        """Read a folder, which need not exist; raises ImbvlmError for a file or a damaged list."""
        if storage.is_local(folder) and storage.exists(folder) and not storage.local_path(folder).is_dir():
            raise ImbvlmError(f"an export needs a folder, and {folder} is a file. Name another one with -o.")
        present = tuple(file.path for file in list_tree(folder)) if storage.list_files(folder) else ()
        if storage.exists(storage.join(folder, LIST_FILE)):
            return ExportFolder(folder, present, _read_list(folder))
        unlisted = {path: [_digest(storage.join(folder, path))] for path in _exported_by_0_1(folder, present)}
        return ExportFolder(folder, present, unlisted)

    def check(self, names: Sequence[str]) -> None:
        """Raise ImbvlmError for files that an export of these files and folders would overwrite or be mistaken with.

        Files of an earlier export are allowed while they are unchanged.
        """
        wrong = []
        for path in self.present:
            is_in_the_way = path.split("/")[0] in names or _OF_EXPORTS.fullmatch(path) is not None
            if path != LIST_FILE and is_in_the_way and not self._is_unchanged(path):
                wrong.append(f"{path} (changed since)" if path in self.listed else path)
        if wrong:
            more = f" and {len(wrong) - MAX_NAMED:,} more" if len(wrong) > MAX_NAMED else ""
            raise ImbvlmError(
                f"an export replaces only unchanged files that an earlier one has listed in {LIST_FILE}, and "
                f"{self.folder} has {', '.join(wrong[:MAX_NAMED])}{more}. Remove them, or name another folder with -o."
            )

    @contextmanager
    def staging(self) -> Iterator[str]:
        """Within, a temporary local folder to write an export into, on the disk of a local export."""
        if not storage.is_local(self.folder):
            with tempfile.TemporaryDirectory() as staged:
                yield staged
            return
        folder = storage.local_path(self.folder)
        is_new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staged = tempfile.mkdtemp(prefix=".export-", dir=folder)
        except OSError as error:
            raise storage.storage_error("write", self.folder, error) from None
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            if is_new:
                # Removed only if the export was not moved into it.
                with suppress(OSError):
                    folder.rmdir()

    def put(self, staged: str) -> None:
        """Move the files of a staging folder into place, and delete the other files of the earlier export.

        The list names old and new files while both may exist, so that an interrupted export can be repeated.
        """
        new = {file.path: _digest(storage.join(staged, file.path)) for file in list_tree(staged)}
        old = {path: self.listed[path] for path in self.present if self._is_unchanged(path)}
        self._write_list(new, old)
        # The description comes last: without it a folder is no model.
        for path in sorted(new, key=lambda path: (PurePosixPath(path).name == "config.json", path)):
            self._move(Path(staged) / path, path)
        for path in old.keys() - new.keys():
            storage.delete(storage.join(self.folder, path))
            self._remove_empty_folders(path)
        self._write_list(new, {})

    def _is_unchanged(self, path: str) -> bool:
        """Whether a file is as an export wrote it."""
        return path in self.listed and _digest(storage.join(self.folder, path)) in self.listed[path]

    def _move(self, source: Path, path: str) -> None:
        target = storage.join(self.folder, path)
        if not storage.is_local(self.folder):
            storage.write_bytes(target, source.read_bytes())
            return
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
        except OSError as error:
            raise storage.storage_error("write", target, error) from None

    def _remove_empty_folders(self, path: str) -> None:
        if storage.is_local(self.folder):
            for parent in [*PurePosixPath(path).parents][:-1]:
                with suppress(OSError):
                    (storage.local_path(self.folder) / parent).rmdir()

    def _write_list(self, files: Mapping[str, str], replaced: Mapping[str, Sequence[str]]) -> None:
        content = {
            "format": FORMAT,
            "files": dict(files),
            "replaced": {path: list(replaced[path]) for path in replaced},
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
        storage.write_bytes(storage.join(self.folder, LIST_FILE), text.encode())


def _read_list(folder: str) -> dict[str, list[str]]:
    """The digests that a listed file may have, by its path; raises ImbvlmError for a damaged list."""
    location = storage.join(folder, LIST_FILE)
    with damage_named(f"{location} is no list of an export's files", "Remove it, or name another folder with -o."):
        content = storage.read_json(location)
        version, files, replaced = content["format"], dict(content["files"]), dict(content["replaced"])
        digests = {str(path): [str(digest) for digest in replaced[path]] for path in replaced}
        for path, digest in files.items():
            digests.setdefault(str(path), []).append(str(digest))
    if version != FORMAT:
        raise ImbvlmError(
            f"{location} has format {version}, and this version reads {FORMAT}. Name another folder with -o."
        )
    return digests


def _exported_by_0_1(folder: str, present: Sequence[str]) -> list[str]:
    """The files of exports by version 0.1, which wrote no list: recognized by their descriptions and names."""
    exported = set[str]()
    for description in filter(_DESCRIPTION.fullmatch, present):
        trial = description.removesuffix("model/config.json")
        model = [path for path in present if path.startswith(f"{trial}model/")]
        is_known = all(_MODEL_FILES.fullmatch(path.removeprefix(f"{trial}model/")) for path in model)
        if is_known and _is_description_0_1(storage.join(folder, description)):
            exported |= {*model, f"{trial}best.yaml"} | ({"trials.csv"} if trial else set())
    return [path for path in present if path in exported]


def _is_description_0_1(location: str) -> bool:
    """Whether a file describes a model of version 0.1, whose descriptions have no digests."""
    try:
        content = storage.read_json(location)
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("library_name") == "imbvlm" and "digests" not in content


def _digest(uri: str) -> str:
    if not storage.is_local(uri):
        return hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    try:
        with storage.local_path(uri).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise storage.storage_error("read", uri, error) from None
