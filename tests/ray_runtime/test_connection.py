"""Which Ray cluster a sweep takes: the one that runs, one of its own where none does, and of two the one it is told."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from apart import Apart, apart_with_ray, free_port, start_head

from imbvlm.ray_runtime.connection import HUGE_PAGES, MALLOC_SETTING

ROOT = Path(__file__).parents[2]
TAKEN = """
import json, os, ray
from imbvlm.ray_runtime.connection import MALLOC_SETTING, ray_session, owns_machine
from imbvlm.base.errors import ImbvlmError

def pages():
    return os.environ.get(MALLOC_SETTING)

try:
    before = owns_machine()
    with ray_session() as cluster:
        assert (before, owns_machine()) == (cluster.is_own,) * 2
        answer = ray.get(ray.remote(num_cpus=1)(pages).remote())
        print(json.dumps([cluster.is_own, cluster.num_cpus, cluster.dashboard, answer, pages()]))
except ImbvlmError as error:
    print(json.dumps(str(error)))
"""


def taken(there: Apart, **settings: str) -> Any:
    """What a sweep says of the cluster that it takes, or why it takes none."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        there.command(sys.executable, "-c", TAKEN), env={**environment, **settings},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_running_cluster_is_joined_and_of_two_the_one_that_is_named(tmp_path: Path) -> None:
    with apart_with_ray(tmp_path) as there:
        started_here, _, dashboard, *pages = taken(there)
        assert started_here
        assert dashboard.startswith("http://127.0.0.1:")
        # Its processes alone have huge pages, unless a user says otherwise.
        assert pages == [HUGE_PAGES, None]
        deadline = time.monotonic() + 30
        while any("gcs_server" in line for line in there.processes()):
            assert time.monotonic() < deadline, "its own cluster is still there"
            time.sleep(0.5)

        addresses = []
        for num_cpus in (3, 5):
            port = free_port()
            ports = [f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
            head = tmp_path / f"head-{num_cpus}"
            head.mkdir()
            start_head(there, head, port, f"--num-cpus={num_cpus}", *ports)
            addresses.append(f"127.0.0.1:{port}")
            if num_cpus == 3:
                assert taken(there)[:2] == [False, 3.0]

        refusal = taken(there)
        assert refusal.startswith("2 Ray clusters run on this machine (")
        assert all(address in refusal for address in addresses)
        assert "Set RAY_ADDRESS" in refusal
        for address, num_cpus in zip(addresses, (3.0, 5.0), strict=True):
            assert taken(there, RAY_ADDRESS=address, RAY_AUTH_MODE="token")[:2] == [False, num_cpus]
        # Ray makes a token when it first starts a cluster of one's own, and heads ask for it from then on.
        assert "set RAY_AUTH_MODE=token" in taken(there, RAY_ADDRESS=addresses[0])
        started_here, *_, pages, _ = taken(there, RAY_ADDRESS="local", GLIBC_TUNABLES="glibc.malloc.perturb=0")
        assert (started_here, pages) == (True, "glibc.malloc.perturb=0")
        assert "Run it on a machine of the cluster" in taken(there, RAY_ADDRESS=f"ray://{addresses[0]}")
        assert "no cluster answers there" in taken(there, RAY_ADDRESS=f"127.0.0.1:{free_port()}")


STARTS = """
import functools, os, time
from imbvlm.base import interrupts
from imbvlm.ray_runtime.connection import ray_session

with interrupts.handled(), ray_session(notify_waiting=functools.partial(print, flush=True)) as cluster:
    print("connected", cluster.is_own, os.getpid(), flush=True)
    time.sleep(6)
print("through", flush=True)
"""
STAYS = "all done; Ray stays for 1 other command on this machine"
JOINS = """
import time, ray
from imbvlm.ray_runtime.connection import ray_session

def add(number):
    return number + 1

with ray_session() as cluster:
    print("connected", cluster.is_own, flush=True)
    for number in range({seconds}):
        time.sleep(1)
        assert ray.get(ray.remote(add).remote(number)) == number + 1
print("through", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_sweeps_cluster_stays_until_the_command_that_has_joined_it_ends(tmp_path: Path) -> None:
    """Two sweeps in two terminals: the second one's work was lost when the first was through."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def start(there: Apart, program: str) -> subprocess.Popen[str]:
        words = there.command(sys.executable, "-c", program)
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    with apart_with_ray(tmp_path) as there:
        with start(there, STARTS) as first:
            assert first.stdout is not None
            assert first.stdout.readline().startswith("connected True ")
            with start(there, JOINS.format(seconds=12)) as second:
                assert second.communicate()[0] == "connected False\nthrough\n"
            *waiting, through = first.communicate()[0].splitlines()
        assert (first.returncode, second.returncode, through) == (0, 0, "through")
        assert waiting == [f"{STAYS}, and Ctrl-C ends it with them"]

        with start(there, STARTS) as first:
            assert first.stdout is not None
            *_, inside = first.stdout.readline().split()
            with start(there, JOINS.format(seconds=300)) as second:
                assert first.stdout.readline().startswith(STAYS)
                there.run("kill", "-INT", inside)
                first.communicate()
                second.communicate()
        assert (first.returncode, second.returncode) == (0, 1)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_cluster_that_starts_beside_a_sweep_keeps_neither_its_cpus_nor_its_cleaners(tmp_path: Path) -> None:
    """Another user's Ray on the same machine: Ray Train's cleaners asked it for the trials, and failed or ended."""
    sweep = [sys.executable, str(ROOT / "sweeps" / "quickstart.py"), "--smoke"]
    # Two trials in the encoder, under Ray Train; all else runs in process, and needs the CPUs of the last one.
    short = ["method=bias_tuning", "num_trials=2", "train.num_epochs=1", "refit_seeds=[0]", "blend=null"]
    short += ["cpus_per_worker=1.9"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with apart_with_ray(tmp_path) as there, (tmp_path / "sweep.log").open("wb") as log:
        words = there.command(*sweep, *(word for text in short for word in ("--set", text)), folder=tmp_path)
        with subprocess.Popen(words, stdout=log, stderr=log, env=environment) as process:
            try:
                while not list(tmp_path.glob("runs/*/trials/*.json")):
                    assert process.poll() is None, (tmp_path / "sweep.log").read_text()
                    time.sleep(0.5)
                ports = [f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
                start_head(there, tmp_path, free_port(), "--num-cpus=1", *ports)
                num_cleaners, is_alone = [], list[bool]()
                while process.poll() is None:
                    lines = there.processes()
                    num_cleaners.append(sum("PlacementGroupCleaner" in line for line in lines))
                    if any("RayTrainWorker" in line for line in lines):
                        is_alone.append(num_cleaners[-1] == 0)
                    time.sleep(1)
            finally:
                process.kill()
        assert process.returncode == 0, (tmp_path / "sweep.log").read_text()
        # A trial's own, and at times the one of the trial before.
        assert max(num_cleaners) <= 2
        # A running trial has one. Its workers may outlast it by a moment.
        assert len(is_alone) > 4
        assert sum(is_alone) < len(is_alone) / 4


def test_glibc_knows_the_settings_of_huge_pages_and_the_guide_says_them() -> None:
    guide = (ROOT / "docs" / "guides" / "monitoring.md").read_text()
    assert f"`{HUGE_PAGES}`" in guide.replace(f"{MALLOC_SETTING}=", "")
    loader = next(Path("/lib64").glob("ld-linux-*"), None)
    if loader is None or platform.libc_ver() < ("glibc", "2.35"):
        pytest.skip("it lists its settings, huge pages among them, since glibc 2.35")
    listed = subprocess.run(
        [str(loader), "--list-tunables"], env={MALLOC_SETTING: HUGE_PAGES}, capture_output=True, text=True, check=True
    ).stdout
    for name, value in {"hugetlb": 1, "mmap_threshold": 64 * 2**20, "trim_threshold": 64 * 2**20}.items():
        assert f"glibc.malloc.{name}: {value:#x} " in listed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_where_ray_does_not_come_up_that_is_said_in_a_sentence(tmp_path: Path) -> None:
    """As on a machine that is busy with other work: one of Ray's processes gets no time."""
    hold = "until found=$(pgrep -x raylet); do sleep 0.01; done; kill -STOP $found"
    with apart_with_ray(tmp_path) as there, subprocess.Popen(there.command("bash", "-c", hold)) as holding:
        refusal = taken(there, RAY_ADDRESS="local")
        assert holding.wait(10) == 0
        left = [line for line in there.processes() if "gcs_server" in line or "raylet/raylet" in line]
    assert refusal.startswith("Ray can't be started on this machine: The current node timed out during startup.")
    assert "If it is busy with other work try again later; Ray's logs are in /tmp/ray" in refusal
    assert not left


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("process", ["raylet", "gcs_server"])
def test_where_ray_ends_while_it_starts_that_is_said_in_a_sentence(tmp_path: Path, process: str) -> None:
    """Ray itself ends the process from C++ then, or gives up."""
    kill = f"until pid=$(pgrep -x {process}); do sleep 0.01; done; kill -KILL $pid"
    work = "from imbvlm.ray_runtime.connection import ray_session\nwith ray_session(): pass"
    with apart_with_ray(tmp_path) as there, subprocess.Popen(there.command("bash", "-c", kill)) as killing:
        done = subprocess.run(
            there.command(sys.executable, "-c", work), env={**os.environ, "RAY_ADDRESS": "local"},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert killing.wait(10) == 0
    assert done.returncode == 1
    sentences = ("Ray can't be started on this machine", "this run was ended without a message", "Ray's logs")
    assert any(sentence in done.stderr for sentence in sentences), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_slurm_s_script_starts_a_cluster_for_a_sweep_and_ends_it(tmp_path: Path) -> None:
    """Of Slurm there are its variables, and programs that note what they are asked and do it on this machine."""
    stubs, asked = tmp_path / "stubs", tmp_path / "asked"
    stubs.mkdir()
    (stubs / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (stubs / "srun").write_text(
        f'#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "$1" >> {asked}; shift; done\nexec "$@"\n'
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    script = tmp_path / "slurm.sh"
    shipped = (ROOT / "cluster" / "slurm.sh").read_text()
    assert "--dashboard-host 0.0.0.0" in shipped
    script.write_text(shipped.replace("--dashboard-host 0.0.0.0", "--dashboard-host 127.0.0.1"))
    brief = ["--set", "num_trials=2", "--set", "method=linear_probe", "--storage", str(tmp_path / "runs")]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {
        "IMBVLM_ENV": str(Path(sys.executable).parents[1]), "HOME": str(tmp_path), "SLURM_JOB_NODELIST": "node[1-1]",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2", "PATH": f"{stubs}:{os.environ['PATH']}",
        # So all of Ray's ports are on loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }  # fmt: skip
    with apart_with_ray(tmp_path) as there:
        done = subprocess.run(
            there.command("bash", str(script), "sweeps/quickstart.py", "--smoke", *brief, folder=ROOT),
            env=environment, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert not [line for line in there.processes() if "raylet" in line or "gcs_server" in line]
    assert "Ray: 2 CPUs, 0 GPUs (a cluster that was running already)" in done.stdout
    assert "winner " in done.stdout
    assert asked.read_text().split() == ["--nodes=1", "--ntasks=1", "--cpus-per-task=2"]
    assert len((tmp_path / ".ray" / "auth_token").read_text()) > 20


@pytest.mark.slow
@pytest.mark.ray
def test_the_tests_join_no_foreign_cluster(ray_cluster: str, tmp_path: Path) -> None:
    """As where a head of another's still runs, or was killed and has left its address."""
    (tmp_path / "test_address.py").write_text("def test_it(ray_cluster):\n    print(f'on {ray_cluster} end')\n")
    for foreign in (ray_cluster, f"127.0.0.1:{free_port()}"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-s", "-p", "conftest", "-p", "no:cacheprovider", "test_address.py"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "RAY_ADDRESS": foreign},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"on {foreign} end" not in done.stdout
