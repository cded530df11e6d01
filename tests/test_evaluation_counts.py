"""
Held-out numbers are those of the held-out rows, each counted once, on any number of processes: 7 and 20 rows on 1, 2
and 3 processes, where some ranks get a row again so that all have equally many.

What is sampled differs with the number of processes, because every rank draws noise of its own. So step 3 answers with
the likeliest token only (a tiny --top_p) here, and the marks of `sample_answers` look at the question alone.
"""

import json
import math
from unittest import mock

import pytest
import torch

import step1_sft
import step2_reward
import step3_ppo
from data import load_stage_data, load_tokenizer
from support import metrics, preflight
from support.models import LanguageModel, RewardModel, load_model
from support.processes import setup
from ranks import run_ranks
from test_ppo import small_models

WORDS = "hot cold big small fast slow high low sky grass snow coal sun lemon leaf milk dog cat cow duck".split()
COUNTS = (7, 20)


def inputs(folder):
    """A model of each kind, and for each count a source with as many test rows, all of other lengths."""
    small_models("llama", folder, load_tokenizer("tiny"))
    for count in COUNTS:
        source = folder / f"{count}"
        source.mkdir()
        rows = []
        for i in range(60 + count):
            chosen = WORDS[i % 11:i % 11 + i * 5 % 7 + 2]
            rejected = WORDS[i % 5:i % 5 + i * 3 % 8 + 1]
            rows.append({"prompt": f"What is {' '.join(WORDS[:i % 7 + 1])} {i}?", "chosen": " ".join(chosen),
                         "rejected": " ".join(rejected)})
        for name, part in (("train", rows[count:]), ("test", rows[:count])):
            (source / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))


def mark(record, answer):
    return len(record.prompt[-1]["content"]) % 5 / 4


def shift(model, size, seed):
    """Adds the same noise to a model's weights on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def evaluate(rank, ranks, folder):
    """Every number that a stage says of held-out rows -> folder/RANKS.json"""
    found = {}
    for count in COUNTS:
        flags = dict(data_path=[str(folder / str(count))], data_split="1,1,1", max_steps=1, max_seq_len=96,
                     max_prompt_seq_len=64, max_answer_seq_len=10, per_device_train_batch_size=3)
        tokenizer = load_tokenizer(f"{folder}/actor")
        settings = setup(step1_sft.Config(**flags))
        quiet = lambda line: None

        # Step 1, and what a trained model says.
        config = step1_sft.Config(**flags)
        data = load_stage_data(config, 1, tokenizer, rank, ranks, log=quiet)
        assert data.held_count == count
        policy = load_model(f"{folder}/actor", tokenizer, settings, 96)
        found[f"{count} perplexity, its log"] = math.log(step1_sft.perplexity(LanguageModel(policy), data.held_loader))
        with mock.patch.object(metrics, "load_gold_mark", lambda config: mark):
            gold, _ = metrics.sample_answers(policy, tokenizer, data.held_records, config, batch_size=2)
        found[f"{count} gold of sample_answers"] = gold

        # Step 2.
        data = load_stage_data(step2_reward.Config(model_name_or_path="tiny", **flags), 2, tokenizer, rank, ranks,
                               log=quiet)
        model = RewardModel(load_model(f"{folder}/reward", tokenizer, settings, 96, head="score"))
        held = step2_reward.evaluate(lambda batch: step2_reward.pair_scores(model, batch), data.held_loader)
        found |= {f"{count} step 2 {name}": value for name, value in held.items()}

        # Step 3, against a reference and an earlier actor that are other models.
        args = step3_ppo.Config(actor_model_name_or_path=f"{folder}/actor", advantage="reinforce", top_p=1e-6,
                                critic_model_name_or_path=f"{folder}/reward", per_device_generation_batch_size=3,
                                **flags)
        data = load_stage_data(args, 3, tokenizer, rank, ranks, log=quiet)
        engine = step3_ppo.DeepSpeedRLHFEngine(f"{folder}/actor", f"{folder}/reward", tokenizer, 1, args)
        engine.eos_token_ids = list(range(0, 1000, 7))  # so that answers end, at all lengths
        trainer = step3_ppo.DeepSpeedPPOTrainer(engine, args)
        for name, scorer in (("by score", None), ("by gold", lambda record, answer: len(answer) % 4 / 3)):
            before = step3_ppo.evaluate(trainer, data.held_loader, scorer)
            shift(engine.actor.module, 0.02, seed=1)
            after = step3_ppo.evaluate(trainer, data.held_loader, scorer, before)
            found |= {f"{count} step 3 {name} {number}": value for number, value in after.numbers.items()
                      if value is not None}

        # Preflight, which tells its numbers in sentences.
        engine.eos_token_ids = [tokenizer.eos_token_id, 7, 14]
        answers = preflight.read_answers(engine, data.held_records, args)
        found |= {f"{count} preflight {name}": value for name, value in answers.items()}
        swapped = [type(record)(record.prompt, record.rejected, record.chosen) for record in data.held_records]
        for records in (data.held_records, swapped):
            sentence, certain = preflight.check_preference(engine, records, args)
            found[f"{count} preflight preference {records is swapped}"] = str(sentence)
    if rank == 0:
        (folder / f"{ranks}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_every_held_out_row_counts_once(tmp_path):
    inputs(tmp_path)
    for ranks in (1, 2, 3):
        run_ranks(ranks, evaluate, tmp_path)
    one, *several = [json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2, 3)]
    for count in COUNTS:
        assert 0 < one[f"{count} step 2 accuracy"] < 1 and one[f"{count} step 3 by score kl"] > 0.01
        assert 0 < one[f"{count} step 3 by score win_rate"] < 1 and 0 < one[f"{count} step 3 by gold gold"] < 1
        sentences = [one[f"{count} preflight preference {swapped}"] for swapped in (False, True)]
        assert any(f"of {count} held-out pairs" in sentence for sentence in sentences), sentences
    for found in several:
        assert found.keys() == one.keys()
        for name, value in one.items():
            assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6, abs=1e-6)), name
