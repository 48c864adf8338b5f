"""Images streamed into training: every row once and in order, over any number of workers, always the same."""

import io
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.image_stream import ImageBatch, StreamPlan, load_batch, stream_in_threads
from imbvlm.data.images.augmentation import Augmentation, growing_crop
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.longtail.class_sampling import batches, epoch_plan

NUM_ROWS, SIDE = 103, 16


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((48, 40), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> str:
    path = str(tmp_path_factory.mktemp("streamed") / "manifest.parquet")
    manifest.write(path)
    return path


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    data = [picture(number) for number in range(NUM_ROWS)]
    data[7] = b"<html>"
    labels = np.arange(NUM_ROWS) % 5
    table = pa.table({"bytes": data, "label": labels, "split": ["train"] * NUM_ROWS})
    return Manifest.build(table, list("abcde"), "streamed")


def plan_for(
    manifest: Manifest,
    rank: int = 0,
    world_size: int = 1,
    epoch: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    **options: Any,
) -> StreamPlan:
    drawn = epoch_plan(manifest.labels, 5, "class_balanced", seed, epoch, 4)
    augmentation = options.pop("augmentation", Augmentation(jitter=0.2, rand_ops=1))
    return StreamPlan(
        drawn.rows,
        batches(drawn, batch_size, rank, world_size),
        Preprocess(SIDE, 1.0),
        augmentation,
        seed,
        epoch,
        **options,
    )


def read(manifest: Manifest, plan: StreamPlan) -> list[ImageBatch]:
    """Without Ray: what the tasks do."""
    return [load_batch(block) for block in plan.blocks(manifest)]


def join(loaded: list[ImageBatch]) -> ImageBatch:
    images, rows, ok = (np.concatenate(parts) for parts in list(zip(*loaded, strict=True))[:3])
    return ImageBatch(images, rows, ok, tuple(reason for batch in loaded for reason in batch.reasons))


def test_planning_blocks_copies_no_embedded_image_and_a_block_takes_its_own_along() -> None:
    size, number = 100_000, 80
    contents = [bytes([row]) * size for row in range(number)]
    table = pa.table({"bytes": contents, "label": np.zeros(number, int), "split": ["test"] * 8 + ["train"] * 72})
    made = Manifest.build(table, ["a"], "large")
    rows = np.random.default_rng(0).permutation(72)
    before = pa.total_allocated_bytes()
    train = made.split("train")
    batches_of_8 = [np.arange(start, start + 8) for start in range(0, 72, 8)]
    plan = StreamPlan(rows, batches_of_8, Preprocess(SIDE, 1.0), None, 0, 0)
    blocks = plan.blocks(train)
    assert pa.total_allocated_bytes() - before < size
    sent = pickle.dumps(blocks[2])
    assert len(sent) < 9 * size
    uris, images = pickle.loads(sent).images.read()
    assert images == [contents[8 + row] for row in rows[16:24]]
    assert uris == [None] * 8


def test_rows_come_in_the_plans_order_and_bad_ones_are_marked(manifest: Manifest) -> None:
    plan = plan_for(manifest)
    joined = join(read(manifest, plan))
    assert joined.rows.tolist() == plan.rows.tolist()
    assert (joined.ok == (plan.rows != 7)).all()
    assert not joined.images[~joined.ok].any()
    assert joined.images.shape == (NUM_ROWS, 3, SIDE, SIDE)
    assert {reason for reason in joined.reasons if reason} == {"not an image (starts with <html>...)"}


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_are_the_same_pixels_over_any_number_of_workers(manifest: Manifest, world_size: int) -> None:
    alone = read(manifest, plan_for(manifest))
    shares = [read(manifest, plan_for(manifest, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        assert sum(len(part.rows) for part in parts) == len(whole.rows)
        for rank, part in enumerate(parts):
            assert (part.rows == whole.rows[rank::world_size]).all()
            assert (part.images == whole.images[rank::world_size]).all()


def test_an_epoch_is_the_same_again_and_others_differ(manifest: Manifest) -> None:
    first, again = (join(read(manifest, plan_for(manifest))).images for _ in range(2))
    assert (first == again).all()
    for other in (plan_for(manifest, epoch=2), plan_for(manifest, seed=1)):
        assert (first != join(read(manifest, other)).images).any()


def test_an_epoch_goes_on_in_the_middle(manifest: Manifest) -> None:
    plan = plan_for(manifest)
    whole, rest = read(manifest, plan), read(manifest, replace(plan, batches=plan.batches[2:]))
    assert len(rest) == len(whole) - 2
    assert all((batch.images == two.images).all() for batch, two in zip(whole[2:], rest, strict=True))


def test_a_share_without_rows_is_an_empty_batch(manifest: Manifest) -> None:
    plan = plan_for(manifest, rank=3, world_size=4, batch_size=101)
    assert [len(batch.rows) for batch in read(manifest, plan)] == [25, 0]


@pytest.mark.ray
def test_ray_data_and_threads_give_the_same_batches_in_order(
    manifest: Manifest, location: str, ray_cluster: str
) -> None:
    from imbvlm.ray_runtime.image_pipeline import stream_in_ray

    plan = plan_for(manifest, batch_size=9)
    wanted = read(manifest, plan)
    for streamed in (list(stream_in_ray(location, plan, num_tasks=2)), list(stream_in_threads(location, plan))):
        assert len(streamed) == len(wanted) == 12
        for batch, two in zip(streamed, wanted, strict=True):
            assert (batch.images == two.images).all()
            assert (batch.rows == two.rows).all()
            assert (batch.ok == two.ok).all()
            assert batch.reasons == two.reasons
    assert list(stream_in_ray(location, replace(plan, batches=[]))) == []


@pytest.mark.ray
def test_two_workers_that_hold_every_cpu_both_finish(manifest: Manifest, location: str, ray_cluster: str) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def worker(plan: StreamPlan) -> list[list[int]]:
        from imbvlm.ray_runtime.image_pipeline import stream_in_ray

        return [batch.rows.tolist() for batch in stream_in_ray(location, plan)]

    plans = [plan_for(manifest, rank, 2) for rank in range(2)]
    shares = ray.get([worker.remote(plan) for plan in plans], timeout=120)
    rows = sorted(row for share in shares for batch in share for row in batch)
    assert rows == sorted(plans[0].rows.tolist())


@pytest.mark.ray
@pytest.mark.slow
def test_two_train_workers_on_two_cpus_read_an_epoch_each_their_share(
    manifest: Manifest, location: str, ray_cluster: str, tmp_path: Path
) -> None:
    """With `get_dataset_shard` this never ends: the loading tasks wait for a CPU."""
    from ray import cloudpickle, train
    from ray.train.torch import TorchTrainer

    plans = cloudpickle.dumps([plan_for(manifest, rank, 2) for rank in range(2)])

    def loop(config: dict[str, Any]) -> None:
        from imbvlm.ray_runtime.image_pipeline import stream_in_ray

        plan = cloudpickle.loads(config["plans"])[train.get_context().get_world_rank()]
        rows = [row for batch in stream_in_ray(config["location"], plan, num_tasks=1) for row in batch.rows.tolist()]
        (tmp_path / str(train.get_context().get_world_rank())).write_text(" ".join(map(str, rows)))

    trainer = TorchTrainer(
        loop,
        train_loop_config={"plans": plans, "location": location},
        scaling_config=train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=train.RunConfig(storage_path=str(tmp_path), name="streams"),
    )
    trainer.fit()
    read_rows = sorted(int(row) for rank in "01" for row in (tmp_path / rank).read_text().split())
    assert read_rows == sorted(plan_for(manifest).rows.tolist())


@pytest.mark.ray
def test_leaving_an_epoch_early_leaves_nothing_running(manifest: Manifest, location: str, ray_cluster: str) -> None:
    from imbvlm.ray_runtime.image_pipeline import stream_in_ray

    for _ in range(3):
        assert len(next(iter(stream_in_ray(location, plan_for(manifest, batch_size=4)))).rows) == 4


@pytest.mark.ray
def test_a_store_that_fails_ends_the_stream_with_its_own_error(tmp_path: Path, ray_cluster: str) -> None:
    from imbvlm.base.errors import StorageError
    from imbvlm.ray_runtime.image_pipeline import stream_in_ray

    # No bucket has so long a name, and nobody needs be asked for that.
    uri = f"s3://{'b' * 300}/y.jpg"
    table = pa.table({"uri": [uri], "label": [0], "split": ["train"]})
    Manifest.build(table, ["a"], "broken").write(str(tmp_path / "broken.parquet"))
    plan = StreamPlan(np.array([0]), [np.array([0])], Preprocess(SIDE, 1.0), None, 0, 0)
    with pytest.raises(StorageError, match=f"can't read {uri}"):
        list(stream_in_ray(str(tmp_path / "broken.parquet"), plan))


# ------------------------------------------------------------------------------------------------ augmentation


def ramp(width: int = 64, height: int = 48) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(),
        Augmentation(crop="growing"),
        Augmentation(crop="center", flip=False),
        Augmentation(jitter=0.4),
        Augmentation(rand_ops=2, rand_magnitude=30),
    ],
)
@pytest.mark.parametrize("shape", [(64, 48), (1, 1), (300, 3)])
def test_every_augmentation_gives_the_towers_size_for_every_shape(
    augmentation: Augmentation, shape: tuple[int, int]
) -> None:
    image = ramp(*shape)
    for seed in range(20):
        crop = augmentation.apply(image, Preprocess(SIDE, 1.0), np.random.default_rng(seed), seed / 19)
        assert crop.shape == (3, SIDE, SIDE)
        assert crop.dtype == np.uint8


def test_no_augmentation_is_the_evaluation_crop() -> None:
    preprocess = Preprocess(SIDE, 8 / 7)
    crop = Augmentation(crop="center", flip=False).apply(ramp(), preprocess, np.random.default_rng(0), 0.5)
    assert (crop == preprocess.apply(ramp())).all()


@pytest.mark.parametrize(("progress", "least"), [(0.0, 0.08), (0.6, 0.08 + 0.2 * 0.92), (1.0, 1.0)])
def test_growing_crops_are_squares_that_grow_as_lift_plus_says(progress: float, least: float) -> None:
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(400):
        left, top, right, bottom = growing_crop(rng, 200, 200, (0.08, 1.0), progress)
        assert right - left == bottom - top
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 200
        sides.append(right - left)
    shares = np.array(sides) ** 2 / 200**2
    assert shares.min() >= least - 0.01
    assert shares.min() <= least + 0.03
    assert shares.max() > 0.97


def test_growing_crops_of_long_images_stay_inside() -> None:
    left, top, right, bottom = growing_crop(np.random.default_rng(0), 1000, 10, (0.08, 1.0), 1.0)
    assert (right - left, bottom - top) == (10, 10)


def test_half_of_the_images_are_flipped() -> None:
    image, preprocess = ramp(), Preprocess(SIDE, 1.0)
    augmentation = Augmentation(crop="center")
    crops = [augmentation.apply(image, preprocess, np.random.default_rng(seed), 0.0)[0, 0] for seed in range(200)]
    assert 70 < sum(int(row[0]) > int(row[-1]) for row in crops) < 130


@pytest.mark.parametrize(
    "options",
    [
        {"crop": "middle"},
        {"crop_scale": (0.5, 1.5)},
        {"crop_scale": (0.9, 0.5)},
        {"jitter": 1.0},
        {"rand_magnitude": 31},
    ],
)
def test_values_that_mean_nothing_are_refused(options: dict[str, str | float | tuple[float, float]]) -> None:
    with pytest.raises(ImbvlmError, match=next(iter(options))):
        Augmentation(**options)


def test_jitter_changes_brightness_within_its_strength_and_no_gray_image_otherwise() -> None:
    """Contrast and saturation leave an even gray as it is, so what is seen is brightness alone: 100 x (1 +- 0.2)."""
    image, augmentation = np.full((40, 40, 3), 100, dtype=np.uint8), Augmentation(crop="center", jitter=0.2)
    crops = [augmentation.apply(image, Preprocess(SIDE, 1.0), np.random.default_rng(seed), 0.0) for seed in range(300)]
    levels = np.array([pixels.mean() for pixels in crops])
    assert max(np.ptp(pixels) for pixels in crops) == 0
    assert 79 <= levels.min() < 84
    assert 116 < levels.max() <= 121


def test_rand_augment_draws_all_of_its_operations_alike() -> None:
    """14 operations, one of them none at all: about a fourteenth of the images stay as they are."""
    image, augmentation = ramp(), Augmentation(crop="center", flip=False, rand_ops=1, rand_magnitude=15)
    plain = Augmentation(crop="center", flip=False).apply(image, Preprocess(SIDE, 1.0), np.random.default_rng(0), 0.0)
    crops = [augmentation.apply(image, Preprocess(SIDE, 1.0), np.random.default_rng(s), 0.0) for s in range(700)]
    same = sum(np.array_equal(pixels, plain) for pixels in crops)
    assert 25 < same < 130
    # Most come in two directions, two of them leave a ramp over the whole range as it is.
    assert len({pixels.tobytes() for pixels in crops}) >= 16


def test_threads_decode_side_by_side_what_one_largest_image_has_and_no_more(
    location: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen threads that train on images of 170 megapixels would take 11 GB."""
    running, most, lock, decode = 0, 0, threading.Lock(), Preprocess.decode

    def counting(self: Any, data: bytes, min_crop: float = 1.0) -> Any:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return decode(self, data, min_crop)

    monkeypatch.setattr(Preprocess, "decode", counting)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    plan = plan_for(manifest)
    for limit, is_alone in ((10**9, False), (1, True)):
        monkeypatch.setattr("imbvlm.data.images.decode_budget.MAX_PIXELS", limit)
        most = 0
        assert sum(len(batch.rows) for batch in stream_in_threads(location, plan)) == len(plan.rows)
        assert (most == 1) is is_alone
