"""A trial that has ended leaves nothing in its process, which runs hundreds more: no circle keeps its tensors.

Python looks for circles when a quarter of what it holds is new. Until then each of them keeps a model, what its
optimizer has, and validation features.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_data import tiny_config, tiny_data, tiny_features
from tiny_images import TinyImages

from imbvlm.config.method_registry import METHODS
from imbvlm.config.second_stage_registry import SECOND_STAGES
from imbvlm.config.trial_config import TrialConfig
from imbvlm.features.trial_data import TrialData
from imbvlm.training import trial_session
from imbvlm.training.trial_pack import TrialPack
from imbvlm.training.trial_run import build_trial
from imbvlm.training.trial_session import HAS_JOINED, TrialSession, TrialSettings

Built = list[weakref.ref[Any]]


@pytest.fixture(autouse=True)
def circles_unlooked_for() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrialData:
    return tiny_data(tmp_path_factory.mktemp("features"), text_tower=True)


def assert_freed_at_its_end(config: TrialConfig, data: TrialData) -> None:
    run = build_trial(config, data)
    # Torch's own parametrizations are circles, of trials that have processes to themselves.
    params = () if config.method == "lora" else run.model.parameters()
    parts = [weakref.ref(one) for one in (run, run.model, run.batch_source, *params)]
    for _ in run.epochs():
        parts.append(weakref.ref(run.val_logits))
    del run
    assert not [one() for one in parts if one() is not None]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_run_is_kept_when_it_has_ended(data: TrialData, tmp_path: Path, method: str) -> None:
    if METHODS[method].trains_encoder:
        images = TinyImages(tmp_path)
        config = images.config(method, train__num_epochs=1, train__batch_size=6)
        data = images.data(config)
    else:
        config = tiny_config(method)
    assert_freed_at_its_end(config, data)


@pytest.mark.parametrize("name", SECOND_STAGES)
def test_nothing_of_a_second_stage_is_kept_either(data: TrialData, name: str) -> None:
    length = {} if name == "tau_normalization" else {"second_stage__num_epochs": 2}
    kind = {"classifier__kind": "linear"}
    assert_freed_at_its_end(tiny_config("linear_probe", second_stage__name=name, **kind, **length), data)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"second_stage__name": "disalign"}, {"optim__lr": 1e38}])
def test_a_process_has_nothing_of_trials_that_finished_failed_or_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool, overrides: dict[str, Any]
) -> None:
    built = Built()

    def noted(*arguments: Any) -> Any:
        run = build_trial(*arguments)
        built.extend(map(weakref.ref, (run, run.model)))
        return run

    monkeypatch.setattr(trial_session, "build_trial", noted)
    config = tiny_config("linear_probe", classifier__kind="linear", train__clip_grad_norm=None, **overrides)
    features, pack = tiny_features(tmp_path / "features"), TrialPack() if together else None
    process = TrialSession(torch.device("cpu"))
    members = [
        process.reports(
            TrialSettings(
                config, features, "val/balanced_accuracy", checkpoint_folder=str(tmp_path / str(number)),
                checkpoint_seconds=0.0, logits_file=str(tmp_path / f"{number}.safetensors"),
            ),
            pack,
        )
        for number in range(3)
    ]  # fmt: skip
    if together:
        assert [next(member) for member in members] == [HAS_JOINED] * 3
    next(members[0])
    members.pop(0).close()
    for member in members:
        assert list(member)[-1].is_last
    del members, member, pack
    assert len(built) == 6
    assert not [one() for one in built if one() is not None]
