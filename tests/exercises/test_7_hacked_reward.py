"""Exercise 7: a sign of a hacked reward that needs no exact mark: the answers become the same."""

import pytest
import torch

from exercise import not_yet
from support.doctor import RunDoctor
from test_advantages import real_trainer
from test_ppo import ragged_prompts, small_models

HEALTHY = {"objective/kl": 1.0, "objective/kl_coef": 0.05, "objective/scores": 1.0, "objective/entropy": 0.2,
           "response/length": 8.0, "response/ended": 1.0, "ppo/policy/approxkl": 0.001, "ppo/policy/ratio": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    return small_models("opt", tmp_path_factory.mktemp("models"), tokenizer)


def said(distinct):
    """What the doctor says of a run in which that share of a rollout's answers differed from each other."""
    doctor = RunDoctor()
    for step, share in enumerate(distinct, 1):
        doctor({"step": step, **HEALTHY, "response/distinct": share})
    return " ".join(doctor.sentences)


def test_the_metric(folders, process_group):
    """The share of different answers among the first ones to each prompt, by their tokens up to EOS."""
    trainer = real_trainer(folders, num_generations=3, temperature=1e-3)
    trainer.models.eos_token_ids = list(range(0, 700, 3))
    prompts = ragged_prompts(trainer)
    for name in ("input_ids", "attention_mask"):
        prompts[name] = prompts[name][[0, 0, 1, 2]]  # one prompt twice, and its answers are the same
    x = trainer.generate_experience(prompts)
    if "response/distinct" not in trainer.metrics:
        not_yet("step3_ppo's metrics have no response/distinct")
    R = x.mask.size(1)
    answers = [tuple(ids[real].tolist()) for ids, real in zip(x.tokens[::3, -R:], x.mask[::3].bool())]
    assert len(set(answers)) == 3
    assert trainer.metrics["response/distinct"] == pytest.approx(3 / 4)


def test_the_doctor_speaks_when_the_answers_become_the_same():
    falling = [0.9] * 10 + [0.9 - 0.04 * i for i in range(20)] + [0.1] * 10
    if "distinct" not in said(falling):
        not_yet("support/doctor.py says nothing with the word distinct when response/distinct falls from 0.9 to 0.1")


def test_the_doctor_is_silent_where_nothing_changed():
    if "distinct" not in said([0.9] * 10 + [0.1] * 30):
        not_yet("support/doctor.py says nothing with the word distinct when response/distinct falls from 0.9 to 0.1")
    torch.manual_seed(0)
    noise = (0.02 * torch.randn(40)).tolist()
    assert said([0.9 + e for e in noise]) == "" and said([0.3 + e for e in noise]) == ""
    assert said([0.9] * 10 + [0.7] * 30) == ""
