"""Learned context: zero-shot where nothing is learned, words in their places, a text tower that stays as it was."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_data import CLASS_COUNTS, tiny_config, tiny_data, tiny_tower
from towers import CONFIGS, write_config

from imbvlm.base.errors import ConfigError, ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.model_sections import PromptTuningConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.trial_data import TrialData
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.models.encoders.text_prompts import class_embeddings
from imbvlm.models.model_builder import build_model, restore_model
from imbvlm.models.prompt_learner import (
    INIT_DEVIATION,
    PromptClassifier,
    PromptLayout,
    build_prompt_classifier,
    default_num_tokens,
    prompt_layout,
    prompt_tokens,
)
from imbvlm.models.text_tower import TextTower
from imbvlm.sweep.plan.feasibility import check_model
from imbvlm.training import checkpoint
from imbvlm.training.trial_run import build_trial

CPU = torch.device("cpu")
NAMES = ["T-shirt/top", "ankle boot", "coat", "bag (leather)", "a", "one two three four five six seven eight nine ten"]
POSITIONS = ("end", "middle", "front")
# CLIP's text side among the model's own attributes, CustomTextCLIP's in a module of its own; each way of reading it.
TOWERS = {
    "clip": CONFIGS["vit"],
    "custom_text": {**CONFIGS["vit"], "custom_text": True},
    "custom_text_timm": CONFIGS["timm_efficientnet"],
    "reads_end_token": {
        **CONFIGS["vit"],
        "text_cfg": {**CONFIGS["vit"]["text_cfg"], "pool_type": "eos", "eos_id": 49407, "proj_bias": True},
    },
    "embedded": None,
}


@pytest.fixture(scope="module", params=TOWERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    config = TOWERS[request.param]
    name = "tinylit_lite0" if config is None else write_config(tmp_path_factory.mktemp(request.param), config)
    return create_encoder(EncoderConfig(name=name), EvalConfig())


@pytest.fixture(scope="module")
def embedded() -> Encoder:
    return create_encoder(EncoderConfig(name="tinylit_lite0"), EvalConfig())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return tiny_data(tmp_path_factory.mktemp("features"), text_tower=True)


def tower_of(encoder: Encoder) -> TextTower:
    return TextTower(encoder.text.model, encoder.text.config)


def build(encoder: Encoder, names: Sequence[str] = NAMES, seed: int = 0, **options: Any) -> PromptClassifier:
    config = PromptTuningConfig(**options)
    torch.manual_seed(seed)
    tokens = prompt_tokens(encoder.text, names, config.init_words)
    return build_prompt_classifier(config, tower_of(encoder), tokens, encoder.info, CPU)


# ------------------------------------------------------------------------------------------------ against zero-shot


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("per_class", [False, True])
def test_zero_learned_tokens_are_zero_shot(encoder: Encoder, position: str, per_class: bool) -> None:
    """Also for a name that is cut off, and one whose end makes one token with the full stop."""
    model = build(encoder, num_tokens=0, position=position, per_class=per_class).eval()
    expected = class_embeddings(encoder.text, [[f"{name}."] for name in NAMES])
    torch.testing.assert_close(model.class_embeddings, expected, atol=1e-5, rtol=0)
    images = torch.randn(4, encoder.info.embedding_width)
    logits = encoder.info.logit_scale * torch.nn.functional.normalize(images, dim=-1) @ expected.T
    torch.testing.assert_close(model(images), logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("position", "words", "template"),
    [
        ("end", "a photo of a", "a photo of a {}."),
        ("front", "a photo of a", "{} a photo of a."),
        ("middle", "a photo of a", "a photo {} of a."),
        ("middle", "my good bright", "my {} good bright."),
    ],
)
def test_untouched_words_give_the_features_of_that_sentence(
    encoder: Encoder, position: str, words: str, template: str
) -> None:
    names = [name for name in NAMES[:5] if name != "bag (leather)"]  # its bracket is one token with the full stop
    model = build(encoder, names, init_words=words, position=position).eval()
    assert model.context.shape[0] == len(words.split())
    expected = class_embeddings(encoder.text, [[template.replace("{}", name)] for name in names])
    torch.testing.assert_close(model.class_embeddings, expected, atol=1e-5, rtol=0)


def test_chunks_give_the_same_embeddings_and_the_same_gradients(encoder: Encoder) -> None:
    images, found = torch.randn(3, encoder.info.embedding_width), []
    for chunk_size in (100, 4, 1):
        model = build(encoder, num_tokens=3, per_class=True, chunk_size=chunk_size).train()
        logits = model(images)
        logits.logsumexp(dim=1).sum().backward()
        found.append((logits.detach(), model.context.grad))
    for logits, gradient in found[1:]:
        torch.testing.assert_close(logits, found[0][0], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-4, rtol=1e-4)
    assert found[0][1].abs().sum() > 0


def test_memory_holds_one_chunk_at_a_time(embedded: Encoder) -> None:
    names = [f"thing number {number}" for number in range(48)]

    def kept_bytes(chunk_size: int) -> int:
        kept = []
        model = build(embedded, names, chunk_size=chunk_size).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            model(torch.randn(2, embedded.info.embedding_width))
        return sum(kept)

    assert kept_bytes(6) < kept_bytes(48) / 10


def test_gradients_are_the_derivatives(embedded: Encoder) -> None:
    model = build(embedded, NAMES[:3], num_tokens=2, position="middle")
    texts = model._text
    texts.tower.double()
    layout = texts._layout
    object.__setattr__(layout, "slots", layout.slots.double())
    direction = torch.randn(3, embedded.info.embedding_width, dtype=torch.float64)
    context = (5 * model.context.detach()).double().requires_grad_()

    def value(given: torch.Tensor) -> torch.Tensor:
        embeddings = texts.tower(
            texts.tower.token_embedding(layout.ids) * (1 - layout.slots.sum(-1, keepdim=True)) + layout.slots @ given,
            layout.ends,
        )
        return (embeddings.double() * direction).sum()

    with torch.no_grad():
        step = torch.randn_like(context)
        numeric = (value(context + 1e-2 * step) - value(context - 1e-2 * step)) / 2e-2
    (gradient,) = torch.autograd.grad(value(context), context)
    assert float((gradient * step).sum()) == pytest.approx(float(numeric), rel=2e-2, abs=1e-4)


# -------------------------------------------------------------------------------------------------------- layout


def layout_of(position: str, num_tokens: int, context_length: int = 16) -> PromptLayout:
    ids = torch.tensor([[1, 7, 8, 5, 9, 0, 0], [1, 7, 5, 9, 0, 0, 0]])
    config = PromptTuningConfig(position=position)
    return prompt_layout(ids, torch.tensor([4, 3]), num_tokens, config, context_length)


@pytest.mark.parametrize(
    ("position", "first", "second"),
    [
        ("end", [1, "a", "b", "c", 7, 8, 5, 9], [1, "a", "b", "c", 7, 5, 9, 0]),
        ("front", [1, 7, 8, "a", "b", "c", 5, 9], [1, 7, "a", "b", "c", 5, 9, 0]),
        ("middle", [1, "a", 7, 8, "b", "c", 5, 9], [1, "a", 7, "b", "c", 5, 9, 0]),
    ],
)
def test_learned_vectors_stand_where_they_are_said_to(
    position: str, first: list[int | str], second: list[int | str]
) -> None:
    layout = layout_of(position, 3)
    for number, expected in enumerate((first, second)):
        shown = [
            "abc"[int(slot.argmax())] if slot.any() else int(token)
            for token, slot in zip(layout.ids[number], layout.slots[number], strict=True)
        ]
        assert shown == expected
        assert layout.ids[number, layout.ends[number]] == 9


def test_names_that_do_not_fit_lose_their_end_and_not_the_token_that_is_read() -> None:
    layout = layout_of("front", 3, context_length=7)
    assert layout.ids.tolist() == [[1, 7, 8, 0, 0, 0, 9], [1, 7, 0, 0, 0, 5, 9]]
    assert layout.ends.tolist() == [6, 6]


def test_the_default_length_is_coops_or_a_quarter_of_a_short_context(embedded: Encoder) -> None:
    assert default_num_tokens(77) == 16
    assert build(embedded).context.shape == (4, 128)
    assert build(embedded, per_class=True).context.shape == (len(NAMES), 4, 128)
    assert build(embedded, num_tokens=7).context.shape == (7, 128)


def test_context_starts_at_random_or_from_words_and_the_rest_at_random(embedded: Encoder) -> None:
    wide = build(embedded, num_tokens=13, per_class=True).context
    assert wide.std().item() == pytest.approx(INIT_DEVIATION, rel=0.05)
    assert not torch.equal(wide[0], wide[1])
    assert torch.equal(build(embedded, seed=1).context, build(embedded, seed=1).context)
    assert not torch.equal(build(embedded, seed=1).context, build(embedded, seed=2).context)
    ids = embedded.text.tokenize(["a photo"])[0, 1:3]
    model = build(embedded, num_tokens=4, init_words="a photo", per_class=True)
    words = embedded.model.text.token_embedding(ids)
    assert all(torch.equal(own[:2], words) for own in model.context)
    assert not torch.isclose(model.context[0, 2:], model.context[1, 2:]).any()
    with pytest.raises(ImbvlmError, match=r"num_tokens must be at least 3, .* got 2\."):
        build(embedded, num_tokens=2, init_words="a photo of")


@pytest.mark.parametrize("text", [{"pool_type": "last"}, {"no_causal_mask": True}])
def test_a_text_tower_of_another_kind_is_refused_before_anything_is_extracted_and_in_a_trial(
    data: TrialData, tmp_path: Path, text: dict[str, str | bool]
) -> None:
    config = {**CONFIGS["vit"], "custom_text": True, "text_cfg": {**CONFIGS["vit"]["text_cfg"], **text}}
    encoder = EncoderConfig(name=write_config(tmp_path, config))
    trial = tiny_config("prompt_tuning").with_overrides({"encoder.name": encoder.name})
    (problem,) = check_model(trial, describe_encoder(encoder))
    info = create_encoder(encoder, EvalConfig()).info
    for says in (problem.message, error_of(trial, dataclasses.replace(data, info=info, encoder=encoder))):
        assert says.startswith("method prompt_tuning needs a text tower that reads a text's end token")


def test_more_context_than_a_text_holds_is_refused(data: TrialData) -> None:
    for position in POSITIONS:
        fits = tiny_config("prompt_tuning", prompt_tuning__num_tokens=13, prompt_tuning__position=position)
        build_model(fits, data.model_inputs, CPU)
        assert check_model(fits, data.info) == []
        too_long = fits.with_overrides({"prompt_tuning.num_tokens": 14})
        (problem,) = check_model(too_long, data.info)
        assert problem.message.startswith("prompt_tuning.num_tokens must leave 3 of the 16 tokens of")
        assert problem.message.endswith("for start, end and class name, got 14. Set it to at most 13.")
        assert problem.message == error_of(too_long, data)


def error_of(config: TrialConfig, data: TrialData) -> str:
    with pytest.raises(ImbvlmError) as error:
        build_model(config, data.model_inputs, CPU)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("per_class", [False, True])
def test_training_lowers_the_loss_and_leaves_the_text_tower_bit_for_bit(
    data: TrialData, loss: str, per_class: bool
) -> None:
    config = tiny_config(
        "prompt_tuning", loss__name=loss, prompt_tuning__per_class=per_class, optim__lr=0.05, train__num_epochs=6
    )
    run = build_trial(config, data)
    before = {name: value.clone() for name, value in run.model._text.tower.state_dict().items()}
    start = run.model.context.detach().clone()
    results = list(run.epochs())
    assert results[-1].metrics["train/loss"] < results[1].metrics["train/loss"]
    after = run.model._text.tower.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.isclose(run.model.context, start).all()
    assert {name for name, _ in run.model.named_parameters()} == {"context"}


def test_the_first_epoch_has_its_own_rate_and_the_schedule_follows(data: TrialData) -> None:
    results = list(build_trial(tiny_config("prompt_tuning", train__num_epochs=4), data).epochs())
    rates = [result.metrics["train/lr"] for result in results]
    assert rates[0] == 1e-5
    assert 0.002 > rates[1] > rates[2] > rates[3]
    steps = 8
    last = 0.002 * (1 + np.cos(np.pi * (3 * steps - 1) / (3 * steps))) / 2
    assert rates[3] == pytest.approx(last)


def test_with_nothing_to_learn_it_trains_to_zero_shot(data: TrialData) -> None:
    run = build_trial(tiny_config("prompt_tuning", prompt_tuning__num_tokens=0), data)
    results = list(run.epochs())
    assert len({result.metrics["val/balanced_accuracy"] for result in results}) == 1
    encoder = create_encoder(EncoderConfig(name=tiny_tower()[0]), EvalConfig())
    expected = class_embeddings(encoder.text, [[f"{name}."] for name in data.class_names])
    torch.testing.assert_close(run.model.class_embeddings, expected, atol=1e-5, rtol=0)


def test_a_saved_model_needs_no_text_tower_and_gives_the_same_logits(data: TrialData, tmp_path: Path) -> None:
    config = tiny_config("prompt_tuning", prompt_tuning__per_class=True)
    run = build_trial(config, data)
    list(run.epochs())
    checkpoint.save_model(str(tmp_path), run.model.eval())
    tensors = checkpoint.load_model_tensors(str(tmp_path))
    assert set(tensors) == {"context", "class_embeddings", "logit_scale"}
    restored = restore_model(config, data.info, len(CLASS_COUNTS), tensors)
    images = data.val.batch("image_embedding", np.arange(9), None).float()
    assert torch.equal(restored(images), run.model(images))
    assert torch.equal(restored.context, run.model.context)


def test_a_refit_without_validation_saves_what_it_learned(data: TrialData, tmp_path: Path) -> None:
    empty = dataclasses.replace(data.val, rows=data.val.rows[:0], labels=data.val.labels[:0])
    run = build_trial(tiny_config("prompt_tuning"), dataclasses.replace(data, val=empty))
    list(run.epochs())
    model = run.model.eval()
    with torch.no_grad():
        assert torch.equal(model.class_embeddings, model._text.encode(model.context))


def test_weights_of_another_tower_are_refused(data: TrialData) -> None:
    other = dataclasses.replace(data, info=dataclasses.replace(data.info, weights_fingerprint="another"))
    with pytest.raises(ImbvlmError, match="are not those that this run began with"):
        build_model(tiny_config("prompt_tuning"), other.model_inputs, CPU)


def test_margins_are_scaled_as_the_logits_are(data: TrialData) -> None:
    course = build_trial(tiny_config("prompt_tuning", loss__name="ldam"), data)._trainer
    assert course.losses_of(0)(0).numbers()["margin_scale"] == data.info.logit_scale


# -------------------------------------------------------------------------------------------------- configuration


def test_defaults_are_coops() -> None:
    tree = {"data": {"manifest": "m"}, "encoder": {"name": "t"}, "method": "prompt_tuning"}
    config = TrialConfig.from_tree(tree)
    assert (config.optim.name, config.optim.lr, config.optim.first_epoch_lr) == ("sgd", 0.002, 1e-5)
    assert (config.optim.lr_schedule, config.optim.momentum, config.optim.nesterov) == ("half_cosine", 0.9, False)
    assert config.train.num_epochs == 50
    assert config.prompt_tuning == PromptTuningConfig()
    assert config.classifier is None
    changed = TrialConfig.from_tree({**tree, "optim": {"lr": 0.01}, "train": {"num_steps": 7}})
    assert (changed.optim.lr, changed.optim.first_epoch_lr, changed.train.num_epochs) == (0.01, 1e-5, None)
    adamw = TrialConfig.from_tree({**tree, "optim": {"name": "adamw"}})
    assert (adamw.optim.lr, adamw.optim.first_epoch_lr) == (0.001, None)
    with pytest.raises(ConfigError, match=r"first_epoch_lr replaces a warm-up"):
        config.with_overrides({"optim.warmup_fraction": 0.1})
    assert TrialConfig.from_tree(config.to_tree()) == config


def test_other_trials_start_without_open_clip() -> None:
    """Building and training them, and predicting with a prompt that was learned elsewhere."""
    code = """
import sys, tempfile, torch
sys.path.insert(0, sys.argv[1])
from tiny_data import tiny_config, tiny_features
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.trial_data import TrialData
from imbvlm.models.model_builder import restore_model
from imbvlm.training.trial_run import build_trial
config = tiny_config("decoder", train__num_epochs=1)
data = TrialData.open(config, tiny_features(tempfile.mkdtemp()))
list(build_trial(config, data).epochs())
tree = {"data": {"manifest": "m"}, "encoder": {"name": "t"}, "method": "prompt_tuning"}
tensors = {"context": torch.zeros(4, 8), "class_embeddings": torch.ones(6, 12), "logit_scale": torch.tensor(2.0)}
restore_model(TrialConfig.from_tree(tree), data.info, 6, tensors)(torch.ones(2, 12))
print("open_clip" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1] / "helpers")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
