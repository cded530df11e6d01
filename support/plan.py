"""
--dry_run: what a run will need, from shapes alone, before anything is loaded: memory of each model and phase, hours,
dollars.

    python step3_ppo.py --actor_model_name_or_path facebook/opt-13b --critic_model_name_or_path facebook/opt-350m \
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

OPT = {"125m": (768, 12, 12), "350m": (1024, 24, 16), "1.3b": (2048, 24, 32), "2.7b": (2560, 32, 32),
       "6.7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "66b": (9216, 64, 72),
       "175b": (12288, 96, 96)}  # width, layers, heads: Zhang et al. 2022, table 1; so that no hub is needed


def empty_model(name_or_path, config, head="lm", trained=True):
    """What load_model and add_lora would make, on the meta device: shapes without weights."""
    size = name_or_path.removeprefix("facebook/").removeprefix("opt-")
    if size in OPT and not Path(name_or_path).exists():
        (E, layers, heads), odd = OPT[size], size == "350m"
        shape = transformers.OPTConfig(hidden_size=E, ffn_dim=4 * E, num_hidden_layers=layers,
                                       num_attention_heads=heads, do_layer_norm_before=not odd,
                                       word_embed_proj_dim=512 if odd else E)
    else:
        shape = read_config(name_or_path)
    shape.num_labels = 1
    with torch.device("meta"):
        auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
        model = auto.from_config(shape)
        if any(p.ndim == 3 for p in model.parameters()):  # transformers stacks the experts' matrices
            raise UsageError(f"{name_or_path}: --dry_run does not know mixtures of experts.")
        return add_lora(model, config) if trained else model.requires_grad_(False)


def forward_flops(model, tokens):
    """Of one row: 2 a token and matrix element, and attention's (Narayanan et al. 2021, appendix)."""
    shape, head = model.config, model.get_output_embeddings()
    matrices = sum(m.weight.numel() for m in block_matrices(model)) + (head.weight.numel() if head else 0)
    return 2 * tokens * matrices + 4 * shape.num_hidden_layers * shape.hidden_size * tokens**2


def block_matrices(model):
    modules = [m for name, m in model.named_modules() if any(part.isdigit() for part in name.split("."))]
    return [m for m in modules if isinstance(m, (nn.Linear, transformers.pytorch_utils.Conv1D))]


def attention_shape(config):
    """Heads, key-value heads, head width."""
    H = config.num_attention_heads
    KVH = getattr(config, "num_key_value_heads", None) or H
    return H, KVH, getattr(config, "head_dim", None) or config.hidden_size // H


def activation_width(model):
    """
    Numbers a token of one layer that the backward pass needs: Korthikanti et al. 2022, section 4.1, less its dropout
    masks (dropout is off) and attention matrix (never stored). The inputs of two norms and of the products after them;
    queries, keys, values, attention's output; in the MLP the activation's input and the last product's.
    """
    shape, family = model.config, FAMILIES.get(model.config.model_type)
    E, (H, KVH, D) = shape.hidden_size, attention_shape(shape)
    names = ("intermediate_size", "ffn_dim", "n_inner")
    inner = next(filter(None, (getattr(shape, name, None) for name in names)), 4 * E)
    gated = family is not None and family.gate  # Llama's kin: RMSNorm also keeps what it scales, the gate two more
    relu = family is not None and getattr(shape, family.activation, "") == "relu"  # its output is all it needs
    return (6 if gated else 4) * E + (2 * H + 2 * KVH) * D + inner * (4 if gated else 1 if relu else 2)


def model_memory(model, settings, devices, rows, tokens, scored, checkpointing, cpu):
    """
    One model's bytes on each device -> {"weights", "optimizer", "gradients", "buffers", "activations", "host"}.

    P parameters, T of them trained, b bytes of the compute dtype, N devices: weights b P, gradients b T, AdamW with
    its float32 master weights 12 T (8 T in float32 without ZeRO), of which ZeRO 1, 2, 3 leave each device 1/N of
    AdamW's, of the gradients, of the weights (Rajbhandari et al. 2020, section 3 and figure 1). DeepSpeed's buffers:
    the bucket in which gradients are summed (reduce_bucket_size numbers, twice with overlap_comm), or, later, a float32
    copy of 16-bit gradients for AdamW; on ZeRO 3 live parameters too, and the bucket stays. On the host: what is
    offloaded.
    """
    zero, b, N = settings["zero_optimization"], compute_dtype(settings).itemsize, devices
    stage, layers, head = zero["stage"], model.config.num_hidden_layers, model.get_output_embeddings()
    P, T = parameter_count(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = {"weights": b * P / (N if stage == 3 else 1), "gradients": b * T / (N if stage >= 2 else 1),
              "optimizer": (12 if b < 4 or stage else 8) * T / (N if stage else 1)}
    widened = 4 * T / (N if stage else 1) if b < 4 else 0
    bucket = b * zero.get("reduce_bucket_size", 5e8) * (2 if zero.get("overlap_comm") and stage < 3 else 1)
    bucket = 0 if not T or N == 1 and stage == 0 else min(bucket, b * T) if cpu or stage == 0 else bucket
    offloaded = [f"offload_{part}" for part in ("param", "optimizer")
                 if zero.get(f"offload_{part}", {}).get("device", "none") != "none"]
    memory["host"] = 0
    if "offload_optimizer" in offloaded:
        memory["host"] += memory["optimizer"] + 4 * T / N
        memory["optimizer"] = widened = 0
    if "offload_param" in offloaded:
        memory["host"] += memory["weights"]
        memory["weights"] = 0
    memory["buffers"] = max(bucket, widened)
    if stage == 3:
        memory["gradients"] += bucket
        memory["buffers"] = b * min(P, zero.get("stage3_max_live_parameters", 1e9)) + widened

    width, E = activation_width(model), model.config.hidden_size
    logits = rows * scored * model.config.vocab_size if head else 0
    if model.config.model_type in FAMILIES:  # then they are never whole: kernels/logprob.py
        logits = min(logits, SLICE["cpu" if cpu else "cuda"])
    kept = layers * E + width if checkpointing else layers * width
    memory["activations"] = (b * rows * tokens * kept + (b + 8) * logits) * (T > 0)
    return memory


def generation_memory(model, settings, rows, tokens, tp, cpu):
    """Bytes on each device of the decoder's own weights (see the top of hybrid_engine.py) and of its KV cache."""
    b, layers = compute_dtype(settings).itemsize, model.config.num_hidden_layers
    H, KVH, D = attention_shape(model.config)
    if settings["zero_optimization"]["stage"] == 3:
        copied = parameter_count(model) / tp
    elif cpu:
        head = model.get_output_embeddings().weight.numel()
        copied = sum(m.weight.numel() for m in block_matrices(model)) / tp + head
    else:
        adapted = sum(m.weight.numel() for m in model.modules() if isinstance(m, LoRALinear))
        copied = max(layers * (H + 2 * KVH) * D * model.config.hidden_size, adapted) / tp
    return {"generation copy": b * copied, "KV cache": b * 2 * layers * rows * tokens * KVH * D}


def memory_plan(models, settings, devices, rows, tokens, scored, generated=0, checkpointing=False, tp=1, cpu=False,
                text=0):
    """
    Bytes on each of `devices` devices, from shapes alone.

    models    {name: model of empty_model}; the first generates
    rows      in one forward and backward, each of so many tokens, `scored` of them through a language model's head
    generated rows of a rollout, answered and scored at once; 0: this stage has none
    text      tokens of a row of the mixture term, which the first model trains on in the same backward; 0: none
    returns   {name: {part: bytes}}, {phase: bytes at its peak}

    Not counted: what CUDA and NCCL keep for themselves (about 1 GB), and fragments of the allocator.
    """
    stage = settings["zero_optimization"]["stage"]
    first, actor = next(iter(models.items()))
    plan = {name: model_memory(model, settings, devices, rows, tokens + text * (name == first),
                               scored + text * (name == first), checkpointing, cpu) for name, model in models.items()}
    always = ["weights", "optimizer", "gradients"][:3 if stage == 3 else 2]
    resident, peaks = sum(memory[part] for memory in plan.values() for part in always), {}
    if generated:
        plan[first].update(generation_memory(actor, settings, generated, tokens, tp, cpu))
        peaks["generate"] = resident + plan[first]["generation copy"] + plan[first]["KV cache"]
        one_layer = activation_width(actor) * compute_dtype(settings).itemsize
        peaks["score"] = resident + generated * tokens * one_layer
    for name, memory in plan.items():
        if memory["gradients"]:
            # the first gradient comes when every activation is there; without ZeRO the buffers wait until they are gone
            both = (sum if stage else max)([memory["activations"], memory["buffers"]])
            peaks[f"train {name}"] = resident + both + (memory["gradients"] if stage < 3 else 0)
    return plan, peaks


def epoch_hours(flops, rows, devices, device_tflops):
    """Hours for `rows` rows of so many FLOP each, shared by `devices` devices of so many TFLOP/s."""
    return flops * rows / (devices * device_tflops * 1e12) / 3600


def training_flops(models, tokens, generated, checkpointing, epochs=1, text=0):
    """
    FLOP of one row as DeepSpeed-Chat counts them: 3 forwards for each trained model (4 with checkpointing) and one for
    the tokens the first model generates. Scoring is in the seconds of its published TFLOP/s, but not in the FLOP.
    Training counts once for each of the `epochs` over a rollout; `text` as in memory_plan.
    """
    trained = [model for model in models.values() if any(p.requires_grad for p in model.parameters())]
    forwards = sum(forward_flops(model, tokens) for model in trained) + (forward_flops(trained[0], text) if text else 0)
    return epochs * (3 + checkpointing) * forwards + (forward_flops(trained[0], tokens) if generated else 0)


def planned_models(config, stage):
    """
    The models of a stage ("sft", "reward", "dpo" or "ppo") without weights, by name; the one that generates comes
    first.
    """
    if stage == "sft":
        return {"model": empty_model(config.model_name_or_path, config)}
    if stage == "reward":
        return {"model": empty_model(config.model_name_or_path, config, "score")}
    if stage == "dpo":
        models = {"model": empty_model(config.model_name_or_path, config)}
        if not config.only_optimize_lora:
            models["ref"] = empty_model(config.model_name_or_path, config, trained=False)
        return models
    actor, critic = config.actor_model_name_or_path, config.critic_model_name_or_path
    models = {"actor": empty_model(actor, config)}
    if not (config.lora_dim and config.only_optimize_lora):
        models["ref"] = empty_model(actor, config, trained=False)
    scorers = [name for name in config.reward_fn or [critic] if not name.rpartition(":")[0].endswith(".py")]
    for i, name in enumerate(scorers):
        models[f"reward {i + 1}" if i else "reward"] = empty_model(name, config, "score", trained=False)
    if config.advantage == "gae":
        models["critic"] = empty_model(critic or actor, config, "score")
    return models


def planned_row(config, stage):
    """-> tokens of one row, tokens of it that go through the head, rows of a rollout (0: the stage has none)."""
    if stage == "sft":
        return config.max_seq_len, config.max_seq_len, 0
    if stage == "reward":
        return 2 * config.max_seq_len, 0, 0
    if stage == "dpo":
        return 2 * config.max_seq_len, 2 * config.max_seq_len, 0
    return config.max_prompt_seq_len + config.max_answer_seq_len, config.max_answer_seq_len, config.rollout_rows


def dry_run(config, stage):
    """Prints memory_plan, time and cost of a stage ("sft", "reward", "dpo" or "ppo"), from rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    models = planned_models(config, stage)
    tokens, scored, generated = planned_row(config, stage)
    settings, machine = deepspeed_settings(config), config.dry_run < 0
    devices = int(os.environ.get("WORLD_SIZE", 1)) if machine else config.dry_run
    cpu = machine and get_accelerator().device_name() == "cpu"
    rows, tp = config.per_device_train_batch_size, getattr(config, "inference_tp_size", 1)
    epochs, text = getattr(config, "ppo_epochs", 1), 0
    if getattr(config, "unsupervised_data_path", None):
        text = config.max_seq_len
    plan, peaks = memory_plan(models, settings, devices, rows, tokens, scored, generated, config.gradient_checkpointing,
                              tp, cpu, text)
    parts = list(dict.fromkeys(part for memory in plan.values() for part in memory))
    print(f"\nmemory plan, GB on each of {devices} device(s): {str(compute_dtype(settings))[6:]}, ZeRO stage "
          f"{settings['zero_optimization']['stage']}, {rows} rows of {tokens} tokens a micro-batch"
          + (f", {generated} a rollout" if generated else ""))
    print(f"\n{'':<10}{'parameters':>11}{'trained':>9}  " + "  ".join(f"{part:>7}" for part in parts))
    for name, memory in plan.items():
        trained = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        print(f"{name:<10}{parameter_count(models[name]) / 1e6:>10.0f}M{trained / 1e6:>8.0f}M"
              + "".join(f"  {memory.get(part, 0) / 2**30:>{max(len(part), 7)}.2f}" for part in parts))
    print("\npeak      " + ", ".join(f"{phase} {size / 2**30:.1f}" for phase, size in peaks.items())
          + f"; in all {max(peaks.values()) / 2**30:.1f} GB a device" + ("" if cpu else ", about 1 GB more for CUDA"))
    flops = training_flops(models, tokens, generated, config.gradient_checkpointing, epochs, text)
    count = config.max_steps * devices * (generated or rows * config.gradient_accumulation_steps)
    count, how_many = (count, "rows") if config.max_steps > 0 else (100_000, "rows, say (--max_steps plans your run)")
    hours = epoch_hours(flops, count, devices, config.device_tflops)
    print(f"time      {count:,} {how_many}: {hours:.2f} h at {config.device_tflops:g} TFLOP/s a device "
          f"(--device_tflops; {flops / 1e12:.2f} TFLOP a row), ${hours * devices * config.device_price:,.2f} "
          f"at ${config.device_price:g} a device-hour (--device_price)")
