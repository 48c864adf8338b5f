"""The other side of `sweep`: a script as one writes it with Ray Tune and Ray Train today.

A nested TorchTrainer for every trial; in it a DataLoader, the frozen tower under inference_mode, the decoder, and
validation after every epoch. `python tune_script.py SETTINGS.json` writes `out`: seconds of fit() and
every trial's reports.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F
from PIL import Image
from ray import train, tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from torch.utils.data import DataLoader, Dataset, Sampler

from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.training_sections import SgdConfig
from imbvlm.longtail.class_sampling import epoch_plan
from imbvlm.models.decoder import Decoder
from imbvlm.training.step.optimizers import lr_factor


class Images(Dataset):
    def __init__(self, manifest: str, split: str, transform: Callable[..., Any]) -> None:
        rows = [row for row in pq.read_table(manifest).to_pylist() if row["split"] == split]
        folder = Path(manifest).parent
        self.paths, self.labels = [folder / row["uri"] for row in rows], [row["label"] for row in rows]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.paths[row]).convert("RGB")), self.labels[row]


class InOrder(Sampler[int]):
    """Each epoch's images in the sweep's order, so that both sides' numbers can be compared."""

    def __init__(self, labels: list[int], num_classes: int, num_epochs: int) -> None:
        self.epoch = 0
        self._plan = partial(epoch_plan, labels, num_classes, "instance_balanced", 0, num_epochs=num_epochs)
        self._size = len(labels)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        return iter(self._plan(self.epoch).rows.tolist())


class WholeDecoder(Decoder):
    """The same blocks, each over all tokens."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.input_norm(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens[:, 0]


class Clock:
    """Seconds of each kind of work so far: of the CPU where that computes, which what else runs doesn't change."""

    def __init__(self, device: str) -> None:
        self.seconds = dict.fromkeys(("wait", "tower", "decoder"), 0.0)
        self._time = time.perf_counter if device == "cuda" else time.process_time
        self._at = self._time()

    def note(self, kind: str) -> None:
        now = self._time()
        self.seconds[kind] += now - self._at
        self._at = now


def train_loop(config: dict) -> None:
    settings = config["settings"]
    device = settings["device"]
    clock = Clock(device)
    torch.set_num_threads(settings["num_threads"])
    model, _, transform = open_clip.create_model_and_transforms(settings["tower"])
    tower = model.visual.eval().to(device)
    width = tower.ln_post.normalized_shape[0]
    final_norm = (tower.ln_post.weight.detach(), tower.ln_post.bias.detach(), tower.ln_post.eps)
    torch.manual_seed(0)
    decoder = WholeDecoder(width, DecoderConfig(depth=settings["depth"]), True, final_norm).to(device)
    classifier = torch.nn.Linear(width, settings["num_classes"]).to(device)
    params = [*decoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(
        params, lr=config["one"]["lr"], momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    size = settings["batch_size"]
    data = {split: Images(settings["manifest"], split, transform) for split in ("train", "val")}
    order = InOrder(data["train"].labels, settings["num_classes"], settings["num_epochs"])
    loaders = {
        split: DataLoader(images, size, sampler=sampler, num_workers=1, persistent_workers=True)
        for (split, images), sampler in zip(data.items(), (order, None), strict=True)
    }
    priors = torch.from_numpy(np.bincount(data["train"].labels, minlength=settings["num_classes"]) / len(data["train"]))
    adjust = torch.log(priors).float().to(device) if config["one"]["loss"] == "balanced_softmax" else 0.0
    num_steps, step = settings["num_epochs"] * len(loaders["train"]), 0

    def half() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def batches(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in loaders[split]:
            clock.note("wait")
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with torch.inference_mode(), half():
                tokens = tower.transformer(tower._embeds(images))
            # What inference_mode made can't be kept for a backward pass.
            tokens = tokens.clone()
            if device == "cuda":
                torch.cuda.synchronize()
            clock.note("tower")
            yield tokens, labels
            clock.note("decoder")

    for epoch in range(settings["num_epochs"]):
        begin, order.epoch = time.perf_counter(), epoch
        clock.seconds = dict.fromkeys(clock.seconds, 0.0)
        for tokens, labels in batches("train"):
            with half():
                loss = F.cross_entropy(classifier(decoder(tokens)).float() + adjust, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = config["one"]["lr"] * lr_factor(SgdConfig(), step, num_steps)
            optimizer.step()
            step += 1
        predicted, true = [], []
        with torch.no_grad(), half():
            for tokens, labels in batches("val"):
                predicted.append(classifier(decoder(tokens)).argmax(1))
                true.append(labels)
        right, true = (torch.cat(predicted) == torch.cat(true)).float(), torch.cat(true)
        accuracy = float(torch.stack([right[true == label].mean() for label in true.unique()]).mean())
        train.report(
            {
                "epoch": epoch + 1,
                "val_balanced_accuracy": accuracy,
                "epoch_seconds": time.perf_counter() - begin,
                **clock.seconds,
            }
        )


def trial(config: dict) -> None:
    settings = config["settings"]
    gpu = {"GPU": 1 / settings["at_once"]} if settings["device"] == "cuda" else {}
    TorchTrainer(
        train_loop,
        train_loop_config=config,
        scaling_config=train.ScalingConfig(
            num_workers=1, use_gpu=bool(gpu), resources_per_worker={"CPU": settings["cpus"], **gpu}
        ),
        run_config=train.RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}",
            storage_path=settings["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    ray.init(include_dashboard=True, log_to_driver=False)
    at_once = settings["at_once"]
    # A trial's own process computes nothing: its worker gets the cores.
    settings["cpus"] = (ray.cluster_resources()["CPU"] - 0.1 * at_once) / at_once
    settings["num_threads"] = max(1, round(settings["cpus"]))
    begin = time.time()
    found = tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.1}),
        param_space={"one": tune.grid_search(settings["configs"]), "settings": settings},
        tune_config=tune.TuneConfig(metric="val_balanced_accuracy", mode="max", max_concurrent_trials=at_once),
        run_config=tune.RunConfig(storage_path=settings["storage"], verbose=0),
    ).fit()
    end = time.time()
    for result in found:
        if result.error is not None:
            raise result.error
    answer = {
        "begin": begin,
        "end": end,
        "fit": end - begin,
        "trials": [{**result.metrics_dataframe.to_dict("list"), "one": result.config["one"]} for result in found],
    }
    Path(settings["out"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
