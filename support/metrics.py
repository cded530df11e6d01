"""
Metrics: the numbers of a run, their sums over ranks, its summary, and what a trained model says.
"""

import dataclasses
import json
import math
import os
import resource
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import transformers

from data import Collator, decode_answers, encode_prompts, rank_share
from hybrid_engine import InferenceEngine
from support.flags import UsageError
from support.models import last_token, vocabulary_size
from support.processes import all_sum, mean_over_ranks, to_device
from support.runs import write_json
from support.terminal import watched
from support.toy import load_gold_mark

SAMPLES = 10  # prompts that are answered where answers cannot be marked

# section of summary.json -> folder of the stage's model below --output_dir
STAGES = {"sft": "sft", "reward": "reward", "dpo": "actor", "ppo": "actor"}


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
    summary.setdefault("commands", {})[section] = shlex.join(command_words())
    if "RUN_COMMAND" in os.environ:
        summary["command"] = os.environ["RUN_COMMAND"]  # of run_all.sh
    write_json(path, summary)


def command_words():
    """The command by which this process was started, without its launcher."""
    flags = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    return ["python", Path(sys.argv[0]).name, *flags]


# -----------------------------------------------------------------------------
# what a trained model says

@dataclass
class Answer:
    """A held-out prompt and what a model answered."""
    record: object        # a data.Preference
    text: str
    ended: bool           # with EOS, before the most tokens were reached
    score: float = None   # the reward's
    kl: float = None      # nats, of the whole answer, to the reference
    gold: float = None    # the exact mark, where the task has one

    def as_dict(self):
        """What a line of samples.jsonl holds."""
        numbers = {name: getattr(self, name) for name in ("score", "kl", "gold")}
        known = {name: value for name, value in numbers.items() if value is not None}
        return {"prompt": self.record.prompt, "answer": self.text, "ended": self.ended, **known}

    def __str__(self):
        """One line of under 100 columns: the end of the question, the start of the answer."""
        question = " ".join(self.record.prompt[-1]["content"].split())[-40:]
        answer = " ".join(self.text.split())[:40]
        return f"  for example: {question} -> {answer}"


def sample_answers(model, tokenizer, records, config, batch_size=64):
    """
    Has a language model answer held-out prompts. A task whose answers can be marked exactly has all
    of them answered, another one ten.

    model    a Hugging Face causal LM
    returns  mean over all ranks of the exact marks, or None; Answers of this rank. Collective
    Prompts over --max_prompt_seq_len are left out.
    """
    rank = dist.get_rank()
    gold_mark = load_gold_mark(config)
    if not gold_mark:
        records = records[:SAMPLES]

    # This rank's share of the prompts that are short enough.
    ids = encode_prompts(tokenizer, [record.prompt for record in records])[1]
    items = [{"input_ids": row, "record": record} for row, record in zip(ids, records)
             if len(row) <= config.max_prompt_seq_len]
    items = rank_share(items, rank, dist.get_world_size())

    engine = InferenceEngine(model, decoder_ranks(model), vocabulary=vocabulary_size(tokenizer))
    collate = Collator(3, tokenizer.pad_token_id)
    answers = []
    parts = [items[start:start + batch_size] for start in range(0, len(items), batch_size)]
    for part in watched(parts, "answers to held-out prompts"):
        batch = to_device(collate(part))
        rollout = engine.generate(
            batch["input_ids"], batch["attention_mask"], config.max_answer_seq_len,
            seed=config.seed + rank, eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=tokenizer.pad_token_id)
        texts = decode_answers(tokenizer, rollout)
        ended = has_ended(rollout, model.generation_config.eos_token_id).tolist()
        for record, text, end, weight in zip(batch["records"], texts, ended, batch["weight"]):
            if weight:  # 0 for a row that is repeated to fill up this rank's share
                gold = gold_mark(record, text) if gold_mark else None
                answers.append(Answer(record, text, end, gold=gold))
    if not gold_mark:
        return None, answers
    return mean_over_ranks([answer.gold for answer in answers]), answers


def has_ended(rollout, eos_token_ids):
    """Rollout -> (B,) bool: which answers end with EOS (an id or several), before their limit."""
    R = rollout.mask.size(1)
    last_ids = last_token(rollout.tokens[:, -R:], rollout.mask)
    return torch.isin(last_ids, torch.tensor(eos_token_ids, device=last_ids.device))


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
