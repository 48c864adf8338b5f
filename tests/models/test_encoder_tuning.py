"""What trains inside a tower trains for real, and nothing else moves; what is saved predicts the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from open_clip.transformer import ResidualAttentionBlock
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from tiny_images import CLASS_COUNTS, TinyImages, extraction_in_this_process
from torch.nn import functional
from trial_logits import trial_logits

from imbvlm.base.errors import ImbvlmError
from imbvlm.cli.train_command import train_one
from imbvlm.config.loss_registry import LOSSES
from imbvlm.config.method_registry import METHODS
from imbvlm.data.images.decoding import decode
from imbvlm.data.manifest import Manifest
from imbvlm.features.trial_data import TrialData
from imbvlm.inference.model_folder import CONFIG_FILE, load, write_model
from imbvlm.models.adapters import Adapter, adapter_width, add_adapters
from imbvlm.models.encoders.encoder_factory import create_encoder
from imbvlm.models.model_builder import build_model
from imbvlm.models.model_state import count_parameters, own_state_dict
from imbvlm.training import checkpoint
from imbvlm.training.step.distributed import DistributedWorkerGroup
from imbvlm.training.trial_run import TrialRun, build_trial

TOWER_METHODS = [name for name, entry in METHODS.items() if entry.trains_encoder]
CASES = [(kind, method) for kind in ("vit", "resnet", "image_only_vit") for method in TOWER_METHODS]
CASES = [case for case in CASES if case not in (("resnet", "adapter"), ("resnet", "lora"))]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyImages]:
    return {kind: TinyImages(tmp_path_factory.mktemp(kind), kind) for kind in ("vit", "resnet", "image_only_vit")}


@pytest.fixture
def vit(problems: dict[str, TinyImages]) -> TinyImages:
    return problems["vit"]


def trial(problem: TinyImages, method: str, **overrides: Any) -> TrialRun:
    config = problem.config(method, **overrides)
    return build_trial(config, problem.data(config))


def numbers(run: TrialRun) -> list[tuple[int, int, dict[str, Any]]]:
    """Everything that a run gave but times."""
    return [
        (r.epoch, r.step, {k: v for k, v in r.metrics.items() if not k.endswith(("seconds", "per_second"))})
        for r in run.epochs()
    ]


# ------------------------------------------------------------------------------------------- what trains


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_training_learns_and_moves_exactly_what_it_should(
    problems: dict[str, TinyImages], kind: str, method: str
) -> None:
    run = (
        trial(problems[kind], method, train__num_epochs=4, fine_tuning__layer_decay=1.0)
        if (method == "fine_tuning")
        else trial(problems[kind], method, train__num_epochs=4)
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    trained = {name for name, param in run.model.named_parameters() if param.requires_grad}
    results = list(run.epochs())
    assert results[-1].metrics["train/loss"] < 0.8 * results[0].metrics["train/loss"]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name


def trained_names(problem: TinyImages, method: str) -> set[str]:
    config = problem.config(method)
    model = build_model(config, problem.data(config).model_inputs, CPU)
    return {name for name, param in model.named_parameters() if param.requires_grad}


def test_what_trains_in_a_vit_by_name(vit: TinyImages) -> None:
    classifier = {"on_features.classifier.weight"}
    adapter = {f"adapters.{block}.{name}" for block in (0, 1) for name in (
        "norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight", "up.bias", "scale")}  # fmt: skip
    assert trained_names(vit, "adapter") == classifier | adapter
    updates = {
        f"tower.transformer.resblocks.{block}.attn.{weight}.0.{part}"
        for block in (0, 1)
        for weight in ("parametrizations.in_proj_weight", "out_proj.parametrizations.weight")
        for part in ("down", "up")
    }
    assert trained_names(vit, "lora") == classifier | updates
    config = vit.config("fine_tuning")
    everything = {name for name, _ in build_model(config, vit.data(config).model_inputs, CPU).named_parameters()}
    # The projection to the text space stands behind what the classifier reads.
    assert trained_names(vit, "fine_tuning") == everything - {"tower.proj"}
    assert trained_names(vit, "bias_tuning") == classifier | {name for name in everything if name.endswith("bias")}


def test_batch_norm_is_frozen_in_a_convolution_tower(problems: dict[str, TinyImages]) -> None:
    names = trained_names(problems["resnet"], "fine_tuning")
    assert not {name for name in names if ".bn" in name or "downsample.1" in name}
    assert {"tower.conv1.weight", "tower.layer4.0.conv3.weight", "tower.attnpool.q_proj.weight"} <= names
    biases = trained_names(problems["resnet"], "bias_tuning")
    assert all(name.endswith("bias") or name.startswith("on_features.") for name in biases)


@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_convolution_towers_are_refused_with_a_fix(problems: dict[str, TinyImages], method: str) -> None:
    with pytest.raises(ImbvlmError, match=r"is a convolution tower\. Choose method bias_tuning or fine_tuning"):
        trial(problems["resnet"], method)


def test_parameters_are_counted_with_the_tower(vit: TinyImages) -> None:
    tower = create_encoder(vit.config("adapter").encoder, vit.config("adapter").eval)
    in_tower = sum(param.numel() for param in tower.image_tower.parameters())
    assert tower.info.num_parameters == in_tower
    counts = {}
    for method in ("linear_probe", *TOWER_METHODS):
        config = vit.config(method)
        counts[method] = count_parameters(build_model(config, vit.data(config).model_inputs, CPU), tower.info)
    classifier = 5 * 32
    assert counts["linear_probe"] == (in_tower + classifier, classifier)
    adapter = 2 * (2 * 32 + 32 + 1 + 32 + 32 + 1)
    assert counts["adapter"] == (in_tower + classifier + adapter, classifier + adapter)
    lora = 2 * (3 * 8 * (32 + 32) + 8 * (32 + 32))
    assert counts["lora"] == (in_tower + classifier + lora, classifier + lora)
    assert counts["fine_tuning"].trained == counts["fine_tuning"].total - tower.image_tower.proj.numel()
    assert counts["bias_tuning"].share < 0.05


# ------------------------------------------------------------------------------------------ where it starts


@pytest.mark.parametrize("method", ["adapter", "lora"])
@pytest.mark.parametrize("kind", ["vit", "timm_vit", "timm_siglip"])
def test_step_0_is_the_towers_own_output(tmp_path: Path, kind: str, method: str) -> None:
    problem = TinyImages(tmp_path, kind)
    config = problem.config(method)
    model = build_model(config, problem.data(config).model_inputs, CPU).eval()
    tower = create_encoder(config.encoder, config.eval)
    size = tower.info.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        found, expected = model.features(images), tower.forward_images(images).pooled
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("num_classes", "num_blocks", "width"),
    [(8142, 12, 256), (1000, 12, 32), (365, 12, 8), (365, 24, 4), (10, 12, 1), (2, 24, 1)],
)
def test_the_adapters_width_is_lifts(num_classes: int, num_blocks: int, width: int) -> None:
    assert adapter_width(num_classes, num_blocks) == width
    assert width == 2 ** max(0, int(math.log2(num_classes / (num_blocks * 2))))


def test_an_adapter_stands_beside_the_mlp(vit: TinyImages) -> None:
    """Against the block's own formula with the adapter written out, after its weights have moved."""
    config = vit.config("adapter", adapter__width=4)
    model = build_model(config, vit.data(config).model_inputs, CPU).eval()
    block, adapter = model.tower.transformer.resblocks[1], model.adapters[1]
    with torch.no_grad():
        for param in adapter.parameters():
            param.add_(0.3 * torch.randn_like(param))
        tokens = torch.randn(2, 17, 32)
        normed = block.ln_1(tokens)
        middle = tokens + block.attn(normed, normed, normed, need_weights=False)[0]
        hidden = functional.layer_norm(middle, (32,), adapter.norm.weight, adapter.norm.bias)
        hidden = (hidden @ adapter.down.weight.T + adapter.down.bias).relu()
        branch = adapter.scale * (hidden @ adapter.up.weight.T + adapter.up.bias)
        # Part for part, as the whole MLP's output has the adapter's in it.
        mlp = block.mlp
        expected = middle + mlp.c_proj(mlp.gelu(mlp.c_fc(block.ln_2(middle)))) + branch
        found = block(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("block", "norm", "factor"),
    [
        (Block(32, 2, init_values=1.0), "norm2", "ls2.gamma"),
        (EvaBlock(32, 2, init_values=1.0), "norm2", "gamma_2"),
        (ResidualAttentionBlock(32, 2, ls_init_value=1.0), "ln_2", "ls_2.gamma"),
    ],
    ids=["timm", "timm_eva", "open_clip"],
)
def test_layer_scale_scales_an_adapter_as_it_does_the_mlp(block: torch.nn.Module, norm: str, factor: str) -> None:
    """Left unscaled it would be seven times too loud in DINOv2's first blocks and five times too quiet in its last."""
    block, plain, middle = block.eval(), copy.deepcopy(block).eval(), []
    factors = torch.linspace(-2, 3, 32)
    plain.get_submodule(norm).register_forward_pre_hook(lambda module, arguments: middle.append(arguments[0]))
    (adapter,) = add_adapters({"block": block}, 4, "a tower")
    tokens = torch.randn(2, 17, 32)
    with torch.no_grad():
        for one in (block, plain):
            one.get_parameter(factor).copy_(factors)
        for param in adapter.parameters():
            param.add_(0.3 * torch.randn_like(param))
        added = block(tokens) - plain(tokens)
        torch.testing.assert_close(added, factors * adapter(middle[0]), atol=1e-5, rtol=1e-5)
    assert added.abs().max() > 0.1


def test_a_low_rank_update_is_added_to_each_matrix(vit: TinyImages) -> None:
    config = vit.config("lora", lora__rank=3, lora__alpha=6.0)
    model = build_model(config, vit.data(config).model_inputs, CPU).eval()
    attention = model.tower.transformer.resblocks[0].attn
    stacked = attention.parametrizations.in_proj_weight
    with torch.no_grad():
        stacked[0].up.normal_()
    expected = stacked.original.clone()
    for matrix in range(3):
        rows = slice(32 * matrix, 32 * (matrix + 1))
        expected[rows] += 6.0 / 3 * stacked[0].up[matrix] @ stacked[0].down[matrix]
    torch.testing.assert_close(attention.in_proj_weight, expected)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    plain = copy.deepcopy(create_encoder(config.encoder, config.eval))
    plain.image_tower.transformer.resblocks[0].attn.in_proj_weight.copy_(expected)
    with torch.no_grad():
        torch.testing.assert_close(model.features(images), plain.forward_images(images).pooled)


@pytest.mark.parametrize("init", ["text", "class_mean"])
def test_a_classifier_starts_as_the_linear_probes(vit: TinyImages, init: str) -> None:
    weights = []
    for method in ("linear_probe", "adapter"):
        config = vit.config(method, classifier__init=init, features__precision="float32")
        model = build_model(config, vit.data(config).model_inputs, CPU)
        weights.append(getattr(model, "on_features", model).classifier.weight)
    # A class without images starts at random.
    known = slice(0, 4) if init == "class_mean" else slice(None)
    assert torch.equal(weights[0][known], weights[1][known])


def test_early_blocks_of_a_fine_tuned_tower_learn_at_lower_rates(problems: dict[str, TinyImages]) -> None:
    run = trial(problems["vit"], "fine_tuning", fine_tuning__layer_decay=0.5, optim__lr=0.1)
    next(run.epochs())
    rates = {}
    for group in run._trainer.optimizer.param_groups:
        for name, param in run.model.named_parameters():
            if any(param is member for member in group["params"]):
                rates[name] = group["lr"] / group["lr_scale"], group["lr_scale"]
    assert len({round(base, 12) for base, _ in rates.values()}) == 1
    scales = {name: scale for name, (_, scale) in rates.items()}
    assert scales["tower.conv1.weight"] == scales["tower.class_embedding"] == 0.125
    assert scales["tower.transformer.resblocks.0.ln_1.weight"] == 0.25
    assert scales["tower.transformer.resblocks.1.mlp.c_fc.weight"] == 0.5
    assert scales["tower.ln_post.weight"] == scales["on_features.classifier.weight"] == 1


# -------------------------------------------------------------------------------- reproducing, saving, loading


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_same_seed_gives_the_same_numbers_and_resuming_changes_none(
    problems: dict[str, TinyImages], kind: str, method: str, tmp_path: Path
) -> None:
    problem, overrides = problems[kind], {"train__num_epochs": 2, "optim__name": "adamw"}
    whole = trial(problem, method, **overrides)
    expected = numbers(whole)
    torch.manual_seed(5)
    first = trial(problem, method, **overrides)
    epochs = first.epochs()
    next(epochs)
    epochs.close()
    checkpoint.save_checkpoint(str(tmp_path), first.state_dict())
    resumed = trial(problem, method, **overrides)
    resumed.load_state_dict(checkpoint.load_checkpoint(str(tmp_path)))
    assert numbers(resumed) == expected[1:]
    assert numbers(trial(problem, method, **overrides)) == expected
    assert all(torch.equal(own_state_dict(resumed.model)[n], t) for n, t in own_state_dict(whole.model).items())


class Stopped(Exception):
    """What ends a run between two of its steps."""


@pytest.mark.parametrize("method", ["adapter", "linear_probe"])
@pytest.mark.parametrize("after", [1, 3, 6])
def test_resuming_within_an_epoch_changes_no_number(vit: TinyImages, method: str, after: int, tmp_path: Path) -> None:
    """4 steps an epoch: in the middle of the first, before its last step, in the middle of the second."""
    store = {"features__store": False} if method == "linear_probe" else {}
    overrides = {"data__class_sampling": "square_root", "loss__name": "balanced_softmax", **store}
    whole = trial(vit, method, **overrides)
    expected = numbers(whole)
    run = trial(vit, method, **overrides)

    def stop() -> None:
        if run.step == after:
            checkpoint.save_checkpoint(str(tmp_path), run.state_dict())
            raise Stopped

    with pytest.raises(Stopped):
        list(run.epochs(stop))
    resumed = trial(vit, method, **overrides)
    resumed.load_state_dict(checkpoint.load_checkpoint(str(tmp_path)))
    assert numbers(resumed) == expected[after // 4 :]
    assert resumed.first_losses == (whole.first_losses if after < 4 else [])
    assert all(torch.equal(own_state_dict(resumed.model)[n], t) for n, t in own_state_dict(whole.model).items())


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_an_exported_model_predicts_the_same_logits(
    problems: dict[str, TinyImages], kind: str, method: str, tmp_path: Path
) -> None:
    problem = problems[kind]
    run = trial(problem, method, train__num_epochs=1)
    list(run.epochs())
    run.model.eval()
    checkpoint.save_model(str(tmp_path / "trained"), run.model)
    saved = checkpoint.load_model_tensors(str(tmp_path / "trained"))
    if method != "fine_tuning":
        frozen = {name for name, p in run.model.named_parameters() if not p.requires_grad}
        assert not frozen & set(saved), "the tower has its own file"
    tower = create_encoder(run.config.encoder, run.config.eval)
    ids = {"17": 0, "40": 1}
    write_model(str(tmp_path / "model"), run.config, saved, tower, run.data.class_names, {}, label_map=ids)
    assert json.loads((tmp_path / "model" / CONFIG_FILE).read_text())["label_map"] == ids
    model = load(tmp_path / "model", "cpu")
    table = Manifest.read(problem.manifest).table
    contents = table.column("bytes").to_pylist()
    rows = run.data.val.manifest_rows
    crops = torch.from_numpy(np.stack([tower.preprocess.apply(decode(contents[row])) for row in rows]))
    assert torch.equal(model.logits(crops), trial_logits(run, run.data.val))
    predicted = model.predict([contents[row] for row in rows], top=1)
    assert [p.labels[0] for p in predicted] == trial_logits(run, run.data.val).argmax(dim=1).tolist()


# -------------------------------------------------------------------------- accumulation, memory, several workers


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_in_parts_gives_the_same_course(vit: TinyImages, loss: str) -> None:
    overrides = {"loss__name": loss, "train__batch_size": 8, "train__num_steps": 8}
    whole = trial(vit, "adapter", **overrides)
    parts = trial(vit, "adapter", **overrides, memory__accumulation=4)
    list(whole.epochs())
    list(parts.epochs())
    assert len(whole.first_losses) >= 7
    assert parts.first_losses == pytest.approx(whole.first_losses, abs=1e-5)
    for name, value in own_state_dict(whole.model).items():
        torch.testing.assert_close(own_state_dict(parts.model)[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_gradient_checkpointing_changes_no_number(problems: dict[str, TinyImages], kind: str, method: str) -> None:
    plain = trial(problems[kind], method, train__num_epochs=1)
    checkpointed = trial(problems[kind], method, train__num_epochs=1, memory__gradient_checkpointing=True)
    assert numbers(checkpointed) == numbers(plain)


def test_bfloat16_trains_with_float32_weights(vit: TinyImages) -> None:
    run = trial(vit, "adapter", train__precision="bfloat16")
    results = list(run.epochs())
    assert results[-1].metrics["train/loss"] < results[0].metrics["train/loss"]
    assert all(param.dtype == torch.float32 for param in run.model.parameters())


WORKER_CASES = [
    ("vit", "adapter", {"loss__name": "lade", "train__batch_size": 25}),
    ("vit", "adapter", {"loss__name": "generalized_reweight", "train__batch_size": 10, "memory__accumulation": 3}),
    ("vit", "fine_tuning", {"loss__name": "balanced_softmax", "train__batch_size": 25}),
    ("vit", "linear_probe", {"features__store": False}),
    ("resnet", "fine_tuning", {"loss__name": "balanced_softmax", "train__batch_size": 25}),
]


def outcome(run: TrialRun) -> dict[str, Any]:
    metrics = [course for _, _, course in numbers(run)]
    return {"first_losses": run.first_losses, "metrics": metrics}


def run_worker(rank: int, world_size: int, folder: Path, cases: list[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found = []
    for config, features in cases:
        data = TrialData.open(config, features)
        found.append(outcome(build_trial(config, data, workers=DistributedWorkerGroup("cpu"))))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_give_one_workers_numbers(tmp_path: Path) -> None:
    """51 images in batches of 25 leave one for the last batch: one of the workers has nothing to do in it.

    One of them can't be read, and either worker may meet it.
    """
    images = {kind: TinyImages(tmp_path / kind, kind, bad=(3,)) for kind in ("vit", "resnet")}
    configs = [
        (kind, images[kind].config(method, train__num_epochs=2, **overrides))
        for kind, method, overrides in WORKER_CASES
    ]
    cases = [(config, images[kind].features(config)) for kind, config in configs]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=run_worker, args=(rank, 2, str(tmp_path), cases)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for number, (kind, config) in enumerate(configs):
        alone = outcome(build_trial(config, images[kind].data(config)))
        assert found[0][number]["metrics"] == found[1][number]["metrics"]
        assert found[0][number]["first_losses"] == pytest.approx(alone["first_losses"], abs=1e-5)
        for mine, reference in zip(found[0][number]["metrics"], alone["metrics"], strict=True):
            assert mine == pytest.approx(reference, abs=1e-4)


# ----------------------------------------------------------------------------- frozen towers on fresh crops


def test_a_frozen_tower_on_images_scores_as_on_stored_features(vit: TinyImages) -> None:
    stored = trial(vit, "linear_probe", classifier__init="text", optim__lr=1e-9, features__precision="float32")
    streamed = trial(vit, "linear_probe", classifier__init="text", optim__lr=1e-9, features__store=False)
    list(stored.epochs())
    list(streamed.epochs())
    torch.testing.assert_close(
        trial_logits(streamed, streamed.data.val), trial_logits(stored, stored.data.val), atol=1e-3, rtol=0
    )
    assert streamed.data.stored.store.read == ()


@pytest.mark.parametrize("method", ["zero_shot", "decoder"])
def test_methods_on_a_frozen_tower_run_without_a_store(vit: TinyImages, method: str) -> None:
    results = list(trial(vit, method, features__store=False).epochs())
    assert "val/balanced_accuracy" in results[-1].metrics


def test_class_means_without_stored_features_are_refused(vit: TinyImages) -> None:
    with pytest.raises(ImbvlmError, match="class_mean needs the stored features"):
        vit.config("adapter", classifier__init="class_mean", features__store=False)


# ------------------------------------------------------------------------------------------------- bad images


def test_an_image_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    bad = (3, sum(CLASS_COUNTS) + 1)
    problem = TinyImages(tmp_path, "vit", files=True, bad=bad)
    run = trial(problem, "adapter", train__num_epochs=2)
    results = list(run.epochs())
    assert set(run.batch_source.unreadable) == set(bad)
    assert "not an image" in run.batch_source.unreadable[3]
    assert results[-1].metrics["data/unreadable_images"] == 2
    assert run.counters(run.data.val).total.sum() == len(run.data.val) - 1
    assert trial_logits(run, run.data.val).isnan().any(dim=1).nonzero().flatten().tolist() == [1]
    strict = problem.config("adapter", data__on_bad_image="strict")
    with pytest.raises(ImbvlmError, match="row 3 of the manifest can't be used: not an image"):
        list(build_trial(strict, problem.data(strict)).epochs())


def test_rows_that_the_store_has_quarantined_are_not_read_again(tmp_path: Path) -> None:
    problem = TinyImages(tmp_path, "vit", bad=(3,))
    stored = problem.config("adapter", classifier__init="class_mean")
    run = build_trial(stored, problem.data(stored))
    list(run.epochs())
    assert 3 not in run.data.train.rows
    assert run.batch_source.unreadable == {}


def test_data_that_has_moved_is_said(tmp_path: Path) -> None:
    problem = TinyImages(tmp_path, "vit", files=True)
    config = problem.config("adapter")
    data = problem.data(config)
    for path in (tmp_path / "images").glob("*.png"):
        path.unlink()
    with pytest.raises(ImbvlmError, match=r"no image of .* could be read. .* file not found. Move the images back"):
        next(build_trial(config, data).epochs())


def test_another_towers_weights_are_refused(vit: TinyImages) -> None:
    config = vit.config("adapter")
    data = vit.data(config)
    changed = dataclasses.replace(data.info, weights_fingerprint="other")
    with pytest.raises(ImbvlmError, match="are not those that this run began with"):
        build_trial(config, dataclasses.replace(data, info=changed))


def test_an_adapter_is_nothing_at_first_and_learns_from_the_first_step() -> None:
    adapter = Adapter(16, 4)
    tokens = torch.randn(2, 5, 16)
    assert (adapter(tokens) == 0).all()
    adapter(tokens).square().sum().backward()
    (adapter(tokens) + tokens).square().sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0


def test_every_augmentation_changes_the_course_and_fresh_crops_change_the_epochs(vit: TinyImages) -> None:
    """At a rate of almost nothing only the images change a loss."""
    still = {"optim__lr": 1e-12, "optim__weight_decay": 0.0, "train__num_epochs": 2, "train__batch_size": 64}
    plain = {"augmentation__min_scale": 1.0, "augmentation__flip": False}
    options = [
        {}, plain, {"augmentation__crop": "growing"}, {"augmentation__color_jitter": 0.5},
        {"augmentation__rand_ops": 2}, {"augmentation__rand_ops": 2, "augmentation__rand_magnitude": 20},
    ]  # fmt: skip
    courses = [numbers(trial(vit, "adapter", **still, **(plain | option if option else {}))) for option in options]
    losses = [[metrics["train/loss"] for _, _, metrics in course] for course in courses]
    assert len({first for first, _ in losses}) == len(options)
    assert all(first != second for first, second in losses)


def test_training_alone_stops_at_the_limit_of_bad_images_before_its_first_step(tmp_path: Path) -> None:
    """`imbvlm train` of a method that streams stores no features, and would meet bad files one epoch later."""
    problem = TinyImages(tmp_path, files=True, bad=(7, 8))
    config = problem.config("bias_tuning", data__max_bad_images=1)
    with extraction_in_this_process(), pytest.raises(ImbvlmError, match="too many images can't be used") as refused:
        train_one(config, str(tmp_path / "runs"), str(tmp_path / "model"), quiet=True)
    assert "7.png" in str(refused.value)
    assert not (tmp_path / "model").exists()
