"""Writes a sweep's report: one page, or a folder with figures and tables in addition."""

from __future__ import annotations

import re
from collections.abc import Callable

from imbvlm.base import storage
from imbvlm.sweep.report.html_page import page
from imbvlm.sweep.report.plotting import Figure, Table
from imbvlm.sweep.report.report_content import CollapsedTable, Columns, Grid, ReportContent, build
from imbvlm.sweep.report.report_data import ReportData

REPORT_FILE = "report.html"
MAX_LATEX_ROWS = 100


def write_report(
    folder: str, out: str | None = None, manifest: str | None = None, say: Callable[[str], None] = lambda text: None
) -> str:
    """Write the report of a sweep's folder and return the page's location; raises ImbvlmError.

    `out` is a page (.html), by default report.html in the sweep's folder, or a folder. A folder also gets every figure
    as SVG and PNG with its numbers as CSV, and every table as CSV and LaTeX. `manifest` is the manifest's present
    location if it was moved. `say` receives a sentence on everything that is missing on the page.
    """
    storage.check_location(out or folder)
    return write_report_of(ReportData.read(folder, manifest), out, say)


def write_report_of(source: ReportData, out: str | None = None, say: Callable[[str], None] = lambda text: None) -> str:
    """Write the report of a sweep's folder that has been read, as `write_report` does."""
    report = build(source)
    for note in report.notes:
        say(note)
    is_page = out is not None and out.endswith((".html", ".htm"))
    uri = out if out is not None and is_page else storage.join(out or source.folder, REPORT_FILE)
    storage.write_bytes(uri, page(report, source.spec.to_yaml_text(), commands(source)).encode())
    if out is not None and not is_page:
        _write_parts(report, out)
    return uri


def commands(source: ReportData) -> list[str]:
    """Commands with which a reader goes on."""
    folder = source.folder
    return [
        f"imbvlm export {folder} -o my-model",
        "imbvlm predict my-model PHOTO.jpg",
        f"imbvlm train {storage.join(folder, 'best.yaml')}",
        f"imbvlm report {folder} -o report-files    # figures as SVG and PNG, all numbers as CSV, LaTeX",
    ]


def _write_parts(report: ReportContent, out: str) -> None:
    figures, tables = parts(report)
    for figure in figures:
        target = storage.join(out, "figures", _file(figure.name))
        storage.write_bytes(f"{target}.svg", figure.svg(alone=True).encode())
        storage.write_bytes(f"{target}.png", figure.png())
        storage.write_bytes(f"{target}.csv", figure.csv().encode())
    for table in tables:
        target = storage.join(out, "tables", _file(table.name))
        storage.write_bytes(f"{target}.csv", table.csv().encode())
        # Papers don't print a row for each of thousands of classes or trials.
        if len(table.rows) <= MAX_LATEX_ROWS:
            storage.write_bytes(f"{target}.tex", table.latex().encode())


def parts(report: ReportContent) -> tuple[list[Figure], list[Table]]:
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
        elif isinstance(block, CollapsedTable):
            tables.append(block.table)
    names = {table.name for table in tables}
    return figures, tables + [table for table in report.extra_tables if table.name not in names]


def _file(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
