"""Test-time ensembling: five crops in their places, their mean logits, the same from store, stream and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import TinyImages
from torchvision.transforms import functional

from imbvlm.base.errors import ConfigError
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.config.input_sections import EvalConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.decoding import decode
from imbvlm.data.images.preprocess import FIVE_CROPS, Preprocess
from imbvlm.data.manifest import Manifest
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.store_sizes import store_bytes
from imbvlm.features.trial_data import TrialData
from imbvlm.inference.model_folder import load, write_model
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.sweep.spec.space_file import parse_space
from imbvlm.training import checkpoint
from imbvlm.training.trial_run import build_trial
from imbvlm.training.trial_session import TrialSession, TrialSettings


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> TinyImages:
    return TinyImages(tmp_path_factory.mktemp("images"), bad=(52,))


def prepared(images: TinyImages, method: str, **overrides: Any) -> tuple[TrialConfig, FeatureSet]:
    """A configuration with five crops and what a driver prepares for its test."""
    config = images.config(method, **{"eval__tte": "five_crop", "eval__expand": 6, **overrides})
    return config, images.features(config)


def pixels_of(images: TinyImages, split: str, preprocess: Any) -> torch.Tensor:
    """(N, 5, 3, S, S), made one by one."""
    manifest = Manifest.read(images.manifest)
    contents = manifest.table.column("bytes").to_pylist()
    pictures = [decode(contents[row]) for row in manifest.rows_of(split) if row != 52]
    return torch.from_numpy(np.stack([[preprocess.apply(one, k) for k in range(5)] for one in pictures]))


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (64, 64)])
def test_the_crops_are_torchvisions(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = [Preprocess(48).five_crop(16).apply(pixels, view) for view in range(len(FIVE_CROPS))]
    resized = functional.resize(Image.fromarray(pixels), 64, functional.InterpolationMode.BICUBIC)
    top_left, top_right, bottom_left, bottom_right, center = functional.five_crop(resized, 48)
    for mine, theirs in zip(found, (center, top_left, top_right, bottom_left, bottom_right), strict=True):
        # Resizing a part rounds once, at its edges, where resizing all and cropping looks beyond them.
        difference = np.abs(mine.astype(int) - np.asarray(theirs).transpose(2, 0, 1))
        assert difference[:, 3:-3, 3:-3].max() <= 1


def test_five_crops_without_room_are_five_times_the_center() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    crops = [Preprocess(32).five_crop(0).apply(pixels, view) for view in range(5)]
    assert all((one == Preprocess(32, 1.0).apply(pixels)).all() for one in crops)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("linear_probe", {}),
        ("decoder", {}),
        ("zero_shot", {}),
        ("adapter", {}),
        ("linear_probe", {"features__store": False}),
    ],
)
def test_store_stream_and_export_give_the_mean_logits_of_five_crops(
    images: TinyImages, method: str, overrides: dict[str, bool], tmp_path: Path
) -> None:
    config, features = prepared(images, method, features__precision="float32", **overrides)
    run = build_trial(config, TrialData.open(config, features))
    list(run.epochs())
    source = TrialData.open_five_crops(config, features, "test")
    result = run.evaluate_full(source, views=range(source.num_views))
    assert result.counters.total.sum() == len(source.labels) == 15

    run.model.eval()
    checkpoint.save_model(str(tmp_path / "trained"), run.model)
    tower = create_encoder(config.encoder, config.eval)
    saved = checkpoint.load_model_tensors(str(tmp_path / "trained"))
    write_model(str(tmp_path / "model"), config, saved, tower, run.data.class_names, {})
    model = load(tmp_path / "model", "cpu")
    pixels = pixels_of(images, "test", tower.preprocess.five_crop(6))
    one_by_one = torch.stack([model.logits(pixels[:, crop]) for crop in range(5)]).mean(dim=0)
    torch.testing.assert_close(model.logits(pixels), one_by_one, atol=1e-5, rtol=1e-5)
    assert result.predicted.tolist() == one_by_one.argmax(dim=1).tolist()
    manifest = Manifest.read(images.manifest)
    contents = [manifest.table.column("bytes")[int(row)].as_py() for row in manifest.rows_of("test")]
    predicted = model.predict(contents, top=1)
    assert [one.labels[0] for one in predicted] == one_by_one.argmax(dim=1).tolist()
    for one, row in zip(predicted, one_by_one.softmax(dim=1).max(dim=1).values, strict=True):
        assert one.probabilities[0] == pytest.approx(row.item(), abs=1e-5)


def test_five_crops_have_a_store_of_their_own_and_only_of_what_is_scored(images: TinyImages) -> None:
    config, features = prepared(images, "linear_probe")
    assert set(features.five_crop) == {"val", "test"}
    assert not set(features.five_crop.values()) & set(features.splits.values())
    assert {one.num_views for one in (features.store("val"), features.store("test"))} == {1}
    without = images.features(images.config("linear_probe"))
    assert without.five_crop == {}
    assert without.splits == features.splits, "the other crops are the same, and computed once"
    manifest = Manifest.read(images.manifest)
    plain, five = (
        store_bytes(one, features.info, manifest, frozenset({"pooled"}), ("train", "val", "test"))["pooled"]
        for one in (images.config("linear_probe"), config)
    )
    assert five - plain == 5 * 15 * 32 * 2


@pytest.mark.parametrize("method", ["linear_probe", "adapter"])
def test_a_trial_scores_both_ways_and_selects_by_neither(images: TinyImages, method: str) -> None:
    config, features = prepared(images, method)
    plain = config.with_overrides({"eval.tte": "none", "eval.expand": 24})

    def last(config: TrialConfig, features: FeatureSet, **settings: Any) -> dict[str, float]:
        settings = TrialSettings(config, features, "val/balanced_accuracy", **settings)
        reports = list(TrialSession(torch.device("cpu")).reports(settings))
        assert reports[-1].has_finished, reports[-1]
        return dict(reports[-1].metrics)

    scored = last(config, features, score_test=True)
    assert {"test/balanced_accuracy", "test_tte/balanced_accuracy", "val_tte/top1_accuracy"} <= set(scored)
    assert not any(key.startswith("test") for key in last(config, features))
    without = last(plain, images.features(plain), score_test=True)
    same = {key for key in without if key.startswith(("val/", "test/"))}
    assert {key: scored[key] for key in same} == {key: without[key] for key in same}


def test_it_is_never_searched_and_an_option_without_effect_is_refused(images: TinyImages) -> None:
    with pytest.raises(ConfigError, match=r"'eval.tte' can't be searched: validation doesn't use it"):
        parse_space(parse_yaml("parameters: {eval.tte: {choice: [none, five_crop]}}"))
    with pytest.raises(ConfigError, match=r"eval.expand has no effect with eval.tte none"):
        images.config("linear_probe", eval__expand=8)
    assert EvalConfig().tte == "none"
