"""The frozen tower: one forward gives tokens, pooled and image embedding; text, preprocessing and identity with it."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import ComputeDtype, EncoderInfo
from imbvlm.config.input_sections import MAX_IMAGE_SIZE, EncoderConfig, EvalConfig
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.models.encoders.encoder import _BUILD_ERRORS, TextTokenizer, _quiet_logging, preprocess_of
from imbvlm.models.encoders.encoder_outputs import EncoderOutput, FinalNorm, VisualRules, visual_rules
from imbvlm.models.encoders.encoder_registry import LOCAL_DIR, EncoderSource, resolve_encoder
from imbvlm.models.encoders.encoder_weights import require_transformers
from imbvlm.models.encoders.token_pooling import pooling_matrix

TEXTS_AT_ONCE = 256
# Stands in for the text tower of a model folder.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


class Encoder(TextTokenizer):
    """An image-text tower that never trains here: eval mode, no gradients, float32 weights.

    `model` is open_clip's model, `info` its facts, `preprocess` how an image becomes its input, `source` what its name
    meant, `token_pool` the matrix (T', T) over its tokens where they are pooled.
    """

    def __init__(
        self, model: Any, info: EncoderInfo, preprocess: Preprocess, source: EncoderSource, token_pool: Tensor | None
    ) -> None:
        super().__init__(source)
        self.model, self.info, self.preprocess, self.source = model, info, preprocess, source
        self.device = next(model.parameters()).device
        self._rules = visual_rules(self.visual, info.name)
        # What was chosen for a GPU.
        self._computed_in: ComputeDtype | None = None
        self._input_dtype = torch.float32
        scale = 1 / torch.tensor(info.std)
        self._scale = (scale / 255).view(1, 3, 1, 1).to(self.device)
        self._shift = (-torch.tensor(info.mean) * scale).view(1, 3, 1, 1).to(self.device)
        self.token_pool = None if token_pool is None else token_pool.to(self.device)

    @staticmethod
    def from_config(
        config: EncoderConfig, evaluation: EvalConfig, device: str | torch.device = "cpu", *, with_text: bool = True
    ) -> Encoder:
        """Load the tower that the configuration names.

        Without `with_text` only the image side of a folder that `save_encoder` wrote is built. Its description then
        names nothing that a library would fetch: no text tower, no tokenizer.

        Raises ImbvlmError for unknown names (with the nearest), a QuickGELU that contradicts the weights, weights that
        can't be had or don't fit, an image size that the tower doesn't take, and outputs that aren't defined.
        """
        source = resolve_encoder(config)
        described, token_pool = _describe(config, with_text)
        model = _load(source, config.image_size, with_text)
        info = replace(
            described,
            logit_scale=float(model.logit_scale.detach().exp()),
            weights_fingerprint=_visual_fingerprint(model.visual, source),
        )
        model.to(device)
        if described.kind == "convolution":
            model.visual.to(memory_format=torch.channels_last)
        return Encoder(model, info, preprocess_of(info, evaluation), source, token_pool)

    def to(self, device: str | torch.device) -> Encoder:
        """Move the tower to another device; returns itself."""
        self.model.to(device)
        self.device = next(self.model.parameters()).device
        self._scale, self._shift = self._scale.to(self.device), self._shift.to(self.device)
        self.token_pool = None if self.token_pool is None else self.token_pool.to(self.device)
        return self

    def compute_in(self, precision: ComputeDtype) -> Encoder:
        """Choose what the image side computes in; returns itself.

        By itself that is bfloat16 on GPUs that have it, by autocast, and float32 elsewhere. On CPUs bfloat16 is of the
        weights: under autocast torch copies a weight of attention for every token. Raises ImbvlmError for bfloat16 on a
        GPU without it.
        """
        if self.device.type == "cuda":
            if precision == "bfloat16" and not _gpu_has_bfloat16():
                raise ImbvlmError(
                    f"the {torch.cuda.get_device_name()} of {socket.gethostname()} has no units for bfloat16, in which "
                    "towers compute on GPUs by themselves; set features.computed_in: float32"
                )
            self._computed_in = precision
        else:
            self._input_dtype = getattr(torch, precision)
            self.visual.to(self._input_dtype)
        return self

    @property
    def visual(self) -> Any:
        return self.model.visual

    @property
    def rules(self) -> VisualRules:
        """What is known about the class of the image side."""
        return self._rules

    @torch.inference_mode()
    def forward_images(self, images: Tensor) -> EncoderOutput:
        """Outputs (float32, on the tower's device) of crops (B, 3, S, S) in bytes, as `preprocess` makes them.

        `image_embedding` is the model's own `encode_image`, not normalised. Unless `compute_in` says otherwise,
        convolutions and matrices run in bfloat16 on GPUs that have it and in float32 elsewhere.
        """
        return self.outputs(images)

    def outputs(self, images: Tensor) -> EncoderOutput:
        """The same as `forward_images`, for a graph: whether gradients are kept is the caller's choice."""
        pixels = self.normalize(images).to(self._input_dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=self._autocasts()):
            outputs = self._rules.outputs(self.visual, pixels)
        tokens, pooled, embedding = (output.float() for output in outputs)
        return EncoderOutput(tokens if self.token_pool is None else self.token_pool @ tokens, pooled, embedding)

    def _autocasts(self) -> bool:
        """A GPU is asked only where the tower is on one: it would else take its memory in each process with a tower."""
        if self.device.type != "cuda":
            return False
        return _gpu_has_bfloat16() if self._computed_in is None else self._computed_in == "bfloat16"

    def normalize(self, images: Tensor) -> Tensor:
        """The tower's input (B, 3, S, S), float32, of crops in bytes: mean and deviation taken out."""
        pixels = images.to(self.device, non_blocking=True)
        if self.info.kind == "convolution":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return torch.addcmul(self._shift, pixels, self._scale)

    def pixel_scale(self) -> tuple[Tensor, Tensor]:
        """Factor and summand (1, 3, 1, 1) that make the tower's input of crops in bytes."""
        return self._scale, self._shift

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Normalised text features (N, E) in float32, on the tower's device."""
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        encoded = [self.model.encode_text(self.tokenize(part).to(self.device), normalize=True) for part in parts]
        return torch.cat(encoded).float()

    def final_norm(self) -> FinalNorm | None:
        """The layer norm behind the last block; None where the tower has none."""
        return self._rules.final_norm(self.visual)

    def projection(self) -> Tensor | None:
        """Matrix (P, E) with pooled @ projection = image_embedding up to a constant; None where it isn't linear."""
        return self._rules.projection(self.visual)

    def text_fingerprint(self) -> str:
        """Hex digest of the text side: its weights by name, the activation, the tokenizer's settings."""
        config = self.source.model_config
        switches = {"quick_gelu": self.source.quick_gelu, "embed_dim": config["embed_dim"], "text": config["text_cfg"]}
        state = {name: value for name, value in self.model.state_dict().items() if not name.startswith("visual.")}
        return _fingerprint(state, switches)

    def check(self) -> None:
        """Compare the outputs with the model's own `encode_image` on a made-up image; raises ImbvlmError."""
        size = self.info.image_size
        image = torch.arange(3 * size * size, dtype=torch.int64).mul(2654435761).remainder(251).to(torch.uint8)
        image = image.view(1, 3, size, size)
        with torch.inference_mode():
            expected = self.model.encode_image(self.normalize(image)).float()
            got = self._rules.outputs(self.visual, self.normalize(image)).image_embedding.float()
        difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not difference < 1e-3:
            raise ImbvlmError(
                f"the encoder {self.info.name} can't be used: its {type(self.visual).__name__} computes something "
                f"unknown here (outputs differ from its own encode_image by {difference:.2g} of the largest value)"
            )


def describe_encoder(config: EncoderConfig) -> EncoderInfo:
    """A tower's facts without its weights, in a fraction of a second; `weights_fingerprint` is empty.

    `logit_scale` is an untrained model's. Raises the ImbvlmErrors of `Encoder.from_config` that don't need weights.
    """
    return _describe(config)[0]


def _describe(config: EncoderConfig, with_text: bool = True) -> tuple[EncoderInfo, Tensor | None]:
    """A tower's facts, and the matrix over its tokens where they are pooled."""
    source = resolve_encoder(config)
    with torch.device("meta"):
        model = _build(source, None, "meta", with_text)
        _resize(model.visual, config.image_size, source.name)
        rules = visual_rules(model.visual, source.name)
        size = _square(model.visual.image_size, source.name)
        _check_size(model, size, source)
        with torch.no_grad():
            model.eval()
            tokens, pooled, embedding = rules.outputs(model.visual, torch.empty(1, 3, size, size))
        norm = rules.final_norm(model.visual)
    has_class_token, token_pool = rules.has_class_token(model.visual), None
    if config.token_pooling > 1:
        # Class token and registers, which lie on no grid.
        num_prefix = int(getattr(getattr(model.visual, "trunk", None), "num_prefix_tokens", has_class_token))
        token_pool = pooling_matrix(tokens.shape[1], num_prefix, config.token_pooling, source.name)
    info = EncoderInfo(
        name=source.name,
        kind="vit" if rules.is_vit(model.visual) else "convolution",
        image_size=size,
        num_tokens=tokens.shape[1] if token_pool is None else len(token_pool),
        token_width=tokens.shape[2],
        pooled_width=pooled.shape[1],
        embedding_width=embedding.shape[1],
        has_class_token=has_class_token,
        mean=tuple(source.preprocess["mean"]),
        std=tuple(source.preprocess["std"]),
        interpolation=source.preprocess["interpolation"],
        resize_mode=source.preprocess["resize_mode"],
        logit_scale=float(np.exp(source.model_config.get("init_logit_scale", np.log(1 / 0.07)))),
        final_norm_eps=None if norm is None else norm.eps,
        weights_fingerprint="",
        num_parameters=sum(param.numel() for param in model.visual.parameters()),
        token_pooling=config.token_pooling,
    )
    return info, token_pool


def _check_size(model: Any, image_size: int, source: EncoderSource) -> None:
    """Refuse a model (on the meta device) that its weights can't be of, before it takes the memory that it asks for."""
    if image_size > MAX_IMAGE_SIZE:
        raise ImbvlmError(
            f"the encoder {source.name} takes images of {image_size:,} px, and at most {MAX_IMAGE_SIZE:,} can be "
            "used; set encoder.image_size"
        )
    held, wanted = source.weights_bytes(), sum(one.numel() for one in chain(model.parameters(), model.buffers()))
    # No format stores a number in less than a byte.
    if held is not None and wanted > held:
        raise ImbvlmError(
            f"can't load the encoder {source.name}: its description asks for {wanted:,} numbers, and its weights have "
            f"{held:,} bytes; they don't belong together"
        )


# -------------------------------------------------------------------------------------------------- loading


def _load(source: EncoderSource, image_size: int | None, with_text: bool) -> Any:
    model = _build(source, source.weights_file(), "cpu", with_text)
    _resize(model.visual, image_size, source.name)
    return model.eval().requires_grad_(False)


def _build(source: EncoderSource, weights: str | None, device: str, with_text: bool) -> Any:
    """open_clip's model with its weights, or without any on the meta device."""
    text = source.model_config["text_cfg"]
    if with_text and text.get("hf_model_name"):
        require_transformers(source.name, "the text tower")
    loads = device != "meta"
    try:
        with _quiet_logging():
            model = open_clip.create_model(
                source.model,
                pretrained=weights,
                load_weights=loads and with_text,
                require_pretrained=loads and with_text,
                force_quick_gelu=source.quick_gelu,
                device=device,
                **({} if with_text else {"text_cfg": dict(_NO_TEXT)}),
            )
            if loads and not with_text:
                _load_image_side(model, source.model.removeprefix(LOCAL_DIR))
            return model
    except _BUILD_ERRORS as error:
        lines = str(error).strip().splitlines() or [""]
        cause = " ".join(line.strip() for line in lines[:3])
        if len(lines) > 3:
            cause += f" and {len(lines) - 3} more such lines"
        raise ImbvlmError(f"can't load the encoder {source.name} from {weights or source.model}: {cause}") from None


def _load_image_side(model: Any, folder: str) -> None:
    """Give a model the weights that `save_encoder` wrote; those of the text side are left in the file."""
    tensors, prefix = load_file(Path(folder) / HF_SAFE_WEIGHTS_NAME), "visual."
    model.visual.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    with torch.no_grad():
        model.logit_scale.copy_(tensors["logit_scale"])


def _resize(visual: Any, image_size: int | None, name: str) -> None:
    rules = visual_rules(visual, name)
    if image_size is not None and image_size != _square(visual.image_size, name):
        rules.resize(visual, image_size)


def _square(size: int | Sequence[int], name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ImbvlmError(
            f"the encoder {name} takes images of {' x '.join(map(str, sorted(sides)))}; only squares can be used"
        )
    return int(sides.pop())


def _visual_fingerprint(visual: Any, source: EncoderSource) -> str:
    config = source.model_config
    switches = {
        "class": type(visual).__name__,
        "quick_gelu": source.quick_gelu,
        "embed_dim": config["embed_dim"],
        "vision": config["vision_cfg"],
    }
    return _fingerprint(visual.state_dict(), switches)


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _fingerprint(state: Mapping[str, Tensor], switches: Mapping[str, Any]) -> str:
    """Hex digest of weights by name, and of the switches that no weight shows."""
    digest = hashlib.sha256(json.dumps(switches, sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()
