"""
Rewards by --reward_fn: Python functions with TRL's signature and reward models, alone and together; what they are
given, what PPO makes of their numbers, and the sentence for each thing that can be wrong.
"""

import copy
import sys
import types

import pytest
import torch

from data import Collator, encode_records, load_tokenizer, to_records
from support.flags import UsageError
from support.metrics import Answer
from support.models import last_token
from support.processes import raise_on_all_ranks
from step3_ppo import Config, DeepSpeedPPOTrainer, DeepSpeedRLHFEngine, Evaluation, evaluate
from support.reward_functions import RewardFunction, load_reward_function
from ranks import run_ranks
from test_ppo import small_models

SIZES = dict(per_device_generation_batch_size=4, per_device_train_batch_size=4, max_prompt_seq_len=48,
             max_answer_seq_len=6, lr_scheduler_type="constant", actor_learning_rate=1e-3, critic_learning_rate=1e-3)
ROWS = [{"prompt": f"What is {i} + {i}?", "chosen": str(2 * i), "rejected": "Go.", "solution": 2 * i} for i in range(4)]
CHAT = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
FILE = '''
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]
def ones(prompts, completions, **columns):
    return len(prompts) * [1]
def solved(prompts, completions, solution, **columns):
    return [float(str(s) in c) for c, s in zip(completions, solution)]
def short(prompts, completions, **columns):
    return [1.0]
def number(prompts, completions, **columns):
    return 1.0
def words(prompts, completions, **columns):
    return len(prompts) * ["good"]
def nan(prompts, completions, **columns):
    return [float("nan")] + (len(prompts) - 1) * [1.0]
def no_columns(prompts, completions):
    return len(prompts) * [1.0]
def typo(prompts, completions, **columns):
    return columns["solutoin"]
def another(prompts, completions, answer, **columns):
    return len(prompts) * [1.0]
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(actor, reward model, file of reward functions)"""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "my.py").write_text(FILE)
    actor, reward = small_models("opt", folder, load_tokenizer("tiny"))
    return types.SimpleNamespace(actor=actor, reward=reward, file=str(folder / "my.py"))


@pytest.fixture
def make_trainer(place, process_group):
    def make(*reward_fn, critic=None, **flags):
        names = [name if "/" in name else f"{place.file}:{name}" for name in reward_fn]
        args = Config(reward_fn=names, **SIZES, **flags)
        critic = place.reward if critic is None else critic
        engine = DeepSpeedRLHFEngine(place.actor, critic, load_tokenizer("tiny"), 4, args)
        return DeepSpeedPPOTrainer(engine, args)
    return make


def prompts(rows=ROWS, tokenizer=None):
    tokenizer = load_tokenizer("tiny")
    dataset = encode_records(to_records(rows, "rows")[0], tokenizer, 3, 48, log=lambda line: None)
    return Collator(3, tokenizer.pad_token_id)([dataset[i] for i in range(len(rows))])


# -----------------------------------------------------------------------------
# what a function is given

@pytest.mark.parametrize("rows, prompt, completion", [
    (ROWS, "What is 1 + 1?", "two"),
    (CHAT, [{"role": "user", "content": "What is 1 + 1?"}], [{"role": "assistant", "content": "two"}])],
    ids=["text", "messages"])
def test_a_function_is_called_as_trl_calls_it(rows, prompt, completion, process_group):
    seen = {}
    def f(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0, 1, 2, 3]
    records, _ = to_records(rows, "rows")
    assert RewardFunction("f", f)(records, ["zero", "two", "four", "six"]).tolist() == [0, 1, 2, 3]
    assert seen["prompts"][1] == prompt and seen["completions"][1] == completion
    assert (seen["solution"] == [0, 2, 4, 6] and seen["chosen"] == ["0", "2", "4", "6"]
            and seen["rejected"] == 4 * ["Go."])
    assert len(seen) == 5


def test_columns_of_blended_sources(process_group):
    """One source has a column that the other lacks: None stands there."""
    records = to_records(ROWS[:1], "a")[0] + to_records([{"question": "Why?", "answer": "So.", "level": 3}], "b")[0]
    seen = {}
    RewardFunction("f", lambda prompts, completions, **columns: seen.update(columns) or [0, 0])(
        records, ["x", "y"])
    assert seen["solution"] == [0, None] and seen["level"] == [None, 3] and seen["chosen"] == ["0", "So."]


# -----------------------------------------------------------------------------
# what PPO makes of it

def test_python_scores_are_taken_as_they_are(make_trainer):
    """
    Lengths are far over the clip that holds a reward model's normalised scores; the answers are those that the rollout
    decodes to.
    """
    trainer = make_trainer("length", reward_clip=0.01)
    x = trainer.generate_experience(prompts())
    R = x.mask.size(1)
    texts = [trainer.models.tokenizer.decode(ids[-R:][mask.bool()], skip_special_tokens=True).strip()
             for ids, mask in zip(x.tokens, x.mask)]
    assert x.scores.tolist() == [len(text) for text in texts] and x.scores.max() > 1
    last = x.mask.sum(1).long() - 1  # gamma = 1, KL = 0: the last token's return is its reward
    torch.testing.assert_close(x.returns.gather(1, last[:, None]).squeeze(1), x.scores, atol=1e-4, rtol=0)
    assert (trainer.metrics["objective/scores"] == trainer.metrics["objective/scores/length"]
            == pytest.approx(x.scores.mean().item()))


def test_a_weighted_sum_of_functions_and_models(make_trainer, place):
    """
    2 x the length - 3 x a reward model, the latter normalised by its own mean and deviation and clipped; each logged
    apart.
    """
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(place.reward)
    config = copy.deepcopy(model.config)
    model.config.score_mean, model.config.score_std = 0.2, 0.5
    model.save_pretrained(place.reward)
    try:
        trainer = make_trainer("length", place.reward, reward_weights=[2.0, -3.0], reward_clip=1.5)
    finally:
        config.save_pretrained(place.reward)
    x = trainer.generate_experience(prompts())
    with torch.no_grad():
        raw = torch.stack([model(ids[None, mask.bool()]).logits[0, 0] for ids, mask in zip(x.tokens, x.attention_mask)])
    critic = last_token(trainer.models.critic(x.tokens, x.attention_mask), x.attention_mask)
    torch.testing.assert_close(critic.detach(), (raw - 0.2) / 0.5, atol=1e-5, rtol=1e-5)  # values in the rewards' units
    normalised = ((raw - 0.2) / 0.5).clamp(-1.5, 1.5)
    lengths = torch.tensor([float(len(c)) for c in decoded(trainer, x)])
    torch.testing.assert_close(x.scores, 2 * lengths - 3 * normalised, atol=1e-5, rtol=1e-5)
    assert trainer.metrics["objective/scores/length"] == pytest.approx(lengths.mean().item(), rel=1e-5)
    assert trainer.metrics["objective/scores/reward"] == pytest.approx(normalised.mean().item(), rel=1e-5)
    assert trainer.metrics["objective/scores"] == pytest.approx(x.scores.mean().item(), rel=1e-5)


def decoded(trainer, x):
    R = x.mask.size(1)
    return [trainer.models.tokenizer.decode(ids[-R:][mask.bool()], skip_special_tokens=True).strip()
            for ids, mask in zip(x.tokens, x.mask)]


def test_without_the_flag_the_reward_model_is_the_critics_start(make_trainer, place):
    trainer = make_trainer()
    x = trainer.generate_experience(prompts())
    values = trainer.models.critic(x.tokens, x.attention_mask)
    torch.testing.assert_close(x.scores, last_token(values, x.attention_mask).clamp(-5, 5), atol=1e-5, rtol=0)
    batch = prompts()
    del batch["records"]  # reward models read ids
    trainer.generate_experience(batch)


def test_evaluation_reports_the_reward_that_was_trained(make_trainer):
    trainer = make_trainer("ones")
    before = dict(trainer.metrics)
    found = evaluate(trainer, [prompts(), prompts()], None)
    held = found.numbers
    assert held["score"] == 1 and len(found.answers) == 8
    assert trainer.metrics == before and trainer.iterations == 0
    assert held["kl"] == pytest.approx(0, abs=1e-4)
    assert held["gold"] is held["win_rate"] is None and found.grades == 8 * [1]


def evaluation_of(grades):
    answers = [Answer(None, "", True, score=99.0, gold=grade) for grade in grades]
    return Evaluation({}, answers, 0.0)


def test_win_rate_by_hand(make_trainer):
    """
    Marks by the task's scorer where there is one, else by the reward: better, worse and tied against a given evaluation before.
    """
    trainer = make_trainer("ones")
    before = evaluation_of([0.5, 1.0, 1.0, 2.0])
    found = evaluate(trainer, [prompts()], None, before)
    assert found.numbers["win_rate"] == (1 + 0.5 + 0.5) / 4
    before = evaluation_of([0.0, 1.0, 5.0, 5.0])
    marked = evaluate(trainer, [prompts()], lambda record, answer: float(record.chosen), before)
    assert marked.grades == [0, 2, 4, 6]
    assert marked.numbers["gold"] == 3 and marked.numbers["score"] == 1
    assert marked.numbers["win_rate"] == (0.5 + 1 + 0 + 1) / 4
    # the same noise at every call
    assert [a.text for a in found.answers] == [a.text for a in marked.answers]


def test_where_the_critic_starts(make_trainer, place, tmp_path, monkeypatch, capsys):
    """
    With a function: from a reward model, a language model with a new head, or, where the default folder is missing,
    from the actor.
    """
    monkeypatch.chdir(tmp_path)
    assert "critic starts" not in capsys.readouterr().out
    for critic, said in ((place.reward, False), (place.actor, False), ("", True)):
        trainer = make_trainer("ones", critic=critic)
        assert ("the critic starts from" in capsys.readouterr().out) == said
        trainer.train_rlhf(trainer.generate_experience(prompts()))
    with pytest.raises(UsageError, match="nowhere"):
        make_trainer("ones", critic="nowhere")
    with pytest.raises(UsageError, match="no reward model"):  # as a reward it must be one
        make_trainer(place.actor)


# -----------------------------------------------------------------------------
# what can be wrong

@pytest.mark.parametrize("name, said", [
    ("typo", "failed in .*my.py, line [0-9]+: KeyError: 'solutoin'.*solution"),
    ("short", "a list of 4 numbers.*list"), ("number", "a list of 4 numbers.*float 1.0"),
    ("words", "a list of 4 numbers.*good"),
    ("nan", "nan gave nan to the answer"), ("no_columns", r"must take \(prompts, completions, \*\*columns\).*solution"),
    ("another", "missing a required.*answer")])
def test_a_function_that_misbehaves(make_trainer, name, said):
    with pytest.raises(UsageError, match=said):
        make_trainer(name).generate_experience(prompts())


def test_a_function_that_imports_its_neighbour(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", sys.path[:])
    (tmp_path / "words_of_mine.py").write_text("LIMIT = 3\n")
    (tmp_path / "mine.py").write_text("from words_of_mine import LIMIT\ndef f(prompts, completions, **columns):\n"
                                      "    return [LIMIT] * len(prompts)\n")
    function = load_reward_function(f"{tmp_path}/mine.py:f").function
    assert function(["a", "b"], ["c", "d"]) == [3, 3]


def test_a_function_that_cannot_be_had(make_trainer, place, tmp_path):
    with pytest.raises(UsageError, match="nowhere.py does not exist"):
        load_reward_function("nowhere.py:f")
    with pytest.raises(UsageError, match="no function missing; it has length, ones"):
        make_trainer("missing")
    with pytest.raises(UsageError, match="2 entries for 1 rewards"):
        make_trainer("ones", reward_weights=[1.0, 2.0])
    assert load_reward_function("output/reward") is load_reward_function("owner/name") is None
    batch = prompts()
    del batch["records"]
    with pytest.raises(UsageError, match="records"):
        make_trainer("ones").generate_experience(batch)


def one_rank_errs(rank, ranks):
    with pytest.raises(UsageError, match="rank 1's"):
        with raise_on_all_ranks():
            if rank == 1:
                raise UsageError("rank 1's")


def test_an_error_of_one_rank_is_every_ranks():
    """Ranks have answers of their own, and only the first of a host speaks."""
    run_ranks(2, one_rank_errs)
