"""Trained members of blends, and the logits that a blend of them must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_images import PER_CLASS, TinyImages

from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.decoding import decode
from imbvlm.data.manifest import Manifest
from imbvlm.inference.blend_folder import write_blend
from imbvlm.inference.blend_merging import TrainedMember
from imbvlm.inference.blend_network import BlendNetwork
from imbvlm.inference.model_folder import load, write_model
from imbvlm.inference.predictor import LogitPostprocessor, Model
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_state import own_state_dict
from imbvlm.training.trial_run import build_trial

CLASS_NAMES = tuple(f"class {label}" for label in range(5))
COUNTS = (30, 12, 6, 3, 0)
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "decoder": {"decoder__depth": 1, "decoder__num_heads": 2},
    "prompt_tuning": {"optim__lr": 0.05},
    "fine_tuning": {"fine_tuning__layer_decay": 1.0},
}


def adjusted(tau: float, alpha: float = 0.0, temperature: float = 1.0, width: int = 24) -> LogitPostprocessor:
    """An adjustment with random class embeddings where it mixes in zero-shot logits."""
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.nn.functional.normalize(torch.randn(5, width, generator=generator), dim=1)
    return LogitPostprocessor(PostHocAdjustment(tau, alpha, temperature), COUNTS, embeddings if alpha else None)


def member(
    problem: TinyImages,
    method: str,
    weight: float = 1.0,
    temperature: float = 1.0,
    post_hoc: LogitPostprocessor | None = None,
    seeds: Sequence[int] = (0,),
    **overrides: object,
) -> TrainedMember:
    """A member that was trained for an epoch with each seed; its encoder has its own configuration's size."""
    chosen = {**OVERRIDES.get(method, {}), **overrides}
    config = problem.config(method, **chosen)
    refits = [_refit(problem, _seeded(config, seed)) for seed in seeds]
    encoder = create_encoder(config.encoder, config.eval)
    return TrainedMember(f"{method}-{weight:g}", config, refits, encoder, weight, temperature, post_hoc)


def _seeded(config: TrialConfig, seed: int) -> TrialConfig:
    return config if config.train is None else config.with_overrides({"train.seed": seed, "train.num_epochs": 1})


def _refit(problem: TinyImages, config: TrialConfig) -> dict[str, torch.Tensor]:
    run = build_trial(config, problem.data(config))
    list(run.epochs())
    tensors = own_state_dict(run.model.eval())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def blend(folder: Path, members: Sequence[TrainedMember]) -> Model:
    """The blend, written and loaded."""
    write_blend(str(folder), members, CLASS_NAMES, {})
    return load(folder, "cpu")


def network_of(model: Model) -> BlendNetwork:
    assert isinstance(model.network, BlendNetwork)
    return model.network


def single(folder: Path, part: TrainedMember) -> Model:
    """A member alone, as an export of one classifier."""
    encoder = create_encoder(part.config.encoder, part.config.eval)
    write_model(str(folder), part.config, dict(part.refits[0]), encoder, CLASS_NAMES, {}, part.post_hoc)
    return load(folder, "cpu")


def pictures(problem: TinyImages) -> list[np.ndarray]:
    """The decoded images of the validation split."""
    manifest = Manifest.read(problem.manifest)
    contents = manifest.table.column("bytes").to_pylist()
    images = [decode(contents[row]) for row in manifest.rows_of("val")]
    assert len(images) == 5 * PER_CLASS
    return images


def crops(model: Model, images: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """The crops (B, V, 3, S, S) of each of the model's inputs."""
    return [
        torch.from_numpy(np.stack([[each.apply(image, crop) for crop in range(each.num_crops)] for image in images]))
        for each in model.inputs
    ]


def adjusted_logits(model: Model, images: Sequence[np.ndarray]) -> torch.Tensor:
    """The logits (B, C) that a model's probabilities are of, in float64."""
    with torch.inference_mode():
        logits: torch.Tensor = model.network(*crops(model, images))[1]
    return logits.double()


def weighted_mean(folder: Path, members: Sequence[TrainedMember], images: Sequence[np.ndarray]) -> torch.Tensor:
    """The weighted mean of members' adjusted logits, each divided by its temperature and exported alone."""
    total = torch.zeros(len(images), 5, dtype=torch.float64)
    for number, part in enumerate(members):
        logits = adjusted_logits(single(folder / f"single-{number}", part), images)
        total += part.weight * logits / part.temperature
    return total / sum(part.weight for part in members)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))
