"""
What bench/results/kl_estimators.md says of the shipped KL terms, exactly: on small distributions every token can be
summed over, and on a language of two tokens every answer, in float64. An estimator has the right mean (k1, k3) or not
(k2); its gradient, in the loss or in the reward, is the KL's or something else.
"""

import itertools

import pytest
import torch

from step3_ppo import kl_loss_k3, reinforce, shape_rewards

V = 6


def distributions(seed=0):
    """-> logits of pi, which require gradients, and log ref; (V,) float64"""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, dtype=torch.float64, generator=generator).requires_grad_()
    return logits, torch.randn(V, dtype=torch.float64, generator=generator).log_softmax(0)


def k1(logprobs, ref_logprobs):
    """The KL that shape_rewards takes off each of the V tokens, as V answers of one token."""
    ones = torch.ones(len(logprobs), 1, dtype=torch.float64)
    nothing = torch.zeros(len(logprobs), dtype=torch.float64)
    return -shape_rewards(nothing, logprobs[:, None], ref_logprobs[:, None], ones, 1.0)[:, 0]


def k2(logprobs, ref_logprobs):
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs, ref_logprobs):
    one = torch.ones(1, 1, dtype=torch.float64)
    return torch.stack([kl_loss_k3(p.view(1, 1), q.view(1, 1), one) for p, q in zip(logprobs, ref_logprobs)])


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


# -----------------------------------------------------------------------------
# as numbers

@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_have_the_kl_as_their_mean_and_k2_has_not(seed):
    logits, log_ref = distributions(seed)
    log_pi = logits.detach().log_softmax(0)
    exact = kl(log_pi, log_ref).item()
    mean = {k: (log_pi.exp() * k(log_pi, log_ref)).sum().item() for k in (k1, k2, k3)}
    assert mean[k1] == pytest.approx(exact, rel=1e-12) and mean[k3] == pytest.approx(exact, rel=1e-12)
    assert abs(mean[k2] - exact) > 0.01 * exact
    assert k1(log_pi, log_ref).min() < 0 <= k3(log_pi, log_ref).min()


def test_near_the_reference_k2_is_right_and_k3_quieter_than_k1():
    """Schulman's reason for them: at a distance e the bias of k2 is O(e^3), and k1's deviation O(e), k3's O(e^2)."""
    logits, log_ref = distributions()
    for e, bias, quieter in ((0.1, 0.1, 5), (0.01, 0.01, 50)):
        log_pi = (log_ref + e * logits.detach()).log_softmax(0)
        pi, exact = log_pi.exp(), kl(log_pi, log_ref)
        assert abs((pi * k2(log_pi, log_ref)).sum() / exact - 1) < bias
        deviation = [(pi * (k(log_pi, log_ref) - exact).square()).sum().sqrt() for k in (k1, k3)]
        assert deviation[0] > quieter * deviation[1]


def test_k3_the_wrong_way_round_is_another_number():
    """exp(d) - d - 1 with d = log pi - log ref has the mean chi^2(pi || ref) - KL(pi || ref)."""
    logits, log_ref = distributions()
    log_pi = logits.detach().log_softmax(0)
    mean = (log_pi.exp() * k3(log_ref, log_pi)).sum()  # the arguments exchanged
    chi_square = ((log_pi.exp() - log_ref.exp()).square() / log_ref.exp()).sum()
    torch.testing.assert_close(mean, chi_square - kl(log_pi, log_ref))
    assert abs(mean / kl(log_pi, log_ref) - 1) > 0.1


# -----------------------------------------------------------------------------
# as gradients of one token

@pytest.mark.parametrize("seed", range(3))
def test_in_the_loss(seed):
    """
    Tokens are drawn from pi, and the drawing has no gradient: k1 then teaches nothing in expectation, k2 has the
    gradient of KL(pi || ref), and k3 that of the other KL, KL(ref || pi).
    """
    logits, log_ref = distributions(seed)
    log_pi = logits.log_softmax(0)
    drawn = log_pi.detach().exp()
    exact = gradient(kl(log_pi, log_ref), logits)
    loss = {k: gradient((drawn * k(log_pi, log_ref)).sum(), logits) for k in (k1, k2, k3)}
    torch.testing.assert_close(loss[k1], torch.zeros_like(exact), atol=1e-14, rtol=0)
    torch.testing.assert_close(loss[k2], exact)
    torch.testing.assert_close(loss[k3], gradient(kl(log_ref, log_pi), logits))
    assert (loss[k3] - exact).norm() > 0.05 * exact.norm()


def test_in_the_loss_behind_the_ratio():
    """With pi / pi_old before it, differentiated too, every unbiased estimator has the KL's gradient, also off-policy."""
    logits, log_ref = distributions()
    log_pi, (_, log_old) = logits.log_softmax(0), distributions(seed=5)
    drawn = log_old.exp()  # tokens of an older policy
    exact = gradient(kl(log_pi, log_ref), logits)
    for k in (k1, k3):
        loss = (drawn * (log_pi - log_old).exp() * k(log_pi, log_ref)).sum()
        torch.testing.assert_close(gradient(loss, logits), exact)


@pytest.mark.parametrize("seed", range(3))
def test_in_the_reward(seed):
    """A reward has no gradient of its own, and weighs grad log pi: k1 is right there, and k2 and k3 are not."""
    logits, log_ref = distributions(seed)
    log_pi = logits.log_softmax(0)
    drawn = log_pi.detach().exp()
    exact = gradient(kl(log_pi, log_ref), logits)
    reward = {k: gradient((drawn * k(log_pi, log_ref).detach() * log_pi).sum(), logits) for k in (k1, k2, k3)}
    torch.testing.assert_close(reward[k1], exact)
    torch.testing.assert_close(reward[k3], exact - gradient(kl(log_ref, log_pi), logits))
    for k in (k2, k3):
        assert (reward[k] - exact).norm() > 0.05 * exact.norm()


def test_a_turned_sign_pays_for_drift():
    """A small step along what the reward +k1 asks for raises the KL; along the shipped reward it falls."""
    logits, log_ref = distributions()
    log_pi = logits.log_softmax(0)
    drawn = log_pi.detach().exp()
    ones, nothing = torch.ones(V, 1, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    for kl_coef, direction in ((0.1, -1), (-0.1, 1)):
        rewards = shape_rewards(nothing, log_pi.detach()[:, None], log_ref[:, None], ones, kl_coef)[:, 0]
        ascent = gradient((drawn * rewards * log_pi).sum(), logits)
        moved = kl((logits + 0.01 * ascent).log_softmax(0), log_ref) - kl(log_pi, log_ref)
        assert direction * moved > 0


# -----------------------------------------------------------------------------
# as gradients of whole answers

def language(seed=0):
    """
    Answers of two tokens out of three -> the logits of the first token and, after each first token, of the second
    (4, 3), the same of the reference, and the nine answers.
    """
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), ref_logits, list(itertools.product(range(3), repeat=2))


def token_logprobs(logits, answers):
    """-> (9, 2)"""
    log_p = logits.log_softmax(-1)
    return torch.stack([torch.stack([log_p[0, a], log_p[1 + a, b]]) for a, b in answers])


def test_the_reward_s_kl_has_the_gradient_of_the_whole_answers():
    """k1 on every token, and each token is weighed by the sum from it on: what shape_rewards and reinforce do."""
    logits, ref_logits, answers = language()
    logprobs, ref_logprobs = token_logprobs(logits, answers), token_logprobs(ref_logits, answers)
    probability = logprobs.sum(1).exp()
    exact = gradient((probability * (logprobs - ref_logprobs).sum(1)).sum(), logits)
    mask, scores = torch.ones(9, 2, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    to_go = reinforce(shape_rewards(scores, logprobs.detach(), ref_logprobs, mask, 1.0), mask, 1.0)
    ascent = gradient((probability.detach()[:, None] * to_go * logprobs).sum(), logits)
    torch.testing.assert_close(-ascent, exact)


def test_a_loss_per_token_forgets_what_the_first_token_does_to_the_second():
    """
    Even with the exact KL at every state (k2's gradient in expectation): right for the last token, and for the first
    one without that part of the gradient which leads to states of lower KL.
    """
    logits, ref_logits, answers = language()
    logprobs, ref_logprobs = token_logprobs(logits, answers), token_logprobs(ref_logits, answers)
    probability = logprobs.sum(1).exp()
    exact = gradient((probability * (logprobs - ref_logprobs).sum(1)).sum(), logits)
    per_token = gradient((probability.detach()[:, None] * k2(logprobs, ref_logprobs)).sum(), logits)
    torch.testing.assert_close(per_token[1:], exact[1:])
    forgotten = exact[0] - per_token[0]
    log_pi, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    later = torch.stack([kl(log_pi[1 + a], log_ref[1 + a]) for a in range(3)]).detach()
    torch.testing.assert_close(forgotten, gradient((log_pi[0].exp() * later).sum(), logits)[0])
    assert forgotten.norm() > 0.05 * exact[0].norm()
