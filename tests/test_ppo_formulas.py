"""
step3_ppo.py's `gae` and `ppo_actor_loss` against closed forms, float64, autograd, and by hand.
"""
import pytest
import torch

from step3_ppo import gae, ppo_actor_loss

NAN = float("nan")


# -----------------------------------------------------------------------------
# generalised advantage estimation

def gae_as_a_sum(rewards, values, mask, gamma, lam):
    """
    One row, float64 lists -> advantages. A_t = sum over k of (gamma lam)^(k - t) delta_k, from t up
    to the first token outside the mask; delta_k = r_k + gamma V_(k+1) - V_k, and V is 0 outside.
    """
    R = len(rewards)
    inside_values = [m * v for m, v in zip(mask, values)] + [0.0]
    advantages = []
    for t in range(R):
        total = 0.0
        for k in range(t, R):
            if mask[k] == 0:
                break
            delta = rewards[k] + gamma * inside_values[k + 1] - values[k]
            total += (gamma * lam) ** (k - t) * delta
        advantages.append(total)
    return advantages


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("B, R", [(1, 1), (4, 2), (3, 7), (2, 64), (5, 100)])
def test_gae_is_a_double_sum(B, R, gamma, lam, holes):
    torch.manual_seed(0)
    rewards = torch.randn(B, R, dtype=torch.float64)
    values = torch.randn(B, R, dtype=torch.float64)
    lengths = torch.randint(1, R + 1, (B, 1))
    lengths[0] = R
    mask = (torch.arange(R) < lengths).double()
    if holes:
        mask *= torch.rand(B, R) < 0.7
    rows = zip(rewards.tolist(), values.tolist(), mask.tolist())
    expected = [gae_as_a_sum(*row, gamma, lam) for row in rows]
    expected = torch.tensor(expected, dtype=torch.float64)
    expected_returns = mask * (expected + values)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(returns, expected_returns, atol=1e-12, rtol=1e-12)
    # in float32, as the trainer calls it
    advantages, returns = gae(rewards.float(), values.float(), mask.float(), gamma, lam)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns.double(), expected_returns, atol=1e-5, rtol=1e-5)


def test_gae_by_hand():
    """gamma 1, lam 0.5, the score on the last of two tokens: 1 - 0.4, and 0.4 - 0.3 + 0.5 * 0.6."""
    rewards = torch.tensor([[0.0, 1.0, 9.0]])
    values = torch.tensor([[0.3, 0.4, 9.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[1.0, 1.0, 0.0]]), 1.0, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.4, 0.6, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.7, 1.0, 0.0]]))


def test_gae_is_detached_and_leaves_its_inputs_alone():
    rewards = torch.ones(1, 4)
    values = torch.ones(1, 4, requires_grad=True)
    advantages, returns = gae(rewards, values, torch.ones(1, 4), 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    assert (rewards == 1).all() and (values == 1).all()


# -----------------------------------------------------------------------------
# the actor's clipped loss

def loss_in_float64(logprobs, old_logprobs, advantages, mask, cliprange):
    """Token by token over the mask, by eq. 7 of Schulman et al. 2017; log-ratios bounded by 20."""
    inside = mask > 0
    log_ratio = (logprobs[inside].double() - old_logprobs[inside].double()).clamp(-20, 20)
    A = advantages[inside].double()
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * A, ratio.clamp(1 - cliprange, 1 + cliprange) * A)
    clipped = ((ratio > 1 + cliprange) & (A > 0)) | ((ratio < 1 - cliprange) & (A < 0))
    return -objective.sum(), clipped.sum(), (log_ratio**2 / 2).sum().detach()


def value_and_gradient(loss_function, logprobs, *arguments):
    logprobs = logprobs.detach().clone().requires_grad_(True)
    loss, clipped, approx_kl = loss_function(logprobs, *arguments)
    assert not clipped.requires_grad and not approx_kl.requires_grad
    (loss / 7).backward()  # callers divide by the number of tokens
    return loss.detach(), clipped, approx_kl, logprobs.grad


@pytest.mark.parametrize("B, R", [(1, 1), (3, 7), (4, 256), (5, 1000)])
def test_actor_loss_is_equation_7(B, R):
    torch.manual_seed(0)
    old_logprobs = -3 * torch.rand(B, R)
    logprobs = old_logprobs + 0.3 * torch.randn(B, R)
    advantages = torch.randn(B, R)
    mask = (torch.rand(B, R) < 0.8).float()
    mask[0, -1] = 1
    for padded in (logprobs, old_logprobs, advantages):
        padded[mask == 0] = NAN  # what stands in the padding must not matter
    arguments = (old_logprobs, advantages, mask, 0.2)
    exact = value_and_gradient(loss_in_float64, logprobs.double(), *arguments)
    ours = value_and_gradient(ppo_actor_loss, logprobs, *arguments)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=1e-6, rtol=1e-5)


def test_actor_loss_by_hand():
    """
    Ratio 2, cliprange 0.2. A > 0: clipped to -1.2 A, without gradient. A < 0: the pessimistic side,
    2 |A|, is kept. Ratio 0.5 and A < 0: clipped to 0.8 |A|.
    """
    logprobs = torch.tensor([[2.0, 2.0, 0.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, -1.0]])
    loss, clipped, approx_kl, gradient = value_and_gradient(
        ppo_actor_loss, logprobs, torch.zeros(1, 3), advantages, torch.ones(1, 3), 0.2)
    torch.testing.assert_close(loss, torch.tensor(-1.2 + 2.0 + 0.8))
    torch.testing.assert_close(approx_kl, 1.5 * torch.tensor(2.0).log().square())
    assert clipped.item() == 2
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 2.0, 0.0]]) / 7)


def test_a_broken_token_leaves_the_actor_loss_finite():
    old_logprobs = torch.tensor([[-200.0, -0.1]])
    advantages = torch.tensor([[-1.0, 1.0]])
    loss, _, _, gradient = value_and_gradient(
        ppo_actor_loss, torch.zeros(1, 2), old_logprobs, advantages, torch.ones(1, 2), 0.2)
    assert torch.isfinite(loss) and gradient[0, 0] == 0 and gradient[0, 1] < 0


def test_nan_in_the_padding_does_not_reach_the_actor_loss():
    mask = torch.tensor([[1.0, 0.0]])
    broken = torch.tensor([[-1.0, NAN]])
    loss, clipped, approx_kl, gradient = value_and_gradient(
        ppo_actor_loss, broken, broken, torch.tensor([[3.0, NAN]]), mask, 0.2)
    assert loss == -3 and clipped == 0 and approx_kl == 0
    torch.testing.assert_close(gradient, torch.tensor([[-3.0, 0.0]]) / 7)


def test_actor_loss_adds_up_over_micro_batches():
    torch.manual_seed(0)
    logprobs, old_logprobs, advantages = torch.randn(3, 6, 9)
    mask = (torch.rand(6, 9) < 0.5).float()
    batch = (logprobs, old_logprobs, advantages, mask)
    whole = torch.stack(ppo_actor_loss(*batch, 0.2))
    first = torch.stack(ppo_actor_loss(*(x[:2] for x in batch), 0.2))
    rest = torch.stack(ppo_actor_loss(*(x[2:] for x in batch), 0.2))
    torch.testing.assert_close(whole, first + rest)
