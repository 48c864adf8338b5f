"""Initial weights of a classifier: class embeddings or class means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import OutputName
from imbvlm.longtail.taxonomy import Taxonomy
from imbvlm.models.model_inputs import StoredFeatures

# Number of images whose features are in memory at once for class means.
CHUNK_SIZE = 512


def text_weights(class_embeddings: Tensor, projection: Tensor | None, width: int) -> Tensor:
    """Class embeddings (C, E) through the transposed projection (width, E), normalized: (C, width) [LIFT].

    Raises ImbvlmError where the encoder has no projection or one of another width.
    """
    if projection is None:
        raise ImbvlmError(
            "classifier.init: text needs a projection from the encoder's pooled output to the text space, and this "
            "encoder has no projection. Set classifier.init: class_mean or random."
        )
    if tuple(projection.shape) != (width, class_embeddings.shape[1]):
        raise ImbvlmError(
            f"classifier.init: text needs a projection of shape ({width}, {class_embeddings.shape[1]}), and the "
            f"encoder's projection is {tuple(projection.shape)}. Set classifier.init: class_mean or random."
        )
    return functional.normalize(class_embeddings.float() @ projection.float().T, dim=-1)


def centered_by_parent(vectors: Tensor, taxonomy: Taxonomy | None, key: str) -> Tensor:
    """Normalized sums (C, D) of the unit steps that lead from each taxon's parent to it, down to classes (C, D).

    A taxon lies at the mean of its children, and the highest ones have a parent at theirs. An only child takes no step.
    Thus siblings differ as much as families do, however alike their names or photos are. In a tree whose classes have
    one parent this is centering by the mean of all classes. Zeros, of a class without images, stay and don't count.
    `key` is the option; raises ImbvlmError without a taxonomy.
    """
    if taxonomy is None:
        raise ImbvlmError(
            f"{key} needs a tree over the classes, and the manifest has none. Build it with --taxonomy, or set {key}: "
            "false."
        )
    places, is_present = vectors.double(), vectors.any(dim=1)
    total = torch.zeros_like(places)
    children = torch.arange(len(vectors))
    # From the classes up to the root: `children` are the classes' taxa at a rank, and `parents` those above.
    for codes in [*taxonomy.codes[-2::-1], np.zeros(len(vectors), np.int64)]:
        parents = torch.from_numpy(np.ascontiguousarray(codes))
        parent_of = torch.zeros(len(places), dtype=torch.int64).index_copy_(0, children, parents)
        shape = (int(parents.max()) + 1, places.shape[1])
        sums = torch.zeros(shape, dtype=torch.float64).index_add_(0, parent_of, places * is_present[:, None])
        counts = torch.bincount(parent_of, is_present.double(), minlength=len(sums))
        means = sums / counts.clamp(min=1)[:, None]
        # Rounding must not become a direction.
        steps = (places - means[parent_of]) * ((counts[parent_of] > 1) & is_present)[:, None]
        total += functional.normalize(steps, dim=-1)[children]
        places, is_present, children = means, counts > 0, parents
    return functional.normalize(total * vectors.any(dim=1)[:, None], dim=-1).to(vectors.dtype)


@torch.no_grad()
def class_means(
    decoder: nn.Module, train: StoredFeatures, reads: OutputName, num_classes: int, width: int, device: torch.device
) -> Tensor:
    """Mean of each class's normalized features as the classifier will receive them, normalized: (C, width).

    Uses the evaluation crop of every training image. A class without images has zeros.
    """
    sums = torch.zeros(num_classes, width, dtype=torch.float64)
    for start in range(0, len(train.labels), CHUNK_SIZE):
        index = np.arange(start, min(start + CHUNK_SIZE, len(train.labels)))
        features = decoder(train.batch(reads, index).to(device).float())
        # Sums are taken on the CPU: on a GPU the order of additions, and with it the last bits, varies between runs.
        directions = functional.normalize(features.float(), dim=-1).to("cpu", torch.float64)
        sums.index_add_(0, torch.from_numpy(train.labels[index]), directions)
    return functional.normalize(sums, dim=-1).float()
