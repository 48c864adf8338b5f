"""The clusters' files: what must be set is named before anything starts, and what Ray's own check misses is refused."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from aws_metadata import aws_metadata
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from imbvlm.base.errors import ConfigError
from imbvlm.cli.cluster_file_check import check_cluster_file

ROOT = Path(__file__).parents[2]
GPU, KUBERAY = ROOT / "cluster" / "gpu.yaml", ROOT / "cluster" / "kuberay.yaml"
SET = {"region": "us-east-1", "zone": "us-east-1a", "image": "ami-0123456789abcdef0"}


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def write_gpu(tmp_path: Path, *replacements: tuple[str, str], **settings: str) -> Path:
    text = GPU.read_text()
    for key, value in {**SET, **settings}.items():
        text, count = re.subn(rf"(  {key}: &{key}) \S+", rf"\1 {value}", text)
        assert count == 1, key
    for old, new in replacements:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    path = tmp_path / "gpu.yaml"
    path.write_text(text)
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_cluster_file(path)
    return [str(problem) for problem in caught.value.problems]


def test_values_that_must_be_set_are_named_with_their_lines() -> None:
    lines = GPU.read_text().splitlines()
    problems = problems_of(GPU)
    assert len(problems) == 3
    for problem, key in zip(problems, ("region", "zone", "image"), strict=True):
        line = int(re.search(r"gpu.yaml:(\d+): ", problem)[1])
        assert f"{key} must be set" in problem
        assert lines[line - 1].startswith(f"  {key}: &{key} null")


def test_ray_up_itself_refuses_values_that_are_not_set(tmp_path: Path) -> None:
    for key in SET:
        config = yaml.safe_load(write_gpu(tmp_path, **{key: "null"}).read_text())
        with pytest.raises(Exception, match=r"None is not of type 'string'"):
            validate_config(prepare_config(config))


def test_with_them_set_it_is_what_ray_wants(tmp_path: Path) -> None:
    path = write_gpu(tmp_path)
    check_cluster_file(path)
    config = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    types = config["available_node_types"]
    assert types["head"]["max_workers"] == 0
    workers = {name: one for name, one in types.items() if name != "head"}
    assert all(0 < one["max_workers"] <= config["max_workers"] and not one["min_workers"] for one in workers.values())
    spot = [name for name, one in workers.items() if "InstanceMarketOptions" in one["node_config"]]
    assert len(spot) == 1
    assert len(workers) == 2
    assert types[spot[0]]["priority"] > 0
    assert {one["node_config"]["ImageId"] for one in types.values()} == {SET["image"]}


@pytest.mark.parametrize(
    ("settings", "replacement", "message"),
    [
        ({"region": "us-east"}, (), "region is 'us-east'"),
        ({"zone": "eu-west-1a"}, (), "the zone eu-west-1a is not in the region us-east-1"),
        ({"image": "ubuntu"}, (), "image is 'ubuntu'"),
        ({"max_spot": "9"}, (), "node type gpu_spot may have 9 workers, and all together 8"),
        ({"max_workers": "0", "max_spot": "0", "max_on_demand": "0"}, (), "no node type may have workers"),
        ({"max_workers": "many"}, (), "max_workers: 'many' is not of type 'integer'"),
        ({}, ("  region: *region\n", ""), "provider.region must be set"),
        ({}, ("      ImageId: *image\n      InstanceMarket", "      InstanceMarket"), "gpu_spot must have ImageId"),
        (
            {},
            ("    min_workers: 0\n    max_workers: *max_spot", "    min_workers: 9\n    max_workers: 8"),
            "min_workers",
        ),
        ({}, ("head_node_type: head", "head_node_type: boss"), "head_node_type"),
        ({}, ("idle_timeout_minutes", "idle_timeout"), "idle_timeout"),
        ({}, ("~/imbvlm/cluster: cluster", "~/imbvlm/cluster: clusters"), "clusters does not exist"),
        ({}, ("upscaling_speed: 100.0", "upscaling_speed: ["), "not YAML"),
    ],
)
def test_mistakes_are_refused(
    tmp_path: Path, settings: dict[str, str], replacement: tuple[Any, ...], message: str
) -> None:
    path = write_gpu(tmp_path, *([replacement] if replacement else []), **settings)
    assert any(message in problem for problem in problems_of(path))


def test_the_command_says_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from imbvlm.cli.app import main

    for path, code, words in ((GPU, 1, "region must be set"), (write_gpu(tmp_path), 0, "nothing is missing")):
        with pytest.raises(SystemExit) as left:
            main(["check-cluster", str(path)])
        assert left.value.code == code
        shown = capsys.readouterr()
        assert words in shown.out + shown.err


def test_ray_s_commands_name_the_missing_region_and_start_nothing() -> None:
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    if ray is None:
        pytest.skip("this environment has no ray command")
    environment = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", "AWS_ACCESS_KEY_ID": "", "HOME": "/nonexistent"}
    done = subprocess.run([ray, "up", "-y", str(GPU)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode != 0
    assert "None is not of type 'string'" in done.stdout + done.stderr


def run_export(tmp_path: Path, metadata: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command by which the head shares its disk, with nothing of it written to the machine's /etc: its exports."""
    commands = yaml.safe_load(GPU.read_text())["head_setup_commands"]
    (command,) = (command for command in commands if "/etc/exports" in command)
    (tmp_path / "bin").mkdir()
    sudo, exports = tmp_path / "bin" / "sudo", tmp_path / "exports"
    sudo.write_text(
        f'#!/bin/sh\n[ "$*" = "exportfs -ra" ] || {{ [ "$*" = "tee /etc/exports" ] && cat > {exports}; }}\n'
    )
    sudo.chmod(0o755)
    # As Ray's launcher runs it, behind others.
    words = ["bash", "-c", f"true && ({command.replace('169.254.169.254', metadata)})"]
    environment = {**os.environ, "PATH": f"{sudo.parent}:{os.environ['PATH']}", "no_proxy": "127.0.0.1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=60), exports


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("networks", ["172.31.0.0/16", "10.0.0.0/16\n100.64.0.0/16"])
def test_the_head_s_disk_is_shared_with_its_own_network_alone_and_writes_are_on_disk(
    tmp_path: Path, networks: str
) -> None:
    with aws_metadata(networks) as metadata:
        done, exports = run_export(tmp_path, metadata)
    assert done.returncode == 0, done.stderr
    options = "(rw,sync,no_subtree_check,no_root_squash)"
    assert exports.read_text() == f"/shared {' '.join(network + options for network in networks.split())}\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("networks", ["", None])
def test_a_head_that_is_told_no_network_shares_its_disk_with_nobody(tmp_path: Path, networks: str | None) -> None:
    with aws_metadata(networks or "") as metadata:
        done, exports = run_export(tmp_path, metadata if networks is not None else f"{metadata}/nothing")
    assert done.returncode == 1
    assert "AWS's metadata service doesn't say which network the head is in" in done.stderr
    assert not exports.exists()


def test_nothing_secret_is_in_a_command() -> None:
    for path in (GPU, KUBERAY, ROOT / "cluster" / "slurm.sh"):
        text = path.read_text()
        assert not re.search(r"RAY_AUTH_TOKEN=|AWS_SECRET|--redis-password", text), path
        assert "get-auth-token --generate > /dev/null" in text or path == KUBERAY


def test_kuberay_names_what_must_be_set(tmp_path: Path) -> None:
    assert [problem.split(": ", 1)[1] for problem in problems_of(KUBERAY)] == [
        "image must be set.",
        "shared-volume-claim must be set.",
    ]
    text = KUBERAY.read_text().replace("&image null", "&image me/imbvlm:1").replace("&claim null", "&claim shared")
    path = tmp_path / "kuberay.yaml"
    path.write_text(text)
    check_cluster_file(path)
    cluster = yaml.safe_load(text)["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    for pod in pods:
        assert pod["spec"]["containers"][0]["image"] == "me/imbvlm:1"
        assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == "shared"
    path.write_text(text.replace("maxReplicas: 8", "maxReplicas: 0"))
    assert "must not decrease" in problems_of(path)[0]
    path.write_text(
        text.replace('nvidia.com/gpu: "1"', 'nvidia.com/gpu: "2"').replace("maxReplicas: 8", "maxReplicas: 6")
    )
    wrong = "IMBVLM_AUTOSCALER must be that of the workers, got '[[8, 8, 1]]'. Set it to '[[6, 8, 2]]'."
    assert wrong in problems_of(path)[0]
    path.write_text(text.replace("kind: RayJob", "kind: Pod"))
    assert "kind must be RayJob" in problems_of(path)[0]


def test_every_dependency_is_pinned_as_the_project_allows_and_one_ray_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "cluster" / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for dependency in map(Requirement, project["dependencies"]):
        assert dependency.specifier.contains(pins[dependency.name.lower().replace("_", "-")]), dependency
    assert yaml.safe_load(KUBERAY.read_text())["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    assert f"rayproject/ray:{pins['ray']}-" in (ROOT / "cluster" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([], {"IMBVLM_ENV": None}, "IMBVLM_ENV: set it to the folder"),
        ([], {}, "which sweep?"),
        (["sweeps/quickstart.py"], {"IMBVLM_ENV": "/nowhere"}, "has no bin/ray"),
        (["sweeps/none.py"], {}, "sweeps/none.py is not there"),
        (["sweeps/quickstart.py"], {}, "this runs under sbatch"),
    ],
)
def test_slurm_names_what_is_missing_before_it_starts_anything(
    arguments: list[str], settings: dict[str, str | None], message: str
) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "IMBVLM_ENV": str(Path(sys.executable).parents[1]),
    }
    environment = {key: value for key, value in {**environment, **settings}.items() if value is not None}
    command = ["bash", str(ROOT / "cluster" / "slurm.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30)
    assert done.returncode != 0
    assert message in done.stderr
