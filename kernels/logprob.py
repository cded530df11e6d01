"""
Log-probability of each chosen token, from the logits or straight from the hidden states.

    x[n, v]       = (hidden[n] . weight[v] + bias[v]) / temperature          (or the logits, given)
    logp[n]       = x[n, target[n]] - logsumexp(x[n])
    entropy[n]    = logsumexp(x[n]) - sum_v softmax(x[n])[v] x[n, v]
    dx[n, v]      = dlogp[n] * ((v == target[n]) - softmax(x[n])[v])

PPO asks for this on every response token, for the actor (with gradient) and for the reference
model.

`token_logprobs`: log_softmax + gather writes N*V numbers to keep N of them. Here the forward reads
the logits once and saves one logsumexp per row, from which the backward rebuilds the softmax.

`linear_logprobs`: the logits need never stand in memory at all. Their sums are online, so the
head's matmul can go through the vocabulary a slice of columns at a time, and the backward
multiplies each slice out once more. At N = 1,024 tokens, V = 50,272, C = 768 in bf16, PyTorch's
form needs 10 bytes a logit at the backward's worst moment, 0.5 GB; here it is one slice, some 30
MB. The price is a fourth matmul on top of three, which on a CPU the slices earn back by staying in
its caches. Slices of columns and not of rows, because then a slice of weight.grad is finished by
one matmul over all rows, accumulated in float32 inside it, and no float32 copy of weight.grad (154
MB) is needed.

Online softmax: Milakov & Gimelshein 2018, Algorithm 3, https://arxiv.org/abs/1805.02867
The head's matmul inside the loss: Wijmans et al. 2024, "Cut Your Losses",
https://arxiv.org/abs/2411.09009
"""

import torch
import torch.nn.functional as F

from kernels import INTERPRETED, tl, triton

# logits in memory at a time: on a GPU 128 MB in bf16, on a CPU as many as its caches hold
SLICE = {"cuda": 2**26, "cpu": 2**21}


def token_logprobs_reference(logits, targets):
    """The definition. logits (N, V), targets (N,) int64 -> (N,) float32."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def linear_logprobs_reference(hidden, weight, targets, bias=None, temperature=1.0):
    """
    The definition. hidden (N, C), weight (V, C), targets (N,) -> logprobs (N,), entropy (N,), both
    float32.
    """
    logprobs = torch.log_softmax(F.linear(hidden, weight, bias).float() / temperature, dim=-1)
    entropy = torch.special.entr(logprobs.detach().exp()).sum(-1)  # entr(p) = -p log p, 0 at p = 0
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


# -----------------------------------------------------------------------------
# Triton: one program per row n. The row's running sums live in state (4, N) float32, so that a
# slice of the vocabulary that begins at column `first` goes on where the slice before it stopped:
#     0: max x    1: sum exp(x - max)    2: sum x exp(x - max)    3: the target's x

if triton is not None:

    @triton.jit
    def _load(row_ptr, v, V, inv_temperature):
        x = tl.load(row_ptr + v, mask=v < V, other=-float("inf"))
        return x.to(tl.float32) * inv_temperature

    @triton.jit
    def _logprob_fwd_kernel(logits_ptr, targets_ptr, state_ptr, stride_n, N, V, first,
                            inv_temperature, BLOCK_V: tl.constexpr):
        # int64, because n * stride_n passes 2**31 at 16k tokens of a 152k vocabulary
        n = tl.program_id(0).to(tl.int64)
        row_ptr = logits_ptr + n * stride_n
        running_max = tl.load(state_ptr + n)
        running_sum = tl.load(state_ptr + N + n)
        running_xsum = tl.load(state_ptr + 2 * N + n)

        # A block of columns at a time: rescale the sums under the old maximum, then add the block.
        for start in range(0, V, BLOCK_V):
            x = _load(row_ptr, start + tl.arange(0, BLOCK_V), V, inv_temperature)
            new_max = tl.maximum(running_max, tl.max(x, axis=0))
            new_max = tl.maximum(new_max, -3e38)  # -inf - -inf would be NaN
            rescale = tl.exp(running_max - new_max)
            e = tl.exp(x - new_max)
            running_sum = running_sum * rescale + tl.sum(e, axis=0)
            running_xsum = running_xsum * rescale + tl.sum(tl.where(e > 0, x, 0.0) * e, axis=0)
            running_max = new_max
        tl.store(state_ptr + n, running_max)
        tl.store(state_ptr + N + n, running_sum)
        tl.store(state_ptr + 2 * N + n, running_xsum)

        # The target's logit, where this slice has it.
        target = tl.load(targets_ptr + n) - first
        if (target >= 0) & (target < V):
            chosen = tl.load(row_ptr + target).to(tl.float32)
            tl.store(state_ptr + 3 * N + n, chosen * inv_temperature)

    @triton.jit
    def _logprob_bwd_kernel(dlogp_ptr, logits_ptr, targets_ptr, lse_ptr, dlogits_ptr, stride_n,
                            stride_dn, V, first, inv_temperature, BLOCK_V: tl.constexpr):
        n = tl.program_id(0).to(tl.int64)
        dlogp = tl.load(dlogp_ptr + n) * inv_temperature
        lse = tl.load(lse_ptr + n)
        target = tl.load(targets_ptr + n) - first
        for start in range(0, V, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            x = _load(logits_ptr + n * stride_n, v, V, inv_temperature)
            dx = dlogp * (tl.where(v == target, 1.0, 0.0) - tl.exp(x - lse))
            tl.store(dlogits_ptr + n * stride_dn + v, dx, mask=v < V)  # cast to the logits' dtype


def _launch_forward(state, logits, targets, first, temperature):
    N, V = logits.shape
    _logprob_fwd_kernel[(N,)](logits, targets, state, logits.stride(0), N, V, first,
                              1 / temperature, BLOCK_V=min(triton.next_power_of_2(V), 4096))


def _launch_backward(dlogp, logits, targets, lse, dlogits, first, temperature):
    N, V = logits.shape
    _logprob_bwd_kernel[(N,)](dlogp, logits, targets, lse, dlogits, logits.stride(0),
                              dlogits.stride(0), V, first, 1 / temperature,
                              BLOCK_V=min(triton.next_power_of_2(V), 4096))


# -----------------------------------------------------------------------------
# one slice of the vocabulary, on any device

def _fresh_state(N, device):
    state = torch.zeros(4, N, dtype=torch.float32, device=device)
    state[0] = -float("inf")
    return state


def _add_slice(state, logits, targets, first, temperature):
    """
    Take the columns [first, first + logits.size(1)) into the running sums; may overwrite float32
    logits.
    """
    if logits.is_cuda or INTERPRETED:
        _launch_forward(state, logits, targets, first, temperature)
        return
    running_max, running_sum, running_xsum, chosen = state
    x = logits.float().clamp_(min=-3e38)  # a banned token's -inf would make 0 * -inf below
    if temperature != 1.0:
        x /= temperature

    # the target's logit, where this slice has it
    target = targets - first
    here = (target >= 0) & (target < x.size(1))
    x_at_target = x.gather(1, target.clamp(0, x.size(1) - 1)[:, None]).squeeze(1)
    chosen.copy_(torch.where(here, x_at_target, chosen))

    # rescale the sums under the old maximum, then add the slice
    new_max = torch.maximum(running_max, x.amax(1))
    rescale = (running_max - new_max).exp_()
    e = (x - new_max[:, None]).exp_()
    running_sum.mul_(rescale).add_(e.sum(1))
    running_xsum.mul_(rescale).add_(torch.linalg.vecdot(e, x))
    running_max.copy_(new_max)


def _slice_gradient(dlogp, logits, targets, lse, first, temperature):
    """The gradient of those columns' logits, in their dtype; overwrites the logits."""
    if logits.is_cuda or INTERPRETED:
        _launch_backward(dlogp, logits, targets, lse, logits, first, temperature)
        return logits
    x = logits.float()
    if temperature != 1.0:
        x /= temperature
    dx = x.sub_(lse[:, None]).exp_().mul_(-dlogp[:, None] / temperature)
    target = targets - first
    here = (target >= 0) & (target < x.size(1))
    at_target = torch.where(here, dlogp / temperature, 0.0)
    dx.scatter_add_(1, target.clamp(0, x.size(1) - 1)[:, None], at_target[:, None])
    return dx.to(logits.dtype)


def _slices(hidden, weight, bias):
    """(columns, their logits) for one slice of the vocabulary after the other."""
    V = weight.size(0)
    columns_at_a_time = SLICE["cuda" if hidden.is_cuda else "cpu"] // max(hidden.size(0), 1)
    width = max(columns_at_a_time // 512, 1) * 512  # aligned, for the matmul
    for first in range(0, V, width):
        columns = slice(first, min(first + width, V))
        slice_bias = None if bias is None else bias[columns]
        yield columns, F.linear(hidden, weight[columns], slice_bias)


# -----------------------------------------------------------------------------
# forward and backward

class _TokenLogprobs(torch.autograd.Function):

    @staticmethod
    def forward(ctx, logits, targets):
        state = _fresh_state(logits.size(0), logits.device)
        _launch_forward(state, logits, targets, 0, 1.0)
        lse = state[0] + state[1].log()
        ctx.save_for_backward(logits, targets, lse)
        return state[3] - lse

    @staticmethod
    def backward(ctx, dlogp):
        logits, targets, lse = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        _launch_backward(dlogp.contiguous(), logits, targets, lse, dlogits, 0, 1.0)
        return dlogits, None


class _LinearLogprobs(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature):
        state = _fresh_state(hidden.size(0), hidden.device)
        for columns, logits in _slices(hidden, weight, bias):
            _add_slice(state, logits, targets, columns.start, temperature)
        lse = state[0] + state[1].log()
        ctx.save_for_backward(hidden, weight, targets, bias, lse)
        ctx.temperature = temperature
        entropy = lse - state[2] / state[1]
        ctx.mark_non_differentiable(entropy)
        return state[3] - lse, entropy

    @staticmethod
    def backward(ctx, dlogp, _):
        hidden, weight, targets, bias, lse = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        dlogp = dlogp.contiguous()
        dhidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = torch.empty_like(bias) if needs_bias else None
        for columns, logits in _slices(hidden, weight, bias):
            dlogits = _slice_gradient(dlogp, logits, targets, lse, columns.start, ctx.temperature)
            if needs_hidden:
                dhidden += dlogits @ weight[columns]
            if needs_weight:
                torch.mm(dlogits.T, hidden, out=dweight[columns])
            if needs_bias:
                dbias[columns] = dlogits.sum(0, dtype=torch.float32)
        if needs_hidden:
            dhidden = dhidden.to(hidden.dtype)
        return dhidden, dweight, None, dbias, None


# -----------------------------------------------------------------------------
# what the stages call

def token_logprobs(logits, targets):
    """
    Log-probability (nats) that `logits` give to `targets`. Differentiable in `logits`.

    logits   (N, V) float32, bfloat16 or float16, last dimension contiguous (else it is copied)
    targets  (N,)   int64 in [0, V); callers drop padding before the call, there is no ignore index
    returns  (N,)   float32

    CUDA tensors go to Triton, all others to `token_logprobs_reference`. TRITON_INTERPRET=1 sends
    CPU tensors through the kernel too, which is how the tests run it without a GPU.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"expected logits (N, V) and targets (N,), "
                         f"got {tuple(logits.shape)} and {tuple(targets.shape)}")
    if triton is None or not (logits.is_cuda or INTERPRETED):
        return token_logprobs_reference(logits, targets)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return _TokenLogprobs.apply(logits, targets.contiguous())


def linear_logprobs(hidden, weight, targets, bias=None, temperature=1.0):
    """
    Log-probability (nats) of `targets` under softmax((hidden @ weight.T + bias) / temperature),
    without the (N, V) logits in memory, forward or backward. Differentiable in hidden, weight and
    bias.

    hidden   (N, C) float32, bfloat16 or float16: the last norm's output at the positions that
             predict `targets`
    weight   (V, C) the head (or tied embedding), of hidden's dtype; bias (V,) likewise, or None
    targets  (N,)   int64 in [0, V)
    returns  logprobs (N,) float32, entropy (N,) float32 (detached: for logging)

    Every device takes the sliced form; on a GPU the sums and the gradient of a slice are Triton
    kernels.
    """
    matrices = hidden.ndim == 2 and weight.ndim == 2 and hidden.size(1) == weight.size(1)
    if not matrices or targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected hidden (N, C), weight (V, C) and targets (N,), got "
                         f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        raise ValueError(f"hidden is {hidden.dtype} and the head {weight.dtype}: "
                         f"cast one, weight.to(hidden.dtype) say")
    if triton is None and hidden.is_cuda:
        return linear_logprobs_reference(hidden, weight, targets, bias, temperature)
    return _LinearLogprobs.apply(hidden, weight, targets.contiguous(), bias, temperature)
