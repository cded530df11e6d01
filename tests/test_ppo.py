"""
PPO's promises on real models: the first update's ratio is 1 and its KL 0, EOS is trained, and the RLHF API runs as
documented.
"""
import pytest
import torch
from transformers import (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, OPTConfig, OPTForCausalLM,
                          OPTForSequenceClassification)

import step3_ppo
from data import Collator, encode_records, load_records, load_tokenizer, make_dataloader
from support.flags import DataConfig, UsageError
from support.models import RewardModel
from step3_ppo import Config
from step3_ppo import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine, critic_loss


def small_models(kind, folder, tokenizer):
    """
    Random actor and reward model of OPT's or Llama's shape, saved as users' folders are. OPT's default dropout of 0.1
    is left in.
    """
    common = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                  max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    if kind == "opt":
        config = OPTConfig(ffn_dim=64, word_embed_proj_dim=32, **common)
        models = (OPTForCausalLM(config),
                  OPTForSequenceClassification(OPTConfig(**{**config.to_dict(), "num_labels": 1})))
    else:
        config = LlamaConfig(intermediate_size=64, num_key_value_heads=2, **common)
        models = (LlamaForCausalLM(config),
                  LlamaForSequenceClassification(LlamaConfig(**{**config.to_dict(), "num_labels": 1})))
    paths = []
    for model, name in zip(models, ("actor", "reward")):
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # biases and norms too: zeros hide mistakes
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        paths.append(str(folder / name))
    return paths


@pytest.fixture(params=["opt", "llama"])
def trainer(request, tmp_path, process_group):
    tokenizer = load_tokenizer("tiny")
    args = Config(per_device_generation_batch_size=4, per_device_train_batch_size=4, max_prompt_seq_len=16,
                  max_answer_seq_len=12, actor_learning_rate=1e-3, critic_learning_rate=1e-3,
                  lr_scheduler_type="constant", temperature=0.8)
    engine = DeepSpeedRLHFEngine(*small_models(request.param, tmp_path, tokenizer), tokenizer=tokenizer,
                                 num_total_iters=4, args=args)
    return DeepSpeedPPOTrainer(engine=engine, args=args)


def ragged_prompts(trainer, lengths=(1, 3, 7, 4)):
    torch.manual_seed(1)
    items = [{"input_ids": torch.randint(4, 300, (n,)).numpy(), "record": None} for n in lengths]
    return Collator(3, trainer.models.tokenizer.pad_token_id)(items)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_first_update_has_ratio_one_and_no_kl(trainer, pad_is_eos):
    """
    Checks 1, 2, 3, 4, 7 of the PPO literature: rollout, trainer and reference are one policy before the first step.
    """
    if pad_is_eos:
        trainer.models.tokenizer.pad_token = trainer.models.tokenizer.eos_token
    trainer.models.eos_token_ids = list(range(0, 700, 3))  # many ends: responses of all lengths
    x = trainer.generate_experience(ragged_prompts(trainer))
    assert 1 < x.mask.sum(1).unique().numel(), "the responses should be ragged"
    torch.testing.assert_close(x.ref_logprobs * x.mask, x.logprobs * x.mask, atol=1e-5, rtol=0)
    trainer.train_rlhf(x)
    # the decoder's own log-probabilities are the training forward's
    assert trainer.metrics["response/logprob_drift"] < 1e-5
    assert trainer.metrics["ppo/policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert trainer.metrics["ppo/policy/clipfrac"] == 0
    if pad_is_eos:
        trainer.models.tokenizer.pad_token = "<pad>"


def test_second_epoch_measures_against_the_frozen_policy(trainer):
    trainer.args.ppo_epochs = 2
    trainer.train_rlhf(trainer.generate_experience(ragged_prompts(trainer)))
    assert abs(trainer.metrics["ppo/policy/ratio"] - 1) > 1e-4 or trainer.metrics["ppo/policy/approxkl"] > 1e-6
    trainer.args.ppo_epochs = 1


def test_eos_is_in_the_mask_and_has_a_gradient(trainer):
    """The action of stopping must be trained: DeepSpeed-Chat masks it with the padding."""
    engine = trainer.models
    engine.eos_token_ids = list(range(0, 700, 2))
    x = trainer.generate_experience(ragged_prompts(trainer))
    row = int((x.mask.sum(1) < x.mask.size(1)).nonzero()[0])  # a row that ended early
    end = int(x.mask[row].sum()) - 1
    P = x.tokens.size(1) - x.mask.size(1)
    assert (int(x.tokens[row, P + end]) in engine.eos_token_ids and x.mask[row, end] == 1
            and x.mask[row, end + 1:].sum() == 0)
    logprobs, _ = engine.actor.module(x.tokens, x.attention_mask, x.mask, 0.8)
    logprobs[row, end].backward()
    head = engine.actor.module.model.get_output_embeddings().weight
    assert head.grad[x.tokens[row, P + end]].abs().sum() > 0
    engine.actor.module.zero_grad()


def test_score_stands_on_the_last_response_token(trainer):
    trainer.models.eos_token_ids = list(range(0, 700, 3))
    x = trainer.generate_experience(ragged_prompts(trainer))
    rewards = x.returns  # gamma = 1 and KL = 0: the last token's advantage is score - value, so its return is the score
    last = x.mask.sum(1).long() - 1
    torch.testing.assert_close(rewards.gather(1, last[:, None]).squeeze(1), x.scores, atol=1e-4, rtol=0)


def test_values_inside_the_clip_are_not_counted_as_clipped():
    """old + (value - old) is not value in floating point: a clip computed so counts rounding."""
    torch.manual_seed(0)
    old, values = 0.19 * torch.rand(2, 64, 8)  # drawn apart, so that value - old is not exact
    mask = torch.ones(64, 8)
    returns = values + 0.01 * torch.randn(64, 8)  # near, so that the last bit of a value shows in its error
    assert critic_loss(values, old, returns, mask, 0.2)[1] == 0
    assert critic_loss(values + 1, old, values, mask, 0.2)[1] == 0  # outside, and the plain error is the larger
    assert critic_loss(values + 1, old, values + 1, mask, 0.2)[1] == 512


def test_values_are_of_the_state_before_each_token(trainer):
    """The same slice in rollout and update: recomputing the critic before any step gives the stored values."""
    x = trainer.generate_experience(ragged_prompts(trainer))
    row, P = 2, x.tokens.size(1) - x.mask.size(1)
    for t in range(int(x.mask[row].sum())):
        prefix, mask = x.tokens[row:row + 1, :P + t], x.attention_mask[row:row + 1, :P + t]
        torch.testing.assert_close(trainer.models.critic.module(prefix, mask)[0, -1], x.values[row, t],
                                   atol=1e-5, rtol=0)


def test_the_rlhf_api_runs_as_written(tmp_path, process_group):
    tokenizer = load_tokenizer("tiny")
    args = Config(max_prompt_seq_len=64, max_answer_seq_len=8, per_device_generation_batch_size=2,
                  per_device_train_batch_size=2)
    actor_path, critic_path = small_models("opt", tmp_path, tokenizer)
    prompts = encode_records(load_records(DataConfig(), stage=3)[0][:4], tokenizer, 3, 64)
    prompt_train_dataloader = make_dataloader(prompts, Collator(3, tokenizer.pad_token_id), 2, seed=0)

    engine = DeepSpeedRLHFEngine(actor_model_name_or_path=actor_path, critic_model_name_or_path=critic_path,
                                 tokenizer=tokenizer, num_total_iters=2, args=args)
    trainer = DeepSpeedPPOTrainer(engine=engine, args=args)
    for prompt_batch in prompt_train_dataloader:
        out = trainer.generate_experience(prompt_batch)
        actor_loss, critic_loss = trainer.train_rlhf(out)
        assert torch.isfinite(torch.tensor([actor_loss, critic_loss])).all()


def test_every_row_is_used_once_an_epoch_and_in_another_order(trainer, monkeypatch):
    args, used, train_step = trainer.args, [], step3_ppo.train_step
    args.per_device_train_batch_size, args.ppo_epochs = 1, 5

    def spy(engine, micro_batches, *rest):
        if engine is trainer.models.actor:
            used.extend(int(row) for x in micro_batches for row in x.scores)
        return train_step(engine, micro_batches, *rest)

    monkeypatch.setattr(step3_ppo, "train_step", spy)
    torch.manual_seed(0)
    x = trainer.generate_experience(ragged_prompts(trainer))
    x.scores = torch.arange(4)  # by which a row is known; no loss reads them
    trainer.train_rlhf(x)
    epochs = [used[i:i + 4] for i in range(0, 20, 4)]
    assert (len(used) == 20 and all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
            and len(set(map(tuple, epochs))) > 1)


def test_each_rank_has_noise_of_its_own(trainer, monkeypatch):
    """The same prompts, rollout and seed on another rank: other answers."""
    rollouts = []
    for rank in (0, 1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(step3_ppo.dist, "get_rank", lambda: rank)
            rollouts.append(trainer.respond(ragged_prompts(trainer), 1, 1)[0].tokens)
    assert torch.equal(rollouts[0], rollouts[2]) and not torch.equal(rollouts[0], rollouts[1])


def test_a_rollout_that_no_whole_step_uses_up_is_refused(trainer):
    """The rest would wait in the gradients and be stepped with the next rollout's."""
    x = trainer.generate_experience(ragged_prompts(trainer, lengths=(1, 3, 7, 4, 2)))
    with pytest.raises(UsageError, match="5 answers.*drop_last"):
        trainer.train_rlhf(x)


def test_the_critic_starts_as_the_reward_model(trainer):
    ids, real = (ragged_prompts(trainer)[name] for name in ("input_ids", "attention_mask"))
    assert torch.equal(trainer.models.critic(ids, real), trainer.models.reward_model(ids, real))


def test_scores_are_normalised_by_the_reward_models_own_numbers_then_clipped(trainer):
    engine = trainer.models
    raw_model = RewardModel(engine.reward_model.model)
    engine.reward_model.model.config.score_mean, engine.reward_model.model.config.score_std = 0.3, 0.02
    engine.scorers = {"reward": RewardModel(engine.reward_model.model, normalise=True)}
    x = DeepSpeedPPOTrainer(engine, trainer.args).generate_experience(ragged_prompts(trainer))
    raw = torch.stack([raw_model(ids[real.bool()][None], real[real.bool()][None])[0, -1]
                       for ids, real in zip(x.tokens, x.attention_mask)])
    expected = (raw.detach() - 0.3) / 0.02
    assert (expected.abs() > 5).any(), "some must reach the clip"
    torch.testing.assert_close(x.scores, expected.clamp(-5, 5), atol=1e-3, rtol=0)


def test_an_answer_without_eos_loses_exactly_the_penalty(trainer):
    """
    After the clip, and before the KL (here 0) is added: the last token's return is the clipped score less the penalty.
    """
    trainer.models.eos_token_ids = list(range(0, 1000, 20))
    trainer.args.reward_clip, trainer.args.missing_eos_penalty = 0.001, 0.7
    x = trainer.generate_experience(ragged_prompts(trainer, lengths=(1, 3, 7, 4, 2, 5, 6, 3)))
    last = x.mask.sum(1).long() - 1
    ended = torch.isin(x.tokens[:, -x.mask.size(1):].gather(1, last[:, None]).squeeze(1),
                       torch.tensor(trainer.models.eos_token_ids))
    assert 0 < ended.sum() < 8 and (x.scores.abs() == 0.001).any()
    torch.testing.assert_close(x.returns.gather(1, last[:, None]).squeeze(1), x.scores - 0.7 * (~ended).float(),
                               atol=1e-4, rtol=0)


def test_only_actor_and_critic_are_trained_and_each_rollout_is_another(trainer):
    engine = trainer.models
    before = {name: {key: value.clone() for key, value in model.state_dict().items()}
              for name, model in (("ref", engine.ref), ("reward", engine.reward_model), ("actor", engine.actor.module))}
    prompts = ragged_prompts(trainer)
    first = trainer.generate_experience(prompts)
    again = trainer.generate_experience(prompts)
    # another seed each time
    assert first.tokens.shape != again.tokens.shape or not torch.equal(first.tokens, again.tokens)
    trainer.train_rlhf(again)
    for name, model in (("ref", engine.ref), ("reward", engine.reward_model)):
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, before["actor"][key]) for key, value in engine.actor.module.state_dict().items())


def test_answers_of_one_token_train(trainer):
    trainer.models.eos_token_ids = list(range(len(trainer.models.tokenizer)))  # whatever is sampled ends the answer
    x = trainer.generate_experience(ragged_prompts(trainer, lengths=(1, 1, 1, 1)))
    assert x.mask.tolist() == [[1.0]] * 4
    assert torch.isfinite(torch.tensor(trainer.train_rlhf(x))).all()
