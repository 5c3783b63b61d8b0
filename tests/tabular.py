"""Exact optima of preference losses: every pair of responses with its probability, L-BFGS in float64."""

import torch

from tokenmdp.preference_losses import dpo_loss
from tokenmdp.testing import ToyMDP


def toy_mdp(seed=0, horizon=3):
    """15 responses of three tokens, one of which ends them."""
    return ToyMDP.random(vocab_size=3, horizon=horizon, eos_token_id=2, seed=seed)


def toy_reference(mdp, seed=1):
    """Sequence log-probabilities (M,) of a policy with random logits."""
    generator = torch.Generator().manual_seed(seed)
    return mdp.tabular_seq_logprobs(torch.randn(mdp.num_prefixes, 3, generator=generator, dtype=torch.float64))


def minimise(loss, start, tolerance=1e-12):
    """Where a smooth function of one tensor is least, up to its largest slope."""
    found = start.clone().requires_grad_()
    search = {"history_size": 50, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([found], max_iter=2000, tolerance_grad=tolerance, tolerance_change=0, **search)

    def closure():
        optimizer.zero_grad()
        value = loss(found)
        value.backward()
        return value

    optimizer.step(closure)
    return found.detach()


def ordered_pairs(count):
    """The rows of all pairs (i, j) with i != j, each in both orders: two tensors (count * (count - 1),)."""
    first, second = torch.cartesian_prod(torch.arange(count), torch.arange(count)).T
    return first[first != second], second[first != second]


def preferred(scores):
    """P(i preferred to j) by Bradley and Terry, for `ordered_pairs`."""
    first, second = ordered_pairs(len(scores))
    return (scores[first] - scores[second]).sigmoid()


def expected_dpo(policy, reference, chances, margin=None, **options):
    """The expectation of the shipped loss over pairs.

    Args:
        policy: (M,) sequence log-probabilities.
        reference: (M,).
        chances: (M (M - 1),) how often i is drawn beside j and preferred, for `ordered_pairs`.
        margin: (M (M - 1),).
        **options: of `dpo_loss`.
    """
    i, j = ordered_pairs(len(policy))
    margin = torch.zeros_like(chances) if margin is None else margin

    def one(chosen, rejected, ref_chosen, ref_rejected, margin):
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, margin=margin, **options)

    each = torch.vmap(one)(policy[i], policy[j], reference[i], reference[j], margin)
    return (chances * each).sum() / chances.sum()


def dpo_optimum(mdp, reference, chances, start=None, lengths=None, **options):
    """Token logits (num_prefixes, V) of the policy in which `expected_dpo` is least.

    Args:
        mdp: whose responses are compared.
        reference: (M,) sequence log-probabilities.
        chances: as in `expected_dpo`.
        start: logits; default 0.
        lengths: (M,) that log-probabilities are divided by.
        **options: of `expected_dpo`.
    """
    start = torch.zeros(mdp.num_prefixes, mdp.vocab_size, dtype=torch.float64) if start is None else start
    lengths = torch.ones_like(reference) if lengths is None else lengths

    def loss(logits):
        return expected_dpo(mdp.tabular_seq_logprobs(logits) / lengths, reference / lengths, chances, **options)

    return minimise(loss, start)
