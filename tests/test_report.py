"""
The report of runs that are made here by formula: every section is there, its numbers are the files'
numbers, what models and data say cannot break the page, and a browser finds nothing that is wider
than its window, on a phone and on a desk.
"""

import html
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

import step1_sft
import step2_reward
import step3_ppo
import support.report
from conftest import ROOT, clean_environment
from support.doctor import RunDoctor
from support.plots import PANELS, draw_frontier, draw_panel, extremes, plot, running_mean
from support.report import default_flags, exploitation, page, text
from support.runs import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECTIONS = ["What the doctor says", "SFT, step by step", "Reward model, step by step",
            "PPO, step by step", "What a nat of KL bought", "What they say",
            "Where time and memory went", "To repeat it"]
QUESTIONS = [f"What is {i} plus {i}?" for i in range(12)]


def write_lines(path, objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))


def logged(steps, **metrics):
    """metrics.jsonl: {name: f(t)}, t from 0 to 1; __ stands for /."""
    return [{"step": i, **{name.replace("__", "/"): f(i / steps) for name, f in metrics.items()}}
            for i in range(1, steps + 1)]


def ppo_rows(steps, **changes):
    metrics = {
        "objective__scores": lambda t: 0.3 + 0.6 * t, "objective__gold": lambda t: 0.5 + 0.4 * t,
        "objective__kl": lambda t: 2 * t, "objective__kl_coef": lambda t: 0.05,
        "objective__entropy": lambda t: 0.5 - 0.3 * t, "response__length": lambda t: 9.0,
        "response__ended": lambda t: 1.0, "ppo__policy__ratio": lambda t: 1.0,
        "ppo__policy__clipfrac": lambda t: 0.01, "ppo__policy__approxkl": lambda t: 0.001,
        "ppo__val__var_explained": lambda t: t, "ppo__policy__grad_norm": lambda t: 1.0,
        "ppo__val__grad_norm": lambda t: 2.0, "lr": lambda t: 1e-4, "time__generate": lambda t: 0.5,
        "time__score": lambda t: 0.25, "time__train": lambda t: 1.0, "memory_gb": lambda t: 1.5 + t,
        "tokens_per_second": lambda t: 1000.0}
    return logged(steps, **{**metrics, **changes})


def make_run(folder, seed=1, steps=40, answer="Four.", ppo_rows=ppo_rows, **flags):
    """A finished run of three stages. flags: of PPO, where they are not as in step 3's Config."""
    write_lines(folder / "sft/metrics.jsonl", logged(
        steps, loss=lambda t: 3 * math.exp(-3 * t), lr=lambda t: 1e-3 * (1 - t), memory_gb=lambda t: 0.5))
    write_lines(folder / "sft/evaluations.jsonl", [
        {"step": step, "eval/perplexity": 1.2 + 1 / step, "eval/gold": 0.5} for step in (10, 20, 40)])
    write_lines(folder / "reward/metrics.jsonl", logged(
        steps, loss=lambda t: 0.7 - 0.4 * t, rewards__accuracies=lambda t: 0.5 + 0.4 * t,
        rewards__margins=lambda t: 3 * t))
    write_lines(folder / "reward/evaluations.jsonl", [
        {"step": step, "eval/accuracy": 0.6 + step / 200, "eval/loss": 0.6} for step in (20, 40)])
    write_lines(folder / "actor/metrics.jsonl", ppo_rows(steps))
    write_lines(folder / "actor/evaluations.jsonl", [
        {"step": step, "eval/score": 0.3 + step / 100, "eval/kl": step / 20, "eval/gold": 0.5 + step / 100,
         **({"eval/win_rate": 0.6} if step else {})} for step in (0, 20, 40)])
    write_lines(folder / "actor/samples.jsonl", [
        {"step": step, "prompt": [{"role": "user", "content": question}],
         "answer": answer if step else "I am the SFT model.", "score": 1.25 + i, "kl": 0.125 * i,
         "ended": i > 0, "gold": 1.0}
        for step in (0, 20, 40) for i, question in enumerate(QUESTIONS)])
    config = {section: {**default_flags(section), "seed": seed, "output_dir": str(folder)}
              for section in ("sft", "reward", "ppo")}
    config["ppo"] |= {"actor_model_name_or_path": f"{folder}/sft", **flags}
    for name in ("sft", "reward", "actor"):
        (folder / name / "run_config.json").write_text("{}")
    (folder / "summary.json").write_text(json.dumps({
        "sft": {"seconds": 100.0, "perplexity": 1.2254 + seed / 100, "gold": 0.5123},
        "reward": {"seconds": 50.0, "accuracy": 0.8765, "score_mean": -5.0236},
        "ppo": {"seconds": 120.0, "score": 0.7036, "kl": 2.0127, "gold": 0.9017 + seed / 1000, "win_rate": 0.6},
        "seconds": 270.0, "model": "tiny", "hardware": "cpu", "seed": seed, "doctor": ["step 9: it coughs."],
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "config": config,
        "clock": {"step1_sft": 111, "step2_reward": 66, "step3_ppo": 133},
        "command": "bash run_all.sh tiny cpu --seed 1", "commands": {"ppo": "deepspeed step3_ppo.py --seed 1"}}))
    return folder


def stop_ppo(folder, lines=25):
    """Makes a finished run one whose PPO was killed while it wrote."""
    summary = json.loads((folder / "summary.json").read_text())
    for part in (summary, summary["config"]):
        part.pop("ppo")
    summary.pop("doctor")
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "actor/run_config.json").unlink()
    whole = (folder / "actor/metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "actor/metrics.jsonl").write_text("".join(whole[:lines]) + whole[lines][:50])
    return folder


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """report("output") -> exit code, standard output and error of the command in tmp_path, without the plots."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(support.report, "plot", lambda title, draw, size=None: "<svg></svg>")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        try:
            support.report.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return (code, *capsys.readouterr())

    return run


def words(page):
    """What a reader sees, without plots: tags become spaces."""
    page = re.sub(r"<(svg|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def titles(page):
    return [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", page)]


# -----------------------------------------------------------------------------
# the sections and their numbers

def test_a_finished_run(tmp_path):
    make_run(tmp_path / "output", actor_learning_rate=0.00077)
    done = subprocess.run([sys.executable, ROOT / "support/report.py", "output"], cwd=tmp_path, timeout=120,
                          env=clean_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "output/report.html\n", "")
    page = (tmp_path / "output/report.html").read_text()
    seen = words(page)
    assert titles(page) == SECTIONS
    for number in ("tiny on cpu, seed 1", "finished ; 270 seconds", "SFT finished 40 100 111",
                   "perplexity 1.235", "gold 0.512", "accuracy 0.876", "score mean -5.024", "score 0.704",
                   "kl 2.013", "gold 0.903", "win rate 0.600", "step 9: it coughs.",
                   # evaluations: step, KL, score, gold, win rate
                   "0 0.000 0.300 0.500 20 1.000 0.500 0.700 0.600 40 2.000 0.700 0.900 0.600",
                   # PPO: clock, stage, generate, score, train, rest; median speed; peak of the memory
                   "PPO 133 120 20 10 40 50 1,000 2.50", "bash run_all.sh tiny cpu --seed 1",
                   "deepspeed step3_ppo.py --seed 1", "torch 2.13.0, deepspeed 0.19.8",
                   "--actor_learning_rate 1e-05 0.00077"):
        assert number in seen, (number, seen)
    # Ten prompts in their order, the SFT model's answer beside the last evaluation's.
    assert [question in seen for question in QUESTIONS] == [True] * 10 + [False] * 2
    assert seen.count("I am the SFT model.") == seen.count("Four.") == seen.count("PPO, step 40") == 10
    assert seen.count("did not end") == 2 and "score 2.250 · gold 1.000 · kl 0.125" in seen
    # A flag that has its default is in the folded list alone.
    assert seen.count("--cliprange_value") == 1 and seen.count("--actor_learning_rate") > 1


def test_each_panel_is_drawn_with_its_units_and_a_sentence(tmp_path):
    page_of_run = page([read_run(make_run(tmp_path))])
    figures = re.findall(r"<figure>.*?</figure>", page_of_run, re.DOTALL)
    assert len(figures) == 3 + 3 + 12 + 1
    for figure in figures[:18]:
        assert "<figcaption>" in figure and ">step</text>" in figure, figure[:200]
    for unit in ("nats a trained token", "nats a pair", "nats a response", "nats a token", "tokens a response",
                 "square root of the KL to the SFT model (nats a response)", "seconds"):
        assert f">{unit}</text>" in page_of_run, unit
    # No colour of matplotlib's own is left: all of them follow the page, light or dark.
    assert not re.search(r"(stroke|fill): ?#", "".join(figures)) and "http" not in re.sub(
        r"http://www.w3.org/\w+/\w+", "", page_of_run)


def test_a_stopped_run(tmp_path, report):
    def runs_away(steps):
        return ppo_rows(steps, objective__kl=lambda t: 80 * t)

    stop_ppo(make_run(tmp_path / "cut", ppo_rows=runs_away))
    (tmp_path / "cut/actor/checkpoint-20").mkdir()
    (tmp_path / "cut/actor/checkpoint-20/manifest.json").write_text(json.dumps(
        {"step": 20, "total_steps": 40, "config": {"kl_coef": 0.0077, "its checksum": 5}}))
    code, out, err = report(tmp_path / "cut")
    assert code == 0, err
    page = (tmp_path / "cut/report.html").read_text()
    assert titles(page) == SECTIONS
    seen = words(page)
    assert "State: PPO stopped at step 25 of 40" in seen and "SFT finished 40 100" in seen
    assert "--kl_coef 0.05 0.0077" in seen and "checksum" not in seen
    # The doctor reads the steps that are there.
    doctor = RunDoctor(1.0)
    for row in runs_away(40)[:25]:
        doctor(row)
    assert doctor.sentences and all(sentence in seen for sentence in doctor.sentences)


def test_a_stage_that_trains_once_more_is_not_finished_by_the_run_before(tmp_path, report):
    make_run(tmp_path)
    (tmp_path / "sft/run_config.json").unlink()
    os.utime(tmp_path / "summary.json", (1, 1))
    seen = words(page([read_run(tmp_path)]))
    assert "SFT stopped at step 40" in seen and "perplexity 1.235" not in seen and "PPO finished" in seen


@pytest.mark.parametrize("name, section", [("sft", "SFT"), ("reward", "Reward model"), ("actor", "PPO")])
def test_a_single_stage(name, section, tmp_path, report):
    make_run(tmp_path / "all")
    (tmp_path / "one").mkdir()
    shutil.copytree(tmp_path / "all" / name, tmp_path / "one" / name)
    (tmp_path / "one" / name / "run_config.json").unlink()
    for folder in (tmp_path / "one", tmp_path / "one" / name):
        code, out, err = report(folder)
        assert code == 0, err
        seen = words((folder / "report.html").read_text())
        assert f"{section} stopped at step 40" in seen and f"{section}, step by step" in seen
        assert ("not there: " in seen) and "the flags are not known" in seen.lower()


def test_a_run_of_dpo(tmp_path, report):
    make_run(tmp_path)
    shutil.rmtree(tmp_path / "actor")
    (tmp_path / "reward").rename(tmp_path / "actor")
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["dpo"] = {**summary.pop("reward"), "gold": 0.7777}
    for part in (summary, summary["config"]):
        part.pop("ppo")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    seen = words(page([read_run(tmp_path)]))
    assert "State: finished" in seen and "DPO, step by step" in seen and "gold 0.778" in seen


def test_a_run_without_evaluations_or_samples(tmp_path, report):
    """As runs were written before there were such files: numbers in metrics.jsonl and summary.json."""
    make_run(tmp_path)
    for file in [*tmp_path.glob("*/evaluations.jsonl"), *tmp_path.glob("*/samples.jsonl")]:
        file.unlink()
    rows = ppo_rows(40)
    rows[19] |= {"eval/score": 0.5, "eval/kl": 1.0, "eval/gold": 0.7, "eval/win_rate": 0.6}
    write_lines(tmp_path / "actor/metrics.jsonl", rows)
    page_of_run = page([read_run(tmp_path)])
    assert "20 1.000 0.500 0.700 0.600 40 2.013 0.704 0.903 0.600" in words(page_of_run)
    assert "What they say" not in titles(page_of_run)


# -----------------------------------------------------------------------------
# comparing

def test_runs_that_differ_by_their_seeds(tmp_path, report):
    for seed in (1, 2, 3):
        make_run(tmp_path / f"runs/{seed}", seed=seed)
    code, out, err = report("runs/1", "runs/2", "runs/3")
    assert (code, out) == (0, "runs/1/comparison.html\n"), err
    page = (tmp_path / "runs/1/comparison.html").read_text()
    seen = words(page)
    assert titles(page) == SECTIONS and "3 runs compared" in seen
    perplexities = [round(1.2254 + seed / 100, 4) for seed in (1, 2, 3)]
    assert f"{statistics.mean(perplexities):.3f} ± {statistics.stdev(perplexities):.3f}" in seen
    assert "0.704 ± 0.000" in seen and "differ by their seeds alone" in seen
    assert re.search(r"SFT --seed 1 2 3", seen) and "output_dir" not in seen
    assert page.count('class="legend"') == 4


def test_a_curve_of_each_run(tmp_path):
    stages = [read_run(make_run(tmp_path / name)).stages["ppo"] for name in "abc"]
    svg = plot("KL", lambda axes: draw_panel(axes, PANELS["ppo"][2], [*stages, None]))
    assert [len(re.findall(rf"stroke: var\(--c{i}\)", svg)) > 0 for i in (1, 2, 3, 4)] == [True] * 3 + [False]


def test_runs_that_differ_by_more_have_no_mean(tmp_path, report):
    make_run(tmp_path / "a", seed=1), make_run(tmp_path / "b", seed=2, kl_coef=0.2)
    stop_ppo(make_run(tmp_path / "c", seed=3))
    for names in ("ab", "ac", "abc"):
        code, out, err = report(*names, "--output", "page.html")
        assert (code, out) == (0, "page.html\n"), err
        seen = words((tmp_path / "page.html").read_text())
        assert "±" not in seen and "no mean is taken" in seen, names
    assert "PPO stopped at step 25" in seen and "PPO --kl_coef 0.05 0.2" in seen


# -----------------------------------------------------------------------------
# what models, data and folders may be called or say

NASTY = ["<script>alert(1)</script>", "\"quoted\" & 'so'", "a\0b\x1b[31m", "half \ud83d of a pair", "👩‍🚀 🎨",
         "‮right to left", "שלום עולם", "</style></div>$title $body ${x}", "$\\frac{1}{0}$", "a" * 10_000,
         "word " * 2_000, ""]


def test_nothing_that_is_said_gets_out_of_its_place(tmp_path, report):
    make_run(tmp_path / "<b>run</b>")
    run = tmp_path / "<b>run</b>"
    write_lines(run / "actor/samples.jsonl", [
        {"step": step, "prompt": [{"role": "<i>", "content": said}, {"role": "user", "content": said}],
         "answer": said} for step in (0, 40) for said in NASTY[:10]])
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"doctor": NASTY[:9], "model": NASTY[0], "seed": NASTY[1], "command": ["bash", *NASTY[:5]],
                "versions": {NASTY[0]: NASTY[1]}}
    summary["config"]["ppo"]["chat_template"] = NASTY[0]
    (run / "summary.json").write_text(json.dumps(summary))
    code, out, err = report(run)
    assert code == 0, err
    page_of_run = (run / "report.html").read_text(encoding="utf-8")
    for part in ("<script", "<b>", "<i>", "\0", "\x1b", "a" * 700):
        assert part not in page_of_run, part
    assert page_of_run.count("</style>") == page_of_run.count("</body>") == 1
    seen = words(page_of_run)
    for said in ("<script>alert(1)</script>", "\"quoted\" & 'so'", "a␀b␛[31m", "half \ufffd of a pair", "👩‍🚀 🎨",
                 "$title $body ${x}", "[… cut: 10,000 characters in all]"):
        assert said in seen, said
    # Another direction of writing ends with its element.
    assert re.search(r'<div class="said" dir="auto">‮right to left</div>', page_of_run)


def test_text_cuts_before_it_escapes():
    assert text("&&&&", longest=2).startswith("&amp;&amp; <span") and text("&&", longest=2) == "&amp;&amp;"


# -----------------------------------------------------------------------------
# size and speed

def test_a_long_run_is_a_small_page(tmp_path):
    def noisy(steps):
        noise = np.random.default_rng(0).normal(size=(steps, 40))
        rows = ppo_rows(steps)
        return [{name: value + noise[i, j] * (name != "step") for j, (name, value) in enumerate(row.items())}
                for i, row in enumerate(rows)]

    for name in ("a", "b"):
        make_run(tmp_path / name, steps=3_000, ppo_rows=noisy, answer="a longer answer " * 500)
    for folders in ([tmp_path / "a"], [tmp_path / "a", tmp_path / "b"]):
        assert len(page([read_run(folder) for folder in folders]).encode()) < 1_000_000


def test_nothing_heavy_is_imported(tmp_path):
    code = "import sys, support.report; print({'torch', 'deepspeed', 'transformers', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_without_matplotlib_the_rest_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page_of_run = page([read_run(make_run(tmp_path))])
    assert "<svg" not in page_of_run and "pip install matplotlib" in page_of_run and "gold 0.903" in words(page_of_run)


# -----------------------------------------------------------------------------
# errors

def broken_summary(run):
    (run / "summary.json").write_text("{\"sft\": ")


def summary_of_another_kind(run):
    (run / "summary.json").write_text("{\"sft\": 3}")


def broken_line(run):
    (run / "actor/metrics.jsonl").write_text("{\"step\": 1}\n{\"step\": \n{\"step\": 3}\n")


def line_of_another_kind(run):
    (run / "actor/samples.jsonl").write_text("[1]\n{}\n")


def unreadable(run):
    (run / "actor/metrics.jsonl").unlink()
    (run / "actor/metrics.jsonl").mkdir()


def bytes_of_another_kind(run):
    (run / "summary.json").write_bytes(b"\xff\xfe\xff{}")


def empty(run):
    shutil.rmtree(run)
    run.mkdir()


@pytest.mark.parametrize("break_it, named", [
    (broken_summary, ["summary.json", "JSON", "move it away"]),
    (summary_of_another_kind, ["summary.json", "sft is '3'", "object is needed"]),
    (broken_line, ["actor/metrics.jsonl, line 2", "JSON object", "mend"]),
    (line_of_another_kind, ["actor/samples.jsonl, line 1", "JSON object", "mend"]),
    (unreadable, ["actor/metrics.jsonl cannot be read", "move it away"]),
    (bytes_of_another_kind, ["summary.json", "JSON"]),
    (empty, ["holds no run", "summary.json", "--output_dir"]),
    (shutil.rmtree, ["no such folder", "--output_dir"])])
def test_what_is_no_run_is_one_sentence(break_it, named, tmp_path, report):
    break_it(make_run(tmp_path / "run"))
    code, out, err = report(tmp_path / "run")
    assert code == 2 and not out and err.startswith("report.py: error: ") and err.count("\n") == 1, err
    for part in named:
        assert part in err, err


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, report):
    make_run(tmp_path / "run")
    code, out, err = report("run", "--output", "nowhere/page.html")
    assert code == 2 and "nowhere/page.html cannot be written" in err and "--output" in err and err.count("\n") == 1


# -----------------------------------------------------------------------------
# the small parts, by hand

def test_running_mean_by_hand():
    assert running_mean(np.array([1.0, 2, 6, 3, 8]), 3).tolist() == pytest.approx([1.5, 3, 11 / 3, 17 / 3, 5.5])
    assert running_mean(np.array([1.0, 2, 6]), 1).tolist() == [1, 2, 6]


def test_thinning_keeps_every_spike():
    values = np.zeros(5000)
    values[[7, 4321]] = [9, -9]
    kept = extremes(values)
    assert len(kept) <= 300 and {7, 4321} <= set(kept) and (np.diff(kept) > 0).all()


@pytest.mark.parametrize("gold, said", [
    ([0.5, 0.7, 0.6], "From step 1 to step 2 gold fell from 0.700 to 0.600 while the score rose from 1.000 to 2.000"),
    ([0.5, 0.7, 0.69], "Nowhere does gold fall"), ([0.5, 0.7, 0.9], "Nowhere does gold fall"), ([0.5], "needs two")])
def test_exploitation_is_named(gold, said):
    rows = [{"step": i, "eval/kl": float(i), "eval/score": float(i), "eval/gold": mark} for i, mark in enumerate(gold)]
    assert exploitation(rows).startswith(said) or said in exploitation(rows)


def test_frontier_is_over_the_root_of_the_kl():
    axes = Figure().add_subplot()
    draw_frontier(axes, [[{"step": i, "eval/kl": kl, "eval/score": 0.1 * i, "eval/gold": 0.2 * i}
                          for i, kl in enumerate((-0.01, 1.0, 9.0))]])
    assert [(line.get_label(), *line.get_xdata()) for line in axes.lines] == [("score", 0, 1, 3), ("gold", 0, 1, 3)]


def test_defaults_are_those_of_the_stages():
    """They are read from the source as text; here they are compared with the classes themselves."""
    for section, module in (("sft", step1_sft), ("reward", step2_reward), ("ppo", step3_ppo)):
        assert default_flags(section) == vars(module.Config())


# -----------------------------------------------------------------------------
# bench/, and run_all.sh

def test_frontier_and_picture_read_evaluations(tmp_path):
    make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (tmp_path / "b/actor/evaluations.jsonl").unlink()  # the picture then takes the steps' own numbers
    shown = subprocess.run([sys.executable, ROOT / "bench/frontier.py", tmp_path / "a/actor/evaluations.jsonl"],
                           capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split() for line in shown[-2:]] == [["20", "1.000", "0.500", "0.700", "0.600"],
                                                     ["40", "2.000", "0.700", "0.900", "0.600"]]
    write_lines(tmp_path / "a/actor/evaluations.jsonl", [
        {"step": step, "eval/score": step / 40, "eval/gold": 0.5, "eval/kl": 1.0} for step in (0, 10, 20, 40)])
    command = [sys.executable, ROOT / "bench/picture.py", tmp_path / "a", tmp_path / "b", "--hacked", tmp_path / "b",
               "--output"]
    for name in ("gold.png", "gold.svg"):
        subprocess.run([*command, tmp_path / name], check=True, capture_output=True)
        assert 5_000 < (tmp_path / name).stat().st_size < 200_000
    shutil.rmtree(tmp_path / "b/actor")
    done = subprocess.run([*command, tmp_path / "none.png"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("picture.py: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("torn", [False, True], ids=["report", "no-report"])
def test_run_all_reports_on_a_stage_that_failed(torn, tmp_path):
    """The stage is a stand-in that fails after some steps; a report that cannot be made is one line."""
    make_run(tmp_path / "output")
    if torn:
        broken_line(tmp_path / "output")
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    python.write_text(f'#!/bin/sh\ncase "$*" in *report.py*) exec {sys.executable} "$@" ;; '
                      '*/step1_sft.py*) exit 3 ;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "run_all.sh", "tiny", "cpu"], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=60,
        env={**clean_environment(), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    *_, said, last = done.stdout.splitlines()
    assert done.returncode == 2 and last.startswith("run_all.sh: error: step1_sft.py failed"), done.stdout
    assert said.startswith("=== report: report.py: error: " if torn else "=== report: output/report.html")
    assert (tmp_path / "output/report.html").exists() is not torn


# -----------------------------------------------------------------------------
# in a browser

# In an iframe, because a browser's own window cannot be as narrow as a phone.
MEASURE = """<body style="margin:0">
<iframe id="page" src="PAGE" style="border:0; width:WIDTHpx; height:2000px"></iframe>
<script>
page.onload = () => {
  const inside = page.contentDocument;
  inside.querySelectorAll("details").forEach(part => part.open = true);
  const wide = [...inside.querySelectorAll("*")].filter(part => {
    const box = part.getBoundingClientRect();
    const isCut = part.scrollWidth > part.clientWidth + 1 && getComputedStyle(part).overflowX != "visible";
    return box.left < -1 || box.right > WIDTH + 1 || isCut;
  });
  const result = {wide: wide.map(part => part.outerHTML.slice(0, 200)), height: inside.body.scrollHeight,
                  plots: inside.querySelectorAll("svg").length,
                  background: getComputedStyle(inside.body).backgroundColor,
                  ink: [...new Set([...inside.querySelectorAll("svg text")].map(t => getComputedStyle(t).fill))]};
  document.body.textContent = "RESULT" + JSON.stringify(result) + "END";
};
</script>"""


def in_browser(page, width, dark=False):
    page.with_name("measure.html").write_text(MEASURE.replace("PAGE", page.name).replace("WIDTH", str(width)))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=10000",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom",
         f"file://{page.with_name('measure.html')}"], capture_output=True, text=True, timeout=110)
    found = re.search("RESULT(.*)END", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(width, tmp_path):
    for i, name in enumerate(("a-rather-long-name-of-a-run" * 3, "b", "c")):
        make_run(tmp_path / name, seed=i, answer="a" * 10_000, chat_template="b" * 300,
                 ppo_rows=lambda steps: ppo_rows(steps, objective__kl=lambda t: 80 * t))
    stop_ppo(tmp_path / "c")
    for names in (["b"], ["c"], ["a-rather-long-name-of-a-run" * 3, "b", "c"]):
        runs = [read_run(tmp_path / name) for name in names]
        for run, name in zip(runs, names):
            run.name = name
        (tmp_path / "page.html").write_text(page(runs))
        found = in_browser(tmp_path / "page.html", width)
        assert found["wide"] == [] and found["plots"] >= 18 and found["height"] > 3000, (names, found)


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_page_and_plots_follow_the_readers_light_or_dark(tmp_path):
    (tmp_path / "page.html").write_text(page([read_run(make_run(tmp_path))]))
    light, dark = (in_browser(tmp_path / "page.html", 1280, dark) for dark in (False, True))
    for found, is_bright in ((light, True), (dark, False)):
        [ink] = found["ink"]
        brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (found["background"], ink)]
        assert (brightness[0] > 0.8 and brightness[1] < 0.3) == is_bright, found
        assert (brightness[0] < 0.2 and brightness[1] > 0.7) != is_bright, found
