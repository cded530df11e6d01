"""
What a nat of KL bought: reward and gold score of the held-out answers against their distance from the SFT model, as in
Gao et al. 2023, "Scaling laws for reward model overoptimization" (arXiv 2210.10760, figure 1). Where the score still
rises and gold falls, the policy exploits the reward model.

    python step3_ppo.py ... --eval_steps 10
    python bench/frontier.py output/actor/evaluations.jsonl                   # a table; several runs one after another
    python bench/frontier.py kl0/actor/evaluations.jsonl kl5/actor/evaluations.jsonl --plot kl.png   # needs matplotlib

The metrics.jsonl of a run that wrote no evaluations.jsonl does as well.
"""

import argparse
import json
import math
import sys
from pathlib import Path

COLUMNS = ("eval/kl", "eval/score", "eval/gold", "eval/win_rate")


def evaluations(path):
    """The lines of a file that hold an evaluation, as dicts; kl in nats a response."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"frontier.py: error: {path} cannot be read as evaluations.jsonl or metrics.jsonl ({error}).")
    found = [line for line in lines if "eval/kl" in line]
    if not found:
        sys.exit(f"frontier.py: error: {path} holds no evaluation; train with --eval_steps 10, say.")
    return found


def plot(runs, file):
    try:
        import matplotlib
    except ImportError:
        sys.exit("frontier.py: error: --plot needs matplotlib; pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots()
    for name, lines in runs.items():
        distance = [math.sqrt(max(line["eval/kl"], 0)) for line in lines]
        for column, style in (("eval/score", "--"), ("eval/gold", "-")):
            if column in lines[0]:
                axes.plot(distance, [line[column] for line in lines], style, marker=".", label=f"{name} {column}")
    axes.set_xlabel("square root of the KL to the SFT model (nats a response)")
    axes.legend()
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="+", help="evaluations.jsonl or metrics.jsonl of runs with --eval_steps")
    parser.add_argument("--plot", metavar="FILE", help="also draw them")
    options = parser.parse_args()
    runs = {path: evaluations(path) for path in options.metrics}
    for path, lines in runs.items():
        print(f"\n{path}\n{'step':>6}" + "".join(f"{name.removeprefix('eval/'):>10}" for name in COLUMNS))
        for line in lines:
            print(f"{line['step']:>6}" + "".join(f"{line[name]:>10.3f}" if name in line else f"{'-':>10}"
                                                 for name in COLUMNS))
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
