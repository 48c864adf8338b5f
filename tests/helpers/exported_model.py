"""A small exported model: a debug ViT with a linear classifier, adjusted with everything that can be."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from towers import write_tower

from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.inference.model_folder import write_model
from imbvlm.inference.predictor import LogitPostprocessor
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_builder import _decoder

CLASS_NAMES = ("cat", "dog, wet", 'çöl "fox"')


def write_model_folder(folder: Path, kind: str = "vit", method: str = "linear_probe", **tower: object) -> Path:
    """Write the tower and a model on it; returns the model's folder. `tower` has further keys of its section."""
    section = {"name": write_tower(folder / "tower", kind), **tower}
    encoder = create_encoder(EncoderConfig(**section), EvalConfig())
    tree = {"data": {"manifest": "m"}, "encoder": section, "optim": {"lr": 0.1}}
    config = TrialConfig.from_tree({**tree, "method": method, "classifier": {"kind": "linear"}})
    torch.manual_seed(0)
    decoder, width = _decoder(config, encoder.info, {})
    weights = {
        "classifier.weight": torch.randn(len(CLASS_NAMES), width),
        "classifier.bias": torch.zeros(len(CLASS_NAMES)),
        **{f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()},
    }
    embeddings, alpha = None, 0.0
    if encoder.info.has_text:
        embeddings, alpha = torch.nn.functional.normalize(torch.randn(3, encoder.info.embedding_width), dim=1), 0.3
    step = LogitPostprocessor(PostHocAdjustment(0.7, alpha, 2.0), (90, 9, 1), embeddings)
    write_model(str(folder / "model"), config, weights, encoder, CLASS_NAMES, {}, step)
    return folder / "model"


def write_noise(folder: Path) -> Path:
    """Write eight photos of noise, and one that is cut off, into a folder; returns the folder."""
    for seed in range(8):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8")
    return folder
