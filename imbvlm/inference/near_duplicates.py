"""Near-duplicates by embedding: images that an encoder takes for mildly changed copies of each other, in chains."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from imbvlm.base import interrupts
from imbvlm.base.errors import ImbvlmError
from imbvlm.base.formatting import pluralize
from imbvlm.config.trial_config import TrialConfig
from imbvlm.data.images.decoding import fetch
from imbvlm.data.manifest import Manifest
from imbvlm.data.manifest_check import Finding
from imbvlm.data.manifest_schema import SPLITS, Rows, content_groups, seeded, split_codes
from imbvlm.data.sources.group_reader import with_groups
from imbvlm.features.extraction import Report, ensure_features
from imbvlm.features.extraction_plan import resolve_compute_dtype
from imbvlm.models.classifier import l2_normalize
from imbvlm.models.encoders.encoder_factory import create_encoder

# Images that are compared with a changed copy of their own and with each other.
SAMPLE_SIZE = 256
# Shares of the changed copies that the threshold finds, and of the images whose nearest other one it may find.
MIN_COPIES, MAX_COPIES, MAX_OTHERS = 0.5, 0.95, 0.05
# A mild change: the sides that a crop keeps, the factors of brightness, and JPEG's quality.
_CROP, _BRIGHTNESS, _QUALITY = 0.95, (0.9, 1.1), 75
# Rows and columns of similarities in memory at a time.
_BLOCK_SIZE = 4096
_BATCH_SIZE = 32
MAX_NAMED = 1000
# Rounding: copies of an image must reach the threshold.
_MAX_SIMILARITY = 0.9999


@dataclass(frozen=True)
class Threshold:
    """The cosine similarity from which on images are near-duplicates, chosen on a sample without labels.

    It is the lowest that the nearest other image in the sample reaches for MAX_OTHERS of the images, but one between
    those that MAX_COPIES and MIN_COPIES of the images have with a mildly changed copy of their own: the nearest images
    of a small set may be near-duplicates themselves. `share_of_copies` and `share_of_others` reach it.
    """

    similarity: float
    num_images: int
    share_of_copies: float
    share_of_others: float

    @staticmethod
    def select(to_copies: Tensor, to_others: Tensor) -> Threshold:
        """The threshold by similarities (S,) of images to their changed copies, and to the nearest other ones."""
        lowest, highest = np.quantile(to_copies.numpy(), [1 - MAX_COPIES, 1 - MIN_COPIES], method="lower")
        of_others = np.quantile(to_others.numpy(), 1 - MAX_OTHERS, method="higher")
        similarity = float(min(max(lowest, of_others), highest, _MAX_SIMILARITY))
        shares = (float((values >= similarity).double().mean()) for values in (to_copies, to_others))
        return Threshold(similarity, len(to_copies), *shares)


@dataclass(frozen=True)
class NearDuplicates:
    """The chain (N,) of each row of a manifest, equal for rows that near-duplicates connect.

    `pairs` are some near-duplicates in different splits: two rows and their similarity.
    """

    encoder: str
    threshold: Threshold
    chains: Rows
    pairs: tuple[tuple[int, int, float], ...]

    @property
    def sizes(self) -> list[int]:
        """The images of each chain of two or more, the largest first."""
        sizes = np.bincount(self.chains)
        return sorted(sizes[sizes > 1].tolist(), reverse=True)

    def findings(self, manifest: Manifest) -> Iterator[Finding]:
        """Findings for a check of the manifest."""
        threshold = self.threshold
        rule = (
            f"near-duplicates are images with a cosine similarity of {threshold.similarity:.3f} by {self.encoder}, "
            f"which {100 * threshold.share_of_copies:.0f} % of {pluralize(threshold.num_images, 'image')} have with a "
            f"mildly changed copy of their own, and {100 * threshold.share_of_others:.0f} % with another one of them"
        )
        yield Finding("note", rule)
        if threshold.share_of_others > 2 * MAX_OTHERS:
            what = f"{self.encoder} hardly tells images from copies, or many are near-duplicates; try a larger encoder"
            yield Finding("warning", what)
        splits = split_codes(manifest.table.column("split"))
        in_splits = np.unique(np.stack([self.chains, splits]), axis=1)[0]
        num_across = int((np.bincount(in_splits) > 1).sum())
        if self.pairs:
            uris, labels = manifest.table.column("uri"), manifest.labels

            def name(row: int) -> str:
                where = f"{SPLITS[splits[row]]}; {manifest.class_names[labels[row]]}"
                return f"{uris[row].as_py() or f'row {row}'} ({where})"

            shown = tuple(f"{name(first)} and {name(second)}, {value:.3f}" for first, second, value in self.pairs)
            yield Finding("warning", f"{pluralize(num_across, 'chain')} of near-duplicates in two splits", shown)
        if self.sizes:
            counts = Counter(self.sizes)
            sizes = tuple(f"{number:,} of {size:,}" for size, number in sorted(counts.items()))
            what = f"{pluralize(len(self.sizes), 'chain')} of near-duplicates with {sum(self.sizes):,} images"
            yield Finding("note", f"{what}, the largest of {self.sizes[0]:,}; by their sizes", sizes)

    def grouped(self, manifest: Manifest) -> Manifest:
        """The manifest with a group for each chain, joined with the groups that it has.

        Raises ImbvlmError where there is none, or all images are in one.
        """
        has_names = "group" in manifest.table.column_names
        names = manifest.table.column("group").to_pylist() if has_names else [None] * len(manifest)
        first_of: dict[str, int] = {}
        rows = [(first_of.setdefault(name, row), row) for row, name in enumerate(names) if name is not None]
        joined = join(self.chains, *np.array(rows, dtype=np.int64).reshape(-1, 2).T)
        name_of = {int(joined[row]): name for name, row in reversed(first_of.items())}
        sizes = np.bincount(joined)
        groups = [name_of.get(chain, f"near row {chain}" if sizes[chain] > 1 else None) for chain in joined.tolist()]
        return with_groups(manifest, groups, f"near-duplicates by {self.encoder}")


def find_near_duplicates(
    manifest: Manifest, location: str, encoder: str, root: str, *, seed: int = 0, report: Report
) -> NearDuplicates:
    """The near-duplicates of a manifest by an encoder's pooled features, which are stored below `root` as for a sweep.

    Raises ImbvlmError for an encoder that can't be loaded, or without two images that can be read.
    """
    tree = {"data": {"manifest": location}, "encoder": {"name": encoder}, "method": "linear_probe"}
    config = TrialConfig.from_tree(tree)
    features = ensure_features(config, manifest, root, frozenset({"pooled"}), manifest.splits, report=report)
    parts, read_rows = [], []
    for split in manifest.splits:
        store = features.store(split)
        is_read = np.flatnonzero(store.ok)
        parts.append(store.gather("pooled", is_read).flatten(1))
        read_rows.append(manifest.rows_of(split)[is_read])
    rows, values = np.concatenate(read_rows), torch.cat(parts)
    if len(rows) < 2:
        raise ImbvlmError(
            f"near-duplicates need 2 images that can be read, got {len(rows)}. `imbvlm manifest check MANIFEST "
            "--decode` says what is wrong with the others."
        )
    report("near-duplicates: comparing images with mildly changed copies of their own")
    copies, splits = content_groups(manifest.table), split_codes(manifest.table.column("split"))
    sample = np.sort(seeded(seed).permutation(len(rows))[:SAMPLE_SIZE])
    of_sample = l2_normalize(values[torch.from_numpy(sample)].float())
    changed = l2_normalize(_encode_changed(config, manifest, rows[sample], seed))
    others = of_sample @ of_sample.T
    ids = torch.from_numpy(copies[rows[sample]])
    others[ids[:, None] == ids] = -1
    threshold = Threshold.select((of_sample * changed).sum(dim=1), others.amax(dim=1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chains, pairs = np.arange(len(manifest)), list[tuple[int, int, float]]()
    num_blocks = math.ceil(len(rows) / _BLOCK_SIZE)
    for number, (first, second, similarity) in enumerate(similar_pairs(values, threshold.similarity, device)):
        interrupts.check()
        report(f"near-duplicates: block {number + 1:,} of {num_blocks * (num_blocks + 1) // 2:,}")
        first, second = rows[first], rows[second]
        chains = join(chains, first, second)
        is_across = np.flatnonzero((splits[first] != splits[second]) & (copies[first] != copies[second]))
        pairs += [
            (int(first[pair]), int(second[pair]), float(similarity[pair]))
            for pair in is_across[: MAX_NAMED - len(pairs)]
        ]
    # Copies that could not be read stay with the others.
    _, first_copy, copy_of = np.unique(copies, return_index=True, return_inverse=True)
    chains = join(chains, first_copy[copy_of], np.arange(len(manifest)))
    return NearDuplicates(encoder, threshold, chains, tuple(sorted(pairs, key=lambda pair: -pair[2])))


def similar_pairs(values: Tensor, threshold: float, device: str = "cpu") -> Iterator[tuple[Rows, Rows, Rows]]:
    """For each block of the similarities of rows (N, D), the pairs that reach the threshold and their similarities.

    Each pair occurs once; only a block of the similarities is in memory.
    """
    for start in range(0, len(values), _BLOCK_SIZE):
        rows = l2_normalize(values[start : start + _BLOCK_SIZE].to(device).float())
        for other in range(start, len(values), _BLOCK_SIZE):
            similarity = rows @ l2_normalize(values[other : other + _BLOCK_SIZE].to(device).float()).T
            hits = similarity >= threshold
            first, second = (hits.triu(1) if other == start else hits).nonzero(as_tuple=True)
            values_of_pairs = similarity[first, second].cpu().numpy()
            yield first.cpu().numpy() + start, second.cpu().numpy() + other, values_of_pairs


def join(chains: Rows, first: Rows, second: Rows) -> Rows:
    """The chains (N,) after joining those of rows `first` with those of rows `second` (P,); a chain is its lowest row.

    `chains` must be such ids, as `np.arange(N)` is.
    """
    if not len(first):
        return chains
    pairs = np.unique(np.sort(np.stack([chains[first], chains[second]]), axis=0), axis=1)
    lowest = np.arange(len(chains))
    while True:
        ends = np.sort(lowest[pairs], axis=0)
        if np.array_equal(ends[0], ends[1]):
            return lowest[chains]
        np.minimum.at(lowest, ends[1], ends[0])
        while not np.array_equal(lowest, lowest[lowest]):
            lowest = lowest[lowest]


def mildly_changed(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A copy as by another export: cropped and so shifted by a twentieth, of other brightness, compressed as JPEG."""
    sizes = [max(1, round(_CROP * side)) for side in picture.size]
    left, top = (int(rng.integers(side - size + 1)) for side, size in zip(picture.size, sizes, strict=True))
    cropped = picture.crop((left, top, left + sizes[0], top + sizes[1]))
    file = io.BytesIO()
    ImageEnhance.Brightness(cropped).enhance(rng.uniform(*_BRIGHTNESS)).save(file, "JPEG", quality=_QUALITY)
    return Image.open(file).convert("RGB")


def _encode_changed(config: TrialConfig, manifest: Manifest, rows: Rows, seed: int) -> Tensor:
    """Pooled features (S, D) of mildly changed copies of rows (S,)."""
    encoder = create_encoder(config.encoder, config.eval)
    encoder.compute_in(resolve_compute_dtype(config, encoder.info))
    if torch.cuda.is_available():
        encoder.to("cuda")
    uris, data, parts = manifest.table.column("uri"), manifest.table.column("bytes"), []
    for start in range(0, len(rows), _BATCH_SIZE):
        interrupts.check()
        batch = []
        for row in rows[start : start + _BATCH_SIZE].tolist():
            picture = encoder.preprocess.decode(fetch(uris[row].as_py(), data[row].as_py()))
            batch.append(encoder.preprocess.apply(mildly_changed(picture, np.random.default_rng((seed, row)))))
        parts.append(encoder.forward_images(torch.from_numpy(np.stack(batch))).pooled.cpu().float())
    return torch.cat(parts)
