"""
Episodes a second of PPO: step3_ppo.py's trainer beside TRL's PPOTrainer, the same models and batches on this machine.

    pip install trl==1.12.0                                  # for this bench alone
    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 python bench/beside_trl.py      # about 15 minutes on 2 CPU cores

Actor, reference, critic and reward model of OPT-125M's shape with random weights (speed is the same on any); a rollout
of 8 prompts of 64 tokens, answered in full length, 64; then one optimizer step on all of it. Each run is a process of
its own, the contestants take turns, and a run's first update warms it up. TRL's learning settings do not matter
here; what costs time is set in its favour: no gradient checkpointing, no saving, no samples printed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
PROMPT, RESPONSE, ROWS = 64, 64, 8
WARM_UP, UPDATES, ROUNDS = 1, 3, 2


def make_models(folder):
    from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

    from data import load_tokenizer
    tokenizer = load_tokenizer("tiny")
    config = OPTConfig(num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    for name, kind in (("actor", OPTForCausalLM), ("reward", OPTForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for dtype in ("float32", "bfloat16"):
        settings = {"bf16": {"enabled": dtype == "bfloat16"}, "gradient_clipping": 1.0}
        (folder / f"{dtype}.json").write_text(json.dumps(settings))


def prompts():
    """(WARM_UP + UPDATES batches, ROWS, PROMPT) token ids without special ones."""
    import torch
    return torch.randint(10, 900, (WARM_UP + UPDATES, ROWS, PROMPT), generator=torch.Generator().manual_seed(0))


def this(folder, dtype):
    """The clock, in seconds, at the start and after each update; as in `trl`."""
    import torch

    from data import load_tokenizer
    from step3_ppo import Config
    from step3_ppo import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine
    args = Config(max_prompt_seq_len=PROMPT, max_answer_seq_len=RESPONSE, per_device_generation_batch_size=ROWS,
                  per_device_train_batch_size=ROWS, deepspeed_config=f"{folder}/{dtype}.json", output_dir=str(folder))
    engine = DeepSpeedRLHFEngine(f"{folder}/actor", f"{folder}/reward", load_tokenizer(f"{folder}/actor"),
                                 WARM_UP + UPDATES, args)
    trainer, times = DeepSpeedPPOTrainer(engine, args), [time.perf_counter()]
    for ids in prompts():
        trainer.train_rlhf(trainer.generate_experience({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
        times.append(time.perf_counter())
    return times


def trl(folder, mode):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    rows = Dataset.from_dict({"input_ids": prompts().flatten(0, 1).tolist()})
    dtype = torch.bfloat16 if mode == "bfloat16 weights" else torch.float32
    actor, ref = (AutoModelForCausalLM.from_pretrained(folder / "actor", dtype=dtype) for _ in range(2))
    critic, reward = (AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=dtype)
                      for _ in range(2))
    args = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=ROWS, gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=1, total_episodes=len(rows), response_length=RESPONSE, temperature=1.0, num_sample_generations=0,
        bf16=mode == "bfloat16 autocast", gradient_checkpointing=False, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True)
    PPOTrainer(args, AutoTokenizer.from_pretrained(folder / "actor"), actor, ref, reward, rows, critic,
               eval_dataset=rows, callbacks=[Clock()]).train()
    return times


CONTESTANTS = {
    "this, float32": (this, "float32"), "this, bfloat16": (this, "bfloat16"),
    "TRL, float32": (trl, "float32"), "TRL, bfloat16 autocast": (trl, "bfloat16 autocast"),
    "TRL, bfloat16 weights": (trl, "bfloat16 weights"),
}


def main():
    if len(sys.argv) == 3:  # a contestant's own process
        run, mode = CONTESTANTS[sys.argv[2]]
        print("\ntimes", json.dumps(run(Path(sys.argv[1]), mode)))
        return
    import accelerate
    import deepspeed
    import torch
    import transformers
    import trl
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, deepspeed {deepspeed.__version__}, "
          f"accelerate {accelerate.__version__}, trl {trl.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
          f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    seconds = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        for i in range(ROUNDS):
            for name in list(CONTESTANTS)[::-1 if i % 2 else 1]:
                out = subprocess.run([sys.executable, __file__, folder, name], capture_output=True, text=True)
                if out.returncode:
                    sys.exit(f"{name} failed:\n{out.stdout[-2000:]}\n{out.stderr[-4000:]}")
                times = json.loads(out.stdout.rpartition("times ")[2])
                seconds[name] += [after - before for before, after in zip(times, times[1:])][WARM_UP:]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name.startswith("TRL"))
    print(f"{'':<26}{'s an update':>12}{'episodes/s':>12}{'x TRL float32':>15}{'x best TRL':>12}")
    for name, value in medians.items():
        print(f"{name:<26}{value:>12.2f}{ROWS / value:>12.2f}{medians['TRL, float32'] / value:>15.2f}"
              f"{best / value:>12.2f}")


if __name__ == "__main__":
    main()
