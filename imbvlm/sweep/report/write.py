"""Writes a sweep's report: one page, or a folder with figures and tables beside it."""

from __future__ import annotations

import re

from imbvlm import storage
from imbvlm.sweep.report.figure import Figure, Table
from imbvlm.sweep.report.page import page
from imbvlm.sweep.report.sections import Columns, Folded, Grid, Report, build
from imbvlm.sweep.report.source import Source

REPORT_FILE = "report.html"


def write_report(folder: str, out: str | None = None) -> str:
    """Write the report of a sweep's folder and return the page's location; raises ImbvlmError.

    `out` is a page (.html), by default report.html in the sweep's folder, or a folder, which gets every figure as SVG
    and every table as CSV and LaTeX besides.
    """
    source = Source.read(folder)
    report = build(source)
    text = page(report, source.spec.to_yaml_text(), commands(source))
    if out is None or out.endswith((".html", ".htm")):
        uri = out or storage.join(folder, REPORT_FILE)
        storage.write_bytes(uri, text.encode())
        return uri
    uri = storage.join(out, REPORT_FILE)
    storage.write_bytes(uri, text.encode())
    _write_parts(source, report, out)
    return uri


def commands(source: Source) -> list[str]:
    """What to type next."""
    folder = source.folder
    return [
        f"imbvlm export {folder} -o my-model",
        "imbvlm predict my-model PHOTO.jpg",
        f"imbvlm train {storage.join(folder, 'best.yaml')}",
        f"imbvlm report {folder} -o report-files    # figures as SVG, tables as CSV and LaTeX",
    ]


def _write_parts(source: Source, report: Report, out: str) -> None:
    figures, tables = parts(report)
    for figure in figures:
        svg = figure.drawing.svg(figure.title, alone=True)
        storage.write_bytes(storage.join(out, "figures", f"{_file(figure.name)}.svg"), svg.encode())
    for table in tables:
        storage.write_bytes(storage.join(out, "tables", f"{_file(table.name)}.csv"), table.csv().encode())
    latex = {"scores", "best_trials", "fresh_crops", "parameters", *(one.name for one in source.spec.study)}
    for table in tables:
        if table.name in latex:
            storage.write_bytes(storage.join(out, "tables", f"{_file(table.name)}.tex"), table.latex().encode())


def parts(report: Report) -> tuple[list[Figure], list[Table]]:
    """All figures and tables of a report, in the page's order."""
    figures, tables = list[Figure](), list[Table]()
    for block in (block for section in report.sections for block in section.blocks):
        if isinstance(block, Figure):
            figures.append(block)
        elif isinstance(block, Grid):
            figures += block.figures
        elif isinstance(block, Table):
            tables.append(block)
        elif isinstance(block, Columns):
            tables += block.tables
        elif isinstance(block, Folded):
            tables.append(block.table)
    known = {table.name for table in tables}
    return figures, tables + [table for table in report.extra_tables if table.name not in known]


def _file(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
