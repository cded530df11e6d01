"""kernels/gae.py against the loop. How to run: tests/kernel_checks.py."""
import pytest
import torch
from kernel_checks import DEVICE, assert_as_exact_as_pytorch, poisoned_empty  # noqa: F401

from kernels.gae import gae, gae_reference


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("B, R", [(1, 1), (4, 2), (3, 7), (2, 64), (5, 100), (2, 257)])
def test_matches_the_loop(B, R, gamma, lam, poisoned_empty):
    torch.manual_seed(0)
    rewards, values = torch.randn(2, B, R + 1, device=DEVICE)[..., :R]  # rows that are not R apart
    lengths = torch.randint(1, R + 1, (B, 1), device=DEVICE)
    lengths[0] = R
    mask = (torch.arange(R, device=DEVICE) < lengths).float()
    exact = gae_reference(rewards.double(), values.double(), mask.double(), gamma, lam)
    ours, theirs = gae(rewards, values, mask, gamma, lam), gae_reference(rewards, values, mask, gamma, lam)
    assert_as_exact_as_pytorch(["advantages", "returns"], exact, ours, theirs, torch.float32)
    assert (ours[0][mask == 0] == 0).all() and (ours[1][mask == 0] == 0).all()


def test_worked_by_hand():
    """gamma 1, lam 0.5, the score on the last of two tokens, then padding: 1 - 0.4, and 0.4 - 0.3 + 0.5 * 0.6."""
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]], device=DEVICE), torch.tensor([[0.3, 0.4, 9.0]], device=DEVICE)
    advantages, returns = gae(rewards, values, torch.tensor([[1.0, 1.0, 0.0]], device=DEVICE), 1.0, 0.5)
    torch.testing.assert_close(advantages.cpu(), torch.tensor([[0.4, 0.6, 0.0]]))
    torch.testing.assert_close(returns.cpu(), torch.tensor([[0.7, 1.0, 0.0]]))


def test_a_mask_with_a_hole_stops_the_recurrence():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 20, device=DEVICE)
    mask = (torch.rand(3, 20, device=DEVICE) < 0.7).float()
    torch.testing.assert_close(gae(rewards, values, mask, 0.99, 0.95), gae_reference(rewards, values, mask, 0.99, 0.95))


def test_detached_and_inputs_untouched():
    rewards, values = torch.ones(1, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE, requires_grad=True)
    advantages, returns = gae(rewards, values, torch.ones(1, 4, device=DEVICE), 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    assert (rewards == 1).all() and (values == 1).all()


def test_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"expected rewards, values and mask \(B, R\)"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3), 1.0, 0.95)
