"""What credit wrappers compute: sums, the single and the vector form, attention, methods of one's own."""

import gymnasium as gym
import gymnasium.utils.env_checker
import numpy as np
import pytest
from doubles import (
    TOY,
    ConstantAttention,
    HashRewardModel,
    SinkAttention,
    each_wrapper,
    play,
    responses,
    same,
    wrapped,
    wrapped_vec,
)
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics

import tokenmdp.wrappers as single
from tokenmdp.credit import SparseCredit, redistribute
from tokenmdp.types import Credit


@each_wrapper
@pytest.mark.filterwarnings("ignore:the attention of SinkAttention")
@pytest.mark.parametrize("model", [HashRewardModel, SinkAttention])
def test_a_thousand_episodes_conserve_their_score_and_single_ones_agree(name, kwargs, model):
    count, horizon = 1000, 8
    envs = wrapped_vec(name, kwargs, count, autoreset_mode="Disabled", reward_model=model())
    envs.reset(seed=0)
    tokens = responses(count, horizon, envs.unwrapped.eos_token_id)
    columns, rewards = {}, np.zeros(count)
    for step in range(horizon):
        _, reward, *_, infos = envs.step(tokens[:, step])
        rewards += reward
        for key in infos:
            if key[0] != "_":
                column = columns.setdefault(key, np.zeros_like(infos[key]))
                column[infos[f"_{key}"]] = infos[key][infos[f"_{key}"]]
    score, token_rewards, mask = columns["score"], columns["token_rewards"], columns["token_mask"]
    assert (token_rewards.shape, token_rewards.dtype) == ((count, horizon), np.float32)
    assert (abs(token_rewards.sum(1, dtype=np.float64) - score) < 1e-5 * np.maximum(1, abs(score))).all()
    assert (rewards == score).all()
    assert not token_rewards[~mask].any()
    assert set(mask.sum(1)) == set(range(1, horizon + 1))
    assert np.isfinite(token_rewards).all()

    env = wrapped(name, kwargs, reward_model=model())
    for row in range(0, count, 5):
        reward, info = play(env, tokens[row], seed=row)
        assert reward == score[row]
        assert set(info) == set(columns)
        assert all(np.array_equal(info[key], columns[key][row]) for key in info), row


@each_wrapper
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_vector_form_equals_wrapped_single_environments_infos_included(name, kwargs, mode):
    envs = wrapped_vec(name, kwargs, autoreset_mode=mode, reward_model=HashRewardModel(), horizon_range=(1, 6))
    singles = SyncVectorEnv(
        [lambda: wrapped(name, kwargs, reward_model=HashRewardModel(), horizon_range=(1, 6))] * 4, autoreset_mode=mode
    )
    assert same(envs.reset(seed=3), singles.reset(seed=3))
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(40):
        actions = rng.integers(32, size=4)
        ours, theirs = envs.step(actions), singles.step(actions)
        assert same(ours, theirs)
        ended += ours[2].sum()
    assert ended > 10


@pytest.mark.parametrize("form", ["single", "vector"])
def test_beta_zero_is_sparse_and_constant_attention_is_uniform(form):
    def all_token_rewards(name, kwargs, model):
        if form == "single":
            env = wrapped(name, kwargs, reward_model=model)
            tokens = responses(50, 8, env.unwrapped.eos_token_id)
            return np.stack([play(env, row, seed=0)[1]["token_rewards"] for row in tokens])
        envs = wrapped_vec(name, kwargs, 50, autoreset_mode="Disabled", score_when="all_done", reward_model=model)
        envs.reset(seed=[0] * 50)
        tokens = responses(50, 8, envs.unwrapped.eos_token_id)
        return [envs.step(tokens[:, step])[4] for step in range(8)][tokens_end(tokens)]["token_rewards"]

    def tokens_end(tokens):
        return int((tokens == 30).argmax(1).max())

    sparse = all_token_rewards("SparseReward", {}, HashRewardModel())
    uniform = all_token_rewards("UniformReward", {}, HashRewardModel())
    assert ((sparse != 0).sum(1) <= 1).all()
    assert not np.allclose(sparse, uniform)
    beta_zero = all_token_rewards("AttentionCreditReward", {"credit_beta": 0.0}, HashRewardModel())
    assert np.array_equal(beta_zero, sparse)
    constant = all_token_rewards("AttentionCreditReward", {"credit_beta": 1.0}, ConstantAttention())
    np.testing.assert_allclose(constant, uniform, rtol=1e-6, atol=1e-7)
    half = all_token_rewards("AttentionCreditReward", {"credit_beta": 0.5}, ConstantAttention())
    np.testing.assert_allclose(half, (sparse + uniform) / 2, rtol=1e-6, atol=1e-7)


def test_attention_that_misses_the_response_falls_back_to_uniform_and_says_so():
    env = wrapped("AttentionCreditReward", {"credit_beta": 1.0}, reward_model=SinkAttention())
    score, info = play(env, [1, 2, 30], seed=0)
    assert info["credit_fallback"] is True
    assert info["attention_mass"] == 0.0
    np.testing.assert_allclose(info["token_rewards"][:3], score / 3, rtol=1e-6)
    env = wrapped("AttentionCreditReward", {}, reward_model=HashRewardModel())
    info = play(env, [1, 2, 30], seed=0)[1]
    assert info["credit_fallback"] is False
    assert 0.0 < info["attention_mass"] < 1.0


def test_attention_is_asked_for_only_by_the_wrapper_that_needs_it():
    for name, asked in (("SparseReward", False), ("UniformReward", False), ("AttentionCreditReward", True)):
        model = HashRewardModel()
        play(wrapped(name, reward_model=model), [1, 30], seed=0)
        assert [attention for _, attention in model.asked] == [asked]


def test_under_all_done_every_row_gets_its_credit_in_the_last_step():
    envs = wrapped_vec("UniformReward", num_envs=3, autoreset_mode="Disabled", score_when="all_done")
    envs.reset(seed=0)
    assert "token_rewards" not in envs.step(np.array([30, 20, 20]))[4]
    *_, infos = envs.step(np.array([0, 30, 30]))
    assert infos["_token_rewards"].all()
    assert infos["token_rewards"][:, :2].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


class Foreign(gym.Env):
    """An environment of another project: one step, and an `outcome`."""

    observation_space = action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.outcome = None
        self.inner = gym.make(TOY).unwrapped

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.inner.reset(seed=seed)
        return 0, {}

    def step(self, action):
        _, reward, terminated, truncated, info = self.inner.step(20 if action else 30)
        self.outcome = self.inner.outcome
        return 0, reward, terminated, truncated, info


def test_sparse_and_uniform_work_on_any_env_that_offers_an_outcome():
    assert play(single.SparseReward(Foreign()), [1, 0])[1]["token_rewards"][:2].tolist() == [0.0, 2.0]
    assert play(single.UniformReward(Foreign()), [1, 0])[1]["token_rewards"][:2].tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match="AttentionCreditReward needs attention and Foreign cannot ask"):
        single.AttentionCreditReward(Foreign())


class Half:
    """A credit method that loses half of the score."""

    name, conserves_return, needs = "half", False, frozenset()

    def __call__(self, outcome, resources):
        token_rewards = SparseCredit()(outcome, resources).token_rewards / 2
        return Credit(token_rewards, {})


@pytest.mark.parametrize("build", [wrapped, wrapped_vec])
def test_what_a_method_does_not_conserve_is_reported(build):
    env = build("SparseReward")
    env.credit = Half()
    env.reset(seed=0, options={"prompt": "a film"})
    *_, info = env.step(20 if build is wrapped else np.array([20, 20, 20, 20]))
    assert "credit_residual" not in info
    *_, info = env.step(30 if build is wrapped else np.array([30, 4, 4, 4]))
    residual = info["credit_residual"] if build is wrapped else info["credit_residual"][0]
    assert (residual.dtype, residual) == (np.float32, 1.0)


class LastHalf:
    """A credit method of one's own: the score shared by the last two tokens."""

    name, conserves_return, needs = "last-half", True, frozenset()

    def __call__(self, outcome, resources):
        mask = outcome.episode.response_mask
        steps = mask.int().cumsum(-1) * mask
        late = (steps > steps.amax(-1, keepdim=True) - 2) & mask
        return Credit(redistribute(outcome.reward.score, late / late.sum(-1, keepdim=True)), {})


def test_credit_reward_binds_any_method():
    env = single.CreditReward(gym.make("tokenmdp:TextGen-Toy-v0", max_new_tokens=3), LastHalf())
    env.reset(seed=0, options={"prompt": "the film was"})
    for word in ("so", "very", "great"):
        *_, info = env.step(env.unwrapped.tokenizer.convert_tokens_to_ids(word))
    np.testing.assert_allclose(info["token_rewards"], [0.0, info["score"] / 2, info["score"] / 2])


@each_wrapper
def test_episode_statistics_outside_the_wrapper_see_the_score(name, kwargs):
    env = RecordEpisodeStatistics(wrapped(name, kwargs))
    score, info = play(env, [20, 4, 30], seed=0)
    assert (info["episode"]["r"], info["episode"]["l"], score) == (2.0, 3, 2.0)
    for mode in ("NextStep", "SameStep", "Disabled"):
        envs = VectorRecordEpisodeStatistics(wrapped_vec(name, kwargs, 2, autoreset_mode=mode))
        envs.reset(seed=0)
        for actions in ([20, 4], [30, 4], [4, 30]):
            *_, infos = envs.step(np.array(actions))
            if actions[0] == 30:
                assert infos["episode"]["r"].tolist() == [2.0, 0.0]
                assert infos["episode"]["l"].tolist() == [2, 0]
        assert infos["episode"]["l"][1] == 3


def test_rendering_tints_the_tokens_at_the_end(capsys):
    env = wrapped("SparseReward", render_mode="ansi")
    env.reset(options={"prompt": "the film was"})
    env.step(20)
    assert env.render() == "the film was | great"
    env.step(30)
    assert "\x1b[" in env.render()
    assert "great" in env.render()
    env.reset()
    assert "\x1b[" not in env.render()

    env = wrapped("SparseReward", render_mode="human")
    env.reset(options={"prompt": "the film was"})
    env.step(20)
    env.step(30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["the film was |", "the film was | great"]
    assert len(lines) == 3
    assert "\x1b[" in lines[2]

    envs = wrapped_vec("SparseReward", num_envs=2, render_mode="ansi", autoreset_mode="Disabled")
    envs.reset(seed=0)
    envs.step(np.array([30, 20]))
    assert ["\x1b[" in frame for frame in envs.render()] == [True, False]


def test_an_episode_that_replaced_an_ended_one_does_not_wear_its_credit():
    for mode in ("SameStep", "NextStep"):
        envs = wrapped_vec("UniformReward", num_envs=1, render_mode="ansi", autoreset_mode=mode)
        envs.reset(seed=0)
        envs.step(np.array([20]))
        envs.step(np.array([30]))
        assert ("\x1b[" in envs.render()[0]) == (mode == "NextStep")
        for _ in range(2):
            envs.step(np.array([4]))
            assert "\x1b[" not in envs.render()[0]
