"""
Generalised advantage estimation (Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438) over response tokens.

    delta[t]      = rewards[t] + gamma values[t + 1] - values[t]                  values past the response are 0
    advantages[t] = mask[t] (delta[t] + gamma lam advantages[t + 1])
    returns[t]    = mask[t] (advantages[t] + values[t])

The loop below is R steps of five small ops, some 10 us a step. But a[t] = b[t] + c[t] a[t + 1] is a linear
recurrence, and two of its steps make one: c[t] c[t + 1] and b[t] + c[t] b[t + 1]. So it is a scan: log2 R doubling
steps of whole (B, R) ops on a CPU, one associative scan a row in Triton, whose traffic is three reads and two writes
of (B, R).

Scans of linear recurrences: Blelloch 1990, "Prefix Sums and Their Applications", 1.4.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton build for this platform: PyTorch serves every call
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as @triton.jit does


def gae_reference(rewards, values, mask, gamma, lam):
    """The definition. All (B, R), right-padded, mask 1.0 on response tokens up to and including EOS."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # nothing follows the last token
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = mask[:, t] * (delta + gamma * lam * next_advantage)
        next_value = mask[:, t] * values[:, t]
    return advantages, mask * (advantages + values)


def _gae_doubling(rewards, values, mask, gamma, lam):
    """The CPU's form: after the step of size d, advantages[t] holds what t, ..., t + 2d - 1 contribute."""
    next_values = torch.nn.functional.pad((mask * values)[:, 1:], (0, 1))
    advantages = mask * (rewards + gamma * next_values - values)
    carry, d = gamma * lam * mask[:, :-1], 1  # carry[:, t]: the weight of advantages[:, t + d] in advantages[:, t]
    while d < rewards.size(1):
        advantages[:, :-d] += carry * advantages[:, d:]
        carry = carry[:, :-d] * carry[:, d:]
        d *= 2
    return advantages, mask * (advantages + values)


# -----------------------------------------------------------------------------
# Triton: one program per row b, the whole row in registers

if triton is not None:

    @triton.jit
    def _two_steps(carry_later, later, carry, here):
        return carry_later * carry, here + carry * later

    @triton.jit
    def _gae_kernel(rewards_ptr, values_ptr, mask_ptr, advantages_ptr, returns_ptr, R, gamma, lam,
                    BLOCK_R: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * R
        t = tl.arange(0, BLOCK_R)
        rewards = tl.load(rewards_ptr + row + t, mask=t < R, other=0.0)
        values = tl.load(values_ptr + row + t, mask=t < R, other=0.0)
        mask = tl.load(mask_ptr + row + t, mask=t < R, other=0.0)
        next_values = tl.load(values_ptr + row + t + 1, mask=t + 1 < R, other=0.0)
        next_mask = tl.load(mask_ptr + row + t + 1, mask=t + 1 < R, other=0.0)
        delta = mask * (rewards + gamma * next_mask * next_values - values)
        _, advantages = tl.associative_scan((gamma * lam * mask, delta), 0, _two_steps, reverse=True)
        tl.store(advantages_ptr + row + t, advantages, mask=t < R)
        tl.store(returns_ptr + row + t, mask * (advantages + values), mask=t < R)


# -----------------------------------------------------------------------------
# what stage 3 calls

@torch.no_grad()
def gae(rewards, values, mask, gamma, lam):
    """
    rewards, values  (B, R) float32, right-padded; values are the critic's before this update; all finite
    mask             (B, R) 1.0 on response tokens up to and including EOS, 0.0 after
    returns          advantages, value targets: both (B, R) float32, zero where mask is zero; detached
    """
    if rewards.ndim != 2 or values.shape != rewards.shape or mask.shape != rewards.shape:
        raise ValueError(f"expected rewards, values and mask (B, R), got {tuple(rewards.shape)}, "
                         f"{tuple(values.shape)}, {tuple(mask.shape)}")
    rewards, values, mask = rewards.float(), values.float(), mask.float()
    if triton is None or not (rewards.is_cuda or INTERPRETED):
        return _gae_doubling(rewards, values, mask, gamma, lam)
    rewards, values, mask = rewards.contiguous(), values.contiguous(), mask.contiguous()
    (B, R), advantages, returns = rewards.shape, torch.empty_like(rewards), torch.empty_like(rewards)
    _gae_kernel[(B,)](rewards, values, mask, advantages, returns, R, gamma, lam, BLOCK_R=triton.next_power_of_2(R))
    return advantages, returns
