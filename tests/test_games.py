"""Shapley and Owen values: their axioms, brute force over all permutations, exact against sampled."""

from itertools import groupby, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp.credit.games import (
    ExactPlan,
    SampledPlan,
    exact_evaluations,
    exact_plan,
    make_plan,
    sampled_evaluations,
    sampled_plan,
)

one_block = st.integers(1, 6).map(lambda n: torch.zeros(n, dtype=torch.long))
partitions = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(torch.tensor)
seeds = st.integers(0, 10_000)
unhurried = settings(deadline=None)  # the first example pays for imports


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_game(players, seed):
    """Any number for any coalition, nobody included."""
    table = torch.randn(2**players, generator=seeded(seed), dtype=torch.float64)
    return lambda keep: table[(keep.long() * 2 ** torch.arange(players)).sum(-1)]


def play(plan, game):
    return plan.estimate(game(plan.keep))


def averaged_over_orders(game, blocks):
    """The definition: what each player adds, averaged over the orders in which no block is interrupted."""
    total, count = torch.zeros(len(blocks), dtype=torch.float64), 0
    for order in permutations(range(len(blocks))):
        if len(list(groupby(order, key=lambda player: blocks[player].item()))) > len(blocks.unique()):
            continue
        keep = torch.zeros(1, len(blocks), dtype=torch.bool)
        for player in order:
            before = game(keep)
            keep[0, player] = True
            total[player] += (game(keep) - before).item()
        count += 1
    return total / count


@settings(unhurried, max_examples=25)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(torch.tensor), seeds)
def test_exact_values_are_the_average_over_all_orders(blocks, seed):
    game = random_game(len(blocks), seed)
    torch.testing.assert_close(play(exact_plan(blocks), game).values, averaged_over_orders(game, blocks))


@unhurried
@given(partitions, seeds)
def test_efficiency(blocks, seed):
    players, game = len(blocks), random_game(len(blocks), seed)
    everything = game(torch.ones(1, players, dtype=torch.bool)) - game(torch.zeros(1, players, dtype=torch.bool))
    for plan in (exact_plan(blocks), sampled_plan(blocks, 50, seeded(seed))):
        assert play(plan, game).values.sum().item() == pytest.approx(everything.item(), abs=1e-12)


@unhurried
@given(partitions, seeds)
def test_an_additive_game_gives_its_weights_without_error(blocks, seed):
    weights = torch.randn(len(blocks), generator=seeded(seed), dtype=torch.float64)
    for plan in (exact_plan(blocks), sampled_plan(blocks, 50, seeded(seed))):
        values, standard_error = play(plan, lambda keep: 3.0 + keep.double() @ weights)
        torch.testing.assert_close(values, weights)
        assert standard_error.max() < 1e-12


@unhurried
@given(st.integers(2, 6), seeds)
def test_dummy_and_symmetry(players, seed):
    """Player 0 adds .5 to any coalition; players 1 and 2 cannot be told apart."""
    table = torch.randn(2**players, generator=seeded(seed), dtype=torch.float64)

    def game(keep):
        others = keep[:, 1:].sort(-1).values  # only how many of them there are
        return 0.5 * keep[:, 0] + table[(others.long() * 2 ** torch.arange(players - 1)).sum(-1)]

    values = play(exact_plan(torch.zeros(players, dtype=torch.long)), game).values
    assert values[0].item() == pytest.approx(0.5)
    torch.testing.assert_close(values[1:], values[1].expand(players - 1))


@unhurried
@given(one_block, seeds)
def test_owen_values_are_shapley_values_where_blocks_say_nothing(together, seed):
    game = random_game(len(together), seed)
    single = torch.randperm(len(together), generator=seeded(seed))  # one block each, in any numbering
    torch.testing.assert_close(play(exact_plan(single), game).values, play(exact_plan(together), game).values)


@unhurried
@given(st.permutations(range(5)), seeds)
def test_the_numbering_of_blocks_cannot_matter(names, seed):
    blocks, game = torch.tensor([0, 0, 1, 2, 2]), random_game(5, seed)
    renamed = torch.tensor(names)[blocks] * 7
    torch.testing.assert_close(play(exact_plan(renamed), game).values, play(exact_plan(blocks), game).values)


def test_a_block_is_worth_what_it_is_worth_as_one_player():
    """Owen's quotient property: among themselves the blocks play Shapley's game."""
    blocks, game = torch.tensor([0, 0, 1, 2, 2, 2]), random_game(6, seed=3)
    values = play(exact_plan(blocks), game).values
    of_blocks = play(exact_plan(torch.arange(3)), lambda keep: game(keep[:, blocks])).values
    torch.testing.assert_close(torch.zeros(3, dtype=torch.float64).index_add(0, blocks, values), of_blocks)


@pytest.mark.parametrize("blocks", [torch.zeros(8, dtype=torch.long), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])])
def test_sampled_values_are_within_four_standard_errors(blocks):
    game = random_game(8, seed=1)
    exact = play(exact_plan(blocks), game).values
    values, standard_error = play(sampled_plan(blocks, 4000, seeded(0)), game)
    assert ((values - exact).abs() < 4 * standard_error).all()
    few = play(sampled_plan(blocks, 250, seeded(0)), game).standard_error
    assert 2 < (few / standard_error).mean() < 8  # sixteen times the budget: a quarter of the error


def test_the_standard_error_is_that_of_many_estimates():
    game, blocks = random_game(6, seed=2), torch.zeros(6, dtype=torch.long)
    estimates = [play(sampled_plan(blocks, 102, seeded(seed)), game) for seed in range(300)]
    spread = torch.stack([estimate.values for estimate in estimates]).std(0)
    reported = torch.stack([estimate.standard_error for estimate in estimates]).mean(0)
    assert (reported / spread).sub(1).abs().max() < 0.2


@unhurried
@given(partitions, st.integers(2, 200), seeds)
def test_the_budget_is_kept_and_no_coalition_is_evaluated_twice(blocks, budget, seed):
    players = len(blocks)
    if budget < min(exact_evaluations(blocks), sampled_evaluations(players)):
        with pytest.raises(ValueError, match=rf"budget is {budget} evaluations and {players} units need at least \d+"):
            make_plan(blocks, budget, seeded(seed))
        return
    plan = make_plan(blocks, budget, seeded(seed))
    assert len(plan.keep) <= budget
    assert len(plan.keep.unique(dim=0)) == len(plan.keep)
    if isinstance(plan, ExactPlan):
        assert len(plan.keep) == exact_evaluations(blocks)
    else:
        assert exact_evaluations(blocks) > budget


@unhurried
@given(partitions, seeds)
def test_sampled_orders_keep_blocks_together_and_come_with_their_reverse(blocks, seed):
    plan = sampled_plan(blocks, 60, seeded(seed))
    for order in plan.orders:
        assert len(list(groupby(blocks[order].tolist()))) == len(blocks.unique())
    half = len(plan.orders) // 2
    assert torch.equal(plan.orders[:half].flip(-1), plan.orders[half:])


def test_one_pair_is_the_least_and_has_an_error():
    blocks, game = torch.zeros(12, dtype=torch.long), random_game(12, seed=0)
    plan = sampled_plan(blocks, sampled_evaluations(12), seeded(0))
    assert isinstance(plan, SampledPlan)
    assert len(plan.keep) == 24
    assert torch.isfinite(play(plan, game).standard_error).all()
    with pytest.raises(ValueError, match="budget is 23; a permutation of 12 players and its reverse take 24"):
        sampled_plan(blocks, 23, seeded(0))
    alone = torch.zeros(1, dtype=torch.long)
    assert play(sampled_plan(alone, 2, seeded(0)), lambda keep: 3.0 * keep[:, 0]).values.tolist() == [3.0]
