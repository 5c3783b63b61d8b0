"""A wrapper that changes `reward` has no effect on token rewards, so it is refused where the first episode ends."""

import functools
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import SB3, TOY, HashRewardModel, of_words, responses
from gymnasium import wrappers as plain
from gymnasium.wrappers import vector as plain_vector

import tokenmdp.wrappers as single
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.interop.arrays import relabel
from tokenmdp.reward_models import ScaledRewardModel, load_reward_model
from tokenmdp.runs.environments import toy_policy
from tokenmdp.wrappers import ChangedReward, vector


class LengthPenalty(gym.Wrapper):
    """Somebody's own wrapper: it is no RewardWrapper and takes something off every step."""

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return obs, reward - 0.01, *rest


class Noise(gym.vector.VectorWrapper):
    def step(self, actions):
        obs, rewards, *rest = self.env.step(actions)
        return obs, rewards + 1e-3, *rest


CHANGES = {
    "TransformReward": lambda env: plain.TransformReward(env, lambda reward: 100 * reward),
    "ClipReward": lambda env: plain.ClipReward(env, -0.1, 0.1),
    "NormalizeReward": plain.NormalizeReward,
    "LengthPenalty": LengthPenalty,
}
VECTOR_CHANGES = {
    "TransformReward": lambda envs: plain_vector.TransformReward(envs, lambda rewards: 100 * rewards),
    "ClipReward": lambda envs: plain_vector.ClipReward(envs, -0.1, 0.1),
    "NormalizeReward": plain_vector.NormalizeReward,
    "VectorizeTransformReward": lambda envs: plain_vector.VectorizeTransformReward(
        envs, plain.TransformReward, func=lambda reward: reward / 3
    ),
    "Noise": Noise,
}
CREDIT = ("SparseReward", "UniformReward", "OnlinePrefixReward")


def toy(**arguments):
    return gym.make(TOY, reward_model=HashRewardModel(), **arguments)


def toy_vec(num_envs=4, mode="Disabled", **arguments):
    return gym.make_vec(TOY, num_envs=num_envs, autoreset_mode=mode, reward_model=HashRewardModel(), **arguments)


def play_all(env, rows=8):
    for tokens in responses(rows, 8, eos=30):
        env.reset(seed=0)
        for token in tokens:
            if env.step(token)[2]:
                break


@pytest.mark.parametrize("credit", CREDIT)
@pytest.mark.parametrize("name", CHANGES)
def test_below_a_single_credit_wrapper(name, credit):
    env = getattr(single, credit)(CHANGES[name](toy()))
    with pytest.raises(ChangedReward, match=f"{name} below {credit} .* score_scale=") as refused:
        play_all(env)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize("mode", ["Disabled", "NextStep", "SameStep"])
@pytest.mark.parametrize("credit", CREDIT)
@pytest.mark.parametrize("name", VECTOR_CHANGES)
def test_below_a_vector_credit_wrapper(name, credit, mode):
    envs = getattr(vector, credit)(VECTOR_CHANGES[name](toy_vec(mode=mode)))
    envs.reset(seed=0)
    with pytest.raises(ChangedReward, match=f"{name} below {credit}"):
        deque(map(envs.step, responses(4, 8, eos=30).T), maxlen=0)


@pytest.mark.parametrize("credit", CREDIT)
@pytest.mark.parametrize("name", VECTOR_CHANGES)
def test_ppo_refuses_what_is_above(name, credit):
    score_when = "ended" if credit == "OnlinePrefixReward" else "all_done"
    envs = VECTOR_CHANGES[name](getattr(vector, credit)(toy_vec(8, score_when=score_when)))
    with pytest.raises(ChangedReward, match=f"{name} above {credit}"):
        PPO(toy_policy(1), envs, PPOConfig(dtype="float32")).learn(1)


@pytest.mark.parametrize("credit", CREDIT)
def test_wrappers_that_change_nothing_stay_allowed(credit):
    same = plain_vector.TransformReward(getattr(vector, credit)(toy_vec(8)), lambda rewards: rewards * 1.0)
    assert PPO(toy_policy(1), same, PPOConfig(dtype="float32")).learn(1).num_updates_done == 1
    play_all(plain.Autoreset(getattr(single, credit)(plain.ClipReward(toy(), -1e6, 1e6))))


@pytest.mark.parametrize("wrap", [CHANGES["ClipReward"], LengthPenalty, None], ids=["ClipReward", "own", "loop"])
@pytest.mark.parametrize("tensors", [False, True])
def test_loops_that_write_back(wrap, tensors):
    def make():
        return (wrap or (lambda env: env))(single.UniformReward(toy()))

    def loop():
        for t, tokens in enumerate(np.random.default_rng(0).integers(29, size=(12, 2))):
            _, reward, _, _, infos = envs.step(tokens)
            rewards[t] = torch.as_tensor(reward) if tensors else reward
            if wrap is None:
                rewards[t] *= 0.1
            relabel(rewards, t, infos)

    envs = gym.vector.SyncVectorEnv([make, make])
    rewards = torch.zeros(12, 2) if tensors else np.zeros((12, 2))
    envs.reset(seed=0)
    with pytest.raises(ChangedReward, match="score_scale="):
        loop()


@pytest.mark.parametrize("workers", ["dummy", "processes", "batch"])
@pytest.mark.parametrize("name", ["TransformReward", "LengthPenalty"])
def test_stable_baselines(name, workers):
    pytest.importorskip("sb3_contrib", reason=SB3)
    from stable_baselines3 import PPO as PPO3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv

    from tokenmdp.interop.sb3 import GymVectorToSB3, TokenRewardCallback

    if workers == "batch":
        name = {"LengthPenalty": "Noise"}.get(name, name)
        venv = GymVectorToSB3(VECTOR_CHANGES[name](vector.UniformReward(toy_vec(2, "SameStep"))))
    else:
        kind = (
            {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "fork"}} if workers == "processes" else {}
        )
        venv = make_vec_env(TOY, 2, wrapper_class=lambda env: CHANGES[name](single.UniformReward(env)), **kind)
    model = PPO3("MultiInputPolicy", venv, n_steps=32, batch_size=32, n_epochs=1, device="cpu", seed=0)
    with pytest.raises(ChangedReward, match=f"{name}.*score_scale="):
        model.learn(64, callback=TokenRewardCallback())
    venv.close()


def test_stable_baselines_scales_with_vec_normalize_and_nothing_else():
    pytest.importorskip("sb3_contrib", reason=SB3)
    from stable_baselines3 import DQN
    from stable_baselines3 import PPO as PPO3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

    from tokenmdp.interop.sb3 import TokenRewardCallback, TokenRewardReplayBuffer

    class Halved(VecEnvWrapper):
        def reset(self):
            return self.venv.reset()

        def step_wait(self):
            obs, rewards, dones, infos = self.venv.step_wait()
            return obs, rewards / 2, dones, infos

    def make(credit):
        return make_vec_env(TOY, 2, wrapper_class=credit)

    options = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "device": "cpu", "seed": 0}
    for credit in (single.UniformReward, single.OnlinePrefixReward):
        venv = VecNormalize(make(credit), norm_obs=False)
        PPO3("MultiInputPolicy", venv, **options).learn(64, callback=TokenRewardCallback())
        for wrong in (
            VecNormalize(Halved(make(credit)), norm_obs=False),
            Halved(VecNormalize(make(credit), norm_obs=False)),
        ):
            with pytest.raises(ChangedReward, match="Halved"):
                PPO3("MultiInputPolicy", wrong, **options).learn(64, callback=TokenRewardCallback())
    clipped = make(lambda env: CHANGES["ClipReward"](single.UniformReward(env)))
    kind = TokenRewardReplayBuffer
    with pytest.raises(ChangedReward, match="score_scale="):
        DQN("MultiInputPolicy", clipped, buffer_size=200, replay_buffer_class=kind, learning_starts=500).learn(64)


@pytest.mark.parametrize("credit", ["UniformReward", "OnlinePrefixReward"])
def test_torchrl(credit):
    torchrl = pytest.importorskip("torchrl", reason="needs the torchrl extra: pip install 'tokenmdp[torchrl]'")
    from torchrl.envs import RewardClipping, RewardScaling, TransformedEnv

    from tokenmdp.interop import torchrl as ours

    assert torchrl
    module = getattr(vector, credit)
    right = ours.relabel(ours.make_env(TOY, module, num_envs=4).rollout(20))
    ours.relabel(right)  # a second time changes nothing
    made = functools.partial(ours.make_env, TOY, module, num_envs=4)
    for changed in (
        TransformedEnv(made(), RewardScaling(loc=0.0, scale=0.01)),
        TransformedEnv(made(), RewardClipping(0.0, 0.01)),
    ):
        torch.manual_seed(0)
        with pytest.raises(ChangedReward, match="RewardScaling"):
            ours.relabel(changed.rollout(30, break_when_any_done=False))


@pytest.mark.parametrize("method", ["sparse", "attention", "red", "shapley"])
def test_scaled_scores_conserve(method):
    arguments = {"reward_model": "imdb-tiny", "tokenizer": "imdb-tiny", "prompts": ["the film was"]}
    tokens = [500, 600, 700, 800]
    played = []
    for scaling in ({}, {"score_scale": 0.25, "score_shift": 1.5}):
        env = single.CreditReward(gym.make("tokenmdp:TextGen-v0", max_new_tokens=4, **arguments, **scaling), method)
        env.reset(seed=0)
        for token in tokens:
            *_, reward, _, _, info = env.step(token)
        assert reward == info["score"] == pytest.approx(info["token_rewards"].sum(), abs=1e-5)
        played.append(float(reward))
    assert played[1] == pytest.approx(0.25 * (played[0] - 1.5), abs=1e-5)


def test_the_scaled_model_scales_all_that_it_gives():
    inner, texts = load_reward_model("toy-lexicon"), of_words(("the film", "was great"), ("a", "bad dull story"))
    scaled = ScaledRewardModel(inner, 0.5, shift=2.0)
    needs = frozenset({"prefix_scores"}) & inner.provides
    before, after = inner(texts, needs=needs), scaled(texts, needs=needs)
    assert torch.equal(after.score, 0.5 * (before.score - 2))
    if before.prefix_scores is not None:
        assert torch.equal(after.prefix_scores, 0.5 * (before.prefix_scores - 2))
    normal = ScaledRewardModel.normalised(inner, [1.0, 3.0, 5.0])
    assert (normal.shift, normal.scale) == (3.0, 0.5)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "2", None, True])
def test_scales_that_are_none(scale):
    with pytest.raises((ValueError, TypeError), match="scale"):
        gym.make(TOY, score_scale=scale)
