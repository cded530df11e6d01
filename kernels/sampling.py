"""
The next token of each row: temperature, top-k, top-p and the draw itself, with the log-probability
of the token drawn.

    w[v]   = exp((x[v] - max x) / temperature)       x = logits; w[v] = 0 outside top-k and top-p
    token  = the first v with w[0] + ... + w[v] > uniform * sum w        (the inverse of the CDF)
    logp   = log(w[token] / sum w)          under the very distribution that was sampled from

As in Hugging Face `generate`: top-k keeps every token that ties with the k-th; top-p, taken after
top-k, keeps the smallest set of the likeliest tokens with mass >= top_p, at least one, and among
tokens that tie at its edge the last ones.

One uniform a row decides the draw, so a seed reproduces it. torch.multinomial draws B*V
exponentials instead: 25 ms for 16 x 50,272 on two CPU cores. Here the running sums are taken in two
levels: block sums of the whole row, then running sums over the blocks and inside one block only
(1.2 ms). The Triton form reads the row twice. top_k=50 adds 3 ms; top_p=0.9 adds 9 ms where the
likeliest thousand tokens of a row settle it, and 4.5 ms more for each row so flat that it has to be
sorted whole.

Rounding: a float32 cumulative sum over 50,272 terms ends 1e-6 short of or beyond 1, so `first v
with cdf > uniform` can run off the end or stop on a token of no probability. Every search below
ends on a positive w. Inverse CDF: Devroye 1986, III.2.
"""

import numpy as np
import torch

from kernels import INTERPRETED, tl, triton


# -----------------------------------------------------------------------------
# the definition

def keep_top_k(logits, top_k):
    """logits (B, V) -> the same, with -inf below the k-th largest of each row."""
    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < kth, -float("inf"))


def keep_top_p(logits, top_p):
    """logits (B, V), top_p a number or (B, 1) -> the same, with -inf outside the set of top-p."""
    # ascending and stable, so that of the tokens which tie at the edge the last ones stay
    ascending, order = logits.sort(dim=-1, stable=True)
    dropped = ascending.double().softmax(-1).cumsum(-1) <= 1 - top_p
    dropped[:, -1] = False
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -float("inf"))


def keep_likeliest_reference(logits, top_k, top_p):
    """logits (B, V), divided by the temperature -> the same, with -inf outside top-k and top-p."""
    if top_k > 0:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return logits


def sample_reference(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    The definition, by sorts and full cumulative sums. logits (B, V), uniform (B,) -> tokens,
    logprobs (B,).
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, None])
        return tokens, logprobs.squeeze(-1)
    logits = keep_likeliest_reference(logits / temperature, top_k, top_p)
    cdf = logits.double().softmax(-1).cumsum(-1)
    # The target stays below cdf[-1], which need not be 1. So the search ends where the CDF rises,
    # that is on a possible token.
    target = torch.minimum(uniform.double() * cdf[:, -1], cdf[:, -1] * (1 - 1e-12))
    tokens = torch.searchsorted(cdf, target[:, None], right=True)
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens)
    return tokens.squeeze(-1), logprobs.squeeze(-1)


# -----------------------------------------------------------------------------
# top-k and top-p from the likeliest tokens alone

CANDIDATES = 1024  # tokens of each row among which top-p's edge is looked for
SPARE = 128  # tokens of each row beyond the k-th, because some may tie with it


def keep_likeliest(logits, top_k, top_p):
    """
    keep_likeliest_reference without a sort of the vocabulary, for top_k > 0 or top_p < 1.

    Only the likeliest tokens of each row are looked at. That settles the matter where the least
    likely of these are dropped, because the tokens left out are at most as likely. Other rows (a
    flat distribution under top-p, many ties) take the definition, which sorts the row. On a GPU
    the question whether there are such rows waits for the device, once.
    """
    count = top_k + SPARE if top_k > 0 else CANDIDATES
    if count >= logits.size(-1):
        return keep_likeliest_reference(logits, top_k, top_p)

    # The candidates, in the order of the vocabulary, because that order decides between ties.
    candidates, places = logits.topk(count)
    places, order = places.sort()
    candidates = candidates.gather(-1, order)

    # The first filter. Top-p's mass is measured within the candidates: top_p of the whole row is
    # top_p / share of them.
    if top_k > 0:
        kept = keep_top_k(candidates, top_k)
    else:
        log_share = candidates.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)
        kept = keep_top_p(candidates, top_p / log_share.double().exp())

    # Rows of which one of the least likely candidates is kept are not settled.
    least = candidates.amin(-1, keepdim=True)
    unsettled = ((kept == least) & kept.isfinite()).any(-1)

    # The second filter, after which the kept candidates go back to their places in the vocabulary.
    if top_k > 0 and top_p < 1:
        kept = keep_top_p(kept, top_p)
    result = torch.full_like(logits, -float("inf")).scatter_(-1, places, kept)
    rows = unsettled.nonzero().squeeze(-1)
    if len(rows) > 0:
        result[rows] = keep_likeliest_reference(logits[rows], top_k, top_p)
    return result


# -----------------------------------------------------------------------------
# the draw on a CPU

WIDTH = 256  # about the square root of a vocabulary: block sums and one block's sums cost the same


def _invert(weights, uniform):
    """
    weights (B, V) float32, uniform (B,) -> the first index of each row at which the running sum of
    its weights exceeds uniform * total, and that total: (B,) int64, (B,) float64.

    In two levels: running sums over blocks of WIDTH, then inside one block only.
    """
    B, V = weights.shape
    values = weights.numpy()

    # 1. The sum of each block, the last of which may be short or empty.
    whole = V // WIDTH
    sums = np.empty((B, whole + 1))  # float64
    blocks = weights[:, :whole * WIDTH].unflatten(1, (whole, WIDTH))
    sums[:, :whole] = blocks.sum(-1).numpy()
    sums[:, whole] = values[:, whole * WIDTH:].sum(1)

    # 2. The block in which the running sum passes the target, and what of the target is left there.
    running = sums.cumsum(1)
    total = running[:, -1]
    target = uniform.double().numpy() * total
    block = (running <= target[:, None]).sum(1)
    before = np.take_along_axis(running, np.maximum(block - 1, 0)[:, None], 1)[:, 0]
    target -= np.where(block > 0, before, 0.0)

    # 3. The running sum inside that block.
    index = block[:, None] * WIDTH + np.arange(WIDTH)
    inside = np.take_along_axis(values, np.minimum(index, V - 1), 1)
    inside[index >= V] = 0.0
    running = inside.cumsum(1, dtype=np.float64)
    # The target must stay below this sum, because step 1 rounded the block's sum in another way.
    target = np.minimum(target, running[:, -1] * (1 - 1e-12))
    tokens = block * WIDTH + (running <= target[:, None]).sum(1)
    return torch.from_numpy(tokens), torch.from_numpy(total)


def _sample_cpu(logits, uniform, temperature):
    """The plain draw -> tokens, logprobs (B,)."""
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    probs = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()
    tokens, total = _invert(probs, uniform)
    chosen = probs.gather(1, tokens[:, None]).squeeze(1)
    return tokens, (chosen / total).log().float()


# -----------------------------------------------------------------------------
# the draw in Triton: one program per row

if triton is not None:

    @triton.jit
    def _load(row_ptr, v, V, inv_temperature):
        x = tl.load(row_ptr + v, mask=v < V, other=-float("inf"))
        return x.to(tl.float32) * inv_temperature

    @triton.jit
    def _sample_kernel(logits_ptr, uniform_ptr, tokens_ptr, logp_ptr, stride_b, V, inv_temperature,
                       GREEDY: tl.constexpr, BLOCK_V: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        row_ptr = logits_ptr + b * stride_b

        # First reading: the largest logit, its first place, and the sum of the weights below it.
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
            # Second reading: the last block of positive mass that begins at or below the target.
            target = tl.load(uniform_ptr + b) * total
            running, before, first = 0.0, 0.0, 0
            for start in range(0, V, BLOCK_V):
                w = tl.exp(_load(row_ptr, start + tl.arange(0, BLOCK_V), V, inv_temperature) - peak)
                mass = tl.sum(w, axis=0)
                here = (mass > 0) & (running <= target)
                before = tl.where(here, running, before)
                first = tl.where(here, start, first)
                running += mass

            # And in that block the last such token.
            v = first + tl.arange(0, BLOCK_V)
            w = tl.exp(_load(row_ptr, v, V, inv_temperature) - peak)
            possible = (w > 0) & (tl.cumsum(w, axis=0) - w <= target - before)
            token = tl.max(tl.where(possible, v, 0), axis=0)
            weight = tl.sum(tl.where(v == token, w, 0.0), axis=0)
            tl.store(tokens_ptr + b, token.to(tl.int64))
            tl.store(logp_ptr + b, tl.log(weight / total))


def _sample_triton(logits, uniform, temperature):
    """The plain draw -> tokens, logprobs (B,)."""
    B, V = logits.shape
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B, dtype=torch.float32, device=logits.device)
    inv_temperature = 1.0 if temperature == 0 else 1.0 / temperature
    BLOCK_V = min(triton.next_power_of_2(V), 4096)
    _sample_kernel[(B,)](logits, uniform.float().contiguous(), tokens, logprobs, logits.stride(0),
                         V, inv_temperature, GREEDY=temperature == 0, BLOCK_V=BLOCK_V, num_warps=8)
    return tokens, logprobs


# -----------------------------------------------------------------------------
# what the engine calls

def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """
    One token a row, and its log-probability (nats) under the distribution it was drawn from.

    logits   (B, V) float32, bfloat16 or float16, last dimension contiguous (else it is copied);
             -inf bans a token
    uniform  (B,)   float32 in [0, 1), the row's only randomness: torch.rand(B, generator=...)
    temperature     0 takes the likeliest token (the first of equals), whatever top-k and top-p; its
                    log-probability is that at temperature 1
    top_k           0 or at least V: off;  top_p in (0, 1], 1: off
    returns  tokens (B,) int64, logprobs (B,) float32; detached; NaN where a row of logits has one,
             with any token

    CUDA tensors, and all under TRITON_INTERPRET=1, take the kernel. Nothing here waits for the GPU
    but top-k and top-p (keep_likeliest).
    """
    if logits.ndim != 2 or uniform.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (B, V) and uniform (B,), "
                         f"got {tuple(logits.shape)} and {tuple(uniform.shape)}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1, "
                         f"got {temperature}, {top_k}, {top_p}")
    logits = logits.detach()
    if top_k >= logits.size(-1):
        top_k = 0
    if temperature > 0 and (top_k > 0 or top_p < 1):
        logits = keep_likeliest(logits.float() / temperature, top_k, top_p)
        temperature = 1.0
    if triton is not None and (logits.is_cuda or INTERPRETED):
        return _sample_triton(logits, uniform, temperature)
    if logits.is_cuda:
        return sample_reference(logits, uniform, temperature)
    return _sample_cpu(logits, uniform, temperature)
