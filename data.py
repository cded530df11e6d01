"""
Data: from files people have to the batches the three stages train on.

Everything becomes one record first, then token ids, then a batch:

    Preference(prompt, chosen, rejected)         text: a question, its better and its worse answer
    encode_answers -> prompt ids, answer ids     by the chat template; an answer ends with EOS
    Collator -> a dict of tensors                padded to the longest row of the batch

Which tokens are trained on is known by construction, because the answer starts where the prompt
ends; it is never searched for.

Sources (`--data_path`, one or more): `toy` (the built-in task, support/toy.py), a local .json,
.jsonl, .csv or .parquet file (the first three .gz too), a folder with train and test files, or a
dataset's hub name. A source's columns decide how its rows are read (support/forms.py).
`--data_split 2,4,4` deals each source's rows to the three stages as DeepSpeed-Chat does, so no
stage trains on another's rows; one prompt in ten is held out from all three.

    # one example a stage, the trained tokens marked
    python data.py --data_path toy
    python data.py --data_path my.jsonl --model_name_or_path facebook/opt-1.3b
    # every record as it was read, to look at or to train from
    python data.py --data_path my.jsonl --write_records records.jsonl
"""

import copy
import hashlib
import itertools
import json
import math
import os
import socket
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer

from support.cache import (Prepared, cache_key, prepare_once, prepared_folder,
                           read_prepared)
from support.flags import (DataConfig, UsageError, check_local_path, exit_on_usage_error,
                           first_line, flag, parse_config)
from support.forms import FORMS, JOINS, Unusable
from support.sources import read_source, read_text
from support.toy import load_gold_mark, toy_tokenizer


# -----------------------------------------------------------------------------
# the record

@dataclass
class Preference:
    prompt: list[dict]    # [{"role": "user", "content": "What is 1 + 1?"}], the last one the user's
    chosen: str           # the better answer; in SFT the demonstration
    rejected: str | None  # the worse answer; None where the source has demonstrations only
    # of the chosen answer's message, what templates read beside its text: reasoning_content
    chosen_fields: dict = field(default_factory=dict)
    tools: list | None = None  # that the template tells the model of
    all_turns: bool = False    # SFT trains on the answers within the prompt too
    # the row's other columns, passed to --reward_fn functions
    columns: dict = field(default_factory=dict, compare=False)
    # the place that errors name: "pairs.jsonl, row 3"
    origin: str = field(default="a record", compare=False)

    @cached_property
    def keys(self):
        """
        What the record is held out as, normalised texts: the last key decides whether it is held
        out, and a record is trained on only if none of its keys is held out. They are the prompt up
        to each of the user's turns, because a longer dialogue that begins with a held-out prompt
        goes on with the answer to it. A row's column `hold_out_as` names others (a text or a list
        of them): a toy row names every question of its dialogue, whose answers stand in the prompt.
        """
        named = self.columns.get("hold_out_as")
        if isinstance(named, str):
            named = [named]
        if not named:
            named = []
            text = ""
            for message in self.prompt:
                text += f"{message['role']}: {message['content']}\n"
                if message["role"] == "user":
                    named.append(text)
        return [normalised(text) for text in named]

    def __getstate__(self):  # what the cache pickles: not the keys, which are soon made again
        return {name: value for name, value in vars(self).items() if name != "keys"}


def normalised(text):
    """Text without what makes no difference to a reader: width, case, the kind of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# -----------------------------------------------------------------------------
# rows -> records

def fitting(table, rows):
    """The first function of a table whose columns more than half of the rows have, or None."""
    # Rows may have different columns, because .jsonl writers omit nulls.
    columns_of_rows = Counter(frozenset(name.lower() for name in row) for row in rows)
    for needed, function in table:
        count = sum(n for columns, n in columns_of_rows.items() if columns.issuperset(needed))
        if count > len(rows) / 2:
            return function
    return None


QUESTION_WORDS = ("question", "prompt", "instruct", "query", "input", "ask", "user", "human")


def choose_form(rows, source):
    """
    Rows (dicts of one source) -> the function of FORMS that reads them. Raises UsageError where
    there is none, with a line of --columns that names this source's own.
    """
    form = fitting(FORMS, rows)
    if form is not None:
        return form
    columns = sorted(set().union(*rows))
    texts = [name for name in columns if isinstance(rows[0].get(name), str)] or columns
    # Those that are called like a question come first.
    texts.sort(key=lambda name: not any(word in name.lower() for word in QUESTION_WORDS))
    accepted = "; ".join(", ".join(needed) for needed, _ in FORMS[:8]) + "; and others"
    raise UsageError(
        f"{source} has the columns {', '.join(columns)}, and no form reads them. Say which is "
        f"which, --columns prompt={texts[0]} response={texts[-1]} say, or chosen=... rejected=... "
        f"for pairs; or add a form to support/forms.py. The forms there need {accepted}.")


def renamed(rows, columns, source):
    """Rows with --columns: "prompt=question" calls the column `question` `prompt`."""
    if not columns:
        return rows
    names = dict(pair.split("=", 1) for pair in columns if "=" in pair)
    known = sorted(set().union(*rows))
    for pair in columns:
        if "=" not in pair or names[pair.split("=")[0]] not in known:
            raise UsageError(f"--columns {pair}: prompt=question, say, with a column of {source}; "
                             f"it has {', '.join(known)}.")
    return [{**row, **{new: row.get(old) for new, old in names.items()}} for row in rows]


def convert(row, form):
    """A row -> its record. Raises Unusable where it holds none."""
    found = form({name.lower(): value for name, value in row.items()})
    if not found.prompt or found.prompt[-1]["role"] not in ("user", "tool"):
        raise Unusable("whose prompt does not end with the user's words")
    chosen = "" if found.chosen is None else found.chosen["content"].strip()
    rejected = None
    if found.rejected is not None:
        rejected = found.rejected["content"].strip() or None
    if found.chosen is not None and not chosen:
        raise Unusable("without an answer")
    if chosen == rejected:
        raise Unusable("with two equal answers")
    fields = {name: value for name, value in (found.chosen or {}).items()
              if name not in ("role", "content")}
    columns = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    tools = row.get("tools")
    if isinstance(tools, str):  # some sets hold them as JSON
        tools = json.loads(tools or "null")
    has_answers = any(message["role"] == "assistant" for message in found.prompt)
    record = Preference(found.prompt, chosen, rejected, fields, tools or None,
                        found.all_turns and has_answers, columns)
    # Halves of surrogate pairs, which JSON can spell but no tokenizer reads, raise here.
    contents = [message["content"] for message in record.prompt]
    "".join([*contents, chosen, rejected or "", *record.keys]).encode()
    return record


def to_records(rows, source):
    """
    Rows (dicts of one source) -> (records, {reason: numbers of the rows that hold none}).

    raises UsageError where no form reads the rows, or none of them can be read
    """
    join = fitting(JOINS, rows)
    if join is not None:
        try:
            numbered = join(rows, source)
        except UNREADABLE as error:
            raise UsageError(f"{source} looks like {join.__doc__.split(':')[0].strip()}, and "
                             f"cannot be read so ({type(error).__name__}: {first_line(error)}); "
                             "rename its columns if it is another set.") from error
    else:
        numbered = list(enumerate(rows, 1))
    whole_rows = [row for _, row in numbered if isinstance(row, dict)]
    form = choose_form(whole_rows or rows, source)

    blank = dict.fromkeys(set().union(*whole_rows))  # a column that a row leaves out is None there
    records = []
    dropped = {}
    first_fault = None
    for number, row in numbered:
        try:
            if isinstance(row, Unusable):
                raise row
            record = convert(blank | row, form)
        except Unusable as reason:
            dropped.setdefault(str(reason), []).append(number)
        except UnicodeEncodeError as error:
            dropped.setdefault(CANNOT_BE_READ, []).append(number)
            first_fault = first_fault or (
                f"{source}, row {number}: its text is no Unicode ({error.reason}); mend the row, "
                "or leave it out.")
        except UNREADABLE as error:
            dropped.setdefault(CANNOT_BE_READ, []).append(number)
            first_fault = first_fault or (
                f"{source}, row {number}: text is needed there, or a list of messages, each with "
                f"role and content ({type(error).__name__}: {first_line(error)}); "
                f"{str(row)[:300]} came.")
        else:
            record.origin = f"{source}, row {number}"
            records.append(record)
    if first_fault and not records:
        raise UsageError(first_fault)
    return records, dropped


# What a form raises for a row that is not as its columns promise.
UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
CANNOT_BE_READ = "that cannot be read"


def say_dropped(source, row_count, dropped, log):
    """Logs what was dropped and why, with the first rows' numbers; loudly where it is much."""
    for reason, numbers in dropped.items():
        shown = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
        much = reason == CANNOT_BE_READ and len(numbers) > 0.01 * row_count
        warning = "warning: " if much else ""
        log(f"data: {warning}{source}: {len(numbers)} rows {reason} left out (row {shown})")


# -----------------------------------------------------------------------------
# hold out, split, blend

def without_held(records, held_keys):
    """The records none of whose keys is held out."""
    return [record for record in records if held_keys.isdisjoint(record.keys)]


def hold_out(records, seed, share=0.1):
    """
    (training, held-out) records for a source without test rows. Prompts are held out, not rows: all
    rows of a prompt are on the same side. Which prompts depends on their text and the seed alone,
    so all ranks and hosts choose the same.
    """
    def random_place(key):  # by a hash, because a generator would depend on the rows' order
        return hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), key

    order = sorted({record.keys[-1] for record in records}, key=random_place)
    count = max(1, round(share * len(order)))
    held_keys = set(order[:count])
    held = [record for record in records if record.keys[-1] in held_keys]
    return without_held(records, held_keys), held


def split_indices(n, data_split, stage, seed):
    """
    Row numbers that belong to `stage` (1, 2 or 3) out of n, as DeepSpeed-Chat deals them
    (get_raw_dataset_split_index): shares are normalised, each part is rounded, the first absorbs
    what rounding leaves; one seeded permutation is cut at the bounds. The parts are disjoint,
    complete, and depend on n, data_split and seed only.
    """
    try:
        shares = np.array([float(share) for share in data_split.split(",")])
    except ValueError:
        shares = np.array([])
    if shares.size != 3 or (shares < 0).any() or not 0 < shares.sum() < math.inf:
        raise UsageError(f"--data_split {data_split}: three numbers like 2,4,4 are needed, one a "
                         "stage, none negative, not all 0.")
    sizes = np.round(shares / shares.sum() * n).astype(int)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    bounds[1:] -= bounds[-1] - n
    # "0,5,5" of 103 rows: 52 + 52 is one too many, and the first part has none to give.
    bounds = bounds.clip(0)
    order = np.random.RandomState(seed).permutation(n)
    return order[bounds[stage - 1]:bounds[stage]]


STAGE_NEEDS = {1: "a prompt and an answer", 2: "a chosen and a rejected answer", 3: "a prompt"}


def is_usable(record, stage):
    """Whether a record has what STAGE_NEEDS says."""
    has_chosen = bool(record.chosen)
    has_rejected = bool(record.rejected)
    return {1: has_chosen, 2: has_chosen and has_rejected, 3: True}[stage]


def check_source(source, rows, records, stage):
    """Raises UsageError where a source by itself has too few usable records for a stage."""
    usable = [record for record in records if is_usable(record, stage)]
    if len({record.keys[-1] for record in usable}) >= 2:
        return
    if usable:
        way_out = ("prompts with two different questions are needed at least, since one in ten is "
                   "held out.")
    elif stage == 2 and any(record.chosen for record in records):
        way_out = ("demonstrations are for step 1 alone: give them as --sft_data_path, beside a "
                   "--data_path of pairs.")
    else:
        way_out = (f"its columns are {', '.join(rows[0])}, and a row counts if its prompt ends "
                   "with a user's message and its answers, where it has two, differ.")
    raise UsageError(f"{source}: {len(usable)} of {len(rows)} rows have {STAGE_NEEDS[stage]}, "
                     f"which this stage needs; {way_out}")


def share_of_stage(records, data_split, stage, seed, weight):
    """A source's training records -> a stage's, `weight` times: 2.5 is twice, and then half."""
    # Split first, filter afterwards: a row belongs to the same stage whichever stage asks.
    dealt = split_indices(len(records), data_split, stage, seed)
    share = [records[i] for i in dealt if is_usable(records[i], stage)]
    whole_copies = int(weight)
    rest = round((weight - whole_copies) * len(share))
    return whole_copies * share + share[:rest]


def sources_of_stage(config, stage):
    """-> list of (source, data_split, weight)."""
    weights = config.data_weights or [1.0] * len(config.data_path)
    valid = all(0 <= weight < math.inf for weight in weights)
    if len(weights) != len(config.data_path) or not valid or not any(weights):
        raise UsageError(f"--data_weights {' '.join(map(str, weights))} for "
                         f"{len(config.data_path)} source(s): one number >= 0 a source is needed, "
                         "not all 0.")
    sources = [(source, config.data_split, weight)
               for source, weight in zip(config.data_path, weights)]
    if stage == 1:
        sources += [(source, "1,0,0", 1.0) for source in config.sft_data_path]
    return sources


def read_records(source, config, log):
    """
    A --data_path entry -> its rows and records; its test rows and their records, None where it has
    none. Says what was dropped, and why. Raises UsageError for a source without rows.
    """
    rows, test_rows = read_source(source)
    if not any(rows):  # none, or all of them {}
        raise UsageError(f"{source} is empty: it holds no rows to train on.")
    rows = renamed(rows, config.columns, source)
    records, dropped = to_records(rows, source)
    say_dropped(source, len(rows), dropped, log)
    test_records = None
    if test_rows:
        test_name = f"{source} (test rows)"
        test_rows = renamed(test_rows, config.columns, test_name)
        test_records, dropped = to_records(test_rows, test_name)
        say_dropped(test_name, len(test_rows), dropped, log)
    return rows, records, test_rows, test_records


def without_repeats(records, seen, source, log):
    """
    The records that no earlier source has; `seen` is a set of what all sources have had so far. A
    row that two sources share would otherwise be dealt twice, to two stages perhaps.
    """
    identities = []
    for record in records:
        content = json.dumps([record.prompt, record.chosen, record.rejected], default=str)
        identities.append(hashlib.blake2b(content.encode(), digest_size=16).digest())
    kept = [record for record, identity in zip(records, identities) if identity not in seen]
    seen.update(identities)
    if len(kept) < len(records):
        log(f"data: {source}: {len(records) - len(kept)} rows left out, which an earlier source "
            "has too")
    return kept


def load_records(config, stage, log=print):
    """
    (training, held-out) lists of Preference for a stage: 1 SFT, 2 reward model, 3 PPO. All stages
    hold out the same rows of --data_path and train on none of them. (DeepSpeed-Chat splits the test
    rows between the stages too; we found no reason to.)

    raises UsageError for a source that is missing, malformed, empty or without the columns the
    stage needs
    """
    train = []
    held = []
    held_keys = set()
    seen = set()
    sources = sources_of_stage(config, stage)
    names = ", ".join(source for source, _, _ in sources)
    for source, data_split, weight in sources:
        rows, records, test_rows, test_records = read_records(source, config, log)
        if len(sources) == 1:
            check_source(source, rows, records, stage)
        records = without_repeats(records, seen, source, log)
        usable_count = sum(is_usable(record, stage) for record in records)

        # What is held out: the source's own test rows, or one prompt in ten.
        if test_rows:
            to_deal = records
        else:
            to_deal, test_records = hold_out(records, config.seed)
            left_out = len(records) - len(to_deal) - len(test_records)
            if left_out:
                log(f"data: {left_out} rows left out, in which a held-out question was asked "
                    "earlier")

        # What this stage reads of both.
        share = share_of_stage(to_deal, data_split, stage, config.seed, weight)
        train += share
        held += [record for record in test_records if is_usable(record, stage)]
        held_keys |= {record.keys[-1] for record in test_records}
        log(f"data: {source}: {len(rows)} rows, {usable_count} of them with {STAGE_NEEDS[stage]}; "
            f"{len(test_records)} held out, {len(share)} for stage {stage}")

    # Two sources, or a train and a test file, may share prompts, which are then held out of all.
    dealt_count = len(train)
    train = without_held(train, held_keys)
    if len(train) < dealt_count:
        log(f"data: {dealt_count - len(train)} rows left out, whose prompts are held out elsewhere")
    if not held:
        raise UsageError(f"{names}: none of the held-out rows has {STAGE_NEEDS[stage]}, which this "
                         "stage is tested on.")
    if not train:
        raise UsageError(f"--data_split {config.data_split} leaves no rows for stage {stage} of "
                         f"{names}; give that stage a larger share, or more rows.")
    # Two generators, so that the order of `held` is the same in all stages, whatever they train on.
    np.random.RandomState(config.seed).shuffle(train)
    np.random.RandomState(config.seed).shuffle(held)
    return train, held


# -----------------------------------------------------------------------------
# tokenizer and chat template

# The form of InstructGPT's descendants (HH-RLHF, DeepSpeed-Chat) as a chat template, so that any
# server that reads the saved folder formats a conversation as it was trained on.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '\\n\\nAssistant: ' + message.content + eos_token }}"
    "{% elif message.role == 'system' %}{{ message.content }}"
    "{% else %}{{ '\\n\\nHuman: ' + message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}")


def load_tokenizer(name_or_path, chat_template=""):
    """
    The tokenizer of a model folder, hub name or the preset `tiny`, as it is but for three things:

    pad token      is not EOS, so that "the last token that is not padding" is well defined for
                   everybody who loads the model
    chat template  `chat_template` (Jinja text or a file), else its own, else CHAT_TEMPLATE
    EOS            is the first special token that this template writes after an answer, if it
                   writes one (Gemma's <end_of_turn>, Phi-3's <|end|>), so that training, sampling
                   and scoring end at the same token
    """
    if name_or_path == "tiny":
        tokenizer = copy.deepcopy(toy_tokenizer())  # a copy, because the cached one must not change
    else:
        check_local_path(name_or_path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except Exception as error:  # of any kind, because the files' readers raise many
            raise UsageError(f"{name_or_path}: no tokenizer could be loaded ({first_line(error)}). "
                             "A model folder needs its tokenizer files (tokenizer.json, or "
                             "tokenizer.model) beside config.json.") from error

        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            raise UsageError(f"{name_or_path}: its tokenizer is empty, because the files that hold "
                             "its vocabulary (tokenizer.json, or tokenizer.model) are missing.")

    # Answers must be able to end, and padding must not look like their end.
    if tokenizer.eos_token is None:
        raise UsageError(f"{name_or_path}: its tokenizer has no EOS token; set eos_token in "
                         "tokenizer_config.json.")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        if tokenizer.unk_token is not None and tokenizer.unk_token != tokenizer.eos_token:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    # The template that is given, or its own, or ours.
    if chat_template:
        is_file = os.path.isfile(chat_template)
        tokenizer.chat_template = read_text(chat_template) if is_file else chat_template
        if "{" not in tokenizer.chat_template:
            raise UsageError(f"--chat_template {chat_template} is neither a file that exists nor "
                             "Jinja text.")
    elif tokenizer.chat_template is None:
        # OPT and LLaMA start every text with BOS, an empty one too. The template must write it.
        starts_with_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + CHAT_TEMPLATE

    # Some templates end an answer with a special token that is not the tokenizer's EOS.
    end = end_of_turn(tokenizer)
    if end is not None:
        tokenizer.eos_token = end
    return tokenizer


def end_of_turn(tokenizer):
    """
    The first special token that the chat template writes after an answer, or None where it writes
    none: a short dialogue is rendered, and the text behind its answer is looked at.
    """
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text, = render(tokenizer, [dialogue])
    check_template(tokenizer, dialogue)
    _, *behind_hellos = text.split("Hello")
    behind_answer = behind_hellos[-1] if behind_hellos else ""
    others = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token}
    places = []
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content not in others and token.content in behind_answer:
            places.append((behind_answer.index(token.content), token.content))
    return min(places)[1] if places else None


def check_template(tokenizer, dialogue):
    """
    Raises UsageError for a chat template that gives an empty prompt.

    dialogue  of a question and its answer
    """
    opened, = render(tokenizer, [dialogue[:1]], open_answer=True)
    if not opened:
        raise UsageError("the chat template writes nothing for a question, and no model answers an "
                         "empty prompt; give another by --chat_template.")


def render(tokenizer, dialogues, open_answer=False, tools=None):
    """
    Message lists -> texts by the template.

    open_answer  with the words that open an answer
    tools        of each dialogue, a list or None
    """
    try:
        if tools and any(tools):
            return [tokenizer.apply_chat_template(dialogue, tools=own_tools, tokenize=False,
                                                  add_generation_prompt=open_answer)
                    for dialogue, own_tools in zip(dialogues, tools)]
        return tokenizer.apply_chat_template(dialogues, tokenize=False,
                                             add_generation_prompt=open_answer)
    except Exception as error:  # of any kind, because a template is a program
        reason = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        raise UsageError(f"the chat template cannot render a dialogue: {reason}. Give another by "
                         "--chat_template, or leave out what it refuses (system messages, say, or "
                         "two answers in a row).") from error


# -----------------------------------------------------------------------------
# records -> token ids, and back

def encode_prompts(tokenizer, prompts, tools=None):
    """List of message lists -> (texts, ids), each with the words that open the assistant's turn."""
    texts = render(tokenizer, prompts, open_answer=True, tools=tools)
    return texts, tokenizer(texts, add_special_tokens=False).input_ids


def encode_answers(tokenizer, prompts, answers, tools=None):
    """
    Lists of message lists and of answers, texts or messages -> list of (prompt ids, answer ids). An
    answer ends with its first EOS, whatever the template writes after it. A prompt is tokenised as
    it will be at generation, by itself: its ids are what the model sees before it answers, even
    where prompt and answer would merge at their seam.
    """
    dialogues = []
    for prompt, answer in zip(prompts, answers):
        if isinstance(answer, str):
            answer = {"role": "assistant", "content": answer}
        dialogues.append([*prompt, answer])
    prompt_texts, all_prompt_ids = encode_prompts(tokenizer, prompts, tools)
    full_texts = render(tokenizer, dialogues, tools=tools)

    # Behind the prompt's text stands the answer's, without the line's end that some templates write
    # after it. The prompt keeps its own.
    answer_texts = []
    for prompt_text, full_text in zip(prompt_texts, full_texts):
        if not full_text.startswith(prompt_text):
            raise UsageError("the chat template does not continue its own generation prompt: an "
                             "answer's text must begin where add_generation_prompt=True ends. Give "
                             "another with --chat_template.")
        answer_texts.append(full_text[len(prompt_text):].rstrip())
    full_texts = [prompt + answer for prompt, answer in zip(prompt_texts, answer_texts)]
    all_full_ids = tokenizer(full_texts, add_special_tokens=False).input_ids

    # Behind the prompt's ids stand the answer's, unless a token lies across the seam.
    eos = tokenizer.eos_token_id
    encoded = []
    for prompt_ids, full_ids, answer_text in zip(all_prompt_ids, all_full_ids, answer_texts):
        if full_ids[:len(prompt_ids)] == prompt_ids:
            answer_ids = full_ids[len(prompt_ids):]
        else:
            answer_ids = tokenizer(answer_text, add_special_tokens=False).input_ids
        if eos in answer_ids:
            answer_ids = answer_ids[:answer_ids.index(eos)]
        encoded.append((prompt_ids, answer_ids + [eos]))
    return encoded


def sft_items(records, tokenizer):
    """
    Stage 1: prompt + chosen answer + EOS. `spans` are the (first, end) of what is trained on: the
    answer, and where the record says all_turns those within the prompt too.
    """
    answers = [{"role": "assistant", "content": record.chosen, **record.chosen_fields}
               for record in records]
    encoded = encode_answers(tokenizer, [record.prompt for record in records], answers,
                             [record.tools for record in records])
    items = []
    for record, (prompt, answer) in zip(records, encoded):
        spans = [(len(prompt), len(prompt) + len(answer))]
        if record.all_turns:
            spans = earlier_spans(tokenizer, record, prompt) + spans
        items.append({"input_ids": prompt + answer, "prompt_len": len(prompt), "spans": spans})
    return items


def earlier_spans(tokenizer, record, prompt_ids):
    """
    The (first, end) of every answer within a record's prompt, its EOS included if the template
    writes one there. An answer stands between two renderings of the dialogue, opened for it and
    closed behind it, as at its own generation. Where the whole prompt's ids begin otherwise (some
    templates write earlier turns in another form, Qwen3's without their thoughts), the answer is
    left untrained. White space at the seams may be part of a token of either side.
    """
    answers = [number for number, message in enumerate(record.prompt)
               if message["role"] == "assistant"]
    if not answers:
        return []
    tools = [record.tools] * len(answers)
    opened = render(tokenizer, [record.prompt[:number] for number in answers], True, tools)
    closed = render(tokenizer, [record.prompt[:number + 1] for number in answers], False, tools)
    all_opened_ids = tokenizer(opened, add_special_tokens=False).input_ids
    all_closed_ids = tokenizer([text.rstrip() for text in closed],
                               add_special_tokens=False).input_ids
    eos = tokenizer.eos_token_id
    spans = []
    for opened_ids, closed_ids in zip(all_opened_ids, all_closed_ids):
        first = count_common(opened_ids, prompt_ids)
        end = count_common(closed_ids, prompt_ids)
        lacking = (tokenizer.decode(opened_ids[first:])
                   + tokenizer.decode(closed_ids[end:], skip_special_tokens=True))
        if lacking.strip():
            continue
        if eos in prompt_ids[first:end]:
            end = prompt_ids.index(eos, first) + 1
        spans.append((first, end))
    return spans


def count_common(ids, others):
    """The number of ids with which both lists begin."""
    count = 0
    while count < min(len(ids), len(others)) and ids[count] == others[count]:
        count += 1
    return count


def without_oldest_turn(record):
    """
    A record whose prompt begins a question later, or None if it has only one. What precedes the
    first question, a system's message, stays.
    """
    questions = [number for number, message in enumerate(record.prompt)
                 if message["role"] == "user"]
    if len(questions) < 2:
        return None
    prompt = record.prompt[:questions[0]] + record.prompt[questions[1]:]
    return replace(record, prompt=prompt)


def pair_items(records, tokenizer):
    """Stage 2: prompt + answer + EOS, for both answers."""
    prompts = [record.prompt for record in records]
    tools = [record.tools for record in records]
    chosen = encode_answers(tokenizer, prompts, [record.chosen for record in records], tools)
    rejected = encode_answers(tokenizer, prompts, [record.rejected for record in records], tools)
    return [{"chosen": prompt + better, "rejected": prompt + worse, "prompt_len": len(prompt)}
            for (prompt, better), (_, worse) in zip(chosen, rejected)]


def prompt_items(records, tokenizer):
    """Stage 3: the prompt alone, and the record that the reward functions read."""
    _, all_ids = encode_prompts(tokenizer, [record.prompt for record in records],
                                [record.tools for record in records])
    return [{"input_ids": ids, "record": record} for ids, record in zip(all_ids, records)]


def text_items(texts, tokenizer):
    """PPO's mixture: a text + EOS, without a chat template."""
    all_ids = tokenizer(texts, add_special_tokens=False).input_ids
    return [{"input_ids": ids + [tokenizer.eos_token_id]} for ids in all_ids]


def encode_rows(make_items, rows, names, tokenizer):
    """
    Yields the items of make_items(rows, tokenizer). What it raises ends as a UsageError that begins
    with the name of the row at fault.
    """
    # In thousands, because ids in Python's lists take nine times the memory of the arrays that the
    # callers make of them.
    for start in tqdm(range(0, len(rows), 1000), disable=len(rows) < 50_000,
                      desc="encoding, thousands of rows"):
        thousand = slice(start, start + 1000)
        try:
            yield from make_items(rows[thousand], tokenizer)
        except Exception:  # of any kind, because templates and tokenizers raise many
            for row, name in zip(rows[thousand], names[thousand]):
                try:
                    make_items([row], tokenizer)
                except Exception as error:
                    raise UsageError(f"{name}: {first_line(error)}") from error
            raise


def sequences_of(item):
    """{name: ids} of an item of any stage."""
    return {name: item[name] for name in ("input_ids", "chosen", "rejected") if name in item}


def longest_sequence(item):
    return max(len(ids) for ids in sequences_of(item).values())


def encode_records(records, tokenizer, stage, max_len, log=print):
    """
    Records -> list of items, dicts whose ids are int32 arrays, 4 bytes a token:

    stage 1  input_ids, prompt_len, spans   prompt + chosen + EOS; what is trained on
    stage 2  chosen, rejected, prompt_len   prompt + answer + EOS each
    stage 3  input_ids, record              the prompt alone

    Answers that do not fit max_len are cut (and get no EOS, since the real answer went on). Prompts
    that leave no room for an answer, or are longer than max_len in stage 3, are dropped. Both are
    counted and said.

    raises UsageError if nothing is left
    """
    make_items = {1: sft_items, 2: pair_items, 3: prompt_items}[stage]
    names = [record.origin for record in records]
    items = []
    cut = 0
    shortened = 0
    for record, item in zip(records, encode_rows(make_items, records, names, tokenizer)):
        # In SFT a dialogue that is too long loses its oldest turns.
        shorter = record
        while stage == 1 and item["prompt_len"] + 1 > max_len and shorter is not None:
            shorter = without_oldest_turn(shorter)
            if shorter is not None:
                [item] = make_items([shorter], tokenizer)
        shortened += shorter is not None and shorter is not record
        # Before training there must be room for one token of the answer; PPO's answers are not part
        # of the item.
        needed = item["prompt_len"] + 1 if stage < 3 else len(item["input_ids"])
        if needed > max_len:
            continue
        cut += longest_sequence(item) > max_len
        for name, ids in sequences_of(item).items():
            item[name] = np.array(ids[:max_len], np.int32)
        items.append(item)
    if shortened:
        log(f"data: {shortened} dialogues lost their oldest turns to fit --max_seq_len {max_len}")
    limit = "--max_prompt_seq_len" if stage == 3 else "--max_seq_len"
    dropped = len(records) - len(items)
    if dropped or cut:
        log(f"data: {len(items)} examples encoded; {dropped} dropped (prompt over {limit} "
            f"{max_len}), {cut} with answers cut to fit")
    if not items:
        raise UsageError(f"all {dropped} prompts are longer than {limit} {max_len} allows; raise "
                         "it, or shorten the prompts.")
    return items


def document_ids(source, tokenizer, held_keys, log):
    """
    A source of plain text -> ids of its documents end to end, EOS after each. A document is a .txt
    file (.gz too), or a row of another source: its column `text` if it has one, else the dialogue
    with its better answer, unless its prompt is held out.
    """
    if source.removesuffix(".gz").endswith(".txt"):
        rows = [{"text": read_text(source)}]
    else:
        rows, _ = read_source(source)
    if not any(rows):
        return []
    if "text" in rows[0]:
        numbered = [(number, row["text"]) for number, row in enumerate(rows, 1)
                    if row.get("text") is not None and str(row["text"]).strip()]
        texts = [text for _, text in numbered]
        names = [f"{source}, row {number}" for number, _ in numbered]
        items = encode_rows(text_items, texts, names, tokenizer)
    else:
        records, _ = to_records(rows, source)
        answered = [record for record in records if record.chosen]
        kept = without_held(answered, held_keys)
        if len(kept) < len(answered):
            log(f"data: {source}: {len(answered) - len(kept)} rows left out of the text, whose "
                "prompts are held out of --data_path")
        items = encode_rows(sft_items, kept, [record.origin for record in kept], tokenizer)
    return [token for item in items for token in item["input_ids"]]


def encode_text(sources, tokenizer, length, held_keys=frozenset(), log=print):
    """
    Plain text for PPO's mixture term -> list of items of stage 1, `length` tokens each, all of them
    trained: the documents of all sources end to end, cut into chunks.

    held_keys  Preference.keys of what must not be in the text
    """
    ids = []
    for source in sources:
        ids += document_ids(source, tokenizer, held_keys, log)
    count = len(ids) // length
    chunks = np.array(ids[:count * length], np.int32).reshape(count, length)
    log(f"data: {', '.join(sources)}: {len(ids)} tokens of text in {count} chunks of {length}")
    if count == 0:
        raise UsageError(f"{', '.join(sources)}: {len(ids)} tokens of text do not fill one chunk "
                         f"of --max_seq_len {length}; give more text, or lower it.")
    return [{"input_ids": chunk, "prompt_len": 0} for chunk in chunks]


def decode_answers(tokenizer, rollout):
    """Rollout (or PPO's Experience) -> texts of its answers, without padding and special tokens."""
    mask = rollout.mask.cpu().bool()
    responses = rollout.tokens[:, -mask.size(1):].cpu()
    return [tokenizer.decode(ids[real], skip_special_tokens=True).strip()
            for ids, real in zip(responses, mask)]


# -----------------------------------------------------------------------------
# batches

def pad(sequences, value, side):
    """
    Lists or arrays of ids -> (ids, padded with `value`; mask, 1 on real tokens), both (N, T) int64,
    T the longest sequence's length. side: of the padding, "left" or "right".
    """
    N = len(sequences)
    T = max(len(sequence) for sequence in sequences)
    ids = torch.full((N, T), value)
    mask = torch.zeros(N, T, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        length = len(sequence)
        real = slice(0, length) if side == "right" else slice(T - length, T)
        ids[row, real] = torch.from_numpy(np.asarray(sequence, np.int64))
        mask[row, real] = 1
    return ids, mask


class Collator:
    """
    Items of one stage -> a batch, a dict of tensors:

    stage 1  input_ids, attention_mask   (B, T) int64, right-padded
             loss_mask                   (B, T) float32, 1 on trained tokens
    stage 2  input_ids, attention_mask   (2B, T) int64, right-padded: B chosen, their B rejected
             loss_mask                   (2B, T) float32, 1 on the answers' tokens
    stage 3  input_ids, attention_mask   (B, P) int64, left-padded: answers start in the same column
             records                     a list of B
    all      weight                      (B,) float32, 0 on the rows that rank_share repeats, else 1
    """

    def __init__(self, stage, pad_token_id, train_on_prompt=False):
        self.stage = stage
        self.pad_token_id = pad_token_id
        self.train_on_prompt = train_on_prompt

    def __call__(self, items):
        weight = torch.tensor([item.get("weight", 1.0) for item in items])
        if self.stage == 3:
            ids, mask = pad([item["input_ids"] for item in items], self.pad_token_id, "left")
            records = [item["record"] for item in items]
            return {"input_ids": ids, "attention_mask": mask, "records": records, "weight": weight}

        # What is trained on: the spans of an item, else all behind its prompt.
        spans = [item.get("spans", [(item["prompt_len"], None)]) for item in items]
        if self.stage == 1:
            rows = [item["input_ids"] for item in items]
        else:
            rows = [item["chosen"] for item in items] + [item["rejected"] for item in items]
            spans = spans + spans  # the rejected rows have the same prompts
        ids, mask = pad(rows, self.pad_token_id, "right")
        loss_mask = mask.float()
        if not self.train_on_prompt:
            in_span = torch.zeros_like(loss_mask)
            for row, spans_of_row in enumerate(spans):
                for first, end in spans_of_row:
                    in_span[row, first:end] = 1
            loss_mask *= in_span
        return {"input_ids": ids, "attention_mask": mask, "loss_mask": loss_mask, "weight": weight}


class MicroBatches:
    """
    Collates the rows of one optimizer step into `parts` micro-batches of similar length, so that
    short rows are not padded to the length of long ones. The step's gradient stays the same,
    because it is normalised over the step and not over each micro-batch.
    """

    def __init__(self, collate, parts):
        self.collate = collate
        self.parts = parts

    def __call__(self, items):
        items = sorted(items, key=longest_sequence)
        size = len(items) // self.parts
        return [self.collate(items[i * size:(i + 1) * size]) for i in range(self.parts)]


def rows_of_step(row_count, config, stage, world_size):
    """
    Rows of an optimizer step, or in stage 3 prompts of a rollout, on each process. Raises
    UsageError where a stage's row_count training rows do not fill one step of all processes.
    """
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    size_flags = "--per_device_train_batch_size or --gradient_accumulation_steps"
    if stage == 3:
        rows = config.per_device_generation_batch_size
        size_flags = "--per_device_generation_batch_size"
    if row_count < rows * world_size:
        raise UsageError(f"{row_count} examples do not fill one step of {rows} rows on "
                         f"{world_size} process(es); lower {size_flags}, or give more data.")
    return rows


class StepSampler:
    """
    Row numbers of this rank, step after step. Seed and epoch alone decide which rows are a step's,
    so the k-th steps of all ranks together are the same rows for any number of ranks, and a resumed
    run goes on with the step it would have had.

    An epoch is a random order of all rows, without those that do not fill a last step. It is cut
    into windows of some micro-batches (of all ranks), and the rows of a window are sorted by length
    before they are cut into micro-batches, so that short rows are not padded to the length of long
    ones. The micro-batches of the whole epoch are then dealt to the steps at random.

    Padding, of HH dialogues with 8 rows a step (bench/padding.py): in windows of 1, 8, 32 and 256
    it is 54, 13, 4 and 1 % of SFT's tokens, and 55, 21, 13 and 10 % of the reward model's, whose
    pairs have two lengths.

    How random is a step then? Every row still comes once an epoch, and every epoch draws the
    windows anew, so a row meets others each time. The micro-batches of a step are independent of
    each other, but within one all rows are about as long. SFT's loss is a mean over a step's
    tokens, so a token of a step of short rows weighs more; and where a length says what a row is,
    as the toy's styles do, a step sees one kind of row. After as many steps, trained from nothing,
    HH's held-out perplexity was 1.4 % higher than with random steps (one run each), the toy's about
    6 % (three runs against four), and its reward model's accuracy .868 against .878 (two). So the
    toy's presets have --length_window 1.

    step_rows  rows of an optimizer step on all ranks together
    lengths    (rows,) tokens of each row; None: steps of random rows
    parts      micro-batches of a step
    window     micro-batches of a window; 1: steps of random rows
    """

    def __init__(self, row_count, step_rows, seed, rank, world_size, lengths=None, parts=1,
                 window=1):
        self.row_count = row_count
        self.step_rows = step_rows
        self.step_count = row_count // step_rows
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.lengths = lengths
        self.parts = parts
        self.window = window
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.step_count * self.step_rows // self.world_size

    def __iter__(self):
        # RandomState, because its numbers are the same in every version of numpy.
        random = np.random.RandomState([self.seed, self.epoch])
        rows = random.permutation(self.row_count)[:self.step_count * self.step_rows]
        if self.lengths is not None and self.window > 1:
            part_rows = self.step_rows // self.parts
            window_rows = self.window * part_rows
            for start in range(0, len(rows), window_rows):
                window = rows[start:start + window_rows]
                by_length = np.argsort(self.lengths[window], kind="stable")
                rows[start:start + window_rows] = window[by_length]
            micro_batches = rows.reshape(-1, part_rows)
            rows = random.permutation(micro_batches)
        steps = rows.reshape(self.step_count, self.step_rows)
        # Every world_size-th row of a micro-batch, because then all ranks have about as many tokens
        # and none waits for another.
        for number in steps[:, self.rank::self.world_size].flat:
            yield int(number)


def make_dataloader(dataset, collate, batch_size, seed, rank=0, world_size=1, lengths=None,
                    parts=1, window=1):
    """
    Of training rows: this rank's batches, batch_size rows of each step, in the order of StepSampler
    (which explains the other arguments) and without the last incomplete step. Call
    `.sampler.set_epoch` each epoch.
    """
    sampler = StepSampler(len(dataset), batch_size * world_size, seed, rank, world_size, lengths,
                          parts, window)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate, drop_last=True)


def rank_share(items, rank, world_size):
    """
    Of rows to evaluate, dicts: every world_size-th, each with its "weight". Collectives need
    equally many rows a rank, so the last ranks may get one of the first rows again, with weight 0.
    """
    share = []
    for first in range(0, len(items), world_size):
        place = first + rank
        weight = 1.0 if place < len(items) else 0.0
        share.append({**items[place % len(items)], "weight": weight})
    return share


def count_steps(dataloader, epochs, max_steps=-1):
    """Steps of a run: max_steps if positive (data repeats as needed), else those of `epochs`."""
    return max_steps if max_steps > 0 else len(dataloader) * epochs


def training_steps(dataloader, total_steps, done=0):
    """
    Yields (step, batch) for the steps after `done` up to total_steps, with an order of its own for
    every epoch. The order depends on seed and epoch alone, so a resumed run goes on with the batch
    it would have had.
    """
    step = done
    while step < total_steps:
        epoch, skipped = divmod(step, len(dataloader))
        dataloader.sampler.set_epoch(epoch)
        # The DataLoader itself is not iterated, because a resumed run starts in the middle of an
        # epoch: row numbers can be skipped here without collating their rows.
        end = skipped + total_steps - step
        for row_numbers in itertools.islice(dataloader.batch_sampler, skipped, end):
            step += 1
            items = [dataloader.dataset[number] for number in row_numbers]
            yield step, dataloader.collate_fn(items)


# -----------------------------------------------------------------------------
# what a stage reads

@dataclass
class StageData:
    """What a stage reads; the loaders are this rank's."""
    train_loader: DataLoader  # of lists of micro-batches in stages 1 and 2, of batches in stage 3
    held_loader: DataLoader   # of batches, in a fixed order
    held_count: int           # held-out rows that are evaluated on all ranks together
    held_records: list        # their Preferences, and those of which nothing fits --max_seq_len
    total_steps: int          # of the run
    gold_mark: object         # f(record, answer) -> exact mark in [0, 1]; None if there is none
    text_batches: object      # iterator of PPO's mixture: load_text_batches; None if there is none


def load_stage_data(config, stage, tokenizer, rank, world, done=0, log=print):
    """
    --data_path and the flags about lengths and batches -> StageData of a stage: 1, 2 or 3.
    Collective.

    done    steps of the run that a checkpoint holds
    raises  UsageError, on all ranks, for data that a rank cannot use, or has otherwise than another
    """
    warn_of_other_dealing(config, log)
    prepared = prepare_once(lambda: key_of_stage(config, stage, tokenizer),
                            lambda log: prepare(config, stage, tokenizer, log), log)
    train_set, held_set, text_set = (prepared.rows[name] for name in ("train", "held", "text"))
    check_ranks_agree(len(train_set) + len(held_set) + len(text_set), prepared.checksum)
    rows = rows_of_step(len(train_set), config, stage, world)
    held_set = list(held_set)

    train_on_prompt = getattr(config, "train_on_prompt", False)  # a flag of stage 1 alone
    collate = Collator(stage, tokenizer.pad_token_id, train_on_prompt)
    collate_step = collate
    held_rows = rows
    by_length = {}  # prompts stay in a random order, because a rollout is sorted by length anyway
    if stage < 3:
        parts = config.gradient_accumulation_steps
        by_length = {"lengths": train_set.lengths(), "parts": parts, "window": config.length_window}
        collate_step = MicroBatches(collate, parts)
        held_rows = config.per_device_train_batch_size
        held_set = sorted(held_set, key=longest_sequence)
    train_loader = make_dataloader(train_set, collate_step, rows, config.seed, rank, world,
                                   **by_length)
    # A generator of its own, because a DataLoader draws a number whenever it is iterated, and
    # training must not depend on how often it is evaluated.
    held_loader = DataLoader(rank_share(held_set, rank, world), held_rows, collate_fn=collate,
                             generator=torch.Generator())
    total_steps = count_steps(train_loader, config.num_train_epochs, config.max_steps)
    steps = "rollouts" if stage == 3 else "optimizer steps"
    log(f"data: {total_steps} {steps} of {rows} rows a process, {len(train_loader)} an epoch; "
        "--num_train_epochs or --max_steps makes it more")
    if total_steps < 10:
        log(f"data: warning: {total_steps} {steps} teach a model next to nothing")

    text_batches = None
    if text_set:
        updates = config.updates_per_rollout
        text_batches = load_text_batches(config, text_set, tokenizer, total_steps * updates,
                                         done * updates, rank, world)
    return StageData(train_loader, held_loader, len(held_set), prepared.held_records, total_steps,
                     load_gold_mark(config), text_batches)


def prepare(config, stage, tokenizer, log):
    """
    Records -> Prepared: the items of a stage, those of its held-out rows, and PPO's mixture of text
    in lists. Raises UsageError for data that cannot be used.
    """
    max_len = config.max_prompt_seq_len if stage == 3 else config.max_seq_len
    train_records, all_held_records = load_records(config, stage, log)
    held_records = all_held_records[:config.max_eval_samples]
    rows = {"train": encode_records(train_records, tokenizer, stage, max_len, log),
            "held": encode_records(held_records, tokenizer, stage, max_len, log), "text": []}
    if getattr(config, "unsupervised_data_path", None):  # a flag of stage 3 alone
        held_keys = {record.keys[-1] for record in all_held_records}
        rows["text"] = encode_text(config.unsupervised_data_path, tokenizer, config.max_seq_len,
                                   held_keys, log)
    checksum = 0
    for item in itertools.chain(*rows.values()):
        for ids in sequences_of(item).values():
            checksum = zlib.crc32(ids.tobytes(), checksum)
    return Prepared(rows, held_records, checksum)


def prepare_beforehand(config, stage, tokenizer, processes):
    """
    What a stage will read is put into the cache of this host, by one process before the stage.

    returns  how many training rows it has
    raises   UsageError for data that the stage could not use, or too few for a step
    """
    folder = prepared_folder(key_of_stage(config, stage, tokenizer),
                             lambda log: prepare(config, stage, tokenizer, log),
                             log=lambda line: None)
    row_count = len(read_prepared(folder).rows["train"])
    rows_of_step(row_count, config, stage, processes)
    return row_count


def key_of_stage(config, stage, tokenizer):
    """-> cache_key of what `prepare` makes."""
    text_sources = getattr(config, "unsupervised_data_path", None) or []
    flags = {one.name: getattr(config, one.name) for one in fields(DataConfig)}
    sources = [*config.data_path, *config.sft_data_path, *text_sources]
    return cache_key(sources, tokenizer, (stage, flags, text_sources))


def warn_of_other_dealing(config, log):
    """
    Says where a model that this stage starts from was trained with another --seed or --data_split
    on a source that this stage reads too. The two then hold out and share different rows: what is
    held out here may have been trained on there. A model's folder has the flags in run_config.json.
    """
    for name, folder in vars(config).items():
        record = Path(str(folder), "run_config.json")
        if not name.endswith("model_name_or_path") or not record.is_file():
            continue
        then = json.loads(record.read_text())
        common = set(config.data_path).intersection(then.get("data_path", []))
        for flag_name in ("seed", "data_split"):
            now = getattr(config, flag_name)
            if common and then.get(flag_name, now) != now:
                log(f"data: warning: {folder} was trained with --{flag_name} {then[flag_name]}, "
                    f"and this stage has {now}: it holds out other rows of "
                    f"{', '.join(sorted(common))} and deals others to the stages, so rows that it "
                    "is tested on may have been trained on. Give both the same.")


def check_ranks_agree(row_count, checksum):
    """
    Raises UsageError, on all ranks, where a rank has read other rows than rank 0, from a file that
    differs on its host, say. Ranks would wait for each other in vain, or train on rows that others
    hold out. Collective.
    """
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, (row_count, checksum, socket.gethostname()))
    first_count, first_crc, first_host = found[0]
    for rank, (count, crc, host) in enumerate(found):
        if (count, crc) != (first_count, first_crc):
            raise UsageError(
                f"rank {rank} on host {host} has read other data than rank 0 on {first_host}: "
                f"{count} rows with checksum {crc:08x}, and {first_count} with {first_crc:08x}. "
                "All hosts need the same files, tokenizer and version of the project.")


def load_text_batches(config, chunks, tokenizer, steps, done, rank, world):
    """
    Chunks of encode_text -> iterator of one list of micro-batches for each of `steps` optimizer
    steps of PPO, those after the first `done`. An optimizer step has one chunk of text for each of
    its answers.
    """
    parts = config.gradient_accumulation_steps
    rows = config.per_device_train_batch_size * parts
    if len(chunks) < rows * world:
        raise UsageError(f"--unsupervised_data_path: {len(chunks)} chunks of --max_seq_len "
                         f"{config.max_seq_len} tokens do not fill one optimizer step of "
                         f"{rows * world}; lower --max_seq_len, or give more text.")
    collate = MicroBatches(Collator(1, tokenizer.pad_token_id), parts)
    loader = make_dataloader(chunks, collate, rows, config.seed, rank, world)
    return (batches for _, batches in training_steps(loader, steps, done))


# -----------------------------------------------------------------------------
# python data.py: what the stages will see

@dataclass
class Config(DataConfig):
    model_name_or_path: str = flag("tiny", "whose tokenizer to use")
    write_records: str = flag("", "a .jsonl file for every record as it was read, before any split")


def show(item, stage, tokenizer):
    """Prints an item of a stage as text, with what is trained on in [[ ]]."""
    if stage == 1:
        ids = item["input_ids"]
        text = ""
        trained = 0
        shown = 0
        for first, end in item["spans"]:
            text += f"{tokenizer.decode(ids[shown:first])}[[{tokenizer.decode(ids[first:end])}]]"
            trained += len(ids[first:end])
            shown = end
        print(text)
        print(f"({len(ids)} tokens, {trained} trained)")
    elif stage == 2:
        for name, ids in sequences_of(item).items():
            before = tokenizer.decode(ids[:-1])
            last = tokenizer.decode(ids[-1:])
            print(f"{name}: {before}[[{last}]]  (scored at its last token)")
    else:
        print(f"{tokenizer.decode(item['input_ids'])}[[the policy's own answer]]")


def write_records(config):
    """--write_records: one record a line, with prompt (messages), chosen and rejected or null."""
    # All are read before the file is opened, because it may be one of the sources.
    lines = []
    for source in config.data_path:
        _, records, _, test_records = read_records(source, config, print)
        for record in records + (test_records or []):
            line = {"prompt": record.prompt, "chosen": record.chosen,
                    "rejected": record.rejected, **record.chosen_fields}
            if record.tools:
                line["tools"] = record.tools
            lines.append(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    try:
        Path(config.write_records).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--write_records {config.write_records} cannot be written "
                         f"({error.strerror}); name another file.") from error
    print(f"{config.write_records}: {len(lines)} records")


def main():
    config = parse_config(Config, __doc__)
    if config.write_records:
        write_records(config)
        return
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    errors = []
    for stage, name in ((1, "SFT"), (2, "reward model"), (3, "PPO")):
        # Data that one stage cannot use may serve another.
        try:
            records, held = load_records(config, stage)
        except UsageError as error:
            errors.append(error)
            if len(errors) == 3:
                raise errors[0]
            print(f"\n=== stage {stage}, {name}: {error}")
            continue

        max_len = config.max_prompt_seq_len if stage == 3 else config.max_seq_len
        items = encode_records(records[:1000], tokenizer, stage, max_len)
        of_how_many = " of the first 1000" if len(records) > 1000 else ""
        print(f"\n=== stage {stage}, {name}: {len(items)}{of_how_many} rows to train on, "
              f"{len(held)} held out. The first, [[trained on]]:")
        show(items[0], stage, tokenizer)


if __name__ == "__main__":
    with exit_on_usage_error():
        main()
