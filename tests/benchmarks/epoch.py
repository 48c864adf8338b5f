"""An epoch over stored tokens against the same epoch over tokens in main memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import made
import numpy as np
import torch
from table import Line, Options, in_turn, rates

from imbvlm.features.trial_data import TrialData
from imbvlm.training.trial_run import build_trial


@dataclass(frozen=True)
class InMemory:
    """What `StoredRows` reads, as one tensor for each output; `index_select` is faster than an index in brackets."""

    tensors: dict[str, torch.Tensor]
    num_views: int = 1

    def gather(
        self, output: str, rows: np.ndarray, views: np.ndarray | None = None, pinned: bool = False
    ) -> torch.Tensor:
        return self.tensors[output].index_select(0, torch.from_numpy(rows))


def lines(options: Options) -> Iterator[Line]:
    for method, number, overrides in (
        ("decoder", 256, {"decoder__depth": 3}),
        ("decoder", 1000, {"decoder__depth": 1, "decoder__width": 192}),
        ("linear_probe", 20_000, {}),
    ):
        number *= 20 if options.large else 1
        output = "tokens" if method == "decoder" else "pooled"
        features = made.stored_features(options.folder / f"{method}{number}", number, outputs=(output,), num_val=64)
        config = made.trial(method, train__num_epochs=100, **overrides)
        data = TrialData.open(config, features)
        store = InMemory({output: data.train.store.gather(output, np.arange(data.train.store.num_rows))})
        in_memory = replace(data, train=replace(data.train, store=store))
        runs = {name: build_trial(config, one, options.device).epochs() for name, one in
                (("stored", data), ("memory", in_memory))}  # fmt: skip
        for run in runs.values():
            next(run)
        taken = in_turn(
            {name: lambda run=run: next(run) for name, run in runs.items()}, 2 if "decoder__depth" in overrides else 5
        )
        words = " ".join(f"{key[9:]} {value}" for key, value in overrides.items())
        yield rates(f"epoch of {method} {words} over {number:,} x {output}", number / taken["stored"],
                    number / taken["memory"], "images/s", 0.9)  # fmt: skip
