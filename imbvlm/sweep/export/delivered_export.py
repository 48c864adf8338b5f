"""The export of the delivered model where it has several members or refits: blend.yaml, and model/ in format 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imbvlm.base import storage
from imbvlm.base.yaml_file import dump_yaml
from imbvlm.config.encoder_entries import encoder_terms
from imbvlm.data.manifest import Manifest
from imbvlm.inference.blend_folder import write_blend
from imbvlm.inference.blend_merging import TrainedMember, is_affine
from imbvlm.inference.calibration_file import ModelCalibration
from imbvlm.inference.model_folder import load
from imbvlm.inference.model_parts import without_paths
from imbvlm.inference.onnx_export import write_onnx
from imbvlm.inference.taxonomy_file import ModelTaxonomy
from imbvlm.models.encoders.encoder import Encoder
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.sweep.export.model_card import CARD_FILE, CardContext, model_card
from imbvlm.sweep.export.trial_export import MODEL_FOLDER, Say, TrialExport, check_trained_on, write_best
from imbvlm.sweep.records.adjustment_selection import read_uncalibrated_note
from imbvlm.sweep.records.delivered_model import DeliveredMember, write_decision_scores
from imbvlm.sweep.records.difference import refits_of
from imbvlm.sweep.records.provenance import check_encoder_weights
from imbvlm.sweep.records.trial_log import DELIVERED, TrialLog, TrialRecord, describe_trial, refit_folder
from imbvlm.sweep.records.winner_selection import Selection
from imbvlm.sweep.spec.baselines import pass_key
from imbvlm.sweep.spec.manifest_path import locate_manifest
from imbvlm.sweep.spec.sweep_spec import SweepSpec
from imbvlm.training.checkpoint import load_model_tensors

BLEND_FILE = "blend.yaml"


def write_blend_file(folder: str, selection: Selection, log: TrialLog) -> None:
    """Write blend.yaml into a folder: the members with their weights, and what the decision rests on."""
    members = [
        {
            "trial": member.name,
            "what": log.records[member.name].name or describe_trial(log.records[member.name]),
            "weight": member.weight,
            "temperature": member.temperature * selection.temperature,
            "gain": member.gain,
        }
        for member in selection.members
    ]
    decisions = [
        {"passes": decision.num_passes, "gain": decision.gain, "standard_error": decision.standard_error}
        for decision in selection.decisions
    ]
    content = {"members": members, "decisions": decisions}
    storage.write_bytes(storage.join(folder, BLEND_FILE), dump_yaml(content).encode())


@dataclass(frozen=True)
class DeliveredExport:
    """The export of a sweep's delivered model."""

    folder: str
    spec: SweepSpec
    log: TrialLog
    selection: Selection | None
    members: Sequence[DeliveredMember]
    say: Say

    @property
    def name(self) -> str:
        """The trial's id, or those of a blend's members."""
        ids = [member.refit.record.trial_id for member in self.members]
        return ids[0] if len(ids) == 1 else f"a blend of {', '.join(ids)}"

    @property
    def missing(self) -> list[str]:
        """The members without a finished refit."""
        return [member.refit.record.trial_id for member in self.members if not self._refits(member)]

    def write(self, out: str, winner: TrialRecord, onnx: bool, license_id: str) -> float | None:
        """Write best.yaml, blend.yaml and model/ into a folder; returns the largest difference of an ONNX graph."""
        location = locate_manifest(self.spec, self.folder)
        write_best(out, winner, location)
        if self.selection is not None and self.selection.members:
            write_blend_file(out, self.selection, self.log)
        manifest, folder = Manifest.read(location), storage.join(out, MODEL_FOLDER)
        encoders: dict[str, Encoder] = {}
        trained = [self._trained(member, manifest, location, encoders) for member in self.members]
        if len(trained) == len(trained[0].refits) == 1:
            trial = TrialExport(self.folder, self.spec, self.log, winner, self.say)
            return trial.write(out, onnx, license_id, trained[0].encoder)
        terms = encoder_terms((member.config.encoder.name for member in trained), manifest.name)
        write_blend(folder, trained, manifest.class_names, self._scores(terms.notes), manifest.label_map)
        exported = [self._refits(member)[: len(own.refits)] for member, own in zip(self.members, trained, strict=True)]
        write_decision_scores(folder, self.folder, self.log, self.spec, self.members, manifest, exported)
        difference = write_onnx(load(folder, "cpu"), folder) if onnx else None
        card = CardContext(
            spec=self.spec,
            log=self.log,
            manifest=manifest,
            record=winner,
            config=without_paths(trained[0].config),
            # A blend's members have their own, in a table of the card.
            adjustment=trained[0].post_hoc.adjustment if trained[0].post_hoc and not trained[1:] else None,
            refits=[record for record in self.log.of("delivered") if record.name == DELIVERED],
            license_id=license_id,
            has_onnx=difference is not None,
            has_text=all(encoder.info.has_text for encoder in encoders.values()),
            revision=trained[0].encoder.info.revision,
            encoder_terms=terms,
            uncalibrated=read_uncalibrated_note(self.folder),
            calibration=ModelCalibration.read(folder, manifest.class_names),
            tree=ModelTaxonomy.read(folder, manifest.class_names),
            members=trained,
        )
        storage.write_bytes(storage.join(folder, CARD_FILE), model_card(card).encode())
        return difference

    def _trained(
        self, member: DeliveredMember, manifest: Manifest, location: str, encoders: dict[str, Encoder]
    ) -> TrainedMember:
        refits, names = self._refits(member), manifest.class_names
        config = refits[0].trial_config().with_overrides({"data.manifest": location})
        key = pass_key(config)
        if key not in encoders:
            encoders[key] = create_encoder(config.encoder, config.eval)
            check_encoder_weights(self.folder, config.encoder, encoders[key].info, keep=False)
        encoder, weights = encoders[key], [refit_folder(self.folder, refit.trial_id) for refit in refits]
        for folder in weights:
            check_trained_on(folder, config, names, encoder.info.weights_fingerprint)
        tensors = [load_model_tensors(weights[0])]
        if is_affine(config, encoder.info, len(names), tensors[0]):
            tensors += [load_model_tensors(folder) for folder in weights[1:]]
        trial = TrialExport(self.folder, self.spec, self.log, member.refit.record, self.say)
        post_hoc = trial.post_hoc(config, weights[0], names, encoder)
        name = member.refit.record.trial_id
        return TrainedMember(name, config, tensors, encoder, member.weight, member.temperature, post_hoc)

    def _refits(self, member: DeliveredMember) -> list[TrialRecord]:
        return refits_of(self.log, member.refit.name)

    def _scores(self, notes: Sequence[str]) -> dict[str, object]:
        scored = [dict(record.epochs[-1]) for record in self.log.of("delivered") if record.name == DELIVERED]
        return {
            "validation": None if self.selection is None else {"num_rows": self.selection.num_rows},
            "test": scored[0] if scored else None,
            "selected_by": "log_likelihood" if self.selection is not None else self.spec.best_objective,
            "sweep": self.spec.name,
            "notes": notes,
        }
