"""
bench/gpu.py: a part that fails or hangs ends no other and is told, rows are kept as they come. The
loop that it captures as a CUDA graph is the engine's.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models import ragged_prompts, small_model

from bench import decode, gpu
from hybrid_engine import InferenceEngine

DRIVER = """
import subprocess, sys
sys.path.insert(0, {root!r})
from bench import gpu
gpu.__file__ = __file__
gpu.has_gpu = lambda: False

def good(note, work):
    note("a step", 0.5, "ms", 1.0, "ms, Hugging Face", 0.25, extra=[1, 2])
    note("rows", 1234)

def bad(note, work):
    note("before the fault", 1)
    raise ValueError("boom")

def slow(note, work):
    child = subprocess.Popen(["sleep", "600"])
    note("child", child.pid)
    child.wait()

gpu.PARTS = {{"bad": gpu.Part(bad, 60), "slow": gpu.Part(slow, 2), "good": gpu.Part(good, 60)}}
sys.exit(gpu.main())
"""


@pytest.fixture
def run(tmp_path):
    """run(flags) -> exit code, output, results.json."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(gpu.ROOT)))

    def call(*flags):
        done = subprocess.run([sys.executable, driver, tmp_path / "out", *flags], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        return done.returncode, done.stdout, json.loads((tmp_path / "out/results.json").read_text())

    return call


def test_a_part_that_fails_ends_no_other(run, tmp_path):
    code, text, results = run()
    parts = results["parts"]
    assert code == 1
    assert [part["status"] for part in parts.values()] == ["failed", "out of time", "passed"]
    assert [row["what"] for row in parts["bad"]["rows"]] == ["before the fault"]
    assert parts["bad"]["error"].endswith("ValueError: boom")
    assert parts["good"]["rows"][0] == {
        "what": "a step", "value": 0.5, "unit": "ms", "beside": 1.0, "of": "ms, Hugging Face",
        "share": 0.25, "extra": [1, 2]}
    # What a part had started is gone with it.
    [child] = parts["slow"]["rows"]
    assert not is_running(child["value"])

    table = (tmp_path / "out/table.md").read_text()
    assert table in text + "\n"
    assert table.startswith(gpu.NO_GPU) and text.startswith(gpu.NO_GPU)
    assert "| good | a step | 0.5 ms | 1 ms, Hugging Face | 2.00 | 0.25 |" in table
    assert "| good | rows | 1,234  |" in table
    assert "ValueError: boom" in table
    assert "ValueError: boom" in (tmp_path / "out/log.txt").read_text()

    # Some parts again: the others' rows stay.
    code, text, again = run("--parts", "good")
    assert code == 0 and again["parts"]["bad"] == parts["bad"]


def test_a_sigterm_ends_the_part_that_runs(tmp_path, run):
    driver = tmp_path / "driver.py"
    running = subprocess.Popen([sys.executable, driver, tmp_path / "out", "--parts", "slow",
                                "--seconds", "60"])
    results = tmp_path / "out/results.json"
    for _ in range(600):
        time.sleep(0.1)
        if results.exists() and "child" in results.read_text():
            break
    running.terminate()
    assert running.wait(20) == 143
    [child] = json.loads(results.read_text())["parts"]["slow"]["rows"]
    assert not is_running(child["value"])


def is_running(pid):
    time.sleep(0.5)
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "Z (zombie)" not in status.read_text()


def test_no_part_begins_when_the_time_is_over(run):
    code, _, results = run("--seconds", "0", "--parts", "good")
    assert code == 1 and results["parts"]["good"]["status"] == "not begun"


def test_arguments(tmp_path):
    with pytest.raises(SystemExit) as stop:
        gpu.main([str(tmp_path), "--parts", "no such part"])
    assert stop.value.code == 2
    shell = [str(gpu.ROOT / "bench/gpu.sh"), str(tmp_path / "no wheels here"), str(tmp_path)]
    done = subprocess.run(["bash", *shell], text=True, capture_output=True)
    assert done.returncode == 2 and "cannot be installed" in done.stderr


@pytest.mark.parametrize("name", ["opt", "llama-3"])
def test_the_captured_loop_is_the_engines(name):
    model = small_model(name)
    ids, mask = ragged_prompts()
    tokens, logprobs, _ = decode.captured(model, ids, mask, few=2, many=7, seed=3)
    expected = InferenceEngine(model).generate(ids, mask, max_new_tokens=7, eos_token_id=None,
                                               seed=3)
    assert torch.equal(tokens, expected.tokens[:, ids.size(1):])
    torch.testing.assert_close(logprobs, expected.logprobs)


def test_bytes_of_a_step_by_hand():
    """Width 48, 3 layers, 2 of 4 heads of 12 for keys and values, MLP 52, 101 ids."""
    model = small_model("llama", torch.bfloat16)
    layer = 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 52 + 2 * 48
    head = 101 * 48 + 48  # untied: the embedding is looked up
    cache = 3 * 2 * 5 * 9 * 2 * 12
    assert decode.step_bytes(model, rows=5, length=9) == 2 * (3 * layer + head + cache)
