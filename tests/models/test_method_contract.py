"""The contract of METHODS: every entry, and every method that trains on a debug-size ViT and convolution tower.

What trains inside the tower has the same checks in test_encoder_tuning.py, beside its own.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_images import TinyImages
from trial_logits import trial_logits

from imbvlm.base.errors import ImbvlmError
from imbvlm.config.input_sections import EncoderConfig
from imbvlm.config.method_registry import METHODS
from imbvlm.data.images.decoding import decode
from imbvlm.data.manifest import Manifest
from imbvlm.inference.model_folder import load, write_model
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_builder import build_model, refusals
from imbvlm.models.model_inputs import ModelInputs
from imbvlm.training import checkpoint
from imbvlm.training.trial_run import TrialRun, build_trial

FROZEN = [name for name, entry in METHODS.items() if entry.trains and not entry.trains_encoder]
RATES = {"prompt_tuning": {"optim__lr": 0.05}, "decoder": {"decoder__depth": 1}}
KINDS = ("vit", "resnet", "image_only_vit")
CASES = [(kind, name) for kind in KINDS for name in FROZEN if (kind, name) != ("image_only_vit", "prompt_tuning")]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyImages]:
    return {kind: TinyImages(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def trial(problem: TinyImages, method: str, **overrides: Any) -> TrialRun:
    config = problem.config(method, **{"train__num_epochs": 5, **RATES.get(method, {}), **overrides})
    return build_trial(config, problem.data(config))


def numbers(run: TrialRun) -> list[dict[str, Any]]:
    """Everything that a run gave but times."""
    return [{k: v for k, v in r.metrics.items() if not k.endswith(("seconds", "per_second"))} for r in run.epochs()]


def weights(run: TrialRun) -> dict[str, torch.Tensor]:
    """Of the model, and of the text tower that prompts are read by."""
    text = getattr(getattr(run.model, "on_features", run.model), "_text", None)
    return {**run.model.state_dict(), **({} if text is None else text.tower.state_dict(prefix="text."))}


PARAMETERS = {
    "build": ["config", "inputs", "encoder", "device"],
    "restore": ["config", "info", "num_classes", "tensors"],
    "install": ["encoder", "config", "num_classes"],
    "refuse": ["config", "info"],
}


@pytest.mark.parametrize("method", METHODS)
def test_an_entry_says_what_it_is_and_names_functions_that_are_called_as_all_are(method: str) -> None:
    entry = METHODS[method]
    assert entry.summary[0].isupper()
    assert entry.summary.endswith(".")
    assert any(f"{year}" in entry.paper for year in range(2014, 2027))
    for name, parameters in PARAMETERS.items():
        function = getattr(entry, name)
        if function is not None:
            assert list(inspect.signature(function.load()).parameters) == parameters


@pytest.mark.parametrize("method", METHODS)
def test_sections_that_vary_images_or_features_are_read_where_a_trial_has_them(method: str) -> None:
    entry = METHODS[method]
    of_images, of_features = {"augmentation", "memory"}, {"feature_augmentation", "second_stage"}
    assert bool(entry.sections & of_images) == entry.trains_encoder
    assert not (entry.trains_encoder and entry.sections & of_features)
    assert entry.packs is None or (entry.trains and not entry.trains_encoder)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_needs_text_and_the_encoder_where_it_says_so(problems: dict[str, TinyImages], method: str) -> None:
    """Built without class embeddings, and on stored features without an encoder."""
    entry, problem = METHODS[method], problems["vit"]
    config = problem.config(method)
    inputs = problem.data(config).model_inputs
    assert refusals(config, inputs.info) == []

    def builds(inputs: ModelInputs) -> bool:
        try:
            build_model(config, inputs, torch.device("cpu"))
        except ImbvlmError:
            return False
        return True

    assert builds(replace(inputs, class_embeddings=None)) != entry.needs_text
    nowhere = EncoderConfig(name="local-dir:/nowhere")
    assert builds(replace(inputs, encoder=nowhere)) != (entry.needs_encoder or entry.trains_encoder)


@pytest.mark.parametrize("stored", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "method"), CASES)
def test_on_a_frozen_tower(
    problems: dict[str, TinyImages], kind: str, method: str, stored: bool, tmp_path: Path
) -> None:
    """Its loss falls, the tower stays bit for bit, the seed decides every number, and what is saved predicts it."""
    problem = problems[kind]
    run = trial(problem, method, features__store=stored)
    trained = {name for name, param in run.model.named_parameters() if param.requires_grad}
    before = {name: value.clone() for name, value in weights(run).items()}
    found = numbers(run)
    assert found[-1]["train/loss"] < 0.9 * found[0]["train/loss"]
    # What a prompt classifier keeps of its learned context is worked out from it.
    made = trained | {name for name in before if name.endswith("class_embeddings")}
    assert {name for name, value in weights(run).items() if not torch.equal(value, before[name])} <= made
    assert all(not torch.equal(weights(run)[name], before[name]) for name in trained)
    torch.manual_seed(11)
    assert numbers(trial(problem, method, features__store=stored)) == found

    checkpoint.save_model(str(tmp_path / "trained"), run.model.eval())
    tower = create_encoder(run.config.encoder, run.config.eval)
    saved = checkpoint.load_model_tensors(str(tmp_path / "trained"))
    write_model(str(tmp_path / "model"), run.config, saved, tower, run.data.class_names, {})
    model = load(tmp_path / "model", "cpu")
    manifest = Manifest.read(problem.manifest)
    contents = manifest.table.column("bytes").to_pylist()
    crops = torch.from_numpy(np.stack([tower.preprocess.apply(decode(contents[r])) for r in manifest.rows_of("val")]))
    # Batches of other sizes round otherwise, before what is stored is rounded to half precision.
    torch.testing.assert_close(
        model.logits(crops), trial_logits(run, run.data.val), atol=0.02 if stored else 1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_a_decoder_of_depth_0_under_the_towers_frozen_norm_is_a_linear_probe(
    problems: dict[str, TinyImages], classifier: str
) -> None:
    """On a ViT whose pooled output is its normed class token: the same start and the same course."""
    overrides = {"features__precision": "float32", "classifier__kind": classifier, "classifier__init": "class_mean"}
    probe = trial(problems["vit"], "linear_probe", **overrides)
    decoder = trial(problems["vit"], "decoder", **overrides, decoder__depth=0)
    # The class without images starts at random in either.
    decoder.model.classifier.load_state_dict(probe.model.classifier.state_dict())
    decoder.model.decoder.requires_grad_(False)
    assert {type(module).__name__ for module in decoder.model.decoder.children()} <= {
        "LayerNorm",
        "Identity",
        "ModuleList",
    }
    decoder._trainer.params = {name: one for name, one in decoder._trainer.params.items() if one.requires_grad}
    assert set(decoder._trainer.params) == set(probe._trainer.params)
    list(probe.epochs())
    list(decoder.epochs())
    assert decoder.first_losses == pytest.approx(probe.first_losses, abs=1e-5)
    torch.testing.assert_close(
        trial_logits(decoder, decoder.data.val), trial_logits(probe, probe.data.val), atol=1e-4, rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm_efficientnet", "timm_convnext", "image_only_convnext"])
@pytest.mark.parametrize("method", ["linear_probe", "bias_tuning", "fine_tuning"])
def test_other_convolution_towers_train_too(tmp_path: Path, kind: str, method: str) -> None:
    problem = TinyImages(tmp_path, kind)
    layers = {"fine_tuning__layer_decay": 1.0} if method == "fine_tuning" else {}
    found = numbers(trial(problem, method, train__num_epochs=4, **layers))
    assert found[-1]["train/loss"] < found[0]["train/loss"]


MEMORY = """
import resource, sys, torch
from imbvlm.config.input_sections import EncoderConfig, EvalConfig
from imbvlm.config.model_sections import PromptTuningConfig
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.prompt_learner import build_prompt_classifier, prompt_tokens
from imbvlm.models.text_tower import TextTower

encoder = create_encoder(EncoderConfig(name="tinylit_lite0"), EvalConfig())
names = [f"Genus{number} species" for number in range(int(sys.argv[1]))]
tower = TextTower(encoder.text.model, encoder.text.config)
config = PromptTuningConfig(chunk_size=int(sys.argv[2]))
tokens = prompt_tokens(encoder.text, names, None)
model = build_prompt_classifier(config, tower, tokens, encoder.info, torch.device("cpu")).train()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(torch.randn(32, encoder.info.embedding_width)).logsumexp(dim=1).sum().backward()
assert model.context.grad.abs().sum() > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_context_of_8142_classes_trains_in_the_memory_of_a_chunk() -> None:
    """Mebibytes that one step adds, through the text tower in the package."""

    def added(num_classes: int, chunk_size: int) -> int:
        # Freed memory goes back at once, so that what is seen is what is held.
        returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        arguments = [sys.executable, "-c", MEMORY, str(num_classes), str(chunk_size)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, env={**os.environ, **returned})
        return int(done.stdout)

    chunked, whole = added(8142, 256), added(2048, 2048)
    # A quarter of the classes at once needs several times as much.
    assert chunked < whole / 2
