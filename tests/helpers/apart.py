"""A place of its own on this machine: processes, mounts and user are apart, and all of it is gone afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


def apart_problem() -> str | None:
    """Why there can't be such a place here, None where there can."""
    if (
        shutil.which("nsenter") is None
        or subprocess.run([*_unshare(0), "true"], capture_output=True, check=False).returncode
    ):
        return "processes and mounts apart need the right to make user namespaces (unshare --user)"
    return None


def _unshare(user: int) -> list[str]:
    as_user = [f"--map-user={user}", f"--map-group={user}", "--keep-caps"]
    return ["unshare", "--user", *as_user, "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


@dataclass(frozen=True)
class Apart:
    """Where it is: its first process, as seen from here."""

    process: int

    def command(self, *words: str, folder: Path | None = None) -> list[str]:
        """A command as to be run in there from here."""
        enter = ["nsenter", "--preserve-credentials", "--user", "--mount", "--pid", f"--target={self.process}", "--"]
        return [*enter, *(["env", f"--chdir={folder}"] if folder else []), *words]

    def run(self, *words: str, folder: Path | None = None, seconds: float = 60) -> str:
        """What a command in there prints; fails where it does."""
        done = subprocess.run(
            self.command(*words, folder=folder), capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def processes(self) -> list[str]:
        """Command lines of what runs in there."""
        return [line for line in self.run("ps", "-ewwo", "args=").splitlines() if not line.startswith("ps -ewwo")]

    def path(self, path: Path) -> Path:
        """A path in there, as seen from here."""
        return Path(f"/proc/{self.process}/root{path}")


@contextmanager
def apart(setup: str, log: Path, user: int = 0) -> Iterator[Apart]:
    """Run a script of bash, which may mount, as the first process; in there one is `user`."""
    script = f"set -e\n{setup}\necho it is ready\nsleep infinity &\nwait"
    with (
        log.open("wb") as stream,
        subprocess.Popen([*_unshare(user), "bash", "-c", script], stdout=stream, stderr=stream) as process,
    ):
        try:
            deadline = time.monotonic() + 30
            while "it is ready" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"there is no place apart: {log.read_text()}")
                time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            yield Apart(int(children))
        finally:
            process.kill()


@contextmanager
def apart_with_ray(folder: Path, setup: str = "true") -> Iterator[Apart]:
    """A place without other Ray, its sessions in `folder`/ray; skips the test where there can't be one."""
    problem = apart_problem()
    if problem is not None:
        pytest.skip(problem)
    (folder / "ray").mkdir()
    with apart(f"{setup}\nmkdir -p /tmp/ray\nmount --bind {folder}/ray /tmp/ray", folder / "apart.log") as there:
        yield there


def start_head(there: Apart, folder: Path, port: int, *options: str, **environment: str) -> None:
    """Start a cluster in there, its head on a port of loopback."""
    log = folder / "head.log"
    ray = str(Path(sys.executable).parent / "ray")
    words = [ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={free_port()}", *options]  # fmt: skip
    with log.open("wb") as stream:
        # So all of its ports are on loopback; and its processes mustn't ask a cluster of the tests for their own.
        given = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        given |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **environment}
        subprocess.Popen(there.command(*words), stdout=stream, stderr=stream, env=given)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
