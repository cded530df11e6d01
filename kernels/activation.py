"""
The MLP's activation with what stands beside it: the bias before, or the product of a gated MLP.

    act(x, name, bias)          f(x + bias)            OPT: relu, GPT-2: gelu_tanh, Pythia: gelu
    gated_act(gate, up, name)   f(gate) * up           SwiGLU: silu, GeGLU: gelu or gelu_tanh

    relu       max(x, 0)                  gelu       x/2 (1 + erf(x / sqrt 2))
    silu       x sigmoid(x)               gelu_tanh  x/2 (1 + tanh u) = x sigmoid(2u),
                                                     u = sqrt(2/pi) (x + 0.044715 x^3)

The bias add alone reads and writes N*F numbers before the activation reads them again; so does a
gate's activation before the product. In one pass the traffic is the inputs once and the output
once. Inference only: no backward.

GELU: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415. Gated forms: Shazeer 2020,
https://arxiv.org/abs/2002.05202
"""

import math

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, tl, triton


def _gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


FORMS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu}
# Hugging Face's config names that mean one of the four
ALIASES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


def act_reference(x, name, bias=None):
    """The definition. x (..., F), bias (F,) or None -> (..., F)."""
    if bias is not None:
        x = x + bias
    return FORMS[ALIASES.get(name, name)](x)


def gated_act_reference(gate, up, name):
    """The definition. gate, up (..., F) -> (..., F)."""
    return FORMS[ALIASES.get(name, name)](gate) * up


# -----------------------------------------------------------------------------
# the CPU's forms

def _gelu_tanh_cpu(x):
    """
    The sigmoid form, x sigmoid(2u): twice as fast as F.gelu(approximate="tanh"), because PyTorch's
    exp on a CPU is faster than its tanh.
    """
    y = x.float()
    linear = 2 * math.sqrt(2 / math.pi)
    cubic = 2 * math.sqrt(2 / math.pi) * 0.044715
    twice_u = (y * y).mul_(cubic).add_(linear).mul_(y)
    return twice_u.sigmoid_().mul_(y).to(x.dtype)


CPU_FORMS = {**FORMS, "gelu_tanh": _gelu_tanh_cpu}


# -----------------------------------------------------------------------------
# Triton: one program per row n and block of columns f

if triton is not None:

    @triton.jit
    def _activate(x, NAME: tl.constexpr):
        if NAME == "relu":
            y = tl.maximum(x, 0.0)
        elif NAME == "gelu":
            y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        elif NAME == "gelu_tanh":
            y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))  # 2 sqrt(2/pi)
        else:
            y = x * tl.sigmoid(x)
        return y

    @triton.jit
    def _act_kernel(x_ptr, bias_ptr, up_ptr, out_ptr, stride_xn, stride_un, F, NAME: tl.constexpr,
                    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, BLOCK_F: tl.constexpr):
        n = tl.program_id(0).to(tl.int64)
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        x = tl.load(x_ptr + n * stride_xn + f, mask=f < F, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)
        y = _activate(x, NAME)
        if GATED:
            y *= tl.load(up_ptr + n * stride_un + f, mask=f < F, other=0.0).to(tl.float32)
        tl.store(out_ptr + n * F + f, y, mask=f < F)


def _rows(x):
    """x (..., F) -> (N, F), each row contiguous."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, x.size(-1))


def _launch(x, name, bias=None, up=None):
    F = x.size(-1)
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # the kernel reads neither pointer where there is no such tensor
    bias_or_any = rows if bias is None else bias
    up_rows = rows if up is None else _rows(up)
    BLOCK_F = min(triton.next_power_of_2(F), 1024)
    _act_kernel[(rows.size(0), triton.cdiv(F, BLOCK_F))](
        rows, bias_or_any, up_rows, out, rows.stride(0), up_rows.stride(0), F, NAME=name,
        HAS_BIAS=bias is not None, GATED=up is not None, BLOCK_F=BLOCK_F)
    return out


# -----------------------------------------------------------------------------
# what the engine calls

def _known(name):
    name = ALIASES.get(name, name)
    if name not in FORMS:
        raise ValueError(f"activation {name!r} is not known; known are "
                         f"{', '.join([*FORMS, *ALIASES])}")
    return name


def act(x, name, bias=None):
    """
    f(x + bias), computed in float32. x (..., F), bias (F,) of its dtype or None -> (..., F) in x's
    dtype.
    """
    name = _known(name)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"expected bias ({x.size(-1)},), got {tuple(bias.shape)}")
    if triton is not None and (x.is_cuda or INTERPRETED):
        return _launch(x, name, bias)
    if x.is_cuda:
        return act_reference(x, name, bias)
    if bias is not None:
        x = x + bias
    return CPU_FORMS[name](x)


def gated_act(gate, up, name):
    """
    f(gate) * up. gate, up (..., F) of one dtype, halves of one fused matmul's output or apart ->
    (..., F).
    """
    name = _known(name)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"expected gate and up (..., F) of one dtype, got {tuple(gate.shape)} "
                         f"{gate.dtype} and {tuple(up.shape)} {up.dtype}")
    if triton is not None and (gate.is_cuda or INTERPRETED):
        return _launch(gate, name, up=up)
    if gate.is_cuda:
        return gated_act_reference(gate, up, name)
    return CPU_FORMS[name](gate).mul_(up)
