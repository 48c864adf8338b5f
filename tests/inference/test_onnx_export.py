"""An ONNX graph has tower, classifier and adjustments in it, and onnxruntime computes the model's logits from bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from exported_model import write_model_folder

import imbvlm
from imbvlm.base.errors import ImbvlmError
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
    side = model.preprocess.image_size
    crops = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"images": crops.numpy()})
    np.testing.assert_allclose(probabilities, model.probabilities(crops).numpy(), atol=2e-3)
    np.testing.assert_allclose(torch.from_numpy(logits).softmax(dim=1).numpy(), probabilities, atol=1e-5)


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
