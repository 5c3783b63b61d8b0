"""Which credit keeps the policy gradient, exactly: every expectation is a sum over all responses, in float64."""

import math

import pytest
import torch

from tokenmdp.credit import CREDIT_METHODS, conserve, make_credit
from tokenmdp.testing import (
    ToyMDP,
    action_values,
    agreement,
    expectation,
    policy_gradient,
    rewards_to_go,
    score_gradient,
    toy_outcome,
    toy_resources,
)

EXACT = ["sparse", "uniform", "attention", "abc-d", "abc-d2", "red"]  # float64 throughout: no further reward calls
BETAS = [0.0, 0.3, 0.8, 1.0]


@pytest.fixture(params=[None, 1], ids=["fixed length", "with end of text"])
def mdp(request):
    return ToyMDP.random(vocab_size=3, horizon=3, eos_token_id=request.param, seed=4)


def random_logits(mdp, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.num_prefixes, mdp.vocab_size, generator=generator, dtype=torch.float64)


def token_rewards(mdp, name, seed=0, **options):
    return make_credit(name, **options)(toy_outcome(mdp, seed=seed), toy_resources(mdp, seed)).token_rewards


def assert_exact(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", EXACT)
def test_with_the_full_return_every_conserving_method_has_the_true_gradient(mdp, name, beta):
    assert CREDIT_METHODS[name].conserves_return
    for seed in range(3):
        logits = random_logits(mdp, seed)
        rewards = token_rewards(mdp, name, seed, credit_beta=beta)
        torch.testing.assert_close(rewards.sum(-1), mdp.scores, rtol=1e-12, atol=1e-12)
        assert_exact(policy_gradient(mdp, logits, rewards, "full_return"), score_gradient(mdp, logits))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", [name for name in EXACT if CREDIT_METHODS[name].potential_based])
def test_with_the_reward_to_go_sparse_and_red_still_have_it(mdp, name, beta):
    for seed in range(3):
        logits = random_logits(mdp, seed)
        rewards = token_rewards(mdp, name, seed, credit_beta=beta)
        assert_exact(policy_gradient(mdp, logits, rewards), score_gradient(mdp, logits))


@pytest.mark.parametrize("name", [name for name in EXACT if not CREDIT_METHODS[name].potential_based])
def test_and_the_others_point_elsewhere(mdp, name):
    logits = random_logits(mdp)
    gradient = policy_gradient(mdp, logits, token_rewards(mdp, name, credit_beta=1.0))
    assert agreement(gradient, score_gradient(mdp, logits)).cosine < 0.999


@pytest.mark.parametrize("estimator", ["reward_to_go", "full_return"])
def test_the_gradient_is_the_expectation_of_score_functions(mdp, estimator):
    """The closed form against automatic differentiation of each response's log-probabilities."""
    logits = random_logits(mdp).requires_grad_()
    rewards = token_rewards(mdp, "attention")
    probabilities = mdp.tabular_seq_logprobs(logits).exp().detach()
    total = torch.zeros_like(logits)
    for row in range(len(mdp.tokens)):
        for t in range(int(mdp.mask[row].sum())):
            G = rewards[row, t:].sum() if estimator == "reward_to_go" else rewards[row].sum()
            (gradient,) = torch.autograd.grad(mdp.tabular_logprobs(logits)[row, t], logits)
            total += probabilities[row] * G * gradient
    assert_exact(policy_gradient(mdp, logits.detach(), rewards, estimator), total)


@pytest.mark.parametrize("seed", range(3))
def test_a_potential_lowers_values_by_itself_and_leaves_advantages(mdp, seed):
    """Q_shaped(s, a) = Q(s, a) - phi(s) and A_shaped = A, with phi(s) = credit_beta * (score so far - prompt's)."""
    logits, beta = random_logits(mdp, seed), 0.7
    plain = action_values(mdp, logits, token_rewards(mdp, "sparse"))
    shaped = action_values(mdp, logits, token_rewards(mdp, "red", seed, credit_beta=beta))
    states, actions = mdp.prefixes()[mdp.mask], mdp.tokens[mdp.mask]
    phi = torch.zeros(mdp.num_prefixes, dtype=torch.float64)
    phi[states] = beta * (mdp.prefix_scores[:, :-1][mdp.mask] - mdp.prefix_scores[0, 0])
    assert_exact(shaped.q[states, actions], (plain.q - phi[:, None])[states, actions])
    assert_exact(shaped.v, plain.v - phi)
    assert_exact(shaped.advantage[states, actions], plain.advantage[states, actions])
    assert plain.advantage[states, actions].abs().max() > 0.1
    other = action_values(mdp, logits, token_rewards(mdp, "uniform")).advantage  # and it is the potential that does it
    assert (other - plain.advantage)[states, actions].abs().max() > 0.1


def test_any_potential_is_invariant(mdp):
    logits = random_logits(mdp)
    phi = torch.randn(mdp.num_prefixes, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    before = torch.where(mdp.mask, phi[mdp.prefixes()], 0.0)
    after = torch.nn.functional.pad(before[:, 1:], (0, 1))  # 0 where the response has ended
    shaped = token_rewards(mdp, "sparse") + (after - before)
    assert_exact(policy_gradient(mdp, logits, shaped), score_gradient(mdp, logits))


def test_values_satisfy_bellman_and_the_tabular_gradient_theorem(mdp):
    """V(root) = E[score]; and grad = sum_s d(s) pi(a | s) A(s, a), from sparse rewards."""
    logits = random_logits(mdp)
    values = action_values(mdp, logits, token_rewards(mdp, "sparse"))
    seq_logprobs = mdp.tabular_seq_logprobs(logits)
    assert math.isclose(values.v[0], expectation(seq_logprobs, mdp.scores), rel_tol=1e-12)
    expected = mdp.state_values(seq_logprobs, mdp.scores)[mdp.mask]
    assert_exact(values.v[mdp.prefixes()[mdp.mask]], expected)
    visits = torch.zeros(mdp.num_prefixes, dtype=torch.float64)
    weights = seq_logprobs.exp()[:, None] * mdp.mask
    visits.index_add_(0, mdp.prefixes().flatten(), weights.flatten())
    theorem = visits[:, None] * logits.softmax(-1) * values.advantage
    torch.testing.assert_close(theorem, score_gradient(mdp, logits), rtol=0, atol=1e-12)


def test_exact_advantages_of_an_episode_sum_to_the_score_minus_the_first_value(mdp):
    """VinePPO's equation with exact values: sum_t A[t] = R - V(s[0])."""
    values = action_values(mdp, random_logits(mdp), token_rewards(mdp, "sparse"))
    taken = values.advantage[mdp.prefixes(), mdp.tokens] * mdp.mask
    assert_exact(taken.sum(-1), mdp.scores - values.v[0])


def test_the_bias_of_random_attention():
    """V=3, T=3, random scores and alpha, uniform policy: mean cosine of the reward-to-go gradient with the truth."""
    expected = {("sparse", 1.0): 1, ("red", 1.0): 1, ("uniform", 1.0): 0.932, ("attention", 0.8): 0.942}
    expected[("attention", 1.0)] = 0.894  # from 300 instances, see benchmarks/credit_bias.py
    cosines = {key: [] for key in expected}
    for seed in range(40):
        mdp = ToyMDP.random(seed=seed)
        logits = torch.zeros(mdp.num_prefixes, mdp.vocab_size, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        alpha = torch.empty(mdp.tokens.shape, dtype=torch.float64).exponential_(generator=generator)
        outcome = mdp.outcome(alpha / alpha.sum(-1, keepdim=True))
        for (name, beta), found in cosines.items():
            rewards = make_credit(name, credit_beta=beta)(outcome, toy_resources(mdp)).token_rewards
            found.append(agreement(policy_gradient(mdp, logits, rewards), score_gradient(mdp, logits)).cosine)
    for key, figure in expected.items():
        assert sum(cosines[key]) / 40 == pytest.approx(figure, abs=1e-12 if figure == 1 else 0.02), key


def test_settled_attributions_of_any_sign_keep_the_full_return(mdp):
    logits = random_logits(mdp)
    signed = torch.randn(mdp.mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rewards = conserve(signed, mdp.scores, mdp.mask, 0.6)
    assert_exact(policy_gradient(mdp, logits, rewards, "full_return"), score_gradient(mdp, logits))
    assert agreement(policy_gradient(mdp, logits, rewards), score_gradient(mdp, logits)).cosine < 0.999


def test_rewards_to_go_are_sums_of_what_follows():
    rewards = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([rewards[:, t:].sum(-1) for t in range(4)], dim=1)
    assert_exact(rewards_to_go(rewards), expected)


def test_bad_requests_are_named(mdp):
    with pytest.raises(ValueError, match="estimator is 'gae'; choose one of reward_to_go, full_return"):
        policy_gradient(mdp, random_logits(mdp), token_rewards(mdp, "sparse"), "gae")
    with pytest.raises(ValueError, match="all scores are the same"):
        agreement(torch.ones(3), torch.zeros(3))
    assert agreement(torch.zeros(3), torch.ones(3)) == (0.0, 0.0)
