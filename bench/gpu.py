"""
All that only a GPU can show, one part after the other, into OUT/results.json while they run and
OUT/table.md after each. bench/gpu.sh starts it; both run on a CPU too, at toy sizes.

    python bench/gpu.py OUT                        # all parts, 515 s at most
    python bench/gpu.py OUT --parts decode tiny    # some; rows of the others stay in OUT
    python bench/gpu.py OUT --seconds 900

machine   what this is, and its limits: bytes/s of a large copy, FLOP/s of a large matmul
tests     the tests marked `gpu`: kernels compiled, decoder equal to Hugging Face, a PPO update
          equal to the CPU's in float32
decode    a decode step of two 1B shapes beside Hugging Face's and as a CUDA graph (bench/decode.py)
step 3    pairs/s and seconds of a PPO step, OPT-1.3B with a 350M critic, 256 + 256 tokens, and the
          memory of each moment beside the plan (bench/step3.py)
kernels   each kernel beside its definition (bench/kernels.py)
memory    the plan beside peaks in three more cases: LoRA, ZeRO 2 with a moving average, ZeRO 3
tiny      `bash run_all.sh tiny 1gpu`: seconds, perplexity, accuracy, gold

A part is a process of its own with a time limit. One that fails or runs out of time ends no other:
its rows so far stay, the last lines of its error stand in results.json and in the table, and the
exit code is 1. A limit is less than its number where the 515 s are nearly over.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/
from support.runs import write_json

NO_GPU = "no GPU: toy sizes on the CPU, no number here is a GPU's"
GB = 2**30


def has_gpu():
    import torch
    return torch.cuda.is_available()


# -----------------------------------------------------------------------------
# what is kept

class Results:
    """
    OUT/results.json: {"parts": {name: {"status", "seconds", "rows", "error"}}}. The file is whole
    after every change, so that a run that is cut off loses nothing.
    """

    def __init__(self, folder):
        self.path = Path(folder) / "results.json"
        if not self.path.exists():
            write_json(self.path, {"parts": {}})

    def read(self):
        return json.loads(self.path.read_text())

    def part(self, name, **changes):
        results = self.read()
        results["parts"].setdefault(name, {}).update(changes)
        write_json(self.path, results)

    def note(self, part, what, value, unit="", beside=None, of="", share=None, **more):
        """
        A row of a part.

        beside  a number of the same unit that `value` is held against, and `of` whose that is
        share   of the card's limit
        more    goes to results.json alone
        """
        results = self.read()
        results["parts"][part]["rows"].append(
            dict(what=what, value=value, unit=unit, beside=beside, of=of, share=share, **more))
        write_json(self.path, results)


def number(x):
    if not isinstance(x, (int, float)):
        return str(x)
    if abs(x) >= 100:
        return f"{x:,.0f}"
    return f"{x:.3g}"


def table(results):
    """The Markdown table of all parts."""
    lines = ["| part | what | measured | beside it | ratio | share of limit |",
             "|---|---|---:|---:|---:|---:|"]
    for name, part in results["parts"].items():
        for row in part["rows"]:
            beside = ratio = share = ""
            if row["beside"] is not None:
                beside = f"{number(row['beside'])} {row['of']}"
                if row["value"]:
                    ratio = f"{row['beside'] / row['value']:.2f}"
            if row["share"] is not None:
                share = f"{row['share']:.2f}"
            lines.append(f"| {name} | {row['what']} | {number(row['value'])} {row['unit']} | "
                         f"{beside} | {ratio} | {share} |")
        ended = f"**{part['status']}** in {part['seconds']:.0f} s"
        if part.get("error"):
            last = part["error"].strip().splitlines()[-1:] or [""]
            ended += ": " + last[0].replace("|", "\\|")[:200]
        lines.append(f"| {name} | {ended} | | | | |")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# the parts, each in a process of its own; note(...) is Results.note

def machine(note, work):
    import deepspeed
    import torch
    import transformers

    from bench import kernels
    about = kernels.machine()
    about.update(transformers=transformers.__version__, deepspeed=deepspeed.__version__)
    if has_gpu():
        memory = torch.cuda.get_device_properties(0).total_memory
        note("memory", memory / GB, "GB")
    note(", ".join(f"{name} {value}" for name, value in about.items()), "", about=about)
    copy, matmul = kernels.limits()
    note("copy, read + written", copy / 1e9, "GB/s")
    note(f"matmul, {about['dtype'].removeprefix('torch.')}", matmul / 1e12, "TFLOP/s")


def tests(note, work):
    """Without a GPU two of the kernels' files in Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=3"]
    environment = dict(os.environ)
    folder = ROOT / "tests"
    if has_gpu():
        if importlib.util.find_spec("xdist"):
            command += ["-n", "8"]  # most of the time is Triton's, which compiles on the CPU
        files = [*sorted(folder.glob("test_kernel_*.py")), folder / "test_decoder_kernels.py",
                 folder / "test_gpu.py"]
        command += ["-m", "gpu", *map(str, files)]
    else:
        environment["TRITON_INTERPRET"] = "1"
        command += [str(folder / "test_kernel_norm.py"), str(folder / "test_gpu.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    print(done.stdout)
    for count, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout):
        note(outcome, int(count), "tests")
    for failed in re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE):
        note(failed, "failed")
    if done.returncode:
        sys.exit(f"pytest ended with code {done.returncode}")


def decode(note, work):
    from bench import decode
    graph = "as a CUDA graph" if has_gpu() else "the loop that a GPU captures"
    unequal = []
    for row in decode.measure():
        name = f"{row['shape']}, batch {row['batch']}"
        floor = row["bytes"] / row["bandwidth"]
        note(f"{name}: a step", row["engine"] * 1e3, "ms", row["hugging_face"] * 1e3,
             "ms, Hugging Face", floor / row["engine"], **row)
        note(f"{name}: {graph}", row["graph"] * 1e3, "ms", row["engine"] * 1e3,
             "ms, as launched", floor / row["graph"])
        if row["equal"] < 1:
            note(f"{name}: the graph's tokens that are the engine's", row["equal"])
            unequal.append(name)
    if unequal:
        sys.exit(f"the graph gave other tokens than the engine: {'; '.join(unequal)}")


def ppo(note, work, case):
    from bench import step3
    found = step3.measure(case, work)
    case = case if has_gpu() else f"toy for {case}"
    note(f"{case}: pairs a second", found["pairs_per_second"], "pairs/s", **found)
    for phase, seconds in found["seconds"].items():
        note(f"{case}: {phase}", seconds, "s")
    for moment, planned in found["planned"].items():
        if moment in found["measured"]:  # no model is saved here, for one
            note(f"{case}: peak of '{moment}'", found["measured"][moment] / GB, "GB",
                 planned / GB, "GB, planned")
    if has_gpu():
        note(f"{case}: taken of the card", found["card"] / GB, "GB", found["card_planned"] / GB,
             "GB, planned")


def kernels(note, work):
    from bench import kernels
    ops = kernels.OPS
    budget = 1.0
    if not has_gpu():
        ops = ("norm", "rotary")
        budget = 0.2
    for row in kernels.measure(ops, *kernels.limits(), budget):
        note(f"{row['op'].strip()}: {row['rate']}", row["us"], "us", row["definition_us"],
             "us, PyTorch", row["of_limit"])


def tiny(note, work):
    """A stage's numbers are noted when it has written its section of summary.json."""
    command = ["bash", str(ROOT / "run_all.sh"), "tiny", "1gpu", "--output_dir", f"{work}/tiny"]
    if not has_gpu():
        command[3] = "cpu"
        command += ["--max_steps", "3", "--max_eval_samples", "8", "--max_answer_seq_len", "8"]
    began = time.time()
    summary = Path(work) / "tiny" / "summary.json"
    noted = set()

    def note_new_sections():
        if not summary.exists():
            return
        sections = json.loads(summary.read_text())
        for name in ("sft", "reward", "ppo"):
            if name in sections and name not in noted:
                noted.add(name)
                for key, value in sections[name].items():
                    if isinstance(value, (int, float)):
                        note(f"{name}: {key}", value, "s" if key == "seconds" else "")

    running = subprocess.Popen(command, cwd=work)
    while running.poll() is None:
        time.sleep(0.5)
        note_new_sections()
    note_new_sections()
    if running.returncode:
        sys.exit(f"run_all.sh ended with code {running.returncode}")
    note("all, by the clock", time.time() - began, "s")


@dataclass
class Part:
    run: object       # run(note, work, *arguments)
    seconds: int      # its limit
    arguments: tuple = ()


PARTS = {
    "machine": Part(machine, 60),
    "tests": Part(tests, 150),
    "decode": Part(decode, 140),
    "step 3": Part(ppo, 90, ("1.3b 350m",)),
    "kernels": Part(kernels, 90),
    "tiny": Part(tiny, 220),
    "memory, ZeRO 3": Part(ppo, 60, ("350m, ZeRO 3",)),
    "memory, LoRA": Part(ppo, 60, ("1.3b 350m, LoRA",)),
    "memory, ZeRO 2": Part(ppo, 60, ("350m, ZeRO 2, EMA",)),
}


# -----------------------------------------------------------------------------
# one after the other

def run_part(name, limit, out, work, results):
    """Runs a part in a process of its own -> whether it passed. Its output goes to OUT/log.txt."""
    log = out / "log.txt"
    results.part(name, status="running", seconds=0, rows=[], error="")
    began = time.time()
    with log.open("a") as file:
        file.write(f"\n=== {name}\n")
        file.flush()
        first = file.tell()
        # In a session of its own, so that its children end with it.
        running = subprocess.Popen(
            [sys.executable, __file__, str(out), "--part", name, "--work", str(work)],
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = running.wait(limit)
            status = "failed" if code else "passed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            try:
                os.killpg(running.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # all of them have ended
            running.wait()
    error = ""
    if status != "passed":
        with log.open("rb") as file:
            file.seek(first)
            error = "\n".join(file.read().decode(errors="replace").strip().splitlines()[-15:])
    results.part(name, status=status, seconds=time.time() - began, error=error)
    print(f"{name}: {status} in {time.time() - began:.0f} s", flush=True)
    if error:
        print(error, flush=True)
    return status == "passed"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help="; ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=515,
                        help="of all parts together; without a GPU four times that")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # a part's own process
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out)
    if args.part:
        part = PARTS[args.part]
        part.run(lambda *row, **more: results.note(args.part, *row, **more), args.work,
                 *part.arguments)
        return 0

    gpu = has_gpu()
    slower = 1 if gpu else 4  # a busy CPU takes longer even for toys
    end = time.time() + slower * args.seconds
    sentence = "" if gpu else NO_GPU
    if sentence:
        print(sentence, flush=True)
    # A SIGTERM ends the part that is running too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    passed = True
    text = ""
    with tempfile.TemporaryDirectory() as work:
        for name in args.parts:
            limit = min(slower * PARTS[name].seconds, end - time.time())
            if limit < 5:
                results.part(name, status="not begun", seconds=0, rows=[],
                             error="no time was left")
                passed = False
            else:
                passed &= run_part(name, limit, args.out, work, results)
            text = f"{sentence}\n\n{table(results.read())}\n".lstrip()
            (args.out / "table.md").write_text(text)
    print("\n" + text, flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
