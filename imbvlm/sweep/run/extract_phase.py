"""The features phase: one pass over the images for each encoder whose outputs are not stored yet."""

from __future__ import annotations

import time
from functools import partial

from imbvlm.base import storage
from imbvlm.features.extraction import ensure_features, seconds_per_image
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.store_sizes import num_crops, pending_images
from imbvlm.sweep.records.provenance import check_class_texts, check_encoder_weights
from imbvlm.sweep.records.quarantine_list import describe_quarantine, quarantined_rows, write_quarantine
from imbvlm.sweep.records.resource_usage import ImageThroughput, throughput_key
from imbvlm.sweep.run.sweep_run import SweepRun
from imbvlm.sweep.spec.baselines import feature_key


def extract(run: SweepRun) -> None:
    """Compute the missing training and validation features, and reserve time for the test split's."""
    started, splits = time.monotonic(), ("train", "val") if "val" in run.manifest.splits else ("train",)
    run.features = extract_splits(run, splits)
    if run.budget.is_limited and "test" in run.manifest.splits:
        seconds = time.monotonic() - started
        run.budget.test_feature_seconds = _test_feature_seconds(run, seconds, splits)


def extract_splits(run: SweepRun, splits: tuple[str, ...]) -> dict[str, FeatureSet]:
    """Return the stored features of each encoder of the space, by `feature_key`; missing ones are computed."""
    feature_sets, throughputs = dict[str, FeatureSet](), dict[str, float]()
    for config in run.encoders:
        check_class_texts(run.folder, config)
        features = ensure_features(
            config,
            run.manifest,
            run.spec.feature_root,
            run.outputs,
            splits,
            report=run.console.update_live,
            five_crop=tuple(split for split in splits if split == "test"),
            cache=run.spec.feature_copies,
            sweep=run.folder,
            check_encoder=partial(check_encoder_weights, run.folder, config.encoder),
        )
        run.console.end_live()
        if features.notice:
            run.console.print(features.notice)
        feature_sets[feature_key(config)] = features
        if "train" in features.splits and (seconds := seconds_per_image(features.folder)) is not None:
            throughputs[throughput_key(config)] = seconds
    # All encoders decode the same files, so the first list holds for each of them.
    _quarantine(run, next(iter(feature_sets.values())))
    if "train" in splits:
        ImageThroughput(len(run.manifest.rows_of("train")), throughputs).write(run.folder)
    return feature_sets


def _test_feature_seconds(run: SweepRun, seconds: float, splits: tuple[str, ...]) -> float:
    """Estimate the seconds of the test split's pass from those that the pass over `splits` took; 0 if none is due."""
    root, num_missing, num_seen = storage.absolute(run.spec.feature_root), 0, 0
    for config in run.encoders:
        num_missing += pending_images(config, run.manifest, root, run.outputs, ("test",)).num_images
        num_seen += num_crops(config, run.manifest, splits)
    # Longer than that pass where the test split has more crops.
    return seconds * max(1.0, num_missing / num_seen) if num_missing else 0.0


def _quarantine(run: SweepRun, features: FeatureSet) -> None:
    bad = quarantined_rows(run.manifest, features)
    if bad:
        run.quarantined += bad
        run.console.print(describe_quarantine(bad, write_quarantine(run.folder, run.quarantined)))
