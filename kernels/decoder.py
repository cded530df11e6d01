"""
One decoder for all model families: the kernels of this folder put together into a forward pass with
a KV cache.

    Family    where a Hugging Face model keeps its weights: an entry of the table FAMILIES
    KVCache   keys and values of the rows in flight
    Decoder   reads a model's weights (aliases where it can, this rank's shard under tensor
              parallelism, gathered layer by layer under ZeRO-3) and runs: `prefill` the prompts,
              then `step` one token a row

The decoder never writes a weight, and has no idea of training: hybrid_engine.InferenceEngine
decides when it lives and what is sampled. Its equal is the Hugging Face model itself:
tests/test_decoder.py holds every family against it.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from operator import attrgetter

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from kernels.activation import ALIASES, FORMS
from kernels.decode_attention import decode_attention, decode_bias, score_bias
from kernels.linear import Linear, can_pack, pack
from kernels.norm import add_layer_norm, add_rms_norm
from kernels.rotary import rotary_cache, rotary_tables, rotate_


# -----------------------------------------------------------------------------
# families: where a Hugging Face model keeps its weights (attribute names as of transformers 5)

@dataclass
class Family:
    """
    Names of modules: `trunk` as seen from the model, embed .. wpe from the trunk, the rest from a
    layer. The defaults are Llama's.
    """
    trunk: str = "model"
    embed: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    wpe: str = ""                             # learned absolute positions
    norm_1: str = "input_layernorm"           # before attention (after it in OPT-350m)
    qkv: tuple = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    unfuse: object = None                     # for a fused QKV: its rows, heads, head width -> q, k
                                              # and v, (H, D, in) each
    out: str = "self_attn.o_proj"
    norm_2: str = "post_attention_layernorm"  # before the MLP; "" where the MLP reads what
                                              # attention reads (GPT-J)
    gate: str = ""                            # activation(gate) * up; without a gate activation(up)
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "hidden_act"            # its name in the config


def three_blocks(rows, H, D):
    """All queries, then all keys, then all values."""
    return rows.unflatten(0, (3, H, D)).unbind(0)


def three_per_head(rows, H, D):
    """Each head's query, key and value together."""
    return rows.unflatten(0, (H, 3, D)).unbind(1)


def codegen_blocks(rows, H, D):
    """One block for each of 4 TPU cores, in the order query, value, key."""
    q, v, k = rows.unflatten(0, (4, 3, H // 4, D)).unbind(1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


LLAMA = Family(gate="mlp.gate_proj")

OPT = Family(
    trunk="model.decoder", norm="final_layer_norm", wpe="embed_positions",
    norm_1="self_attn_layer_norm", out="self_attn.out_proj",
    norm_2="final_layer_norm", up="fc1", down="fc2", activation="activation_function")

GPT2 = Family(
    trunk="transformer", embed="wte", layers="h", norm="ln_f", wpe="wpe",
    norm_1="ln_1", qkv=("attn.c_attn",), unfuse=three_blocks, out="attn.c_proj",
    norm_2="ln_2", up="mlp.c_fc", down="mlp.c_proj", activation="activation_function")

GPT_NEO = replace(
    GPT2, out="attn.attention.out_proj", unfuse=None,
    qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"))

GPTJ = replace(
    GPT2, wpe="", qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"), unfuse=None,
    out="attn.out_proj", norm_2="", up="mlp.fc_in", down="mlp.fc_out")

CODEGEN = replace(GPTJ, qkv=("attn.qkv_proj",), unfuse=codegen_blocks)

BLOOM = Family(
    trunk="transformer", embed="word_embeddings", layers="h", norm="ln_f",
    qkv=("self_attention.query_key_value",), unfuse=three_per_head, out="self_attention.dense",
    up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")

GPT_NEOX = Family(
    trunk="gpt_neox", embed="embed_in", norm="final_layer_norm",
    qkv=("attention.query_key_value",), unfuse=three_per_head, out="attention.dense",
    up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "opt": OPT,
    "gpt2": GPT2,
    "gpt_neo": GPT_NEO,
    "gptj": GPTJ,
    "codegen": CODEGEN,
    "bloom": BLOOM,
    "gpt_neox": GPT_NEOX,
}


# Tokens of the prompts that a prefill runs at once.
PREFILL_TOKENS = 2**14


def submodule(parent, name):
    """The module at a dotted name, or None where a family has no such module (name "")."""
    return attrgetter(name)(parent) if name else None


# -----------------------------------------------------------------------------
# what families differ in besides names

def attention_window(config, layer):
    """How many columns, its own included, a query of this layer sees; 0 for all."""
    if config.model_type == "mistral":
        return config.sliding_window or 0
    if config.model_type == "gpt_neo" and config.attention_layers[layer] == "local":
        return config.window_size
    # other families read no such setting, even where their config has one
    if config.model_type in ("qwen2", "qwen3") and config.layer_types[layer] == "sliding_attention":
        return config.sliding_window
    return 0


def attention_scale(config, layer, head_dim):
    """What q . k is multiplied with: 1 / sqrt(D), but for GPT-Neo (1) and two switches of GPT-2."""
    scale = head_dim ** -0.5
    if config.model_type == "gpt_neo" or not getattr(config, "scale_attn_weights", True):
        scale = 1.0
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        scale /= layer + 1
    return scale


def alibi_slopes(heads):
    """
    (H,) float32, Press et al. 2022: 2^(-8 i / n) for the power of two n <= H, then the odd ones of
    2 n.
    """
    n = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor(slopes)


def rotary_frequencies(model):
    """
    Frequencies (r / 2,) float32, r the rotated part of a head; the factor on cos and sin; whether
    pairs are neighbours (0, 1) or halves (0, r / 2). None without rotary embedding. Llama 3's and
    other fixed scalings come with the model.
    """
    config = model.config
    if config.model_type in ("gptj", "codegen"):
        r = config.rotary_dim
        return 10000.0 ** (-torch.arange(0, r, 2) / r), 1.0, True
    trunk = submodule(model, FAMILIES[config.model_type].trunk)
    rotary = getattr(trunk, "rotary_emb", None)
    if rotary is None:
        return None
    return rotary.inv_freq.float(), rotary.attention_scaling, False


def why_unsupported(model):
    """None, or why the canonical decoder cannot run this model."""
    config = model.config
    if config.model_type not in FAMILIES:
        return (f"model type {config.model_type!r} is not in kernels/decoder.py's FAMILIES "
                f"({', '.join(sorted(FAMILIES))})")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        return "it carries PEFT adapters: merge them into the weights first (merge_and_unload)"
    if not all(p.is_floating_point() for p in model.parameters()):
        return "its weights are quantised"
    family = FAMILIES[config.model_type]
    activation = getattr(config, family.activation, "gelu_new")
    if ALIASES.get(activation, activation) not in FORMS:
        return (f"activation {activation!r} is not in kernels/activation.py "
                f"({', '.join([*FORMS, *ALIASES])})")
    if config.model_type == "bloom" and model.dtype != torch.float32:
        # Hugging Face rounds ALiBi's biases, and the scores with them, to 16 bits. At 700 tokens
        # its training forward is then 0.1 nats per token from a sampler that does not.
        return (f"in {str(model.dtype).removeprefix('torch.')} its training forward rounds ALiBi, "
                "so the decoder would sample from another policy than the one that is trained")
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        return ("its residual connection starts after the norm "
                "(apply_residual_connection_post_layernorm)")
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        return "its products are summed in pieces (slow_but_exact)"
    rotary = getattr(submodule(model, family.trunk), "rotary_emb", None)
    rope_type = getattr(rotary, "rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        return f"rope type {rope_type!r} changes its frequencies with the length"
    return None


# -----------------------------------------------------------------------------
# the decoder

class KVCache:
    """
    Keys and values of the rows in flight, all layers in one allocation.

    data  (L, 2, B, KVH, T, D) model dtype: [layer, 0] keys, [layer, 1] values. All rows write the
          same column. Left of a row's first token is padding (finite, masked), right of the current
          column unwritten memory (never read)
    rows  how many of the B are in flight: they lie at the front, so that compaction moves no
          address
    """

    def __init__(self, layers, rows, kv_heads, length, head_dim, dtype, device):
        self.data = torch.empty(layers, 2, rows, kv_heads, length, head_dim, dtype=dtype,
                                device=device)

    def use(self, rows):
        """
        The first `rows` rows are in flight. Makes the views of each layer that writing and reading
        go through.
        """
        self.rows = rows
        self.layers = [layer[:, :rows] for layer in self.data]  # (2, rows, KVH, T, D)
        self.keys_values = [layer.unbind() for layer in self.layers]

    def keep(self, rows, length):
        """
        Compaction: the rows of the index `rows` (ascending) move to the front, with their first
        `length` columns.
        """
        for layer in self.layers:
            layer[:, :len(rows), :, :length] = layer[:, rows, :, :length]
        self.use(len(rows))

    def move(self, by, length):
        """
        The first `length` columns move right by so many, and zeros stand before them: padding must
        be finite. They move left where `by` is negative.
        """
        first = max(0, -by)
        for layer in self.layers:
            moved = layer[:, :, :, first:length].clone()  # because the two places overlap
            layer[:, :, :, first + by:length + by] = moved
            layer[:, :, :, :max(0, by)] = 0


class Norm:
    """LayerNorm, or RMSNorm where the module has no bias attribute."""

    def __init__(self, module, own, one_plus, embed):
        self.rms = not hasattr(module, "bias")
        self.one_plus = one_plus  # Gemma scales with 1 + w
        self.eps = getattr(module, "variance_epsilon", None) or module.eps
        self.bias = None if self.rms else own(module.bias)
        self.weight = own(module.weight)
        if self.weight is None:  # OPT without elementwise_affine
            self.weight = embed.new_ones(module.normalized_shape)

    def __call__(self, x, residual=None):
        """-> (x + residual) normed, x + residual"""
        if self.rms:
            return add_rms_norm(x, residual, self.weight, self.eps, self.one_plus)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


@dataclass
class Layer:
    norm_1: Norm
    norm_2: Norm           # None: the MLP reads norm_1's output
    qkv: Linear            # rows: H query heads, KVH key heads, KVH value heads
    qk_norm: torch.Tensor  # (H + KVH, D), the weights of Qwen3's RMSNorm of each head, or None
    out: Linear
    gate: Linear           # None: plain MLP
    up: Linear
    down: Linear
    scale: float           # of q . k
    window: int            # columns that a query sees; 0: every column


def linear_weight(module):
    """
    (out, in) weight of nn.Linear, of transformers' Conv1D (stored the other way round) or of
    LoRALinear (merged).
    """
    if hasattr(module, "merged_weight"):
        weight = module.merged_weight()
    else:
        weight = module.weight
    if isinstance(getattr(module, "base", module), Conv1D):
        weight = weight.t()
    return weight


class Decoder:
    """
    One decoder for all families. Reads the weights of `model` when it is built, and never writes
    them.

    B rows in flight, P prompt, T columns of the cache, H query heads, KVH key-value heads, D head
    width, E model width.

    A rollout is one `prefill`, then any number of `step`s, and `keep` when rows leave; where rows
    come too (hybrid_engine.RollingBatch), `join` and `move`. prefill sets what the steps read: the
    rotary tables `cos` and `sin`, each row's first column `start` and the CPU's `bias`.
    """

    def __init__(self, model, pack=True, group=None):
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.ranks = dist.get_world_size(group) if group else 1
        self.pack = pack
        self.family = FAMILIES[model.config.model_type]
        self.rotary = rotary_frequencies(model)
        self.partitioned = any(hasattr(p, "ds_id") for p in model.parameters())  # ZeRO-3
        self._read_shape(model.config)
        self._read_weights(model)

    # -------------------------------------------------------------------------
    # Reading the model.
    #
    # Tensor parallelism (Megatron-LM: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): with
    # a process group of n ranks, rank r holds the r-th of n shares of the query heads, with the
    # key-value heads that these read, and the r-th share of the MLP's columns. H and KVH are then
    # this rank's. Matrices into heads and MLP (qkv, gate, up) are split by outputs, so each rank
    # computes its own part alone. Matrices back (out, down) are split by inputs: each rank's
    # product is a part of the sum, which one all-reduce adds up (`_plus`), two in a layer, or one
    # where attention and MLP are parallel. Biases of that sum are rank 0's alone. With fewer
    # key-value heads than ranks, neighbouring ranks hold the same one. Embedding, norms and head
    # are whole on every rank.

    def _read_shape(self, config):
        """Sizes, and in what the blocks of this family differ."""
        H = config.num_attention_heads
        KVH = getattr(config, "num_key_value_heads", None) or H
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // H
        if H % self.ranks or (KVH % self.ranks and self.ranks % KVH):
            raise ValueError(f"{H} heads and {KVH} key-value heads do not split over {self.ranks} "
                             "ranks: choose an --inference_tp_size that divides both, or the first "
                             "and is a multiple of the second")
        self.heads = H // self.ranks
        self.kv_heads = max(1, KVH // self.ranks)
        self.first_kv_head = self.rank * KVH // self.ranks

        # x + attention + MLP in one sum
        self.parallel = not self.family.norm_2 or getattr(config, "use_parallel_residual", False)
        # norms after the sums (OPT-350m)
        self.post_norm = not getattr(config, "do_layer_norm_before", True)
        self.activation = getattr(config, self.family.activation, "gelu_new")  # BLOOM names none
        self.qk_eps = getattr(config, "rms_norm_eps", None)
        self.gemma = config.model_type == "gemma"
        self.interleaved = self.rotary is not None and self.rotary[2]

    def _read_weights(self, model):
        config = model.config
        trunk = submodule(model, self.family.trunk)
        embed = submodule(trunk, self.family.embed)
        wpe = submodule(trunk, self.family.wpe)
        norm = submodule(trunk, self.family.norm)  # None in a few OPTs
        head = model.get_output_embeddings()
        embed_norm = getattr(trunk, "word_embeddings_layernorm", None)  # BLOOM
        project_in = getattr(trunk, "project_in", None)  # OPT-350m
        project_out = getattr(trunk, "project_out", None)

        # Around the layers.
        self.held = []  # every tensor of a weight, for the accounting
        with self._gathered(embed, head, norm, wpe, embed_norm, project_in, project_out):
            self.embed = self._own(embed.weight)
            self.wpe = None if wpe is None else self._own(wpe.weight)
            self.embed_norm = self._norm(embed_norm)
            self.norm = self._norm(norm)
            self.project_in = self._linear(project_in)
            self.project_out = self._linear(project_out)
            tied = head.weight is embed.weight
            if tied and not (self.pack and can_pack(head.weight)):
                self.head = Linear(self.embed, self._own(head.bias))
            else:
                self.head = self._linear(head)
        self.wpe_offset = getattr(wpe, "offset", 0)  # OPT: 2
        self.embed_scale = None
        if self.gemma:
            self.embed_scale = self.embed.new_tensor(config.hidden_size ** 0.5)
        self.alibi = None
        if config.model_type == "bloom":
            slopes = alibi_slopes(config.num_attention_heads)
            self.alibi = self._share(slopes).to(self.embed.device)

        # The layers, of which ZeRO-3 gathers one at a time.
        self.layers = []
        for i, layer in enumerate(submodule(trunk, self.family.layers)):
            scale = attention_scale(config, i, self.head_dim)
            window = attention_window(config, i)
            with self._gathered(layer):
                self.layers.append(self._layer(layer, scale, window))

    def _layer(self, layer, scale, window):
        family = self.family

        # One matrix for query, key and value.
        qkv = [submodule(layer, name) for name in family.qkv]
        qkv_weight = self._heads([linear_weight(module) for module in qkv])
        qkv_bias = None
        if qkv[0].bias is not None:
            qkv_bias = self._heads([module.bias[:, None] for module in qkv]).squeeze(1)

        # Qwen3's norms of q and k, one weight for each head.
        qk_norm = None
        attention = getattr(layer, "self_attn", None)
        if hasattr(attention, "q_norm"):
            q = attention.q_norm.weight.expand(self.heads, -1)
            k = attention.k_norm.weight.expand(self.kv_heads, -1)
            qk_norm = self._own(torch.cat([q, k]))

        return Layer(
            norm_1=self._norm(submodule(layer, family.norm_1)),
            norm_2=self._norm(submodule(layer, family.norm_2)),
            qkv=self._matrix(qkv_weight, qkv_bias),
            qk_norm=qk_norm,
            out=self._linear(submodule(layer, family.out), split="in"),
            gate=self._linear(submodule(layer, family.gate), split="out"),
            up=self._linear(submodule(layer, family.up), split="out"),
            down=self._linear(submodule(layer, family.down), split="in"),
            scale=scale,
            window=window)

    def _gathered(self, *modules):
        """A context in which the weights of these modules (or None) are whole on this rank."""
        if not self.partitioned:
            return nullcontext()
        parameters = {}  # by identity, because tied ones must be gathered once
        for module in modules:
            if module is not None:
                parameters.update((id(p), p) for p in module.parameters())
        return deepspeed.zero.GatheredParameters(list(parameters.values()))

    def _own(self, tensor):
        """
        An alias of the weight (or None); under ZeRO-3 a copy, since the gathered weight is freed
        after the `with`.
        """
        if tensor is None:
            return None
        tensor = tensor.detach()
        if self.partitioned and not tensor.is_mkldnn:  # what `pack` made is a copy already
            tensor = tensor.clone()
        self.held.append(tensor)
        return tensor

    def _norm(self, module):
        if module is None:
            return None
        return Norm(module, self._own, self.gemma, self.embed)

    def _linear(self, module, split=None):
        """
        split "out": this rank's share of the outputs. "in": its share of the inputs, with which the
        result is the sum over the ranks. None: all of it.
        """
        if module is None:
            return None
        weight = linear_weight(module)
        bias = module.bias
        if split == "out":
            weight = self._share(weight)
            bias = None if bias is None else self._share(bias)
        if split == "in":
            weight = self._share(weight, dim=1)
            bias = bias if self.rank == 0 else None
        return self._matrix(weight, bias)

    def _matrix(self, weight, bias):
        if self.pack and can_pack(weight):
            weight = pack(weight)
        return Linear(self._own(weight), self._own(bias))

    def _share(self, tensor, dim=0):
        """This rank's share of a tensor, along dim."""
        size = tensor.size(dim)
        first = self.rank * size // self.ranks
        end = (self.rank + 1) * size // self.ranks
        return tensor.narrow(dim, first, end - first)

    def _heads(self, rows):
        """
        Three projections (heads * D, in), or one fused, as this rank's rows q | k | v:
        ((H + 2 KVH) D, in).
        """
        if self.family.unfuse:
            q, k, v = self.family.unfuse(rows[0], self.heads * self.ranks, self.head_dim)
        else:
            q, k, v = (r.unflatten(0, (-1, self.head_dim)) for r in rows)
        q = self._share(q)
        k = k.narrow(0, self.first_kv_head, self.kv_heads)
        v = v.narrow(0, self.first_kv_head, self.kv_heads)
        return torch.cat([q, k, v]).flatten(0, 1)

    # -------------------------------------------------------------------------
    # Running.

    def prefill(self, ids, start, cache, copies):
        """
        Begin a rollout with left-padded prompts (B, P), whose first tokens are in the columns start
        (B,). Fills the cache's first P columns of `copies` rows for each prompt, and sets what the
        steps read -> logits (B * copies, V) of the next token.
        """
        P = ids.size(1)
        T = cache.data.size(-2)
        if self.rotary:
            frequencies, factor, interleaved = self.rotary
            cos, sin = rotary_tables(frequencies.to(ids.device), T, factor, interleaved)
            self.cos = cos.to(self.embed.dtype)
            self.sin = sin.to(self.embed.dtype)
        self._begin(start.repeat_interleave(copies, 0), T)

        # Some prompts at a time, because what a layer computes on the way is larger than the cache.
        count = max(1, PREFILL_TOKENS // P)
        logits = []
        for first in range(0, len(ids), count):
            prompts = slice(first, first + count)
            logits.append(self._prefill(ids[prompts], start[prompts], cache, copies, first))
        return torch.cat(logits).repeat_interleave(copies, 0)

    def join(self, ids, column, cache):
        """
        One prompt (1, P) takes its place behind the rows in flight, and ends before `column`, where
        these are -> logits (1, V) of its next token. There was a `prefill` before, and the cache
        has its row in flight already (KVCache.use).
        """
        start = column - ids.size(1)
        row = len(self.start)
        self._begin(F.pad(self.start, (0, 1), value=start), self.length)
        for layer in cache.layers:
            layer[:, row, :, :start] = 0  # because padding must be finite
        return self._prefill(ids, torch.zeros_like(ids[:, 0]), cache, 1, first=row, column=start)

    def move(self, by):
        """All rows have moved right by so many columns (KVCache.move)."""
        self._begin(self.start + by, self.length)

    def _prefill(self, ids, start, cache, copies, first, column=0):
        """
        Prompts (b, P), of which `first` others stand before -> logits (b, V). Their first column is
        `column` of the cache.
        """
        P = ids.size(1)
        rows = slice(first * copies, (first + len(ids)) * copies)
        columns = torch.arange(P, device=ids.device)
        positions = (columns - start[:, None]).clamp(min=0)
        rotation = self._rotation(positions)
        masks = self._prefill_masks(start, P)

        def attention(i, layer, qkv):
            if self.rotary:
                rotate_(qkv[:, :, :-self.kv_heads], *rotation, self.interleaved)
            q, kv = qkv.split([self.heads, 2 * self.kv_heads], dim=2)
            q = q.transpose(1, 2)
            kv = kv.unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)  # (2, b, KVH, P, D)
            written = cache.layers[i][:, rows, :, column:column + P]
            written.copy_(kv.repeat_interleave(copies, 1))
            # every query head gets its group's key and value
            k, v = kv.repeat_interleave(self.heads // self.kv_heads, 2)
            a = F.scaled_dot_product_attention(q, k, v, masks[layer.window], scale=layer.scale)
            return a.transpose(1, 2).flatten(2)

        x, delta = self._run(ids, positions, attention)

        # Left-padded prompts end in the last column.
        x = x[:, -1]
        if delta is not None:
            delta = delta[:, -1]
        return self._logits(x, delta)

    def step(self, tokens, positions, column, cache):
        """
        One token a row, (B,), written to `column` (0-dim, the same for all) -> logits (B, V) of the
        next.

        On a GPU nothing in here waits for the device; weights, cache and tables keep their
        addresses as long as no row leaves.
        """
        rotation = self._rotation(positions)
        end = column + 1

        def attention(i, layer, qkv):
            q = rotary_cache(qkv, *rotation, cache.layers[i], column, self.interleaved)
            keys, values = cache.keys_values[i]
            a = decode_attention(q, keys, values, self.start, end, layer.scale, self.alibi,
                                 layer.window, self.bias)
            return a.flatten(1)

        x, delta = self._run(tokens, positions, attention)
        return self._logits(x, delta)

    def keep(self, rows):
        """Rows leave the batch: only those of the index `rows` stay."""
        self._begin(self.start[rows], self.length)

    def _begin(self, start, length):
        """
        What the steps ask about the rows in flight: the column of each row's first token, and the
        bias made of these columns, which the CPU's attention adds to its scores.
        """
        self.start = start
        self.length = length
        self.bias = None
        if not start.is_cuda:
            self.bias = decode_bias(start, length, self.kv_heads, self.alibi)

    def _prefill_masks(self, start, P):
        """
        What is added to the scores of prompts (B, P): -inf on later columns and outside the window,
        score_bias elsewhere. One (B, 1 or H, P, P) for each of the layers' windows, by window.
        """
        key = torch.arange(P, device=start.device)
        query = key[:, None]
        bias = score_bias(start, P, self.embed.dtype, self.alibi)[:, :, None]
        masks = {}
        for window in {layer.window for layer in self.layers}:
            unseen = (key > query) | (key <= query - (window or P))
            masks[window] = bias.masked_fill(unseen, -math.inf)
        return masks

    def _rotation(self, positions):
        """cos and sin of each position, or None, None without rotary embedding."""
        if self.rotary is None:
            return None, None
        return self.cos[positions], self.sin[positions]

    def _run(self, ids, positions, attention):
        """
        ids, positions (...) -> (x, delta), both (..., E). Their sum is the residual stream before
        the final norm; delta may be None. The addition is left to the next norm, whose GPU kernel
        adds and normalises in one pass. Inside, x and delta stand for the stream in the same way.

        attention(i, layer, qkv) -> (..., H D), from qkv (..., H + 2 KVH, D) before rotation, which
        it may overwrite
        """
        x = F.embedding(ids, self.embed)
        if self.gemma:
            x = x * self.embed_scale
        if self.embed_norm is not None:
            x, _ = self.embed_norm(x)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.wpe is not None:
            x = x + F.embedding(positions + self.wpe_offset, self.wpe)

        delta = None
        for i, layer in enumerate(self.layers):
            # Attention, of the normed stream; in OPT-350m of the stream itself, which is whole.
            if self.post_norm:
                h = x
            else:
                h, x = layer.norm_1(x, delta)
            a = attention(i, layer, self._qkv(layer, h))

            # The MLP, and the two sums in the order of the family.
            if self.parallel:
                if layer.norm_2 is not None:
                    h, _ = layer.norm_2(x)
                m = self._mlp(layer, h)
                x, delta = self._plus(x, (layer.out, a), (layer.down, m))
            elif self.post_norm:
                x, delta = self._plus(x, (layer.out, a))
                x, _ = layer.norm_1(x, delta)
                m = self._mlp(layer, x)
                x, delta = self._plus(x, (layer.down, m))
                x, _ = layer.norm_2(x, delta)
                delta = None
            else:
                x, delta = self._plus(x, (layer.out, a))
                h, x = layer.norm_2(x, delta)
                m = self._mlp(layer, h)
                x, delta = self._plus(x, (layer.down, m))
        return x, delta

    def _qkv(self, layer, x):
        """x (..., E) -> (..., H + 2 KVH, D), q and k normed where the family does so."""
        qkv = layer.qkv(x)
        qkv = qkv.view(*qkv.shape[:-1], -1, self.head_dim)
        if layer.qk_norm is not None:
            qk = qkv.narrow(-2, 0, self.heads + self.kv_heads)
            qk.copy_(F.rms_norm(qk, qk.shape[-1:], eps=self.qk_eps) * layer.qk_norm)
        return qkv

    def _mlp(self, layer, h):
        """h (..., E) -> the MLP's columns (..., F), before `down`."""
        if layer.gate is None:
            return layer.up.activated(h, self.activation)
        return layer.gate.activated(h, self.activation, times=layer.up(h))

    def _plus(self, x, *products):
        """
        x + the sum of linear(a) over the pairs (linear, a) and over the group's ranks, as (x,
        delta). Where one process multiplies by oneDNN's matrices the sum is made within the
        products, and delta is None.
        """
        first_linear, _ = products[0]
        within_products = self.group is None and first_linear.packed
        total = x if within_products else None
        for linear, a in products:
            total = linear(a, residual=total)
        if within_products:
            return total, None
        if self.group:
            dist.all_reduce(total, group=self.group)
        return x, total

    def _logits(self, x, delta):
        """(x, delta) as _run returns them -> logits (..., V)."""
        if self.norm is not None:
            x, _ = self.norm(x, delta)
        elif delta is not None:
            x = x + delta
        if self.project_out is not None:
            x = self.project_out(x)
        return self.head(x)
