import pytest
import torch

from tokenmdp.credit import CREDIT_METHODS, make_credit
from tokenmdp.returns import explained_variance, full_return, gae, masked_mean, vine_advantages, whiten
from tokenmdp.testing import ToyMDP, action_values, toy_outcome, toy_resources


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 7, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([7, 1, 3, 5, 2, 7])
    return rewards, values, torch.arange(7) < lengths[:, None], lengths


def one_episode(rewards, values, gamma, gae_lambda):
    """Equation 16 as a double sum, without recursion or padding."""
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t in range(len(values))
    ]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_masked_gae_is_the_loop_over_unpadded_episodes(batch, gamma, gae_lambda):
    rewards, values, mask, lengths = batch
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for row, length in enumerate(lengths.tolist()):
        expected = torch.stack(one_episode(rewards[row, :length], values[row, :length], gamma, gae_lambda))
        torch.testing.assert_close(advantages[row, :length], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(returns[row, :length], expected + values[row, :length], rtol=0, atol=1e-12)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()


def test_lambda_1_gives_reward_to_go_minus_values_and_lambda_0_the_td_error(batch):
    rewards, values, mask, _ = batch
    rewards, values = rewards * mask, values * mask
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(advantages, to_go - values, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, to_go, rtol=0, atol=1e-12)
    following = torch.cat([values[:, 1:], torch.zeros(6, 1, dtype=values.dtype)], dim=1)
    torch.testing.assert_close(
        gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)[0], rewards + 0.9 * following - values
    )


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_what_the_padding_holds_cannot_matter(batch, garbage):
    rewards, values, mask, _ = batch
    clean = gae(rewards, values, mask)
    dirty = gae(torch.where(mask, rewards, garbage), torch.where(mask, values, garbage), mask)
    for ours, theirs in zip(clean, dirty, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(whiten(values, mask), whiten(torch.where(mask, values, garbage), mask))


def test_a_single_episode_needs_no_batch_axis(batch):
    rewards, values, mask, _ = batch
    for ours, theirs in zip(gae(rewards[2], values[2], mask[2]), gae(rewards, values, mask), strict=True):
        assert torch.equal(ours, theirs[2])


def test_the_exact_values_have_advantages_that_average_to_zero():
    mdp = ToyMDP.random(vocab_size=3, horizon=3, eos_token_id=0)
    logits = torch.randn(mdp.num_prefixes, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seq_logprobs = mdp.tabular_seq_logprobs(logits)
    last = mdp.mask & (mdp.mask.cumsum(-1) == mdp.mask.sum(-1, keepdim=True))
    rewards = mdp.scores[:, None] * last
    advantages, _ = gae(rewards, mdp.state_values(seq_logprobs, mdp.scores), mdp.mask, gae_lambda=0.7)
    expected = mdp.state_values(seq_logprobs, torch.ones_like(mdp.scores))  # 1 wherever a token is chosen
    assert torch.equal(expected.round(decimals=9), mdp.mask.double())
    for t in range(mdp.horizon):  # E[A_t | prefix] = 0
        conditional = mdp.state_values(seq_logprobs, advantages[:, t])[:, t]
        torch.testing.assert_close(conditional, torch.zeros_like(conditional), rtol=0, atol=1e-12)


def random_logits(mdp):
    return torch.randn(mdp.num_prefixes, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_full_return_is_one_number_an_episode_however_it_is_spread():
    mdp = ToyMDP.random(vocab_size=3, horizon=3, eos_token_id=0)
    values = torch.randn(mdp.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = [name for name in CREDIT_METHODS if name in ("sparse", "uniform", "attention", "abc-d", "abc-d2", "red")]
    assert len(exact) == 6
    for name in exact:
        rewards = make_credit(name)(toy_outcome(mdp), toy_resources(mdp)).token_rewards
        advantages, returns = full_return(rewards, values, mdp.mask)
        torch.testing.assert_close(returns, mdp.scores[:, None] * mdp.mask, rtol=0, atol=1e-12)
        torch.testing.assert_close(advantages, (mdp.scores[:, None] - values) * mdp.mask, rtol=0, atol=1e-12)


def test_the_full_return_ignores_the_padding_and_needs_no_batch_axis(batch):
    rewards, values, mask, _ = batch
    clean = full_return(rewards, values, mask)
    dirty = full_return(torch.where(mask, rewards, torch.nan), torch.where(mask, values, torch.inf), mask)
    for ours, theirs, whole in zip(full_return(rewards[2], values[2], mask[2]), dirty, clean, strict=True):
        assert torch.equal(theirs, whole)
        torch.testing.assert_close(ours, whole[2])
        assert not whole[~mask].any()


def test_vine_with_exact_values_gives_the_exact_advantages():
    mdp = ToyMDP.random(vocab_size=3, horizon=3, eos_token_id=0)
    logits = random_logits(mdp)
    prefix_values = mdp.state_values(mdp.tabular_seq_logprobs(logits), mdp.scores)
    advantages = vine_advantages(mdp.scores, prefix_values, mdp.mask)
    sparse = make_credit("sparse")(mdp.outcome(), toy_resources(mdp)).token_rewards
    expected = action_values(mdp, logits, sparse).advantage[mdp.prefixes(), mdp.tokens] * mdp.mask
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages.sum(-1), mdp.scores - prefix_values[:, 0], rtol=0, atol=1e-12)


def test_vine_advantages_telescope_whatever_the_values_are(batch):
    _, values, mask, _ = batch
    scores = torch.arange(6.0, dtype=torch.float64)
    advantages = vine_advantages(scores, torch.where(mask, values, torch.nan), mask)
    torch.testing.assert_close(advantages.sum(-1), scores - values[:, 0], rtol=0, atol=1e-12)
    assert not advantages[~mask].any()


@pytest.mark.parametrize("estimate", [gae, full_return])
def test_shapes_that_differ_are_refused(estimate):
    with pytest.raises(ValueError, match=r"rewards \(2, 3\), values \(2, 4\)"):
        estimate(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool))


def test_whitened_advantages_have_mean_0_and_standard_deviation_1_over_the_mask(batch):
    values, mask = batch[0] * 5 + 3, batch[2]
    whitened = whiten(values, mask)
    inside = whitened[mask]
    assert abs(inside.mean()) < 1e-12
    assert abs(inside.std(correction=0) - 1) < 1e-7  # dividing by the root of the standard deviation gives 2.2
    assert not whitened[~mask].any()
    assert torch.isfinite(whiten(torch.ones(3), torch.ones(3, dtype=torch.bool))).all()


def test_explained_variance_is_that_of_the_masked_entries(batch):
    returns, values, mask, _ = batch
    inside = mask.nonzero(as_tuple=True)
    expected = 1 - (returns - values)[inside].var() / returns[inside].var()
    assert torch.isclose(explained_variance(values, returns, mask), expected)
    assert explained_variance(values, torch.ones_like(returns), mask) == 0
    assert masked_mean(returns, torch.zeros_like(mask)) == 0
