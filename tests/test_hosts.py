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
from support import processes
rank = int(os.environ["RANK"])
processes.BEAT_SECONDS, processes.SILENT_BEATS = 0.5, 6
processes.host_address = lambda: f"10.0.0.{rank}"  # two hosts, as far as one can see
from step1_sft import Config
processes.setup(Config(deepspeed_config="configs/cpu.json"))
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
    ranks = [subprocess.Popen([sys.executable, "-c", RANK], cwd=ROOT,
                              env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
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


DEEPSPEED = """#!/bin/sh
echo "deepspeed $*"
for stage in sft reward; do case "$*" in *step?_$stage.py*)
  mkdir -p output/$stage/checkpoint-5
  echo "$stage of $$" | tee output/summary.json > output/$stage/model.safetensors ;; esac; done
case "$*" in *step3*)
  echo '{"model": "tiny", "hardware": "x", "seed": 1, "seconds": 1}' > output/summary.json; exit 3 ;; esac
"""
SSH = """#!/bin/bash
while [ "${1:0:1}" = - ]; do case $1 in -o) shift ;; esac; shift; done  # flags
host=$1; shift
case $host in far) echo "no route to host"; exit 255 ;; own-disk) set -- "${*//output/output-of-own-disk}" ;; esac
case $host in old) set -- "$* && echo 2" ;; esac
exec bash -c "$*"
"""


def test_run_all_checks_its_hosts_and_hands_models_to_those_with_disks_of_their_own(run_script, tmp_path):
    """
    Everything but run_all.sh is a stand-in: ssh for a host that shares the disk, one that does not, and two that cannot
    take part.
    """
    (tmp_path / "bin").mkdir()
    for name, text in (("deepspeed", DEEPSPEED), ("ssh", SSH), ("python3", "#!/bin/sh\necho /bin/sh\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*hosts):
        (tmp_path / "hosts").write_text("# the cluster\n\n" + "".join(f"{host} slots=2\n" for host in hosts))
        return run_script("run_all.sh", "tiny", "multinode", env={
            "HOSTFILE": "hosts", "LAUNCHER_ARGS": "--master_port 29555",
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})

    for hosts, sentence in ((("shared", "far"), "host far of hosts: 'ssh far' must work without a password; it says: "
                                                "no route to host"),
                            (("shared", "old"), "host old differs from this one")):
        code, output = run(*hosts)
        assert code == 2 and sentence in output and "deepspeed" not in output

    stale = tmp_path / "output-of-own-disk" / "sft"  # of an earlier run, and in more files
    stale.mkdir(parents=True)
    (stale / "model-00001-of-00002.safetensors").write_text("stale")
    code, output = run("shared", "own-disk")
    assert code == 2 and "step3_ppo.py failed" in output  # DeepSpeed's exit code was 3
    assert "deepspeed --quiet --hostfile hosts --master_port 29555" in output
    assert output.count("copying sft") == 1 and output.count("copying reward") == 1 and "shared does not" not in output
    for stage in ("sft", "reward"):
        here, there = (tmp_path / root / stage for root in ("output", "output-of-own-disk"))
        assert [file.name for file in there.iterdir()] == ["model.safetensors"]  # no checkpoints
        assert (there / "model.safetensors").read_text() == (here / "model.safetensors").read_text()
