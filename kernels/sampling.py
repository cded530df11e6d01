"""
The next token of each row: temperature, top-k, top-p and the draw itself, with the log-probability of what was drawn.

    w[v]   = exp((x[v] - max x) / temperature)            x = logits; then w[v] = 0 outside the top-k, the top-p set
    token  = the first v with w[0] + ... + w[v] > uniform * sum w                          (the inverse of the CDF)
    logp   = log(w[token] / sum w)                        under the very distribution that was sampled from

As in Hugging Face `generate`: top-k keeps every token that ties with the k-th; top-p, taken after top-k, keeps the
smallest set of the likeliest tokens with mass >= top_p, at least one, and among tokens that tie at its edge the last
ones.

One uniform a row decides the draw, so a seed reproduces it. torch.multinomial draws B*V exponentials instead (16 x
50,272 on one CPU core: 13 ms) and top-p is usually had by sorting the vocabulary with its indices (53 ms). Here the
sums are taken in two levels: block sums of the whole row, then running sums over the blocks and inside one block only
(0.7 ms); top-p's edge is found from a sorted sample, and only its surroundings are sorted (2 ms more).
The Triton form reads the row twice; with top-k or top-p 16 times more, since it finds the edge's bit pattern two bits
at a time.

Rounding: a float32 cumulative sum over 50,272 terms ends 1e-6 short of or beyond 1, so `first v with cdf > uniform`
can run off the end or stop on a token of no probability. Every search below ends on a positive w. Inverse CDF:
Devroye 1986, III.2.
"""

import functools
import os

import numpy as np
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton build for this platform: PyTorch serves every call
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as @triton.jit does


def sample_reference(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """The definition, by sorts and full cumulative sums. logits (B, V), uniform (B,) -> tokens, logprobs (B,)."""
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
    logits = logits / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -float("inf"))
    if top_p < 1:
        ascending, order = logits.sort(dim=-1, stable=True)
        dropped = ascending.double().softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -float("inf"))
    cdf = logits.double().softmax(-1).cumsum(-1)
    # cdf[-1] and not 1, and strictly below it: the search then ends where the CDF rises, that is on a possible token
    target = torch.minimum(uniform.double() * cdf[:, -1], cdf[:, -1] * (1 - 1e-12))
    tokens = torch.searchsorted(cdf, target[:, None], right=True)
    return tokens.squeeze(-1), torch.log_softmax(logits, dim=-1).gather(-1, tokens).squeeze(-1)


# -----------------------------------------------------------------------------
# the CPU's form

SCRATCH = 2**20  # numbers in each of two temporaries at most; more rows are taken in turns
WIDTH = 256  # about the square root of a vocabulary: block sums and one block's sums then cost the same
STRIDE = 48  # one in so many probabilities is in the sample that tells where top-k and top-p end


def _invert(weights, uniform):
    """First index of each row where the running sum of weights (B, V) exceeds uniform * total; that total (B,)."""
    B, V = weights.shape
    values, rows, whole = weights.numpy(), np.arange(B), V // WIDTH * WIDTH
    sums = np.empty((B, V // WIDTH + 1))  # float64
    sums[:, :-1] = weights[:, :whole].unflatten(1, (V // WIDTH, WIDTH)).sum(-1).numpy()
    sums[:, -1] = values[:, whole:].sum(1)
    total = sums.cumsum(1, out=sums)[:, -1]
    target = np.minimum(uniform.double().numpy() * total, total * (1 - 1e-12))  # top-p's 1 - top_p may round to 1
    block = (sums <= target[:, None]).sum(1)
    target -= np.where(block > 0, sums[rows, block - 1], 0.0)
    index = block[:, None] * WIDTH + np.arange(WIDTH)
    inner = np.where(index < V, values[rows[:, None], np.minimum(index, V - 1)], 0.0).cumsum(1, dtype=np.float64)
    target = np.minimum(target, inner[:, -1] * (1 - 1e-12))  # the block's own sum, rounded otherwise than in sums
    return torch.from_numpy(block * WIDTH + (inner <= target[:, None]).sum(1)), torch.from_numpy(total)


def _keep_likeliest(probs, scratch, top_k, top_p):
    """
    Set the probabilities (B, V) outside top-k and top-p to zero, in place; afterwards they need not sum to one.

    Both end at one value of the sorted row, the edge. A sorted sample says between which bounds it must lie; what lies
    between them, about a thousand values, is all that is sorted. numpy sorts plain values by the CPU's vector
    instructions; torch.sort, with its indices, takes 7 to 30 times as long.
    """
    values, V = probs.numpy(), probs.size(1)
    sample = np.empty((len(values), -(-V // STRIDE) + 2), dtype=np.float32)
    sample[:, 0], sample[:, 1:-1], sample[:, -1] = 0.0, values[:, ::STRIDE], np.inf
    sample.sort(axis=1)
    if 0 < top_k < V:
        window, positions = _k_likeliest(values, scratch, sample, top_k)
        edge, sums = window[:, -top_k], _running_sums(window)
        target = (1 - top_p) * sums[:, -1]
    else:
        target = (1 - top_p) * probs.sum(1).double().numpy()
        window, positions, sums = _around_top_p(probs, scratch, sample, target)
    if top_p < 1:  # the edge is the first value, ascending, at which the sum exceeds the target
        place = np.minimum(_first_above(sums, target), window.shape[1] - 1)  # one stays, whatever the rounding
        edge = window[np.arange(len(window)), place]
        flat = values.ravel()
        for value, ascending, n, ids in zip(edge, window, place, positions):
            if n and ascending[n - 1] == value:  # equals before it, which are to go
                flat[ids[flat[ids] == value][:n - np.searchsorted(ascending, value)]] = 0.0
    for row, value in zip(probs, np.nextafter(edge, np.float32(0)).tolist()):  # F.threshold keeps only what is above
        F.threshold_(row, value, 0.0)  # by rows: masked_fill takes 10 to 20 times as long


def _sorted(values, mask):
    """
    The masked of values (B, V), sorted: (B, n), shorter rows after zeros. And where they are in values.ravel(),
    ascending: B arrays.
    """
    places = np.flatnonzero(mask)
    positions = np.split(places, np.searchsorted(places, values.shape[1] * np.arange(1, len(values))))
    window, flat = np.zeros((len(values), max(1, *map(len, positions))), dtype=values.dtype), values.ravel()
    for row, ids in zip(window, positions):
        row[:len(ids)] = flat[ids]
    window.sort(axis=1)
    return window, positions


def _running_sums(values):
    """Along each row of values (B, n): (B, n) float64. torch is quicker at it than numpy."""
    return torch.from_numpy(values).cumsum(1, dtype=torch.float64).numpy()


def _k_likeliest(values, scratch, sample, top_k):
    """As _sorted: the top_k largest of values (B, V) and what ties with the last of them."""
    places = top_k / STRIDE
    places = min(int(places + 4 * places**0.5 + 8), sample.shape[1])  # 4 standard deviations, and some
    mask = np.greater_equal(values, sample[:, [-places]], out=_masks(scratch)[0])
    window, positions = _sorted(values, mask)
    if window.shape[1] < top_k or not window[:, -top_k].all():  # an unlucky sample
        window, positions = _sorted(values, np.ones_like(mask))
    window[window < window[:, [-top_k]]] = 0.0
    return window, positions


def _first_above(sums, target):
    """The first place in each row of ascending sums (B, n) that exceeds target (B,), both float64; n if none does."""
    return torch.searchsorted(torch.from_numpy(sums), torch.from_numpy(target)[:, None], right=True)[:, 0].numpy()


def _masks(scratch):
    """Two boolean (B, V) in the memory of scratch (B, V) float32."""
    return scratch.numpy().view(bool).reshape(4, *scratch.shape)[:2]


def _around_top_p(probs, scratch, sample, target):
    """
    As _sorted: values of probabilities (B, V) within which their ascending sum exceeds target (B,). And the sums up
    to each of them, (B, n) float64.
    """
    values, rows, last = probs.numpy(), np.arange(len(probs)), sample.shape[1] - 1
    sums = _running_sums(sample[:, :-1])
    guess = sample[rows, np.minimum(_first_above(sums, target / STRIDE), last - 1)]
    place = (sample < guess[:, None]).sum(1)  # the first of equals
    # the sum below the guess: minima with it, less the guess for each value not below it
    minima = torch.clamp(probs, max=torch.from_numpy(guess)[:, None], out=scratch).sum(1).double().numpy()
    mask, spare = _masks(scratch)
    np.greater_equal(values, guess[:, None], out=mask)
    below = minima - guess * np.array([np.count_nonzero(row) for row in mask], dtype=np.float64)
    missed = (target - below) / (STRIDE * np.maximum(guess, 1e-30))  # by so many places of the sample
    missed = np.nan_to_num(missed)  # of a row that holds NaN
    missed += np.copysign(3 * np.abs(missed)**0.5 + 6, missed)  # 3 standard deviations, and some
    other = sample[rows, np.clip(place + missed, 0, last).astype(int)]
    beyond = (sample <= other[:, None]).sum(1)  # past all that equal the other bound
    other = np.where(missed > 0, sample[rows, np.minimum(beyond, last)], other)
    mask ^= np.greater_equal(values, other[:, None], out=spare)  # from the lower bound up to the higher
    window, positions = _sorted(values, mask)
    sums = _running_sums(window)
    start = below - np.where(other < guess, sums[:, -1], 0.0)
    sums += start[:, None]
    if ((start <= target) & ((target < sums[:, -1]) | (other == np.inf))).all():
        return window, positions, sums
    window, positions = _sorted(values, np.ones_like(mask))  # an unlucky sample
    return window, positions, _running_sums(window)


@functools.lru_cache(maxsize=1)
def _scratch(size):
    return np.empty((2, size), dtype=np.float32)  # numpy's: a tensor made in inference mode is of no use outside


def _sample_cpu(logits, uniform, temperature, top_k, top_p):
    """
    Its two large temporaries live in 8 MB that are never freed (one thread at a time, then). malloc may hand such sizes
    back to the system after every call: 786 page faults for each 16 x 50,272 numbers, 1 ms, twice the plain draw.
    """
    B, V = logits.shape
    rows = max(SCRATCH // V, 1)
    if B > rows:
        parts = [_sample_cpu(*part, temperature, top_k, top_p) for part in zip(logits.split(rows), uniform.split(rows))]
        return tuple(torch.cat(part) for part in zip(*parts))
    probs, scratch = (torch.from_numpy(part[:B * V]).view(B, V) for part in _scratch(max(SCRATCH, V)))
    if logits.dtype != torch.float32 or temperature not in (0, 1):
        logits = scratch.copy_(logits).div_(temperature or 1.0)
    torch.softmax(logits, -1, out=probs)
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()
    if 0 < top_k < V or top_p < 1:
        _keep_likeliest(probs, scratch, top_k, top_p)
    tokens, total = _invert(probs, uniform)
    return tokens, (probs.gather(1, tokens[:, None]).squeeze(1) / total).log().float()


# -----------------------------------------------------------------------------
# Triton: one program per row

if triton is not None:

    @triton.jit
    def _load(row_ptr, v, V, inv_temperature):
        return tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32) * inv_temperature

    @triton.jit
    def _key(x):
        """float32 -> int64 in [0, 2**32) in the same order: its bits, with the sign's half turned round."""
        bits = x.to(tl.int32, bitcast=True).to(tl.int64)
        return tl.where(bits >= 0, bits + 2147483648, -1 - bits)

    @triton.jit
    def _edge(row_ptr, V, inv_temperature, peak, floor, goal, BY_MASS: tl.constexpr, BLOCK_V: tl.constexpr):
        """The largest key such that the tokens from it up (none below `floor`) number, or weigh, `goal` at least."""
        edge = tl.full((), 0, tl.int64)
        for step in range(16):
            shift = 30 - 2 * step  # the next two bits of the key
            candidates = edge + (tl.arange(0, 4).to(tl.int64) << shift)
            reached = tl.zeros((4,), tl.float32)
            for start in range(0, V, BLOCK_V):
                v = start + tl.arange(0, BLOCK_V)
                x = _load(row_ptr, v, V, inv_temperature)
                key = _key(x)
                amount = tl.exp(x - peak) if BY_MASS else tl.full((BLOCK_V,), 1.0, tl.float32)
                amount = tl.where((v < V) & (key >= floor), amount, 0.0)
                reached += tl.sum(tl.where(key[None, :] >= candidates[:, None], amount[None, :], 0.0), axis=1)
            passed = tl.sum((reached >= goal).to(tl.int64), axis=0)  # they ascend: the first `passed`
            edge += tl.maximum(passed - 1, 0) << shift
        return tl.maximum(edge, floor)

    @triton.jit
    def _masses(row_ptr, V, inv_temperature, peak, edge, BLOCK_V: tl.constexpr):
        """Mass above the edge, the number of tokens on it, and the weight of one of these."""
        above, ties, weight = 0.0, 0, 0.0
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            x = _load(row_ptr, v, V, inv_temperature)
            key = _key(x)
            w = tl.exp(x - peak)
            on_edge = (v < V) & (key == edge)
            above += tl.sum(tl.where(key > edge, w, 0.0), axis=0)
            ties += tl.sum(on_edge.to(tl.int32), axis=0)
            weight = tl.maximum(weight, tl.max(tl.where(on_edge, w, 0.0), axis=0))
        return above, ties, weight

    @triton.jit
    def _kept(row_ptr, v, V, inv_temperature, peak, edge, ties_before, ties_dropped, FILTERED: tl.constexpr):
        """Weights of this block after top-k and top-p, and the number of tokens on the edge up to its end."""
        x = _load(row_ptr, v, V, inv_temperature)
        w = tl.exp(x - peak)
        ties = ties_before
        if FILTERED:
            key = _key(x)
            on_edge = ((v < V) & (key == edge)).to(tl.int32)
            rank = ties_before + tl.cumsum(on_edge, axis=0)  # from 1
            w = tl.where((key > edge) | ((on_edge == 1) & (rank > ties_dropped)), w, 0.0)
            ties = ties_before + tl.sum(on_edge, axis=0)
        return w, ties

    @triton.jit
    def _sample_kernel(logits_ptr, uniform_ptr, tokens_ptr, logp_ptr, stride_b, V, inv_temperature, top_k, top_p,
                       GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK_V: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        row_ptr = logits_ptr + b * stride_b
        peak, total, best = -float("inf"), 0.0, 0
        for start in range(0, V, BLOCK_V):
            x = _load(row_ptr, start + tl.arange(0, BLOCK_V), V, inv_temperature)
            block_peak = tl.max(x, axis=0)
            best = tl.where(block_peak > peak, start + tl.argmax(x, axis=0), best)
            new_peak = tl.maximum(tl.maximum(peak, block_peak), -3e38)  # -inf - -inf would be NaN
            total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), axis=0)
            peak = new_peak
        if GREEDY:
            tl.store(tokens_ptr + b, best.to(tl.int64))
            tl.store(logp_ptr + b, -tl.log(total))
        else:
            edge = tl.full((), -1, tl.int64)  # below every key
            ties_dropped = 0
            if TOP_K:
                edge = _edge(row_ptr, V, inv_temperature, peak, edge, top_k, False, BLOCK_V)
                above, ties, weight = _masses(row_ptr, V, inv_temperature, peak, edge, BLOCK_V)
                total = above + ties * weight
            if TOP_P:
                goal = top_p * total
                edge = _edge(row_ptr, V, inv_temperature, peak, edge, goal, True, BLOCK_V)
                above, ties, weight = _masses(row_ptr, V, inv_temperature, peak, edge, BLOCK_V)
                needed = tl.maximum(tl.ceil((goal - above) / tl.maximum(weight, 1e-38)), 1.0)
                kept = tl.minimum(needed, ties.to(tl.float32)).to(tl.int32)
                ties_dropped = ties - kept
                total = above + kept * weight

            # the last block of positive mass that begins at or below the target, and in it the last such token
            target = tl.load(uniform_ptr + b) * total
            running, before, ties, ties_before, first = 0.0, 0.0, 0, 0, 0
            for start in range(0, V, BLOCK_V):
                w, ties_after = _kept(row_ptr, start + tl.arange(0, BLOCK_V), V, inv_temperature, peak, edge, ties,
                                      ties_dropped, TOP_K or TOP_P)
                mass = tl.sum(w, axis=0)
                here = (mass > 0) & (running <= target)
                before = tl.where(here, running, before)
                ties_before = tl.where(here, ties, ties_before)
                first = tl.where(here, start, first)
                running += mass
                ties = ties_after
            v = first + tl.arange(0, BLOCK_V)
            w, _ = _kept(row_ptr, v, V, inv_temperature, peak, edge, ties_before, ties_dropped, TOP_K or TOP_P)
            possible = (w > 0) & (tl.cumsum(w, axis=0) - w <= target - before)
            token = tl.max(tl.where(possible, v, 0), axis=0)
            tl.store(tokens_ptr + b, token.to(tl.int64))
            tl.store(logp_ptr + b, tl.log(tl.sum(tl.where(v == token, w, 0.0), axis=0) / total))


# -----------------------------------------------------------------------------
# what the engine calls

def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    One token a row, and its log-probability (nats) under the distribution it was drawn from.

    logits   (B, V) float32, bfloat16 or float16, last dimension contiguous (else it is copied); -inf bans a token
    uniform  (B,)   float32 in [0, 1), the row's only randomness: torch.rand(B, generator=...)
    temperature     0 takes the likeliest token (the first of equals); its log-probability is that at temperature 1
    top_k           0 or at least V: off;  top_p in (0, 1], 1: off
    returns  tokens (B,) int64, logprobs (B,) float32; detached; NaN where a row of logits has one, with any token

    CUDA tensors, and all under TRITON_INTERPRET=1, take the kernel; nothing here waits for the GPU.
    """
    if logits.ndim != 2 or uniform.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (B, V) and uniform (B,), "
                         f"got {tuple(logits.shape)} and {tuple(uniform.shape)}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, "
                         f"got {temperature}, {top_k}, {top_p}")
    logits = logits.detach()
    if triton is None or not (logits.is_cuda or INTERPRETED):
        form = sample_reference if logits.is_cuda else _sample_cpu
        return form(logits, uniform, temperature, top_k, top_p)
    B, V = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B, dtype=torch.float32, device=logits.device)
    _sample_kernel[(B,)](logits, uniform.float().contiguous(), tokens, logprobs, logits.stride(0), V,
                         1.0 / (temperature or 1.0), top_k, top_p, GREEDY=temperature == 0, TOP_K=0 < top_k < V,
                         TOP_P=top_p < 1, BLOCK_V=min(triton.next_power_of_2(V), 4096), num_warps=8)
    return tokens, logprobs
