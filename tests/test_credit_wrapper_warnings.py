"""When a credit wrapper warns: its token rewards are not read, or the attention that it follows is uninformative."""

import sys
import warnings

import numpy as np
import pytest
from doubles import SB3, ConstantAttention, HashRewardModel, play, wrapped, wrapped_vec

import tokenmdp.wrappers as single
from tokenmdp.wrappers import UninformativeAttention
from tokenmdp.wrappers.base import CreditWrapper


def unread_warnings(monkeypatch, read, episodes=40):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.setattr(CreditWrapper, "readers", set())
    dummy = pytest.importorskip("stable_baselines3.common.vec_env", reason=SB3).DummyVecEnv
    envs = dummy([lambda: wrapped("UniformReward")] * 2)
    if read:
        envs.env_method("set_wrapper_attr", "token_rewards_read", True)
        assert all(env.unwrapped.token_rewards_read for env in envs.envs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        envs.reset()
        for _ in range(episodes):
            envs.step(np.array([30, 30]))
    return [warning for warning in caught if issubclass(warning.category, single.UnreadTokenRewards)]


def test_stable_baselines3_that_reads_nothing_is_warned_once(monkeypatch):
    pytest.importorskip("stable_baselines3", reason=SB3)
    caught = unread_warnings(monkeypatch, read=False)
    assert len(caught) == 1
    assert "UniformReward changes nothing" in str(caught[0].message)
    assert "token_rewards_read = True" in str(caught[0].message)
    assert unread_warnings(monkeypatch, read=True) == []


def test_no_warning_where_stable_baselines3_is_not_in_use(monkeypatch):
    pytest.importorskip("stable_baselines3", reason=SB3)
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.delitem(sys.modules, "stable_baselines3")
    env = wrapped("UniformReward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            play(env, [30])


def play_rows(envs, count, tokens=(3, 4, 5, 6, 7)):
    """``count`` episodes per row of these tokens and end-of-text; returns the warnings about attention."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(count):
            envs.reset(seed=seed)
            for token in (*tokens, envs.unwrapped.eos_token_id):
                envs.step(np.full(envs.num_envs, token))
    return [warning for warning in caught if warning.category is UninformativeAttention]


def even_rows(max_new_tokens):
    """64 episodes at a time, whose reward model attends to everything alike."""
    return wrapped_vec(
        "AttentionCreditReward", num_envs=64, autoreset_mode="Disabled", max_new_tokens=max_new_tokens,
        reward_model=ConstantAttention(),
    )  # fmt: skip


@pytest.fixture
def forget(monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned_of_attention", set())


@pytest.mark.usefixtures("forget")
def test_nearly_uniform_attention_warns_once():
    envs = [
        wrapped_vec("AttentionCreditReward", num_envs=16, autoreset_mode="Disabled", reward_model=model())
        for model in (ConstantAttention, ConstantAttention, HashRewardModel)
    ]
    assert play_rows(envs[0], 3) == []  # 48 responses: too few to say
    (warning,) = play_rows(envs[0], 3)
    assert "entropy is 1.000 of the maximum over 64 responses" in str(warning.message)
    assert "ConstantAttention" in str(warning.message)
    assert "tokenmdp quality" in str(warning.message)
    assert play_rows(envs[1], 8) == []  # the same model under another wrapper
    assert play_rows(envs[2], 8) == []  # uneven rows


@pytest.mark.usefixtures("forget")
def test_responses_that_repeat_themselves_say_nothing_about_attention():
    envs = even_rows(max_new_tokens=24)
    assert play_rows(envs, 2, [13] * 12) == []
    assert play_rows(envs, 2, [13] * 18 + [14, 15, 16]) == []  # 5 different ones of 22
    assert len(play_rows(envs, 1, [13] * 8 + [14, 15, 16])) == 1


@pytest.mark.usefixtures("forget")
def test_long_responses_are_judged_by_a_number_of_distinct_tokens_not_a_share():
    envs = even_rows(max_new_tokens=96)
    assert play_rows(envs, 1, [13] * 64 + [*range(14, 27)]) == []  # 15 different ones of 78
    assert len(play_rows(envs, 1, [13] * 64 + [*range(14, 28)])) == 1


@pytest.mark.usefixtures("forget")
def test_short_responses_say_nothing_about_attention():
    envs = wrapped_vec(
        "AttentionCreditReward", num_envs=64, autoreset_mode="Disabled", reward_model=ConstantAttention()
    )
    envs.reset(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for token in (3, 4, envs.unwrapped.eos_token_id):
            envs.step(np.full(64, token))
