"""Prefix differences paid while the episode runs, against the retroactive method and against forwards by hand."""

import gymnasium as gym
import numpy as np
import pytest
from doubles import HashRewardModel
from gymnasium.envs.registration import EnvSpec

import tokenmdp.wrappers as single
from tokenmdp.credit import PrefixDifferenceCredit
from tokenmdp.wrappers import vector

TOY, IMDB = "tokenmdp:TextGen-Toy-v0", "tokenmdp:TextGen-IMDb-v0"
PROMPTS = ["the film was", "a very", "the plot", "this movie is so"]


def play(env, tokens, **reset):
    """The rewards of one episode and its last info."""
    env.reset(**reset)
    rewards = []
    for token in tokens:
        *_, reward, terminated, _, info = env.step(token)
        rewards.append(reward)
        if terminated:
            return rewards, info
    raise AssertionError("the episode did not end")


@pytest.mark.parametrize("beta", [1.0, 0.4, 0.0])
def test_rewards_equal_the_retroactive_ones_on_the_bundled_model(beta):
    prompt, text = "The acting is", " wonderful but the plot makes no sense at all and I fell asleep halfway"
    online = single.OnlinePrefixReward(gym.make(IMDB, prompts=["It is"]), credit_beta=beta)
    later = single.CreditReward(gym.make(IMDB, prompts=["It is"]), PrefixDifferenceCredit(beta))
    tokens = [*online.unwrapped.tokenizer.encode(text)[:15], online.unwrapped.eos_token_id]
    rewards, info = play(online, tokens, options={"prompt": prompt})
    _, expected = play(later, tokens, options={"prompt": prompt})
    n_tokens = info["n_tokens"]
    np.testing.assert_allclose(rewards, expected["token_rewards"][:n_tokens], atol=1e-5)
    np.testing.assert_allclose(rewards, info["token_rewards"][:n_tokens], atol=1e-6)
    assert sum(rewards) == pytest.approx(info["score"], abs=1e-5)
    if beta:
        assert min(rewards) < 0 < max(rewards)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("model", [HashRewardModel, None])
def test_vector_rows_equal_single_environments_through_restarts(mode, model):
    """Random tokens that end episodes at different steps; every row against a single environment that replays it."""
    options = {} if model is None else {"reward_model": model()}
    envs = vector.OnlinePrefixReward(gym.make_vec(TOY, num_envs=4, autoreset_mode=mode, **options), 0.7)
    env = single.OnlinePrefixReward(gym.make(TOY, **options), 0.7)
    rng = np.random.default_rng(0)
    obs, _ = envs.reset(seed=3)
    eos = envs.unwrapped.eos_token_id
    running = [([], [], start(obs, row)) for row in range(4)]  # tokens, rewards, prompt of each row's episode
    idle = np.zeros(4, dtype=bool)
    finished = 0
    for _ in range(60):
        actions = rng.integers(29, size=4)
        actions[rng.random(4) < 0.2] = eos
        obs, rewards, ended, _, infos = envs.step(actions)
        for row in range(4):
            if idle[row]:
                assert rewards[row] == 0.0
                if mode == "NextStep":
                    running[row] = ([], [], start(obs, row))
                    idle[row] = False
                continue
            tokens, paid, prompt = running[row]
            tokens.append(actions[row])
            paid.append(rewards[row])
            if not ended[row]:
                continue
            finished += 1
            expected, info = play(env, tokens, options={"prompt": prompt})
            np.testing.assert_allclose(paid, expected, atol=1e-6)
            theirs = infos["final_info"] if mode == "SameStep" else infos
            np.testing.assert_array_equal(theirs["token_rewards"][row], info["token_rewards"])
            assert theirs["_token_rewards"][row]
            if mode == "SameStep":
                running[row] = ([], [], start(obs, row))
            else:
                idle[row] = True
        if mode == "Disabled" and idle.any() and rng.random() < 0.5:
            obs, _ = envs.reset(options={"reset_mask": idle.copy()})
            for row in np.flatnonzero(idle):
                running[row] = ([], [], start(obs, row))
            idle[:] = False
    assert finished > 20


def start(obs, row):
    """The prompt ids that a row began with."""
    return obs["input_ids"][row][obs["attention_mask"][row].astype(bool)].tolist()


def test_delayed_scores_are_refused():
    envs = gym.make_vec(TOY, num_envs=2, autoreset_mode="Disabled", score_when="all_done")
    with pytest.raises(ValueError, match="score_when='all_done' delays the scores"):
        vector.OnlinePrefixReward(envs)


def test_it_is_a_credit_wrapper():
    env = single.OnlinePrefixReward(gym.make(TOY, render_mode="ansi"), 0.5)
    with pytest.raises(ValueError, match="on top of OnlinePrefixReward: an episode has one credit"):
        single.SparseReward(env)
    rebuilt = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert play(rebuilt, [20, 4, 30], seed=1)[0] == play(env, [20, 4, 30], seed=1)[0]
    assert "\x1b[" in env.render()  # the credit is drawn


def test_the_price_is_one_forward_a_step():
    model = HashRewardModel()
    envs = vector.OnlinePrefixReward(gym.make_vec(TOY, num_envs=4, autoreset_mode="Disabled", reward_model=model))
    envs.reset(seed=0)
    assert [len(texts) for texts, _ in model.asked] == [4]  # the prompts
    envs.step(np.array([20, 20, 20, envs.unwrapped.eos_token_id]))
    assert sorted(len(texts) for texts, _ in model.asked[1:]) == [1, 3]  # the row that ended, and those that continue


@pytest.mark.parametrize("batched", [False, True])
def test_a_given_response_prefix_is_where_the_differences_start(batched):
    if batched:
        envs = vector.OnlinePrefixReward(gym.make_vec(TOY, num_envs=1, autoreset_mode="Disabled"))
    else:
        envs = single.OnlinePrefixReward(gym.make(TOY))
    tokenizer = envs.unwrapped.tokenizer
    envs.reset(options={"prompt": "the film was", "response_prefix": "dull but"})
    rewards = []
    for token in tokenizer("brilliant <eos>")["input_ids"]:
        *_, reward, _, _, info = envs.step(np.array([token]) if batched else token)
        rewards.append(float(np.squeeze(reward)))
    # The prefix earned its -1 before: the rest of the score of 2, after brilliant's 3, comes last.
    assert rewards == [3.0, -1.0]
    assert np.squeeze(info["score"]) == sum(rewards)
    assert np.squeeze(info["token_rewards"])[:4].tolist() == [0.0, 0.0, 3.0, -1.0]
