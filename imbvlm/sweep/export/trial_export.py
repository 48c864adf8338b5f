"""The export of one trial: its model from its first refit, which is trained now if the sweep has not done so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from imbvlm.base import storage
from imbvlm.base.console import Console
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import percent
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.encoder_entries import encoder_terms
from imbvlm.config.input_sections import PromptsConfig
from imbvlm.config.trial_config import TrialConfig, needs_text
from imbvlm.data.manifest import Manifest, absolute_manifest
from imbvlm.features.class_embeddings import TEXT_KEY
from imbvlm.features.extraction import ensure_features
from imbvlm.inference.calibration_file import ModelCalibration
from imbvlm.inference.model_folder import load, write_model
from imbvlm.inference.model_parts import without_paths
from imbvlm.inference.onnx_export import write_onnx
from imbvlm.inference.predictor import LogitPostprocessor
from imbvlm.inference.taxonomy_file import ModelTaxonomy
from imbvlm.longtail.post_hoc_adjustment import PostHocAdjustment
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.classifier_init import centered_by_parent
from imbvlm.models.encoders.class_texts import read_class_texts
from imbvlm.models.encoders.encoder import Encoder, require_text
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.encoders.text_prompts import class_embeddings, class_sentences
from imbvlm.models.model_builder import stored_outputs
from imbvlm.sweep.export.model_card import CARD_FILE, CardContext, model_card
from imbvlm.sweep.records.adjustment_selection import read_adjustment, read_uncalibrated_note, select_adjustments
from imbvlm.sweep.records.delivered_model import DeliveredMember, write_decision_scores
from imbvlm.sweep.records.provenance import check_class_texts, check_encoder_weights, data_changes
from imbvlm.sweep.records.refit_selection import Refit, refit_config, refits
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord, last_values, refit_folder
from imbvlm.sweep.spec.manifest_path import locate_manifest
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.checkpoint import load_model_tensors
from imbvlm.training.per_class_results import PER_CLASS_FILE, read_per_class_results
from imbvlm.training.trial_session import TrialSession, TrialSettings, default_device

BEST_FILE, MODEL_FOLDER = "best.yaml", "model"
LOG_FILE = "export.log"
Say = Callable[[str], None]


def best_config(record: TrialRecord, manifest: str) -> TrialConfig:
    """A trial's configuration with which `imbvlm train` repeats it, including the number of threads.

    `manifest` is the manifest's present location.
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


@dataclass(frozen=True)
class TrialExport:
    """The export of one trial of a sweep."""

    folder: str
    spec: SweepSpec
    log: TrialLog
    record: TrialRecord
    say: Say

    @cached_property
    def refit_name(self) -> str | None:
        """The name of the trial's refit, None if the sweep does not select the trial for a refit."""
        for refit in refits(self.log, self.spec):
            if refit.record.trial_id == self.record.trial_id and not refit.is_fresh:
                return refit.name
        return None

    @cached_property
    def refits(self) -> list[TrialRecord]:
        """The trial's finished refits, one per seed."""
        records = self.log.of("refit")
        return [record for record in records if record.name == self.refit_name and record.state == "finished"]

    def write(self, out: str, onnx: bool, license_id: str, encoder: Encoder | None = None) -> float | None:
        """Write best.yaml and model/ into a folder; returns the largest difference of an ONNX graph's logits.

        `encoder` is the trial's if it was created already.
        """
        location = locate_manifest(self.spec, self.folder)
        write_best(out, self.record, location)
        config = self._config().with_overrides({"data.manifest": location})
        manifest = Manifest.read(config.data.manifest)
        encoder = encoder or create_encoder(config.encoder, config.eval)
        check_encoder_weights(self.folder, config.encoder, encoder.info, keep=False)
        folder, names = storage.join(out, MODEL_FOLDER), manifest.class_names
        terms = encoder_terms([config.encoder.name], manifest.name)
        with self._weights(config, manifest) as weights:
            check_trained_on(weights, config, names, encoder.info.weights_fingerprint)
            post_hoc = self.post_hoc(config, weights, names, encoder)
            tensors = load_model_tensors(weights)
            write_model(
                folder, config, tensors, encoder, names, self._scores(terms.notes), post_hoc, manifest.label_map
            )
        refit = Refit(self.refit_name or self.record.trial_id, self.record, config, (self.spec.refit_seeds[0],))
        member = DeliveredMember(refit, None if post_hoc is None else post_hoc.adjustment)
        write_decision_scores(folder, self.folder, self.log, self.spec, [member], manifest, [self.refits[:1]])
        difference = write_onnx(load(folder, "cpu"), folder) if onnx else None
        card = CardContext(
            spec=self.spec,
            log=self.log,
            manifest=manifest,
            record=self.record,
            config=without_paths(config),
            adjustment=None if post_hoc is None else post_hoc.adjustment,
            refits=[record for record in self.refits if last_values([record], "test/top1_accuracy")],
            license_id=license_id,
            has_onnx=difference is not None,
            has_text=encoder.info.has_text,
            revision=encoder.info.revision,
            encoder_terms=terms,
            uncalibrated=read_uncalibrated_note(self.folder),
            calibration=ModelCalibration.read(folder, manifest.class_names),
            tree=ModelTaxonomy.read(folder, manifest.class_names),
        )
        storage.write_bytes(storage.join(folder, CARD_FILE), model_card(card).encode())
        return difference

    def _config(self) -> TrialConfig:
        if self.refits:
            return self.refits[0].trial_config()
        config = refit_config(self.record, self.spec)
        return config if config.train is None else config.with_overrides({"train.seed": self.spec.refit_seeds[0]})

    def _scores(self, notes: Sequence[str]) -> dict[str, object]:
        validation = self.record.best_epoch(self.spec.objective)
        return {
            "validation": None if validation is None else dict(validation),
            "refit": dict(self.refits[0].epochs[-1]) if self.refits and self.refits[0].epochs else None,
            "selected_by": self.spec.best_objective,
            "sweep": self.spec.name,
            "notes": notes,
        }

    @contextmanager
    def _weights(self, config: TrialConfig, manifest: Manifest) -> Iterator[str]:
        """Within, the folder of the refit's weights, which are trained now if the sweep has not done so.

        New weights are stored in the sweep's folder for later exports, or in a temporary folder if it is read-only.
        """
        name = (
            self.refits[0].trial_id if self.refits else f"export-{self.record.trial_id}-seed{self.spec.refit_seeds[0]}"
        )
        weights = refit_folder(self.folder, name)
        # The class record is written last.
        if self.refits or storage.exists(storage.join(weights, PER_CLASS_FILE)):
            yield weights
            return
        changes = data_changes(self.folder, manifest)
        if changes:
            raise ImbvlmError(
                f"{self.record.trial_id} can't be retrained: {changes[0]} since the sweep began. Restore the data."
            )
        check_class_texts(self.folder, config, keep=False)
        self.say(
            f"{self.record.trial_id} ({percent(self.record.best_value(self.spec.best_objective))} % on validation) "
            "is retrained on all training images"
        )
        problem = _write_problem(weights)
        if problem is None:
            self._train(config, manifest, weights)
            yield weights
            return
        self.say(f"its weights aren't kept for another export: {problem}")
        with TemporaryDirectory() as temporary:
            self._train(config, manifest, temporary)
            yield temporary

    def _train(self, config: TrialConfig, manifest: Manifest, weights: str) -> None:
        # The features lie next to the sweep, which may have been moved.
        parent = storage.absolute(self.folder).rpartition("/")[0]
        root = self.spec.model_copy(update={"storage": parent}).feature_root
        splits = tuple(split for split in manifest.splits if split != "test")
        console = Console()
        with console.redirect_output(_log_file(self.folder)):
            features = ensure_features(
                config, manifest, root, stored_outputs(config), splits, report=console.update_live,
                text=needs_text(config), cache=self.spec.feature_copies,
            )  # fmt: skip
        console.end_live()
        if features.notice:
            self.say(features.notice)
        settings = TrialSettings(
            config=config,
            feature_set=features,
            objective=self.spec.objective,
            num_threads=self.record.num_threads,
            refit=True,
            model_folder=weights,
        )
        for report in TrialSession(default_device()).reports(settings):
            if report.failure is not None:
                raise ImbvlmError(f"{self.record.trial_id} could not be retrained: {report.failure}")

    def post_hoc(
        self, config: TrialConfig, weights: str, class_names: Sequence[str], encoder: Encoder
    ) -> LogitPostprocessor | None:
        """The adjustment of the trial's logits with the data that it needs; None if there was no selection."""
        adjustment = self._adjustment(config)
        if adjustment is None:
            return None
        embeddings, content = None, read_per_class_results(weights)
        if adjustment.alpha:
            prompts = config.prompts or PromptsConfig()
            check_class_texts(self.folder, config, keep=False)
            sentences = class_sentences(prompts, class_names, read_class_texts(prompts.texts, class_names))
            embeddings = class_embeddings(require_text(encoder), sentences)
            if prompts.center_by_parent:
                taxonomy = Taxonomy.from_dict(content["taxonomy"], len(class_names))
                embeddings = centered_by_parent(embeddings, taxonomy, TEXT_KEY)
        return LogitPostprocessor(adjustment, tuple(content["class_counts"]), embeddings)

    def _adjustment(self, config: TrialConfig) -> PostHocAdjustment | None:
        if self.refits and self.refit_name is not None:
            return read_adjustment(self.folder, self.refit_name)
        name = self.record.trial_id
        refit = Refit(name, self.record, config, (self.spec.refit_seeds[0],))
        selection = select_adjustments(self.folder, [refit], self.log, self.spec).get(name)
        return None if selection is None else selection.adjustment


def _log_file(folder: str) -> Path | None:
    """The file for libraries' output: in a local sweep's folder, or the null device if that is read-only."""
    if not storage.is_local(folder):
        return None
    path = storage.local_path(folder) / LOG_FILE
    try:
        with path.open("ab"):
            return path
    except OSError:
        return Path(os.devnull)


def _write_problem(folder: str) -> str | None:
    """The error of writing into a folder; None if it succeeds."""
    probe = storage.join(folder, LOG_FILE)
    try:
        storage.write_bytes(probe, b"")
        storage.delete(probe)
    except storage.StorageError as error:
        return str(error)
    return None


def check_trained_on(weights: str, config: TrialConfig, class_names: Sequence[str], encoder_fingerprint: str) -> None:
    """Raise ImbvlmError if classes or the encoder's fingerprint differ from those that weights were trained with."""
    trained = read_per_class_results(weights)
    trained_names, fix = trained["class_names"], "Restore it, or start a new sweep."
    if list(class_names) != trained_names:
        differences = (
            f"class {label} is {now!r} in place of {then!r}"
            for label, (now, then) in enumerate(zip(class_names, trained_names, strict=False))
            if now != then
        )
        difference = next(differences, f"{len(class_names):,} in place of {len(trained_names):,}")
        manifest = config.data.manifest
        raise ImbvlmError(f"the manifest {manifest} has other classes than in the training: {difference}. {fix}")
    # The first versions did not write the encoder's fingerprint.
    if trained.get("tower", encoder_fingerprint) != encoder_fingerprint:
        raise ImbvlmError(f"the encoder {config.encoder.name} has other weights than in the training. {fix}")
