"""On-policy SB3: every row of the rollout buffer holds the true token reward, and the advantages follow."""

from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from doubles import SB3

pytest.importorskip("sb3_contrib", reason=SB3)
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_ledger import (
    ALGORITHMS,
    GAMMA,
    LAMBDA,
    N_ENVS,
    N_STEPS,
    PROMPT_SLOTS,
    After,
    Before,
    InMidText,
    on_policy,
    vec_env,
)
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecNormalize

from tokenmdp.interop.sb3 import TokenRewardCallback
from tokenmdp.wrappers import UnreadTokenRewards
from tokenmdp.wrappers.base import CreditWrapper

pytestmark = pytest.mark.filterwarnings(
    "error:.*episodes ended unread", "ignore:.*truncated mini-batch", "ignore:You have specified a mini-batch size"
)
ROLLOUTS, BATCH = 3, 50  # 636 rows in all


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.setattr(CreditWrapper, "readers", set())


def train(algorithm, kind, mode="complete", look=None, normalize=None, n_envs=N_ENVS, **arguments):
    """A trained model, its ledger and a snapshot per rollout."""
    masked = algorithm is MaskablePPO
    ledger = vec_env(kind, n_envs, min_new_tokens=2 if masked else 0, **arguments)
    envs = ledger if normalize is None else VecNormalize(ledger, **normalize)
    model = on_policy(algorithm, envs)
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
    sums = snapshot.arrays["advantages"] + snapshot.arrays["values"]
    np.testing.assert_allclose(snapshot.arrays["returns"][kept], sums[kept], atol=1e-5)


def began(ledger):
    """The observations with which environment 0 began its episodes."""
    return [obs for dones, obs in zip(ledger.dones, ledger.obs[1:], strict=False) if dones[0]]


def check_complete(ledger, snapshots):
    assert len(snapshots) == ROLLOUTS * N_ENVS / ledger.num_envs
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
    assert rows >= 600
    assert straddling >= ROLLOUTS


@cache
def trained(algorithm, kind):
    """The same again for two tests, which only look."""
    return train(algorithm, kind)


KINDS = [(algorithm, kind) for algorithm in ALGORITHMS for kind in ("dummy", "bridge")]
KINDS += [(PPO, "fork"), (MaskablePPO, "fork")]  # masks come from the workers too


@pytest.mark.parametrize(("algorithm", "kind"), KINDS)
def test_every_row_is_exact_and_the_advantages_follow(algorithm, kind):
    _, ledger, snapshots = trained(algorithm, kind)
    check_complete(ledger, snapshots)


@pytest.mark.parametrize("algorithm", [PPO, MaskablePPO])
def test_every_row_is_exact_where_episodes_begin_in_mid_text(algorithm):
    _, ledger, snapshots = train(algorithm, "dummy", around=InMidText, horizon_range=None)
    check_complete(ledger, snapshots)
    prefixes = {int(obs["attention_mask"][0, PROMPT_SLOTS:].sum()) for obs in began(ledger)}
    assert prefixes == {0, 1, 2, 3}


@pytest.mark.parametrize("norm_reward", [True, False])
def test_under_vecnormalize_all_rows_of_a_rollout_have_one_scale(norm_reward):
    _, ledger, snapshots = train(PPO, "dummy", normalize={"norm_obs": False, "norm_reward": norm_reward})
    assert all((snapshot.scale != 1.0) == norm_reward for snapshot in snapshots)
    check_complete(ledger, snapshots)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_bridge_trains_the_same_model_as_single_environments(algorithm):
    model, _, snapshots = trained(algorithm, "dummy")
    other, _, others = trained(algorithm, "bridge")
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


DROPS = [(algorithm, "dummy", None) for algorithm in ALGORITHMS]
DROPS += [(PPO, "fork", None), (PPO, "bridge", None), (PPO, "dummy", InMidText)]


@pytest.mark.parametrize(("algorithm", "kind", "around"), DROPS)
def test_drop_trains_on_episodes_that_ended_and_on_nothing_else(algorithm, kind, around):
    starts = {"around": around, "horizon_range": None} if around else {}
    model, ledger, snapshots = train(algorithm, kind, mode="drop", look=minibatches, **starts)
    rows = carried_over = 0
    for snapshot in snapshots:
        rewards, dones = truth(ledger, snapshot)
        arrays, kept = snapshot.arrays, ended_later(dones)
        assert (~np.isclose(arrays["rewards"], rewards, rtol=1e-5, atol=1e-6))[kept].sum() == 0
        check_advantages(snapshot, rewards, dones, kept)
        assert not arrays["rewards"][~kept].any()
        assert not arrays["advantages"][~kept].any()
        columns = (arrays["values"], arrays["actions"][..., 0], arrays["advantages"])
        expected = Counter(zip(*(column[kept].tolist() for column in columns), strict=True))
        assert snapshot.drawn <= expected
        assert (expected - snapshot.drawn).total() == (kept.sum() % BATCH == 1)  # a single row makes no minibatch
        rows += kept.sum()
        carried_over += (arrays["episode_starts"][0] == 0).sum()
    assert rows >= 500
    assert carried_over >= ROLLOUTS
    assert not kept.all()
    returns, values = (arrays[name][kept] for name in ("returns", "values"))
    explained = 1 - np.var(returns - values) / np.var(returns)
    assert model.logger.name_to_value["train/explained_variance"] == pytest.approx(explained, abs=1e-4)


def test_without_the_callback_most_rows_are_wrong():
    ledger = vec_env("dummy", N_ENVS)
    before = Before(ledger)
    model = on_policy(PPO, ledger)
    with pytest.warns(UnreadTokenRewards, match=r"callback=TokenRewardCallback\(\).*TokenRewardReplayBuffer"):
        model.learn(N_STEPS * N_ENVS * 3, callback=[before, After(before)])
    rewards, _ = truth(ledger, before.snapshots[0])
    assert (~np.isclose(before.snapshots[0].arrays["rewards"], rewards, atol=1e-6)).mean() > 0.9


def test_learning_goes_on_in_a_second_call():
    for mode in ("complete", "drop"):
        ledger = vec_env("dummy", 2)
        model = on_policy(PPO, ledger)
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
    model = on_policy(algorithm, ledger)
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


def test_the_log_says_what_the_cut_cost():
    for mode, key, at_most in (("complete", "completion_steps", 7), ("drop", "dropped_rows", 7 * N_ENVS)):
        model = on_policy(PPO, vec_env("dummy", N_ENVS))
        model.learn(N_STEPS * N_ENVS, callback=TokenRewardCallback(mode), log_interval=None)
        assert 1 <= model.logger.name_to_value[f"rollout/{key}"] <= at_most
        ended = [info["l"] for info in model.ep_info_buffer]
        assert sum(ended) >= N_STEPS * N_ENVS or mode == "drop"


def test_complete_warns_of_rollouts_shorter_than_an_episode_and_stays_exact():
    ledger = vec_env("dummy", 2, horizon_range=None)
    model = on_policy(A2C, ledger, n_steps=5)
    before = Before(ledger)
    with pytest.warns(UserWarning, match=r"n_steps=5 .*tokens from 5 on are never trained on"):
        model.learn(100, callback=[before, TokenRewardCallback(), After(before)])
    for snapshot in before.snapshots:
        rewards, _ = truth(ledger, snapshot)
        np.testing.assert_allclose(snapshot.arrays["rewards"], rewards, rtol=1e-5, atol=1e-6)
