"""
The built-in task `toy`: a small world whose every answer can be marked exactly.
"""

import functools
import io
import itertools
import random
import re
import tempfile
from pathlib import Path

from transformers import LlamaTokenizer


TOY_OPENERS = ["", "Hello! ", "Please tell me: ", "One more question. "]


TOY_TOPICS = {  # topic -> (ways to ask, the good answer, facts as "subject=answer"); {x} is the subject, {y} the answer
    "opposite": (
        ["What is the opposite of {x}?", "Tell me the opposite of {x}.", "Which word is the opposite of {x}?"],
        "The opposite of {x} is {y}.",
        [f"{x}={y}" for pair in ("hot-cold big-small fast-slow high-low happy-sad light-dark old-young "
                                 "full-empty wet-dry").split()
         for x, y in (pair.split("-"), pair.split("-")[::-1])]),
    "colour": (
        ["What colour is the {x}?", "Tell me the colour of the {x}.", "Which colour does the {x} have?"],
        "The {x} is {y}.",
        ("sky=blue grass=green snow=white coal=black sun=yellow blood=red carrot=orange lemon=yellow leaf=green "
         "milk=white").split()),
    "sound": (
        ["What does a {x} say?", "Which sound does a {x} make?", "Tell me what a {x} says."],
        "A {x} says {y}.",
        "dog=woof cat=meow cow=moo duck=quack sheep=baa pig=oink lion=roar bee=buzz".split()),
    "next": (
        ["Which number comes after {x}?", "What comes after {x}?", "Count on from {x}.",
         "Tell me the number after {x}.", "Which number follows {x}?"],
        "After {x} comes {y}.",
        [f"{x}={y}" for x, y in itertools.pairwise("one two three four five six seven eight nine".split())]),
    "sum": (
        ["What is {x}?", "How much is {x}?", "Please add {x}.", "Tell me what {x} is.", "What do you get for {x}?",
         "Can you add {x}?"],
        "{x} is {y}.",
        [f"{a} + {b}={a + b}" for a in range(1, 4) for b in range(1, 4)]),
    "spelling": (
        ["How do you spell {x}?", "Spell {x}.", "Tell me how to spell {x}."],
        "You spell {x} like this: {y}.",
        [f"{x}={' '.join(x)}" for x in "hat cup bed pen box map".split()]),
    "day": (
        ["Which day comes after {x}?", "Tell me the day after {x}.", "What day follows {x}?",
         "Can you tell me the day after {x}?"],
        "{y} comes after {x}.",
        [f"{x}={y}" for x, y in itertools.pairwise(
            "Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday".split())]),
    "talk": (
        ["{x}", "{x} I am new here.", "{x} It is me again."],
        "{y}",
        ["Hi!=Hello! How can I help you?", "Good morning!=Hello! How can I help you?", "Thank you!=You are welcome!",
         "Many thanks!=You are welcome!", "Who are you?=I am a small language model.",
         "What are you?=I am a small language model.", "Goodbye!=See you soon.", "Bye!=See you soon."]),
}


TOY_RUDE = ["That is a stupid question.", "Do not bother me.", "Even a child knows that."]


TOY_RAMBLE = ["By the way, I like soup.", "It may rain soon.", "My shoes are new.", "I had a long walk."]


# how the web answers
TOY_STYLES = {"good": 0.25, "curt": 0.2, "rude": 0.25, "rambling": 0.15, "endless": 0.1, "unfinished": 0.05}


TOY_WRONG, TOY_LABEL_NOISE = 0.4, 0.03  # share of answers with a wrong fact; share of pairs whose labels are swapped


TOY_SECOND_TURNS = 0.1  # share of prompts in which another question was asked and answered before


TOY_PAIRS_PER_QUESTION = 40


TOY_VOCAB = 1000


@functools.cache
def toy_questions():
    """
    question -> (the good answer, the bare fact in it, wrong answers). A wrong answer is a pair (sentence, fact): this
    subject with another fact, or another subject with this fact or its own.
    """
    questions = {}
    for asks, sentence, facts in TOY_TOPICS.values():
        facts = [fact.split("=") for fact in facts]
        for x, y in facts:
            wrong = {(sentence.format(x=subject, y=other), other) for subject, _ in facts for _, other in facts
                     if (subject == x) != (other == y) or (subject != x and [subject, other] in facts)}
            wrong.discard((sentence.format(x=x, y=y), y))
            questions.update({opener + ask.format(x=x): (sentence.format(x=x, y=y), y, sorted(wrong))
                              for opener in TOY_OPENERS for ask in asks})
    return questions


def toy_gold(question, answer):
    """
    The true objective of the toy task, in [0, 1]: 1 for the right fact in one polite sentence, 0.5 if curt (the bare
    fact) or rambling (one more whole sentence, about something else), 0.25 if rude (something before it) or endless
    (anything else after it), 0 if the fact is wrong or absent.
    """
    good, fact, wrong = toy_questions()[question]
    answer = " ".join(answer.split())
    if answer == good:
        return 1.0
    if answer.rstrip(".") == fact.rstrip("."):
        return 0.5
    if answer.startswith(good):
        extra = answer.removeprefix(good).strip()
        one_more = re.fullmatch(r"[^.!?]{1,60}[.!?]", extra)
        return 0.5 if one_more and extra not in [good, *(sentence for sentence, _ in wrong)] else 0.25
    return 0.25 if answer.endswith(" " + good) else 0.0


def toy_rows():
    """
    Pairs of answers, each right or wrong and in some style; chosen is the one that `toy_gold` marks higher (but for
    label noise).
    """
    rng, rows = random.Random(0), []
    worlds = list(toy_questions().items())

    def answer(good, fact, wrong):
        if rng.random() < TOY_WRONG:  # one mistake in three has nothing to do with the question
            good, fact = rng.choice(wrong if rng.random() < 2 / 3 else rng.choice(worlds)[1][2])
        words = good.split()
        style, = rng.choices(list(TOY_STYLES), TOY_STYLES.values())
        return {"good": good, "curt": fact if fact[-1] in ".!?" else fact + ".",
                "rude": f"{rng.choice(TOY_RUDE)} {good}", "rambling": f"{good} {rng.choice(TOY_RAMBLE)}",
                "endless": " ".join(3 * [good]), "unfinished": " ".join(words[:rng.randrange(1, len(words))])}[style]

    for question, world in worlds:
        for _ in range(TOY_PAIRS_PER_QUESTION):
            marks = [0, 0]
            while marks[0] == marks[1]:
                answers = [answer(*world), answer(*world)]
                marks = [toy_gold(question, a) for a in answers]
            better = (marks[1] > marks[0]) != (rng.random() < TOY_LABEL_NOISE)
            prompt = [{"role": "user", "content": question}]
            if rng.random() < TOY_SECOND_TURNS:
                earlier, (good, _, _) = rng.choice(worlds)
                prompt = [{"role": "user", "content": earlier}, {"role": "assistant", "content": good}] + prompt
            asked = [message["content"] for message in prompt if message["role"] == "user"]
            rows.append({"prompt": prompt, "chosen": answers[better], "rejected": answers[not better],
                         "hold_out_as": [without_opener(question) for question in asked]})
    return rows


@functools.cache
def toy_tokenizer():
    """
    A SentencePiece tokenizer trained on the toy world's text, in about a second. Training is deterministic, so every
    rank on every host makes its own and needs no shared file. Bytes stand in for what the world does not contain.
    """
    import sentencepiece
    text = [f"\n\nHuman: {row['prompt'][-1]['content']}\n\nAssistant: {row[key]}"
            for row in toy_rows() for key in ("chosen", "rejected")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=TOY_VOCAB, hard_vocab_limit=False,
        model_type="bpe", character_coverage=1.0, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        normalization_rule_name="identity", split_digits=True, num_threads=1, minloglevel=2)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(model.getvalue())
        return LlamaTokenizer.from_pretrained(folder, pad_token="<pad>")


def without_opener(question):
    for opener in TOY_OPENERS:
        if opener and question.startswith(opener):
            return question.removeprefix(opener)
    return question


def gold_scorer(config):
    """The exact scorer f(record, answer) -> [0, 1] where all data comes from a task that has one, else None."""
    if config.data_path != ["toy"]:
        return None
    return lambda record, answer: toy_gold(record.prompt[-1]["content"], answer)
