"""Bytes that stored features take, and checks of the disk before they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import size_text
from imbvlm.config.encoder_info import OUTPUT_NAMES, EncoderInfo, OutputName
from imbvlm.config.input_sections import FeatureCacheConfig
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.preprocess import FIVE_CROPS
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction_plan import PendingPart, num_views, plan_layout, plan_part, store_parts
from imbvlm.features.feature_cache import FeatureCache
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.ray_runtime.cluster_resources import is_single_node
from imbvlm.ray_runtime.connection import existing_cluster

# Bytes on disk for each byte of numbers: rows, reasons and Arrow's metadata come on top.
DISK_MARGIN = 1.02


def store_bytes(
    config: TrialConfig,
    info: EncoderInfo,
    manifest: Manifest,
    outputs: frozenset[OutputName],
    splits: Sequence[str],
) -> dict[OutputName, int]:
    """Bytes on disk of each output over some official splits."""
    num_entries = num_crops(config, manifest, splits)
    if config.eval.tte == "five_crop" and "test" in splits:
        num_entries += len(manifest.rows_of("test")) * len(FIVE_CROPS)
    layout = plan_layout(config, info, "")
    return {output: layout.num_bytes(output, num_entries) for output in outputs_to_store(config, info, outputs)}


def outputs_to_store(config: TrialConfig, info: EncoderInfo, outputs: frozenset[OutputName]) -> list[OutputName]:
    """Those of `outputs` that the encoder has and that are stored; none with `features.store: false`."""
    return [output for output in info.shapes if output in outputs and config.features.store]


def trial_bytes(config: TrialConfig, info: EncoderInfo, manifest: Manifest, outputs: frozenset[OutputName]) -> int:
    """Limit on what one trial reads: a refit reads its output of all splits, and image embeddings of the test split."""
    each = store_bytes(config, info, manifest, outputs, manifest.splits)
    embedding = frozenset[OutputName]({"image_embedding"}) & outputs if "test" in manifest.splits else frozenset()
    of_test = store_bytes(config, info, manifest, embedding, ("test",)).get("image_embedding", 0)
    return max((count + (of_test if output != "image_embedding" else 0) for output, count in each.items()), default=0)


def check_disk_space(
    configs: Sequence[TrialConfig],
    manifest: Manifest,
    root: str,
    outputs: frozenset[OutputName],
    *,
    cache: FeatureCacheConfig | None = None,
    other_bytes: int = 0,
) -> None:
    """Check, before the first pass, that the disk can hold all splits of all encoders and the cache those of a trial.

    `other_bytes` are what trials will write to that disk. Raises ImbvlmError.
    """
    root, free = storage.absolute(root), storage.free_bytes(root)
    described = [(config, describe_encoder(config.encoder)) for config in configs]
    needed = sum(
        sum(store_bytes(config, info, manifest, outputs, manifest.splits).values()) for config, info in described
    )
    # Existing shards need the encoders' weights to be found, and are counted only where they matter.
    if free is not None and needed * DISK_MARGIN + other_bytes > free:
        parts = [part for config in configs for part in _pending_parts(config, manifest, root, outputs)]
        # Encoders may share a store.
        unique = {(part.store.folder, part.part.split, part.part.num_views): part for part in parts}
        check_parts_fit(configs, root, list(unique.values()), other_bytes)
    if not storage.is_local(root):
        for config, info in described:
            source = f"what a trial of {config.encoder.name} reads of {root}"
            _check_cache_fits(cache, source, trial_bytes(config, info, manifest, outputs))


def num_crops(config: TrialConfig, manifest: Manifest, splits: Sequence[str]) -> int:
    """Crops of some official splits that training and evaluation read."""
    return sum(len(manifest.rows_of(split)) * num_views(config, split) for split in splits)


def bytes_per_image(config: TrialConfig, info: EncoderInfo, outputs: frozenset[OutputName]) -> int:
    """Bytes of these outputs for one crop."""
    layout = plan_layout(config, info, "")
    return sum(layout.num_bytes(output) for output in outputs)


class Pending(NamedTuple):
    """Crops that a pass would still compute, bytes that it would write, and crops that are stored."""

    num_images: int
    num_bytes: int
    num_known: int


@existing_cluster()
def pending_images(
    config: TrialConfig, manifest: Manifest, root: str, outputs: frozenset[OutputName], splits: Sequence[str]
) -> Pending:
    """The crops that a pass would still compute, by what is stored now.

    Files of unknown content count as new, although some may be copies. Needs the weights. Writes nothing, and takes an
    existing shard for whole. Raises ImbvlmError.
    """
    parts = _pending_parts(config, manifest, root, outputs, splits)
    return Pending(
        sum(part.num_images for part in parts),
        sum(part.num_bytes(output) for part in parts for output in outputs),
        sum(part.num_known for part in parts),
    )


def _pending_parts(
    config: TrialConfig,
    manifest: Manifest,
    root: str,
    outputs: frozenset[OutputName],
    splits: Sequence[str] | None = None,
) -> list[PendingPart]:
    """The parts that `pending_images` counts, of all splits by default."""
    splits = manifest.splits if splits is None else splits
    encoder = create_encoder(config.encoder, config.eval)
    parts = store_parts(config, encoder.preprocess, splits, ("test",) if "test" in splits else ())
    stored = outputs_to_store(config, encoder.info, outputs)
    return [plan_part(config, manifest, root, stored, encoder, part, is_dry_run=True) for part in parts]


def check_parts_fit(
    configs: Sequence[TrialConfig], root: str, parts: Sequence[PendingPart], other_bytes: int = 0
) -> None:
    """Raise ImbvlmError where the disk can't hold the pending parts; names the options that make them smaller."""
    needed = {output: sum(part.num_bytes(output) for part in parts) for output in OUTPUT_NAMES}
    total, free = sum(needed.values()), storage.free_bytes(root)
    if free is None or not total or total * DISK_MARGIN + other_bytes <= free:
        return
    config = configs[0]
    features = config.features
    size = config.encoder.image_size or "the encoder's own"
    options = [
        f"features.num_views ({features.num_views})",
        f"features.precision ({features.precision})",
        f"encoder.image_size ({size})",
    ]
    if needed["tokens"]:
        options += token_size_options(config)
        reading = ", ".join(name for name, entry in METHODS.items() if entry.reads == "tokens")
        options.append(f"or leave out the methods that need tokens ({reading})")
    if len(configs) > 1:
        options.append(f"the number of encoders ({len(configs)})")
    sizes = ", ".join(f"{output} {size_text(count)}" for output, count in needed.items() if count)
    others = f", trials' validation logits up to {size_text(other_bytes)}," if other_bytes else ""
    raise ImbvlmError(
        f"the stored features need {size_text(total)} more ({sizes}){others} and {root} has {size_text(free)} free. "
        f"Reduce {', '.join(options)}, or choose a storage folder on a larger disk."
    )


def token_size_options(config: TrialConfig) -> list[str]:
    """The unset options that make stored tokens smaller, each with the fraction of the bytes that remains."""
    fraction = "a half" if config.features.precision == "float16" else "a quarter"
    options = []
    if not config.features.int8_tokens:
        options.append(f"set features.int8_tokens: true ({fraction} of the tokens' bytes)")
    if config.encoder.token_pooling == 1:
        options.append("set encoder.token_pooling: 2 (a quarter of them)")
    return options


def check_cache_size(
    cache: FeatureCacheConfig | None, root: str, outputs: Sequence[OutputName], parts: Sequence[PendingPart]
) -> None:
    """Raise CacheFullError where the cache can't hold all splits of the largest output, which a trial reads."""
    num_bytes = {
        output: sum(part.store.layout.num_bytes(output, part.missing.size) for part in parts) for output in outputs
    }
    if num_bytes:
        largest = max(num_bytes, key=num_bytes.__getitem__)
        _check_cache_fits(cache, f"{largest} of {root}", num_bytes[largest])


def _check_cache_fits(config: FeatureCacheConfig | None, source: str, num_bytes: int) -> None:
    """Raise CacheFullError where the cache can't hold the bytes; for other machines only their limit is known."""
    cache = FeatureCache(config or FeatureCacheConfig())
    if cache.config.max_gigabytes is not None or is_single_node():
        cache.check_fits(source, num_bytes, on_this_machine=is_single_node())
