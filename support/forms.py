"""
Forms: the rows of the data sets that people have -> examples, as each set means them.

    Example(prompt, chosen, rejected, all_turns)
        prompt            messages, [{"role": "user", "content": "What is 1 + 1?"}]
        chosen, rejected  the assistant's better and worse answer, a message each; None where the
                          row has none
        all_turns         whether the answers within the prompt are demonstrations too, and not the
                          dialogue that two answers were given in

A form is a function, row -> Example. `FORMS` names the columns of each, and a source is read by the
first of them that fits. Where an example takes several rows (a tree of messages, good and bad
answers apart), `JOINS` first makes one row of them. To add a set, write one small function and a
line of `FORMS`. A row that holds no example raises Unusable, with the reason by which it is
counted.

The sets' names stand beside their functions: Hugging Face's hub, unless said otherwise.
"""

import json
import math
import zlib
from collections import defaultdict
from functools import partial
from typing import NamedTuple


class Example(NamedTuple):
    prompt: list
    chosen: dict | None
    rejected: dict | None
    all_turns: bool = False


class Unusable(Exception):
    """
    A row that holds no example. Its message says why, in words that follow "12 rows": "that are
    ties".
    """


# -----------------------------------------------------------------------------
# texts and messages

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"

# What sets call the speakers -> the chat templates' names.
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "bard": "assistant", "bot": "assistant", "model": "assistant",
         "observation": "tool"}
# Fields of a message, beside role and content, that chat templates read.
MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


def message(role, content):
    return {"role": role, "content": content}


def as_message(value):
    """
    {"role", "content"} or ShareGPT's {"from", "value"} -> a message whose content is text. Content
    parts are put together; a call of a tool, which has no text, gets an empty one.
    """
    role = value.get("role") or value.get("from")
    content = value["content"] if "content" in value else value.get("value")
    fields = {name: value[name] for name in MESSAGE_FIELDS if value.get(name) is not None}
    if isinstance(content, list):
        if any(not isinstance(part, str) and "text" not in part for part in content):
            raise Unusable("with an image or sound")
        texts = [part if isinstance(part, str) else part["text"] for part in content]
        content = "\n".join(text for text in texts if text is not None)
    if content is None and "tool_calls" in fields:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError("a message needs a role and a text as content")
    return {"role": ROLES.get(role, role), "content": content, **fields}


def parse_dialogue(text):
    """
    '\\n\\nHuman: hi\\n\\nAssistant: hello\\n\\nHuman: ...' -> messages. Text before the first
    marker is the system's message; text without markers is one message of the user.
    """
    # Windows ends lines by "\r\n".
    dialogue = "\n\n" + text.replace("\r\n", "\n").lstrip()
    if HUMAN not in dialogue:
        return [message("user", text.strip())]
    system, *turns = dialogue.split(HUMAN)
    messages = []
    if system.strip():
        messages.append(message("system", system.strip()))
    for turn in turns:
        question, *answers = turn.split(ASSISTANT)
        messages.append(message("user", question.strip()))
        messages += [message("assistant", answer.strip()) for answer in answers]
    return messages


def is_dialogue(text):
    """
    Whether a prompt is a dialogue in HH-RLHF's form. It begins with a marker or ends with one; a
    question may quote a dialogue in its middle.
    """
    text = text.replace("\r\n", "\n")
    return text.startswith(HUMAN) or (HUMAN in "\n\n" + text.lstrip()
                                      and text.rstrip().endswith(ASSISTANT))


def as_prompt(value):
    """
    A prompt, text or messages -> messages. An open '\\n\\nAssistant:' at the end is dropped,
    because the chat template writes it.
    """
    if isinstance(value, (list, tuple)):
        messages = [as_message(one) for one in value]
    elif is_dialogue(value):
        messages = parse_dialogue(value)
    else:
        messages = [message("user", value.strip())]
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and not last["content"] and len(last) == 2:
        messages = messages[:-1]
    return messages


def as_turns(value):
    """What follows a prompt: a text, a message or a list of them -> messages, [] for None."""
    if value is None:
        return []
    if isinstance(value, str):
        return [message("assistant", value)]
    if isinstance(value, dict):
        return [as_message(value)]
    return [as_message(one) for one in value]


def speeches(messages):
    """Who said what, for comparisons."""
    return [(one["role"], one["content"].strip()) for one in messages]


def whole_dialogue(prompt, answer):
    """
    prompt  messages
    answer  what as_turns takes. A list may go on from the prompt, repeat it, or be the whole
            dialogue of which the prompt's column holds only a part
    """
    turns = as_turns(answer)
    if not turns:
        raise Unusable("without an answer")
    repeats_prompt = len(turns) > 1 and turns[0]["role"] != "assistant"
    if repeats_prompt and turns[0]["role"] == "system":
        prompt = []
    elif repeats_prompt:
        prompt = [one for one in prompt if one["role"] == "system"]
    dialogue = prompt + turns
    if dialogue[-1]["role"] != "assistant":
        raise Unusable("whose last turn is not the assistant's")
    return dialogue


def example(prompt, chosen, rejected=None):
    """A prompt (messages) and its answers, see whole_dialogue, -> Example."""
    better = whole_dialogue(prompt, chosen)
    if not rejected:
        return Example(better[:-1], better[-1], None)
    worse = whole_dialogue(prompt, rejected)
    if speeches(better[:-1]) != speeches(worse[:-1]):
        raise Unusable("whose two dialogues differ before the last answer")
    return Example(better[:-1], better[-1], worse[-1])


def better_first(row, first, second, first_is_better):
    """The row's columns `first` and `second` as (chosen, rejected); None: neither is better."""
    if first_is_better is None:
        raise Unusable("that are ties")
    return (row[first], row[second]) if first_is_better else (row[second], row[first])


def by_score(first_score, second_score):
    """Numbers (text in a .csv) -> whether the first is better; None where they are the same."""
    first_score = float(first_score)
    second_score = float(second_score)
    if math.isnan(first_score) or math.isnan(second_score):
        raise ValueError("a score that is no number")
    return None if first_score == second_score else first_score > second_score


# -----------------------------------------------------------------------------
# pairs

def from_pair(row):
    """
    prompt, chosen, rejected: Dahoas/rm-static, full-hh-rlhf and synthetic-instruct-gptj-pairwise,
    HuggingFaceH4/ultrafeedback_binarized, argilla/dpo-mix-7k, tulu-3's preferences, TRL.
    In yitingxie/rlhf-reward-datasets the answers hold the "Assistant:" that the prompt lacks.
    """
    prompt = row["prompt"]
    chosen = row["chosen"]
    rejected = row["rejected"]
    if not chosen:
        return from_prompt(row)
    if isinstance(prompt, str) and is_dialogue(prompt):
        chosen, rejected = (answer.strip().removeprefix("Assistant:")
                            if isinstance(answer, str) else answer for answer in (chosen, rejected))
    return example(as_prompt(prompt), chosen, rejected)


def from_dialogues(row):
    """Two whole dialogues, the same but for the last answer: Anthropic/hh-rlhf, TRL."""
    chosen, rejected = (parse_dialogue(row[name]) if isinstance(row[name], str) else row[name]
                        for name in ("chosen", "rejected"))
    if not chosen or not rejected or as_prompt(rejected)[-1]["role"] != "assistant":
        raise Unusable("without an answer")
    return example([], chosen, rejected)


def from_question(question, row):
    """Intel/orca_dpo_pairs, argilla/distilabel-intel-orca-dpo-pairs: the system's message apart."""
    return example(with_system(row, as_prompt(row[question])), row["chosen"], row["rejected"])


def with_system(row, messages):
    system = row.get("system") or row.get("system_prompt")
    return [message("system", system.strip()), *messages] if system else messages


def from_ranked_conversations(row):
    """LLaMA-Factory's ShareGPT form with a better and a worse answer."""
    prompt = with_system(row, as_prompt(row["conversations"]))
    return example(prompt, row["chosen"], row["rejected"])


def from_webgpt(row):
    """openai/webgpt_comparisons: two scored answers."""
    prompt = as_prompt(row["question"]["full_text"])
    better = by_score(row["score_0"], row["score_1"])
    return example(prompt, *better_first(row, "answer_0", "answer_1", better))


def from_shp(row):
    """stanfordnlp/SHP: labels is 1 where answer A was preferred."""
    prompt = as_prompt(row["history"])
    first_is_better = int(row["labels"]) == 1
    return example(prompt, *better_first(row, "human_ref_a", "human_ref_b", first_is_better))


def from_safe_rlhf(row):
    """PKU-Alignment/PKU-SafeRLHF: the more helpful answer; safer_response_id is another label."""
    better = int(row["better_response_id"]) == 0
    return example(as_prompt(row["prompt"]),
                   *better_first(row, "response_0", "response_1", better))


def from_strength(prompt, first, second, strength, row):
    """nvidia/HelpSteer2 (preference), HelpSteer3: a strength below 0 means the first is better."""
    better = by_score(0, row[strength])
    return example(helpsteer_prompt(row[prompt]), *better_first(row, first, second, better))


def helpsteer_prompt(value):
    """HelpSteer's 'hi<extra_id_1>Assistant\\nhello\\n<extra_id_1>User\\n...' -> messages."""
    if not isinstance(value, str) or "<extra_id_1>" not in value:
        return as_prompt(value)
    question, *turns = value.split("<extra_id_1>")
    messages = [message("user", question.strip())]
    for turn in turns:
        speaker, _, text = turn.partition("\n")
        messages.append(message(speaker.strip().lower(), text.strip()))
    return as_prompt(messages)


def from_arena(row):
    """lmsys/chatbot_arena_conversations: two dialogues and the winner."""
    winner = row["winner"]
    if not winner.startswith("model_"):
        raise Unusable("that are ties")
    columns = ("conversation_a", "conversation_b")
    return example([], *better_first(row, *columns, winner == "model_a"))


def from_completions(row):
    """
    openbmb/UltraFeedback: several scored answers. As in Zephyr (Tunstall et al. 2023, section 3)
    the best is chosen and another, by chance, rejected; the chance is a hash of the prompt.
    """
    answers = []
    for one in row["completions"]:
        score = one.get("fine-grained_score") or one.get("overall_score")
        if one.get("response") and score is not None:
            answers.append((float(score), one["response"]))
    if not answers:
        raise Unusable("without an answer")
    best_score, best = max(answers, key=lambda answer: answer[0])
    worse = [text for score, text in answers if score < best_score]
    prompt = as_prompt(row["instruction"])
    if not worse:
        return example(prompt, best)
    return example(prompt, best, worse[zlib.crc32(row["instruction"].encode()) % len(worse)])


def from_rated_responses(row):
    """argilla/ultrafeedback-binarized-preferences."""
    return example(as_prompt(row["instruction"]), row["chosen_response"], row["rejected_response"])


def from_passages(row):
    """Cohere/miracl-*-queries: a passage that answers the query, and one that does not."""
    positive = row["positive_passages"]
    negative = row["negative_passages"]
    if not positive:
        raise Unusable("without an answer")
    rejected = negative[0]["text"] if negative else None
    return example(as_prompt(row["query"]), positive[0]["text"], rejected)


# -----------------------------------------------------------------------------
# demonstrations

def from_instruction(row):
    """
    tatsu-lab/alpaca, LLaMA-Factory's form of it with system and history, databricks-dolly-15k
    (context, response). The answer is output or response, or a chosen and a rejected one.
    """
    prompt = with_system(row, [])
    for question, answer in row.get("history") or []:
        prompt += [message("user", question), message("assistant", answer)]
    extra = row.get("input") or row.get("context")
    question = row["instruction"] + ("\n\n" + extra if extra else "")
    prompt += as_prompt(question)
    for name in ("chosen", "output", "response"):
        if row.get(name) is not None:
            return example(prompt, row[name], row.get("rejected"))
    raise Unusable("without an answer")


def from_messages(column, row):
    """
    A whole dialogue, all of whose answers are demonstrations: HuggingFaceH4/ultrachat_200k,
    tulu-3's SFT mixture, OpenAI's and TRL's messages; ShareGPT's conversations.
    """
    dialogue = as_turns(row[column])
    if not dialogue:
        raise Unusable("without an answer")
    if dialogue[0]["role"] != "system":
        dialogue = with_system(row, dialogue)
    return example([], dialogue)._replace(all_turns=True)


def from_columns(prompt, answer, row):
    """Demonstrations; prompt and answer are the names of the columns that hold them."""
    return example(with_system(row, as_prompt(row[prompt])), row[answer])


def from_vicuna(row):
    """pvduy/sharegpt_alpaca_oa_vicuna_format: 'USER: hi ASSISTANT:', and the answer as label."""
    messages = []
    for turn in row["prompt"].split("USER:")[1:]:
        question, *answers = turn.split("ASSISTANT:")
        messages.append(message("user", question.strip()))
        messages += [message("assistant", answer.replace("</s>", "").strip()) for answer in answers]
    return example(as_prompt(messages or row["prompt"]), row["label"])


def from_lists(question, answers, row):
    """Hello-SimpleAI/HC3-Chinese: the first of several answers."""
    return example(as_prompt(row[question]), row[answers][0] if row[answers] else None)


def from_paragraph(row):
    """lmqg/qag_jaquad, as in DeepSpeed-Chat: the first question, answered by the paragraph."""
    return example(as_prompt(row["questions"][0]), row["paragraph"])


def from_prompt(row):
    """A prompt alone, which is enough for PPO."""
    return Example(as_prompt(row["prompt"]), None, None)


# -----------------------------------------------------------------------------
# rows -> one row an example: list of rows -> list of (row number, row or Unusable)

def join_tree(rows, source):
    """
    OpenAssistant/oasst1, oasst2: every row is a message that names its parent; sibling answers are
    ranked, 0 the best. A question's best answer is chosen, and its worst rejected.
    """
    by_id = {row["message_id"]: row for row in rows}
    children = defaultdict(list)
    for row in rows:
        if not row.get("deleted"):
            children[row["parent_id"]].append(row)
    joined = []
    for number, row in enumerate(rows, 1):
        if row["role"] != "prompter" or row.get("deleted"):
            continue
        answers = [child for child in children[row["message_id"]] if child["role"] == "assistant"]
        if not answers:
            joined.append((number, Unusable("without an answer")))
            continue
        prompt = []
        ancestor = row
        while ancestor is not None and len(prompt) <= len(rows):
            prompt.insert(0, as_message({"from": ancestor["role"], "value": ancestor["text"]}))
            ancestor = by_id.get(ancestor["parent_id"])
        if ancestor is not None:
            joined.append((number, Unusable("whose message is an ancestor of its own")))
            continue
        ranked = [answer for answer in answers if answer.get("rank") is not None]
        ranked.sort(key=lambda answer: answer["rank"])
        best = ranked[0] if ranked else answers[0]
        worst = ranked[-1] if len(ranked) > 1 else None
        joined.append((number, {**row, "prompt": prompt, "chosen": best["text"],
                                "rejected": worst["text"] if worst else None}))
    return joined


def grouped(rows):
    """Rows -> for each prompt, in order, a list of its (number, row)."""
    groups = defaultdict(list)
    for number, row in enumerate(rows, 1):
        groups[json.dumps(row["prompt"], default=str)].append((number, row))
    return list(groups.values())


def join_ratings(rows, source):
    """nvidia/HelpSteer2, HelpSteer: the most and the least helpful answer to a prompt."""
    joined = []
    for group in grouped(rows):
        group.sort(key=lambda numbered: -float(numbered[1]["helpfulness"]))
        (number, best), (_, worst) = group[0], group[-1]
        if len(group) > 1 and float(best["helpfulness"]) == float(worst["helpfulness"]):
            joined.append((number, Unusable("that are ties")))
            continue
        rejected = worst["response"] if len(group) > 1 else None
        joined.append((number, {**best, "prompt": helpsteer_prompt(best["prompt"]),
                                "chosen": best["response"], "rejected": rejected}))
    return joined


def join_labels(rows, source):
    """
    TRL's unpaired form (trl-lib/kto-mix-14k): label says whether a completion is good. A prompt's
    good ones are paired with its bad ones; a bad one alone is no demonstration.
    """
    joined = []
    for group in grouped(rows):
        good = [one for one in group if str(one[1]["label"]).lower() in ("true", "1", "1.0")]
        bad = [one for one in group if one not in good]
        for place, (number, row) in enumerate(good):
            rejected = bad[place][1]["completion"] if place < len(bad) else None
            joined.append((number, {**row, "chosen": row["completion"], "rejected": rejected}))
        for number, _ in bad[len(good):]:
            joined.append((number, Unusable("with a bad answer alone")))
    return joined


def join_languages(rows, source):
    """mkqa: questions and answers in 26 languages; the source's name says which, else English."""
    language = "en"
    for word, code in (("chinese", "zh_cn"), ("zh", "zh_cn"), ("japanese", "ja"), ("-ja", "ja")):
        if word in source.lower():
            language = code
            break
    joined = []
    for number, row in enumerate(rows, 1):
        answers = row["answers"].get(language) or []
        answer = answers[0].get("text") if answers else None
        question = row["queries"].get(language) or row.get("query")
        if answer:
            joined.append((number, {**row, "prompt": question, "response": answer}))
        else:
            joined.append((number, Unusable("without an answer")))
    return joined


# -----------------------------------------------------------------------------
# the tables: columns that a source must have -> how it is read. The first that fits is taken.

JOINS = [
    (("message_id", "parent_id", "text", "role"), join_tree),
    (("prompt", "response", "helpfulness"), join_ratings),
    (("prompt", "completion", "label"), join_labels),
    (("queries", "answers"), join_languages),
]

FORMS = [
    (("conversations", "chosen", "rejected"), from_ranked_conversations),
    (("prompt", "chosen", "rejected"), from_pair),
    (("instruction", "chosen", "rejected"), from_instruction),
    (("question", "chosen", "rejected"), partial(from_question, "question")),
    (("input", "chosen", "rejected"), partial(from_question, "input")),
    (("chosen", "rejected"), from_dialogues),
    (("question", "answer_0", "answer_1", "score_0", "score_1"), from_webgpt),
    (("history", "human_ref_a", "human_ref_b", "labels"), from_shp),
    (("prompt", "response_0", "response_1", "better_response_id"), from_safe_rlhf),
    (("prompt", "response_1", "response_2", "preference_strength"),
     partial(from_strength, "prompt", "response_1", "response_2", "preference_strength")),
    (("context", "response1", "response2", "overall_preference"),
     partial(from_strength, "context", "response1", "response2", "overall_preference")),
    (("conversation_a", "conversation_b", "winner"), from_arena),
    (("instruction", "completions"), from_completions),
    (("instruction", "chosen_response", "rejected_response"), from_rated_responses),
    (("query", "positive_passages", "negative_passages"), from_passages),
    (("instruction", "output"), from_instruction),
    (("instruction", "response"), from_instruction),
    (("messages",), partial(from_messages, "messages")),
    (("conversations",), partial(from_messages, "conversations")),
    (("conversation",), partial(from_messages, "conversation")),
    (("prompt", "response"), partial(from_columns, "prompt", "response")),
    (("prompt", "completion"), partial(from_columns, "prompt", "completion")),
    (("prompt", "chosen"), partial(from_columns, "prompt", "chosen")),
    (("prompt", "label"), from_vicuna),
    (("question", "human_answers"), partial(from_lists, "question", "human_answers")),
    (("questions", "paragraph"), from_paragraph),
    (("question", "answer"), partial(from_columns, "question", "answer")),
    (("question", "response"), partial(from_columns, "question", "response")),
    (("prompt",), from_prompt),
]
