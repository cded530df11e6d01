"""
Plots: the curves of a run's stages, each with a sentence on what a healthy one looks like, drawn by
matplotlib as SVG that takes its colours from the page around it. support/report.py shows them.
"""

import html
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from support.runs import column

POINTS = 300  # of a curve; more are thinned


# -----------------------------------------------------------------------------
# what is drawn

@dataclass
class Panel:
    """One plot of a stage: a metric of each step, and the same of held-out rows."""
    key: str       # in metrics.jsonl; "" where the plot is of held-out rows alone
    title: str
    unit: str
    healthy: str   # one sentence or two: what a healthy run looks like
    held: str = ""               # in evaluations.jsonl
    of_held: Callable = np.array  # held-out values -> values in this plot's unit
    smooth: bool = True          # a running mean over the steps
    log: bool = False            # logarithmic
    guide: float | None = None   # a dashed line
    limits: tuple | None = None  # of the vertical axis


PAIRS = [
    Panel("loss", "Loss", "nats a pair", held="eval/loss", guide=math.log(2), healthy=(
        "Falls from about ln 2 = 0.69, what a coin's guess costs (dashed). Where it falls on while "
        "the held-out loss rises, the model memorises the pairs.")),
    Panel("rewards/accuracies", "Accuracy", "share of pairs", held="eval/accuracy", guide=0.5,
          healthy=("Rises from 0.5, a coin's guess (dashed), and levels off below 1, because some "
                   "labels are wrong. The held-out accuracy stays close.")),
    Panel("rewards/margins", "Margin", "score, chosen less rejected", guide=0, healthy=(
        "Rises from 0 and levels off. One that grows while the held-out accuracy stands still is "
        "certainty without knowledge."))]
PANELS = {
    "sft": [
        Panel("loss", "Loss", "nats a trained token", held="eval/perplexity", of_held=np.log,
              log=True, healthy=(
            "Falls fast, then slowly, and levels off. The held-out loss (the logarithm of the "
            "perplexity) stays close; a gap that widens means that the model memorises rows.")),
        Panel("", "Held-out perplexity", "a trained token", held="eval/perplexity", healthy=(
            "Falls from one evaluation to the next and levels off. Where it turns upwards, "
            "training should have stopped.")),
        Panel("lr", "Learning rate", "of AdamW", smooth=False, healthy=(
            "Rises over --num_warmup_steps, then follows --lr_scheduler_type to its end."))],
    "reward": PAIRS,
    "dpo": PAIRS + [
        Panel("", "Gold", "mean exact mark", held="eval/gold", healthy=(
            "Rises: the answers become better, and not only likelier than the rejected ones."))],
    "ppo": [
        Panel("objective/scores", "Score", "reward, an answer", held="eval/score", healthy=(
            "Rises, fast at first, and levels off. It is the reward model's opinion and does not "
            "say whether answers are right: see gold, or read them.")),
        Panel("objective/gold", "Gold", "mean exact mark", held="eval/gold", healthy=(
            "Rises with the score. Where it falls while the score rises, the actor exploits the "
            "reward model.")),
        Panel("objective/kl", "KL to the SFT model", "nats a response", held="eval/kl", guide=0,
              healthy=("Starts at 0, rises and settles at a few nats. It is an estimate: "
                       "one step may lie below 0, the mean of many may not.")),
        Panel("objective/entropy", "Entropy", "nats a token", healthy=(
            "Falls as the actor becomes surer, and stays over 0. A plunge to nearly nothing means "
            "that all answers become one.")),
        Panel("response/length", "Length", "tokens a response", healthy=(
            "Changes a little and settles. Length that grows along with the score may be what the "
            "reward pays for.")),
        Panel("response/ended", "Answers that end", "share with EOS", limits=(0, 1.05), healthy=(
            "Stays near 1, or where the SFT model began. A fall means that answers are cut at "
            "--max_answer_seq_len.")),
        Panel("ppo/policy/ratio", "Ratio to the old policy", "mean over tokens", guide=1, healthy=(
            "Stays within some hundredths of 1 (dashed): the actor is still close to the policy "
            "that sampled the answers.")),
        Panel("ppo/policy/clipfrac", "Clip fraction", "share of tokens", healthy=(
            "Small: up to a tenth of the tokens. More means that the actor moves too far within "
            "one rollout; lower --actor_learning_rate or --ppo_epochs.")),
        Panel("ppo/val/var_explained", "Explained variance of the critic", "share", guide=0,
              limits=(-1, 1.05), healthy=(
            "May begin below 0 (cut off at -1), then stays well above it: 1 is a perfect critic, 0 "
            "(dashed) one that always says the mean.")),
        Panel("ppo/policy/grad_norm", "Gradient of the actor", "norm before clipping", log=True,
              healthy=("Stays within one range. Growth to many times its start often comes before "
                       "a KL that runs away.")),
        Panel("ppo/val/grad_norm", "Gradient of the critic", "norm before clipping", log=True,
              healthy=("High while the critic learns what answers earn, then lower and within one "
                       "range.")),
        Panel("lr", "Learning rate", "of the actor's AdamW", smooth=False, healthy=(
            "Rises over --num_warmup_steps, then follows --lr_scheduler_type to its end."))]}


def has_data(panel, stages):
    """Whether any of the Stages has it. One held-out number alone stands in the head already."""
    for stage in filter(None, stages):
        if panel.key and len(column(stage.rows, panel.key)[0]):
            return True
        if not panel.key and len(column(stage.evaluations, panel.held)[0]) > 1:
            return True
    return False


# -----------------------------------------------------------------------------
# how it is drawn

# Matplotlib gets a colour for each role, and the page's own colours take their places in the SVG,
# so that a plot follows the reader's light or dark.
INK = "#fe0000"
FAINT = "#fe0009"
COLOURS = [f"#fe000{i}" for i in range(1, 9)]
IN_THE_PAGE = {INK: "currentColor", FAINT: "var(--line)",
               **{colour: f"var(--c{i})" for i, colour in enumerate(COLOURS, 1)}}
LOOK = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK,
    "grid.color": FAINT, "grid.linewidth": 0.8, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.formatter.useoffset": False,
    "lines.linewidth": 1.7, "lines.solid_joinstyle": "round", "legend.frameon": False}


def plot(title, draw, size=(4.5, 2.7)):
    """
    draw(axes), a matplotlib plot of that size in inches -> HTML, an <svg>; a sentence where
    matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return "<p class='soft'>No plot, because matplotlib is missing: pip install matplotlib</p>"
    with matplotlib.rc_context({**LOOK, "svg.hashsalt": title}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    # Names that are the same in every plot, and digits that nobody sees, are left out.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for colour, name in IN_THE_PAGE.items():
        svg = svg.replace(colour, name)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def window_of(count):
    """Steps of the running mean: an odd number, about a 24th of the curve."""
    return count // 24 | 1


def running_mean(values, window):
    """The mean of the window around each value; at the ends, of the part of it that is there."""
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    begin = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, len(values))
    return (total[end] - total[begin]) / (end - begin)


def extremes(values):
    """Which values a thinned curve keeps: the smallest and the largest of each stretch."""
    if len(values) <= POINTS:
        return np.arange(len(values))
    kept = set()
    for stretch in np.array_split(np.arange(len(values)), POINTS // 2):
        kept |= {stretch[values[stretch].argmin()], stretch[values[stretch].argmax()]}
    return np.array(sorted(kept))


def draw_panel(axes, panel, stages):
    """A Panel of the Stages of one run or several, None where a run has none."""
    alone = len(stages) == 1
    for i, stage in enumerate(stages):
        if stage is None:
            continue
        colour = COLOURS[i % 8]
        steps, values = column(stage.rows, panel.key)
        if len(values):
            mean = values
            if panel.smooth:
                mean = running_mean(values, window_of(len(stage.rows)))
            if alone and panel.smooth:
                kept = extremes(values)
                axes.plot(steps[kept], values[kept], color=colour, alpha=0.3, linewidth=0.9)
            kept = np.unique(np.linspace(0, len(values) - 1, POINTS).astype(int))
            axes.plot(steps[kept], mean[kept], "-" if i < 8 else "--", color=colour,
                      marker="." if len(values) == 1 else None)
        if panel.held:
            steps, values = column(stage.evaluations, panel.held)
            axes.plot(steps, panel.of_held(values), "o-", markersize=4, linewidth=0.7,
                      color=COLOURS[1] if alone else colour)
    if panel.guide is not None:
        axes.axhline(panel.guide, color=INK, linewidth=0.9, linestyle=(0, (4, 4)), alpha=0.6)
    if panel.log:
        from matplotlib.ticker import LogLocator, NullLocator
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    if panel.limits:
        axes.set_ylim(*panel.limits)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)


def draw_frontier(axes, evaluations):
    """Score and gold against the KL. evaluations: of one run or several, lists of objects."""
    for i, rows in enumerate(evaluations):
        for name, label, style in (("eval/score", "score", "--"), ("eval/gold", "gold", "-")):
            both = [row for row in rows if name in row and "eval/kl" in row]
            kl = column(both, "eval/kl")[1]
            values = column(both, name)[1]
            if not len(values):
                continue
            colour = COLOURS[i % 8]
            if len(evaluations) == 1 and name == "eval/gold":
                colour = COLOURS[1]
            # An estimate of a KL near 0 may be negative.
            axes.plot(np.sqrt(kl.clip(min=0)), values, style, marker="o", markersize=4,
                      color=colour, label=None if i else label)
    axes.set_xlabel("square root of the KL to the SFT model (nats a response)")
    axes.set_ylabel("score (reward), gold (exact mark)")
    axes.legend()


def draw_bars(axes, names, parts):
    """names: of the bars, from the top; parts: {label: seconds of each bar}, one after another."""
    place = range(len(names), 0, -1)
    begin = np.zeros(len(names))
    for colour, (label, seconds) in zip([*COLOURS[:3], COLOURS[7]], parts.items()):
        if any(seconds):
            axes.barh(place, seconds, left=begin, height=0.55, label=label, color=colour)
        begin += seconds
    axes.set_yticks(place, names)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, handlelength=1)
