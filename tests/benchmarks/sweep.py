"""A whole sweep against a Ray Tune script: 16 decoders behind a frozen tower, each side as a command of its own.

Ours runs all 16 trials. Each trial of the script does the same work again, so only `--script-trials` of its 16 are run,
two at a time, and its fit() is multiplied; with `--script-trials 16` nothing is.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import made
import numpy as np
import torch
from cpu import WatchedCommand
from table import Line, Options, limited, seconds, shown, times
from tune_script import WholeDecoder

from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.training_sections import TrainConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.encoder_worker import BATCH_ON_CPU
from imbvlm.features.extraction_plan import resolve_compute_dtype
from imbvlm.models.decoder import Decoder
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.sweep.records.trial_log import TrialLog
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.step.compute_context import ComputeContext

NUM_TRIALS, NUM_EPOCHS, BATCH_SIZE, DEPTH, NUM_CLASSES = 16, 4, 32, 3, 20
LOSSES = ("cross_entropy", "balanced_softmax")
RATES = tuple(round(float(rate), 5) for rate in np.geomspace(0.003, 0.1, NUM_TRIALS // len(LOSSES)))
METRIC = "val/balanced_accuracy"
# Of every epoch, by loss and learning rate.
Accuracies = Mapping[tuple[str, float], list[float]]


@dataclass(frozen=True)
class Ours:
    """One run of `imbvlm sweep run`: seconds to the end of the search, also of CPU, and of the command; its trials."""

    search: float
    cpu: float
    command: float
    until_first_trial: float
    num_epochs: int
    accuracies: Accuracies


@dataclass(frozen=True)
class Script:
    """The script over all 16 trials: its seconds, those of CPU, and how they are spent.

    `spent` is of the CPU's seconds, or of wall time where a GPU computes.
    """

    whole: float
    cpu: float
    spent: Mapping[str, float]
    accuracies: Accuracies


def lines(options: Options) -> Iterator[Line]:
    num_train = options.images or (4000 if options.large else 240)
    num_val = num_train // 3
    architecture = "ViT-L-14" if options.large else "ViT-B-32"
    tower = made.tower(options.folder / "tower", architecture)
    manifest = made.image_manifest(options.folder / "data", num_train, num_val, NUM_CLASSES)
    num_run = options.script_trials
    yield shown(f"{NUM_TRIALS} trials of {NUM_EPOCHS} epochs: {architecture}, decoder of depth {DEPTH}", "")
    yield shown(f"  on {num_train:,} training and {num_val:,} validation images; {num_run} of the script's trials", "")
    on_gpu = options.device == "cuda"
    plain, asha = (run_ours(options, tower, manifest, name) for name in ("none", "asha"))
    script = run_script(options, tower, manifest, num_run)
    config = zero_shot(manifest, tower)
    info = describe_encoder(config.encoder)
    cost = costs(config, info, options.device)
    scripts, decoder_in = "bfloat16" if on_gpu else "float32", by_itself(options.device)
    tower_in = resolve_compute_dtype(config, info)
    yield shown("  what the script computes in; our tower; our decoder", f"{scripts}; {tower_in}; {decoder_in}")
    yield times("as shipped, but ASHA off on both sides", plain.search, script.whole, "s", 10)
    yield times("as shipped, so with ASHA, the script without", asha.search, script.whole, "s", 20)
    left = {"decoder": cost["whole in bfloat16"] / cost["whole"], "tower": cost["tower in bfloat16"] / cost["tower"]}
    differs = {name: left[name] for name, kind in (("decoder", decoder_in), ("tower", tower_in)) if kind != scripts}
    if differs:
        share = 1 - sum(script.spent[name] * (1 - part) for name, part in differs.items()) / script.cpu
        for words, one in (("ASHA off", plain), ("ASHA on", asha)):
            what = f"  the script in that as well (worked out), {words}"
            yield times(what, one.search, share * script.whole, "s")
    for words, one in (("ASHA off", plain), ("ASHA on", asha)):
        yield times(f"  CPU seconds of the same, {words}", one.cpu, script.cpu, "s")
    commands = ", ".join(f"{one.command:.0f}" for one in (plain, asha))
    yield shown("  with refit, report and end, of both", f"{commands} s")
    yield from _parts(options, cost, script, plain, asha, num_train + num_val, tower_in, decoder_in)
    for words, one in (("ASHA off", plain), ("ASHA on", asha)):
        yield from _same_accuracy(words, one.accuracies, script.accuracies, num_val)


def by_itself(device: str) -> str:
    """What a decoder's trial computes in by the defaults."""
    with ComputeContext(TrainConfig(), torch.device(device), 1, NUM_CLASSES, is_decoder=True).autocast():
        return "bfloat16" if torch.is_autocast_enabled(device) else "float32"


def _same_accuracy(words: str, ours: Accuracies, theirs: Accuracies, num_val: int) -> Iterator[Line]:
    """Of configurations that both sides ran, at the last epoch that both did: ASHA ends trials early."""
    last = [min(len(ours[key]), len(theirs[key])) - 1 for key in theirs]
    pairs = np.array([(ours[key][at], theirs[key][at]) for key, at in zip(theirs, last, strict=True)])
    mean = pairs.mean()
    yield shown(f"  balanced accuracy; {words}; script's", f"{pairs[:, 0].mean():.3f}; {pairs[:, 1].mean():.3f}")
    error = float(np.sqrt(mean * (1 - mean) / num_val))
    apart = float(np.abs(pairs[:, 0] - pairs[:, 1]).max())
    yield limited("    largest difference, at most twice the binomial standard error", apart, "", 2 * error)


def _parts(
    options: Options,
    cost: Mapping[str, float],
    script: Script,
    plain: Ours,
    asha: Ours,
    images: int,
    tower_in: str,
    decoder_in: str,
) -> Iterator[Line]:
    """What each part leaves of the script's seconds, by what was measured of it; then the sweep's own seconds."""
    on_gpu = options.device == "cuda"
    left = sum(script.spent.values())
    yield shown(f"  {'wall' if on_gpu else 'CPU'} seconds of the script", left)
    yield shown(f"    {', '.join(script.spent)}", ", ".join(f"{one:.0f}" for one in script.spent.values()))
    once = script.spent["tower"] / (NUM_TRIALS * NUM_EPOCHS)
    left += once - script.spent["tower"]
    yield shown("  left with each image through the tower once", left)
    left -= script.spent["starts and loading"]
    yield shown("  left without processes and loaders for each trial", left)
    left += script.spent["decoder"] * (cost["one token"] / cost["whole"] - 1)
    yield shown("  left with the last block on the class token alone", left)
    if decoder_in == "bfloat16" and not on_gpu:
        left += script.spent["decoder"] * (cost["bfloat16"] - cost["one token"]) / cost["whole"]
        yield shown("  left with bfloat16 in the decoder", left)
    if tower_in == "bfloat16" and not on_gpu:
        left += once * (cost["tower in bfloat16"] / cost["tower"] - 1)
        yield shown("  left with bfloat16 in the tower", left)
    yield shown("  measured, ASHA off", plain.search if on_gpu else plain.cpu)
    share = asha.num_epochs / plain.num_epochs
    yield shown(
        f"  measured, ASHA on, which ran {100 * share:.0f} % of the epochs", asha.search if on_gpu else asha.cpu
    )
    yield shown(f"  wall time until the first trial: Ray's start and {images:,} images", plain.until_first_trial, "s")


def run_ours(options: Options, tower: str, manifest: str, scheduler: str) -> Ours:
    folder = options.folder / f"ours-{scheduler}"
    folder.mkdir()
    spec = SweepSpec.from_tree(
        {
            "name": "bench",
            "base": {
                "data": {"manifest": manifest}, "encoder": {"name": tower}, "method": "decoder",
                "decoder": {"depth": DEPTH}, "classifier": {"kind": "linear"}, "eval": {"resize": 1.0},
                "train": {"num_epochs": NUM_EPOCHS, "batch_size": BATCH_SIZE},
            },
            "space": {"parameters": {"loss.name": {"choice": list(LOSSES)}, "optim.lr": {"choice": list(RATES)}}},
            "num_trials": NUM_TRIALS, "trial_scheduler": {"name": scheduler}, "refit_seeds": [0],
            "gpus_per_worker": 0.25 if options.device == "cuda" else 0.0,
        }
    )  # fmt: skip
    (folder / "bench.yaml").write_text(dump_yaml(spec.to_tree()))
    command = ["-m", "imbvlm", "sweep", "run", str(folder / "bench.yaml"), "--storage", str(folder)]
    ran = WatchedCommand([sys.executable, *command], folder / "out.log")
    (found,) = folder.glob("bench-*")
    log = TrialLog.read(str(found))
    search = log.of("search")
    assert len(search) == NUM_TRIALS, "every configuration is tried once"
    end = max(record.ended_at or 0.0 for record in search)
    return Ours(
        end - ran.began,
        ran.cpu_seconds(end),
        ran.seconds,
        min(record.started_at for record in log.records.values()) - ran.began,
        sum(len(record.epochs) for record in search),
        {
            (one.config["loss"]["name"], one.config["optim"]["lr"]): [epoch[METRIC] for epoch in one.epochs]
            for one in search
        },
    )


def run_script(options: Options, tower: str, manifest: str, num_run: int) -> Script:
    folder = options.folder / "script"
    folder.mkdir()
    configs = [{"loss": loss, "lr": rate} for rate in RATES for loss in LOSSES]
    settings = {
        "tower": tower, "manifest": manifest, "depth": DEPTH, "num_classes": NUM_CLASSES, "batch_size": BATCH_SIZE,
        "num_epochs": NUM_EPOCHS, "storage": str(folder / "ray"), "device": options.device,
        "out": str(folder / "out.json"), "at_once": 2,
        # From the middle of the grid on: rates that learn something.
        "configs": (configs[NUM_TRIALS // 2 :] + configs)[:num_run],
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    script = str(Path(__file__).with_name("tune_script.py"))
    ran = WatchedCommand([sys.executable, script, str(folder / "settings.json")], folder / "out.log")
    answer = json.loads(Path(settings["out"]).read_text())
    factor = NUM_TRIALS / num_run
    whole = ran.seconds + (factor - 1) * answer["fit"]
    cpu = ran.cpu_seconds() + (factor - 1) * (ran.cpu_seconds(answer["end"]) - ran.cpu_seconds(answer["begin"]))
    at_once = settings["at_once"] if options.device == "cuda" else 1
    spent = {
        name: factor * sum(map(sum, (trial[name] for trial in answer["trials"]))) / at_once
        for name in ("tower", "decoder")
    }
    spent["starts and loading"] = (whole if options.device == "cuda" else cpu) - sum(spent.values())
    accuracies = {
        (trial["one"]["loss"], trial["one"]["lr"]): trial["val_balanced_accuracy"] for trial in answer["trials"]
    }
    return Script(whole, cpu, spent, accuracies)


def zero_shot(manifest: str, tower: str) -> TrialConfig:
    tree = {"data": {"manifest": manifest}, "encoder": {"name": tower}, "method": "zero_shot", "eval": {"resize": 1.0}}
    return TrialConfig.from_tree(tree)


def costs(config: TrialConfig, info: EncoderInfo, device: str) -> dict[str, float]:
    """Seconds of one thread, in main memory: a training step of a decoder of each kind, and a batch in the tower."""
    clock, threads = time.perf_counter if device == "cuda" else time.process_time, torch.get_num_threads()
    torch.set_num_threads(1)
    tokens = torch.randn(BATCH_SIZE, info.num_tokens, info.token_width, device=device)
    found = {}
    for name, kind, precision in (
        ("whole", WholeDecoder, torch.float32),
        ("one token", Decoder, torch.float32),
        ("bfloat16", Decoder, torch.bfloat16),
        ("whole in bfloat16", WholeDecoder, torch.bfloat16),
    ):
        decoder = kind(info.token_width, DecoderConfig(depth=DEPTH), True).to(device)
        found[name] = seconds(made.training_step(decoder, tokens, precision), 5, clock)
    encoder = create_encoder(config.encoder, config.eval, device)
    images = torch.zeros(BATCH_ON_CPU, 3, info.image_size, info.image_size, dtype=torch.uint8)
    for name, precision in (("tower", "float32"), ("tower in bfloat16", "bfloat16")):
        encoder.compute_in(precision)
        found[name] = seconds(lambda: encoder.forward_images(images).pooled.sum().item(), 2, clock)
    torch.set_num_threads(threads)
    return found
