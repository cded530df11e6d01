"""
kernels/sampling.py: the right set, the right frequencies, the right log-probability. How to run:
tests/kernel_checks.py.
"""
import pytest
import torch
from kernel_checks import DEVICE, INTERPRETED, poisoned_empty  # noqa: F401

from kernels import sampling
from kernels.sampling import keep_likeliest, keep_likeliest_reference, sample, sample_reference

OPTIONS = [dict(), dict(temperature=0.7), dict(temperature=2.5), dict(top_k=5), dict(top_p=0.8),
           dict(temperature=1.5, top_k=6, top_p=0.7)]


def exact_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """
    float64 probabilities (V,) of one row after the three options, token by token as Hugging Face
    describes them.
    """
    x = logits.double() / temperature
    if top_k:
        x[x < x.sort().values[-min(top_k, len(x))]] = -float("inf")
    probs = x.softmax(0)
    if top_p < 1:
        # likeliest first, of equals the last
        order = sorted(range(len(x)), key=lambda v: (-probs[v].item(), -v))
        mass, kept = 0.0, []
        for v in order:
            if mass >= top_p - 1e-12 and kept:
                break
            kept.append(v)
            mass += probs[v].item()
        dropped = torch.ones(len(x), dtype=torch.bool)
        dropped[kept] = False
        probs[dropped] = 0.0
    return probs / probs.sum()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("V, candidates, spare", [(11, 1024, 128), (300, 1024, 128), (300, 150, 9)])
def test_frequencies_and_support(V, candidates, spare, options, monkeypatch, poisoned_empty):
    """
    An even grid of uniforms must hit each token in proportion, to one count: stricter than
    chi-square, no luck. Top-k and top-p from all the tokens, and from the likeliest alone.
    """
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    monkeypatch.setattr(sampling, "SPARE", spare)
    torch.manual_seed(1)
    logits = 2 * torch.randn(V)
    logits[V // 2:V // 2 + 3] = logits[0]  # ties, and a banned token
    logits[-1] = -float("inf")
    probs = exact_probs(logits, **options)
    draws = 12 if INTERPRETED else 400  # interpreted, a row takes up to 0.2 s
    uniform = (torch.arange(draws) + 0.5) / draws
    tokens, logprobs = sample(logits.expand(draws, V).to(DEVICE), uniform.to(DEVICE), **options)
    tokens, logprobs = tokens.cpu(), logprobs.cpu()
    assert (probs[tokens] > 0).all()
    assert (torch.bincount(tokens, minlength=V) - draws * probs).abs().max() <= 1 + 1e-6
    torch.testing.assert_close(logprobs, probs[tokens].log().float(), atol=2e-6, rtol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="600 rows; the grid above says the same of the kernel")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chi_square(options):
    """Random uniforms: Pearson's statistic under its 99.9% point for 9 degrees of freedom, 27.9."""
    torch.manual_seed(2)
    logits, draws = torch.randn(10), 600
    probs = exact_probs(logits, **options)
    tokens, _ = sample(logits.expand(draws, 10).to(DEVICE), torch.rand(draws).to(DEVICE), **options)
    counts, expected = torch.bincount(tokens.cpu(), minlength=10), draws * probs
    assert counts[probs == 0].sum() == 0
    assert ((counts - expected) ** 2 / expected)[probs > 0].sum() < 27.9


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.6, top_k=50), dict(top_p=0.9),
                                     dict(temperature=0),
                                     dict(temperature=1.5, top_k=3000, top_p=0.7)], ids=str)
@pytest.mark.parametrize("V, dtype", [(4097, torch.bfloat16), (50272, torch.float32),
                                      (50272, torch.bfloat16), (151936, torch.float32)])
def test_large_vocabulary(V, options, dtype, poisoned_empty):
    """
    The token of the definition, at both ends of the CDF too, from rows of a wider view. bfloat16
    logits tie.
    """
    torch.manual_seed(3)
    logits = (3 * torch.randn(3, V + 5, device=DEVICE)).to(dtype)[:, 2:V + 2]
    uniform = torch.tensor([0.0, 0.4321, 1 - 2**-24], device=DEVICE)
    tokens, logprobs = sample(logits, uniform, **options)
    expected, expected_logprobs = sample_reference(logits, uniform, **options)
    if options.get("temperature") == 0:
        assert (tokens == logits.float().argmax(-1)).all()
        kept = logits.float()
    else:
        kept = keep_likeliest_reference(logits.float() / options.get("temperature", 1.0),
                                        options.get("top_k", 0), options.get("top_p", 1.0))
    # float32 sums end a cumulative sum 1e-6 off, so within that of a border between two tokens
    # either may come
    same = tokens == expected
    assert same[:2].all()
    assert ((tokens - expected).abs() <= 200)[~same].all() and torch.isfinite(logprobs).all()
    exact = kept.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    error, baseline = ((t - exact)[same].abs().max() for t in (logprobs, expected_logprobs))
    assert error <= 2 * baseline + 1e-5


@pytest.mark.parametrize("V", [7, 4096, 5000])
@pytest.mark.parametrize("options", [dict(), dict(top_k=3), dict(top_p=0.5)], ids=str)
def test_never_an_impossible_token(V, options):
    """All the mass in the middle, banned or vanishing tokens round it, uniforms at both ends."""
    uniform = torch.tensor([0.0, 1e-30, 1 - 2**-24, 1 - 2**-23, 0.999999], device=DEVICE)
    logits = torch.full((5, V), -float("inf"), device=DEVICE)
    logits[:, V // 2 - 1:V // 2 + 2] = torch.tensor([0.1, 1.0, 0.2], device=DEVICE)
    logits[3:, :V // 2 - 1] = -200.0
    tokens, logprobs = sample(logits, uniform, **options)
    assert ((tokens - V // 2).abs() <= 1).all() and (logprobs > -2).all()


@pytest.mark.parametrize("V, banned", [(256, 6), (250, 0), (12288, 4096)])
def test_the_last_uniform_of_many_rows(V, banned):
    """The sum of a block rounds one way as a whole and another way token by token."""
    torch.manual_seed(5)
    rows = 20 if INTERPRETED else 500
    logits = torch.randn(rows, V, device=DEVICE)
    logits[:, V - banned:] = -float("inf")
    tokens, logprobs = sample(logits, torch.full((rows,), 1 - 2**-24, device=DEVICE))
    assert (tokens < V - banned).all() and torch.isfinite(logprobs).all()


def test_tied_logits_and_tiny_top_p():
    """
    Worked by hand: ten equals at top_p 0.55 keep the last six; a top_p near zero keeps the
    likeliest alone.
    """
    uniform = (torch.arange(6, device=DEVICE) + 0.5) / 6
    tokens, logprobs = sample(torch.zeros(6, 10, device=DEVICE), uniform, top_p=0.55)
    assert tokens.tolist() == [4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(logprobs.cpu(), torch.full((6,), 1 / 6).log())
    logits = torch.tensor([[0.0, 2.0, 1.0]], device=DEVICE)
    tokens, logprobs = sample(logits, uniform[5:], top_p=1e-20)
    assert tokens.tolist() == [1] and logprobs.tolist() == [0.0]
    tokens, logprobs = sample(torch.zeros(1, 1, device=DEVICE), uniform[5:])  # a vocabulary of one
    assert tokens.tolist() == [0] and logprobs.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_of_equal_logits_is_the_likeliest(dtype):
    """
    At temperature 0: equals within 4,096 logits, which the kernel reads at once, across the border
    between two such blocks, and in three of them, the last of which is short.
    """
    torch.manual_seed(6)
    logits = torch.randn(5, 12295, device=DEVICE).to(dtype)
    ties = [[7, 4103], [4095, 4096], [10, 11], [4100, 8196, 12294], [0, 8192]]
    for row, places in enumerate(ties):
        logits[row, places] = 9.0
    tokens, logprobs = sample(logits, torch.rand(5, device=DEVICE), temperature=0)
    assert tokens.tolist() == [7, 4095, 10, 4100, 0]
    exact = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [dict(top_k=300), dict(top_k=500), dict(top_p=1 - 6e-8)],
                         ids=str)
def test_options_that_keep_everything(options):
    """
    top_k of the whole vocabulary or more, and a top_p that rounding alone sets apart from 1, on
    equal logits.
    """
    uniform = (torch.arange(5, device=DEVICE) + 0.4517) / 5
    for rows in (slice(None), slice(3, 4)):
        logits = torch.zeros(5, 300, device=DEVICE)[rows]
        tokens, logprobs = sample(logits, uniform[rows], **options)
        assert tokens.tolist() == [27, 87, 147, 207, 267][rows]
        expected = torch.full((5,), 1 / 300).log()[rows]
        torch.testing.assert_close(logprobs.cpu(), expected, atol=1e-5, rtol=0)


def test_same_uniform_same_token_in_any_batch():
    """Rows from flat to peaked: those that are sorted whole must not change the rest."""
    torch.manual_seed(4)
    logits = torch.linspace(0.5, 8, 8)[:, None] * torch.randn(8, 4999)
    logits, uniform = logits.to(DEVICE), torch.rand(8, device=DEVICE)
    tokens, logprobs = sample(logits, uniform, top_p=0.9)
    for row in range(8):
        alone, alone_logprobs = sample(logits[row:row + 1], uniform[row:row + 1], top_p=0.9)
        assert alone == tokens[row] and alone_logprobs == logprobs[row]


# -----------------------------------------------------------------------------
# top-k and top-p from the likeliest tokens alone

@pytest.fixture
def sorted_whole(monkeypatch):
    """A list to which each call of the definition adds how many rows it was given."""
    calls = []
    definition = keep_likeliest_reference

    def counting(logits, top_k, top_p):
        calls.append(len(logits))
        return definition(logits, top_k, top_p)

    monkeypatch.setattr(sampling, "keep_likeliest_reference", counting)
    return calls


def test_ties_at_the_edge_by_hand(sorted_whole):
    """
    One token of probability 0.4, four of 0.15 and thousands of next to none. top_p 0.65 needs two
    of the four, the last; top_k 2 keeps all four, which tie with the second.
    """
    logits = torch.full((1, 5000), -40.0, device=DEVICE)
    logits[0, 10] = torch.tensor(0.4).log()
    ties = [7, 2000, 3000, 4999]
    logits[0, ties] = torch.tensor(0.15).log()
    finite = lambda kept: kept[0].isfinite().nonzero().flatten().tolist()
    assert finite(keep_likeliest(logits, 0, 0.65)) == [10, 3000, 4999]
    assert finite(keep_likeliest(logits, 2, 1.0)) == [7, 10, 2000, 3000, 4999]
    assert finite(keep_likeliest(logits, 2, 0.65)) == [10, 3000, 4999]
    assert finite(keep_likeliest(logits, 1, 0.65)) == [10]
    assert finite(keep_likeliest(logits, 0, 1e-9)) == [10]
    assert sorted_whole == []


def test_more_ties_than_candidates_by_hand(sorted_whole):
    """4,000 equals: top_p 0.55 keeps the last 2,200 of them, top_k 3 all."""
    logits = torch.full((1, 5000), -40.0, device=DEVICE)
    logits[0, 500:4500] = 1.0
    kept = keep_likeliest(logits, 0, 0.55)
    assert kept[0].isfinite().nonzero().flatten().tolist() == list(range(2300, 4500))
    kept = keep_likeliest(logits, 3, 1.0)
    assert kept[0].isfinite().nonzero().flatten().tolist() == list(range(500, 4500))
    assert sorted_whole == [1, 1]


@pytest.mark.parametrize("top_k, top_p, unsettled", [(50, 1.0, 1), (0, 0.9, 3), (50, 0.9, 1),
                                                     (2000, 0.5, 1)], ids=str)
def test_candidates_keep_what_the_definition_keeps(top_k, top_p, unsettled, sorted_whole):
    """
    Rows flat, usual, peaked, rounded to a few values (so that most tokens tie), and banned but for
    three tokens. `unsettled` is how many of them the candidates cannot settle.
    """
    torch.manual_seed(7)
    logits = torch.randn(5, 6000, device=DEVICE)
    logits[0] *= 0.1
    logits[2] *= 6
    logits[3] = logits[3].round()
    logits[4, 3:] = -float("inf")
    kept = keep_likeliest(logits, top_k, top_p)
    assert torch.equal(kept, keep_likeliest_reference(logits, top_k, top_p))
    assert sorted_whole == [unsettled]


def test_options_are_checked():
    with pytest.raises(ValueError, match="0 < top_p <= 1"):
        sample(torch.zeros(1, 3), torch.zeros(1), top_p=0.0)
    with pytest.raises(ValueError, match=r"uniform \(B,\)"):
        sample(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("options", OPTIONS + [dict(temperature=0)], ids=str)
def test_logits_that_are_no_numbers(options):
    """No error, for which a GPU would have to be waited for: that row's log-probability says so."""
    torch.manual_seed(8)
    logits, uniform = torch.randn(3, 3000, device=DEVICE), torch.rand(3, device=DEVICE)
    logits[1, 200] = float("nan")
    tokens, logprobs = sample(logits, uniform, **options)
    expected, expected_logprobs = sample_reference(logits[::2], uniform[::2], **options)
    assert logprobs[1].isnan() and 0 <= tokens[1] < 3000
    assert torch.equal(tokens[::2], expected)
    torch.testing.assert_close(logprobs[::2], expected_logprobs, atol=2e-5, rtol=0)
