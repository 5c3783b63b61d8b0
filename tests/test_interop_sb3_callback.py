"""The callback beyond relabelling: what it refuses, what it tells the environments, what an interruption leaves."""

import copy
import itertools
import pickle
from weakref import WeakSet

import gymnasium as gym
import numpy as np
import pytest
from doubles import SB3

pytest.importorskip("sb3_contrib", reason=SB3)
from sb3_contrib import ARS, RecurrentPPO
from sb3_ledger import ALGORITHMS, N_ENVS, N_STEPS, TOY, After, Before, Ledger, on_policy, vec_env
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from tokenmdp.interop.sb3 import GymVectorToSB3, TokenRewardCallback, mark_token_rewards_read
from tokenmdp.wrappers import SparseReward, UniformReward, UnreadTokenRewards, vector
from tokenmdp.wrappers.base import CreditWrapper

pytestmark = pytest.mark.filterwarnings(
    "error:.*episodes ended unread", "ignore:.*truncated mini-batch", "ignore:You have specified a mini-batch size"
)


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.setattr(CreditWrapper, "readers", WeakSet())


class At(BaseCallback):
    """Do something when a rollout ends."""

    def __init__(self, action):
        super().__init__()
        self.action = action

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.action(self.model)


def interrupt(model):
    raise KeyboardInterrupt


def said(envs):
    """The environments' values of `token_rewards_read`."""
    return envs.get_attr("token_rewards_read")


@pytest.mark.parametrize("kind", ["dummy", "fork", "bridge"])
def test_nobody_warns_while_the_callback_learns(kind, capfd):
    ledger, heard = vec_env(kind, 2), []
    callbacks = [TokenRewardCallback(), At(lambda model: heard.append(said(ledger)))]
    on_policy(PPO, ledger, n_steps=64).learn(512, callback=callbacks)
    after = said(ledger)
    ledger.close()
    assert after == [False, False]
    assert heard == [[kind == "fork"] * 2] * 4  # only other processes have to be told
    assert "unread" not in capfd.readouterr().err


@pytest.mark.parametrize("end", ["ends", "is stopped", "is interrupted"])
@pytest.mark.parametrize("kind", ["dummy", "bridge"])
def test_a_run_without_the_callback_warns_after_one_that(end, kind):
    envs = vec_env(kind, 2)
    model, ours = on_policy(PPO, envs, n_steps=64), TokenRewardCallback()
    if end == "ends":
        model.learn(512, callback=ours)
    elif end == "is stopped":
        model.learn(512, callback=[ours, StopTrainingOnMaxEpisodes(40)])
    else:
        with pytest.raises(KeyboardInterrupt):
            model.learn(512, callback=[ours, At(interrupt)])
    with pytest.warns(UnreadTokenRewards):
        model.learn(512)


def test_environments_in_other_processes_say_again_what_they_said_before():
    envs = vec_env("fork", 2)
    model = on_policy(PPO, envs, n_steps=16)
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, callback=[TokenRewardCallback(), At(interrupt)])
    assert said(envs) == [True, True]  # nothing tells them
    model.learn(64, callback=TokenRewardCallback())  # but the next run knows that they did not set this themselves
    assert said(envs) == [False, False]
    envs.env_method("set_wrapper_attr", "token_rewards_read", True, indices=1)
    model.learn(64, callback=TokenRewardCallback())
    assert said(envs) == [False, True]
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, callback=[TokenRewardCallback(), At(interrupt)])
    mark_token_rewards_read(envs)
    model.learn(64, callback=TokenRewardCallback())
    assert said(envs) == [True, True]
    envs.close()


@pytest.fixture
def interrupted():
    """A model whose training was interrupted when some rows were to be left out."""
    model = on_policy(PPO, vec_env("dummy"))
    with pytest.raises(KeyboardInterrupt):
        model.learn(N_STEPS * N_ENVS, callback=[TokenRewardCallback("drop"), At(interrupt)])
    drawn = sum(len(batch.actions) for batch in model.rollout_buffer.get(50))
    assert 0 < drawn < N_STEPS * N_ENVS
    return model


@pytest.mark.parametrize("callback", [None, TokenRewardCallback()], ids=["none", "complete"])
def test_the_run_after_an_interrupted_one_trains_on_every_row(interrupted, callback, monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned", True)  # about what does not concern the buffer
    buffer, drawn = interrupted.rollout_buffer, []
    draw = type(buffer)._get_samples
    monkeypatch.setattr(type(buffer), "_get_samples", lambda self, rows: drawn.append(len(rows)) or draw(self, rows))
    interrupted.learn(N_STEPS * N_ENVS * 2, callback=callback)
    assert sum(drawn) == N_STEPS * N_ENVS * 2
    assert "get" not in vars(buffer)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_buffer_that_was_put_away_holds_every_row(algorithm, tmp_path):
    envs, kept = vec_env("dummy"), []

    def put_away(model):
        assert "get" in vars(model.rollout_buffer)
        model.save(tmp_path / "model", include=["rollout_buffer"])
        kept.extend([pickle.loads(pickle.dumps(model.rollout_buffer)), copy.deepcopy(model.rollout_buffer)])

    on_policy(algorithm, envs).learn(N_STEPS * N_ENVS, callback=[TokenRewardCallback("drop"), At(put_away)])
    for buffer in kept:
        (batch,) = buffer.get(N_STEPS * N_ENVS)
        rows = batch.mask.sum() if algorithm is RecurrentPPO else len(batch.advantages)
        assert rows == N_STEPS * N_ENVS
    algorithm.load(tmp_path / "model", env=envs, device="cpu").learn(N_STEPS * N_ENVS, callback=TokenRewardCallback())


def test_checkpoints_in_the_middle_of_drop(tmp_path):
    model = on_policy(PPO, vec_env("dummy"))
    callbacks = [TokenRewardCallback("drop"), CheckpointCallback(20, tmp_path)]
    model.learn(N_STEPS * N_ENVS * 2, callback=callbacks)
    files = sorted(tmp_path.glob("*.zip"))
    assert len(files) == 5
    again = PPO.load(files[-1], env=vec_env("dummy"), device="cpu")
    again.learn(N_STEPS * N_ENVS, callback=TokenRewardCallback())


def test_an_interruption_while_episodes_are_completed_leads_to_a_reset(monkeypatch):
    ledger = vec_env("dummy")
    model = on_policy(PPO, ledger)
    with monkeypatch.context() as patch:
        patch.setattr(model, "predict", lambda *_, **__: interrupt(model))
        with pytest.raises(KeyboardInterrupt):
            model.learn(N_STEPS * N_ENVS, callback=TokenRewardCallback())
    before = Before(ledger)
    callbacks = [before, TokenRewardCallback(), After(before)]
    model.learn(N_STEPS * N_ENVS, callback=callbacks, reset_num_timesteps=False)
    (snapshot,) = before.snapshots
    steps = slice(snapshot.first_step, snapshot.first_step + N_STEPS)
    np.testing.assert_allclose(snapshot.arrays["rewards"], ledger.rewards[steps], rtol=1e-5, atol=1e-6)
    assert snapshot.arrays["episode_starts"][0].all()


def test_two_of_them_are_refused():
    model = tiny(PPO, toy_envs(), n_steps=16, batch_size=16)
    pairs = [[TokenRewardCallback(), TokenRewardCallback("drop")]]
    pairs += [[pairs[0][0], CallbackList([At(len), pairs[0][1]])], CallbackList(pairs[0])]
    for pair in pairs:
        with pytest.raises(ValueError, match=r"2 TokenRewardCallbacks \(modes 'complete', 'drop'\) in one learn"):
            model.learn(8, callback=pair)
    tiny(PPO, toy_envs(), n_steps=16, batch_size=16).learn(16, callback=pairs[0][0])


def test_one_that_would_not_be_told_of_the_end_of_a_rollout_is_refused():
    for inner in (TokenRewardCallback(), CallbackList([TokenRewardCallback()])):
        with pytest.raises(ValueError, match=r"inside EveryNTimesteps.*pass it to learn\(\) itself"):
            tiny(PPO, toy_envs()).learn(8, callback=EveryNTimesteps(4, inner))


class Scripted(gym.ActionWrapper):
    """Texts of 1 token and of 8 tokens in turn, whatever the policy chooses."""

    def __init__(self, env):
        super().__init__(env)
        self.tokens = itertools.cycle([env.unwrapped.eos_token_id, *range(8)])

    def action(self, action):
        return next(self.tokens)


def test_drop_refuses_to_train_on_a_single_row():
    envs = toy_envs(1, wrapper=lambda env: Scripted(UniformReward(env)))
    with pytest.raises(ValueError, match=r"only 1 of the 8 rows .*n_steps=8, n_envs=1.*make n_steps several times"):
        tiny(PPO, envs, n_steps=8, batch_size=8).learn(8, callback=TokenRewardCallback("drop"))
    model = tiny(PPO, envs, n_steps=9, batch_size=9)
    model.learn(9, callback=TokenRewardCallback("drop"))
    assert model.logger.name_to_value.get("rollout/dropped_rows", 0) == 0


def test_steps_outside_of_learn_are_noticed():
    class Evaluation(BaseCallback):
        def _on_step(self):
            if self.n_calls % 5 == 0:
                evaluate_policy(self.model, self.training_env, 2)
            return True

    with pytest.raises(ValueError, match=r"an episode of \d tokens ended in environment \d, and \d+ steps of it"):
        on_policy(PPO, vec_env("dummy")).learn(5000, callback=[TokenRewardCallback(), Evaluation()])


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


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'carry' is not one of 'complete', 'drop'"):
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
    assert model.rollout_buffer.rewards[:-1].any(1).all()  # a share in every row, and not at the ends only
