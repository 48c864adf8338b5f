"""A pass that no machine is left for says what it waits for, and nothing while it could go on."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest

from imbvlm.data.waiting import lacking, said_while


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([(4, 1)], None),
        ([(1, 0), (3, 1)], None),
        ([(8, 0)], "needs 2 CPUs and 1 GPUs beside a loading task's 0.5, and there are 8 CPUs and 0 GPUs"),
        ([(1, 1), (1, 1)], "there are 2 CPUs and 2 GPUs in the cluster now"),
        ([(2, 1)], "beside a loading task's 0.5, and there are 2 CPUs"),
        ([(0, 0)], "there are 0 CPUs and 0 GPUs in the cluster now"),
        ([], "waiting for a machine"),
    ],
)
def test_a_worker_needs_a_machine_of_its_size_and_a_loading_task_room_beside_it(nodes, words):
    found = lacking(nodes, 2, 1, 0.5)
    assert (found is None) == (words is None)
    assert words is None or words in str(found)


def test_a_pass_that_books_nothing_lacks_nothing():
    """On machines without free CPUs nothing is booked."""
    assert lacking([(0, 0)], 0, 0, 0) is None


def test_it_is_said_while_it_lasts_and_not_of_what_passes(monkeypatch):
    monkeypatch.setattr("imbvlm.data.waiting.LOOK_SECONDS", 0.001)
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr("imbvlm.data.waiting.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("imbvlm.data.waiting.SAY_AGAIN_SECONDS", 20.0)
    looks = iter(["gone"] * 3 + [None] + ["gone"] * 3 + ["away"] * 3 + [None])
    said, over = [], threading.Event()

    def lacks():
        found = next(looks, "end")
        if found == "end":
            over.set()
        return None if found == "end" else found

    with said_while(lacks, said.append):
        assert over.wait(10)
    assert said == ["away", "away"]
    assert not [thread for thread in threading.enumerate() if thread.name == "waiting"]
