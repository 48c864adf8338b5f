"""Sentences that turn class names into text features, as open_clip's zero-shot classifier does."""

from __future__ import annotations

from collections.abc import Sequence

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


def class_embeddings(text: TextEncoder, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Text features (C, E) in float32 on the CPU: normalized, averaged over the templates, normalized again.

    The transpose of open_clip's `build_zero_shot_classifier`; memory doesn't grow with the number of sentences.
    """
    at_once = max(1, TEXTS_AT_ONCE // len(templates))
    parts = []
    for start in range(0, len(class_names), at_once):
        names = class_names[start : start + at_once]
        features = text.encode_text([_fill(template, name) for name in names for template in templates])
        mean = features.reshape(len(names), len(templates), -1).mean(dim=1)
        parts.append((mean / mean.norm(dim=1, keepdim=True)).cpu())
    # Tensors made in inference mode can't take part in training, and clones can.
    return torch.cat(parts).clone()


def truncated_names(tokenizer: TextTokenizer, class_names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """Class names whose longest sentence doesn't fit in the text tower's context: it reads only their beginning."""
    context = tokenizer.context_length
    # Long enough to show the tokens that would be truncated.
    length = 4 * context
    padding = tokenizer.tokenize([""], length)[0, -1]
    lengths = (tokenizer.tokenize([_fill(template, "x") for template in templates], length) != padding).sum(dim=1)
    longest = templates[int(lengths.argmax())]
    truncated: list[str] = []
    for start in range(0, len(class_names), TEXTS_AT_ONCE):
        names = class_names[start : start + TEXTS_AT_ONCE]
        tokens = tokenizer.tokenize([_fill(longest, name) for name in names], length)
        is_truncated = (tokens[:, context:] != padding).any(dim=1).tolist()
        truncated += [name for name, is_long in zip(names, is_truncated, strict=True) if is_long]
    return tuple(truncated)


def _fill(template: str, name: str) -> str:
    # str.format would read other braces in a sentence or a name.
    return template.replace("{}", name, 1)
