"""A small Hugging Face hub on loopback: repositories with revisions, hashes, gates, and downloads that break."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from loopback_server import QuietHandler, loopback_server


@dataclass
class Repository:
    """Files by commit, and the commit that `main` is; `token` is needed to read it, and `gated` says why."""

    commits: dict[str, dict[str, bytes]]
    main: str
    token: str | None = None
    gated: bool = False
    # Files that are sent with another byte than their hash is of.
    damaged: set[str] = field(default_factory=set)
    # Bytes of a file after which the first download of it is cut off.
    cut_after: dict[str, int] = field(default_factory=dict)
    # Every download is cut off, and not the first one alone.
    cuts_all: bool = False


@dataclass
class Hub:
    """The server's repositories by OWNER/REPO, and the requests that it has answered."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, name: str, folder: Path, commit: str = "a" * 40) -> Repository:
        """Publish the files of a folder as one commit of a repository, and as its `main`."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        repository = self.repositories.setdefault(name, Repository({}, commit))
        repository.commits[commit], repository.main = files, commit
        return repository


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run the server in a thread of this process."""
    hub = Hub("")

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            owner, _, rest = self.path.lstrip("/").partition("/resolve/")
            repository = hub.repositories.get(owner)
            if repository is None:
                return self.fail(401, "RepoNotFound")
            if not rest:
                return self.reply(200, {}, b"")
            if repository.token is not None and self.headers.get("authorization") != f"Bearer {repository.token}":
                return self.fail(401, "GatedRepo" if repository.gated else "RepoNotFound")
            revision, _, name = rest.partition("/")
            commit = repository.main if revision == "main" else revision
            if commit not in repository.commits:
                return self.fail(404, "RevisionNotFound")
            content = repository.commits[commit].get(name)
            if content is None:
                return self.fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return self.send_file(repository, commit, name, content)

        def send_file(self, repository: Repository, commit: str, name: str, content: bytes) -> None:
            is_large = name.endswith((".safetensors", ".bin"))
            digest = hashlib.sha256(content) if is_large else hashlib.sha1(f"blob {len(content)}\0".encode() + content)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{digest.hexdigest()}"', "Accept-Ranges": "bytes"}
            if name in repository.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            cut = repository.cut_after.get(name) if self.command == "GET" else None
            if cut is not None and not repository.cuts_all:
                del repository.cut_after[name]
            return self.reply(206 if start else 200, headers, content[start:], cut)

        def fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self.reply(status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}, b"")

        def reply(self, status: int, headers: dict[str, str], content: bytes, cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content if cut is None else content[:cut])
            if cut is not None:
                self.close_connection = True

        do_GET = do_HEAD = answer

    with loopback_server(Handler) as address:
        hub.endpoint = f"http://{address}"
        yield hub


@contextmanager
def use_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Run the server, and make this process ask it, without a token and with an empty cache."""
    with hub_server() as hub:
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
