"""On-policy SB3: every row of the rollout buffer holds the true token reward, and the advantages follow."""

from collections import Counter
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("sb3_contrib")
from sb3_contrib import ARS, TRPO, MaskablePPO, RecurrentPPO
from sb3_ledger import TOY, After, Before, Ledger, vec_env
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from tokenmdp.interop.sb3 import GymVectorToSB3, TokenRewardCallback
from tokenmdp.wrappers import SparseReward, UniformReward, UnreadTokenRewards, vector
from tokenmdp.wrappers.base import CreditWrapper

pytestmark = pytest.mark.filterwarnings(
    "error:.*episodes ended unread", "ignore:.*truncated mini-batch", "ignore:You have specified a mini-batch size"
)
ALGORITHMS = {
    PPO: {"batch_size": 64, "n_epochs": 1},
    A2C: {},
    TRPO: {"batch_size": 64, "n_critic_updates": 1},
    MaskablePPO: {"batch_size": 64, "n_epochs": 1},
    RecurrentPPO: {"batch_size": 64, "n_epochs": 1, "policy_kwargs": {"lstm_hidden_size": 8}},
}
N_STEPS, ROLLOUTS, N_ENVS = 53, 5, 4  # 1060 rows; 53 cuts most rollouts off in mid-episode
GAMMA, LAMBDA, BATCH = 0.97, 0.9, 50


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.setattr(CreditWrapper, "readers", set())


def make_model(algorithm, envs, **arguments):
    policy = "MultiInputLstmPolicy" if algorithm is RecurrentPPO else "MultiInputPolicy"
    arguments = {"n_steps": N_STEPS, "gamma": GAMMA, "gae_lambda": LAMBDA} | ALGORITHMS[algorithm] | arguments
    arguments["policy_kwargs"] = {"net_arch": [16]} | arguments.get("policy_kwargs", {})
    return algorithm(policy, envs, seed=1, device="cpu", **arguments)


def train(algorithm, kind, mode="complete", look=None, normalize=None, **arguments):
    """A trained model, its ledger and a snapshot a rollout."""
    masked = algorithm is MaskablePPO
    ledger = vec_env(kind, N_ENVS, min_new_tokens=2 if masked else 0, **arguments)
    envs = ledger if normalize is None else VecNormalize(ledger, **normalize)
    model = make_model(algorithm, envs)
    before = Before(ledger)
    callbacks = [before, TokenRewardCallback(mode), After(before, look)]
    model.learn(N_STEPS * N_ENVS * ROLLOUTS, callback=callbacks, log_interval=None)
    ledger.close()
    return model, ledger, before.snapshots


def truth(ledger, snapshot):
    steps = slice(snapshot.first_step, snapshot.first_step + len(snapshot.arrays["rewards"]))
    assert np.array_equal(snapshot.arrays["actions"][..., 0], np.array(ledger.actions[steps]))
    assert np.array_equal(snapshot.arrays["input_ids"], [obs["input_ids"] for obs in ledger.obs[steps]])
    return np.array(ledger.rewards[steps]) * snapshot.scale, np.array(ledger.dones[steps])


def check_advantages(snapshot, rewards, dones, kept):
    """Advantages as sums of discounted TD errors to the episode's end, or to the end of the rollout and its value."""
    values = np.concatenate([snapshot.arrays["values"], snapshot.last_values[None]]).astype(np.float64)
    assert np.array_equal(snapshot.last_dones, dones[-1])
    for first, env in zip(*np.nonzero(kept), strict=True):
        total, discount = 0.0, 1.0
        for step in range(first, N_STEPS):
            following = 0.0 if dones[step, env] else values[step + 1, env]
            total += discount * (rewards[step, env] + GAMMA * following - values[step, env])
            discount *= GAMMA * LAMBDA
            if dones[step, env]:
                break
        assert snapshot.arrays["advantages"][first, env] == pytest.approx(total, abs=1e-4), (first, env)
    np.testing.assert_allclose(
        snapshot.arrays["returns"], snapshot.arrays["advantages"] + snapshot.arrays["values"], atol=1e-5
    )


def check_complete(ledger, snapshots):
    assert len(snapshots) == ROLLOUTS
    rows = straddling = 0
    for snapshot in snapshots:
        rewards, dones = truth(ledger, snapshot)
        assert np.isfinite(rewards).all()  # every stored row belongs to an episode that was played to its end
        wrong = ~np.isclose(snapshot.arrays["rewards"], rewards, rtol=1e-5, atol=1e-6)
        assert wrong.sum() == 0
        assert snapshot.arrays["episode_starts"][0].all()
        assert np.array_equal(snapshot.arrays["episode_starts"][1:], dones[:-1])
        check_advantages(snapshot, rewards, dones, np.ones_like(dones))
        rows += rewards.size
        straddling += (~dones[-1]).sum()
    assert rows >= 1000
    assert straddling >= ROLLOUTS


@pytest.mark.parametrize("kind", ["dummy", "bridge"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_row_is_exact_and_the_advantages_follow(algorithm, kind):
    _, ledger, snapshots = train(algorithm, kind)
    check_complete(ledger, snapshots)


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_every_row_is_exact_with_environments_in_other_processes(algorithm):
    _, ledger, snapshots = train(algorithm, "fork")
    check_complete(ledger, snapshots)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_under_vecnormalize_all_rows_of_a_rollout_have_one_scale(norm_reward):
    _, ledger, snapshots = train(PPO, "dummy", normalize={"norm_obs": False, "norm_reward": norm_reward})
    assert all((snapshot.scale != 1.0) == norm_reward for snapshot in snapshots)
    check_complete(ledger, snapshots)


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO, RecurrentPPO])
def test_the_bridge_trains_the_same_model_as_single_environments(algorithm):
    model, _, snapshots = train(algorithm, "dummy")
    other, _, others = train(algorithm, "bridge")
    for one, two in zip(snapshots, others, strict=True):
        assert all(np.array_equal(one.arrays[name], two.arrays[name]) for name in one.arrays)
    for one, two in zip(model.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def minibatches(model, snapshot):
    """(value, action, advantage) of every row that training draws; its log-probabilities are those of the sampler."""
    snapshot.drawn = Counter()
    for batch in model.rollout_buffer.get(BATCH):
        extra = {"action_masks": batch.action_masks} if isinstance(model, MaskablePPO) else {}
        mask = torch.ones_like(batch.returns, dtype=torch.bool)
        if isinstance(model, RecurrentPPO):
            extra, mask = {"lstm_states": batch.lstm_states, "episode_starts": batch.episode_starts}, batch.mask > 0.5
        with torch.no_grad():
            logprobs = model.policy.evaluate_actions(batch.observations, batch.actions.long().flatten(), **extra)[1]
        torch.testing.assert_close(logprobs[mask], batch.old_log_prob[mask], atol=1e-5, rtol=1e-4)
        columns = (batch.old_values, batch.actions.flatten(), batch.advantages)
        snapshot.drawn.update(zip(*(column[mask].tolist() for column in columns), strict=True))


def ended_later(dones):
    """(n_steps, N) bool: rows whose episode ends in the rollout."""
    return np.flip(np.maximum.accumulate(np.flip(dones, 0), 0), 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_drop_trains_on_episodes_that_ended_and_on_nothing_else(algorithm):
    _, ledger, snapshots = train(algorithm, "dummy", mode="drop", look=minibatches)
    rows = carried_over = 0
    for snapshot in snapshots:
        rewards, dones = truth(ledger, snapshot)
        arrays, kept = snapshot.arrays, ended_later(dones)
        assert (~np.isclose(arrays["rewards"], rewards, rtol=1e-5, atol=1e-6))[kept].sum() == 0
        check_advantages(snapshot, rewards, dones, kept)
        assert not arrays["rewards"][~kept].any()
        assert not arrays["advantages"][~kept].any()
        assert np.array_equal(arrays["returns"][~kept], arrays["values"][~kept])
        columns = (arrays["values"], arrays["actions"][..., 0], arrays["advantages"])
        expected = Counter(zip(*(column[kept].tolist() for column in columns), strict=True))
        assert snapshot.drawn <= expected
        assert (expected - snapshot.drawn).total() == (kept.sum() % BATCH == 1)  # a single row makes no minibatch
        rows += kept.sum()
        carried_over += (arrays["episode_starts"][0] == 0).sum()
    assert rows >= 900
    assert carried_over >= ROLLOUTS


def test_without_the_callback_most_rows_are_wrong():
    ledger = vec_env("dummy", N_ENVS)
    before = Before(ledger)
    model = make_model(PPO, ledger)
    with pytest.warns(UnreadTokenRewards, match=r"callback=TokenRewardCallback\(\).*TokenRewardReplayBuffer"):
        model.learn(N_STEPS * N_ENVS * 3, callback=[before, After(before)])
    rewards, _ = truth(ledger, before.snapshots[0])
    assert (~np.isclose(before.snapshots[0].arrays["rewards"], rewards, atol=1e-6)).mean() > 0.9


@pytest.mark.parametrize("kind", ["dummy", "fork", "bridge"])
def test_the_environments_are_told_that_somebody_reads(kind):
    ledger = vec_env(kind, 2)
    make_model(PPO, ledger, n_steps=16, batch_size=16).learn(32, callback=TokenRewardCallback())
    if kind == "fork":
        assert ledger.get_attr("token_rewards_read") == [True, True]
    else:
        inner = ledger.venv
        bases = [inner.envs.unwrapped] if kind == "bridge" else [env.unwrapped for env in inner.envs]
        assert all(base.token_rewards_read for base in bases)
    ledger.close()


def test_learning_goes_on_in_a_second_call():
    for mode in ("complete", "drop"):
        ledger = vec_env("dummy", 2)
        model = make_model(PPO, ledger)
        for _ in range(3):
            before = Before(ledger)
            callbacks = [before, TokenRewardCallback(mode), After(before)]
            model.learn(N_STEPS * 2, callback=callbacks, reset_num_timesteps=False, log_interval=None)
            rewards, dones = truth(ledger, before.snapshots[0])
            kept = ended_later(dones) | (mode == "complete")
            assert np.allclose(before.snapshots[0].arrays["rewards"][kept], rewards[kept], rtol=1e-5, atol=1e-6)
        assert "get" not in vars(model.rollout_buffer)


@pytest.mark.parametrize("algorithm", [MaskablePPO, RecurrentPPO])
def test_the_completion_samples_as_the_rollout_does(algorithm, monkeypatch):
    ledger = vec_env("dummy", N_ENVS, min_new_tokens=2 if algorithm is MaskablePPO else 0)
    model = make_model(algorithm, ledger)
    predict, calls, at_the_cut = model.predict, [], []

    def spy(obs, **arguments):
        if algorithm is MaskablePPO:
            assert np.array_equal(arguments["action_masks"], np.stack(ledger.env_method("action_masks")))
        actions, state = predict(obs, **arguments)
        calls.append((arguments["state"], state))
        assert arguments.get("deterministic", False) is False
        return actions, state

    class Cut(Before):
        def _on_rollout_end(self):
            if algorithm is RecurrentPPO:
                at_the_cut.append([layer.numpy().copy() for layer in self.model._last_lstm_states.pi])

    monkeypatch.setattr(model, "predict", spy)
    model.learn(N_STEPS * N_ENVS, callback=[Cut(ledger), TokenRewardCallback()], log_interval=None)
    assert len(calls) >= 2
    if algorithm is RecurrentPPO:
        assert np.array_equal(calls[0][0], at_the_cut[0])
        assert all(before is after for (_, before), (after, _) in pairwise(calls))


def test_an_interrupted_run_leaves_no_rows_out_of_the_next():
    model = make_model(PPO, vec_env("dummy", N_ENVS))

    def interrupt(model, _):
        assert "get" in vars(model.rollout_buffer)
        raise KeyboardInterrupt

    before = Before(model.get_env())
    with pytest.raises(KeyboardInterrupt):
        model.learn(N_STEPS * N_ENVS, callback=[before, TokenRewardCallback("drop"), After(before, interrupt)])
    seen = []
    callbacks = [before, TokenRewardCallback(), After(before, lambda model, _: seen.extend(vars(model.rollout_buffer)))]
    model.learn(N_STEPS * N_ENVS, callback=callbacks)
    assert "rewards" in seen
    assert "get" not in seen


def test_the_log_says_what_the_cut_cost():
    for mode, key, at_most in (("complete", "completion_steps", 7), ("drop", "dropped_rows", 7 * N_ENVS)):
        model = make_model(PPO, vec_env("dummy", N_ENVS))
        model.learn(N_STEPS * N_ENVS, callback=TokenRewardCallback(mode), log_interval=None)
        assert 1 <= model.logger.name_to_value[f"rollout/{key}"] <= at_most
        ended = [info["l"] for info in model.ep_info_buffer]
        assert sum(ended) >= N_STEPS * N_ENVS or mode == "drop"


def tiny(algorithm, envs, **arguments):
    return algorithm("MultiInputPolicy", envs, device="cpu", **arguments)


def toy_envs(n_envs=2, wrapper=UniformReward, **arguments):
    return make_vec_env(TOY, n_envs, wrapper_class=wrapper, **arguments)


def test_no_credit_wrapper_is_refused():
    bridge = GymVectorToSB3(gym.make_vec(TOY, num_envs=2, autoreset_mode="SameStep"))
    for envs in (toy_envs(wrapper=None), bridge):
        with pytest.raises(ValueError, match=r"environment 0 .*no credit wrapper.*SparseReward\(env\)"):
            tiny(PPO, envs).learn(8, callback=TokenRewardCallback())


def test_a_time_limit_is_refused():
    def limited():
        return SparseReward(gym.make(TOY, max_episode_steps=5))

    with pytest.raises(ValueError, match=r"TimeLimit.*without max_episode_steps"):
        tiny(PPO, make_vec_env(limited, 2)).learn(8, callback=TokenRewardCallback())


def test_normalized_observations_are_refused():
    envs = VecNormalize(Ledger(toy_envs()), norm_obs=True)
    with pytest.raises(ValueError, match="norm_obs=False"):
        tiny(PPO, envs).learn(8, callback=TokenRewardCallback())


def test_algorithms_without_a_rollout_buffer_are_refused():
    with pytest.raises(TypeError, match=r"DQN learns from a replay buffer.*TokenRewardReplayBuffer"):
        tiny(DQN, toy_envs(), buffer_size=100).learn(8, callback=TokenRewardCallback())
    with pytest.raises(TypeError, match="ARS has no rollout buffer"):
        ARS("MlpPolicy", "CartPole-v1", device="cpu").learn(8, callback=TokenRewardCallback())


def test_drop_refuses_rollouts_shorter_than_an_episode():
    for n_steps in (3, 7):
        with pytest.raises(ValueError, match=f"n_steps={n_steps} .*make n_steps"):
            tiny(A2C, toy_envs(4), n_steps=n_steps).learn(2000, callback=TokenRewardCallback("drop"))


def test_complete_warns_of_rollouts_shorter_than_an_episode_and_stays_exact():
    ledger = vec_env("dummy", 2, horizon_range=None)
    model = make_model(A2C, ledger, n_steps=5)
    before = Before(ledger)
    with pytest.warns(UserWarning, match=r"n_steps=5 .*tokens from 5 on are never trained on"):
        model.learn(100, callback=[before, TokenRewardCallback(), After(before)])
    for snapshot in before.snapshots:
        rewards, _ = truth(ledger, snapshot)
        np.testing.assert_allclose(snapshot.arrays["rewards"], rewards, rtol=1e-5, atol=1e-6)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'carry' is none of 'complete', 'drop'"):
        TokenRewardCallback("carry")


def test_monitors_that_forbid_early_resets_say_so():
    envs = toy_envs(monitor_kwargs={"allow_early_resets": False})
    with pytest.raises(RuntimeError, match="allow_early_resets=True"):
        tiny(PPO, envs, n_steps=13, batch_size=26).learn(104, callback=TokenRewardCallback())


def test_a_batch_wrapped_by_gymnasium_too_is_found():
    envs = gym.make_vec(TOY, num_envs=2, autoreset_mode="SameStep")
    envs = gym.wrappers.vector.RecordEpisodeStatistics(vector.UniformReward(envs))
    model = tiny(PPO, GymVectorToSB3(envs), n_steps=16, batch_size=32, n_epochs=1)
    model.learn(64, callback=TokenRewardCallback())
    assert envs.unwrapped.token_rewards_read
