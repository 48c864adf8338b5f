"""Prompts: the same text features as open_clip's zero-shot classifier, and names that don't fit."""

import importlib.util
from pathlib import Path

import open_clip
import pytest
import torch
from towers import write_tower

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import EncoderConfig, EvalConfig, PromptsConfig
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.encoders.text_prompts import (
    TEMPLATES,
    class_embeddings,
    class_sentences,
    templates_of,
    truncated_names,
)

NAMES = ["sandal", "ankle boot", "T-shirt {or top}", "coat"] * 3


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return create_encoder(EncoderConfig(name="tinylit_lite0"), EvalConfig())


OWN = ("a {} on white", "the {}, from above.", "{}")


@pytest.mark.parametrize("templates", ["plain", "imagenet", OWN, OWN[:1]])
def test_equal_to_open_clips_zero_shot_classifier(encoder: Encoder, templates: str | tuple[str, ...]) -> None:
    """By the sentences of a configuration: a set by name, or the user's own, one or several."""
    own = [lambda name, text=text: text.replace("{}", name) for text in OWN]
    functions = {"plain": [lambda name: f"a photo of a {name}."], "imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES}
    functions |= {OWN: own, OWN[:1]: own[:1]}
    tokenizer = open_clip.get_tokenizer(encoder.source.model)
    expected = open_clip.build_zero_shot_classifier(encoder.model, tokenizer, NAMES, functions[templates])
    config = PromptsConfig(templates=templates if isinstance(templates, str) else list(templates))
    got = class_embeddings(encoder.text, class_sentences(config, NAMES, {}))
    torch.testing.assert_close(got, expected.T, atol=1e-5, rtol=1e-5)
    assert got.shape == (len(NAMES), 384)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(len(NAMES)))


def test_batches_do_not_change_the_features(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = list(class_sentences(PromptsConfig(templates="imagenet"), NAMES, {"coat": ["warm", "long", "red"]}))
    whole = class_embeddings(encoder.text, sentences)
    for at_once in (1, 100):
        monkeypatch.setattr("imbvlm.models.encoders.text_prompts.TEXTS_AT_ONCE", at_once)
        torch.testing.assert_close(class_embeddings(encoder.text, sentences), whole, atol=1e-5, rtol=1e-5)


def test_texts_take_the_templates_place_or_join_them(encoder: Encoder) -> None:
    names, texts = ["coat", "boot", "hat"], {"coat": ["a long coat.", "wool {}"], "hat": ["headgear"]}
    assert list(class_sentences(PromptsConfig(texts="t.json"), names, texts)) == [
        ["a long coat.", "wool {}"], ["a photo of a boot."], ["headgear"],
    ]  # fmt: skip
    both = list(class_sentences(PromptsConfig(texts="t.json", add_templates=True), names, texts))
    assert both[0] == ["a long coat.", "wool {}", "a photo of a coat."]
    sums = [torch.stack([*encoder.text.encode_text(own)]).double().mean(dim=0) for own in both]
    expected = torch.stack([mean / mean.norm() for mean in sums]).float()
    torch.testing.assert_close(class_embeddings(encoder.text, both), expected, atol=1e-5, rtol=1e-5)


def test_features_can_take_part_in_training(encoder: Encoder) -> None:
    weight = torch.nn.Parameter(torch.ones(384, 384))
    (class_embeddings(encoder.text, [[name] for name in NAMES]) @ weight).sum().backward()
    assert weight.grad is not None


def test_templates_are_named_or_written_out() -> None:
    assert len(templates_of(PromptsConfig(templates="imagenet"))) == 80
    assert templates_of(PromptsConfig()) == ("a photo of a {}.",)
    assert templates_of(PromptsConfig(templates=["a {} on white"])) == ("a {} on white",)


def test_names_that_the_context_cuts_off_are_found(encoder: Encoder) -> None:
    # 16 tokens: start, end, and "a photo of a", "." leave 9 for the name.
    assert encoder.text.context_length == 16
    fits, too_long = " ".join(["boot"] * 9), " ".join(["boot"] * 10)
    endless = "boot " * 200
    assert truncated_names(encoder.text, ["boot", fits, too_long, endless], TEMPLATES["plain"]) == (too_long, endless)
    assert truncated_names(encoder.text, ["boot", fits], ["{}", "a very good photo of the very good {}."]) == (fits,)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is installed")
def test_text_of_a_tower_with_a_hugging_face_tokenizer_names_the_extra(tmp_path: Path) -> None:
    text = {"context_length": 64, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1, "hf_tokenizer_name": "x/y"}
    name = write_tower(tmp_path / "siglip", "timm_siglip", text_cfg=text)
    encoder = create_encoder(EncoderConfig(name=name), EvalConfig())
    size = encoder.info.image_size
    assert encoder.forward_images(torch.zeros(1, 3, size, size, dtype=torch.uint8)).pooled.isfinite().all()
    with pytest.raises(ImbvlmError, match=r"pip install 'imbvlm\[siglip\]'"):
        encoder.text.encode_text(["a boot"])
