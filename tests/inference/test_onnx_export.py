"""An ONNX graph has tower, classifier and adjustments in it, and onnxruntime computes the model's logits from bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from blend_members import adjusted, blend, member, network_of, single
from exported_model import write_model_folder
from tiny_images import TinyImages

import imbvlm
from imbvlm.base.errors import ImbvlmError
from imbvlm.config.method_registry import METHODS
from imbvlm.inference import onnx_export

pytestmark = [pytest.mark.slow]


@pytest.mark.parametrize("method", ["linear_probe", "decoder"])
@pytest.mark.parametrize(
    "kind", ["vit", "resnet", "timm_siglip", "timm_efficientnet", "image_only_vit", "image_only_convnext"]
)
def test_onnxruntime_gives_the_models_probabilities(tmp_path: Path, kind: str, method: str) -> None:
    import onnxruntime

    folder = write_model_folder(tmp_path, kind, method)
    model = imbvlm.load(folder, "cpu")
    assert onnx_export.write_onnx(model, str(folder)) < 0.02
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"))
    side = model.inputs[0].image_size
    crops = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"images": crops.numpy()})
    np.testing.assert_allclose(probabilities, model.probabilities(crops).numpy(), atol=2e-3)
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(dim=1).numpy(), probabilities, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_every_method_is_a_graph_for_batches_of_any_size(tmp_path: Path, method: str) -> None:
    """The written graph is checked with five images, where two were exported."""
    problem = TinyImages(tmp_path / "problem")
    model = single(tmp_path / "model", member(problem, method, post_hoc=adjusted(0.5)))
    assert onnx_export.write_onnx(model, str(tmp_path / "model")) < 0.02


@pytest.mark.parametrize("size", [None, 48])
def test_a_blend_is_one_graph(tmp_path: Path, size: int | None) -> None:
    """All heads on one encoder and a pass of an adapter; or two passes of two sizes, one with five crops."""
    import onnxruntime

    problem = TinyImages(tmp_path / "problem")
    parts = [
        member(problem, "linear_probe", 2, post_hoc=adjusted(0.5, 0.3)),
        member(problem, "decoder", 1, 0.7),
        member(problem, "prototype_cache", 1),
        member(problem, "adapter", 1)
        if size is None
        else member(problem, "class_means", 1, encoder__image_size=size, eval__tte="five_crop", eval__expand=8),
    ]
    model = blend(tmp_path / "blend", parts)
    assert len(network_of(model).passes) == 2
    assert onnx_export.write_onnx(model, str(tmp_path / "blend")) < 0.02
    session = onnxruntime.InferenceSession(str(tmp_path / "blend" / "onnx" / "model.onnx"))
    crops = [model.random_crops(number, 3) for number in range(len(model.inputs))]
    names = ["images"] if size is None else ["images_1", "images_2"]
    assert [(each.name, each.shape) for each in session.get_inputs()] == [
        (name, ["batch", *part.shape[1:]]) for name, part in zip(names, crops, strict=True)
    ]
    feeds = {name: part.numpy() for name, part in zip(names, crops, strict=True)}
    (probabilities,) = session.run(["probabilities"], feeds)
    np.testing.assert_allclose(probabilities, model.probabilities(*crops).numpy(), atol=2e-3)


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model_folder(tmp_path)
    model = imbvlm.load(folder, "cpu")
    export = onnx_export._export

    def other_weights(model: torch.nn.Module, path: Path) -> None:
        export(model, path)
        with torch.no_grad():
            model.network.classifier.classifier.weight.mul_(2)

    monkeypatch.setattr(onnx_export, "_export", other_weights)
    with pytest.raises(ImbvlmError, match="computes other logits than the model"):
        onnx_export.write_onnx(model, str(folder))
    assert not (folder / "onnx").exists()
