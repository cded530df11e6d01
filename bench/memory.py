"""
The memory plan of --dry_run beside measured peaks, at each moment of a run on a CPU: load,
generate, score, train, EMA, sample, save, resume; models of OPT-125M's and OPT-350M's shape, ZeRO
0, 2 and 3, LoRA, a moving average, 1 and 2 processes.

    python bench/memory.py                     # all cases, some minutes each
    python bench/memory.py "125m, ZeRO 2, 2"   # one

The cases of OPT-350M's shape need 18 GB of memory and 20 GB of disk (TMPDIR). With two processes
its reward model and critic are of OPT-125M's, because 24 GB are not enough for both.

A case is three runs: two steps of PPO with checkpoints, one more after a --resume, and two steps of
SFT for the sample at its end. Measured: the growth of a process's peak resident memory within a
moment over what it had after the imports. Of that is taken off what the same runs take with a model
of next to no weights, because libraries touch their pages late (some 0.2 GB). Where
models are loaded without ZeRO 3, the file that is mapped into memory counts, which the system could
drop; so it is added to the plan, which leaves it out, unless the moving average, made later, is
larger.

What is counted is what is alive: MALLOC_MMAP_THRESHOLD_ gives every tensor of a megabyte its own
pages, and between two moments the holes in glibc's heap go back to the system. Without either they
come on top: with ZeRO 3, whose pieces are small, some 0.3 GB.
"""

import argparse
import ctypes
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
P = 64
R = 32
ROWS = 4
LORA = ["--lora_dim", "8", "--only_optimize_lora", "--gradient_checkpointing"]
CASES = {  # name -> shapes of actor (and critic), DeepSpeed JSON, processes, flags
    "125m, ZeRO 0, EMA": ("125m", "float32", 1, ["--enable_ema"]),
    "125m, ZeRO 2, 2": ("125m", "float32", 2, ["--zero_stage", "2"]),
    "125m, ZeRO 2, EMA, 2": ("125m", "float32", 2, ["--zero_stage", "2", "--enable_ema"]),
    "125m, ZeRO 3, 2": ("125m", "float32", 2, ["--zero_stage", "3"]),
    "125m, ZeRO 3, EMA, 2": ("125m", "float32", 2, ["--zero_stage", "3", "--enable_ema"]),
    "125m, ZeRO 0, LoRA": ("125m", "float32", 1, LORA),
    "125m, ZeRO 3, LoRA, 2": ("125m", "float32", 2, ["--zero_stage", "3", *LORA]),
    "125m, bf16, ZeRO 0": ("125m", "bfloat16", 1, []),
    "350m, ZeRO 2": ("350m", "float32", 1, ["--zero_stage", "2"]),
    "350m and 125m, ZeRO 3, 2": ("350m 125m", "float32", 2, ["--zero_stage", "3"]),
}
SHORT = {"bfloat16": (16, 8, 2)}  # P, R, ROWS where a CPU multiplies slowly


# -----------------------------------------------------------------------------
# in a process of its own: a stage, and its peaks

def resident(entry):
    """Bytes, from /proc/self/status: VmRSS is what is resident now, VmHWM its peak."""
    for line in open("/proc/self/status"):
        if line.startswith(entry):
            return int(line.split()[1]) * 1024


class HostMemory:
    """What is resident beyond what was so at the beginning."""

    def __init__(self):
        self.baseline = resident("VmRSS")

    def peak(self):
        return resident("VmHWM") - self.baseline

    def forget_peak(self):
        """The peak counts from here."""
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


class DeviceMemory:
    """What tensors hold on the GPU, without what its allocator keeps for the next ones."""

    def peak(self):
        import torch
        return torch.cuda.max_memory_allocated()

    def forget_peak(self):
        import torch
        torch.cuda.reset_peak_memory_stats()


class Peaks:
    """The peak of each moment; a moment within another is not counted to the outer one."""

    def __init__(self, memory):
        self.memory = memory
        self.bytes = {}
        self.moments = ["other"]
        self.memory.forget_peak()

    def _note(self):
        moment = self.moments[-1]
        self.bytes[moment] = max(self.bytes.get(moment, 0), self.memory.peak())
        self.memory.forget_peak()

    def watch(self, owner, name, moment):
        """Calls of owner.name are that moment from now on."""
        function = getattr(owner, name)

        def watched(*arguments, **options):
            self._note()
            self.moments.append(moment)
            try:
                return function(*arguments, **options)
            finally:
                self._note()
                self.moments.pop()

        setattr(owner, name, watched)


def watch_moments(peaks, generate="generate"):
    """generate: the moment that a rollout of the decoder belongs to."""
    import hybrid_engine
    import step1_sft
    import step3_ppo
    from support import checkpoints
    trainer = step3_ppo.DeepSpeedPPOTrainer
    average = hybrid_engine.ExponentialMovingAverage
    for owner, name, moment in (
            (step3_ppo.DeepSpeedRLHFEngine, "__init__", "load"),
            (hybrid_engine.InferenceEngine, "generate", generate),
            (trainer, "generate_experience", "score"), (step3_ppo, "evaluate", "score"),
            (trainer, "update_actor", "train actor"), (trainer, "update_critic", "train critic"),
            (average, "update", "EMA"), (average, "by_name", "save"),
            (step3_ppo, "save_model", "save"), (checkpoints.Checkpoints, "_write", "save"),
            (checkpoints.Checkpoints, "_restore", "resume"),
            (step1_sft, "sample_answers", "sample")):
        peaks.watch(owner, name, moment)


def child(stage, arguments):
    """Runs a stage; the last line is {moment: bytes}."""
    import step1_sft
    import step3_ppo
    from support.flags import parse_config
    peaks = Peaks(HostMemory())
    watch_moments(peaks, "generate" if stage == "ppo" else "sample")
    module = {"sft": step1_sft, "ppo": step3_ppo}[stage]
    module.main(parse_config(module.Config, "", arguments))
    print(json.dumps(peaks.bytes))


# -----------------------------------------------------------------------------
# the runs of a case

def make_models(folder, sizes):
    """Actor and reward model with random weights in float16, as OPT's on the hub are."""
    import torch
    from transformers import OPTForCausalLM, OPTForSequenceClassification

    from data import load_tokenizer
    from support.plan import OPT, opt_config
    OPT["none"] = (12, 12, 12)  # a model of next to no weights
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer("tiny")
    sizes = sizes.split()
    for name, kind, size in (("actor", OPTForCausalLM, sizes[0]),
                             ("reward", OPTForSequenceClassification, sizes[-1])):
        hf_config = opt_config(size)
        if size == "none":
            hf_config.vocab_size = len(tokenizer)
        hf_config.num_labels = 1
        hf_config.pad_token_id = tokenizer.pad_token_id
        hf_config.eos_token_id = tokenizer.eos_token_id
        with torch.device(device):  # a billion random numbers take a CPU long
            model = kind(hf_config)
        model.half().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_inputs(folder, sizes, prompt_tokens):
    """The models; prompts of so many tokens; the DeepSpeed JSON of each dtype."""
    from data import encode_prompts, load_tokenizer
    make_models(folder, sizes)
    tokenizer = load_tokenizer("tiny")

    # Questions of many lengths, of which those with that many tokens are kept.
    rows = []
    for n in range(1, prompt_tokens):
        questions = [f"What is {i} plus {i % 7}" + " red" * n + "?" for i in range(50)]
        prompts = [[{"role": "user", "content": question}] for question in questions]
        ids = encode_prompts(tokenizer, prompts)[1]
        for question, row in zip(questions, ids):
            if len(row) == prompt_tokens:
                rows.append(json.dumps({"prompt": question, "response": "yes"}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    for dtype in ("float32", "bfloat16"):
        settings = {"bf16": {"enabled": dtype == "bfloat16"}, "gradient_clipping": 1.0}
        (folder / f"{dtype}.json").write_text(json.dumps(settings))


def flags(folder, stage, dtype, more):
    prompt_tokens, answer_tokens, rows = SHORT.get(dtype, (P, R, ROWS))
    values = {
        "data_path": f"{folder}/rows.jsonl",
        "output_dir": f"{folder}/output",
        "deepspeed_config": f"{folder}/{dtype}.json",
        "max_prompt_seq_len": prompt_tokens,
        "max_answer_seq_len": answer_tokens,
        "per_device_train_batch_size": rows // 2,
        "max_eval_samples": rows,
        "max_steps": 2,
        "save_steps": 1,
    }
    if stage == "ppo":
        values |= {"actor_model_name_or_path": f"{folder}/actor",
                   "critic_model_name_or_path": f"{folder}/reward",
                   "per_device_generation_batch_size": rows,
                   "skip_preflight": True}
    else:
        values |= {"model_name_or_path": f"{folder}/actor",
                   "max_seq_len": prompt_tokens + answer_tokens}
        more = [word for word in more if word != "--enable_ema"]
    words = []
    for flag, value in values.items():
        words += [f"--{flag}", str(value)]
    return words + more


def run(stage, arguments, processes):
    """-> [{moment: bytes} of each process]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "HF_HUB_OFFLINE": "1",
                   "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                   "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = []
    for rank in range(processes):
        running.append(subprocess.Popen(
            [sys.executable, __file__, "--child", stage, *arguments], cwd=ROOT, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE))
    outputs = [process.communicate()[0] for process in running]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measured(folder, dtype, processes, more):
    """-> [{moment: bytes} of each process] of the three runs of a case."""
    ppo = run("ppo", flags(folder, "ppo", dtype, more), processes)
    resumed = run("ppo", flags(folder, "ppo", dtype, [*more, "--resume", "--max_steps", "3"]),
                  processes)
    sft = run("sft", flags(folder, "sft", dtype, more), processes)
    for peaks, after, beside in zip(ppo, resumed, sft):
        peaks["resume"] = after["resume"]
        peaks["sample"] = beside["sample"]
    return ppo


def planned(folder, dtype, processes, more):
    """-> [{moment: bytes} of each process]."""
    import step1_sft
    import step3_ppo
    from support.dry_run import planned_work
    from support.flags import parse_config
    from support.plan import memory_plan, parameter_count, planned_models
    from support.processes import deepspeed_settings
    moments = {}
    for stage, config_class in (("ppo", step3_ppo.Config), ("sft", step1_sft.Config)):
        config = parse_config(config_class, "", flags(folder, stage, dtype, more))
        models = planned_models(config, stage)
        ds_config = deepspeed_settings(config)
        work = planned_work(config, stage, processes, True, models, ds_config)
        of_stage = memory_plan(models, ds_config, processes, work)[1]
        if stage == "ppo":
            file = 2 * max(parameter_count(model) for model in models.values())  # float16
            stage_of_zero = ds_config["zero_optimization"]["stage"]
            average = 0
            if work.ema:
                average = 4 * parameter_count(models["actor"]) / (processes if stage_of_zero else 1)
            if stage_of_zero < 3:
                of_stage["load"].device += max(0, file - average)
        moments = {**of_stage, **moments}
    return [{name: need.device + need.host + (0 if rank else need.first)
             for name, need in moments.items()} for rank in range(processes)]


# -----------------------------------------------------------------------------
# the table

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE",
                        help="; ".join(CASES))
    cases = parser.parse_args().cases
    import deepspeed
    import torch
    import transformers

    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, deepspeed "
          f"{deepspeed.__version__}, transformers {transformers.__version__}")
    print("planned / measured MB; the process of rank 0, which writes, and the last")
    own = {}
    ratios = []
    for case in cases:
        size, dtype, processes, more = CASES[case]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            prompt_tokens = SHORT.get(dtype, (P,))[0]
            zero_stage = more[1] if more[:1] == ["--zero_stage"] else "0"
            if (processes, zero_stage) not in own:
                make_inputs(folder, "none", P)
                plain = ["--zero_stage", zero_stage]
                own[processes, zero_stage] = measured(folder, "float32", processes, plain)
                subprocess.run(["rm", "-r", str(folder / "output")], check=True)
            make_inputs(folder, size, prompt_tokens)
            plan = planned(folder, dtype, processes, more)
            found = measured(folder, dtype, processes, more)
        for rank in sorted({0, processes - 1}):
            words = []
            for moment, expected in plan[rank].items():
                with suppress(KeyError):  # moments of the other stage's training
                    of_libraries = own[processes, zero_stage][rank]
                    library = of_libraries.get(moment, of_libraries["score"])
                    peak = found[rank][moment] - library
                    ratios.append(expected / peak)
                    words.append(f"{moment} {expected / 2**20:.0f}/{peak / 2**20:.0f}")
            print(f"{case}, rank {rank}: {', '.join(words)}", flush=True)
    print(f"planned / measured: {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} moments")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
