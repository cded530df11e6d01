"""Exercise 3: every token of an answer costs something."""

import pytest
import torch

import step3_ppo
from exercise import needs_flag, with_argument

MASK = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
LOGPROBS = torch.tensor([[-1.0, -2, -3], [-1, -9, -9]])
REF = torch.tensor([[-2.0, -2, -1], [-1, -7, -5]])
SCORES = torch.tensor([5.0, 7.0])


def test_by_hand():
    """KL terms 1, 0 and -2 at a coefficient of 0.1; 0.5 a token; the score stands on the last token as before."""
    shape_rewards = with_argument(step3_ppo, "shape_rewards", "length_penalty")
    rewards = shape_rewards(SCORES, LOGPROBS, REF, MASK, 0.1, length_penalty=0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1 - 0.5, -0.5, 0.2 - 0.5 + 5], [7 - 0.5, 0, 0]]))


def test_a_longer_answer_earns_less_by_its_tokens():
    shape_rewards = with_argument(step3_ppo, "shape_rewards", "length_penalty")
    without = shape_rewards(SCORES, LOGPROBS, REF, MASK, 0.1)
    lost = without.sum(1) - shape_rewards(SCORES, LOGPROBS, REF, MASK, 0.1, length_penalty=0.5).sum(1)
    assert lost.tolist() == pytest.approx([1.5, 0.5])


def test_the_flag_reaches_the_rewards():
    needs_flag(step3_ppo.Config, "length_penalty")
    trainer = step3_ppo.DeepSpeedPPOTrainer(None, step3_ppo.Config(kl_coef=0.1, length_penalty=0.5))
    rewards = trainer.rewards(SCORES, LOGPROBS, REF, MASK)
    assert rewards.sum(1).tolist() == pytest.approx([5 + 0.1 - 1.5, 7 - 0.5])
    plain = step3_ppo.DeepSpeedPPOTrainer(None, step3_ppo.Config(kl_coef=0.1))
    assert plain.rewards(SCORES, LOGPROBS, REF, MASK).sum(1).tolist() == pytest.approx([5 + 0.1, 7])
