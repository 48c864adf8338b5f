"""Extraction: what is missing is computed once, bad images are left out, what can't be held is refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_images import extraction_in_this_process
from towers import write_tower

from imbvlm.base import interrupts
from imbvlm.base.errors import ImbvlmError, StorageError
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.decoding import decode
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import LazyRows
from imbvlm.features.extraction import compute_here, ensure_features
from imbvlm.features.extraction_plan import plan_part, resolve_compile, store_parts
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.image_blocks import ImageBlock, load_block
from imbvlm.features.store_sizes import check_disk_space, pending_images, store_bytes, trial_bytes
from imbvlm.features.trial_data import TrialData
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder

NUM_TRAIN, NUM_VAL, SIZE = 21, 6, 32
ALL = frozenset({"tokens", "pooled", "image_embedding"})
SPLITS = ("train", "val")
# As the tower computes it on any machine.
EXACT = {"precision": "float32", "computed_in": "float32"}


def picture(number: int) -> Image.Image:
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8))


def trial(folder: Path, tower: str, features: dict | None = None, **data: Any) -> TrialConfig:
    tree = {
        "data": {"manifest": str(folder / "data" / "manifest.parquet"), **data},
        "encoder": {"name": tower},
        "features": features or {},
        "method": "zero_shot",
    }
    return TrialConfig.from_tree(tree)


def make_data(folder: Path, broken: tuple[int, ...] = ()) -> Manifest:
    """Training images of labels 0, 1, 2, ... in turn, then validation images; class 6 has images 6, 13 and 20."""
    (folder / "data").mkdir()
    uris = []
    for number in range(NUM_TRAIN + NUM_VAL):
        uris.append(str(folder / "data" / f"{number}.png"))
        picture(number).save(uris[-1])
        if number in broken:
            content = Path(uris[-1]).read_bytes()
            Path(uris[-1]).write_bytes(content[: len(content) // 2])
    splits = ["train"] * NUM_TRAIN + ["val"] * NUM_VAL
    labels = [number % 7 for number in range(NUM_TRAIN)] + list(range(NUM_VAL))
    table = pa.table({"uri": uris, "label": labels, "split": splits})
    manifest = Manifest.build(table, [f"class {label}" for label in range(7)], "pictures")
    manifest.write(str(folder / "data" / "manifest.parquet"))
    return manifest


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tower(tmp_path_factory.mktemp("tower"), "vit")


@pytest.fixture
def without_ray() -> Iterator[None]:
    """For tests of what stands in the store afterwards: a pass of real Ray takes seconds, and others have it."""
    with extraction_in_this_process():
        yield


def extract(
    folder: Path,
    config: TrialConfig,
    manifest: Manifest,
    outputs: frozenset[str] | set[str] = ALL,
    splits: tuple[str, ...] = SPLITS,
) -> tuple[FeatureSet, list[str]]:
    said: list[str] = []
    found = ensure_features(config, manifest, str(folder / "features"), frozenset(outputs), splits, report=said.append)
    return found, said


def shard_times(features: FeatureSet) -> dict[str, int]:
    files = Path(features.folder).rglob("*.arrow")
    return {str(path): path.stat().st_mtime_ns for path in files}


# -------------------------------------------------------------------------------------------- without Ray


def test_loading_gives_the_crops_of_every_view(tmp_path: Path) -> None:
    manifest = make_data(tmp_path, broken=(2,))
    preprocess = Preprocess(SIZE, resize=8 / 7)
    rows, views = np.arange(1, 4), np.ones((3, 2), np.bool_)
    images = LazyRows(manifest.table, rows)
    unknown = np.zeros((3, 16), np.uint8), np.zeros(3, np.bool_)
    block = ImageBlock(
        str(tmp_path / "store"), 0, ("pooled",), "train", rows, views, *unknown, preprocess, False, images
    )
    assert block.describe() == "train images 1 to 3"
    loaded = load_block(block)
    assert loaded.images.shape == (6, 3, SIZE, SIZE)
    assert loaded.reasons == [None, "truncated", None]
    data = Path(manifest.table.column("uri")[3].as_py()).read_bytes()
    content = hashlib.blake2b(data, digest_size=16).digest()
    assert loaded.contents[2].tobytes() == content
    assert np.array_equal(loaded.images[4], preprocess.apply(decode(data), 0))
    assert np.array_equal(loaded.images[5], preprocess.apply(decode(data), 1, int.from_bytes(content)))
    assert not loaded.images[2:4].any()
    with pytest.raises(
        ImbvlmError, match=r"train image .*2\.png can't be used: truncated. data.on_bad_image is strict"
    ):
        load_block(replace(block, is_strict=True))


def test_planned_bytes_need_no_weights_and_count_views_of_training_only(tmp_path: Path, tower: str) -> None:
    manifest = make_data(tmp_path)
    config = trial(tmp_path, tower, {"num_views": 3})
    info = describe_encoder(config.encoder)
    plan = store_bytes(config, info, manifest, frozenset({"tokens", "pooled"}), SPLITS)
    images = 3 * NUM_TRAIN + NUM_VAL
    assert plan == {"tokens": images * 17 * 32 * 2, "pooled": images * 32 * 2}
    embedded = Manifest.read("embedded:fashion_mnist_lt")
    large = trial(tmp_path, "openai_vit_l14")
    info = describe_encoder(large.encoder)
    assert store_bytes(large, info, embedded, frozenset({"tokens"}), ("train",)) == {"tokens": 2480 * 257 * 1024 * 2}


def test_a_disk_that_is_too_small_is_refused_with_the_options(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_data(tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(ImbvlmError) as caught:
        extract(tmp_path, trial(tmp_path, tower, {"num_views": 2}), manifest)
    for word in (
        "57.6 kB more",
        "tokens",
        "features.num_views (2)",
        "features.precision (float16)",
        "image_size",
        "set features.int8_tokens: true (a half of the tokens' bytes)",
        "set encoder.token_pooling: 2 (a quarter of them)",
        "decoder",
    ):
        assert word in str(caught.value)
    with pytest.raises(ImbvlmError) as caught:
        extract(tmp_path, trial(tmp_path, tower), manifest, {"pooled"})
    assert "decoder" not in str(caught.value)
    assert "int8" not in str(caught.value)


@pytest.mark.usefixtures("without_ray")
def test_before_the_first_pass_the_disk_must_hold_all_towers_and_splits_together(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first tower fills the disk, or the whole search runs before the test split does."""
    manifest, outputs, root = make_data(tmp_path), frozenset({"pooled"}), str(tmp_path / "features")
    towers = [trial(tmp_path, tower, {"precision": precision}) for precision in ("float16", "float32")]
    info = describe_encoder(towers[0].encoder)
    sizes = [store_bytes(config, info, manifest, outputs, SPLITS)["pooled"] for config in towers]
    usage = namedtuple("usage", "free")
    free = [1.1 * sizes[1]]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free[0]))
    for one in towers:
        check_disk_space([one], manifest, root, outputs)
    with pytest.raises(ImbvlmError, match=r"need 5.2 kB more \(pooled 5.2 kB\).*Reduce .*the number of encoders \(2\)"):
        check_disk_space(towers, manifest, root, outputs)
    # Of the first the training split is there, as after the search.
    free[0] = 1e9
    extract(tmp_path, towers[0], manifest, outputs, ("train",))
    left = sum(sizes) - store_bytes(towers[0], info, manifest, outputs, ("train",))["pooled"]
    free[0] = 1.03 * left
    check_disk_space(towers, manifest, root, outputs)
    free[0] = 1.01 * left
    with pytest.raises(ImbvlmError, match=r"need [\d.]+ kB more"):
        check_disk_space(towers, manifest, root, outputs)


def test_what_a_refit_reads_of_all_splits_must_fit_the_copies_before_the_first_pass(tmp_path: Path, tower: str) -> None:
    """The test split's rows come on top of the search's; a shared folder is read in place where they don't fit."""
    manifest, outputs = make_data(tmp_path), frozenset({"pooled"})
    config = trial(tmp_path, tower)
    most = trial_bytes(config, describe_encoder(config.encoder), manifest, outputs)
    assert most == 32 * 2 * (NUM_TRAIN + NUM_VAL)
    root, small = "s3://no-bucket/features", FeatureCacheConfig(folder=str(tmp_path), max_gigabytes=(most - 1) / 1e9)
    with pytest.raises(ImbvlmError, match=r"what a trial of .* reads of s3://.* has .*feature_copies.max_gigabytes"):
        check_disk_space([config], manifest, root, outputs, cache=small)
    check_disk_space([config], manifest, root, outputs, cache=small.model_copy(update={"max_gigabytes": most / 1e9}))
    shared = small.model_copy(update={"of_shared_folders": True})
    check_disk_space([config], manifest, str(tmp_path / "features"), outputs, cache=shared)


@pytest.mark.usefixtures("without_ray")
def test_trials_on_several_machines_are_told_to_copy_a_shared_folder(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, config = make_data(tmp_path), trial(tmp_path, tower)
    assert extract(tmp_path, config, manifest, {"pooled"})[0].cache is None
    monkeypatch.setattr("imbvlm.features.extraction.has_many_machines", lambda: True)
    monkeypatch.setattr("imbvlm.features.extraction_plan.has_many_machines", lambda: True)
    assert extract(tmp_path, config, manifest, {"pooled"})[0].cache == FeatureCacheConfig()


def test_a_split_that_the_data_has_not_is_named(tmp_path: Path, tower: str) -> None:
    manifest = make_data(tmp_path)
    with pytest.raises(ImbvlmError, match="has no test rows; it has train, val"):
        extract(tmp_path, trial(tmp_path, tower), manifest, splits=("test",))


# ------------------------------------------------------------------------------------------------ with Ray


@pytest.fixture
def by_workers(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images would be computed by this process, which has started the cluster."""
    monkeypatch.setattr("imbvlm.features.extraction.SECONDS_HERE", 0.0)


@pytest.mark.ray
@pytest.mark.usefixtures("by_workers")
def test_stored_numbers_are_the_towers(tmp_path: Path, tower: str) -> None:
    manifest, config = make_data(tmp_path), trial(tmp_path, tower, EXACT | {"num_views": 2})
    features, said = extract(tmp_path, config, manifest)
    encoder = create_encoder(config.encoder, config.eval)
    assert features.info == encoder.info
    uris = manifest.table.column("uri").to_pylist()
    for split, row, view in [("train", 0, 0), ("train", NUM_TRAIN - 1, 1), ("val", 2, 0)]:
        data = Path(uris[row + (NUM_TRAIN if split == "val" else 0)]).read_bytes()
        content = int.from_bytes(hashlib.blake2b(data, digest_size=16).digest())
        crop = encoder.preprocess.apply(decode(data), view, content)
        expected = encoder.forward_images(torch.from_numpy(crop)[None])
        store = features.store(split)
        for output in ALL:
            got = store.gather(output, np.array([row]), np.array([view]))
            torch.testing.assert_close(got, getattr(expected, output), atol=1e-5, rtol=1e-5)
    assert features.store("val").num_views == 1
    data = TrialData.open(config, features)
    assert torch.equal(data.encoder_tensors["projection"], encoder.image_tower.proj)
    assert torch.equal(data.encoder_tensors["final_norm.weight"], encoder.image_tower.ln_post.weight)
    assert data.class_embeddings is not None
    assert data.class_embeddings.shape == (7, encoder.info.embedding_width)
    assert f"features: {2 * NUM_TRAIN + NUM_VAL} images to compute" in said
    assert any(f"{2 * NUM_TRAIN + NUM_VAL} of {2 * NUM_TRAIN + NUM_VAL} images" in line for line in said)


@pytest.mark.parametrize(("alone", "seconds", "here"), [(True, 10.0, True), (True, 0.0, False), (False, 10.0, False)])
def test_a_pass_of_seconds_on_a_machine_of_ones_own_needs_no_workers(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch, alone: bool, seconds: float, here: bool
) -> None:
    """Those of Ray start for longer; and a cluster's machines have others' work, which its scheduler knows of."""
    monkeypatch.setattr("imbvlm.features.extraction.owns_machine", lambda: alone)
    monkeypatch.setattr("imbvlm.features.extraction.SECONDS_HERE", seconds)
    monkeypatch.setattr("imbvlm.features.extraction.ray_session", Mock(side_effect=ConnectionError("Ray is asked for")))
    manifest = make_data(tmp_path)
    with nullcontext() if here else pytest.raises(ConnectionError, match="Ray is asked for"):
        features, _ = extract(tmp_path, trial(tmp_path, tower), manifest, {"pooled"}, splits=("val",))
        assert len(features.store("val").gather("pooled", np.arange(NUM_VAL))) == NUM_VAL


@pytest.mark.parametrize("is_late", [False, True])
def test_blocks_that_this_process_has_no_time_for_are_left_to_workers(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """Large photos behind a small encoder: a machine with many cores loads them in as many processes."""
    monkeypatch.setattr("imbvlm.features.extraction.LOADING_THREADS", 1)
    manifest, config = make_data(tmp_path), trial(tmp_path, tower)
    encoder = create_encoder(config.encoder, config.eval)
    (part,) = store_parts(config, encoder.preprocess, ("train",), ())
    pending = plan_part(config, manifest, str(tmp_path / "features"), ("pooled",), encoder, part)
    blocks = deque(pending.blocks(0, is_strict=False))
    num_blocks, max_seconds = len(blocks), 1.0 if is_late else 60.0
    summaries = compute_here(encoder, blocks, max_seconds=max_seconds)
    done = [next(summaries)]
    if is_late:
        time.sleep(max_seconds)
    done += summaries
    # The first block and the one that is loaded ahead of it are computed.
    assert len(done) == (2 if is_late else num_blocks)
    assert sum(len(summary.rows) for summary in done) + sum(len(block.rows) for block in blocks) == NUM_TRAIN
    assert len(pending.store.index("pooled").keys) == sum(summary.num_computed for summary in done)


@pytest.mark.parametrize(
    ("compile_setting", "num_gpus", "kind", "num_images", "compiles"),
    [
        ("auto", 0, "image_only_vit", 10**12, False),
        ("auto", 1, "image_only_vit", 10**12, True),
        ("auto", 1, "image_only_vit", 2000, False),
        ("auto", 10**9, "image_only_vit", 10**12, False),
        ("auto", 1, "vit", 10**12, False),
        (True, 0, "vit", 1, True),
        (False, 1, "image_only_vit", 10**12, False),
    ],
)
def test_an_encoder_is_compiled_for_long_passes_of_timms_transformers_on_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compile_setting: bool | str,
    num_gpus: int,
    kind: str,
    num_images: int,
    compiles: bool,
) -> None:
    monkeypatch.setattr("imbvlm.features.extraction_plan.num_gpus", lambda: num_gpus)
    config = trial(tmp_path, write_tower(tmp_path / "tower", kind), {"compile": compile_setting})
    assert resolve_compile(config, create_encoder(config.encoder, config.eval), num_images) == compiles


@pytest.mark.usefixtures("without_ray")
def test_compiled_features_are_those_of_the_same_store(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    manifest, outputs = make_data(tmp_path), {"pooled"}
    plain, _ = extract(tmp_path, trial(tmp_path, tower, EXACT), manifest, outputs, splits=("val",))
    expected = plain.store("val").gather("pooled", np.arange(NUM_VAL))
    shutil.rmtree(tmp_path / "features")
    compiled, lines = extract(
        tmp_path, trial(tmp_path, tower, {**EXACT, "compile": True}), manifest, outputs, splits=("val",)
    )
    assert compiled.folder == plain.folder
    torch.testing.assert_close(compiled.store("val").gather("pooled", np.arange(NUM_VAL)), expected)
    assert compiled.notice == ""
    assert not any("torch.compile" in line for line in lines)
    torch._dynamo.reset()


@pytest.mark.usefixtures("without_ray")
def test_where_an_encoder_cannot_be_compiled_the_pass_goes_on_and_says_so(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: Mock(side_effect=RuntimeError("no C compiler")))
    config = trial(tmp_path, tower, {**EXACT, "compile": True})
    features, lines = extract(tmp_path, config, make_data(tmp_path), {"pooled"}, splits=("val",))
    sentence = f"the encoder {tower} computes without torch.compile: RuntimeError: no C compiler"
    assert features.notice == sentence
    assert lines[-1].endswith(f"; {sentence}")
    assert len(features.store("val").gather("pooled", np.arange(NUM_VAL))) == NUM_VAL


@pytest.mark.usefixtures("without_ray")
def test_a_tower_that_computes_in_bfloat16_has_a_store_of_its_own(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_data(tmp_path)
    halved = trial(tmp_path, tower, {"computed_in": "bfloat16", "precision": "float32"})
    features, _ = extract(tmp_path, halved, manifest, {"pooled"}, splits=("val",))
    encoder = create_encoder(halved.encoder, halved.eval)
    pixels = decode(Path(manifest.table.column("uri")[NUM_TRAIN + 2].as_py()).read_bytes())
    crop = torch.from_numpy(encoder.preprocess.apply(pixels, 0, 2))[None]
    whole, expected = encoder.forward_images(crop).pooled, encoder.compute_in("bfloat16").forward_images(crop).pooled
    got = features.store("val").gather("pooled", np.array([2]), np.array([0]))
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=1e-2)
    assert not torch.equal(got, whole)
    plain = trial(tmp_path, tower, EXACT)
    other, said = extract(tmp_path, plain, manifest, {"pooled"}, splits=("val",))
    assert other.folder != features.folder
    assert f"features: {NUM_VAL} images to compute" in said
    # The default precision on a CPU, with units for it and without.
    for has_them, same in ((True, features), (False, other)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_them=has_them: has_them)
        by_itself, said = extract(
            tmp_path, trial(tmp_path, tower, {"precision": "float32"}), manifest, {"pooled"}, splits=("val",)
        )
        assert by_itself.folder == same.folder
        assert not said


def test_a_running_cluster_decides_what_the_tower_computes_in(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this process hadn't joined it: a sweep there would compute all of it again."""
    manifest, root, outputs = make_data(tmp_path), str(tmp_path / "features"), frozenset({"pooled"})
    exact = trial(tmp_path, tower, {"computed_in": "float32"})
    with extraction_in_this_process():
        extract(tmp_path, exact, manifest, outputs, splits=("val",))
    is_connected = False

    @contextmanager
    def connected() -> Iterator[None]:
        nonlocal is_connected
        is_connected = True
        yield
        is_connected = False

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr("imbvlm.ray_runtime.connection.owns_machine", lambda: False)
    monkeypatch.setattr("imbvlm.ray_runtime.connection.ray_session", connected)
    monkeypatch.setattr("imbvlm.features.extraction.has_many_machines", lambda: is_connected)
    monkeypatch.setattr("imbvlm.features.extraction_plan.has_many_machines", lambda: is_connected)
    assert pending_images(trial(tmp_path, tower), manifest, root, outputs, ("val",)) == (0, 0, NUM_VAL)
    assert extract(tmp_path, trial(tmp_path, tower), manifest, outputs, splits=("val",))[1] == []


@pytest.mark.usefixtures("without_ray")
def test_a_ctrl_c_of_which_a_library_makes_nothing_ends_the_pass(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a `__del__`, of which Python ignores what is raised."""
    told: list[int] = []

    def add(_: object, num_images: int, num_computed: int) -> None:
        told.append(num_images)
        if len(told) == 1:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("imbvlm.features.extraction._Progress.add", add)
    with interrupts.handled(), pytest.raises(KeyboardInterrupt):
        extract(tmp_path, trial(tmp_path, tower), make_data(tmp_path), {"pooled"})
    assert len(told) == 1


@pytest.mark.usefixtures("without_ray")
def test_only_what_is_missing_or_damaged_is_computed(tmp_path: Path, tower: str) -> None:
    manifest, config = make_data(tmp_path), trial(tmp_path, tower)
    features, _ = extract(tmp_path, config, manifest, {"pooled"})
    first = shard_times(features)
    again, said = extract(tmp_path, config, manifest, {"pooled"})
    assert (again, said) == (features, [])
    assert shard_times(again) == first

    store = features.store("train")
    damaged, gone = (str(tmp_path / "features" / path) for path in store.places["pooled"].paths[1:3])
    before = store.gather("pooled", np.arange(NUM_TRAIN)).clone()
    content = bytearray(Path(damaged).read_bytes())
    content[len(content) // 2] ^= 255
    Path(damaged).write_bytes(content)
    os.unlink(gone)
    _, said = extract(tmp_path, config, manifest, {"pooled"})
    changed = {path for path, at in shard_times(features).items() if at != first.get(path)}
    assert changed == {damaged, gone}
    after = features.store("train").gather("pooled", np.arange(NUM_TRAIN))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)

    kept = shard_times(features)
    more, _ = extract(tmp_path, config, manifest, {"pooled", "tokens"})
    assert more.folder == features.folder
    assert kept.items() <= shard_times(more).items()
    assert len(more.store("train").gather("tokens", np.arange(NUM_TRAIN))) == NUM_TRAIN


def features_of(features: FeatureSet, split: str = "train") -> np.ndarray:
    store = features.store(split)
    entries = np.indices((store.num_rows, store.num_views)).reshape(2, -1)
    return store.gather("pooled", *entries).numpy().reshape(store.num_rows, store.num_views, -1)


def write_manifest(folder: Path, uris: list[str], labels: list[int], splits: list[str]) -> Manifest:
    table = pa.table({"uri": uris, "label": labels, "split": splits})
    manifest = Manifest.build(table, [f"class {label}" for label in range(7)], "pictures")
    manifest.write(str(folder / "data" / "manifest.parquet"))
    return manifest


@pytest.mark.usefixtures("without_ray")
def test_images_are_computed_once_whatever_their_name_label_split_folder_and_order(tmp_path: Path, tower: str) -> None:
    manifest, config = make_data(tmp_path), trial(tmp_path, tower, EXACT | {"num_views": 2})
    first, lines = extract(tmp_path, config, manifest, {"pooled"})
    assert first.num_computed == 2 * NUM_TRAIN + NUM_VAL
    old, data = manifest.table.column("uri").to_pylist(), tmp_path / "data"
    # Renamed, copied, and moved to another folder with all that remains; the order and labels are others, too.
    renamed, copied = str(data / "renamed.png"), str(data / "copied.png")
    os.rename(old[0], renamed)
    shutil.copy(old[1], copied)
    shutil.copytree(data, tmp_path / "elsewhere")
    new = str(data / "new.png")
    picture(99).save(new)
    moved = [str(tmp_path / "elsewhere" / Path(uri).name) for uri in old[2:NUM_TRAIN]]
    uris = [*reversed(moved), renamed, copied, new, old[1], *old[NUM_TRAIN:]]
    labels = [number % 7 for number in range(len(uris) - NUM_VAL)] + [6] * NUM_VAL
    grown = write_manifest(tmp_path, uris, labels, ["train"] * (len(uris) - NUM_VAL) + ["val"] * NUM_VAL)
    again, lines = extract(tmp_path, config, grown, {"pooled"})
    assert again.num_computed == 2, "two views of one image"
    # One training image and the validation images have kept their files; others are read, to see what they are.
    assert f"features: {2 + NUM_VAL} images known, {2 * (len(uris) - NUM_VAL - 1)} images to compute" in lines
    same_rows = [*reversed(range(2, NUM_TRAIN)), 0, 1]
    before, after = features_of(first), features_of(again)
    assert np.array_equal(after[: len(same_rows)], before[same_rows]), (
        "random crops are those of the image, not of its row"
    )
    assert np.array_equal(after[-1], before[1])
    assert np.array_equal(features_of(again, "val"), features_of(first, "val"))
    third, lines = extract(tmp_path, config, grown, {"pooled"})
    assert (third.num_computed, lines) == (0, []), "now all files are known"
    # Another share for tests, and training images that become validation: their random crops are there already.
    splits = ["test"] * 3 + ["val"] * 3 + ["train"] * (len(uris) - 6)
    other = write_manifest(tmp_path, uris, [number % 7 for number in range(len(uris))], splits)
    fourth, lines = extract(tmp_path, config, other, {"pooled"}, ("train", "val", "test"))
    assert f"features: {2 * len(uris) - 6 - NUM_VAL} images known, {NUM_VAL} images to compute" in lines
    assert fourth.num_computed == NUM_VAL, "random crops of what was validation"


@pytest.mark.usefixtures("without_ray")
def test_a_file_that_changes_is_computed_again_and_its_old_content_stays(tmp_path: Path, tower: str) -> None:
    manifest, config = make_data(tmp_path), trial(tmp_path, tower, EXACT)
    first, _ = extract(tmp_path, config, manifest, {"pooled"})
    changed = manifest.table.column("uri")[4].as_py()
    shutil.copy(changed, tmp_path / "kept.png")
    picture(77).save(changed)
    second, _ = extract(tmp_path, config, manifest, {"pooled"})
    assert second.num_computed == 1
    different = (features_of(first) != features_of(second)).any(axis=(1, 2))
    assert np.flatnonzero(different).tolist() == [4]
    shutil.copy(tmp_path / "kept.png", changed)
    third, _ = extract(tmp_path, config, manifest, {"pooled"})
    assert third.num_computed == 0
    assert third.splits == first.splits


def test_a_block_computes_nothing_that_another_sweep_has_finished_meanwhile(tmp_path: Path, tower: str) -> None:
    """Both were planned before either had computed anything, the second of other rows and of more outputs."""
    manifest, config = make_data(tmp_path), trial(tmp_path, tower)
    encoder, root = create_encoder(config.encoder, config.eval), str(tmp_path / "features")
    (part,) = store_parts(config, encoder.preprocess, ("train",), ())
    some = manifest.take(np.arange(5, NUM_TRAIN))
    plans = [
        plan_part(config, rows, root, outputs, encoder, part)
        for rows, outputs in ((manifest, ("pooled",)), (some, ("pooled",)), (some, ("pooled", "tokens")))
    ]
    computed = []
    for plan in plans:
        blocks = deque(plan.blocks(0, is_strict=False))
        computed.append(sum(summary.num_computed for summary in compute_here(encoder, blocks, max_seconds=60)))
    assert computed == [NUM_TRAIN, 0, len(some)]
    index = plans[0].store.index("tokens")
    assert len(index.keys) == len(some)


@pytest.mark.usefixtures("without_ray")
def test_copies_within_a_split_are_computed_once(tmp_path: Path, tower: str) -> None:
    make_data(tmp_path)
    paths = [str(tmp_path / "data" / f"{number}.png") for number in (0, 1, 2)]
    for number in range(40):
        shutil.copy(paths[number % 3], tmp_path / "data" / f"copy{number}.png")
    uris = [str(tmp_path / "data" / f"copy{number}.png") for number in range(40)]
    manifest = write_manifest(tmp_path, uris, [number % 3 for number in range(40)], ["train"] * 40)
    features, _ = extract(tmp_path, trial(tmp_path, tower), manifest, {"pooled"}, ("train",))
    values = features_of(features)
    assert all(np.array_equal(values[number], values[number % 3]) for number in range(40))
    assert len(np.unique(values[:, 0], axis=0)) == 3
    # Blocks that are loaded at the same time may both read a copy.
    assert features.num_computed <= 3 * 8


@pytest.mark.usefixtures("without_ray")
def test_a_store_that_has_moved_is_as_good_and_a_read_only_one_is_read(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, config = make_data(tmp_path), trial(tmp_path, tower, EXACT)
    first, _ = extract(tmp_path, config, manifest, {"pooled"})
    expected = features_of(first)
    shutil.copytree(tmp_path / "features", tmp_path / "moved" / "features")
    shutil.rmtree(tmp_path / "features")
    root = str(tmp_path / "moved" / "features")

    def refuse(uri: str, data: bytes) -> None:
        raise StorageError(f"can't write {uri}: read-only file system")

    # Permissions don't hold for root.
    monkeypatch.setattr("imbvlm.base.storage.write_bytes", refuse)
    moved = ensure_features(config, manifest, root, frozenset({"pooled"}), SPLITS, report=lambda text: None)
    assert moved.num_computed == 0
    assert np.array_equal(features_of(moved), expected)


@pytest.mark.usefixtures("without_ray")
def test_bad_images_cost_no_other_row(tmp_path: Path, tower: str) -> None:
    manifest = make_data(tmp_path, broken=(3, 6, 13))
    os.unlink(tmp_path / "data" / f"{NUM_TRAIN}.png")
    config = trial(tmp_path, tower)
    features, said = extract(tmp_path, config, manifest)
    train, val = features.store("train"), features.store("val")
    assert [entry.row for entry in train.quarantine] == [3, 6, 13]
    assert {entry.reason for entry in train.quarantine} == {"truncated"}
    assert val.quarantine == ((0, "file not found"),)
    assert any("3 of 21 train images are left out, such as" in line and "3.png: truncated" in line for line in said)
    data = TrialData.open(config, features)
    assert data.class_stats.counts.tolist() == [3, 3, 3, 2, 3, 3, 1]
    assert data.class_stats.split_counts.tolist() == [3] * 7
    assert len(data.val) == NUM_VAL - 1
    # Limits stop the run before training, with names.
    with pytest.raises(ImbvlmError, match=r"3 images of train can't be used, above data.max_bad_images 2: .*3\.png"):
        extract(tmp_path, trial(tmp_path, tower, max_bad_images=2), manifest)
    with pytest.raises(ImbvlmError, match=r"14.3% of 21, above data.max_bad_share 0.1"):
        extract(tmp_path, trial(tmp_path, tower, max_bad_share=0.1), manifest)
    # The store was filled under quarantine; strict doesn't take it, nor fills one of its own.
    strict = trial(tmp_path, tower, on_bad_image="strict")
    with pytest.raises(ImbvlmError, match=r"3\.png can't be used: truncated"):
        extract(tmp_path, strict, manifest)
    shutil.rmtree(tmp_path / "features")
    with pytest.raises(ImbvlmError, match=r"\.png can't be used: (truncated|file not found)"):
        extract(tmp_path, strict, manifest)


@pytest.mark.usefixtures("without_ray")
def test_a_class_without_a_usable_image_stops_the_run(tmp_path: Path, tower: str) -> None:
    manifest = make_data(tmp_path, broken=(6, 13, 20))
    with pytest.raises(ImbvlmError, match=r"1 class would lose every training image: 'class 6' \(3\)"):
        extract(tmp_path, trial(tmp_path, tower), manifest)


@pytest.mark.ray
@pytest.mark.usefixtures("by_workers")
def test_a_pass_over_files_that_are_gone_ends_long_before_its_end(tmp_path: Path, tower: str) -> None:
    """A wrong folder or a lost mount would else cost the whole night."""
    manifest, said = make_data(tmp_path), []
    for path in (tmp_path / "data").glob("*.png"):
        path.unlink()
    config, root = trial(tmp_path, tower), str(tmp_path / "features")
    with pytest.raises(ImbvlmError, match=r"above data.max_bad_share 0.5: .*\.png \(file not found\)"):
        ensure_features(config, manifest, root, ALL, SPLITS, report=said.append)
    assert any(" of 27 images" in line for line in said)
    assert not any("27 of 27 images" in line for line in said)


@pytest.mark.usefixtures("without_ray")
def test_small_things_beside_the_shards_are_made_again(tmp_path: Path, tower: str) -> None:
    manifest, config = make_data(tmp_path), trial(tmp_path, tower)
    features, _ = extract(tmp_path, config, manifest)
    text, norms = Path(features.class_embeddings), Path(features.folder) / "tower.safetensors"
    # Copies: what safetensors loads is a map of the file that is damaged next.
    expected, tensors = safetensors.torch.load(text.read_bytes()), safetensors.torch.load(norms.read_bytes())
    for path in (text, norms):
        content = bytearray(path.read_bytes())
        content[-1] ^= 255
        path.write_bytes(content)
    again, said = extract(tmp_path, config, manifest)
    assert again == features
    torch.testing.assert_close(load_file(text)["class_embeddings"], expected["class_embeddings"])
    assert all(torch.equal(load_file(norms)[name], tensor) for name, tensor in tensors.items())
    assert [line for line in said if line.startswith("text features") and line.endswith(" names, 1 sentence each")]
    other = config.with_overrides({"prompts.templates": ["a drawing of {}"]})
    assert extract(tmp_path, other, manifest)[0].class_embeddings != features.class_embeddings


@pytest.mark.usefixtures("without_ray")
def test_texts_of_classes_are_encoded_anew_where_their_file_changes(tmp_path: Path, tower: str) -> None:
    manifest, path, stored = make_data(tmp_path), tmp_path / "texts.json", []
    name = manifest.class_names[0]
    config = trial(tmp_path, tower).with_overrides({"prompts.texts": str(path)})
    for sentences in (["a photo of a thing."], ["another.", "sentence " * 200]):
        path.write_text(json.dumps({name: sentences}))
        features, lines = extract(tmp_path, config, manifest)
        stored.append(load_file(features.class_embeddings)["class_embeddings"].clone())
    assert any(line.startswith("1 of 2 texts are longer than the text tower reads") for line in lines)
    assert any(line.endswith("1 sentence each; 2 texts of 1 class") for line in lines)
    plain = load_file(extract(tmp_path, trial(tmp_path, tower), manifest)[0].class_embeddings)["class_embeddings"]
    for tensor in stored:
        assert [not torch.equal(row, other) for row, other in zip(tensor, plain, strict=True)] == [
            index == 0 for index in range(len(plain))
        ]
    assert not torch.equal(*stored)


SCRIPT = """
import sys, ray
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import LazyRows
from imbvlm.features.extraction import ensure_features

if __name__ == "__main__":
    config = TrialConfig.from_yaml(sys.argv[1])
    if sys.argv[3] == "ray":
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ensure_features(config, Manifest.read(config.data.manifest), sys.argv[2], frozenset({"pooled", "tokens"}),
                    ("train",), report=lambda text: print(text, flush=True))
    print("ray started:", ray.is_initialized())
"""


def _start(folder: Path, config: TrialConfig, ray: str) -> subprocess.Popen:
    config.to_yaml(folder / "trial.yaml")
    (folder / "script.py").write_text(SCRIPT)
    arguments = [sys.executable, "script.py", "trial.yaml", str(folder / "features"), ray]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    # Other tests' cluster, which it would join and leave at work.
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_a_killed_pass_goes_on_and_a_complete_one_starts_no_ray(tmp_path: Path) -> None:
    config = TrialConfig.from_tree(
        {
            "data": {"manifest": "embedded:fashion_mnist_lt"},
            "encoder": {"name": "tinylit_lite0", "image_size": 64},
            "method": "zero_shot",
        }
    )
    process = _start(tmp_path, config, "ray")
    while "of 2,480 images" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)
    store = FeatureStore.open(str(next((tmp_path / "features").glob("*/store.json")).parent))
    kept = {path: path.stat().st_mtime_ns for path in Path(store.folder).glob("*/*.arrow")}
    assert kept
    left = 2480 - len(store.index("tokens").keys)
    assert left
    output = _start(tmp_path, config, "ray").communicate(timeout=150)[0]
    assert f"{left:,} images to compute" in output
    assert len(store.index("tokens").keys) == len(store.index("pooled").keys) == 2480
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert "ray started: False" in _start(tmp_path, config, "no").communicate(timeout=150)[0]
