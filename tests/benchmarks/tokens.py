"""Tokens as bytes with a scale per channel, and averaged 2 x 2: cost in accuracy, gain in bytes and time."""

from collections.abc import Iterator
from pathlib import Path

import embedded
import made
import numpy as np
from table import Line, Options, in_turn, shown, times
from tiny_images import extraction_in_this_process

from imbvlm.config import TrialConfig
from imbvlm.data.manifest import Manifest
from imbvlm.features.examples import FeatureSet, TrialData
from imbvlm.features.extract import ensure_features
from imbvlm.training.epochs import build_trial

KINDS = {
    "half precision": {},
    "bytes": {"features__int8_tokens": True},
    "half precision, 2 x 2": {"encoder__token_pooling": 2},
    "bytes, 2 x 2": {"features__int8_tokens": True, "encoder__token_pooling": 2},
}
SEEDS = range(3)
# 4 x 4 tokens of the embedded tower.
DECODER = {"encoder__image_size": 128, "decoder__depth": 2, "decoder__width": 192, "optim__lr": 0.03}


def lines(options: Options) -> Iterator[Line]:
    yield shown(f"embedded data at 128 px, decoder of depth 2, {embedded.NUM_EPOCHS} epochs, {len(SEEDS)} seeds", "")
    for words, knobs in KINDS.items():
        config = embedded.config("decoder", **DECODER, **knobs)
        manifest = Manifest.read(embedded.MANIFEST)
        with extraction_in_this_process():
            found = ensure_features(
                config, manifest, str(options.folder / "stores"), frozenset({"tokens"}), ("train", "val", "test"),
                report=lambda text: None,
            )  # fmt: skip
        scores = 100 * np.array([_score(config, found, seed, options) for seed in SEEDS])
        (balanced, few), (spread, few_spread) = scores.mean(axis=0), scores.std(axis=0, ddof=1)
        yield shown(
            f"  {words}: test, balanced and few-shot accuracy",
            f"{balanced:.2f} ± {spread:.2f}, {few:.2f} ± {few_spread:.2f}",
        )
    yield from _sizes(options)


def _score(config: TrialConfig, found: FeatureSet, seed: int, options: Options) -> tuple[float, float]:
    config = config.with_overrides({"train.seed": seed})
    run = build_trial(config, TrialData.open(config, found, refit=True), options.device)
    for _ in run.epochs():
        pass
    metrics = run.evaluate(TrialData.open_split(config, found, "test"))
    return metrics["balanced_accuracy"], metrics["few_shot_accuracy"]


def _sizes(options: Options) -> Iterator[Line]:
    """Bytes and an epoch's seconds of tokens as many and as wide as a ViT-B/32's, and a quarter of the grid."""
    number = 20_000 if options.large else 384
    yield shown(f"{number:,} images x 50 tokens of 768, decoder of depth 3: MB on disk, and an epoch", "")
    runs, sizes = {}, {}
    for words, knobs in KINDS.items():
        num_tokens = 17 if "encoder__token_pooling" in knobs else 50
        folder = options.folder / words.replace(" ", "-")
        is_int8 = "features__int8_tokens" in knobs
        features = made.stored_features(
            folder, number, num_tokens=num_tokens, outputs=("tokens",), num_val=64, int8_tokens=is_int8
        )
        config = made.trial("decoder", train__num_epochs=100)
        data = TrialData.open(config, features)
        runs[words] = build_trial(config, data, options.device).epochs()
        sizes[words] = _bytes(folder / "train")
        next(runs[words])
    taken = in_turn({words: lambda run=run: next(run) for words, run in runs.items()}, 2)
    whole = next(iter(KINDS))
    for words in KINDS:
        yield times(f"  {words}, {sizes[words] / 1e6:.1f} MB; half precision beside it", taken[words], taken[whole])


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "tokens").glob("*.arrow"))
