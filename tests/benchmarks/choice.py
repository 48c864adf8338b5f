"""A choice among heads without a validation split: its regret, the truth of its claims, and the gain of a blend.

A draw takes random images of each class, from the training and validation images of an embedded set, as somebody's
folder. Its models are fitted on the embedded encoder's features; all other images of the set say how accurate they
are. The sets' test splits are never read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from table import Line, Options, limited, shown
from tiny_images import extraction_in_this_process
from torch import Tensor

from imbvlm.config.encoder_info import EncoderInfo
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.folds import Fold, deal_folds, fold_pairs
from imbvlm.data.manifest import LabelRows, Manifest
from imbvlm.data.manifest_schema import SPLITS
from imbvlm.data.splits import carve_validation
from imbvlm.features.extraction import ensure_features
from imbvlm.longtail.blending import Blend, BlendPool, Candidate, select_blend
from imbvlm.longtail.claims import (
    Claim,
    RowOutcomes,
    claims_of_rows,
    corrected_claims,
    macro_claim,
    out_of_bag_accuracy,
)
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.logits import log_prior
from imbvlm.longtail.metrics import balanced_standard_error
from imbvlm.longtail.post_hoc_adjustment import adjust_logits, balanced_row_weights
from imbvlm.models.classifier import l2_normalize
from imbvlm.models.model_builder import build_model
from imbvlm.models.model_inputs import ModelInputs

SIZES = (64, 96)
NUM_AXES = 256
NUM_FOLDS, NUM_DRAWS, NUM_CLAIMS = 5, 20, 100
Array = np.ndarray


# ------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Pool:
    """Features (N, D) of one encoder size, labels (N,) and groups of copies (N,) of the images of both splits."""

    info: EncoderInfo
    features: Tensor
    labels: Array
    copies: Array

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Plan:
    """The part of an embedded set that a draw takes: a share of each class, one image at least; None: 250 to 5 images.

    Those fall by equal ratios from the set's largest class to its smallest.
    """

    manifest: str
    share: float | None

    def counts(self, labels: Array) -> Array:
        """Images of each class (C,)."""
        counts = np.bincount(labels)
        if self.share is not None:
            return np.maximum(np.rint(self.share * counts), 1).astype(int)
        result = np.empty(len(counts), dtype=int)
        result[np.argsort(-counts, kind="stable")] = np.rint(np.geomspace(250, 5, len(counts)))
        return result


def read_pool(name: str, size: int, folder: Path) -> Pool:
    """The images of training and validation, whose features are extracted once into the folder.

    Of the encoder's 1,280 numbers the heads see NUM_AXES principal axes of all these images, for speed: images that
    train, validate and tell the truth are treated alike, and no label is read for it.
    """
    manifest = Manifest.read(f"embedded:{name}")
    config = head_config("class_means", data__manifest=f"embedded:{name}", encoder__image_size=size)
    splits = tuple(split for split in ("train", "val") if split in manifest.splits)
    with extraction_in_this_process():
        stored = ensure_features(config, manifest, str(folder), frozenset({"pooled"}), splits, report=lambda line: None)
    rows = {split: manifest.rows_of(split) for split in splits}
    parts = [stored.store(split).gather("pooled", np.arange(len(rows[split]))).float() for split in splits]
    all_rows = np.concatenate([rows[split] for split in splits])
    features = l2_normalize(torch.cat(parts))
    axes = torch.linalg.eigh(features.double().T @ features.double())[1][:, -NUM_AXES:].float()
    info = replace(stored.info, pooled_width=NUM_AXES)
    return Pool(info, features @ axes, manifest.labels[all_rows], manifest.label_rows().copies[all_rows])


# The emoji are long-tailed as they are. Half of each class is a folder like many; with 13 % the median class has three
# images, and more than 2,000 are left to tell the truth.
PLANS = {
    "fashion_mnist_lt": Plan("fashion_mnist_lt", None),
    "emoji_lt, half": Plan("emoji_lt", 0.5),
    "emoji_lt, 13 %": Plan("emoji_lt", 0.13),
}


@dataclass(frozen=True)
class Sample:
    """A draw: rows of the pool to train on and those kept away, and the former as a manifest's label rows."""

    train: Array
    truth: Array
    rows: LabelRows

    @property
    def stats(self) -> ClassStats:
        return ClassStats.from_counts(self.rows.split_counts)


def draw(plan: Plan, pool: Pool, seed: int) -> Sample:
    """Random rows of each class; copies of a drawn image are not among those kept away."""
    rng = np.random.default_rng(seed)
    train = np.concatenate(
        [
            rng.permutation(np.flatnonzero(pool.labels == label))[:count]
            for label, count in enumerate(plan.counts(pool.labels))
        ]
    )
    train.sort()
    labels = pool.labels[train]
    rows = LabelRows(
        labels=labels,
        split_codes=np.full(len(train), SPLITS.index("train"), dtype=np.int8),
        copies=pool.copies[train],
        groups=None,
        class_names=tuple(str(label) for label in range(pool.num_classes)),
        split_counts=np.bincount(labels, minlength=pool.num_classes),
    )
    return Sample(train, np.flatnonzero(~np.isin(pool.copies, pool.copies[train])), rows)


# -------------------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class Features:
    """Stored features as methods read them."""

    features: Tensor
    labels: Array

    def batch(self, output: str, index: Array) -> Tensor:
        return self.features[torch.from_numpy(index)]


# Logits (M, C) of heads by name: of an encoder, its features (N, D), labels (N,), the number of classes, rows (M, D).
Fit = Callable[[EncoderInfo, Tensor, Array, int, Tensor], dict[str, Tensor]]


def head_config(method: str, **overrides: object) -> TrialConfig:
    tree: dict[str, object] = {
        "data": {"manifest": "embedded:fashion_mnist_lt"}, "encoder": {"name": "tinylit_lite0"}, "method": method,
        "eval": {"resize": 1.0},
    }  # fmt: skip
    return TrialConfig.from_tree(tree).with_overrides({k.replace("__", "."): v for k, v in overrides.items()})


@torch.no_grad()
def fit_untrained(
    info: EncoderInfo, features: Tensor, labels: Array, num_classes: int, rows: Tensor
) -> dict[str, Tensor]:
    """The package's methods that train nothing, with several options."""
    names = tuple(str(label) for label in range(num_classes))
    inputs = ModelInputs(info, names, stored=Features(features, labels))
    return {name: build_model(config, inputs, torch.device("cpu"))(rows) for name, config in UNTRAINED.items()}


UNTRAINED = {
    "class_means": head_config("class_means"),
    "discriminant, shrinkage 0.05": head_config("discriminant", discriminant__shrinkage=0.05),
    "discriminant, shrinkage 0.2": head_config("discriminant", discriminant__shrinkage=0.2),
    "discriminant, shrinkage 0.5": head_config("discriminant", discriminant__shrinkage=0.5),
    "prototype_cache, sharpness 5.5": head_config("prototype_cache", prototype_cache__sharpness=5.5),
    "prototype_cache, sharpness 20": head_config("prototype_cache", prototype_cache__sharpness=20.0),
}
# Loss: the share of the log prior in training's logits, the power of class counts in the rows' weights, tau after it.
PROBES = {
    "cross entropy": (0.0, 0.0, 0.0),
    "cross entropy, adjusted": (0.0, 0.0, 1.0),
    "balanced softmax": (1.0, 0.0, 0.0),
    "inverse frequency": (0.0, 1.0, 0.0),
}
NUM_STEPS, MOMENTUM, COSINE_SCALE = 40, 0.9, 20


def fit_probes(
    kind: str, decay: float, info: EncoderInfo, features: Tensor, labels: Array, num_classes: int, rows: Tensor
) -> dict[str, Tensor]:
    """Linear or cosine classifiers of all PROBES at once, by full-batch steps from zero or from class means."""
    targets, counts = torch.from_numpy(labels), np.bincount(labels, minlength=num_classes)
    if kind == "linear":
        # One scale for all axes, which makes them as wide on average as standardized ones. The last axis is the bias.
        center = features.mean(dim=0)
        scale = 1 / (features - center).square().mean().sqrt()
        features, rows = (F.pad((part - center) * scale, (0, 1), value=1) for part in (features, rows))
    else:
        features, rows = l2_normalize(features), l2_normalize(rows)
    one_hot = F.one_hot(targets, num_classes).float()
    prior = log_prior(counts, torch.device("cpu")).float()
    shift = torch.stack([share * prior for share, _, _ in PROBES.values()])[:, None]
    row_weights = torch.stack([torch.from_numpy(counts[labels] ** -power) for _, power, _ in PROBES.values()]).float()
    row_weights = (row_weights / row_weights.sum(dim=1, keepdim=True))[..., None]
    weight = (one_hot.T @ features + 1e-6).repeat(len(PROBES), 1, 1) * (kind == "cosine")
    velocity = torch.zeros_like(weight)
    for _ in range(NUM_STEPS):
        used = weight if kind == "linear" else l2_normalize(weight)
        factor = 1 if kind == "linear" else COSINE_SCALE
        error = torch.softmax(factor * features @ used.mT + shift, dim=-1) - one_hot
        gradient = factor * (error * row_weights).mT @ features
        if kind == "cosine":
            # The part along the weight only changes its length.
            gradient -= (gradient * used).sum(dim=-1, keepdim=True) * used
        velocity = MOMENTUM * velocity + gradient + decay * used
        weight = used - (0.02 if kind == "linear" else 0.05) * velocity
    logits = rows @ weight.mT if kind == "linear" else COSINE_SCALE * rows @ l2_normalize(weight).mT
    return {
        f"{kind}, {name}, decay {decay:g}": adjust_logits(logits[number], counts, tau)
        for number, (name, (_, _, tau)) in enumerate(PROBES.items())
    }


FITS: tuple[Fit, ...] = (
    fit_untrained,
    partial(fit_probes, "linear", 1e-4),
    partial(fit_probes, "linear", 1e-2),
    partial(fit_probes, "cosine", 1e-4),
)
CHEAP = FITS[:1]


# ------------------------------------------------------------------------------------------------------ fitting


@dataclass(frozen=True)
class Scores:
    """Logits (N, C) of heads by name on the same rows, their targets (N,) and the rows' parts (N,)."""

    logits: Mapping[str, Tensor]
    targets: Tensor
    parts: Tensor


def fitted(fits: Sequence[Fit], pool: Pool, train: Array, scored: Array) -> dict[str, Tensor]:
    """Logits of heads that are fitted on some rows of the pool, on others."""
    features, labels = pool.features[torch.from_numpy(train)], pool.labels[train]
    rows = pool.features[torch.from_numpy(scored)]
    logits: dict[str, Tensor] = {}
    for fit in fits:
        logits |= fit(pool.info, features, labels, pool.num_classes, rows)
    return logits


def scores(fits: Sequence[Fit], pool: Pool, pairs: Sequence[tuple[Array, Array]]) -> Scores:
    """Pooled logits over pairs of rows to train on and rows to score."""
    parts = [fitted(fits, pool, train, scored) for train, scored in pairs]
    rows = np.concatenate([scored for _, scored in pairs])
    return Scores(
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        torch.from_numpy(pool.labels[rows]),
        torch.from_numpy(np.repeat(np.arange(len(pairs)), [len(scored) for _, scored in pairs])),
    )


def on_folds(fits: Sequence[Fit], pool: Pool, sample: Sample) -> Scores:
    """Out-of-fold logits of the draw's rows."""
    folds = deal_folds(sample.rows, NUM_FOLDS, seed=0).folds
    return scores(fits, pool, [(sample.train[fold.train], sample.train[fold.val]) for fold in folds])


def on_held_out(fits: Sequence[Fit], pool: Pool, sample: Sample) -> Scores:
    """Logits of the rows that a sweep holds out from training where there is no validation split."""
    held_out = carve_validation(sample.rows, 0)
    train = np.setdiff1d(np.arange(len(sample.train)), held_out)
    return scores(fits, pool, [(sample.train[train], sample.train[held_out])])


def on_truth(fits: Sequence[Fit], pool: Pool, sample: Sample) -> Scores:
    """Logits of the rows that were kept away, by heads fitted on all rows of the draw."""
    return scores(fits, pool, [(sample.train, sample.truth)])


def accuracy(logits: Tensor, targets: Tensor, classes: Array | None = None) -> float:
    """Balanced accuracy in percent, over these classes."""
    correct, labels = (logits.argmax(dim=1) == targets).double().numpy(), targets.numpy()
    rows = np.ones(len(labels), dtype=bool) if classes is None else np.isin(labels, classes)
    return 100 * macro_claim(correct[rows], labels[rows]).value


# ------------------------------------------------------------------------------------------- regret, and blends


TODAY = "balanced accuracy, held-out rows"
OURS = "log-likelihood, five folds"


def criteria(held_out: Scores, folds: Scores) -> dict[str, dict[str, float]]:
    """Four numbers of each head that could choose."""
    result = {}
    for where, rows in (("held-out rows", held_out), ("five folds", folds)):
        pool = BlendPool.fit(candidates({"": rows}), rows.targets)
        likelihoods = pool.extensions(()) @ balanced_row_weights(rows.targets).float()
        result[f"balanced accuracy, {where}"] = {
            name: accuracy(logits, rows.targets) for name, logits in rows.logits.items()
        }
        result[f"log-likelihood, {where}"] = dict(zip(rows.logits, likelihoods.tolist(), strict=True))
    return result


def regrets(truth: Scores, values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By criterion, points that its choice lies below the best head; the mean over heads that it finds equal."""
    true = {name: accuracy(logits, truth.targets) for name, logits in truth.logits.items()}
    return {
        criterion: max(true.values())
        - float(np.mean([true[name] for name, value in of.items() if value == max(of.values())]))
        for criterion, of in values.items()
    }


def candidates(passes: Mapping[str, Scores]) -> list[Candidate]:
    """The heads of each pass, named `head` with the pass behind it."""
    return [Candidate(name + of, of, logits) for of, rows in passes.items() for name, logits in rows.logits.items()]


def blend_gain(folds: Mapping[str, Scores], truth: Mapping[str, Scores]) -> float:
    """Points by which the deliverable that folds decide on is above the single head that they choose."""
    rows = next(iter(folds.values()))
    pool = BlendPool.fit(candidates(folds), rows.targets)
    blend = select_blend(pool, rows.parts, max_passes=len(folds))
    single = pool.candidates[pool.select(balanced_row_weights(rows.targets), 0)[0]].name
    logits = {candidate.name: candidate.logits for candidate in candidates(truth)}
    targets = next(iter(truth.values())).targets
    return accuracy(blend.combine(logits), targets) - accuracy(logits[single], targets)


def choice_lines(name: str, plan: Plan, pools: Mapping[int, Pool]) -> Iterator[Line]:
    """Regret of four rules on the smaller size, and gains of blends, over draws of the training images."""
    found: dict[str, list[float]] = {}
    gains: dict[str, list[float]] = {}
    for seed in range(NUM_DRAWS):
        sample = draw(plan, pools[SIZES[0]], seed)
        folds = {f", {size} px": on_folds(FITS, pool, sample) for size, pool in pools.items()}
        truth = {f", {size} px": on_truth(FITS, pool, sample) for size, pool in pools.items()}
        first = next(iter(folds))
        held_out = on_held_out(FITS, pools[SIZES[0]], sample)
        for criterion, regret in regrets(truth[first], criteria(held_out, folds[first])).items():
            found.setdefault(criterion, []).append(regret)
        gains.setdefault("one pass", []).append(blend_gain({first: folds[first]}, {first: truth[first]}))
        gains.setdefault("two sizes", []).append(blend_gain(folds, truth))
    yield shown(f"{name}: {len(sample.train):,} images train, {len(sample.truth):,} are the truth", "")
    for criterion, values in found.items():
        yield shown(f"  regret, {criterion}: mean, worst", f"{np.mean(values):.2f}, {max(values):.2f} points")
    today, ours = found[TODAY], found[OURS]
    yield limited(f"  mean regret, {OURS}, over the first rule's", np.mean(ours) / np.mean(today), "x", 0.5)
    yield limited("  worst regret, likewise", max(ours) / max(today), "x", 1.0)
    for passes, values in gains.items():
        error = np.std(values, ddof=1) / len(values) ** 0.5
        yield shown(f"  gain of a blend of {passes} over the best head", f"{np.mean(values):.2f} ± {error:.2f} points")


# -------------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class ClaimedDraw:
    """A claim with its truth in fractions, the naive value, and the standard error of the chosen predictor's rows.

    `uncorrected` is the claim of models that train on four fifths of the images.
    """

    claim: Claim
    truth: float
    naive: float
    error: float
    uncorrected: float


def claimed(plan: Plan, pool: Pool, seed: int) -> tuple[ClaimedDraw, ClaimedDraw]:
    """Claims of balanced and few-shot accuracy of the deliverable that folds decide on, over validated classes."""
    sample = draw(plan, pool, seed)
    folds, truth = on_folds(CHEAP, pool, sample), on_truth(CHEAP, pool, sample)
    heads = BlendPool.fit(candidates({"": folds}), folds.targets)
    blend = select_blend(heads, folds.parts)

    def choose(row_weights: Tensor) -> Tensor:
        return heads.correct(heads.select(row_weights, blend.num_passes))

    naive = choose(balanced_row_weights(folds.targets)).double().numpy()
    plain = claims_of_rows(out_of_bag_accuracy(choose, folds.targets, seed=seed), folds.targets, sample.stats)
    by_folds, by_pairs, row_of = scored_rows(blend, pool, sample, naive)
    claims = corrected_claims(plain, by_folds, by_pairs, row_of, folds.targets, sample.stats)
    right = (blend.combine(truth.logits).argmax(dim=1) == truth.targets).double().numpy()
    validated = np.unique(folds.targets.numpy())
    few = np.intersect1d(validated, sample.stats.few_shot)
    result = []
    for metric, classes in (("balanced_accuracy", validated), ("few_shot_accuracy", few)):
        is_in, is_true = (np.isin(rows.targets.numpy(), classes) for rows in (folds, truth))
        labels = folds.targets.numpy()[is_in]
        before = macro_claim(naive[is_in], labels)
        true = macro_claim(right[is_true], truth.targets.numpy()[is_true])
        error = balanced_standard_error(np.bincount(labels, weights=naive[is_in]), np.bincount(labels))
        result.append(ClaimedDraw(claims[metric], true.value, before.value, error, plain[metric].value))
    return result[0], result[1]


def scored_rows(blend: Blend, pool: Pool, sample: Sample, correct: Array) -> tuple[RowOutcomes, RowOutcomes, Array]:
    """Rows scored without their fold, given which are correct (N,), and without one more; the former's number (P,)."""
    folds = deal_folds(sample.rows, NUM_FOLDS, seed=0)
    place = np.argsort(folds.val_rows)
    pairs = fold_pairs(folds)
    logits = [fitted(CHEAP, pool, sample.train[pair.train], sample.train[pair.val]) for pair in pairs]
    predicted = np.concatenate([blend.combine(of_pair).argmax(dim=1).numpy() for of_pair in logits])
    rows = np.concatenate([pair.val for pair in pairs])

    def num_seen(parts: Sequence[Fold]) -> Array:
        labels = sample.rows.labels
        return np.concatenate(
            [np.bincount(labels[part.train], minlength=pool.num_classes)[labels[part.val]] for part in parts]
        )

    by_pairs = RowOutcomes((predicted == sample.rows.labels[rows]).astype(float), num_seen(pairs))
    return RowOutcomes(correct, num_seen(folds.folds)), by_pairs, place[np.searchsorted(folds.val_rows[place], rows)]


def claim_lines(name: str, plan: Plan, pool: Pool) -> Iterator[Line]:
    """Coverage, error and width of claims over draws of the training images."""
    pairs = [claimed(plan, pool, seed) for seed in range(NUM_CLAIMS)]
    for what, draws in zip(("balanced", "few-shot"), zip(*pairs, strict=True), strict=True):
        errors = np.array([of.claim.value - of.truth for of in draws])
        widths = np.array([of.claim.half_width for of in draws])
        num_covered = int((np.abs(errors) <= widths).sum())
        truth, naive, plain = (
            100 * np.mean([getattr(of, key) for of in draws]) for key in ("truth", "naive", "uncorrected")
        )
        yield shown(f"{name}: {what} accuracy claimed, true", f"{truth + 100 * errors.mean():.1f}, {truth:.1f} %")
        yield shown("  the best score over folds, the same without its choice", f"{naive:.1f}, {plain:.1f} %")
        yield Line(
            f"  intervals of {NUM_CLAIMS} that cover the truth", f"{num_covered}", "", None, ">= 90", num_covered >= 90
        )
        yield limited("  mean error of the claim, absolute", abs(100 * errors.mean()), "points", 1.0)
        yield limited(
            "  mean half-width, over the standard error of its rows", widths.mean() / np.mean([d.error for d in draws]),
            "x", 2.2,
        )  # fmt: skip


def lines(options: Options) -> Iterator[Line]:
    torch.set_num_threads(1)
    for name, plan in PLANS.items():
        pools = {size: read_pool(plan.manifest, size, options.features or options.folder) for size in SIZES}
        yield from choice_lines(name, plan, pools)
        yield from claim_lines(name, plan, pools[SIZES[0]])
