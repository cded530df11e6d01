"""
The memory plan of --dry_run beside the measured peak of step 3, for an actor and critic of OPT-125M's shape on a CPU.

    OMP_NUM_THREADS=1 python bench/memory.py                # 4 runs of a rollout and two updates, about a minute each

Random weights, saved in float16 as OPT's on the hub are. Measured: the growth of the process's peak resident memory
over what it had after the imports, a fresh process each. MALLOC_MMAP_THRESHOLD_ gives every tensor of a megabyte its
own pages, so that what is counted is what is alive: with glibc's own threshold the holes in its heap come on top.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
P, R, ROWS = 64, 32, 4
BF16 = '{"bf16": {"enabled": true}, "gradient_clipping": 1.0}'
RUNS = {  # name -> flags
    "float32, ZeRO 0": ["--deepspeed_config", str(ROOT / "configs/cpu.json")],
    "bfloat16, ZeRO 0": [],
    "bfloat16, ZeRO 2": ["--zero_stage", "2"],
    "float32, LoRA, checkpointing": ["--deepspeed_config", str(ROOT / "configs/cpu.json"), "--lora_dim", "8",
                                     "--only_optimize_lora", "--gradient_checkpointing"],
}


def flags(folder, name):
    return ["--actor_model_name_or_path", f"{folder}/actor", "--critic_model_name_or_path", f"{folder}/reward",
            "--data_path", f"{folder}/rows.jsonl", "--output_dir", f"{folder}/output", "--max_prompt_seq_len", P,
            "--max_answer_seq_len", R, "--per_device_generation_batch_size", ROWS, "--per_device_train_batch_size",
            ROWS // 2, "--max_steps", 1, "--max_eval_samples", ROWS, "--deepspeed_config", f"{folder}/bf16.json",
            *RUNS[name]]


def make_inputs(folder):
    """Actor, reward model, and prompts of exactly P tokens."""
    import json

    from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

    from data import encode_prompts, load_tokenizer
    tokenizer = load_tokenizer("tiny")
    config = OPTConfig(num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    for name, kind in (("actor", OPTForCausalLM), ("reward", OPTForSequenceClassification)):
        kind(config).half().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for n in range(20, P):
        prompts = [f"What is {i} plus {i % 7}" + " red" * n + "?" for i in range(50)]
        ids = encode_prompts(tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts])[1]
        rows += [{"prompt": prompt, "chosen": "yes"} for prompt, row in zip(prompts, ids) if len(row) == P]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bf16.json").write_text(BF16)


def child(arguments):
    """Runs step 3; the last line is the growth of its peak memory in MB."""
    import step3_ppo
    from support.flags import parse_config

    def resident(line):  # in /proc/self/status: VmRSS now, VmHWM at its peak
        return int(next(l for l in open("/proc/self/status") if l.startswith(line)).split()[1]) / 1024

    baseline = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step3_ppo.main(parse_config(step3_ppo.Config, "", arguments))
    print(resident("VmHWM") - baseline)


def planned(arguments):
    """MB at the highest peak."""
    import step3_ppo
    from support.flags import parse_config
    from support.plan import memory_plan
    from support.processes import deepspeed_settings
    config = parse_config(step3_ppo.Config, "", arguments)
    peaks = memory_plan(step3_ppo.planned_models(config), deepspeed_settings(config), 1, ROWS // 2, P + R, R, ROWS,
                        config.gradient_checkpointing, cpu=True)[1]
    phase = max(peaks, key=peaks.get)
    return peaks[phase] / 2**20, phase


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").exists() else None) as folder:
        make_inputs(Path(folder))
        print(f"{'':<32}{'planned MB':>11}{'measured':>10}{'ratio':>7}  peak")
        for name in RUNS:
            arguments = list(map(str, flags(folder, name)))
            plan, phase = planned(arguments)
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "HF_HUB_OFFLINE": "1",
                           "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run([sys.executable, __file__, "--child", *arguments], env=environment, cwd=ROOT,
                                  text=True, stdout=subprocess.PIPE, check=True)
            measured = float(done.stdout.split()[-1])
            print(f"{name:<32}{plan:>11.0f}{measured:>10.0f}{plan / measured:>7.2f}  {phase}", flush=True)


if __name__ == "__main__":
    child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
