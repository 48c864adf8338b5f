"""Sentences that turn class names into text features, as open_clip's zero-shot classifier does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from imbvlm.config.input_sections import PromptsConfig
from imbvlm.models.encoders.encoder import TextEncoder, TextTokenizer
from imbvlm.models.encoders.open_clip_text import TEXTS_AT_ONCE

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("a photo of a {}.",),
    "imagenet": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
}


def templates_of(config: PromptsConfig) -> tuple[str, ...]:
    """The sentences of a configuration, each with one {} for the class name."""
    return TEMPLATES[config.templates] if isinstance(config.templates, str) else tuple(config.templates)


def class_sentences(
    config: PromptsConfig, class_names: Sequence[str], texts: Mapping[str, list[str]]
) -> Iterator[list[str]]:
    """The sentences of each class: its own texts, and the templates' where it has none or both are asked for."""
    templates = templates_of(config)
    for name in class_names:
        own = texts.get(name, [])
        yield own + [_fill(template, name) for template in templates if config.add_templates or not own]


def class_embeddings(text: TextEncoder, sentences: Iterable[Sequence[str]]) -> Tensor:
    """Text features (C, E) in float32 on the CPU of the sentences of each class.

    They are normalized, averaged over the sentences and normalized again: the transpose of open_clip's
    `build_zero_shot_classifier`. Memory doesn't grow with the number of sentences.
    """
    parts = []
    for number, classes in groupby(sentences, len):
        at_once = max(1, TEXTS_AT_ONCE // number)
        while batch := list(islice(classes, at_once)):
            features = text.encode_text([sentence for own in batch for sentence in own])
            mean = features.reshape(len(batch), number, -1).mean(dim=1)
            parts.append((mean / mean.norm(dim=1, keepdim=True)).cpu())
    # Tensors made in inference mode can't take part in training, and clones can.
    return torch.cat(parts).clone()


def truncated_names(tokenizer: TextTokenizer, class_names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """Class names whose longest sentence doesn't fit in the text tower's context: it reads only their beginning."""
    # Long enough to show the tokens that would be truncated.
    length = 4 * tokenizer.context_length
    padding = tokenizer.tokenize([""], length)[0, -1]
    lengths = (tokenizer.tokenize([_fill(template, "x") for template in templates], length) != padding).sum(dim=1)
    longest = templates[int(lengths.argmax())]
    is_long = are_truncated(tokenizer, [_fill(longest, name) for name in class_names])
    return tuple(name for name, is_truncated in zip(class_names, is_long, strict=True) if is_truncated)


def are_truncated(tokenizer: TextTokenizer, sentences: Sequence[str]) -> list[bool]:
    """Whether each sentence is longer than the text tower's context."""
    context = tokenizer.context_length
    padding = tokenizer.tokenize([""], 4 * context)[0, -1]
    is_long: list[bool] = []
    for start in range(0, len(sentences), TEXTS_AT_ONCE):
        tokens = tokenizer.tokenize(sentences[start : start + TEXTS_AT_ONCE], 4 * context)
        is_long += (tokens[:, context:] != padding).any(dim=1).tolist()
    return is_long


def _fill(template: str, name: str) -> str:
    # str.format would read other braces in a sentence or a name.
    return template.replace("{}", name, 1)
