"""The tools around the learners: SB3's checks, evaluation, checkpoints and logs, Gymnasium's statistics and workers."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from doubles import SB3, HashRewardModel

pytest.importorskip("sb3_contrib", reason=SB3)
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from sb3_ledger import TOY
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import SubprocVecEnv, VecMonitor, VecNormalize

from tokenmdp.evaluation import evaluate
from tokenmdp.interop import arrays
from tokenmdp.interop.sb3 import GymVectorToSB3, TokenRewardCallback, mark_token_rewards_read
from tokenmdp.wrappers import (
    AttentionCreditReward,
    OnlinePrefixReward,
    SparseReward,
    UniformReward,
    UnreadTokenRewards,
    vector,
)
from tokenmdp.wrappers.base import CreditWrapper

pytestmark = pytest.mark.filterwarnings("error:.*episodes ended unread", "ignore:.*already wrapped with a `Monitor`")


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    monkeypatch.setattr(CreditWrapper, "_warned", False)
    monkeypatch.setattr(CreditWrapper, "readers", set())


def singles(n_envs=2, **arguments):
    return make_vec_env(TOY, n_envs, wrapper_class=UniformReward, **arguments)


def batch(n_envs=2):
    envs = gym.make_vec(TOY, num_envs=n_envs, autoreset_mode="SameStep")
    return GymVectorToSB3(vector.UniformReward(envs))


def model_of(envs, **arguments):
    return PPO("MultiInputPolicy", envs, n_steps=32, batch_size=32, n_epochs=1, device="cpu", **arguments)


@pytest.mark.parametrize("wrapper", [SparseReward, UniformReward, AttentionCreditReward, OnlinePrefixReward])
def test_check_env(wrapper):
    check_env(wrapper(gym.make(TOY)))


@pytest.mark.parametrize("build", [singles, batch])
def test_evaluation_checkpoints_and_tensorboard_beside_the_callback(build, tmp_path):
    envs = VecNormalize(build(), norm_obs=False)
    eval_envs = VecNormalize(build(), norm_obs=False, norm_reward=False, training=False)
    callbacks = [
        TokenRewardCallback(),
        EvalCallback(
            eval_envs, eval_freq=50, n_eval_episodes=40, log_path=tmp_path, best_model_save_path=tmp_path, verbose=0
        ),
        CheckpointCallback(50, tmp_path, save_vecnormalize=True),
    ]
    model = model_of(envs, tensorboard_log=tmp_path / "board")
    model.learn(256, callback=callbacks)
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (2, 40)
    assert sorted(path.name for path in tmp_path.glob("rl_model_*_steps.zip")) == [
        "rl_model_100_steps.zip",
        "rl_model_200_steps.zip",
    ]
    assert len(list(tmp_path.glob("*.pkl"))) == 2
    (events,) = (tmp_path / "board").rglob("events*")
    scalars = read_scalars(events)
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/completion_steps", "eval/mean_reward"} <= scalars

    loaded = PPO.load(tmp_path / "best_model", env=build(), device="cpu")
    mean, deviation = evaluate_policy(loaded, loaded.get_env(), 4)
    assert np.isfinite([mean, deviation]).all()
    loaded.learn(64, callback=TokenRewardCallback())


@pytest.mark.parametrize("build", [singles, batch])
def test_an_evaluation_alone_is_no_reason_to_warn_and_no_excuse_for_learning(build):
    envs = build()
    evaluate_policy(model_of(envs), envs, 40)
    masked = MaskablePPO("MultiInputPolicy", envs, n_steps=32, batch_size=32, n_epochs=1, device="cpu")
    evaluate_masked(masked, envs, 40)
    for played in (UniformReward(gym.make(TOY)), vector.UniformReward(gym.make_vec(TOY, num_envs=3))):
        evaluate(played, masked, 40)
    # Those of a callback, beside a learner that has said for its own environments that it reads.
    own = build()
    mark_token_rewards_read(own)
    model_of(own).learn(256, callback=EvalCallback(build(), eval_freq=32, n_eval_episodes=20, verbose=0))
    assert not CreditWrapper._warned
    with pytest.warns(UnreadTokenRewards) as caught:
        masked.learn(512, callback=EvalCallback(build(), eval_freq=64, n_eval_episodes=20, verbose=0))
    assert len([warning for warning in caught if warning.category is UnreadTokenRewards]) == 1


def workers(n_envs=2):
    return make_vec_env(
        TOY, n_envs, wrapper_class=UniformReward, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}
    )


@pytest.mark.parametrize("build", [singles, batch, workers])
def test_one_function_marks_environments_of_gymnasium_and_of_sb3(build):
    envs = VecMonitor(build())
    assert mark_token_rewards_read is arrays.mark_token_rewards_read
    mark_token_rewards_read(envs)
    assert envs.get_attr("token_rewards_read") == [True, True]
    envs.close()


def test_a_vecenv_that_comes_before_its_adapter_is_refused_with_the_remedy():
    code = (
        "from stable_baselines3.common.env_util import make_vec_env\n"
        "from tokenmdp.interop.arrays import mark_token_rewards_read\n"
        f"mark_token_rewards_read(make_vec_env('{TOY}'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TypeError: DummyVecEnv gives no token rewards" in done.stderr
    assert "import tokenmdp.interop.sb3 before" in done.stderr


def read_scalars(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return set(EventAccumulator(str(path)).Reload().Tags()["scalars"])


def test_monitor_files_hold_the_score_of_every_episode(tmp_path):
    envs = singles(monitor_dir=str(tmp_path), monitor_kwargs={"info_keywords": ("score", "n_tokens")})
    model = model_of(envs)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(192, callback=TokenRewardCallback())
    envs.close()
    results = load_results(str(tmp_path))
    assert len(results) > 20
    np.testing.assert_allclose(results["r"], results["score"], atol=1e-5)
    assert (results["l"] == results["n_tokens"]).all()
    assert "rollout/completion_steps" in (tmp_path / "progress.csv").read_text().splitlines()[0]


def test_the_trained_policy_survives_save_and_load(tmp_path):
    model = model_of(singles())
    model.learn(64, callback=TokenRewardCallback("drop"))
    model.save(tmp_path / "model")
    other = PPO.load(tmp_path / "model", env=singles(), device="cpu")
    obs = other.get_env().reset()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])


WORKERS = """
import sys
import gymnasium as gym, numpy as np, torch
from tokenmdp.wrappers import AttentionCreditReward

class Worker(gym.Wrapper):
    def loaded(self):
        return "reward_model" in vars(self.unwrapped.task)

    def threads(self):
        return torch.get_num_threads()

def make():
    return Worker(AttentionCreditReward(gym.make("tokenmdp:TextGen-IMDb-v0", max_new_tokens=3)))

def of_gymnasium(context):
    workers = gym.vector.AsyncVectorEnv([make], context=context, autoreset_mode="SameStep")
    envs = gym.wrappers.vector.RecordEpisodeStatistics(workers)
    envs.reset(seed=0)
    print(*workers.call("loaded"))
    for _ in range(3):
        _, rewards, ended, _, infos = envs.step(np.array([5]))
    final = infos["final_info"]
    assert ended.all() and final["_token_rewards"].all(), infos
    assert np.allclose(final["token_rewards"].sum(1), rewards, rtol=1e-5), (final, rewards)
    assert np.allclose(infos["episode"]["r"], rewards), (infos, rewards)
    assert infos["episode"]["l"].tolist() == [3]
    print(*workers.call("loaded"), *workers.call("threads"))
    envs.close()

def of_sb3():
    from stable_baselines3.common.vec_env import SubprocVecEnv

    envs = SubprocVecEnv([make], start_method="spawn")
    envs.reset()
    print(envs.env_method("loaded")[0], envs.env_method("threads")[0] == torch.get_num_threads())
    for _ in range(3):
        _, rewards, *_ = envs.step(np.array([5]))
    assert rewards.all()
    print(envs.env_method("loaded")[0], envs.env_method("threads")[0])
    envs.close()

if __name__ == "__main__":
    of_gymnasium("fork")  # before anything is loaded here
    of_gymnasium("spawn")
    of_sb3()
"""


@pytest.mark.long
def test_workers_of_a_fresh_process_load_models_when_they_score_and_use_one_thread(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    free = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, env=free)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\nTrue 1\n" * 2 + "False True\nTrue 1\n"


def test_missing_libraries_are_named_with_the_line_that_installs_them():
    for library in ("stable_baselines3", "sb3_contrib"):
        code = (
            f"import sys; sys.modules['{library}'] = None\n"
            "import tokenmdp.interop, gymnasium.error\n"
            "try:\n    import tokenmdp.interop.sb3\n"
            "except gymnasium.error.DependencyNotInstalled as error:\n    print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == (
            f'{library} is not installed, run `pip install "tokenmdp[sb3]"` for tokenmdp.interop.sb3\n'
        ), done.stderr


def test_the_interop_package_imports_nothing_by_itself():
    code = "import sys, tokenmdp.interop; print({'torch', 'stable_baselines3', 'torchrl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_an_env_of_the_online_wrapper_trains_on_the_same_rewards_with_or_without_the_callback():
    stored = []
    for callback in (None, TokenRewardCallback()):
        arguments = {"reward_model": HashRewardModel()}
        envs = make_vec_env(TOY, 2, seed=0, env_kwargs=arguments, wrapper_class=OnlinePrefixReward)
        model = model_of(envs, seed=0)
        model.learn(64, callback=callback)
        stored.append(model.rollout_buffer.rewards)
    np.testing.assert_allclose(stored[0], stored[1], atol=1e-5)
