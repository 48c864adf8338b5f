"""results.parquet: the records of a sweep as one typed table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imbvlm.base import storage
from imbvlm.base.schema import flatten
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord

RESULTS_FILE = "results.parquet"
# Python's objects for thousands of trials at once would take more memory than their records.
ROWS_AT_ONCE = 512
_COLUMN_TYPES: Mapping[type, pa.DataType] = {int: pa.int64(), bool: pa.bool_(), str: pa.string()}


def write_results_table(log: TrialLog) -> str:
    """Write results.parquet into the sweep's folder, one row per trial, and return its location."""
    # Arrow's own buffer keeps each of its sizes while it grows.
    parts, file = table_parts(list(log.records.values())), io.BytesIO()
    first = next(parts)
    with pq.ParquetWriter(file, first.schema) as writer:
        for part in chain([first], parts):
            writer.write_table(part)
            pa.default_memory_pool().release_unused()
    uri = storage.join(log.folder, RESULTS_FILE)
    storage.write_bytes(uri, file.getbuffer())
    return uri


def table_parts(records: Sequence[TrialRecord]) -> Iterator[pa.Table]:
    """The table in parts of `ROWS_AT_ONCE` rows of equal columns; without records a single part without rows.

    A row is a trial: identity, state, times, all keys (`config.*`), metrics of the last epoch and of all epochs.
    """
    rows = sorted(records, key=lambda record: (record.kind != "baseline", record.kind == "refit", record.trial_id))
    kinds, metrics = dict[str, set[type]](), set[str]()
    for row in rows:
        for key, value in flatten(row.config).items():
            kinds.setdefault(key, set()).update([] if value is None else [type(value)])
        metrics.update(*row.epochs[-1:])
    for start in range(0, max(1, len(rows)), ROWS_AT_ONCE):
        yield _part(rows[start : start + ROWS_AT_ONCE], kinds, sorted(metrics))


def _part(rows: Sequence[TrialRecord], kinds: Mapping[str, Set[type]], metrics: Sequence[str]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "trial_id": pa.array([row.trial_id for row in rows], pa.string()),
        "kind": pa.array([row.kind for row in rows], pa.string()),
        "name": pa.array([row.name for row in rows], pa.string()),
        "state": pa.array([row.state for row in rows], pa.string()),
        "stop_reason": pa.array([row.stop_reason for row in rows], pa.string()),
        "views": pa.array([row.views for row in rows], pa.string()),
        "driver": pa.array([row.driver for row in rows], pa.string()),
        "num_threads": pa.array([row.num_threads for row in rows], pa.int64()),
        "pack_size": pa.array([row.pack_size for row in rows], pa.int64()),
        "num_epochs": pa.array([len(row.epochs) for row in rows], pa.int64()),
        "started_at": pa.array([int(row.started_at * 1e6) for row in rows], pa.timestamp("us", tz="UTC")),
        "seconds": pa.array([row.seconds() for row in rows], pa.float64()),
        "config": pa.array([json.dumps(row.config) for row in rows], pa.string()),
    }
    flats = [flatten(row.config) for row in rows]
    for key, types in kinds.items():
        columns[f"config.{key}"] = _column([config.get(key) for config in flats], types)
    last = [row.epochs[-1] if row.epochs else {} for row in rows]
    for key in metrics:
        columns[key] = pa.array([epoch.get(key) for epoch in last], pa.float64())
    columns["epochs"] = pa.array(
        [[list(epoch.items()) for epoch in row.epochs] for row in rows], pa.list_(pa.map_(pa.string(), pa.float64()))
    )
    return pa.table(columns)


def _column(values: list[Any], kinds: Set[type]) -> pa.Array:
    """A column of values of these types: numbers, texts or booleans unchanged, a mixture as JSON."""
    if len(kinds) <= 1 and kinds <= _COLUMN_TYPES.keys():
        return pa.array(values, _COLUMN_TYPES[next(iter(kinds))] if kinds else pa.null())
    if kinds <= {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())
