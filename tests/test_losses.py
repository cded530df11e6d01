"""
The maths of the three stages against numbers worked by hand, float64 or plain PyTorch; then the gradient of a whole
step through DeepSpeed, which must not depend on how its rows are dealt to micro-batches or padded.
"""

import copy
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import step3_ppo
from data import Collator, MicroBatches, longest_sequence, make_dataloader, pad
from hybrid_engine import train_engine, train_step
from support.flags import UsageError
from support.models import LanguageModel, RewardModel, last_token
from support.processes import device
from step1_sft import Config as SFTConfig
from step1_sft import batch_loss, perplexity, sft_loss, trained_tokens
from step2_reward import Config as RewardConfig
from step2_reward import calibration_error, evaluate, one_row_a_pair, pair_scores, reward_loss
from step3_ppo import (DeepSpeedPPOTrainer, Experience, adapt_kl_coef, critic_loss, gae,
                       shape_rewards, whiten)
from step3_ppo import ppo_actor_loss as actor_loss

pytestmark = pytest.mark.usefixtures("settings")  # whiten and the evaluations sum over a process group


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def ragged(B=6, R=9, seed=0):
    """A (B, R) mask with responses of 1, R and other lengths, and a function that draws (B, R) numbers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, R + 1, (B,), generator=generator)
    lengths[:2] = torch.tensor([1, R])
    return (torch.arange(R) < lengths[:, None]).float(), lambda: torch.randn(B, R, generator=generator)


# -----------------------------------------------------------------------------
# step 1

def test_sft_loss_by_hand():
    """
    Row 1: prompt of 2, answer of 2; row 2: prompt of 1, answer of 1, 2 padding. The first token is never predicted.
    """
    logprobs = tensor([-1, -2, -4], [-8, -16, -32])
    mask = tensor([0, 0, 1, 1], [0, 1, 0, 0])
    assert sft_loss(logprobs, mask[:, 1:]) == 2 + 4 + 8
    assert sft_loss(logprobs, tensor([1, 1, 1], [1, 0, 0])) == 1 + 2 + 4 + 8  # --train_on_prompt
    assert trained_tokens([{"loss_mask": mask}, {"loss_mask": mask}]) == 6


ROWS = [([5, 9, 7, 20, 31, 2], 3), ([40, 8, 2], 1), ([6, 11, 12, 13, 14, 15, 16, 2], 7),
        ([90, 91, 92, 93, 2], 2)]  # ids, length of the prompt


def sft_items(rows=ROWS):
    return [{"input_ids": torch.tensor(ids).int().numpy(), "prompt_len": n} for ids, n in rows]


def row_nats(model, ids, start):
    """-sum log p(ids[t] | ids[:t]) for t >= start, of one row by itself through the Hugging Face model."""
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logits[t - 1, ids[t]] for t in range(start, len(ids)))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_perplexity_is_per_token(make_model, family):
    """Batches of one row and three: a mean of their means would be another number."""
    model = make_model(family)
    nats = sum(row_nats(model.double(), ids, n) for ids, n in ROWS) / sum(len(ids) - n for ids, n in ROWS)
    collate, items = Collator(1, pad_token_id=2), sft_items()  # pad == EOS: the mask comes from lengths
    found = perplexity(LanguageModel(model.float()).to(device()), [collate(items[:1]), collate(items[1:])])
    assert found == pytest.approx(nats.exp().item(), rel=1e-5)


# -----------------------------------------------------------------------------
# step 2

def test_reward_loss_by_hand():
    """-log sigmoid(d): log 2 at d = 0, log(1 + e^-1) at 1, 1 + log(1 + e^-1) at -1; linear, not infinite, far out."""
    assert reward_loss(tensor(3.0), tensor(3.0)) == pytest.approx(math.log(2))
    assert reward_loss(tensor(2.0, 1.0), tensor(1.0, 2.0)) == pytest.approx(1 + 2 * math.log1p(math.exp(-1)))
    assert reward_loss(tensor(-1000.0), tensor(1000.0)) == 2000 and reward_loss(tensor(1000.0), tensor(-1000.0)) == 0


def test_reward_gradient_is_a_sigmoid():
    chosen, rejected = tensor(0.3, -2.0).requires_grad_(), tensor(1.0, 4.0).requires_grad_()
    reward_loss(chosen, rejected).backward()
    expected = -torch.sigmoid(rejected - chosen)
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_last_token_wherever_the_padding_is():
    values = tensor([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    assert last_token(values, mask).tolist() == [4, 2, 4, 3]
    assert last_token(values, torch.tensor([[1, 0, 0, 0]] * 4)).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [3, 2])  # 2 is EOS
def test_scores_are_those_of_the_row_alone(make_model, family, side, pad_id):
    """
    Under any padding and batch: what AutoModelForSequenceClassification says of the row by itself. Each answer has a
    row of its own.
    """
    hf = make_model(family, "score")
    model = RewardModel(hf)
    model.takes_any_mask = False
    rows = [ids for ids, _ in ROWS]
    ids, mask = pad(rows, pad_id, side)
    batch = {"input_ids": torch.cat([ids, ids.flip(0)]), "attention_mask": torch.cat([mask, mask.flip(0)])}
    with torch.no_grad():
        chosen, rejected = pair_scores(model, batch)
        alone = torch.cat([hf(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(chosen, alone, atol=2e-6, rtol=0)
    torch.testing.assert_close(rejected, alone.flip(0), atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_prompt_that_is_computed_once_gives_the_scores_of_the_row_alone(make_model, family):
    """Answers of 1 to 9 tokens, the longer one chosen or rejected; the last two begin alike, and have no prompt."""
    hf = make_model(family, "score")
    prompts = [[5, 9, 7], [40], [6, 11, 12, 13, 14], []]
    answers = [([20, 31, 2], [2]), ([2], [41, 42, 43, 44, 45, 46, 47, 48, 2]), ([8, 2], [8, 9]), ([50, 51, 2], [50, 2])]
    array = lambda ids: torch.tensor(ids).int().numpy()
    items = [{"chosen": array(prompt + better), "rejected": array(prompt + worse), "prompt_len": len(prompt)}
             for prompt, (better, worse) in zip(prompts, answers)]
    batch = Collator(2, pad_token_id=2)(items)
    model = RewardModel(hf)
    assert model.takes_any_mask and one_row_a_pair(batch)[0].shape[0] == 4
    with torch.no_grad():
        found = pair_scores(model, batch)
        alone = [hf(torch.tensor([item[name]])).logits[0] for name in ("chosen", "rejected") for item in items]
    torch.testing.assert_close(torch.cat(found), torch.cat(alone), atol=2e-6, rtol=0)


def test_evaluation_of_pairs_by_hand():
    """Scores and lengths are given; 3 pairs in batches of 1 and 2: right, wrong, tied."""
    def batch(lengths, *scores):
        return {"loss_mask": (torch.arange(9) < torch.tensor(lengths)[:, None]).float(),
                "scores": tensor(*scores).to(device())}

    batches = [batch([4, 2], 2.0, 1.0), batch([1, 9, 1, 5], 0.0, 3.0, 1.0, 3.0)]
    held = evaluate(lambda batch: batch["scores"].chunk(2), batches)
    scores, lengths = torch.tensor([[2, 1, 0, 3, 1, 3], [4, 2, 1, 9, 1, 5]], dtype=torch.float64)
    centred = scores - scores.mean(), lengths - lengths.mean()
    correlation = (centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm())
    certainty = 1 / (1 + math.exp(-1))  # right by 1 and wrong by 1 share a bin, the tie has its own
    assert held == pytest.approx({"accuracy": 0.5, "loss": (2 * math.log1p(math.exp(-1)) + 1 + math.log(2)) / 3,
                                  "calibration_error": 2 * (certainty - 0.5) / 3,
                                  "length_correlation": correlation.item(),
                                  "score_mean": scores.mean().item(), "score_std": scores.std(correction=0).item()})


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_evaluation_of_broken_scores_is_a_sentence(broken):
    batch = {"loss_mask": torch.ones(2, 3), "scores": tensor(broken, 1.0).to(device())}
    with pytest.raises(UsageError, match="held-out pairs: .* no finite number"):
        evaluate(lambda batch: batch["scores"].chunk(2), [batch])


def test_calibration_error_by_hand():
    """
    Margins drawn so that sigmoid(margin) is the chance of being right have none; margins three times as large are sure
    of too much.
    """
    sure = torch.tensor([100.0, 100.0, 100.0, -100.0])
    assert calibration_error(sure) == pytest.approx(0.25)  # certain, and right in 3 of 4
    assert calibration_error(torch.tensor([100.0, 0.0, 0.0])) == 0  # certain and right; half certain and tied
    generator = torch.Generator().manual_seed(0)
    margins = 3 * torch.rand(100_000, generator=generator)
    signs = (torch.rand(100_000, generator=generator) < torch.sigmoid(margins)).double() * 2 - 1
    assert calibration_error(margins * signs) < 0.01
    overconfident = (torch.sigmoid(3 * margins) - torch.sigmoid(margins)).mean().item()  # the same sign in every bin
    assert calibration_error(3 * margins * signs) == pytest.approx(overconfident, abs=0.01)


# -----------------------------------------------------------------------------
# step 3

def test_score_stands_on_the_last_response_token():
    mask, draw = ragged()
    scores = draw()[:, 0]
    rewards = shape_rewards(scores, draw(), draw(), mask, kl_coef=0.0)
    last = mask.sum(1).long() - 1
    assert rewards.nonzero().tolist() == [[row, column] for row, column in enumerate(last.tolist())]
    torch.testing.assert_close(rewards.sum(1), scores)


def test_rewards_sum_to_the_score_less_the_kl():
    mask, draw = ragged()
    scores, logprobs, ref_logprobs = draw()[:, 0], draw(), draw()
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.3)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * ((logprobs - ref_logprobs) * mask).sum(1))
    assert (rewards * (1 - mask)).abs().max() == 0
    by_hand = shape_rewards(tensor(5.0), tensor([-1.0, -2.0, -9.0]), tensor([-2.0, -1.0, 0.0]),
                            tensor([1.0, 1.0, 0.0]), kl_coef=0.5)
    assert by_hand.tolist() == [[-0.5, 0.5 + 5.0, 0.0]]  # signed: a token less likely than under the reference earns


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.97, 1.0), (0.8, 0.0), (0.731, 0.642)])
def test_gae_is_the_sum_it_is_defined_by(gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, in O(T^2) and float64, a row at a time without padding."""
    mask, draw = ragged()
    rewards, values = draw() * mask, draw()  # values stand on the padding too, and must not matter
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(mask.sum(1).int().tolist()):
        r, v = rewards[row, :length].double().tolist(), values[row, :length].double().tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected = [sum((gamma * lam)**(k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert returns[row, :length].tolist() == pytest.approx([a + b for a, b in zip(expected, v)], abs=1e-5)
    assert (advantages * (1 - mask)).abs().max() == (returns * (1 - mask)).abs().max() == 0


def test_gae_without_values_or_discount_is_the_reward_to_go():
    mask, draw = ragged()
    rewards = (8 * draw()).round() * mask  # whole numbers: exact
    advantages, returns = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    assert torch.equal(advantages, rewards.flip(1).cumsum(1).flip(1) * mask) and torch.equal(returns, advantages)


def test_nothing_after_eos_matters():
    mask, draw = ragged()
    rewards, values, noise = draw() * mask, draw(), 100 * draw() * (1 - mask)
    for a, b in zip(gae(rewards, values, mask, 0.9, 0.8), gae(rewards, values + noise, mask, 0.9, 0.8)):
        assert torch.equal(a, b)
    wider = lambda x: F.pad(x, (0, 3))
    for a, b in zip(gae(rewards, values, mask, 0.9, 0.8), gae(*map(wider, (rewards, values, mask)), 0.9, 0.8)):
        assert torch.equal(wider(a), b)


def test_whitened_advantages():
    mask, draw = ragged()
    values = 3 * draw() + 7
    whitened = whiten(values * mask, mask)
    inside = whitened[mask.bool()].double()
    assert (inside.mean().item() == pytest.approx(0, abs=1e-5)
            and inside.var(correction=0).item() == pytest.approx(1, abs=1e-5))
    assert (whitened * (1 - mask)).abs().max() == 0
    torch.testing.assert_close(whiten(F.pad(values, (0, 1), value=99.0), F.pad(mask, (0, 1))), F.pad(whitened, (0, 1)))
    torch.testing.assert_close(whiten(values[mask.bool()][None].flip(1), torch.ones(1, int(mask.sum()))).flip(1)[0],
                               whitened[mask.bool()])


def test_whitening_keeps_its_digits_far_from_zero():
    """
    Mean 1000, deviation 1: in float32 the mean of the squares less the square of the mean would keep one digit of it.
    """
    values, mask = 1000 + torch.randn(64, 41, generator=torch.Generator().manual_seed(0)), torch.ones(64, 41)
    exact = (values.double() - values.double().mean()) / values.double().std(correction=0)
    torch.testing.assert_close(whiten(values, mask).double(), exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 77.77, 1234.567, 1e5 / 3])
def test_whitening_what_does_not_vary(value):
    """
    The variance is 0 but for rounding, which must not make its root complex, infinite or NaN: sums of squares need
    float64.
    """
    generator = torch.Generator().manual_seed(0)
    whitened = whiten(value * (1 + 1e-7 * torch.randn(64, 41, generator=generator)), torch.ones(64, 41))
    assert whitened.dtype == torch.float32 and whitened.isfinite().all()


def token_gradient(loss, point, *arguments):
    point = point.clone().requires_grad_()
    loss(point, *arguments)[0].backward()
    return point.grad


def test_actor_loss_by_hand():
    """
    Ratios 1.5, 0.5 and 1.1 with eps 0.2: -A min(...) picks the clip where the advantage would still pull further away.
    """
    old, mask = torch.zeros(1, 6), torch.ones(1, 6)
    logprobs = tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.1]).log()
    advantages = tensor([2, -2, 2, -2, 2, -2])
    loss, clipped, approx_kl = actor_loss(logprobs, old, advantages, mask, 0.2)
    assert (loss.item() == pytest.approx(-2 * 1.2 + 2 * 1.5 - 2 * 0.5 + 2 * 0.8 - 2 * 1.1 + 2 * 1.1, abs=1e-6)
            and clipped == 2)
    # sum of log(ratio)^2 / 2
    assert approx_kl.item() == pytest.approx(math.log(1.5)**2 + math.log(0.5)**2 + math.log(1.1)**2, rel=1e-5)
    gradient = token_gradient(actor_loss, logprobs, old, advantages, mask, 0.2)[0]
    assert gradient.tolist() == pytest.approx([0, 2 * 1.5, -2 * 0.5, 0, -2 * 1.1, 2 * 1.1], abs=1e-6)


def test_actor_loss_counts_only_the_mask():
    mask, draw = ragged()
    logprobs, old, advantages = draw(), draw(), draw()
    loss, clipped, approx_kl = actor_loss(logprobs, old, advantages, mask, 0.2)
    inside = [x[mask.bool()][None] for x in (logprobs, old, advantages, mask)]
    assert (loss.item() == pytest.approx(actor_loss(*inside, 0.2)[0].item(), rel=1e-5)
            and clipped == actor_loss(*inside, 0.2)[1])


def test_first_update_is_the_policy_gradient():
    """At ratio 1 the gradient is -A, and nothing is clipped."""
    mask, draw = ragged()
    logprobs, advantages = draw(), draw()
    torch.testing.assert_close(token_gradient(actor_loss, logprobs, logprobs, advantages, mask, 0.2),
                               -advantages * mask)
    assert actor_loss(logprobs, logprobs, advantages, mask, 0.2)[1] == 0


@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1e30])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_one_stray_token_leaves_the_loss_finite(log_ratio, advantage):
    arguments = tensor([log_ratio]), tensor([0.0]), tensor([advantage]), tensor([1.0]), 0.2
    assert actor_loss(*arguments)[0].isfinite() and token_gradient(actor_loss, *arguments).isfinite().all()


def test_critic_loss_by_hand():
    """
    old value 0, eps 0.5. (value, target): inside the clip; past it, towards the target; past it, away; past it, target
    between.
    """
    values, returns = tensor([0.3, 2.0, -2.0, 2.0]), tensor([1.0, 3.0, 1.0, 1.0])
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    squares = [0.7**2, 2.5**2, 3.0**2, 1.0**2]  # max of (v - G)^2 and (clip - G)^2: 0.49|0.49, 1|6.25, 9|2.25, 1|0.25
    loss, clipped = critic_loss(values, old, returns, mask, 0.5)
    assert loss.item() == pytest.approx(0.5 * sum(squares)) and clipped == 1
    gradient = token_gradient(critic_loss, values, old, returns, mask, 0.5)[0]
    assert gradient.tolist() == pytest.approx([-0.7, 0, -3.0, 1.0], abs=1e-6)
    assert critic_loss(values, old, returns, tensor([1, 0, 0, 0]), 0.5)[0].item() == pytest.approx(0.5 * 0.49)


def test_kl_controller_by_hand():
    """
    beta (1 + clip(KL / target - 1, +-0.2) n / horizon): KL 12 of 6 is 20% at most, 6.6 is 10%, 3 is -20%, 6 is none.
    """
    beta = 0.1
    for kl, factor in ((12, 1 + 0.2 * 64 / 1000), (6.6, 1 + 0.1 * 64 / 1000), (3, 1 - 0.2 * 64 / 1000), (6, 1.0)):
        before, beta = beta, adapt_kl_coef(beta, kl, 6, 64, horizon=1000)
        assert beta == pytest.approx(before * factor, rel=1e-9)
    assert beta == pytest.approx(0.1 * 1.0128 * 1.0064 * 0.9872)


# -----------------------------------------------------------------------------
# a whole step: the same weights however the rows are dealt

LR, SPLITS = 3e-4, [(4, 1), (2, 2), (1, 4)]  # rows in a micro-batch, micro-batches


def step_settings(settings, rows, parts):
    return {**settings, "train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": parts,
            "train_batch_size": rows * parts}


def make_engine(wrapper, model, settings, rows, parts, config_class=SFTConfig):
    config = config_class(per_device_train_batch_size=rows, gradient_accumulation_steps=parts)
    return train_engine(wrapper(copy.deepcopy(model)), step_settings(settings, rows, parts), config, LR, 10)


def weights(engine):
    return {name: p.detach().cpu().clone() for name, p in engine.module.model.named_parameters()}


def plain_step(model, mean_loss):
    """(weights, loss, gradient norm) after one step of plain PyTorch in float64: clipped to norm 1, then AdamW."""
    model = copy.deepcopy(model).double()
    loss = mean_loss(model)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0).step()
    return {name: p.detach().float() for name, p in model.named_parameters()}, loss.item(), norm.item()


def assert_same_step(found, expected):
    for (found_weights, *numbers), (expected_weights, *expected_numbers) in [(found, expected)]:
        assert numbers == pytest.approx(expected_numbers, rel=2e-5)
        assert found_weights.keys() == expected_weights.keys()
        for name, weight in found_weights.items():
            torch.testing.assert_close(weight, expected_weights[name], atol=1e-6, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_sft_step_is_the_same_in_any_micro_batches(make_model, settings, family):
    model = make_model(family)
    trained = sum(len(ids) - n for ids, n in ROWS)
    expected = plain_step(model, lambda m: sum(row_nats(m, ids, n) for ids, n in ROWS) / trained)
    for rows, parts in SPLITS:
        engine = make_engine(LanguageModel, model, settings, rows, parts)
        batches = MicroBatches(Collator(1, pad_token_id=3), parts)(sft_items())
        loss, norm = train_step(engine, batches, lambda batch: batch_loss(engine, batch), trained_tokens(batches))
        assert_same_step((weights(engine), loss, norm), expected)


def test_padded_step_is_the_trimmed_one(make_model, settings):
    model, collate = make_model("opt"), Collator(1, pad_token_id=2)
    expected = plain_step(model, lambda m: sum(row_nats(m, ids, n) for ids, n in ROWS) / 15)
    batch = {name: F.pad(value, (0, 20), value=2 if name == "input_ids" else 0)
             for name, value in collate(sft_items()).items()}
    engine = make_engine(LanguageModel, model, settings, 4, 1)
    loss, norm = train_step(engine, [batch], lambda batch: batch_loss(engine, batch), 15)
    assert_same_step((weights(engine), loss, norm), expected)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_reward_step_is_the_same_in_any_micro_batches(make_model, settings, family):
    model = make_model(family, "score")
    answers = [([7, 8, 2], [7, 9, 10, 11, 2]), ([5, 2], [5, 6, 2]), ([30, 31, 32, 33, 34, 2], [30, 2]),
               ([4, 4, 2], [4, 2])]
    score = lambda m, ids: m(torch.tensor([ids])).logits[0, 0]  # Hugging Face reads the last token that is not padding
    expected = plain_step(model, lambda m: -sum(F.logsigmoid(score(m, a) - score(m, b)) for a, b in answers) / 4)
    items = [{key: torch.tensor(ids).int().numpy() for key, ids in zip(("chosen", "rejected"), pair)}
             | {"prompt_len": 1} for pair in answers]
    for rows, parts in SPLITS:
        engine = make_engine(RewardModel, model, settings, rows, parts, RewardConfig)
        batches = MicroBatches(Collator(2, pad_token_id=3), parts)(items)
        loss, norm = train_step(engine, batches, lambda batch: reward_loss(*pair_scores(engine, batch)), 4)
        assert_same_step((weights(engine), loss, norm), expected)


def loss_and_gradients(model, batches, loss_sum, count):
    """Of a whole step: loss per `count`, gradients by name."""
    model.zero_grad()
    losses = [loss_sum(batch) / count for batch in batches]
    sum(losses).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return sum(losses).item(), gradients


@pytest.mark.parametrize("stage", [1, 2])
def test_steps_by_length_teach_what_the_same_rows_do_when_all_are_padded(make_model, stage):
    """
    Steps of 8 rows as the loader deals them, in micro-batches of similar length, against the same
    rows in one batch that is padded to 96 tokens.
    """
    generator = np.random.RandomState(0)
    items = []
    for length in generator.randint(3, 90, 40):
        ids = [generator.randint(4, 900, length + more).astype(np.int32) for more in (0, 5)]
        names = ["input_ids"] if stage == 1 else ["chosen", "rejected"]
        items.append({**dict(zip(names, ids)), "prompt_len": 2})
    lengths = np.array([longest_sequence(item) for item in items])
    collate = Collator(stage, pad_token_id=3)
    loader = make_dataloader(items, MicroBatches(collate, 4), 8, seed=0, lengths=lengths, parts=4,
                             window=4)
    if stage == 1:
        model = LanguageModel(make_model("opt"))
        loss_sum = lambda batch: batch_loss(model, batch)
        count = trained_tokens
    else:
        model = RewardModel(make_model("opt", "score"))
        loss_sum = lambda batch: reward_loss(*pair_scores(model, batch))
        count = lambda batches: 8

    for rows, batches in zip(loader.batch_sampler, loader, strict=True):
        padded = collate([items[row] for row in rows])
        extra = 96 - padded["input_ids"].size(1)
        for name in ("input_ids", "attention_mask", "loss_mask"):
            padded[name] = F.pad(padded[name], (0, extra), value=3 if name == "input_ids" else 0)
        assert sum(batch["input_ids"].numel() for batch in batches) < padded["input_ids"].numel()
        assert count(batches) == count([padded])
        loss, gradients = loss_and_gradients(model, batches, loss_sum, count(batches))
        expected_loss, expected = loss_and_gradients(model, [padded], loss_sum, count([padded]))
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=0)
        assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2


def make_experience(left=0, right=0):
    """
    4 ragged responses to ragged prompts, with old log-probabilities and values some way off; `left`, `right`: columns
    of padding more.
    """
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([[3, 4], [1, 6], [5, 1], [2, 3]])  # (prompt, response)
    P, R = lengths.amax(0).tolist()
    tokens = torch.randint(4, 1000, (4, P + R), generator=generator)
    mask = (torch.arange(R) < lengths[:, 1:]).float()
    attention_mask = torch.cat([(torch.arange(P) >= P - lengths[:, :1]).long(), mask.long()], 1)
    old = {name: torch.randn(4, R, generator=generator) for name in ("logprobs", "values", "advantages", "returns")}
    old["logprobs"] = old["logprobs"] * 0.2 - 7  # near log(1 / 1000): some ratios are clipped, others not
    wide = lambda x: F.pad(x, (0, right))
    return Experience(F.pad(tokens, (left, right)), F.pad(attention_mask, (left, right)), wide(mask),
                      ref_logprobs=wide(old["logprobs"]), scores=torch.zeros(4), rewards=wide(0 * mask),
                      **{name: wide(value * mask) for name, value in old.items()})


def ppo_losses(actor, critic, x, args):
    """
    (mean actor loss, mean critic loss) a row at a time, without padding, by the formulas of step3_ppo's docstring.
    """
    sums = [0.0, 0.0]
    for tokens, real, mask, old, v_old, A, G in zip(x.tokens, x.attention_mask, x.mask, x.logprobs, x.values,
                                                    x.advantages, x.returns):
        ids, n = tokens[real.bool()], int(mask.sum())
        at = torch.arange(len(ids) - n, len(ids))
        logp = (actor(ids[None]).logits[0] / args.temperature).log_softmax(-1)[at - 1, ids[at]]
        V = critic.score(critic.model(ids[None])[0])[0, at - 1, 0]
        old, v_old, A, G = (y[:n].double() for y in (old, v_old, A, G))
        ratio = (logp - old).exp()
        sums[0] -= torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A).sum()
        sums[1] += 0.5 * torch.maximum((V - G)**2, (v_old + (V - v_old).clamp(-0.2, 0.2) - G)**2).sum()
    return sums[0] / x.mask.sum(), sums[1] / x.mask.sum()


def make_trainer(actor, critic, settings, rows, parts, **flags):
    args = step3_ppo.Config(per_device_train_batch_size=rows, gradient_accumulation_steps=parts, temperature=0.7,
                            **flags)
    engine = types.SimpleNamespace(actor=make_engine(LanguageModel, actor, settings, rows, parts), ema=None,
                                   critic=make_engine(RewardModel, critic, settings, rows, parts))
    trainer = DeepSpeedPPOTrainer(engine, args)
    trainer.metrics = {"time/generate": 1.0, "time/score": 1.0, "objective/kl": 0.0}
    return trainer


def to(device, x):
    return Experience(**{name: value.to(device) for name, value in vars(x).items()})


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_ppo_step_is_the_same_in_any_micro_batches_and_padding(make_model, settings, family):
    actor, critic, x = make_model(family), make_model(family, "score", seed=1), make_experience()
    args = step3_ppo.Config(temperature=0.7)
    expected = [plain_step(actor, lambda m: ppo_losses(m, copy.deepcopy(critic).double(), x, args)[0]),
                plain_step(critic, lambda m: ppo_losses(copy.deepcopy(actor).double(), m, x, args)[1])]
    metrics = []
    for rows, parts, padding in [(*split, {}) for split in SPLITS] + [(2, 2, {"left": 3, "right": 5})]:
        trainer = make_trainer(actor, critic, settings, rows, parts)
        actor_mean, critic_mean = trainer.train_rlhf(to(device(), make_experience(**padding)))
        assert_same_step((weights(trainer.models.actor), actor_mean, trainer.metrics["ppo/policy/grad_norm"]),
                         expected[0])
        assert_same_step((weights(trainer.models.critic), critic_mean, trainer.metrics["ppo/val/grad_norm"]),
                         expected[1])
        metrics.append([trainer.metrics[name] for name in sorted(trainer.metrics) if name.startswith("ppo/")])
    assert all(numbers == pytest.approx(metrics[0], rel=1e-4) for numbers in metrics), (
        "metrics divide by what was really counted")
    assert 0 < trainer.metrics["ppo/policy/clipfrac"] < 1 and 0 < trainer.metrics["ppo/val/clipfrac"] < 1, (
        "the example has both kinds of token")


def test_ptx_gradient_is_added(make_model, settings):
    """
    One step of PPO and text together, in any micro-batches: grad(ppo) + c grad(ptx), each a mean over its own tokens.
    """
    actor, critic, x = make_model("opt"), make_model("opt", "score", seed=1), make_experience()
    args, c = step3_ppo.Config(temperature=0.7), 3.0
    nats = lambda m: sum(row_nats(m, ids, 1) for ids, _ in ROWS) / sum(len(ids) - 1 for ids, _ in ROWS)
    expected = plain_step(actor, lambda m: ppo_losses(m, copy.deepcopy(critic).double(), x, args)[0] + c * nats(m))
    with torch.no_grad():
        ptx = nats(copy.deepcopy(actor).double()).item()
    for rows, parts in SPLITS:
        trainer = make_trainer(actor, critic, settings, rows, parts, unsup_coef=c)
        texts = MicroBatches(Collator(1, pad_token_id=3), parts)([{**item, "prompt_len": 0} for item in sft_items()])
        loss, _ = trainer.train_rlhf(to(device(), x), iter([texts]))
        assert_same_step((weights(trainer.models.actor), loss, trainer.metrics["ppo/policy/grad_norm"]), expected)
        assert trainer.metrics["ppo/loss/ptx"] == pytest.approx(ptx, rel=1e-5)
        assert trainer.metrics["ppo/loss/policy"] == pytest.approx(loss - c * ptx, abs=1e-4)


@pytest.mark.parametrize("rows, parts, epochs, steps", [(4, 1, 1, 1), (2, 1, 1, 2), (1, 2, 3, 6), (1, 4, 2, 2)])
def test_optimizer_steps_are_epochs_times_minibatches(make_model, settings, rows, parts, epochs, steps):
    trainer = make_trainer(make_model("opt"), make_model("opt", "score"), settings, rows, parts, ppo_epochs=epochs)
    trainer.train_rlhf(to(device(), make_experience()))
    assert trainer.models.actor.global_steps == trainer.models.critic.global_steps == steps


def test_a_policy_that_has_not_moved_has_ratio_one(make_model, settings):
    """With old log-probabilities from the very forward that trains, for any split: ratio 1, KL 0, nothing clipped."""
    for rows, parts in SPLITS:
        trainer, x = (make_trainer(make_model("opt"), make_model("opt", "score"), settings, rows, parts),
                      to(device(), make_experience(left=2)))
        with torch.no_grad():
            x.logprobs = trainer.models.actor(x.tokens, x.attention_mask, x.mask, 0.7)[0]
        trainer.train_rlhf(x)
        numbers = [trainer.metrics[f"ppo/policy/{name}"] for name in ("ratio", "approxkl", "clipfrac")]
        assert numbers == pytest.approx([1, 0, 0], abs=1e-5)


def test_weight_decay_spares_biases_and_norms(make_model, settings):
    config = SFTConfig(per_device_train_batch_size=4, weight_decay=0.5)
    engine = train_engine(LanguageModel(make_model("opt")), step_settings(settings, 4, 1), config, LR, 10)
    decay = {id(p): group["weight_decay"] for group in engine.optimizer.param_groups for p in group["params"]}
    assert (all(decay[id(p)] == (0.5 if p.ndim >= 2 else 0) for p in engine.module.parameters())
            and len(decay) == len(list(engine.module.parameters())))


def test_schedule_counts_optimizer_steps_and_ends_at_its_end(make_model, settings):
    """Linear from LR to 0 over 4 optimizer steps of 2 micro-batches, warm-up of 2: LR/2, LR, LR, LR/2, then 0."""
    config = SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2, lr_scheduler_type="linear",
                       num_warmup_steps=2)
    engine = train_engine(LanguageModel(make_model("opt")), step_settings(settings, 2, 2), config, LR, 4)
    batches, rates = MicroBatches(Collator(1, pad_token_id=3), 2)(sft_items()), []
    for _ in range(4):
        rates.append(engine.get_lr()[0])
        train_step(engine, batches, lambda batch: batch_loss(engine, batch), 15)
    assert rates + [engine.get_lr()[0]] == pytest.approx([0, LR / 2, LR, LR / 2, 0])
