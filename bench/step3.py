"""
PPO steps of OPT's shapes on one GPU, by the recipe of `run_all.sh opt-1.3b 1gpu`: pairs (a prompt
with its answer) a second, the seconds of each phase, and the memory of each moment beside the plan
of --dry_run.

    python bench/step3.py "1.3b 350m"       # under a minute; on a CPU toy shapes
    python bench/step3.py                   # all cases

Random weights, prompts of 256 random tokens, answers of 256 (there is no EOS): speed and memory do
not depend on what is said. Answers are sampled from the first 1000 of the 50,272 ids, which are all
that the built-in tokenizer knows. Measured memory is what tensors hold (max_memory_allocated), at
the peak of each moment; "card" is all that is taken of the card at the end, by the allocator and by
CUDA too, beside what --dry_run holds against the card's size.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
import torch

from bench.memory import DeviceMemory, HostMemory, Peaks, make_models, watch_moments

PRESET = dict(per_device_generation_batch_size=64, per_device_train_batch_size=16,
              gradient_accumulation_steps=2)
ADAPTERS = dict(lora_dim=128, lora_alpha=1.0, only_optimize_lora=True, gradient_checkpointing=True)
CASES = {  # name -> sizes of actor and reward model, flags beside the preset's
    "1.3b 350m": ("1.3b 350m", {}),
    "1.3b 350m, LoRA": ("1.3b 350m", ADAPTERS),
    "350m, ZeRO 2, EMA": ("350m", dict(zero_stage=2, enable_ema=True)),
    "350m, ZeRO 3": ("350m", dict(zero_stage=3)),
}
WARM_UP = 1
STEPS = 3


def measure(case, folder):
    """
    Runs a case in this process, which can run only one; `folder` keeps models for other cases.

    returns  seconds (of generate, score, train and a whole step, medians), pairs_per_second,
             measured and planned (bytes by moment), card and card_planned (bytes)
    """
    from data import load_tokenizer
    from step3_ppo import Config, DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
    from support.dry_run import plan_stage

    # 1. The case; on a CPU its toy.
    gpu = torch.cuda.is_available()
    sizes, flags = CASES[case]
    flags = {**PRESET, **flags}
    tokens = 256
    if not gpu:
        sizes = "none"
        tokens = 8
        flags.update(per_device_generation_batch_size=4, per_device_train_batch_size=2)
    models = Path(folder) / sizes.replace(" ", "-")
    if not models.exists():
        make_models(models, sizes)
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    args = Config(
        actor_model_name_or_path=f"{models}/actor", critic_model_name_or_path=f"{models}/reward",
        max_prompt_seq_len=tokens, max_answer_seq_len=tokens, output_dir=f"{folder}/output",
        deepspeed_config=str(ROOT / "configs" / ("1gpu.json" if gpu else "cpu.json")), **flags)
    plan = plan_stage(args, "ppo", 1, not gpu)

    # 2. Steps, with the peak of each moment.
    peaks = Peaks(DeviceMemory() if gpu else HostMemory())
    watch_moments(peaks)
    tokenizer = load_tokenizer(args.actor_model_name_or_path)
    engine = DeepSpeedRLHFEngine(args.actor_model_name_or_path, args.critic_model_name_or_path,
                                 tokenizer, WARM_UP + STEPS, args)
    engine.eos_token_ids = [-1]  # an answer never ends
    trainer = DeepSpeedPPOTrainer(engine, args)
    phases = ("generate", "score", "train")
    seconds = {phase: [] for phase in (*phases, "step")}
    for step in range(WARM_UP + STEPS):
        shape = (args.per_device_generation_batch_size, tokens)
        ids = torch.randint(10, len(tokenizer), shape)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        experience = trainer.generate_experience(batch)
        assert experience.mask.all() and experience.mask.size(1) == tokens
        trainer.train_rlhf(experience)
        if step >= WARM_UP:
            taken = [trainer.metrics[f"time/{phase}"] for phase in phases]
            for phase, value in zip(seconds, (*taken, sum(taken))):
                seconds[phase].append(value)
    medians = {phase: statistics.median(values) for phase, values in seconds.items()}

    # 3. Beside the plan.
    card = 0
    if gpu:
        free, total = torch.cuda.mem_get_info()
        card = total - free
    planned = {moment: need.device for moment, need in plan.moments.items()}
    return dict(case=case, seconds=medians, pairs_per_second=shape[0] / medians["step"],
                measured=peaks.bytes, planned=planned, card=card, card_planned=plan.peak)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE",
                        help="; ".join(CASES))
    cases = parser.parse_args().cases
    if len(cases) > 1:
        for case in cases:
            subprocess.run([sys.executable, __file__, case], check=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(cases[0], folder), indent=1))


if __name__ == "__main__":
    main()
