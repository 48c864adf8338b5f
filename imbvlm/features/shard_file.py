"""One shard of a feature store as an Arrow file: schema, checksum, and its rows as tensors."""

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
from imbvlm.features.entry_index import DIGEST_BYTES, Digests, Keys, binary_rows, keys_of_views
from imbvlm.features.store_layout import Precision, StoreError, StoreLayout

_SCALE = "scale"
Integers = npt.NDArray[np.integer[Any]]


class MappedShard(NamedTuple):
    """A shard's values (entries, ...) as on disk, and for int8 the factor of each channel (D,)."""

    values: npt.NDArray[Any]
    scales: npt.NDArray[np.float32] | None


def is_intact(batch: pa.RecordBatch, layout: StoreLayout, output: OutputName, shard: str) -> bool:
    """Whether a shard has the layout's schema and the checksum of its own metadata.

    Raises ArrowInvalid for a record batch whose buffers contradict its schema.
    """
    if not batch.schema.equals(_schema(output, layout, batch.schema.names[:1])):
        return False
    batch.validate(full=True)
    # Version 0.1 numbered shards: shard-00001.arrow says that it is shard 1.
    label = shard if batch.schema.names[0] == "content" else str(int(shard[6:-6]))
    return bool(batch.schema.metadata == _metadata(layout.digest, output, label, _checksum(batch, output)))


def _metadata(digest: str, output: str, shard: str, checksum: int) -> dict[bytes, bytes]:
    """A shard's identity and checksum. They stand in its own file: two writers could mix up files next to it."""
    facts = {"store": digest, "output": output, "shard": shard, "crc32": f"{checksum:08x}"}
    return {f"imbvlm.{name}".encode(): value.encode() for name, value in facts.items()}


def _schema(output: OutputName, layout: StoreLayout, first: Sequence[str] = ("content",)) -> pa.Schema:
    """An entry's image and view, the reason of a bad image or null, and the values. The first entry has the scales.

    Version 0.1 wrote the row of a split in place of the content of its image.
    """
    width, dtype = int(np.prod(layout.shapes[output])), layout.stored_as(output)
    values = pa.list_(pa.field("item", pa.from_numpy_dtype(dtype)), width)
    image = ("row", pa.int64()) if list(first) == ["row"] else ("content", pa.binary(DIGEST_BYTES))
    columns = [image, ("view", pa.int16()), ("reason", pa.string()), (output, values)]
    return pa.schema([*columns, (_SCALE, pa.list_(pa.float32()))] if dtype == "int8" else columns)


def _checksum(batch: pa.RecordBatch, output: OutputName) -> int:
    checksum = zlib.crc32(flat_values(batch, output).view(np.uint8).data)
    images = batch.column(0)
    is_numbered = pa.types.is_integer(images.type)
    checksum = zlib.crc32(images.to_numpy().tobytes() if is_numbered else shard_contents(batch).tobytes(), checksum)
    checksum = zlib.crc32(batch.column("view").to_numpy().tobytes(), checksum)
    scales = channel_scales(batch)
    if scales is not None:
        checksum = zlib.crc32(scales.tobytes(), checksum)
    return zlib.crc32(json.dumps(batch.column("reason").to_pylist()).encode(), checksum)


def shard_contents(batch: pa.RecordBatch) -> Digests:
    """The contents (E, 16) of the images of a shard's entries."""
    return binary_rows(pa.chunked_array([batch.column("content")]), DIGEST_BYTES)


def shard_keys(batch: pa.RecordBatch) -> Keys:
    """The keys of a shard's entries, in their order."""
    return keys_of_views(shard_contents(batch), batch.column("view").to_numpy())


def flat_values(batch: pa.RecordBatch, output: OutputName) -> npt.NDArray[Any]:
    """A shard's values, flat and without a copy."""
    values: npt.NDArray[Any] = batch.column(output).flatten().to_numpy(zero_copy_only=True)
    return values


def channel_scales(batch: pa.RecordBatch) -> npt.NDArray[np.float32] | None:
    """The factor of each channel (D,) of an int8 shard; None for other shards."""
    if _SCALE not in batch.schema.names or not batch.num_rows:
        return None
    scales: npt.NDArray[np.float32] = batch.column(_SCALE).flatten().to_numpy()
    return scales


def is_finite(values: npt.NDArray[np.floating[Any]]) -> bool:
    """Whether all values are finite: a NaN makes the extremes NaN. torch is 3 times as fast as NumPy at half floats."""
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(as_tensor(values)))


def quantize_int8(values: npt.NDArray[np.floating[Any]]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Values (..., D) as int8 and a scale for each channel (D,): int8 times scale is off by half a scale at most.

    The largest value of a channel becomes 127; a channel of zeros has scale 1.
    """
    largest = np.abs(values.reshape(-1, values.shape[-1])).max(axis=0, initial=0).astype(np.float32)
    scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(values / scales).astype(np.int8), scales


def empty_batch(shape: tuple[int, int], precision: Precision, pinned: bool) -> Tensor:
    """An uninitialized batch. NumPy allocates huge pages, which take a third less time to fill than torch's memory."""
    if pinned:
        return torch.empty(shape, dtype=getattr(torch, precision), pin_memory=True)
    return torch.from_numpy(np.empty(shape, dtype=precision))


def copy_by_row(maps: Mapping[int, MappedShard], shards: Integers, indices: Integers, into: Tensor) -> None:
    """Copy the entries at indices (B,) of shards (B,) into a batch (B, width), row by row."""
    # NumPy indexes a row in a fifth of torch's time; torch widens int8 in a third of NumPy's.
    if all(mapped.scales is None for mapped in maps.values()):
        flat = {shard: mapped.values.reshape(-1, into.shape[1]) for shard, mapped in maps.items()}
        for row, shard, index in zip(into.numpy(), shards.tolist(), indices.tolist(), strict=True):
            row[:] = flat[shard][index]
        return
    scales = {shard: as_tensor(mapped.scales) for shard, mapped in maps.items() if mapped.scales is not None}
    stored = {shard: as_tensor(mapped.values) for shard, mapped in maps.items()}
    shape = next(iter(stored.values())).shape[1:]
    for row, shard, index in zip(into.view(-1, *shape), shards.tolist(), indices.tolist(), strict=True):
        torch.mul(stored[shard][index], scales[shard], out=row)


def copy_by_shard(maps: Mapping[int, MappedShard], shards: Integers, indices: Integers, into: Tensor) -> None:
    """As `copy_by_row`, all entries of a shard at once: faster for many short rows, although it copies them twice."""
    gathered = into.numpy()
    for shard, (values, scales) in maps.items():
        positions = np.flatnonzero(shards == shard)
        rows = values.reshape(-1, gathered.shape[1])[indices[positions]]
        if scales is not None:
            wide = as_tensor(rows).view(len(rows), -1, len(scales)) * as_tensor(scales)
            rows = wide.view(len(rows), -1).numpy()
        gathered[positions] = rows


def to_arrow(
    layout: StoreLayout,
    output: OutputName,
    shard: str,
    contents: Digests,
    views: npt.NDArray[np.integer[Any]],
    values: npt.NDArray[Any],
    scales: npt.NDArray[np.float32] | None,
    reasons: Sequence[str | None],
) -> pa.Buffer:
    """A shard's file: one record batch, with its checksum in the schema's metadata."""
    schema = _schema(output, layout)
    flat = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(values)])
    columns = [
        pa.Array.from_buffers(pa.binary(DIGEST_BYTES), len(contents), [None, pa.py_buffer(contents)]),
        pa.array(views, pa.int16()),
        pa.array(reasons, pa.string()),
        pa.FixedSizeListArray.from_arrays(flat, type=schema.field(output).type),
    ]
    if scales is not None:
        columns.append(pa.array([scales, *[[]] * (len(contents) - 1)], pa.list_(pa.float32())))
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    metadata = _metadata(layout.digest, output, shard, _checksum(batch, output))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema.with_metadata(metadata)) as writer:
        writer.write_batch(batch.replace_schema_metadata(metadata))
    return sink.getvalue()


def map_shard(batch: pa.RecordBatch, layout: StoreLayout, output: OutputName) -> MappedShard:
    """The values of a shard as on disk, which must not be written to."""
    values = flat_values(batch, output).reshape(batch.num_rows, *layout.shapes[output])
    return MappedShard(values, channel_scales(batch))


def open_shard(path: str) -> pa.RecordBatch:
    """The one record batch of a shard, memory-mapped, or read whole from an object store; raises StoreError."""
    try:
        if not storage.is_local(path):
            batch = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(path))).get_batch(0)
        else:
            # The map outlives the file: a store of thousands of shards must not use up the process's file descriptors.
            with pa.memory_map(path) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"can't read the shard {path} ({error}). Start again to compute it anew.") from None
    problem = next(filter(None, map(type_problem, batch.schema.types)), None)
    if problem is not None:
        raise StoreError(f"the shard {path} is not read: {problem}. Delete it to compute it anew.")
    return batch


def as_tensor(values: npt.NDArray[Any]) -> Tensor:
    """A tensor over the same memory, which may be read-only and must not be written to."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns once; callers only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)
