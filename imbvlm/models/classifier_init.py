"""Weights that a classifier starts from: class embeddings or class means."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.encoder_info import OutputName
from imbvlm.models.model_inputs import StoredFeatures

# Images whose features are in memory at once while class means are computed.
CHUNK_SIZE = 512


def text_weights(class_embeddings: Tensor, projection: Tensor | None, width: int) -> Tensor:
    """Class embeddings (C, E) through the tower's transposed projection (width, E), normalised: (C, width) [LIFT].

    Raises ImbvlmError where the tower has no projection or one of another width.
    """
    if projection is None:
        raise ImbvlmError(
            "classifier.init is text, and this tower has no projection from its pooled output to the text space; "
            "set classifier.init: class_mean or random"
        )
    if tuple(projection.shape) != (width, class_embeddings.shape[1]):
        raise ImbvlmError(
            f"classifier.init is text, and the tower's projection is {tuple(projection.shape)} where the classifier "
            f"reads {width} features and the text space has {class_embeddings.shape[1]}; "
            "set classifier.init: class_mean or random"
        )
    return functional.normalize(class_embeddings.float() @ projection.float().T, dim=-1)


@torch.no_grad()
def class_means(
    decoder: nn.Module, train: StoredFeatures, reads: OutputName, num_classes: int, width: int, device: torch.device
) -> Tensor:
    """Mean of each class's normalised features as the classifier will receive them, normalised: (C, width).

    The evaluation crop of every training image is used; a class without images has zeros, for which the classifier
    keeps its random start.
    """
    sums = torch.zeros(num_classes, width, dtype=torch.float64)
    for start in range(0, len(train.labels), CHUNK_SIZE):
        index = np.arange(start, min(start + CHUNK_SIZE, len(train.labels)))
        features = decoder(train.batch(reads, index).to(device).float())
        # Added on the CPU: on a GPU the order of additions, and so the last bits, would vary from run to run.
        directions = functional.normalize(features.float(), dim=-1).to("cpu", torch.float64)
        sums.index_add_(0, torch.from_numpy(train.labels[index]), directions)
    return functional.normalize(sums, dim=-1).float()
