"""kernels/ppo_loss.py against its definition and autograd. How to run: tests/kernel_checks.py."""
import pytest
import torch
from kernel_checks import DEVICE, assert_as_exact_as_pytorch, poisoned_empty  # noqa: F401

from kernels.ppo_loss import ppo_actor_loss, ppo_actor_loss_reference


def in_float64(logprobs, old_logprobs, advantages, mask, cliprange):
    """Token by token over the mask, by eq. 7."""
    keep = mask > 0
    log_ratio = (logprobs[keep] - old_logprobs[keep]).clamp(-20, 20)
    ratio, A = log_ratio.exp(), advantages[keep]
    objective = torch.minimum(ratio * A, ratio.clamp(1 - cliprange, 1 + cliprange) * A)
    clipped = ((ratio > 1 + cliprange) & (A > 0)) | ((ratio < 1 - cliprange) & (A < 0))
    return -objective.sum(), clipped.double().sum(), (log_ratio**2 / 2).sum().detach()


def value_and_grad(fn, logprobs, *args):
    logprobs = logprobs.detach().clone().requires_grad_(True)
    loss, clipped, approx_kl = fn(logprobs, *args)
    assert not clipped.requires_grad and not approx_kl.requires_grad
    (loss / 7).backward()  # callers divide by the number of tokens
    return loss.detach(), clipped, approx_kl, logprobs.grad


@pytest.mark.parametrize("B, R", [(1, 1), (3, 7), (4, 256), (5, 1000)])
def test_matches_definition(B, R, poisoned_empty):
    torch.manual_seed(0)
    old_logprobs = -3 * torch.rand(B, R, device=DEVICE)
    logprobs = old_logprobs + 0.3 * torch.randn(B, R, device=DEVICE)
    advantages = torch.randn(B, R + 3, device=DEVICE)[:, :R]
    mask = (torch.rand(B, R, device=DEVICE) < 0.8).float()
    mask[0, -1] = 1
    for t in (logprobs, old_logprobs, advantages):
        t[mask == 0] = float("nan")  # what stands in the padding must not matter
    args = (old_logprobs, advantages, mask, 0.2)
    exact = value_and_grad(in_float64, logprobs.double(), *(t.double() for t in args[:3]), 0.2)
    exact[3][mask == 0] = 0.0
    ours = value_and_grad(ppo_actor_loss, logprobs, *args)
    theirs = value_and_grad(ppo_actor_loss_reference, logprobs, *args)
    assert_as_exact_as_pytorch(["loss", "clipped", "approx_kl", "dlogprobs"], exact, ours, theirs, torch.float32)


def test_worked_by_hand():
    """ratio 2, cliprange 0.2. A > 0: clipped to -1.2 A, no gradient. A < 0: the pessimistic side, 2 |A|, is kept."""
    logprobs = torch.tensor([[2.0, 2.0, 0.5]], device=DEVICE).log()
    advantages = torch.tensor([[1.0, -1.0, -1.0]], device=DEVICE)
    ones = torch.ones_like(logprobs)
    loss, clipped, _, grad = value_and_grad(ppo_actor_loss, logprobs, torch.zeros_like(logprobs), advantages, ones, 0.2)
    torch.testing.assert_close(loss.cpu(), torch.tensor(-1.2 + 2.0 + 0.8))
    assert clipped.item() == 2
    torch.testing.assert_close(grad.cpu(), torch.tensor([[0.0, 2.0, 0.0]]) / 7)


def test_a_broken_token_stays_finite():
    logprobs = torch.tensor([[0.0, 0.0]], device=DEVICE)
    old_logprobs = torch.tensor([[-200.0, -0.1]], device=DEVICE)
    advantages = torch.tensor([[-1.0, 1.0]], device=DEVICE)
    mask = torch.ones_like(logprobs)
    loss, _, _, grad = value_and_grad(ppo_actor_loss, logprobs, old_logprobs, advantages, mask, 0.2)
    assert torch.isfinite(loss) and grad[0, 0] == 0 and grad[0, 1] < 0


def test_sums_add_up_over_micro_batches():
    torch.manual_seed(0)
    logprobs, old_logprobs, advantages = torch.randn(3, 6, 9, device=DEVICE)
    mask = (torch.rand(6, 9, device=DEVICE) < 0.5).float()
    whole = torch.stack(ppo_actor_loss(logprobs, old_logprobs, advantages, mask, 0.2))
    parts = sum(torch.stack(ppo_actor_loss(*(t[rows] for t in (logprobs, old_logprobs, advantages, mask)), 0.2))
                for rows in (slice(0, 2), slice(2, 6)))
    torch.testing.assert_close(whole, parts)


def test_rejects_other_shapes():
    with pytest.raises(ValueError, match="four tensors of one shape"):
        ppo_actor_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3), 0.2)
