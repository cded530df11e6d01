"""
The table of results that run_all.sh prints at its end, without torch, in a moment:

    python -m support.table output/summary.json 280 170 150 615
"""

import json
import sys
from pathlib import Path

from support.runs import write_json


def table(path, clock):
    """
    Prints the headline numbers of a run, and keeps the seconds by the clock in its summary.

    clock  seconds of each stage, launching and importing with it, and of the whole run
    """
    summary = json.loads(Path(path).read_text())
    summary["clock"] = dict(zip(["step1_sft", "step2_reward", "step3_ppo", "run"], clock))
    write_json(path, summary)
    about = f"{summary['model']} on {summary['hardware']}, seed {summary['seed']}"
    print(f"\n{'stage':<8}{'seconds':>9}   held-out result        ({about})")
    shown = {"sft": ("perplexity", "gold"), "reward": ("accuracy",), "ppo": ("score", "kl", "gold")}
    for section, names in shown.items():
        numbers = summary[section]
        results = [f"{name} {numbers[name]:.3f}" for name in names if name in numbers]
        print(f"{section:<8}{numbers['seconds']:>9.0f}   {'   '.join(results)}")
    print(f"{'all':<8}{clock[-1]:>9.0f}   by the clock, with checks, launching and importing")


if __name__ == "__main__":
    table(sys.argv[1], [int(word) for word in sys.argv[2:]])
