"""The last phase of an update: the earlier sweep's delivered model and this one's on the same test images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError, LostProcessesError
from imbvlm.base.formatting import pluralize
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_schema import Rows
from imbvlm.features.known_files import row_contents
from imbvlm.inference.batch_prediction import MIN_RAY_IMAGES, Images, predictions
from imbvlm.inference.model_folder import read_record
from imbvlm.longtail.model_change import accuracy_changes, class_changes, join_classes
from imbvlm.sweep.export.exporter import export_sweep
from imbvlm.sweep.export.trial_export import MODEL_FOLDER
from imbvlm.sweep.records.provenance import data_changes, has_rows_of
from imbvlm.sweep.records.sweep_folder import read_spec
from imbvlm.sweep.records.trial_log import DELIVERED, TrialLog, refit_folder
from imbvlm.sweep.report.update_comparison import BALANCED, ComparedClass, NewClass, UpdateComparison
from imbvlm.sweep.run.sweep_run import SweepRun
from imbvlm.sweep.spec.manifest_path import locate_manifest
from imbvlm.training.test_predictions import TEST, TestPredictions

# What stands for the answer on an image that can't be read.
NO_ANSWER = -1
_EXPORT_FOLDER = "earlier-model"


def compare_with_earlier(run: SweepRun) -> None:
    """Compare the delivered model with that of the sweep that this one updates, and write update.json.

    A reason against a comparison is written in its place: the new model is there without it.
    """
    earlier = run.spec.update_of
    if earlier is None or run.num_refits_left:
        return
    delivered = _delivered(run.log)
    before = UpdateComparison.read(run.folder)
    if before is not None and not before.problem and before.delivered == delivered:
        return
    try:
        comparison = _compare(run, earlier, delivered)
    except LostProcessesError:
        raise
    except ImbvlmError as error:
        comparison = UpdateComparison(earlier, problem=str(error))
    comparison.write(run.folder)


def _compare(run: SweepRun, earlier: str, delivered: str) -> UpdateComparison:
    now = run.manifest
    if "test" not in now.splits:
        raise ImbvlmError("the data has no test split. Hold images out with `imbvlm manifest build --test-share 0.2`.")
    predicted = _test_predictions(run.folder, delivered)
    if predicted is None:
        raise ImbvlmError("it has no predictions of the test split. Remove the reason above and resume.")
    location = locate_manifest(read_spec(earlier), earlier)
    before = Manifest.read(location)
    if not has_rows_of(earlier, before):
        raise ImbvlmError(
            f"{location} has changed since that sweep, so that the images that it was trained with aren't known. Write "
            "the manifest of grown data to another file."
        )
    keys, keys_before = (_image_keys(run.spec.feature_root, manifest.table) for manifest in (now, before))
    seen = {own[row] for own, manifest in ((keys, now), (keys_before, before)) for row in _selecting_rows(manifest)}
    rows = now.rows_of("test")
    answers = np.full(len(rows), NO_ANSWER, dtype=np.int64)
    answers[predicted.rows.numpy()] = predicted.predicted[TEST].numpy()
    is_unseen = np.array([keys[row] not in seen for row in rows], dtype=np.bool_)
    rows, answers = rows[is_unseen], answers[is_unseen]
    answers_before = np.full(len(rows), NO_ANSWER, dtype=np.int64)
    is_read = answers != NO_ANSWER
    answers_before[is_read] = _earlier_answers(run, earlier, before, keys_before, rows[is_read], keys)
    comparison = compare_answers(before, now, rows, answers_before, answers)
    return replace(comparison, earlier=earlier, delivered=delivered, num_seen=int((~is_unseen).sum()))


def compare_answers(
    before: Manifest, now: Manifest, rows: Rows, answers_before: Rows, answers_now: Rows
) -> UpdateComparison:
    """Compare answers (N,) on `rows` (N,) of the present manifest, each in its manifest's labels, NO_ANSWER for none.

    Classes are joined by name. Raises ImbvlmError without an image that both could read and name.
    """
    is_read = (answers_before != NO_ANSWER) & (answers_now != NO_ANSWER)
    labels, label_of = now.labels[rows[is_read]], join_classes(before.class_names, now.class_names)
    right_before, right_now = label_of[answers_before[is_read]] == labels, answers_now[is_read] == labels
    is_known = np.isin(labels, label_of)
    if not is_known.any():
        raise ImbvlmError(
            "no test image is left that the earlier one can name and wasn't trained or selected with. Add test images."
        )
    outcomes, groups = (right_before[is_known], right_now[is_known], labels[is_known]), now.label_rows().groups
    stats_before, counts_now = before.class_stats(), now.class_stats().counts
    sets = {BALANCED: label_of} | {name: label_of[members] for name, members in stats_before.shot_groups.items()}
    number_of = {label: number for number, label in enumerate(label_of.tolist())}
    names, new = now.class_names, [label for label in range(len(now.class_names)) if label not in number_of]
    return UpdateComparison(
        "",
        num_unread=int((~is_read).sum()),
        accuracies=accuracy_changes(*outcomes, sets, None if groups is None else groups[rows[is_read]][is_known]),
        classes=[
            ComparedClass(
                names[change.label],
                int(stats_before.counts[number_of[change.label]]),
                int(counts_now[change.label]),
                change,
            )
            for change in class_changes(*outcomes)
        ],
        new=[
            NewClass(names[label], int((labels == label).sum()), int(right_now[labels == label].sum())) for label in new
        ],
        gone=[name for name, label in zip(before.class_names, label_of, strict=True) if label < 0],
    )


def _delivered(log: TrialLog) -> str:
    """The id of the delivered model's record; empty in sweeps without one."""
    return next((record.trial_id for record in log.of("delivered") if record.name == DELIVERED), "")


def _test_predictions(folder: str, trial_id: str) -> TestPredictions | None:
    return TestPredictions.read(refit_folder(folder, trial_id)) if trial_id else None


def _image_keys(root: str, table: pa.Table) -> list[bytes]:
    """The content of each image as far as stores in `root` know it, else its location."""
    contents = row_contents(root, table)
    located = zip(contents.digests, contents.is_known, table.column("uri").to_pylist(), strict=True)
    return [digest.tobytes() if is_known else str(uri).encode() for digest, is_known, uri in located]


def _selecting_rows(manifest: Manifest) -> list[int]:
    """The rows that a model is trained or selected with."""
    return [*manifest.rows_of("train").tolist(), *manifest.rows_of("val").tolist()]


def _earlier_answers(
    run: SweepRun, earlier: str, before: Manifest, keys_before: list[bytes], rows: Rows, keys: list[bytes]
) -> Rows:
    """The earlier model's answers (N,) on rows (N,): those of its own test split are known, others it gives now."""
    answers = dict[bytes, int]()
    predicted = _test_predictions(earlier, _delivered(TrialLog.read(earlier)))
    if predicted is not None and not data_changes(earlier, before):
        tested = before.rows_of("test")[predicted.rows.numpy()]
        answers = dict(zip((keys_before[row] for row in tested), predicted.predicted[TEST].tolist(), strict=True))
    unknown = [row for row in rows.tolist() if keys[row] not in answers]
    if unknown:
        run.console.print(f"the earlier model predicts {pluralize(len(unknown), 'test image')}")
        answers |= zip((keys[row] for row in unknown), _predict(run, earlier, unknown), strict=True)
    return np.array([answers[keys[row]] for row in rows], dtype=np.int64)


def _predict(run: SweepRun, earlier: str, rows: list[int]) -> list[int]:
    """The labels that the earlier model, as it is exported, gives to rows of the manifest."""
    table = run.manifest.table.select(["uri", "bytes"]).take(pa.array(rows))
    images = Images([f"row {row}" for row in rows], table.column("uri").to_pylist(), table.column("bytes").to_pylist())
    # All machines of a cluster read the sweep's folder.
    folder = storage.join(run.folder, _EXPORT_FOLDER)
    try:
        export_sweep(earlier, folder, say=lambda text: None)
        model = storage.join(folder, MODEL_FOLDER)
        if any(each.num_crops > 1 for each in read_record(model).inputs):
            raise ImbvlmError(
                "the earlier one predicts several crops, and tests score one. Use `imbvlm predict` with both."
            )
        use_ray = len(rows) >= MIN_RAY_IMAGES
        predicted = predictions(model, images, 1, use_ray=use_ray, notify=run.console.print)
        return [each.labels[0] if each.error is None else NO_ANSWER for each in predicted]
    finally:
        storage.delete(folder)
