"""Runs that start together in one folder: how they end."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace

from imbvlm.base import storage
from imbvlm.base.errors import ImbvlmError
from imbvlm.sweep.records import folder_lease
from imbvlm.sweep.records.folder_lease import Holder

# Takes the folder at a moment that it reads, and says from when until when it had it.
STARTER = """
import sys, time
from imbvlm.base.errors import ImbvlmError
from imbvlm.sweep.records import folder_lease as lease
lease.POLL_SECONDS = 0.05
for line in sys.stdin:
    folder, moment = line.split()
    time.sleep(max(0.0, float(moment) - time.time()))
    try:
        with lease.folder_lease(folder, lambda text: None):
            began = time.time()
            time.sleep(0.3)
            had = (began, time.time())
        print(*had, flush=True)
    except ImbvlmError as error:
        print(error, flush=True)
"""


def work_until_ended() -> None:
    time.sleep(60)
    raise AssertionError("it went on without its folder")


def race(folder: str, number: int = 2) -> list[str]:
    """How the runs that start together end: "has it" for as long as all have tried, or what they are told."""
    barrier, ends = threading.Barrier(number), list[str]()

    def start() -> None:
        barrier.wait()
        try:
            with folder_lease.folder_lease(folder, lambda text: None):
                ends.append("has it")
                barrier.wait()
        except ImbvlmError as error:
            ends.append(str(error))
            barrier.wait()

    threads = [threading.Thread(target=start) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def assert_one_has_it(ends: list[str]) -> None:
    assert ends.count("has it") == 1, ends
    assert all("this sweep still runs" in end for end in ends if end != "has it"), ends


def assert_never_both(ends: list[str]) -> None:
    """On a busy machine the second may try when the first has ended."""
    refused = [end for end in ends if "this sweep still runs" in end]
    had = sorted(tuple(map(float, end.split())) for end in ends if end not in refused)
    assert had, ends
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(had)), ends


def race_of_processes(root: str, number: int, is_silent: bool, environment: Mapping[str, str]) -> None:
    """Pairs of processes that start within 50 ms, on a fresh folder or on that of a run elsewhere that has ended."""
    rng = random.Random(0)
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        for pair in range(number):
            folder = storage.join(root, f"{is_silent}-{pair}")
            if is_silent:
                ended = replace(
                    Holder.here(), place="far", beat=time.time() - 2 * folder_lease.HEARTBEAT_TIMEOUT_SECONDS
                )
                storage.write_bytes(storage.join(folder, folder_lease.LEASE_FILE), json.dumps(asdict(ended)).encode())
            moment, late = time.time() + 0.05, rng.uniform(0.0, 0.05) * (pair % 2)
            for starter, delay in zip(starters, (0.0, late), strict=True):
                assert starter.stdin is not None
                starter.stdin.write(f"{folder} {moment + delay}\n")
                starter.stdin.flush()
            assert_never_both([str(starter.stdout and starter.stdout.readline()) for starter in starters])
    finally:
        for starter in starters:
            starter.kill()
            starter.communicate()
