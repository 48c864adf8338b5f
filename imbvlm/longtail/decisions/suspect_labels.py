"""Labels that look wrong, by probabilities of models that have not trained on the rows: confident learning.

A row looks like another class whose probability reaches the mean that the class has on its own rows [Northcutt, Jiang
and Chuang 2021]. Each class has a threshold of its own, so that a class that models are unsure of counts as well. A
label is suspected if it is unusual for its class, too: models know a tail less well, and find many right labels of it
improbable.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imbvlm.longtail.decisions.scored_rows import Floats, Ids
from imbvlm.longtail.post_hoc_adjustment import CHUNK_SIZE

# How many times as probable as the given label another class must be, over what is usual for the class: alike classes
# have many rows between them. For a class of n rows it is times 1 + FEW / n, since models know few images less well.
MIN_RATIO, FEW = 10.0, 20
_NONE = torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class SuspectLabels:
    """Numbers of the rows (S,) whose labels look wrong, the most suspicious first, with what each looks like (S,).

    Probabilities (S,) are of the given label and of that class.
    """

    rows: Ids
    looks_like: Ids
    given_probability: Floats
    other_probability: Floats

    def __len__(self) -> int:
        return len(self.rows)


def find_suspects(logits: Tensor, labels: Tensor) -> SuspectLabels:
    """The suspects among rows of logits (N, C) and labels (N,); rows without probabilities are none.

    They are at most half of a class's rows. A class without rows, which has no threshold, stands against none.
    """
    num_classes = logits.shape[1]
    parts = list(zip(torch.split(logits, CHUNK_SIZE), torch.split(labels, CHUNK_SIZE), strict=True))
    given, highest = [_NONE], [_NONE]
    for part, own in parts:
        logs = part.double().log_softmax(dim=1)
        given.append(logs.gather(1, own[:, None])[:, 0])
        highest.append(logs.max(dim=1).values)
    log_given, log_highest = torch.cat(given), torch.cat(highest)
    of_given, is_read = log_given.exp(), ~log_given.isnan()
    counts = torch.bincount(labels[is_read], minlength=num_classes)
    sums = torch.bincount(labels[is_read], weights=of_given[is_read], minlength=num_classes)
    thresholds = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
    other, looks_like = [_NONE], [_NONE.long()]
    for part, _ in parts:
        probabilities = part.double().softmax(dim=1)
        best = probabilities.where(probabilities >= thresholds, -1.0).max(dim=1)
        other.append(best.values)
        looks_like.append(best.indices)
    others, classes = torch.cat(other), torch.cat(looks_like)
    limits = _limits((log_highest - log_given)[is_read].numpy(), labels[is_read].numpy(), num_classes)
    is_suspect = is_read & (classes != labels) & (others.log() - log_given > torch.from_numpy(limits)[labels])
    rows = torch.nonzero(is_suspect).flatten()
    rows = rows[torch.argsort(of_given[rows] - others[rows], stable=True)]
    arrays = rows, classes[rows], of_given[rows], others[rows]
    return SuspectLabels(*(array.numpy() for array in arrays))


def _limits(ratios: Floats, labels: Ids, num_classes: int) -> Floats:
    """The ratio (C,) that rows of each class must exceed, all as logarithms, by the ratios (N,) of all rows."""
    counts = np.bincount(labels, minlength=num_classes)
    of_class = np.split(ratios[np.argsort(labels, kind="stable")], np.cumsum(counts)[:-1])
    usual = np.array([np.median(own) if len(own) else 0.0 for own in of_class])
    return usual + np.log(MIN_RATIO * (1 + FEW / np.maximum(counts, 1)))
