"""
kernels/rotary.py against complex multiplication in float64. How to run: tests/kernel_checks.py.
"""
import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as_pytorch, poisoned_empty  # noqa: F401

from kernels.rotary import rotary_cache, rotary_cache_reference, rotary_tables


def inputs(B, H, KVH, D, R, dtype, interleaved=False, T=9):
    torch.manual_seed(0)
    qkv = torch.randn(B, H + 2 * KVH, D, device=DEVICE).to(dtype)
    frequencies = 10000.0 ** (-torch.arange(R // 2, device=DEVICE) / (R // 2))
    positions = torch.randint(50, (B,), device=DEVICE)
    cos, sin = rotary_tables(frequencies, 50, interleaved=interleaved)
    cos = cos[positions]
    sin = sin[positions]
    cache = torch.zeros(2, B, KVH, T, D, device=DEVICE, dtype=dtype)
    return qkv, cos, sin, cache, torch.tensor(T - 2, device=DEVICE), positions, frequencies


def in_float64(x, positions, frequencies, interleaved):
    """Each pair is a complex number, turned by its angle."""
    x, R = x.double(), 2 * len(frequencies)
    angles = (positions[:, None] * frequencies).double()[:, None]
    pairs = x[..., :R].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    if not interleaved:
        pairs = pairs.transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(turned)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat((turned, x[..., R:]), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("B, H, KVH, D, R", [(1, 1, 1, 2, 2), (3, 4, 4, 48, 48), (2, 6, 2, 80, 32),
                                             (5, 3, 1, 96, 24)])
def test_rotary_cache(B, H, KVH, D, R, interleaved, dtype, poisoned_empty):
    qkv, cos, sin, cache, column, positions, frequencies = inputs(B, H, KVH, D, R, dtype,
                                                                  interleaved)
    q, k, v = qkv.clone().split((H, KVH, KVH), dim=1)
    their_cache = torch.zeros_like(cache)
    theirs = rotary_cache_reference(qkv.clone(), cos, sin, their_cache, column, interleaved)
    ours = rotary_cache(qkv, cos, sin, cache, column, interleaved)
    exact = [in_float64(x, positions, frequencies, interleaved) for x in (q, k)]
    c = column.item()
    assert_as_exact_as_pytorch(["q", "k"], exact, [ours, cache[0, :, :, c]],
                               [theirs, their_cache[0, :, :, c]], dtype)
    assert torch.equal(cache[1, :, :, c], v)
    assert cache.count_nonzero() == cache[:, :, :, c].count_nonzero()  # no other column was touched


def test_without_rotation_and_into_a_view():
    """
    No tables (learned positions, ALiBi): only the write. The cache may be the first rows of a
    larger one.
    """
    qkv, _, _, _, column, _, _ = inputs(2, 3, 3, 40, 2, torch.float32)
    large = torch.zeros(2, 5, 3, 9, 40, device=DEVICE)
    out = rotary_cache(qkv, None, None, large[:, 1:3], column)
    q, k, v = qkv.split(3, dim=1)
    assert torch.equal(out, q)
    assert torch.equal(large[0, 1:3, :, 7], k) and torch.equal(large[1, 1:3, :, 7], v)
    assert large.count_nonzero() == k.count_nonzero() + v.count_nonzero()


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_only(interleaved):
    """What rotary is for: q at position 9 against k at 5 scores as q at 34 against k at 30."""
    qkv, _, _, cache, column, _, frequencies = inputs(1, 1, 1, 64, 64, torch.float32)
    cos, sin = rotary_tables(frequencies, 50, interleaved=interleaved)
    scores = []
    for far, near in ((9, 5), (34, 30)):
        far = slice(far, far + 1)
        near = slice(near, near + 1)
        q = rotary_cache(qkv.clone(), cos[far], sin[far], cache, column, interleaved)
        rotary_cache(qkv.clone(), cos[near], sin[near], cache, column, interleaved)
        scores.append((q * cache[0, :, :, column.item()]).sum())
    torch.testing.assert_close(scores[0], scores[1])


def test_says_what_is_wrong():
    qkv, cos, sin, cache, column, _, _ = inputs(2, 2, 2, 8, 8, torch.float32)
    with pytest.raises(ValueError, match="gather the tables"):
        rotary_cache(qkv, cos[:1], sin[:1], cache, column)
    with pytest.raises(ValueError, match=r"H \+ 2 KVH"):
        rotary_cache(qkv[:, :4], cos, sin, cache, column)
