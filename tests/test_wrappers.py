import copy
import pickle
import sys
import warnings

import gymnasium as gym
import gymnasium.utils.env_checker
import numpy as np
import pytest
import torch
from doubles import ConstantAttention, HashRewardModel, ScoreOnly, SinkAttention
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics

import tokenmdp.wrappers as single
from tokenmdp.credit import AttentionCredit, SparseCredit, make_credit, redistribute
from tokenmdp.types import Credit
from tokenmdp.wrappers import UninformativeAttention, find_credit_wrapper, vector
from tokenmdp.wrappers.base import CreditWrapper

TOY = "tokenmdp:TextGen-Toy-v0"
WRAPPERS = [
    ("SparseReward", {}),
    ("UniformReward", {}),
    ("AttentionCreditReward", {}),
    ("AttentionCreditReward", {"credit_beta": 0.0}),
    ("AttentionCreditReward", {"credit_beta": 1.0, "attention_floor": 0.01}),
]
each_wrapper = pytest.mark.parametrize(("name", "kwargs"), WRAPPERS, ids=str)


def make(name, wrapper_kwargs=None, **kwargs):
    return getattr(single, name)(gym.make(TOY, **kwargs), **(wrapper_kwargs or {}))


def make_vec(name, wrapper_kwargs=None, num_envs=4, **kwargs):
    return getattr(vector, name)(gym.make_vec(TOY, num_envs=num_envs, **kwargs), **(wrapper_kwargs or {}))


def same(first, second):
    return gym.utils.env_checker.data_equivalence(first, second, exact=True)


def responses(count, horizon, eos, seed=0):
    """Random responses of every length 1..horizon; those shorter than the horizon end with end-of-text."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(29, size=(count, horizon))
    lengths = rng.integers(1, horizon + 1, size=count)
    tokens[np.arange(count), lengths - 1] = eos
    return tokens


def episode(env, tokens, **reset):
    env.reset(**reset)
    for token in tokens:
        *_, reward, terminated, _, info = env.step(token)
        if terminated:
            return reward, info
    raise AssertionError("the episode did not end")


@each_wrapper
@pytest.mark.filterwarnings("ignore:the attention of SinkAttention")
@pytest.mark.parametrize("model", [HashRewardModel, SinkAttention])
def test_a_thousand_episodes_conserve_their_score_single_and_vector(name, kwargs, model):
    count, horizon = 1000, 8
    envs = make_vec(name, kwargs, count, autoreset_mode="Disabled", reward_model=model())
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

    env = make(name, kwargs, reward_model=model())
    for row in range(count):
        reward, info = episode(env, tokens[row], seed=row)
        assert reward == score[row]
        assert set(info) == set(columns)
        assert all(np.array_equal(info[key], columns[key][row]) for key in info), row


@each_wrapper
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_vector_form_equals_wrapped_single_environments_infos_included(name, kwargs, mode):
    envs = make_vec(name, kwargs, autoreset_mode=mode, reward_model=HashRewardModel(), horizon_range=(1, 6))
    singles = SyncVectorEnv(
        [lambda: make(name, kwargs, reward_model=HashRewardModel(), horizon_range=(1, 6))] * 4, autoreset_mode=mode
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
            env = make(name, kwargs, reward_model=model)
            tokens = responses(50, 8, env.unwrapped.eos_token_id)
            return np.stack([episode(env, row, seed=0)[1]["token_rewards"] for row in tokens])
        envs = make_vec(name, kwargs, 50, autoreset_mode="Disabled", score_when="all_done", reward_model=model)
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
    env = make("AttentionCreditReward", {"credit_beta": 1.0}, reward_model=SinkAttention())
    score, info = episode(env, [1, 2, 30], seed=0)
    assert info["credit_fallback"] is True
    assert info["attention_mass"] == 0.0
    np.testing.assert_allclose(info["token_rewards"][:3], score / 3, rtol=1e-6)
    env = make("AttentionCreditReward", {}, reward_model=HashRewardModel())
    info = episode(env, [1, 2, 30], seed=0)[1]
    assert info["credit_fallback"] is False
    assert 0.0 < info["attention_mass"] < 1.0


def test_attention_is_asked_for_only_by_the_wrapper_that_needs_it():
    for name, asked in (("SparseReward", False), ("UniformReward", False), ("AttentionCreditReward", True)):
        model = HashRewardModel()
        episode(make(name, reward_model=model), [1, 30], seed=0)
        assert [attention for _, attention in model.asked] == [asked]


def test_under_all_done_every_row_gets_its_credit_in_the_last_step():
    envs = make_vec("UniformReward", num_envs=3, autoreset_mode="Disabled", score_when="all_done")
    envs.reset(seed=0)
    assert "token_rewards" not in envs.step(np.array([30, 20, 20]))[4]
    *_, infos = envs.step(np.array([0, 30, 30]))
    assert infos["_token_rewards"].all()
    assert infos["token_rewards"][:, :2].tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("build", [make, make_vec])
def test_two_credit_wrappers_are_refused(build):
    module = single if build is make else vector
    with pytest.raises(ValueError, match="SparseReward on top of UniformReward"):
        module.SparseReward(build("UniformReward"))
    stats = RecordEpisodeStatistics if build is make else VectorRecordEpisodeStatistics
    with pytest.raises(ValueError, match="AttentionCreditReward on top of UniformReward"):
        module.AttentionCreditReward(stats(build("UniformReward")))


@pytest.mark.parametrize("build", [make, make_vec])
def test_attention_credit_refuses_a_reward_model_without_attention(build):
    with pytest.raises(ValueError, match=r"does not provide attention.*UniformReward or SparseReward"):
        build("AttentionCreditReward", reward_model=ScoreOnly())
    build("UniformReward", reward_model=ScoreOnly())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"credit_beta": 1.5}, "credit_beta is 1.5"), ({"attention_floor": 0.0}, "attention_floor is 0.0")],
)
def test_bad_arguments(arguments, message):
    for build in (make, make_vec):
        with pytest.raises(ValueError, match=message):
            build("AttentionCreditReward", arguments)


def test_other_environments_are_refused():
    with pytest.raises(TypeError, match="CartPoleEnv has no `outcome`"):
        single.SparseReward(gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match=r"SyncVectorEnv has no `outcome`.*wrap each single environment"):
        vector.SparseReward(SyncVectorEnv([lambda: gym.make(TOY)]))


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
    assert episode(single.SparseReward(Foreign()), [1, 0])[1]["token_rewards"][:2].tolist() == [0.0, 2.0]
    assert episode(single.UniformReward(Foreign()), [1, 0])[1]["token_rewards"][:2].tolist() == [1.0, 1.0]
    with pytest.raises(TypeError, match="AttentionCreditReward needs attention and Foreign cannot ask"):
        single.AttentionCreditReward(Foreign())


class Half:
    """A credit method that loses half of the score."""

    name, conserves_return, needs = "half", False, frozenset()

    def __call__(self, outcome, resources):
        token_rewards = SparseCredit()(outcome, resources).token_rewards / 2
        return Credit(token_rewards, {})


@pytest.mark.parametrize("build", [make, make_vec])
def test_what_a_method_does_not_conserve_is_reported(build):
    env = build("SparseReward")
    env.credit = Half()
    env.reset(seed=0, options={"prompt": "a film"})
    *_, info = env.step(20 if build is make else np.array([20, 20, 20, 20]))
    assert "credit_residual" not in info
    *_, info = env.step(30 if build is make else np.array([30, 4, 4, 4]))
    residual = info["credit_residual"] if build is make else info["credit_residual"][0]
    assert (residual.dtype, residual) == (np.float32, 1.0)


@each_wrapper
def test_specs_rebuild_the_wrapped_env_also_through_json(name, kwargs):
    env = make(name, kwargs)
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        other = gym.make(spec)
        assert type(other) is type(env)
        assert other.credit == env.credit
        assert same(episode(other, [20, 4, 30], seed=1), episode(env, [20, 4, 30], seed=1))


def test_rebuilding_a_spec_never_copies_the_reward_model():
    model = HashRewardModel()
    env = make("AttentionCreditReward", reward_model=model)
    assert gym.make(env.spec).unwrapped.task.reward_model is model
    assert copy.deepcopy(env).unwrapped.task.reward_model is model


@each_wrapper
def test_a_copy_in_mid_episode_continues_identically(name, kwargs):
    env, envs = make(name, kwargs), make_vec(name, kwargs)
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
    env = make("UniformReward")
    assert find_credit_wrapper(RecordEpisodeStatistics(env)) is env
    assert find_credit_wrapper(gym.make(TOY)) is None
    envs = make_vec("UniformReward")
    assert find_credit_wrapper(VectorRecordEpisodeStatistics(envs)) is envs
    assert find_credit_wrapper(gym.make_vec(TOY)) is None


def test_vector_wrappers_forward_the_autoreset_mode():
    for mode in AutoresetMode:
        assert make_vec("SparseReward", autoreset_mode=mode.value).autoreset_mode is mode


def test_both_modules_offer_the_same_wrappers_with_the_same_arguments():
    names = [name for name in vector.__all__ if name.endswith("Reward")]
    assert names == ["AttentionCreditReward", "CreditReward", "OnlinePrefixReward", "SparseReward", "UniformReward"]
    for name in names:
        one, other = getattr(single, name), getattr(vector, name)
        assert one.__init__.__defaults__ == other.__init__.__defaults__
        assert one.__doc__.splitlines()[0] == other.__doc__.splitlines()[0]


@each_wrapper
def test_episode_statistics_outside_the_wrapper_see_the_score(name, kwargs):
    env = RecordEpisodeStatistics(make(name, kwargs))
    score, info = episode(env, [20, 4, 30], seed=0)
    assert (info["episode"]["r"], info["episode"]["l"], score) == (2.0, 3, 2.0)
    for mode in ("NextStep", "SameStep", "Disabled"):
        envs = VectorRecordEpisodeStatistics(make_vec(name, kwargs, 2, autoreset_mode=mode))
        envs.reset(seed=0)
        for actions in ([20, 4], [30, 4], [4, 30]):
            *_, infos = envs.step(np.array(actions))
            if actions[0] == 30:
                assert infos["episode"]["r"].tolist() == [2.0, 0.0]
                assert infos["episode"]["l"].tolist() == [2, 0]
        assert infos["episode"]["l"][1] == 3


@each_wrapper
def test_stable_baselines3_conformance_without_a_warning(name, kwargs, monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    check_env = pytest.importorskip("stable_baselines3.common.env_checker").check_env
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in ({}, {"max_new_tokens": 1}, {"horizon_range": (2, 5)}, {"eos_token_id": 0}):
            check_env(make(name, kwargs, **arguments))


def test_stable_baselines3_makes_the_env_by_name_without_a_warning():
    make_vec_env = pytest.importorskip("stable_baselines3.common.env_util").make_vec_env
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


def unread_warnings(monkeypatch, read, episodes=40):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.setattr(CreditWrapper, "readers", set())
    dummy = pytest.importorskip("stable_baselines3.common.vec_env").DummyVecEnv
    envs = dummy([lambda: make("UniformReward")] * 2)
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
    pytest.importorskip("stable_baselines3")
    caught = unread_warnings(monkeypatch, read=False)
    assert len(caught) == 1
    assert "UniformReward changes nothing" in str(caught[0].message)
    assert "token_rewards_read = True" in str(caught[0].message)
    assert unread_warnings(monkeypatch, read=True) == []


def test_no_warning_where_stable_baselines3_is_not_in_use(monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.delitem(sys.modules, "stable_baselines3")
    env = make("UniformReward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            episode(env, [30])


def test_rendering_tints_the_tokens_at_the_end(capsys):
    env = make("SparseReward", render_mode="ansi")
    env.reset(options={"prompt": "the film was"})
    env.step(20)
    assert env.render() == "the film was | great"
    env.step(30)
    assert "\x1b[" in env.render()
    assert "great" in env.render()
    env.reset()
    assert "\x1b[" not in env.render()

    env = make("SparseReward", render_mode="human")
    env.reset(options={"prompt": "the film was"})
    env.step(20)
    env.step(30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["the film was |", "the film was | great"]
    assert len(lines) == 3
    assert "\x1b[" in lines[2]

    envs = make_vec("SparseReward", num_envs=2, render_mode="ansi", autoreset_mode="Disabled")
    envs.reset(seed=0)
    envs.step(np.array([30, 20]))
    assert ["\x1b[" in frame for frame in envs.render()] == [True, False]


def test_an_episode_that_replaced_an_ended_one_does_not_wear_its_credit():
    for mode in ("SameStep", "NextStep"):
        envs = make_vec("UniformReward", num_envs=1, render_mode="ansi", autoreset_mode=mode)
        envs.reset(seed=0)
        envs.step(np.array([20]))
        envs.step(np.array([30]))
        assert ("\x1b[" in envs.render()[0]) == (mode == "NextStep")
        for _ in range(2):
            envs.step(np.array([4]))
            assert "\x1b[" not in envs.render()[0]


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


@pytest.mark.parametrize("build", [make, make_vec])
def test_credit_reward_takes_a_name_and_its_spec_keeps_it(build):
    module, base = (single, gym.make(TOY)) if build is make else (vector, gym.make_vec(TOY, num_envs=2))
    wrapped = module.CreditReward(base, "red", credit_beta=0.5)
    assert wrapped.credit == make_credit("red", credit_beta=0.5)
    if build is make:
        again = gym.make(EnvSpec.from_json(wrapped.spec.to_json()))
        assert again.credit == wrapped.credit
        assert same(episode(again, [20, 4, 30], seed=1), episode(wrapped, [20, 4, 30], seed=1))
    with pytest.raises(ValueError, match="has its options already; credit_beta can be given with a name only"):
        module.CreditReward(base, SparseCredit(), credit_beta=0.5)
    with pytest.raises(TypeError, match=r"credit is \{'credit_beta': 0\.5\}; pass the name of a method"):
        module.CreditReward(base, {"credit_beta": 0.5})


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
    with pytest.raises(ValueError, match="credit is 'dense'; choose one of sparse, uniform, attention"):
        make_credit("dense")


def play_rows(envs, count):
    """``count`` episodes a row of five tokens and end-of-text; returns the warnings about attention."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(count):
            envs.reset(seed=seed)
            for token in (3, 4, 5, 6, 7, envs.unwrapped.eos_token_id):
                envs.step(np.full(envs.num_envs, token))
    return [warning for warning in caught if warning.category is UninformativeAttention]


@pytest.fixture
def forget(monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned_of_attention", set())


@pytest.mark.usefixtures("forget")
def test_nearly_uniform_attention_warns_once():
    envs = [
        make_vec("AttentionCreditReward", num_envs=16, autoreset_mode="Disabled", reward_model=model())
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
def test_short_responses_say_nothing_about_attention():
    envs = make_vec("AttentionCreditReward", num_envs=64, autoreset_mode="Disabled", reward_model=ConstantAttention())
    envs.reset(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for token in (3, 4, envs.unwrapped.eos_token_id):
            envs.step(np.full(64, token))
