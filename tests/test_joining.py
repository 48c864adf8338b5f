"""Which Ray cluster a sweep takes: the one that runs, one of its own where none does, and of two the one it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from apart import apart_with_ray, free_port, start_head

TAKEN = """
import json, os, ray
from imbvlm.data.cluster import connected
from imbvlm.errors import ImbvlmError

def told():
    return os.environ.get("RAY_ADDRESS")

try:
    with connected() as cluster:
        answer = ray.get(ray.remote(num_cpus=1)(told).remote())
        print(json.dumps([cluster.started_here, cluster.num_cpus, cluster.dashboard, answer]))
except ImbvlmError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_running_cluster_is_joined_and_of_two_the_one_that_is_named(tmp_path):
    with apart_with_ray(tmp_path) as there:

        def taken(**settings):
            environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
            done = subprocess.run(
                there.command(sys.executable, "-c", TAKEN), env={**environment, **settings},
                capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        started_here, _, dashboard, _ = taken()
        assert started_here
        assert dashboard.startswith("http://127.0.0.1:")
        deadline = time.monotonic() + 30
        while any("gcs_server" in line for line in there.processes()):
            assert time.monotonic() < deadline, "its own cluster is still there"
            time.sleep(0.5)

        addresses = []
        for num_cpus in (3, 5):
            port = free_port()
            ports = [f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
            head = tmp_path / f"head-{num_cpus}"
            head.mkdir()
            start_head(there, head, port, f"--num-cpus={num_cpus}", *ports)
            addresses.append(f"127.0.0.1:{port}")
            if num_cpus == 3:
                assert taken()[:2] == [False, 3.0]

        refusal = taken()
        assert refusal.startswith("2 Ray clusters run on this machine (")
        assert all(address in refusal for address in addresses)
        assert "set RAY_ADDRESS" in refusal
        for address, num_cpus in zip(addresses, (3.0, 5.0), strict=True):
            started_here, found, _, told = taken(RAY_ADDRESS=address, RAY_AUTH_MODE="token")
            # Its workers are told, too: Ray Train's cleaner would ask the other one and never free a stopped trial's.
            assert (started_here, found, told) == (False, num_cpus, address)
        # Ray makes a token when it first starts a cluster of one's own, and heads ask for it from then on.
        assert "set RAY_AUTH_MODE=token" in taken(RAY_ADDRESS=addresses[0])
        assert taken(RAY_ADDRESS="local")[0]
        assert "no cluster answers there" in taken(RAY_ADDRESS=f"127.0.0.1:{free_port()}")
