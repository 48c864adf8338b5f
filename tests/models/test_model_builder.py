"""Every method builds a model that reads what it says it reads; initializations start where they promise."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import CLASS_COUNTS, EMBEDDING_WIDTH, WIDTH, tiny_config, tiny_data, tiny_info
from tiny_images import TinyImages
from torch.nn import functional

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import needs_text
from imbvlm.features.trial_data import TrialData
from imbvlm.models.classifier_init import class_means, text_weights
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_builder import build_model, restore_model
from imbvlm.training import checkpoint

CPU = torch.device("cpu")
NUM_CLASSES = len(CLASS_COUNTS)
# Every method, and on images also those that may read stored features.
CASES = [(name, entry.trains_encoder) for name, entry in METHODS.items()]
CASES += [(name, True) for name, entry in METHODS.items() if not (entry.trains_encoder or entry.needs_stored)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return tiny_data(tmp_path_factory.mktemp("features"), text_tower=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> TinyImages:
    return TinyImages(tmp_path_factory.mktemp("images"))


@pytest.fixture
def case(request: pytest.FixtureRequest, data: TrialData, images: TinyImages) -> tuple[Any, Any, Any, Any]:
    """Configuration, data, three inputs and the tower of a case of CASES."""
    (method, on_images), *overrides = request.param
    overrides = {"features__store": False, **overrides[0]} if overrides else {"features__store": False}
    if not on_images:
        del overrides["features__store"]
        return tiny_config(method, **overrides), data, some_batch(data, method), None
    if METHODS[method].trains_encoder:
        del overrides["features__store"]
    config = images.config(method, **overrides)
    batch = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    return config, images.data(config), batch, create_encoder(config.encoder, config.eval)


def some_batch(data: TrialData, method: str) -> torch.Tensor:
    return data.train.batch(METHODS[method].reads, np.array([0, 130, 200]), None).float()


# ------------------------------------------------------------------------------- the contract of every method


@pytest.mark.parametrize("case", [(case,) for case in CASES], indirect=True, ids=str)
def test_a_method_maps_its_input_to_finite_logits_of_every_class(case: tuple[Any, Any, Any, Any]) -> None:
    config, data, batch, _ = case
    model = build_model(config, data.model_inputs, CPU)
    logits = model(batch)
    assert logits.shape == (3, len(data.class_names))
    assert logits.isfinite().all()
    assert model(batch[:0]).shape == (0, len(data.class_names)), "a worker's batch may be empty"


@pytest.mark.parametrize("case", [(case,) for case in CASES], indirect=True, ids=str)
def test_a_method_trains_exactly_where_it_says_so(case: tuple[Any, Any, Any, Any]) -> None:
    config, data, batch, _ = case
    model = build_model(config, data.model_inputs, CPU)
    trainable = [param for param in model.parameters() if param.requires_grad]
    assert bool(trainable) == METHODS[config.method].trains
    if trainable:
        model(batch).square().sum().backward()
        assert all(param.grad is not None for param in trainable)


KINDS = ({"classifier__kind": "linear"}, {"classifier__kind": "cosine"})


@pytest.mark.parametrize(
    "case",
    [(case, kind) for case in CASES for kind in KINDS if "classifier" in METHODS[case[0]].sections]
    + [(case,) for case in CASES if "classifier" not in METHODS[case[0]].sections],
    indirect=True,
    ids=str,
)
def test_exported_weights_predict_without_the_training_data(case: tuple[Any, Any, Any, Any], tmp_path: Path) -> None:
    config, data, batch, tower = case
    model = build_model(config, data.model_inputs, CPU).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01 * torch.randn_like(param) if param.requires_grad else 0)
    checkpoint.save_model(str(tmp_path), model)
    tensors = checkpoint.load_model_tensors(str(tmp_path))
    restored = restore_model(config, data.info, len(data.class_names), tensors, tower)
    assert torch.equal(restored(batch), model(batch))


def test_weights_of_another_configuration_are_refused(data: TrialData, tmp_path: Path) -> None:
    model = build_model(tiny_config("linear_probe"), data.model_inputs, CPU)
    with pytest.raises(ImbvlmError, match="don't fit their configuration"):
        restore_model(tiny_config("decoder"), data.info, NUM_CLASSES, model.state_dict())


# -------------------------------------------------------------------------------------------------- zero-shot


def test_zero_shot_is_scaled_cosine_similarity(data: TrialData) -> None:
    images = some_batch(data, "zero_shot")
    logits = build_model(tiny_config("zero_shot"), data.model_inputs, CPU)(images)
    cosine = functional.cosine_similarity(images[:, None], data.class_embeddings[None], dim=-1)
    torch.testing.assert_close(logits, data.info.logit_scale * cosine)


def test_zero_shot_without_text_features_is_refused_with_a_fix(data: TrialData) -> None:
    without = dataclasses.replace(data, class_embeddings=None)
    with pytest.raises(ImbvlmError, match="zero_shot needs the class names' text embeddings"):
        build_model(tiny_config("zero_shot"), without.model_inputs, CPU)


def test_which_trials_need_text() -> None:
    assert needs_text(tiny_config("zero_shot"))
    assert needs_text(tiny_config("linear_probe", classifier__init="text"))
    assert not needs_text(tiny_config("linear_probe"))


# --------------------------------------------------------------------------------------------- initialization


def test_text_weights_rank_classes_as_the_text_space_does_for_a_centered_feature(data: TrialData) -> None:
    weights = text_weights(data.class_embeddings, data.encoder_tensors["projection"], WIDTH)
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(NUM_CLASSES))
    feature = torch.randn(WIDTH)
    in_text_space = data.class_embeddings @ (feature @ data.encoder_tensors["projection"])
    lengths = (data.class_embeddings @ data.encoder_tensors["projection"].T).norm(dim=-1)
    torch.testing.assert_close(weights @ feature * lengths, in_text_space, rtol=1e-4, atol=1e-4)


def test_a_text_start_behind_an_identity_decoder_is_that_of_the_probe(data: TrialData) -> None:
    probe = build_model(tiny_config("linear_probe", classifier__init="text"), data.model_inputs, CPU)
    decoder = build_model(
        tiny_config("decoder", classifier__init="text", decoder__init="identity"), data.model_inputs, CPU
    )
    assert torch.equal(probe.classifier.weight, decoder.classifier.weight)
    torch.testing.assert_close(
        decoder(some_batch(data, "decoder")), probe(some_batch(data, "linear_probe")), atol=0.05, rtol=0
    )


def test_a_tower_without_projection_or_with_another_is_refused(data: TrialData) -> None:
    config = tiny_config("linear_probe", classifier__init="text")
    with pytest.raises(ImbvlmError, match="has no projection"):
        build_model(config, dataclasses.replace(data, encoder_tensors={}).model_inputs, CPU)
    with pytest.raises(ImbvlmError, match="projection is"):
        text_weights(torch.ones(3, EMBEDDING_WIDTH), torch.ones(WIDTH + 1, EMBEDDING_WIDTH), WIDTH)


def test_a_text_start_behind_a_decoder_needs_a_normed_class_token(data: TrialData) -> None:
    config = tiny_config("decoder", classifier__init="text", decoder__init="identity")
    without = {
        "needs an encoder with a class token": dataclasses.replace(data, info=tiny_info(has_class_token=False)),
        "a pooled output that is the normed class token": dataclasses.replace(data, encoder_tensors={}),
    }
    for reason, inputs in without.items():
        with pytest.raises(ImbvlmError, match=reason):
            build_model(config, inputs.model_inputs, CPU)


def test_class_means_are_those_of_normalized_features_over_all_chunks(
    data: TrialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imbvlm.models.classifier_init.CHUNK_SIZE", 50)
    means = class_means(torch.nn.Identity(), data.train, "pooled", NUM_CLASSES, WIDTH, CPU)
    features = data.train.batch("pooled", np.arange(len(data.train)), None).float()
    own = functional.normalize(features[data.train.labels == 2], dim=-1).mean(dim=0)
    torch.testing.assert_close(means[2], functional.normalize(own, dim=0))
    assert (means[NUM_CLASSES - 1] == 0).all()


def test_a_class_without_images_starts_in_some_direction(data: TrialData) -> None:
    model = build_model(tiny_config("linear_probe", classifier__init="class_mean"), data.model_inputs, CPU)
    assert model.classifier.weight.norm(dim=-1).min() > 0.1


@pytest.mark.parametrize("width", [None, 8])
def test_class_means_behind_a_decoder_are_of_the_decoders_output(data: TrialData, width: int | None) -> None:
    config = tiny_config("decoder", classifier__init="class_mean", decoder__width=width)
    model = build_model(config, data.model_inputs, CPU)
    with torch.no_grad():
        features = model.decoder(data.train.batch("tokens", np.arange(len(data.train)), None).float())
    own = functional.normalize(features, dim=-1)[data.train.labels == 0].mean(dim=0)
    torch.testing.assert_close(model.classifier.weight[0], functional.normalize(own, dim=0), atol=1e-5, rtol=1e-4)


def test_the_decoder_starts_from_the_towers_final_norm(data: TrialData) -> None:
    model = build_model(tiny_config("decoder"), data.model_inputs, CPU)
    assert torch.equal(model.decoder.input_norm.weight, data.encoder_tensors["final_norm.weight"])
    assert model.decoder.input_norm.eps == tiny_info().final_norm_eps
