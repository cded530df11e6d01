"""
--dry_run: what a run will need, from shapes alone, before anything is loaded: memory of each model
and phase, hours, dollars.

    python step3_ppo.py --actor_model_name_or_path facebook/opt-13b \
        --critic_model_name_or_path facebook/opt-350m \
        --deepspeed_config configs/1node.json --dry_run 8

bench/memory.py holds the plan beside measured peaks.
"""

import os
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kernels.decoder import FAMILIES
from kernels.logprob import SLICE
from support.flags import UsageError
from support.lora import LoRALinear, add_lora
from support.models import parameter_count, read_config
from support.processes import compute_dtype, deepspeed_settings

# Width, layers, heads (Zhang et al. 2022, table 1), so that no hub is needed to plan for OPT.
OPT = {
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32), "6.7b": (4096, 32, 32), "13b": (5120, 40, 40),
    "30b": (7168, 48, 56), "66b": (9216, 64, 72), "175b": (12288, 96, 96)}

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
    size = name_or_path.removeprefix("facebook/").removeprefix("opt-")
    if size in OPT and not Path(name_or_path).exists():
        hf_config = opt_config(size)
    else:
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
        return add_lora(model, config)


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


def model_memory(model, ds_config, devices, rows, tokens, scored, checkpointing, cpu):
    """
    One model's bytes on each device -> {"weights", "gradients", "optimizer", "host", "buffers",
    "activations"}.

    P parameters, T of them trained, b bytes of the compute dtype, N devices: weights b P, gradients
    b T, AdamW with its float32 master weights 12 T (8 T in float32 without ZeRO), of which ZeRO
    leaves each device all or 1/N (SHARDED). DeepSpeed's buffers: the bucket in which gradients are
    summed (reduce_bucket_size numbers, twice with overlap_comm), or, later, a float32 copy of
    16-bit gradients for AdamW; on ZeRO 3 live parameters too, and the bucket stays. On the host:
    what is offloaded.
    """
    zero = ds_config["zero_optimization"]
    stage = zero["stage"]
    N = devices
    b = compute_dtype(ds_config).itemsize
    P = parameter_count(model)
    T = trained_count(model)

    # What the device holds all the time.
    adam = 8 if b == 4 and stage == 0 else 12
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
    bucket = reduce_bucket(zero, b, T, N, cpu)
    if stage == 3:
        live = min(P, zero.get("stage3_max_live_parameters", 1e9))
        memory["gradients"] += bucket
        memory["buffers"] = b * live + widened
    else:
        memory["buffers"] = max(bucket, widened)

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
    b = compute_dtype(ds_config).itemsize
    hf_config = model.config
    layers = hf_config.num_hidden_layers
    H, KVH, D = attention_shape(hf_config)
    if ds_config["zero_optimization"]["stage"] == 3:
        copied = parameter_count(model) / tp
    elif cpu:
        head = model.get_output_embeddings().weight.numel()
        copied = sum(m.weight.numel() for m in block_matrices(model)) / tp + head
    else:
        fused = layers * (H + 2 * KVH) * D * hf_config.hidden_size
        merged = sum(m.weight.numel() for m in model.modules() if isinstance(m, LoRALinear))
        copied = max(fused, merged) / tp
    return {"generation copy": b * copied, "KV cache": b * 2 * layers * rows * tokens * KVH * D}


def memory_plan(models, ds_config, devices, rows, tokens, scored, generated=0, checkpointing=False,
                tp=1, cpu=False, text=0):
    """
    Bytes on each of `devices` devices, from shapes alone.

    models    {name: model of empty_model}; the first generates
    rows      in one forward and backward, each of so many tokens, `scored` of them through a
              language model's head
    generated rows of a rollout, answered and scored at once; 0: this stage has none
    tp        devices that share one copy of the weights to generate
    text      tokens of a row of the mixture term, which the first model trains on in the same
              backward; 0: none
    returns   {name: {part: bytes}}, {phase: bytes at its peak}

    Not counted: what CUDA and NCCL keep for themselves (about 1 GB), and the allocator's fragments.
    """
    stage = ds_config["zero_optimization"]["stage"]
    first = next(iter(models))
    plan = {}
    for name, model in models.items():
        more = text if name == first else 0
        plan[name] = model_memory(model, ds_config, devices, rows, tokens + more, scored + more,
                                  checkpointing, cpu)
    # Gradients come and go; ZeRO 3 keeps them in place.
    always = ["weights", "optimizer"]
    if stage == 3:
        always.append("gradients")
    resident = sum(memory[part] for memory in plan.values() for part in always)

    # The peaks of a rollout: while it is generated, and while it is scored, layer by layer.
    peaks = {}
    if generated:
        actor = models[first]
        plan[first].update(generation_memory(actor, ds_config, generated, tokens, tp, cpu))
        peaks["generate"] = resident + plan[first]["generation copy"] + plan[first]["KV cache"]
        one_layer = activation_width(actor) * compute_dtype(ds_config).itemsize
        peaks["score"] = resident + generated * tokens * one_layer

    # The peak of each model's training.
    for name, memory in plan.items():
        if not memory["gradients"]:
            continue
        activations = memory["activations"]
        buffers = memory["buffers"]
        # The first gradient comes when every activation is there. Without ZeRO the buffers wait
        # until the activations are gone.
        peak = resident + (activations + buffers if stage else max(activations, buffers))
        if stage < 3:
            peak += memory["gradients"]
        peaks[f"train {name}"] = peak
    return plan, peaks


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


# -----------------------------------------------------------------------------
# what is printed

def planned_row(config, stage):
    """-> tokens of a row, tokens of it that go through the head, rows of a rollout (0: none)."""
    if stage == "sft":
        return config.max_seq_len, config.max_seq_len, 0
    pair = 2 * config.max_seq_len
    if stage == "reward":
        return pair, 0, 0
    if stage == "dpo":
        return pair, pair, 0
    answer = config.max_answer_seq_len
    return config.max_prompt_seq_len + answer, answer, config.rollout_rows


def dry_run(config, stage):
    """Rank 0 prints memory_plan, time and cost of a stage ("sft", "reward", "dpo" or "ppo")."""
    if os.environ.get("RANK", "0") != "0":
        return
    models = planned_models(config, stage)
    ds_config = deepspeed_settings(config)
    tokens, scored, generated = planned_row(config, stage)
    rows = config.per_device_train_batch_size
    checkpointing = config.gradient_checkpointing

    # `--dry_run 8` plans for 8 GPUs, `--dry_run` alone for this machine.
    devices = config.dry_run
    cpu = False
    if config.dry_run < 0:
        devices = int(os.environ.get("WORLD_SIZE", 1))
        cpu = get_accelerator().device_name() == "cpu"

    # PPO alone shares weights to generate, reads a rollout several times, and mixes in text.
    tp = 1
    epochs = 1
    text = 0
    if stage == "ppo":
        tp = config.inference_tp_size
        epochs = config.ppo_epochs
        if config.unsupervised_data_path:
            text = config.max_seq_len

    # Memory: what is planned, then the table.
    dtype = str(compute_dtype(ds_config)).removeprefix("torch.")
    zero_stage = ds_config["zero_optimization"]["stage"]
    rollout = f", {generated} a rollout" if generated else ""
    print(f"\nmemory plan, GB on each of {devices} device(s): {dtype}, ZeRO stage {zero_stage}, "
          f"{rows} rows of {tokens} tokens a micro-batch{rollout}")
    plan, peaks = memory_plan(models, ds_config, devices, rows, tokens, scored, generated,
                              checkpointing, tp, cpu, text)
    print_memory(models, plan, peaks, cpu)

    # Time: of the run, or of 100,000 rows where the flags do not say how long it is.
    flops = training_flops(models, tokens, generated, checkpointing, epochs, text)
    if config.max_steps > 0:
        rows_a_step = generated or rows * config.gradient_accumulation_steps
        count = config.max_steps * devices * rows_a_step
        how_many = "rows"
    else:
        count = 100_000
        how_many = "rows, say (--max_steps plans your run)"
    hours = epoch_hours(flops, count, devices, config.device_tflops)
    dollars = hours * devices * config.device_price
    print(f"time      {count:,} {how_many}: {hours:.2f} h at {config.device_tflops:g} TFLOP/s a "
          f"device (--device_tflops; {flops / 1e12:.2f} TFLOP a row), ${dollars:,.2f} at "
          f"${config.device_price:g} a device-hour (--device_price)")


def print_memory(models, plan, peaks, cpu):
    """The two results of memory_plan as a table of models and a line of peaks."""
    parts = []
    for memory in plan.values():
        parts += [part for part in memory if part not in parts]
    widths = {part: max(len(part), 7) for part in parts}
    header = "  ".join(f"{part:>{widths[part]}}" for part in parts)
    print(f"\n{'':<10}{'parameters':>11}{'trained':>9}  {header}")
    for name, memory in plan.items():
        count = parameter_count(models[name]) / 1e6
        trained = trained_count(models[name]) / 1e6
        sizes = [f"{memory.get(part, 0) / 2**30:>{widths[part]}.2f}" for part in parts]
        print(f"{name:<10}{count:>10.0f}M{trained:>8.0f}M  {'  '.join(sizes)}")
    phases = ", ".join(f"{phase} {size / 2**30:.1f}" for phase, size in peaks.items())
    beside = "" if cpu else ", about 1 GB more for CUDA"
    print(f"\npeak      {phases}; in all {max(peaks.values()) / 2**30:.1f} GB a device{beside}")
