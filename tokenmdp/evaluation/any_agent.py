"""Play episodes with any agent and report their scores.

An agent is whatever turns observations into actions. `evaluate` takes, alike:

    def agent(obs): ...                                  a function
    agent.act(obs)                                       an object, `Acts`
    agent.predict(obs, deterministic=...)                a model of Stable-Baselines3 or sb3-contrib, `Predicts`
    CausalLMPolicy                                       a language model, or an agent whose `policy` is one

``obs`` is what the environment returned and the actions are what its `step` takes: one row and one token id in a single
environment, N rows and N ids in a vector environment. Agents that accept ``action_masks`` receive the environment's
masks: (V,) or (N, V) bool.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import iterate

from tokenmdp.envs.vector import TextGenVectorEnv
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.state_reader import StateReader, without_early_end
from tokenmdp.models.token_distribution import NEVER
from tokenmdp.wrappers.layers import check_conversions, check_infos

Observation = dict[str, np.ndarray]
Act = Callable[..., Any]  # (obs), or (obs, action_masks=...)


@runtime_checkable
class Acts(Protocol):
    """The protocol of an agent in this library."""

    def act(self, obs: Observation) -> Any:
        """Actions for the observations; it may take ``action_masks`` too."""


@runtime_checkable
class Predicts(Protocol):
    """The protocol of Stable-Baselines3's models."""

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[Any, Any]:
        """Actions and the state of a recurrent model; it may take ``state``, ``episode_start``, ``action_masks``."""


@runtime_checkable
class HoldsPolicy(Protocol):
    """An agent around a language model, such as `tokenmdp.agents.ppo.PPO`."""

    policy: CausalLMPolicy


@runtime_checkable
class DrawsActions(Protocol):
    """An agent that may sample from its space of actions, as DQN does when it explores."""

    action_space: gym.Space


@dataclass(frozen=True)
class EvaluationResult:
    """Scores and lengths of some episodes; index i of both arrays is episode i, on the same prompt for any agent."""

    scores: np.ndarray  # (episodes,) float64
    lengths: np.ndarray  # (episodes,) int64, response tokens

    @property
    def score(self) -> Estimate:
        """The mean score with its 95% interval over episodes."""
        return mean_interval(self.scores)

    def __str__(self) -> str:
        """Such as ``score 1.25 [1.10, 1.40], 7.5 tokens, 64 episodes``."""
        return f"score {self.score}, {self.lengths.mean():.1f} tokens, {len(self.scores)} episodes"


def evaluate(
    envs: gym.Env | VectorEnv,
    agent: Act | Acts | Predicts | HoldsPolicy | CausalLMPolicy,
    episodes: int = 64,
    seed: int = 0,
    *,
    deterministic: bool = False,
) -> EvaluationResult:
    """Play ``episodes`` whole episodes.

    Every row of a vector environment plays its share of them, whatever their lengths: the first episodes to end would
    be the short ones. The same ``seed`` draws the same prompts for any agent, so two results can be subtracted episode
    by episode. Use environments of their own: this resets them and uses up their random numbers.

    Args:
        envs: a single or a vector TextGen environment in any autoreset mode, with or without a credit wrapper, or
            Gymnasium's SyncVectorEnv or AsyncVectorEnv of single ones.
        agent: see the top of this module.
        episodes: how many.
        seed: of the environment and, for the duration of the call, of PyTorch's random numbers, NumPy's global
            generator and the agent's ``action_space``, from which models of Stable-Baselines3 draw; the caller's are
            restored. An agent with a generator of its own is not seeded.
        deterministic: take the most likely token, for language models and Stable-Baselines3. Other agents decide for
            themselves.

    Raises:
        TypeError: ``envs`` or the agent is none of these.
        gymnasium.error.Error: an episode was cut off before it had a score.

    >>> import numpy as np
    >>> env = gym.make("tokenmdp:TextGen-Toy-v0")
    >>> print(evaluate(env, lambda obs: env.unwrapped.eos_token_id, episodes=3))
    score 0.00 [0.00, 0.00], 1.0 tokens, 3 episodes
    """
    if episodes < 1:
        raise ValueError(f"episodes={episodes}; at least 1 is needed")
    if not isinstance(envs, (gym.Env, VectorEnv)):
        raise TypeError(
            f"envs is a {type(envs).__name__}; pass the Gymnasium environment, single or vector, from before it was "
            "wrapped for another library, such as gym.make_vec(...) itself and not GymVectorToSB3 of it"
        )
    check_conversions(envs, "evaluate")
    act = _bind(agent, envs, seed, deterministic)
    if not isinstance(envs, VectorEnv):
        envs, act = _one_row(envs, act)
    with _seeded(agent, seed):
        played = sorted(_play(envs, act, episodes, seed), key=lambda one: one.place)
    return EvaluationResult(
        np.array([one.score for one in played], dtype=np.float64),
        np.array([one.n_tokens for one in played], dtype=np.int64),
    )


@contextlib.contextmanager
def _seeded(agent: Any, seed: int) -> Iterator[None]:
    """Seed the random numbers that agents draw from, for the length of the block."""
    numpy_state = np.random.get_state()  # noqa: NPY002  # Stable-Baselines3 draws from the global generator
    generator = agent.action_space.np_random.bit_generator if isinstance(agent, DrawsActions) else None
    space_state: Any = None if generator is None else generator.state
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        if generator is not None:
            generator.state = type(generator)(seed).state
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            if generator is not None:
                generator.state = space_state


class _Played(NamedTuple):
    place: tuple[int, int]  # the episode's index within its row, the row
    score: float
    n_tokens: int


def _one_row(env: gym.Env, act: Act) -> tuple[VectorEnv, Act]:
    """A single environment as a vector of one row, and its agent, which still meets the single form."""
    envs = SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.DISABLED)
    envs.closed = True  # or the end of this object would close the caller's environment
    return envs, lambda obs, starts: [act(next(iterate(envs.observation_space, obs)), starts)]


def _play(envs: Any, act: Act, episodes: int, seed: int) -> Iterator[_Played]:
    rows = np.arange(envs.num_envs)
    share = episodes // len(rows) + (rows < episodes % len(rows))
    mode = envs.metadata["autoreset_mode"]
    # The native environment lets ended rows wait, so all start together and a language model keeps its cache.
    waits = isinstance(envs.unwrapped, TextGenVectorEnv)
    played, ended = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.bool_)
    obs, _ = envs.reset(seed=seed)
    starts = np.ones(len(rows), dtype=np.bool_)
    while (played < share).any():
        obs, _, terminated, truncated, infos = envs.step(act(obs, starts))
        _check_whole((truncated & ~terminated).any())
        check_infos(infos, "evaluate")
        final = infos.get("final_info", infos)
        for row in np.flatnonzero(final.get("_score", ())):
            if played[row] < share[row]:
                yield _Played((int(played[row]), int(row)), float(final["score"][row]), int(final["n_tokens"][row]))
            played[row] += 1
        if mode is AutoresetMode.NEXT_STEP:  # one step between two episodes, in which a row ignores its action
            starts, ended = ended, terminated.copy()
        elif mode is AutoresetMode.SAME_STEP:
            starts = terminated.copy()
        else:
            starts, ended = np.zeros_like(ended), ended | terminated
            if ended.all() if waits else ended.any():
                obs, _ = envs.reset(options={"reset_mask": ended.copy()})
                starts, ended = ended, starts


def _check_whole(cut_off: bool) -> None:
    if cut_off:
        raise gym.error.Error(
            "an episode was truncated before it had a score; take the TimeLimit off: max_new_tokens ends every episode"
        )


def _bind(agent: Any, envs: Any, seed: int, deterministic: bool) -> Act:
    """One form for all agents: ``(obs, starts) -> actions``; ``starts`` (N,) says which rows begin an episode."""
    if isinstance(agent, HoldsPolicy) and isinstance(agent.policy, CausalLMPolicy):
        agent = agent.policy
    if isinstance(agent, CausalLMPolicy):
        return _LanguageModel(agent, envs, seed, deterministic)
    if isinstance(agent, Predicts):
        return _Model(agent, envs, deterministic)
    act: Any = agent.act if isinstance(agent, Acts) else agent
    if not callable(act):
        raise TypeError(
            f"{type(agent).__name__} is not an agent: pass a function obs -> actions, an object with act(obs) or "
            "predict(obs, deterministic=...), a CausalLMPolicy or an agent that holds one"
        )
    if "action_masks" in inspect.signature(act).parameters:
        return lambda obs, starts: act(obs, action_masks=_action_masks(envs))
    return lambda obs, starts: act(obs)


def _action_masks(envs: Any) -> np.ndarray:
    """(V,) bool, or (N, V)."""
    if isinstance(envs.unwrapped, (gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv)):
        return np.stack(envs.unwrapped.call("action_masks"))
    return envs.unwrapped.action_masks()


class _Model:
    """A model with `predict`, called with the arguments that its signature accepts."""

    def __init__(self, model: Any, envs: Any, deterministic: bool) -> None:
        self._takes = set(inspect.signature(model.predict).parameters)
        self._predict = partial(model.predict, deterministic=deterministic)
        self._envs = envs
        self._state: Any = None

    def __call__(self, obs: Observation, starts: np.ndarray) -> Any:
        offered = {"state": self._state, "episode_start": starts}
        if "action_masks" in self._takes:
            offered["action_masks"] = _action_masks(self._envs)
        taken = {key: value for key, value in offered.items() if key in self._takes}
        actions, self._state = self._predict(obs, **taken)
        return actions


class _LanguageModel:
    """Samples from a `CausalLMPolicy`, feeding it only the tokens that are new."""

    def __init__(self, policy: CausalLMPolicy, envs: Any, seed: int, deterministic: bool) -> None:
        self._policy, self._envs, self._deterministic = policy, envs, deterministic
        self._generator = torch.Generator(policy.lm.device).manual_seed(seed)
        # An early end is masked row by row, before top-k as the policy would.
        everything = without_early_end(policy)
        everything.top_k = 0
        self._reader = StateReader(everything)

    @torch.no_grad()
    def __call__(self, obs: Observation, starts: np.ndarray) -> Any:
        policy, single = self._policy, obs["input_ids"].ndim == 1
        device = policy.lm.device
        ids, mask = (torch.as_tensor(np.atleast_2d(obs[key]), device=device) for key in ("input_ids", "attention_mask"))
        state = self._reader.read(ids, mask.bool())
        logits, support = state.logits, None  # (N, V)
        if not logits.isfinite().all():
            raise FloatingPointError(
                f"{type(policy.lm).__name__} gave logits that are NaN or infinite; look for NaN in its weights, load "
                "an earlier checkpoint, or use compute_dtype=torch.float32"
            )
        if policy.min_new_tokens:
            legal = torch.as_tensor(np.atleast_2d(_action_masks(self._envs)), device=device)
            logits = logits.masked_fill(~legal, NEVER)
        if policy.top_k:
            support = logits.topk(policy.top_k, dim=-1).indices  # (N, k)
            logits = logits.gather(-1, support)
        uniform = torch.rand(len(logits), dtype=torch.float64, device=device, generator=self._generator)
        token, _, _ = policy.act(state._replace(logits=logits, support=support), uniform, self._deterministic)
        actions = token.cpu().numpy()
        return actions[0] if single else actions
