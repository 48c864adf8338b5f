"""Each method's stratum in a search stratified by method, against the exhaustive grid, on the embedded data."""

from collections.abc import Iterator
from functools import partial

import embedded
import numpy as np
import optuna
from search import SPACE, make_spec, searches, train_grid
from table import Line, Options, shown

SEEDS = range(3)
NUM_SEARCHES = 10
METHODS = ("linear_probe", "decoder")
# The probes of the section `search`, and decoders on the tower's four tokens.
STRATIFIED_SPACE = {
    "method": {"choice": list(METHODS)},
    "decoder.depth": {"choice": [1], "when": {"method": "decoder"}},
    "decoder.width": {"choice": [64], "when": {"method": "decoder"}},
    **SPACE,
    "classifier.kind": {**SPACE["classifier.kind"], "when": {"method": "linear_probe"}},
}


def lines(options: Options) -> Iterator[Line]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = embedded.features(options.folder, outputs=frozenset({"tokens", "pooled"}))
    tables = {seed: train_grid(found, make_spec(seed, space=STRATIFIED_SPACE), options.device) for seed in SEEDS}
    size = len(tables[0])
    make = partial(make_spec, num_trials=size // 8, stratify=("method",), space=STRATIFIED_SPACE)
    yield shown(f"exhaustive grid: {size} configurations of {len(METHODS)} methods, {len(SEEDS)} seeds", "")
    for method in METHODS:
        regrets, _ = searches(tables, NUM_SEARCHES, make, True, lambda config, method=method: config.method == method)
        what = f"  stratified by method, {size // 8} trials: median regret within {method}"
        yield shown(f"{what}, {len(regrets)} searches", float(np.median(regrets)))
        low, high = (float(np.quantile(regrets, part)) for part in (0.25, 0.75))
        yield shown("    lower and upper quartile", f"{low:.2f} {high:.2f}")
