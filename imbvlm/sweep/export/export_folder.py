"""The folder that an export is written to: the list of its files, and how the next export takes their place."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.data.files.file_listing import list_tree

LIST_FILE = "export.json"
FORMAT = 1
MAX_NAMED = 5
# Names that `predict` and `train` look for, or that a person would take for an export's.
_OF_EXPORTS = re.compile(r"(best\.yaml|trials\.csv|config\.json|model/.*|\d+-[^/]+/(model/.*|best\.yaml))", re.DOTALL)


class ExportFolder:
    """A local folder or s3:// prefix with the files of an earlier export, or with none."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._listed = _read_list(folder)
        if storage.is_local(folder) and storage.exists(folder) and not storage.local_path(folder).is_dir():
            raise ImbvlmError(f"an export needs a folder, and {folder} is a file; name another one with -o")
        self._present = [file.path for file in list_tree(folder)] if storage.list_files(folder) else []

    def check(self, names: Sequence[str]) -> None:
        """Raise ImbvlmError for files that an export of these files and folders would overwrite or be mistaken with.

        Files that the earlier export has listed don't count while they are as it wrote them.
        """
        wrong = []
        for path in self._present:
            is_changed = path in self._listed
            in_the_way = path.split("/")[0] in names or _OF_EXPORTS.fullmatch(path) is not None
            if path != LIST_FILE and in_the_way and not self._is_listed(path):
                wrong.append(f"{path} (changed since)" if is_changed else path)
        if wrong:
            more = f" and {len(wrong) - MAX_NAMED:,} more" if len(wrong) > MAX_NAMED else ""
            raise ImbvlmError(
                f"an export replaces only what an earlier one has listed in {LIST_FILE} and nobody has changed, and "
                f"{self.folder} has {', '.join(wrong[:MAX_NAMED])}{more}; remove them, or name another folder with -o"
            )

    @contextmanager
    def staging(self) -> Iterator[str]:
        """A local folder to write an export into, which is gone afterwards; on the same disk as a local export."""
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
                # Nothing has come of it.
                with suppress(OSError):
                    folder.rmdir()

    def put(self, staged: str) -> None:
        """Move what was written into a staging folder into place, and remove what the earlier export has listed.

        The list names old and new files while both may lie there: an export that is cut off can be repeated.
        """
        new = {file.path: _digest(storage.join(staged, file.path)) for file in list_tree(staged)}
        old = {path: self._listed[path] for path in self._present if self._is_listed(path)}
        self._write_list(new, old)
        # The description comes last: without it a folder is no model.
        for path in sorted(new, key=lambda path: (PurePosixPath(path).name == "config.json", path)):
            self._move(Path(staged) / path, path)
        for path in old.keys() - new.keys():
            storage.delete(storage.join(self.folder, path))
            self._remove_empty_folders(path)
        self._write_list(new, {})

    def _is_listed(self, path: str) -> bool:
        """Whether a file is as an export wrote it."""
        return path in self._listed and _digest(storage.join(self.folder, path)) in self._listed[path]

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
    """Digests that a listed file may have, by its path; empty without a list. Raises ImbvlmError."""
    where = storage.join(folder, LIST_FILE)
    if not storage.exists(where):
        return {}
    try:
        content = storage.read_json(where)
        version, files, replaced = content["format"], dict(content["files"]), dict(content["replaced"])
        digests = {str(path): [str(digest) for digest in replaced[path]] for path in replaced}
        for path, digest in files.items():
            digests.setdefault(str(path), []).append(str(digest))
    except (ValueError, LookupError, TypeError) as error:
        raise ImbvlmError(
            f"{where} is no list of an export's files ({error!r}); remove it, or name another folder with -o"
        ) from None
    if version != FORMAT:
        raise ImbvlmError(f"{where} has format {version}, and this version reads {FORMAT}; name another folder with -o")
    return digests


def _digest(uri: str) -> str:
    if not storage.is_local(uri):
        return hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    try:
        with storage.local_path(uri).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise storage.storage_error("read", uri, error) from None
