"""Compares encoders before any sweep: baselines by folds over a class-stratified sample of the training images."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imbvlm.base import interrupts
from imbvlm.base.errors import ConfigError, ImbvlmError, Problem
from imbvlm.base.formatting import percent, pluralize, size_text
from imbvlm.base.text_tables import UNLIMITED, table
from imbvlm.config.encoder_entries import find_entry, score_notes
from imbvlm.config.encoder_info import EncoderInfo, OutputName
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import seeded, with_column
from imbvlm.data.split_power import NUM_FOLDS
from imbvlm.data.splits import draw_rows
from imbvlm.features.extraction import ensure_features, seconds_per_image
from imbvlm.features.store_sizes import bytes_per_image
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.class_stats import ClassStats
from imbvlm.longtail.group_gap import MIN_GROUPS, GroupedRows, group_standard_error
from imbvlm.longtail.metrics import balanced_standard_error, per_class_accuracy, shot_group_accuracies
from imbvlm.longtail.worker_group import SINGLE_WORKER
from imbvlm.models.encoders.encoder_factory import describe_encoder
from imbvlm.models.encoders.encoder_registry import resolve_encoder
from imbvlm.sweep.plan.feasibility import data_counts, one_class_problem, validation_problem
from imbvlm.sweep.spec.baselines import PROBE_PATIENCE, probe_config
from imbvlm.training.folded_run import FoldedRun
from imbvlm.training.trial_run import build_trial
from imbvlm.training.trial_session import default_device

HEADS = ("linear probe", "class means", "zero-shot")
# The outputs that the heads read, which every sweep stores.
OUTPUTS = frozenset[OutputName]({"pooled", "image_embedding"})
# Names that YAML reads as text without quotes, also in a list.
_PLAIN = re.compile(r"[A-Za-z][\w./@+-]*(:[\w./@+-]+)*")


# ----------------------------------------------------------------------------------------------------- the sample


def sample_quota(counts: npt.NDArray[np.int64], max_images: int, seed: int) -> npt.NDArray[np.int64]:
    """Images of each class (C,) in a sample of at most `max_images`: as many of one as of another, or all of its own.

    A class has NUM_FOLDS or all, or none where the sample has no space for every class; `seed` selects those it has.
    """
    level = (
        bisect_right(range(int(counts.max()) + 1), max_images, key=lambda level: np.minimum(counts, level).sum()) - 1
    )
    shares = np.minimum(counts, max(level, NUM_FOLDS))
    order, quota = seeded(seed).permutation(len(counts)), np.zeros_like(counts)
    order = order[np.cumsum(shares[order]) <= max_images]
    quota[order] = shares[order]
    return quota


def sample_images(manifest: Manifest, max_images: int, seed: int) -> Manifest:
    """Training images, equally many of each class or all of its own; the classes are those that have any.

    Shot groups stay those of the whole manifest. Copies of an image are sampled together. Raises ConfigError for a
    sample that scores nothing.
    """
    train, sample = manifest.rows_of("train"), manifest.split("train")
    if len(train) > max_images:
        counts = np.bincount(manifest.labels[train], minlength=len(manifest.class_names))
        rows = draw_rows(manifest.label_rows(), sample_quota(counts, max_images, seed), seed)
        sample = _of_its_classes(replace(manifest.take(rows), split_counts=sample.split_counts))
    stats, num_val = data_counts(sample, seed, NUM_FOLDS)
    problem = one_class_problem(stats) or validation_problem(stats, num_val, ["val/balanced_accuracy"])
    if problem is not None:
        raise ConfigError([Problem(f"of a sample of {pluralize(len(sample), 'image')}, {problem}.", manifest.name)])
    return sample


def _of_its_classes(sample: Manifest) -> Manifest:
    """The sample without classes that it has no image of, between which zero-shot alone would have to choose."""
    if not len(sample):
        return sample
    labels, column = np.unique(sample.labels), sample.table.schema.field("label").type
    names, counts = sample.class_names, sample.class_stats().split_counts
    return replace(
        sample,
        table=with_column(sample.table, "label", pa.array(np.searchsorted(labels, sample.labels), column)),
        class_names=tuple(names[label] for label in labels),
        split_counts=tuple(counts[labels].tolist()),
        label_map=None,
        taxonomy=None,
    )


# --------------------------------------------------------------------------------------------------- the encoders


@dataclass(frozen=True)
class ComparedEncoder:
    """An encoder at a size: the zero-shot configuration that its features are extracted with, and its facts."""

    config: TrialConfig
    info: EncoderInfo

    @property
    def name(self) -> str:
        """The name that the user gave."""
        return self.config.encoder.name


def find_encoders(manifest: str, names: Sequence[str], sizes: Sequence[object], seed: int) -> list[ComparedEncoder]:
    """Each encoder at each size, by default its own; loads no weights.

    Raises ConfigError with every mistake of a name or size, and all weights that can't be had.
    """
    compared, problems = [], dict[Problem, None]()
    if not names:
        problems[Problem("--encoders must name an encoder, got none. Separate several by commas.")] = None
    for name in dict.fromkeys(names):
        for size in dict.fromkeys(sizes or [None]):
            data, encoder = {"manifest": manifest, "split_seed": seed}, {"name": name, "image_size": size}
            try:
                config = TrialConfig.from_tree({"data": data, "encoder": encoder, "method": "zero_shot"})
                problem = resolve_encoder(config.encoder).weights_state().problem
                compared.append(ComparedEncoder(config, describe_encoder(config.encoder)))
            except ConfigError as error:
                problems |= dict.fromkeys(error.problems)
            except ImbvlmError as error:
                problems[Problem(str(error), name)] = None
            else:
                problems |= {} if problem is None else {Problem(problem, name): None}
    if problems:
        raise ConfigError(problems)
    return compared


# ----------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True)
class HeadScore:
    """Fractions, with their standard errors; None where no few-shot class is scored, and for errors of few groups."""

    balanced_accuracy: float
    balanced_standard_error: float | None
    few_shot_accuracy: float | None
    few_shot_standard_error: float | None

    @staticmethod
    def of(
        correct: npt.NDArray[np.int64],
        total: npt.NDArray[np.int64],
        stats: ClassStats,
        rows: GroupedRows | None = None,
    ) -> HeadScore:
        """The score of correct rows and rows per class (C,); errors are class-stratified, or of `rows` in groups."""
        accuracy, few = per_class_accuracy(correct, total), stats.few_shot
        few_shot_accuracy = shot_group_accuracies(accuracy, stats).get("few_shot_accuracy")

        def error(classes: npt.NDArray[np.int64]) -> float | None:
            independent = balanced_standard_error(correct[classes], total[classes])
            return independent if rows is None else group_standard_error(rows.of_classes(classes), independent)

        return HeadScore(
            float(np.nanmean(accuracy)),
            error(np.arange(len(total))),
            few_shot_accuracy,
            None if few_shot_accuracy is None else error(few),
        )


@dataclass(frozen=True)
class EncoderResult:
    """An encoder's scores by head, its speed, sizes and terms; without scores there is a `failure`.

    `images_per_second` are of the pass that stored the sample, on all of its machines; None where that was too short
    to say. `bytes_per_image` has each output, tokens too.
    """

    encoder: str
    image_size: int
    scores: Mapping[str, HeadScore]
    images_per_second: float | None
    bytes_per_image: Mapping[OutputName, int]
    num_parameters: int
    license: str
    notes: Sequence[str]
    failure: str | None = None

    @property
    def best_head(self) -> str | None:
        """The head with the highest balanced accuracy, the first of equals."""
        return max(self.scores, key=lambda head: self.scores[head].balanced_accuracy, default=None)

    @property
    def best(self) -> HeadScore | None:
        """The score of the best head."""
        return None if self.best_head is None else self.scores[self.best_head]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        best = {} if self.best is None else asdict(self.best)
        return {**asdict(self), "best_head": self.best_head, **best}


def compare_encoder(
    encoder: ComparedEncoder, sample: Manifest, root: str, report: Callable[[str], None]
) -> EncoderResult:
    """Store the sample's features and score the heads on them; an error of one encoder becomes its `failure`."""
    config, info = encoder.config, encoder.info
    entry = find_entry(encoder.name)
    result = EncoderResult(
        encoder.name,
        info.image_size,
        {},
        None,
        {output: bytes_per_image(config, info, frozenset({output})) for output in info.shapes},
        info.num_parameters,
        "" if entry is None else entry.license_text,
        score_notes([encoder.name], sample.name),
    )
    try:
        features = ensure_features(config, sample, root, OUTPUTS, ("train",), report=report)
        seconds = seconds_per_image(features.folder)
        folds = TrialData.open_folds(config, features, NUM_FOLDS, table=sample.label_rows())
        scores = {}
        for head, (head_config, patience) in _heads(encoder).items():
            report(f"{head} over {len(folds)} folds")
            scores[head] = score_head(head_config, folds, patience)
    except (ImbvlmError, RuntimeError, OSError) as error:
        # A library may have made another error of a Ctrl-C.
        interrupts.check()
        return replace(result, failure=" ".join(str(error).split()) or type(error).__name__)
    notes = [*result.notes, *([features.notice] if features.notice else [])]
    return replace(result, scores=scores, images_per_second=1 / seconds if seconds else None, notes=notes)


def _heads(encoder: ComparedEncoder) -> dict[str, tuple[TrialConfig, int | None]]:
    """The configuration and patience of each head, as sweeps run them as baselines; zero-shot where there is text."""
    config, (probe, means, zero_shot) = encoder.config, HEADS
    heads = {
        probe: (probe_config(config, {}), PROBE_PATIENCE),
        means: (config.with_overrides({"method": "class_means"}), None),
    }
    return {**heads, zero_shot: (config, None)} if encoder.info.has_text else heads


def score_head(config: TrialConfig, folds: Sequence[TrialData], patience: int | None) -> HeadScore:
    """The score of a head over folds at its best epoch, as for baselines; raises ImbvlmError for one that diverges."""
    run = FoldedRun([build_trial(config, fold, default_device()) for fold in folds])
    counters, rows = run.val_counters, None
    for result in run.epochs(lambda: None):
        if result.failure is not None:
            raise ImbvlmError(result.failure)
        best_epoch = run.best_epoch["balanced_accuracy"]
        if result.epoch == best_epoch:
            counters, rows = run.val_counters, _grouped_rows(run)
        if patience is not None and result.epoch - best_epoch >= patience:
            break
    return HeadScore.of(counters.correct.cpu().numpy(), counters.total.cpu().numpy(), folds[0].class_stats, rows)


def _grouped_rows(run: FoldedRun) -> GroupedRows | None:
    """The validation rows of all folds in the last epoch with their groups; None where images have none."""
    vals = [fold.val for fold in run.data]
    groups = [val.groups for val in vals if val.groups is not None]
    logits = run.gathered_logits(SINGLE_WORKER) if groups else None
    if logits is None:
        return None
    labels = np.concatenate([val.labels for val in vals])
    return GroupedRows(labels, np.concatenate(groups), logits.argmax(dim=1).numpy() == labels)


# -------------------------------------------------------------------------------------------------- for the reader


@dataclass(frozen=True)
class Comparison:
    """The results so far, with the sample that they are of; `has_sizes` says whether the user gave sizes."""

    manifest: Manifest
    sample: Manifest
    seed: int
    results: Sequence[EncoderResult]
    has_sizes: bool

    @property
    def ranked(self) -> list[EncoderResult]:
        """The results, the highest balanced accuracy of the best head first and failures last."""
        return sorted(self.results, key=lambda result: 1.0 if result.best is None else -result.best.balanced_accuracy)

    @property
    def space(self) -> dict[str, dict[str, list[Any]]]:
        """The parameters of a search space over the encoders that have scores, the best first."""
        scored = [result for result in self.ranked if result.scores]
        columns: dict[str, list[Any]] = {"encoder.name": [result.encoder for result in scored]}
        if self.has_sizes:
            columns["encoder.image_size"] = [result.image_size for result in scored]
        return {key: {"choice": list(dict.fromkeys(values))} for key, values in columns.items() if values}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; accuracies are fractions."""
        return {
            "data": self.sample.name,
            "num_train": len(self.manifest.rows_of("train")),
            "num_sampled": len(self.sample),
            "num_classes": len(self.sample.class_names),
            "seed": self.seed,
            "num_folds": NUM_FOLDS,
            "encoders": [result.to_dict() for result in self.ranked],
            "space": self.space,
        }

    def describe(self, width: int = UNLIMITED) -> str:
        """Tables, notes, failures, and the lines for a search space."""
        scored = [result for result in self.ranked if result.scores]
        tables = [_encoder_table(scored, width), "", _head_table(scored, width)] if scored else []
        notes = dict.fromkeys(note for result in scored for note in result.notes)
        failed = [
            f"failed: {result.encoder} at {result.image_size} px: {result.failure}"
            for result in self.ranked
            if result.failure is not None
        ]
        lines = [f"  {key}: {{choice: [{', '.join(map(_yaml, item['choice']))}]}}" for key, item in self.space.items()]
        return "\n".join(
            [
                self._describe_sample(),
                *tables,
                *(f"note: {note}" for note in notes),
                *failed,
                *(["for the parameters of a search space, the best first:", *lines] if lines else []),
            ]
        )

    def _describe_sample(self) -> str:
        sample, largest = self.sample, int(np.bincount(self.sample.labels).max())
        images = f"groups of images, from {MIN_GROUPS} groups on" if sample.has_groups else "images"
        return (
            f"sample: {len(sample):,} of {len(self.manifest.rows_of('train')):,} training images of {sample.name} "
            f"(seed {self.seed}), at most {largest:,} of a class; {len(sample.class_names):,} of "
            f"{len(self.manifest.class_names):,} classes ({sample.class_stats().describe_groups()})\n"
            f"accuracies in percent over {NUM_FOLDS} folds of the sample, ± their standard error over its {images}:"
        )


def _encoder_table(results: Sequence[EncoderResult], width: int) -> str:
    header = [
        "encoder", "px", "best head", "balanced", "few", "images/s", "bytes/image", "with tokens", "parameters",
        "license",
    ]  # fmt: skip
    rows = [
        [
            result.encoder,
            str(result.image_size),
            result.best_head or "-",
            *_cells(result.best),
            "-" if result.images_per_second is None else f"{result.images_per_second:.0f}",
            size_text(sum(count for output, count in result.bytes_per_image.items() if output in OUTPUTS)),
            size_text(sum(result.bytes_per_image.values())),
            f"{result.num_parameters / 1e6:,.1f} M",
            result.license or "-",
        ]
        for result in results
    ]
    return table(header, rows, width)


def _head_table(results: Sequence[EncoderResult], width: int) -> str:
    header = ["encoder", "px", *(text for head in HEADS for text in (head, "few"))]
    rows = [
        [
            result.encoder,
            str(result.image_size),
            *(
                cell
                for head in HEADS
                for cell in (_cells(result.scores[head]) if head in result.scores else ["no text"] * 2)
            ),
        ]
        for result in results
    ]
    return table(header, rows, width)


def _cells(score: HeadScore | None) -> list[str]:
    """Balanced and few-shot accuracy in percent with their standard errors, a dash where there is none."""
    if score is None:
        return ["-", "-"]
    pairs = (
        (score.balanced_accuracy, score.balanced_standard_error),
        (score.few_shot_accuracy, score.few_shot_standard_error),
    )
    return [
        percent(value) if value is None or error is None else f"{percent(value)} ± {percent(error)}"
        for value, error in pairs
    ]


def _yaml(value: object) -> str:
    text = str(value)
    return text if isinstance(value, int) or _PLAIN.fullmatch(text) else json.dumps(text)
