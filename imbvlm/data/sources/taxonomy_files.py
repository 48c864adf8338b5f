"""Reads trees over classes from CSV files and from the rows of a table."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from imbvlm.base.csv_cells import unescape_cell
from imbvlm.base.errors import MAX_SUGGESTED, suggest_name
from imbvlm.base.formatting import pluralize
from imbvlm.data.manifest import ManifestError
from imbvlm.data.sources.manifest_builder import read_lines
from imbvlm.longtail.taxonomy import Taxonomy, in_several_places, lineage_findings

# The second heading of a file that has the parent of each name; the ranks of such a file have no names.
PARENT = "parent"
_TREE = "tree"
# Names of a circle that a sentence lists.
_MAX_CIRCLE = 8
Lineages = Mapping[str, tuple[str, ...]]


def read_taxonomy(path: str, class_names: Sequence[str]) -> Taxonomy:
    """Read a CSV file of classes with their ancestors; raises ManifestError with every mistake, StorageError.

    A row has a class and its ancestors, the highest rank first, under a heading with the names of the ranks, such as
    `species,order,family`. Under `class,parent` it has a name and its parent, which has a row of its own; the parents
    of the highest names are empty.
    """
    heading, *rows = _cells(path, class_names)
    if [name.lower() for name in heading[1:]] == [PARENT]:
        ranks, lineages, findings = _from_parents(rows, class_names)
    else:
        ranks, (lineages, findings) = heading[1:], _from_lineages(rows, class_names)
    return _checked((*ranks, heading[0]), lineages, findings, {row[0] for row in rows}, class_names, path, _TREE)


def taxonomy_of_rows(
    ranks: Sequence[str],
    lineages: Sequence[tuple[str, ...]],
    labels: npt.NDArray[np.int64],
    class_names: Sequence[str],
    source: str,
) -> Taxonomy:
    """The tree of N rows with the ancestors of their classes, the highest rank first, and labels (N,).

    Raises ManifestError with every mistake.
    """
    distinct = dict.fromkeys(zip(labels.tolist(), lineages, strict=True))
    rows = [[class_names[label], *names] for label, names in distinct]
    noun = "tree in the columns of"
    return _checked(ranks, *_from_lineages(rows, class_names), {row[0] for row in rows}, class_names, source, noun)


def _checked(
    ranks: Sequence[str],
    lineages: Lineages,
    findings: Sequence[str],
    names: Iterable[str],
    class_names: Sequence[str],
    source: str,
    noun: str,
) -> Taxonomy:
    """The tree over the classes; raises ManifestError with these and all other findings. `names` are those of rows."""
    present = set(names)
    missing = [name for name in dict.fromkeys(class_names) if name not in present]
    findings = [*findings, *_each(missing, "has no row", present - set(class_names))]
    placed = [name for name in class_names if name in lineages]
    taxonomy = Taxonomy(tuple(ranks), tuple(lineages[name] for name in placed))
    of_tree = lineage_findings(taxonomy, placed)
    upside_down = replace(taxonomy, lineages=tuple(names[::-1] for names in taxonomy.lineages))
    if of_tree and not lineage_findings(upside_down, placed):
        of_tree.append(f"if {', '.join(ranks[:-1])} has the lowest rank first, turn it round: the highest comes first")
    findings += of_tree
    if findings:
        raise ManifestError(source, findings, noun)
    return taxonomy


def _cells(path: str, class_names: Sequence[str]) -> list[list[str]]:
    """The cells of all rows that have any, the heading first, each row as long as the heading."""
    try:
        read = [
            [unescape_cell(cell).strip() for cell in row] for row in csv.reader(read_lines(path, _TREE), strict=True)
        ]
    except csv.Error as error:
        raise ManifestError(path, [f"it can't be read as CSV: {error}. Close every quote."], _TREE) from None
    rows = [row for row in read if any(row)]
    if not rows or len(rows[0]) < 2:
        got = f", got {','.join(rows[0])[:80]!r}" if rows else ", and is empty"
        rule = f"it must begin with a heading, such as species,order,family or class,parent, between commas{got}"
        raise ManifestError(path, [rule], _TREE)
    heading, findings = rows[0], list[str]()
    if heading[0] in class_names:
        findings.append(
            f"the first row must be a heading, such as species,order,family, got {','.join(heading)[:80]!r}"
        )
    if heading[0].lower() == PARENT:
        findings.append(
            f"a name must stand before its parent, got the heading {','.join(heading)[:80]!r}; swap the columns"
        )
    nameless = sum(not row[0] for row in rows[1:])
    if nameless:
        findings.append(f"{pluralize(nameless, 'row')} without a name in the first column; name the class or ancestor")
    findings += [
        f"{row[0]!r} has more cells than the heading; put names with commas in quotes"
        for row in rows
        if len(row) > len(heading)
    ]
    if findings:
        raise ManifestError(path, findings, _TREE)
    return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def _from_lineages(rows: Sequence[Sequence[str]], class_names: Sequence[str]) -> tuple[Lineages, list[str]]:
    """The ancestors of each class, and findings about its name, of rows with both."""
    places: dict[str, dict[tuple[str, ...], None]] = {}
    for name, *names in rows:
        places.setdefault(name, {})[tuple(names)] = None
    findings = _unknown(places, class_names)
    findings += [
        in_several_places(repr(name), (" / ".join(names) for names in lineages))
        for name, lineages in places.items()
        if len(lineages) > 1
    ]
    return {name: next(iter(lineages)) for name, lineages in places.items()}, findings


def _from_parents(rows: Sequence[Sequence[str]], class_names: Sequence[str]) -> tuple[list[str], Lineages, list[str]]:
    """Ranks, the ancestors of each class, and findings about all names, of rows with a name and its parent."""
    places: dict[str, dict[str, None]] = {}
    for name, parent in rows:
        places.setdefault(name, {})[parent] = None
    parents = {name: next(iter(above)) for name, above in places.items()}
    findings = [
        in_several_places(repr(name), (parent or "nothing" for parent in above))
        for name, above in places.items()
        if len(above) > 1
    ]
    inner = dict.fromkeys(filter(None, parents.values()))
    missing = [name for name in inner if name not in parents]
    findings += _each(missing, "is a parent and has no row; give it one, with an empty parent if it has none", parents)
    findings += _unknown((name for name in parents if name not in inner), class_names)
    for circle in _circles(parents):
        shown = [*map(repr, circle[:_MAX_CIRCLE]), *["..."] * (len(circle) > _MAX_CIRCLE), repr(circle[0])]
        findings.append(f"{' in '.join(shown)} is a circle; correct a parent")
    lineages = {}
    for name in dict.fromkeys(class_names):
        # Keys keep their order, and a circle ends at a key.
        climbed, parent = {name: None}, parents.get(name, "")
        while parent in parents and parent not in climbed:
            climbed[parent] = None
            parent = parents[parent]
        if name in parents and not parent:
            lineages[name] = tuple(climbed)[:0:-1]
    depth = Counter(map(len, lineages.values())).most_common(1)[0][0] if lineages else 1
    return [f"level {number}" for number in range(1, depth + 1)], lineages, findings


def _unknown(names: Iterable[str], class_names: Sequence[str]) -> list[str]:
    classes = set(class_names)
    return _each([name for name in names if name not in classes], "is no class", classes)


def _each(names: Sequence[str], problem: str, valid: Collection[str]) -> list[str]:
    """A sentence about each name, with the nearest valid one for the first few, since seeking it takes long."""
    return [
        f"{name!r} {problem}; {suggest_name(name, valid)}"
        if valid and number < MAX_SUGGESTED
        else f"{name!r} {problem}"
        for number, name in enumerate(names)
    ]


def _circles(parents: Mapping[str, str]) -> list[list[str]]:
    """The names of each circle, each in the next."""
    starts, circles = dict[str, str](), []
    for start in parents:
        name = start
        while name in parents and name not in starts:
            starts[name] = start
            name = parents[name]
        if starts.get(name) == start:
            circle = [name]
            while (parent := parents[circle[-1]]) != name:
                circle.append(parent)
            circles.append(circle)
    return circles
