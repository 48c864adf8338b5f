"""A pass that no machine is left for says what it waits for, and nothing while it could go on."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from imbvlm.ray_runtime.capacity_notice import missing_capacity, notify_while


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([(4, 1)], None),
        ([(1, 0), (3, 1)], None),
        ([(8, 0)], "needs 2 CPUs and 1 GPUs in addition to a loading task's 0.5, and there are 8 CPUs and 0 GPUs"),
        ([(1, 1), (1, 1)], "there are 2 CPUs and 2 GPUs in the cluster now"),
        ([(2, 1)], "in addition to a loading task's 0.5, and there are 2 CPUs"),
        ([(0, 0)], "there are 0 CPUs and 0 GPUs in the cluster now"),
        ([], "waiting for a machine"),
    ],
)
def test_a_worker_needs_a_machine_of_its_size_and_a_loading_task_room_beside_it(
    nodes: list[tuple[int, int]], words: str | None
) -> None:
    found = missing_capacity(nodes, 2, 1, 0.5)
    assert (found is None) == (words is None)
    assert words is None or words in str(found)


def test_a_pass_that_books_nothing_lacks_nothing() -> None:
    """On machines without free CPUs nothing is booked."""
    assert missing_capacity([(0, 0)], 0, 0, 0) is None


def test_it_is_said_while_it_lasts_and_not_of_what_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbvlm.ray_runtime.capacity_notice.LOOK_SECONDS", 0.001)
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr("imbvlm.ray_runtime.capacity_notice.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("imbvlm.ray_runtime.capacity_notice.SAY_AGAIN_SECONDS", 20.0)
    looks = iter(["gone"] * 3 + [None] + ["gone"] * 3 + ["away"] * 3 + [None])
    said, over = [], threading.Event()

    def lacks() -> str | None:
        found = next(looks, "end")
        if found == "end":
            over.set()
        return None if found == "end" else found

    with notify_while(lacks, said.append):
        assert over.wait(10)
    assert said == ["away", "away"]
    assert not [thread for thread in threading.enumerate() if thread.name == "waiting"]


LOSES = """
import hashlib, math, os, sys, threading, time
from imbvlm.base import interrupts
from imbvlm.base.console import LastWord; from imbvlm.ray_runtime.capacity_notice import ended_when
gone_at, interrupts.GRACE_SECONDS = math.inf, 0.5

def lost(failed):
    # Seen late, but for an error.
    return "it is gone" if time.monotonic() >= gone_at + 0.5 * (not failed) else None

def stuck():
    # Python calls no handler before this comes back, in a quarter of an hour.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

with interrupts.handled(), ended_when(lost, LastWord("go on", 1, sys.argv[1])):
    {}
print("still there")
"""


@pytest.mark.parametrize(
    ("work", "code", "printed", "error"),
    [
        ("gone_at = time.monotonic(); time.sleep(60)", 1, "imbvlm: it is gone; then go on\n", ""),
        ("gone_at = time.monotonic(); raise OSError('of Ray')", 1, "imbvlm: it is gone; then go on\n", ""),
        # As Ray ends it from C++, and as the kernel does.
        ("os._exit(1)", 1, "imbvlm: this run was ended without a message: .*; then go on\n", ""),
        ("os.kill(os.getpid(), 9)", -9, "imbvlm: this run was ended without a message: .*; then go on\n", ""),
        # A second Ctrl-C, or a SIGTERM whose time is over.
        (
            "threading.Timer(0.5, os.kill, [os.getpid(), 15]).start(); stuck()",
            143,
            "",
            "\nimbvlm: interrupted by SIGTERM\n",
        ),
        ("raise OSError('of its own')", 1, "", "OSError: of its own\n"),
        ("pass", 0, "still there\n", ""),
    ],
)
def test_what_hangs_on_a_cluster_that_is_gone_ends_with_a_sentence(
    tmp_path: Path, work: str, code: int, printed: str, error: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOSES.format(work), str(tmp_path / "log")],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == code
    assert re.fullmatch(printed, done.stdout)
    assert done.stderr.endswith(error) if error else not done.stderr
    log = tmp_path / "log"
    assert (log.read_text() if log.exists() else "") == (done.stdout if "imbvlm: " in printed else "")


REDIRECTED = """
import os, sys
from pathlib import Path
from imbvlm.base.console import LAST_WORD, Console
from imbvlm.ray_runtime.capacity_notice import ended_when

with Console().redirect_output(Path(sys.argv[1])):
    with ended_when(lambda failed: None, LAST_WORD.get()):
        os.write(2, b"of a library\\n")
        os._exit(1)
"""


def test_a_command_that_redirects_its_libraries_output_says_its_last_sentence_to_the_user(tmp_path: Path) -> None:
    """A features pass, an export and a comparison of encoders had it in their log alone, and ended without a word."""
    done = subprocess.run(
        [sys.executable, "-c", REDIRECTED, str(tmp_path / "log")],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("imbvlm: this run was ended without a message: .*; then type the command again\n", done.stderr)
    assert (tmp_path / "log").read_text() == "of a library\n"


INTERRUPTED = """
import subprocess
from imbvlm.base.console import LastWord; from imbvlm.ray_runtime.capacity_notice import ended_when
start = subprocess.Popen

def interrupted(*arguments, **more):
    start(*arguments, **more)
    raise KeyboardInterrupt

subprocess.Popen = interrupted
try:
    with ended_when(lambda failed: None, LastWord("go on", 1)):
        pass
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_ctrl_c_before_it_watches_leaves_its_sentence_to_the_sweep() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (0, "interrupted\n")
