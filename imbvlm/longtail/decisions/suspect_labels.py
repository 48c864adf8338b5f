"""Labels that look wrong, by probabilities of models that have not trained on the rows: confident learning.

A row looks like another class whose probability reaches the mean that the class has on its own rows [Northcutt, Jiang
and Chuang 2021]. Each class has a threshold of its own, so that a class that models are unsure of counts as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imbvlm.longtail.decisions.scored_rows import Floats, Ids
from imbvlm.longtail.post_hoc_adjustment import CHUNK_SIZE

# How many times as probable as the given label another class must be: alike classes have many rows between them. For
# a class of n rows it is times 1 + FEW / n, since models know few images less well.
MIN_RATIO, FEW = 10.0, 20
_NONE = torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class SuspectLabels:
    """Numbers of the rows (S,) whose labels look wrong, the most suspicious first, with what each looks like (S,).

    Probabilities (S,) are of the given label and of that class. `unknown` are the classes that nothing is said about.
    """

    rows: Ids
    looks_like: Ids
    given_probability: Floats
    other_probability: Floats
    unknown: Ids

    def __len__(self) -> int:
        return len(self.rows)


def find_suspects(logits: Tensor, labels: Tensor) -> SuspectLabels:
    """The suspects among rows of logits (N, C) and labels (N,); rows without probabilities are none.

    Models that take most rows of a class for others don't know it. Its rows aren't listed, since they would be most of
    a tail; nor does a class without rows, which has no threshold, stand against any.
    """
    num_classes = logits.shape[1]
    parts = list(zip(torch.split(logits, CHUNK_SIZE), torch.split(labels, CHUNK_SIZE), strict=True))
    given = torch.cat([_NONE, *(part.double().softmax(dim=1).gather(1, own[:, None])[:, 0] for part, own in parts)])
    is_read = ~given.isnan()
    counts = torch.bincount(labels[is_read], minlength=num_classes)
    sums = torch.bincount(labels[is_read], weights=given[is_read], minlength=num_classes)
    thresholds = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
    other, looks_like = [_NONE], [_NONE.long()]
    for part, _ in parts:
        probabilities = part.double().softmax(dim=1)
        best = probabilities.where(probabilities >= thresholds, -1.0).max(dim=1)
        other.append(best.values)
        looks_like.append(best.indices)
    ratios = MIN_RATIO * (1 + FEW / counts.clamp(min=1))
    others, classes = torch.cat(other), torch.cat(looks_like)
    is_suspect = is_read & (classes != labels) & (others > ratios[labels] * given)
    num_suspects = torch.bincount(labels[is_suspect], minlength=num_classes)
    is_known = 2 * num_suspects < counts
    is_suspect &= is_known[labels]
    rows = torch.nonzero(is_suspect).flatten()
    rows = rows[torch.argsort(given[rows] - others[rows], stable=True)]
    arrays = rows, classes[rows], given[rows], others[rows], torch.nonzero(~is_known & (counts > 0)).flatten()
    return SuspectLabels(*(array.numpy() for array in arrays))
