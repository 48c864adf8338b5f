"""Prompts whose context words are learned, before a frozen text tower [Zhou et al. 2022, "CoOp"]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.model_sections import PromptTuningConfig
from imbvlm.config.trial_config import TrialConfig, require_section
from imbvlm.models.classifier import AffineMap
from imbvlm.models.encoders.encoder import Encoder, TextTokenizer, require_text
from imbvlm.models.model_inputs import ModelInputs
from imbvlm.models.text_tower import TextTower, unsupported_text_tower

MAX_DEFAULT_TOKENS = 16
INIT_DEVIATION = 0.02


def refuse_text_tower(config: TrialConfig, info: EncoderInfo) -> list[str]:
    """Reject encoders whose text tower can't take learned context, or not as many tokens of it."""
    # open_clip takes seconds to import, and a learned prompt predicts without it.
    from imbvlm.models.encoders.encoder_registry import resolve_encoder

    num_tokens = require_section(config.section(PromptTuningConfig)).num_tokens
    problem = unsupported_text_tower(resolve_encoder(config.encoder).model_config["text_cfg"], info.name, num_tokens)
    return [] if problem is None else [problem]


def build_prompt_tuning(
    config: TrialConfig, inputs: ModelInputs, encoder: Encoder | None, device: torch.device
) -> nn.Module:
    """The classifier at its start, before the encoder's text tower; raises ImbvlmError for too many init_words."""
    assert encoder is not None, "METHODS says that prompt tuning needs the encoder"
    text = require_text(encoder)
    section = require_section(config.section(PromptTuningConfig))
    text_tower = TextTower(text.model, text.config)
    tokens = prompt_tokens(text, inputs.class_names, section.init_words)
    return build_prompt_classifier(section, text_tower, tokens, inputs.info, device)


def restore_prompt_tuning(
    config: TrialConfig, info: EncoderInfo, num_classes: int, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A classifier of the exported shapes, which predicts without a text tower."""
    # Only the weights say how long the context is.
    context = next((tensor for name, tensor in tensors.items() if name.split(".")[-1] == "context"), torch.zeros(0))
    embeddings = torch.zeros(num_classes, info.text_space.width)
    return PromptClassifier(torch.zeros(context.shape), embeddings, info.text_space.logit_scale, None)


class PromptClassifier(nn.Module):
    """Scaled cosine similarity of image embeddings (B, E) and class embeddings made of learned context: (B, C).

    Only `context` (n, D), or (C, n, D) with one for each class, trains. Each training step computes class embeddings
    anew. `eval()` stores them in the buffer `class_embeddings`, so that a model saved afterwards predicts without a
    text tower. The text tower isn't a submodule: its weights are neither saved nor moved with the model.
    """

    class_embeddings: Tensor
    logit_scale: Tensor

    def __init__(
        self, context: Tensor, class_embeddings: Tensor, logit_scale: float, text: ClassPrompts | None
    ) -> None:
        super().__init__()
        self.context = nn.Parameter(context)
        self.register_buffer("class_embeddings", class_embeddings)
        self.register_buffer("logit_scale", torch.tensor(logit_scale))
        self._text, self._is_stale = text, text is not None

    def forward(self, image_embedding: Tensor) -> Tensor:
        """Logits (B, C) of image embeddings (B, E)."""
        classes = self.class_embeddings
        if self.training:
            assert self._text is not None, "a restored model has no text tower, and only predicts"
            classes = self._text.encode(self.context)
        with torch.autocast(image_embedding.device.type, enabled=False):
            return self.logit_scale * F.normalize(image_embedding.float(), dim=-1) @ classes.float().T

    def affine(self) -> AffineMap:
        weight = self.logit_scale.double() * self.class_embeddings.double()
        return AffineMap(weight, weight.new_zeros(len(weight)), is_normalized=True)

    def train(self, mode: bool = True) -> PromptClassifier:
        """As torch's; `eval()` brings `class_embeddings` up to date."""
        super().train(mode)
        if mode:
            self._is_stale = True
        elif self._is_stale and self._text is not None:
            with torch.no_grad():
                self.class_embeddings.copy_(self._text.encode(self.context))
            self._is_stale = False
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._is_stale = True


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of the class names and of the first context.

    `ids` (C, T) are of "NAME." for each class, with T long enough for all. `words` are the tokens of `init_words`
    without start and end.
    """

    ids: Tensor
    words: Sequence[int]
    context_length: int


def prompt_tokens(tokenizer: TextTokenizer, class_names: Sequence[str], init_words: str | None) -> PromptTokens:
    """Tokens of the texts "NAME." and of the words that learned context starts from."""
    # Names that the text tower would truncate must fit.
    length = 4 * tokenizer.context_length
    words: list[int] = []
    if init_words is not None:
        ids = tokenizer.tokenize([init_words], length)[0]
        # An empty text is its start, its end, and padding.
        end = int((tokenizer.tokenize([""], length)[0, 1] == ids).int().argmax())
        words = ids[1:end].tolist()
    ids = tokenizer.tokenize([f"{name}." for name in class_names], length)
    return PromptTokens(ids, words, tokenizer.context_length)


@dataclass(frozen=True)
class PromptLayout:
    """Positions in each class's prompt.

    `ids` (C, T) are its tokens, 0 in place of context. `ends` (C,) is the position of the token that is read. `slots`
    (C, T, n) is 1 where position t has the i-th learned vector.
    """

    ids: Tensor
    ends: Tensor
    slots: Tensor


class ClassPrompts:
    """The prompts of all classes before a frozen text tower, encoded `chunk_size` classes at a time."""

    def __init__(self, tower: TextTower, layout: PromptLayout, chunk_size: int, device: torch.device) -> None:
        self.tower = tower.to(device)
        self._layout = PromptLayout(layout.ids.to(device), layout.ends.to(device), layout.slots.to(device))
        self._chunk_size = chunk_size

    def encode(self, context: Tensor) -> Tensor:
        """Normalized class embeddings (C, E) of context (n, D) or (C, n, D).

        With several chunks the backward pass computes each again, so that memory holds one at a time.
        """
        num_classes = len(self._layout.ids)
        parts = []
        for start in range(0, num_classes, self._chunk_size):
            rows = slice(start, start + self._chunk_size)
            own = context[rows] if context.ndim == 3 else context
            if torch.is_grad_enabled() and num_classes > self._chunk_size:
                parts.append(checkpoint(self._encode, own, rows, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._encode(own, rows))
        return torch.cat(parts)

    def _encode(self, context: Tensor, rows: slice) -> Tensor:
        slots = self._layout.slots[rows]
        words = self.tower.token_embedding(self._layout.ids[rows]) * (1 - slots.sum(dim=-1, keepdim=True))
        # A product with ones and zeros, because a GPU adds the gradient of a gather in varying order.
        with torch.autocast(words.device.type, enabled=False):
            learned = slots @ context
        encoded: Tensor = self.tower(words + learned, self._layout.ends[rows])
        return encoded


def prompt_layout(
    ids: Tensor, ends: Tensor, num_tokens: int, config: PromptTuningConfig, context_length: int
) -> PromptLayout:
    """Insert `num_tokens` learned vectors into the texts "NAME." of the classes, of tokens `ids` (C, T).

    `ends` (C,) are the positions that are read. The token before it counts as the full stop, which stays last at every
    `position`. A name that doesn't fit loses its end, as it would without learned vectors.
    """
    room = context_length - 2 - num_tokens
    first = {"end": num_tokens, "middle": num_tokens // 2, "front": 0}[config.position]
    prompts = []
    for row, end in zip(ids.tolist(), ends.tolist(), strict=True):
        content = [(token, -1) for token in row[1:end]]
        name, stop = (content[:-1], content[-1:]) if len(content) <= room else (content[:room], [])
        learned = [(0, slot) for slot in range(num_tokens)]
        before, after = learned[:first], learned[first:]
        prompts.append([(row[0], -1), *before, *name, *after, *stop, (row[end], -1)])
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.tensor([prompt + [(0, -1)] * (max(lengths) - len(prompt)) for prompt in prompts])
    slots = (padded[..., 1:] == torch.arange(num_tokens)).float()
    return PromptLayout(padded[..., 0].contiguous(), torch.tensor(lengths) - 1, slots)


def default_num_tokens(context_length: int) -> int:
    """Number of learned vectors by default: 16, or a quarter of a shorter context."""
    return min(MAX_DEFAULT_TOKENS, context_length // 4)


def initial_context(config: PromptTuningConfig, words: Tensor, num_tokens: int, num_classes: int) -> Tensor:
    """Context (n, D), or (C, n, D): embeddings `words` (m, D) first, then random ones of standard deviation 0.02.

    Raises ImbvlmError for more words than vectors.
    """
    if len(words) > num_tokens:
        raise ImbvlmError(
            f"prompt_tuning.num_tokens must be at least {len(words)}, the number of tokens in init_words "
            f"{config.init_words!r}, got {num_tokens}. Raise it, or set it to null."
        )
    shape = (num_classes, num_tokens, words.shape[1]) if config.per_class else (num_tokens, words.shape[1])
    context = INIT_DEVIATION * torch.randn(shape)
    context[..., : len(words), :] = words
    return context


def build_prompt_classifier(
    config: PromptTuningConfig, tower: TextTower, tokens: PromptTokens, info: EncoderInfo, device: torch.device
) -> PromptClassifier:
    """The classifier at its start, with its text tower on the device; raises ImbvlmError for too many init_words."""
    words, num_tokens = tokens.words, config.num_tokens
    if num_tokens is None:
        num_tokens = len(words) or default_num_tokens(tokens.context_length)
    layout = prompt_layout(tokens.ids, tower.ends(tokens.ids), num_tokens, config, tokens.context_length)
    embedded = tower.token_embedding(torch.tensor(words, dtype=torch.long, device=tower.token_embedding.weight.device))
    context = initial_context(config, embedded.detach().float(), num_tokens, len(tokens.ids))
    texts = ClassPrompts(tower, layout, config.chunk_size, device)
    embeddings = torch.zeros(len(tokens.ids), info.text_space.width)
    return PromptClassifier(context, embeddings, info.text_space.logit_scale, texts)
