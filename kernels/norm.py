"""
Residual add and normalisation in one pass, for the decoder's blocks.

    s           = x + residual        rounded to x's dtype: it is the residual stream that goes on
    LayerNorm   (s - mean(s)) / sqrt(var(s) + eps) * weight + bias
    RMSNorm     s / sqrt(mean(s^2) + eps) * weight        (Gemma: * (1 + weight), `plus_one`)

Separate ops move 7 x N*C numbers (add: 2 in, 1 out; norm: 1 in for the statistics, 1 in for the
values, 1 out, and a float32 copy where a model casts); one pass moves 4: x and the residual in, the
sum and the normed rows out. For one token a row the launches weigh more still: one in place of two
to six, twice a layer. Inference only: no backward.

LayerNorm: Ba et al. 2016, https://arxiv.org/abs/1607.06450. RMSNorm: Zhang & Sennrich 2019,
https://arxiv.org/abs/1910.07467
"""

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, tl, triton


def add_layer_norm_reference(x, residual, weight, bias, eps):
    """The definition, and the CPU's form, because F.layer_norm sums in float32 in one pass."""
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, weight.shape, weight, bias, eps), x


def add_rms_norm_reference(x, residual, weight, eps, plus_one=False):
    """The definition."""
    if residual is not None:
        x = x + residual
    weight = weight.float()
    if plus_one:
        weight = 1 + weight
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype), x


def _add_rms_norm_pytorch(x, residual, weight, eps, plus_one):
    """The form without Triton: PyTorch's own RMSNorm, which knows no 1 + weight."""
    if residual is not None:
        x = x + residual
    if plus_one:
        return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), eps).to(x.dtype), x
    return F.rms_norm(x, weight.shape, weight, eps), x


# -----------------------------------------------------------------------------
# Triton: one program per row n, the whole row in registers

if triton is not None:

    @triton.jit
    def _add_norm_kernel(x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, sum_ptr, stride_x,
                         stride_r, C, eps, RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                         HAS_BIAS: tl.constexpr, PLUS_ONE: tl.constexpr, BLOCK_C: tl.constexpr):
        n = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK_C)

        # The residual stream: rounded as it is stored, because that is what the next block adds to
        # and what a training forward normalises.
        x = tl.load(x_ptr + n * stride_x + c, mask=c < C, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + n * stride_r + c, mask=c < C, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + n * C + c, rounded, mask=c < C)
            x = rounded.to(tl.float32)

        # The norm.
        if not RMS:
            x = tl.where(c < C, x - tl.sum(x, axis=0) / C, 0.0)
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        if PLUS_ONE:
            weight += 1.0
        normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps) * weight
        if HAS_BIAS:
            normed += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(normed_ptr + n * C + c, normed, mask=c < C)


def _rows(x):
    """x (..., C) -> (N, C), each row contiguous."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.size(-1))


def _launch(x, residual, weight, bias, eps, rms, plus_one):
    C = x.size(-1)
    rows = _rows(x)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if residual is None:
        residual_rows = rows  # not read
        total = x
    else:
        residual_rows = _rows(residual)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    bias_or_any = weight if bias is None else bias  # not read where there is no bias
    BLOCK_C = triton.next_power_of_2(C)
    _add_norm_kernel[(rows.size(0),)](
        rows, residual_rows, weight, bias_or_any, normed, total, rows.stride(0),
        residual_rows.stride(0), C, eps, RMS=rms, HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None, PLUS_ONE=plus_one, BLOCK_C=BLOCK_C,
        num_warps=min(max(BLOCK_C // 512, 1), 8))
    return normed, total


# -----------------------------------------------------------------------------
# what the engine calls

def _check(x, residual, weight, bias=None):
    same_rows = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    same_width = weight.shape == x.shape[-1:] and (bias is None or bias.shape == weight.shape)
    if not (same_rows and same_width):
        shapes = [None if t is None else (tuple(t.shape), t.dtype)
                  for t in (x, residual, weight, bias)]
        raise ValueError(f"expected x and residual (..., C) of one dtype, weight and bias (C,), "
                         f"got {shapes}")


def add_layer_norm(x, residual, weight, bias, eps):
    """
    x, residual   (..., C) of one dtype; residual None: the first norm of a stack, x is the residual
                  stream
    weight, bias  (C,); bias may be None
    returns       normed (..., C), x + residual (..., C) in x's dtype (x itself where residual is
                  None). No backward.
    """
    _check(x, residual, weight, bias)
    if triton is not None and (x.is_cuda or INTERPRETED):
        return _launch(x, residual, weight, bias, eps, rms=False, plus_one=False)
    return add_layer_norm_reference(x, residual, weight, bias, eps)


def add_rms_norm(x, residual, weight, eps, plus_one=False):
    """As add_layer_norm, without mean and bias; plus_one: times 1 + weight, as in Gemma."""
    _check(x, residual, weight)
    if triton is not None and (x.is_cuda or INTERPRETED):
        return _launch(x, residual, weight, None, eps, rms=True, plus_one=plus_one)
    return _add_rms_norm_pytorch(x, residual, weight, eps, plus_one)
