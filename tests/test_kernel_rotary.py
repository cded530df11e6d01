"""kernels/rotary.py against complex multiplication in float64. How to run: tests/kernel_checks.py."""
import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as_pytorch, poisoned_empty  # noqa: F401

from kernels.rotary import rotary_cache, rotary_cache_reference


def inputs(B, H, KVH, D, R, dtype, T=9):
    torch.manual_seed(0)
    qkv = torch.randn(B, H + 2 * KVH, D, device=DEVICE).to(dtype)  # one fused matmul's output: q, k, v are views of it
    q, k, v = qkv.split((H, KVH, KVH), dim=1)
    angle = torch.arange(50, device=DEVICE)[:, None] * 10000.0 ** (-torch.arange(R // 2, device=DEVICE) / (R // 2))
    caches = torch.zeros(2, B, KVH, T, D, device=DEVICE, dtype=dtype)
    positions = torch.randint(50, (B,), device=DEVICE)
    return q, k, v, angle.cos(), angle.sin(), caches[0], caches[1], torch.tensor(T - 2, device=DEVICE), positions


def in_float64(x, cos, sin, interleaved):
    """Each pair is a complex number, turned by cos + i sin."""
    x, R = x.double(), 2 * cos.size(-1)
    pairs = x[..., :R].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    if not interleaved:
        pairs = pairs.transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double())[:, None]
    turned = torch.view_as_real(turned)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat((turned, x[..., R:]), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("B, H, KVH, D, R", [(1, 1, 1, 2, 2), (3, 4, 4, 48, 48), (2, 6, 2, 80, 32), (5, 3, 1, 96, 24)])
def test_rotary_cache(B, H, KVH, D, R, interleaved, dtype, poisoned_empty):
    q, k, v, cos, sin, cache_k, cache_v, column, positions = inputs(B, H, KVH, D, R, dtype)
    ours = rotary_cache(q, k, v, cos, sin, cache_k, cache_v, column, positions, interleaved)
    their_k, their_v = torch.zeros_like(cache_k), torch.zeros_like(cache_v)
    theirs = rotary_cache_reference(q, k, v, cos, sin, their_k, their_v, column, positions, interleaved)
    exact = [in_float64(x, cos[positions], sin[positions], interleaved) for x in (q, k)]
    c = column.item()
    assert_as_exact_as_pytorch(["q", "k"], exact, [ours, cache_k[:, :, c]], [theirs, their_k[:, :, c]], dtype)
    assert torch.equal(cache_v[:, :, c], v)
    for cache in (cache_k, cache_v):  # and no other column was touched
        assert cache.count_nonzero() == cache[:, :, c].count_nonzero()


def test_gathered_tables_are_the_same():
    q, k, v, cos, sin, cache_k, cache_v, column, positions = inputs(4, 2, 2, 32, 16, torch.float32)
    other_k, other_v = torch.zeros_like(cache_k), torch.zeros_like(cache_v)
    a = rotary_cache(q, k, v, cos, sin, cache_k, cache_v, column, positions)
    b = rotary_cache(q, k, v, cos[positions], sin[positions], other_k, other_v, column)
    assert torch.equal(a, b) and torch.equal(cache_k, other_k)


def test_without_rotation_and_into_a_view():
    """No tables (learned positions, ALiBi): only the write. The cache may be the first rows of a larger one."""
    q, k, v, _, _, _, _, column, _ = inputs(2, 3, 3, 40, 2, torch.float32)
    large = torch.zeros(2, 5, 3, 9, 40, device=DEVICE)
    out = rotary_cache(q, k, v, None, None, large[0, 1:3], large[1, 1:3], column)
    assert torch.equal(out, q) and torch.equal(large[0, 1:3, :, 7], k) and torch.equal(large[1, 1:3, :, 7], v)
    assert large.count_nonzero() == k.count_nonzero() + v.count_nonzero()


def test_scores_depend_on_distance_only():
    """What rotary is for: q at position 9 against k at 5 scores as q at 34 against k at 30."""
    q, k, v, cos, sin, cache_k, cache_v, column, _ = inputs(1, 1, 1, 64, 64, torch.float32)
    scores = []
    for far, near in ((9, 5), (34, 30)):
        turned = [rotary_cache(x, k, v, cos, sin, cache_k, cache_v, column, torch.tensor([p], device=DEVICE))
                  for x, p in ((q, far), (k, near))]
        scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(scores[0], scores[1])


def test_says_what_is_missing():
    q, k, v, cos, sin, cache_k, cache_v, column, _ = inputs(2, 2, 2, 8, 8, torch.float32)
    with pytest.raises(ValueError, match="gather it by row, or pass positions"):
        rotary_cache(q, k, v, cos, sin, cache_k, cache_v, column)
