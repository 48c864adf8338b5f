"""Writes a sweep's report: one page, or a folder with figures and tables in addition."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from imbvlm.base import storage
from imbvlm.sweep.report.plotting import Table
from imbvlm.sweep.report.rendering import latex, page
from imbvlm.sweep.report.report_content import build
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
    if report.pairs_problem:
        say(f"Not all images of confused pairs are shown: {report.pairs_problem}")
    is_page = out is not None and out.endswith((".html", ".htm"))
    uri = out if out is not None and is_page else storage.join(out or source.folder, REPORT_FILE)
    storage.write_bytes(uri, page(report).encode())
    if out is not None and not is_page:
        for figure in report.all_figures:
            name, svg = re.sub(r"[^a-z0-9]+", "_", figure.name.lower()), figure.svg(alone=True)
            for ending, content in (("svg", svg.encode()), ("png", figure.png()), ("csv", figure.csv().encode())):
                storage.write_bytes(storage.join(out, "figures", f"{name.strip('_')}.{ending}"), content)
        # Papers don't print a row for each of thousands of classes or trials.
        write_tables(out, report.all_tables, MAX_LATEX_ROWS)
    return uri


def write_tables(folder: str, tables: Sequence[Table], max_latex_rows: float = math.inf) -> None:
    """Write each table as CSV into tables/ of a folder, and as LaTeX unless it is longer than `max_latex_rows`."""
    for table in tables:
        uri = storage.join(folder, "tables", re.sub(r"[^a-z0-9_]+", "_", table.name.lower()))
        storage.write_bytes(f"{uri}.csv", table.csv().encode())
        if len(table.rows) <= max_latex_rows:
            storage.write_bytes(f"{uri}.tex", latex(table).encode())
