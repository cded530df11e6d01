"""
kernels/logprob.py against its definitions, forward and backward. How to run:
tests/kernel_checks.py.
"""
import os
import subprocess
import sys

import pytest
import torch
from kernel_checks import (DEVICE, DTYPES, INTERPRETED, assert_as_exact_as_pytorch,
                           poisoned_empty)  # noqa: F401

from kernels import logprob
from kernels.logprob import (linear_logprobs, linear_logprobs_reference, token_logprobs,
                             token_logprobs_reference)


def value_and_grad(fn, logits, targets, dlogp):
    logits = logits.detach().clone().requires_grad_(True)
    logp = fn(logits, targets)
    logp.backward(dlogp.to(logp.dtype))
    return logp.detach(), logits.grad


def in_float64(logits, targets):
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V", [(1, 1), (3, 7), (5, 1000), (4, 4096), (2, 4097), (3, 9001),
                                  (2, 50272), (2, 151936)])
def test_token_logprobs(N, V, dtype, poisoned_empty):
    torch.manual_seed(0)
    logits = (8 * torch.randn(N, V, device=DEVICE)).to(dtype)
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[0] = V - 1  # the last column, where a wrong mask shows
    dlogp = torch.randn(N, device=DEVICE)
    exact = value_and_grad(in_float64, logits.double(), targets, dlogp.double())
    ours = value_and_grad(token_logprobs, logits, targets, dlogp)
    theirs = value_and_grad(token_logprobs_reference, logits, targets, dlogp)
    assert_as_exact_as_pytorch(["logp", "dlogits"], exact, ours, theirs, dtype)


def test_rows_of_a_view():
    """Logits arrive as logits[:, start:-1] flattened: rows that are not V apart."""
    torch.manual_seed(0)
    wide = torch.randn(6, 50, device=DEVICE)
    view, targets = wide[:, :37], torch.randint(37, (6,), device=DEVICE)
    expected = token_logprobs_reference(view, targets)
    torch.testing.assert_close(token_logprobs(view, targets), expected)


def test_certain_and_impossible_tokens():
    """
    Worked by hand: one logit dominates, so logp is 0 for it and the gap for the other; -inf is a
    banned token.
    """
    row = [100.0, 0.0, -float("inf")]
    logits = torch.tensor([row, row], device=DEVICE)
    logp = token_logprobs(logits, torch.tensor([0, 1], device=DEVICE))
    torch.testing.assert_close(logp.cpu(), torch.tensor([0.0, -100.0]))


def test_rejects_a_batch_dimension():
    with pytest.raises(ValueError, match=r"expected logits \(N, V\)"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64))


# -----------------------------------------------------------------------------
# with the head fused in

def head(N, V, C, dtype, bias):
    torch.manual_seed(0)
    hidden = torch.randn(N, C, device=DEVICE).to(dtype)
    weight = (3 * torch.randn(V, C, device=DEVICE) / C**0.5).to(dtype)
    bias = torch.randn(V, device=DEVICE).to(dtype) if bias else None
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[0] = V - 1
    return hidden, weight, bias, targets


def linear_value_and_grad(fn, hidden, weight, bias, targets, dlogp, temperature):
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    leaves = [t.detach().clone().requires_grad_(True) for t in leaves]
    leaf_bias = leaves[2] if len(leaves) == 3 else None
    logp, entropy = fn(leaves[0], leaves[1], targets, leaf_bias, temperature)
    assert not entropy.requires_grad
    logp.backward(dlogp.to(logp.dtype))
    return [logp.detach(), entropy, *(t.grad for t in leaves)]


def linear_in_float64(hidden, weight, targets, bias, temperature):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1).detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, C, bias, temperature, slice_of",
                         [(1, 5, 3, False, 1.0, 2**21), (7, 1300, 33, True, 0.7, 512),
                          (5, 2047, 64, False, 1.0, 512), (24, 50272, 48, True, 1.3, 24 * 20000)])
def test_linear_logprobs(N, V, C, bias, temperature, slice_of, dtype, monkeypatch, poisoned_empty):
    """slice_of / N columns at a time (512 at least): one slice, several, and a narrow last one."""
    monkeypatch.setattr(logprob, "SLICE", dict(cpu=slice_of, cuda=slice_of))
    hidden, weight, bias, targets = head(N, V, C, dtype, bias)
    dlogp = torch.randn(N, device=DEVICE)
    double = [None if t is None else t.double() for t in (hidden, weight, bias)]
    arguments = (hidden, weight, bias, targets, dlogp, temperature)
    exact = linear_value_and_grad(linear_in_float64, *double, targets, dlogp.double(), temperature)
    ours = linear_value_and_grad(linear_logprobs, *arguments)
    theirs = linear_value_and_grad(linear_logprobs_reference, *arguments)
    names = ["logp", "entropy", "dhidden", "dweight", "dbias"][:len(exact)]
    assert_as_exact_as_pytorch(names, exact, ours, theirs, dtype)


def test_linear_logprobs_of_a_frozen_head_and_a_banned_token():
    hidden, weight, bias, targets = head(4, 700, 8, torch.float32, True)
    bias[3] = -float("inf")
    hidden.requires_grad_(True)
    logp, entropy = linear_logprobs(hidden, weight, targets, bias)
    (ours,) = torch.autograd.grad(logp.sum(), hidden)
    logp_r, entropy_r = linear_logprobs_reference(hidden, weight, targets, bias)
    (theirs,) = torch.autograd.grad(logp_r.sum(), hidden)
    torch.testing.assert_close((logp, entropy, ours), (logp_r, entropy_r, theirs), atol=2e-5,
                               rtol=1e-4)


def test_linear_logprobs_names_the_dtypes():
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden is torch.bfloat16 and the head torch.float32"):
        linear_logprobs(torch.zeros(2, 3).bfloat16(), torch.zeros(5, 3), targets)


PEAK = """
import sys, torch
sys.path.insert(0, ".")
from kernels import logprob
torch.set_num_threads(1)
torch.manual_seed(0)
N, V, C = 1024, 50272, 96
hidden = torch.randn(N, C).bfloat16().requires_grad_(True)
weight = torch.empty(V, C, dtype=torch.bfloat16).normal_(std=0.02).requires_grad_(True)
targets = torch.randint(V, (N,))
fn = getattr(logprob, sys.argv[1])
# the first call's workspaces are no part of the peak
fn(hidden[:8], weight[:8], targets[:8] % 8)[0].sum().backward()
hidden.grad = weight.grad = None
def kilobytes(field):
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0])
open("/proc/self/clear_refs", "w").write("5")  # forget the high-water mark so far
before = kilobytes("VmRSS")
fn(hidden, weight, targets)[0].sum().backward()
print((kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda" or not os.path.exists("/proc/self/clear_refs"),
                    reason="reads the CPU form's resident memory from Linux")
def test_linear_logprobs_peak_memory():
    """
    Forward + backward of a head of OPT's vocabulary, 96 wide because some CPUs multiply bf16
    slowly, on 1,024 tokens: at most 0.35 of the plain form's memory, both with weight.grad in it.
    Resident memory's peak over what it was before, each form in its own process.
    """
    def megabytes(name):
        command = [sys.executable, "-c", PEAK, name]
        return float(subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE).stdout)

    sliced = megabytes("linear_logprobs")
    plain = megabytes("linear_logprobs_reference")
    print(f"peak of forward + backward: {sliced:.0f} MB sliced, {plain:.0f} MB plain, "
          f"ratio {sliced / plain:.2f}")
    assert sliced <= 0.35 * plain
