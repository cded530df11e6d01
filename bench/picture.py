"""
The picture that opens the README: what RLHF buys, and how it goes wrong. On the left the learned score and gold, the
exact mark, over the PPO steps of several seeds; on the right a run whose score rises while its gold falls.

    for s in 1 2 1234; do STEP3_ARGS="--eval_steps 10" bash run_all.sh tiny cpu --seed $s --output_dir seeds/$s; done
    STEP2_ARGS="--max_steps 150" STEP3_ARGS="--kl_coef 0 --actor_learning_rate 1e-3 --max_steps 50 --eval_steps 5" \\
        bash run_all.sh tiny cpu --output_dir hacked
    python bench/picture.py seeds/* --hacked hacked --output bench/results/gold.png      # or .svg; needs matplotlib

Held-out answers where a run has four evaluations or more (--eval_steps), else the training answers' running mean.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not bench/: its kernels.py would stand before kernels/

from support.plots import running_mean, window_of
from support.runs import RunError, column, read_run

SCORE, GOLD = "#2f6fd0", "#d9731a"


def series(folder):
    """A run's folder -> [(steps, scores), (steps, gold)], and whether they are of held-out answers."""
    stage = read_run(folder).stages.get("ppo")
    if stage is None:
        raise RunError(f"{folder}: there is no PPO in this run; name the --output_dir of one that has had its step 3.")
    held = [column(stage.evaluations, name) for name in ("eval/score", "eval/gold")]
    if all(len(steps) >= 4 for steps, _ in held):
        return held, True
    trained = [column(stage.rows, name) for name in ("objective/scores", "objective/gold")]
    if not all(len(steps) for steps, _ in trained):
        raise RunError(f"{folder}: it has no gold, which only the built-in task marks; name a run of --data_path toy.")
    return [(steps, running_mean(values, window_of(len(values)))) for steps, values in trained], False


def draw(axes, title, runs):
    """The curves of runs in one panel."""
    for number, lines in enumerate(runs):
        for (steps, values), label, colour in zip(lines, ("learned score", "gold"), (SCORE, GOLD)):
            axes.plot(steps, values, color=colour, linewidth=1.8, alpha=0.8, label=None if number else label)
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_xlabel("PPO step")
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c9ced4")
    axes.tick_params(length=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="--output_dir of runs with PPO done")
    parser.add_argument("--hacked", required=True, metavar="FOLDER", help="the run of the right panel")
    parser.add_argument("--output", required=True, metavar="FILE", help=".png or .svg")
    options = parser.parse_args()
    try:
        healthy = [series(folder) for folder in options.runs]
        hacked = series(options.hacked)
    except RunError as error:
        sys.exit(f"picture.py: error: {error}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("picture.py: error: matplotlib is needed; pip install matplotlib")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    seeds = f"{len(healthy)} seeds" if len(healthy) > 1 else "one seed"
    draw(left, f"The defaults, {seeds}", [lines for lines, _ in healthy])
    draw(right, "A reward model trained too little, and no KL penalty", [hacked[0]])
    held = {is_held for _, is_held in [*healthy, hacked]}
    of = {(True,): "held-out answers", (False,): "training answers"}.get(tuple(held), "answers")
    left.set_ylabel(f"mean over {of}")
    left.legend(frameon=False, loc="lower right")
    figure.savefig(options.output, dpi=150, metadata={"Date": None} if options.output.endswith(".svg") else None)
    print(f"{options.output}: {Path(options.output).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
