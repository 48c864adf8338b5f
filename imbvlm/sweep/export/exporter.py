"""Exports from a sweep: best.yaml, and model/ with weights, encoder, class names, preprocessing and a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imbvlm.base import storage
from imbvlm.base.csv_cells import csv_line
from imbvlm.base.errors import ImbvlmError
from imbvlm.inference.onnx_export import require_onnx
from imbvlm.sweep.export.delivered_export import BLEND_FILE, DeliveredExport
from imbvlm.sweep.export.export_folder import ExportFolder
from imbvlm.sweep.export.model_card import UNSTATED
from imbvlm.sweep.export.trial_export import BEST_FILE, MODEL_FOLDER, Say, TrialExport
from imbvlm.sweep.records.delivered_model import delivered_members
from imbvlm.sweep.records.summary_tables import HEADINGS, METRICS, pareto_records
from imbvlm.sweep.records.sweep_folder import read_spec
from imbvlm.sweep.records.trial_log import TrialLog, TrialRecord
from imbvlm.sweep.records.winner_selection import read_selection
from imbvlm.sweep.spec.manifest_path import with_located_manifest
from imbvlm.sweep.spec.sweep_spec import SweepSpec

TRIALS_FILE = "trials.csv"
FEW_SHOT = "val/few_shot_accuracy"


@dataclass(frozen=True)
class Exported:
    """An exported model and the folder of its best.yaml and model/."""

    record: TrialRecord
    name: str
    folder: str
    onnx_difference: float | None = None


def export_sweep(
    folder: str,
    out: str,
    *,
    top: int = 1,
    pareto: bool = False,
    single: bool = False,
    onnx: bool = False,
    license_id: str = UNSTATED,
    manifest: str | None = None,
    say: Say = print,
) -> list[Exported]:
    """Write the delivered model: best.yaml, blend.yaml where it is a blend, and model/; `single`: the best trial.

    The `top` best trials or the Pareto set have a folder each.
    Trials without a refit are first retrained on all training images, from stored features and without reading the
    test split. `manifest` is the manifest's present location if it was moved. Raises ImbvlmError without a result.
    """
    storage.check_location(out)
    if onnx:
        require_onnx()
    spec, log = with_located_manifest(read_spec(folder), folder, manifest), TrialLog.read(folder)
    ranked = log.winner_first(spec.objective)
    if not ranked:
        raise ImbvlmError(f"no trial of {folder} has a result yet. Run `imbvlm sweep resume {folder}`.")
    records, objectives = pareto_set(log, spec) if pareto else (ranked[:top], ())
    has_folders = pareto or top > 1
    names = [f"{number}-{record.trial_id}" for number, record in enumerate(records, 1)] if has_folders else [""]
    target = ExportFolder.open(out)
    target.check([*names, TRIALS_FILE] if has_folders else [BEST_FILE, BLEND_FILE, MODEL_FOLDER])
    if has_folders:
        none = f", none better in all of {', '.join(objectives)}" if pareto else ""
        say(f"{len(records)} of {len(ranked)} trials{none}")
    delivered = None if has_folders or single else _delivered(folder, spec, log, say)
    exported = []
    with target.staging() as staged:
        for name, record in zip(names, records, strict=True):
            path, location = storage.join(staged, name), storage.join(out, name) if name else out
            if delivered is None:
                difference = TrialExport(folder, spec, log, record, say).write(path, onnx, license_id)
                exported.append(Exported(record, record.trial_id, location, difference))
            else:
                difference = delivered.write(path, record, onnx, license_id)
                exported.append(Exported(record, delivered.name, location, difference))
        if has_folders:
            storage.write_bytes(storage.join(staged, TRIALS_FILE), _trials_csv(exported, spec).encode())
        target.put(staged)
    return exported


def _delivered(folder: str, spec: SweepSpec, log: TrialLog, say: Say) -> DeliveredExport | None:
    """The export of the delivered model; None before its members are refitted, so that the best trial is exported."""
    selection = read_selection(folder)
    members = delivered_members(folder, log, spec, selection)
    delivered = DeliveredExport(folder, spec, log, selection, members, say)
    if not delivered.missing:
        return delivered
    if len(members) > 1:
        say(
            f"the best single trial is exported, since members of the blend aren't refitted: "
            f"{', '.join(delivered.missing)}. Refit them with: imbvlm sweep resume {folder}"
        )
    return None


def pareto_set(log: TrialLog, spec: SweepSpec) -> tuple[list[TrialRecord], tuple[str, ...]]:
    """The Pareto set of a sweep and its objectives; few-shot accuracy is the second one of a sweep with one objective.

    Raises ImbvlmError if the set is empty.
    """
    if not spec.other_objectives and spec.objective != FEW_SHOT:
        spec = spec.model_copy(update={"other_objectives": [FEW_SHOT]})
    records = pareto_records(log, spec) if spec.other_objectives else []
    if not records:
        objectives = " and ".join(spec.objectives)
        raise ImbvlmError(f"the Pareto set is empty: no trial meets the constraints and has {objectives}. Use --top.")
    return records, spec.objectives


def _trials_csv(exported: Sequence[Exported], spec: SweepSpec) -> str:
    rows = [["folder", "trial", "seconds", *(f"{heading}_accuracy_validation" for heading in HEADINGS)]]
    for export in exported:
        best, name = export.record.best_epoch(spec.objective) or {}, export.folder.rstrip("/").rpartition("/")[2]
        values = [best.get(f"val/{metric}") for metric in METRICS]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        rows.append([name, export.record.trial_id, f"{export.record.seconds():.1f}", *cells])
    return "".join(map(csv_line, rows))
