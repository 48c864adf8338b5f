"""Initial weights of a classifier: class embeddings or class means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import OutputName
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
