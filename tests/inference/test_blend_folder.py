"""A blend predicts the weighted mean of its members' logits, whatever they are; its folder is checked as others are."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blend_members import (
    CLASS_NAMES,
    adjusted,
    adjusted_logits,
    assert_close,
    blend,
    member,
    network_of,
    pictures,
    single,
    weighted_mean,
)
from safetensors.torch import load_file, save_file
from tiny_images import TinyImages

import imbvlm
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.method_registry import METHODS
from imbvlm.inference.blend_folder import write_blend
from imbvlm.inference.blend_merging import TrainedMember
from imbvlm.inference.blend_network import FrozenPass, TunedPass
from imbvlm.models.encoders.encoder_factory import create_encoder


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> TinyImages:
    return TinyImages(tmp_path_factory.mktemp("problem"))


@pytest.fixture(scope="module")
def images(problem: TinyImages) -> list[np.ndarray]:
    return pictures(problem)


@pytest.fixture(scope="module")
def members(problem: TinyImages) -> dict[str, TrainedMember]:
    """A member of every method; three are adjusted in every way."""
    steps = {"linear_probe": adjusted(0.7, 0.3, 2.0), "decoder": adjusted(-0.5, 0.2), "lora": adjusted(1.1)}
    return {
        name: member(problem, name, weight=1 + number % 3, temperature=0.5 + 0.2 * number, post_hoc=steps.get(name))
        for number, name in enumerate(METHODS)
    }


# ----------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("method", METHODS)
def test_a_blend_of_one_member_is_the_member(
    members: dict[str, TrainedMember], images: list[np.ndarray], method: str, tmp_path: Path
) -> None:
    part = members[method]
    alone = adjusted_logits(single(tmp_path / "single", part), images)
    for times in (1, 2):
        model = blend(tmp_path / f"blend-{times}", [part] * times)
        assert_close(adjusted_logits(model, images), alone / part.temperature)
        assert len(network_of(model).passes) == (times if METHODS[method].trains_encoder else 1)


def test_all_methods_together_in_any_order_are_their_weighted_mean(
    members: dict[str, TrainedMember], images: list[np.ndarray], tmp_path: Path
) -> None:
    parts = list(members.values())
    expected = weighted_mean(tmp_path, parts, images)
    model = blend(tmp_path / "blend", parts)
    assert_close(adjusted_logits(model, images), expected)
    assert_close(adjusted_logits(blend(tmp_path / "turned", parts[::-1]), images), expected)
    tuned = [name for name, entry in METHODS.items() if entry.trains_encoder]
    kinds = [type(module) for module in network_of(model).passes]
    assert kinds == [FrozenPass, *[TunedPass] * len(tuned)]
    frozen = network_of(model).passes[0]
    assert isinstance(frozen, FrozenPass)
    assert len(frozen.heads) == 2, "a decoder and a cache of prototypes are no matrices"
    # Zero-shot logits that are mixed into any head are one matrix with those of methods that read embeddings.
    assert {(form.reads, form.is_normalized) for form in frozen.forms} == {
        ("pooled", True), ("image_embedding", True)
    }  # fmt: skip


SECOND_STAGES = ("classifier_retraining", "learnable_weight_scaling", "tau_normalization", "disalign", "marc")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_classifiers_of_one_form_are_one_matrix_also_behind_second_stages(
    problem: TinyImages, images: list[np.ndarray], kind: str, tmp_path: Path
) -> None:
    stages = [name for name in SECOND_STAGES if kind == "linear" or name not in ("tau_normalization", "marc")]
    overrides = {"classifier__kind": kind}
    parts = [
        member(problem, "linear_probe", 2.0, **overrides),
        *(
            member(problem, "linear_probe", number, 1.3, adjusted(0.4), second_stage={"name": name}, **overrides)
            for number, name in enumerate(stages, 1)
        ),
        member(problem, "linear_probe", 1.5, **overrides, features__store=False),
    ]
    model = blend(tmp_path / "blend", parts)
    assert_close(adjusted_logits(model, images), weighted_mean(tmp_path, parts, images))
    (network,) = network_of(model).passes
    assert isinstance(network, FrozenPass)
    # A trial on images has seen features that were not rounded.
    assert [form.precision for form in network.forms] == ["float16", "float32"]
    assert [type(each).__name__ for each in network.classifiers] == ["FeatureClassifier"], "DisAlign is no matrix"


@pytest.mark.parametrize("method", ["linear_probe", "class_means", "decoder"])
def test_refits_are_averaged_where_that_gives_the_mean_of_their_logits(
    problem: TinyImages, images: list[np.ndarray], method: str, tmp_path: Path
) -> None:
    part = member(problem, method, seeds=(0, 1, 2))
    model = blend(tmp_path / "blend", [part])
    alone = [
        adjusted_logits(single(tmp_path / f"{number}", TrainedMember("", part.config, [refit], part.encoder)), images)
        for number, refit in enumerate(part.refits)
    ]
    is_averaged = method != "decoder"
    assert_close(adjusted_logits(model, images), sum(alone) / 3 if is_averaged else alone[0])
    description = json.loads((tmp_path / "blend" / "config.json").read_text())
    assert description["passes"][0]["members"][0]["num_refits"] == (3 if is_averaged else 1)


def test_what_is_no_blend_is_not_written(members: dict[str, TrainedMember], tmp_path: Path) -> None:
    def part(method: str = "linear_probe", **changes: Any) -> TrainedMember:
        return TrainedMember(**{**vars(members[method]), **changes})

    for wrong, words in (
        ([], "must have a member, got none"),
        ([part(weight=0.0)], "must be above 0, got 0 and 1.5 of linear_probe-"),
        ([part(temperature=math.nan)], "must be above 0, got"),
        ([part(refits=())], "must have a refit, got none of linear_probe-"),
        ([part("adapter", post_hoc=adjusted(0.0, 0.5))], "an encoder as it was pretrained"),
        ([part(post_hoc=adjusted(0.0, 0.5, width=7))], "must be 5 x 24, got .5, 7. of linear_probe-"),
        ([part(refits=[{"classifier.weight": torch.zeros(5, 7)}])], "don't fit their configuration"),
    ):
        with pytest.raises(ImbvlmError, match=words):
            write_blend(str(tmp_path / "wrong"), wrong, CLASS_NAMES, {})
        assert not (tmp_path / "wrong" / "config.json").exists()


# --------------------------------------------------------------------------------------- sizes, crops, other folders


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainedMember], TinyImages]:
    """A blend over two sizes of the encoder in the package, one of them with five crops."""
    folder = tmp_path_factory.mktemp("sizes")
    problem = TinyImages(folder)
    problem.tower = "tinylit_lite0"
    parts = [
        member(problem, "linear_probe", 2, encoder__image_size=64, post_hoc=adjusted(0.3, 0.25, width=384)),
        member(problem, "class_means", 1, 2.0, encoder__image_size=96, eval__tte="five_crop", eval__expand=8),
        member(problem, "prototype_cache", 1, encoder__image_size=64),
    ]
    blend(folder / "model", parts)
    return folder / "model", parts, problem


def test_two_sizes_of_an_encoder_are_two_inputs(
    two_sizes: tuple[Path, list[TrainedMember], TinyImages], tmp_path: Path
) -> None:
    folder, parts, problem = two_sizes
    model, images = imbvlm.load(folder, "cpu"), pictures(problem)
    assert [(each.image_size, each.num_crops) for each in model.inputs] == [(64, 1), (96, 5)]
    assert network_of(model).inputs == (0, 1)
    expected = weighted_mean(tmp_path, parts, images)
    assert_close(adjusted_logits(model, images), expected)
    predicted = model.predict(images, top=5)
    for prediction, row in zip(predicted, expected.softmax(dim=1), strict=True):
        assert prediction.probabilities == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-5)


def test_a_moved_blend_predicts_without_ray_and_names_no_path(
    two_sizes: tuple[Path, list[TrainedMember], TinyImages], tmp_path: Path
) -> None:
    folder, _, problem = two_sizes
    before = imbvlm.load(folder, "cpu").predict(pictures(problem)[:1], top=1)[0]
    moved = shutil.copytree(folder, tmp_path / "moved" / "model")
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text()
    np.save(tmp_path / "image.npy", pictures(problem)[0])
    code = (
        "import sys, numpy, imbvlm\n"
        "def asked(*given): sys.exit('a request was made')\n"
        "import socket; socket.getaddrinfo = socket.socket.connect = asked\n"
        f"(found,) = imbvlm.load({str(moved.parent)!r}, 'cpu').predict(numpy.load({str(tmp_path / 'image.npy')!r}))\n"
        "print([name for name in ('ray', 'pandas', 'optuna') if name in sys.modules], found.class_names[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == f"[] {before.class_names[0]}"


def test_equal_encoders_are_written_once_and_passes_with_equal_crops_share_an_input(
    members: dict[str, TrainedMember], tmp_path: Path
) -> None:
    other = members["class_means"]
    other = TrainedMember(**{**vars(other), "encoder": create_encoder(other.config.encoder, other.config.eval)})
    model = blend(tmp_path, [members["linear_probe"], other, members["decoder"], members["adapter"]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "pass-1", "pass-2"]
    assert len(model.inputs) == 1
    assert network_of(model).inputs == (0, 0)


# ------------------------------------------------------------------------------------------------ damage and hostility


@pytest.fixture(scope="module")
def written(members: dict[str, TrainedMember], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes: a matrix and a decoder, and an adapter."""
    folder = tmp_path_factory.mktemp("written") / "model"
    blend(folder, [members["linear_probe"], members["decoder"], members["adapter"]])
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    description = json.loads((folder / "config.json").read_text())
    change(description)
    (folder / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=4), "has format 4, and this version reads 2 and 3"),
        (lambda d: d.update(passes=[]), "is not a model's description .*passes is empty"),
        (lambda d: d["passes"][0].update(members=[]), "members is empty"),
        (lambda d: d["passes"][0]["members"][1].update(head="../../secret"), "head must be a number from 1 up or null"),
        (lambda d: d["passes"][0]["members"][1].update(head=2), r"members have the heads \[2\]"),
        (lambda d: d["passes"][0]["members"][0].update(head=2), r"members have the heads \[2, 1\]"),
        (lambda d: d["passes"][0]["members"].pop(), r"scales.* should have"),
        (lambda d: d["passes"][1]["members"].append(d["passes"][0]["members"][0]), "can't belong to its description"),
        (lambda d: d["passes"][0]["matrices"].pop(), "doesn't fit its description: its tensors have the shapes"),
        (lambda d: d["passes"][0]["matrices"][0].update(reads="tokens"), "a matrix reads pooled or image_embedding"),
        (lambda d: d["passes"][0]["matrices"][0].update(precision="int8"), "a matrix reads pooled or image_embedding"),
        (lambda d: d["passes"][0]["matrices"][0].update(is_normalized=7), "is_normalized must be true or false"),
        (lambda d: d["passes"][0]["matrices"][0].update(path="/etc"), "is not a model's description"),
        (lambda d: d["passes"][0].update(input="images_9"), "is not a model's description"),
        (lambda d: d["inputs"].clear(), "is not a model's description"),
        (lambda d: d["inputs"][0].update(preprocess_fingerprint="0"), "images are resized differently here"),
        (lambda d: d["inputs"][0]["preprocess"].update(image_size=40), "prepares images differently than"),
        (lambda d: d["passes"][1]["encoder"].update(weights_fingerprint="0"), "pass-2 is not the one that"),
        (lambda d: d["passes"][1]["members"][0]["config"].update(method="lora"), "doesn't read the section"),
        (lambda d: d.update(digests={}), "merged.safetensors is damaged: its content isn't what was exported"),
        (lambda d: d.pop("digests"), "merged.safetensors is damaged: its content isn't what was exported"),
        (lambda d: d.update(class_names=[f"{n}" for n in range(10**6)]), "doesn't fit its description"),
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused_and_takes_no_memory(
    copied: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    edit(copied, change)
    with pytest.raises(ImbvlmError, match=words):
        imbvlm.load(copied, "cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


FILES = ["pass-1/merged.safetensors", "pass-1/head-1.safetensors", "pass-2/head-1.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_tensors_that_are_not_what_was_exported_are_refused(copied: Path, name: str) -> None:
    tensors = load_file(copied / name)
    next(iter(tensors.values())).view(-1)[0] += 0.25
    save_file(tensors, copied / name)
    with pytest.raises(ImbvlmError, match=f"{name} is damaged: its content isn't what was exported"):
        imbvlm.load(copied, "cpu")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [*FILES, "pass-1/tower/open_clip_config.json", "pass-2/tower"])
def test_a_file_that_is_missing_or_a_pipe_is_named(copied: Path, name: str) -> None:
    (shutil.rmtree if (copied / name).is_dir() else os.unlink)(copied / name)
    with pytest.raises(ImbvlmError, match=name.partition("/")[0]):
        imbvlm.load(copied, "cpu")
    os.mkfifo(copied / name)
    with pytest.raises(ImbvlmError, match=name.partition("/")[0]):
        imbvlm.load(copied, "cpu")


@pytest.mark.parametrize("key", ["inputs", "passes", "class_names", "digests"])
def test_a_description_nested_without_end_is_refused(copied: Path, key: str) -> None:
    text = (copied / "config.json").read_text()
    for depth in (900, 200_000):
        description = json.dumps({**json.loads(text), key: 0})
        (copied / "config.json").write_text(description.replace(f'"{key}": 0', f'"{key}": {"[" * depth}{"]" * depth}'))
        with pytest.raises(ImbvlmError):
            imbvlm.load(copied, "cpu")
