"""One shard of a feature store as an Arrow file: schema, checksum, rows as tensors."""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from imbvlm.base import storage
from imbvlm.config.encoder_info import OutputName
from imbvlm.data.manifest_schema import type_problem
from imbvlm.features.store_layout import Precision, StoreError, StoreLayout

# The column of what bytes are multiplied by.
_SCALE = "scale"
Rows = npt.NDArray[np.int64]


class _Mapped(NamedTuple):
    """A shard's values as they are on disk, and what bytes are multiplied by, channel by channel (D,)."""

    values: npt.NDArray[Any]
    scale: npt.NDArray[np.float32] | None


def _metadata(digest: str, output: str, shard: int, checksum: int) -> dict[bytes, bytes]:
    """What a shard says about itself, in its own file: a file beside it could go astray between two writers."""
    facts = {"store": digest, "output": output, "shard": str(shard), "crc32": f"{checksum:08x}"}
    return {f"imbvlm.{name}".encode(): value.encode() for name, value in facts.items()}


def _schema(output: OutputName, layout: StoreLayout) -> pa.Schema:
    """One entry per row and view: why its image is bad or null, and the values; a scale lies in the first one."""
    width, kept = int(np.prod(layout.shapes[output])), layout.stored_as(output)
    values = pa.list_(pa.field("item", pa.from_numpy_dtype(kept)), width)
    columns = [("row", pa.int64()), ("view", pa.int16()), ("reason", pa.string()), (output, values)]
    return pa.schema([*columns, (_SCALE, pa.list_(pa.float32()))] if kept == "int8" else columns)


def _checksum(batch: pa.RecordBatch, output: OutputName) -> int:
    checksum = zlib.crc32(_flat(batch, output).view(np.uint8).data)
    for name in ("row", "view"):
        checksum = zlib.crc32(batch.column(name).to_numpy().tobytes(), checksum)
    scale = _scale(batch)
    if scale is not None:
        checksum = zlib.crc32(scale.tobytes(), checksum)
    return zlib.crc32(json.dumps(batch.column("reason").to_pylist()).encode(), checksum)


def _flat(batch: pa.RecordBatch, output: OutputName) -> npt.NDArray[Any]:
    """A batch's values, flat and without a copy."""
    values: npt.NDArray[Any] = batch.column(output).flatten().to_numpy(zero_copy_only=True)
    return values


def _scale(batch: pa.RecordBatch) -> npt.NDArray[np.float32] | None:
    """What a shard's bytes are multiplied by; None where it has no bytes."""
    if _SCALE not in batch.schema.names or not batch.num_rows:
        return None
    scale: npt.NDArray[np.float32] = batch.column(_SCALE).flatten().to_numpy()
    return scale


def _is_finite(values: npt.NDArray[np.floating[Any]]) -> bool:
    """Whether all are; with a NaN the extremes are NaN, and torch finds those of half floats in a third of the time."""
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(as_tensor(values)))


def quantize_int8(values: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Values (..., D) as bytes, and a scale for each channel (D,): bytes times scale are off by half a scale at most.

    The largest of a channel becomes 127, a channel of zeros has scale 1.
    """
    largest = np.abs(values.reshape(-1, values.shape[-1])).max(axis=0, initial=0).astype(np.float32)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(values / scale).astype(np.int8), scale


def _empty(shape: tuple[int, int], precision: Precision, pinned: bool) -> Tensor:
    """What is gathered into; NumPy's memory is of huge pages, which takes a third less time to fill."""
    if pinned:
        return torch.empty(shape, dtype=getattr(torch, precision), pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype=precision))


def _copy_by_row(maps: Mapping[int, _Mapped], shards: Rows, places: Rows, into: Tensor) -> None:
    """Entries at places (B,) of shards (B,) into a batch (B, width), one after another."""
    # A NumPy row is found in a fifth of the time, torch widens bytes in a third.
    if all(one.scale is None for one in maps.values()):
        flat = {shard: one.values.reshape(-1, into.shape[1]) for shard, one in maps.items()}
        for row, shard, place in zip(into.numpy(), shards.tolist(), places.tolist(), strict=True):
            row[:] = flat[shard][place]
        return
    scales = {shard: as_tensor(one.scale) for shard, one in maps.items() if one.scale is not None}
    stored = {shard: as_tensor(one.values).view(-1, *one.values.shape[2:]) for shard, one in maps.items()}
    shape = next(iter(stored.values())).shape[1:]
    for row, shard, place in zip(into.view(-1, *shape), shards.tolist(), places.tolist(), strict=True):
        torch.mul(stored[shard][place], scales[shard], out=row)


def _copy_by_shard(maps: Mapping[int, _Mapped], shards: Rows, places: Rows, into: Tensor) -> None:
    """As `_copy_by_row`, all entries of a shard at once: faster for many short ones, which are then copied twice."""
    gathered = into.numpy()
    for shard, (values, scale) in maps.items():
        positions = np.flatnonzero(shards == shard)
        found = values.reshape(-1, gathered.shape[1])[places[positions]]
        gathered[positions] = found if scale is None else _widened(found, scale)


def _widened(values: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Bytes (N, T * D) times their channel's scale (D,)."""
    wide = as_tensor(values).view(len(values), -1, len(scale)) * as_tensor(scale)
    return wide.view(len(values), -1).numpy()


def _to_arrow(
    layout: StoreLayout,
    output: OutputName,
    shard: int,
    values: npt.NDArray[Any],
    scale: npt.NDArray[np.float32] | None,
    reasons: Sequence[str | None],
) -> pa.Buffer:
    """A shard's file, one record batch; its checksum lies in the schema's metadata."""
    rows = layout.rows_of(shard)
    schema = _schema(output, layout)
    flat = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(values)])
    columns = [
        pa.array(np.repeat(np.arange(rows.start, rows.stop, dtype=np.int64), layout.num_views)),
        pa.array(np.tile(np.arange(layout.num_views, dtype=np.int16), len(rows))),
        pa.array([reason for reason in reasons for _ in range(layout.num_views)], pa.string()),
        pa.FixedSizeListArray.from_arrays(flat, type=schema.field(output).type),
    ]
    if scale is not None:
        columns.append(pa.array([scale, *[[]] * (len(rows) * layout.num_views - 1)], pa.list_(pa.float32())))
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    metadata = _metadata(layout.digest, output, shard, _checksum(batch, output))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema.with_metadata(metadata)) as writer:
        writer.write_batch(batch.replace_schema_metadata(metadata))
    return sink.getvalue()


def _open_shard(path: str) -> pa.RecordBatch:
    """The one record batch of a shard, memory-mapped, or read whole from an object store; raises StoreError."""
    try:
        if not storage.is_local(path):
            batch = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(path))).get_batch(0)
        else:
            # The map outlives the file: a store of thousands of shards must not use up the process's file descriptors.
            with pa.memory_map(path) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"can't read the shard {path} ({error}); start again and it is computed anew") from None
    problem = next(filter(None, map(type_problem, batch.schema.types)), None)
    if problem is not None:
        raise StoreError(f"the shard {path} isn't read: {problem}")
    return batch


def as_tensor(values: npt.NDArray[Any]) -> Tensor:
    """A tensor over the same memory, which may be read-only and must not be written to."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and says so once; callers only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)
