"""A checkpoint is there whole or not at all, and a damaged one is said to be damaged."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imbvlm.training import checkpoint
from imbvlm.training.checkpoint import CheckpointError, TrialState


@pytest.fixture
def state() -> TrialState:
    tensors = {"model/weight": torch.randn(4, 3), "optimizer/weight/step": torch.tensor(7.0)}
    return TrialState(tensors, {"epoch": 2, "best": {"top1_accuracy": 0.1 + 0.2}})


def tensors_file(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith("state-"))


def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: Path, state: TrialState) -> None:
    checkpoint.save_checkpoint(str(tmp_path / "new" / "folder"), state)
    loaded = checkpoint.load_checkpoint(str(tmp_path / "new" / "folder"))
    assert loaded.scalars == state.scalars
    assert loaded.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], state.tensors[name]) for name in state.tensors)


def test_a_new_checkpoint_replaces_the_old_one_and_leaves_no_file_of_it(tmp_path: Path, state: TrialState) -> None:
    checkpoint.save_checkpoint(str(tmp_path), state)
    checkpoint.save_checkpoint(str(tmp_path), TrialState({"model/weight": torch.ones(2)}, {"epoch": 3}))
    assert checkpoint.load_checkpoint(str(tmp_path)).scalars == {"epoch": 3}
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_the_same_state_twice_keeps_it(tmp_path: Path, state: TrialState) -> None:
    checkpoint.save_checkpoint(str(tmp_path), state)
    checkpoint.save_checkpoint(str(tmp_path), state)
    assert checkpoint.load_checkpoint(str(tmp_path)).scalars == state.scalars


def test_tensors_that_share_memory_or_are_transposed_are_saved(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    checkpoint.save_checkpoint(str(tmp_path), TrialState({"a": base, "b": base, "c": base.T}))
    assert torch.equal(checkpoint.load_checkpoint(str(tmp_path)).tensors["c"], base.T)


def damage_tensors(folder: Path) -> None:
    path = tensors_file(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate_tensors(folder: Path) -> None:
    path = tensors_file(folder)
    path.write_bytes(path.read_bytes()[:-8])


def remove_tensors(folder: Path) -> None:
    tensors_file(folder).unlink()


def truncate_index(folder: Path) -> None:
    path = folder / checkpoint.INDEX_FILE
    path.write_bytes(path.read_bytes()[:20])


def empty_index(folder: Path) -> None:
    (folder / checkpoint.INDEX_FILE).write_text("[]")


def future_format(folder: Path) -> None:
    path = folder / checkpoint.INDEX_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


@pytest.mark.parametrize(
    "damage", [damage_tensors, truncate_tensors, remove_tensors, truncate_index, empty_index, future_format]
)
def test_damage_is_an_error_that_names_the_folder(
    tmp_path: Path, state: TrialState, damage: Callable[..., Any]
) -> None:
    checkpoint.save_checkpoint(str(tmp_path), state)
    damage(tmp_path)
    assert checkpoint.has_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        checkpoint.load_checkpoint(str(tmp_path))


def test_no_checkpoint_is_no_damage(tmp_path: Path) -> None:
    assert not checkpoint.has_checkpoint(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load_checkpoint(str(tmp_path / "none"))


def save_for_ever(folder: str) -> None:
    number = 0
    while True:
        number += 1
        checkpoint.save_checkpoint(folder, TrialState({"x": torch.full((200_000,), float(number))}, {"epoch": number}))


def test_a_writer_killed_at_any_time_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for delay in (0.05, 0.08, 0.11, 0.14):
        writer = context.Process(target=save_for_ever, args=(str(tmp_path),))
        writer.start()
        while not checkpoint.has_checkpoint(str(tmp_path)):
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        loaded = checkpoint.load_checkpoint(str(tmp_path))
        assert loaded.tensors["x"][0] == loaded.scalars["epoch"]


def test_exported_weights_keep_names_and_values(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    checkpoint.save_model(str(tmp_path), model)
    tensors = checkpoint.load_model_tensors(str(tmp_path))
    assert set(tensors) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(tensors["0.weight"], model[0].weight)
    (tmp_path / checkpoint.MODEL_FILE).write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load_model_tensors(str(tmp_path))
