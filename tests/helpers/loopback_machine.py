"""This machine as one to launch clusters on: an sshd on loopback; user, home, processes and /tmp/ray are apart."""

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

from apart import Apart, apart, apart_problem, free_port

# As a plain user sshd needs no right.
USER, USER_ID = "sweeper", 1000
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
# What an installation may need of this process's environment.
_HANDED_ON = ("PIP_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http", "SSL_CERT", "REQUESTS_CA")


def machine_problem() -> str | None:
    """Why there can't be one here, None where there can."""
    programs = {"openssh-server": SSHD, "openssh-client": shutil.which("ssh"), "rsync": shutil.which("rsync")}
    missing = [package for package, found in programs.items() if found is None]
    if missing:
        return f"the launcher's way needs Debian's {' and '.join(missing)}: apt-get install {' '.join(missing)}"
    return apart_problem()


@dataclass(frozen=True)
class LoopbackMachine:
    """What runs there; `home` is its user's, and `key` lets one log in."""

    there: Apart
    home: Path
    key: Path

    def command(self, *words: str, folder: Path | None = None) -> list[str]:
        """A command as to be run there from here, in the home unless another folder is given."""
        return self.there.command(f"HOME={self.home}", f"USER={USER}", *words, folder=folder or self.home)


@contextmanager
def loopback_machine(folder: Path) -> Iterator[LoopbackMachine]:
    """Start one with its files in `folder`; all that runs there ends with it."""
    home, key, port = folder / "home", folder / "key", free_port()
    shutil.copytree("/etc/skel", home)
    (folder / "ray").mkdir()
    for path in (key, folder / "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    (home / ".ssh").mkdir(mode=0o700)
    # The launcher knows no port but 22.
    (home / ".ssh" / "config").write_text(f"Host 127.0.0.1\n  Port {port}\n")
    (folder / "passwd").write_text(f"{USER}:x:{USER_ID}:{USER_ID}::{home}:/bin/bash\n")
    (folder / "group").write_text(f"{USER}:x:{USER_ID}:\n")
    # Its python3 is the tests'; Debian's shells put this folder into PATH where it is there.
    (home / ".local" / "bin").mkdir(parents=True)
    (home / ".local" / "bin" / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    path = f"{home}/.local/bin:/usr/local/bin:/usr/bin:/bin"
    given = {"PATH": path, **{key: value for key, value in os.environ.items() if key.startswith(_HANDED_ON)}}
    settings = " ".join(f'{name}="{value}"' for name, value in given.items())
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder / 'host_key'}\nAuthorizedKeysFile {key}.pub\nPidFile none\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nSetEnv {settings}\n"
    )
    setup = (
        f"mount --bind {folder}/passwd /etc/passwd\nmount --bind {folder}/group /etc/group\n"
        f"mkdir -p /tmp/ray\nmount --bind {folder}/ray /tmp/ray\n"
        f"setpriv --ambient-caps=-all --inh-caps=-all {SSHD} -D -e -f {folder}/sshd_config &"
    )
    with apart(setup, folder / "sshd.log", USER_ID) as there:
        _wait_for(port, folder / "sshd.log")
        yield LoopbackMachine(there, home, key)


def _wait_for(port: int, log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise AssertionError(f"no sshd: {log.read_text()}") from None
            time.sleep(0.1)
