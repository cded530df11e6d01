"""
Residual add and normalisation in one pass, for the decoder's blocks.

    s         = x + residual                          rounded to x's dtype: it is the residual stream that goes on
    LayerNorm   (s - mean(s)) / sqrt(var(s) + eps) * weight + bias
    RMSNorm     s / sqrt(mean(s^2) + eps) * weight           (Gemma: * (1 + weight), `plus_one`)

Separate ops move 7 x N*C numbers (add: 2 in, 1 out; norm: 1 in for the statistics, 1 in for the values, 1 out, and a
float32 copy where a model casts); one pass moves 4: x and the residual in, the sum and the normed rows out. For one
token a row the launches weigh more still: one in place of two to six, twice a layer. Inference only: no backward.

LayerNorm: Ba et al. 2016, https://arxiv.org/abs/1607.06450. RMSNorm: Zhang & Sennrich 2019,
https://arxiv.org/abs/1910.07467
"""

import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton build for this platform: PyTorch serves every call
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as @triton.jit does


def add_layer_norm_reference(x, residual, weight, bias, eps):
    """The definition, and the CPU's form: F.layer_norm sums in float32 in one pass."""
    x = x if residual is None else x + residual
    return F.layer_norm(x, weight.shape, weight, bias, eps), x


def add_rms_norm_reference(x, residual, weight, eps, plus_one=False):
    """The definition."""
    x = x if residual is None else x + residual
    weight = 1 + weight.float() if plus_one else weight.float()
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype), x


# -----------------------------------------------------------------------------
# Triton: one program per row n, the whole row in registers

if triton is not None:

    @triton.jit
    def _add_norm_kernel(x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, sum_ptr, stride_x, stride_r, C, eps,
                         RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, PLUS_ONE: tl.constexpr,
                         BLOCK_C: tl.constexpr):
        n = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK_C)
        x = tl.load(x_ptr + n * stride_x + c, mask=c < C, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + n * stride_r + c, mask=c < C, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + n * C + c, rounded, mask=c < C)
            x = rounded.to(tl.float32)  # what the next block adds to, and what a training forward normalises
        if not RMS:
            x = tl.where(c < C, x - tl.sum(x, axis=0) / C, 0.0)
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        if PLUS_ONE:
            weight += 1.0
        normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps) * weight
        if HAS_BIAS:
            normed += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(normed_ptr + n * C + c, normed, mask=c < C)


def _launch(x, residual, weight, bias, eps, rms, plus_one):
    C = x.size(-1)
    rows = x.reshape(-1, C) if x.stride(-1) == 1 else x.contiguous().view(-1, C)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if residual is None:
        residual_rows, total = rows, x
    else:
        residual_rows = residual.reshape(-1, C) if residual.stride(-1) == 1 else residual.contiguous().view(-1, C)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BLOCK_C = triton.next_power_of_2(C)
    _add_norm_kernel[(rows.size(0),)](rows, residual_rows, weight, weight if bias is None else bias, normed, total,
                                      rows.stride(0), residual_rows.stride(0), C, eps, RMS=rms,
                                      HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, PLUS_ONE=plus_one,
                                      BLOCK_C=BLOCK_C, num_warps=min(max(BLOCK_C // 512, 1), 8))
    return normed, total


def _check(x, residual, weight, bias=None):
    if (residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype)) or \
            weight.shape != x.shape[-1:] or (bias is not None and bias.shape != weight.shape):
        shapes = [None if t is None else (tuple(t.shape), t.dtype) for t in (x, residual, weight, bias)]
        raise ValueError(f"expected x and residual (..., C) of one dtype, weight and bias (C,), got {shapes}")


# -----------------------------------------------------------------------------
# what the engine calls

def add_layer_norm(x, residual, weight, bias, eps):
    """
    x, residual  (..., C) of one dtype; residual None: the first norm of a stack, x is the residual stream
    weight, bias (C,); bias may be None
    returns      normed (..., C), x + residual (..., C) in x's dtype (x itself where residual is None). No backward.
    """
    _check(x, residual, weight, bias)
    if triton is None or not (x.is_cuda or INTERPRETED):
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return _launch(x, residual, weight, bias, eps, rms=False, plus_one=False)


def add_rms_norm(x, residual, weight, eps, plus_one=False):
    """As add_layer_norm, without mean and bias; plus_one multiplies by (1 + weight), as Gemma does."""
    _check(x, residual, weight)
    if triton is None or not (x.is_cuda or INTERPRETED):
        x = x if residual is None else x + residual
        if plus_one:
            return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), eps).to(x.dtype), x
        return F.rms_norm(x, weight.shape, weight, eps), x
    return _launch(x, residual, weight, None, eps, rms=True, plus_one=plus_one)
