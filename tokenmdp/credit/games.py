"""What each player of a cooperative game is worth: Shapley and Owen values, exact or from sampled permutations.

A game of n players is a function ``v`` from coalitions, ``keep`` (M, n) bool, to numbers (M,). A plan says which
coalitions to evaluate, each once, and turns the answers into values, so that the evaluations of several games can share
one batch:

    plan = exact_plan(blocks)                     # or sampled_plan(blocks, budget, generator)
    estimate = plan.estimate(v(plan.keep))        # values (n,), standard_error (n,)

``blocks`` (n,) int64 numbers the block of each player. With one block for all, or one for each, the values are
Shapley's; otherwise they are Owen's, in which a player joins whole blocks and any part of its own.

Sources: Shapley, "A value for n-person games", 1953; Owen, "Values of games with a priori unions", 1977; Castro et al.,
"Polynomial calculation of the Shapley value based on sampling", 2009.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Estimate(NamedTuple):
    """The players' values; they sum to ``v(everybody) - v(nobody)``."""

    values: torch.Tensor  # (n,) float64
    standard_error: torch.Tensor  # (n,) float64, 0 where the values are exact


class ExactPlan(NamedTuple):
    """All coalitions that the values depend on."""

    keep: torch.Tensor  # (M, n) bool
    weights: torch.Tensor  # (n, M) float64

    def estimate(self, answers: torch.Tensor) -> Estimate:
        """``values[i] = sum_m weights[i, m] * answers[m]``."""
        values = self.weights @ answers.double()  # (n, M), (M,) -> (n,)
        return Estimate(values, torch.zeros_like(values))


class SampledPlan(NamedTuple):
    """The coalitions along K permutations, in pairs: k and k + K / 2 are each other's reverse."""

    keep: torch.Tensor  # (M, n) bool
    orders: torch.Tensor  # (K, n) int64: the s-th player to join
    chains: torch.Tensor  # (K, n + 1) int64: the row of keep after s players have joined

    def estimate(self, answers: torch.Tensor) -> Estimate:
        """The mean over permutations of what each player added when it joined.

        A pair is one sample of the standard error; of a single pair, its two permutations are, as if independent.
        """
        added = answers.double()[self.chains].diff(dim=-1)  # (K, n) in the order of joining
        added = torch.zeros_like(added).scatter(-1, self.orders, added)  # (K, n) by player
        samples = added.unflatten(0, (2, -1)).mean(0) if len(added) > 2 else added
        return Estimate(samples.mean(0), samples.std(0) / len(samples) ** 0.5)


Plan = ExactPlan | SampledPlan


def exact_evaluations(blocks: torch.Tensor) -> int:
    """How many coalitions an `exact_plan` evaluates: ``2**m + sum_b 2**(m - 1) * (2**size_b - 2)`` with m blocks.

    >>> exact_evaluations(torch.zeros(10, dtype=torch.long)), exact_evaluations(torch.arange(12) // 4)
    (1024, 176)
    """
    sizes = [int(size) for size in blocks.unique(return_counts=True)[1]]
    count = len(sizes)
    return 2**count + sum(2 ** (count - 1) * (2**size - 2) for size in sizes)


def sampled_evaluations(players: int, pairs: int = 1) -> int:
    """How many coalitions that many pairs of permutations contain at most.

    The empty and the full coalition are common to all; each permutation has ``players - 1`` coalitions between them.
    """
    return 2 + 2 * pairs * (players - 1)


def exact_plan(blocks: torch.Tensor) -> ExactPlan:
    """Every coalition of whole blocks outside a player's block and any part of its own.

    ``values[i] = sum_Q sum_S w(|Q|, m) * w(|S|, size_b) * (v(Q + S + i) - v(Q + S))`` over sets Q of the other m - 1
    blocks and subsets S of the rest of the player's block b, with ``w(s, n) = s! * (n - s - 1)! / n!``.

    >>> plan = exact_plan(torch.zeros(3, dtype=torch.long))
    >>> glove_game = lambda keep: ((keep[:, 0] | keep[:, 1]) & keep[:, 2]).double()     # two left gloves, one right
    >>> [round(value, 4) for value in plan.estimate(glove_game(plan.keep)).values.tolist()]
    [0.1667, 0.1667, 0.6667]
    """
    blocks = _numbered(blocks)
    num_blocks = int(blocks.max()) + 1
    keeps, weights = [], []
    for block in range(num_blocks):
        inside = blocks == block
        others = [index for index in range(num_blocks) if index != block]
        whole = torch.zeros(2 ** len(others), num_blocks, dtype=torch.bool)
        whole[:, others] = _subsets(len(others))
        outer = _joining_weight(whole.sum(-1), num_blocks)  # (Q,)
        part = _subsets(int(inside.sum()))  # (S, size)
        # A part with the player counts for what it added to the part without, one without for what is added to it.
        sizes = part.sum(-1, keepdim=True)
        inner = torch.where(part, _joining_weight(sizes - 1, part.shape[1]), -_joining_weight(sizes, part.shape[1]))
        keep = whole[:, None, blocks].repeat(1, len(part), 1)  # (Q, S, n)
        keep[:, :, inside] = part.expand(len(whole), -1, -1)
        weight = torch.zeros(*keep.shape, dtype=torch.float64)
        weight[:, :, inside] = outer[:, None, None] * inner
        keeps.append(keep.flatten(0, 1))
        weights.append(weight.flatten(0, 1))
    keep, row = torch.cat(keeps).unique(dim=0, return_inverse=True)
    total = torch.zeros(keep.shape, dtype=torch.float64).index_add(0, row, torch.cat(weights))
    return ExactPlan(keep, total.T.contiguous())


def sampled_plan(blocks: torch.Tensor, budget: int, generator: torch.Generator) -> SampledPlan:
    """As many permutations as ``budget`` evaluations allow, each keeping the players of a block together.

    Half are drawn and half are their reverses, whose errors partly cancel. Coalitions that several permutations meet
    are evaluated once, so fewer than ``budget`` may be spent.

    Raises:
        ValueError: the budget is too small for one pair.
    """
    players = len(blocks)
    needed = sampled_evaluations(players)
    if budget < needed:
        raise ValueError(f"budget is {budget}; a permutation of {players} players and its reverse take {needed}")
    pairs = (budget - 2) // (2 * (players - 1)) if players > 1 else 1  # one player has one order
    blocks = _numbered(blocks)
    block_places = torch.rand(pairs, int(blocks.max()) + 1, generator=generator).argsort(-1).argsort(-1)
    within = torch.rand(pairs, players, generator=generator, dtype=torch.float64)  # below 1, the step between blocks
    drawn = (block_places[:, blocks] + within).argsort(-1)  # (K / 2, n)
    orders = torch.cat([drawn, drawn.flip(-1)])
    keep = orders.argsort(-1)[:, None, :] < torch.arange(players + 1)[:, None]  # (K, n + 1, n)
    keep, row = keep.flatten(0, 1).unique(dim=0, return_inverse=True)
    return SampledPlan(keep, orders, row.view(len(orders), players + 1))


def make_plan(blocks: torch.Tensor, budget: int, generator: torch.Generator) -> Plan:
    """The exact plan if ``budget`` evaluations suffice for it, else a sampled one.

    >>> isinstance(make_plan(torch.zeros(10, dtype=torch.long), 1024, torch.Generator()), ExactPlan)
    True

    Raises:
        ValueError: the budget is too small for either; the message gives the smallest that suffices.
    """
    exact, sampled = exact_evaluations(blocks), sampled_evaluations(len(blocks))
    if budget < min(exact, sampled):
        raise ValueError(
            f"budget is {budget} evaluations and {len(blocks)} units need at least {min(exact, sampled)} "
            f"({exact} for exact values); raise budget or choose larger units"
        )
    return exact_plan(blocks) if exact <= budget else sampled_plan(blocks, budget, generator)


def _numbered(blocks: torch.Tensor) -> torch.Tensor:
    """Block numbers without gaps, 0 .. m - 1."""
    return blocks.unique(return_inverse=True)[1]


def _subsets(size: int) -> torch.Tensor:
    """All subsets of ``size`` things: (2**size, size) bool."""
    return (torch.arange(2**size)[:, None] >> torch.arange(size)) & 1 == 1


def _joining_weight(joined: torch.Tensor, players: int) -> torch.Tensor:
    """``joined! * (players - joined - 1)! / players!``: how often a given set of that size precedes a given player."""
    sizes = torch.arange(players, dtype=torch.float64)
    weights = (torch.lgamma(sizes + 1) + torch.lgamma(players - sizes) - math.lgamma(players + 1)).exp()
    return weights[joined.clamp(0, players - 1)]  # other sizes precede nobody: the caller leaves them out
