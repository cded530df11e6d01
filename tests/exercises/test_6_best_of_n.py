"""Exercise 6: the best of n answers, without training, and how far it is from the model that gave them."""

import itertools
import math

import pytest
import torch

from exercise import function, module


def test_the_distribution_of_the_best():
    """Against all draws of n answers, of which the one with the highest score is taken."""
    distribution = function(module("bench.best_of_n"), "best_of_n_distribution")
    torch.manual_seed(0)
    probabilities = torch.randn(4, dtype=torch.float64).softmax(0)
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    for n in (1, 2, 3):
        expected = torch.zeros(4, dtype=torch.float64)
        for draw in itertools.product(range(4), repeat=n):
            best = max(draw, key=lambda i: scores[i])
            expected[best] += probabilities[list(draw)].prod()
        torch.testing.assert_close(distribution(probabilities, scores, n), expected)


def test_the_bound_of_the_kl():
    """log n - (n - 1) / n, an upper bound of the KL to the model (arXiv 2401.01879), close where answers are many."""
    best_of_n = module("bench.best_of_n")
    kl_bound, distribution = function(best_of_n, "kl_bound"), function(best_of_n, "best_of_n_distribution")
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    for count, close in ((3, False), (3000, True)):
        probabilities = torch.full((count,), 1 / count, dtype=torch.float64)
        best = distribution(probabilities, torch.arange(count, dtype=torch.float64), 8)
        kl = (best * (best / probabilities).log()).sum().item()
        assert kl < kl_bound(8) and (kl > 0.999 * kl_bound(8)) == close


def test_the_best_of_each_group():
    """Scores of answers that stand together by prompt, n each -> the row of each group's best."""
    pick = function(module("bench.best_of_n"), "pick")
    assert pick(torch.tensor([1.0, 5, 2, 0, -3, -1]), 3).tolist() == [1, 3]
    assert pick(torch.tensor([1.0, 5, 2, 0]), 1).tolist() == [0, 1, 2, 3]
