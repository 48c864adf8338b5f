"""A report as one HTML page: no script, no request, light or dark by the reader's setting."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from imbvlm.base.version import __version__
from imbvlm.sweep.report.plotting import Figure, Table, figure_css
from imbvlm.sweep.report.report_content import (
    Block,
    CollapsedTable,
    Columns,
    ConfusedPairs,
    Grid,
    HeadlineNumber,
    ReportContent,
    ReportSection,
)

# The page fetches and runs nothing, even if the name of a class contains markup.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(report: ReportContent, spec_yaml: str, commands: Sequence[str]) -> str:
    """The whole page."""
    style = figure_css() + files("imbvlm.sweep.report").joinpath("report.css").read_text(encoding="utf-8")
    verdict = report.verdict
    details = f"<p class='muted'>{escape(verdict.details)}</p>" if verdict.details else ""
    facts_note = f"<p class='muted note'>{escape(report.facts_note)}</p>" if report.facts_note else ""
    links = "".join(f'<a href="#{section.name}">{escape(section.title)}</a>' for section in report.sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(report.title)} · imbvlm report</title><style>{style}</style>'
        "</head><body>"
        f"<header><p class='kicker'>imbvlm sweep</p><h1>{escape(report.title)}</h1>"
        f"<p class='muted'>{escape(report.subtitle)}</p>"
        f"<div class='statement {'win' if verdict.is_win else ''}'><p>{escape(verdict.statement)}</p>{details}</div>"
        f"<dl class='facts'>{''.join(map(_fact, report.facts))}</dl>{facts_note}"
        f"<nav aria-label='Sections'>{links}</nav></header>"
        f"<main>{''.join(map(_section, report.sections))}{_repeat(spec_yaml, commands)}</main>"
        f"<footer class='muted'>imbvlm {escape(__version__)}</footer></body></html>"
    )


def _fact(fact: HeadlineNumber) -> str:
    notes = "".join(f"<dd class='muted'>{escape(note)}</dd>" for note in fact.notes)
    return f"<div><dt>{escape(fact.label)}</dt><dd class='value'>{escape(fact.value)}</dd>{notes}</div>"


def _section(section: ReportSection) -> str:
    blocks = "".join(map(_block, section.blocks))
    return f'<section id="{section.name}"><h2>{escape(section.title)}</h2>{blocks}</section>'


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Columns):
        return f"<div class='columns'>{''.join(f'<div>{_table(table)}</div>' for table in block.tables)}</div>"
    if isinstance(block, ConfusedPairs):
        return _pairs(block)
    if isinstance(block, CollapsedTable):
        summary = f"{escape(block.table.title)} ({len(block.table.rows):,})"
        return f"<details><summary>{summary}</summary>{_table(block.table, heading=False)}</details>"
    assert isinstance(block, Grid)
    kind = "grid small" if block.small else "grid"
    return f"<div class='{kind}'>{''.join(map(_figure, block.figures))}</div>"


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    kind = " class='wide'" if figure.wide else ""
    return (
        f"<figure{kind}><h3>{escape(figure.title)}</h3><div class='scroll' tabindex='0'>"
        f"{figure.svg()}</div>{caption}</figure>"
    )


def _table(table: Table, *, heading: bool = True) -> str:
    title = f"<h3>{escape(table.title)}</h3>" if heading and table.title else ""
    caption = f"<p class='muted note'>{escape(table.caption)}</p>" if table.caption else ""
    head = ""
    if any(table.header):
        cells = "".join(
            f"<th scope='col'{_number_class(table, index)}>{escape(cell)}</th>"
            for index, cell in enumerate(table.header)
        )
        head = f"<thead><tr>{cells}</tr></thead>"
    body = "".join(_row(table, row) for row in table.rows)
    kind = " class='wordy'" if table.first_number >= len(table.header) else ""
    return f"{title}<div class='scroll' tabindex='0'><table{kind}>{head}<tbody>{body}</tbody></table></div>{caption}"


def _row(table: Table, row: Sequence[str]) -> str:
    first = f"<th scope='row'>{escape(row[0])}</th>"
    rest = (f"<td{_number_class(table, index)}>{escape(cell)}</td>" for index, cell in enumerate(row[1:], 1))
    return f"<tr>{first}{''.join(rest)}</tr>"


def _number_class(table: Table, index: int) -> str:
    return " class='number'" if index >= table.first_number else " class='words'" if index else ""


def _pairs(block: ConfusedPairs) -> str:
    cards = []
    for pair in block.pairs:
        label, predicted = map(escape, pair.class_names)
        images = "".join(f'<img src="{uri}" alt="{label}" loading="lazy">' for uri in pair.images)
        row = f"<div class='pictures'>{images}</div>" if images else ""
        text = f"<p><b>{label}</b> taken for <b>{predicted}</b></p><p class='muted'>{escape(pair.detail)}</p>"
        cards.append(f"<li>{row}{text}</li>")
    return f"<h3>{escape(block.title)}</h3><ul class='pairs'>{''.join(cards)}</ul>"


def _repeat(spec_yaml: str, commands: Sequence[str]) -> str:
    lines = "\n".join(commands)
    return (
        f"<section id='repeat'><h2>Take it further</h2><pre tabindex='0'>{escape(lines)}</pre>"
        f"<details><summary>sweep.yaml</summary><pre tabindex='0'>{escape(spec_yaml)}</pre></details></section>"
    )
