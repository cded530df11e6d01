"""
Rotary position of one new token's q and k, and the write of its k and v into the static KV cache.

    half-split (LLaMA, NeoX)   pairs (x[i], x[i + R/2]), i < R/2      R = rotary_dim; x[R:] passes
    interleaved (GPT-J)        pairs (x[2i], x[2i + 1])               as it is
    (a, b) -> (a cos - b sin, b cos + a sin)
    cos, sin of position * frequency[i] come from tables, so that any rope scaling works

As x[d] cos[d] + x[partner of d] sin[d], with tables as wide as the rotated part: sin is negative
where d is an a.

    cache[0, b, :, column] = rotated k[b];  cache[1, b, :, column] = v[b]

A decode step does this in every layer for a few kB, so what counts is launches, not bytes: one
here, about seven as PyTorch ops. `column` is a tensor, so that no step waits for the CPU to read
it. Inference only: no backward.

RoFormer: Su et al. 2021, eq. 34, https://arxiv.org/abs/2104.09864
"""

import torch

from kernels import INTERPRETED, tl, triton


def rotary_tables(frequencies, length, factor=1.0, interleaved=False):
    """
    frequencies (R/2,) float32, in radians a position -> cos, sin (length, R) float32, both times
    factor.
    """
    angles = torch.arange(length, device=frequencies.device)[:, None] * frequencies
    cos = angles.cos() * factor
    sin = angles.sin() * factor
    if interleaved:
        return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate_(x, cos, sin, interleaved=False):
    """
    The definition of the rotation, in place. x (..., H, D); cos, sin (..., R) of each token's
    position, the same for every head.
    """
    cos = cos.unsqueeze(-2)
    sin = sin.unsqueeze(-2)
    R = cos.size(-1)
    x = x[..., :R]
    if interleaved:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = x.roll(R // 2, -1)
    x.copy_(torch.addcmul(x * cos, partner, sin))


def rotary_cache_reference(qkv, cos, sin, cache, column, interleaved=False):
    """
    The definition, and the CPU's form: q and k are rotated together, in place, which halves the
    number of ops.
    """
    KVH = cache.size(2)
    if cos is not None:
        rotate_(qkv[:, :-KVH], cos, sin, interleaved)
    q = qkv[:, :-2 * KVH]
    kv = qkv[:, -2 * KVH:].unflatten(1, (2, KVH))  # (B, 2, KVH, D)
    cache.select(3, int(column)).copy_(kv.transpose(0, 1))
    return q


# -----------------------------------------------------------------------------
# Triton: one program per row b and head. Heads 0 .. H-1 are q's; KVH of k follow, each with its v

if triton is not None:

    @triton.jit
    def _rotary_cache_kernel(qkv_ptr, cos_ptr, sin_ptr, out_ptr, cache_ptr, column_ptr, stride_xb,
                             stride_xh, stride_cos, stride_c, stride_cb, stride_ch, stride_ct, H,
                             KVH, D, R, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1)
        d = tl.arange(0, BLOCK_D)
        x_ptr = qkv_ptr + b * stride_xb + h * stride_xh

        # Where the rotated head goes: a q into the output, a k into the cache, and its v beside it.
        if h < H:
            target_ptr = out_ptr + (b * H + h) * D
        else:
            column = tl.load(column_ptr)
            target_ptr = cache_ptr + b * stride_cb + (h - H) * stride_ch + column * stride_ct
            v = tl.load(x_ptr + KVH * stride_xh + d, mask=d < D, other=0.0)
            tl.store(target_ptr + stride_c + d, v, mask=d < D)

        # The rotation; beyond R it is x * 1 + 0.
        if INTERLEAVED:
            partner = d ^ 1
        else:
            partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
        cos = tl.load(cos_ptr + b * stride_cos + d, mask=d < R, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * stride_cos + d, mask=d < R, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        other = tl.load(x_ptr + partner, mask=d < R, other=0.0).to(tl.float32)
        tl.store(target_ptr + d, x * cos + other * sin, mask=d < D)


def _launch(qkv, cos, sin, cache, column, interleaved):
    B, heads, D = qkv.shape
    KVH = cache.size(2)
    H = heads - 2 * KVH
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    if cos is None:
        R = 0
        cos = qkv  # not read
        sin = qkv
    else:
        R = cos.size(-1)
        cos = cos.contiguous()
        sin = sin.contiguous()
    out = torch.empty(B, H, D, dtype=qkv.dtype, device=qkv.device)
    _rotary_cache_kernel[(B, H + KVH)](
        qkv, cos, sin, out, cache, column, *qkv.stride()[:2], cos.stride(0), *cache.stride()[:4], H,
        KVH, D, R, INTERLEAVED=interleaved, BLOCK_D=triton.next_power_of_2(D), num_warps=1)
    return out


# -----------------------------------------------------------------------------
# what the engine calls

def rotary_cache(qkv, cos, sin, cache, column, interleaved=False):
    """
    Rotate q and k, write k and v into the cache at `column`, return the rotated q (B, H, D).

    qkv       (B, H + 2 KVH, D), one new token a row: heads of q, then of k, then of v, as one fused
              matmul leaves them. q and k in it may be overwritten
    cos, sin  (B, R) rows of rotary_tables at each row's position (left padding makes it differ from
              the column), R <= D the rotary part of a head; gathered once for all layers. None: no
              rotation, only the write
    cache     (2, B, KVH, T, D), keys and values, written in place
    column    0-dim int64 tensor, the same for all rows
    """
    B, heads, D = qkv.shape
    KVH = cache.size(2)
    fits = cache.ndim == 5 and cache.shape[:2] == (2, B) and cache.size(4) == D
    if not fits or heads <= 2 * KVH:
        raise ValueError(f"expected qkv (B, H + 2 KVH, D), cache (2, B, KVH, T, D), got "
                         f"{tuple(qkv.shape)}, {tuple(cache.shape)}")
    if cos is not None and len(cos) != B:
        raise ValueError(f"cos has {len(cos)} rows for a batch of {B}: gather the tables by the "
                         f"rows' positions")
    if triton is not None and (qkv.is_cuda or INTERPRETED):
        return _launch(qkv, cos, sin, cache, column, interleaved)
    return rotary_cache_reference(qkv, cos, sin, cache, column, interleaved)
