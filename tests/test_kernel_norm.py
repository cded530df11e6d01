"""kernels/norm.py against its definitions. How to run: tests/kernel_checks.py."""
import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as_pytorch, poisoned_empty  # noqa: F401

from kernels.norm import (add_layer_norm, add_layer_norm_reference, add_rms_norm,
                          add_rms_norm_reference)


def inputs(N, C, dtype, residual=True):
    torch.manual_seed(0)
    # off-centre rows of a wider tensor
    x = (3 * torch.randn(N, C + 3, device=DEVICE) + 5).to(dtype)[:, 1:C + 1]
    r = torch.randn(N, C, device=DEVICE).to(dtype) if residual else None
    return x, r, torch.randn(C, device=DEVICE).to(dtype), torch.randn(C, device=DEVICE).to(dtype)


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, C, residual, bias", [(1, 1, True, True), (5, 192, True, True),
                                                  (3, 1000, True, False), (2, 4097, False, True),
                                                  (4, 768, True, True)])
def test_layer_norm(N, C, residual, bias, dtype, poisoned_empty):
    x, r, w, b = inputs(N, C, dtype, residual)
    b = b if bias else None
    exact = add_layer_norm_reference(*double(x, r, w, b), 1e-5)
    ours, theirs = add_layer_norm(x, r, w, b, 1e-5), add_layer_norm_reference(x, r, w, b, 1e-5)
    assert ours[0].dtype == ours[1].dtype == dtype
    assert_as_exact_as_pytorch(["normed", "sum"], exact, ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("N, C, residual", [(1, 1, True), (5, 192, True), (3, 1000, False),
                                            (2, 4097, True)])
def test_rms_norm(N, C, residual, plus_one, dtype, poisoned_empty):
    x, r, w, _ = inputs(N, C, dtype, residual)
    x64, r64, w64 = double(x, r, w)
    s = x64 if r is None else x64 + r64
    exact = (s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (w64 + plus_one), s)
    ours = add_rms_norm(x, r, w, 1e-6, plus_one)
    theirs = add_rms_norm_reference(x, r, w, 1e-6, plus_one)
    assert_as_exact_as_pytorch(["normed", "sum"], exact, ours, theirs, dtype)


def test_batch_dimensions_and_first_norm():
    x, _, w, b = inputs(6, 48, torch.float32)
    cube = x.contiguous().view(2, 3, 48)
    normed, stream = add_layer_norm(cube, None, w, b, 1e-5)
    assert stream is cube
    torch.testing.assert_close(normed.view(6, 48), add_layer_norm_reference(x, None, w, b, 1e-5)[0])


def test_norms_the_stream_as_it_goes_on():
    """
    In bfloat16 the sum is rounded before it is normed, as in a training forward, because later
    blocks see that stream.
    """
    x, r, w, b = inputs(5, 300, torch.bfloat16)
    for fn, tail in ((add_layer_norm, (w, b, 1e-5)), (add_rms_norm, (w, 1e-6))):
        normed, stream = fn(x, r, *tail)
        assert torch.equal(normed, fn(stream, None, *tail)[0])


def test_worked_by_hand():
    x = torch.tensor([[3.0, 4.0]], device=DEVICE)
    one = torch.ones(2, device=DEVICE)
    rms, _ = add_rms_norm(x, x, one, 0.0)
    torch.testing.assert_close(rms.cpu(), torch.tensor([[6.0, 8.0]]) / 50**0.5)
    normed, _ = add_layer_norm(x, x, one, one, 0.0)
    torch.testing.assert_close(normed.cpu(), torch.tensor([[0.0, 2.0]]))


def test_rejects_another_width():
    with pytest.raises(ValueError, match="expected x and residual"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(4), 1e-6)
