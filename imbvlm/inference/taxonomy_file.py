"""The tree over an exported model's classes in its folder, and the scores by which predictions roll up in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.json_file import read_json
from imbvlm.inference.calibration_file import describe_basis
from imbvlm.inference.model_parts import EXPORT_AGAIN
from imbvlm.longtail.roll_up import Floats, RankScores, RollUp, best_taxa, learn_roll_up
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.training.checkpoint import read_tensors, write_tensors

TAXONOMY_FILE, RANK_SCORES_FILE = "taxonomy.json", "rank_scores.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class RolledUp:
    """The taxon at the lowest rank that a roll-up is sure of, and its probability."""

    taxon: str
    rank: str
    probability: float


@dataclass(frozen=True)
class ModelTaxonomy:
    """The tree over a model's classes, and scores of rows that it has not trained on, or the reason for none.

    `is_exported` says that the exported weights have scored them, not models of folds.
    """

    taxonomy: Taxonomy
    class_names: tuple[str, ...]
    scores: RankScores | str
    is_exported: bool = False

    def rolled_up(self, roll_up: RollUp, probabilities: Floats) -> list[RolledUp | None]:
        """The named taxon of each row of probabilities (B, C); None where no rank is sure enough."""
        taxa, values = best_taxa(self.taxonomy, probabilities)
        named = zip(taxa, values, roll_up.ranks(values).tolist(), strict=True)
        return [
            None if rank < 0 else RolledUp(self._names[rank][own[rank]], self.taxonomy.ranks[rank], float(value[rank]))
            for own, value, rank in named
        ]

    @cached_property
    def _names(self) -> Sequence[tuple[str, ...]]:
        return (*self.taxonomy.taxa, self.class_names)

    def write(self, folder: str) -> None:
        """Write the tree into a model's folder, and the scores if there are any."""
        digests, reason = dict[str, str](), self.scores if isinstance(self.scores, str) else None
        if isinstance(self.scores, RankScores):
            write_rank_scores(folder, self.scores, digests)
        content = {
            "format": FORMAT, **self.taxonomy.to_dict(), "no_scores": reason, "is_exported": self.is_exported,
            "digests": digests,
        }  # fmt: skip
        text = json.dumps(content, ensure_ascii=False)
        storage.write_bytes(storage.join(folder, TAXONOMY_FILE), text.encode())

    @staticmethod
    def read(folder: str, class_names: Sequence[str]) -> ModelTaxonomy | None:
        """The tree in a model's folder, None without one; raises ImbvlmError for damaged files."""

        def parse(content: Any) -> tuple[Taxonomy, str | None, bool, dict[str, str]]:
            taxonomy, is_exported = Taxonomy.from_dict(content, len(class_names)), bool(content.get("is_exported"))
            return taxonomy, content["no_scores"], is_exported, dict(content["digests"])

        read = read_json(storage.join(folder, TAXONOMY_FILE), parse, EXPORT_AGAIN)
        if read is None:
            return None
        taxonomy, reason, is_exported, digests = read
        scores = read_rank_scores(folder, len(taxonomy.ranks), digests) if reason is None else str(reason)
        return ModelTaxonomy(taxonomy, tuple(class_names), scores, is_exported)


def roll_up_notes(tree: ModelTaxonomy | None, precision: float) -> tuple[str, ...]:
    """Sentences on what a roll-up promises; raises ImbvlmError as `learn_for` does."""
    learn_for(tree, precision)
    assert tree is not None, "it was learned for"
    return (describe_basis(len(tree.scores), tree.is_exported),)


def learn_for(tree: ModelTaxonomy | None, precision: float) -> RollUp:
    """A model's thresholds for a precision; raises ImbvlmError where no rank can promise it, with the reason."""
    if tree is None:
        raise ImbvlmError("a roll-up needs a tree over the model's classes, and it has none. Export a sweep with one.")
    if isinstance(tree.scores, str):
        raise ImbvlmError(f"this model can't promise a precision of roll-ups: {tree.scores}. Predict without one.")
    return learn_roll_up(tree.taxonomy, tree.scores, precision)


def write_rank_scores(folder: str, scores: RankScores, digests: dict[str, str]) -> None:
    """Write scores by rank into a folder, and add the file's digest."""
    tensors = {"probabilities": torch.from_numpy(scores.probabilities), "is_right": torch.from_numpy(scores.is_right)}
    write_tensors(folder, RANK_SCORES_FILE, tensors, digests)


def read_rank_scores(folder: str, num_ranks: int, digests: Mapping[str, str]) -> RankScores:
    """What `write_rank_scores` wrote; raises ImbvlmError for a damaged or missing file."""
    tensors = read_tensors(folder, RANK_SCORES_FILE, digests)
    parts = [tensors.get(name, torch.empty(0)) for name in ("probabilities", "is_right")]
    shapes = {tuple(part.shape) for part in parts}
    if shapes != {(len(parts[0]), num_ranks)}:
        location = storage.join(folder, RANK_SCORES_FILE)
        raise ImbvlmError(f"{location} must have scores of {num_ranks} ranks, got {sorted(shapes)}. {EXPORT_AGAIN}")
    return RankScores(parts[0].double().numpy(), parts[1].bool().numpy())
