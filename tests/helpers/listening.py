"""Where the Ray processes that can be seen from here listen; as a script it prints that as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

# As the kernel writes them: IPv4, IPv4 within IPv6, and IPv6.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def listening() -> list[tuple[str, int, str]]:
    """(host as /proc/net writes it, port, the process's command), each once."""
    inodes: dict[str, tuple[str, int]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A":
                host, _, port = parts[1].partition(":")
                inodes[parts[9]] = (host, int(port, 16))
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().replace("\0", " ")
            if "/ray/" not in command and "ray::" not in command:
                continue
            for link in (process / "fd").iterdir():
                target = os.readlink(link)
                if target.startswith("socket:[") and target[8:-1] in inodes:
                    found.add((*inodes[target[8:-1]], command[:160]))
        except OSError:
            pass
    return sorted(found)


if __name__ == "__main__":
    print(json.dumps(listening()))
