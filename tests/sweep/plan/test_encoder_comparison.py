"""The sample that compares encoders, the scores over its folds, and what is printed of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_images import encoded_image, extraction_in_this_process
from towers import write_tower

from imbvlm.base.errors import ConfigError
from imbvlm.base.yaml_file import parse_yaml
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.split_power import NUM_FOLDS
from imbvlm.features import extraction
from imbvlm.features.extraction import ensure_features
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.sweep.plan.encoder_comparison import (
    OUTPUTS,
    ComparedEncoder,
    Comparison,
    EncoderResult,
    HeadScore,
    compare_encoder,
    find_encoders,
    sample_images,
    sample_quota,
)
from imbvlm.sweep.spec.baselines import baselines
from imbvlm.sweep.spec.space_file import parse_space
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.trial_session import TrialSession, TrialSettings


def made_manifest(counts: Sequence[int], name: str = "made") -> Manifest:
    """Images in the classes' colors, without a validation split."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    images = [encoded_image(int(label) % 5, row) for row, label in enumerate(labels)]
    table = pa.table({"bytes": images, "label": labels, "split": ["train"] * len(labels)})
    return Manifest.build(table, [f"class {label}" for label in range(len(counts))], name)


# ----------------------------------------------------------------------------------------------------- the sample


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any),
    max_images=st.integers(1, 400),
    seed=st.integers(0, 5),
)
@settings(deadline=None)
def test_each_class_gives_as_many_images_as_any_other_or_all_of_its_own(
    counts: list[int], max_images: int, seed: int
) -> None:
    present = np.array(counts)
    quota = sample_quota(present, max_images, seed)
    assert quota.sum() <= max_images
    assert (quota <= present).all()
    level = quota.max()
    sampled = quota > 0
    assert (quota[sampled] == np.minimum(present[sampled], level)).all()
    if np.minimum(present, NUM_FOLDS).sum() <= max_images:
        # Every class is in it, and one more image of each doesn't fit.
        assert (sampled == (present > 0)).all()
        assert level == present.max() or np.minimum(present, level + 1).sum() > max_images
    assert (sample_quota(present, max_images, seed) == quota).all()


def test_a_sample_has_its_classes_and_the_shot_groups_of_all_images() -> None:
    manifest = made_manifest([120, 40, 12, 0, 3, *[7] * 20])
    sample = sample_images(manifest, 40, seed=1)
    assert len(sample) <= 40
    assert sample.splits == ("train",)
    # Where not every class has space each has five, or all of its own.
    counts = np.bincount(sample.labels)
    assert set(counts.tolist()) <= {3, NUM_FOLDS}
    named = {name: int(name.split()[1]) for name in sample.class_names}
    whole = manifest.class_stats().split_counts
    assert sample.class_stats().split_counts.tolist() == [whole[label] for label in named.values()]
    by_bytes = dict(zip(manifest.table["bytes"].to_pylist(), manifest.labels.tolist(), strict=True))
    labels = list(named.values())
    for image, label in zip(sample.table["bytes"].to_pylist(), sample.labels, strict=True):
        assert by_bytes[image] == labels[label]
    assert sample.row_fingerprint("train") == sample_images(manifest, 40, seed=1).row_fingerprint("train")
    assert sample.row_fingerprint("train") != sample_images(manifest, 40, seed=2).row_fingerprint("train")


def test_few_images_are_all_sampled_with_the_classes_without_any() -> None:
    manifest = made_manifest([9, 0, 4])
    sample = sample_images(manifest, 2000, seed=0)
    assert sample.class_names == manifest.class_names
    assert sample.row_fingerprint("train") == manifest.split("train").row_fingerprint("train")


@pytest.mark.parametrize(
    ("counts", "says"), [([40], "of 1 class, and two or more"), ([1, 1], "no class has a validation")]
)
def test_a_sample_that_scores_nothing_is_refused(counts: list[int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sample_images(made_manifest(counts), 20, seed=0)


def test_images_that_are_in_several_classes_are_not_sampled() -> None:
    """Their labels contradict each other; where nothing else is left, the error says that nothing can be scored."""
    image = encoded_image(0, 0)
    table = pa.table({"bytes": [image] * 30, "label": [0, 1] * 15, "split": ["train"] * 30})
    with pytest.raises(ConfigError, match="no class has a validation image"):
        sample_images(Manifest.build(table, ["a", "b"], "copies"), 20, seed=0)


def test_the_smallest_sample_has_two_classes() -> None:
    sample = sample_images(made_manifest([40, 40, 40]), 10, seed=0)
    assert np.bincount(sample.labels).tolist() == [NUM_FOLDS, NUM_FOLDS]


# ----------------------------------------------------------------------------------------------------- the scores


def test_scores_are_means_over_classes_with_class_stratified_standard_errors() -> None:
    correct, total, official = [30, 6, 1, 0, 0], [40, 10, 3, 2, 0], [500, 25, 12, 4, 3]
    score = HeadScore.of(np.array(correct), np.array(total), ClassStats.from_counts(total, official))

    def error(labels: Sequence[int]) -> float:
        terms = []
        for label in labels:
            p = (correct[label] + 1) / (total[label] + 2)
            terms.append(p * (1 - p) / total[label])
        return math.sqrt(sum(terms)) / len(terms)

    assert score.balanced_accuracy == pytest.approx((30 / 40 + 6 / 10 + 1 / 3 + 0) / 4)
    assert score.balanced_standard_error == pytest.approx(error([0, 1, 2, 3]))
    # The last few-shot class has no row.
    assert score.few_shot_accuracy == pytest.approx((1 / 3 + 0) / 2)
    assert score.few_shot_standard_error == pytest.approx(error([2, 3]))


def test_without_a_few_shot_class_there_is_no_few_shot_accuracy() -> None:
    score = HeadScore.of(np.array([30, 6]), np.array([40, 10]), ClassStats.from_counts([40, 10], [500, 25]))
    assert score.few_shot_accuracy is score.few_shot_standard_error is None


def test_features_and_scores_are_those_of_a_sweeps_baselines(tmp_path: Path) -> None:
    """On all training images: a sweep reads the same stores, and compares by the same numbers."""
    manifest, location = made_manifest([30, 12, 6, 3]), str(tmp_path / "manifest.parquet")
    manifest.write(location)
    name, root = write_tower(tmp_path / "encoder", "vit"), str(tmp_path / "features")
    base = {"data": {"manifest": location}, "encoder": {"name": name}, "method": "linear_probe"}
    space = {"parameters": {"optim.lr": {"loguniform": [0.01, 0.5]}}}
    sweep = SweepSpec.from_tree({"name": "s", "base": base, "space": space}).resolve()
    with extraction_in_this_process():
        zero_shot = TrialConfig.from_tree({**base, "method": "zero_shot"})
        features = ensure_features(
            zero_shot, Manifest.read(location), root, OUTPUTS, ("train",), report=lambda text: None
        )
        said: list[str] = []
        (encoder,) = find_encoders(location, [name], [], 0)
        result = compare_encoder(encoder, sample_images(Manifest.read(location), 2000, 0), root, said.append)
    assert result.failure is None
    assert not any("images to compute" in text for text in said)
    expected = {}
    for baseline in baselines(sweep).values():
        run = TrialSettings(
            baseline.config, features, "val/balanced_accuracy", patience=baseline.patience, num_folds=NUM_FOLDS
        )
        reports = list(TrialSession(torch.device("cpu")).reports(run))
        expected[baseline.name] = max((report.values for report in reports), key=lambda v: v["val/balanced_accuracy"])
    for head, score in result.scores.items():
        assert score.balanced_accuracy == pytest.approx(expected[head]["val/balanced_accuracy"])
        assert score.balanced_standard_error == pytest.approx(expected[head]["val/balanced_standard_error"])
        assert score.few_shot_accuracy == pytest.approx(expected[head]["val/few_shot_accuracy"])
    assert set(result.scores) == {"linear probe", "class means", "zero-shot"}


def test_an_encoder_that_cannot_be_compiled_has_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that says so while it runs is redrawn by the next."""
    monkeypatch.setattr(extraction, "resolve_compile", lambda *arguments: True)
    monkeypatch.setattr(torch, "compile", lambda function: Mock(side_effect=RuntimeError("no C compiler")))
    manifest, location = made_manifest([20, 10]), str(tmp_path / "manifest.parquet")
    manifest.write(location)
    (encoder,) = find_encoders(location, [write_tower(tmp_path / "encoder", "vit")], [], 0)
    with extraction_in_this_process():
        sample = sample_images(Manifest.read(location), 2000, 0)
        result = compare_encoder(encoder, sample, str(tmp_path / "features"), lambda text: None)
    assert [note.rpartition(": ")[2] for note in result.notes] == ["no C compiler"]


# ------------------------------------------------------------------------------------------------ the encoders


def test_every_mistake_of_names_sizes_and_weights_is_in_one_error(tmp_path: Path) -> None:
    name = write_tower(tmp_path / "encoder", "vit")
    write_tower(tmp_path / "empty", "vit")
    (tmp_path / "empty" / "open_clip_model.safetensors").unlink()
    names = ["openai_vit_b61", name, f"local-dir:{tmp_path / 'empty'}"]
    with pytest.raises(ConfigError) as error:
        find_encoders("embedded:fashion_mnist_lt", names, [32, 36, "big", 9999], 0)
    text = str(error.value)
    assert "openai_vit_b61" in text
    assert "did you mean" in text
    assert "encoder.image_size is 36, which is no multiple" in text
    assert "image_size" in text
    assert "big" in text
    assert "9999" in text
    assert "has no weights" in text
    assert text.count("has no weights") == 1
    with pytest.raises(ConfigError, match="must name an encoder"):
        find_encoders("embedded:fashion_mnist_lt", [], [32], 0)


# -------------------------------------------------------------------------------------------------- for the reader


def result(encoder: str, balanced: float, size: int = 224, **fields: object) -> EncoderResult:
    scores = {"linear probe": HeadScore(balanced, 0.012, None, None), "class means": HeadScore(0.1, 0.01, 0.05, 0.02)}
    made = EncoderResult(encoder, size, scores, 123.4, {"tokens": 302_592, "pooled": 1536}, 86_000_000, "mit", [])
    return replace(made, **fields)


@pytest.fixture(scope="module")
def sample() -> Manifest:
    return made_manifest([6, 5])


def test_lines_for_a_search_space_name_the_best_encoder_and_size_first(sample: Manifest) -> None:
    odd = "local-dir:my folder/x"
    results = [
        result("openai_vit_b16", 0.5),
        result(odd, 0.7, 336),
        result("hf-hub:org/repo@main", 0.9, scores={}, failure="its weights are damaged"),
        result("openai_vit_b16", 0.6, 336),
    ]
    comparison = Comparison(sample, sample, 0, results, has_sizes=True)
    assert comparison.space == {
        "encoder.name": {"choice": [odd, "openai_vit_b16"]},
        "encoder.image_size": {"choice": [336, 224]},
    }
    lines = comparison.describe().split("the best first:\n")[1]
    space = parse_space(parse_yaml(f"parameters:\n{lines}"))
    assert {parameter.key: list(parameter.values) for parameter in space.parameters} == {
        key: item["choice"] for key, item in comparison.space.items()
    }
    assert "encoder.image_size" not in replace(comparison, has_sizes=False).describe()


def test_tables_have_a_dash_for_what_is_not_known_and_say_where_there_is_no_text(sample: Manifest) -> None:
    results = [
        result("timm:image-only", 0.5, images_per_second=None, license="apple-amlr (non-commercial)", notes=["Seen."]),
        result("broken", 0.0, scores={}, failure="out of memory"),
    ]
    text = Comparison(sample, sample, 3, results, has_sizes=False).describe()
    (row,) = [line.split() for line in text.splitlines() if line.startswith("timm:image-only  224  linear")]
    assert row[2:9] == ["linear", "probe", "50.0", "±", "1.2", "-", "-"]
    assert "1.5 kB" in text
    assert "304.1 kB" not in text
    assert "apple-amlr (non-commercial)" in text
    assert "no text" in text
    assert "note: Seen." in text
    assert "failed: broken at 224 px: out of memory" in text
    assert "seed 3" in text


def test_json_has_the_best_heads_numbers_beside_those_of_each(sample: Manifest) -> None:
    data = Comparison(sample, sample, 0, [result("a", 0.5), result("b", 0.6)], has_sizes=False).to_dict()
    assert [row["encoder"] for row in data["encoders"]] == ["b", "a"]
    best = data["encoders"][0]
    assert (best["best_head"], best["balanced_accuracy"], best["few_shot_accuracy"]) == ("linear probe", 0.6, None)
    assert best["scores"]["class means"]["few_shot_standard_error"] == 0.02
    assert data["space"] == {"encoder.name": {"choice": ["b", "a"]}}


def test_an_encoder_that_fails_has_its_cause_and_keeps_the_others_rows(tmp_path: Path, sample: Manifest) -> None:
    name = write_tower(tmp_path / "encoder", "vit")
    weights = tmp_path / "encoder" / "open_clip_model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    sample.write(str(tmp_path / "manifest.parquet"))
    (encoder,) = find_encoders(str(tmp_path / "manifest.parquet"), [name], [], 0)
    assert isinstance(encoder, ComparedEncoder)
    failed = compare_encoder(encoder, sample, str(tmp_path / "features"), lambda text: None)
    assert failed.failure is not None
    assert name in failed.failure
    assert failed.scores == {}
    assert failed.best_head is None
