"""Exercise 1: rows with a question, several answers and their votes become pairs."""

import pytest

from data import to_records
from exercise import not_yet
from support import forms

ROWS = [
    {"query": "What is 1 + 1?", "answers": ["Three.", "Two.", "Eleven?"], "votes": [1, 9, 0]},
    {"query": "Who are you?", "answers": ["A model.", "You know."], "votes": [4, 4]},
    {"query": "Hi!", "answers": ["Hello!"], "votes": [2]},
]


def read():
    """-> records, and the rows that were left out, by reason"""
    if not any(set(columns) == {"query", "answers", "votes"} for columns, _ in forms.FORMS):
        not_yet("support/forms.py has no line of FORMS for the columns query, answers, votes")
    return to_records(ROWS, "votes.jsonl")


def test_most_votes_against_fewest():
    first = read()[0][0]
    assert first.prompt == [{"role": "user", "content": "What is 1 + 1?"}]
    assert (first.chosen, first.rejected) == ("Two.", "Eleven?")


def test_equal_votes_are_left_out_and_counted():
    records, left_out = read()
    assert len(records) == 2 and "that are ties" in left_out
    form = next(form for columns, form in forms.FORMS if "votes" in columns)
    with pytest.raises(forms.Unusable, match="ties"):
        form(ROWS[1])


def test_one_answer_is_a_demonstration():
    second = read()[0][1]
    assert (second.chosen, second.rejected) == ("Hello!", None)
