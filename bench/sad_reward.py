"""
"Sadder" as a reward function for step3_ppo.py; bench/real_text.py uses it. The lexicon's path comes in VADER_LEXICON.

    VADER_LEXICON=vader_lexicon.txt python step3_ppo.py --reward_fn bench/sad_reward.py:sadder ...

Hutto & Gilbert 2014, VADER; https://github.com/cjhutto/vaderSentiment
"""

import os
import re
from functools import cache


@cache
def valences():
    """{word: mean valence people gave it, -4 (worst) to 4 (best)}; a line is word, mean, deviation, ratings."""
    with open(os.environ["VADER_LEXICON"], encoding="utf-8") as file:
        return {word: float(mean) for word, mean, *_ in (line.split("\t") for line in file)}


def sadder(prompts, completions, **columns):
    """
    Minus VADER's compound score of each completion, in (-1, 1): s / sqrt(s^2 + 15), s the sum of its words' valences.
    One sad word more counts ever less, so that a list of them gains little. Without VADER's rules for negation.
    """
    sums = [sum(valences().get(word, 0.0) for word in re.findall(r"[a-z']+", text.lower())) for text in completions]
    return [-s / (s * s + 15) ** 0.5 for s in sums]
