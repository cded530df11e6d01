"""
kernels/decode_attention.py against a softmax written out in float64. How to run:
tests/kernel_checks.py.
"""
import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as_pytorch, poisoned_empty  # noqa: F401

from kernels import INTERPRETED, triton
from kernels import decode_attention as module
from kernels.decode_attention import decode_attention, decode_attention_reference, decode_bias


def inputs(B, H, KVH, T, D, end, dtype):
    torch.manual_seed(0)
    q = (3 * torch.randn(B, H, D + 4, device=DEVICE)).to(dtype)[..., :D]
    caches = torch.randn(2, B, KVH, T, D, device=DEVICE).to(dtype)
    caches[:, :, :, end:] = float("nan")  # columns that no step has written yet
    start = torch.randint(end, (B,), device=DEVICE)
    start[0] = 0
    for b in range(B):
        caches[:, b, :, :start[b]] = 1e4  # left padding: finite, but must not be seen
    return q, caches[0], caches[1], start, torch.tensor(end, device=DEVICE), D**-0.5


def in_float64(q, cache_k, cache_v, start, end, scale, alibi_slopes=None, window=0):
    """Row by row and head by head."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    end = int(end)
    G = q.size(1) // cache_k.size(1)
    for b in range(q.size(0)):
        first = max(int(start[b]), end - window if window else 0)
        for h in range(q.size(1)):
            k, v = (cache[b, h // G, first:end].double() for cache in (cache_k, cache_v))
            s = scale * (k @ q[b, h].double())
            if alibi_slopes is not None:
                columns = torch.arange(first, end, device=q.device)
                s = s + alibi_slopes[h].double() * (columns - (end - 1))
            out[b, h] = s.softmax(0) @ v
    return out


def as_hugging_face(q, cache_k, cache_v, start, end, scale, alibi_slopes=None, window=0):
    """
    PyTorch's plain ops in q's dtype, as "eager" attention has them: what the CPU's form may be held
    against.
    """
    T = int(end)
    G = q.size(1) // cache_k.size(1)
    k, v = (cache[:, :, :T].repeat_interleave(G, 1) for cache in (cache_k, cache_v))
    columns = torch.arange(T, device=q.device)
    scores = torch.matmul(q[:, :, None], k.transpose(-1, -2)) * scale
    if alibi_slopes is not None:
        positions = (columns - start[:, None])[:, None]
        scores = scores + (alibi_slopes[:, None] * positions)[:, :, None].to(q.dtype)
    hidden = (columns < start[:, None]) | (columns < T - (window or T))
    scores = scores.masked_fill(hidden[:, None, None], -float("inf"))
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v).squeeze(2)


CASES = [  # B, H, KVH, T, D, end, alibi, window
    (1, 1, 1, 1, 16, 1, False, 0),
    (3, 4, 4, 40, 48, 37, False, 0),
    (1, 8, 2, 700, 64, 691, False, 0),  # many splits, grouped heads
    (2, 6, 1, 300, 80, 130, True, 0),  # splits with nothing to do, one KV head
    (5, 4, 2, 200, 32, 200, False, 33),  # a local window, a full cache
    (2, 2, 2, 260, 160, 259, True, 100),
    (3, 4, 2, 50, 32, 48, False, 40),  # a window over most of the cache
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, H, KVH, T, D, end, alibi, window", CASES)
def test_decode_attention(B, H, KVH, T, D, end, alibi, window, dtype, poisoned_empty):
    args = inputs(B, H, KVH, T, D, end, dtype)
    slopes = 0.5 ** torch.arange(1, H + 1, device=DEVICE).float() if alibi else None
    options = dict(alibi_slopes=slopes, window=window)
    exact = in_float64(*args, **options)
    ours = decode_attention(*args, **options)
    theirs = decode_attention_reference(*args, **options)
    assert ours.dtype == theirs.dtype == dtype
    if DEVICE == "cpu" and not INTERPRETED:
        rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(theirs.double(), exact, atol=1e-5, rtol=rtol)
        theirs = as_hugging_face(*args, **options)
    assert_as_exact_as_pytorch(["out"], [exact], [ours], [theirs], dtype)


@pytest.mark.parametrize("alibi", [False, True])
def test_a_bias_built_once_a_rollout(alibi):
    q, cache_k, cache_v, start, end, scale = args = inputs(3, 4, 2, 50, 32, 41, torch.float32)
    slopes = torch.rand(4, device=DEVICE) if alibi else None
    bias = decode_bias(start, 50, 2, slopes)
    assert bias.shape == (3 * 2, 2 if alibi else 1, 50)
    for window in (0, 7):
        once = decode_attention(*args, alibi_slopes=slopes, window=window, bias=bias)
        each_time = decode_attention(*args, alibi_slopes=slopes, window=window)
        torch.testing.assert_close(once, each_time)


@pytest.mark.skipif(triton is None or not (DEVICE == "cuda" or INTERPRETED), reason="of the kernel")
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_any_number_of_splits(splits, monkeypatch, poisoned_empty):
    args = inputs(2, 4, 2, 300, 32, 290, torch.float32)
    monkeypatch.setattr(module, "_splits", lambda *_: splits)
    ours = decode_attention(*args).double()
    torch.testing.assert_close(ours, in_float64(*args), atol=1e-5, rtol=1e-5)


def test_large_scores_do_not_overflow():
    """Scores in the hundreds: a softmax without its running maximum would be inf / inf."""
    q, cache_k, cache_v, start, end, _ = inputs(2, 2, 2, 150, 16, 150, torch.float32)
    args = (q, cache_k, cache_v, start, end, 20.0)
    ours = decode_attention(*args).double()
    torch.testing.assert_close(ours, in_float64(*args), atol=1e-4, rtol=1e-4)


def test_rejects_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="H a multiple of KVH"):
        decode_attention(torch.zeros(1, 3, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8),
                         torch.zeros(1, dtype=torch.int64), torch.tensor(1), 1.0)
