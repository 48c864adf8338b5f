"""Files of predictions: CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
# Between the classes of a set in a CSV file.
SEPARATOR = "; "
_ROW_GROUP = 16_384


def check_out(out: str) -> None:
    """Raise ImbvlmError for a name without the suffix of a known format, or a location that can't be written."""
    storage.check_location(out)
    if not out.endswith(OUT_SUFFIXES):
        raise ImbvlmError(
            f"the name after --out must end with {', '.join(OUT_SUFFIXES)}, got {out!r}. Give it one of these endings."
        )


def write_predictions(predictions: Iterable[Prediction], out: str, top: int, decided: Sequence[str] = ()) -> None:
    """Write a row per image as CSV, Parquet or JSON lines, whole or not at all; `out` is a path or s3:// URI.

    `decided` are further columns that predictions have, those of decisions, sets and roll-ups.
    """
    check_out(out)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "table"
        if out.endswith(".parquet"):
            _write_parquet(predictions, path, top, decided)
        else:
            with open(path, "w", newline="", encoding="utf-8") as stream:
                (write_csv if out.endswith(".csv") else write_json_lines)(predictions, stream, top, decided)
        storage.write_bytes(out, path.read_bytes())


def write_csv(predictions: Iterable[Prediction], stream: TextIO, top: int, decided: Sequence[str] = ()) -> None:
    """Write image, class_1, probability_1, ..., error; an apostrophe precedes texts that a spreadsheet would run.

    Between them are the columns `decided`; the names of a set are joined by SEPARATOR.
    """
    stream.write(csv_line(parquet_schema(top, decided).names))
    for prediction in predictions:
        cells = [cell for name, value in prediction.ranked for cell in (escape_cell(name), f"{value:.6f}")]
        blank = [""] * (2 * top - len(cells))
        values = _decided(prediction, decided).values()
        of_rules = [escape_cell(value if isinstance(value, str) else SEPARATOR.join(value or ())) for value in values]
        error = escape_cell(prediction.error or "")
        stream.write(csv_line([escape_cell(prediction.source), *cells, *blank, *of_rules, error]))


def _decided(prediction: Prediction, decided: Sequence[str]) -> dict[str, str | tuple[str, ...] | None]:
    rolled_up = prediction.roll_up
    named = (None, None) if rolled_up is None else (rolled_up.taxon, rolled_up.rank)
    values = {
        "roll_up": named[0], "roll_up_rank": named[1], "decision": prediction.decision, "set": prediction.class_set
    }  # fmt: skip
    return {name: values[name] for name in decided}


def write_json_lines(predictions: Iterable[Prediction], stream: TextIO, top: int, decided: Sequence[str] = ()) -> None:
    """Write an object per line: image, classes with their probabilities, what is `decided`, error."""
    for prediction in predictions:
        classes = [{"class": name, "probability": value} for name, value in prediction.ranked]
        row = {"image": prediction.source, "classes": classes, **_decided(prediction, decided)}
        row["error"] = prediction.error
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def parquet_schema(top: int, decided: Sequence[str] = ()) -> pa.Schema:
    """The columns of the CSV file with probabilities as floats and nulls for missing values."""
    fields = [("image", pa.string())]
    for rank in range(1, top + 1):
        fields += [(f"class_{rank}", pa.string()), (f"probability_{rank}", pa.float32())]
    fields += [(name, pa.list_(pa.string()) if name == "set" else pa.string()) for name in decided]
    return pa.schema([*fields, ("error", pa.string())])


def _write_parquet(predictions: Iterable[Prediction], path: Path, top: int, decided: Sequence[str]) -> None:
    schema, rows = parquet_schema(top, decided), list[dict[str, Any]]()
    with pq.ParquetWriter(path, schema) as writer:
        for prediction in predictions:
            row: dict[str, Any] = {"image": prediction.source, "error": prediction.error}
            row |= _decided(prediction, decided)
            for rank, (name, value) in enumerate(prediction.ranked, 1):
                row |= {f"class_{rank}": name, f"probability_{rank}": value}
            rows.append(row)
            if len(rows) == _ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema))


def write_lines(predictions: Iterable[Prediction], stream: TextIO, top: int, decided: Sequence[str] = ()) -> None:
    """Write a line of text per image, with what is `decided`."""
    for prediction in predictions:
        text = prediction.error or ", ".join(f"{name} {100 * value:.1f}%" for name, value in prediction.ranked)
        rolled_up = prediction.roll_up
        if prediction.error is None:
            text += f" -> {prediction.decision}" if prediction.decision else ""
            text += f" -> {{{SEPARATOR.join(prediction.class_set)}}}" if prediction.class_set else ""
            named = "no name" if rolled_up is None else f"{rolled_up.rank} {rolled_up.taxon}"
            text += f" -> {named}" if "roll_up" in decided else ""
        stream.write(f"{printable(f'{prediction.source}: {text}')}\n")
