"""
What every recipe of run_all.sh needs, by its own --dry_run, as README's table: the highest peak of
the three stages on a device and on a host, the settings that make it fit, or what would.

    python bench/recipes.py

On cards of 80 GB: 1, 8, and 64 of them on 8 hosts. The plan is arithmetic, so this says nothing
about the machine that it runs on. About 8 minutes for 56 plans, without a network.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("tiny smollm2-135m opt-125m opt-350m opt-1.3b opt-2.7b opt-6.7b opt-13b opt-30b opt-66b "
          "opt-175b llama-2-7b llama-2-13b llama-2-70b").split()
HARDWARE = {"cpu": [], "1gpu": ["--device", "a100-80"], "1node": ["--device", "a100-80"],
            "multinode": ["--device", "a100-80"]}


def plan(model, hardware, folder):
    """-> exit code and output of one --dry_run."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOSTFILE": f"{folder}/none",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "run_all.sh"), model, hardware, "--dry_run", *HARDWARE[hardware]]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode not in (0, 2) or done.stdout.count("verdict") != 3:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}")
    return done.returncode, done.stdout


def cell(code, text):
    """One plan -> a cell of the table."""
    peaks = [float(found) for found in re.findall(r"^verdict +[a-z ]+: ([\d.]+) GB at", text, re.M)]
    hosts = [float(found) for found in re.findall(r"^host +([\d.]+) GB", text, re.M)]
    settings = []
    for name in ("ZeRO [1-3]", "LoRA", r"\d+ share a decoder"):
        found = re.search(name, text.split("=== step3_ppo")[1])
        settings += [found[0].replace(" share a decoder", " ranks a decoder")] if found else []
    words = f"{max(peaks):.0f}"
    if hosts:
        words += f" / {max(hosts):.0f}"
    if code:
        return f"refused: {words}"
    return ", ".join([words, *settings])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print("| GB on a device / on its host | " + " | ".join(HARDWARE) + " |")
    print("|---|" + "---:|" * len(HARDWARE))
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            cells = [cell(*plan(model, hardware, folder)) for hardware in HARDWARE]
            print(f"| `{model}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
