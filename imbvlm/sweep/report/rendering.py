"""A report's page and tables by templates: no script, no request, light or dark by the reader's setting."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from imbvlm.base import storage
from imbvlm.base.formatting import duration, percent, pluralize
from imbvlm.base.version import __version__
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import SECOND_STAGES
from imbvlm.sweep.records.difference import title_in
from imbvlm.sweep.records.trial_log import describe_trial
from imbvlm.sweep.report.plotting import Table, figure_css
from imbvlm.sweep.report.report_content import ReportContent
from imbvlm.sweep.report.report_statistics import search_bias_note
from imbvlm.sweep.report.score_tables import MAX_ROWS
from imbvlm.sweep.report.search_plots import objective_name
from imbvlm.training.test_predictions import POST_HOC

_FOLDER = "imbvlm.sweep.report"
_TEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "±": "$\\pm$",
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
}


def environment(package: str, **options: Any) -> Environment:
    """The templates of a package, which escape all values for HTML and reject undefined names."""
    rules: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "keep_trailing_newline": True}
    return Environment(loader=PackageLoader(package), trim_blocks=True, lstrip_blocks=True, **{**rules, **options})


def page(report: ReportContent) -> str:
    """The whole page."""
    templates, source = environment(_FOLDER), report.source
    templates.filters |= {
        "describe": describe_trial, "duration": duration, "percent": percent, "pluralize": pluralize,
        "titled": title_in, "words": _words,
    }  # fmt: skip
    entries: dict[str, Any] = {**METHODS, **LOSSES, **SECOND_STAGES}
    return templates.get_template("page.html").render(
        report=report,
        source=source,
        summaries=[(name, name.replace("_", " "), entry.summary.replace("_", " ")) for name, entry in entries.items()],
        search_bias_note=search_bias_note,
        objective_name=objective_name,
        best_file=storage.join(source.folder, "best.yaml"),
        style=figure_css() + files(_FOLDER).joinpath("report.css").read_text(encoding="utf-8"),
        version=__version__,
        POST_HOC=POST_HOC,
        MAX_ROWS=MAX_ROWS,
    )


def _words(html: str) -> str:
    """The words of a text without its tags, in small letters between spaces."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', re.sub('<[^>]*>', ' ', html).lower()))} "


def latex(table: Table) -> str:
    """A table in LaTeX, for the package booktabs."""
    templates = environment(
        _FOLDER, autoescape=False, finalize=_tex,
        block_start_string="<%", block_end_string="%>", variable_start_string="<<", variable_end_string=">>",
    )  # fmt: skip
    return templates.get_template("table.tex").render(table=table)


def _tex(value: object) -> str:
    return "".join(_TEX.get(letter, letter) for letter in str(value))
