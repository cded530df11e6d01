"""
Metrics: what a run tells people. Its log, its summary, and what a trained model says.
"""

import dataclasses
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import transformers

from data import Collator, decode_answers, encode_prompts, rank_share
from hybrid_engine import InferenceEngine
from support.flags import UsageError
from support.models import vocabulary_size
from support.processes import all_sum, mean_over_ranks, print0, to_device
from support.toy import load_gold_mark

# section of summary.json -> folder of the stage's model below --output_dir
STAGES = {"sft": "sft", "reward": "reward", "dpo": "actor", "ppo": "actor"}


class MetricsLog:
    """
    On rank 0: one JSON object a step in folder/metrics.jsonl; every --logging_steps a line of fixed
    width, whose numbers are means over the steps since the line before; and DeepSpeed's monitor
    (TensorBoard, W&B, CSV: sections of the DeepSpeed JSON) where one is switched on. A resumed run,
    with `done` steps behind it, appends.
    """

    def __init__(self, folder, total_steps, every, columns, monitor=None, done=0):
        """columns: (label, name of the metric, format) of the printed line."""
        self.total_steps = total_steps
        self.every = every
        self.columns = columns
        self.monitor = monitor
        self.done = done
        self.began = time.time()
        self.unprinted = []
        self.is_rank0 = dist.get_rank() == 0
        if self.is_rank0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.file = open(Path(folder) / "metrics.jsonl", "a" if done else "w", buffering=1)

    def __call__(self, step, metrics):
        """
        step counts from 1; metrics are floats, over all ranks; None is left out.

        raises UsageError, on all ranks, for one that is no finite number: the run has diverged
        """
        check_finite(f"step {step}", metrics)
        if not self.is_rank0:
            return
        metrics = {name: value for name, value in metrics.items() if value is not None}
        metrics = {"step": step, **metrics, "memory_gb": memory_gb()}
        self.file.write(json.dumps(metrics, allow_nan=False) + "\n")
        if self.monitor is not None and self.monitor.enabled:
            events = [(name, value, step) for name, value in metrics.items() if name != "step"]
            self.monitor.write_events(events)
        self.unprinted.append(metrics)
        if step % self.every == 0 or step in (self.done + 1, self.total_steps):
            self._print_line(step)

    def _print_line(self, step):
        last = self.unprinted[-1]
        means = []
        for label, name, form in self.columns:
            if name in last:
                values = [metrics[name] for metrics in self.unprinted if name in metrics]
                mean = sum(values) / len(values)
                means.append(f"{label} {mean:>{form}}")
        self.unprinted = []
        seconds_a_step = (time.time() - self.began) / (step - self.done)
        left = seconds_a_step * (self.total_steps - step)
        print0(f"step {step:>5}/{self.total_steps}  {'  '.join(means)}  "
               f"{1 / seconds_a_step:5.2f} steps/s  {left:4.0f} s left")

    def answers(self, answered):
        """Prints three of the pairs of record and answer."""
        print_answers(answered)


def check_finite(when, numbers):
    """
    Raises UsageError where a number is NaN or infinite. The numbers are those of all ranks, so that
    all of them end, and this stands before anything is saved, so that nothing good is lost.
    """
    wrong = [name for name, v in numbers.items() if isinstance(v, float) and not math.isfinite(v)]
    if wrong:
        raise UsageError(
            f"{when}: {', '.join(wrong[:3])} is {numbers[wrong[0]]}, which is no finite number; "
            "most likely the training has diverged. Nothing was saved since; older models and "
            "checkpoints are as they were. Start again with a lower learning rate, or more "
            "--num_warmup_steps.")


class Sums(dict):
    """Running sums of named numbers (or 0-dim tensors), which end as sums over all ranks."""

    def add(self, **values):
        for name, value in values.items():
            self[name] = self.get(name, 0.0) + value

    def over_ranks(self):
        """
        -> {name: float}. Collective; every rank has added the same names in the same order.

        raises UsageError, on all ranks, for a sum that is no finite number
        """
        total = dict(zip(self, all_sum(*self.values())))
        check_finite("this step", total)
        return total


def memory_gb():
    """Peak memory so far: the accelerator's, or this process's on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kilobytes


def write_json(path, value):
    """Atomic: a reader sees the old file or the new one, never half of either."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def write_summary(config, section, values, model, **others):
    """
    Rank 0: a stage's headline numbers into output_dir/summary.json, beside those of earlier stages.

    section  "sft", "reward", "dpo" or "ppo"
    values   numbers by name, `seconds` among them; None is left out
    model    name of what the stage started from
    others   more entries of the whole run
    """
    path = Path(config.output_dir) / "summary.json"
    summary = {}
    if path.exists() and section != "sft":  # because a new run begins with SFT
        summary = json.loads(path.read_text())
    summary[section] = {name: round(v, 4) for name, v in values.items() if v is not None}
    seconds = sum(summary[s]["seconds"] for s in STAGES if s in summary)
    hardware = config.deepspeed_config or ("1gpu" if torch.cuda.is_available() else "cpu")
    versions = {"python": sys.version.split()[0]}
    for module in (torch, deepspeed, transformers):
        versions[module.__name__] = module.__version__
    summary.update(others)
    summary.update(seconds=round(seconds, 1), model=summary.get("model", model),
                   hardware=Path(hardware).stem, seed=config.seed, versions=versions)
    summary.setdefault("config", {})[section] = dataclasses.asdict(config)
    write_json(path, summary)


# -----------------------------------------------------------------------------
# what a trained model says

def sample_answers(model, tokenizer, records, config, batch_size=64):
    """
    Has a language model answer held-out prompts, and prints three of the answers. A task whose
    answers can be marked exactly has all of them answered, another one three.

    model    a Hugging Face causal LM
    returns  mean over all ranks of the exact marks, or None. Collective
    Prompts over --max_prompt_seq_len are left out.
    """
    rank = dist.get_rank()
    gold_mark = load_gold_mark(config)
    if not gold_mark:
        records = records[:3]

    # This rank's share of the prompts that are short enough.
    ids = encode_prompts(tokenizer, [record.prompt for record in records])[1]
    items = [{"input_ids": row, "record": record} for row, record in zip(ids, records)
             if len(row) <= config.max_prompt_seq_len]
    items = rank_share(items, rank, dist.get_world_size())

    engine = InferenceEngine(model, decoder_ranks(model), vocabulary=vocabulary_size(tokenizer))
    collate = Collator(3, tokenizer.pad_token_id)
    answered = []
    for start in range(0, len(items), batch_size):
        batch = to_device(collate(items[start:start + batch_size]))
        rollout = engine.generate(
            batch["input_ids"], batch["attention_mask"], config.max_answer_seq_len,
            seed=config.seed + rank, eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=tokenizer.pad_token_id)
        answers = decode_answers(tokenizer, rollout)
        for record, answer, weight in zip(batch["records"], answers, batch["weight"]):
            if weight:  # 0 for a row that is repeated to fill up this rank's share
                answered.append((record, answer))
    print_answers(answered)
    if not gold_mark:
        return None
    return mean_over_ranks([gold_mark(record, answer) for record, answer in answered])


def decoder_ranks(model):
    """
    How many ranks of this host share the weights to generate: 1 where each has them anyway. Under
    ZeRO 3 as many as the heads can be split over, because a whole model may not fit one device.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return 1
    # A model without heads generates through Hugging Face, and shares nothing.
    heads = getattr(model.config, "num_attention_heads", 1)
    kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
    world = dist.get_world_size()
    on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return ranks_of_a_decoder(on_this_host, world, heads, kv_heads)


def ranks_of_a_decoder(on_this_host, world, heads, kv_heads):
    """The most ranks of a host that heads can be split over."""
    count = math.gcd(on_this_host, world, heads)
    if kv_heads % count and count % kv_heads:
        count = math.gcd(count, kv_heads)
    return count


def print_answers(answered):
    """answered: pairs of record and answer; the first three are printed."""
    for record, answer in answered[:3]:
        question = record.prompt[-1]["content"][-300:]
        print0(f"\n  {question}\n  -> {answer}")
