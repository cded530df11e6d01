"""
The headline numbers of several runs side by side, as a Markdown table with mean and spread.

    for s in 1 2 3 4 1234; do bash run_all.sh tiny cpu --seed $s --output_dir runs/$s; done
    python bench/seeds.py runs/*
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

COLUMNS = [("SFT perplexity", "sft", "perplexity"), ("SFT gold", "sft", "gold"),
           ("reward accuracy", "reward", "accuracy"), ("PPO gold", "ppo", "gold"), ("win rate", "ppo", "win_rate"),
           ("KL, nats", "ppo", "kl")]


def main(folders):
    summaries, rows = [], []
    for folder in folders:
        try:
            summaries.append(json.loads((Path(folder) / "summary.json").read_text()))
            rows.append([summaries[-1][stage].get(name) for _, stage, name in COLUMNS])
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"seeds.py: error: {folder} is no --output_dir of a run with all three stages done "
                     f"({type(error).__name__}: {error}).")
    known = [i for i in range(len(COLUMNS)) if all(row[i] is not None for row in rows)]  # only the toy has a gold score
    rows = [[row[i] for i in known] for row in rows]
    print("| seed |" + "".join(f" {COLUMNS[i][0]} |" for i in known) + " doctor |")
    print("|---|" + "---:|" * len(known) + "---|")
    for summary, row in zip(summaries, rows):
        said = len(summary["doctor"])
        print(f"| {summary['seed']} |" + "".join(f" {value:.3f} |" for value in row) + f" {said or 'nothing'} |")
    if len(rows) > 1:
        spread = [f" {statistics.mean(column):.3f} ± {statistics.stdev(column):.3f} |" for column in zip(*rows)]
        print("| mean ± sd |" + "".join(spread) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="--output_dir of a run with all three stages done")
    main(parser.parse_args().folders)
