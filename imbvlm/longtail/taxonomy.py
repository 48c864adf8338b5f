"""A tree over classes: their ancestors by rank, errors by rank, and the height of the lowest common ancestor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from imbvlm.base.formatting import pluralize

Rows = npt.NDArray[np.int64]
# Places of a name that a sentence lists.
_MAX_PLACES = 5

# Names of metrics; that of a rank's error ends with the rank.
RANK_ERROR, LCA_HEIGHT = "rank_error/", "lca_height"


@dataclass(frozen=True)
class Taxonomy:
    """The ancestors of each class, the highest rank first, and the names of all ranks, that of the classes last.

    `lineage_findings` tells whether it is a tree.
    """

    ranks: tuple[str, ...]
    lineages: tuple[tuple[str, ...], ...]

    @cached_property
    def taxa(self) -> tuple[tuple[str, ...], ...]:
        """The names of the taxa of each rank above the classes, in the order in which classes have them."""
        return tuple(tuple(dict.fromkeys(names)) for names in zip(*self.lineages, strict=True))

    @cached_property
    def codes(self) -> Rows:
        """Each class's taxon at each rank (R, C): its number in `taxa`, and at the last rank the class itself."""
        numbers = [{name: number for number, name in enumerate(names)} for names in self.taxa]
        above = [[number[names[rank]] for names in self.lineages] for rank, number in enumerate(numbers)]
        return np.array([*above, range(len(self.lineages))], dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"ranks": list(self.ranks), "lineages": [list(names) for names in self.lineages]}

    @staticmethod
    def from_dict(data: Mapping[str, Any], num_classes: int) -> Taxonomy:
        """Read what `to_dict` gave; raises KeyError, TypeError or ValueError."""
        taxonomy = Taxonomy(tuple(data["ranks"]), tuple(tuple(names) for names in data["lineages"]))
        if not all(isinstance(text, str) for texts in (taxonomy.ranks, *taxonomy.lineages) for text in texts):
            raise TypeError("ranks and lineages of a taxonomy must be texts")
        findings = lineage_findings(taxonomy, [f"class {label}" for label in range(num_classes)])
        if findings:
            raise ValueError(findings[0])
        return taxonomy

    def describe(self) -> str:
        """Numbers of taxa by rank, such as `order 3, family 10, species 200`."""
        sizes = [*map(len, self.taxa), len(self.lineages)]
        return ", ".join(f"{rank} {size:,}" for size, rank in zip(sizes, self.ranks, strict=True))


def lineage_findings(taxonomy: Taxonomy, class_names: Sequence[str]) -> list[str]:
    """Sentences about everything that keeps ranks and lineages from being a tree over these classes."""
    ranks, lineages = taxonomy.ranks, taxonomy.lineages
    findings = []
    if len(ranks) < 2 or len(set(ranks)) < len(ranks) or not all(ranks):
        findings.append(
            f"a tree needs two ranks or more, each with a name of its own, and its ranks are {', '.join(ranks)!r}"
        )
    if len(lineages) != len(class_names):
        findings.append(f"the tree has {len(lineages):,} classes, and there are {len(class_names):,}")
    for name, names in zip(class_names, lineages, strict=False):
        if len(names) != len(ranks) - 1:
            number, above = pluralize(len(names), "ancestor"), ", ".join(ranks[:-1])
            findings.append(f"{name!r} has {number}, and the ranks above the classes are {above}")
        findings += [f"{name!r} has no {rank}" for rank, taxon in zip(ranks, names, strict=False) if not taxon]
    whole = [names for names in dict.fromkeys(lineages) if len(names) == len(ranks) - 1 and all(names)]
    return [*findings, *_parent_findings(ranks, whole)]


def _parent_findings(ranks: Sequence[str], lineages: Sequence[tuple[str, ...]]) -> list[str]:
    """A sentence about each taxon that lies in several."""
    parents: dict[tuple[int, str], dict[str, None]] = {}
    for names in lineages:
        for rank in range(1, len(names)):
            parents.setdefault((rank, names[rank]), {})[names[rank - 1]] = None
    return [
        in_several_places(f"the {ranks[rank]} {name!r}", above)
        for (rank, name), above in parents.items()
        if len(above) > 1
    ]


def in_several_places(subject: str, places: Iterable[str]) -> str:
    """A sentence about a name that a tree has in several places."""
    shown = [repr(place) for place in places]
    rest = [f"{len(shown) - _MAX_PLACES:,} more"] if len(shown) > _MAX_PLACES else []
    listed = " and in ".join([*shown[:_MAX_PLACES], *rest])
    return f"{subject} lies in {listed}; give it one place, or each of them a name of its own"


def rank_errors(taxonomy: Taxonomy, labels: Rows, predicted: Rows) -> dict[str, float]:
    """Errors by rank, from the classes up, and the mean height of the lowest common ancestor; {} without any row.

    labels and predicted are classes (N,), the latter -1 for rows that don't count. An error is the share of rows whose
    predicted class lies in another taxon of the rank than the row's own, the mean over classes. The height of two
    classes' lowest common ancestor is the number of ranks at which they differ, so that its mean is the errors' sum
    [Bertinetto et al. 2020, section 3].
    """
    labels, predicted = labels[predicted >= 0], predicted[predicted >= 0]
    totals = np.bincount(labels)
    present = totals > 0
    differ = taxonomy.codes[:, labels] != taxonomy.codes[:, predicted]
    shares = [np.bincount(labels, weights=row)[present] / totals[present] for row in differ[::-1]]
    if not present.any():
        return {}
    errors = [float(np.mean(share)) for share in shares]
    named = {f"{RANK_ERROR}{rank}": error for rank, error in zip(taxonomy.ranks[::-1], errors, strict=True)}
    return {**named, LCA_HEIGHT: sum(errors)}
