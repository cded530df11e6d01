"""
PPO's clipped actor loss and its statistics, from log-probabilities, in one pass.

    ratio = exp(clamp(logprobs - old_logprobs, -20, 20))
    loss  = sum over mask of max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange))   Schulman et al. 2017, eq. 7
    dloss / dlogprobs = -A ratio where the first term is the larger and the clamp is idle, else 0

As PyTorch ops this is some fifteen launches forward and as many tensors of (B, R) kept for a backward of as many
more. The gradient needs nothing that the forward has not at hand, so the kernel writes it with the loss: one launch,
four reads and one write of (B, R), and a backward that is a multiplication.

Sums, not means: callers divide by the number of tokens of the whole batch over all micro-batches and ranks, so that
neither changes the loss. The bound of 20 keeps one broken token from making the step infinite (e^89
is inf in float32). PPO: https://arxiv.org/abs/1707.06347. approx_kl is (logprobs - old_logprobs)^2 / 2, Schulman's
k2, http://joschu.net/blog/kl-approx.html
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton build for this platform: PyTorch serves every call
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as @triton.jit does
BOUND = 20.0  # nats


def ppo_actor_loss_reference(logprobs, old_logprobs, advantages, mask, cliprange):
    """The definition. All (B, R) -> loss, clipped tokens, approximate KL: sums over the mask, 0-dim float32."""
    inside = mask > 0
    log_ratio = torch.where(inside, logprobs.float() - old_logprobs, 0.0).clamp(-BOUND, BOUND)
    advantages = torch.where(inside, advantages, 0.0)  # padding may hold anything, NaN too
    ratio = log_ratio.exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        is_clipped, approx_kl = (clipped > free).float().sum(), 0.5 * log_ratio.square().sum()
    return torch.maximum(free, clipped).sum(), is_clipped, approx_kl


# -----------------------------------------------------------------------------
# Triton: each program a block of tokens; its three sums are added up afterwards, in the same order every time

if triton is not None:

    @triton.jit
    def _ppo_loss_kernel(logp_ptr, old_logp_ptr, advantages_ptr, mask_ptr, dlogp_ptr, sums_ptr, M, cliprange,
                         BOUND: tl.constexpr, BLOCK_M: tl.constexpr):
        block = tl.program_id(0).to(tl.int64)
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = tl.load(mask_ptr + m, mask=m < M, other=0.0) > 0
        log_ratio = tl.load(logp_ptr + m, mask=inside, other=0.0).to(tl.float32)
        log_ratio -= tl.load(old_logp_ptr + m, mask=inside, other=0.0).to(tl.float32)
        advantage = tl.load(advantages_ptr + m, mask=inside, other=0.0).to(tl.float32)
        bounded = tl.minimum(tl.maximum(log_ratio, -BOUND), BOUND)
        ratio = tl.exp(bounded)
        free = -advantage * ratio
        clipped = -advantage * tl.minimum(tl.maximum(ratio, 1 - cliprange), 1 + cliprange)
        dlogp = tl.where((free >= clipped) & (bounded == log_ratio), free, 0.0)  # d ratio / d logp = ratio
        tl.store(dlogp_ptr + m, dlogp, mask=m < M)
        tl.store(sums_ptr + block * 3, tl.sum(tl.maximum(free, clipped), axis=0))
        tl.store(sums_ptr + block * 3 + 1, tl.sum((clipped > free).to(tl.float32), axis=0))
        tl.store(sums_ptr + block * 3 + 2, 0.5 * tl.sum(bounded * bounded, axis=0))


class _PPOActorLoss(torch.autograd.Function):

    @staticmethod
    def forward(ctx, logprobs, old_logprobs, advantages, mask, cliprange):
        M, BLOCK_M = logprobs.numel(), 1024
        blocks = triton.cdiv(M, BLOCK_M)
        dlogp = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
        sums = torch.empty(blocks, 3, dtype=torch.float32, device=logprobs.device)
        _ppo_loss_kernel[(blocks,)](logprobs.contiguous(), old_logprobs.contiguous(), advantages.contiguous(),
                                    mask.float().contiguous(), dlogp, sums, M, cliprange, BOUND=BOUND, BLOCK_M=BLOCK_M)
        ctx.save_for_backward(dlogp)
        ctx.dtype = logprobs.dtype
        loss, clipped, approx_kl = sums.sum(0).unbind()
        ctx.mark_non_differentiable(clipped, approx_kl)
        return loss, clipped, approx_kl

    @staticmethod
    def backward(ctx, dloss, _, __):
        return (ctx.saved_tensors[0] * dloss).to(ctx.dtype), None, None, None, None


# -----------------------------------------------------------------------------
# what stage 3 calls

def ppo_actor_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """
    logprobs      (B, R) float32, nats, of the response tokens under the actor; differentiable
    old_logprobs  (B, R) those of the policy that sampled; advantages (B, R), whitened by the caller; both get no grad
    mask          (B, R) 1.0 on response tokens; what stands elsewhere is never used
    returns       loss (with gradient), number of clipped tokens, approximate KL (nats): sums over the mask, 0-dim
                  float32; the last two detached
    """
    if not logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape:
        raise ValueError(f"expected four tensors of one shape, got {tuple(logprobs.shape)}, "
                         f"{tuple(old_logprobs.shape)}, {tuple(advantages.shape)}, {tuple(mask.shape)}")
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    if triton is None or not (logprobs.is_cuda or INTERPRETED):
        return ppo_actor_loss_reference(logprobs, old_logprobs, advantages, mask, cliprange)
    return _PPOActorLoss.apply(logprobs, old_logprobs, advantages, mask, cliprange)
