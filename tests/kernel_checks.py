"""
What the kernel tests share: the yardstick, poisoned memory, and which form of an op a run is
testing.

    pytest tests                            the forms that this machine's tensors take, then
                                            (without a GPU) every kernel in Triton's interpreter, in
                                            a subprocess
    TRITON_INTERPRET=1 pytest tests/test_kernel_norm.py
                                            one kernel, interpreted: any machine
    pytest tests/test_kernels_compile.py    every kernel, compiled for sm_90: any machine
"""
import pytest
import torch

from kernels import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def assert_as_exact_as_pytorch(names, exact, ours, theirs, dtype, noise=1e-5):
    """
    Each of `ours` may be twice as far from the float64 result as PyTorch's own is at this dtype,
    plus float32 noise. One ulp more where Triton's interpreter ran, because it truncates float32 ->
    bfloat16 where compiled code rounds to nearest.
    """
    for name, exact_t, ours_t, theirs_t in zip(names, exact, ours, theirs, strict=True):
        exact_t = exact_t.double()
        ours_t = ours_t.double()
        theirs_t = theirs_t.double()
        assert ours_t.shape == exact_t.shape, \
            f"{name}: {tuple(ours_t.shape)}, expected {tuple(exact_t.shape)}"
        assert torch.isfinite(ours_t).all(), f"{name} is not finite"
        scale = exact_t.abs().max()
        truncation = 2**-7 * scale if INTERPRETED and dtype == torch.bfloat16 else 0
        error = (ours_t - exact_t).abs().max()
        baseline = (theirs_t - exact_t).abs().max()
        allowed = 2 * baseline + truncation + noise * max(1, scale)
        assert error <= allowed, \
            f"{name}: off by {error:.2e}, PyTorch by {baseline:.2e}, allowed {allowed:.2e}"


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fresh memory reads as NaN, so an output the kernel forgot to write cannot pass by luck."""
    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    for name in ["empty", "empty_like"]:
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **k: poison(plain(*a, **k)))
