import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from cleanrl_style import compute_gae
from known_credit import TOY, KnownCredit, often_ending, position, single, true_reward

from tokenmdp.interop.arrays import mark_token_rewards_read, relabel
from tokenmdp.returns import gae
from tokenmdp.wrappers import vector

STEPS, ENVS, ROLLOUTS = 11, 5, 25  # 1,375 rows; 11 steps never hold whole episodes only


def native(mode):
    return vector.CreditReward(gym.make_vec(TOY, num_envs=ENVS, autoreset_mode=mode), KnownCredit())


def sync(mode):
    return gym.vector.SyncVectorEnv([single] * ENVS, autoreset_mode=mode)


def workers(mode):
    return gym.vector.AsyncVectorEnv([single] * ENVS, autoreset_mode=mode, context="fork")


class Loop:
    """A hand-written loop that keeps, beside what a learner keeps, the truth about every row as it happens.

    ``truth`` is the row's true token reward, NaN where the step took no token; ``whose`` numbers its episode.
    """

    def __init__(self, envs, mode, patient=False):
        mark_token_rewards_read(envs)
        self.envs, self.mode, self.patient = envs, mode, patient
        self.rng = np.random.default_rng(0)
        self.obs, _ = envs.reset(seed=0)
        self.waiting = np.zeros(ENVS, dtype=bool)
        self.episode, self.finished = np.arange(ENVS), set()

    def rollout(self, rewards, known):
        truth, whose = np.full((STEPS, ENVS), np.nan), np.full((STEPS, ENVS), -1)
        terminations = np.zeros((STEPS, ENVS), dtype=bool)
        for t in range(STEPS):
            actions = often_ending(self.rng, ENVS)
            truth[t] = np.where(self.waiting, np.nan, true_reward(actions, position(self.obs)))
            whose[t] = np.where(self.waiting, -1, self.episode)
            self.obs, reward, terminated, _, infos = self.envs.step(actions)
            rewards[t], terminations[t] = torch.as_tensor(reward) if torch.is_tensor(rewards) else reward, terminated
            relabel(rewards, t, infos, known)
            self.finished |= set(self.episode[terminated].tolist())
            self.episode = np.where(terminated, self.episode + ENVS, self.episode)
            if self.mode == "NextStep":
                self.waiting = terminated
            elif self.mode == "Disabled":
                self.waiting = self.waiting | terminated
                if self.waiting.all() if self.patient else self.waiting.any():
                    self.obs, _ = self.envs.reset(options={"reset_mask": self.waiting.copy()})
                    self.waiting = np.zeros(ENVS, dtype=bool)
        return truth, whose, terminations


CASES = [(native, mode, False) for mode in ("SameStep", "NextStep", "Disabled")]
CASES += [(native, "Disabled", True), (sync, "SameStep", False), (sync, "NextStep", False), (sync, "Disabled", False)]
CASES = [(*case, as_tensor) for case in CASES for as_tensor in (False, True)]
CASES.append((workers, "SameStep", False, False))  # worker processes change the transport only


@pytest.mark.parametrize(("kind", "mode", "patient", "as_tensor"), CASES)
def test_every_row_gets_its_own_tokens_reward(kind, mode, patient, as_tensor):
    loop = Loop(kind(mode), mode, patient)
    rewards, known = np.zeros((STEPS, ENVS)), np.zeros((STEPS, ENVS), dtype=bool)
    if as_tensor:
        rewards, known = torch.zeros(STEPS, ENVS), torch.zeros(STEPS, ENVS, dtype=torch.bool)
    begun_earlier = rows = idle = unfinished = 0
    last_episodes = np.full(ENVS, -1)
    for _ in range(ROLLOUTS):  # the arrays are used again, with what the last rollout left in them
        truth, whose, _ = loop.rollout(rewards, known)
        learned, used = np.asarray(rewards), np.asarray(known)
        decided = np.isin(whose, list(loop.finished))  # its episode ended within this rollout, else it would go on
        np.testing.assert_array_equal(used, decided)
        np.testing.assert_allclose(learned[used], truth[used], rtol=1e-6)
        assert (learned[~used] == 0).all()
        rows += used.sum()
        idle += (whose == -1).sum()
        unfinished += ((whose >= 0) & ~decided).sum()
        begun_earlier += (used & (whose == last_episodes)).sum()
        last_episodes = np.where(whose[-1] >= 0, whose[-1], -2)
    assert rows >= 600
    assert begun_earlier > 25  # tokens of episodes that straddle two rollouts
    assert unfinished > 25
    assert (idle > 0) == (mode == "NextStep" or patient)
    loop.envs.close()


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_gae_over_the_rollout_is_gae_of_each_episode(mode):
    """The contents of unfinished episodes and idle steps do not flow into any row that is learned from."""
    loop, compared = Loop(native(mode), mode, patient=mode == "Disabled"), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        rewards, known = torch.zeros(STEPS, ENVS), torch.zeros(STEPS, ENVS, dtype=torch.bool)
        _, whose, terminations = loop.rollout(rewards, known)
        values = torch.randn(STEPS, ENVS, generator=generator)
        next_value = torch.randn(ENVS, generator=generator)
        advantages = compute_gae(rewards, values, torch.as_tensor(terminations).float(), next_value, 0.9, 0.8)
        for episode in set(whose[known.numpy()].tolist()):
            rows = torch.as_tensor(whose == episode)
            mask = torch.ones(int(rows.sum()), dtype=torch.bool)
            expected, _ = gae(rewards[rows], values[rows], mask, 0.9, 0.8)  # the episode alone
            torch.testing.assert_close(advantages[rows], expected)
            compared += len(mask)
    assert compared > 150


def test_misuse_is_explained():
    bare = gym.make_vec(TOY, num_envs=2, autoreset_mode="SameStep")
    with pytest.raises(gym.error.Error, match=r"tokenmdp.wrappers.vector.SparseReward\(env\)"):
        mark_token_rewards_read(bare)
    for envs in (gym.make(TOY), gym.vector.SyncVectorEnv([lambda: gym.make(TOY)] * 2)):
        with pytest.raises(gym.error.Error, match=r"wrappers.SparseReward\(env\)"):
            mark_token_rewards_read(envs)
    limited = functools.partial(single, max_episode_steps=4)
    for envs in (limited(), gym.vector.SyncVectorEnv([limited])):
        with pytest.raises(gym.error.Error, match="a TimeLimit ends episodes before the reward model has scored them"):
            mark_token_rewards_read(envs)
    with pytest.raises(TypeError, match="CartPole"):
        mark_token_rewards_read(gym.make("CartPole-v1"))
    late = gym.make_vec(TOY, num_envs=2, autoreset_mode="Disabled", score_when="all_done")
    with pytest.raises(gym.error.Error, match="score_when='all_done' delivers token rewards later"):
        mark_token_rewards_read(vector.SparseReward(late))
    for envs in (bare, gym.vector.SyncVectorEnv([lambda: gym.make(TOY)] * 2)):
        envs.reset(seed=0)
        *_, infos = envs.step(np.full(2, 30))
        with pytest.raises(gym.error.Error, match="without token_rewards because no credit wrapper"):
            relabel(np.zeros((4, 2)), 0, infos)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_tokens_that_took_no_step_are_not_written_over_the_episode_before(as_tensor):
    envs = native("SameStep")
    mark_token_rewards_read(envs)
    rewards, known = np.zeros((STEPS, ENVS)), np.zeros((STEPS, ENVS), dtype=bool)
    if as_tensor:
        rewards, known = torch.zeros(STEPS, ENVS), torch.zeros(STEPS, ENVS, dtype=torch.bool)
    end, word = np.full(ENVS, envs.unwrapped.eos_token_id), np.ones(ENVS, dtype=np.int64)

    def step(t, actions):
        *_, infos = envs.step(actions)
        relabel(rewards, t, infos, known)

    for rollout in range(2):  # with the last one's marks in the arrays
        envs.reset(options={"response_prefix": [[3, 4]] * ENVS})
        step(0, end)  # 3 tokens, and the arrays begin with the last
        assert np.asarray(known).any(1).tolist() == [True, *[bool(rollout)] * 2, *[False] * (STEPS - 3)]
        np.testing.assert_allclose(rewards[0], true_reward(end, np.full(ENVS, 2)), rtol=1e-6)
        envs.reset(options={"response_prefix": [*[None] * (ENVS - 1), [3, 4]]})
        step(1, word)
        with pytest.raises(gym.error.Error, match=r"row 4 ended an episode of 4 tokens in step 2.*response_prefix"):
            step(2, end)
        np.testing.assert_allclose(rewards[0], true_reward(end, np.full(ENVS, 2)), rtol=1e-6)


def test_marking_reaches_environments_in_gymnasiums_vector_environment():
    envs = sync("NextStep")
    mark_token_rewards_read(envs)
    assert all(env.unwrapped.token_rewards_read for env in envs.envs)
    envs = workers("NextStep")
    mark_token_rewards_read(envs)
    assert all(envs.get_attr("token_rewards_read"))
    envs.close()
    envs = native("SameStep")
    mark_token_rewards_read(envs)
    assert envs.unwrapped.token_rewards_read
