"""
What the start of a stage costs as the rows grow: CPU seconds and memory of a process, for the
first start, which prepares the rows, and the second, which maps them.

    OMP_NUM_THREADS=1 python bench/rows.py                           # 20k, 100k and 1M rows
    OMP_NUM_THREADS=1 python bench/rows.py 20000 --tree ../older     # another checkout beside it

The rows are pairs of answers to one question each, some 45 tokens a row in all. Every start has
processes of its own, one or two. Counted is from the imports' end to the first batch: CPU seconds of all of
the process's threads and of its children; the growth of its resident memory at the peak, and when
it has the first batch. Of the latter the mapped file's pages are left out, which the system may
drop and all processes share.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = {1: "step1_sft", 2: "step2_reward", 3: "step3_ppo"}


# -----------------------------------------------------------------------------
# in a process of its own: a stage's start

def resident(entry):
    """MB, from /proc/self/status: VmRSS is what is resident, VmHWM its peak."""
    for line in open("/proc/self/status"):
        if line.startswith(entry):
            return int(line.split()[1]) / 1024


def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def child(number, flags):
    """Reads a stage's data as far as the first batch; the last line is what it cost, as JSON."""
    import importlib

    import torch.distributed as dist

    from data import load_stage_data, load_tokenizer, training_steps
    from support.flags import parse_config
    stage = importlib.import_module(STAGES[number])
    config = parse_config(stage.Config, "", flags)
    dist.init_process_group("gloo")
    tokenizer = load_tokenizer("tiny")

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.time()
    cpu = cpu_seconds()
    before = resident("VmRSS")
    anonymous = resident("RssAnon")
    data = load_stage_data(config, number, tokenizer, dist.get_rank(), dist.get_world_size(),
                           log=lambda line: None)
    next(iter(training_steps(data.train_loader, data.total_steps)))
    print(json.dumps({"cpu": cpu_seconds() - cpu, "clock": time.time() - began,
                      "peak": resident("VmHWM") - before,
                      "kept": resident("RssAnon") - anonymous}))


# -----------------------------------------------------------------------------
# the table

def write_rows(path, count):
    """Pairs in DeepSpeed-Chat's form, in words that the tiny tokenizer knows."""
    draw = random.Random(0)
    words = "what is the opposite of hot red blue two plus a dog says it green seven cold".split()
    with open(path, "w") as file:
        for number in range(count):
            question = " ".join(draw.choices(words, k=8))
            row = {"prompt": f"\n\nHuman: {number} {question}?\n\nAssistant:",
                   "chosen": " " + " ".join(draw.choices(words, k=10)),
                   "rejected": " " + " ".join(draw.choices(words, k=8))}
            file.write(json.dumps(row) + "\n")


def start(tree, number, processes, rows, cache):
    """-> what the start of a stage cost each of so many processes: [dict]."""
    port = str(random.randrange(20_000, 60_000))
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_DATASETS_CACHE": str(cache),
                   "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
                   "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for rank in range(processes):
        running.append(subprocess.Popen(
            [sys.executable, __file__, "--child", str(number), "--data_path", str(rows)],
            cwd=tree, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, outputs):
        if process.returncode:
            sys.exit(f"rows.py: error: a start failed:\n{errors[-2000:]}")
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=[20_000, 100_000, 1_000_000])
    parser.add_argument("--tree", nargs="+", type=Path, default=[], metavar="FOLDER",
                        help="other checkouts, measured beside this one")
    parser.add_argument("--stages", nargs="+", type=int, default=list(STAGES), choices=STAGES)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    import datasets
    import torch
    import transformers
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
          f"{torch.__version__}, transformers {transformers.__version__}, datasets "
          f"{datasets.__version__}\n")
    print("| rows | checkout | stage | processes | start | CPU s | clock s | peak MB | kept MB |\n"
          "|---:|---|---:|---:|---|---|---:|---|---|")
    for count in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder, "rows.jsonl")
            write_rows(rows, count)
            for tree in [ROOT, *options.tree]:
                for number in options.stages:
                    for processes in options.processes:
                        name = str(tree.resolve()).replace("/", "-")
                        cache = Path(folder, f"{name}-{number}-{processes}")
                        for which in ("first", "second"):
                            costs = start(tree.resolve(), number, processes, rows, cache)
                            words = [" and ".join(f"{cost[name]:,.{digits}f}" for cost in costs)
                                     for name, digits in (("cpu", 1), ("peak", 0), ("kept", 0))]
                            clock = max(cost["clock"] for cost in costs)
                            print(f"| {count:,} | {tree.resolve().name} | {number} | {processes} | "
                                  f"{which} | {words[0]} | {clock:.0f} | {words[1]} | {words[2]} |",
                                  flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.path[0] = os.environ["PYTHONPATH"]  # the checkout that is measured
        child(int(sys.argv[2]), sys.argv[3:])
    else:
        main()
