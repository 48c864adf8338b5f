"""Trials of every kind, run on a device given, for test_device: all that would meet a GPU with tensors of the CPU.

    python tests/helpers/device_cases.py FOLDER [WORD ...]

prints what each gives on the CPU and on a device that isn't there, or what it raises, as JSON; of those alone that have
one of the words in their name, where there are any. Left out are what computes again on the way back (gradient
checkpointing) and second stages stacked by vmap, which that device can't do.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    import other_device

import torch
from tiny_images import TinyImages
from trial_logits import trial_logits

from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import SECOND_STAGES
from imbvlm.inference.model_folder import load, write_model
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.training import checkpoint
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_run import build_trial

if TYPE_CHECKING:
    from imbvlm.config.trial_config import TrialConfig

Numbers = list[float]
Case = Callable[[torch.device], Numbers]


def cases(folder: Path) -> dict[str, Case]:
    """By name; each gives numbers that don't depend on the device."""
    problems = {kind: TinyImages(folder / kind, kind) for kind in ("vit", "resnet")}
    found: dict[str, Case] = {}

    def add(name: str, kind: str, method: str, **keys: object) -> None:
        config = problems[kind].config(method, **({"train__num_epochs": 2} if METHODS[method].trains else {}), **keys)
        found[name] = lambda device: trained(problems[kind], config, device)

    for kind in problems:
        for method, entry in METHODS.items():
            if kind == "resnet" and method in ("adapter", "lora"):
                continue
            for stored in (True, False) if entry.trains and not entry.trains_encoder else (True,):
                add(f"{method}, {kind}, {'stored' if stored else 'images'}", kind, method, features__store=stored)
    for name in LOSSES:
        add(f"loss {name}", "vit", "linear_probe", loss__name=name)
    add("ldam, reweighted late", "vit", "linear_probe", loss__name="ldam", loss__reweight_from=0.5)
    for name in SECOND_STAGES:
        for kind in ("linear",) if SECOND_STAGES[name].reads_weight_norms else ("linear", "cosine"):
            keys = {"second_stage__name": name, "classifier__kind": kind}
            keys |= {} if name == "tau_normalization" else {"second_stage__num_epochs": 2}
            add(f"second stage {name}, {kind}", "vit", "linear_probe", **keys)
            add(f"decoder, second stage {name}, {kind}", "vit", "decoder", **keys)
    for start in ("text", "class_mean"):
        for method in ("linear_probe", "decoder", "adapter"):
            same = {"decoder__init": "identity"} if method == "decoder" else {}
            add(f"{method} from {start}", "vit", method, classifier__kind="cosine", classifier__init=start, **same)
    add("decoder, narrow", "vit", "decoder", decoder__width=8, optim__name="adamw")
    add("decoder, no block", "vit", "decoder", decoder__depth=0, decoder__input_norm="none")
    add("decoder, bytes, 2 x 2", "vit", "decoder", features__int8_tokens=True, encoder__token_pooling=2)
    add("label smoothing", "vit", "linear_probe", loss__name="balanced_softmax", loss__label_smoothing=0.1)
    add("features mixed", "vit", "linear_probe", feature_augmentation__mixup=0.3)
    add("views", "vit", "linear_probe", features__num_views=2, data__class_sampling="progressively_balanced")
    add("five crops, stored", "vit", "linear_probe", eval__tte="five_crop")
    add("five crops, images", "vit", "adapter", eval__tte="five_crop")
    add("images mixed", "vit", "lora", mixing__mixup=0.3, mixing__cutmix=1.0)
    add("images turned", "vit", "adapter", augmentation__rand_ops=2, augmentation__color_jitter=0.4)
    add("memory", "vit", "fine_tuning", memory__accumulation=2)
    add("context per class", "vit", "prompt_tuning", prompt_tuning__per_class=True)
    add("context from words", "vit", "prompt_tuning", prompt_tuning__init_words="a photo")
    rates = [{"optim__lr": rate, "loss__name": name} for rate in (0.01, 0.1) for name in LOSSES]
    stages = [
        {"second_stage__name": name, "classifier__kind": "linear"} | ({"second_stage__num_epochs": 1} if more else {})
        for name in SECOND_STAGES
        for more in [name != "tau_normalization"]
    ]
    for name, method, members in (
        ("pack of probes", "linear_probe", rates),
        ("pack of cosine probes", "linear_probe", [one | {"classifier__kind": "cosine"} for one in rates]),
        ("pack of decoders", "decoder", stages),
    ):
        configs = [problems["vit"].config(method, train__num_epochs=2, **one) for one in members]
        found[name] = lambda device, configs=configs: packed(problems["vit"], configs, device)
    for method in ("linear_probe", "adapter", "prompt_tuning"):
        config = problems["vit"].config(method, train__num_epochs=2)
        found[f"{method}, resumed"] = lambda device, config=config: resumed(problems["vit"], config, device)
        found[f"{method}, exported"] = lambda device, config=config, method=method: exported(
            problems["vit"], config, folder / f"{method}-{device.type}", device
        )
    return found


def trained(problem: TinyImages, config: TrialConfig, device: torch.device) -> Numbers:
    run = build_trial(config, problem.data(config), device)
    losses = [result.metrics["val/loss"] for result in run.epochs()]
    return [*losses, *trial_logits(run, run.data.val).cpu().flatten().tolist()]


def packed(problem: TinyImages, configs: list[TrialConfig], device: torch.device) -> Numbers:
    pack, runs = TrialPack(), [build_trial(config, problem.data(config), device) for config in configs]
    for run in runs:
        run.join(pack)
    turns = zip(*[run.epochs() for run in runs], strict=True)
    return [result.metrics["val/loss"] for turn in turns for result in turn]


def resumed(problem: TinyImages, config: TrialConfig, device: torch.device) -> Numbers:
    """From a checkpoint behind the first epoch."""
    first = build_trial(config, problem.data(config), device)
    next(first.epochs())
    place = str(problem.folder / f"{config.method}-{device.type}")
    checkpoint.save_checkpoint(place, first.state_dict())
    again = build_trial(config, problem.data(config), device)
    again.load_state_dict(checkpoint.load_checkpoint(place))
    return [result.metrics["val/loss"] for result in again.epochs()]


def exported(problem: TinyImages, config: TrialConfig, folder: Path, device: torch.device) -> Numbers:
    """What a model predicts on the device."""
    run = build_trial(config, problem.data(config), device)
    list(run.epochs())
    checkpoint.save_model(str(folder / "trained"), run.model.eval())
    tower, saved = (
        create_encoder(config.encoder, config.eval),
        checkpoint.load_model_tensors(str(folder / "trained")),
    )
    write_model(str(folder / "model"), config, saved, tower, run.data.class_names, {})
    model = load(folder / "model", device)
    crops = torch.randint(0, 256, (4, 3, tower.info.image_size, tower.info.image_size), dtype=torch.uint8)
    return [value for _, values in model.classify([crops.numpy()], 3) for value in values]


def outcome(case: Case, device: torch.device) -> Numbers | str:
    """What it gives, or the error and where it came from."""
    torch.manual_seed(0)
    try:
        return case(device)
    except Exception:  # noqa: BLE001
        return traceback.format_exc()[-1500:]


def main() -> None:
    there = torch.device(other_device.NAME)
    found: dict[str, list[Numbers | str]] = {}
    words = sys.argv[2:] or [""]
    for name, case in cases(Path(sys.argv[1])).items():
        if not any(word in name for word in words):
            continue
        here = outcome(case, torch.device("cpu"))
        with other_device.Computing():
            found[name] = [here, outcome(case, there)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
