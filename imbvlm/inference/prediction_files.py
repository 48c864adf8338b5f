"""Tables of predictions as CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from imbvlm.base import storage
from imbvlm.base.csv_cells import csv_line, escape_cell
from imbvlm.base.errors import ImbvlmError, printable
from imbvlm.inference.predictor import Prediction

OUT_SUFFIXES = (".csv", ".parquet", ".jsonl")
_ROW_GROUP = 16_384


def check_out(out: str) -> None:
    """Raises ImbvlmError for a file whose name doesn't say one of the forms, or that lies where nothing is written."""
    storage.check_location(out)
    if not out.endswith(OUT_SUFFIXES):
        raise ImbvlmError(f"--out is {out!r}; its name must end with {', '.join(OUT_SUFFIXES)}")


def write_predictions(found: Iterable[Prediction], out: str, top: int) -> None:
    """Write a row an image as CSV, Parquet or JSON lines, whole or not at all; `out` is a path or s3:// URI."""
    check_out(out)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "table"
        if out.endswith(".parquet"):
            _write_parquet(found, path, top)
        else:
            with open(path, "w", newline="", encoding="utf-8") as stream:
                (write_csv if out.endswith(".csv") else write_json_lines)(found, stream, top)
        storage.write_bytes(out, path.read_bytes())


def write_csv(found: Iterable[Prediction], stream: TextIO, top: int) -> None:
    """image, class_1, probability_1, ..., error; a text that a spreadsheet would run gets an apostrophe in front."""
    ranks = range(1, top + 1)
    columns = (f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))
    stream.write(csv_line(["image", *columns, "error"]))
    for one in found:
        pairs = zip(one.class_names, one.probabilities, strict=True)
        cells = [cell for name, value in pairs for cell in (escape_cell(name), f"{value:.6f}")]
        blank = [""] * (2 * top - len(cells))
        stream.write(csv_line([escape_cell(one.source), *cells, *blank, escape_cell(one.error or "")]))


def write_json_lines(found: Iterable[Prediction], stream: TextIO, top: int) -> None:
    """One object a line: image, classes with their probabilities, error."""
    for one in found:
        pairs = zip(one.class_names, one.probabilities, strict=True)
        classes = [{"class": name, "probability": value} for name, value in pairs]
        row = {"image": one.source, "classes": classes, "error": one.error}
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def parquet_schema(top: int) -> pa.Schema:
    """The columns of the CSV, probabilities as floats, what is absent as null."""
    fields = [("image", pa.string())]
    for rank in range(1, top + 1):
        fields += [(f"class_{rank}", pa.string()), (f"probability_{rank}", pa.float32())]
    return pa.schema([*fields, ("error", pa.string())])


def _write_parquet(found: Iterable[Prediction], path: Path, top: int) -> None:
    schema, rows = parquet_schema(top), list[dict[str, Any]]()
    with pq.ParquetWriter(path, schema) as writer:
        for one in found:
            row: dict[str, Any] = {"image": one.source, "error": one.error}
            for rank, (name, value) in enumerate(zip(one.class_names, one.probabilities, strict=True), 1):
                row |= {f"class_{rank}": name, f"probability_{rank}": value}
            rows.append(row)
            if len(rows) == _ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema))


def write_lines(found: Iterable[Prediction], stream: TextIO, top: int) -> None:
    """A line an image, for reading."""
    for one in found:
        pairs = zip(one.class_names, one.probabilities, strict=True)
        text = one.error or ", ".join(f"{name} {100 * value:.1f}%" for name, value in pairs)
        stream.write(f"{printable(f'{one.source}: {text}')}\n")
