"""The members of an exported model, and the time of each of its passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from imbvlm.base.formatting import percent
from imbvlm.inference.model_record import ModelRecord
from imbvlm.inference.predictor import Model

_HEADINGS = ("member", "weight (%)", "method", "pass", "encoder", "pixels", "crops", "ms an image")
_NUM_RUNS = 3


def pass_milliseconds(model: Model, num_images: int = 8) -> list[float]:
    """Milliseconds that each pass takes for an image on the model's device: the encoder, and all heads on it.

    The median of three batches of `num_images` images, after one to start with. Reading, decoding and resizing the
    image are not included.
    """
    return [
        1000 * statistics.median(_seconds(module, model.random_crops(number, num_images))) / num_images
        for module, number in model.network.passes
    ]


def _seconds(module: torch.nn.Module, crops: Tensor) -> list[float]:
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + _NUM_RUNS):
            start = time.perf_counter()
            module(crops)
            if crops.is_cuda:
                torch.cuda.synchronize(crops.device)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def member_table(record: ModelRecord, milliseconds: Sequence[float] = ()) -> list[list[str]]:
    """A heading, and a row for each member: its share of the weights, its pass, and that pass's milliseconds.

    `milliseconds` are those of `pass_milliseconds`; without them the last column is left out.
    """
    total = sum(member.weight for each in record.passes for member in each.members)
    rows = [list(_HEADINGS)]
    for number, each in enumerate(record.passes, 1):
        preprocess = record.inputs[each.input]
        cost = f"{milliseconds[number - 1]:.1f}" if milliseconds else ""
        for member in each.members:
            sizes = (str(number), each.encoder, str(preprocess.image_size), str(preprocess.num_crops))
            rows.append([member.name, percent(member.weight / total), member.config.method, *sizes, cost])
    return rows if milliseconds else [row[:-1] for row in rows]
