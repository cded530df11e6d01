"""
The report: a run, or several beside each other, as one HTML page that needs nothing else.

    python support/report.py output                     # writes output/report.html
    python support/report.py runs/1 runs/2 runs/3       # writes runs/1/comparison.html
    python support/report.py runs/1 runs/2 --output page.html

It reads what the stages write: output/summary.json, and metrics.jsonl, evaluations.jsonl and
samples.jsonl in output/sft, output/reward and output/actor. Any of them may be missing, as in a run
that was stopped. run_all.sh calls it at the end. Exit code 2 where there is no such run.

Texts of models and data may hold anything, so all that gets into the page goes through `text`,
which escapes it; what is HTML already is of the class `Html`.
"""

import argparse
import ast
import html
import json
import os
import re
import shlex
import statistics
import string
import sys
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.doctor import RunDoctor
from support.plots import (PANELS, POINTS, draw_bars, draw_frontier, draw_panel, has_data, plot,
                           window_of)
from support.runs import NAMES, SCRIPTS, RunError, Stage, column, number_of, read_run

SAMPLES = 10       # held-out prompts shown
LONGEST = 600      # characters of a text shown
GOLD_FALL = 0.02   # about the standard error of the mean of 512 marks
HEADLINES = [      # name, section of summary.json, number there
    ("SFT perplexity", "sft", "perplexity"), ("SFT gold", "sft", "gold"),
    ("reward accuracy", "reward", "accuracy"), ("DPO accuracy", "dpo", "accuracy"),
    ("DPO gold", "dpo", "gold"), ("PPO score", "ppo", "score"), ("PPO gold", "ppo", "gold"),
    ("win rate", "ppo", "win_rate"), ("KL, nats", "ppo", "kl")]


# -----------------------------------------------------------------------------
# pieces of HTML

class Html(str):
    """Text that is HTML already; what is added to it is escaped."""

    def __add__(self, other):
        return Html(str(self) + text(other))


def text(value, longest=None):
    """Anything -> Html, escaped; over `longest` characters it is cut, and says so."""
    if isinstance(value, Html):
        return value
    value = str(value)
    note = ""
    if longest and len(value) > longest:
        note = f' <span class="soft">[… cut: {len(value):,} characters in all]</span>'
        value = value[:longest]
    # Half of a surrogate pair cannot be written, and browsers drop or change control characters.
    value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    value = re.sub(r"[\0-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), value)
    return Html(html.escape(value) + note)


def tag(name, content, **attributes):
    """class_="soft" is written class="soft", data_name="step" data-name="step"."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
                      for key, value in attributes.items())
    return Html(f"<{name}{written}>{text(content)}</{name}>")


def join(parts, between="\n"):
    return Html(between.join(text(part) for part in parts))


def note(content):
    return tag("p", content, class_="soft")


def with_flags(sentence):
    """A sentence whose --flags are not broken at the end of a line."""
    return Html(re.sub(r"--\w+", r'<span class="flag">\g<0></span>', text(sentence)))


def folded(title, content, is_open=False):
    return Html(f"<details{' open' * is_open}><summary>{text(title)}</summary>{content}</details>")


def table(head, rows, numbers=(), mean=None):
    """
    head     names of the columns
    rows     lists of cells
    numbers  which columns hold numbers
    mean     one more row, set off
    """
    def line(cells, kind, **of_row):
        written = []
        for i, (name, cell) in enumerate(zip(head, cells)):
            options = {"class_": "number"} if i in numbers else {}
            if kind == "td":
                cell = tag("div", cell) if text(cell) else ""
                options["data_name"] = name
            written.append(tag(kind, cell, **options))
        return tag("tr", join(written, ""), **of_row)

    lines = [line(row, "td") for row in rows]
    if mean:
        lines.append(line(mean, "td", class_="mean"))
    return tag("table", tag("thead", line(head, "th")) + tag("tbody", join(lines)))


def without_empty_columns(head, rows):
    used = [i for i in range(len(head)) if any(text(row[i]) for row in rows)]
    return [head[i] for i in used], [[row[i] for i in used] for row in rows]


def shown(value, form=".3f"):
    """A number as it stands in tables; nothing where there is none."""
    return "" if value is None else f"{value:{form}}"


def legend(names):
    """The runs' names beside their colours."""
    items = []
    for i, name in enumerate(names):
        style = f"color: var(--c{i % 8 + 1}); border-top-style: {'solid' if i < 8 else 'dashed'}"
        items.append(tag("span", tag("i", "", style=style) + text(name)))
    return tag("div", join(items), class_="legend")


# -----------------------------------------------------------------------------
# 1. head

def seed_of(run):
    seeds = [stage.config["seed"] for stage in run.stages.values() if "seed" in stage.config]
    return run.summary.get("seed", seeds[0] if seeds else "")


def place_of(run):
    """Model and hardware, as far as they are known."""
    model = str(run.summary.get("model", ""))
    hardware = run.summary.get("hardware")
    return f"{model} on {hardware}" if hardware else model


def progress(stage):
    if stage.finished:
        return tag("span", "finished", class_="good")
    of = f" of {stage.total_steps}" if stage.total_steps else ""
    return tag("span", f"stopped at step {stage.last_step}{of}", class_="bad")


def state(run):
    """What of the run is done, and what is not."""
    expected = ["sft", "dpo"] if "dpo" in run.stages else ["sft", "reward", "ppo"]
    parts = [join([NAMES[section], progress(stage)], " ")
             for section, stage in run.stages.items() if not stage.finished]
    missing = [NAMES[section] for section in expected if section not in run.stages]
    if missing:
        parts.append(f"not there: {', '.join(missing)}")
    return join(parts, "; ") if parts else tag("span", "finished", class_="good")


def clock_of(run, section):
    """Seconds of a stage by run_all.sh's clock, or None."""
    return number_of(run.summary.get("clock", {}), SCRIPTS[section])


def head_of_one(run):
    rows = []
    for section, stage in run.stages.items():
        headline = [name for _, of, name in HEADLINES if of == section]
        results = []
        for name in sorted(stage.results, key=lambda name: name not in headline):
            value = number_of(stage.results, name)
            if value is not None and name != "seconds":
                words = f"{name.replace('_', ' ')} {value:.3f}"
                results.append(tag("span", words, class_="result" if name in headline else
                                   "result soft"))
        rows.append([NAMES[section], progress(stage), stage.last_step or "",
                     shown(number_of(stage.results, "seconds"), ",.0f"),
                     shown(clock_of(run, section), ",.0f"), join(results)])
    head, rows = without_empty_columns(
        ["stage", "state", "steps", "seconds", "by the clock", "held-out results"], rows)
    title = place_of(run) or Path(run.name).resolve().name
    seed = seed_of(run)
    numbers = [i for i, name in enumerate(head) if name in ("steps", "seconds", "by the clock")]
    seconds = number_of(run.summary, "seconds")
    all_finished = all(stage.finished for stage in run.stages.values())
    took = f"; {seconds:,.0f} seconds in the stages" if seconds and all_finished else ""
    return join([tag("h1", f"{title}, seed {seed}" if seed != "" else title),
                 tag("p", Html("State: ") + state(run) + took), table(head, rows, numbers)])


def head_of_many(runs):
    known = [(name, section, key) for name, section, key in HEADLINES
             if any(section in run.stages and key in run.stages[section].results for run in runs)]
    rows, numbers = [], []
    for run in runs:
        of_run = [number_of(run.stages.get(section, Stage()).results, key)
                  for _, section, key in known]
        numbers.append(of_run)
        about = f"{place_of(run)}, seed {seed_of(run)}".removesuffix(", seed ")
        rows.append([text(run.name) + tag("div", about, class_="soft"), state(run),
                     *map(shown, of_run)])
    mean = None
    why = "The runs differ by more than their seeds, so no mean is taken; see what differs, below."
    if only_seeds_differ(runs):
        mean = ["mean ± sd", "", *map(mean_and_spread, zip(*numbers))]
        why = "The runs differ by their seeds alone; sd is the sample standard deviation."
    head = ["run", "state", *(name for name, _, _ in known)]
    return join([tag("h1", f"{len(runs)} runs compared"),
                 table(head, rows, range(2, len(head)), mean), note(why)])


def mean_and_spread(values):
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


# -----------------------------------------------------------------------------
# 2. the doctor

def doctor_of(run):
    """What the doctor said of PPO, or says now, a list of sentences."""
    stage = run.stages["ppo"]
    said = run.summary.get("doctor")
    if stage.finished and isinstance(said, list):
        return said
    doctor = RunDoctor(clip=1.0)  # as in all of configs/
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of means over metrics that a file lacks
        for row in stage.rows:
            numbers = {name: number_of(row, name) for name in row}
            numbers = {name: value for name, value in numbers.items() if value is not None}
            if "objective/kl" in numbers and "objective/scores" in numbers:
                doctor({**numbers, "step": row["step"]})
    return doctor.sentences


def doctor(runs):
    parts = [tag("h2", "What the doctor says")]
    for run in runs:
        of_run = f"{run.name}: " if len(runs) > 1 else ""
        if "ppo" not in run.stages:
            parts.append(tag("p", of_run + "the doctor reads PPO's metrics, and there are none."))
            continue
        said = doctor_of(run)
        found = "this" if said else "nothing"
        steps = run.stages["ppo"].last_step or "the"
        parts.append(tag("p", f"{of_run}it read {steps} steps of PPO and found {found}."))
        if said:
            parts.append(tag("ul", join(tag("li", with_flags(sentence)) for sentence in said)))
    return join(parts)


# -----------------------------------------------------------------------------
# 3. curves

def curves(runs):
    parts = []
    for section, panels in PANELS.items():
        stages = [run.stages.get(section) for run in runs]
        steps = max((len(stage.rows) for stage in stages if stage), default=0)
        if not steps:
            continue
        parts.append(tag("h2", f"{NAMES[section]}, step by step"))
        window = window_of(steps)
        lines = f"the running mean of {window} steps" if window > 1 else "every step"
        if len(runs) > 1:
            parts.append(legend([run.name for run in runs]))
            of_shorter = ", of fewer for a shorter run" if window > 1 else ""
            parts.append(note(f"Lines: {lines}{of_shorter}. Dots: held-out rows."))
        else:
            thinned = ", thinned to its extremes" if steps > POINTS else ""
            pale = f" Pale: every step{thinned}." if window > 1 else ""
            parts.append(note(f"Line: {lines}.{pale} Dots: held-out rows."))
        figures = []
        for panel in panels:
            if has_data(panel, stages):
                svg = plot(f"{NAMES[section]}: {panel.title}",
                           lambda axes: draw_panel(axes, panel, stages))
                figures.append(tag("figure", join([
                    tag("strong", panel.title), Html(svg),
                    tag("figcaption", with_flags(panel.healthy))])))
        parts.append(tag("div", join(figures), class_="panels"))
    return join(parts)


# -----------------------------------------------------------------------------
# 4. the frontier

def frontier(runs):
    evaluations = [[row for row in run.stages.get("ppo", Stage()).evaluations
                    if number_of(row, "eval/kl") is not None] for run in runs]
    if not any(evaluations):
        return ""
    parts = [tag("h2", "What a nat of KL bought"), tag("p", (
        "Held-out answers at each evaluation: the learned score, and gold where the task has exact "
        "marks, against the distance from the SFT model (Gao et al. 2023, figure 1)."))]
    if len(runs) > 1:
        parts.append(legend([run.name for run in runs]))
    for run, rows in zip(runs, evaluations):
        if rows:
            of_run = f"{run.name}: " if len(runs) > 1 else ""
            parts.append(tag("p", with_flags(of_run + exploitation(rows))))
    drawn = []
    if max(map(len, evaluations)) > 1:
        drawn.append(tag("figure", Html(plot("Score and gold against KL", lambda axes:
                                             draw_frontier(axes, evaluations), (5.4, 3.4)))))
    if len(runs) == 1:
        names = ["kl", "score", "gold", "win_rate"]
        rows = [[row["step"], *(shown(number_of(row, f"eval/{name}")) for name in names)]
                for row in evaluations[0]]
        head, rows = without_empty_columns(["step", "KL", "score", "gold", "win rate"], rows)
        drawn.append(tag("div", table(head, rows, range(len(head))), class_="scroll"))
    return join([*parts, tag("div", join(drawn), class_="beside")])


def exploitation(rows):
    """Where gold fell while the score rose, or that it did not."""
    rows = [row for row in rows if number_of(row, "eval/gold") is not None
            and number_of(row, "eval/score") is not None]
    if len(rows) < 2:
        return ("Whether gold fell while the score rose needs two evaluations with exact marks; "
                "--eval_steps 10 makes one every 10 steps.")
    best = max(rows, key=lambda row: row["eval/gold"])
    way_out = f"Raise --kl_coef, or stop at {best['eval/kl']:.1f} nats."
    if best["step"] == 0:
        way_out = ("No step was better than the SFT model: raise --kl_coef, and look at the reward "
                   "model's accuracy.")
    for row in reversed(rows[rows.index(best):]):
        fell = best["eval/gold"] - row["eval/gold"]
        if fell > GOLD_FALL and row["eval/score"] > best["eval/score"]:
            return (f"From step {best['step']} to step {row['step']} gold fell from "
                    f"{best['eval/gold']:.3f} to {row['eval/gold']:.3f} while the score rose from "
                    f"{best['eval/score']:.3f} to {row['eval/score']:.3f}: the actor exploits the "
                    f"reward model. {way_out}")
    return "Nowhere does gold fall from its best while the score rises."


# -----------------------------------------------------------------------------
# 5. answers

def answers_at(stage, step):
    """{prompt, as a text to compare by: sample} of one evaluation."""
    return {json.dumps(sample.get("prompt"), sort_keys=True): sample
            for sample in stage.samples if sample["step"] == step}


def last_step_of_samples(stage):
    return max(sample["step"] for sample in stage.samples)


def answers_of_one(run):
    """-> {name of a model: its last answers}, the SFT model's first."""
    columns = {}
    for section, stage in run.stages.items():
        if not stage.samples or section == "reward":
            continue
        last = last_step_of_samples(stage)
        if section == "sft" or last == 0:
            columns["SFT model"] = answers_at(stage, last)
        else:
            # PPO's evaluation 0 is of the SFT model, with scores beside its answers.
            columns["SFT model"] = answers_at(stage, 0) or columns.get("SFT model", {})
            columns[f"{NAMES[section]}, step {last}"] = answers_at(stage, last)
    return columns


def answers_of_many(runs):
    """-> {name of a run: the last answers of its last stage that answers}."""
    columns = {}
    for run in runs:
        for section, stage in run.stages.items():
            if stage.samples and section != "reward":
                columns[run.name] = answers_at(stage, last_step_of_samples(stage))
    return columns


def samples(runs):
    columns = answers_of_one(runs[0]) if len(runs) == 1 else answers_of_many(runs)
    columns = {name: answers for name, answers in columns.items() if answers}
    if not columns:
        return ""
    first, *others = columns.values()
    prompts = [key for key in first if all(key in answers for answers in others)][:SAMPLES]
    parts = [tag("h2", "What they say")]
    if not prompts:
        return join([*parts, tag("p", "These models were not asked the same held-out prompts.")])
    parts.append(note(f"The first {len(prompts)} held-out prompts, not picked by hand. Score: the "
                      "reward's; gold: the exact mark; KL: nats of this answer."))
    for key in prompts:
        answers = join(answer_cell(name, samples[key]) for name, samples in columns.items())
        parts.append(tag("div", join([prompt_text(first[key].get("prompt")),
                                      tag("div", answers, class_="answers")]), class_="sample"))
    return join(parts)


def said(content, style="said"):
    """What somebody said, in its own direction of writing."""
    content = content if isinstance(content, str) else json.dumps(content)
    return tag("div", text(content, LONGEST), class_=style, dir="auto")


def prompt_text(prompt):
    """A dialogue, the speaker before each message where there are several; or a plain text."""
    messages = prompt if isinstance(prompt, list) else [prompt]
    parts = []
    for message in messages:
        message = message if isinstance(message, dict) else {"content": message}
        if len(messages) > 1:
            parts.append(tag("div", text(message.get("role", ""), 40), class_="soft"))
        parts.append(said(message.get("content"), "said prompt"))
    return join(parts)


def answer_cell(name, sample):
    facts = [f"{key} {number_of(sample, key):.3f}" for key in ("score", "gold", "kl")
             if number_of(sample, key) is not None]
    if sample.get("ended") is False:
        facts.append("did not end")
    return tag("div", join([tag("div", name, class_="soft"), said(sample.get("answer", "")),
                            tag("div", " · ".join(facts), class_="soft")]))


# -----------------------------------------------------------------------------
# 6. time and memory

def costs(runs):
    names, rows = [], []
    bars = {"generate": [], "score": [], "train": [], "rest": []}
    for run in runs:
        for section, stage in run.stages.items():
            names.append(f"{run.name}: {NAMES[section]}" if len(runs) > 1 else NAMES[section])
            seconds = number_of(stage.results, "seconds")
            times = [column(stage.rows, f"time/{part}")[1] for part in list(bars)[:3]]
            parts = [float(time.sum()) if len(time) else None for time in times]
            logged = sum(part or 0 for part in parts)
            rest = max(seconds - logged, 0) if seconds is not None else None
            for part, value in zip(bars, [*parts, rest]):
                bars[part].append(value or 0)
            speed = column(stage.rows, "tokens_per_second")[1]
            memory = column(stage.rows, "memory_gb")[1]
            rows.append([names[-1], shown(clock_of(run, section), ",.0f"), shown(seconds, ",.0f"),
                         *(shown(part, ",.0f") for part in parts),
                         shown(rest if logged else None, ",.0f"),
                         shown(np.median(speed) if len(speed) else None, ",.0f"),
                         shown(memory.max() if len(memory) else None, ".2f")])
    head, rows = without_empty_columns(
        ["stage", "s by the clock", "s in the stage", "s generate", "s score", "s train", "s rest",
         "tokens/s, median", "memory peak, GB"], rows)
    parts = [tag("h2", "Where time and memory went"), note(
        "By the clock of run_all.sh a stage includes launching and importing. PPO's score is all "
        "forward passes of reward model, reference, actor and critic; its rest (grey, as the other "
        "stages are in whole) is loading, checks, evaluation and saving.")]
    if len(runs) == 1 and any(map(any, bars.values())):
        parts.append(tag("figure", Html(plot(
            "Seconds of the stages", lambda axes: draw_bars(axes, names, bars),
            (5.4, 0.9 + 0.4 * len(names)))), class_="wide"))
    return join([*parts, table(head, rows, range(1, len(head)))])


# -----------------------------------------------------------------------------
# 7. command, versions, flags

def plain(value):
    """A flag's value as one would type it."""
    if isinstance(value, list):
        return " ".join(map(plain, value))
    return "none" if value in ("", None) else str(value)


def default_flags(section):
    """
    {flag: default} of a stage, from its source as text, because importing it would take seconds. A
    default is the first argument of `flag(...)`.
    """
    defaults = {}
    for file in (ROOT / "support" / "flags.py", ROOT / f"{SCRIPTS[section]}.py"):
        for part in ast.parse(file.read_text(encoding="utf-8")).body:
            if getattr(part, "name", "") in ("DataConfig", "RunConfig", "Config"):
                for line in part.body:
                    if isinstance(line, ast.AnnAssign):
                        defaults[line.target.id] = ast.literal_eval(line.value.args[0])
    return defaults


def flags_of_one(run):
    stages = {section: stage for section, stage in run.stages.items() if stage.config}
    if not stages:
        return note("The flags are not known: a stage writes them when it is finished, and with "
                    "each checkpoint.")
    defaults = {section: default_flags(section) for section in stages}
    rows, changed = [], []
    for flag in dict.fromkeys(flag for stage in stages.values() for flag in stage.config):
        values = {section: stage.config[flag] for section, stage in stages.items()
                  if flag in stage.config}
        default = next((known[flag] for known in defaults.values() if flag in known), None)
        row = [with_flags(f"--{flag}"), plain(default),
               *(text(plain(values[section]), LONGEST) if section in values else ""
                 for section in stages)]
        rows.append(row)
        if any(value != defaults[section].get(flag) for section, value in values.items()):
            changed.append(row)
    head = ["flag", "default", *(NAMES[section] for section in stages)]
    return join([table(head, changed), folded(f"All {len(rows)} flags", table(head, rows))])


def differing_flags(runs):
    """-> {(section, flag): its value in each run, None where the run has not got that stage}."""
    values = {}
    for i, run in enumerate(runs):
        for section, stage in run.stages.items():
            output = str(stage.config.get("output_dir", "")).rstrip("/")
            for flag, value in stage.config.items():
                if flag != "output_dir":
                    # The run's own models are the same by their places in it.
                    value = plain(value).replace(f"{output}/", "OUTPUT_DIR/")
                    values.setdefault((section, flag), [None] * len(runs))[i] = value
    return {key: of_runs for key, of_runs in values.items() if len(set(of_runs) - {None}) > 1}


def only_seeds_differ(runs):
    flags = {flag for _, flag in differing_flags(runs)}
    all_known = all(stage.config for run in runs for stage in run.stages.values())
    return flags == {"seed"} and all_known and len(set(map(place_of, runs))) == 1


def commands_of(run):
    def written(command):
        return shlex.join(map(str, command)) if isinstance(command, list) else str(command)

    whole = run.summary.get("command")
    stages = [written(command) for command in run.summary.get("commands", {}).values() if command]
    parts = [tag("pre", written(whole))] if whole else []
    if stages:
        parts.append(folded("The stages one by one", tag("pre", "\n\n".join(stages)), not whole))
    if not parts:
        parts.append(note("The run has not written its command down."))
    versions = run.summary.get("versions")
    if versions:
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(note(f"Versions: {listed}."))
    return join(parts)


def repetition(runs):
    parts = [tag("h2", "To repeat it")]
    if len(runs) == 1:
        return join([*parts, commands_of(runs[0]), tag("h3", "Flags that are not the defaults"),
                     flags_of_one(runs[0])])
    for run in runs:
        parts += [tag("h3", run.name), commands_of(run)]
    rows = [[NAMES[section], with_flags(f"--{flag}"),
             *("" if value is None else text(value, LONGEST) for value in values)]
            for (section, flag), values in differing_flags(runs).items()]
    parts.append(tag("h3", "Flags that differ"))
    if rows:
        parts.append(table(["stage", "flag", *(run.name for run in runs)], rows))
    else:
        parts.append(note("None, as far as the flags are known."))
    return join(parts)


# -----------------------------------------------------------------------------
# the page

def page(runs):
    """Runs -> the whole page, a str."""
    head = head_of_one(runs[0]) if len(runs) == 1 else head_of_many(runs)
    body = [head, *(section(runs) for section in (
        doctor, curves, frontier, samples, costs, repetition))]
    template = (ROOT / "support" / "report.html").read_text(encoding="utf-8")
    title = text("report: " + ", ".join(run.name for run in runs))
    return string.Template(template).substitute(title=title, body=join(body))


def shorten_names(runs):
    """Leaves out of the runs' names what all of them begin with, where they stay different."""
    common = os.path.commonpath([os.path.abspath(run.name) for run in runs])
    short = [os.path.relpath(run.name, common) for run in runs]
    if "." not in short:
        for run, name in zip(runs, short):
            run.name = name


def write(path, content):
    """Under a temporary name first, so that a reader sees the old page or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error}); name another file with --output."
                       ) from None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="--output_dir of a run")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the run's folder;"
                        " of several: comparison.html in the first's")
    args = parser.parse_args()
    folders = list(dict.fromkeys(map(os.path.normpath, args.runs)))
    name = "report.html" if len(folders) == 1 else "comparison.html"
    path = Path(args.output or Path(folders[0]) / name)
    try:
        runs = [read_run(folder) for folder in folders]
        if len(runs) > 1:
            shorten_names(runs)
        write(path, page(runs))
    except RunError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(path)


if __name__ == "__main__":
    main()
