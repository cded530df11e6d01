"""
Rotary position of one new token's q and k, and the write of its k and v into the static KV cache.

    half-split (LLaMA, NeoX)   pairs (x[i], x[i + R/2]), i < R/2          R = rotary_dim; x[R:] passes as it is
    interleaved (GPT-J)        pairs (x[2i], x[2i + 1])
    (a, b) -> (a cos - b sin, b cos + a sin)    cos, sin of position * frequency[i] by table: any rope scaling works

    cache_k[b, :, column] = rotated k[b];  cache_v[b, :, column] = v[b]

A decode step does this in every layer for a few kB, so what counts is launches, not bytes: one here, about twelve as
PyTorch ops. `column` is a tensor, so a captured CUDA graph serves every step. Inference only: no backward.

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


def rotate(x, cos, sin, interleaved=False):
    """The definition of the rotation. x (B, H, D), cos and sin (B, R/2) of each row's position -> (B, H, D)."""
    R = 2 * cos.size(-1)
    cos, sin = cos[:, None], sin[:, None]  # (B, 1, R/2): the same for every head
    head, rest = x[..., :R], x[..., R:]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    head = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((head.to(x.dtype), rest), dim=-1) if rest.size(-1) else head.to(x.dtype)


def rotary_cache_reference(q, k, v, cos, sin, cache_k, cache_v, column, positions=None, interleaved=False):
    """The definition, and the CPU's form: q and k are rotated together, which halves the number of ops."""
    if cos is not None:
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        q, k = rotate(torch.cat((q, k), dim=1), cos, sin, interleaved).split((q.size(1), k.size(1)), dim=1)
    cache_k.select(2, int(column)).copy_(k)
    cache_v.select(2, int(column)).copy_(v)
    return q


# -----------------------------------------------------------------------------
# Triton: one program per row b and head; heads 0 .. H-1 are q's, then come KVH of k and v

if triton is not None:

    @triton.jit
    def _rotary_cache_kernel(q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, cache_k_ptr, cache_v_ptr, column_ptr,
                             positions_ptr, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
                             stride_cos, stride_ckb, stride_ckh, stride_ckt, stride_cvb, stride_cvh, stride_cvt, H,
                             D, R, HAS_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1)
        d = tl.arange(0, BLOCK_D)
        column = tl.load(column_ptr)
        if h < H:
            source_ptr = q_ptr + b * stride_qb + h * stride_qh
            target_ptr = out_ptr + (b * H + h) * D
        else:
            source_ptr = k_ptr + b * stride_kb + (h - H) * stride_kh
            target_ptr = cache_k_ptr + b * stride_ckb + (h - H) * stride_ckh + column * stride_ckt
            v = tl.load(v_ptr + b * stride_vb + (h - H) * stride_vh + d, mask=d < D, other=0.0)
            tl.store(cache_v_ptr + b * stride_cvb + (h - H) * stride_cvh + column * stride_cvt + d, v, mask=d < D)
        if INTERLEAVED:
            partner, pair, first = d ^ 1, d // 2, d % 2 == 0
        else:
            first = d < R // 2
            partner, pair = tl.where(first, d + R // 2, d - R // 2), tl.where(first, d, d - R // 2)
        row = tl.load(positions_ptr + b) if HAS_POSITIONS else b
        cos = tl.load(cos_ptr + row * stride_cos + pair, mask=d < R, other=1.0).to(tl.float32)  # beyond R: x * 1 + 0
        sin = tl.load(sin_ptr + row * stride_cos + pair, mask=d < R, other=0.0).to(tl.float32)
        x = tl.load(source_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        other = tl.load(source_ptr + partner, mask=d < R, other=0.0).to(tl.float32)
        tl.store(target_ptr + d, x * cos + tl.where(first, -other, other) * sin, mask=d < D)


# -----------------------------------------------------------------------------
# what the engine calls

def rotary_cache(q, k, v, cos, sin, cache_k, cache_v, column, positions=None, interleaved=False):
    """
    Rotate q and k, write k and v into the caches at `column`, return the rotated q (B, H, D).

    q                 (B, H, D); k, v (B, KVH, D): one new token a row, may be views of one fused matmul's output
    cos, sin          (T, R/2) tables indexed by `positions`, or without positions (B, R/2), gathered already (once for
                      all layers); float32, R <= D the rotary part of a head; None: no rotation, only the write
    cache_k, cache_v  (B, KVH, T, D), written in place;  column  0-dim int64 tensor, the same for all rows
    positions         (B,) int64, each row's rotary position (left padding makes it differ from the column), or None
    """
    if q.ndim != 3 or k.shape != v.shape or cache_k.shape[:2] != k.shape[:2] or cache_k.size(-1) != k.size(-1):
        raise ValueError(f"expected q (B, H, D), k and v (B, KVH, D), caches (B, KVH, T, D), got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}, {tuple(cache_k.shape)}")
    if cos is not None and positions is None and cos.size(0) != q.size(0):
        raise ValueError(f"cos has {cos.size(0)} rows for a batch of {q.size(0)}: gather it by row, or pass positions")
    if triton is None or not (q.is_cuda or INTERPRETED):
        return rotary_cache_reference(q, k, v, cos, sin, cache_k, cache_v, column, positions, interleaved)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    (B, H, D), R = q.shape, 0 if cos is None else 2 * cos.size(-1)
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    table = q if cos is None else cos.contiguous()
    _rotary_cache_kernel[(B, H + k.size(1))](
        q, k, v, table, q if cos is None else sin.contiguous(), out, cache_k, cache_v, column,
        column if positions is None else positions, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], table.stride(0),
        *cache_k.stride()[:3], *cache_v.stride()[:3], H, D, R, HAS_POSITIONS=positions is not None,
        INTERLEAVED=interleaved, BLOCK_D=triton.next_power_of_2(D), num_warps=1)
    return out
