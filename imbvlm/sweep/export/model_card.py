"""A model's card, README.md in the Hugging Face hub's form: data, metrics, how it was selected, limits, licence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imbvlm.base.formatting import mean_std, percent
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.longtail.class_stats import SHOT_GROUPS
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.sweep.records.difference import POST_HOC_MEANS, verdict_on_test
from imbvlm.sweep.records.summary_tables import HEADINGS, METRICS
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord, describe_trial
from imbvlm.sweep.spec.sweep_spec import SweepSpec

CARD_FILE = "README.md"
UNSTATED = "other"


@dataclass(frozen=True)
class CardContext:
    """What a card is made of; `refits` are the seeds' records that read the test split, [] where it wasn't read."""

    spec: SweepSpec
    log: TrialLog
    manifest: Manifest
    record: TrialRecord
    config: TrialConfig
    adjustment: PostHocAdjustment | None
    refits: Sequence[TrialRecord]
    licence: str
    has_onnx: bool

    @property
    def is_adjusted(self) -> bool:
        """Whether anything is done to the logits, and the test split has answered for that."""
        was_scored = any("test_post_hoc/top1_accuracy" in one.epochs[-1] for one in self.refits)
        return self.adjustment not in (None, PostHocAdjustment()) and (was_scored or not self.refits)


def model_card(facts: CardContext) -> str:
    """The whole README.md."""
    sections = [
        _front_matter(facts),
        f"# {_name(facts)}\n\n{_opening(facts)}",
        f"## Use\n\n{_use(facts)}",
        f"## Data\n\n{_data(facts)}",
        f"## Metrics\n\n{_metrics(facts)}",
        f"## How it was selected\n\n{_selection(facts)}",
        f"## Limits\n\n{_limits(facts)}",
        f"## Licence\n\n{_licence(facts)}",
    ]
    return "\n\n".join(sections) + "\n"


def _name(facts: CardContext) -> str:
    return f"{facts.spec.name}-{facts.record.trial_id}"


def _front_matter(facts: CardContext) -> str:
    tags = ["image-classification", "imbvlm", "long-tail", "clip"]
    data: dict[str, Any] = {"license": facts.licence}
    if facts.licence == UNSTATED:
        data |= {"license_name": "not-stated", "license_link": "#licence"}
    data |= {
        "library_name": "imbvlm",
        "pipeline_tag": "image-classification",
        "tags": [*tags, "onnx"] if facts.has_onnx else tags,
    }
    values = _test_values(facts)
    if values:
        metrics = [
            {"type": "accuracy", "name": f"{heading} accuracy, test", "value": round(statistics.fmean(found), 4)}
            for heading, found in values.items()
        ]
        data["model-index"] = [
            {
                "name": _name(facts),
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": facts.manifest.name, "type": facts.manifest.name, "split": "test"},
                        "metrics": metrics,
                    }
                ],
            }
        ]
    return f"---\n{dump_yaml(data)}---"


def _opening(facts: CardContext) -> str:
    return (
        f"Classifies images into the {len(facts.manifest.class_names):,} classes of {facts.manifest.name} "
        f"({facts.config.encoder.name}; {describe_trial(facts.record)}). Found by a sweep of imbvlm, "
        "which searches long-tailed classifiers on vision-language models."
    )


def _use(facts: CardContext) -> str:
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
        "`model.safetensors` what was trained; `tower/` the image-text tower that it stands on.",
    ]
    if facts.has_onnx:
        lines += [
            "",
            "`onnx/model.onnx` is tower and classifier in one graph: `images` (B, 3, S, S) in bytes, prepared as "
            "`config.json` says, to `logits` and `probabilities` (B, C).",
        ]
    return "\n".join(lines)


def _data(facts: CardContext) -> str:
    manifest, stats = facts.manifest, facts.manifest.class_stats()
    groups = ", ".join(
        f"{len(members):,} {group.replace('_', '-')}" for group in SHOT_GROUPS if len(members := getattr(stats, group))
    )
    rows = ", ".join(f"{len(manifest.rows_of(split)):,} {split}" for split in manifest.splits)
    return (
        f"{manifest.name}: {rows} images; {stats.num_classes:,} classes ({groups}), imbalance factor "
        f"{stats.imbalance_factor:.3g}. Many-shot classes have more than 100 training images, medium-shot 20 to 100, "
        "few-shot 1 to 19."
    )


def _metrics(facts: CardContext) -> str:
    best = facts.record.best_epoch(facts.spec.objective) or {}
    if not facts.refits:
        row = ["validation", *(percent(best.get(f"val/{metric}")) for metric in METRICS)]
        return (
            f"{_table([['split', *HEADINGS], row])}\n\nPercent, at the best epoch, on images that selected it: expect "
            "less on others. The test split was not read for this model."
        )
    rows, note = [["what", "seeds", *HEADINGS]], ""
    this = facts.refits[0].name
    rows.append(_scores_row("this model", facts.refits, "test_post_hoc" if facts.is_adjusted else "test"))
    if facts.is_adjusted:
        rows.append(_scores_row("before its adjustments", facts.refits, "test"))
    names = dict.fromkeys(record.name for record in facts.log.of("baseline"))
    for name in names:
        records = [one for one in facts.log.of("refit") if one.name == name and one.epochs]
        if records and name != this:
            rows.append(_scores_row(f"baseline: {name}", records, "test"))
            if "test_post_hoc/balanced_accuracy" in records[0].epochs[-1]:
                rows.append(_scores_row(f"baseline: {name}, post hoc", records, "test_post_hoc"))
                note = f" {POST_HOC_MEANS}"
    verdict = verdict_on_test(facts.log, facts.refits, "this model")
    if verdict is not None and this not in names:
        note = f"{'' if POST_HOC_MEANS in verdict.beside else note}\n\n{verdict}"
    return (
        f"{_table(rows)}\n\nPercent on the test split, read once; means over seeds, ± their standard deviation. The "
        f"weights here are those of seed {facts.config.train.seed if facts.config.train else 0}.{note}"
    )


def _scores_row(title: str, records: Sequence[TrialRecord], split: str) -> list[str]:
    keys = [f"{split}/{metric}" for metric in METRICS]
    values = ([one.epochs[-1][key] for one in records if key in one.epochs[-1]] for key in keys)
    return [title, str(len(records)), *map(mean_std, values)]


def _selection(facts: CardContext) -> str:
    spec, search = facts.spec, facts.log.of("search")
    ended = sum(record.is_over for record in search)
    rank = [record.trial_id for record in facts.log.best(spec.objective)].index(facts.record.trial_id) + 1
    lines = [
        f"Number {rank} of {ended} trials of the sweep `{spec.name}` (searcher {spec.searcher.name}, trial scheduler "
        f"{spec.trial_scheduler.name}) by {spec.best_objective} on validation images; then trained again on all "
        "training images.",
        _adjustments(facts.adjustment),
        f"Its configuration:\n\n```yaml\n{dump_yaml(facts.config.to_tree())}```",
    ]
    return "\n\n".join(lines)


def _adjustments(adjustment: PostHocAdjustment | None) -> str:
    if adjustment in (None, PostHocAdjustment()):
        return (
            "Nothing is adjusted after training, for validation didn't show that it helps: the probabilities are the "
            "softmax of the model's own logits."
        )
    return (
        f"Chosen on validation after training: logit adjustment tau {adjustment.tau:g}, zero-shot logits mixed in with "
        f"alpha {adjustment.alpha:g}, temperature {adjustment.temperature:.3g}."
    )


def _limits(facts: CardContext) -> str:
    stats, lines = facts.manifest.class_stats(), list[str]()
    for group in ("few_shot", "zero_train"):
        labels = getattr(stats, group)
        if len(labels):
            few = "fewer than 20" if group == "few_shot" else "no"
            lines.append(
                f"{len(labels):,} classes have {few} training images: what it says of them is less certain than its "
                "overall accuracy suggests."
            )
    if "test" in facts.manifest.splits:
        rows = facts.manifest.labels[facts.manifest.rows_of("test")]
        lines.append(
            f"Its test numbers rest on {len(rows):,} images of {len(set(rows.tolist())):,} classes, taken like the "
            "training images; on other cameras, places or times expect less."
        )
    calibrated = facts.adjustment is not None and facts.adjustment.temperature != 1
    lines += [
        f"Probabilities are {'calibrated on validation images of the same kind' if calibrated else 'as they come'}; "
        "an image of none of the classes gets a class all the same.",
        f"It inherits what its tower, {facts.config.encoder.name}, has learnt from its own data, biases "
        "included. It was not examined for use on people.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _licence(facts: CardContext) -> str:
    stated = (
        "Not stated by whoever exported it (`imbvlm export --licence` sets it)."
        if facts.licence == UNSTATED
        else f"Stated at export: {facts.licence}."
    )
    return (
        f"{stated} The tower's weights ({facts.config.encoder.name}) and the images have terms of their "
        "own, which hold for what is made of them."
    )


def _test_values(facts: CardContext) -> dict[str, list[float]]:
    """Metrics of the model as it is exported, each seed's, by heading; groups without classes are absent."""
    found = {}
    for metric, heading in zip(METRICS, HEADINGS, strict=True):
        values = [
            epoch.get(f"test_post_hoc/{metric}", epoch.get(f"test/{metric}"))
            for epoch in (record.epochs[-1] for record in facts.refits)
        ]
        known = [value for value in values if value is not None]
        if known:
            found[heading] = known
    return found


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
