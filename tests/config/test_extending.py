"""A loss, a second stage and a method of one's own, added to a copy of the package as a stranger would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

LOSS_OPTIONS = """
class Poly1Config(LossSection):
    name: Literal["poly1"] = "poly1"
    epsilon: float = Field(1.0, ge=0)


"""
LOSS_ENTRY = """        "poly1": Loss(
            Poly1Config,
            Lazy("imbvlm.longtail.losses:poly1"),
            summary="Adds epsilon (1 - p) to the cross entropy.",
            paper="Leng et al., ICLR 2022",
        ),
"""
LOSS_FUNCTION = '''
def poly1(
    logits: Tensor,
    targets: Tensor,
    class_counts: Tensor,
    *,
    epsilon: LossOption = 1.0,
    workers: WorkerGroup = SINGLE_WORKER,
) -> Tensor:
    """-log p_y + epsilon (1 - p_y) [Leng et al. 2022]."""
    losses = _nll(F.log_softmax(at_least_float32(logits), dim=-1), targets)
    return _weighted_mean(losses + epsilon * (1 - torch.exp(-losses)), None, workers)
'''
STAGE_OPTIONS = """
class OffsetConfig(TrainedStage):
    name: Literal["offset"] = "offset"
    lr: float = Field(0.1, gt=0)


"""
STAGE_ENTRY = """        "offset": SecondStage(
            OffsetConfig,
            summary="Learns an offset on each class's logit.",
            paper="A stranger, 2026",
            build=Lazy("imbvlm.models.offset_stage:Offset"),
            class_sampling="class_balanced",
            loss="cross_entropy",
        ),
"""
STAGE_MODULE = '''
import torch
from torch import Tensor, nn

from imbvlm.models.second_stage_modules import Classifier, LogitTransform


class Offset(LogitTransform):
    """z + b, b (C,) learned from 0 [a stranger 2026]."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__(classifier)
        self.offset = nn.Parameter(torch.zeros(len(classifier.weight)))

    def adjust(self, logits: Tensor, features: Tensor) -> Tensor:
        return logits + self.offset
'''
TRIAL = """
import pathlib, sys
import imbvlm
from tiny_data import tiny_config, tiny_data
from imbvlm.longtail.losses import build_loss
from imbvlm.training.trial_run import build_trial

assert pathlib.Path(imbvlm.__file__).parent.parent == pathlib.Path.cwd()
config = tiny_config("linear_probe", loss__name="poly1", loss__epsilon=2.0, second_stage__name="offset",
                     second_stage__num_epochs=2)
run = build_trial(config, tiny_data(sys.argv[1]))
losses = [result.metrics["train/loss"] for result in run.epochs()]
assert losses[2] < losses[0], losses
assert run.model.classifier.offset.abs().sum() > 0
assert (build_loss("poly1", [3, 2], epsilon=0.0).entry.summary).startswith("Adds")
print("trained")
"""


def insert(path: Path, anchor: str, text: str) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count(anchor) == 1, (path, anchor)
    path.write_text(source.replace(anchor, text + anchor), encoding="utf-8")


def copy_package(folder: Path) -> Path:
    """The package without its data in a folder."""
    ignored = shutil.ignore_patterns("__pycache__", "*.parquet", "*.safetensors")
    return Path(shutil.copytree(ROOT / "imbvlm", folder / "imbvlm", ignore=ignored))


def run_in_copy(folder: Path, code: str) -> None:
    """Run Python on the package in a folder; the code must print that it has trained."""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "features")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT / 'tests' / 'helpers'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "trained\n", done.stderr


def test_a_loss_and_a_second_stage_of_ones_own_need_an_entry_and_their_code(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    losses, stages = package / "config" / "loss_registry.py", package / "config" / "second_stage_registry.py"
    insert(losses, "@dataclass(frozen=True)\nclass Loss:", LOSS_OPTIONS)
    insert(losses, '        "focal": Loss(', LOSS_ENTRY)
    insert(package / "longtail" / "losses.py", "\ndef focal(", LOSS_FUNCTION)
    insert(stages, "@dataclass(frozen=True)\nclass SecondStage:", STAGE_OPTIONS)
    insert(stages, '        "disalign": SecondStage(', STAGE_ENTRY)
    (package / "models" / "offset_stage.py").write_text(STAGE_MODULE, encoding="utf-8")
    run_in_copy(tmp_path, TRIAL)


METHOD_OPTIONS = """
class HiddenProbeConfig(Section):
    width: int = Field(8, ge=1)


"""
METHOD_ENTRY = """            Method(
                name="hidden_probe",
                summary="Trains a classifier behind a hidden layer.",
                paper="nobody, never",
                reads="pooled",
                section=HiddenProbeConfig,
                build=Lazy("imbvlm.models.hidden_probe:build"),
                restore=Lazy("imbvlm.models.hidden_probe:restore"),
            ),
"""
METHOD_MODULE = """
from torch import nn

from imbvlm.models.classifier import FeatureClassifier, build_classifier


def build(config, inputs, encoder, device):
    return restore(config, inputs.info, len(inputs.class_names), {})


def restore(config, info, num_classes, tensors):
    hidden = nn.Sequential(nn.Linear(info.pooled_width, config.hidden_probe.width), nn.ReLU())
    return FeatureClassifier(hidden, build_classifier(config.classifier, config.hidden_probe.width, num_classes))
"""
METHOD_TRIAL = """
import pathlib, sys
import imbvlm
from tiny_data import tiny_config, tiny_data
from imbvlm.config.trial_config import TrialConfig
from imbvlm.models.model_builder import restore_model
from imbvlm.models.model_state import own_state_dict
from imbvlm.training.trial_run import build_trial

assert pathlib.Path(imbvlm.__file__).parent.parent == pathlib.Path.cwd()
config = tiny_config("hidden_probe", hidden_probe__width=5)
assert TrialConfig.from_tree(config.to_tree()) == config
data = tiny_data(sys.argv[1])
run = build_trial(config, data)
losses = [result.metrics["train/loss"] for result in run.epochs()]
assert losses[-1] < losses[0], losses
restored = restore_model(config, data.info, len(data.class_names), own_state_dict(run.model))
features = data.val.batch("pooled", range(4)).float()
assert (restored(features) == run.model.eval()(features)).all()
print("trained")
"""


def test_a_method_of_ones_own_needs_an_entry_and_a_file(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    methods = package / "config" / "method_registry.py"
    insert(methods, "@dataclass(frozen=True)\nclass Method:", METHOD_OPTIONS)
    insert(methods, "from imbvlm.base.registry import", "from pydantic import Field\n")
    insert(methods, '            Method(\n                name="adapter",', METHOD_ENTRY)
    (package / "models" / "hidden_probe.py").write_text(METHOD_MODULE, encoding="utf-8")
    run_in_copy(tmp_path, METHOD_TRIAL)
