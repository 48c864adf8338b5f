"""Several workers give one worker's numbers, with Ray Train or without; the in-process numbers are the reference."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_data import tiny_config, tiny_data, tiny_features, with_text_tower
from tiny_images import TinyImages

from imbvlm.base.errors import ImbvlmError
from imbvlm.features.feature_set import FeatureSet
from imbvlm.features.trial_data import TrialData
from imbvlm.training.checkpoint import save_checkpoint
from imbvlm.training.step.distributed import DistributedWorkerGroup
from imbvlm.training.trial_run import TrialRun, build_trial
from imbvlm.training.trial_session import TrialReport, TrialSession, TrialSettings, from_result

# What a machine, not a seed, decides: times, and the memory of a process that did other things before.
TIMES = ("seconds", "per_second", "peak_bytes")
# 227 images in batches of 113 leave one image for the last batch: one of two workers has nothing to do in it.
CASES = [
    ("linear_probe", {"loss__name": "lade", "train__batch_size": 113}),
    ("linear_probe", {"loss__name": "generalized_reweight", "train__batch_size": 50, "optim__name": "adamw"}),
    ("decoder", {"loss__name": "balanced_softmax", "train__batch_size": 113, "classifier__init": "class_mean"}),
    ("decoder", {"loss__name": "ldam", "loss__reweight_from": 0.5, "train__batch_size": 64}),
    (
        "decoder",
        {
            "train__num_epochs": 2,
            "train__batch_size": 113,
            "second_stage__name": "disalign",
            "second_stage__num_epochs": 2,
        },
    ),
    ("linear_probe", {"feature_augmentation__transfer": 0.7, "train__batch_size": 113}),
    ("linear_probe", {"second_stage__name": "classifier_retraining", "second_stage__num_epochs": 2}),
    ("linear_probe", {"classifier__kind": "linear", "second_stage__name": "tau_normalization"}),
    ("prompt_tuning", {"loss__name": "lade", "optim__lr": 0.1, "prompt_tuning__chunk_size": 4}),
    ("zero_shot", {}),
]


def outcome(run: TrialRun) -> dict[str, int | dict[str, float | list[float | list]] | list[float | dict[str, float]]]:
    """What a run gave, as JSON has it."""
    results = list(run.epochs())
    metrics = [{k: v for k, v in r.metrics.items() if not k.endswith(TIMES)} for r in results]
    weights = {name: value.tolist() for name, value in run.model.state_dict().items()}
    predicted = run.evaluate_full(run.data.val).predicted.tolist()
    return {
        "first_losses": run.first_losses,
        "metrics": metrics,
        "step": run.step,
        "weights": weights,
        "predicted": predicted,
    }


def join_group(rank: int, world_size: int, folder: Path) -> DistributedWorkerGroup:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    return DistributedWorkerGroup("cpu")


def run_cases(rank: int, world_size: int, folder: Path, features: FeatureSet) -> None:
    workers = join_group(rank, world_size, folder)
    data = with_text_tower(TrialData.open(tiny_config("zero_shot"), features))
    outcomes = [
        outcome(build_trial(tiny_config(method, **options), data, workers=workers)) for method, options in CASES
    ]
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


def start_at_unlike_epochs(rank: int, world_size: int, folder: Path, features: FeatureSet) -> None:
    workers = join_group(rank, world_size, folder)
    data = TrialData.open(tiny_config("zero_shot"), features)
    run = build_trial(tiny_config("linear_probe"), data, workers=workers)
    run.epoch = rank
    try:
        next(run.epochs())
    except ImbvlmError as error:
        answer = {"error": str(error), "reports": reports_behind_a_checkpoint(rank, workers, folder, data, features)}
        Path(folder, f"{rank}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def reports_behind_a_checkpoint(
    rank: int, workers: Any, folder: Path, data: TrialData, features: FeatureSet
) -> list[dict[str, Any]]:
    """Worker 0's is sound, worker 1's is damaged."""
    config, checkpoint = tiny_config("linear_probe", train__num_epochs=2), f"{folder}/checkpoint-{rank}"
    run = build_trial(config, data)
    next(run.epochs())
    save_checkpoint(checkpoint, run.state_dict())
    if rank == 1:
        Path(checkpoint, "state.json").write_text("{")
    settings = TrialSettings(config, features, "val/balanced_accuracy", checkpoint)
    return list(map(asdict, TrialSession(torch.device("cpu"), workers).reports(settings)))


def in_processes(
    target: Callable[..., Any], world_size: int, folder: Path, features: FeatureSet
) -> list[dict[str, str | list[dict]] | list[dict[str, dict | int | list]]]:
    """What each of the workers wrote."""
    context = multiprocessing.get_context("spawn")
    arguments = (world_size, str(folder), features)
    workers = [context.Process(target=target, args=(rank, *arguments)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.slow
def test_two_workers_give_one_workers_numbers(tmp_path: Path) -> None:
    features = tiny_features(tmp_path / "features")
    data = tiny_data(tmp_path / "features", text_tower=True)
    workers = in_processes(run_cases, 2, tmp_path, features)
    for case, (method, options) in enumerate(CASES):
        alone = outcome(build_trial(tiny_config(method, **options), data))
        for found in (worker[case] for worker in workers):
            assert found["first_losses"] == pytest.approx(alone["first_losses"], abs=1e-4)
            assert found["step"] == alone["step"]
            for mine, reference in zip(found["metrics"], alone["metrics"], strict=True):
                assert mine == pytest.approx(reference, abs=1e-3), (method, options)
            for name, weight in alone["weights"].items():
                torch.testing.assert_close(
                    torch.tensor(found["weights"][name]), torch.tensor(weight), atol=1e-3, rtol=0
                )
        assert workers[0][case]["metrics"] == workers[1][case]["metrics"], "rank 0's report must be everybody's"
        # Logits that nearly tie may fall the other way; each worker has everybody's predictions.
        same = [mine == his for mine, his in zip(workers[0][case]["predicted"], alone["predicted"], strict=True)]
        assert sum(same) >= len(same) - 1
        assert workers[0][case]["predicted"] == workers[1][case]["predicted"]
        assert workers[0][case]["weights"] == workers[1][case]["weights"]


@pytest.mark.slow
def test_workers_restored_at_unlike_epochs_stop_and_behind_a_damaged_checkpoint_all_start_again(tmp_path: Path) -> None:
    """In both cases one would wait for the others for ever."""
    workers = in_processes(start_at_unlike_epochs, 2, tmp_path, tiny_features(tmp_path / "features"))
    assert all(
        "different epochs (0 to 1)" in worker["error"] and "shared storage" in worker["error"] for worker in workers
    )
    assert [[report["epoch"] for report in worker["reports"]] for worker in workers] == [[1, 2]] * 2
    assert "another worker" in workers[0]["reports"][0]["restart"]
    assert "is damaged" in workers[1]["reports"][0]["restart"]


# ------------------------------------------------------------------------------------------------ under Ray Train


def settings_for(tmp_path: Path, method: str, **overrides: Any) -> TrialSettings:
    config = tiny_config(method, train__num_threads=1, **overrides)
    return TrialSettings(
        config=config,
        feature_set=tiny_features(tmp_path / "features"),
        checkpoint_folder=str(tmp_path / "checkpoint"),
        objective="val/best_balanced_accuracy",
        checkpoint_seconds=0.0,
        num_threads=1,
        score_test=True,
        model_folder=str(tmp_path / "model"),
    )


def without_times(reports: Iterable[TrialReport]) -> list[dict[str, float]]:
    return [
        {key: value for key, value in report.values.items() if not key.endswith(TIMES)} | {"progress": report.progress}
        for report in reports
    ]


def under_ray_train(settings: TrialSettings, folder: Path, num_workers: int, cpus: float = 0.5) -> list[TrialReport]:
    """The reports of worker 0."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    from imbvlm.training.train_worker import train_worker

    written = Path(folder, "reports.jsonl")

    class Keep(train.UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            with written.open("a") as stream:
                stream.write(json.dumps(metrics[0]) + "\n")

    TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": cpus}),
        run_config=train.RunConfig(name="tiny", storage_path=str(folder), callbacks=[Keep()]),
    ).fit()
    results = [json.loads(line) for line in written.read_text().splitlines()]
    reports = [report for result in results for report in from_result(result)]
    # What ends the trial under Ray Tune.
    assert [result["done"] for result in results] == [report.is_last for report in reports]
    return reports


@pytest.mark.ray
@pytest.mark.slow
def test_ray_train_gives_the_numbers_of_the_same_process(tmp_path: Path, ray_cluster: str) -> None:
    settings = settings_for(tmp_path, "decoder", loss__name="balanced_softmax", train__num_epochs=2)
    reports = under_ray_train(settings, tmp_path / "ray", 1)
    (tmp_path / "checkpoint" / "state.json").unlink()
    torch.set_num_threads(1)
    alone = list(TrialSession(torch.device("cpu")).reports(settings))
    assert without_times(reports) == without_times(alone)
    assert reports[-1].has_finished
    assert "test/balanced_accuracy" in reports[-1].metrics
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_two_ray_workers_agree_with_one_process(tmp_path: Path, ray_cluster: str) -> None:
    settings = settings_for(tmp_path, "linear_probe", loss__name="lade", train__batch_size=113)
    reports = under_ray_train(settings, tmp_path / "ray", 2)
    (tmp_path / "checkpoint" / "state.json").unlink()
    alone = list(TrialSession(torch.device("cpu")).reports(settings))
    for mine, reference in zip(without_times(reports), without_times(alone), strict=True):
        assert mine == pytest.approx(reference, abs=1e-3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_failure_that_would_come_again_is_a_report_and_no_exception(tmp_path: Path, ray_cluster: str) -> None:
    settings = settings_for(
        tmp_path, "linear_probe", classifier__kind="linear", optim__lr=1e38, train__clip_grad_norm=None
    )
    reports = under_ray_train(settings, tmp_path / "ray", 1)
    assert len(reports) == 1
    assert "wasn't finite" in reports[0].failure


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_that_hold_every_cpu_stream_the_images_of_one_process(
    tmp_path: Path, ray_cluster: str, num_workers: int
) -> None:
    """Two workers of one CPU each on two CPUs leave none for loading, and there is a bad image on the way."""
    problem = TinyImages(tmp_path, files=True, bad=(7,))
    config = problem.config("adapter", train__num_epochs=2, train__num_threads=1, train__batch_size=25)
    settings = TrialSettings(
        config=config,
        feature_set=problem.features(config),
        objective="val/best_balanced_accuracy",
        num_threads=1,
        score_test=True,
        model_folder=str(tmp_path / "model"),
    )
    reports = under_ray_train(settings, tmp_path / "ray", num_workers, cpus=2 / num_workers)
    torch.set_num_threads(1)
    alone = list(TrialSession(torch.device("cpu")).reports(settings))
    for mine, reference in zip(without_times(reports), without_times(alone), strict=True):
        assert mine == pytest.approx(reference, abs=1e-3 if num_workers > 1 else 1e-6)
    assert reports[-1].metrics["data/unreadable_images"] == 1
    assert "test/balanced_accuracy" in reports[-1].metrics
