"""`ray up`, `ray submit`, export, `ray job submit` and `ray down` for real, on loopback with an sshd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from imbvlm.yaml_file import dump_yaml, read_foreign_yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parent.parent
SSHD = "/usr/sbin/sshd"


def isolated() -> list[str] | None:
    """A command that runs another in namespaces of its own, as root; None where that isn't permitted."""
    command = ["unshare", "-npfm", "--mount-proc", "--kill-child"]
    tools = [SSHD, "rsync", "ssh", "ip", "unshare"]
    if os.geteuid() or any(shutil.which(tool) is None for tool in tools):
        return None
    # A user namespace in which groups can't be set is no place for an sshd.
    if Path("/proc/self/setgroups").read_text().strip() != "allow":
        return None
    return None if subprocess.run([*command, "true"], check=False, capture_output=True).returncode else command


def cluster_file(folder: Path) -> Path:
    """cluster/gpu.yaml's own commands, as far as they need no network and no NFS, for one machine: this one."""
    given = read_foreign_yaml(ROOT / "cluster" / "gpu.yaml").data
    site = sysconfig.get_path("purelib")
    kept = [
        one for one in given["setup_commands"] if not any(word in one for word in ("apt-get", "pip install", "sudo"))
    ]
    base_python = Path(sys.base_prefix) / "bin" / "python3"
    environment = [one.replace("python3 -m venv", f"{base_python} -m venv --without-pip") for one in kept]
    # Packages come from the environment of the tests; its executables would run its own Python.
    first = next(number for number, one in enumerate(environment) if "-m venv" in one) + 1
    purelib = "$(~/imbvlm-env/bin/python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    environment[first:first] = [
        f"echo {site} > {purelib}/all.pth",
        "printf '#!/bin/sh\\nexec python -m ray.scripts.scripts \"$@\"\\n' > ~/imbvlm-env/bin/ray",
        "chmod +x ~/imbvlm-env/bin/ray",
    ]
    tree = {
        "cluster_name": "loopback",
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": "root", "ssh_private_key": str(folder / "key")},
        "file_mounts": {remote: str(ROOT / local) for remote, local in given["file_mounts"].items()},
        "rsync_exclude": given["rsync_exclude"],
        "setup_commands": environment,
        "head_setup_commands": [one for one in given["head_setup_commands"] if "auth_token" in one],
        "head_start_ray_commands": [one.replace("0.0.0.0", "127.0.0.1") for one in given["head_start_ray_commands"]],
    }
    path = folder / "cluster.yaml"
    path.write_text(dump_yaml(tree))
    return path


def test_the_way_from_ray_up_to_ray_down(tmp_path):
    command = isolated()
    if command is None:
        pytest.skip("needs root, namespaces, sshd and rsync (Debian: openssh-server, rsync)")
    cluster_file(tmp_path)
    done = subprocess.run(
        [*command, "bash", str(ROOT / "tests" / "launch.sh"), str(tmp_path), str(Path(sys.executable).parent)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-8000:]
    assert "test split, read once" in printed
    for step in ("EXPORTED", "REFUSED WITHOUT TOKEN", "JOB DONE", "DOWN"):
        assert f"\n{step}\n" in printed
