"""
What is handed on: flags to the place that uses them, sums to the metric that divides them, steps to
schedules and seeds, one rank's part to all ranks.

Stand-ins take the models' places in most tests. The numbers that they give are written down below,
so that each result can be worked out row by row in float64. No flag has its default value, and no
two flags have the same value.
"""

import json
import time
import types

import pytest
import torch
import torch.distributed as dist

import step3_ppo
from data import Collator, load_stage_data, load_tokenizer
from hybrid_engine import Rollout, train_engine
from ranks import run_ranks
from step1_sft import Config as SFTConfig
from step1_sft import perplexity
from step2_reward import evaluate as evaluate_pairs
from step3_ppo import (DeepSpeedPPOTrainer, DeepSpeedRLHFEngine, Evaluation, Experience, evaluate,
                       mean_gold)
from support import metrics, models
from support.lora import LoRALinear, add_lora
from support.log import MetricsLog
from support.metrics import Answer, sample_answers, write_summary
from support.models import LanguageModel, save_model
from support.processes import setup
from support.toy import toy_rows
from test_engine import opt
from test_losses import make_experience
from test_ppo_formulas import gae_as_a_sum

pytestmark = pytest.mark.usefixtures("settings")  # sums run over a process group


# -----------------------------------------------------------------------------
# eight answers of at most 4 tokens to prompts of at most 3, and what the models say of them

FLAGS = dict(
    per_device_generation_batch_size=2, num_generations=2, per_device_train_batch_size=1,
    gradient_accumulation_steps=2, max_answer_seq_len=4, temperature=0.8, gamma=0.9, lam=0.7,
    cliprange=0.15, cliprange_value=0.35, ppo_epochs=3, kl_coef=0.3, reward_clip=1.5,
    reward_fn=["model", "mark"], reward_weights=[2.0, -3.0], missing_eos_penalty=0.4, seed=77)

P, R = 3, 4
PROMPT_LENGTHS = torch.tensor([2, 2, 3, 3, 1, 1, 2, 2])
LENGTHS = [4, 2, 1, 3, 3, 4, 2, 1]
WITHOUT_EOS = [0, 5]
EOS_IDS = [2, 5]
FIRST_ID = 100  # a prompt's first token is this plus the row's number, by which stand-ins know it

GENERATOR = torch.Generator().manual_seed(5)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR)


MASK = (torch.arange(R) < torch.tensor(LENGTHS)[:, None]).float()
PROMPT_MASK = torch.arange(P) >= P - PROMPT_LENGTHS[:, None]
REAL = torch.cat([PROMPT_MASK, MASK.bool()], 1).long()
TOKENS = torch.randint(10, 90, (8, P + R), generator=GENERATOR)
FIRST_COLUMNS = P - PROMPT_LENGTHS
TOKENS[range(8), FIRST_COLUMNS] = FIRST_ID + torch.arange(8)
for number, length in enumerate(LENGTHS):
    if number not in WITHOUT_EOS:
        TOKENS[number, P + length - 1] = EOS_IDS[number % 2]

POLICY = draw(8, R) - 3          # log-probabilities at temperature 1
REFERENCE = draw(8, R) - 3
SIGNS = draw(8, R).sign()
SAMPLED = POLICY / 0.8 + 0.25 * SIGNS  # the sampler's, each off by 0.25, behind the end too
VALUES = draw(8, P + R)
SCORES = 2 * draw(8, P + R)      # a reward model's; some are over reward_clip
MARKS = [0.7, 0.7, -1.1, -1.1, 0.2, 0.2, 1.9, 1.9]  # a reward function's: the prompt's record

# an earlier policy, critic and rollout, for the updates
OLD_LOGPROBS = POLICY / 0.8 + 0.2 * draw(8, R)
OLD_VALUES = VALUES[:, P - 1:P - 1 + R] + 0.4 * draw(8, R)
ADVANTAGES = draw(8, R)
RETURNS = OLD_VALUES + draw(8, R)


def rows_of(tokens, attention_mask):
    """-> the numbers of these rows, and the column in which their prompts begin."""
    first = attention_mask.argmax(1)
    return tokens.gather(1, first[:, None]).squeeze(1) - FIRST_ID, first


class Given(torch.nn.Module):
    """
    In the place of a language model (log-probabilities, entropies) or a reward model. Columns that
    all rows pad may be missing from what it is given, and then are from what it gives.
    """

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, attention_mask, mask=None, temperature=1.0):
        rows, first = rows_of(tokens, attention_mask)
        if mask is None:
            left = int((FIRST_COLUMNS[rows] - first)[0])
            return self.numbers[rows, left:left + tokens.size(1)]
        numbers = self.numbers[rows, :mask.size(1)]
        return numbers / temperature * mask, numbers.square() * mask

    def get_lr(self):
        return [0.01]


class GivenAnswers:
    """In the place of the InferenceEngine. Answers begin with the row that the prompt names."""
    memory = {}

    def __init__(self):
        self.calls = []

    def generate(self, input_ids, attention_mask, num_return_sequences, **options):
        self.calls.append({"num_return_sequences": num_return_sequences, **options})
        first, _ = rows_of(input_ids, attention_mask)
        rows = (first[:, None] + torch.arange(num_return_sequences)).flatten()
        return Rollout(TOKENS[rows], SAMPLED[rows], MASK[rows])

    def seeds(self):
        return [call["seed"] for call in self.calls]


def stand_ins(tokenizer, **flags):
    """A trainer of stand-ins, which takes old log-probabilities from the training forward."""
    args = step3_ppo.Config(**{**FLAGS, **flags})
    scorers = {"model": Given(SCORES), "mark": lambda records, answers: torch.tensor(records)}
    engine = types.SimpleNamespace(
        actor=Given(POLICY), ref=Given(REFERENCE), critic=Given(VALUES), scorers=scorers,
        generator=GivenAnswers(), tokenizer=tokenizer, eos_token_ids=EOS_IDS, ema=None)
    if args.advantage != "gae":
        engine.critic = None
    trainer = DeepSpeedPPOTrainer(engine, args)
    trainer.sampler_is_exact = False
    return trainer


def prompts(*rows, weight=None):
    """The prompts of these rows, as data.Collator(3) makes them."""
    rows = list(rows)
    batch = {"input_ids": TOKENS[rows, :P], "attention_mask": REAL[rows, :P],
             "records": [MARKS[row] for row in rows]}
    if weight is not None:
        batch["weight"] = torch.tensor(weight)
    return batch


# -----------------------------------------------------------------------------
# the same by hand, of one row, in float64

def log_ratios(row):
    """(n,) policy over reference, nats, at temperature 0.8."""
    n = LENGTHS[row]
    return (POLICY[row, :n].double() - REFERENCE[row, :n].double()) / 0.8


def model_score(row):
    return SCORES[row, P + LENGTHS[row] - 1].double().clamp(-1.5, 1.5).item()


def score(row):
    return 2 * model_score(row) - 3 * MARKS[row]


def penalty(row):
    return 0.4 if row in WITHOUT_EOS else 0.0


def raw_advantages(row, advantage, kl_coef):
    """-> rewards, advantages before whitening, values: lists of n."""
    n = LENGTHS[row]
    rewards = -kl_coef * log_ratios(row)
    rewards[-1] += score(row) - penalty(row)
    rewards = rewards.tolist()
    values = VALUES[row, P - 1:P - 1 + n].tolist()
    if advantage == "gae":
        return rewards, gae_as_a_sum(rewards, values, n * [1], gamma=0.9, lam=0.7), values
    return rewards, gae_as_a_sum(rewards, n * [0.0], n * [1], gamma=0.9, lam=1.0), values


def check_rollout(trainer, own_rows, all_rows, advantage):
    """A rollout on this rank, which answers own_rows of all_rows."""
    trainer.kl_coef = 0.5  # where the controller has steered it, away from --kl_coef
    x = trainer.generate_experience(prompts(own_rows[0], own_rows[2]))
    everyones = [raw_advantages(row, advantage, 0.5)[1] for row in all_rows]
    everyones = torch.tensor(sum(everyones, []), dtype=torch.float64)
    mean = everyones.mean()
    std = everyones.std(correction=0)
    for place, row in enumerate(own_rows):
        rewards, advantages, values = raw_advantages(row, advantage, 0.5)
        n = LENGTHS[row]
        whitened = (torch.tensor(advantages, dtype=torch.float64) - mean) / std
        assert x.rewards[place, :n].tolist() == pytest.approx(rewards, abs=1e-5)
        assert x.advantages[place, :n].tolist() == pytest.approx(whitened.tolist(), abs=1e-5)
        assert x.advantages[place, n:].abs().sum() == 0
        assert x.scores[place].item() == pytest.approx(score(row), abs=1e-5)
        if advantage == "gae":
            targets = [a + v for a, v in zip(advantages, values)]
            assert x.returns[place, :n].tolist() == pytest.approx(targets, abs=1e-5)

    def mean_over_rows(number_of):
        return sum(float(number_of(row)) for row in all_rows) / len(all_rows)

    tokens = sum(LENGTHS[row] for row in all_rows)
    expected = {
        "objective/kl": mean_over_rows(lambda row: log_ratios(row).sum()),
        "objective/kl_coef": 0.5,
        "objective/scores": mean_over_rows(score),
        "objective/scores/model": mean_over_rows(model_score),
        "objective/scores/mark": mean_over_rows(lambda row: MARKS[row]),
        "objective/rlhf_reward": mean_over_rows(
            lambda row: score(row) - penalty(row) - 0.5 * log_ratios(row).sum()),
        "response/length": tokens / len(all_rows),
        "response/ended": mean_over_rows(lambda row: row not in WITHOUT_EOS),
        "response/logprob_drift": 0.25,
    }
    found = {name: value for name, value in trainer.metrics.items() if "time/" not in name}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


# -----------------------------------------------------------------------------
# a rollout

@pytest.mark.parametrize("advantage", ["gae", "reinforce"])
def test_a_rollout_is_what_it_is_by_hand(tokenizer, advantage):
    """Rewards, whitened advantages, value targets, every metric; the answers have 1 to 4 tokens."""
    rows = [0, 1, 2, 3]
    check_rollout(stand_ins(tokenizer, advantage=advantage), rows, rows, advantage)


@pytest.mark.parametrize("flags, dtype, exact", [
    ({}, torch.float32, True), ({}, torch.bfloat16, False), ({"top_p": 0.6}, torch.float32, False)])
def test_where_the_samplers_log_probabilities_are_taken(tokenizer, monkeypatch, flags, dtype, exact):
    """In float32 and of the whole distribution. The drift is then measured before the first step."""
    engine = stand_ins(tokenizer, **flags).models
    engine.actor.to(dtype)
    trainer = DeepSpeedPPOTrainer(engine, step3_ppo.Config(**{**FLAGS, **flags}))
    rows = [0, 1, 2, 3]
    x = trainer.generate_experience(prompts(0, 2))
    expected = SAMPLED if exact else POLICY / 0.8
    torch.testing.assert_close(x.logprobs, (expected * MASK)[rows], rtol=0, atol=1e-6)
    kl = ((expected - REFERENCE / 0.8) * MASK)[rows].sum().item() / 4
    assert trainer.metrics["objective/kl"] == pytest.approx(kl, rel=1e-5)
    held = evaluate(trainer, [prompts(0, 1, 2, 3)], None)
    assert held.numbers["kl"] == pytest.approx(kl, rel=1e-5)

    def train_step(engine, micro_batches, loss_sum, count):
        return float(sum(loss_sum(x) for x in micro_batches) / count), 0.5

    monkeypatch.setattr(step3_ppo, "train_step", train_step)
    if exact:
        assert "response/logprob_drift" not in trainer.metrics
    trainer.train_rlhf(x)
    assert trainer.metrics.get("response/logprob_drift") == (None if flags else pytest.approx(0.25))


def test_the_sampler_is_told_every_flag(tokenizer):
    trainer = stand_ins(tokenizer, top_p=0.6)
    trainer.generate_experience(prompts(0, 2))
    [options] = trainer.models.generator.calls
    assert isinstance(options.pop("seed"), int)
    assert options == {
        "max_new_tokens": 4, "temperature": 0.8, "top_p": 0.6, "eos_token_id": EOS_IDS,
        "pad_token_id": tokenizer.pad_token_id, "num_return_sequences": 2}
    # No drift is measured, because the sampler's probabilities are those of top-p's set alone.
    assert "response/logprob_drift" not in trainer.metrics


def seeds_of_a_run(tokenizer, seed):
    """-> seeds of three rollouts, and of an evaluation of three batches after each of them."""
    trainer = stand_ins(tokenizer, seed=seed)
    seeds = trainer.models.generator.seeds
    evaluations = []
    for _ in range(3):
        trainer.generate_experience(prompts(0, 2))
        before = len(seeds())
        evaluate(trainer, [prompts(0), prompts(2), prompts(4)], None)
        evaluations.append(seeds()[before:])
    training = [seeds()[place] for place in (0, 4, 8)]
    return training, evaluations


def test_noise_of_training_and_evaluation(tokenizer):
    """
    Each rollout has noise of its own. Every evaluation has the same, which no rollout has, and
    another --seed makes other noise in both.
    """
    training, evaluations = seeds_of_a_run(tokenizer, seed=77)
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert len(set(training + evaluations[0])) == 6
    other_training, other_evaluations = seeds_of_a_run(tokenizer, seed=4077)
    assert not set(training + evaluations[0]) & set(other_training + other_evaluations[0])


def test_a_resumed_trainer_goes_on_where_the_other_stopped(tokenizer):
    """With the noise of the rollout that is next, the KL coefficient and the average of then."""
    whole = stand_ins(tokenizer)
    resumed = stand_ins(tokenizer)
    loaded = []
    whole.models.ema = types.SimpleNamespace(by_name=lambda: {"weight": torch.tensor([3.0])})
    resumed.models.ema = types.SimpleNamespace(load=loaded.append)
    whole.generate_experience(prompts(0, 2))
    whole.generate_experience(prompts(0, 2))
    whole.kl_coef = 0.123
    resumed.load_state_dict(whole.state_dict())
    for trainer in (whole, resumed):
        trainer.generate_experience(prompts(0, 2))
    assert resumed.models.generator.seeds() == whole.models.generator.seeds()[2:]
    assert resumed.kl_coef == 0.123
    assert loaded == [{"weight": torch.tensor([3.0])}]


# -----------------------------------------------------------------------------
# updates

def experience(rows):
    """A rollout of the earlier policy and critic, as generate_experience returns it."""
    return Experience(
        TOKENS[rows], REAL[rows], MASK[rows], OLD_LOGPROBS[rows] * MASK[rows],
        REFERENCE[rows] / 0.8 * MASK[rows], OLD_VALUES[rows] * MASK[rows], torch.zeros(len(rows)),
        0 * MASK[rows], ADVANTAGES[rows] * MASK[rows], RETURNS[rows] * MASK[rows])


def tokens_of(rows, numbers):
    """The response tokens of rows, end to end, in float64."""
    return torch.cat([numbers[row, :LENGTHS[row]].double() for row in rows])


def actor_terms(rows):
    """-> ratios and losses of the tokens, with clip 0.15."""
    ratios = (tokens_of(rows, POLICY) / 0.8 - tokens_of(rows, OLD_LOGPROBS)).exp()
    A = tokens_of(rows, ADVANTAGES)
    return ratios, -torch.minimum(ratios * A, ratios.clamp(0.85, 1.15) * A)


def critic_terms(rows):
    """-> plain squared errors and losses of the tokens, with clip 0.35."""
    values = tokens_of(rows, VALUES[:, P - 1:P - 1 + R])
    old = tokens_of(rows, OLD_VALUES)
    G = tokens_of(rows, RETURNS)
    errors = (values - G).square()
    clipped_errors = (old + (values - old).clamp(-0.35, 0.35) - G).square()
    return errors, 0.5 * torch.maximum(errors, clipped_errors)


def check_update(trainer, patch, own_rows, all_rows):
    """
    `train_rlhf` on this rank, of own_rows of all_rows. The stand-in for train_step sums the losses
    and updates nothing, so each epoch has the same sums.
    """
    events = []

    def train_step(engine, micro_batches, loss_sum, count):
        numbers = [int(row) for x in micro_batches for row in rows_of(x.tokens, x.attention_mask)[0]]
        events.append(("actor" if engine is trainer.models.actor else "critic", numbers))
        return float(sum(loss_sum(x) for x in micro_batches) / count), 0.5

    patch.setattr(step3_ppo, "train_step", train_step)
    trainer.models.ema = types.SimpleNamespace(update=lambda: events.append(("average", None)))
    trainer.metrics = {"time/generate": 5.0, "time/score": 7.0, "objective/kl": 9.0}
    trainer.kl_coef = 0.5
    actor_loss, critic_loss = trainer.train_rlhf(experience(own_rows))

    # The average is taken after every optimizer step: 3 epochs of 2 minibatches.
    assert [name for name, _ in events] == 6 * ["actor", "critic", "average"]

    # Each update's loss is a mean over the tokens of all ranks' minibatches.
    updates = [numbers for name, numbers in events if name == "actor"]
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, updates)
    whole_updates = [sum(parts, []) for parts in zip(*of_ranks)]
    actor_means = [actor_terms(rows)[1].mean().item() for rows in whole_updates]
    critic_means = [critic_terms(rows)[1].mean().item() for rows in whole_updates]
    assert actor_loss == pytest.approx(sum(actor_means) / 6, abs=1e-6)
    assert critic_loss == pytest.approx(sum(critic_means) / 6, rel=1e-5)

    ratios, losses = actor_terms(all_rows)
    squared_errors, clipped_losses = critic_terms(all_rows)
    G = tokens_of(all_rows, RETURNS)
    clipped = (losses > -ratios * tokens_of(all_rows, ADVANTAGES) + 1e-9).double()
    clipped_values = (clipped_losses > 0.5 * squared_errors + 1e-9).double()
    assert 0 < clipped.mean() < 1
    assert 0 < clipped_values.mean() < 1
    expected = {
        "objective/entropy": tokens_of(all_rows, POLICY).square().mean().item(),
        "ppo/loss/policy": sum(actor_means) / 6,
        "ppo/loss/value": sum(critic_means) / 6,
        "ppo/policy/clipfrac": clipped.mean().item(),
        "ppo/policy/approxkl": (ratios.log().square() / 2).mean().item(),
        "ppo/policy/ratio": ratios.mean().item(),
        "ppo/policy/grad_norm": 0.5,
        "ppo/val/clipfrac": clipped_values.mean().item(),
        "ppo/val/var_explained": 1 - (squared_errors.mean() / G.var(correction=0)).item(),
        "ppo/val/grad_norm": 0.5,
        "ppo/returns/mean": G.mean().item(),
    }
    found = {name: value for name, value in trainer.metrics.items()
             if name.startswith("ppo/") or name == "objective/entropy"}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)

    # Prompts count among the tokens read, and all three parts of a step among its seconds.
    seconds = 5 + 7 + trainer.metrics["time/train"]
    tokens_read = REAL[all_rows].sum().item()
    assert trainer.metrics["tokens_per_second"] == pytest.approx(tokens_read / seconds, rel=1e-9)

    # The controller starts from the coefficient of now, and counts the answers of all ranks.
    if trainer.args.kl_target:
        steered = 0.5 * (1 + 0.2 * len(all_rows) / 10_000)
        assert trainer.kl_coef == pytest.approx(steered, rel=1e-12)


def test_an_update_is_what_it_is_by_hand(tokenizer, monkeypatch):
    """Losses, every metric and the KL coefficient, over 3 epochs of 2 minibatches of 2 rows."""
    rows = [0, 1, 2, 3]
    check_update(stand_ins(tokenizer, kl_target=6.0), monkeypatch, rows, rows)


def test_grpo_weighs_its_kl_by_the_coefficient_of_now(tokenizer, monkeypatch):
    trainer = stand_ins(tokenizer, advantage="grpo", ppo_epochs=1, gradient_accumulation_steps=4)
    trainer.kl_coef = 0.5
    trainer.metrics = {"time/generate": 5.0, "time/score": 7.0}
    rows = [0, 1, 2, 3]
    monkeypatch.setattr(step3_ppo, "train_step", lambda engine, parts, loss_sum, count: (
        float(sum(loss_sum(part) for part in parts) / count), 0.5))
    loss, _ = trainer.train_rlhf(experience(rows))
    d = (tokens_of(rows, REFERENCE) - tokens_of(rows, POLICY)) / 0.8
    expected = actor_terms(rows)[1].mean() + 0.5 * (d.exp() - d - 1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


# -----------------------------------------------------------------------------
# evaluation

def check_evaluation(trainer, own_rows, counted_rows, all_counted_rows):
    """
    Two batches of two prompts on this rank. A row that only fills up the rank's share has weight 0
    and is in no number. An answer's mark is 10 times its record. Before, the mark was the same in
    rows 0 and 4, a tie, and 3 in the others.
    """
    def weights(rows):
        return [float(row in counted_rows) for row in rows]

    def mark_before(row):
        return 10 * MARKS[row] if row % 4 == 0 else 3.0

    answers_before = [Answer(None, "", True, gold=mark_before(row)) for row in counted_rows]
    before = Evaluation({}, answers_before, 0.0)
    held = [prompts(*rows, weight=weights(rows)) for rows in (own_rows[:2], own_rows[2:])]
    found = evaluate(trainer, held, lambda record, answer: 10 * record, before)
    wins = [0.5 if row % 4 == 0 else float(10 * MARKS[row] > 3) for row in all_counted_rows]
    count = len(all_counted_rows)
    assert found.numbers == pytest.approx({
        "score": sum(score(row) for row in all_counted_rows) / count,
        "kl": sum(log_ratios(row).sum().item() for row in all_counted_rows) / count,
        "gold": sum(10 * MARKS[row] for row in all_counted_rows) / count,
        "win_rate": sum(wins) / count}, rel=1e-5)
    assert found.grades == [10 * MARKS[row] for row in counted_rows]
    assert [answer.record for answer in found.answers] == [MARKS[row] for row in counted_rows]
    assert [answer.score for answer in found.answers] == pytest.approx(
        [score(row) for row in counted_rows], abs=1e-5)
    assert [answer.kl for answer in found.answers] == pytest.approx(
        [log_ratios(row).sum().item() for row in counted_rows], abs=1e-5)
    # Without a scorer the grades are the scores.
    by_score = evaluate(trainer, held, None)
    assert by_score.grades == pytest.approx([score(row) for row in counted_rows], abs=1e-5)


def test_an_evaluation_is_what_it_is_by_hand(tokenizer):
    check_evaluation(stand_ins(tokenizer), [0, 1, 2, 3], [0, 1, 2], [0, 1, 2])


def test_the_mean_mark_gives_each_answer_its_own_record():
    """Three answers to each of two prompts stand together."""
    def scorer(record, answer):
        return float(answer.startswith(record))

    answers = ["a1", "a2", "b3", "b4", "b5", "b6"]
    assert mean_gold(scorer, ["a", "b"], answers) == pytest.approx(5 / 6)


def test_perplexity_leaves_out_rows_that_are_there_twice():
    """Rows of 4, 2 and 1 trained tokens; another row, of 3, has weight 0."""
    rows = [0, 1, 2, 3]
    # Column 0 names the row and is not predicted. The answer stands in the R others.
    names = FIRST_ID + torch.tensor(rows)
    batch = {"input_ids": torch.cat([names[:, None], TOKENS[rows, P:]], 1),
             "attention_mask": torch.ones(4, R + 1, dtype=torch.int64),
             "loss_mask": torch.cat([torch.ones(4, 1), MASK[rows]], 1),
             "weight": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    expected = (-tokens_of([0, 1, 2], POLICY).mean()).exp().item()
    assert perplexity(Given(POLICY), [batch]) == pytest.approx(expected, rel=1e-5)


def test_evaluated_pairs_leave_out_those_that_are_there_twice():
    """Margins 1 and -3; a pair with margin 100 has weight 0."""
    batch = {"loss_mask": torch.ones(6, 5), "weight": torch.tensor([1.0, 1.0, 0.0])}
    chosen = torch.tensor([2.0, 0.0, 100.0])
    rejected = torch.tensor([1.0, 3.0, 0.0])
    held = evaluate_pairs(lambda batch: (chosen, rejected), [batch])
    margins = torch.tensor([1.0, -3.0], dtype=torch.float64)
    assert held["accuracy"] == 0.5
    assert held["loss"] == pytest.approx((1 + (-margins).exp()).log().mean().item())
    assert held["score_mean"] == pytest.approx((2 + 0 + 1 + 3) / 4)


# -----------------------------------------------------------------------------
# engines

def test_schedules_count_every_update_of_the_run(model_folders, tokenizer):
    """
    3 rollouts x 2 epochs x 2 minibatches = 12 optimizer steps: linear warm-up over 3, then linear
    to 0. A rollout's metrics have the rate of its first step. Actor and critic have their own.
    """
    args = step3_ppo.Config(
        per_device_generation_batch_size=4, per_device_train_batch_size=2, ppo_epochs=2,
        max_prompt_seq_len=20, max_answer_seq_len=10, lr_scheduler_type="linear",
        num_warmup_steps=3, actor_learning_rate=3e-3, critic_learning_rate=5e-4, enable_ema=True)
    engine = DeepSpeedRLHFEngine(
        model_folders["lm"], model_folders["reward"], tokenizer, num_total_iters=3, args=args)
    trainer = DeepSpeedPPOTrainer(engine, args)
    assert engine.ema.decay == 0.992  # Ouyang et al. 2022, appendix C
    for share_of_top in (0, (12 - 4) / 9, (12 - 8) / 9):
        rates = [engine.actor.get_lr()[0], engine.critic.get_lr()[0]]
        assert rates == pytest.approx([share_of_top * 3e-3, share_of_top * 5e-4])
        trainer.metrics = {"time/generate": 1.0, "time/score": 1.0}
        trainer.train_rlhf(make_experience())
        assert trainer.metrics["lr"] == rates[0]
    assert [engine.actor.get_lr()[0], engine.critic.get_lr()[0]] == pytest.approx([0, 0])

    # Reference and reward model are only read.
    for frozen in (engine.ref, engine.reward_model):
        assert not frozen.training
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in engine.actor.module.parameters())


class Slope(torch.nn.Module):
    """One weight w: its output is w x, so that x is the gradient."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([[0.6]]))

    def forward(self, x):
        return (self.w * x).sum()


def test_adamw_by_hand_for_two_steps(settings):
    """Betas 0.9 and 0.95, eps 1e-5, decay 0.5 at rate 0.01; the gradients are 0.5 and -0.1."""
    config = SFTConfig(lr_scheduler_type="constant", weight_decay=0.5)
    engine = train_engine(Slope(), settings, config, 0.01, 10)
    w = 0.6
    m = 0.0
    v = 0.0
    for step, g in ((1, 0.5), (2, -0.1)):
        engine.backward(engine(torch.tensor(g)))
        engine.step()
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g**2
        direction = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)) ** 0.5 + 1e-5)
        w = w * (1 - 0.01 * 0.5) - 0.01 * direction
        assert engine.module.w.item() == pytest.approx(w, abs=1e-7)


@pytest.mark.parametrize("alpha, scaling", [(0.0, 2.0), (3.0, 0.75)])
def test_adapters_are_scaled_by_alpha_over_dim(make_model, alpha, scaling):
    """Without --lora_alpha alpha is 2 dim, so the adapter's part counts twice."""
    model = add_lora(make_model("opt"), SFTConfig(lora_dim=4, lora_alpha=alpha))
    layer = next(module for module in model.modules() if isinstance(module, LoRALinear))
    torch.manual_seed(2)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 32)
    difference = layer(x) - layer.base(x)
    expected = scaling * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(difference, expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_a_plain_head_is_read_at_the_temperature():
    """
    A family that the decoder does not know, padded on both sides, with 7 rows more than its
    tokenizer has ids: log-probabilities and entropies against float64.
    """
    from transformers import OlmoConfig, OlmoForCausalLM
    torch.manual_seed(0)
    model = OlmoForCausalLM(OlmoConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, pad_token_id=None, bos_token_id=None, eos_token_id=5)).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20  # a flat distribution is nearly the same at every temperature
    ours = LanguageModel(model, vocabulary=90)
    assert not ours.plain_head
    ids = torch.randint(6, 90, (3, 9))
    real = torch.ones(3, 9, dtype=torch.int64)
    real[0, :3] = 0
    real[1, 7:] = 0
    mask = real[:, 4:].clone()
    logprobs, entropy = ours(ids, real, mask, 0.7)
    for row in range(3):
        kept = real[row].bool()
        logits = model(ids[row:row + 1, kept]).logits[0, :, :90].double()
        logp = torch.full((9, 90), torch.nan, dtype=torch.float64)
        logp[kept] = (logits / 0.7).log_softmax(-1)
        for place in mask[row].nonzero().flatten().tolist():
            before = logp[4 + place - 1]
            expected = [before[ids[row, 4 + place]].item(), -(before.exp() * before).sum().item()]
            found = [logprobs[row, place].item(), entropy[row, place].item()]
            assert found == pytest.approx(expected, abs=1e-4)
    assert (logprobs * (1 - mask)).abs().sum() == 0


# -----------------------------------------------------------------------------
# the text of the mixture

@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """A .jsonl file of 100 pairs; text.txt beside it has 300 rows' text."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [row for row in toy_rows()[:400] if row["rejected"]]
    columns = ("prompt", "chosen", "rejected")
    lines = [json.dumps({name: row[name] for name in columns}) for row in pairs[:100]]
    file.write_text("\n".join(lines))
    text = "\n".join(f"{row['prompt']} {row['chosen']}" for row in toy_rows()[:300])
    file.with_name("text.txt").write_text(text)
    return file


def text_ids(tokenizer, rows_file, rank=0, world=1, done=0, **flags):
    """-> this rank's text, (rows, 24) for each optimizer step after the first `done` rollouts."""
    config = step3_ppo.Config(**{**dict(
        data_path=[str(rows_file)], max_steps=3,
        # plain text, from which nothing is held out: --seed changes its order alone
        unsupervised_data_path=[str(rows_file.with_name("text.txt"))],
        per_device_generation_batch_size=8 // world, per_device_train_batch_size=2 // world,
        gradient_accumulation_steps=2, ppo_epochs=2, max_seq_len=24, max_prompt_seq_len=90,
        seed=77), **flags})
    data = load_stage_data(config, 3, tokenizer, rank, world, done, log=lambda line: None)
    return [torch.cat([batch["input_ids"] for batch in batches]) for batches in data.text_batches]


def test_the_text_goes_on_where_the_run_stopped(tokenizer, rows_file):
    """3 rollouts of 2 epochs of 2 minibatches: 12 steps, of which 8 are left after one rollout."""
    whole = text_ids(tokenizer, rows_file)
    resumed = text_ids(tokenizer, rows_file, done=1)
    assert len(whole) == 12 and len(resumed) == 8
    assert all(torch.equal(one, other) for one, other in zip(whole[4:], resumed))
    assert len({ids.numpy().tobytes() for ids in whole}) == 12  # no step has another's text
    other_seed = text_ids(tokenizer, rows_file, seed=78)
    assert not torch.equal(whole[0], other_seed[0])


def test_two_ranks_read_the_text_that_one_reads(tokenizer, rows_file):
    def as_set(ids):
        return {tuple(row) for row in ids.tolist()}

    whole = text_ids(tokenizer, rows_file)
    halves = [text_ids(tokenizer, rows_file, rank, world=2) for rank in (0, 1)]
    for ids, first, second in zip(whole, *halves, strict=True):
        assert len(first) == len(second) == 2
        assert as_set(first) | as_set(second) == as_set(ids)


def test_a_resumed_run_reads_the_text_of_the_whole_one(model_folders, rows_file, tmp_path,
                                                       monkeypatch):
    """
    By step3_ppo.main, stopped in its third step, with a checkpoint of two. At a learning rate of 0
    the mixture's loss tells which text a step had.
    """
    def run(name, **flags):
        step3_ppo.main(step3_ppo.Config(
            actor_model_name_or_path=model_folders["lm"],
            critic_model_name_or_path=model_folders["reward"], output_dir=str(tmp_path / name),
            data_path=[str(rows_file)], unsupervised_data_path=[str(rows_file)], max_steps=4,
            save_steps=2, eval_steps=3, max_eval_samples=2, skip_preflight=True, max_seq_len=24,
            max_prompt_seq_len=90, max_answer_seq_len=5, per_device_generation_batch_size=4,
            per_device_train_batch_size=2, ppo_epochs=2, actor_learning_rate=0.0,
            critic_learning_rate=1e-3, lr_scheduler_type="constant", **flags))

    def lines(name, file="metrics.jsonl"):
        text = (tmp_path / name / "actor" / file).read_text()
        return [json.loads(line) for line in text.splitlines()]

    run("whole")
    log = MetricsLog.__call__

    def stop_in_step_3(self, step, numbers):
        log(self, step, numbers)
        assert step < 3, "stopped"

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "__call__", stop_in_step_3)
        with pytest.raises(AssertionError, match="stopped"):
            run("stopped")
    run("stopped", resume=True)
    whole = [line["ppo/loss/ptx"] for line in lines("whole")]
    resumed = [line["ppo/loss/ptx"] for line in lines("stopped")]
    assert resumed[-2:] == pytest.approx(whole[-2:], rel=1e-6)
    assert len({round(loss, 4) for loss in whole}) == 4
    # The SFT model is evaluated, --eval_steps 3 does it after step 3, and the end is one.
    evaluations = lines("whole", "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 3, 4]
    resumed = lines("stopped", "evaluations.jsonl")
    assert [line["step"] for line in resumed] == [0, 3, 4]
    assert [line["eval/kl"] for line in resumed] == [line["eval/kl"] for line in evaluations]
    assert lines("stopped", "samples.jsonl") == lines("whole", "samples.jsonl")


# -----------------------------------------------------------------------------
# what is said

def test_a_printed_line_has_the_means_since_the_line_before(tmp_path, capsys):
    """Every 3 steps, and the first and the last: means of 1; of 2 and 4; of 6."""
    log = MetricsLog(tmp_path, 4, 3, [("loss", "loss", "6.3f")])
    for step, loss in enumerate([1.0, 2.0, 4.0, 6.0], 1):
        log(step, {"loss": loss, "nothing": None})
    printed = [line.split()[3] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["1.000", "3.000", "6.000"]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in written] == [1.0, 2.0, 4.0, 6.0]
    assert "nothing" not in written[0]


def test_the_summary_adds_the_seconds_of_its_stages(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), seed=77)
    for section, seconds in (("sft", 3.0), ("reward", 4.0), ("ppo", 5.5)):
        write_summary(config, section, {"seconds": seconds, "none": None}, section + "'s model")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] == 12.5 and summary["ppo"] == {"seconds": 5.5}
    assert summary["model"] == "sft's model" and summary["seed"] == 77
    write_summary(config, "sft", {"seconds": 2.0}, "another")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] == 2.0 and "ppo" not in summary


# -----------------------------------------------------------------------------
# two ranks

def check_samples(rank, ranks, tokenizer, patch):
    """
    Five held-out prompts on two ranks, which are three on each, one of them twice. It is marked
    once, and each rank has noise of its own.
    """
    engines = []

    class Sampler(GivenAnswers):
        def __init__(self, model, tp_size, vocabulary):
            super().__init__()
            engines.append(self)

        def generate(self, ids, mask, max_new_tokens, **options):
            return super().generate(torch.full((len(ids), 1), FIRST_ID), mask[:, -1:], 1, **options)

    patch.setattr(metrics, "InferenceEngine", Sampler)
    patch.setattr(metrics, "load_gold_mark", lambda config: lambda record, answer: record.place)
    records = [types.SimpleNamespace(prompt=[{"role": "user", "content": "Hello!"}], place=place)
               for place in (1.0, 2.0, 4.0, 8.0, 16.0)]
    model = types.SimpleNamespace(parameters=list,
                                  generation_config=types.SimpleNamespace(eos_token_id=EOS_IDS))
    assert sample_answers(model, tokenizer, records, SFTConfig(seed=77))[0] == 31 / 5
    [[options]] = [engine.calls for engine in engines]
    assert options["eos_token_id"] == EOS_IDS
    seeds = [None] * ranks
    dist.all_gather_object(seeds, options["seed"])
    assert len(set(seeds)) == ranks


def check_save(rank, tokenizer, folder, patch):
    """Rank 0 takes a second to write. No rank comes back before the files are there."""
    config = SFTConfig(deepspeed_config=str(folder / "ds.json"))
    engine = train_engine(LanguageModel(opt()), setup(config), config, 1e-2, 10)
    write_folder = models.write_folder

    def slow(*arguments):
        time.sleep(1)
        write_folder(*arguments)

    patch.setattr(models, "write_folder", slow)
    save_model(engine, tokenizer, folder / "out")
    files = {file.name for file in (folder / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


def two_ranks(rank, ranks, folder):
    tokenizer = load_tokenizer("tiny")
    everyone = list(range(8))
    own = everyone[4 * rank:4 * rank + 4]
    with pytest.MonkeyPatch.context() as patch:
        for advantage in ("gae", "reinforce"):
            check_rollout(stand_ins(tokenizer, advantage=advantage), own, everyone, advantage)
        check_update(stand_ins(tokenizer, kl_target=6.0), patch, own, everyone)
        counted = own[:4 - rank]
        check_evaluation(stand_ins(tokenizer), own, counted, everyone[:7])
        check_samples(rank, ranks, tokenizer, patch)
        check_save(rank, tokenizer, folder, patch)


def test_two_ranks_say_and_do_what_is_so_by_hand(tmp_path):
    """
    Rollout, update, KL coefficient and evaluation over the eight answers of both; their samples;
    and that no rank leaves save_model before the files are there.
    """
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    run_ranks(2, two_ranks, tmp_path)
