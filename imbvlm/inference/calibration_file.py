"""Scores of validation rows in an exported model's folder, from which it learns what to accept and sets of classes."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from imbvlm.base import storage
from imbvlm.base.csv_cells import unescape_cell
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import join_limited, limited, pluralize
from imbvlm.base.json_file import damage_named, read_json
from imbvlm.inference.model_parts import EXPORT_AGAIN
from imbvlm.inference.possible_classes import possible_labels, utf8_lines
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.decisions.acceptance import Acceptance, learn_acceptance
from imbvlm.longtail.decisions.prediction_sets import PredictionSets, learn_sets
from imbvlm.longtail.decisions.scored_rows import Floats, Ids, ScoredRows
from imbvlm.training.checkpoint import read_tensors, write_tensors

CALIBRATION_FILE, SCORES_FILE = "calibration.json", "calibration.safetensors"
FORMAT = 1
ACCEPT, REVIEW = "accept", "review"
# Mistakes of a file of shares that an error lists.
_MAX_MISTAKES = 20
# Prevalences with names; others are shares by class.
TRAINING, EVEN = "training", "even"
Prevalence = str | Mapping[str, float]
# The decision on an image and its set, each where it was asked for.
Decided = tuple[str | None, tuple[str, ...] | None]


@dataclass(frozen=True)
class Decisions:
    """The rules by which a model decides, those that were asked for, and sentences on what they promise."""

    class_names: tuple[str, ...]
    acceptance: Acceptance | None
    sets: PredictionSets | None
    notes: tuple[str, ...]

    def decided(self, labels: Ids, probabilities: Floats) -> list[Decided]:
        """Whether to accept each row's first label (N,), and its set, the most probable first, or None.

        probabilities (N, C).
        """
        words: Sequence[str | None] = [None] * len(labels)
        sets: Sequence[tuple[str, ...] | None] = [None] * len(labels)
        if self.acceptance is not None:
            accepted = self.acceptance.accepts(labels, probabilities[np.arange(len(labels)), labels])
            words = np.where(accepted, ACCEPT, REVIEW).tolist()
        if self.sets is not None:
            is_in = self.sets.members(probabilities)
            order = np.argsort(-probabilities, axis=1, kind="stable")
            sets = [
                tuple(self.class_names[label] for label in own[of[own]]) for own, of in zip(order, is_in, strict=True)
            ]
        return list(zip(words, sets, strict=True))


@dataclass(frozen=True)
class ModelCalibration:
    """Scores of rows that a model has not trained on, or the reason for none.

    `is_exported` says that the exported weights have scored them, not models of folds.
    """

    class_names: tuple[str, ...]
    rows: ScoredRows | str
    is_exported: bool = False

    def decide(
        self, accept: float | None = None, sets: float | None = None, prevalence: Prevalence | None = None
    ) -> Decisions:
        """The rules for a precision of what is accepted, a coverage of sets, or both; raises ImbvlmError.

        `prevalence` says how classes come in the images: as in `training`, `even`, or by shares; by default as here.
        """
        if accept is None and sets is None:
            raise ImbvlmError("a prevalence is for decisions, and none was asked for. Give accept or sets too.")
        if isinstance(self.rows, str):
            raise ImbvlmError(f"this model can't promise decisions: {self.rows}. Predict without them.")
        shares = None if prevalence is None else self._shares(prevalence, self.rows)
        if shares is not None and self.rows.comes_as(shares):
            shares = None
        sample = self.rows if shares is None else self.rows.at_prevalence(shares)
        acceptance = None if accept is None else learn_acceptance(sample, accept)
        learned = None if sets is None else learn_sets(self.rows, sets, shares)
        notes = [self.basis, *self._notes(sample, shares)]
        notes += [] if acceptance is None else [_describe_acceptance(acceptance)]
        notes += [] if learned is None else [_describe_sets(learned)]
        return Decisions(self.class_names, acceptance, learned, tuple(notes))

    @property
    def basis(self) -> str:
        """A sentence on what the promises rest on."""
        assert not isinstance(self.rows, str), "there are scores"
        return describe_basis(len(self.rows), self.is_exported)

    def _notes(self, sample: ScoredRows, shares: Floats | None) -> list[str]:
        if shares is None:
            return []
        assert not isinstance(self.rows, str), "there are scores"
        unseen = [self.class_names[label] for label in np.flatnonzero((shares > 0) & (self.rows.counts == 0)).tolist()]
        text = (
            f"approximate at this prevalence: {len(sample):,} of the images, drawn so that their classes come by it, "
            "stand for such images"
        )
        return [f"{text}; without {join_limited(unseen, 5)}, which no validation image has" if unseen else text]

    def _shares(self, prevalence: Prevalence, rows: ScoredRows) -> Floats:
        if prevalence == TRAINING:
            return rows.stats.split_counts.astype(np.float64)
        if prevalence == EVEN:
            return np.ones(len(self.class_names))
        if isinstance(prevalence, str):
            raise ImbvlmError(
                f"a prevalence must be {TRAINING}, {EVEN} or shares by class, got {prevalence!r}. Give one of them."
            )
        shares = np.zeros(len(self.class_names))
        possible_labels(prevalence, self.class_names, "classes with a share")
        for name, share in prevalence.items():
            if not 0 <= share < math.inf:
                raise ImbvlmError(f"the share of {name!r} must be a number from 0 up, got {share!r}. Correct it.")
            own = possible_labels([name], self.class_names)
            shares[own] = share / len(own)
        return shares

    def write(self, folder: str) -> None:
        """Write the scores, or the reason for none, into a folder."""
        digests, reason = dict[str, str](), self.rows if isinstance(self.rows, str) else None
        if isinstance(self.rows, ScoredRows):
            rows = self.rows
            arrays = {
                "labels": rows.labels, "predicted": rows.predicted, "confidence": rows.confidence,
                "label_probability": rows.label_probability, "mean_probabilities": rows.mean_probabilities,
                "class_counts": rows.stats.counts, "split_counts": rows.stats.split_counts,
            }  # fmt: skip
            write_tensors(folder, SCORES_FILE, {name: torch.tensor(own) for name, own in arrays.items()}, digests)
        content = {"format": FORMAT, "no_scores": reason, "is_exported": self.is_exported, "digests": digests}
        storage.write_bytes(storage.join(folder, CALIBRATION_FILE), json.dumps(content).encode())

    @staticmethod
    def read(folder: str, class_names: Sequence[str]) -> ModelCalibration | None:
        """What `write` wrote, None before; raises ImbvlmError for damaged files."""

        def parse(content: Any) -> tuple[str | None, bool, dict[str, str]]:
            return content["no_scores"], bool(content["is_exported"]), dict(content["digests"])

        location = storage.join(folder, CALIBRATION_FILE)
        read = read_json(location, parse, EXPORT_AGAIN)
        if read is None:
            return None
        reason, is_exported, digests = read
        if reason is not None:
            return ModelCalibration(tuple(class_names), str(reason))
        tensors = {name: own.numpy() for name, own in read_tensors(folder, SCORES_FILE, digests).items()}
        with damage_named(f"{location} is damaged", EXPORT_AGAIN):
            stats = ClassStats.from_counts(tensors.pop("class_counts"), tensors.pop("split_counts"))
            rows = ScoredRows(**tensors, stats=stats)
            if stats.num_classes != len(class_names) or len({len(rows.labels), len(rows.confidence)}) > 1:
                raise ValueError(f"its scores are of {stats.num_classes} classes, not {len(class_names)}")
        return ModelCalibration(tuple(class_names), rows, is_exported)


def describe_basis(num_rows: int, is_exported: bool) -> str:
    """A sentence on the rows that promises rest on: scored by the exported weights, or by models of the search."""
    images = pluralize(num_rows, "validation image")
    if is_exported:
        return f"promises are for images that come as {images}, which the exported weights have scored"
    return (
        f"promises are estimates: {images} were scored by models of the search, which trained on fewer images than the "
        "exported weights"
    )


def _describe_acceptance(acceptance: Acceptance) -> str:
    own = [promise for promise in acceptance.promise_of if promise.is_given]
    pooled = sum(promise.group is not None for promise in own)
    return (
        f"accept {acceptance.precision:g}: {pluralize(len(own) - pooled, 'class')} with a promise each, {pooled} with "
        f"one of their shot group, {acceptance.num_classes - len(own)} without, which are for review; each promise "
        "holds at 95 %, so that 1 in 20 may be broken"
    )


def _describe_sets(sets: PredictionSets) -> str:
    num_own = int(sets.has_own.sum())
    return (
        f"sets {sets.coverage:g}: {pluralize(num_own, 'class')} covered one by one, and {len(sets.has_own) - num_own} "
        "with fewer validation images together"
    )


def decide_for(
    calibration: ModelCalibration | None, accept: float | None, sets: float | None, prevalence: Prevalence | None
) -> Decisions:
    """A model's rules as `decide` gives them; raises ImbvlmError for a model without calibration."""
    if calibration is None:
        raise ImbvlmError(f"this model has no scores to decide by, since an earlier version wrote it. {EXPORT_AGAIN}")
    return calibration.decide(accept, sets, prevalence)


def read_prevalence(value: str) -> Prevalence:
    """A prevalence by its name, or from a CSV file with a row for each class: its name and its share, of any sum.

    Raises ImbvlmError with all mistakes of the file, StorageError.
    """
    if value in (TRAINING, EVEN):
        return value
    if not storage.exists(value):
        raise ImbvlmError(f"a prevalence must be {TRAINING}, {EVEN} or a CSV file, and {value} is not there. Give one.")
    try:
        rows = [[unescape_cell(cell).strip() for cell in row] for row in csv.reader(utf8_lines(value))]
    except csv.Error as error:
        raise ImbvlmError(f"{value} can't be read as CSV: {error}. Write a class and its share in each row.") from None
    shares, mistakes = dict[str, float](), list[str]()
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and len(row) == 2 and row[1].lower() == "share"):
            continue
        name, share = (row[0], _number(row[1])) if len(row) == 2 else (row[0], None)
        if share is None:
            mistakes.append(f"line {number} must be a class and its share from 0 up, got {','.join(row)!r}")
        elif name in shares:
            mistakes.append(f"line {number} has {name!r} again")
        else:
            shares[name] = share
    if not mistakes and not any(shares.values()):
        mistakes.append("no share is above 0" if shares else "it has no row")
    if mistakes:
        rule = f"{value} must have a row for each class: its name and its share, such as cat,0.2"
        shown = limited(mistakes, _MAX_MISTAKES)
        raise ImbvlmError("\n  ".join([f"{rule}; the heading class,share may stand above.", *shown]))
    return shares


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None
