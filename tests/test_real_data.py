"""
Real files, where there are some beside the checkout: of ten rows of each, what is trained on, decoded,
is what the raw row says that the assistant answered, and all else is the prompt.
"""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from transformers import GPT2Tokenizer

import data
from data import encode_records, load_tokenizer, read_records, sequences_of
from support.flags import DataConfig
from support.models import vocabulary_size

SHARED = Path(data.__file__).resolve().parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    for file in (SHARED / "tokenizers" / "gpt2").iterdir():
        shutil.copy(file, folder)
    GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)
    return load_tokenizer(str(folder))


def raw_rows(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# Each: raw rows -> {(last question, better answer or demonstration, worse answer or None)}, read as
# the files' authors describe them and not by this project's forms.

def hh(rows):
    found = set()
    for row in rows:
        turns = row["chosen"].split("\n\nAssistant:")
        question = turns[-2].split("\n\nHuman:")[-1]
        found.add((question, turns[-1], row["rejected"].split("\n\nAssistant:")[-1]))
    return found


def gsm8k(rows):
    return {(row["question"], row["answer"], None) for row in rows}


def alpaca(rows):
    found = set()
    for row in rows:
        question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        if "chosen" in row:
            found.add((question, row["chosen"], row["rejected"]))
        else:
            found.add((question, row["output"], None))
    return found


def truthfulqa(rows):
    return {(row["prompt"], row["completion"], None) for row in rows}


def oasst(rows):
    """Sibling answers, rank 0 the best: the better with the worse, and the best as demonstration."""
    by_id = {row["message_id"]: row for row in rows}
    siblings = {}
    for row in rows:
        if row["role"] == "assistant":
            siblings.setdefault(row["parent_id"], []).append(row)
    found = set()
    for parent, answers in siblings.items():
        if parent not in by_id:
            continue
        question = by_id[parent]["text"]
        for better in answers:
            found.add((question, better["text"], None))
            for worse in answers:
                if None not in (better["rank"], worse["rank"]) and better["rank"] < worse["rank"]:
                    found.add((question, better["text"], worse["text"]))
    return found


FILES = {
    "hh_rlhf/harmless-base/test.jsonl.gz": hh,
    "hh_rlhf/helpful-base/test.jsonl.gz": hh,
    "gsm8k/train.jsonl.gz": gsm8k,
    "gsm8k/test.jsonl.gz": gsm8k,
    "rasbt/instruction-data.json": alpaca,
    "rasbt/instruction-data-with-preference.json": alpaca,
    "truthfulqa/finetune_truth.jsonl.gz": truthfulqa,
    "oasst1/en-validation.jsonl.gz": oasst,
}


def squeezed(text):
    return " ".join(text.split())


@pytest.mark.parametrize("name", FILES)
def test_ten_rows_of_each_file_are_trained_on_their_answers(name, gpt2):
    path = SHARED / name
    known = {tuple(text and squeezed(text) for text in row) for row in FILES[name](raw_rows(path))}
    _, records, _, _ = read_records(str(path), DataConfig(), log=lambda sentence: None)
    ten = records[::len(records) // 10][:10]
    assert len(ten) == 10
    eos = gpt2.eos_token_id

    for item, record in zip(encode_records(ten, gpt2, 1, 4096, log=lambda sentence: None), ten):
        ids = item["input_ids"]
        first, end = item["spans"][-1]
        assert end == len(ids) and ids[-1] == eos and max(ids) < vocabulary_size(gpt2)
        answer = squeezed(gpt2.decode(ids[first:end - 1]))
        before = gpt2.decode(ids[:first])
        assert before.endswith("Assistant:") and eos not in ids[first:end - 1]
        question = squeezed(before.rpartition("Human:")[2].removesuffix("Assistant:"))
        demonstrations = {(asked, better) for asked, better, _ in known}
        assert (question, answer) in demonstrations, gpt2.decode(ids)
        # All other trained tokens are earlier answers of the dialogue.
        for start, stop in item["spans"][:-1]:
            trained = squeezed(gpt2.decode(ids[start:stop]).replace(gpt2.eos_token, ""))
            assert trained in {squeezed(turn["content"]) for turn in record.prompt
                               if turn["role"] == "assistant"}

    pairs = [record for record in ten if record.rejected is not None]
    if any(worse is not None for _, _, worse in known):
        assert len(pairs) > 5
        for item in encode_records(pairs, gpt2, 2, 4096, log=lambda sentence: None):
            length = item["prompt_len"]
            sequences = sequences_of(item)
            asked = squeezed(gpt2.decode(sequences["chosen"][:length])
                             .rpartition("Human:")[2].removesuffix("Assistant:"))
            better, worse = (squeezed(gpt2.decode(sequences[kind][length:-1]))
                             for kind in ("chosen", "rejected"))
            assert (asked, better, worse) in known
            assert sequences["chosen"][-1] == sequences["rejected"][-1] == eos
