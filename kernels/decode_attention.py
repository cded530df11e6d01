"""
Attention of one new token a row over the static KV cache.

    s[b, h, t] = scale q[b, h] . k[b, h // G, t] + slope[h] (t - (end - 1))
    out[b, h]  = sum_t softmax(s[b, h])[t] v[b, h // G, t]
    over first[b] <= t < end; first = start, or end - window where that is later; G = H / KVH

This reads the cache once, 2 B KVH (end - first) D numbers, and does almost nothing with them, so it
is bound by memory: K and V are never repeated for the G query heads of a group (PyTorch's usual
form copies them G times), no (B, T) mask is read, and left padding is skipped, not masked. One
program per row and KV head would leave a GPU empty at a small batch, so the columns are split over
programs too; each keeps a running softmax in float32 and hands on its part with the logsumexp of
its scores, and a second kernel weighs the parts. Inference only: no backward.

Running softmax: Dao et al. 2022, https://arxiv.org/abs/2205.14135. Split over the sequence: Dao et
al. 2023, "Flash-Decoding", https://crfm.stanford.edu/2023/10/12/flashdecoding.html. ALiBi: Press et
al. 2021, https://arxiv.org/abs/2108.12409
"""

import functools

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, tl, triton


def decode_attention_reference(q, cache_k, cache_v, start, end, scale, alibi_slopes=None, window=0):
    """The definition, in float32 throughout."""
    B, H, D = q.shape
    KVH = cache_k.size(1)
    end = int(end)
    first = int(start.min())
    if window:
        first = max(first, end - window)
    k = cache_k[:, :, first:end].float()
    v = cache_v[:, :, first:end].float()
    columns = torch.arange(first, end, device=q.device)
    scores = torch.matmul(q.float().view(B, KVH, H // KVH, D) * scale, k.transpose(-1, -2))
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.float().view(KVH, -1, 1) * (columns - (end - 1))
    scores = scores.masked_fill((columns < start[:, None])[:, None, None], -float("inf"))
    return torch.matmul(scores.softmax(-1), v).view(B, H, D).to(q.dtype)


# -----------------------------------------------------------------------------
# the CPU's form: the scores' bias is built once a rollout; attention is four calls in the model's
# dtype

def score_bias(start, length, dtype, alibi_slopes=None):
    """
    (B, 1 or H, T): what is added to the scores of a key in column t. ALiBi's slope x position; on
    padding something huge but finite, because a query that is padding itself (in a prefill) sees
    nothing else, and must not give NaN.
    """
    columns = torch.arange(length, device=start.device)
    positions = columns - start[:, None]  # (B, T), negative on padding
    if alibi_slopes is None:
        bias = torch.zeros(len(start), 1, length, device=start.device)
    else:
        bias = alibi_slopes[:, None] * positions[:, None]
    return bias.to(dtype).masked_fill((positions < 0)[:, None], torch.finfo(dtype).min / 2)


def decode_bias(start, length, kv_heads, alibi_slopes=None):
    """score_bias in float32, for the products below: (B KVH, G, T), or G = 1 without slopes."""
    bias = score_bias(start, length, torch.float32, alibi_slopes)
    if alibi_slopes is None:
        bias = bias.expand(-1, kv_heads, -1)
    return bias.unflatten(1, (kv_heads, -1)).flatten(0, 1)


@functools.lru_cache(maxsize=4)  # the layers of a step share them
def _rows_seen(heads, length, first, end):
    """
    (B KVH, end - first) int32: where the columns first .. end of each of the B KVH `heads` are
    among the rows of a (B KVH T, D) cache.
    """
    first_rows = torch.arange(heads, dtype=torch.int32)[:, None] * length
    return first_rows + torch.arange(first, end, dtype=torch.int32)


def _decode_cpu(q, cache_k, cache_v, end, scale, window, bias):
    """
    No key or value is repeated for the G queries of a group. Why each product has its form, in ms
    for 192 x (192, 64) in bf16 on one core:

    scores      as k q^T 0.7; as q k^T 1.9, because oneDNN copies the slice of a cache, transposed
    weights v   as embedding_bag, a sum of weighted rows, 0.33; as a product 0.64, which however
                serves a whole group at once
    """
    _, H, D = q.shape
    _, KVH, T, _ = cache_k.shape
    end = int(end)
    first = max(0, end - window) if window else 0
    k = cache_k.flatten(0, 1)  # (B KVH, T, D)
    v = cache_v.flatten(0, 1)
    queries = q.reshape(len(k), -1, D).transpose(1, 2)  # (B KVH, D, G)

    # In bf16 oneDNN copies k q^T's slice as well. Where most columns are seen, all are multiplied
    # instead, unwritten ones too, and the products are sliced.
    if q.dtype == torch.bfloat16 and end - first > 0.6 * T:
        scores = torch.bmm(k, queries)[:, first:end]
    else:
        scores = torch.bmm(k[:, first:end], queries)
    scores = scores.transpose(1, 2)  # (B KVH, G, end - first)
    scores = torch.add(bias[:, :, first:end], scores, alpha=scale)  # float32
    weights = scores.softmax(-1).to(q.dtype)

    if H > KVH:
        return torch.bmm(weights, v[:, first:end]).view(q.shape)
    rows = _rows_seen(len(v), T, first, end)
    out = F.embedding_bag(rows, v.flatten(0, 1), per_sample_weights=weights.squeeze(1), mode="sum")
    return out.view(q.shape)


# -----------------------------------------------------------------------------
# Triton: one program per row b, KV head and split; its G query heads are the rows of one small
# matmul

if triton is not None:

    @triton.jit
    def _decode_kernel(q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, slopes_ptr, part_ptr, lse_ptr,
                       scale, window, stride_qb, stride_qh, stride_kb, stride_kh, stride_kt,
                       stride_vb, stride_vh, stride_vt, KVH, G: tl.constexpr, D: tl.constexpr,
                       SPLITS: tl.constexpr, HAS_ALIBI: tl.constexpr, IN_FLOAT32: tl.constexpr,
                       BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
        b = (tl.program_id(0) // KVH).to(tl.int64)
        kv_head = tl.program_id(0) % KVH
        split = tl.program_id(1)

        # The columns low .. high of this split. A late split of a short row has none, which its
        # logsumexp of -inf tells the second kernel.
        end = tl.load(end_ptr)
        first = tl.load(start_ptr + b)
        if window > 0:
            first = tl.maximum(first, end - window)
        length = tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_T) * BLOCK_T
        low = first + split * length
        high = tl.minimum(low + length, end)

        # The group's queries (BLOCK_G, BLOCK_D).
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        head = kv_head * G + g
        q_mask = (g < G)[:, None] & (d < D)[None, :]
        q_ptrs = q_ptr + b * stride_qb + head[:, None] * stride_qh + d[None, :]
        q = tl.load(q_ptrs, mask=q_mask, other=0.0)
        if HAS_ALIBI:
            slope = tl.load(slopes_ptr + head, mask=g < G, other=0.0).to(tl.float32)

        # A block of columns at a time: the scores s (BLOCK_G, BLOCK_T), and the softmax so far,
        # rescaled whenever its maximum grows.
        k_row_ptr = k_ptr + b * stride_kb + kv_head * stride_kh
        v_row_ptr = v_ptr + b * stride_vb + kv_head * stride_vh
        running_max = tl.full((BLOCK_G,), -float("inf"), tl.float32)
        running_sum = tl.zeros((BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        for begin in range(low, high, BLOCK_T):
            t = begin + tl.arange(0, BLOCK_T)
            kv_mask = (t < high)[:, None] & (d < D)[None, :]
            k_ptrs = k_row_ptr + t[:, None] * stride_kt + d[None, :]
            v_ptrs = v_row_ptr + t[:, None] * stride_vt + d[None, :]
            k = tl.load(k_ptrs, mask=kv_mask, other=0.0)
            v = tl.load(v_ptrs, mask=kv_mask, other=0.0)
            if IN_FLOAT32:
                q = q.to(tl.float32)
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if HAS_ALIBI:
                s += slope[:, None] * (t - (end - 1)).to(tl.float32)[None, :]
            s = tl.where((t < high)[None, :], s, -float("inf"))
            new_max = tl.maximum(running_max, tl.max(s, axis=1))
            rescale = tl.exp(running_max - new_max)
            p = tl.exp(s - new_max[:, None])
            running_sum = running_sum * rescale + tl.sum(p, axis=1)
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            running_max = new_max

        # This split's part of the output, and the logsumexp by which it will be weighed.
        running_sum = tl.maximum(running_sum, 1e-30)  # no columns: acc = 0 and lse = -inf
        acc = acc / running_sum[:, None]
        part = (b * KVH * G + head) * SPLITS + split
        tl.store(part_ptr + part[:, None] * D + d[None, :], acc, mask=q_mask)
        tl.store(lse_ptr + part, running_max + tl.log(running_sum), mask=g < G)

    @triton.jit
    def _combine_kernel(part_ptr, lse_ptr, out_ptr, SPLITS: tl.constexpr, D: tl.constexpr,
                        BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
        bh = tl.program_id(0).to(tl.int64)
        s = tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        lse = tl.load(lse_ptr + bh * SPLITS + s, mask=s < SPLITS, other=-float("inf"))
        weight = tl.exp(lse - tl.max(lse, axis=0))
        mask = (s < SPLITS)[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + (bh * SPLITS + s[:, None]) * D + d[None, :], mask=mask, other=0.0)
        out = tl.sum(part * weight[:, None], axis=0) / tl.sum(weight, axis=0)
        tl.store(out_ptr + bh * D + d, out, mask=d < D)


def _splits(device, programs, columns, BLOCK_T):
    """
    Enough splits for two programs a multiprocessor. They come from the size of the cache, because
    the grid must not depend on the value of `end`.
    """
    if INTERPRETED:
        wanted = 8
    else:
        wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(wanted, programs), triton.cdiv(columns, BLOCK_T), 64))


def _launch(q, cache_k, cache_v, start, end, scale, alibi_slopes, window):
    B, H, D = q.shape
    _, KVH, T, _ = cache_k.shape
    G = H // KVH
    if q.stride(-1) != 1:
        q = q.contiguous()

    # k and v of a block are held in three stages: 98 KB of shared memory at most, of the 99 that a
    # consumer card has. tl.dot wants a width of 16 at least, and as many query heads.
    BLOCK_T = 64 if D <= 128 else 32
    if q.dtype == torch.float32:
        BLOCK_T //= 2
    BLOCK_D = max(triton.next_power_of_2(D), 16)
    BLOCK_G = max(triton.next_power_of_2(G), 16)

    # A single split writes the output itself.
    columns = min(T, window) if window else T
    splits = _splits(q.device, B * KVH, columns, BLOCK_T)
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    if splits == 1:
        part = out
    else:
        part = torch.empty(B, H, splits, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, splits, dtype=torch.float32, device=q.device)
    slopes_or_any = q if alibi_slopes is None else alibi_slopes  # not read where there are none
    _decode_kernel[(B * KVH, splits)](
        q, cache_k, cache_v, start, end, slopes_or_any, part, lse, scale, window, *q.stride()[:2],
        *cache_k.stride()[:3], *cache_v.stride()[:3], KVH, G=G, D=D, SPLITS=splits,
        HAS_ALIBI=alibi_slopes is not None,
        IN_FLOAT32=INTERPRETED,  # the interpreter's tl.dot takes bfloat16's bits for integers
        BLOCK_G=BLOCK_G, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D)
    if splits > 1:
        _combine_kernel[(B * H,)](part, lse, out, SPLITS=splits, D=D,
                                  BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=BLOCK_D)
    return out


# -----------------------------------------------------------------------------
# what the engine calls

def decode_attention(q, cache_k, cache_v, start, end, scale, alibi_slopes=None, window=0,
                     bias=None):
    """
    q                 (B, H, D), one query a row: the token in column end - 1, whose k and v are in
                      the cache already
    cache_k, cache_v  (B, KVH, T, D) of q's dtype; H is a multiple of KVH, query heads of a group
                      are neighbours
    start             (B,) int64, first valid column of each row (its left padding); start < end
    end               0-dim int64 tensor, number of written columns, the same for all rows
    scale             usually D ** -0.5
    alibi_slopes      (H,) float32 or None
    window            > 0: only the last `window` columns
    bias              decode_bias(start, T, KVH, alibi_slopes), to build it once a rollout; CPU only
    returns           (B, H, D) in q's dtype. No backward; nothing on a GPU waits for `end`'s value.
    """
    B, H, D = q.shape
    _, KVH, T, _ = cache_k.shape
    caches_fit = cache_k.shape == (B, KVH, T, D) and cache_v.shape == cache_k.shape
    if not caches_fit or H % KVH or start.shape != (B,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, cache_k, cache_v, start))
        raise ValueError(f"expected q (B, H, D), caches (B, KVH, T, D) with H a multiple of KVH, "
                         f"start (B,), got {shapes}")
    if triton is not None and (q.is_cuda or INTERPRETED):
        return _launch(q, cache_k, cache_v, start, end, scale, alibi_slopes, window)
    if bias is None:
        bias = decode_bias(start, T, KVH, alibi_slopes)
    return _decode_cpu(q, cache_k, cache_v, end, scale, window, bias)
