"""Bytes that stored features take, and checks of the disk before they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import size_text
from imbvlm.config.encoder_info import OUTPUT_NAMES, EncoderInfo, OutputName
from imbvlm.config.method_registry import METHODS
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.preprocess import FIVE_CROPS
from imbvlm.data.manifest import Manifest
from imbvlm.features.extraction_plan import PendingPart, _layout, _num_views, _parts, _store_key, few_shot_rows
from imbvlm.features.feature_cache import DEFAULT_COPIES, Copies
from imbvlm.features.feature_store import FeatureStore
from imbvlm.features.store_layout import STORE_FILE
from imbvlm.models.encoders.encoder_factory import create_encoder, describe_encoder
from imbvlm.ray_runtime.cluster_resources import is_single_node
from imbvlm.ray_runtime.connection import existing_cluster

# What lies beside a store's numbers: rows, reasons, Arrow's own words.
DISK_MARGIN = 1.02


def store_bytes(
    config: TrialConfig, manifest: Manifest, outputs: frozenset[OutputName], splits: Sequence[str]
) -> dict[OutputName, int]:
    """Bytes on disk of each output over some official splits; needs no weights."""
    info = describe_encoder(config.encoder)
    sizes = _sizes(config, manifest, splits)
    if config.eval.tte == "five_crop" and "test" in splits:
        sizes.append((len(manifest.rows_of("test")), len(FIVE_CROPS)))
    layouts = [_layout(config, info, count, num_rows, "") for num_rows, count in sizes if num_rows]
    stored = [output for output in OUTPUT_NAMES if output in outputs and config.features.store]
    return {output: sum(layout.num_bytes(output) for layout in layouts) for output in stored}


def trial_bytes(config: TrialConfig, manifest: Manifest, outputs: frozenset[OutputName]) -> int:
    """What one trial reads at the most: a refit reads its output of all splits, and image embeddings of the test."""
    each = store_bytes(config, manifest, outputs, manifest.splits)
    beside = frozenset[OutputName]({"image_embedding"}) & outputs if "test" in manifest.splits else frozenset()
    of_test = store_bytes(config, manifest, beside, ("test",)).get("image_embedding", 0)
    return max((count + (of_test if output != "image_embedding" else 0) for output, count in each.items()), default=0)


def check_disk_space(
    configs: Sequence[TrialConfig],
    manifest: Manifest,
    root: str,
    outputs: frozenset[OutputName],
    *,
    copies: Copies = DEFAULT_COPIES,
    other_bytes: int = 0,
) -> None:
    """Refuse, before the first of the passes for these towers, what the disk can't hold of all splits of all of them.

    Or what no machine could hold a copy of. `other_bytes` are what trials will write to that disk. Raises ImbvlmError.
    """
    root, free = storage.absolute(root), storage.free_bytes(root)
    whole = sum(sum(store_bytes(config, manifest, outputs, manifest.splits).values()) for config in configs)
    # What is there already is looked up, with the towers' weights, only where that matters.
    if free is not None and whole * DISK_MARGIN + other_bytes > free:
        works = [work for config in configs for work in _works_left(config, manifest, root, outputs, manifest.splits)]
        # Towers may share a store.
        _check_disk(configs, root, list({work.store.folder: work for work in works}.values()), other_bytes)
    if not storage.is_local(root):
        for config in configs:
            _check_copy(
                copies, f"what a trial of {config.encoder.name} reads of {root}", trial_bytes(config, manifest, outputs)
            )


def num_crops(config: TrialConfig, manifest: Manifest, splits: Sequence[str]) -> int:
    """Crops of some official splits that training and evaluation read."""
    return sum(num_rows * num_views for num_rows, num_views in _sizes(config, manifest, splits))


def _sizes(config: TrialConfig, manifest: Manifest, splits: Sequence[str]) -> list[tuple[int, int]]:
    """Rows and views of what is stored of some official splits, five crops aside."""
    sizes = [(len(manifest.rows_of(split)), _num_views(config, split)) for split in splits]
    if "train" in splits and config.features.tail_views is not None:
        sizes.append((len(few_shot_rows(manifest)), config.features.tail_views))
    return sizes


def bytes_per_image(config: TrialConfig, info: EncoderInfo, outputs: frozenset[OutputName]) -> int:
    """Bytes of these outputs of one crop."""
    layout = _layout(config, info, 1, 1, "")
    return sum(layout.num_bytes(output) for output in outputs)


@existing_cluster()
def pending_images(
    config: TrialConfig, manifest: Manifest, root: str, outputs: frozenset[OutputName], splits: Sequence[str]
) -> tuple[int, int]:
    """Crops that a pass would still compute, and bytes that it would still write, by the shards that are there now.

    Needs the weights; writes nothing, and takes a shard that is there for whole. Raises ImbvlmError.
    """
    works = _works_left(config, manifest, root, outputs, splits)
    return sum(work.num_images for work in works), sum(work.num_bytes(output) for work in works for output in outputs)


def _works_left(
    config: TrialConfig, manifest: Manifest, root: str, outputs: frozenset[OutputName], splits: Sequence[str]
) -> list[PendingPart]:
    """What `pending_images` counts."""
    encoder, found = create_encoder(config.encoder, config.eval), []
    for part in _parts(config, manifest, encoder, splits, ("test",) if "test" in splits else ()):
        rows = part.rows(manifest)
        key = _store_key(config, rows, encoder, part)
        folder = storage.join(root, key.digest)
        layout = _layout(config, encoder.info, key.num_views, len(rows), key.digest)
        store = FeatureStore(folder, layout)
        if storage.exists(storage.join(folder, STORE_FILE)):
            store = FeatureStore.open(folder)
        missing = {
            output: sorted(set(range(store.layout.num_shards)) - set(store.present(output)))
            for output in OUTPUT_NAMES
            if output in outputs and config.features.store
        }
        shards = {s: tuple(o for o in missing if s in missing[o]) for s in _any_of(missing)}
        found.append(PendingPart(part, store, rows, shards))
    return found


def _any_of(missing: Mapping[OutputName, Sequence[int]]) -> list[int]:
    return sorted({shard for shards in missing.values() for shard in shards})


def _check_disk(configs: Sequence[TrialConfig], root: str, works: Sequence[PendingPart], other_bytes: int = 0) -> None:
    needed = {output: sum(work.num_bytes(output) for work in works) for output in OUTPUT_NAMES}
    total, free = sum(needed.values()), storage.free_bytes(root)
    if free is None or not total or total * DISK_MARGIN + other_bytes <= free:
        return
    config = configs[0]
    features = config.features
    knobs = [f"features.num_views ({features.num_views})", f"features.precision ({features.precision})"]
    if features.tail_views is not None:
        knobs.insert(1, f"features.tail_views ({features.tail_views})")
    size = config.encoder.image_size or "the tower's own"
    knobs.append(f"encoder.image_size ({size})")
    if needed["tokens"]:
        knobs += token_size_options(config)
        reading = ", ".join(name for name, entry in METHODS.items() if entry.reads == "tokens")
        knobs.append(f"or leave out the methods that need tokens ({reading})")
    if len(configs) > 1:
        knobs.append(f"the number of towers ({len(configs)})")
    parts = ", ".join(f"{output} {size_text(count)}" for output, count in needed.items() if count)
    others = f", trials' validation logits up to {size_text(other_bytes)}," if other_bytes else ""
    raise ImbvlmError(
        f"the stored features need {size_text(total)} more ({parts}){others} and {root} has {size_text(free)} free; "
        f"reduce {', '.join(knobs)}, or choose a storage folder on a larger disk"
    )


def token_size_options(config: TrialConfig) -> list[str]:
    """What makes stored tokens smaller and isn't set yet, with the share of bytes that it leaves of them."""
    share = "a half" if config.features.precision == "float16" else "a quarter"
    knobs = [] if config.features.int8_tokens else [f"set features.int8_tokens: true ({share} of the tokens' bytes)"]
    return knobs if config.encoder.token_pooling > 1 else [*knobs, "set encoder.token_pooling: 2 (a quarter of them)"]


def _check_copies(copies: Copies, root: str, outputs: Sequence[OutputName], works: Sequence[PendingPart]) -> None:
    """A trial reads all splits of an output together."""
    num_bytes = {output: sum(work.store.layout.num_bytes(output) for work in works) for output in outputs}
    if num_bytes:
        largest = max(num_bytes, key=num_bytes.__getitem__)
        _check_copy(copies, f"{largest} of {root}", num_bytes[largest])


def _check_copy(copies: Copies, what: str, num_bytes: int) -> None:
    """Refuse what a machine could never hold; of other machines only the limit is known, and not the disk."""
    if copies.max_gigabytes is not None or is_single_node():
        copies.check_fits(what, num_bytes, here=is_single_node())
