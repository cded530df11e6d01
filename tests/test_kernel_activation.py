"""kernels/activation.py against its definitions. How to run: tests/kernel_checks.py."""
import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as_pytorch, poisoned_empty  # noqa: F401

from kernels.activation import FORMS, act, act_reference, gated_act, gated_act_reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("N, F, bias", [(1, 1, True), (5, 192, False), (3, 1025, True)])
def test_act(N, F, bias, name, dtype, poisoned_empty):
    torch.manual_seed(0)
    x = (4 * torch.randn(N, F + 2, device=DEVICE)).to(dtype)[:, 1:F + 1]
    b = torch.randn(F, device=DEVICE).to(dtype) if bias else None
    exact = act_reference(x.double(), name, b.double() if bias else None)
    ours, theirs = act(x, name, b), act_reference(x, name, b)
    assert ours.dtype == dtype
    assert_as_exact_as_pytorch([name], [exact], [ours], [theirs], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("N, F", [(1, 1), (4, 700), (2, 2049)])
def test_gated_act(N, F, name, dtype, poisoned_empty):
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(N, 2 * F + 3, device=DEVICE)).to(dtype)[:, :2 * F].chunk(2, dim=-1)
    exact = gated_act_reference(gate.double(), up.double(), name)
    theirs = gated_act_reference(gate, up, name)
    assert_as_exact_as_pytorch([name], [exact], [gated_act(gate, up, name)], [theirs], dtype)
    apart = gated_act(gate.contiguous()[None], up.contiguous()[None], name)[0]
    torch.testing.assert_close(apart, gated_act(gate, up, name))


@pytest.mark.parametrize("name", FORMS)
def test_tails(name):
    """Far from zero every one of them is x or 0, and finite: exp must not overflow into NaN."""
    y = act(torch.tensor([[-300.0, -60.0, 0.0, 60.0, 300.0]], device=DEVICE), name)
    torch.testing.assert_close(y.cpu(), torch.tensor([[0.0, 0.0, 0.0, 60.0, 300.0]]))


def test_names():
    x = torch.randn(2, 3, 8, device=DEVICE)
    torch.testing.assert_close(act(x, "gelu_new"), act_reference(x, "gelu_tanh"))
    with pytest.raises(ValueError, match="'mish' is not known; known are relu"):
        act(x, "mish")
    with pytest.raises(ValueError, match="gate and up"):
        gated_act(x, x[..., :4], "silu")
