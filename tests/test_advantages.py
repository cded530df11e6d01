"""
The advantages without a critic: each against numbers worked by hand or float64, and what becomes of them in a rollout
of several answers a prompt and in the actor's step.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch

import step3_ppo
from conftest import ROOT
from data import load_tokenizer
from support.flags import UsageError
from support.processes import device
from step3_ppo import Config
from step3_ppo import DeepSpeedPPOTrainer, DeepSpeedRLHFEngine, grpo, kl_loss_k3, reinforce, rloo
from test_losses import (assert_same_step, make_experience, make_trainer, plain_step, ppo_losses, ragged, tensor, to,
                         weights)
from test_ppo import ragged_prompts, small_models

pytestmark = pytest.mark.usefixtures("settings")


# -----------------------------------------------------------------------------
# the formulas

@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_is_the_return_to_go(gamma):
    mask, draw = ragged()
    rewards = draw() * mask
    exact = torch.zeros(rewards.shape, dtype=torch.float64)
    for t in range(rewards.size(1)):
        for k in range(t, rewards.size(1)):
            exact[:, t] += gamma ** (k - t) * rewards[:, k].double()
    torch.testing.assert_close(reinforce(rewards, mask, gamma).double(), exact * mask, atol=1e-5, rtol=0)


def test_rloo_by_hand():
    """
    Two prompts, three responses each. The first earned 1 + 2, 0 and 6: minus the means of the others, 3, 4.5 and 1.5.
    """
    rewards = tensor([1, 2], [0, 0], [6, 0], [5, 0], [0, 5], [5, 0])
    assert rloo(rewards, 3).tolist() == [[0.0], [-4.5], [4.5], [0.0], [0.0], [0.0]]
    assert rloo(rewards, 2).tolist() == [[3.0], [-3.0], [1.0], [-1.0], [0.0], [0.0]]


def test_grpo_by_hand():
    """Scores 1, 2, 3 have mean 2 and deviation 1; three equal ones say nothing; the scale of the scores cancels."""
    scores = tensor(1, 2, 3, 7, 7, 7)
    expected = tensor([-1.0], [0.0], [1.0], [0.0], [0.0], [0.0])
    torch.testing.assert_close(grpo(scores, 3), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(grpo(100 * scores + 5, 3), expected, atol=2e-4, rtol=0)


def test_kl_loss_k3_is_the_kl_in_expectation():
    """Over a distribution, pi k3 sums to sum pi log(pi / ref): k3 is unbiased, and no summand is negative."""
    torch.manual_seed(0)
    pi, ref = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    summands = torch.stack([kl_loss_k3(p[None], q[None], torch.ones(1, dtype=torch.float64)) for p, q in zip(pi, ref)])
    assert (summands >= 0).all()
    assert (pi.exp() * summands).sum().item() == pytest.approx((pi.exp() * (pi - ref)).sum().item(), rel=1e-9)


def test_kl_penalty_counts_the_mask_and_stays_finite():
    logprobs, ref, mask = tensor([-1, -2, -500]), tensor([-2, -2, 0]), tensor([1, 1, 0])
    assert kl_loss_k3(logprobs, ref, mask).item() == pytest.approx(2.718281828 ** -1 + 1 - 1)
    logprobs.requires_grad_()
    kl_loss_k3(logprobs, ref, mask).backward()  # d k3 / d logp = 1 - exp(d)
    assert logprobs.grad.tolist() == [pytest.approx([1 - 2.718281828 ** -1, 0, 0])]
    assert kl_loss_k3(tensor([-900]), tensor([0]), tensor([1])).isfinite()


# -----------------------------------------------------------------------------
# in a rollout

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return small_models("opt", tmp_path_factory.mktemp("models"), load_tokenizer("tiny"))


def real_trainer(folders, **flags):
    args = Config(**{**dict(per_device_generation_batch_size=4, per_device_train_batch_size=3,
                            gradient_accumulation_steps=2, max_prompt_seq_len=16, max_answer_seq_len=12,
                            actor_learning_rate=1e-3, lr_scheduler_type="constant", kl_coef=0.3), **flags})
    return DeepSpeedPPOTrainer(DeepSpeedRLHFEngine(*folders, load_tokenizer("tiny"), 2, args), args)


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce"])
def test_groups_of_answers_without_a_critic(folders, advantage):
    trainer = real_trainer(folders, advantage=advantage, num_generations=3)
    engine = trainer.models
    prompts = ragged_prompts(trainer)
    engine.eos_token_ids = list(range(0, 700, 3))
    trainer.train_rlhf(trainer.generate_experience(prompts))  # so that the actor is not the reference
    x = trainer.generate_experience(prompts)
    P = prompts["input_ids"].size(1)
    assert len(x.tokens) == 12 and torch.equal(x.tokens[:, :P], prompts["input_ids"].repeat_interleave(3, 0))
    assert torch.equal(x.attention_mask[:, :P], prompts["attention_mask"].repeat_interleave(3, 0))
    answers = x.tokens[:, P:].view(4, 3, -1)
    assert not (answers[:, 0] == answers[:, 1]).all() and x.mask.sum(1).unique().numel() > 1

    kl, scores = ((x.logprobs - x.ref_logprobs) * x.mask).double(), x.scores.double()
    assert kl.abs().max() > 1e-3
    for row in range(12):
        group = slice(row // 3 * 3, row // 3 * 3 + 3)
        earned = scores - 0.3 * kl.sum(1)
        n = int(x.mask[row].sum())
        if advantage == "rloo":
            expected = (1.5 * (earned[row] - earned[group].mean())).expand(n)
        elif advantage == "grpo":
            expected = ((scores[row] - scores[group].mean()) / (scores[group].std() + 1e-4)).expand(n)
        else:
            to_go = [scores[i] - 0.3 * kl[i, t:].sum() for i in range(12) for t in range(int(x.mask[i].sum()))]
            mean, std = torch.stack(to_go).mean(), torch.stack(to_go).std(correction=0)
            expected = torch.stack([(scores[row] - 0.3 * kl[row, t:].sum() - mean) / std for t in range(n)])
        torch.testing.assert_close(x.advantages[row, :n].double(), expected, atol=1e-4, rtol=1e-4)
        assert x.advantages[row, n:].abs().sum() == 0

    steps = engine.actor.global_steps
    actor_loss, critic_loss = trainer.train_rlhf(x)
    assert engine.critic is None and x.values is None and critic_loss == 0 and engine.actor.global_steps == steps + 2
    assert not any("val" in name for name in trainer.metrics) and trainer.metrics["ppo/policy/grad_norm"] > 0


def test_several_answers_with_a_critic(folders):
    trainer = real_trainer(folders, num_generations=3)
    trainer.train_rlhf(trainer.generate_experience(ragged_prompts(trainer)))
    assert trainer.models.critic.global_steps == 2 and trainer.metrics["ppo/policy/ratio"] == pytest.approx(1, abs=0.05)


def test_the_held_out_prompts_are_answered_once(folders):
    from step3_ppo import evaluate
    trainer = real_trainer(folders, advantage="rloo", num_generations=3, max_prompt_seq_len=64)
    batch = ragged_prompts(trainer)
    held = evaluate(trainer, [batch], lambda record, answer: 1.0)
    assert len(held.answers) == 4 and held.numbers["gold"] == 1


def test_grpo_step_has_the_kl_in_its_loss(make_model, settings):
    """Against plain PyTorch in float64: PPO's clipped loss plus kl_coef k3 to the reference, both a token."""
    actor, critic, x = make_model("opt"), make_model("opt", "score", seed=1), make_experience()
    x.ref_logprobs = (x.logprobs + 0.5 * torch.randn(x.mask.shape, generator=torch.Generator().manual_seed(2))) * x.mask
    args = step3_ppo.Config(temperature=0.7)

    def mean_loss(model):
        loss = ppo_losses(model, copy.deepcopy(critic).double(), x, args)[0]
        for tokens, real, mask, ref in zip(x.tokens, x.attention_mask, x.mask, x.ref_logprobs):
            ids, n = tokens[real.bool()], int(mask.sum())
            at = torch.arange(len(ids) - n, len(ids))
            logp = (model(ids[None]).logits[0] / 0.7).log_softmax(-1)[at - 1, ids[at]]
            d = ref[:n].double() - logp
            loss = loss + 0.4 * (d.exp() - d - 1).sum() / x.mask.sum()
        return loss

    expected = plain_step(actor, mean_loss)
    for rows, parts in ((4, 1), (1, 4)):
        trainer = make_trainer(actor, critic, settings, rows, parts, advantage="grpo", num_generations=2, kl_coef=0.4)
        trainer.models.critic = None
        loss, _ = trainer.train_rlhf(to(device(), x))
        assert_same_step((weights(trainer.models.actor), loss, trainer.metrics["ppo/policy/grad_norm"]), expected)


@pytest.mark.parametrize("flags, said", [
    (dict(advantage="rloo"), "--advantage rloo.*--num_generations is 1: 2 or more"),
    (dict(advantage="grpo"), "--advantage grpo.*2 or more"),
    (dict(num_generations=5), "4 x --num_generations 5 must be a multiple of --per_device_train_batch_size 3"),
    (dict(num_generations=0), "--num_generations 0")])
def test_flags_that_do_not_go_together(folders, flags, said):
    with pytest.raises(UsageError, match=said):
        real_trainer(folders, **flags)


def test_a_run_without_a_critic(folders, tmp_path):
    """
    By its flags: a Python reward, groups, evaluations on the way; no critic is saved, no value is logged, and the
    frontier can be read off.
    """
    rows = [{"prompt": f"What is {i}?", "chosen": str(i), "rejected": "Go."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my.py").write_text("def length(prompts, completions, **columns):\n"
                                    "    return [len(c) for c in completions]\n")
    step3_ppo.main(Config(actor_model_name_or_path=folders[0], data_path=[str(tmp_path / "rows.jsonl")],
                          output_dir=str(tmp_path / "output"), reward_fn=[f"{tmp_path / 'my.py'}:length"],
                          advantage="rloo", num_generations=2, per_device_generation_batch_size=4,
                          per_device_train_batch_size=4, max_prompt_seq_len=32, max_answer_seq_len=8, max_steps=4,
                          eval_steps=2, actor_learning_rate=3e-3, lr_scheduler_type="constant",
                          deepspeed_config=str(ROOT / "configs" / "cpu.json")))
    lines = [json.loads(line) for line in (tmp_path / "output/actor/metrics.jsonl").read_text().splitlines()]
    held_lines = [json.loads(line) for line in
                  (tmp_path / "output/actor/evaluations.jsonl").read_text().splitlines()]
    assert ([line["step"] for line in held_lines] == [0, 2, 4]
            and not any("val/" in name for name in lines[0] if name[0] == "p"))
    assert lines[0]["objective/scores"] == lines[0]["objective/scores/length"]
    held = json.loads((tmp_path / "output/summary.json").read_text())["ppo"]
    assert ({"score", "kl", "win_rate"} <= held.keys() and "gold" not in held
            and not (tmp_path / "output/critic").exists())
    for name in ("score", "kl", "win_rate"):
        assert held[name] == pytest.approx(held_lines[2][f"eval/{name}"], abs=1e-4)
    shown = subprocess.run([sys.executable, ROOT / "bench/frontier.py", tmp_path / "output/actor/evaluations.jsonl"],
                           capture_output=True, text=True, check=True)
    last = shown.stdout.split("\n")[-2].split()
    assert last == ["4", f"{held['kl']:.3f}", f"{held['score']:.3f}", "-", f"{held['win_rate']:.3f}"]
