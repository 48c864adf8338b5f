"""Tokens as bytes with a scale per channel, and averaged 2 x 2: cost in accuracy, gain in bytes and time."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

import embedded
import made
import numpy as np
from made_stores import stored_split
from table import Line, Options, in_turn, shown, times
from tiny_images import extraction_in_this_process

from imbvlm.base import storage
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction import ensure_features
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.store_layout import TOWER_FILE
from imbvlm.features.trial_data import TrialData
from imbvlm.models.encoders.token_pooling import pooling_matrix
from imbvlm.training.trial_run import build_trial

# Whether tokens are bytes, and how many by how many are one.
KINDS = {
    "half precision": (False, 1),
    "bytes": (True, 1),
    "half precision, 2 x 2": (False, 2),
    "bytes, 2 x 2": (True, 2),
}
SEEDS, NUM_EPOCHS = range(3), 2
# 4 x 4 tokens of the embedded tower.
DECODER = {
    "encoder__image_size": 128, "decoder__depth": 1, "decoder__width": 192, "optim__lr": 0.05,
    "train__num_epochs": NUM_EPOCHS,
}  # fmt: skip


def lines(options: Options) -> Iterator[Line]:
    """All kinds are made of one pass of the tower, as the pass itself would make them."""
    yield shown(f"embedded data at 128 px, decoder of depth 1, {NUM_EPOCHS} epochs, {len(SEEDS)} seeds", "")
    config, manifest = embedded.config("decoder", **DECODER), Manifest.read(embedded.MANIFEST)
    with extraction_in_this_process():
        whole = ensure_features(
            config, manifest, str(options.folder / "stores"), frozenset({"tokens"}), ("train", "val", "test"),
            report=lambda text: None,
        )  # fmt: skip
    for words, (int8, side) in KINDS.items():
        found = _variant(whole, options.folder / f"stores-{int8}-{side}", int8, side)
        config = config.with_overrides({"encoder.token_pooling": side, "features.int8_tokens": int8})
        scores = [_score(config, found, seed, options) for seed in SEEDS]
        yield embedded.accuracies(f"  {words}: test, balanced and few-shot accuracy", scores)
    yield from _sizes(options)


def _variant(whole: FeatureSet, folder: Path, int8: bool, side: int) -> FeatureSet:
    """The same tokens as bytes, averaged, or both."""
    info, splits = whole.info, {}
    pool = pooling_matrix(info.num_tokens, int(info.has_class_token), side, info.name)
    for name in whole.splits:
        split = whole.store(name)
        shapes = {**split.layout.shapes, "tokens": (len(pool), info.token_width)}
        layout = replace(split.layout, shapes=shapes, int8_tokens=int8)
        tokens = pool @ split.gather("tokens", np.arange(split.num_rows)).float()
        splits[name] = stored_split(folder, layout, {"tokens": tokens.numpy()[:, None]}, name=name, per_shard=512)
    tensors = storage.read_bytes(storage.join(whole.folder, TOWER_FILE))
    storage.write_bytes(str(folder / layout.digest / TOWER_FILE), tensors)
    info = replace(info, num_tokens=len(pool), token_pooling=side)
    return replace(whole, folder=str(folder / layout.digest), splits=splits, info=info)


def _score(config: TrialConfig, found: FeatureSet, seed: int, options: Options) -> tuple[float, float]:
    config = config.with_overrides({"train.seed": seed})
    return embedded.tested(build_trial(config, TrialData.open(config, found, refit=True), options.device), found)


def _sizes(options: Options) -> Iterator[Line]:
    """Bytes and an epoch's seconds of tokens as many and as wide as a ViT-B/32's, and a quarter of the grid."""
    number = 20_000 if options.large else 128
    yield shown(f"{number:,} images x 50 tokens of 768, decoder of depth 3: MB on disk, and an epoch", "")
    runs, sizes = {}, {}
    for words, (int8, side) in KINDS.items():
        num_tokens, folder = len(pooling_matrix(50, 1, side, "made")), options.folder / f"made-{int8}-{side}"
        features = made.stored_features(
            folder, number, num_tokens=num_tokens, outputs=("tokens",), num_val=64, int8_tokens=int8
        )
        config = made.trial("decoder", train__num_epochs=100)
        data = TrialData.open(config, features)
        runs[words] = build_trial(config, data, options.device).epochs()
        sizes[words] = _bytes(folder / "made")
        next(runs[words])
    # Of the CPU, where that computes: what else runs on the machine isn't in it.
    clock = perf_counter if options.device == "cuda" else process_time
    taken = in_turn({words: lambda run=run: next(run) for words, run in runs.items()}, 2, clock)
    whole = next(iter(KINDS))
    for words in KINDS:
        yield times(f"  {words}, {sizes[words] / 1e6:.1f} MB; half precision beside it", taken[words], taken[whole])


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "tokens").glob("*.arrow"))
