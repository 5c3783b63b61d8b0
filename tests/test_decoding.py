"""Decoding without waste against the plain path: same tokens, same numbers."""

import copy

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from tokenmdp.credit import make_credit
from tokenmdp.models.kv_cache import GrowingLayer
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.rollouts import collect
from tokenmdp.types import Rollout
from tokenmdp.wrappers import vector

TOY = "tokenmdp:TextGen-Toy-v0"
NEVER, ALWAYS = 2.0, 1e-9


def make_policy(kind, **options):
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
        return CausalLMPolicy(
            GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=30, eos_token_id=30, **shape)), 32, 30, **options
        )
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"num_hidden_layers": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    return CausalLMPolicy(LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=30, **shape)), 32, 30, **options)


def roll(kind, credit, share_ended, **options):
    envs = gym.make_vec(
        TOY, num_envs=24, autoreset_mode="Disabled", score_when="all_done",
        min_new_tokens=options.get("min_new_tokens", 0), prompts=["the plot", "a film that is", "very"],
    )  # fmt: skip
    policy, fed = make_policy(kind, **options), []
    append = policy.append
    policy.append = lambda state, token: fed.append(len(token)) or append(state, token)
    generator = torch.Generator().manual_seed(3)
    envs = vector.CreditReward(envs, make_credit(credit))
    rollout, metrics = collect(envs, policy, policy, generator, seed=5, share_ended=share_ended)
    return rollout, metrics, fed, torch.rand(1, generator=generator)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("credit", ["sparse", "abc-d"])
@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 2, "top_k": 6}], ids=str)
def test_rows_that_end_stop_costing_and_change_nothing_else(kind, credit, options):
    plain, metrics, every_row, next_number = roll(kind, credit, NEVER, **options)
    rollout, same_metrics, fed, same_number = roll(kind, credit, ALWAYS, **options)
    assert set(every_row) == {24}
    assert fed == [int(mask.sum()) for mask in plain.response_mask.T[1:]]  # row by row: who has a next token
    assert fed[-1] < fed[0]
    assert same_number == next_number  # the generator continues in the same state
    for name, expected, ours in zip(Rollout._fields, plain, rollout, strict=True):
        if name == "support" and ours is not None:
            expected, ours = (part[plain.response_mask] for part in (expected, ours))
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert same_metrics == pytest.approx(metrics, abs=1e-4)


def columns(length, rows, seed):
    return torch.randn(rows, 2, length, 3, generator=torch.Generator().manual_seed(seed))


CHANGES = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("drop first"), st.integers(0, 3)),
    st.tuples(st.just("crop"), st.integers(0, 3)),
    st.tuples(st.just("select"), st.integers(1, 3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(CHANGES, max_size=12))
def test_spare_columns_equal_concatenation(changes):
    ours, plain = GrowingLayer(), DynamicLayer()
    rows = 3
    with torch.no_grad():
        for seed, (change, count) in enumerate([("append", 5), *changes, ("append", 1), ("append", 1)]):
            for layer in (ours, plain):
                if change == "append":
                    layer.update(columns(count, rows, seed), columns(count, rows, -seed - 1))
                elif change == "drop first":
                    layer.keys, layer.values = layer.keys[:, :, count:], layer.values[:, :, count:]
                elif change == "crop" and count < plain.get_seq_length():
                    layer.crop(-count)
                elif change == "select":
                    layer.batch_select_indices(torch.arange(min(count, rows)))
                elif change == "repeat":
                    layer.batch_repeat_interleave(count)
            rows = plain.keys.shape[0]
            assert torch.equal(ours.keys, plain.keys)
            assert torch.equal(ours.values, plain.values)
            assert ours.get_seq_length() == plain.get_seq_length()


def test_copies_of_a_layer_do_not_write_over_each_other():
    with torch.no_grad():
        first = GrowingLayer()
        first.update(columns(3, 2, 0), columns(3, 2, 1))
        first.update(columns(1, 2, 2), columns(1, 2, 3))
        second = copy.copy(first)
        ours, _ = first.update(columns(1, 2, 4), columns(1, 2, 5))
        theirs, _ = second.update(columns(1, 2, 6), columns(1, 2, 7))
        before = ours.clone()
        first.crop(-1)
        first.update(columns(1, 2, 8), columns(1, 2, 9))
    assert torch.equal(ours[:, :, -1:], columns(1, 2, 4))
    assert torch.equal(theirs[:, :, -1:], columns(1, 2, 6))
    assert torch.equal(ours, before)


def test_columns_already_written_stay_where_they_are():
    layer, places = GrowingLayer(), set()
    with torch.no_grad():
        for seed in range(512):
            keys, _ = layer.update(columns(1, 2, seed), columns(1, 2, seed))
            places.add(keys.data_ptr())
    assert len(places) <= 10  # concatenation would move them 511 times


def test_gradients_flow_through_the_cache():
    layer = GrowingLayer()
    first, second = (columns(4, 2, seed).requires_grad_() for seed in (0, 1))
    layer.update(first, first)
    keys, values = layer.update(second, second)
    (keys * 2 + values).sum().backward()
    assert torch.equal(first.grad, torch.full_like(first, 3.0))
    assert torch.equal(second.grad, torch.full_like(second, 3.0))
