"""
A matrix product with what stands beside it, for the decoder's blocks.

    linear(x)                       x W^T + b
    linear(x, residual)             residual + x W^T + b
    linear.activated(x, f)          f(x W^T + b)
    linear.activated(x, f, times)   f(x W^T + b) * times    the gate of a gated MLP, its other half

On a CPU the weight can be copied into oneDNN's own layout, blocks as its inner loop reads them,
when a rollout begins: then one call does a line of this table. For 1 and for 16 rows of OPT-125M's
first MLP matrix (768 to 3072, relu, one core) that is 2.8 and 2.3 times as fast as F.linear and
relu in float32, 2.0 and 1.2 times in bf16. Elsewhere the product is the library's, the rest a
kernel of activation.py; the residual is better left to norm.py, whose kernel adds it on its way.
Inference only: no backward.

oneDNN: https://oneapi-src.github.io/oneDNN (primitive attributes: post-ops; weights in format
`any`)
"""

import torch
import torch.nn.functional as F

from kernels import INTERPRETED
from kernels.activation import ALIASES, act, gated_act

# an activation's name here -> its name, scalars and variant in oneDNN
ONEDNN = {"relu": ("relu", [], ""), "gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh"),
          "silu": ("swish", [], "")}


def can_pack(weight):
    """
    Whether oneDNN has a fast matmul for this weight: on a CPU, in float32, or in bf16 where the
    processor knows that.
    """
    if weight.device.type != "cpu" or INTERPRETED or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight):
    """A copy in oneDNN's layout, by the private op that torch.compile calls for frozen weights."""
    rows = 32  # a hint, not a limit
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


class Linear:
    """
    weight (out, in), or what `pack` made of it; bias (out,) or None. x (..., in) -> (..., out) in
    x's dtype.
    """

    def __init__(self, weight, bias):
        self.weight = weight
        self.bias = bias
        self.packed = weight.is_mkldnn

    def __call__(self, x, residual=None):
        if self.packed and residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias,
                                                             "add")
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else residual + y

    def activated(self, x, name, times=None):
        """name: as Hugging Face configs have it (activation.py); times (..., out) or None."""
        if self.packed:
            activation = ONEDNN[ALIASES.get(name, name)]
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *activation)
            return y if times is None else y.mul_(times)
        if times is None:
            return act(F.linear(x, self.weight), name, self.bias)
        return gated_act(F.linear(x, self.weight, self.bias), times, name)
