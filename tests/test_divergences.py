import pytest
import torch

from tokenmdp.divergences import kl_k1, kl_k2, kl_k3
from tokenmdp.testing import ToyMDP, expectation, kl


@pytest.fixture
def pair():
    mdp = ToyMDP.random(vocab_size=3, horizon=3, eos_token_id=2)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, mdp.num_prefixes, 3, generator=generator, dtype=torch.float64)
    return [mdp.tabular_logprobs(rows) for rows in logits]


def test_k1_and_k3_of_sequences_are_unbiased_and_k2_is_not(pair):
    policy, reference = (logprobs.sum(-1) for logprobs in pair)
    exact = kl(policy, reference)
    assert exact > 0.1
    for estimator, unbiased in ((kl_k1, True), (kl_k3, True), (kl_k2, False)):
        assert torch.isclose(expectation(policy, estimator(policy, reference)), exact, rtol=1e-12) == unbiased


def test_token_terms_of_k1_sum_to_the_sequence_kl(pair):
    policy, reference = pair
    seq_logprobs = policy.sum(-1)
    assert torch.isclose(
        expectation(seq_logprobs, kl_k1(policy, reference).sum(-1)), kl(seq_logprobs, reference.sum(-1)), rtol=1e-12
    )


def test_k2_and_k3_are_never_negative_and_all_vanish_without_change(pair):
    policy, reference = pair
    assert (kl_k2(policy, reference) >= 0).all()
    assert (kl_k3(policy, reference) >= 0).all()
    assert (kl_k1(policy, reference) < 0).any()
    for estimator in (kl_k1, kl_k2, kl_k3):
        assert not estimator(policy, policy).any()
