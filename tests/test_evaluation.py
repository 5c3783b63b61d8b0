import copy
import gc

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import SB3, HashRewardModel

from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.evaluation import evaluate
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.runs.environments import toy_policy
from tokenmdp.wrappers import vector

ID = "tokenmdp:TextGen-Toy-v0"
MODES = ("Disabled", "SameStep", "NextStep")


def make(num_envs, mode="Disabled", **arguments):
    return gym.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, reward_model=HashRewardModel(), **arguments)


def make_single(**arguments):
    return gym.make(ID, reward_model=HashRewardModel(), **arguments)


def sync(num_envs, mode):
    return gym.vector.SyncVectorEnv([make_single] * num_envs, autoreset_mode=mode)


def scripted(obs):
    """A token that depends on the whole observation, of all rows alike; about every fifth ends the text."""
    ids, mask = np.atleast_2d(obs["input_ids"]), np.atleast_2d(obs["attention_mask"])
    token = (ids * mask * np.arange(1, ids.shape[1] + 1)).sum(1) * 7919 % 1009
    token = np.where(token % 5 == 0, 30, token % 30)
    return token if obs["input_ids"].ndim == 2 else token[0]


def test_the_toy_tokenizers_end_of_text_is_what_scripted_takes():
    assert make_single().unwrapped.eos_token_id == 30


def by_hand(seed, episodes):
    env = make_single()
    obs, _ = env.reset(seed=seed)
    played = []
    for _ in range(episodes):
        terminated = False
        while not terminated:
            obs, reward, terminated, _, info = env.step(scripted(obs))
        played.append((reward, info["n_tokens"]))
        obs, _ = env.reset()
    return played


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [make, sync])
def test_a_function_plays_each_rows_share_in_any_mode(kind, mode):
    result = evaluate(kind(3, mode), scripted, episodes=11, seed=5)
    expected = [by_hand(5 + row, 4) for row in range(3)]
    for i in range(11):  # episode i is the i // 3-th of row i % 3
        assert (result.scores[i], result.lengths[i]) == expected[i % 3][i // 3]
    assert len(set(result.lengths.tolist())) > 1  # rows do end at different steps


def test_a_single_environment_and_late_scores():
    single = evaluate(make_single(), scripted, episodes=4, seed=5)
    assert list(zip(single.scores, single.lengths, strict=True)) == by_hand(5, 4)
    assert str(single).endswith("tokens, 4 episodes")
    late = evaluate(make(3, score_when="all_done"), scripted, episodes=7, seed=5)
    np.testing.assert_array_equal(late.scores, evaluate(make(3), scripted, episodes=7, seed=5).scores)


def test_a_single_environment_is_not_closed():
    class Closing(gym.Wrapper):
        closed = 0

        def close(self):
            self.closed += 1

    env = Closing(make_single())
    evaluate(env, lambda obs: env.unwrapped.eos_token_id, episodes=2)
    gc.collect()
    assert env.closed == 0


def language_model(**options):
    return CausalLMPolicy.for_task(toy_policy(3), make(1, **options).unwrapped.task)


def greedy_by_full_forward(policy, min_new_tokens=0):
    """The most likely legal token, from the unprocessed model on one row's real tokens."""

    def act(obs):
        mask = obs["attention_mask"].astype(bool)
        with torch.no_grad():
            logits = policy.lm(torch.as_tensor(obs["input_ids"][mask])[None]).logits[0, -1]
        if mask[4:].sum() < min_new_tokens:
            logits[30] = -torch.inf
        return int(logits.argmax())

    return act


@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_a_language_model_is_greedy_with_a_cache_as_without(min_new_tokens):
    policy = language_model(min_new_tokens=min_new_tokens)
    policy.lm.get_output_embeddings().weight.data[30] *= 3  # so that end-of-text is often the most likely token
    expected = []
    for row in range(4):
        env = make_single(min_new_tokens=min_new_tokens)
        expected.append(evaluate(env, greedy_by_full_forward(policy, min_new_tokens), 3, seed=row).scores)
    for mode in MODES:
        envs = make(4, mode, min_new_tokens=min_new_tokens)
        result = evaluate(envs, policy, episodes=12, seed=0, deterministic=True)
        np.testing.assert_array_equal(result.scores.reshape(3, 4), np.transpose(expected))
    single = evaluate(make_single(min_new_tokens=min_new_tokens), policy, episodes=3, seed=0, deterministic=True)
    np.testing.assert_array_equal(single.scores, expected[0])


@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_top_1_sampling_is_greedy_and_sampling_repeats_with_the_seed(min_new_tokens):
    policy, envs = language_model(min_new_tokens=min_new_tokens), make(4, min_new_tokens=min_new_tokens)
    policy.lm.get_output_embeddings().weight.data[30] *= 3  # so that end-of-text is often the most likely token
    greedy = evaluate(envs, policy, episodes=8, deterministic=True)
    before = torch.get_rng_state()
    sampled = evaluate(envs, policy, episodes=8)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(sampled.scores, evaluate(envs, policy, episodes=8).scores)
    assert (sampled.scores != evaluate(envs, policy, episodes=8, seed=1).scores).any()
    policy.top_k = 1
    np.testing.assert_array_equal(evaluate(envs, policy, episodes=8).scores, greedy.scores)


def test_top_k_is_k_tokens_where_more_are_equally_likely():
    policy, env, drawn = language_model(), make_single(), set()
    policy.lm.get_output_embeddings().weight.data.zero_()
    policy.top_k = 2
    support = policy.prefill(torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.bool)).support
    step = env.step
    env.step = lambda action: (drawn.add(int(action)), step(action))[1]
    evaluate(env, policy, episodes=8)
    assert drawn == set(support.flatten().tolist())


def test_an_agent_of_ours_is_its_policy():
    agent = PPO(toy_policy(0), vector.SparseReward(make(4)), PPOConfig())
    expected = evaluate(make(4), agent.policy, episodes=6)
    np.testing.assert_array_equal(evaluate(make(4), agent, episodes=6).scores, expected.scores)


class Careful:
    """Ends the text as soon as that is legal: after ``min_new_tokens``. Before, it would be an InvalidAction."""

    def act(self, obs, action_masks):
        return np.where(action_masks[..., 30], 30, 0)


@pytest.mark.parametrize("envs", [make_single(min_new_tokens=3), make(3, min_new_tokens=3)])
def test_masks_reach_whoever_takes_them(envs):
    assert (evaluate(envs, Careful(), episodes=5).lengths == 4).all()
    assert (evaluate(envs, Careful().act, episodes=5).lengths == 4).all()
    with pytest.raises(gym.error.InvalidAction):
        evaluate(envs, lambda obs: np.full(obs["input_ids"].shape[:-1], 30), episodes=5)


def test_masks_of_gymnasiums_vector_environment():
    envs = gym.vector.SyncVectorEnv([lambda: make_single(min_new_tokens=2)] * 3)
    assert (evaluate(envs, Careful(), episodes=5).lengths == 3).all()


@pytest.mark.parametrize("num_envs", [None, 3])
def test_models_of_stable_baselines3(num_envs):
    sb3 = pytest.importorskip("stable_baselines3", reason=SB3)
    contrib = pytest.importorskip("sb3_contrib", reason=SB3)
    from stable_baselines3.common.evaluation import evaluate_policy

    from tokenmdp.interop.sb3 import GymVectorToSB3

    small = {"n_steps": 8, "batch_size": 8, "device": "cpu", "policy_kwargs": {"net_arch": [8]}}
    env = make_single()
    model = sb3.PPO("MultiInputPolicy", env, seed=0, **small)
    for theirs in (model.env, GymVectorToSB3(make(2, "SameStep"))):
        with pytest.raises(TypeError, match=f"envs is a {type(theirs).__name__}; pass the Gymnasium environment"):
            evaluate(theirs, model)
    played = make_single() if num_envs is None else make(num_envs)
    result = evaluate(played, model, episodes=6, seed=3, deterministic=True)
    if num_envs is None:
        model.env.seed(3)
        rewards, lengths = evaluate_policy(model, model.env, n_eval_episodes=6, return_episode_rewards=True, warn=False)
        assert result.scores.tolist() == pytest.approx(rewards)
        assert result.lengths.tolist() == lengths
    np.testing.assert_array_equal(
        evaluate(played, model, episodes=6).scores, evaluate(played, model, episodes=6).scores
    )  # samples from PyTorch's random numbers

    masked = contrib.MaskablePPO("MultiInputPolicy", make_single(min_new_tokens=4), seed=0, **small)
    careful = make_single(min_new_tokens=4) if num_envs is None else make(num_envs, min_new_tokens=4)
    assert (evaluate(careful, masked, episodes=12).lengths > 4).all()

    recurrent = contrib.RecurrentPPO("MultiInputLstmPolicy", env, seed=0, **small)
    by_row = [evaluate(make_single(), recurrent, 2, seed=row, deterministic=True).scores for row in range(3)]
    for mode in MODES:
        together = evaluate(make(3, mode), recurrent, 6, seed=0, deterministic=True)
        np.testing.assert_array_equal(together.scores.reshape(2, 3), np.transpose(by_row))


@pytest.mark.parametrize("name", ["DQN", "QRDQN"])
@pytest.mark.parametrize("num_envs", [None, 3])
def test_a_model_that_explores_repeats_with_the_seed(name, num_envs):
    """SB3's off-policy models explore with NumPy's global generator and that of their action space."""
    library = "stable_baselines3" if name == "DQN" else "sb3_contrib"
    models = pytest.importorskip(library, reason=SB3)
    model = getattr(models, name)("MultiInputPolicy", make_single(), seed=0, buffer_size=10, device="cpu")
    model.exploration_rate = 0.7
    played = make_single() if num_envs is None else make(num_envs)
    first = evaluate(played, model, episodes=12, seed=3)
    np.random.seed(5)  # noqa: NPY002  # what others draw meanwhile changes nothing, and the other way round
    model.action_space.seed(5)
    before = np.random.get_state()[1].copy(), copy.deepcopy(model.action_space.np_random).random(4)  # noqa: NPY002
    np.testing.assert_array_equal(first.scores, evaluate(played, model, episodes=12, seed=3).scores)
    after = np.random.get_state()[1], model.action_space.np_random.random(4)  # noqa: NPY002
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    greedy = evaluate(played, model, episodes=12, seed=3, deterministic=True)
    assert (first.scores != greedy.scores).any()
    assert (first.scores != evaluate(played, model, episodes=12, seed=4).scores).any()


def test_misuse_is_explained():
    with pytest.raises(TypeError, match="int is not an agent: pass a function obs -> actions"):
        evaluate(make_single(), 3)
    with pytest.raises(TypeError, match="envs is a str; pass the Gymnasium environment"):
        evaluate(ID, scripted)
    with pytest.raises(ValueError, match="episodes=0"):
        evaluate(make_single(), scripted, episodes=0)
    with pytest.raises(gym.error.Error, match="take the TimeLimit off"):
        evaluate(gym.wrappers.TimeLimit(make_single(), 2), lambda obs: 0)
    limited = gym.vector.SyncVectorEnv([lambda: gym.wrappers.TimeLimit(make_single(), 2)] * 2)
    with pytest.raises(gym.error.Error, match="take the TimeLimit off"):
        evaluate(limited, lambda obs: np.zeros(2, dtype=np.int64))
