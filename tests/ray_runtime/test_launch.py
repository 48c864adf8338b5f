"""The way to a cluster as users go it, on loopback: ray up, submit, export, jobs with a token, ray down."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import pytest
import yaml
from apart import free_port
from aws_metadata import aws_metadata
from listening import LOOPBACK
from loopback_machine import USER, LoopbackMachine, loopback_machine, machine_problem

import imbvlm
from imbvlm.cli.cluster_file_check import check_cluster_file
from imbvlm.data.manifest import Manifest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# What a machine without root, NFS and other machines can't do of cluster/gpu.yaml's commands, and what stands for it.
STAND_INS = {
    "sudo apt-get -qq -o DPkg::Lock::Timeout=600 update && sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y "
    "python3-venv nfs-common": "true",
    "sudo mkdir -p /shared && ln -sfn /shared/runs ~/runs && ln -sfn /shared/data ~/data": (
        "mkdir -p ~/shared && ln -sfn ~/shared/runs ~/runs && ln -sfn ~/shared/data ~/data"
    ),
    "sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y nfs-kernel-server && sudo chown $USER /shared && "
    "mkdir -p /shared/runs /shared/data": "mkdir -p ~/shared/runs ~/shared/data",
    "sudo tee /etc/exports > /dev/null && sudo exportfs -ra": "cat > ~/exports",
}


def loopback_file(machine: LoopbackMachine, dashboard_port: int, metadata: str) -> dict:
    """cluster/gpu.yaml with another provider and login, its node types gone, and its ports free ones of loopback."""
    shipped = yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())
    for key in ("metadata", "head_node_type", "available_node_types", "max_workers"):
        del shipped[key]
    text = yaml.safe_dump(shipped, width=1_000_000)
    stand_ins = {
        **STAND_INS,
        "169.254.169.254": metadata,
        "--port=6379 --object-manager-port=8076 --dashboard-host=0.0.0.0": (
            f"--node-ip-address=127.0.0.1 --port={free_port()} --dashboard-host=127.0.0.1 "
            f"--dashboard-port={dashboard_port}"
        ),
    }
    found = yaml.safe_load(text)
    for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands"):
        for old, new in list(stand_ins.items()):
            if any(old in command for command in found[key]):
                found[key] = [command.replace(old, new) for command in found[key]]
                del stand_ins[old]
    assert not stand_ins, f"cluster/gpu.yaml no longer has {stand_ins}"
    return {
        **found,
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": USER, "ssh_private_key": str(machine.key)},
    }


class Launcher:
    """Types commands of Ray's launcher in this repository's root, on the machine itself."""

    def __init__(self, machine: LoopbackMachine, file: Path) -> None:
        self.machine, self.file = machine, file

    def words(self, command: str, *arguments: str) -> list[str]:
        words = ["PYTHONPATH=", f"PATH={BIN}:{os.environ['PATH']}", "ray", command, *arguments]
        return self.machine.command(*words, folder=ROOT)

    def __call__(self, command: str, *arguments: str, seconds: float = 300) -> str:
        done = subprocess.run(
            self.words(command, *arguments), capture_output=True, text=True, timeout=seconds, check=False
        )
        assert done.returncode == 0, f"ray {command}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def on_terminal(self, command: str, *arguments: str, typed: str = "", until: str | None = None) -> str:
        """What a user sees on a terminal of 100 columns; the connection is lost once `until` is seen."""
        ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        process = subprocess.Popen(
            self.words(command, *arguments), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        os.write(ours, typed.encode())
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
                if until is not None and until.encode() in shown:
                    os.killpg(process.pid, signal.SIGKILL)
        except OSError:
            pass  # Linux's way to say that the other end is closed.
        os.close(ours)
        text = shown.decode(errors="replace")
        assert process.wait() == (0 if until is None else -signal.SIGKILL), text
        return text

    @contextmanager
    def dashboard(self, remote_port: int) -> Iterator[str]:
        """The forwarded dashboard's address."""
        port = free_port()
        words = self.words("dashboard", f"--port={port}", f"--remote-port={remote_port}", str(self.file))
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 30
                while status(address) is None:
                    assert time.monotonic() < deadline, "the dashboard wasn't forwarded"
                    time.sleep(0.2)
                yield address
            finally:
                process.kill()


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it didn't come to that"
        time.sleep(0.5)


def status(url: str) -> int | None:
    """The HTTP status of a page, None where nothing listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return int(page.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackMachine]:
    problem = machine_problem()
    if problem is not None:
        pytest.skip(problem)
    # The smallest of what its environment is made of.
    pins = (ROOT / "cluster" / "requirements.txt").read_text().splitlines()
    words = ["-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path_factory.mktemp("index"))]
    words += [pin for pin in pins if pin.startswith("attrs==")]
    if subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode:
        pytest.skip("the cluster's environment is installed from a package index, and none answers")
    with loopback_machine(tmp_path_factory.mktemp("machine")) as found:
        yield found


def test_ray_up_submit_export_job_and_down(
    machine: LoopbackMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    port, file = free_port(), tmp_path / "loopback.yaml"
    with aws_metadata("127.0.0.0/8") as metadata:
        file.write_text(yaml.safe_dump(loopback_file(machine, port, metadata), sort_keys=False))
        check_cluster_file(file)
        ray = Launcher(machine, file)
        ray("up", "-y", str(file), seconds=900)
    assert (machine.home / "exports").read_text() == "/shared 127.0.0.0/8(rw,sync,no_subtree_check,no_root_squash)\n"
    token = (machine.home / ".ray" / "auth_token").read_text().strip()
    assert len(token) > 20
    hosts = subprocess.run(
        machine.command(sys.executable, str(ROOT / "tests" / "helpers" / "listening.py")),
        capture_output=True,
        check=True,
    )
    at_dashboard = {host for host, one, _ in json.loads(hosts.stdout) if one == port}
    assert at_dashboard
    assert at_dashboard <= LOOPBACK

    shown = ray.on_terminal("submit", str(file), "sweeps/quickstart.py", "--smoke")
    (sweep,) = (machine.home / "runs").glob("quickstart-*")
    assert f"imbvlm export {sweep}" in shown
    assert re.search(r"^winner ", shown, re.MULTILINE)
    assert "a cluster that was running already" in shown
    # The live view is drawn again and again in its place.
    without_styles = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert len(re.findall(r"trials .*\d+ of 8 done", without_styles)) >= 3
    assert shown.count("\x1b[2K") >= 3

    assert f"{sweep.name} " in ray.on_terminal("attach", str(file), typed="cd ~; imbvlm sweep list runs\nexit\n")

    # The user's machine goes to sleep, the sweep goes on.
    brief = ["--set", "num_trials=2", "--set", "method=linear_probe"]
    ray.on_terminal("submit", str(file), "sweeps/quickstart.py", "--smoke", *brief, until="of 2 done")
    (alone,) = set((machine.home / "runs").glob("quickstart-*")) - {sweep}
    wait_for((alone / "best.yaml").exists, 180)
    assert "winner " in (alone / "progress.log").read_text()

    ray("exec", str(file), f"imbvlm export ~/runs/{sweep.name} -o ~/my-model")
    ray("rsync-down", str(file), "~/my-model", str(tmp_path))
    images = Manifest.read("embedded:fashion_mnist_lt")
    row = int(images.rows_of("test")[0])
    (prediction,) = imbvlm.load(str(tmp_path / "my-model")).predict([images.table.column("bytes")[row].as_py()])
    assert prediction.class_names

    with ray.dashboard(port) as address:
        assert status(f"{address}/api/jobs/") == 401
        job = ["job", "submit", "--address", address, "--working-dir", "sweeps", "--", "python", "quickstart.py"]
        job += ["--smoke", "--storage", "~/runs", "--set", "num_trials=2", "--set", "method=linear_probe"]
        stranger = ["RAY_AUTH_MODE=disabled", f"HOME={tmp_path}"]
        environment = machine.command(*stranger, f"PATH={BIN}:{os.environ['PATH']}", "PYTHONPATH=", folder=ROOT)
        refused = subprocess.run([*environment, "ray", *job], capture_output=True, text=True, check=False, timeout=60)
        assert refused.returncode != 0
        assert "token authentication is enabled" in refused.stderr
        (tmp_path / "my-token").write_text(token)
        known = ["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={tmp_path / 'my-token'}", f"HOME={tmp_path}"]
        environment = machine.command(*known, f"PATH={BIN}:{os.environ['PATH']}", "PYTHONPATH=", folder=ROOT)
        done = subprocess.run([*environment, "ray", *job], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "succeeded" in done.stdout
        assert "winner" in done.stdout
    running = machine.there.processes()
    assert any("raylet" in line for line in running)
    assert not [line for line in running if token in line]

    ray("down", "-y", str(file))
    assert not [line for line in machine.there.processes() if "raylet" in line or "gcs_server" in line]
    assert len(list((machine.home / "runs").glob("quickstart-*"))) == 3
