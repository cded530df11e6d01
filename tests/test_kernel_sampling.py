"""kernels/sampling.py: the right set, the right frequencies, the right log-probability. Running: kernel_checks.py."""
import pytest
import torch
from kernel_checks import DEVICE, INTERPRETED, poisoned_empty  # noqa: F401

from kernels import sampling
from kernels.sampling import sample, sample_reference

LONG = pytest.mark.skipif(INTERPRETED, reason="5 seconds a case, interpreted; the options apart say the same")
OPTIONS = [dict(), dict(temperature=0.7), dict(temperature=2.5), dict(top_k=5), dict(top_p=0.8),
           dict(temperature=1.5, top_k=6, top_p=0.7)]


def exact_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """float64 probabilities (V,) of one row after the three options, token by token as Hugging Face describes them."""
    x = logits.double() / temperature
    if top_k:
        x[x < x.sort().values[-min(top_k, len(x))]] = -float("inf")
    probs = x.softmax(0)
    if top_p < 1:
        order = sorted(range(len(x)), key=lambda v: (-probs[v].item(), -v))  # likeliest first, of equals the last
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
@pytest.mark.parametrize("V", [11, 300])
def test_frequencies_and_support(V, options, poisoned_empty):
    """An even grid of uniforms must hit each token in proportion, to one count: stricter than chi-square, no luck."""
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


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.6, top_k=50), dict(top_p=0.9), dict(temperature=0),
                                     pytest.param(dict(temperature=1.5, top_k=3000, top_p=0.7), marks=LONG)], ids=str)
@pytest.mark.parametrize("V, dtype", [(4097, torch.bfloat16), (50272, torch.float32), (50272, torch.bfloat16),
                                      (151936, torch.float32)])
def test_large_vocabulary(V, options, dtype, poisoned_empty):
    """The token of the definition, at both ends of the CDF too, from rows of a wider view. bfloat16 logits tie."""
    torch.manual_seed(3)
    logits = (3 * torch.randn(3, V + 5, device=DEVICE)).to(dtype)[:, 2:V + 2]
    uniform = torch.tensor([0.0, 0.4321, 1 - 2**-24], device=DEVICE)
    tokens, logprobs = sample(logits, uniform, **options)
    expected, expected_logprobs = sample_reference(logits, uniform, **options)
    exact = sample_reference(logits.double(), uniform, **options)[1]
    if options.get("temperature") == 0:
        assert (tokens == logits.float().argmax(-1)).all()
    # float32 sums end a cumulative sum 1e-6 off, so within that of a border between two tokens either may come
    same = tokens == expected
    assert same[:2].all()
    assert ((tokens - expected).abs() <= 200)[~same].all() and torch.isfinite(logprobs).all()
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


def test_the_last_uniform_of_many_rows():
    """One block of weights, whose sum rounds one way as a whole and another way token by token."""
    torch.manual_seed(5)
    rows = 20 if INTERPRETED else 500
    logits = torch.randn(rows, 256, device=DEVICE)
    logits[:, 250:] = -float("inf")
    tokens, logprobs = sample(logits, torch.full((rows,), 1 - 2**-24, device=DEVICE))
    assert (tokens < 250).all() and torch.isfinite(logprobs).all()


def test_tied_logits_and_tiny_top_p():
    """Worked by hand: ten equals at top_p 0.55 keep the last six; a top_p near zero keeps the likeliest alone."""
    uniform = (torch.arange(6, device=DEVICE) + 0.5) / 6
    tokens, logprobs = sample(torch.zeros(6, 10, device=DEVICE), uniform, top_p=0.55)
    assert tokens.tolist() == [4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(logprobs.cpu(), torch.full((6,), 1 / 6).log())
    tokens, logprobs = sample(torch.tensor([[0.0, 2.0, 1.0]], device=DEVICE), uniform[5:], top_p=1e-20)
    assert tokens.tolist() == [1] and logprobs.tolist() == [0.0]
    tokens, logprobs = sample(torch.zeros(1, 1, device=DEVICE), uniform[5:])  # a vocabulary of one
    assert tokens.tolist() == [0] and logprobs.tolist() == [0.0]


@pytest.mark.parametrize("options", [dict(top_k=300), dict(top_k=500), dict(top_p=1 - 6e-8)], ids=str)
def test_options_that_keep_everything(options):
    """top_k of the whole vocabulary or more, and a top_p that rounding alone sets apart from 1, on equal logits."""
    uniform = (torch.arange(5, device=DEVICE) + 0.4517) / 5
    for rows in (slice(None), slice(3, 4)):
        tokens, logprobs = sample(torch.zeros(5, 300, device=DEVICE)[rows], uniform[rows], **options)
        assert tokens.tolist() == [27, 87, 147, 207, 267][rows]
        torch.testing.assert_close(logprobs.cpu(), torch.full((5,), 1 / 300).log()[rows], atol=1e-5, rtol=0)


def test_same_uniform_same_token_in_any_batch():
    torch.manual_seed(4)
    logits, uniform = torch.randn(8, 999, device=DEVICE), torch.rand(8, device=DEVICE)
    tokens, logprobs = sample(logits, uniform, top_p=0.9)
    alone, alone_logprobs = sample(logits[3:4], uniform[3:4], top_p=0.9)
    assert alone == tokens[3] and alone_logprobs == logprobs[3]


def test_rows_taken_in_turns(monkeypatch):
    """The CPU's form takes as many rows at a time as its scratch memory holds."""
    torch.manual_seed(6)
    logits, uniform = torch.randn(10, 500, device=DEVICE), torch.rand(10, device=DEVICE)
    whole = sample(logits, uniform, top_k=100, top_p=0.8)
    for numbers in (1700, 100):  # three rows; less than one
        monkeypatch.setattr(sampling, "SCRATCH", numbers)
        turns = sample(logits, uniform, top_k=100, top_p=0.8)
        assert torch.equal(whole[0], turns[0]) and torch.equal(whole[1], turns[1])


@pytest.mark.skipif(INTERPRETED, reason="of the CPU's form")
@pytest.mark.parametrize("options", [dict(top_k=50), dict(top_p=0.9), dict(top_k=3000, top_p=0.5)], ids=str)
@pytest.mark.parametrize("shift", [-20.0, 20.0])
def test_a_sample_that_misleads(shift, options):
    """The CPU's form finds the edges from one value in so many: those have none, or all, of the mass here."""
    torch.manual_seed(7)
    logits, uniform = torch.randn(4, 20000), torch.rand(4)
    logits[:, ::sampling.STRIDE] += shift
    tokens, logprobs = sample(logits, uniform, **options)
    expected, expected_logprobs = sample_reference(logits, uniform, **options)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=2e-5, rtol=0)


def test_options_are_checked():
    with pytest.raises(ValueError, match="0 < top_p <= 1"):
        sample(torch.zeros(1, 3), torch.zeros(1), top_p=0.0)
    with pytest.raises(ValueError, match=r"uniform \(B,\)"):
        sample(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("options", OPTIONS + [dict(temperature=0)], ids=str)
def test_logits_that_are_no_numbers(options):
    """Nothing here waits for a GPU to say so: the log-probability does, of that row alone."""
    torch.manual_seed(8)
    logits, uniform = torch.randn(3, 300, device=DEVICE), torch.rand(3, device=DEVICE)
    logits[1, 200] = float("nan")
    tokens, logprobs = sample(logits, uniform, **options)
    expected, expected_logprobs = sample_reference(logits[::2], uniform[::2], **options)
    assert logprobs[1].isnan() and 0 <= tokens[1] < 300
    assert torch.equal(tokens[::2], expected)
    torch.testing.assert_close(logprobs[::2], expected_logprobs, atol=2e-5, rtol=0)
