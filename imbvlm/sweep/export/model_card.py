"""A model's card, README.md in the form of the Hugging Face hub: data, metrics, selection, limits, license."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imbvlm.base.formatting import mean_std, percent
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.sweep.records.difference import (
    POST_HOC,
    POST_HOC_MEANS,
    TEST,
    refits_of,
    splits_of,
    title_in,
    values_in,
    verdict_on_test,
)
from imbvlm.sweep.records.summary_tables import HEADINGS, METRICS
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord, describe_trial, last_values
from imbvlm.sweep.spec.sweep_spec import SweepSpec

CARD_FILE = "README.md"
UNSTATED = "other"


@dataclass(frozen=True)
class CardContext:
    """The data of a card; `refits` are the records that were scored on the test split, one per seed."""

    spec: SweepSpec
    log: TrialLog
    manifest: Manifest
    record: TrialRecord
    config: TrialConfig
    adjustment: PostHocAdjustment | None
    refits: Sequence[TrialRecord]
    license_id: str
    has_onnx: bool
    has_text: bool

    @property
    def is_adjusted(self) -> bool:
        """Whether the logits are adjusted, and the adjusted model was scored if any was."""
        was_scored = bool(last_values(self.refits, f"{POST_HOC}/top1_accuracy"))
        return self.adjustment not in (None, PostHocAdjustment()) and (was_scored or not self.refits)


def model_card(context: CardContext) -> str:
    """The whole README.md."""
    sections = [
        _front_matter(context),
        f"# {_name(context)}\n\n{_opening(context)}",
        f"## Use\n\n{_use(context)}",
        f"## Data\n\n{_data(context)}",
        f"## Metrics\n\n{_metrics(context)}",
        f"## How it was selected\n\n{_selection(context)}",
        f"## Limits\n\n{_limits(context)}",
        f"## License\n\n{_license(context)}",
    ]
    return "\n\n".join(sections) + "\n"


def _name(context: CardContext) -> str:
    return f"{context.spec.name}-{context.record.trial_id}"


def _front_matter(context: CardContext) -> str:
    tags = ["image-classification", "imbvlm", "long-tail", *(["clip"] if context.has_text else [])]
    data: dict[str, Any] = {"license": context.license_id}
    if context.license_id == UNSTATED:
        data |= {"license_name": "not-stated", "license_link": "#license"}
    data |= {
        "library_name": "imbvlm",
        "pipeline_tag": "image-classification",
        "tags": [*tags, "onnx"] if context.has_onnx else tags,
    }
    values = _test_values(context)
    if values:
        metrics = [
            {"type": "accuracy", "name": f"{heading} accuracy, test", "value": round(statistics.fmean(scores), 4)}
            for heading, scores in values.items()
        ]
        data["model-index"] = [
            {
                "name": _name(context),
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": context.manifest.name, "type": context.manifest.name, "split": "test"},
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return f"---\n{dump_yaml(data)}---"


def _opening(context: CardContext) -> str:
    return (
        f"Classifies images into the {len(context.manifest.class_names):,} classes of {context.manifest.name} "
        f"({context.config.encoder.name}; {describe_trial(context.record)}). Found by a sweep of imbvlm, "
        "which searches long-tailed classifiers on pretrained encoders."
    )


def _use(context: CardContext) -> str:
    lines = [
        "```python",
        "import imbvlm",
        "",
        'model = imbvlm.load("PATH/OF/THIS/FOLDER")',
        'for prediction in model.predict(["photo.jpg"]):',
        "    print(prediction.class_names, prediction.probabilities)",
        "```",
        "",
        "`config.json` has the class names, the preprocessing with its fingerprint, and the adjustments; "
        "`model.safetensors` the trained weights, `tower/` the pretrained encoder.",
    ]
    if context.has_onnx:
        lines += [
            "",
            "`onnx/model.onnx` is encoder and classifier in one graph: `images` (B, 3, S, S) in bytes, prepared as "
            "`config.json` says, to `logits` and `probabilities` (B, C).",
        ]
    return "\n".join(lines)


def _data(context: CardContext) -> str:
    manifest, stats = context.manifest, context.manifest.class_stats()
    rows = ", ".join(f"{len(manifest.rows_of(split)):,} {split}" for split in manifest.splits)
    return (
        f"{manifest.name}: {rows} images; {stats.num_classes:,} classes ({stats.describe_groups()}), imbalance factor "
        f"{stats.imbalance_factor:.3g}. Many-shot classes have more than 100 training images, medium-shot 20 to 100, "
        "few-shot 1 to 19."
    )


def _metrics(context: CardContext) -> str:
    best = context.record.best_epoch(context.spec.objective) or {}
    if not context.refits:
        row = ["validation", *(percent(best.get(f"val/{metric}")) for metric in METRICS)]
        return (
            f"{_table([['split', *HEADINGS], row])}\n\nPercent, at the best epoch, on images that selected it: expect "
            "less on others. The test split was not read for this model."
        )
    rows, note = [["what", "seeds", *HEADINGS]], ""
    rows.append(_scores_row("this model", context.refits, POST_HOC if context.is_adjusted else TEST))
    if context.is_adjusted and POST_HOC in splits_of(context.refits, METRICS):
        rows.append(_scores_row("before its adjustments", context.refits, TEST))
    own_name, names = context.refits[0].name, dict.fromkeys(record.name for record in context.log.of("baseline"))
    baselines = [(name, refits_of(context.log, name)) for name in names if name != own_name]
    for name, records in [(name, records) for name, records in baselines if records]:
        for split in splits_of(records, METRICS):
            rows.append(_scores_row(f"baseline: {title_in(name, split)}", records, split))
            note = f" {POST_HOC_MEANS}" if split == POST_HOC else note
    verdict = verdict_on_test(context.log, context.refits, "this model")
    if verdict is not None and own_name not in names:
        note = f"{'' if POST_HOC_MEANS in verdict.details else note}\n\n{verdict}"
    return (
        f"{_table(rows)}\n\nPercent on the test split, read once; means over seeds, ± their standard deviation. The "
        f"weights here are those of seed {context.config.train.seed if context.config.train else 0}.{note}"
    )


def _scores_row(title: str, records: Sequence[TrialRecord], split: str) -> list[str]:
    values = (last_values(records, f"{split}/{metric}") for metric in METRICS)
    return [title, str(len(records)), *map(mean_std, values)]


def _selection(context: CardContext) -> str:
    spec, search = context.spec, context.log.of("search")
    ended = sum(record.is_over for record in search)
    rank = [record.trial_id for record in context.log.best(spec.objective)].index(context.record.trial_id) + 1
    lines = [
        f"Number {rank} of {ended} trials of the sweep `{spec.name}` (searcher {spec.searcher.name}, trial scheduler "
        f"{spec.trial_scheduler.name}) by {spec.best_objective} on validation images; then retrained on all training "
        "images.",
        _adjustments(context),
        f"Its configuration:\n\n```yaml\n{dump_yaml(context.config.to_tree())}```",
    ]
    return "\n\n".join(lines)


def _adjustments(context: CardContext) -> str:
    adjustment = context.adjustment
    if adjustment is None or adjustment == PostHocAdjustment():
        return (
            "Nothing is adjusted after training, because validation did not show a gain: the probabilities are the "
            "softmax of the model's own logits."
        )
    mixed = f"zero-shot logits mixed in with alpha {adjustment.alpha:g}, " if context.has_text else ""
    return (
        f"Chosen on validation after training: logit adjustment tau {adjustment.tau:g}, {mixed}temperature "
        f"{adjustment.temperature:.3g}."
    )


def _limits(context: CardContext) -> str:
    stats, lines = context.manifest.class_stats(), list[str]()
    for group in ("few_shot", "zero_train"):
        labels = stats.shot_groups[group]
        if len(labels):
            few = "fewer than 20" if group == "few_shot" else "no"
            lines.append(
                f"{len(labels):,} classes have {few} training images: predictions of them are less certain than the "
                "overall accuracy suggests."
            )
    if "test" in context.manifest.splits:
        rows = context.manifest.labels[context.manifest.rows_of("test")]
        lines.append(
            f"The test scores are of {len(rows):,} images of {len(set(rows.tolist())):,} classes, taken like the "
            "training images; expect less on images of other cameras, places or times."
        )
    is_calibrated = context.adjustment is not None and context.adjustment.temperature != 1
    lines += [
        f"Probabilities are {'calibrated on validation images of the same kind' if is_calibrated else 'uncalibrated'}; "
        "an image of none of the classes gets a class nevertheless.",
        f"The model inherits from its encoder, {context.config.encoder.name}, what that has learned from its own data, "
        "including biases. It was not evaluated for use on people.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _license(context: CardContext) -> str:
    stated = (
        "Not stated at export (`imbvlm export --license` sets it)."
        if context.license_id == UNSTATED
        else f"Stated at export: {context.license_id}."
    )
    return (
        f"{stated} The encoder's weights ({context.config.encoder.name}) and the images have terms of their own, "
        "which also apply to this model."
    )


def _test_values(context: CardContext) -> dict[str, list[float]]:
    """Metrics of all seeds of the model as exported, by heading; groups without classes are absent."""
    pairs = zip(METRICS, HEADINGS, strict=True)
    scores = {heading: values_in(context.refits, POST_HOC, metric) for metric, heading in pairs}
    return {heading: values for heading, values in scores.items() if values}


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
