"""Episodes grouped by length: no row is lost, and what is computed stays the same."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ppo import make_agent, make_envs

from tokenmdp.agents import base
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.scoring import score_under
from tokenmdp.training.batches import by_length, length_groups, row_lengths, select_rows

SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=8)


def cost(groups, prompts, responses, forward_slots):
    return sum(len(group) * (prompts[group].max() + responses[group].max()) + forward_slots for group in groups)


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, forward_slots=st.integers(0, 200))
def test_the_groups_are_the_best_split_of_the_sorted_episodes(sizes, forward_slots):
    prompts, responses = np.array(sizes).T
    groups = length_groups(prompts, responses, forward_slots)
    assert sorted(itertools.chain(*(group.tolist() for group in groups))) == list(range(len(sizes)))
    order = np.argsort(prompts + responses, kind="stable")
    every_split = (
        np.split(order, cuts)
        for count in range(len(sizes))
        for cuts in itertools.combinations(range(1, len(sizes)), count)
    )
    least = min(cost(split, prompts, responses, forward_slots) for split in every_split)
    assert cost(groups, prompts, responses, forward_slots) == least
    assert len(length_groups(prompts, responses, math.inf)) == 1


def rollout_of(num_envs=24, **options):
    envs = make_envs(num_envs, prompts=["the plot", "a film that is", "very"])
    agent = make_agent(envs, num_minibatches=2, **options)
    agent.learn(1)
    return agent, collect(envs, agent.policy, agent.reference, agent.generator)[0]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}], ids=str)
def test_a_selection_scores_as_the_whole_and_groups_hold_every_row_once(options):
    agent, rollout = rollout_of(**options)
    lengths = row_lengths(rollout)
    assert lengths.max(0).tolist() == [rollout.prompt_slots, rollout.response_mask.shape[1]]
    whole = agent.policy.evaluate(
        rollout.input_ids, rollout.attention_mask, rollout.prompt_slots, rollout.support
    ).logprobs
    seen, widths = [], set()
    rows = torch.randperm(24)[:20]
    for members, part in by_length(rollout, rows, lengths, forward_slots=0):
        seen += members.tolist()
        widths.add(part.input_ids.shape[1])
        alone = agent.policy.evaluate(part.input_ids, part.attention_mask, part.prompt_slots, part.support).logprobs
        mask = part.response_mask
        torch.testing.assert_close(alone[mask], whole[members, : mask.shape[1]][mask], rtol=0, atol=1e-4)
        assert torch.equal(rollout.scores[members], part.scores)
    assert sorted(seen) == sorted(rows.tolist())
    assert len(widths) > 1
    torch.testing.assert_close(score_under(agent.policy, rollout, 7), whole * rollout.response_mask, rtol=0, atol=1e-4)


def test_an_empty_prompt_keeps_the_slot_before_the_response():
    _, rollout = rollout_of()
    empty = rollout._replace(attention_mask=rollout.attention_mask.clone())
    empty.attention_mask[0, : rollout.prompt_slots] = False
    ((_, part),) = by_length(empty, torch.tensor([0]), row_lengths(empty))
    assert part.prompt_slots == 1
    assert select_rows(empty, torch.tensor([0]), 1, 2).response_mask.shape == (1, 2)


def test_an_update_in_groups_equals_one_without(monkeypatch):
    histories, weights, forwards = [], [], []
    for forward_slots in (math.inf, 0):
        monkeypatch.setattr(base, "FORWARD_SLOTS", forward_slots)
        agent = make_agent(make_envs(24), num_minibatches=2, ent_coef=0.01, update_epochs=2)
        calls = []
        agent.policy.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        agent.learn(2)
        forwards.append(len(calls))
        histories.append(agent.history)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in agent.policy.parameters()]))
    for plain, grouped in zip(*histories, strict=True):
        timing = {"seconds", "tokens_per_second"}
        assert {key: value for key, value in grouped.items() if key not in timing} == pytest.approx(
            {key: value for key, value in plain.items() if key not in timing}, rel=1e-3, abs=1e-4
        )
    # Adam divides by the gradient's own size, so a gradient of nothing but rounding moves a weight visibly.
    start = torch.cat([parameter.detach().flatten() for parameter in make_agent(make_envs(24)).policy.parameters()])
    assert (weights[0] - weights[1]).norm() < 1e-2 * (weights[0] - start).norm()
    assert forwards[1] > forwards[0]
