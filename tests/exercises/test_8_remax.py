"""Exercise 8: ReMax (arXiv 2310.10505): what the greedy answer to the prompt earns is the baseline."""

import pytest
import torch

import step3_ppo
from exercise import function, needs_choice
from step3_ppo import Config
from test_advantages import real_trainer
from test_ppo import ragged_prompts, small_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    return small_models("opt", tmp_path_factory.mktemp("models"), tokenizer)


def test_by_hand():
    """Answers earned 1 + 2 and 0 + 4, the greedy ones 1 and 5."""
    remax = function(step3_ppo, "remax")
    rewards = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert remax(rewards, torch.tensor([1.0, 5.0])).tolist() == [[2.0], [-1.0]]


def test_a_rollout(folders, process_group):
    """The baseline is the score of the answer without sampling, of the same prompt, in a batch of ragged prompts."""
    needs_choice(Config, "advantage", "remax")
    trainer = real_trainer(folders, advantage="remax", num_generations=3)
    trainer.models.eos_token_ids = list(range(0, 700, 3))
    prompts = ragged_prompts(trainer)
    trainer.train_rlhf(trainer.generate_experience(prompts))  # so that the actor is not the reference
    x = trainer.generate_experience(prompts)
    assert trainer.models.critic is None and x.values is None

    greedy = trainer.models.generator.generate(
        prompts["input_ids"], prompts["attention_mask"], max_new_tokens=12, temperature=0,
        eos_token_id=trainer.models.eos_token_ids, pad_token_id=trainer.models.tokenizer.pad_token_id)
    attention_mask = torch.cat([prompts["attention_mask"], greedy.mask.long()], 1)
    _, greedy_scores = trainer.score(greedy, attention_mask, [])
    earned = x.scores - 0.3 * ((x.logprobs - x.ref_logprobs) * x.mask).sum(1)
    expected = (earned - greedy_scores.repeat_interleave(3))[:, None] * x.mask
    torch.testing.assert_close(x.advantages, expected, atol=1e-4, rtol=1e-4)
    assert (greedy_scores - x.scores.view(4, 3).mean(1)).abs().max() > 1e-3


def test_the_sampled_answers_stay_as_they_were(folders, process_group):
    """The greedy answers must not change the noise of the others."""
    needs_choice(Config, "advantage", "remax")
    tokens = []
    for advantage in ("reinforce", "remax"):
        trainer = real_trainer(folders, advantage=advantage, num_generations=3)
        tokens.append(trainer.generate_experience(ragged_prompts(trainer)).tokens)
    assert torch.equal(*tokens)
