"""Labels flipped on purpose: which share is found, and which share of right labels is listed, by shot group.

A draw of Fashion-MNIST gives ten random classes 250 to 5 training and validation images; the emoji are all training
images, whose two drawings stay in one fold. Linear classifiers on the embedded encoder's features score five folds, as
a sweep's do, and train on the flipped labels. The sets' test splits are never read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from choice import NUM_FOLDS, read_pool
from table import Line, Options
from torch import Tensor
from torch.nn.functional import cross_entropy

from imbvlm.data.manifest import Manifest
from imbvlm.longtail.decisions.suspect_labels import find_suspects
from imbvlm.longtail.post_hoc_adjustment import best_temperature

Array = np.ndarray
NUM_DRAWS, WEIGHT_DECAY, NUM_STEPS = 4, 2e-4, 30
FEW = 20
# The chance of each class to be what a label is flipped to, by the images (C,) of each and the number of its own.
KINDS: dict[str, Callable[[Array, int], Array]] = {
    "to any class alike": lambda counts, own: np.ones(len(counts)),
    "by sizes": lambda counts, own: counts,
    "to smaller classes": lambda counts, own: counts * (counts < own),
    "to larger classes": lambda counts, own: counts * (counts > own),
}
FLIPS = [("none", 0.0), *((kind, share) for share in (0.05, 0.1) for kind in KINDS)]


@dataclass(frozen=True)
class Draw:
    """Features (N, D), labels (N,), and what no fold divides (N,)."""

    features: Tensor
    labels: Array
    groups: Array


def lines(options: Options) -> Iterator[Line]:
    folder = options.features or options.folder
    fashion = read_pool("fashion_mnist_lt", 64, folder)
    emoji = read_pool("emoji_lt", 128, folder)
    manifest = Manifest.read("embedded:emoji_lt")
    uris = manifest.table.column("uri").take(manifest.rows_of("train")).to_pylist()
    drawings = np.unique([PurePosixPath(uri).name.split("-", 1)[1] for uri in uris], return_inverse=True)[1]
    draws: dict[str, Callable[[np.random.Generator], Draw]] = {
        "Fashion-MNIST": lambda rng: drawn(Draw(fashion.features, fashion.labels, fashion.copies), rng),
        "emoji": lambda rng: Draw(emoji.features, emoji.labels, drawings),
    }
    for name, draw in draws.items():
        for kind, share in FLIPS:
            counted = [listed_counts(draw, kind, share, seed) for seed in range(NUM_DRAWS)]
            yield summarized(f"{name}, {100 * share:g} % flipped {kind}", np.array(counted))


def drawn(pool: Draw, rng: np.random.Generator) -> Draw:
    """Ten random classes of 250 to 5 images by equal ratios; a class that has too few images gets a smaller number."""
    available, classes, rows = np.bincount(pool.labels), list(range(10)), []
    for size in np.rint(np.geomspace(250, 5, 10)).astype(int):
        label = int(rng.choice([label for label in classes if available[label] >= size]))
        classes.remove(label)
        rows.append(rng.permutation(np.flatnonzero(pool.labels == label))[:size])
    chosen = np.sort(np.concatenate(rows))
    return Draw(pool.features[torch.from_numpy(chosen)], pool.labels[chosen], pool.groups[chosen])


def flipped(labels: Array, kind: str, share: float, rng: np.random.Generator) -> Array:
    """The labels, each with another class at this chance, unless there is none to flip it to."""
    counts, result = np.bincount(labels).astype(float), labels.copy()
    for row in np.flatnonzero(rng.random(len(labels)) < share):
        weights = KINDS[kind](counts, counts[labels[row]]).copy()
        weights[labels[row]] = 0
        if weights.any():
            result[row] = rng.choice(len(counts), p=weights / weights.sum())
    return result


def dealt(labels: Array, groups: Array, rng: np.random.Generator) -> Array:
    """The fold (N,) of each row: groups in a random order by their classes, in turn."""
    _, first, unit = np.unique(groups, return_index=True, return_inverse=True)
    order = rng.permutation(len(first))
    order = order[np.argsort(labels[first][order], kind="stable")]
    folds = np.empty(len(first), dtype=int)
    folds[order] = np.arange(len(first)) % NUM_FOLDS
    return folds[unit]


def scored(features: Tensor, labels: Array, folds: Array, num_classes: int) -> Tensor:
    """Logits (N, C), adjusted to an even prior, of linear classifiers that trained on the other folds."""
    targets, logits = torch.from_numpy(labels), torch.zeros(len(labels), num_classes)
    for fold in range(NUM_FOLDS):
        is_train = torch.from_numpy(folds != fold)
        center = features[is_train].mean(dim=0)
        rows = (features - center) / (features[is_train] - center).square().mean().sqrt() / features.shape[1] ** 0.5
        weight, bias = fitted(rows[is_train], targets[is_train], num_classes)
        logits[~is_train] = rows[~is_train] @ weight + bias
    return logits / best_temperature(logits, targets)


def fitted(rows: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (D, C) and bias (C,) of a linear classifier by balanced softmax, of rows (N, D) and targets (N,)."""
    counts = torch.bincount(targets, minlength=num_classes)
    prior = (counts.clamp(min=0.5) / counts.sum()).log()
    weight = torch.zeros(rows.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=NUM_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(rows @ weight + bias + prior, targets) + WEIGHT_DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def listed_counts(draw: Callable[[np.random.Generator], Draw], kind: str, share: float, seed: int) -> Array:
    """Flipped rows, listed ones of them, right rows, listed ones of them: of few-shot and of other classes (2, 4)."""
    rng = np.random.default_rng([seed, 7])
    own = draw(rng)
    labels = flipped(own.labels, kind, share, rng) if share else own.labels
    logits = scored(own.features, labels, dealt(labels, own.groups, rng), int(own.labels.max()) + 1)
    return counts_of(logits, labels, own.labels)


def counts_of(logits: Tensor, labels: Array, truth: Array) -> Array:
    """What `listed_counts` gives, of logits (N, C), labels (N,) and those before flips (N,)."""
    is_listed = np.isin(np.arange(len(labels)), find_suspects(logits, torch.from_numpy(labels)).rows)
    is_wrong, is_few = labels != truth, np.bincount(labels)[labels] < FEW
    return np.array(
        [[(is_wrong & own).sum(), (is_wrong & is_listed & own).sum(), (~is_wrong & own).sum(),
          (~is_wrong & is_listed & own).sum()] for own in (is_few, ~is_few)]
    )  # fmt: skip


def summarized(what: str, counts: Array) -> Line:
    """Flipped labels found and the share of flipped among the listed; right labels listed, with errors over draws."""
    total = counts.sum(axis=0)
    wrong, found, _, listed = total.sum(axis=0)
    shares = [f"{100 * own[1] / own[0]:.0f}" if own[0] else "-" for own in total]
    recall = (
        f"{100 * found / wrong:.0f} ({' and '.join(shares)}), {100 * found / (found + listed):.0f}" if wrong else "-"
    )
    rates = 100 * counts[:, :, 3] / counts[:, :, 2]
    few, other = 100 * total[:, 3] / total[:, 2]
    difference = rates[:, 0] - rates[:, 1]
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return Line(what, recall, f"{few:.1f}, {other:.1f} ({difference.mean():+.1f} ± {error:.1f})")
