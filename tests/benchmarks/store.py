"""A store that has grown: finding known rows, memory of opening them, and an epoch over rows that lie scattered."""

import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import made
import numpy as np
import pyarrow as pa
from epoch import InMemory
from growth import apart
from made_stores import made_contents
from table import Line, Options, in_turn, limited, rates, shown

from imbvlm.base.storage import FileState
from imbvlm.features import known_files
from imbvlm.features.entry_index import EntryIndex, entry_keys, read_index, write_index
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.known_files import record_files, row_contents
from imbvlm.features.stored_split import StoredSplit
from imbvlm.features.trial_data import StoredRows, TrialData
from imbvlm.training.trial_run import build_trial

NUM_WANTED, NUM_STORED = 400_000, 1_000_000


def lines(options: Options) -> Iterator[Line]:
    seconds, megabytes = apart(_lookup, options.folder / "lookup")
    yield limited(f"{NUM_WANTED:,} of {NUM_STORED:,} known files found, their sizes given", seconds, "s", 5)
    yield limited("  memory of that", megabytes, "MB", 2000)
    sizes = (10_000, 100_000, 1_000_000)
    opened = {number: apart(_opened, options.folder / f"rows{number}", number) for number in sizes}
    yield shown("rows of 16 numbers gathered 100 times 256 at random", "")
    for number, (taken, more) in opened.items():
        yield shown(f"  {number:,} rows", f"{taken:.2f} s, {more:,.0f} MB")
    # An index of places takes eight bytes a row and output; the features themselves are mapped.
    grown = opened[sizes[-1]][1] - opened[sizes[0]][1]
    yield limited(f"  memory of {sizes[-1]:,} rows beyond that of {sizes[0]:,}", grown, "MB", 100)
    for method, output, number, overrides in (
        ("decoder", "tokens", 256, {"decoder__depth": 1, "decoder__width": 192}),
        ("linear_probe", "pooled", 20_000, {}),
    ):
        number *= 5 if options.large else 1
        yield _scattered(options, method, output, number, overrides)


def _lookup(folder: Path) -> float:
    """Seconds to find the places of a manifest's rows; the sizes and times of files are given."""
    generator = np.random.default_rng(0)
    contents = generator.integers(0, 256, (NUM_STORED, 16), dtype=np.uint8)
    uris = pa.array([f"/photos/class{row % 1000}/{row}.jpg" for row in range(NUM_STORED)], pa.large_string())
    versions = np.stack([np.arange(NUM_STORED)] * 2, axis=1)
    record_files(str(folder), pa.chunked_array([uris]), versions, contents)
    keys = entry_keys(contents, 1)[:, 0]
    write_index(str(folder / "pooled"), EntryIndex.of_shard("a", FileState(1, 1, 1), keys, [None] * len(keys)))
    rows = generator.permutation(NUM_STORED)[:NUM_WANTED]
    nulls = {"bytes": pa.nulls(NUM_WANTED, pa.large_binary()), "content": pa.nulls(NUM_WANTED, pa.binary(16))}
    table = pa.table({"uri": uris.take(pa.array(rows)), **nulls})
    # 400,000 files of an empty disk would take longer to make than all of this.
    known_files._versions = lambda uris: versions[rows]
    begin = perf_counter()
    read = row_contents(str(folder), table)
    index = EntryIndex.union(read_index(str(folder / "pooled"))[1].values())
    places = index.find(entry_keys(read.digests, 1))
    taken = perf_counter() - begin
    if not read.is_known.all() or (places < 0).any():
        raise RuntimeError("known rows weren't found")
    return taken


def _opened(folder: Path, number: int) -> float:
    path = folder / "path.json"
    if not path.exists():
        # In a process of its own, whose memory isn't counted.
        apart(_made, folder, number)
    begin = perf_counter()
    split = StoredSplit.open(json.loads(path.read_text()))
    generator = np.random.default_rng(0)
    for _ in range(100):
        split.gather("pooled", generator.integers(0, number, 256))
    return perf_counter() - begin


def _made(folder: Path, number: int) -> float:
    features = made.stored_features(folder, number, width=16, num_val=8)
    (folder / "path.json").write_text(json.dumps(features.splits["train"]))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _scattered(options: Options, method: str, output: str, number: int, overrides: dict[str, object]) -> Line:
    """The split's rows are a tenth of the store's, in random order."""
    features = made.stored_features(options.folder / method, 10 * number, outputs=(output,), num_val=64)
    config = made.trial(method, train__num_epochs=100, **overrides)
    whole = TrialData.open(config, features)
    rows = np.random.default_rng(0).permutation(10 * number)[:number]
    path = FeatureStore.open(features.folder).write_split(made_contents("train", 10 * number)[rows], 1, (output,))
    stored = StoredRows(StoredSplit.open(path), np.arange(number), whole.train.labels[rows])
    memory = InMemory({output: stored.store.gather(output, np.arange(number))})
    runs = {
        name: build_trial(config, replace(whole, train=train, stored=stored), options.device).epochs()
        for name, train in (("stored", stored), ("memory", replace(stored, store=memory)))
    }
    for run in runs.values():
        next(run)
    taken = in_turn({name: lambda run=run: next(run) for name, run in runs.items()}, 5)
    return rates(
        f"epoch of {method} over {number:,} rows scattered over {10 * number:,}",
        *(number / taken[name] for name in ("stored", "memory")),
        "images/s",
        0.9,
    )
