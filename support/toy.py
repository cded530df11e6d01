"""
The built-in task `toy`: short questions about a small world, in which every answer can be marked
exactly.

It needs no download, a model of a few million parameters learns it in minutes on a CPU, and
`toy_gold` says what a learned reward cannot: whether the answers really became better. Its answers
are good and bad in known shares and a few labels are wrong, so there is something to learn at every
stage.
"""

import functools
import io
import random
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from transformers import LlamaTokenizer


# -----------------------------------------------------------------------------
# the world: what can be asked, and what is true

class Topic(NamedTuple):
    asks: list   # ways to ask about a subject {x}
    answer: str  # the good answer: a sentence about {x} and the fact {y}
    facts: dict  # subject -> fact


def pairs(text):
    """'sky=blue grass=green' -> {'sky': 'blue', 'grass': 'green'}"""
    return dict(fact.split("=") for fact in text.split())


TOY_OPENERS = ["", "Hello! ", "Please tell me: ", "One more question. "]

TOY_TOPICS = {
    "opposite": Topic(
        ["What is the opposite of {x}?", "Tell me the opposite of {x}.",
         "Which word is the opposite of {x}?"],
        "The opposite of {x} is {y}.",
        pairs("hot=cold cold=hot big=small small=big fast=slow slow=fast high=low low=high "
              "happy=sad sad=happy light=dark dark=light old=young young=old full=empty empty=full "
              "wet=dry dry=wet")),
    "colour": Topic(
        ["What colour is the {x}?", "Tell me the colour of the {x}.",
         "Which colour does the {x} have?"],
        "The {x} is {y}.",
        pairs("sky=blue grass=green snow=white coal=black sun=yellow blood=red carrot=orange "
              "lemon=yellow leaf=green milk=white")),
    "sound": Topic(
        ["What does a {x} say?", "Which sound does a {x} make?", "Tell me what a {x} says."],
        "A {x} says {y}.",
        pairs("dog=woof cat=meow cow=moo duck=quack sheep=baa pig=oink lion=roar bee=buzz")),
    "next": Topic(
        ["Which number comes after {x}?", "What comes after {x}?", "Count on from {x}.",
         "Tell me the number after {x}.", "Which number follows {x}?"],
        "After {x} comes {y}.",
        pairs("one=two two=three three=four four=five five=six six=seven seven=eight eight=nine")),
    "sum": Topic(
        ["What is {x}?", "How much is {x}?", "Please add {x}.", "Tell me what {x} is.",
         "What do you get for {x}?", "Can you add {x}?"],
        "{x} is {y}.",
        {f"{a} + {b}": str(a + b) for a in range(1, 4) for b in range(1, 4)}),
    "spelling": Topic(
        ["How do you spell {x}?", "Spell {x}.", "Tell me how to spell {x}."],
        "You spell {x} like this: {y}.",
        {word: " ".join(word) for word in "hat cup bed pen box map".split()}),
    "day": Topic(
        ["Which day comes after {x}?", "Tell me the day after {x}.", "What day follows {x}?",
         "Can you tell me the day after {x}?"],
        "{y} comes after {x}.",
        pairs("Monday=Tuesday Tuesday=Wednesday Wednesday=Thursday Thursday=Friday Friday=Saturday "
              "Saturday=Sunday Sunday=Monday")),
    "talk": Topic(
        ["{x}", "{x} I am new here.", "{x} It is me again."],
        "{y}",
        {"Hi!": "Hello! How can I help you?", "Good morning!": "Hello! How can I help you?",
         "Thank you!": "You are welcome!", "Many thanks!": "You are welcome!",
         "Who are you?": "I am a small language model.",
         "What are you?": "I am a small language model.",
         "Goodbye!": "See you soon.", "Bye!": "See you soon."}),
}


class AnswerKey(NamedTuple):
    """What is needed to mark and to make answers to one question."""
    good: str    # the good answer, a sentence
    fact: str    # the bare fact in it
    wrong: list  # wrong answers: pairs of a sentence and the bare fact in it


@functools.cache
def toy_questions():
    """-> {question: its AnswerKey}"""
    questions = {}
    for topic in TOY_TOPICS.values():
        for subject, fact in topic.facts.items():
            good = topic.answer.format(x=subject, y=fact)
            key = AnswerKey(good, fact, wrong_answers(topic, subject))
            for opener in TOY_OPENERS:
                for ask in topic.asks:
                    questions[opener + ask.format(x=subject)] = key
    return questions


def wrong_answers(topic, asked_subject):
    """
    Sorted pairs (sentence, fact), of three kinds: about the subject that was asked about, with the
    fact of another; about another subject, with the fact that was asked for; and a true sentence
    about another subject.
    """
    right_fact = topic.facts[asked_subject]
    wrong = set()
    for subject, own_fact in topic.facts.items():
        if subject == asked_subject:
            wrong_facts = set(topic.facts.values()) - {right_fact}
        else:
            wrong_facts = {right_fact, own_fact}
        for fact in wrong_facts:
            wrong.add((topic.answer.format(x=subject, y=fact), fact))
    # The answers of small talk do not name their subject: that to "Hi!" is also that to "Good
    # morning!", and not wrong.
    good = topic.answer.format(x=asked_subject, y=right_fact)
    wrong.discard((good, right_fact))
    return sorted(wrong)


# -----------------------------------------------------------------------------
# gold: the exact mark of an answer

def toy_gold(question, answer):
    """
    The true objective of the toy task, in [0, 1]:

    1     the right fact in one polite sentence
    0.5   curt (the bare fact), or rambling (one more whole sentence, about something else)
    0.25  rude (something before the good answer), or endless (anything else after it)
    0     the fact is wrong or absent
    """
    good, fact, wrong = toy_questions()[question]
    answer = " ".join(answer.split())
    if answer == good:
        return 1.0
    if answer.rstrip(".") == fact.rstrip("."):
        return 0.5
    if answer.startswith(good):
        extra = answer.removeprefix(good).strip()
        is_one_sentence = re.fullmatch(r"[^.!?]{1,60}[.!?]", extra)
        is_an_answer = extra == good or any(extra == sentence for sentence, _ in wrong)
        return 0.5 if is_one_sentence and not is_an_answer else 0.25
    return 0.25 if answer.endswith(" " + good) else 0.0


def load_gold_mark(config):
    """f(record, answer) -> toy_gold in [0, 1] where all data is the toy task's, else None."""
    if config.data_path != ["toy"] or config.sft_data_path:
        return None

    def gold_mark(record, answer):
        question = record.prompt[-1]["content"]
        return toy_gold(question, answer)

    return gold_mark


# -----------------------------------------------------------------------------
# rows: pairs of answers, as people might have written and labelled them

# shares of answer styles: mostly bad, like text from the web
TOY_STYLES = {"good": 0.25, "curt": 0.2, "rude": 0.25, "rambling": 0.15, "endless": 0.1,
              "unfinished": 0.05}
TOY_RUDE = ["That is a stupid question.", "Do not bother me.", "Even a child knows that."]
TOY_RAMBLE = ["By the way, I like soup.", "It may rain soon.", "My shoes are new.",
              "I had a long walk."]

TOY_WRONG = 0.4         # share of answers with a wrong fact
TOY_LABEL_NOISE = 0.03  # share of pairs whose labels are swapped
TOY_SECOND_TURNS = 0.1  # share of prompts in which another question was asked and answered before
TOY_PAIRS_PER_QUESTION = 40


def toy_rows():
    """
    Rows with the columns prompt (messages), chosen, rejected and hold_out_as: the questions in the
    prompt without their openers, because the same question is held out with all openers, and out of
    earlier turns too. chosen is the answer that `toy_gold` marks higher, but for label noise.
    Always the same rows.
    """
    rng = random.Random(0)
    questions = toy_questions()
    asked_before = list(questions.items())
    rows = []
    for question, key in questions.items():
        for _ in range(TOY_PAIRS_PER_QUESTION):
            chosen, rejected = draw_pair(rng, question, key)
            prompt = [{"role": "user", "content": question}]
            hold_out_as = [without_opener(question)]
            if rng.random() < TOY_SECOND_TURNS:
                earlier, earlier_key = rng.choice(asked_before)
                prompt = [{"role": "user", "content": earlier},
                          {"role": "assistant", "content": earlier_key.good}] + prompt
                hold_out_as = [without_opener(earlier)] + hold_out_as
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected,
                         "hold_out_as": hold_out_as})
    return rows


def draw_pair(rng, question, key):
    """-> (chosen, rejected), two answers of different marks."""
    first_mark = second_mark = 0
    while first_mark == second_mark:
        first = draw_answer(rng, key)
        second = draw_answer(rng, key)
        first_mark = toy_gold(question, first)
        second_mark = toy_gold(question, second)
    second_is_chosen = second_mark > first_mark
    if rng.random() < TOY_LABEL_NOISE:
        second_is_chosen = not second_is_chosen
    if second_is_chosen:
        return second, first
    return first, second


def draw_answer(rng, key):
    """An answer to the key's question, right or wrong, in some style."""
    sentence = key.good
    fact = key.fact
    if rng.random() < TOY_WRONG:
        wrong = key.wrong
        if rng.random() >= 2 / 3:  # one mistake in three has nothing to do with the question
            other_key = rng.choice(list(toy_questions().values()))
            wrong = other_key.wrong
        sentence, fact = rng.choice(wrong)

    style, = rng.choices(list(TOY_STYLES), TOY_STYLES.values())
    # Every style's words are drawn, so that the number of draws is the same for all styles.
    rude = rng.choice(TOY_RUDE)
    ramble = rng.choice(TOY_RAMBLE)
    words = sentence.split()
    unfinished = words[:rng.randrange(1, len(words))]
    in_style = {
        "good": sentence,
        "curt": fact if fact.endswith((".", "!", "?")) else fact + ".",
        "rude": f"{rude} {sentence}",
        "rambling": f"{sentence} {ramble}",
        "endless": f"{sentence} {sentence} {sentence}",
        "unfinished": " ".join(unfinished),
    }
    return in_style[style]


def without_opener(question):
    for opener in TOY_OPENERS:
        if opener and question.startswith(opener):
            return question.removeprefix(opener)
    return question


# -----------------------------------------------------------------------------
# the tokenizer of the preset `tiny`

TOY_VOCAB = 1000  # pieces, at most


@functools.cache
def toy_tokenizer():
    """
    A SentencePiece tokenizer trained on the toy world's text, in about a second. Training is
    deterministic, so every rank on every host makes its own and needs no shared file. Bytes stand
    in for what the world does not contain.
    """
    import sentencepiece
    text = []
    for row in toy_rows():
        question = row["prompt"][-1]["content"]
        for answer in (row["chosen"], row["rejected"]):
            text.append(f"\n\nHuman: {question}\n\nAssistant: {answer}")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=TOY_VOCAB,
        hard_vocab_limit=False, model_type="bpe", character_coverage=1.0, byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, normalization_rule_name="identity",
        split_digits=True, num_threads=1, minloglevel=2)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.getvalue())
        return LlamaTokenizer.from_pretrained(folder, pad_token="<pad>")
