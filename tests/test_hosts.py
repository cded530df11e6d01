"""A host that falls silent ends the run on the others; what run_all.sh says about hosts that cannot take part."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from conftest import ROOT, clean_environment

RANK = """
import os, sys, time
import hybrid_engine
rank = int(os.environ["RANK"])
hybrid_engine.BEAT_SECONDS, hybrid_engine.SILENT_BEATS = 0.5, 6
hybrid_engine.host_address = lambda: f"10.0.0.{rank}"  # two hosts, as far as one can see
from step1_sft import Config
hybrid_engine.setup(Config(deepspeed_config="configs/cpu.json"))
print("ready", flush=True)
time.sleep(100)  # as in a collective that will not end
"""


@pytest.fixture
def two_ranks():
    """Two processes that are set up, each of which takes the other for another host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**clean_environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK], cwd=ROOT, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    for process in ranks:
        while process.poll() is None and process.stdout.readline() != "ready\n":
            pass
    yield ranks
    for process in ranks:
        process.kill()
        process.wait()


def test_a_silent_host_ends_the_others_by_name(two_ranks):
    time.sleep(5)  # longer than the limit: both are heard
    assert [process.poll() for process in two_ranks] == [None, None]

    began = time.monotonic()
    os.kill(two_ranks[0].pid, signal.SIGSTOP)  # with it stands the store, and whoever waits for an answer of it
    error = two_ranks[1].communicate(timeout=30)[1]
    assert two_ranks[1].returncode == 1 and time.monotonic() - began > 2
    assert "nothing heard for 3.0 s from rank 0 on host" in error and "(10.0.0.0): host, network or process" in error

    time.sleep(1)
    os.kill(two_ranks[0].pid, signal.SIGCONT)
    began = time.monotonic()
    error = two_ranks[0].communicate(timeout=30)[1]
    assert two_ranks[0].returncode == 1
    assert time.monotonic() - began > 2  # its own stop was nobody's silence
    assert "from rank 1 on host" in error and "(10.0.0.1): host, network or process" in error
