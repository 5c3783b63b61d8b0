"""What credit wrappers refuse, and what they promise to the tools around them: specs, copies, chains, conformance."""

import copy
import pickle
import warnings

import gymnasium as gym
import gymnasium.utils.env_checker
import numpy as np
import pytest
import torch
from doubles import (
    SB3,
    TOY,
    HashRewardModel,
    ScoreOnly,
    each_wrapper,
    play,
    same,
    wrapped,
    wrapped_vec,
)
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics

import tokenmdp.wrappers as single
from tokenmdp.credit import AttentionCredit, SparseCredit, make_credit
from tokenmdp.types import Credit
from tokenmdp.wrappers import find_credit_wrapper, vector
from tokenmdp.wrappers.base import CreditWrapper


@pytest.mark.parametrize("build", [wrapped, wrapped_vec])
def test_two_credit_wrappers_are_refused(build):
    module = single if build is wrapped else vector
    with pytest.raises(ValueError, match="SparseReward on top of UniformReward"):
        module.SparseReward(build("UniformReward"))
    stats = RecordEpisodeStatistics if build is wrapped else VectorRecordEpisodeStatistics
    with pytest.raises(ValueError, match="AttentionCreditReward on top of UniformReward"):
        module.AttentionCreditReward(stats(build("UniformReward")))


@pytest.mark.parametrize("name", ["CreditReward", "AttentionCreditReward", "OnlinePrefixReward"])
def test_the_wrapper_of_the_other_form_is_named(name):
    options = {"credit": "sparse"} if name == "CreditReward" else {}
    with pytest.raises(TypeError, match=rf"wraps a single environment.*use tokenmdp\.wrappers\.vector\.{name}$"):
        getattr(single, name)(gym.make_vec(TOY, num_envs=2), **options)
    with pytest.raises(TypeError, match=rf"wraps a vector environment.*use tokenmdp\.wrappers\.{name}$"):
        getattr(vector, name)(gym.make(TOY), **options)
    with pytest.raises(TypeError, match=r"wraps a single environment.*: wrap each single environment inside it$"):
        getattr(single, name)(SyncVectorEnv([lambda: gym.make(TOY)] * 2), **options)


@pytest.mark.parametrize("build", [wrapped, wrapped_vec])
def test_attention_credit_refuses_a_reward_model_without_attention(build):
    with pytest.raises(ValueError, match=r"does not provide attention.*UniformReward or SparseReward"):
        build("AttentionCreditReward", reward_model=ScoreOnly())
    build("UniformReward", reward_model=ScoreOnly())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"credit_beta": 1.5}, "credit_beta is 1.5"), ({"attention_floor": 0.0}, "attention_floor is 0.0")],
)
def test_bad_arguments(arguments, message):
    for build in (wrapped, wrapped_vec):
        with pytest.raises(ValueError, match=message):
            build("AttentionCreditReward", arguments)


def test_other_environments_are_refused():
    with pytest.raises(TypeError, match="CartPoleEnv has no `outcome`"):
        single.SparseReward(gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match=r"SyncVectorEnv has no `outcome`.*wrap each single environment"):
        vector.SparseReward(SyncVectorEnv([lambda: gym.make(TOY)]))


class Broken:
    """Returns whatever it was made with."""

    name, conserves_return, needs = "broken", True, frozenset()

    def __init__(self, token_rewards):
        self.token_rewards = token_rewards

    def __call__(self, outcome, resources):
        return Credit(self.token_rewards, {})


@pytest.mark.parametrize(("token_rewards", "message"), [
    (torch.full((1, 8), torch.nan), r"broken credit of the text with token ids \[.*\] is \[nan, .*look for NaN"),
    (torch.zeros(1, 5), r"broken credit returned token_rewards of shape \(1, 5\); .* shape \(1, 8\)"),
])  # fmt: skip
def test_credit_that_no_learner_could_use_is_refused(token_rewards, message):
    env = single.CreditReward(gym.make(TOY), Broken(token_rewards))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(env.unwrapped.eos_token_id)


def test_make_credit_knows_its_names():
    assert make_credit("attention", credit_beta=0.3) == AttentionCredit(0.3)
    with pytest.raises(ValueError, match="credit is 'dense'; choose one of sparse, uniform, position, attention"):
        make_credit("dense")


@pytest.mark.parametrize("build", [wrapped, wrapped_vec])
def test_credit_reward_takes_a_name_and_its_spec_keeps_it(build):
    module, base = (single, gym.make(TOY)) if build is wrapped else (vector, gym.make_vec(TOY, num_envs=2))
    bound = module.CreditReward(base, "red", credit_beta=0.5)
    assert bound.credit == make_credit("red", credit_beta=0.5)
    if build is wrapped:
        again = gym.make(EnvSpec.from_json(bound.spec.to_json()))
        assert again.credit == bound.credit
        assert same(play(again, [20, 4, 30], seed=1), play(bound, [20, 4, 30], seed=1))
    with pytest.raises(ValueError, match="has its options already; credit_beta can be given with a name only"):
        module.CreditReward(base, SparseCredit(), credit_beta=0.5)
    with pytest.raises(TypeError, match=r"credit is \{'credit_beta': 0\.5\}; pass the name of a method"):
        module.CreditReward(base, {"credit_beta": 0.5})


@each_wrapper
def test_specs_rebuild_the_wrapped_env_also_through_json(name, kwargs):
    env = wrapped(name, kwargs)
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        other = gym.make(spec)
        assert type(other) is type(env)
        assert other.credit == env.credit
        assert same(play(other, [20, 4, 30], seed=1), play(env, [20, 4, 30], seed=1))


def test_rebuilding_a_spec_never_copies_the_reward_model():
    model = HashRewardModel()
    env = wrapped("AttentionCreditReward", reward_model=model)
    assert gym.make(env.spec).unwrapped.task.reward_model is model
    assert copy.deepcopy(env).unwrapped.task.reward_model is model


@each_wrapper
def test_a_copy_in_mid_episode_continues_identically(name, kwargs):
    env, envs = wrapped(name, kwargs), wrapped_vec(name, kwargs)
    env.reset(seed=0)
    envs.reset(seed=0)
    env.step(4)
    envs.step(np.arange(4))
    for clone in (copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))):
        other, others = clone(env), clone(envs)
        assert same(other.step(30), clone(env).step(30))
        actions = np.array([30, 1, 30, 2])
        assert same(others.step(actions), clone(envs).step(actions))


def test_the_wrapper_is_found_in_any_chain():
    env = wrapped("UniformReward")
    assert find_credit_wrapper(RecordEpisodeStatistics(env)) is env
    assert find_credit_wrapper(gym.make(TOY)) is None
    envs = wrapped_vec("UniformReward")
    assert find_credit_wrapper(VectorRecordEpisodeStatistics(envs)) is envs
    assert find_credit_wrapper(gym.make_vec(TOY)) is None


def test_vector_wrappers_forward_the_autoreset_mode():
    for mode in AutoresetMode:
        assert wrapped_vec("SparseReward", autoreset_mode=mode.value).autoreset_mode is mode


def test_both_modules_offer_the_same_wrappers_with_the_same_arguments():
    names = [name for name in vector.__all__ if name.endswith("Reward")]
    assert names == ["AttentionCreditReward", "CreditReward", "OnlinePrefixReward", "SparseReward", "UniformReward"]
    for name in names:
        one, other = getattr(single, name), getattr(vector, name)
        assert one.__init__.__defaults__ == other.__init__.__defaults__
        assert one.__doc__.splitlines()[0] == other.__doc__.splitlines()[0]


@each_wrapper
def test_stable_baselines3_conformance_without_a_warning(name, kwargs, monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    check_env = pytest.importorskip("stable_baselines3.common.env_checker", reason=SB3).check_env
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in ({}, {"max_new_tokens": 1}, {"horizon_range": (2, 5)}, {"eos_token_id": 0}):
            check_env(wrapped(name, kwargs, **arguments))


def test_stable_baselines3_makes_the_env_by_name_without_a_warning():
    make_vec_env = pytest.importorskip("stable_baselines3.common.env_util", reason=SB3).make_vec_env
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = make_vec_env(TOY, n_envs=2, wrapper_class=single.UniformReward)
        envs.seed(0)
        envs.reset()
        envs.step(np.array([20, 20]))
        *_, dones, infos = envs.step(np.array([30, 30]))
        assert dones.all()
        assert infos[0]["token_rewards"][:2].tolist() == [1.0, 1.0]
        assert infos[0]["episode"]["r"] == 2.0
        assert envs.get_images()[0].dtype == np.uint8
