"""
What a stage will need, from shapes alone, before anything is loaded: memory of each model and at
each moment of the run, FLOP and hours. support/dry_run.py says it, and judges. bench/memory.py
holds the plan beside measured peaks.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kernels.decoder import FAMILIES
from kernels.linear import can_pack
from kernels.logprob import SLICE
from support.flags import UsageError
from support.lora import LoRALinear, add_lora
from support.models import parameter_count, read_config
from support.processes import compute_dtype

# Width, layers, heads (Zhang et al. 2022, table 1), so that no hub is needed to plan for OPT.
OPT = {
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32), "6.7b": (4096, 32, 32), "13b": (5120, 40, 40),
    "30b": (7168, 48, 56), "66b": (9216, 64, 72), "175b": (12288, 96, 96)}

# Width, MLP width, layers, heads, key-value heads, vocabulary, whether head and embeddings are one
# matrix: of Llamas, from their config.json on the hub.
LLAMAS = {
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32, 32000, False),
    "meta-llama/Llama-2-13b-hf": (5120, 13824, 40, 40, 40, 32000, False),
    "meta-llama/Llama-2-70b-hf": (8192, 28672, 80, 64, 8, 32000, False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (576, 1536, 30, 9, 3, 49152, True)}

# What each ZeRO stage leaves a device 1/N of (Rajbhandari et al. 2020, section 3 and figure 1).
SHARDED = {
    0: (),
    1: ("optimizer",),
    2: ("optimizer", "gradients"),
    3: ("optimizer", "gradients", "weights")}


# -----------------------------------------------------------------------------
# models without weights

def empty_model(name_or_path, config, head="lm", trained=True):
    """What load_model and add_lora would make, on the meta device: shapes without weights."""
    hf_config = known_config(name_or_path)
    if hf_config is None or Path(name_or_path).exists():
        hf_config = read_config(name_or_path)
    hf_config.num_labels = 1
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(hf_config)
        # transformers stacks the experts' matrices.
        if any(p.ndim == 3 for p in model.parameters()):
            raise UsageError(f"{name_or_path}: --dry_run does not know mixtures of experts.")
        if not trained:
            return model.requires_grad_(False)
        return add_lora(model, config, log=lambda sentence: None)


def known_config(name):
    """The config of a recipe's model by its name on the hub, without asking there; or None."""
    size = name.removeprefix("facebook/").removeprefix("opt-")
    if size in OPT:
        return opt_config(size)
    if name not in LLAMAS:
        return None
    E, inner, layers, H, KVH, V, tied = LLAMAS[name]
    return transformers.LlamaConfig(
        hidden_size=E, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=H,
        num_key_value_heads=KVH, vocab_size=V, tie_word_embeddings=tied)


def opt_config(size):
    E, layers, heads = OPT[size]
    odd = size == "350m"  # the only one with norms after the layers, and narrower embeddings
    return transformers.OPTConfig(
        hidden_size=E, ffn_dim=4 * E, num_hidden_layers=layers, num_attention_heads=heads,
        do_layer_norm_before=not odd, word_embed_proj_dim=512 if odd else E)


def planned_models(config, stage):
    """
    {name: model without weights} of a stage ("sft", "reward", "dpo" or "ppo"); the first one
    generates.
    """
    if stage == "sft":
        return {"model": empty_model(config.model_name_or_path, config)}
    if stage == "reward":
        return {"model": empty_model(config.model_name_or_path, config, "score")}
    if stage == "dpo":
        start = config.model_name_or_path
        models = {"model": empty_model(start, config)}
        if not config.only_optimize_lora:
            models["ref"] = empty_model(start, config, trained=False)
        return models

    # PPO: as in step3_ppo.DeepSpeedRLHFEngine.
    actor = config.actor_model_name_or_path
    critic = config.critic_model_name_or_path
    models = {"actor": empty_model(actor, config)}
    if not config.only_optimize_lora:
        models["ref"] = empty_model(actor, config, trained=False)
    number = 0
    for name in config.reward_fn or [critic]:
        file = name.rpartition(":")[0]
        if file.endswith(".py"):
            continue  # a Python function needs no memory
        number += 1
        label = "reward" if number == 1 else f"reward {number}"
        models[label] = empty_model(name, config, "score", trained=False)
    if config.advantage == "gae":
        models["critic"] = empty_model(critic or actor, config, "score")
    return models


def trained_count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def block_matrices(model):
    """The linear layers of the blocks, which are the modules with a number in their name."""
    matrices = []
    for name, module in model.named_modules():
        in_block = any(part.isdigit() for part in name.split("."))
        if in_block and isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)):
            matrices.append(module)
    return matrices


def attention_shape(hf_config):
    """Heads, key-value heads, head width."""
    H = hf_config.num_attention_heads
    KVH = getattr(hf_config, "num_key_value_heads", None) or H
    D = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // H
    return H, KVH, D


# -----------------------------------------------------------------------------
# memory

def activation_width(model):
    """
    Numbers a token of one layer that the backward pass needs: Korthikanti et al. 2022, section 4.1,
    less its dropout masks (dropout is off) and attention matrix (never stored). The inputs of two
    norms and of the products after them; queries, keys, values, attention's output; in the MLP the
    activation's input and the last product's.
    """
    hf_config = model.config
    family = FAMILIES.get(hf_config.model_type)
    E = hf_config.hidden_size
    H, KVH, D = attention_shape(hf_config)
    inner = 4 * E
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(hf_config, name, None):
            inner = getattr(hf_config, name)
            break

    of_norms = 4 * E
    of_mlp = 2 * inner
    if family is not None and family.gate:  # Llama's kin
        of_norms = 6 * E  # RMSNorm also keeps what it scales
        of_mlp = 4 * inner  # the gate keeps two more
    elif family is not None and getattr(hf_config, family.activation, "") == "relu":
        of_mlp = inner  # ReLU's output is all that it needs, and the last product's input
    of_attention = (2 * H + 2 * KVH) * D
    return of_norms + of_attention + of_mlp


def activation_memory(model, b, rows, tokens, scored, checkpointing, cpu):
    """Bytes that one forward keeps for its backward; b: bytes of a number. See memory_plan."""
    hf_config = model.config
    layers = hf_config.num_hidden_layers
    width = activation_width(model)
    kept = layers * width
    if checkpointing:
        # Every layer's input, and everything of the one layer that is computed again.
        kept = layers * hf_config.hidden_size + width

    logits = 0
    if model.get_output_embeddings() is not None:
        logits = rows * scored * hf_config.vocab_size
    if hf_config.model_type in FAMILIES:
        # Then the logits are never whole: kernels/logprob.py.
        logits = min(logits, SLICE["cpu" if cpu else "cuda"])
    return b * rows * tokens * kept + (b + 8) * logits


def reduce_bucket(zero, b, T, devices, cpu):
    """Bytes of the bucket in which DeepSpeed sums the gradients of T parameters over devices."""
    stage = zero["stage"]
    if T == 0 or (devices == 1 and stage == 0):
        return 0
    bucket = b * zero.get("reduce_bucket_size", 5e8)
    if zero.get("overlap_comm") and stage < 3:
        bucket *= 2  # one is filled while the other is summed
    if cpu or stage == 0:
        # Here the bucket is no larger than what goes into it.
        bucket = min(bucket, b * T)
    return bucket


def is_offloaded(zero, part):
    return zero.get(f"offload_{part}", {}).get("device", "none") != "none"


def live_parameters(model, ds_config):
    """Bytes of one model's weights that ZeRO 3 gathers at a time."""
    limit = ds_config["zero_optimization"].get("stage3_max_live_parameters", 1e9)
    return compute_dtype(ds_config).itemsize * min(parameter_count(model), limit)


def model_memory(model, ds_config, devices, rows, tokens, scored, checkpointing, cpu):
    """
    One model's bytes on each device -> {"weights", "gradients", "optimizer", "host", "bucket",
    "buffers", "activations"}.

    P parameters, T of them trained, b bytes of the compute dtype, N devices: weights b P, gradients
    b T, AdamW with its float32 master weights 12 T (8 T in float32 without ZeRO), of which ZeRO
    leaves each device all or 1/N (SHARDED). DeepSpeed's buffers: the bucket in which gradients are
    summed (reduce_bucket_size numbers, twice with overlap_comm), or, later, a float32 copy of
    16-bit gradients for AdamW; on ZeRO 3 the bucket stays, and is copied when it is full. On the
    host: what is offloaded.
    """
    zero = ds_config["zero_optimization"]
    stage = zero["stage"]
    N = devices
    b = compute_dtype(ds_config).itemsize
    P = parameter_count(model)
    T = trained_count(model)

    # What the device holds all the time.
    adam = 8 + master_bytes(stage, b)
    memory = {"weights": b * P, "gradients": b * T, "optimizer": adam * T}
    for part in SHARDED[stage]:
        memory[part] /= N

    # AdamW's float32 copy of the gradients, sharded like AdamW's state.
    widened = 0
    if b < 4:
        widened = 4 * T
        if "optimizer" in SHARDED[stage]:
            widened /= N

    # What is offloaded, AdamW with that copy, moves to the host.
    memory["host"] = 0
    if is_offloaded(zero, "optimizer"):
        memory["host"] += memory["optimizer"] + 4 * T / N
        memory["optimizer"] = 0
        widened = 0
    if is_offloaded(zero, "param"):
        memory["host"] += memory["weights"]
        memory["weights"] = 0

    # DeepSpeed's buffers.
    memory["bucket"] = reduce_bucket(zero, b, T, N, cpu)
    if stage == 3:
        # The bucket is copied when it is full, in the backward; AdamW comes after it.
        memory["buffers"] = max(memory["bucket"], widened)
    else:
        memory["buffers"] = max(memory["bucket"], widened)

    memory["activations"] = 0
    if T > 0:
        memory["activations"] = activation_memory(model, b, rows, tokens, scored, checkpointing,
                                                  cpu)
    return memory


def generation_memory(model, ds_config, rows, tokens, tp, cpu):
    """
    Bytes on each device of the decoder's own weights (see the top of hybrid_engine.py) and of its
    KV cache, when tp devices share the weights.
    """
    dtype = compute_dtype(ds_config)
    b = dtype.itemsize
    hf_config = model.config
    layers = hf_config.num_hidden_layers
    H, KVH, D = attention_shape(hf_config)
    if ds_config["zero_optimization"]["stage"] == 3:
        # The blocks' matrices are split over the devices, embeddings and head are whole.
        in_blocks = sum(m.weight.numel() for m in block_matrices(model))
        copied = in_blocks / tp + parameter_count(model) - in_blocks
    elif cpu and can_pack(torch.empty(0, dtype=dtype)):
        head = model.get_output_embeddings().weight.numel()
        copied = sum(m.weight.numel() for m in block_matrices(model)) / tp + head
    else:
        fused = layers * (H + 2 * KVH) * D * hf_config.hidden_size
        merged = sum(m.weight.numel() for m in model.modules() if isinstance(m, LoRALinear))
        copied = max(fused, merged) / tp
    return {"generation copy": b * copied, "KV cache": b * 2 * layers * rows * tokens * KVH * D}


def master_bytes(stage, b):
    """Of a trained parameter: AdamW's float32 weights, where the model's own are not those."""
    return 0 if b == 4 and stage == 0 else 4


def adam_averages(memory, stage, b):
    """Bytes of AdamW's two averages, 8 a parameter, in model_memory's "optimizer"."""
    return memory["optimizer"] * 8 / (8 + master_bytes(stage, b))


def largest_weight(model):
    return max(parameter.numel() for parameter in model.parameters())


def saving_memory(model, stage, b, devices, averaged, cpu):
    """
    Bytes that writing a model takes on the host: of each process, of the first alone. `averaged`:
    its averages are written too.
    """
    P = parameter_count(model)
    T = trained_count(model)
    each = 0
    first = 0
    if stage > 0 or not cpu:
        first += b * P  # gathered, copied from the device or out of ZeRO's flat buffers
    if stage < 3:
        # Matrices with their adapters merged, beside the model's own. Under ZeRO 3 they take the
        # place of what was gathered.
        first += b * sum(m.weight.numel() for m in model.modules() if isinstance(m, LoRALinear))
    if averaged:
        # The averages by name, in float32 and, where that is another type, as they are written.
        # While they are gathered, the weights that stand in their place are kept.
        first += 4 * T
        if b < 4:
            first += b * T
        if stage > 0:
            each += 4 * T / devices
    return each, first


def resuming_memory(model, memory, stage, b, cpu):
    """
    Bytes on the host while DeepSpeed reads one model's checkpoint. Its tensors are copied, but for
    AdamW's two averages, which on a CPU are taken over (not in 16 bits without ZeRO).
    """
    weights = b * sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = memory["optimizer"]
    taken_over = 0
    if cpu and (stage > 0 or b == 4):
        taken_over = adam_averages(memory, stage, b)
    if stage == 0:
        return weights + optimizer - taken_over
    # Weights and optimizer are files of their own, read one after the other. Under ZeRO 3 the
    # weights come from the optimizer's.
    if stage == 3:
        weights = 0
    return max(weights, optimizer) - taken_over


@dataclass
class Work:
    """What a stage does with its models, on each device."""
    rows: int                    # in one forward and backward
    tokens: int                  # of a row
    scored: int                  # of them that go through a language model's head
    generated: int = 0           # rows of a rollout; 0: this stage has none
    sampled: int = 0             # rows that the trained model answers at the end; 0: none
    answered: int = 0            # tokens of such a row
    text: int = 0                # tokens of a row of the mixture term; 0: none
    tp: int = 1                  # devices that share one copy of the weights to generate
    checkpointing: bool = False  # activations are computed again
    ema: bool = False            # the first model's weights are averaged
    cpu: bool = False            # devices are processes on the host


@dataclass
class Need:
    """Bytes at one moment of a run."""
    device: float     # on each device
    host: float = 0   # of each process on its host, beside the device
    first: float = 0  # of the first process beside that


def memory_plan(models, ds_config, devices, work):
    """
    What each of `devices` devices holds, from shapes alone.

    models    {name: model of empty_model}; the first generates
    returns   {name: {part: bytes}}, {moment: Need}

    Not counted: what CUDA, NCCL and Python keep for themselves (support.dry_run.fits), and files
    that are mapped into memory, which the system drops when it needs the room.
    """
    stage = ds_config["zero_optimization"]["stage"]
    b = compute_dtype(ds_config).itemsize
    first = next(iter(models))
    actor = models[first]
    parts = {}
    for name, model in models.items():
        more = work.text if name == first else 0
        parts[name] = model_memory(model, ds_config, devices, work.rows, work.tokens + more,
                                   work.scored + more, work.checkpointing, work.cpu)

    # What is there all the time. Gradients come and go; ZeRO 3 keeps them in place.
    always = ["weights", "optimizer"]
    bucket = 0
    if stage == 3:
        always.append("gradients")
        bucket = sum(memory["bucket"] for memory in parts.values())
    at_first = sum(memory[part] for memory in parts.values() for part in always)
    device = at_first + bucket
    host = sum(memory["host"] for memory in parts.values())
    averages = 4 * trained_count(actor) if work.ema else 0
    averages_of_first = 0
    if stage == 0:
        averages_of_first = averages
    else:
        host += averages / devices

    # Loading ends before AdamW's two averages are there, but in 16 bits without ZeRO, where
    # DeepSpeed steps once to make them, on float32 gradients of 0.
    gathered = 0
    if stage == 3:
        # One weight at a time is whole, to be loaded, copied into the decoder, or written.
        gathered = b * max(largest_weight(model) for model in models.values())
    # In loading it is there twice, as it was read and as it is shared out. The average of the
    # weights is made when that is over, in the same memory on a CPU.
    load_host = host
    if work.cpu and stage == 3:
        load_host -= min(averages / devices, 2 * gathered)
    moments = {"load": Need(at_first + 2 * gathered, load_host, averages_of_first)}
    if stage > 0 or b == 4:
        moments["load"].device -= sum(adam_averages(memory, stage, b)
                                      for memory in parts.values())
    else:
        moments["load"].device += 4 * max(trained_count(model) for model in models.values())

    # Parameters that ZeRO 3 has gathered: those of the model at work, and those of the one before,
    # which go when they are in the way.
    live = 0
    if stage == 3:
        largest = sorted(live_parameters(model, ds_config) for model in models.values())
        live = sum(largest[-2:])
    # A forward that keeps nothing has one layer's activations at a time.
    forward = live + b * work.rows * work.tokens * activation_width(actor)

    # A rollout: generated, then scored.
    if work.generated:
        rollout = generation_memory(actor, ds_config, work.generated, work.tokens, work.tp,
                                    work.cpu)
        parts[first].update(rollout)
        moments["generate"] = Need(device + gathered + sum(rollout.values()), host,
                                   averages_of_first)
        moments["score"] = Need(device + forward, host, averages_of_first)

    # The peak of each model's training.
    for name, memory in parts.items():
        if not memory["gradients"]:
            continue
        activations = memory["activations"]
        buffers = memory["buffers"]
        # A step that updates all weights of a model shares all of them out again, so that the next
        # model is gathered alone. One of adapters leaves the frozen weights where they are.
        live_here = live
        if stage == 3 and trained_count(models[name]) == parameter_count(models[name]):
            live_here = live_parameters(models[name], ds_config)
        # The first gradient comes when every activation is there. Without ZeRO the buffers wait
        # until the activations are gone.
        peak = device + live_here
        peak += activations + buffers if stage else max(activations, buffers)
        if stage < 3:
            peak += memory["gradients"]
        moments[f"train {name}"] = Need(peak, host, averages_of_first)

    if work.ema:
        moments["EMA"] = Need(device, host, averages_of_first)

    # The end: a sample, and what is written.
    if work.sampled:
        sample = generation_memory(actor, ds_config, work.sampled, work.answered, work.tp, work.cpu)
        moments["sample"] = Need(device + gathered + sum(sample.values()), host,
                                 averages_of_first)
    # Twice, because what is gathered for rank 0 is copied.
    moments["save"] = Need(device + 2 * gathered, host, averages_of_first)
    moments["resume"] = Need(at_first, host, averages_of_first)
    for name, model in models.items():
        if not trained_count(model):
            continue
        each, first_alone = saving_memory(model, stage, b, devices, work.ema and name == first,
                                          work.cpu)
        save = moments["save"]
        save.host = max(save.host, host + each)
        save.first = max(save.first, averages_of_first + first_alone)
        resume = moments["resume"]
        read = resuming_memory(model, parts[name], stage, b, work.cpu)
        if work.cpu and name == first:
            read = max(read, averages)  # a file that is mapped, and read to its end
        resume.host = max(resume.host, host + read)
    return parts, moments


# -----------------------------------------------------------------------------
# time

def forward_flops(model, tokens):
    """
    FLOP of one row's forward: 2 a token and matrix element, and attention's (Narayanan et al. 2021,
    appendix).
    """
    hf_config = model.config
    head = model.get_output_embeddings()
    elements = sum(m.weight.numel() for m in block_matrices(model))
    if head is not None:
        elements += head.weight.numel()
    attention = 4 * hf_config.num_hidden_layers * hf_config.hidden_size * tokens**2
    return 2 * tokens * elements + attention


def training_flops(models, tokens, generated, checkpointing, epochs=1, text=0):
    """
    FLOP of one row as DeepSpeed-Chat counts them: 3 forwards for each trained model (4 with
    checkpointing) and one for the tokens the first model generates. Scoring is in the seconds of
    its published TFLOP/s, but not in the FLOP. Training counts once for each of the `epochs` over a
    rollout; `text` as in memory_plan.
    """
    trained = [model for model in models.values() if trained_count(model) > 0]
    first = trained[0]
    forwards = sum(forward_flops(model, tokens) for model in trained)
    if text:
        forwards += forward_flops(first, text)
    passes = 4 if checkpointing else 3
    flops = epochs * passes * forwards
    if generated:
        flops += forward_flops(first, tokens)
    return flops


def epoch_hours(flops, rows, devices, device_tflops):
    """Hours for rows of so many FLOP each, shared by devices of so many TFLOP/s each."""
    return flops * rows / (devices * device_tflops * 1e12) / 3600
