"""Exported models as ONNX graphs of encoders and classifiers, whose logits are checked with onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.inference.model_record import input_names
from imbvlm.inference.predictor import Model

ONNX_FILE = "onnx/model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Tolerated difference relative to the largest logit: features that are rounded to half precision may differ by a step.
TOLERANCE = 2e-3
# A protobuf holds at most 2 GB; larger weights go into a second file.
_MAX_GRAPH_BYTES = 1_500_000_000


class _Graph(nn.Module):
    """Maps crops in bytes of each input to adjusted logits and probabilities, (B, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *images: Tensor) -> tuple[Tensor, Tensor]:
        adjusted = self.network(*images)[1]
        return adjusted, adjusted.softmax(dim=1)


def require_onnx() -> None:
    """Raise ImbvlmError if a package of the extra `onnx` is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImbvlmError(f"--onnx needs {', '.join(missing)}. Run `pip install 'imbvlm[onnx]'`.")


def write_onnx(model: Model, folder: str) -> float:
    """Write onnx/model.onnx into a model's folder and return the largest difference of its logits from `model`'s.

    The input `images` (B, 3, S, S) is crops in bytes, as the model's preprocessing makes them: of five crops it takes
    each, whose logits a caller averages. A blend of several sizes has inputs `images_1`, `images_2`, ..., since no
    graph resizes as Pillow does; of five crops such an input takes all, (B, 5, 3, S, S), since the graph adds up what
    other inputs give. The outputs `logits` and `probabilities` (B, C) are adjusted as validation selected. `model` must
    be on the CPU. Raises ImbvlmError if an encoder can't be written as a graph, or if onnxruntime computes other
    logits.
    """
    require_onnx()
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / Path(ONNX_FILE).name
        _export(model, path)
        difference = _largest_difference(model, path)
        for file in sorted(path.parent.iterdir()):
            storage.write_bytes(storage.join(folder, Path(ONNX_FILE).parent.name, file.name), file.read_bytes())
    return difference


def _export(model: Model, path: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.network.state_dict().values())
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Graph(model.network).eval(),
                _crops(model, 2),
                str(path),
                input_names=input_names(model.inputs),
                output_names=["logits", "probabilities"],
                dynamic_shapes={"images": ({0: torch.export.Dim("batch")},) * len(model.inputs)},
                dynamo=True,
                external_data=size > _MAX_GRAPH_BYTES,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise ImbvlmError(
            f"this model can't be written as an ONNX graph: {_first_cause(error)}. Export it without --onnx."
        ) from None
    finally:
        logging.disable(before)


def _first_cause(error: BaseException) -> str:
    """The first cause of an error of torch's exporter, whose own message names only the step."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _largest_difference(model: Model, path: Path) -> float:
    """The largest difference of logits over random crops, in a batch of another size than the exported one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    crops = _crops(model, 5)
    feeds = {name: part.numpy() for name, part in zip(input_names(model.inputs), crops, strict=True)}
    logits = session.run(["logits"], feeds)[0]
    with torch.inference_mode():
        expected = model.network(*crops)[1].numpy()
    difference, largest = float(np.abs(logits - expected).max()), float(np.abs(expected).max())
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise ImbvlmError(
            f"the ONNX graph computes other logits than the model and was not written: they differ by "
            f"{difference:.3g}, and the largest logit is {largest:.3g}. Export it without --onnx."
        )
    return difference


def _crops(model: Model, num_images: int) -> tuple[Tensor, ...]:
    """Random crops of each input; of five crops a graph with one input takes each alone."""
    crops = [model.random_crops(number, num_images) for number in range(len(model.inputs))]
    return (crops[0].flatten(0, -4)[:num_images],) if len(crops) == 1 else tuple(crops)
