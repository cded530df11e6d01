"""
Data: from files people have to the batches the three stages train on.

Everything becomes one record first, then token ids, then a batch:

    Preference(prompt, chosen, rejected)        text: what was asked, the better answer, the worse one (or None)
    encode_answers -> prompt ids, answer ids    through the tokenizer's chat template; an answer ends with EOS
    Collator -> a dict of tensors               padded to the longest row of the batch, never to --max_seq_len

Which tokens are trained on is known by construction (the answer starts where the prompt ends) and never searched for.

Sources (`--data_path`, one or more): `toy` (the built-in task, last section), a local .json, .jsonl, .csv or .parquet
file (the first three .gz too), a folder with train and test files, or a dataset's hub name. Its columns decide how a
row is read (`FORMS`); to add a form, write one small function and put it in that list. `--data_split 2,4,4` deals each
source's rows to the three stages as DeepSpeed-Chat does, so no stage trains on another's rows; one question in ten is
held out from all three.

    python data.py --data_path toy                      # one example a stage, the trained tokens marked
    python data.py --data_path my.jsonl --model_name_or_path facebook/opt-1.3b
"""

import copy
import csv
import gzip
import io
import itertools
import json
import math
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from transformers import AutoTokenizer

from support.flags import (DataConfig, UsageError, check_local_path, exit_on_usage_error, first_line, flag,
                           parse_config)
from support.toy import gold_scorer, toy_rows, toy_tokenizer


# -----------------------------------------------------------------------------
# the record, and rows -> records: one small function a form, recognised by its columns

@dataclass
class Preference:
    prompt: list[dict]    # [{"role": "user", "content": "What is the opposite of hot?"}, ...], the last one the user's
    chosen: str           # the better answer; the demonstration in SFT
    rejected: str | None  # the worse answer; None where the source has demonstrations only
    columns: dict = field(default_factory=dict, compare=False)  # the row but for chosen and rejected: for --reward_fn


HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def parse_dialogue(text):
    """
    '\\n\\nHuman: hi\\n\\nAssistant: hello\\n\\nHuman: ...' -> messages; what stands before is the system's.
    Text without markers is one user message.
    """
    if HUMAN not in "\n\n" + text.lstrip():
        return [{"role": "user", "content": text.strip()}]
    system, *turns = ("\n\n" + text.lstrip()).split(HUMAN)
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in turns:
        question, *answers = turn.split(ASSISTANT)
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return messages


def as_prompt(value):
    """A prompt column, text or messages -> messages that end with the user's; an open '\\n\\nAssistant:' is dropped."""
    messages = list(value) if isinstance(value, (list, tuple)) else parse_dialogue(value)
    if messages and messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages = messages[:-1]
    return messages


def as_answer(value):
    """An answer column, text or a one-message list -> text; None stays None."""
    return value[-1]["content"] if isinstance(value, (list, tuple)) else value


def from_pair(row):
    return Preference(as_prompt(row["prompt"]), as_answer(row["chosen"]), as_answer(row["rejected"]))


def from_dialogues(row):
    """HH-RLHF: two whole dialogues that share their beginning; the prompt is what they share up to the last answers."""
    chosen, rejected = (as_prompt(row[key]) for key in ("chosen", "rejected"))
    if (chosen[:-1] != rejected[:-1] or not chosen
            or chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant"):
        return None
    return Preference(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def from_instruction(row):
    """Alpaca: instruction and optional input, with an output or with a chosen and a rejected one."""
    prompt = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    chosen = row["chosen"] if row.get("chosen") is not None else row["output"]
    return Preference(as_prompt(prompt), chosen, row.get("rejected"))


def from_messages(row):
    if not row["messages"] or row["messages"][-1]["role"] != "assistant":
        return None
    return Preference(list(row["messages"][:-1]), row["messages"][-1]["content"], None)


def from_webgpt(row):
    """openai/webgpt_comparisons: two scored answers; ties teach nothing."""
    first, second = float(row["score_0"]), float(row["score_1"])  # a .csv holds text
    if first == second:
        return None
    answers = (row["answer_0"], row["answer_1"]) if first > second else (row["answer_1"], row["answer_0"])
    return Preference(as_prompt(row["question"]["full_text"]), *answers)


def from_shp(row):
    """stanfordnlp/SHP: labels is 1 where answer A was preferred."""
    better, worse = ("human_ref_A", "human_ref_B") if int(row["labels"]) == 1 else ("human_ref_B", "human_ref_A")
    return Preference(as_prompt(row["history"]), row[better], row[worse])


def from_columns(prompt, answer):
    return lambda row: Preference(as_prompt(row[prompt]), as_answer(row[answer]), None)


FORMS = [  # the first form whose columns most rows have reads the source
    (("prompt", "chosen", "rejected"), from_pair),
    (("instruction", "chosen", "rejected"), from_instruction),
    (("chosen", "rejected"), from_dialogues),
    (("question", "answer_0", "answer_1", "score_0", "score_1"), from_webgpt),
    (("history", "human_ref_A", "human_ref_B", "labels"), from_shp),
    (("instruction", "output"), from_instruction),
    (("messages",), from_messages),
    (("prompt", "response"), from_columns("prompt", "response")),
    (("prompt", "completion"), from_columns("prompt", "completion")),
    (("question", "answer"), from_columns("question", "answer")),
    (("prompt",), lambda row: Preference(as_prompt(row["prompt"]), "", None)),  # PPO needs no answers
]


def to_records(rows, source):
    """Rows (dicts of one source) -> (records, number of rows that hold no usable example)."""
    there = Counter(map(frozenset, rows))  # a .jsonl file may leave out what is null
    columns = set().union(*there)
    form = next((function for needed, function in FORMS
                 if sum(n for names, n in there.items() if names.issuperset(needed)) > len(rows) / 2), None)
    if form is None:
        accepted = "; ".join(", ".join(needed) for needed, _ in FORMS)
        raise UsageError(f"{source} has the columns {', '.join(sorted(columns))}. One of these sets is needed: "
                         f"{accepted}. Rename its columns, or add a form to FORMS in data.py.")
    records, blank = [], dict.fromkeys(columns)
    for number, row in enumerate(rows, 1):
        row = blank | row
        try:
            record = form(row)
            texts = [(message["role"], message["content"].strip()) for message in record.prompt] if record else []
            if record:
                record.chosen = "" if record.chosen is None else record.chosen.strip()
                record.rejected = None if record.rejected is None else record.rejected.strip()
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"{source}, row {number}: text is needed there, or a list of messages, each with role and "
                             f"content; {str(row)[:300]} came.") from error
        if texts and texts[-1][0] == "user" and record.chosen != record.rejected:
            record.columns = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
            records.append(record)
    return records, len(rows) - len(records)


# -----------------------------------------------------------------------------
# sources -> rows

def read_text(path):
    try:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig") as file:  # -sig: Windows writes a mark in front
            return file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def read_file(path):
    """A local file -> list of rows. JSON errors name the line."""
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        import pyarrow.parquet
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise UsageError(f"{path} cannot be read: {first_line(error)}") from error
    if suffix not in (".json", ".jsonl", ".csv"):
        raise UsageError(f"{path}: files ending in .json, .jsonl, .csv or .parquet are read (the first three .gz too).")
    text = read_text(path)
    if suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is less than a long dialogue
        rows = list(csv.DictReader(io.StringIO(text)))
        if long := [number for number, row in enumerate(rows, 1) if None in row]:
            raise UsageError(f"{path}, row {long[0]} has more fields than the header; text that holds commas needs "
                             "quotes around it.")
        return rows
    try:
        if text.lstrip().startswith("["):
            rows, offset = json.loads(text), 0
        else:
            rows = []
            for offset, line in enumerate(text.split("\n")):  # not splitlines: JSON strings may hold U+2028
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        line = error.lineno if text.lstrip().startswith("[") else offset + error.lineno
        raise UsageError(f"{path}, line {line}: not JSON ({error.msg}). A .json or .jsonl file holds one object a "
                         "line, or one list of objects.") from error
    if rows and not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: every row must be a JSON object, {type(rows[0]).__name__} came.")
    return rows


def read_source(source):
    """--data_path entry -> (training rows, held-out rows or None where the source has no test split)."""
    if source == "toy":
        return toy_rows(), None
    if os.path.isfile(source):
        return read_file(source), None
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, "dataset_dict.json")):
        parts = {}
        for name, starts in (("train", "train"), ("test", ("test", "eval", "valid"))):
            files = sorted(str(f) for f in Path(source).iterdir() if f.name.startswith(starts))
            parts[name] = [row for file in files for row in read_file(file)]
        if not parts["train"]:
            raise UsageError(f"{source}: a folder needs files whose names start with train (and, optionally, test): "
                             "train.jsonl, test.jsonl. Or name the files themselves.")
        return parts["train"], parts["test"] or None
    if source.startswith((".", "/", "~")) or source.endswith((".json", ".jsonl", ".gz", ".csv", ".parquet")):
        raise UsageError(f"{source} does not exist. --data_path takes toy, a file, a folder or a dataset's hub name.")
    from datasets import load_dataset, load_from_disk
    try:
        dataset = load_from_disk(source) if os.path.isdir(source) else load_dataset(source)
    except Exception as error:
        raise UsageError(f"{source} is neither a local file or folder nor a dataset that could be fetched from the "
                         f"hub ({type(error).__name__}: {str(error)[:200]}).") from error
    if "train" not in dataset:
        raise UsageError(f"{source} has no split named train, only {', '.join(dataset)}.")
    test = next((dataset[name] for name in ("test", "validation", "eval") if name in dataset), None)
    return dataset["train"].to_list(), test.to_list() if test is not None else None


# -----------------------------------------------------------------------------
# hold out, split, blend

def questions(record):
    """
    All that the user asked in a record's prompt; the last one is what is answered. A row may say in its column
    `hold_out_as` what counts as the same question (the toy's rows leave out their openers: "Hello! What is 1 + 1?" is
    no other question than "What is 1 + 1?").
    """
    asked = [message["content"] for message in record.prompt if message["role"] == "user"]
    return record.columns.get("hold_out_as", asked)


def hold_out(records, seed, share=0.1):
    """
    (training, held-out) records for a source without a test split. Questions are held out, not rows: no question that
    a held-out record ends with occurs in a training record, be it earlier in the dialogue. Which ones depends on their
    text and the seed alone, so it is the same on every rank and host.
    """
    order = sorted({questions(r)[-1] for r in records}, key=lambda q: (zlib.crc32(f"{seed} {q}".encode()), q))
    held = set(order[:max(1, round(share * len(order)))])
    return [r for r in records if held.isdisjoint(questions(r))], [r for r in records if questions(r)[-1] in held]


def split_indices(n, data_split, stage, seed):
    """
    Row numbers that belong to `stage` (1, 2 or 3) out of n, as DeepSpeed-Chat deals them (get_raw_dataset_split_index):
    shares are normalised, each part is rounded, the first absorbs what rounding leaves; one seeded permutation is cut
    at the bounds. The parts are disjoint, complete, and depend on n, data_split and seed only.
    """
    try:
        shares = np.array([float(share) for share in data_split.split(",")])
    except ValueError:
        shares = np.array([])
    if shares.size != 3 or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() == 0:
        raise UsageError(f"--data_split {data_split}: three numbers like 2,4,4 are needed, one a stage, none "
                         "negative, not all 0.")
    bounds = np.concatenate([[0], np.cumsum(np.round(shares / shares.sum() * n).astype(int))])
    bounds[1:] -= bounds[-1] - n
    bounds = bounds.clip(0)  # "0,5,5" of 103: 52 + 52 is one too many, and the first part has none to give
    order = np.random.RandomState(seed).permutation(n)
    return order[bounds[stage - 1]:bounds[stage]]


def load_records(config, stage, log=print):
    """
    (training, held-out) lists of Preference for a stage: 1 SFT, 2 reward model, 3 PPO. The held-out rows are the same
    in all stages, and none of them trains on these (DeepSpeed-Chat deals those out too, for no reason we could find).

    raises UsageError for a source that is missing, malformed, empty or without the columns the stage needs
    """
    weights = config.data_weights or [1.0] * len(config.data_path)
    if len(weights) != len(config.data_path) or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise UsageError(f"--data_weights {' '.join(map(str, weights))} for {len(config.data_path)} source(s): one "
                         "number >= 0 a source is needed, not all 0.")
    usable = {1: lambda r: bool(r.chosen), 2: lambda r: bool(r.chosen and r.rejected), 3: lambda r: True}[stage]
    needs = {1: "a prompt and an answer", 2: "a chosen and a rejected answer", 3: "a prompt"}[stage]
    train, held, held_questions = [], [], set()
    for source, weight in zip(config.data_path, weights):
        rows, test_rows = read_source(source)
        if not rows:
            raise UsageError(f"{source} is empty: it holds no rows to train on.")
        records, _ = to_records(rows, source)
        able = sum(map(usable, records))
        if len({questions(r)[-1] for r in records if usable(r)}) < 2 and len(config.data_path) == 1:
            if able:
                way_out = "two that end with different questions are needed at least, since one in ten is held out."
            elif stage == 2 and any(r.chosen for r in records):
                way_out = "--data_split 1,0,0 gives all rows to SFT, where demonstrations alone are enough."
            else:
                way_out = (f"its columns are {', '.join(rows[0])}, and a row counts if its prompt ends with a user's "
                           "message and its answers, where it has two, differ.")
            raise UsageError(f"{source}: {able} of {len(rows)} rows have {needs}, which this stage needs; {way_out}")
        # all rows are dealt, then those that the stage cannot use go: which rows are whose must not depend on the stage
        if test_rows:
            test = to_records(test_rows, source)[0]
        else:
            usable_rows = len(records)
            records, test = hold_out(records, config.seed)
            if left_out := usable_rows - len(records) - len(test):
                log(f"data: {left_out} rows left out, in which a held-out question was asked earlier")
        dealt = split_indices(len(records), config.data_split, stage, config.seed)
        mine = [records[i] for i in dealt if usable(records[i])]
        copies = int(weight) * mine + mine[:round((weight - int(weight)) * len(mine))]
        train += copies
        held += filter(usable, test)
        held_questions |= {questions(r)[-1] for r in test}
        log(f"data: {source}: {len(rows)} rows, {len(rows) - able} without a usable example, {len(test)} held out, "
            f"{len(copies)} for stage {stage}")
    overlap = [r for r in train if not held_questions.isdisjoint(questions(r))]
    if overlap:  # two sources, or a train and a test file, that share questions
        train = [r for r in train if held_questions.isdisjoint(questions(r))]
        log(f"data: {len(overlap)} rows left out, whose questions another source holds out")
    if not held:
        raise UsageError(f"{', '.join(config.data_path)}: none of the held-out rows has {needs}, which this stage is "
                         "tested on.")
    if not train:
        raise UsageError(f"--data_split {config.data_split} leaves no rows for stage {stage} of "
                         f"{', '.join(config.data_path)}; give that stage a larger share, or more rows.")
    np.random.RandomState(config.seed).shuffle(train)
    np.random.RandomState(config.seed).shuffle(held)  # by itself: the same rows are evaluated in all stages
    return train, held[:config.max_eval_samples]


# -----------------------------------------------------------------------------
# tokenizer, chat template, encoding

# The form of InstructGPT's descendants (HH-RLHF, DeepSpeed-Chat) as a chat template, so that any server that reads the
# saved folder formats a conversation as it was trained on.
CHAT_TEMPLATE = (
    "{{ bos }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '\\n\\nAssistant: ' + message.content + eos_token }}"
    "{% elif message.role == 'system' %}{{ message.content }}"
    "{% else %}{{ '\\n\\nHuman: ' + message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}")


def load_tokenizer(name_or_path, chat_template=""):
    """
    The tokenizer of a model folder, hub name or the preset `tiny`, left as it is but for three things: a pad token that
    is not EOS (so that "the last token that is not padding" is well defined for everybody who loads the model); a chat
    template where it has none or `chat_template` gives one; and EOS is the special token that ends an answer in this
    template, if one does (Gemma's <end_of_turn>), so that answers are trained, sampled and scored up to the same token.
    """
    if name_or_path == "tiny":
        tokenizer = copy.deepcopy(toy_tokenizer())  # that one is cached; its template may differ from call to call
    else:
        check_local_path(name_or_path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{name_or_path}: no tokenizer could be loaded ({first_line(error)}). "
                             "A model folder needs its tokenizer files (tokenizer.json, or tokenizer.model) "
                             "beside config.json.") from error
    if tokenizer.eos_token is None:
        raise UsageError(f"{name_or_path}: its tokenizer has no EOS token; set eos_token in tokenizer_config.json.")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        if tokenizer.unk_token is not None and tokenizer.unk_token != tokenizer.eos_token:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text() if os.path.isfile(chat_template) else chat_template
        if "{" not in tokenizer.chat_template:
            raise UsageError(f"--chat_template {chat_template} is neither a file that exists nor Jinja text.")
    elif tokenizer.chat_template is None:
        begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # OPT and LLaMA start every text with BOS
        tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ bos }}", "{{ bos_token }}" if begins else "")
    answer = render(tokenizer, [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]])[0]
    last = tokenizer(answer.rstrip(), add_special_tokens=False).input_ids[-1]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if last in special - {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(last)
    return tokenizer


def render(tokenizer, dialogues, open_answer=False):
    """List of message lists -> texts by the chat template; open_answer: with the words that open the next answer."""
    try:
        return tokenizer.apply_chat_template(dialogues, tokenize=False, add_generation_prompt=open_answer)
    except jinja2.TemplateError as error:
        raise UsageError(f"the chat template cannot render a dialogue: {error}. Give another by --chat_template, "
                         "or leave out what it refuses (system messages, say, or two answers in a row).") from error


def encode_prompts(tokenizer, prompts):
    """List of message lists -> (texts, ids), each up to and including the words that open the assistant's turn."""
    texts = render(tokenizer, prompts, open_answer=True)
    return texts, tokenizer(texts, add_special_tokens=False).input_ids


def encode_answers(tokenizer, prompts, answers):
    """
    Lists of message lists and of answer texts -> list of (prompt ids, answer ids). An answer ends with EOS. A prompt is
    tokenised as it will be at generation, by itself: its ids are what the model sees before it answers, even where
    prompt and answer would merge at their seam.
    """
    dialogues = [prompt + [{"role": "assistant", "content": answer}] for prompt, answer in zip(prompts, answers)]
    prompt_texts, prompt_ids = encode_prompts(tokenizer, prompts)
    full_texts = render(tokenizer, dialogues)
    if not all(full_text.startswith(prompt_text) for full_text, prompt_text in zip(full_texts, prompt_texts)):
        raise UsageError("the chat template does not continue its own generation prompt: an answer's text must begin "
                         "where add_generation_prompt=True ends. Give another with --chat_template.")
    # some templates write a line's end after the answer's; a blank answer leaves the prompt's own
    full_texts = [prompt + text[len(prompt):].rstrip() for text, prompt in zip(full_texts, prompt_texts)]
    full_ids = tokenizer(full_texts, add_special_tokens=False).input_ids
    encoded = []
    for prompt_text, prompt, full_text, full in zip(prompt_texts, prompt_ids, full_texts, full_ids):
        if full[:len(prompt)] == prompt:
            response = full[len(prompt):]
        else:
            response = tokenizer(full_text[len(prompt_text):], add_special_tokens=False).input_ids
        if not response or response[-1] != tokenizer.eos_token_id:
            response = response + [tokenizer.eos_token_id]
        encoded.append((prompt, response))
    return encoded


def encode_records(records, tokenizer, stage, max_len, log=print):
    """
    Records -> list of items, dicts whose ids are int32 arrays, 4 bytes a token:

    stage 1  input_ids, prompt_len    prompt + chosen + EOS
    stage 2  chosen, rejected         prompt + answer + EOS each; prompt_len
    stage 3  input_ids, record        the prompt alone

    Answers that do not fit max_len are cut (and lose their EOS: what was cut does not end there); prompts that leave no
    room for an answer, or are longer than max_len in stage 3, are dropped. Both are counted and said.

    raises UsageError if nothing is left
    """
    items, cut = [], 0
    for start in tqdm(range(0, len(records), 1000), desc=f"encoding for stage {stage}, thousands of rows",
                      disable=len(records) < 50_000):
        chunk = records[start:start + 1000]
        prompts = [record.prompt for record in chunk]
        if stage == 3:
            encoded = [({"input_ids": ids}, {"record": record}, len(ids) <= max_len)
                       for record, ids in zip(chunk, encode_prompts(tokenizer, prompts)[1])]
        else:
            answers = {"input_ids" if stage == 1 else "chosen": [record.chosen for record in chunk]}
            if stage == 2:
                answers["rejected"] = [record.rejected for record in chunk]
            columns = [encode_answers(tokenizer, prompts, texts) for texts in answers.values()]
            encoded = [({name: prompt + answer for name, (prompt, answer) in zip(answers, row)},
                        {"prompt_len": len(row[0][0])}, len(row[0][0]) < max_len) for row in zip(*columns)]
        for sequences, others, fits in encoded:
            if fits:
                cut += any(len(ids) > max_len for ids in sequences.values())
                items.append({name: np.array(ids[:max_len], np.int32) for name, ids in sequences.items()} | others)
    limit, dropped = "--max_prompt_seq_len" if stage == 3 else "--max_seq_len", len(records) - len(items)
    log(f"data: {len(items)} examples encoded; {dropped} dropped (prompt over {limit} {max_len}), {cut} with answers "
        "cut to fit")
    if not items:
        raise UsageError(f"all {dropped} prompts are longer than {limit} {max_len} allows; raise it, or shorten the "
                         "prompts.")
    return items


def encode_text(sources, tokenizer, length, log=print):
    """
    Plain text for PPO's mixture term -> list of items of stage 1, `length` tokens each, all of them trained: documents
    end to end with EOS between them, cut into chunks. A document is a .txt file (.gz too), or a row of another source:
    its column `text` if it has one, else the dialogue with its better answer.
    """
    ids = []
    for source in sources:
        plain = source.removesuffix(".gz").endswith(".txt")
        rows = [{"text": read_text(source)}] if plain else read_source(source)[0]
        if rows and "text" in rows[0]:
            for document in tokenizer([row["text"] for row in rows], add_special_tokens=False).input_ids:
                ids += document + [tokenizer.eos_token_id]
        elif rows:
            records = [record for record in to_records(rows, source)[0] if record.chosen]
            for prompt, answer in encode_answers(tokenizer, [r.prompt for r in records], [r.chosen for r in records]):
                ids += prompt + answer
    chunks = np.array(ids[:len(ids) // length * length], np.int32).reshape(-1, length)
    log(f"data: {', '.join(sources)}: {len(ids)} tokens of text in {len(chunks)} chunks of {length}")
    if len(chunks) == 0:
        raise UsageError(f"{', '.join(sources)}: {len(ids)} tokens of text do not fill one chunk of --max_seq_len "
                         f"{length}; give more text, or lower it.")
    return [{"input_ids": chunk, "prompt_len": 0} for chunk in chunks]


# -----------------------------------------------------------------------------
# batches

def pad(sequences, value, side):
    """Lists or arrays of ids -> ids, padded with `value`, and mask, 1 on what is real: (N, T) int64, T the longest."""
    T = max(len(sequence) for sequence in sequences)
    ids, mask = torch.full((len(sequences), T), value), torch.zeros(len(sequences), T, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(T - len(sequence), T)
        ids[row, where] = torch.as_tensor(np.asarray(sequence), dtype=torch.int64)
        mask[row, where] = 1
    return ids, mask


class Collator:
    """
    Items of one stage -> a batch, a dict of tensors:

    stage 1  input_ids, attention_mask   (B, T) int64, right-padded
             loss_mask                   (B, T) float32, 1 on trained tokens
    stage 2  input_ids, attention_mask   (2B, T) int64, right-padded: B chosen, then their B rejected
             loss_mask                   (2B, T) float32, 1 on the answers' tokens
    stage 3  input_ids, attention_mask   (B, P) int64, left-padded: the answers start in the same column
             records                     a list of B
    """

    def __init__(self, stage, pad_token_id, train_on_prompt=False):
        self.stage, self.pad_token_id, self.train_on_prompt = stage, pad_token_id, train_on_prompt

    def __call__(self, items):
        if self.stage == 2:
            sequences = [item["chosen"] for item in items] + [item["rejected"] for item in items]
        else:
            sequences = [item["input_ids"] for item in items]
        ids, mask = pad(sequences, self.pad_token_id, "left" if self.stage == 3 else "right")
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.stage < 3:
            starts = torch.tensor([0 if self.train_on_prompt else item["prompt_len"] for item in items] * self.stage)
            batch["loss_mask"] = (mask * (torch.arange(ids.size(1)) >= starts[:, None])).float()
        if self.stage == 3:
            batch["records"] = [item["record"] for item in items]
        return batch


def make_dataloader(dataset, collate, batch_size, seed, rank=0, world_size=1, shuffle=True,
                    size_flags="--per_device_train_batch_size or --gradient_accumulation_steps"):
    """
    Every rank gets its share of the same seeded order; the last incomplete batch is dropped when training. The k-th
    batches of all ranks together are the same rows for any number of ranks. Call `.sampler.set_epoch` each epoch.
    """
    if shuffle and len(dataset) < batch_size * world_size:
        raise UsageError(f"{len(dataset)} examples do not fill one step of {batch_size} rows on {world_size} "
                         f"process(es); lower {size_flags}, or give more data.")
    sampler = DistributedSampler(dataset, world_size, rank, shuffle=shuffle, seed=seed, drop_last=shuffle)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate, drop_last=shuffle)


class MicroBatches:
    """
    Collates the rows of one optimizer step into `parts` micro-batches of similar length: short rows are not padded to
    the length of long ones, and the step's gradient is the same, since it is normalised over the step and not over each
    micro-batch.
    """

    def __init__(self, collate, parts):
        self.collate, self.parts = collate, parts

    def __call__(self, items):
        items = sorted(items, key=lambda item: max(len(ids) for ids in item.values() if isinstance(ids, np.ndarray)))
        size = len(items) // self.parts
        return [self.collate(items[i * size:(i + 1) * size]) for i in range(self.parts)]


def rank_share(items, rank, world_size):
    """Every world_size-th item, equally many on every rank (collectives must match), wrapping around at the end."""
    share = math.ceil(len(items) / world_size)
    return [items[(rank + i * world_size) % len(items)] for i in range(share)]


def count_steps(dataloader, epochs, max_steps=-1):
    """Steps of a run: max_steps if positive (the data is then repeated as needed), else what `epochs` passes hold."""
    return max_steps if max_steps > 0 else len(dataloader) * epochs


def training_steps(dataloader, total_steps, done=0):
    """
    Yields (step, batch) for the steps after `done` up to total_steps, with an order of its own for every epoch. The
    order depends on seed and epoch alone, so a resumed run goes on with the batch it would have had.
    """
    step = done
    while step < total_steps:
        epoch, skipped = divmod(step, len(dataloader))
        dataloader.sampler.set_epoch(epoch)
        for rows in itertools.islice(dataloader.batch_sampler, skipped, skipped + total_steps - step):
            step += 1
            yield step, dataloader.collate_fn([dataloader.dataset[row] for row in rows])


@dataclass
class StageData:
    """What a stage reads: see load_stage_data."""
    train_loader: DataLoader   # its batches are lists of micro-batches in stages 1 and 2, prompts in stage 3
    held_loader: DataLoader    # one batch at a time, nothing shuffled
    held_records: list         # of Preference
    total_steps: int           # of the run
    scorer: object             # f(record, answer) -> exact mark in [0, 1] where the task has one, else None


def load_stage_data(config, stage, tokenizer, rank, world, log=print):
    """--data_path and the flags about lengths and batches -> StageData of this rank, for a stage: 1, 2 or 3."""
    max_len = config.max_prompt_seq_len if stage == 3 else config.max_seq_len
    train_records, held_records = load_records(config, stage, log)
    train_set = encode_records(train_records, tokenizer, stage, max_len, log)
    held_set = encode_records(held_records, tokenizer, stage, max_len, log)
    collate = Collator(stage, tokenizer.pad_token_id, getattr(config, "train_on_prompt", False))
    if stage == 3:
        rows = config.per_device_generation_batch_size
        train_loader = make_dataloader(train_set, collate, rows, config.seed, rank, world,
                                       size_flags="--per_device_generation_batch_size")
    else:
        rows = config.per_device_train_batch_size
        parts = config.gradient_accumulation_steps
        train_loader = make_dataloader(train_set, MicroBatches(collate, parts), rows * parts, config.seed, rank, world)
    held_loader = make_dataloader(held_set, collate, rows, config.seed, rank, world, shuffle=False)
    total_steps = count_steps(train_loader, config.num_train_epochs, config.max_steps)
    return StageData(train_loader, held_loader, held_records, total_steps, gold_scorer(config))


def load_text_batches(config, tokenizer, steps, done, rank, world, log=print):
    """
    --unsupervised_data_path -> iterator of one list of micro-batches for each of `steps` optimizer steps of PPO, those
    after the first `done`. An optimizer step has one chunk of text for each of its answers.
    """
    parts = config.gradient_accumulation_steps
    rows = config.per_device_train_batch_size * parts
    chunks = encode_text(config.unsupervised_data_path, tokenizer, config.max_seq_len, log)
    if len(chunks) < rows * world:
        raise UsageError(f"--unsupervised_data_path: {len(chunks)} chunks of --max_seq_len {config.max_seq_len} "
                         f"tokens do not fill one optimizer step of {rows * world}; lower --max_seq_len, or give more "
                         "text.")
    collate = MicroBatches(Collator(1, tokenizer.pad_token_id), parts)
    loader = make_dataloader(chunks, collate, rows, config.seed, rank, world)
    return (batches for _, batches in training_steps(loader, steps, done))


def decode_answers(tokenizer, rollout):
    """Rollout -> list of texts: the response tokens that its mask marks, special tokens left out."""
    responses = rollout.tokens[:, -rollout.mask.size(1):]
    return [tokenizer.decode(ids[mask.bool()], skip_special_tokens=True).strip()
            for ids, mask in zip(responses.cpu(), rollout.mask.cpu())]


# -----------------------------------------------------------------------------
# python data.py: what the stages will see

def main():
    @dataclass
    class Config(DataConfig):
        model_name_or_path: str = flag("tiny", "whose tokenizer to use")

    config = parse_config(Config, __doc__)
    tokenizer, errors = load_tokenizer(config.model_name_or_path, config.chat_template), []
    for stage, name in ((1, "SFT"), (2, "reward model"), (3, "PPO")):
        try:
            records, held = load_records(config, stage)
        except UsageError as error:
            errors.append(error)
            if len(errors) == 3:  # the data are of no use to any
                raise errors[0]
            print(f"\n=== stage {stage}, {name}: {error}")
            continue
        longest = config.max_prompt_seq_len if stage == 3 else config.max_seq_len
        dataset = encode_records(records[:1000], tokenizer, stage, longest)
        item = dataset[0]
        of = f" of the first {len(records[:1000])}" if len(records) > 1000 else ""
        print(f"\n=== stage {stage}, {name}: {len(dataset)}{of} rows to train on, {len(held)} held out. "
              "The first, [[trained on]]:")
        if stage == 1:
            ids, start = item["input_ids"], item["prompt_len"]
            print(f"{tokenizer.decode(ids[:start])}[[{tokenizer.decode(ids[start:])}]]")
            print(f"({len(ids)} tokens, {len(ids) - start} trained)")
        elif stage == 2:
            for key in ("chosen", "rejected"):
                before, last = tokenizer.decode(item[key][:-1]), tokenizer.decode(item[key][-1:])
                print(f"{key}: {before}[[{last}]]  (scored at its last token)")
        else:
            print(f"{tokenizer.decode(item['input_ids'])}[[the policy's own answer]]")


if __name__ == "__main__":
    with exit_on_usage_error():
        main()
