"""data.py: which rows, which tokens, which batches. Masks are checked by decoding what is trained on."""

import collections
import csv
import dataclasses
import gzip
import itertools
import json
import math
import os
import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from deepspeed.accelerator import real_accelerator

import data
import step1_sft
import step3_ppo
from support import run_all, toy
from data import (Collator, MicroBatches, Preference, count_steps,
                  encode_answers, encode_prompts, encode_records, encode_text, hold_out,
                  load_records, load_stage_data, load_tokenizer, make_dataloader, pad,
                  rank_share, read_source, split_indices, to_records,
                  training_steps, without_held)
from support.flags import DataConfig, UsageError
from support.forms import FORMS, as_prompt, parse_dialogue
from support.toy import toy_gold, toy_questions, toy_rows
from ranks import run_ranks

SHARED = Path(data.__file__).resolve().parent.parent / "shared" / "data"  # real data, where there is some


def encode_answer(tokenizer, prompt, answer):
    return encode_answers(tokenizer, [prompt], [answer])[0]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def records_of(rows, source="here"):
    return to_records(rows, source)[0]


def quiet(line):
    pass


# -----------------------------------------------------------------------------
# the split

@pytest.mark.parametrize("n, split, sizes", [  # round(n x share), the first part absorbs what rounding leaves
    (100, "2,4,4", (20, 40, 40)), (101, "2,4,4", (21, 40, 40)), (99, "2,4,4", (19, 40, 40)),
    (99, "4,8,8", (19, 40, 40)), (7, "0,0,1", (0, 0, 7)), (10, "10,0,0", (10, 0, 0)), (101, "0,5,5", (1, 50, 50)),
    (103, "0,5,5", (0, 51, 52))])
def test_split_sizes(n, split, sizes):
    assert tuple(len(split_indices(n, split, stage, 0)) for stage in (1, 2, 3)) == sizes


def test_split_is_disjoint_complete_and_seeded():
    parts = [split_indices(101, "2,4,4", stage, 7) for stage in (1, 2, 3)]
    assert sorted(np.concatenate(parts)) == list(range(101))
    assert np.array_equal(parts[1], split_indices(101, "2,4,4", 2, 7))
    assert not np.array_equal(parts[1], split_indices(101, "2,4,4", 2, 8))


def test_split_cuts_one_permutation_at_the_bounds():
    """DeepSpeed-Chat, dschat/utils/data/data_utils.py: RandomState(seed).permutation(n), cut."""
    assert np.array_equal(np.concatenate([split_indices(50, "1,1,3", stage, 3) for stage in (1, 2, 3)]),
                          np.random.RandomState(3).permutation(50))


@pytest.mark.parametrize("split", ["2,4", "2,4,4,1", "a,b,c", "-1,4,4", "0,0,0", "", "nan,1,1"])
def test_malformed_splits_are_refused(split):
    with pytest.raises(UsageError, match="--data_split"):
        split_indices(100, split, 1, 0)


def test_whole_prompts_are_held_out():
    records = [Preference(user(f"question {i % 40}"), f"answer {i}", None) for i in range(200)]
    train, held = hold_out(records, seed=0)
    prompts = lambda part: {record.prompt[0]["content"] for record in part}
    assert len(prompts(held)) == 4 and not prompts(train) & prompts(held) and len(train) + len(held) == 200
    assert hold_out(records[::-1], seed=0)[1] == held[::-1], (
        "the choice depends on the prompts, not on the order of the rows")
    assert prompts(hold_out(records, seed=1)[1]) != prompts(held)


def test_a_common_last_turn_holds_out_no_more_than_a_tenth():
    """Whole prompts are held out: 300 of these 1,000 dialogues end with "continue", 200 more have it earlier."""
    records = []
    for i in range(1000):
        turns = user(f"Tell me of {i}.") + assistant("So.")
        if i % 10 in (0, 1):
            turns += user("continue") + assistant("And so.")
        turns += user("continue") if i % 10 in (2, 3, 4) else user("What else?")
        records.append(Preference(turns, "x", None))
    for seed in range(3):
        train, held = hold_out(records, seed)
        assert len(held) == 100 and len(train) == 900


def test_one_question_about_many_texts_is_many_prompts(tmp_path):
    rows = [{"messages": [{"role": "system", "content": f"Review {i}."}, *user("Is it good?"), *assistant("Yes.")]}
            for i in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    train, held = load_records(DataConfig(data_path=[path], data_split="1,0,0"), 1, log=quiet)
    assert len(train) == 36 and len(held) == 4


def test_prompts_that_differ_by_case_width_or_spaces_are_held_out_together():
    spellings = ["what is {}?", "What is {}?", " What  is\u00a0{}?\n", "WHAT IS {}?", "\uff37hat is {}?"]
    records = [Preference(user(spelling.format(i)), "x", None) for i in range(50) for spelling in spellings]
    train, held = hold_out(records, seed=0)
    number = lambda record: int("".join(filter(str.isdigit, record.prompt[0]["content"])))
    assert len(held) == 25 and len(train) == 225
    assert not set(map(number, held)) & set(map(number, train))


def test_seeds_hold_out_different_prompts():
    """
    With unrelated choices of a tenth, two seeds share a tenth of their prompts: 20 of 200, standard deviation 4.0.
    Of 45 pairs of seeds none should be 5 deviations away.
    """
    records = [Preference(user(f"What is {i}?"), "x", None) for i in range(2000)]
    held = [{record.keys[0] for record in hold_out(records, seed)[1]} for seed in range(10)]
    shared = [len(a & b) for a, b in itertools.combinations(held, 2)]
    assert all(0 < count < 40 for count in shared) and abs(sum(shared) / 45 - 20) < 3


def test_no_training_row_begins_with_a_held_out_prompt():
    """It would go on with an answer to that prompt. The same question asked later in a dialogue is another prompt."""
    short = [Preference(user(f"Q{i}"), "x", None) for i in range(100)]
    _, held = hold_out(short, 1)
    [asked, *_] = [record.prompt[0]["content"] for record in held]
    again = [{"role": "assistant", "content": "an answer"}, {"role": "user", "content": "And then?"}]
    begins = Preference(user(asked.lower()) + again, "x", None)
    later = Preference(user("Hello") + [again[0], {"role": "user", "content": asked}], "x", None)
    assert without_held([begins, later], {record.keys[-1] for record in held}) == [later]
    assert begins.keys == [f"user: {asked.lower()}", f"user: {asked.lower()} assistant: an answer user: and then?"]


def test_a_row_may_name_several_keys():
    """As the toy's rows do: held out by the last, and not trained on if any is held out."""
    rows = []
    for i in range(200):
        earlier = [f"q{i * 7 % 50}"] if i % 2 else []
        prompt = [message for question in earlier for message in user(question) + assistant("x")]
        rows.append({"prompt": prompt + user(f"q{i % 50}"), "response": "x", "hold_out_as": [*earlier, f"q{i % 50}"]})
    train, held = hold_out(records_of(rows), seed=0)
    asked = {record.prompt[-1]["content"] for record in held}
    assert (len(asked) == 5 and asked.isdisjoint(message["content"] for record in train for message in record.prompt)
            and len(train) > 150)


def test_rows_may_say_what_they_are_held_out_as():
    """Other words for the same prompt share its key, in a list or by itself; null is the whole prompt."""
    rows = []
    for i in range(40):
        rows.append({"prompt": f"q{i}", "response": "x", "hold_out_as": None})
        key = [f"User:  q{i}"] if i % 2 else f"user: q{i}"
        rows.append({"prompt": f"Please: q{i}", "response": "x", "hold_out_as": key})
    train, held = hold_out(records_of(rows), seed=0)
    asked = [{record.prompt[0]["content"].removeprefix("Please: ") for record in part}
             for part in (train, held)]
    assert len(train) == 72 and len(held) == 8 and not asked[0] & asked[1]


def all_stages(**flags):
    return [load_records(DataConfig(**flags), stage, log=quiet) for stage in (1, 2, 3)]


def test_no_stage_trains_on_anothers_rows_or_on_what_is_held_out(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
                                                  for i in range(100)])
    stages = all_stages(data_path=[path])
    assert [len(train) for train, _ in stages] == [18, 36, 36]
    rows = [record.chosen for train, _ in stages for record in train]
    held = [{record.chosen for record in held} for _, held in stages]
    assert len(set(rows)) == 90 and len(held[0]) == 10 and held[0] == held[1] == held[2] and not held[0] & set(rows)


def test_stages_stay_apart_where_only_some_rows_are_pairs(tmp_path):
    """Stage 2 can use half of these rows; which rows are whose must not depend on that."""
    path = write_jsonl(tmp_path / "mixed.jsonl", [{"instruction": f"q{i}", "chosen": f"good {i}",
                                                   "rejected": f"bad {i}" if i % 2 else None} for i in range(200)])
    stages = all_stages(data_path=[path])
    trained = [{record.chosen for record in train} for train, _ in stages]
    held = set.union(*({record.chosen for record in held} for _, held in stages))
    assert all(not a & b for a, b in itertools.combinations(trained, 2)) and not held & set.union(*trained)
    assert (all(record.rejected is not None for part in stages[1] for record in part)
            and len(stages[1][0]) in range(20, 60))


def test_a_prompt_held_out_of_one_source_is_trained_on_in_none(tmp_path):
    (tmp_path / "first").mkdir()
    rows = [{"prompt": f"q{i}", "response": "one"} for i in range(40)]
    write_jsonl(tmp_path / "first" / "train.jsonl", rows[:30])
    write_jsonl(tmp_path / "first" / "test.jsonl", rows[25:])
    second = write_jsonl(tmp_path / "second.jsonl", [{"prompt": f"q{i}", "response": "two"} for i in range(20, 100)])
    lines = []
    train, held = load_records(DataConfig(data_path=[str(tmp_path / "first"), second], data_split="1,0,0"), 1,
                               log=lines.append)
    trained = {record.prompt[0]["content"] for record in train}
    held = {record.prompt[0]["content"] for record in held}
    assert (not trained & held and held >= {f"q{i}" for i in range(25, 40)} and len(trained | held) == 100
            and "left out" in lines[-1])


def test_every_stage_evaluates_on_the_same_held_out_rows(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
                                                  for i in range(300)])
    one, two, three = ([record.chosen for record in held] for _, held in all_stages(data_path=[path]))
    assert len(one) == 30 and one == two == three


def test_blending_and_data_weights(tmp_path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "response": "x"} for i in range(100)])
             for name in "abc"]
    train, _ = load_records(DataConfig(data_path=paths, data_weights=[1, 2, 0.5], data_split="1,0,0"), 1, log=quiet)
    prompts = collections.Counter(record.prompt[0]["content"] for record in train)
    by_source = collections.Counter(record.prompt[0]["content"][0] for record in train)
    assert by_source == {"a": 90, "b": 180, "c": 45}
    assert {prompts[p] for p in prompts if p[0] == "b"} == {2} and {prompts[p] for p in prompts if p[0] != "b"} == {1}
    sources = [record.prompt[0]["content"][0] for record in train]
    assert set(sources[:60]) == {"a", "b", "c"}, "shuffled, not one source after the other"


def test_blank_answers_are_no_pairs(tmp_path):
    """A table cannot say that there is none: half the rows have no worse answer, or no better one."""
    for blank in ("chosen", "rejected"):
        rows = [{"prompt": f"What is {i}?", "chosen": "A number.", "rejected": "Go."} for i in range(40)]
        for row in rows[::2]:
            row[blank] = "  "
        path = tmp_path / f"{blank}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        train, held = load_records(DataConfig(data_path=[str(path)], data_split="0,1,0"), 2, log=quiet)
        assert 0 < len(train + held) <= 20 and all(r.chosen and r.rejected for r in train + held)


def test_answers_that_are_no_text_are_refused_and_none_is_none():
    pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": None}
    assert to_records([pair], "rows")[0][0].rejected is None
    for wrong in ({"prompt": "Hi", "completion": [3]}, {"prompt": "Hi", "response": {"text": "Hello!"}},
                  {"messages": [*user("Hi"), {"role": "assistant", "content": 3}]}):
        with pytest.raises(UsageError, match="row 1: text is needed"):
            to_records([wrong], "rows")


def test_rows_may_leave_out_what_they_lack():
    """The form is the one that most rows have; null and missing answers are none, whatever row comes first."""
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    odd = [{"prompt": "a", "chosen": "yes"}, {"prompt": "b", "chosen": None, "rejected": "no"}]
    records, _ = to_records(odd + pairs, "rows")
    assert [(r.chosen, r.rejected) for r in records] == [("yes", None), ("", None)] + 4 * [("yes", "no")]
    assert records[0].columns == {"prompt": "a"}


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, -1], [0, 0], [1, math.nan]])
def test_data_weights_must_fit_the_sources(tmp_path, weights):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "response": "x"} for i in range(10)])
    with pytest.raises(UsageError, match="--data_weights"):
        load_records(DataConfig(data_path=[path, path], data_weights=weights), 1, log=quiet)


def test_demonstrations_beside_pairs_are_for_step_1_alone(tmp_path):
    """All that is not held out of them, whatever --data_split says; what --data_path holds out is not among them."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
                                                   for i in range(100)])
    shown = write_jsonl(tmp_path / "shown.jsonl", [{"prompt": f"Q{i}", "response": "shown"} for i in range(50, 250)])
    flags = dict(data_path=[pairs], data_weights=[2])
    alone = all_stages(**flags)
    beside = all_stages(sft_data_path=[shown], **flags)
    assert beside[1:] == alone[1:]
    train, held = beside[0]
    keys = [{record.keys[0] for record in part} for part in (train, held)]
    demonstrations = [record for record in train if record.chosen == "shown"]
    assert not keys[0] & keys[1] and keys[1] >= {record.keys[0] for record in alone[0][1]}
    assert sum(record.chosen == "shown" for record in held) == 20 and 170 <= len(demonstrations) <= 180
    assert len(train) - len(demonstrations) >= 2 * 15
    with pytest.raises(UsageError, match="0 of 200 rows.*--sft_data_path"):
        load_records(DataConfig(data_path=[shown]), 2, log=quiet)


# -----------------------------------------------------------------------------
# forms and files

ROWS = {  # one row of every form, and the record it is
    ("prompt", "chosen", "rejected"):
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello! ", "rejected": "Go."},
         Preference(user("Hi"), "Hello!", "Go.")),
    ("instruction", "chosen", "rejected"):
        ({"instruction": "Add", "input": "1 + 1", "chosen": "2", "rejected": "3", "output": "9"},
         Preference(user("Add\n\n1 + 1"), "2", "3")),
    ("chosen", "rejected"):
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: So.",
          "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: No."},
         Preference(user("Hi") + assistant("Yes?") + user("Why?"), "So.", "No.")),
    ("question", "answer_0", "answer_1", "score_0", "score_1"):
        ({"question": {"full_text": "Why?"}, "answer_0": "A", "answer_1": "B ", "score_0": -0.5, "score_1": 0.5},
         Preference(user("Why?"), "B", "A")),
    ("history", "human_ref_a", "human_ref_b", "labels"):
        ({"history": "Why?", "human_ref_A": "A", "human_ref_B": "B", "labels": 0}, Preference(user("Why?"), "B", "A")),
    ("instruction", "output"):
        ({"instruction": "Say hi", "input": "", "output": "hi"}, Preference(user("Say hi"), "hi", None)),
    ("messages",): ({"messages": user("Hi") + assistant("Hello!")}, Preference(user("Hi"), "Hello!", None)),
    ("prompt", "response"): ({"prompt": "Hi", "response": "Hello!"}, Preference(user("Hi"), "Hello!", None)),
    ("prompt", "completion"):
        ({"prompt": user("Hi"), "completion": assistant("Hello!")}, Preference(user("Hi"), "Hello!", None)),
    ("prompt", "chosen"): ({"prompt": "Hi", "chosen": "Hello!"}, Preference(user("Hi"), "Hello!", None)),
    ("question", "answer"): ({"question": "1 + 1?", "answer": "2"}, Preference(user("1 + 1?"), "2", None)),
    ("conversations", "chosen", "rejected"):
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello!"},
          "rejected": {"from": "gpt", "value": "Go."}}, Preference(user("Hi"), "Hello!", "Go.")),
    ("question", "chosen", "rejected"):
        ({"question": "Hi", "system": "Be kind.", "chosen": "Hello!", "rejected": "Go."},
         Preference([{"role": "system", "content": "Be kind."}] + user("Hi"), "Hello!", "Go.")),
    ("input", "chosen", "rejected"):
        ({"input": "Hi", "system": "", "chosen": "Hello!", "rejected": "Go."}, Preference(user("Hi"), "Hello!", "Go.")),
    ("prompt", "response_0", "response_1", "better_response_id"):
        ({"prompt": "Hi", "response_0": "Go.", "response_1": "Hello!", "better_response_id": 1},
         Preference(user("Hi"), "Hello!", "Go.")),
    ("prompt", "response_1", "response_2", "preference_strength"):
        ({"prompt": "Hi", "response_1": "Go.", "response_2": "Hello!", "preference_strength": 2},
         Preference(user("Hi"), "Hello!", "Go.")),
    ("context", "response1", "response2", "overall_preference"):
        ({"context": user("Hi") + assistant("Yes?") + user("Why?"), "response1": "So.", "response2": "No.",
          "overall_preference": -1}, Preference(user("Hi") + assistant("Yes?") + user("Why?"), "So.", "No.")),
    ("conversation_a", "conversation_b", "winner"):
        ({"conversation_a": user("Hi") + assistant("Go."), "conversation_b": user("Hi") + assistant("Hello!"),
          "winner": "model_b"}, Preference(user("Hi"), "Hello!", "Go.")),
    ("instruction", "completions"):
        ({"instruction": "Hi", "completions": [{"response": "Go.", "fine-grained_score": 1.5, "overall_score": 9},
                                               {"response": "Hello!", "fine-grained_score": 4.0, "overall_score": 2}]},
         Preference(user("Hi"), "Hello!", "Go.")),
    ("instruction", "chosen_response", "rejected_response"):
        ({"instruction": "Hi", "chosen_response": "Hello!", "rejected_response": "Go."},
         Preference(user("Hi"), "Hello!", "Go.")),
    ("query", "positive_passages", "negative_passages"):
        ({"query": "Hi", "positive_passages": [{"text": "Hello!"}], "negative_passages": [{"text": "Go."}]},
         Preference(user("Hi"), "Hello!", "Go.")),
    ("instruction", "response"):
        ({"instruction": "Add", "context": "1 + 1", "response": "2"}, Preference(user("Add\n\n1 + 1"), "2", None)),
    ("conversations",):
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
         Preference(user("Hi"), "Hello!", None)),
    ("conversation",): ({"conversation": user("Hi") + assistant("Hello!")}, Preference(user("Hi"), "Hello!", None)),
    ("prompt", "label"):
        ({"prompt": "USER: Hi ASSISTANT: Yes?</s>USER: Why? ASSISTANT:", "label": "So."},
         Preference(user("Hi") + assistant("Yes?") + user("Why?"), "So.", None)),
    ("question", "human_answers"): ({"question": "Hi", "human_answers": ["Hello!", "Go."]},
                                    Preference(user("Hi"), "Hello!", None)),
    ("questions", "paragraph"): ({"questions": ["Hi", "Why?"], "paragraph": "Hello!"},
                                 Preference(user("Hi"), "Hello!", None)),
    ("question", "response"): ({"question": "1 + 1?", "system_prompt": "Add.", "response": "2"},
                               Preference([{"role": "system", "content": "Add."}] + user("1 + 1?"), "2", None)),
    ("prompt",): ({"prompt": "Hi"}, Preference(user("Hi"), "", None)),
}


@pytest.mark.parametrize("needed", [needed for needed, _ in FORMS], ids=" ".join)
def test_every_form(tmp_path, needed):
    row, record = ROWS[needed]
    assert to_records(read_source(write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "and": "a column more"}]))[0],
                      "rows") == ([record, record], {})


def test_a_tree_of_messages_is_pairs_of_its_ranked_answers():
    def row(name, parent, role, text, rank=None, **others):
        return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, **others}

    rows = [row("q", None, "prompter", "Hi"), row("a", "q", "assistant", "Hello?", 1), row("b", "q", "assistant", "Hello!", 0),
            row("c", "q", "assistant", "Go.", 2), row("d", "q", "assistant", "Spam", None, deleted=True),
            row("e", "b", "prompter", "Why?"), row("f", "e", "assistant", "So.", None), row("g", None, "prompter", "Anyone?")]
    records, dropped = to_records(rows, "tree")
    assert records == [Preference(user("Hi"), "Hello!", "Go."),
                       Preference(user("Hi") + assistant("Hello!") + user("Why?"), "So.", None)]
    assert [record.origin for record in records] == ["tree, row 1", "tree, row 6"]
    assert dropped == {"without an answer": [8]}
    circle = [row("x", "z", "assistant", "x"), row("z", "x", "prompter", "y")]
    assert to_records(circle + rows, "tree")[1]["whose message is an ancestor of its own"] == [2]


def test_rated_answers_to_one_prompt_are_a_pair():
    """HelpSteer2: as ties where the ratings are equal; earlier turns stand in the prompt."""
    def row(prompt, response, helpfulness):
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "coherence": 4}

    several = "Hi<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nWhy?"
    rows = [row("Hi", "Go.", 1), row("Hi", "Hello!", 4), row(several, "So.", 3), row(several, "No.", "2"),
            row("Tie", "a", 2), row("Tie", "b", 2)]
    records, dropped = to_records(rows, "rated")
    assert records == [Preference(user("Hi"), "Hello!", "Go."),
                       Preference(user("Hi") + assistant("Hello!") + user("Why?"), "So.", "No.")]
    assert dropped == {"that are ties": [5]}


def test_good_and_bad_answers_apart_are_pairs():
    rows = [{"prompt": "Hi", "completion": "Go.", "label": False}, {"prompt": "Hi", "completion": "Hello!", "label": True},
            {"prompt": "Why?", "completion": "So.", "label": True}, {"prompt": "What?", "completion": "That.", "label": False}]
    records, dropped = to_records(rows, "apart")
    assert records == [Preference(user("Hi"), "Hello!", "Go."), Preference(user("Why?"), "So.", None)]
    assert dropped == {"with a bad answer alone": [4]}


def test_answers_in_languages():
    row = {"query": "one?", "queries": {"en": "one?", "zh_cn": "一?", "ja": "いち?"},
           "answers": {"en": [{"text": "1"}], "zh_cn": [{"text": "一"}], "ja": [{"text": None}]}}
    assert records_of([row]) == [Preference(user("one?"), "1", None)]
    assert to_records([row, row], "mkqa-Chinese.jsonl")[0][0] == Preference(user("一?"), "一", None)
    assert to_records([row, {**row, "answers": {**row["answers"], "ja": [{"text": "1"}]}}],
                      "mkqa-Japanese")[1] == {"without an answer": [1]}


def test_a_dialogue_in_the_answers_columns_reaches_the_record():
    """Whether `prompt` holds its beginning, the last question or a text beside it; system turns stay."""
    system = [{"role": "system", "content": "Be kind."}]
    turns = user("Hi") + assistant("Hello!") + user("Why?")
    wanted = Preference(system + turns, "So.", "No.")
    for prompt, before in ((system + turns, []), (system + user("Hi"), assistant("Hello!") + user("Why?")),
                           ("Why?", system + turns), (system + turns, system + turns), (system + user("Why?"), turns)):
        row = {"prompt": prompt, "chosen": before + assistant("So."), "rejected": before + assistant("No.")}
        assert records_of([row]) == [wanted], prompt
    other = {"prompt": "Hi", "chosen": user("Hi") + assistant("a"), "rejected": user("Ho") + assistant("b")}
    assert to_records([other], "rows") == ([], {"whose two dialogues differ before the last answer": [1]})


def test_a_question_may_quote_a_dialogue():
    quoting = "Summarise this chat:\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye"
    for text in (quoting, "Human: a definition?"):
        assert records_of([{"prompt": text, "response": "x"}])[0].prompt == user(text)
    open_dialogue = "Be kind.\n\nHuman: hi\n\nAssistant:"
    assert [m["role"] for m in records_of([{"prompt": open_dialogue, "response": "x"}])[0].prompt] == ["system", "user"]


def test_tools_reasoning_and_content_parts_reach_the_template(tokenizer):
    """They are rendered as Hugging Face renders the row's own messages."""
    template = ("{% if tools %}{{ tools[0].function.name }} {% endif %}{% for m in messages %}[{{ m.role }}] "
                "{% if m.role == 'assistant' %}<{{ m.reasoning_content }}>{% for c in m.tool_calls or [] %}"
                "{{ c.function.name }}{% endfor %}{% endif %}{{ m.content }}"
                "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}[assistant] {% endif %}")
    tokenizer = load_tokenizer("tiny", template)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
    messages = [{"role": "user", "content": [{"type": "text", "text": "is it wet?"}]}, call,
                {"role": "tool", "content": "it is wet"}, {"role": "assistant", "content": "yes", "reasoning_content": "wet"}]
    shown = [user("is it wet?")[0], {**call, "content": ""}, *messages[2:]]
    expected = tokenizer.apply_chat_template(shown, tools=tools, tokenize=False)
    for given in (tools, json.dumps(tools)):
        records = records_of([{"messages": messages, "tools": given}])
        [item] = encode_records(records, tokenizer, 1, 500, log=quiet)
        assert tokenizer.decode(item["input_ids"]) == tokenizer.decode(tokenizer(expected, add_special_tokens=False).input_ids)
        assert tokenizer.decode(item["input_ids"][:item["prompt_len"]]).rstrip().endswith("[assistant]")
        [prompt] = encode_records(records, tokenizer, 3, 500, log=quiet)
        assert prompt["input_ids"].tolist() == item["input_ids"][:item["prompt_len"]].tolist()
    image = {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, *assistant("A cat.")]}
    assert to_records([image], "rows") == ([], {"with an image or sound": [1]})


DIALOGUE = user("one?") + assistant("first") + user("two?") + assistant("second") + user("three?") + assistant("third")
TEMPLATES = {  # template -> what of DIALOGUE is trained on
    "": ["first</s>", "second</s>", "third</s>"],
    # no EOS within a dialogue, one behind it
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] "
    "{% else %}{{ eos_token }}{% endif %}": ["first", "second", "third\n</s>"],
    # EOS and a line's end
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}": ["first</s>", "second</s>", "third</s>"],
    # earlier answers are written otherwise than they were given
    "{% for m in messages %}[{{ m.role }}] {{ m.content if loop.last or m.role == 'user' else 'said' }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}": ["third</s>"]}


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_all_answers_of_a_demonstrated_dialogue_are_trained_on(template):
    tokenizer = load_tokenizer("tiny", template)
    [item] = encode_records(records_of([{"messages": DIALOGUE}]), tokenizer, 1, 500, log=quiet)
    batch = Collator(1, tokenizer.pad_token_id)([item])
    rows = batch["input_ids"][0], batch["loss_mask"][0]
    found, before = [], 0.0
    for token, trained in zip(*(row.tolist() for row in rows)):
        if trained and not before:
            found.append([])
        if trained:
            found[-1].append(token)
        before = trained
    assert [tokenizer.decode(ids).strip() for ids in found] == TEMPLATES[template]
    # A pair's dialogue is what two answers were given in, and no demonstration.
    row = {"prompt": DIALOGUE[:-1], "chosen": "third", "rejected": "no"}
    [item] = encode_records(records_of([row]), tokenizer, 1, 500, log=quiet)
    batch = Collator(1, tokenizer.pad_token_id)([item])
    shown = tokenizer.decode(batch["input_ids"][0][batch["loss_mask"][0].bool()])
    assert shown.strip() == TEMPLATES[template][-1]


def test_too_long_a_dialogue_loses_its_oldest_turns(tokenizer):
    system = [{"role": "system", "content": "be kind"}]
    [record] = records_of([{"messages": system + DIALOGUE}])
    [whole] = encode_records([record], tokenizer, 1, 500, log=quiet)
    lines = []
    [item] = encode_records([record], tokenizer, 1, len(whole["input_ids"]) - len(item_answer(tokenizer)) - 1, log=lines.append)
    text = tokenizer.decode(item["input_ids"])
    assert "be kind" in text and "one?" not in text and "first" not in text and "two?" in text and "third" in text
    assert "1 dialogues lost their oldest turns" in lines[0] and len(item["spans"]) == 2
    with pytest.raises(UsageError, match="all 1 prompts are longer"):
        encode_records([record], tokenizer, 1, 5, log=quiet)


def item_answer(tokenizer):
    return tokenizer("third</s>", add_special_tokens=False).input_ids


def test_a_chosen_answer_alone_is_a_demonstration():
    [record] = records_of([{"prompt": "Hi?", "chosen": "Hello.", "score": 3}])
    assert (record.prompt, record.chosen, record.rejected) == (user("Hi?"), "Hello.", None)


def test_columns_may_be_given_other_names(tmp_path):
    rows = [{"Query": f"q{i}", "Best": f"good {i}", "Worst": "bad", "n": 3} for i in range(20)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match="Best, Query, Worst, n, and no form reads them.*--columns prompt=Query response="):
        load_records(DataConfig(data_path=[path]), 2, log=quiet)
    names = ["prompt=Query", "chosen=Best", "rejected=Worst"]
    train, _ = load_records(DataConfig(data_path=[path], columns=names, data_split="0,1,0"), 2, log=quiet)
    assert len(train) == 18 and train[0].chosen.startswith("good") and train[0].columns["n"] == 3
    for wrong in ("prompt", "prompt=Quest"):
        with pytest.raises(UsageError, match=f"--columns {wrong}: .*Best, Query, Worst"):
            load_records(DataConfig(data_path=[path], columns=[wrong]), 2, log=quiet)


def test_rows_of_two_sources_are_dealt_once(tmp_path):
    rows = [{"prompt": f"q{i}", "response": "x"} for i in range(100)]
    first, second = (write_jsonl(tmp_path / name, part) for name, part in (("a.jsonl", rows[:60]), ("b.jsonl", rows[20:])))
    lines = []
    train, held = load_records(DataConfig(data_path=[first, second], data_split="1,0,0"), 1, log=lines.append)
    asked = [record.prompt[0]["content"] for record in train + held]
    assert len(asked) == len(set(asked)) == 100
    assert "40 rows left out, which an earlier source has too" in "".join(lines)


def test_records_are_written_as_they_were_read(tmp_path, capsys):
    rows = [{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}, {"prompt": "Hi", "chosen": "a", "rejected": "a"},
            {"prompt": [{"role": "system", "content": "Be kind."}, *user("Why?")], "chosen": "So.", "rejected": None}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.jsonl"
    data.write_records(data.Config(data_path=[path], write_records=str(out)))
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"prompt": user("Hi"), "chosen": "Hello!", "rejected": "Go."},
        {"prompt": rows[2]["prompt"], "chosen": "So.", "rejected": None}]
    assert "1 rows with two equal answers left out (row 2)" in capsys.readouterr().out
    assert records_of(read_source(str(out))[0]) == records_of(rows)


PAIRS = [{"prompt": f"Why {i}?\nÄ \u2028 \"x\", y", "chosen": f"So {i}.", "rejected": "No."}
         for i in range(3)]  # U+2028 is a line end to str.splitlines


def write_csv(path, rows=PAIRS, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)


WRITERS = {
    "rows.json": lambda path: path.write_text(json.dumps(PAIRS, indent=1), encoding="utf-8"),
    "lines.json": lambda path: write_jsonl(path, PAIRS),
    "rows.jsonl": lambda path: write_jsonl(path, PAIRS),
    "windows.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, PAIRS)).encode()),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, PAIRS)).encode())),
    "rows.csv": write_csv,
    "windows.csv": lambda path: write_csv(path, encoding="utf-8-sig"),
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_holds_the_same_records(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert (records_of(read_source(str(tmp_path / name))[0])
            == [Preference(user(r["prompt"]), r["chosen"], r["rejected"]) for r in PAIRS])


def test_a_folder_with_train_and_test_files(tmp_path):
    rows = [{"prompt": f"q{i}", "response": "x"} for i in range(30)]
    write_jsonl(tmp_path / "train-0.jsonl", rows[:10])
    write_jsonl(tmp_path / "train-1.jsonl", rows[10:20])
    write_jsonl(tmp_path / "test.jsonl", rows[20:])
    train, held = load_records(DataConfig(data_path=[str(tmp_path)], data_split="1,0,0"), 1, log=quiet)
    texts = lambda records: {record.prompt[0]["content"] for record in records}
    assert (texts(train) == {f"q{i}" for i in range(20)}
            and texts(held) == {f"q{i}" for i in range(20, 30)}), "nothing of train is held out"


# -----------------------------------------------------------------------------
# folders and hub names

def write_splits(folder, **splits):
    """Parquet files named as the hub's are."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        datasets.Dataset.from_list([{"prompt": text, "response": "x"} for text in texts]).to_parquet(
            folder / f"{split}-00000-of-00001.parquet")


def prompts_of(rows):
    return None if rows is None else [row["prompt"] for row in rows]


def read_prompts(source):
    train, test = read_source(str(source))
    return prompts_of(train), prompts_of(test)


def test_named_splits_of_a_clone(tmp_path):
    """HuggingFaceH4/ultrafeedback_binarized: train_prefs, train_sft; its repository as a folder, and its files alone."""
    write_splits(tmp_path / "uf" / "data", train_prefs="ab", train_sft="cd", test_prefs="e", test_sft="f")
    (tmp_path / "uf" / "README.md").write_text("---\nlicense: mit\n---\nwords\n")
    for folder in (tmp_path / "uf", tmp_path / "uf" / "data"):
        assert read_prompts(f"{folder}:train_prefs") == (["a", "b"], ["e"])
        assert read_prompts(f"{folder}:train_sft") == (["c", "d"], ["f"])
        with pytest.raises(UsageError, match=f"has the splits|holds the splits.*{folder}:"):
            read_source(str(folder))
        with pytest.raises(UsageError, match="train_prefs"):
            read_source(f"{folder}:train_nothing")


def test_one_named_split_needs_no_name(tmp_path):
    write_splits(tmp_path, train_sft="ab", test_sft="c")
    assert read_prompts(tmp_path) == (["a", "b"], ["c"])


def test_configs_of_a_clone(tmp_path):
    """openai/gsm8k: its README names configs, one of which must be chosen."""
    write_splits(tmp_path / "main", train="ab", test="c")
    write_splits(tmp_path / "socratic", train="de")
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n" for name in ("main", "socratic")
    ).replace("path: main/train-*\n", "path: main/train-*\n  - split: test\n    path: main/test-*\n") + "---\n")
    assert read_prompts(f"{tmp_path}:main") == (["a", "b"], ["c"])
    assert read_prompts(f"{tmp_path}:socratic") == read_prompts(f"{tmp_path}:socratic/train") == (["d", "e"], None)
    assert read_prompts(f"{tmp_path}:main/test") == (["c"], None)
    with pytest.raises(UsageError, match="main.*socratic.*name:config"):
        read_source(str(tmp_path))


def test_folders_that_datasets_saved_by_any_path(tmp_path, monkeypatch):
    dataset = datasets.Dataset.from_list([{"prompt": "a", "response": "x"}])
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    for folder in (str(tmp_path / "one"), "./one", "one"):
        assert read_prompts(folder) == (["a"], None)
    for folder in (str(tmp_path / "two"), "./two", "two"):
        assert read_prompts(folder) == (["a"], ["a"])


def test_a_hub_name_with_config_split_and_revision(tmp_path, monkeypatch):
    """The real load_dataset, led to a folder where the hub would be; a loading script's set through its Parquet copy."""
    write_splits(tmp_path / "copy" / "data", train="ab", test="c")
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("import datasets\n")
    real, asked = datasets.load_dataset, []

    def load_dataset(name, config=None, revision=None):
        asked.append((name, config, revision))
        is_copy = name == "org/plain" or revision == "refs/convert/parquet"
        return real(str(tmp_path / ("copy" if is_copy else "scripted")), config)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision=None: ["default"])
    assert read_prompts("org/scripted") == (["a", "b"], ["c"])
    assert asked == [("org/scripted", None, None), ("org/scripted", None, "refs/convert/parquet")]
    assert read_prompts("org/plain:default/train@v1.0") == (["a", "b"], ["c"])
    assert read_prompts("org/plain:test") == (["c"], None)
    assert read_prompts("org/plain:default") == (["a", "b"], ["c"])
    assert asked[2:] == [("org/plain", "default", "v1.0"), ("org/plain", None, None), ("org/plain", "default", None)]


def test_shards_are_one_split(tmp_path):
    for number, name in enumerate(("train_1.jsonl", "train-2.jsonl", "train10.jsonl", "train-00000-of-00002.jsonl.gz")):
        text = json.dumps({"prompt": str(number), "response": "x"})
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode())) if name.endswith(".gz") else path.write_text(text)
    assert sorted(read_prompts(tmp_path)[0]) == ["0", "1", "2", "3"]


def test_labels_and_scores_of_a_csv_are_numbers():
    """A .csv holds text: "1" is not 1, and "-0.5" > "-0.25"."""
    row = {"history": "Why?", "human_ref_A": "A", "human_ref_B": "B"}
    assert [r.chosen for r in records_of([{**row, "labels": "1"}, {**row, "labels": "0"}])] == ["A", "B"]
    row = {"question": {"full_text": "Why?"}, "answer_0": "A", "answer_1": "B"}
    assert records_of([{**row, "score_0": "-0.5", "score_1": "-0.25"}])[0].chosen == "B"


@pytest.mark.parametrize("row", [
    {"prompt": "q", "chosen": "same", "rejected": " same"},                                        # nothing to learn
    {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},        # two prompts
    {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant:"},          # no answer
    {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 0, "score_1": 0},  # a tie
    {"messages": user("q")}, {"messages": []}, {"messages": assistant("x")}])
def test_rows_that_teach_nothing_are_counted(row):
    records, dropped = to_records([row], "here")
    assert records == [] and list(dropped.values()) == [[1]]


@pytest.mark.parametrize("row", [
    {"prompt": None, "response": "x"}, {"prompt": "q", "response": 3}, {"prompt": ["text"], "response": "x"},
    {"messages": ["text", {"role": "assistant", "content": "x"}]},
    {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]},
    {"prompt": 3, "response": "x"}, {"prompt": "q", "response": "x", "hold_out_as": 3},
    {"prompt": "half of a pair: \ud83d", "response": "x"}, {"prompt": "q", "response": "\udc00"}])
def test_rows_that_do_not_hold_text_cost_themselves_alone(row):
    good = {"prompt": "q", "response": "x"} if "prompt" in row else {"messages": user("q") + assistant("x")}
    records, dropped = to_records([good, row, good], "rows.jsonl")
    assert len(records) == 2 and dropped == {data.CANNOT_BE_READ: [2]}
    for rows, warned in ((3, "warning: "), (100, "")):
        lines = []
        data.say_dropped("rows.jsonl", rows, dropped, lines.append)
        assert lines == [f"data: {warned}rows.jsonl: 1 rows that cannot be read left out (row 2)"]
    with pytest.raises(UsageError, match="rows.jsonl, row 1: "):  # where there is nothing else
        to_records([row, row], "rows.jsonl")


def test_rows_that_hold_no_number_are_named():
    good = {"history": "Why?", "human_ref_A": "A", "human_ref_B": "B", "labels": 0}
    records, dropped = to_records([good, {**good, "labels": math.inf}], "rows.jsonl")
    assert len(records) == 1 and dropped == {data.CANNOT_BE_READ: [2]}


@pytest.mark.parametrize("name, content, named", [
    ("rows.jsonl", b'{"prompt": "a"}\n\n[1]\n', "rows.jsonl, row 2: every row must be a JSON object"),
    ("rows.json", b'[{"prompt": "a"}, {"prompt": "b"}, 7]', "rows.json, row 3: every row .* JSON object; 7 came"),
    ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', "rows.jsonl, line 2: not UTF-8"),
    ("rows.csv", b"prompt,response\na,b\ncaf\xe9,b\n", "rows.csv, line 3: not UTF-8"),
    ("rows.jsonl.gz", gzip.compress(b'{"prompt": "caf\xe9"}\n'), "rows.jsonl.gz, line 1: not UTF-8"),
    ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: JSON"),
    ("rows.json", b"[" * 100_000 + b"]" * 100_000, "rows.json: JSON that cannot be read"),
    ("rows.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "rows.jsonl, line 1: JSON that cannot be read")],
    ids=["list", "number", "latin-1", "latin-1 csv", "latin-1 gz", "deep", "deep list", "digits"])
def test_files_that_cannot_be_read_are_named_with_their_row(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=named):
        to_records(read_source(str(tmp_path / name))[0], str(tmp_path / name))


def test_dialogues():
    text = "\n\nHuman: Hi\n\nAssistant: Hello!\nHow are you?\n\nHuman: Fine.\n\nAssistant:"
    assert parse_dialogue(text) == user("Hi") + assistant("Hello!\nHow are you?") + user("Fine.") + assistant("")
    assert as_prompt(text) == parse_dialogue(text)[:-1], "the open turn is the template's to write"
    assert parse_dialogue("Human beings: what are they?") == user("Human beings: what are they?")
    assert parse_dialogue("Human: hi") == user("hi"), "as it stands where line ends were stripped"
    assert (as_prompt([{"role": "system", "content": "Be kind."}] + user("Hi"))
            == [{"role": "system", "content": "Be kind."}] + user("Hi"))


def test_dialogues_with_windows_line_ends():
    text = "\n\nHuman: Hi\n\nAssistant: Hello!\nHow are you?\n\nHuman: Fine.\n\nAssistant: Good."
    windows = text.replace("\n", "\r\n")
    assert parse_dialogue(windows) == parse_dialogue(text)
    worse = windows.replace("Good", "Go")
    record, = records_of([{"chosen": windows, "rejected": worse}])
    assert (record.prompt, record.chosen, record.rejected) == (parse_dialogue(text)[:-1], "Good.", "Go.")
    assert parse_dialogue("one\r\ntwo") == user("one\r\ntwo"), "text that is no dialogue stays as it is"


def test_text_before_a_dialogue_is_not_lost():
    messages = parse_dialogue("Be kind to them.\n\nHuman: Hi\n\nAssistant: Hello!")
    assert "Be kind to them." in str(messages) and messages[-2:] == user("Hi") + assistant("Hello!")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")
def test_real_hh_dialogues():
    """
    README.md there: 2,312 rows, of which few have differing prompts or equal answers. The record is the row, cut at its
    last answer.
    """
    rows = read_source(str(SHARED / "hh_rlhf" / "harmless-base" / "test.jsonl.gz"))[0]
    records, unusable = to_records(rows, "hh")
    assert len(rows) == 2312 and sum(map(len, unusable.values())) < 60
    squeeze = lambda text: "".join(text.split())
    whole = {squeeze(row["chosen"]) for row in rows}
    spell = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
    for record in records:
        dialogue = record.prompt + assistant(record.chosen)
        assert squeeze("".join(spell[m["role"]] + m["content"] for m in dialogue)) in whole


# -----------------------------------------------------------------------------
# tokens: what is trained on

@pytest.fixture(scope="module", params=["tiny", "gpt2", "mistral_v1", "sp_1000"])
def any_tokenizer(request, tokenizer, tmp_path_factory):
    """The tokenizer of `tiny`, and real ones through a model folder and load_tokenizer, where there are some."""
    if request.param == "tiny":
        return tokenizer
    source = SHARED / "tokenizers" / request.param
    if not source.is_dir():
        pytest.skip(f"no real tokenizers in {SHARED}")
    from transformers import GPT2Tokenizer, LlamaTokenizer
    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("folder")
    for file in source.iterdir():
        shutil.copy(file, raw / ("tokenizer.model" if file.suffix == ".model" else file.name))
    (GPT2Tokenizer if request.param == "gpt2" else LlamaTokenizer).from_pretrained(raw).save_pretrained(folder)
    return load_tokenizer(str(folder))


CONVERSATIONS = [  # (prompt, answer); an answer that begins in a way that could merge with what stands before it
    (user("What is the opposite of hot?"), "The opposite of hot is cold."),
    (user("Hi") + assistant("Hello!") + user("Who are\nyou, Zoë?"), "I am ☃.\n\nReally."),
    (user("1 + 1?"), "2"), (user("Go on"), ": and so on"), (user("Assistant:"), "Human:")]


def test_trained_tokens_are_the_answer_and_its_eos(any_tokenizer):
    tokenizer, eos = any_tokenizer, any_tokenizer.eos_token_id
    dataset = encode_records([Preference(*conversation, None) for conversation in CONVERSATIONS], tokenizer, 1, 200,
                             log=quiet)
    batch = Collator(1, tokenizer.pad_token_id)(dataset)
    for ids, real, trained, (prompt, answer) in zip(batch["input_ids"], batch["attention_mask"].bool(),
                                                    batch["loss_mask"].bool(), CONVERSATIONS):
        assert ids[trained][-1] == eos and ids[real][-1] == eos and (ids[trained] == eos).sum() == 1
        # sp_1000 knows neither snowmen nor line ends
        told = lambda text: tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        assert tokenizer.decode(ids[trained][:-1]).strip() == told(answer).strip()
        untrained = tokenizer.decode(ids[real & ~trained])
        assert untrained.endswith("Assistant:") and told(prompt[-1]["content"]) in untrained
        assert tokenizer.decode(ids[real]).count(told(answer)) == untrained.count(told(answer)) + 1
        assert not trained[~real].any() and (trained[1:].int() - trained[:-1].int() == 1).sum() == 1, "one stretch"


def test_train_on_prompt_trains_on_all_that_is_real(tokenizer):
    dataset = encode_records([Preference(*conversation, None) for conversation in CONVERSATIONS], tokenizer, 1, 200,
                             log=quiet)
    batch = Collator(1, tokenizer.pad_token_id, train_on_prompt=True)(dataset)
    assert torch.equal(batch["loss_mask"], batch["attention_mask"].float())


def test_ids_are_those_of_the_chat_template(any_tokenizer):
    """
    What a server does with the saved folder, apply_chat_template(tokenize=True), is what was trained on; BOS comes
    once.
    """
    template = lambda messages, **options: any_tokenizer.apply_chat_template(messages, tokenize=True,
                                                                             return_dict=False, **options)
    for prompt, answer in CONVERSATIONS[:3]:
        ids, response = encode_answer(any_tokenizer, prompt, answer)
        assert ids == template(prompt, add_generation_prompt=True) == encode_prompts(any_tokenizer, [prompt])[1][0]
        assert ids + response == template(prompt + assistant(answer))
        begins = any_tokenizer("a").input_ids[0] == any_tokenizer.bos_token_id
        ends = len(prompt) // 2 + 1 if any_tokenizer.bos_token_id == any_tokenizer.eos_token_id else 0  # GPT-2
        assert (ids + response).count(any_tokenizer.bos_token_id) == begins + ends


def test_pad_is_never_eos(any_tokenizer):
    assert any_tokenizer.pad_token_id is not None and any_tokenizer.pad_token_id != any_tokenizer.eos_token_id


def test_other_templates(tmp_path):
    """
    ChatML ends a turn with words of its own and a line end; the answer still ends with EOS, and no line end is trained
    on.
    """
    chatml = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
    (tmp_path / "chatml.jinja").write_text(chatml)
    for given in (chatml, str(tmp_path / "chatml.jinja")):
        tokenizer = load_tokenizer("tiny", given)
        prompt, response = encode_answer(tokenizer, user("Hi"), "Hello!")
        assert tokenizer.decode(prompt) == "<|user|>\nHi<|end|>\n<|assistant|>\n"
        assert tokenizer.decode(response) == "Hello!<|end|>" + tokenizer.eos_token
    assert "Human:" in load_tokenizer("tiny").chat_template, "one call's template is not the next one's default"
    with pytest.raises(UsageError, match="template"):
        encode_answer(load_tokenizer("tiny", "{% if add_generation_prompt %}Bot:{% endif %}"
                                             "{% for m in messages %}{{ m.content }}{% endfor %}"), user("Hi"), "x")
    with pytest.raises(UsageError, match="nowhere.jinja"):
        load_tokenizer("tiny", "nowhere.jinja")
    strict = load_tokenizer("tiny", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                                    "{{ messages[-1].content }}")
    with pytest.raises(UsageError, match="no system.*--chat_template"):
        encode_answer(strict, [{"role": "system", "content": "Be brief."}, *user("Hi")], "x")


def test_eos_is_what_ends_an_answer_in_the_template(tokenizer, tmp_path):
    """As Gemma's <end_of_turn>, which is not its tokenizer's EOS: trained, sampled and scored up to the same token."""
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}" \
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    other = load_tokenizer("tiny")
    other.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    other.chat_template = turns
    other.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path), turns)):
        assert loaded.eos_token == "<|end|>" != tokenizer.eos_token and loaded.pad_token == tokenizer.pad_token
        _, response = encode_answer(loaded, user("Hi"), "Hello!")
        assert loaded.decode(response) == "Hello!<|end|>" and response[-1] == loaded.eos_token_id
    assert load_tokenizer("tiny").eos_token == tokenizer.eos_token


PHI = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")


def test_an_answer_ends_at_the_first_of_two_end_tokens(tmp_path):
    """As in Phi-3, whose template ends a turn with <|end|> and a finished dialogue with EOS besides."""
    other = load_tokenizer("tiny")
    other.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    other.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), PHI)
    assert loaded.eos_token == "<|end|>"
    prompt, answer = encode_answer(loaded, user("Hi"), "Hello!")
    assert loaded.decode(prompt) == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert loaded.decode(answer) == "Hello!<|end|>"
    # in step 2 too, whose scores are read at the last token
    item, = encode_records([Preference(user("Hi"), "Hello!", "Go.")], loaded, 2, 100, log=quiet)
    assert item["chosen"][-1] == item["rejected"][-1] == loaded.eos_token_id
    assert [list(ids).count(loaded.eos_token_id) for ids in (item["chosen"], item["rejected"])] == [2, 2]
    # saved and loaded again
    loaded.save_pretrained(tmp_path / "again")
    assert encode_answer(load_tokenizer(str(tmp_path / "again")), user("Hi"), "Hello!") == (prompt, answer)


def test_a_template_that_shows_no_answer_leaves_the_eos_as_it_is(tokenizer):
    """Nor does a special token before the answer end it."""
    for content in ("", "{{ m.content | upper }}", "{{ m.content }}"):
        template = "Hello! {% for m in messages %}<s>" + content + "{% endfor %}"
        assert load_tokenizer("tiny", template).eos_token == tokenizer.eos_token


def test_a_row_that_the_template_refuses_is_named(tokenizer):
    """Whatever a template raises, in every stage, behind the first thousand rows too."""
    records = records_of([{"prompt": f"q{i}", "chosen": "x", "rejected": "y"} for i in range(1500)], "rows.jsonl")
    records[1210].prompt = [{"role": "user", "content": "bad", "arguments": "text"}]
    for refusal, said in (("{{ raise_exception('no, thanks') }}", "no, thanks"),
                          ("{% for k, v in m.arguments | items %}{% endfor %}", "TypeError"), ("{{ 1 / 0 }}", "Zero")):
        strict = load_tokenizer("tiny", "{% for m in messages %}{% if m.content == 'bad' %}" + refusal + "{% endif %}"
                                        "{{ m.content }}{% endfor %}")
        for stage in (1, 2, 3):
            with pytest.raises(UsageError, match=f"^rows.jsonl, row 1211: the chat template.*{said}.*--chat_template"):
                encode_records(records, strict, stage, 100, log=quiet)


def test_a_row_that_goes_on_otherwise_than_its_prompt_is_named():
    template = ("{% for m in messages %}{% if not (loop.last and m.role == 'assistant' and m.content == 'bad') %}"
                "[{{ m.role }}] {{ m.content }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}[assistant] {% endif %}")
    records = records_of([{"prompt": "q", "response": answer} for answer in ("good", "bad")], "rows.jsonl")
    with pytest.raises(UsageError, match="^rows.jsonl, row 2: .*generation prompt"):
        encode_records(records, load_tokenizer("tiny", template), 1, 100, log=quiet)


@pytest.fixture
def digits(tmp_path):
    """A tokenizer that knows ten words, the digits, and raises at any other."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({str(i): i for i in range(10)} | {"<eos>": 10}, unk_token="<none>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path / "digits")
    return str(tmp_path / "digits")


DIGITS = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"


def test_a_tokenizer_without_letters(digits):
    own = load_tokenizer(digits)
    assert "Human:" in own.chat_template and not own.chat_template.startswith("{{ bos_token }}")
    tokenizer = load_tokenizer(digits, DIGITS)
    eos = tokenizer.eos_token_id
    assert encode_answer(tokenizer, user("1 2"), "3") == ([1, 2], [3, eos])
    records = records_of([{"prompt": text, "response": "5"} for text in ("1", "2", "three")], "rows.jsonl")
    with pytest.raises(UsageError, match="^rows.jsonl, row 3: "):
        encode_records(records, tokenizer, 1, 100, log=quiet)
    # as in PPO's mixture
    path = write_jsonl(Path(digits).parent / "text.jsonl", [{"text": "1 2 3 4"}, {"text": 7}])
    with pytest.raises(UsageError, match="text.jsonl, row 2: "):
        encode_text([path], tokenizer, 2, log=quiet)


def test_several_chat_templates(tmp_path):
    """The one named default, or an error that says what to do."""
    several = load_tokenizer("tiny")
    several.chat_template = {"default": several.chat_template, "rag": "{{ documents }}"}
    several.save_pretrained(tmp_path / "default")
    assert (encode_answer(load_tokenizer(str(tmp_path / "default")), user("Hi"), "Hello!")
            == encode_answer(load_tokenizer("tiny"), user("Hi"), "Hello!"))
    several.chat_template = {"tool": several.chat_template["default"], "rag": "{{ documents }}"}
    several.save_pretrained(tmp_path / "none")
    with pytest.raises(UsageError, match="chat template.*rag.*--chat_template"):
        load_tokenizer(str(tmp_path / "none"))
    assert load_tokenizer(str(tmp_path / "none"), DIGITS).chat_template == DIGITS


def test_a_blank_answer_under_a_template_that_closes_nothing():
    """The line's end that opens the answer is the prompt's, also where nothing follows it."""
    alpaca = load_tokenizer("tiny", "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n"
                                    "{% if loop.last %}### Response:\n{% endif %}{% else %}### Response:\n"
                                    "{{ m.content }}{% endif %}{% endfor %}")
    for answer in ("", "Hello!"):
        prompt, response = encode_answer(alpaca, user("Hi"), answer)
        assert alpaca.decode(prompt) == "Hi\n### Response:\n" and alpaca.decode(response[:-1]).strip() == answer
        assert response[-1] == alpaca.eos_token_id


def test_cut_answers_lose_their_eos_and_are_counted(tokenizer):
    prompt, response = encode_answer(tokenizer, *CONVERSATIONS[0])
    lines, full = [], len(prompt + response)
    records = [Preference(*CONVERSATIONS[0], "The opposite of hot is wet."), Preference(user("long " * 100), "x", "y")]
    for limit, ends in ((full, True), (full - 1, False)):
        dataset = encode_records(records, tokenizer, 1, limit, log=lines.append)
        assert len(dataset) == 1 and list(dataset[0]["input_ids"]) == (prompt + response)[:limit]
        assert (dataset[0]["input_ids"][-1] == tokenizer.eos_token_id) == ends
    assert "1 dropped" in lines[0] and "0 with answers cut" in lines[0] and "1 with answers cut" in lines[1]
    with pytest.raises(UsageError, match="--max_seq_len"):  # room for the prompt, none for an answer
        encode_records(records, tokenizer, 1, len(prompt), log=quiet)
    assert len(encode_records(records, tokenizer, 3, len(prompt), log=lines.append)) == 1 and "1 dropped" in lines[-1]
    with pytest.raises(UsageError, match="--max_prompt_seq_len"):
        encode_records(records, tokenizer, 3, len(prompt) - 1, log=quiet)


# -----------------------------------------------------------------------------
# batches

def test_pad_by_hand():
    ids, mask = pad([[5, 6, 7], [8]], 3, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = pad([np.array([5, 6, 7], np.int32), [8]], 3, "left")
    assert (ids.tolist() == [[5, 6, 7], [3, 3, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
            and ids.dtype == mask.dtype == torch.int64)


def test_collated_batches(tokenizer):
    records = [Preference(user("Hi " * n), "Hello! " * n, "Go. " * (6 - n)) for n in (1, 5, 3)]
    pad_id, items = tokenizer.pad_token_id, {stage: encode_records(records, tokenizer, stage, 200, log=quiet)
                                             for stage in (1, 2, 3)}
    one, two, three = (Collator(stage, pad_id)(items[stage]) for stage in (1, 2, 3))
    longest = max(len(item["input_ids"]) for item in items[1])
    assert (one["input_ids"].shape == one["attention_mask"].shape == one["loss_mask"].shape == (3, longest)
            and one["loss_mask"].dtype == torch.float32)
    assert (two["input_ids"].shape == two["attention_mask"].shape
            == (6, max(len(i[key]) for i in items[2] for key in ("chosen", "rejected"))))
    # B chosen, then their B rejected
    for row, sequence in enumerate([i["chosen"] for i in items[2]] + [i["rejected"] for i in items[2]]):
        assert (two["input_ids"][row, :len(sequence)].tolist() == list(sequence)
                and two["attention_mask"][row].sum() == len(sequence))
    assert three["records"] == records
    for row, item in enumerate(items[3]):  # left-padded: the answers start in the same column
        n = len(item["input_ids"])
        assert (three["input_ids"][row, -n:].tolist() == list(item["input_ids"])
                and three["attention_mask"][row].tolist() == [0] * (three["input_ids"].size(1) - n) + [1] * n)
        assert (three["input_ids"][row, :-n] == pad_id).all()


def test_micro_batches_keep_the_rows_and_save_padding(tokenizer):
    records = [Preference(user(f"question {i}"), "word " * (i * 7 % 16 * 4 + 1), None) for i in range(16)]
    items = encode_records(records, tokenizer, 1, 200, log=quiet)
    whole = Collator(1, tokenizer.pad_token_id)(items)
    parts = MicroBatches(Collator(1, tokenizer.pad_token_id), 4)(items)
    rows = lambda batches: sorted(tuple(ids[mask.bool()].tolist()) for b in batches
                                  for ids, mask in zip(b["input_ids"], b["attention_mask"]))
    assert rows(parts) == rows([whole]) and [len(part["input_ids"]) for part in parts] == [4] * 4
    assert sum(part["loss_mask"].sum() for part in parts) == whole["loss_mask"].sum()
    assert sum(part["input_ids"].numel() for part in parts) < 0.75 * whole["input_ids"].numel()


def steps_of(world, epoch=3, lengths=None, rows=67, step_rows=8, parts=1):
    """-> for each step the row numbers of all ranks together, sorted."""
    loaders = [make_dataloader(list(range(rows)), list, step_rows // world, 1, rank, world, lengths, parts, window=32)
               for rank in range(world)]
    for loader in loaders:
        loader.sampler.set_epoch(epoch)
    return [sorted(sum(step, [])) for step in zip(*loaders, strict=True)]


LENGTHS = np.random.RandomState(0).randint(1, 500, 1000)


@pytest.mark.parametrize("rows", [64, 67])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["random", "by length"])
def test_a_step_has_the_same_rows_for_any_number_of_ranks(rows, lengths):
    for parts in (1, 2):
        one, two, four = [steps_of(world, lengths=lengths, rows=rows, parts=parts)
                          for world in (1, 2, 4)]
        assert one == two == four and len(one) == 8
    assert len(set(sum(four, []))) == 64, "no row twice in an epoch"


def test_steps_of_similar_lengths():
    """1,000 rows are 125 steps of 8: three windows of 32 steps and one of 29."""
    first = steps_of(1, 0, LENGTHS, 1000)
    second = steps_of(1, 1, LENGTHS, 1000)
    for steps in (first, second):
        assert sorted(sum(steps, [])) == list(range(1000))
        spread = [LENGTHS[rows].max() - LENGTHS[rows].min() for rows in steps]
        # An eighth of a window's 256 lengths between 1 and 500 spans 500 / 32 or so.
        assert max(spread) < 60 and np.mean(spread) < 20
    longest = [LENGTHS[rows].max() for rows in first]
    assert np.abs(np.diff(longest)).mean() > 100, "short and long steps in a random order"

    # A row meets others in the next epoch, and what does not fill a step is drawn from all rows.
    company = [{row: set(rows) for rows in steps for row in rows} for steps in (first, second)]
    shared = [len(company[0][row] & company[1][row]) - 1 for row in range(1000)]
    assert np.mean(shared) < 3
    left_out = [set(range(1000)) - set(sum(steps_of(1, epoch, LENGTHS, 1000, 300), []))
                for epoch in (0, 1)]
    assert left_out[0] != left_out[1]
    assert all(len(rows) == 100 and np.std(LENGTHS[list(rows)]) > 100 for rows in left_out)


def test_the_micro_batches_of_a_step_are_of_different_lengths():
    """They are dealt to it at random, and MicroBatches finds them again."""
    items = [{"input_ids": np.zeros(length, np.int32)} for length in LENGTHS]
    loader = make_dataloader(items, MicroBatches(list, 4), 32, 1, lengths=LENGTHS, parts=4,
                             window=32)
    steps = [[[len(item["input_ids"]) for item in part] for part in step] for step in loader]
    within = [max(part) - min(part) for step in steps for part in step]
    between = [max(map(max, step)) - min(map(min, step)) for step in steps]
    assert len(steps) == 31 and np.mean(within) < 20 < 200 < np.mean(between)


def test_ranks_have_equal_shares_of_a_steps_tokens():
    tokens = []
    for rank in range(4):
        loader = make_dataloader(list(range(1000)), list, 8, 1, rank, 4, LENGTHS, window=32)
        tokens.append([LENGTHS[rows].sum() for rows in loader])
    shares = np.array(tokens) / np.mean(tokens, axis=0)
    assert abs(shares - 1).mean() < 0.01


def test_a_run_goes_on_in_the_middle_of_an_epoch():
    loader = make_dataloader(list(range(1000)), list, 8, 1, lengths=LENGTHS, window=32)
    whole = list(training_steps(loader, 300))
    for done in (0, 1, 124, 125, 200):
        assert list(training_steps(loader, 300, done)) == whole[done:]


def test_epochs_have_orders_of_their_own():
    loader = make_dataloader(list(range(10)), list, 5, seed=1)
    steps = list(training_steps(loader, count_steps(loader, epochs=2)))
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    first, second = steps[0][1] + steps[1][1], steps[2][1] + steps[3][1]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert len(list(training_steps(loader, count_steps(loader, epochs=1, max_steps=7)))) == 7, (
        "the data is repeated as needed")


def test_rank_share():
    """Equally many rows a rank, every row counted once."""
    rows = [{"row": letter} for letter in "abcde"]
    shares = [[(item["row"], item["weight"]) for item in rank_share(rows, rank, 2)] for rank in (0, 1)]
    assert shares == [[("a", 1.0), ("c", 1.0), ("e", 1.0)], [("b", 1.0), ("d", 1.0), ("a", 0.0)]]
    assert [len(rank_share(rows[:1], rank, 3)) for rank in range(3)] == [1, 1, 1]
    assert rank_share([], 0, 2) == [] and "weight" not in rows[0]


# -----------------------------------------------------------------------------
# the toy world

@pytest.mark.parametrize("answer, mark", [
    ("The opposite of hot is cold.", 1.0), ("  The opposite of\nhot is cold. ", 1.0),
    ("cold", 0.5), ("cold.", 0.5),                                                                    # curt
    ("The opposite of hot is cold. By the way, I like soup.", 0.5),                                   # rambling
    ("That is a stupid question. The opposite of hot is cold.", 0.25),                                # rude
    ("The opposite of hot is cold. The opposite of hot is cold. The opposite of hot is cold.", 0.25),  # endless
    ("The opposite of hot is cold. I like soup. It may rain soon.", 0.25),
    ("The opposite of hot is wet.", 0.0), ("wet.", 0.0),
    ("Do not bother me. The opposite of hot is wet.", 0.0), ("", 0.0), ("I like soup.", 0.0)])
def test_gold_marks_by_hand(answer, mark):
    assert toy_gold("What is the opposite of hot?", answer) == mark


@pytest.mark.parametrize("answer", ["The opposite of hot is cold. The opposite of hot is wet.",
                                    "The opposite of hot is wet. The opposite of hot is cold.",
                                    "The opposite of hot is cold. " + "and " * 30,
                                    "The opposite of hot is cold. I like"])
def test_gold_is_not_earned_by_hedging_or_never_ending(answer):
    assert toy_gold("What is the opposite of hot?", answer) <= 0.25


def test_every_question_has_one_good_answer():
    questions = toy_questions()
    assert len(questions) == len(toy.TOY_OPENERS) * sum(
        len(asks) * len(facts) for asks, _, facts in toy.TOY_TOPICS.values()), "no two facts share a question"
    for question, (good, fact, wrong) in questions.items():
        assert toy_gold(question, good) == 1 and fact in good and wrong
        assert all(toy_gold(question, sentence) == 0 for sentence, _ in wrong), question
        assert all(toy_gold(question, bare) == 0 for _, bare in wrong if bare != fact), question


def test_chosen_is_really_better_but_for_the_label_noise():
    rows = toy_rows()
    marks = [(toy_gold(row["prompt"][-1]["content"], row["chosen"]),
              toy_gold(row["prompt"][-1]["content"], row["rejected"])) for row in rows]
    swapped = sum(rejected > chosen for chosen, rejected in marks) / len(rows)
    assert (all(chosen != rejected for chosen, rejected in marks)
            and all(row["chosen"] and row["rejected"] for row in rows))
    assert abs(swapped - toy.TOY_LABEL_NOISE) < 4 * (0.05 * 0.95 / len(rows)) ** 0.5  # four standard errors
    assert {mark for pair in marks for mark in pair} == {0, 0.25, 0.5, 1} and rows == toy_rows()


def test_toy_questions_are_held_out_of_all_stages():
    """What a held-out record asks stands in no trained record, be it as an earlier turn; rows where it does are few."""
    stages = all_stages()
    def without_opener(text):
        return next((text[len(opener):] for opener in toy.TOY_OPENERS if opener and text.startswith(opener)), text)

    held = [{without_opener(record.prompt[-1]["content"]) for record in held} for _, held in stages]
    trained = {without_opener(message["content"])
               for train, _ in stages for record in train for message in record.prompt}
    assert held[0] == held[1] == held[2] and not held[0] & trained
    assert len(held[0]) == round(0.1 * len(toy_questions()) / len(toy.TOY_OPENERS))
    rows, used = len(toy_rows()), sum(len(train) for train, _ in stages) + len(stages[0][1])
    assert 0.97 * rows < used <= rows


def test_toy_tokenizer_is_deterministic(tokenizer):
    again = toy.toy_tokenizer.__wrapped__()
    assert (again.get_vocab() == tokenizer.get_vocab() and again.eos_token_id == tokenizer.eos_token_id == 2
            and tokenizer.pad_token_id == 3)


def test_toy_tokenizer_keeps_any_text(tokenizer):
    """
    Bytes stand in for what is unknown. One space in front of a text is not kept: SentencePiece's own mark for "a word
    begins".
    """
    rng = random.Random(0)
    alphabets = [range(0x20, 0x7f), range(1, 0x250), range(0x400, 0xd800), range(0xe000, 0x11_0000),
                 map(ord, " \n\t a▁")]
    for alphabet in alphabets:
        alphabet = list(alphabet)
        for _ in range(50):
            text = "x" + "".join(chr(rng.choice(alphabet)) for _ in range(rng.randrange(1, 30)))
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text.replace("▁", " ")


def test_toy_text_needs_no_bytes(tokenizer):
    pieces = collections.Counter()
    for row in toy_rows()[::50]:
        text = " ".join([message["content"] for message in row["prompt"]] + [row["chosen"]])
        pieces.update(tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids))
    assert not [piece for piece in pieces if piece.startswith("<0x")], "every letter of the world has a piece"


def test_text_to_mix_in(tokenizer, tmp_path):
    """
    Documents end to end, EOS after each, in whole chunks whose every token is trained: from .txt, .txt.gz, a column
    `text`, dialogues.
    """
    eos, ids = tokenizer.eos_token_id, lambda text: tokenizer(text, add_special_tokens=False).input_ids
    (tmp_path / "a.txt").write_text("The sky is blue.\n\nA dog says woof.")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"Grass is green."))
    (tmp_path / "c.jsonl").write_text('{"text": "Hello!"}\n{"text": "Snow is white."}')
    (tmp_path / "d.jsonl").write_text('{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}')
    expected = (ids("The sky is blue.\n\nA dog says woof.") + [eos] + ids("Grass is green.") + [eos] + ids("Hello!")
                + [eos] + ids("Snow is white.") + [eos])
    (prompt, answer), = encode_answers(tokenizer, [user("Hi")], ["Hello!"])
    expected += prompt + answer
    items = encode_text([str(tmp_path / name) for name in ("a.txt", "b.txt.gz", "c.jsonl", "d.jsonl")], tokenizer, 4,
                        log=quiet)
    assert [len(item["input_ids"]) for item in items] == len(expected) // 4 * [4]
    assert [token for item in items for token in item["input_ids"].tolist()] == expected[:len(expected) // 4 * 4]
    batch = Collator(1, tokenizer.pad_token_id)(items)
    assert batch["loss_mask"].all() and batch["attention_mask"].all()
    with pytest.raises(UsageError, match="do not fill one chunk"):
        encode_text([str(tmp_path / "c.jsonl")], tokenizer, 100, log=quiet)


def test_text_to_mix_in_holds_nothing_that_is_held_out(tokenizer, tmp_path):
    """Rows whose prompts --data_path holds out, in another spelling too; plain text stays as it is."""
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    others = [{"prompt": f"what is  {i}?", "response": f"Well, {i}."} for i in range(50)]
    other = write_jsonl(tmp_path / "other.jsonl", others)
    _, held = load_records(DataConfig(data_path=[path]), 3, log=quiet)
    held_keys = {record.keys[-1] for record in held}
    asked = {record.prompt[0]["content"] for record in held}
    lines = []

    def text(source):
        chunks = encode_text([source], tokenizer, 4, held_keys, log=lines.append)
        return tokenizer.decode([token for chunk in chunks for token in chunk["input_ids"].tolist()])

    for source, count in ((path, 36), (other, 46)):
        mixed = text(source).lower()
        assert mixed.count("what is") == count and len(asked) == 4
        assert not any(" ".join(question.lower().split()) in " ".join(mixed.split()) for question in asked)
        assert "4 rows left out of the text" in lines[-2]
    (tmp_path / "plain.txt").write_text("\n".join(asked))
    assert text(str(tmp_path / "plain.txt")).count("What is") == 4 and "left out" not in lines[-2]


def test_the_toy_as_text_to_mix_in_holds_nothing_that_is_held_out(tokenizer, monkeypatch, process_group):
    """Neither as the question that is answered nor earlier in the dialogue."""
    chunks = []

    def kept(*arguments, **options):
        chunks.extend(encode_text(*arguments, **options))
        return chunks

    monkeypatch.setattr(data, "encode_text", kept)
    config = step3_ppo.Config(unsupervised_data_path=["toy"], max_prompt_seq_len=64, max_seq_len=64, max_steps=4,
                              max_eval_samples=10, actor_model_name_or_path="tiny", critic_model_name_or_path="tiny")
    load_stage_data(config, 3, tokenizer, 0, 1, log=quiet)
    _, held = load_records(config, 3, log=quiet)
    asked = {record.prompt[-1]["content"] for record in held}
    assert len(asked) == round(0.1 * len(toy_questions()) / len(toy.TOY_OPENERS)) * len(toy.TOY_OPENERS)
    text = tokenizer.decode([token for chunk in chunks for token in chunk["input_ids"].tolist()])
    assert text.count("Human:") > 10_000
    assert not any(f"Human: {question}\n\nAssistant:" in text for question in asked)


# -----------------------------------------------------------------------------
# stages and ranks that do not fit together

@pytest.mark.parametrize("flags, warned", [
    (dict(seed=1), "--seed 1, and this stage has 1234"), (dict(data_split="8,1,1"), "--data_split 8,1,1, and this"),
    (dict(), None), (dict(data_path=["other.jsonl"], seed=1), None)])
def test_another_dealing_of_the_stage_before_is_said(tokenizer, tmp_path, process_group, flags, warned):
    before = dataclasses.asdict(step1_sft.Config(**flags))
    (tmp_path / "run_config.json").write_text(json.dumps(before))
    config = step1_sft.Config(model_name_or_path=str(tmp_path), max_steps=20, max_eval_samples=4)
    lines = []
    load_stage_data(config, 1, tokenizer, 0, 1, log=lines.append)
    said = [line for line in lines if "was trained with" in line]
    assert len(said) == (warned is not None) and all(warned in line for line in said)


def read_by_rank(rank, ranks, folder, error):
    """Rank 1 has another file than rank 0, as on another host, whose first rank it is."""
    os.environ["LOCAL_RANK"] = "0"
    config = step1_sft.Config(data_path=[f"{folder}/{rank}/rows.jsonl"], data_split="1,0,0")
    with pytest.raises(UsageError, match=error):
        load_stage_data(config, 1, load_tokenizer("tiny"), rank, ranks, log=quiet)


@pytest.mark.parametrize("change, error", [
    ("one word", "rank 1 on host .* has read other data than rank 0"), ("a row less", "79 rows .*, and 80"),
    ("no file", "1/rows.jsonl")])
def test_ranks_with_other_data_all_stop(tmp_path, change, error):
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(80)]
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_jsonl(tmp_path / str(rank) / "rows.jsonl", rows)
    if change == "no file":
        (tmp_path / "1" / "rows.jsonl").unlink()
    else:
        changed = [{**rows[0], "response": "It is one."}, *rows[1:]] if change == "one word" else rows[1:]
        write_jsonl(tmp_path / "1" / "rows.jsonl", changed)
    run_ranks(2, read_by_rank, tmp_path, error)


# -----------------------------------------------------------------------------
# how many steps the rows give

def test_few_steps_are_said_and_warned_of(tokenizer, tmp_path, process_group):
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(100)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for epochs, steps in ((1, 5), (2, 10)):
        lines = []
        config = step1_sft.Config(data_path=[path], data_split="1,0,0", per_device_train_batch_size=8,
                                  gradient_accumulation_steps=2, num_train_epochs=epochs)
        found = load_stage_data(config, 1, tokenizer, 0, 1, log=lines.append)
        assert found.total_steps == steps  # of 16 rows, out of 90
        said = [line for line in lines if f"data: {steps} optimizer steps" in line]
        assert len(said) == 1 and "--num_train_epochs or --max_steps" in said[0]
        assert any("warning" in line for line in lines) == (steps < 10)


def test_run_all_finds_too_few_rows_for_the_last_stage(tmp_path, monkeypatch, capsys):
    """Before the first stage is trained, by rows alone."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."}
                                                 for i in range(40)])
    common = f"--data_path {path} --per_device_train_batch_size 2"
    command = (f"step1_sft {common} -- step2_reward --model_name_or_path tiny {common} -- step3_ppo "
               f"--actor_model_name_or_path tiny --critic_model_name_or_path tiny {common} "
               "--per_device_generation_batch_size ").split(" ")[:-1]
    monkeypatch.setattr("sys.argv", ["run_all"])
    run_all.check("cpu", command + ["14"])  # 40 rows, 4 held out, 7, 14 and 15 or so for the stages
    with pytest.raises(SystemExit):
        run_all.check("cpu", command + ["16"])
    assert "step3_ppo.py: error: 14 examples do not fill one step of 16 rows" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run_all.check("cpu", command + ["8"])
    assert "on 2 process(es)" in capsys.readouterr().err


def test_run_all_refuses_hardware_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_all"])
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(real_accelerator.get_accelerator(), "_name", "cpu")
    for hardware in ("1gpu", "1node"):
        with pytest.raises(SystemExit):
            run_all.check(hardware, ["step1_sft", "--max_steps", "3"])
        assert f"run_all.sh: error: HARDWARE {hardware}: DeepSpeed finds no GPU" in capsys.readouterr().err
        run_all.plan_all(hardware, ["step1_sft", "--model_name_or_path", "tiny", "--dry_run"])
    run_all.check("cpu", ["step1_sft", "--max_steps", "3"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_all.check("1node", ["step1_sft", "--max_steps", "3"])
