"""
The memory plan of --dry_run beside the measured peak of step 3, for an actor and critic of
OPT-125M's shape on a CPU.

    OMP_NUM_THREADS=1 python bench/memory.py

That is four runs of a rollout and two updates, about a minute each.

Random weights, saved in float16 as OPT's on the hub are. Measured: the growth of the process's peak
resident memory over what it had after the imports, a fresh process each. MALLOC_MMAP_THRESHOLD_
gives every tensor of a megabyte its own pages, so that what is counted is what is alive: with
glibc's own threshold the holes in its heap come on top.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
P = 64
R = 32
ROWS = 4
BF16 = {"bf16": {"enabled": True}, "gradient_clipping": 1.0}
FLOAT32 = ["--deepspeed_config", f"{ROOT}/configs/cpu.json"]
RUNS = {  # name -> flags
    "float32, ZeRO 0": FLOAT32,
    "bfloat16, ZeRO 0": [],
    "bfloat16, ZeRO 2": ["--zero_stage", "2"],
    "float32, LoRA, checkpointing": [
        *FLOAT32, "--lora_dim", "8", "--only_optimize_lora", "--gradient_checkpointing"],
}


def flags(folder, name):
    values = {
        "actor_model_name_or_path": f"{folder}/actor",
        "critic_model_name_or_path": f"{folder}/reward",
        "data_path": f"{folder}/rows.jsonl",
        "output_dir": f"{folder}/output",
        "max_prompt_seq_len": P,
        "max_answer_seq_len": R,
        "per_device_generation_batch_size": ROWS,
        "per_device_train_batch_size": ROWS // 2,
        "max_steps": 1,
        "overwrite_output_dir": True,
        "max_eval_samples": ROWS,
        "deepspeed_config": f"{folder}/bf16.json",
    }
    words = []
    for flag, value in values.items():
        words += [f"--{flag}", str(value)]
    return words + RUNS[name]


def make_inputs(folder):
    """Actor, reward model, and prompts of exactly P tokens."""
    from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification

    from data import encode_prompts, load_tokenizer
    tokenizer = load_tokenizer("tiny")
    hf_config = OPTConfig(num_labels=1, pad_token_id=tokenizer.pad_token_id,
                          eos_token_id=tokenizer.eos_token_id)
    for name, kind in (("actor", OPTForCausalLM), ("reward", OPTForSequenceClassification)):
        kind(hf_config).half().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    # Questions of many lengths, of which those with P tokens are kept.
    rows = []
    for n in range(20, P):
        questions = [f"What is {i} plus {i % 7}" + " red" * n + "?" for i in range(50)]
        prompts = [[{"role": "user", "content": question}] for question in questions]
        ids = encode_prompts(tokenizer, prompts)[1]
        for question, row in zip(questions, ids):
            if len(row) == P:
                rows.append(json.dumps({"prompt": question, "chosen": "yes"}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "bf16.json").write_text(json.dumps(BF16))


def resident(entry):
    """MB, from /proc/self/status: VmRSS is what is resident now, VmHWM its peak."""
    for line in open("/proc/self/status"):
        if line.startswith(entry):
            return int(line.split()[1]) / 1024


def child(arguments):
    """Runs step 3; the last line is the growth of its peak memory in MB."""
    import step3_ppo
    from support.flags import parse_config
    baseline = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    step3_ppo.main(parse_config(step3_ppo.Config, "", arguments))
    print(resident("VmHWM") - baseline)


def planned(arguments):
    """-> MB at the highest peak, and its phase."""
    import step3_ppo
    from support.flags import parse_config
    from support.plan import memory_plan, planned_models
    from support.processes import deepspeed_settings
    config = parse_config(step3_ppo.Config, "", arguments)
    models = planned_models(config, "ppo")
    _, peaks = memory_plan(models, deepspeed_settings(config), 1, ROWS // 2, P + R, R, ROWS,
                           config.gradient_checkpointing, cpu=True)
    phase = max(peaks, key=peaks.get)
    return peaks[phase] / 2**20, phase


def measured(arguments):
    """MB of growth of a fresh process that runs step 3."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "HF_HUB_OFFLINE": "1",
                   "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], env=environment,
                          cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.exists() else None) as folder:
        make_inputs(Path(folder))
        print(f"{'':<32}{'planned MB':>11}{'measured':>10}{'ratio':>7}  peak")
        for name in RUNS:
            arguments = flags(folder, name)
            plan, phase = planned(arguments)
            measure = measured(arguments)
            print(f"{name:<32}{plan:>11.0f}{measure:>10.0f}{plan / measure:>7.2f}  {phase}",
                  flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
