"""Exercise 5: GRPO done right (arXiv 2503.20783): no deviation to divide by, and no length."""

import pytest
import torch

import step3_ppo
from exercise import function, needs_choice
from step3_ppo import Config, DeepSpeedPPOTrainer
from test_advantages import real_trainer
from test_ppo import ragged_prompts, small_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    return small_models("opt", tmp_path_factory.mktemp("models"), tokenizer)


def test_by_hand():
    """Scores 1, 2, 6 and 7, 7, 7, three to a prompt; twice the scores are twice the advantages."""
    dr_grpo = function(step3_ppo, "dr_grpo")
    scores = torch.tensor([1.0, 2, 6, 7, 7, 7])
    assert dr_grpo(scores, 3).tolist() == [[-2.0], [-1.0], [3.0], [0.0], [0.0], [0.0]]
    torch.testing.assert_close(dr_grpo(2 * scores, 3), 2 * dr_grpo(scores, 3))


def test_the_flag_chooses_it_without_a_critic(folders, process_group):
    needs_choice(Config, "advantage", "dr_grpo")
    trainer = real_trainer(folders, advantage="dr_grpo", num_generations=3)
    trainer.models.eos_token_ids = list(range(0, 700, 3))
    x = trainer.generate_experience(ragged_prompts(trainer))
    assert trainer.models.critic is None
    torch.testing.assert_close(x.advantages, step3_ppo.dr_grpo(x.scores, 3) * x.mask)
    from support.flags import UsageError
    with pytest.raises(UsageError, match="dr_grpo.*2 or more"):
        Config(advantage="dr_grpo")


def test_a_token_weighs_the_same_in_every_rollout(folders, process_group, monkeypatch):
    """The actor's loss is divided by rows x --max_answer_seq_len, and not by the tokens that there happen to be."""
    needs_choice(Config, "advantage", "dr_grpo")
    divisors = {}
    train_step = step3_ppo.train_step
    for advantage in ("grpo", "dr_grpo"):
        trainer = real_trainer(folders, advantage=advantage, num_generations=3)
        trainer.models.eos_token_ids = list(range(0, 700, 3))
        x = trainer.generate_experience(ragged_prompts(trainer))
        found = []

        def record(engine, micro_batches, loss_sum, divisor):
            found.append(float(divisor))
            return train_step(engine, micro_batches, loss_sum, divisor)

        monkeypatch.setattr(step3_ppo, "train_step", record)
        trainer.train_rlhf(x)
        divisors[advantage] = sum(found)
        assert x.mask.sum() < 12 * trainer.args.max_answer_seq_len
    assert divisors["grpo"] == x.mask.sum()
    assert divisors["dr_grpo"] == 12 * 12  # 12 answers of at most 12 tokens


def test_the_kl_stays_in_the_loss(folders, process_group):
    """As grpo's does, because a score's distance from its group's mean knows nothing of the KL."""
    needs_choice(Config, "advantage", "dr_grpo")
    from support.metrics import Sums
    losses = {}
    for kl_coef in (0.0, 1.0):
        trainer = real_trainer(folders, advantage="dr_grpo", num_generations=3, kl_coef=kl_coef)
        x = trainer.generate_experience(ragged_prompts(trainer))
        x.ref_logprobs = x.ref_logprobs - 0.5 * x.mask
        losses[kl_coef] = trainer.policy_loss(x, Sums()).item()
    k3 = 2.718281828**-0.5 + 0.5 - 1  # of each token
    assert losses[1.0] - losses[0.0] == pytest.approx(k3 * x.mask.sum().item(), rel=1e-3)
    assert isinstance(trainer, DeepSpeedPPOTrainer)
