"""What bench/chat_model.py measures of an answer, against numbers worked by hand."""

import math

import pytest
import torch
import transformers

from bench.chat_model import content_f1, perplexity, repetition


def test_repetition_is_the_share_of_three_word_runs_seen_before():
    assert repetition("one two three four five") == 0
    assert repetition("go on go on go on") == pytest.approx(0.5)  # go on go, on go on, go on go, on go on
    assert repetition("too short") == 0


def test_content_f1_counts_words_that_are_not_the_commonest():
    assert content_f1("The capital of France is Paris.", "Paris is the capital of France.") == 1
    # ours: capital, lyon; theirs: capital, france, paris; one in common
    assert content_f1("The capital is Lyon.", "The capital of France is Paris.") == pytest.approx(2 / 5)
    assert content_f1("It is.", "That is it.") == 1
    assert content_f1("", "Paris.") == 0


def test_reading_ease_is_fleschs():
    simple_english = pytest.importorskip("bench.simple_english", reason="needs pyphen")
    # 6 words, 1 sentence, 6 syllables
    expected = 206.835 - 1.015 * 6 - 84.6 * 1
    assert simple_english.reading_ease("The cat sat on the mat.") == pytest.approx(expected)
    # 4 words, 2 sentences; pho-to-syn-the-sis has five syllables
    expected = 206.835 - 1.015 * 2 - 84.6 * 8 / 4
    assert simple_english.reading_ease("Photosynthesis helps. Plants grow.") == pytest.approx(expected)
    assert simple_english.simple([], ["", "The cat sat on the mat."]) == [0, 5]


def test_perplexity_of_a_text_is_hugging_faces():
    class Letters:
        def __call__(self, text, add_special_tokens):
            ids = [ord(letter) % 20 for letter in text]
            return transformers.BatchEncoding({"input_ids": ids})

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    text = "a quick brown fox jumps over the lazy dogs"
    ids = torch.tensor(Letters()(text, False)["input_ids"][:40]).view(2, 20)
    with torch.no_grad():
        expected = math.exp(model(ids, labels=ids).loss)
    assert perplexity(model, Letters(), text, length=20) == pytest.approx(expected, rel=1e-5)
