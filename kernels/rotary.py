"""
Rotary position of one new token's q and k, and the write of its k and v into the static KV cache.

    half-split (LLaMA, NeoX)   pairs (x[i], x[i + R/2]), i < R/2          R = rotary_dim; x[R:] passes as it is
    interleaved (GPT-J)        pairs (x[2i], x[2i + 1])
    (a, b) -> (a cos - b sin, b cos + a sin)    cos, sin of position * frequency[i] by table: any rope scaling works

As x[d] cos[d] + x[partner of d] sin[d], with tables as wide as the rotated part: sin is negative where d is an a.

    cache[0, b, :, column] = rotated k[b];  cache[1, b, :, column] = v[b]

A decode step does this in every layer for a few kB, so what counts is launches, not bytes: one here, about seven as
PyTorch ops. `column` is a tensor, so that no step waits for the CPU to read it. Inference only: no backward.

RoFormer: Su et al. 2021, eq. 34, https://arxiv.org/abs/2104.09864
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton build for this platform: PyTorch serves every call
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as @triton.jit does


def rotary_tables(frequencies, length, factor=1.0, interleaved=False):
    """frequencies (R/2,) float32, in radians a position -> cos, sin (length, R) float32, both times factor."""
    angles = torch.arange(length, device=frequencies.device)[:, None] * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if interleaved:
        return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate_(x, cos, sin, interleaved=False):
    """The definition of the rotation, in place. x (..., H, D); cos, sin (..., R) of each token's position."""
    x, cos, sin = x[..., :cos.size(-1)], cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for every head
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(x.size(-1) // 2, -1)
    x.copy_(torch.addcmul(x * cos, partner, sin))


def rotary_cache_reference(qkv, cos, sin, cache, column, interleaved=False):
    """The definition, and the CPU's form: q and k are rotated together, in place, which halves the number of ops."""
    KVH = cache.size(2)
    if cos is not None:
        rotate_(qkv[:, :-KVH], cos, sin, interleaved)
    q, kv = qkv[:, :-2 * KVH], qkv[:, -2 * KVH:]
    cache.select(3, int(column)).copy_(kv.unflatten(1, (2, KVH)).transpose(0, 1))
    return q


# -----------------------------------------------------------------------------
# Triton: one program per row b and head; heads 0 .. H-1 are q's, then come KVH of k, each with its v

if triton is not None:

    @triton.jit
    def _rotary_cache_kernel(qkv_ptr, cos_ptr, sin_ptr, out_ptr, cache_ptr, column_ptr, stride_xb, stride_xh,
                             stride_cos, stride_c, stride_cb, stride_ch, stride_ct, H, KVH, D, R,
                             INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1)
        d = tl.arange(0, BLOCK_D)
        x_ptr = qkv_ptr + b * stride_xb + h * stride_xh
        if h < H:
            target_ptr = out_ptr + (b * H + h) * D
        else:
            target_ptr = cache_ptr + b * stride_cb + (h - H) * stride_ch + tl.load(column_ptr) * stride_ct
            v = tl.load(x_ptr + KVH * stride_xh + d, mask=d < D, other=0.0)
            tl.store(target_ptr + stride_c + d, v, mask=d < D)
        if INTERLEAVED:
            partner = d ^ 1
        else:
            partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
        cos = tl.load(cos_ptr + b * stride_cos + d, mask=d < R, other=1.0).to(tl.float32)  # beyond R: x * 1 + 0
        sin = tl.load(sin_ptr + b * stride_cos + d, mask=d < R, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        other = tl.load(x_ptr + partner, mask=d < R, other=0.0).to(tl.float32)
        tl.store(target_ptr + d, x * cos + other * sin, mask=d < D)


# -----------------------------------------------------------------------------
# what the engine calls

def rotary_cache(qkv, cos, sin, cache, column, interleaved=False):
    """
    Rotate q and k, write k and v into the cache at `column`, return the rotated q (B, H, D).

    qkv       (B, H + 2 KVH, D), one new token a row: heads of q, then of k, then of v, as one fused matmul leaves them.
              q and k in it may be overwritten
    cos, sin  (B, R) rows of rotary_tables at each row's position (left padding makes it differ from the column), R <= D
              the rotary part of a head; gathered once for all layers. None: no rotation, only the write
    cache     (2, B, KVH, T, D), keys and values, written in place;  column  0-dim int64 tensor, the same for all rows
    """
    (B, heads, D), KVH = qkv.shape, cache.size(2)
    if cache.ndim != 5 or cache.shape[:2] != (2, B) or cache.size(4) != D or heads <= 2 * KVH:
        raise ValueError(f"expected qkv (B, H + 2 KVH, D), cache (2, B, KVH, T, D), got {tuple(qkv.shape)}, "
                         f"{tuple(cache.shape)}")
    if cos is not None and len(cos) != B:
        raise ValueError(f"cos has {len(cos)} rows for a batch of {B}: gather the tables by the rows' positions")
    if triton is None or not (qkv.is_cuda or INTERPRETED):
        return rotary_cache_reference(qkv, cos, sin, cache, column, interleaved)
    H, R = heads - 2 * KVH, 0 if cos is None else cos.size(-1)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    out = torch.empty(B, H, D, dtype=qkv.dtype, device=qkv.device)
    cos, sin = (qkv, qkv) if cos is None else (cos.contiguous(), sin.contiguous())
    _rotary_cache_kernel[(B, H + KVH)](qkv, cos, sin, out, cache, column, *qkv.stride()[:2], cos.stride(0),
                                       *cache.stride()[:4], H, KVH, D, R, INTERLEAVED=interleaved,
                                       BLOCK_D=triton.next_power_of_2(D), num_warps=1)
    return out
