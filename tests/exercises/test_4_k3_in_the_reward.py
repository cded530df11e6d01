"""Exercise 4: the penalty of a token by k3 and not by k1."""

import pytest
import torch

import step3_ppo
from exercise import needs_flag, with_argument


def penalties(log_pi, log_ref, estimator):
    """What shape_rewards takes off each of V tokens at a coefficient of 1, as V answers of one token."""
    shape_rewards = with_argument(step3_ppo, "shape_rewards", "kl_estimator")
    ones, nothing = torch.ones(len(log_pi), 1, dtype=torch.float64), torch.zeros(len(log_pi), dtype=torch.float64)
    return -shape_rewards(nothing, log_pi[:, None], log_ref[:, None], ones, 1.0, kl_estimator=estimator)[:, 0]


def test_same_mean_and_never_negative():
    torch.manual_seed(0)
    log_pi, log_ref = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum().item()
    k1, k3 = penalties(log_pi, log_ref, "k1"), penalties(log_pi, log_ref, "k3")
    assert k1.min() < 0 <= k3.min()
    for k in (k1, k3):
        assert (log_pi.exp() * k).sum().item() == pytest.approx(exact, rel=1e-9)


def test_by_hand():
    """log pi / ref of log 2 and -log 2: k3 is 1/2 + log 2 - 1 and 2 - log 2 - 1."""
    log_2 = torch.tensor(2.0, dtype=torch.float64).log()
    found = penalties(torch.stack([log_2, -log_2]) - 3, torch.full((2,), -3.0, dtype=torch.float64), "k3")
    torch.testing.assert_close(found, torch.stack([log_2 - 0.5, 1 - log_2]))


def test_a_broken_token_stays_finite_and_padding_has_none():
    shape_rewards = with_argument(step3_ppo, "shape_rewards", "kl_estimator")
    mask = torch.tensor([[1.0, 0.0]])
    rewards = shape_rewards(torch.zeros(1), torch.tensor([[-900.0, -900.0]]), torch.zeros(1, 2), mask, 0.1,
                            kl_estimator="k3")
    assert rewards.isfinite().all() and rewards[0, 1] == 0


def test_the_flag_reaches_the_rewards():
    needs_flag(step3_ppo.Config, "kl_estimator")
    logprobs, ref, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.0]]), torch.ones(1, 2)
    sums = {}
    for estimator in ("k1", "k3"):
        args = step3_ppo.Config(kl_coef=1.0, kl_estimator=estimator)
        trainer = step3_ppo.DeepSpeedPPOTrainer(None, args)
        sums[estimator] = trainer.rewards(torch.zeros(1), logprobs, ref, mask).sum().item()
    assert sums["k1"] == pytest.approx(0) and sums["k3"] == pytest.approx(-(2.718281828 + 2.718281828**-1 - 2))
    assert step3_ppo.Config().kl_estimator == "k1"
