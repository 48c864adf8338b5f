"""Blends of heads, selected greedily by class-balanced log-likelihood, where they earn their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imbvlm.base.errors import ImbvlmError
from imbvlm.longtail.logits import at_least_float32
from imbvlm.longtail.metrics import predictions
from imbvlm.longtail.post_hoc_adjustment import balanced_row_weights, best_temperature

MAX_MEMBERS = 8
# Picks of one selection, and so the finest weight, 1 / MAX_PICKS.
MAX_PICKS = 20
# Elements (candidates x rows x classes) of calibrated logits in memory at once: 256 MB, and as much for work.
MAX_ELEMENTS = 2**26
# Numbers by candidate and row that are remembered of earlier selections: 512 MB.
MAX_REMEMBERED = 2**27
# A pick that gains less would only move weights.
MIN_GAIN = 1e-6


@dataclass(frozen=True)
class Candidate:
    """A head's validation logits (N, C), adjusted beforehand, and the pass over the images that they need.

    A pass is one encoder with its weights, size, pooling and crops. Logits may be in half precision, or mapped from a
    file.
    """

    name: str
    pass_name: str
    logits: Tensor


@dataclass(frozen=True)
class BlendMember:
    """A head of a blend; `gain` is the blend's class-balanced log-likelihood above that without this member."""

    name: str
    pass_name: str
    weight: float
    temperature: float
    gain: float


@dataclass(frozen=True)
class BlendDecision:
    """A blend of at most `num_passes` passes against what was decided before it, on rows that chose neither.

    `gain` in class-balanced log-likelihood, with its standard error over rows.
    """

    num_passes: int
    gain: float
    standard_error: float

    @property
    def is_taken(self) -> bool:
        """Heads of one pass cost nothing at prediction; a further pass must gain more than its standard error."""
        return self.gain > (self.standard_error if self.num_passes > 1 else 0)


@dataclass(frozen=True)
class Blend:
    """The weighted mean of members' logits, each divided by its temperature; a single head is a blend of one.

    Its selection was allowed `num_passes` passes, 0 for a single head.
    """

    members: tuple[BlendMember, ...]
    num_passes: int
    decisions: tuple[BlendDecision, ...]

    def combine(self, logits: Mapping[str, Tensor]) -> Tensor:
        """As `blended_logits`, of this blend's members."""
        return blended_logits(self.members, logits)


def blended_logits(members: Sequence[BlendMember], logits: Mapping[str, Tensor]) -> Tensor:
    """A blend's logits (B, C) of its members' logits (B, C) by name, adjusted as the candidates' were."""
    parts = [member.weight / member.temperature * at_least_float32(logits[member.name]) for member in members]
    return torch.stack(parts).sum(dim=0)


# Numbers of candidates in ascending order, each as often as it was picked.
Picks = tuple[int, ...]


class BlendPool:
    """Candidates on the same validation rows, each with a temperature of its own from all rows.

    What depends on picks alone is remembered, so that selections on parts and resamples of the rows share it.
    """

    def __init__(self, candidates: Sequence[Candidate], targets: Tensor, temperatures: Sequence[float]) -> None:
        self.candidates, self.targets, self.temperatures = tuple(candidates), targets, tuple(temperatures)
        self._extensions: dict[Picks, Tensor] = {}
        self._blocks: list[tuple[slice, Tensor]] | None = None

    @staticmethod
    def fit(candidates: Sequence[Candidate], targets: Tensor) -> BlendPool:
        """Give each candidate with finite logits the temperature of highest class-balanced log-likelihood.

        targets (N,). Raises ImbvlmError without rows or such candidates, or for logits of another shape.
        """
        names = [candidate.name for candidate in candidates]
        if len(set(names)) < len(names):
            raise ImbvlmError(
                f"names of candidates must differ, got {', '.join(sorted(names))}. Rename the repeated ones."
            )
        if len({tuple(candidate.logits.shape) for candidate in candidates}) > 1:
            raise ImbvlmError("candidates must have logits of the same rows and classes. Score all on the same images.")
        finite = [candidate for candidate in candidates if bool(torch.isfinite(candidate.logits).all())]
        if not finite:
            raise ImbvlmError("a blend needs a candidate with finite logits, got none. Give one.")
        row_weights = balanced_row_weights(targets)
        temperatures = [best_temperature(candidate.logits, targets, row_weights=row_weights) for candidate in finite]
        return BlendPool(finite, targets, temperatures)

    def strongest(self, number: int) -> BlendPool:
        """The pool of so many candidates with the highest class-balanced log-likelihood."""
        if number >= len(self.candidates):
            return self
        scores = self.extensions(()) @ balanced_row_weights(self.targets).float()
        chosen = sorted(scores.topk(number).indices.tolist())
        candidates, temperatures = (
            [values[index] for index in chosen] for values in (self.candidates, self.temperatures)
        )
        return BlendPool(candidates, self.targets, temperatures)

    def select(self, row_weights: Tensor, num_passes: int, max_members: int = MAX_MEMBERS) -> Picks:
        """The best candidate by weighted log-likelihood for `num_passes` 0, else the best blend of so many passes.

        row_weights (N,), 0 for rows that don't choose. Greedy selection with replacement [Caruana et al. 2004].
        """
        if num_passes == 0:
            return (int((self.extensions(()) @ row_weights.float()).argmax()),)
        if num_passes > 1:
            return self._greedy(row_weights, num_passes, max_members, None)[1]
        passes = dict.fromkeys(candidate.pass_name for candidate in self.candidates)
        blends = [self._greedy(row_weights, 1, max_members, name) for name in passes]
        return max(blends, key=lambda blend: blend[0])[1]

    def log_likelihoods(self, picks: Picks) -> Tensor:
        """Log-likelihood (N,) of each row's class by the blend of these picks."""
        *others, last = picks
        return self.extensions(tuple(others))[last]

    def extensions(self, picks: Picks) -> Tensor:
        """Log-likelihoods (K, N) of these picks with each of the K candidates."""
        if picks not in self._extensions:
            result = torch.empty(len(self.candidates), len(self.targets))
            for rows, margins in self._margins():
                total = margins + margins[list(picks)].sum(dim=0)
                result[:, rows] = -torch.logsumexp(total.div_(len(picks) + 1), dim=-1)
            while self._extensions and (len(self._extensions) + 1) * result.numel() > MAX_REMEMBERED:
                del self._extensions[next(iter(self._extensions))]
            self._extensions[picks] = result
        return self._extensions[picks]

    def correct(self, picks: Picks) -> Tensor:
        """Which rows (N,) the blend of these picks predicts correctly."""
        result = torch.empty(len(self.targets), dtype=torch.bool)
        for rows, margins in self._margins():
            result[rows] = predictions(margins[list(picks)].sum(dim=0))[0] == self.targets[rows]
        return result

    def _greedy(
        self, row_weights: Tensor, max_passes: int, max_members: int, pass_name: str | None
    ) -> tuple[float, Picks]:
        """Score and picks: the candidate that adds most, again and again while it adds, from one pass where named."""
        picks: Picks = ()
        best = -torch.inf
        for _ in range(MAX_PICKS):
            passes = {self.candidates[pick].pass_name for pick in picks} or ({pass_name} if pass_name else set())
            is_full = len(set(picks)) == max_members
            allowed = [
                index
                for index, candidate in enumerate(self.candidates)
                if index in picks or (not is_full and (candidate.pass_name in passes or len(passes) < max_passes))
            ]
            scores = self.extensions(picks)[allowed] @ row_weights.float()
            score = float(scores.max())
            if score <= best + MIN_GAIN:
                break
            best, picks = score, tuple(sorted((*picks, allowed[int(scores.argmax())])))
        return best, picks

    def _margins(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and calibrated logits minus that of the row's class (K, B, C); kept only where all rows fit."""
        if self._blocks is not None:
            yield from self._blocks
            return
        num_rows, num_classes = self.candidates[0].logits.shape
        block = max(MAX_ELEMENTS // (len(self.candidates) * num_classes), 1)
        blocks = (
            (rows, self._block(rows)) for rows in (slice(start, start + block) for start in range(0, num_rows, block))
        )
        if block >= num_rows:
            self._blocks = list(blocks)
            yield from self._blocks
        else:
            yield from blocks

    def _block(self, rows: slice) -> Tensor:
        targets = self.targets[rows, None]
        parts = []
        for candidate, temperature in zip(self.candidates, self.temperatures, strict=True):
            logits = at_least_float32(candidate.logits[rows]) / temperature
            parts.append((logits - logits.gather(1, targets)).float())
        return torch.stack(parts)


def select_blend(pool: BlendPool, parts: Tensor, *, max_members: int = MAX_MEMBERS, max_passes: int = 1) -> Blend:
    """The single head or blend to predict with.

    `parts` (N,) are the rows' folds, or ten parts. Single and blend are chosen anew on all parts but one and compared
    on that one: heads of one pass are blended where the pooled gain is above 0, a further pass is taken where it is
    above its standard error. Raises ImbvlmError.
    """
    if max_members < 1 or max_passes < 1:
        raise ImbvlmError(
            f"a blend needs 1 member and 1 pass or more, got {max_members} and {max_passes}. Give larger numbers."
        )
    row_weights = balanced_row_weights(pool.targets)
    limits = range(min(max_passes, len({candidate.pass_name for candidate in pool.candidates})) + 1)
    scores = [held_out_scores(pool, parts, limit, max_members) for limit in limits]
    chosen, decisions = 0, []
    for limit in limits[1:]:
        gains = scores[limit] - scores[chosen]
        gain = float(row_weights @ gains)
        error = float((row_weights * (gains - gain)).square().sum().sqrt())
        decisions.append(BlendDecision(limit, gain, error))
        chosen = limit if decisions[-1].is_taken else chosen
    picks = pool.select(row_weights, chosen, max_members)
    return Blend(
        members=_members(pool, picks, row_weights),
        num_passes=chosen,
        decisions=tuple(decisions),
    )


def held_out_scores(pool: BlendPool, parts: Tensor, num_passes: int, max_members: int = MAX_MEMBERS) -> Tensor:
    """Log-likelihood (N,) of each row by what `BlendPool.select` takes on the rows of all other parts (N,)."""
    scores = torch.empty(len(parts), dtype=torch.float64)
    for part in sorted(set(parts.tolist())):
        is_held = parts == part
        row_weights = torch.zeros(len(parts), dtype=torch.float64)
        row_weights[~is_held] = balanced_row_weights(pool.targets[~is_held])
        scores[is_held] = pool.log_likelihoods(pool.select(row_weights, num_passes, max_members))[is_held].double()
    return scores


def _members(pool: BlendPool, picks: Picks, row_weights: Tensor) -> tuple[BlendMember, ...]:
    """Members by weight. Without its only member a blend knows nothing: all classes are equally likely."""
    score = float(row_weights @ pool.log_likelihoods(picks).double())
    members = []
    for index in sorted(set(picks), key=lambda index: (-picks.count(index), index)):
        others = tuple(pick for pick in picks if pick != index)
        without = pool.log_likelihoods(others).double() if others else -torch.tensor(_num_classes(pool)).double().log()
        candidate = pool.candidates[index]
        members.append(
            BlendMember(
                name=candidate.name,
                pass_name=candidate.pass_name,
                weight=picks.count(index) / len(picks),
                temperature=pool.temperatures[index],
                gain=score - float((row_weights * without).sum()),
            )
        )
    return tuple(members)


def _num_classes(pool: BlendPool) -> int:
    return pool.candidates[0].logits.shape[1]
