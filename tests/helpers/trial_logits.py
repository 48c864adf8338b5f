"""A trained run's logits, for tests that compare them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from imbvlm.features.trial_data import RowSource
from imbvlm.training.trial_run import TrialRun


def trial_logits(run: TrialRun, rows: RowSource) -> Tensor:
    """Float32 logits (N, C) of all rows in order, of their evaluation crops; NaN for an unreadable image."""
    run.model.eval()
    result = torch.full((len(rows), len(run.data.class_names)), math.nan)
    for logits, batch in run._evaluator.outputs(run._forward, rows, np.arange(len(rows))):
        result[torch.from_numpy(batch.examples)] = logits.cpu()
    return result
