"""Trials that train together against the same trials one after another; CPU seconds, in process, without Ray."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import made
import numpy as np
import torch
from table import Line, Options, in_turn, limited, shown, times
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from imbvlm.config.model_sections import DecoderConfig
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.models.decoder import Decoder
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_run import build_trial

LOSSES = ("cross_entropy", "balanced_softmax", "logit_adjustment", "focal")
# What a pack gives is what each member gives alone, to this share of it.
MOST_APART = 1e-5


def lines(options: Options) -> Iterator[Line]:
    sizes = ((10, 512, False, 5.0), (10, 1280, False, 5.0), (10, 1280, True, None), (100, 768, True, None))
    number, epochs = 32, 4
    for num_classes, width, cosine, wanted in sizes:
        rows = 40_000 if options.large else 2_500
        folder = options.folder / f"packs{num_classes}-{width}-{cosine}"
        features = made.stored_features(
            folder, rows, num_classes=num_classes, width=width, num_val=500, noise=20.0, scale=0.05
        )
        configs = members(number, epochs, cosine)
        kinds = "linear and cosine" if cosine else "linear"
        what = f"{number} {kinds} classifiers, {num_classes:,} classes, {rows:,} x {width}, {epochs} epochs"
        yield from _compared(what, configs, features, options, wanted)
    yield from _second_stages(options, number, epochs)
    yield from _decoders(options)


def _second_stages(options: Options, number: int, epochs: int) -> Iterator[Line]:
    """The same probes, each with a second stage of as many epochs; both stages are counted."""
    features = made.stored_features(
        options.folder / "stages", 2_500, num_classes=10, width=512, num_val=500, noise=20.0, scale=0.05
    )
    for name in ("classifier_retraining", "disalign"):
        keys = {"second_stage.name": name, "second_stage.num_epochs": epochs}
        configs = [one.with_overrides(keys) for one in members(number, epochs, cosine=False)]
        yield from _compared(f"{number} linear classifiers and {name}, 10 classes", configs, features, options)


def _compared(
    what: str, configs: list[TrialConfig], features: FeatureSet, options: Options, wanted: float | None = None
) -> Iterator[Line]:
    """Trials together beside one after another, and how far apart their numbers are."""
    data = TrialData.open(configs[0], features)
    # The first of either pays for what torch loads late.
    _together(configs[:2], data, options), _alone(configs[:2], data, options)
    alone, one_after_another = _timed(_alone, configs, data, options)
    together, packed = _timed(_together, configs, data, options)
    yield times(what, packed, one_after_another, "s", wanted)
    apart = max(abs(together[place] / alone[place] - 1) for place in alone)
    what = "  largest difference of validation loss, of its size"
    # On a GPU trials compute in bfloat16, of which nothing is claimed.
    yield shown(what, f"{apart:.1e}") if options.device == "cuda" else limited(what, apart, "", MOST_APART)


def members(number: int, epochs: int, cosine: bool = True) -> list[TrialConfig]:
    """Linear, or half of them cosine with temperatures of their own; four losses, and a rate for each."""
    linear = {"classifier__kind": "linear"}
    return [
        made.trial(
            "linear_probe", train__num_epochs=epochs, optim__lr=float(10 ** np.interp(place, (0, number), (-2, -0.5))),
            loss__name=LOSSES[place % 4],
            **({"classifier__temperature": 0.02 + place / 1000} if cosine and place % 8 > 3 else linear),
        )
        for place in range(number)
    ]  # fmt: skip


def _timed(work: Callable[..., dict[int, float]], *arguments: Any) -> tuple[dict[int, float], float]:
    """What `work` gives, and seconds: of CPU where it computes there, so that other work on the machine is left out."""
    clock = perf_counter if arguments[-1].device == "cuda" else process_time
    begin = clock()
    return work(*arguments), clock() - begin


def _alone(configs: list[TrialConfig], data: TrialData, options: Options) -> dict[int, float]:
    found = {}
    for place, config in enumerate(configs):
        *_, last = build_trial(config, data, options.device).epochs()
        found[place] = last.metrics["val/loss"]
    return found


def _together(configs: list[TrialConfig], data: TrialData, options: Options) -> dict[int, float]:
    pack, runs = TrialPack(), [build_trial(config, data, options.device) for config in configs]
    for run in runs:
        run.join(pack)
    generators = [run.epochs() for run in runs]
    for results in zip(*generators, strict=True):
        found = {place: result.metrics["val/loss"] for place, result in enumerate(results)}
    return found


def _decoders(options: Options) -> Iterator[Line]:
    """Decoders of one shape by turns on each batch; stacked by torch.func, which packs don't do; from a cold disk."""
    number = 8
    for depth, width, num_tokens, token_width, rows in (
        (3, 768, 50, 768, 8192 if options.large else 32), (1, 192, 5, 1280, 2_500), (1, 64, 5, 512, 2_500),
    ):  # fmt: skip
        features = made.stored_features(
            options.folder / f"decoders{width}", rows, num_classes=10, width=token_width, num_tokens=num_tokens,
            outputs=("tokens",), num_val=64,
        )  # fmt: skip
        configs = _decoder_trials(number, depth, width)
        what = f"{number} decoders, depth {depth}, width {width}, {num_tokens} tokens of {token_width:,}"
        yield from _compared(f"{what}, {rows:,} images", configs, features, options)
        yield _stacked_step(options, number, DecoderConfig(depth=depth, width=width), num_tokens, token_width)
    yield _from_a_cold_disk(options, number)


def _decoder_trials(number: int, depth: int, width: int) -> list[TrialConfig]:
    return [
        made.trial(
            "decoder", train__num_epochs=1, train__batch_size=32, decoder__depth=depth, decoder__width=width,
            optim__lr=1e-4 * (1 + place), loss__name=LOSSES[place % 4],
        )
        for place in range(number)
    ]  # fmt: skip


def _stacked_step(options: Options, number: int, decoder: DecoderConfig, num_tokens: int, token_width: int) -> Line:
    """A training step of decoders of one shape, stacked by torch.func: why packs let them take turns."""
    decoders = [Decoder(token_width, decoder, True).to(options.device) for _ in range(number)]
    tokens = torch.randn(32, num_tokens, token_width, device=options.device)
    params, buffers = stack_module_state(decoders)

    def loss_of(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(decoders[0], (params, buffers), (tokens,)).square().mean()

    def together() -> None:
        vmap(loss_of)(params, buffers).sum().backward()

    def one_after_another() -> None:
        for one in decoders:
            one(tokens).square().mean().backward()

    clock = perf_counter if options.device == "cuda" else process_time
    taken = in_turn({"together": together, "alone": one_after_another}, 1, clock)
    return times("  a step of theirs in float32, stacked by torch.func", taken["together"], taken["alone"])


def _from_a_cold_disk(options: Options, number: int) -> Line:
    """Wall time where no page of the tokens is in memory as an epoch begins, as with a store larger than memory."""
    rows = 20_000 if options.large else 2_000
    folder = options.folder / "cold"
    features = made.stored_features(
        folder, rows, num_classes=10, width=768, num_tokens=50, outputs=("tokens",), num_val=64
    )
    configs = _decoder_trials(number, 1, 16)

    def together() -> None:
        _forget(folder)
        _together(configs, TrialData.open(configs[0], features), options)

    def alone() -> None:
        for config in configs:
            _forget(folder)
            _alone([config], TrialData.open(config, features), options)

    taken = in_turn({"together": together, "alone": alone}, 1)
    return times(
        f"{number} decoders, depth 1, width 16, {rows:,} x 50 x 768, cold disk", taken["together"], taken["alone"]
    )


def _forget(folder: Path) -> None:
    """Let the system drop a folder's files from memory."""
    gc.collect()
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
