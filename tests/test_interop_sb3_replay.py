"""Off-policy SB3: an episode enters the replay buffer when it ends, with its true token rewards."""

from collections import defaultdict

import gymnasium as gym
import numpy as np
import pytest
from doubles import SB3

pytest.importorskip("sb3_contrib", reason=SB3)
from sb3_contrib import QRDQN
from sb3_ledger import PROMPT_SLOTS, TOY, InMidText, credited, vec_env
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from tokenmdp.interop.sb3 import TokenRewardReplayBuffer, mark_token_rewards_read
from tokenmdp.wrappers import SparseReward, UniformReward
from tokenmdp.wrappers.base import CreditWrapper

pytestmark = pytest.mark.filterwarnings("error:.*episodes ended unread")
N_ENVS, STEPS = 4, 200


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.setattr(CreditWrapper, "readers", set())


def make_model(algorithm, envs, **arguments):
    arguments = {"buffer_size": 5000, "learning_starts": 64, "train_freq": 16, "batch_size": 16} | arguments
    return algorithm(
        "MultiInputPolicy",
        envs,
        replay_buffer_class=TokenRewardReplayBuffer,
        policy_kwargs={"net_arch": [16]},
        exploration_fraction=0.9,
        seed=1,
        device="cpu",
        **arguments,
    )


def finished(ledger):
    """(observation, next observation, action, reward, done) of every row, in the order in which episodes ended."""
    rows, open_steps = [], [[] for _ in range(ledger.num_envs)]
    for step, dones in enumerate(ledger.dones):
        for env, steps in enumerate(open_steps):
            steps.append(step)
            if not dones[env]:
                continue
            for where in steps:
                ended = where == step
                after = ledger.terminal[where][env]["input_ids"] if ended else ledger.obs[where + 1]["input_ids"][env]
                before = ledger.obs[where]["input_ids"][env]
                rows.append((before, after, ledger.actions[where][env], ledger.rewards[where][env], float(ended)))
            steps.clear()
    return [np.array(column) for column in zip(*rows, strict=True)]


def check_rows(buffer, ledger):
    before, after, actions, rewards, dones = finished(ledger)
    rows = buffer.size()
    assert rows == len(rewards) >= 700
    assert rows + buffer.num_open_rows == len(ledger.obs) * ledger.num_envs
    assert (~np.isclose(buffer.rewards[:rows, 0], rewards, rtol=1e-5, atol=1e-6)).sum() == 0
    assert np.array_equal(buffer.observations["input_ids"][:rows, 0], before)
    assert np.array_equal(buffer.next_observations["input_ids"][:rows, 0], after)
    assert np.array_equal(buffer.actions[:rows, 0, 0], actions)
    assert np.array_equal(buffer.dones[:rows, 0], dones)
    assert not buffer.timeouts.any()


@pytest.mark.parametrize("kind", ["dummy", "fork", "bridge"])
@pytest.mark.parametrize("algorithm", [DQN, QRDQN])
def test_every_row_is_exact(algorithm, kind):
    ledger = vec_env(kind, N_ENVS)
    if kind == "fork":
        mark_token_rewards_read(ledger)
        assert ledger.get_attr("token_rewards_read") == [True] * N_ENVS
    model = make_model(algorithm, ledger)
    model.learn(STEPS * N_ENVS, log_interval=None)
    ledger.close()
    check_rows(model.replay_buffer, ledger)
    cuts = ~np.array(ledger.dones)[15:-1:16]  # (rollouts, N): where training came in mid-episode
    assert cuts.sum() >= len(cuts) > 10


def test_every_row_is_exact_where_episodes_begin_in_mid_text():
    ledger = vec_env("dummy", N_ENVS, around=InMidText, horizon_range=None)
    model = make_model(DQN, ledger)
    model.learn(STEPS * N_ENVS, log_interval=None)
    check_rows(model.replay_buffer, ledger)
    rows = model.replay_buffer.size()
    starts = np.flatnonzero(model.replay_buffer.dones[: rows - 1, 0]) + 1
    prefixes = model.replay_buffer.observations["attention_mask"][starts, 0, PROMPT_SLOTS:].sum(-1)
    assert set(prefixes.tolist()) == {0, 1, 2, 3}


def n_step_rows(rows, n_steps):
    """(return, last observation, whether the text ends there) of every row, one addition at a time."""
    _, after, _, rewards, dones = rows
    for first in range(len(rewards)):
        total, last = 0.0, first
        for step in range(n_steps):
            total += 0.9**step * rewards[first + step]
            last = first + step
            if dones[last]:
                break
        yield total, after[last], dones[last]


@pytest.mark.parametrize("algorithm", [DQN, QRDQN])
@pytest.mark.parametrize(("n_steps", "size"), [(3, 5000), (20, 5000), (3, 101)])
def test_n_step_returns_add_up_token_rewards_to_the_end_of_the_text(algorithm, n_steps, size):
    ledger = vec_env("dummy", N_ENVS)
    discounting = {"n_steps": n_steps, "gamma": 0.9}
    model = make_model(algorithm, ledger, gamma=0.9, buffer_size=size, replay_buffer_kwargs=discounting)
    model.learn(STEPS * N_ENVS, log_interval=None)
    buffer = model.replay_buffer
    rows = buffer.size()
    returns, after, ends = zip(*list(n_step_rows(finished(ledger), n_steps))[-rows:], strict=True)
    samples = buffer._get_samples((np.arange(rows) + buffer.pos) % rows if buffer.full else np.arange(rows))
    np.testing.assert_allclose(samples.rewards[:, 0], returns, rtol=1e-4, atol=1e-5)
    assert np.array_equal(samples.next_observations["input_ids"], after)
    assert np.array_equal(samples.dones[:, 0], ends)
    assert samples.discounts.numpy() == pytest.approx(0.9**n_steps)
    assert samples.discounts.shape == samples.rewards.shape == (rows, 1)


def test_n_step_returns_are_asked_of_the_buffer():
    with pytest.warns(UserWarning, match=r'`replay_buffer_kwargs=\{"n_steps": 3, "gamma": 0.99\}`'):
        make_model(DQN, toy_envs(), n_steps=3)
    for wrong in ({"n_steps": 3}, {"n_steps": 0, "gamma": 0.9}):
        with pytest.raises(ValueError, match=r"n_steps=. and gamma=.*the model's own gamma"):
            make_model(DQN, toy_envs(), replay_buffer_kwargs=wrong)


def test_what_is_sampled_are_the_rows():
    ledger = vec_env("dummy", N_ENVS)
    model = make_model(DQN, ledger)
    model.learn(STEPS * N_ENVS, log_interval=None)
    before, _, actions, rewards, _ = finished(ledger)
    true = defaultdict(list)
    for obs, action, reward in zip(before.tolist(), actions, rewards, strict=True):
        true[(*obs, action)].append(reward)  # the same row may have had several futures, and so several rewards
    sample = model.replay_buffer.sample(500)
    assert sample.rewards.shape == (500, 1)
    for obs, action, reward in zip(sample.observations["input_ids"], sample.actions, sample.rewards, strict=True):
        assert np.isclose(reward.item(), true[(*obs.int().tolist(), action.item())], rtol=1e-5, atol=1e-6).any()


def test_under_vecnormalize_rewards_are_stored_as_they_are_and_scaled_when_sampled():
    ledger = vec_env("dummy", N_ENVS)
    envs = VecNormalize(ledger, norm_obs=False)
    model = make_model(DQN, envs)
    model.learn(STEPS * N_ENVS, log_interval=None)
    check_rows(model.replay_buffer, ledger)
    raw = set(envs.normalize_reward(model.replay_buffer.rewards[: model.replay_buffer.size(), 0]).tolist())
    assert set(model.replay_buffer.sample(200, env=envs).rewards.flatten().tolist()) <= raw


def test_a_full_buffer_forgets_the_oldest_rows():
    ledger = vec_env("dummy", N_ENVS)
    model = make_model(DQN, ledger, buffer_size=101)
    model.learn(STEPS * N_ENVS, log_interval=None)
    buffer, rewards = model.replay_buffer, finished(ledger)[3]
    assert (buffer.full, buffer.size()) == (True, 101)
    np.testing.assert_allclose(np.roll(buffer.rewards[:, 0], -buffer.pos), rewards[-101:], rtol=1e-5, atol=1e-6)


def test_a_reset_in_mid_episode_leaves_no_row_behind():
    ledger = vec_env("dummy", N_ENVS)
    model = make_model(DQN, ledger)
    for _ in range(10):
        model.learn(13 * N_ENVS, log_interval=None)  # resets the environments, whatever they are at
    buffer = model.replay_buffer
    rows = buffer.size()
    ends = np.flatnonzero(buffer.dones[:rows, 0])
    starts = np.concatenate([[0], ends[:-1] + 1])
    prompts = buffer.observations["attention_mask"][:rows, 0]
    assert not prompts[starts, 4:].any()  # each begins with nothing but its prompt
    assert np.array_equal(prompts[ends, 4:].sum(1), ends - starts)
    assert len(ends) > 50
    for first, last in zip(starts, ends, strict=True):
        text = {key: column[last, 0] for key, column in buffer.next_observations.items()}
        np.testing.assert_allclose(buffer.rewards[first : last + 1, 0], credited(text), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefixes", [False, True])
def test_the_rows_of_a_text_that_was_not_finished_are_dropped(prefixes):
    ledger = vec_env("dummy", N_ENVS, around=InMidText if prefixes else None, horizon_range=None)
    model = make_model(DQN, ledger)
    for _ in range(10):
        model.learn(13 * N_ENVS, log_interval=None)
    true = defaultdict(list)
    for obs, rewards, actions in zip(ledger.obs, ledger.rewards, ledger.actions, strict=True):
        for row in range(N_ENVS):
            if np.isfinite(rewards[row]):
                true[(*obs["input_ids"][row], actions[row])].append(rewards[row])
    buffer, rows = model.replay_buffer, model.replay_buffer.size()
    assert rows == sum(map(len, true.values())) > 200
    columns = (buffer.observations["input_ids"], buffer.actions[:, 0, 0], buffer.rewards[:, 0])
    for obs, action, reward in zip(*(column[:rows] for column in columns), strict=True):
        assert np.isclose(reward, true[(*obs[0], action)], rtol=1e-5, atol=1e-6).any()


def test_save_and_load(tmp_path):
    ledger = vec_env("dummy", N_ENVS)
    model = make_model(DQN, ledger)
    checkpoints = CheckpointCallback(40, tmp_path, save_replay_buffer=True)
    model.learn(50 * N_ENVS, log_interval=None, callback=checkpoints)
    assert len(list(tmp_path.glob("*.pkl"))) == 1
    model.save_replay_buffer(tmp_path / "buffer")
    model.save(tmp_path / "model")
    assert model.replay_buffer.num_open_rows > 0

    again = vec_env("dummy", N_ENVS, seed=100)
    other = DQN.load(tmp_path / "model", env=again, device="cpu")
    other.load_replay_buffer(tmp_path / "buffer")
    buffer, rows = other.replay_buffer, model.replay_buffer.size()
    assert isinstance(buffer, TokenRewardReplayBuffer)
    assert (buffer.size(), buffer.num_open_rows) == (rows, 0)
    other.learn(STEPS * N_ENVS, log_interval=None)
    rewards = finished(again)[3]
    np.testing.assert_allclose(buffer.rewards[rows : buffer.size(), 0], rewards, rtol=1e-5, atol=1e-6)


def test_a_saved_buffer_goes_on_with_another_number_of_environments(tmp_path):
    model = make_model(DQN, vec_env("dummy", N_ENVS))
    model.learn(50 * N_ENVS, log_interval=None)
    model.save_replay_buffer(tmp_path / "buffer")
    fewer = vec_env("dummy", N_ENVS - 1, seed=100)
    other = make_model(DQN, fewer)
    other.load_replay_buffer(tmp_path / "buffer")
    buffer, rows = other.replay_buffer, model.replay_buffer.size()
    other.learn(50 * N_ENVS, log_interval=None)
    np.testing.assert_allclose(buffer.rewards[rows : buffer.size(), 0], finished(fewer)[3], rtol=1e-5, atol=1e-6)
    other.replay_buffer = model.replay_buffer
    assert model.replay_buffer.num_open_rows > 0
    with pytest.raises(ValueError, match=r"a step of 3 environments, and \d+ rows of 4 others wait.*save and load"):
        other.learn(50 * N_ENVS, log_interval=None)


def toy_envs(wrapper=UniformReward, **arguments):
    return make_vec_env(TOY, 2, wrapper_class=wrapper, **arguments)


class EvaluateOnTheTrainingEnvironments(BaseCallback):
    def _on_step(self):
        if self.n_calls % 5 == 0:
            evaluate_policy(self.model, self.training_env, 2)
        return True


def test_steps_outside_of_learn_are_noticed():
    model = make_model(DQN, vec_env("dummy", N_ENVS))
    with pytest.raises(ValueError, match=r"an episode of \d tokens ended in environment \d, and \d+ steps of it"):
        model.learn(STEPS * N_ENVS, callback=EvaluateOnTheTrainingEnvironments())


def test_sampling_before_an_episode_has_ended_says_what_to_do():
    model = make_model(DQN, toy_envs(), learning_starts=0, train_freq=1)
    with pytest.raises(ValueError, match=r"no episode has ended yet: .* rows of 2 .*learning_starts at least num_envs"):
        model.learn(64)


def test_one_finished_episode_is_enough_to_learn_from():
    envs = toy_envs(env_kwargs={"max_new_tokens": 3})
    model = make_model(DQN, envs, learning_starts=2 * 3, train_freq=1, batch_size=32)
    model.learn(12)
    assert 0 < model.replay_buffer.size() < 32


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"without info\['token_rewards'\].*SparseReward"):
        make_model(DQN, toy_envs(wrapper=None)).learn(64)

    def limited():
        return SparseReward(gym.make(TOY, max_episode_steps=2))

    with pytest.raises(ValueError, match=r"TimeLimit.*without max_episode_steps"):
        make_model(DQN, make_vec_env(limited, 2)).learn(64)
    with pytest.raises(ValueError, match="norm_obs=False"):
        make_model(DQN, VecNormalize(toy_envs(), norm_obs=True)).learn(256)
