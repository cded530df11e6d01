"""
Simple English as a reward function, one that a user of step3_ppo.py might write; bench/chat_model.py uses it.

    pip install pyphen                                   # hyphenation tells the syllables; needed here alone
    python step3_ppo.py --reward_fn bench/simple_english.py:simple --data_path my_questions.jsonl ...
"""

import re

import pyphen

HYPHENS = pyphen.Pyphen(lang="en_US")


def reading_ease(text):
    """
    Flesch's reading ease (Flesch 1948, A new readability yardstick): 100 is very easy, 60 plain, 0 for scholars.
    206.835 - 1.015 words a sentence - 84.6 syllables a word; a text without words has 0.
    """
    words = re.findall(r"[A-Za-z']+", text)
    if not words:
        return 0.0
    sentences = max(len(re.findall(r"[.!?](?:\s|$)", text)), 1)
    syllables = sum(len(HYPHENS.positions(word)) + 1 for word in words)
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)


def simple(prompts, completions, **columns):
    """
    Reading ease of each completion, between 0 and 100, in twentieths: about one standard deviation of what a small
    chat model writes. The bounds keep a row of one-syllable words from being worth more than a plain sentence.
    """
    return [min(max(reading_ease(text), 0.0), 100.0) / 20 for text in completions]
