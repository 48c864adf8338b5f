"""What a user takes away: best.yaml, and model/ with weights, tower, class names, preprocessing and a model card."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import percent
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.input_sections import PromptsConfig
from imbvlm.config.trial_config import TrialConfig, needs_text
from imbvlm.data.manifest import Manifest, absolute_manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.inference.model_folder import load, without_paths, write_model
from imbvlm.inference.onnx_export import require_onnx, write_onnx
from imbvlm.inference.predictor import LogitPostprocessor
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.models.encoders.open_clip_encoder import Encoder
from imbvlm.models.encoders.text_prompts import class_embeddings, templates_of
from imbvlm.models.model_builder import stored_outputs
from imbvlm.sweep.export.export_folder import ExportFolder
from imbvlm.sweep.export.model_card import CARD_FILE, UNSTATED, CardContext, model_card
from imbvlm.sweep.records.adjustment_selection import read_adjustment, select_adjustments
from imbvlm.sweep.records.provenance import check_tower, data_changes
from imbvlm.sweep.records.refit_selection import Refit, refit_config, refits
from imbvlm.sweep.records.summary_tables import HEADINGS, METRICS, pareto_records
from imbvlm.sweep.records.sweep_folder import read_spec
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.spec.manifest_path import locate_manifest, with_located_manifest
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.checkpoint import load_model_tensors
from imbvlm.training.per_class_results import CLASS_RECORD_FILE
from imbvlm.training.trial_session import TrialSession, TrialSettings, default_device

BEST_FILE, MODEL_FOLDER = "best.yaml", "model"
TRIALS_FILE = "trials.csv"
LOG_FILE = "export.log"
FEW_SHOT = "val/few_shot_accuracy"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """One model that was written, and where its best.yaml and model/ are."""

    record: TrialRecord
    folder: str
    onnx_difference: float | None = None


def best_config(record: TrialRecord, manifest: str) -> TrialConfig:
    """A trial's configuration such that `imbvlm train` alone repeats it: with the threads that its numbers hang on.

    `manifest` is where the sweep's manifest is by now.
    """
    config = record.trial_config()
    if config.train is not None and config.train.num_threads is None and record.num_threads is not None:
        config = config.with_overrides({"train.num_threads": record.num_threads})
    return config.with_overrides({"data.manifest": absolute_manifest(manifest)})


def write_best(folder: str, record: TrialRecord, manifest: str) -> str:
    """Write best.yaml into a folder and return its location."""
    uri = storage.join(folder, BEST_FILE)
    storage.write_bytes(uri, dump_yaml(best_config(record, manifest).to_tree()).encode())
    return uri


def export_sweep(
    folder: str,
    out: str,
    *,
    top: int = 1,
    pareto: bool = False,
    onnx: bool = False,
    licence: str = UNSTATED,
    manifest: str | None = None,
    say: Say = print,
) -> list[Exported]:
    """Write best.yaml and model/ of the best trial, of the `top` best or of the Pareto set, each in a folder then.

    A trial that the sweep has not trained again on all training images is trained so here, from the stored features,
    and the test split isn't read for it. `manifest` is where the sweep's manifest is by now. Raises ImbvlmError where
    there is no result yet.
    """
    storage.check_location(out)
    if onnx:
        require_onnx()
    spec, log = with_located_manifest(read_spec(folder), folder, manifest), TrialLog.read(folder)
    ranked = log.best(spec.objective)
    if not ranked:
        raise ImbvlmError(f"no trial of {folder} has a result yet; go on with: imbvlm sweep resume {folder}")
    records, objectives = pareto_set(log, spec) if pareto else (ranked[:top], ())
    several = pareto or top > 1
    names = [f"{number}-{record.trial_id}" for number, record in enumerate(records, 1)] if several else [""]
    target = ExportFolder(out)
    target.check([*names, TRIALS_FILE] if several else [BEST_FILE, MODEL_FOLDER])
    if several:
        none = f", none better in all of {', '.join(objectives)}" if pareto else ""
        say(f"{len(records)} of {len(ranked)} trials{none}")
    exported = []
    with target.staging() as staged:
        for name, record in zip(names, records, strict=True):
            difference = _Export(folder, spec, log, record, say).write(storage.join(staged, name), onnx, licence)
            exported.append(Exported(record, storage.join(out, name) if name else out, difference))
        if several:
            storage.write_bytes(storage.join(staged, TRIALS_FILE), _trials_csv(exported, spec).encode())
        target.put(staged)
    return exported


def pareto_set(log: TrialLog, spec: SweepSpec) -> tuple[list[TrialRecord], tuple[str, ...]]:
    """The trials than which none is better in every objective of the sweep, and these.

    Where a sweep has one objective, few-shot accuracy is the other. Raises ImbvlmError where there is none.
    """
    if not spec.other_objectives and spec.objective != FEW_SHOT:
        spec = spec.model_copy(update={"other_objectives": [FEW_SHOT]})
    records = pareto_records(log, spec) if spec.other_objectives else []
    if not records:
        raise ImbvlmError(
            f"there is no Pareto set: no trial has {' and '.join(spec.objectives)} and meets the constraints; use --top"
        )
    return records, spec.objectives


def _trials_csv(exported: Sequence[Exported], spec: SweepSpec) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", "trial", "seconds", *(f"{heading}_accuracy_validation" for heading in HEADINGS)])
    for one in exported:
        best = one.record.best_epoch(spec.objective) or {}
        values = [best.get(f"val/{metric}") for metric in METRICS]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        name = one.folder.rstrip("/").rpartition("/")[2]
        writer.writerow([name, one.record.trial_id, f"{one.record.seconds():.1f}", *cells])
    return text.getvalue()


class _Export:
    """One trial of a sweep on its way out."""

    def __init__(self, folder: str, spec: SweepSpec, log: TrialLog, record: TrialRecord, say: Say) -> None:
        self.folder, self.spec, self.log, self.record, self.say = folder, spec, log, record, say
        # The winner's name, or in a study that of what it lists.
        self.name = next(
            (one.name for one in refits(log, spec) if one.record.trial_id == record.trial_id and not one.is_fresh), None
        )
        self.refits = [one for one in log.of("refit") if one.name == self.name and one.state == "finished"]

    def write(self, out: str, onnx: bool, licence: str) -> float | None:
        """Write best.yaml and model/ into a folder; returns how far an ONNX graph's logits are off."""
        location = locate_manifest(self.spec, self.folder)
        write_best(out, self.record, location)
        config = self._config().with_overrides({"data.manifest": location})
        manifest = Manifest.read(config.data.manifest)
        encoder = Encoder.from_config(config.encoder, config.eval)
        check_tower(self.folder, config.encoder, encoder.info, keep=False)
        with self._weights(config, manifest) as weights:
            return self._write_model(out, config, manifest, encoder, weights, onnx, licence)

    def _write_model(
        self,
        out: str,
        config: TrialConfig,
        manifest: Manifest,
        encoder: Encoder,
        weights: str,
        onnx: bool,
        licence: str,
    ) -> float | None:
        check_trained_on(weights, config, manifest.class_names, encoder.info.weights_fingerprint)
        step = self._post_hoc(config, weights, manifest.class_names, encoder)
        folder = storage.join(out, MODEL_FOLDER)
        names, ids = manifest.class_names, manifest.label_map
        write_model(folder, config, load_model_tensors(weights), encoder, names, self._scores(), step, ids)
        difference = write_onnx(load(folder, "cpu"), folder) if onnx else None
        read_test = [one for one in self.refits if one.epochs and "test/top1_accuracy" in one.epochs[-1]]
        adjustment = None if step is None else step.adjustment
        shown, has_onnx = without_paths(config), difference is not None
        facts = CardContext(self.spec, self.log, manifest, self.record, shown, adjustment, read_test, licence, has_onnx)
        storage.write_bytes(storage.join(folder, CARD_FILE), model_card(facts).encode())
        return difference

    def _config(self) -> TrialConfig:
        if self.refits:
            return self.refits[0].trial_config()
        config = refit_config(self.record, self.spec)
        return config if config.train is None else config.with_overrides({"train.seed": self.spec.refit_seeds[0]})

    def _scores(self) -> dict[str, object]:
        return {
            "validation": self.record.best_epoch(self.spec.objective),
            "refit": self.refits[0].epochs[-1] if self.refits and self.refits[0].epochs else None,
            "selected_by": self.spec.best_objective,
            "sweep": self.spec.name,
        }

    @contextmanager
    def _weights(self, config: TrialConfig, manifest: Manifest) -> Iterator[str]:
        """The folder with the weights of the refit, which is trained where the sweep hasn't done so.

        It is in the sweep's folder for exports to come, or a temporary one where nothing can be written there.
        """
        name = (
            self.refits[0].trial_id if self.refits else f"export-{self.record.trial_id}-seed{self.spec.refit_seeds[0]}"
        )
        weights = storage.join(self.folder, "refits", name)
        # The class record is written last.
        if self.refits or storage.exists(storage.join(weights, CLASS_RECORD_FILE)):
            yield weights
            return
        changes = data_changes(self.folder, manifest)
        if changes:
            raise ImbvlmError(f"{self.record.trial_id} can't be trained again: {changes[0]} since the sweep began")
        self.say(
            f"{self.record.trial_id} ({percent(self.record.best_value(self.spec.best_objective))} % on validation) "
            "is trained again on all training images"
        )
        refusal = _write_refusal(weights)
        if refusal is None:
            self._train(config, manifest, weights)
            yield weights
            return
        self.say(f"its weights aren't kept for another export: {refusal}")
        with TemporaryDirectory() as temporary:
            self._train(config, manifest, temporary)
            yield temporary

    def _train(self, config: TrialConfig, manifest: Manifest, weights: str) -> None:
        # Beside the sweep, which may have been moved.
        beside = storage.absolute(self.folder).rpartition("/")[0]
        root = self.spec.model_copy(update={"storage": beside}).feature_root
        splits = tuple(split for split in manifest.splits if split != "test")
        console = Console()
        with console.redirect_output(_log_file(self.folder)):
            features = ensure_features(
                config, manifest, root, stored_outputs(config), splits, report=console.update_live,
                text=needs_text(config), copies=self.spec.feature_copies,
            )  # fmt: skip
        console.end_live()
        settings = TrialSettings(
            config=config.to_tree(),
            feature_set=features.to_dict(),
            objective=self.spec.objective,
            num_threads=self.record.num_threads,
            refit=True,
            model_folder=weights,
        )
        for report in TrialSession(default_device()).reports(settings):
            if report.get("failure"):
                raise ImbvlmError(f"{self.record.trial_id} could not be trained again: {report['failure']}")

    def _post_hoc(
        self, config: TrialConfig, weights: str, class_names: Sequence[str], encoder: Encoder
    ) -> LogitPostprocessor | None:
        """What was chosen on validation for the logits of this trial; None where nothing could be chosen."""
        chosen = self._adjustment(config)
        if chosen is None:
            return None
        embeddings = None
        if chosen.alpha:
            embeddings = class_embeddings(encoder, class_names, templates_of(config.prompts or PromptsConfig()))
        counts = json.loads(storage.read_bytes(storage.join(weights, CLASS_RECORD_FILE)))["class_counts"]
        return LogitPostprocessor(chosen, tuple(counts), embeddings)

    def _adjustment(self, config: TrialConfig) -> PostHocAdjustment | None:
        if self.refits and self.name is not None:
            return read_adjustment(self.folder, self.name)
        name = self.record.trial_id
        refit = Refit(name, self.record, config, (self.spec.refit_seeds[0],))
        found = select_adjustments(self.folder, [refit], self.log, self.spec.objective).get(name)
        return None if found is None else found.adjustment


def _log_file(folder: str) -> Path | None:
    """Where libraries' output goes: a file in a local sweep's folder, or nowhere if that can't be written."""
    if not storage.is_local(folder):
        return None
    path = storage.local_path(folder) / LOG_FILE
    try:
        with path.open("ab"):
            return path
    except OSError:
        return Path(os.devnull)


def _write_refusal(folder: str) -> str | None:
    """Why nothing can be written into a folder; None where it can."""
    probe = storage.join(folder, LOG_FILE)
    try:
        storage.write_bytes(probe, b"")
        storage.delete(probe)
    except storage.StorageError as error:
        return str(error)
    return None


def check_trained_on(weights: str, config: TrialConfig, class_names: Sequence[str], tower: str) -> None:
    """Raises ImbvlmError where classes, or the tower by its fingerprint, aren't those of a refit's weights any more."""
    trained = json.loads(storage.read_bytes(storage.join(weights, CLASS_RECORD_FILE)))
    before, mend = trained["class_names"], "put it back as it was, or begin a new sweep"
    if list(class_names) != before:
        unlike = (
            f"class {label} is {now!r} in place of {then!r}"
            for label, (now, then) in enumerate(zip(class_names, before, strict=False))
            if now != then
        )
        how = next(unlike, f"{len(class_names):,} in place of {len(before):,}")
        raise ImbvlmError(
            f"the manifest {config.data.manifest} has other classes than the model was trained on: {how}; {mend}"
        )
    # Sweeps of earlier versions don't say which tower it was.
    if trained.get("tower", tower) != tower:
        raise ImbvlmError(f"the tower {config.encoder.name} has other weights than the model was trained on; {mend}")
