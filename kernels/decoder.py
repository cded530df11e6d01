"""
One decoder for all model families: the kernels of this folder put together into a forward pass with a KV cache.

    Family    where a Hugging Face model keeps its weights: a line of the table FAMILIES
    Decoder   reads them (aliases where it can, this rank's shard under tensor parallelism, gathered layer by layer
              under ZeRO-3) and runs: `prefill` the prompts, then `step` one token a row
    KVCache   keys and values of the rows in flight

It never writes a weight, and has no idea of training: hybrid_engine.InferenceEngine decides when it lives and what is
sampled. Its equal is the Hugging Face model itself: tests/test_decoder.py holds every family against it.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from operator import attrgetter

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

from kernels.activation import ALIASES, FORMS
from kernels.decode_attention import decode_attention, decode_bias, score_bias
from kernels.linear import Linear, can_pack, pack
from kernels.norm import add_layer_norm, add_rms_norm
from kernels.rotary import rotary_cache, rotary_tables, rotate_


# -----------------------------------------------------------------------------
# families: where a Hugging Face model keeps its weights (attribute names as of transformers 5)

@dataclass
class Family:
    """Module names: `trunk` from the model, embed .. wpe from the trunk, the rest from a layer. Defaults: Llama's."""
    trunk: str = "model"
    embed: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    wpe: str = ""                             # learned absolute positions
    norm_1: str = "input_layernorm"           # before attention (after it in OPT-350m)
    qkv: tuple = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    norm_2: str = "post_attention_layernorm"  # before the MLP; "" where the MLP reads norm_1's output (GPT-J)
    gate: str = ""                            # activation(gate) * up; without a gate activation(up)
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    activation: str = "hidden_act"            # its name in the config
    unfuse: object = None                     # rows of a fused QKV, heads, head width -> q, k, v: (H, D, in) each


def codegen_blocks(rows, H, D):  # one block for each of 4 TPU cores, in the order query, value, key
    q, v, k = rows.unflatten(0, (4, 3, H // 4, D)).unbind(1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


three_blocks = lambda rows, H, D: rows.unflatten(0, (3, H, D)).unbind(0)
three_per_head = lambda rows, H, D: rows.unflatten(0, (H, 3, D)).unbind(1)
GPT = dict(trunk="transformer", embed="wte", layers="h", norm="ln_f", norm_1="ln_1", norm_2="ln_2",
           activation="activation_function")
LLAMA = Family(gate="mlp.gate_proj")

FAMILIES = {
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma": LLAMA,
    "opt": Family(trunk="model.decoder", norm="final_layer_norm", wpe="embed_positions", norm_1="self_attn_layer_norm",
                  out="self_attn.out_proj", norm_2="final_layer_norm", up="fc1", down="fc2",
                  activation="activation_function"),
    "gpt2": Family(**GPT, wpe="wpe", qkv=("attn.c_attn",), unfuse=three_blocks, out="attn.c_proj", up="mlp.c_fc",
                   down="mlp.c_proj"),
    "gpt_neo": Family(**GPT, wpe="wpe", out="attn.attention.out_proj", up="mlp.c_fc", down="mlp.c_proj",
                      qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")),
    "gptj": Family(**{**GPT, "norm_2": ""}, qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"), out="attn.out_proj",
                   up="mlp.fc_in", down="mlp.fc_out"),
    "codegen": Family(**{**GPT, "norm_2": ""}, qkv=("attn.qkv_proj",), unfuse=codegen_blocks, out="attn.out_proj",
                      up="mlp.fc_in", down="mlp.fc_out"),
    "bloom": Family(trunk="transformer", embed="word_embeddings", layers="h", norm="ln_f",
                    qkv=("self_attention.query_key_value",), unfuse=three_per_head, out="self_attention.dense",
                    up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
    "gpt_neox": Family(trunk="gpt_neox", embed="embed_in", norm="final_layer_norm", qkv=("attention.query_key_value",),
                       unfuse=three_per_head, out="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
}


def attention_window(config, layer):
    """How many columns, its own included, a query of this layer sees; 0 for all."""
    if config.model_type == "mistral":
        return config.sliding_window or 0
    if config.model_type == "gpt_neo":
        return config.window_size if config.attention_layers[layer] == "local" else 0
    qwen = config.model_type in ("qwen2", "qwen3")  # the others read no such setting, even where their config has one
    return config.sliding_window if qwen and config.layer_types[layer] == "sliding_attention" else 0


def attention_scale(config, layer, head_dim):
    """What q . k is multiplied with: 1 / sqrt(D), but for GPT-Neo (1) and two switches of GPT-2."""
    scaled = config.model_type != "gpt_neo" and getattr(config, "scale_attn_weights", True)
    depth = layer + 1 if getattr(config, "scale_attn_by_inverse_layer_idx", False) else 1
    return (head_dim ** -0.5 if scaled else 1.0) / depth


def alibi_slopes(heads):
    """(H,) float32, Press et al. 2022: 2^(-8 i / n) for the power of two n <= H, then the odd ones of 2 n."""
    n = 2 ** int(math.log2(heads))
    return torch.tensor([2 ** (-8 * i / n) for i in range(1, n + 1)]
                        + [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)])


def rotary_frequencies(model):
    """
    Frequencies (r / 2,) float32, r the rotated part of a head; the factor on cos and sin; whether pairs are neighbours
    (0, 1) or halves (0, r / 2). None without rotary embedding. Llama 3's and other fixed scalings come with the model.
    """
    if model.config.model_type in ("gptj", "codegen"):
        r = model.config.rotary_dim
        return 10000.0 ** (-torch.arange(0, r, 2) / r), 1.0, True
    rotary = getattr(attrgetter(FAMILIES[model.config.model_type].trunk)(model), "rotary_emb", None)
    return rotary and (rotary.inv_freq.float(), rotary.attention_scaling, False)


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
        return f"activation {activation!r} is not in kernels/activation.py ({', '.join([*FORMS, *ALIASES])})"
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        return "its residual connection starts after the norm (apply_residual_connection_post_layernorm)"
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        return "its products are summed in pieces (slow_but_exact)"
    rope_type = getattr(getattr(attrgetter(family.trunk)(model), "rotary_emb", None), "rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        return f"rope type {rope_type!r} changes its frequencies with the length"
    return None


# -----------------------------------------------------------------------------
# the decoder

class KVCache:
    """
    Keys and values of the rows in flight, all layers in one allocation.

    data  (L, 2, B, KVH, T, D) model dtype: [layer, 0] keys, [layer, 1] values. All rows write the same column. Left of
          a row's first token is padding (finite, masked), right of the current column unwritten memory (never read)
    rows  how many of the B are in flight: they lie at the front, so that compaction moves no address
    """

    def __init__(self, layers, rows, kv_heads, length, head_dim, dtype, device):
        self.data = torch.empty(layers, 2, rows, kv_heads, length, head_dim, dtype=dtype, device=device)

    def use(self, rows):
        """The first `rows` rows are in flight: makes the views of each layer that writing and reading go through."""
        self.rows = rows
        self.layers = [layer[:, :rows] for layer in self.data]  # (2, rows, KVH, T, D)
        self.keys_values = [layer.unbind() for layer in self.layers]

    def keep(self, rows, length):
        """Compaction: the rows of the index `rows` (ascending) move to the front, with their first `length` columns."""
        for layer in self.layers:
            layer[:, :len(rows), :, :length] = layer[:, rows, :, :length]
        self.use(len(rows))


class Norm:
    """LayerNorm, or RMSNorm where the module has no bias attribute."""

    def __init__(self, module, own, one_plus, new_ones):
        self.rms, self.one_plus = not hasattr(module, "bias"), one_plus  # Gemma scales with 1 + w
        self.eps = getattr(module, "variance_epsilon", None) or module.eps
        self.weight, self.bias = own(module.weight), None if self.rms else own(module.bias)
        if self.weight is None:  # OPT without elementwise_affine
            self.weight = new_ones(module.normalized_shape)

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
    scale: float
    window: int            # 0: every column


def linear_weight(module):
    """(out, in) weight of nn.Linear, of transformers' Conv1D (stored the other way round) or of LoRALinear (merged)."""
    weight = module.merged_weight() if hasattr(module, "merged_weight") else module.weight
    return weight.t() if isinstance(getattr(module, "base", module), transformers.pytorch_utils.Conv1D) else weight


class Decoder:
    """
    One decoder for all families. Reads the weights of `model` when it is built, and never writes them.

    B rows in flight, P prompt, T columns of the cache, H query heads, KVH key-value heads, D head width, E model width.
    With a process group H and KVH are this rank's: it holds its heads and its slice of the MLP's columns, and the parts
    are added up in two all-reduces a layer (one where attention and MLP are parallel). Embedding and head are whole.
    """

    def __init__(self, model, pack=True, group=None):
        config, self.group = model.config, group
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        family = self.family = FAMILIES[config.model_type]
        trunk = attrgetter(family.trunk)(model)

        H = config.num_attention_heads
        KVH = getattr(config, "num_key_value_heads", None) or H
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // H
        if H % self.ranks or (KVH % self.ranks and self.ranks % KVH):
            raise ValueError(f"{H} heads and {KVH} key-value heads do not split over {self.ranks} ranks: choose an "
                             "--inference_tp_size that divides both, or the first and is a multiple of the second")
        self.heads, self.kv_heads = H // self.ranks, max(1, KVH // self.ranks)  # several ranks may share a kv head
        self.first_kv_head = self.rank * KVH // self.ranks

        self.parallel = not family.norm_2 or getattr(config, "use_parallel_residual", False)  # x + attention + MLP
        self.post_norm = not getattr(config, "do_layer_norm_before", True)                    # OPT-350m
        self.activation = getattr(config, family.activation, "gelu_new")                      # BLOOM names none
        self.qk_eps = getattr(config, "rms_norm_eps", None)
        self.gemma = config.model_type == "gemma"
        self.rotary = rotary_frequencies(model)
        self.interleaved = self.rotary is not None and self.rotary[2]

        self.pack = pack
        self.partitioned = any(hasattr(p, "ds_id") for p in model.parameters())  # ZeRO-3
        self.held = []  # every tensor of a weight, for the accounting
        head, embed = model.get_output_embeddings(), attrgetter(family.embed)(trunk)
        norm, wpe = attrgetter(family.norm)(trunk), attrgetter(family.wpe)(trunk) if family.wpe else None
        embed_norm = getattr(trunk, "word_embeddings_layernorm", None)                                      # BLOOM
        project_in, project_out = (getattr(trunk, name, None) for name in ("project_in", "project_out"))  # OPT-350m
        with self._gathered(embed, head, norm, wpe, embed_norm, project_in, project_out):
            self.embed, self.wpe = self._own(embed.weight), wpe and self._own(wpe.weight)
            self.embed_norm, self.norm = self._norm(embed_norm), self._norm(norm)
            self.project_in, self.project_out = self._linear(project_in), self._linear(project_out)
            tied = head.weight is embed.weight and not (self.pack and can_pack(head.weight))
            self.head = Linear(self.embed, self._own(head.bias)) if tied else self._linear(head)
        self.alibi = alibi_slopes(H)[self._share(H)].to(self.embed.device) if config.model_type == "bloom" else None
        self.embed_scale = self.embed.new_tensor(config.hidden_size ** 0.5) if self.gemma else None
        self.wpe_offset = getattr(wpe, "offset", 0)  # OPT: 2
        self.layers = []
        for i, layer in enumerate(attrgetter(family.layers)(trunk)):
            with self._gathered(layer):
                self.layers.append(self._layer(layer, attention_scale(config, i, self.head_dim),
                                               attention_window(config, i)))

    # reading weights

    def _gathered(self, *modules):
        if not self.partitioned:
            return nullcontext()
        parameters = {id(p): p for module in modules if module for p in module.parameters()}  # tied ones once
        return deepspeed.zero.GatheredParameters(list(parameters.values()))

    def _own(self, tensor):
        """An alias of the weight; a copy of one that ZeRO-3 gathered, which is gone when the next one comes."""
        if tensor is None:
            return None
        self.held.append(tensor.detach().clone() if self.partitioned and not tensor.is_mkldnn else tensor.detach())
        return self.held[-1]

    def _matrix(self, weight, bias):
        return Linear(self._own(pack(weight) if self.pack and can_pack(weight) else weight), self._own(bias))

    def _linear(self, module, split=None):
        """split "out": this rank's share of the outputs. "in": of the inputs; the sum over ranks is then the result."""
        if not module:
            return None
        weight, bias = linear_weight(module), module.bias
        if split == "out":
            weight, bias = weight[self._share(weight.size(0))], None if bias is None else bias[self._share(len(bias))]
        if split == "in":
            weight, bias = weight[:, self._share(weight.size(1))], bias if self.rank == 0 else None
        return self._matrix(weight, bias)

    def _share(self, n):
        return slice(self.rank * n // self.ranks, (self.rank + 1) * n // self.ranks)

    def _norm(self, module):
        return module and Norm(module, self._own, self.gemma, self.embed.new_ones)

    def _layer(self, layer, scale, window):
        family, module = self.family, lambda name: attrgetter(name)(layer) if name else None
        qkv = [module(name) for name in family.qkv]
        qkv_bias = None if qkv[0].bias is None else self._heads([m.bias[:, None] for m in qkv]).squeeze(1)
        qk_norm = None
        if hasattr(getattr(layer, "self_attn", None), "q_norm"):
            q, k = layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight
            qk_norm = self._own(torch.cat([q.expand(self.heads, -1), k.expand(self.kv_heads, -1)]))
        return Layer(
            norm_1=self._norm(module(family.norm_1)), norm_2=self._norm(module(family.norm_2)),
            qkv=self._matrix(self._heads([linear_weight(m) for m in qkv]), qkv_bias), qk_norm=qk_norm,
            out=self._linear(module(family.out), split="in"),
            gate=self._linear(module(family.gate), split="out"), up=self._linear(module(family.up), split="out"),
            down=self._linear(module(family.down), split="in"), scale=scale, window=window)

    def _heads(self, rows):
        """Three projections (heads * D, in), or one fused, as this rank's rows q | k | v: ((H + 2 KVH) D, in)."""
        if self.family.unfuse:
            q, k, v = self.family.unfuse(rows[0], self.heads * self.ranks, self.head_dim)
        else:
            q, k, v = (r.unflatten(0, (-1, self.head_dim)) for r in rows)
        q = q[self._share(len(q))]
        k, v = (x[self.first_kv_head:self.first_kv_head + self.kv_heads] for x in (k, v))
        return torch.cat([q, k, v]).flatten(0, 1)

    # running

    def _run(self, ids, positions, attention):
        """
        ids, positions (...) -> x, delta (..., E): the hidden states before the final norm are their sum, and x if delta
        is None. A sum waits for the norm after it, which on a GPU adds on its way.

        attention(i, layer, qkv) -> (..., H D), from qkv (..., H + 2 KVH, D) before rotation, which it may overwrite
        """
        x, delta = F.embedding(ids, self.embed), None
        x = x * self.embed_scale if self.gemma else x
        x = self.embed_norm(x)[0] if self.embed_norm else x
        x = self.project_in(x) if self.project_in else x
        x = x + F.embedding(positions + self.wpe_offset, self.wpe) if self.wpe is not None else x
        for i, layer in enumerate(self.layers):
            h, x = (x, x) if self.post_norm else layer.norm_1(x, delta)
            a = attention(i, layer, self._qkv(layer, h))
            if self.parallel:
                h = layer.norm_2(x)[0] if layer.norm_2 else h
                x, delta = self._plus(x, (layer.out, a), (layer.down, self._mlp(layer, h)))
            elif self.post_norm:
                x, _ = layer.norm_1(*self._plus(x, (layer.out, a)))
                x, _ = layer.norm_2(*self._plus(x, (layer.down, self._mlp(layer, x))))
            else:
                h, x = layer.norm_2(*self._plus(x, (layer.out, a)))
                x, delta = self._plus(x, (layer.down, self._mlp(layer, h)))
        return x, delta

    def _plus(self, x, *products):
        """x + the sum of linear(a), over the pairs (linear, a) and the group's ranks, as _run returns it."""
        at_once = self.group is None and products[0][0].packed  # oneDNN adds within the product
        total = x if at_once else None
        for linear, a in products:
            total = linear(a, residual=total)
        if self.group:
            dist.all_reduce(total, group=self.group)
        return (total, None) if at_once else (x, total)

    def _mlp(self, layer, h):
        if layer.gate:
            return layer.gate.activated(h, self.activation, times=layer.up(h))
        return layer.up.activated(h, self.activation)

    def _qkv(self, layer, x):
        """x (..., E) -> (..., H + 2 KVH, D), q and k normed where the family does so."""
        qkv = layer.qkv(x)
        qkv = qkv.view(*qkv.shape[:-1], -1, self.head_dim)
        if layer.qk_norm is not None:
            qk = qkv.narrow(-2, 0, self.heads + self.kv_heads)
            qk.copy_(F.rms_norm(qk, qk.shape[-1:], eps=self.qk_eps) * layer.qk_norm)
        return qkv

    def _rotation(self, positions):
        return (self.cos[positions], self.sin[positions]) if self.rotary else (None, None)

    def _logits(self, x, delta):
        x = self.norm(x, delta)[0] if self.norm else x if delta is None else x + delta
        return self.head(self.project_out(x) if self.project_out else x)

    def prefill(self, ids, start, cache, copies):
        """
        Left-padded prompts (B, P), whose first tokens are in the columns start (B,) -> logits (B * copies, V) of the
        next token; fills the cache's first P columns, and makes the tables that the steps after it need.
        """
        P, T, dtype = ids.size(1), cache.data.size(-2), self.embed.dtype
        if self.rotary:
            frequencies, factor, interleaved = self.rotary
            tables = rotary_tables(frequencies.to(ids.device), T, factor, interleaved)
            self.cos, self.sin = (table.to(dtype) for table in tables)
        query, key = torch.arange(P, device=ids.device)[:, None], torch.arange(P, device=ids.device)
        bias, masks = score_bias(start, P, dtype, self.alibi)[:, :, None], {}  # window -> (B, 1 or H, P, P)
        for window in {layer.window for layer in self.layers}:
            masks[window] = bias.masked_fill((key > query) | (key <= query - (window or P)), -math.inf)
        positions = (key - start[:, None]).clamp(min=0)
        rotation = self._rotation(positions)

        def attention(i, layer, qkv):
            if self.rotary:
                rotate_(qkv[:, :, :-self.kv_heads], *rotation, self.interleaved)
            q, kv = qkv.split([self.heads, 2 * self.kv_heads], dim=2)
            q, kv = q.transpose(1, 2), kv.unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4)
            cache.layers[i][:, :, :, :P] = kv.repeat_interleave(copies, 1)
            k, v = kv.repeat_interleave(self.heads // self.kv_heads, 2)
            a = F.scaled_dot_product_attention(q, k, v, masks[layer.window], scale=layer.scale)
            return a.transpose(1, 2).flatten(2)

        x, delta = self._run(ids, positions, attention)
        self._begin(start.repeat_interleave(copies, 0), T)
        # left-padded: the last token is in the last column
        return self._logits(x[:, -1], None if delta is None else delta[:, -1]).repeat_interleave(copies, 0)

    def keep(self, rows):
        """Rows leave the batch: only those of the index `rows` stay."""
        self._begin(self.start[rows], self.length)

    def _begin(self, start, length):
        """What the steps ask about the rows in flight: their first columns, and the CPU's bias made of them."""
        self.start, self.length = start, length
        self.bias = decode_bias(start, length, self.kv_heads, self.alibi)

    def step(self, tokens, positions, column, cache):
        """
        One token a row, (B,), written to `column` (0-dim, the same for all) -> logits (B, V) of the next.

        On a GPU nothing in here waits for it; weights, cache and tables keep their addresses as long as no row leaves.
        """
        rotation, end = self._rotation(positions), column + 1

        def attention(i, layer, qkv):
            q = rotary_cache(qkv, *rotation, cache.layers[i], column, self.interleaved)
            return decode_attention(q, *cache.keys_values[i], self.start, end, layer.scale, self.alibi, layer.window,
                                    self.bias).flatten(1)

        return self._logits(*self._run(tokens, positions, attention))
