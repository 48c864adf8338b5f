"""The image side of an encoder, by the rules of its image tower: outputs, precision, identity."""

from __future__ import annotations

import hashlib
import json
import socket
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_entries import ORIGIN_KEY
from imbvlm.config.encoder_info import ComputeDtype, EncoderInfo
from imbvlm.config.input_sections import MAX_IMAGE_SIZE, EncoderConfig, EvalConfig
from imbvlm.data.images.preprocess import Preprocess
from imbvlm.models.encoders.encoder import Encoder, TextEncoder
from imbvlm.models.encoders.encoder_outputs import EncoderOutput, FinalNorm, num_registers, visual_rules
from imbvlm.models.encoders.encoder_source import EncoderSource, Origin
from imbvlm.models.encoders.token_pooling import pooling_matrix

# What open_clip, timm and torch raise when weights and architecture don't go together.
BUILD_ERRORS = (
    RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, OSError,
    ImportError, EOFError, SafetensorError, UnpicklingError,
)  # fmt: skip

# Limits of what compiling may change of an output, by compute dtype, as a share of the output's norm.
MAX_DIFFERENCE: Mapping[ComputeDtype, float] = {"float32": 1e-4, "bfloat16": 5e-2}


class ImageEncoder(Encoder):
    """The image side that implementations of `Encoder` share; each builds, names and saves its library's model.

    `model` is the library's whole model, `source` what its name means.
    """

    def __init__(
        self,
        model: Any,
        info: EncoderInfo,
        preprocess: Preprocess,
        source: EncoderSource,
        token_pool: Tensor | None,
        text: TextEncoder | None,
    ) -> None:
        self.model, self.info, self.preprocess, self.source, self.text = model, info, preprocess, source, text
        self.device = next(model.parameters()).device
        self.image_tower = self.image_tower_of(model)
        self.rules = visual_rules(self.image_tower, info.name)
        # Compiled where `compile` was called.
        self._tower_outputs: Callable[[Any, Tensor], EncoderOutput] = self.rules.outputs
        # Set for a GPU only: a CPU computes in the dtype of the weights.
        self._autocast_dtype: ComputeDtype | None = None
        self._input_dtype = torch.float32
        scale = 1 / torch.tensor(info.std)
        self._scale = (scale / 255).view(1, 3, 1, 1).to(self.device)
        self._shift = (-torch.tensor(info.mean) * scale).view(1, 3, 1, 1).to(self.device)
        self.token_pool = None if token_pool is None else token_pool.to(self.device)

    # ---------------------------------------------------------------------------- what an implementation defines

    @staticmethod
    @abstractmethod
    def build(source: EncoderSource, weights: str | None, device: str, with_text: bool) -> Any:
        """The library's model with its weights, or without any on the meta device; raises ImbvlmError."""

    @staticmethod
    @abstractmethod
    def image_tower_of(model: Any) -> Any:
        """The module of a model that images pass."""

    @staticmethod
    @abstractmethod
    def switches(source: EncoderSource, image_tower: nn.Module) -> Mapping[str, Any]:
        """Return the settings that change the outputs and that no weight shows."""

    @staticmethod
    @abstractmethod
    def logit_scale(source: EncoderSource, model: Any) -> float | None:
        """Factor on cosine similarities, an untrained model's on the meta device; None without text."""

    @staticmethod
    @abstractmethod
    def text_of(source: EncoderSource, model: Any) -> TextEncoder | None:
        """The text side of a model; None without text."""

    @abstractmethod
    def own_output(self, pixels: Tensor) -> Tensor:
        """The last output as the library itself computes it of normalized pixels (B, 3, S, S)."""

    # -------------------------------------------------------------------------------------- loading and describing

    @classmethod
    def load(
        cls,
        source: EncoderSource,
        config: EncoderConfig,
        evaluation: EvalConfig,
        device: str | torch.device,
        *,
        with_text: bool,
    ) -> Self:
        """The encoder with its weights on a device; raises ImbvlmError where they are missing or don't fit."""
        # The weights come first: a description that asks for more than they hold is refused.
        weights = source.weights_file()
        described, token_pool = cls.describe(source, config, with_text=with_text)
        model = cls.build(source, weights, "cpu", with_text)
        _check_finite(model, source)
        image_tower = cls.image_tower_of(model)
        _resize(image_tower, config.image_size, source.name)
        model.eval().requires_grad_(False)
        # Outputs had registers among their tokens once, and another fingerprint.
        left_out = {"registers": "left out"} if num_registers(image_tower) else {}
        switches = {**cls.switches(source, image_tower), **left_out}
        info = replace(
            described,
            logit_scale=cls.logit_scale(source, model),
            weights_fingerprint=fingerprint(image_tower.state_dict(), switches),
            revision="" if source.origin is None else source.origin.revision,
        )
        model.to(device)
        if described.kind == "convolution":
            image_tower.to(memory_format=torch.channels_last)
        text = cls.text_of(source, model) if with_text else None
        return cls(model, info, _preprocess(info, evaluation), source, token_pool, text)

    @classmethod
    def describe(
        cls, source: EncoderSource, config: EncoderConfig, *, with_text: bool = True
    ) -> tuple[EncoderInfo, Tensor | None]:
        """The encoder's facts without its weights, and the matrix over its tokens where they are pooled."""
        with torch.device("meta"):
            model = cls.build(source, None, "meta", with_text)
            image_tower = cls.image_tower_of(model)
            _resize(image_tower, config.image_size, source.name)
            rules = visual_rules(image_tower, source.name)
            size = _square(image_tower.image_size, source.name)
            _check_size(model, size, source)
            try:
                with torch.no_grad():
                    model.eval()
                    tokens, pooled, embedding = rules.outputs(image_tower, torch.empty(1, 3, size, size))
            except BUILD_ERRORS as error:
                raise build_error(source, None, error) from None
            norm = rules.final_norm(image_tower)
        has_class_token, token_pool = rules.has_class_token(image_tower), None
        if config.token_pooling > 1:
            # The class token lies on no grid.
            token_pool = pooling_matrix(tokens.shape[1], int(has_class_token), config.token_pooling, source.name)
        info = EncoderInfo(
            name=source.name,
            kind="vit" if rules.is_vit(image_tower) else "convolution",
            image_size=size,
            num_tokens=tokens.shape[1] if token_pool is None else len(token_pool),
            token_width=tokens.shape[2],
            pooled_width=pooled.shape[1],
            embedding_width=None if embedding is None else embedding.shape[1],
            has_class_token=has_class_token,
            mean=tuple(source.preprocess["mean"]),
            std=tuple(source.preprocess["std"]),
            interpolation=source.preprocess["interpolation"],
            resize_mode=source.preprocess["resize_mode"],
            logit_scale=cls.logit_scale(source, model),
            final_norm_eps=None if norm is None else norm.eps,
            weights_fingerprint="",
            num_parameters=sum(param.numel() for param in image_tower.parameters()),
            token_pooling=config.token_pooling,
        )
        return info, token_pool

    # ------------------------------------------------------------------------------------------------ image side

    def to(self, device: str | torch.device) -> Self:
        self.model.to(device)
        self.device = next(self.model.parameters()).device
        self._scale, self._shift = self._scale.to(self.device), self._shift.to(self.device)
        self.token_pool = None if self.token_pool is None else self.token_pool.to(self.device)
        return self

    def compute_in(self, precision: ComputeDtype) -> Self:
        """Set what the image side computes in and return the encoder.

        The default is bfloat16 by autocast on GPUs that have it, and float32 elsewhere. On CPUs bfloat16 is the dtype
        of the weights: under autocast torch copies a weight of attention for every token. Raises ImbvlmError for
        bfloat16 on a GPU without it.
        """
        if self.device.type == "cuda":
            if precision == "bfloat16" and not _gpu_has_bfloat16():
                raise ImbvlmError(
                    f"the {torch.cuda.get_device_name()} of {socket.gethostname()} has no units for bfloat16, the "
                    "default of encoders on GPUs; set features.computed_in: float32."
                )
            self._autocast_dtype = precision
        else:
            self._input_dtype = getattr(torch, precision)
            self.image_tower.to(self._input_dtype)
        return self

    def compile(self, batch_size: int) -> str | None:
        """Compile the image side with torch.compile for batches of a size, in its present dtype.

        Returns the reason where torch can't, or where outputs differ from those before by more than rounding does; the
        encoder then stays as it was.
        """
        images, reason = self._synthetic_image().repeat(batch_size, 1, 1, 1), ""
        before = self.forward_images(images)
        is_half = self._autocasts() or self._input_dtype == torch.bfloat16
        limit = MAX_DIFFERENCE["bfloat16" if is_half else "float32"]
        try:
            self._tower_outputs = torch.compile(self.rules.outputs)
            difference = _relative_difference(self.forward_images(images), before)
            if not difference <= limit:
                reason = f"compiled outputs differ by {difference:.2g} of their norm, more than {limit:g}"
        except BUILD_ERRORS as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if not reason:
            return None
        self._tower_outputs = self.rules.outputs
        return reason

    def _synthetic_image(self) -> Tensor:
        """One image (1, 3, S, S) in bytes with all kinds of values."""
        size = self.info.image_size
        values = torch.arange(3 * size * size, dtype=torch.int64).mul(2654435761).remainder(251)
        return values.to(torch.uint8).view(1, 3, size, size)

    @torch.inference_mode()
    def forward_images(self, images: Tensor) -> EncoderOutput:
        """Outputs (float32, on the encoder's device) of crops (B, 3, S, S) in bytes, as `preprocess` makes them.

        `image_embedding` is the model's own `encode_image`, not normalized. By default convolutions and matrices run
        in bfloat16 on GPUs that have it and in float32 elsewhere.
        """
        return self.outputs(images)

    def outputs(self, images: Tensor) -> EncoderOutput:
        """The same as `forward_images`, for a graph: the caller decides whether gradients are kept."""
        pixels = self.normalize(images).to(self._input_dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=self._autocasts()):
            tokens, pooled, embedding = self._tower_outputs(self.image_tower, pixels)
        tokens, pooled = tokens.float(), pooled.float()
        tokens = tokens if self.token_pool is None else self.token_pool @ tokens
        return EncoderOutput(tokens, pooled, None if embedding is None else embedding.float())

    def _autocasts(self) -> bool:
        # Asking a GPU takes its memory, so it is asked only where the encoder is on one.
        if self.device.type != "cuda":
            return False
        return _gpu_has_bfloat16() if self._autocast_dtype is None else self._autocast_dtype == "bfloat16"

    def normalize(self, images: Tensor) -> Tensor:
        """The image tower's input (B, 3, S, S), float32, of crops in bytes: mean and deviation taken out."""
        pixels = images.to(self.device, non_blocking=True)
        if self.info.kind == "convolution":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return torch.addcmul(self._shift, pixels, self._scale)

    def pixel_scale(self) -> tuple[Tensor, Tensor]:
        return self._scale, self._shift

    def blocks(self) -> dict[str, nn.Module]:
        return self.rules.blocks(self.image_tower)

    def final_norm(self) -> FinalNorm | None:
        return self.rules.final_norm(self.image_tower)

    def projection(self) -> Tensor | None:
        return self.rules.projection(self.image_tower)

    def check(self) -> None:
        pixels = self.normalize(self._synthetic_image())
        with torch.inference_mode():
            expected = self.own_output(pixels).float()
            _, pooled, embedding = self.rules.outputs(self.image_tower, pixels)
        actual = (pooled if embedding is None else embedding).float()
        difference = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not difference < 1e-3:
            raise ImbvlmError(
                f"the encoder {self.info.name} can't be used: its {type(self.image_tower).__name__} computes something "
                f"unknown here (outputs differ from its own by {difference:.2g} of the largest). Choose another one."
            )


def _relative_difference(outputs: EncoderOutput, expected: EncoderOutput) -> float:
    """The largest norm of a difference over all outputs, as a share of the output's own norm."""
    pairs = [(a, b) for a, b in zip(outputs, expected, strict=True) if a is not None and b is not None]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)


def build_error(source: EncoderSource, weights: str | None, error: BaseException) -> ImbvlmError:
    """The sentence about a model that its library could not build or fill: the first three lines of the cause."""
    lines = str(error).strip().splitlines() or [""]
    cause = " ".join(line.strip() for line in lines[:3])
    if len(lines) > 3:
        cause += f" and {len(lines) - 3} more such lines"
    return ImbvlmError(
        f"can't load the encoder {source.name} from {weights or source.model}: {cause}. Is it this model's file?"
    )


def fingerprint(state: Mapping[str, Tensor], switches: Mapping[str, Any]) -> str:
    """Hex digest of weights by name, and of the switches that no weight shows."""
    digest = hashlib.sha256(json.dumps(switches, sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).numpy().data)
    return digest.hexdigest()


def write_model(
    folder: str,
    weights_file: str,
    state: Mapping[str, Tensor],
    config_file: str,
    description: Mapping[str, Any],
    origin: Origin | None,
) -> None:
    """Write a model's weights, and its library's description of it with its origin."""
    if origin is not None:
        description = {**description, ORIGIN_KEY: asdict(origin)}
    # safetensors takes no tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    storage.write_bytes(storage.join(folder, weights_file), save(tensors))
    storage.write_json(storage.join(folder, config_file), description)


def _preprocess(info: EncoderInfo, evaluation: EvalConfig) -> Preprocess:
    """How images become this encoder's input; raises ImbvlmError for an unknown mode or interpolation."""
    interpolation: Any = evaluation.interpolation or info.interpolation
    mode: Any = info.resize_mode
    return Preprocess(
        info.image_size, evaluation.resize, interpolation, info.mean, info.std, mode, evaluation.jpeg_downscale
    )


def _check_size(model: nn.Module, image_size: int, source: EncoderSource) -> None:
    """Reject a model on the meta device that is too large for its weights file, before it takes that much memory."""
    if not 0 < image_size <= MAX_IMAGE_SIZE:
        raise ImbvlmError(
            f"the encoder {source.name} takes images of {image_size:,} px, and 1 to {MAX_IMAGE_SIZE:,} can be used; "
            "set encoder.image_size."
        )
    num_bytes = source.weights_bytes()
    num_values = sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers()))
    # No format stores a number in less than a byte.
    if num_bytes is not None and num_values > num_bytes:
        raise ImbvlmError(
            f"can't load the encoder {source.name}: its description asks for {num_values:,} numbers, and its weights "
            f"have {num_bytes:,} bytes; they don't belong together. Copy the folder again."
        )


def _check_finite(model: nn.Module, source: EncoderSource) -> None:
    infinite = next((name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()), None)
    if infinite is not None:
        raise ImbvlmError(
            f"the encoder {source.name} has numbers that aren't finite in {infinite}, so that its outputs would mean "
            "nothing. Copy or fetch its weights again."
        )


def _resize(image_tower: Any, image_size: int | None, name: str) -> None:
    rules = visual_rules(image_tower, name)
    if image_size is not None and image_size != _square(image_tower.image_size, name):
        rules.resize(image_tower, image_size)


def _square(size: int | Sequence[int], name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ImbvlmError(
            f"the encoder {name} takes images of {' x '.join(map(str, sorted(sides)))}; only squares can be used."
        )
    return int(sides.pop())


def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
