"""Python runs this as each process of the tests' cluster starts: faults that a test orders come into real trials.

Orders are a JSON file (its path in IMBVLM_TEST_FAULTS), read anew each time; without it nothing happens.
`losses` {name: raise | nan | inf | out_of_memory | hoard | hang}; `loss_seconds`, `slow_losses` {name: seconds} and
`tower_seconds`: how much longer it takes; `checkpoint_seconds`: how often a trial is saved; `hoards` {tower |
tower_start | loading: number}: so many of an extraction's processes take memory until they are ended.
Processes that compute losses, run a tower or load its images leave their id in the folder beside it.
"""

import dataclasses
import functools
import importlib.abc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ORDERS = os.environ.get("IMBVLM_TEST_FAULTS", "")


def orders() -> dict[str, Any]:
    try:
        return json.loads(Path(ORDERS).read_text())
    except (OSError, ValueError):
        return {}


def leave_id(kind: str) -> None:
    path = Path(ORDERS).parent / f"{kind}-{os.getpid()}"
    if not path.exists():
        path.touch()


def hoard() -> None:
    hoarded = []
    while True:
        hoarded.append(b"1" * 100_000_000)
        assert len(hoarded) < 120, "nobody has ended it"
        time.sleep(0.02)


def hoard_if_ordered(ordered: dict[str, Any], kind: str) -> None:
    """As often as is ordered; whoever makes the file first does."""
    leave_id(kind)
    for number in range(ordered.get("hoards", {}).get(kind, 0)):
        try:
            (Path(ORDERS).parent / f"hoards-{kind}-{number}").open("x").close()
        except FileExistsError:
            continue
        hoard()


def faulty_loss(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(loss)
    def call(*arguments: Any, **options: Any) -> Any:
        ordered = orders()
        if not ordered:
            return loss(*arguments, **options)
        import torch

        leave_id("trial")
        time.sleep(ordered.get("slow_losses", {}).get(name, ordered.get("loss_seconds", 0)))
        kind = ordered.get("losses", {}).get(name)
        if kind == "raise":
            raise ValueError("a fault of the tests")
        if kind == "out_of_memory":
            torch.empty(2**58)
        if kind == "hoard":
            hoard()
        while orders().get("losses", {}).get(name) == "hang":
            time.sleep(1)
        value = loss(*arguments, **options)
        return value * float(kind) if kind in ("nan", "inf") else value

    return call


def patch_losses(module: ModuleType) -> None:
    from imbvlm.base.registry import Lazy, Registry

    class FaultyLoss(Lazy):
        def load(self) -> Callable[..., Any]:
            return faulty_loss(self.path.rpartition(":")[2], super().load())

    module.LOSSES = Registry(
        module.LOSSES.kind,
        {
            name: dataclasses.replace(entry, function=FaultyLoss(entry.function.path))
            for name, entry in module.LOSSES.own.items()
        },
    )


def patch_tower(module: ModuleType) -> None:
    init, call = module.EncoderWorker.__init__, module.EncoderWorker.__call__

    def start(self: Any, *arguments: Any, **options: Any) -> None:
        if ordered := orders():
            hoard_if_ordered(ordered, "tower_start")
        init(self, *arguments, **options)

    def slow(self: Any, block: Any) -> Any:
        if ordered := orders():
            hoard_if_ordered(ordered, "tower")
            time.sleep(ordered.get("tower_seconds", 0))
        return call(self, block)

    module.EncoderWorker.__init__, module.EncoderWorker.__call__ = start, slow


def patch_prediction(module: ModuleType) -> None:
    call = module.ModelWorker.__call__

    def slow(self: Any, block: Any) -> Any:
        if ordered := orders():
            leave_id("tower")
            time.sleep(ordered.get("tower_seconds", 0))
        return call(self, block)

    module.ModelWorker.__call__ = slow


def patch_loading(module: ModuleType) -> None:
    load = module.load_block

    @functools.wraps(load)
    def call(block: Any) -> Any:
        if ordered := orders():
            hoard_if_ordered(ordered, "loading")
        return load(block)

    module.load_block = call


def patch_session(module: ModuleType) -> None:
    settings = module.TrialSettings
    init = settings.__init__

    def often(self: Any, *arguments: Any, **fields: Any) -> None:
        fields |= {key: value for key, value in orders().items() if key == "checkpoint_seconds"}
        init(self, *arguments, **fields)

    settings.__init__ = often


PATCHES = {
    "imbvlm.longtail.losses": patch_losses,
    "imbvlm.features.image_blocks": patch_loading,
    "imbvlm.inference.batch_prediction": patch_prediction,
    "imbvlm.features.encoder_worker": patch_tower,
    "imbvlm.training.trial_session": patch_session,
}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        original = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            original(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if ORDERS:
    sys.meta_path.insert(0, Finder())
