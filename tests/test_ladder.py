"""The ladder's variants (bench/ladder.py): their flags are step 3's, and what they replace does what its name says."""

import shlex
import sys

import pytest
import torch

import step3_ppo
import support.models
from support.flags import parse_config


@pytest.fixture(scope="module")
def ladder():
    path = list(sys.path)  # a script of bench/ puts the project's folder in its first place
    import bench.ladder
    sys.path[:] = path
    return bench.ladder


@pytest.fixture
def restored(monkeypatch):
    """What the variants replace is put back."""
    for owner, name in ((step3_ppo, "whiten"), (step3_ppo, "shape_rewards"), (step3_ppo, "ppo_actor_loss"),
                        (support.models, "disable_dropout")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def test_flags(ladder, monkeypatch):
    for name, variant in ladder.VARIANTS.items():
        flags = f"{ladder.COMMON} {variant.flags}"
        monkeypatch.setattr(sys, "argv", ["step3_ppo.py", *shlex.split(flags)])
        config = parse_config(step3_ppo.Config, step3_ppo.__doc__)
        assert config.updates_per_rollout in (1, 4), name
    for names in (ladder.LADDER, ladder.LEFT_OUT, ladder.HARDER):
        assert set(names) <= set(ladder.VARIANTS)


MASK = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
LOGPROBS = torch.tensor([[-1.0, -2, -3], [-1, 0, 0]])
REF = torch.tensor([[-2.0, -2, -1], [-1, 0, 0]])
SCORES = torch.tensor([5.0, 7.0])


def test_rewards(ladder, restored):
    plain = step3_ppo.shape_rewards(SCORES, LOGPROBS, REF, MASK, 0.1)
    ladder.scores_two_higher()
    higher = step3_ppo.shape_rewards(SCORES, LOGPROBS, REF, MASK, 0.1) - plain
    torch.testing.assert_close(higher, torch.tensor([[0.0, 0, 2], [2, 0, 0]]))
    ladder.kl_reward_turned_round()
    turned = step3_ppo.shape_rewards(SCORES, LOGPROBS, REF, MASK, 0.1) - higher
    torch.testing.assert_close(turned, torch.tensor([[0.1, 0, 5 - 0.2], [7, 0, 0]]))


def test_what_is_not_trained(ladder, restored):
    ladder.eos_not_trained()
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, _, _ = step3_ppo.ppo_actor_loss(logprobs, LOGPROBS, torch.ones(2, 3), MASK, 0.2)
    loss.backward()
    assert logprobs.grad.tolist() == [[-1, -1, 0], [0, 0, 0]]
    ladder.no_whitening()
    assert torch.equal(step3_ppo.whiten(LOGPROBS + 3, MASK), (LOGPROBS + 3) * MASK)
    ladder.dropout_on()
    from transformers import OPTConfig
    config = OPTConfig(dropout=0.0)
    support.models.disable_dropout(config)
    assert config.dropout == 0.1


def test_a_baseline_makes_the_height_of_the_scores_nothing(ladder, restored, settings):
    """Why there is no run of rung 2 with higher scores: its advantages would be the same."""
    def advantages():
        rewards = step3_ppo.shape_rewards(SCORES, LOGPROBS, REF, MASK, 0.1)
        return step3_ppo.whiten(step3_ppo.reinforce(rewards, MASK, 1.0), MASK)

    plain = advantages()
    ladder.scores_two_higher()
    torch.testing.assert_close(advantages(), plain)
