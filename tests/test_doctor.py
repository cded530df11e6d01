"""
The run doctor on histories made by formula: one anomaly at a time is named, its lesser form and a
healthy run are not.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import step3_ppo
from support.doctor import RunDoctor, diagnose


def history(steps=120, **changes):
    """
    A run like a healthy one of `tiny`: {name: f(t, noise)} replaces a metric, t from 0 to 1, noise
    of about +-1 by turns. Names are as in metrics.jsonl, with __ for /.
    """
    healthy = {
        "objective/scores": lambda t, noise: 0.85 + 0.4 * min(1, 2 * t) + 0.06 * noise,
        "objective/kl": lambda t, noise: 1.2 * min(1, 2 * t) + 0.1 * noise,
        "objective/kl_coef": lambda t, noise: 0.05,
        "objective/gold": lambda t, noise: 0.6 + 0.3 * min(1, 2 * t) + 0.03 * noise,
        "objective/entropy": lambda t, noise: 0.25 * (1 - 0.85 * t),
        "response/length": lambda t, noise: 9 - 1.5 * t + 0.3 * noise,
        "response/ended": lambda t, noise: 1 - 0.01 * (noise > 1),
        "response/logprob_drift": lambda t, noise: 4e-7,
        "ppo/policy/approxkl": lambda t, noise: 2e-3,
        "ppo/policy/ratio": lambda t, noise: 1 + 1e-3 * noise,
        "ppo/val/var_explained": lambda t, noise: 0.8 - 8 * max(0, 0.2 - t),
        "ppo/policy/grad_norm": lambda t, noise: 1.3 + 0.4 * noise,
        "ppo/val/grad_norm": lambda t, noise: 40 * math.exp(-12 * t) + 1 + 0.3 * noise}
    healthy |= {name.replace("__", "/"): f for name, f in changes.items()}
    noises = [math.sin(2.4 * i) * 1.4 for i in range(steps)]
    return [{"step": i + 1, **{name: f((i + 1) / steps, noises[i]) for name, f in healthy.items()}}
            for i in range(steps)]


CASES = [  # kind, what the sentence names, metrics of the anomaly, of a lesser form that is none
    ("kl negative", "--top_p 1", dict(objective__kl=lambda t, noise: -1 + noise),
     dict(objective__kl=lambda t, noise: -0.02 + 0.5 * noise)),
    ("kl runs away", "--kl_coef", dict(objective__kl=lambda t, noise: 30 * t),
     dict(objective__kl=lambda t, noise: 14 * t)),
    ("kl runs away", "--actor_learning_rate", dict(objective__kl=lambda t, noise: 60 * (t > 0.5)),
     dict(objective__kl=lambda t, noise: 10 * (t > 0.5))),
    ("kl runs away", "--kl_coef",  # 0.2 nats a token
     dict(objective__kl=lambda t, noise: 80 * t, response__length=lambda t, noise: 256.0),
     dict(objective__kl=lambda t, noise: 40 * t, response__length=lambda t, noise: 256.0)),
    ("kl runs away", "--kl_coef is 0",
     dict(objective__kl=lambda t, noise: 8 * t, objective__kl_coef=lambda t, noise: 0.0),
     dict(objective__kl=lambda t, noise: 3 * t, objective__kl_coef=lambda t, noise: 0.0)),
    ("entropy", "collapsed", dict(objective__entropy=lambda t, noise: 0.3 * math.exp(-6 * t)),
     dict(objective__entropy=lambda t, noise: 0.3 * math.exp(-2.5 * t))),
    ("ended", "--missing_eos_penalty", dict(response__ended=lambda t, noise: 1 - 0.4 * t),
     dict(response__ended=lambda t, noise: 1 - 0.1 * t)),
    ("length", "grow with the score",
     dict(response__length=lambda t, noise: 10 + 30 * t,
          objective__scores=lambda t, noise: t + 0.02 * noise),
     dict(response__length=lambda t, noise: 10 + 30 * t,
          objective__scores=lambda t, noise: 0.1 * noise)),
    ("critic", "--critic_learning_rate", dict(ppo__val__var_explained=lambda t, noise: -0.3),
     dict(ppo__val__var_explained=lambda t, noise: 0.1 + 0.3 * noise)),
    ("policy clipped", "gradient_clipping", dict(ppo__policy__grad_norm=lambda t, noise: 6 + noise),
     dict(ppo__policy__grad_norm=lambda t, noise: 2 + noise)),
    ("val clipped", "--critic_learning_rate", dict(ppo__val__grad_norm=lambda t, noise: 60 + noise),
     dict(ppo__val__grad_norm=lambda t, noise: 2 + noise)),
    ("drift", "does not read the trained weights",
     dict(response__logprob_drift=lambda t, noise: 0.01 * t),
     dict(response__logprob_drift=lambda t, noise: 5e-4)),
    ("ratio", "--ppo_epochs", dict(ppo__policy__approxkl=lambda t, noise: 0.3),
     dict(ppo__policy__approxkl=lambda t, noise: 0.03)),
    ("ratio", "lower it tenfold", dict(ppo__policy__approxkl=lambda t, noise: 3),
     dict(ppo__policy__approxkl=lambda t, noise: 0.03)),
    ("ratio", "--actor_learning_rate", dict(ppo__policy__ratio=lambda t, noise: 1.5),
     dict(ppo__policy__ratio=lambda t, noise: 1.05)),
    ("reward hacking", "exploits the reward model",
     dict(objective__scores=lambda t, noise: 1 + t,
          objective__gold=lambda t, noise: 0.9 - 0.5 * t + 0.03 * noise),
     dict(objective__scores=lambda t, noise: 1 + t,
          objective__gold=lambda t, noise: 0.9 - 0.03 * t + 0.03 * noise)),
    ("never right", "train step 1 longer",
     dict(objective__scores=lambda t, noise: 0.2 + 1.5 * t + 0.1 * noise,
          objective__gold=lambda t, noise: 0.0),
     dict(objective__scores=lambda t, noise: 0.2 + 1.5 * t + 0.1 * noise,
          objective__gold=lambda t, noise: 0.03 * (noise > 0))),
    ("never right", "no answer is right",
     dict(objective__scores=lambda t, noise: 0.2 + 0.5 * t + 0.1 * noise,
          objective__gold=lambda t, noise: 0.004 * (noise > 1)),
     dict(objective__scores=lambda t, noise: 0.2 + 0.1 * noise,
          objective__gold=lambda t, noise: 0.0)),
    ("score", "fell from", dict(objective__scores=lambda t, noise: 1 - 2 * t + 0.06 * noise),
     dict(objective__scores=lambda t, noise: 1 - 0.2 * t + 0.06 * noise)),
]


@pytest.mark.parametrize("kind, named, anomaly, lesser", CASES,
                         ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_names_it_and_not_its_lesser_form(kind, named, anomaly, lesser):
    said, broken, well = {}, history(**anomaly), history(**lesser)
    for n in range(1, 121):
        said = diagnose(broken[:n], clip=1.0) | said  # what is said first
        assert kind not in diagnose(well[:n], clip=1.0), n
    assert named in said[kind]


def test_a_healthy_run_gets_no_sentence():
    def falls_in_30_steps(t, noise):
        return 40 * math.exp(-48 * t) + 1 + 0.3 * noise

    doctor = RunDoctor(clip=1.0)
    for metrics in history(480, ppo__val__grad_norm=falls_in_30_steps):
        assert doctor(metrics) == []


def test_no_clipping_without_a_limit_and_no_critic_without_its_metrics():
    rows = history(ppo__policy__grad_norm=lambda t, noise: 99.0)
    assert diagnose(rows, clip=0.0) == {}
    without = [{name: value for name, value in row.items()
                if "/val/" not in name and "gold" not in name} for row in history()]
    assert diagnose(without, clip=1.0) == {}


def test_a_lost_run_is_said_at_once():
    rows = history(3)
    rows[-1]["objective/kl"] = math.nan
    assert "objective/kl" in diagnose(rows)["not finite"]


def test_a_sentence_is_repeated_only_after_200_steps_and_reads_a_finished_run(tmp_path):
    rows = history(500, objective__kl=lambda t, noise: 30.0)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    doctor = RunDoctor()
    for line in open(tmp_path / "metrics.jsonl"):
        doctor(json.loads(line))
    said_at = [sentence.split(":")[0] for sentence in doctor.sentences]
    assert said_at == ["step 5", "step 205", "step 405"]


def test_gold_is_of_each_answer_to_its_prompt(process_group):
    def equal(record, answer):
        return float(record == answer)

    assert step3_ppo.mean_gold(equal, ["a", "b"], ["a", "x", "b", "b"]) == 0.75


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_command(elsewhere, tmp_path):
    """From the project's folder, where `support` could be imported, and from another one."""
    root = Path(step3_ppo.__file__).parent
    script = root / "support" / "doctor.py" if elsewhere else "support/doctor.py"
    rows = history(ppo__policy__grad_norm=lambda t, noise: 99.0)
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    for flags in ([], ["--gradient_clipping", "0"]):
        done = subprocess.run([sys.executable, script, file, *flags], capture_output=True,
                              text=True, cwd=tmp_path if elsewhere else root)
        assert done.returncode == (0 if flags else 1), done.stderr
        said.append(done.stdout)
    assert "the actor's gradient has been clipped" in said[0]
    assert "120 steps, 1 sentence(s)" in said[0]
    assert said[1] == "120 steps, nothing to report\n"


def test_the_command_reads_a_run_by_its_folder(tmp_path):
    """The --output_dir or the actor's folder; exit code 2 for anything that is no PPO run."""
    script = Path(step3_ppo.__file__).parent / "support" / "doctor.py"
    actor = tmp_path / "output" / "actor"
    actor.mkdir(parents=True)
    (tmp_path / "output" / "sft").mkdir()
    (tmp_path / "output" / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (actor / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history()))
    for path, code, said in (
            ("output", 0, "120 steps, nothing to report"),
            ("output/actor", 0, "120 steps, nothing to report"),
            ("output/sft", 2, "output/sft/metrics.jsonl is not of a PPO run"),
            ("nowhere", 2, "nowhere cannot be read as metrics.jsonl"),
            (".", 2, ". holds no actor/metrics.jsonl")):
        done = subprocess.run([sys.executable, script, path], capture_output=True, text=True,
                              cwd=tmp_path)
        assert done.returncode == code, path
        assert said in done.stdout + done.stderr


def test_constant_scores_say_nothing(recwarn):
    """
    A reward that is the same for every answer has no correlation with their length; numpy is not
    asked for it.
    """
    growing = history(objective__scores=lambda t, noise: 1.0,
                      response__length=lambda t, noise: 10 + 30 * t)
    assert "length" not in diagnose(growing) and not recwarn.list


def test_seeds_side_by_side(tmp_path):
    """Only the toy has gold scores; other runs have the other columns."""
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "summary.json").write_text(json.dumps({
            "sft": {"perplexity": 2.0 * seed}, "reward": {"accuracy": 0.5},
            "ppo": {"kl": 1.0, "win_rate": 0.5}, "seed": seed, "doctor": []}))
    script = Path(step3_ppo.__file__).with_name("bench") / "seeds.py"
    done = subprocess.run([sys.executable, script, tmp_path / "1", tmp_path / "2"], text=True,
                          capture_output=True, check=True)
    assert "gold" not in done.stdout
    assert "| mean ± sd | 3.000 ± 1.414 | 0.500 ± 0.000 |" in done.stdout
