"""The true course of an SB3 environment, recorded beside the learner and credited again from the texts."""

from collections import Counter
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
import torch
from doubles import HashRewardModel
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper

from tokenmdp.interop.sb3 import GymVectorToSB3
from tokenmdp.types import Episode
from tokenmdp.wrappers import AttentionCreditReward, vector

TOY = "tokenmdp:TextGen-Toy-v0"
PROMPT_SLOTS, BETA = 4, 0.8
N_STEPS, N_ENVS = 53, 4  # 53 cuts most rollouts off in mid-episode
GAMMA, LAMBDA = 0.97, 0.9
ALGORITHMS = {
    PPO: {"batch_size": 64, "n_epochs": 1},
    A2C: {},
    TRPO: {"batch_size": 64, "n_critic_updates": 1},
    MaskablePPO: {"batch_size": 64, "n_epochs": 1},
    RecurrentPPO: {"batch_size": 64, "n_epochs": 1, "policy_kwargs": {"lstm_hidden_size": 8}},
}


def on_policy(algorithm, envs, **arguments):
    """A small model of one of the ALGORITHMS."""
    policy = "MultiInputLstmPolicy" if algorithm is RecurrentPPO else "MultiInputPolicy"
    arguments = {"n_steps": N_STEPS, "gamma": GAMMA, "gae_lambda": LAMBDA} | ALGORITHMS[algorithm] | arguments
    arguments["policy_kwargs"] = {"net_arch": [16]} | arguments.get("policy_kwargs", {})
    return algorithm(policy, envs, seed=1, device="cpu", **arguments)


def credited(obs):
    """Token rewards (T,) of a finished text, by the formula; ``obs`` is its last observation."""
    ids = torch.as_tensor(obs["input_ids"]).long()[None]
    mask = torch.as_tensor(obs["attention_mask"]).bool()[None]
    said = HashRewardModel().evaluate(Episode(ids, mask, mask[:, PROMPT_SLOTS:]), frozenset({"attention"}))
    length = int(mask[0, PROMPT_SLOTS:].sum())
    score, row = said.score.double().item(), said.attention[0, :length].double().numpy()
    rewards = score * BETA * row / row.sum()
    rewards[-1] += score * (1 - BETA)
    return rewards


class Ledger(VecEnvWrapper):
    """Every step of every environment; ``rewards[step][env]`` is filled in when the episode ends."""

    def __init__(self, venv):
        super().__init__(venv)
        self.obs, self.actions, self.dones, self.rewards, self.terminal = [], [], [], [], []
        self._open = [[] for _ in range(self.num_envs)]

    def reset(self):
        self._obs = self.venv.reset()
        self._open = [[] for _ in range(self.num_envs)]
        return {key: rows.copy() for key, rows in self._obs.items()}

    def step_async(self, actions):
        self.actions.append(np.array(actions))
        self.venv.step_async(actions)

    def step_wait(self):
        after, rewards, dones, infos = self.venv.step_wait()
        step = len(self.obs)
        self.obs.append(self._obs)
        self.dones.append(dones.copy())
        self.rewards.append(np.full(self.num_envs, np.nan))
        self.terminal.append([info.get("terminal_observation") for info in infos])
        for env, steps in enumerate(self._open):
            steps.append(step)
            if dones[env]:
                earned = credited(infos[env]["terminal_observation"])
                prefix = self.obs[steps[0]]["attention_mask"][env, PROMPT_SLOTS:].sum()  # in place before the first
                for where, reward in zip(steps, earned[prefix:], strict=True):
                    self.rewards[where][env] = reward
                steps.clear()
        self._obs = {key: rows.copy() for key, rows in after.items()}
        return after, rewards, dones, infos


@dataclass
class Snapshot:
    """One rollout as the learner will train on it, and the values it bootstraps from."""

    first_step: int
    last_values: np.ndarray | None = None
    last_dones: np.ndarray | None = None
    arrays: dict = field(default_factory=dict)
    scale: float = 1.0
    drawn: Counter | None = None


class Before(BaseCallback):
    """Stands before TokenRewardCallback: values of the last observations, by the policy's own forward."""

    def __init__(self, ledger):
        super().__init__()
        self.ledger, self.snapshots = ledger, []

    def _on_rollout_start(self):
        self.snapshots.append(Snapshot(len(self.ledger.obs)))

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        model, now = self.model, self.snapshots[-1]
        now.last_dones = np.array(model._last_episode_starts)
        with torch.no_grad():
            obs = {key: torch.as_tensor(rows) for key, rows in model._last_obs.items()}
            if states := getattr(model, "_last_lstm_states", None):
                values = model.policy(obs, states, torch.as_tensor(now.last_dones).float())[1]
            else:
                values = model.policy(obs)[1]
        now.last_values = values.numpy().flatten()


class After(BaseCallback):
    """Stands after TokenRewardCallback: the buffer that goes into training."""

    NAMES = ("rewards", "advantages", "returns", "values", "episode_starts", "actions")

    def __init__(self, before, look=None):
        super().__init__()
        self.before, self.look = before, look

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer, now = self.model.rollout_buffer, self.before.snapshots[-1]
        now.arrays = {name: getattr(buffer, name).copy() for name in self.NAMES}
        now.arrays["input_ids"] = buffer.observations["input_ids"].copy()
        normalizer = self.model.get_vec_normalize_env()
        if normalizer is not None:
            now.scale = float(normalizer.normalize_reward(np.array([1.0]))[0])
        if self.look is not None:
            self.look(self.model, now)


class InMidText(gym.Wrapper):
    """Every episode begins with up to three tokens in place."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.draw = np.random.default_rng(seed)
        prefix = self.draw.integers(28, size=self.draw.integers(4)).tolist()
        return self.env.reset(seed=seed, options={"response_prefix": prefix})


def vec_env(kind, n_envs=N_ENVS, seed=0, around=None, **arguments):
    """The same environments as a "dummy", "fork", "spawn" (worker processes) or "bridge" VecEnv, inside a Ledger.

    ``around``: a wrapper around each single environment.
    """
    arguments = {"reward_model": HashRewardModel(), "horizon_range": (2, 8)} | arguments
    if kind == "bridge":
        envs = gym.make_vec(TOY, num_envs=n_envs, autoreset_mode="SameStep", **arguments)
        venv = GymVectorToSB3(vector.AttentionCreditReward(envs, BETA))
        venv.seed(seed)
    else:
        venv = make_vec_env(
            TOY,
            n_envs,
            seed,
            env_kwargs=arguments,
            wrapper_class=lambda env: (around or (lambda env: env))(AttentionCreditReward(env, credit_beta=BETA)),
            vec_env_cls=DummyVecEnv if kind == "dummy" else SubprocVecEnv,
            vec_env_kwargs=None if kind == "dummy" else {"start_method": kind},
        )
    return Ledger(venv)
