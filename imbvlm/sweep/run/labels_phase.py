"""The label phase: which images of training and validation have labels that look wrong."""

from __future__ import annotations

import numpy as np

from imbvlm.base import storage
from imbvlm.base.formatting import pluralize
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest_schema import Rows
from imbvlm.features.trial_data import TrialData
from imbvlm.longtail.decisions.suspect_labels import find_suspects
from imbvlm.sweep.records.delivered_model import delivered_members, validation_logits
from imbvlm.sweep.records.sweep_folder import SUSPECTS_FILE, SuspectLabel, write_suspects
from imbvlm.sweep.run.sweep_run import SweepRun
from imbvlm.sweep.spec.baselines import feature_key


def check_labels(run: SweepRun) -> None:
    """Write suspect_labels.csv: by the delivered model's members in the search, which did not train on the images."""
    if run.num_refits_left:
        return
    # Another model may have been delivered before.
    storage.delete(storage.join(run.folder, SUSPECTS_FILE))
    members = delivered_members(run.folder, run.log, run.spec, run.selection)
    scored = validation_logits(run.folder, run.log, run.spec, members)
    if isinstance(scored, str):
        run.console.print(f"labels aren't checked: {scored}")
        return
    rows = _validated_rows(run, members[0].refit.config, len(scored.saved.stats))
    if not np.array_equal(run.manifest.labels[rows], scored.saved.targets.numpy()):
        run.console.print("labels aren't checked: images have become readable or unreadable since they were scored")
        return
    suspects, seen = find_suspects(scored.logits, scored.labels), rows[scored.seen.numpy()]
    chosen, names = seen[suspects.rows], run.manifest.class_names
    table = run.manifest.table.select(["uri", "split"]).take(chosen).to_pylist()
    numbers = zip(suspects.given_probability.tolist(), suspects.other_probability.tolist(), strict=True)
    labels = zip(run.manifest.labels[chosen].tolist(), suspects.looks_like.tolist(), strict=True)
    listed = [
        SuspectLabel(entry["uri"] or f"row {row}", row, entry["split"], names[given], names[other], *probabilities)
        for entry, row, (given, other), probabilities in zip(table, chosen.tolist(), labels, numbers, strict=True)
    ]
    write_suspects(run.folder, listed)
    number = f"{len(listed):,} of {pluralize(len(seen), 'image')}"
    run.console.print(f"labels that look wrong: {number}; see {storage.join(run.folder, SUSPECTS_FILE)}")


def _validated_rows(run: SweepRun, config: TrialConfig, num_folds: int) -> Rows:
    """Manifest row numbers of a trial's validation rows, in the order of its logits."""
    features, table = run.features[feature_key(config)], run.manifest.label_rows()
    # A sweep of 0.1 has recorded a relative path.
    config = config.model_copy(update={"encoder": features.encoder})
    if num_folds == 1:
        split = "val" if len(table.rows_of("val")) else "train"
        return table.rows_of(split)[TrialData.open(config, features, table=table).val.rows]
    number = run.num_folds if run.num_folds > 1 else run.context.confirm_folds
    data = TrialData.open_folds(config, features, number, table=table)
    official = data[0].official
    rows = [table.rows_of("train")[fold.val.rows] for fold in data]
    return np.concatenate(rows if official is None else [*rows, table.rows_of("val")[official.rows]])
