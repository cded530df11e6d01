"""
LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): a linear layer W becomes

    W x + (alpha / dim) B A x          with A (dim, in) and B (out, dim) trained, and W often frozen

B starts at zero, so the model starts as it was. With W frozen (--only_optimize_lora) the model with
its adapters off stays the one it started from, which PPO and DPO use as their reference, for no
memory.
"""

import json
import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from support.flags import UsageError
from support.processes import print0


class LoRALinear(nn.Module):
    """Wraps nn.Linear or GPT-2's Conv1D, whose weight is (in, out)."""

    def __init__(self, base, dim, alpha):
        super().__init__()
        self.base = base
        self.scaling = alpha / dim
        self.enabled = True
        self.transposed = isinstance(base, transformers.pytorch_utils.Conv1D)
        # The sizes are not taken from weight.shape, because that is (0,) where ZeRO 3 has
        # partitioned the weight.
        if self.transposed:
            in_features, out_features = base.nx, base.nf
        else:
            in_features, out_features = base.in_features, base.out_features
        dtype = base.weight.dtype
        self.lora_A = nn.Parameter(torch.empty(dim, in_features, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, dim, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        if not self.enabled:
            return y
        return y + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged_weight(self, weight=None, A=None, B=None):
        """
        The base's weight plus the adapter's part, laid out as in the base. The result is a new
        tensor. The base is never written, because rounding would pile up in it. Tensors that are
        given stand in for the layer's own (a checkpoint's, or ones that ZeRO 3 gathered).
        """
        weight = self.base.weight if weight is None else weight
        A = self.lora_A if A is None else A
        B = self.lora_B if B is None else B
        delta = self.scaling * B.float() @ A.float()
        if self.transposed:
            delta = delta.t()
        return (weight.float() + delta).to(weight.dtype)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias


def add_lora(model, config, log=print0):
    """
    Wraps the linear layers whose name contains --lora_module_name (default: all in the blocks), in
    place, and freezes the rest with --only_optimize_lora. Without --lora_dim the model stays as it
    is.

    raises UsageError where no layer has such a name, or the head has it
    """
    if config.lora_dim == 0:
        return model
    if config.only_optimize_lora:
        model.requires_grad_(False)
        if hasattr(model, "score"):
            model.score.requires_grad_(True)  # because a new head has to be learned

    # Every chosen linear layer is replaced, where its parent holds it, by a LoRALinear around it.
    wrapped = 0
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            name = f"{parent_name}.{child_name}"
            if not isinstance(child, (nn.Linear, transformers.pytorch_utils.Conv1D)):
                continue
            if config.lora_module_name:
                chosen = config.lora_module_name in name
            else:
                chosen = any(part.isdigit() for part in name.split("."))  # numbers name the blocks
            if chosen:
                alpha = config.lora_alpha or 2 * config.lora_dim
                setattr(parent, child_name, LoRALinear(child, config.lora_dim, alpha))
                wrapped += 1

    # Names that chose the head, or nothing.
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    if any(isinstance(head, LoRALinear) for head in heads):
        raise UsageError(f"--lora_module_name {config.lora_module_name} is in the name of the head,"
                         " which takes no adapter; name linear layers of the blocks.")
    if not wrapped:
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise UsageError(f"--lora_module_name {config.lora_module_name} is in no linear layer's "
                         f"name; this model has, for example, {', '.join(linear[:4])}.")
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    rest = "frozen" if config.only_optimize_lora else "trained too"
    log(f"LoRA: {wrapped} layers, {adapters / 1e6:.2f}M adapter parameters, everything else "
        f"{rest}")
    return model


@contextmanager
def adapters_off(model):
    """Inside, the model is what it was before LoRA."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


class WithoutAdapters:
    """A model in training with LoRA, called as the frozen model that it started from."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def __call__(self, *inputs):
        with adapters_off(self.model):
            return self.model(*inputs)


def split_lora_state(model, state):
    """State dict of a model with LoRALinear layers -> (adapters by name, merged plain state)."""
    adapters = {}
    plain = dict(state)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        A = adapters[f"{name}.lora_A"] = plain.pop(f"{name}.lora_A")
        B = adapters[f"{name}.lora_B"] = plain.pop(f"{name}.lora_B")
        base_weight = plain.pop(f"{name}.base.weight")
        # Onto the CPU at once, because the device may have no room for all merged matrices.
        A = A.to(base_weight.device)
        B = B.to(base_weight.device)
        plain[f"{name}.weight"] = layer.merged_weight(base_weight, A, B).cpu()
        if layer.bias is not None:
            plain[f"{name}.bias"] = plain.pop(f"{name}.base.bias")
    return adapters, plain


def save_adapter(adapters, head, model, folder):
    """
    The adapter in PEFT's format, which peft.PeftModel.from_pretrained(base, folder) loads.

    adapters  name -> tensor
    head      name -> tensor of what else was trained: a reward model's score, because PEFT looks
              for it in every adapter of task type SEQ_CLS
    """
    # The tensors, under the names that PEFT gives them.
    folder.mkdir()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    layer = next(iter(layers.values()))
    dim = next(iter(adapters.values())).size(0)  # the first is a lora_A
    tensors = {f"{name}.weight": tensor for name, tensor in adapters.items()}
    tensors.update(head)
    save_file({f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()},
              folder / "adapter_model.safetensors")
    # The config by which PEFT rebuilds the layers.
    peft_config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
        "r": dim,
        "lora_alpha": layer.scaling * dim,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(layers),
        "inference_mode": True,
        "fan_in_fan_out": layer.transposed,
        "base_model_name_or_path": model.config._name_or_path,
    }
    (folder / "adapter_config.json").write_text(json.dumps(peft_config, indent=1) + "\n")
