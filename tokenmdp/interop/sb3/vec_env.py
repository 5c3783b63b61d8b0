"""From Gymnasium's batched environment to SB3's VecEnv."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from tokenmdp.wrappers.layers import check_conversions

ROW_BY_ROW = frozenset({"render", "get_rng_state"})  # methods whose lists and tuples have one entry per row


class GymVectorToSB3(VecEnv):
    """A batched environment as the VecEnv that SB3 learns from: one reward-model call per step for all rows that end.

    Row by row it does what a `DummyVecEnv` of the single environments does with equal seeds. The infos of ended rows
    hold what `Monitor` adds, ``info["episode"]`` with the return ``r``, the length ``l`` and the seconds since
    construction ``t``, and `env_is_wrapped` says so. SB3's VecMonitor may go around it to write its file; it warns that
    its own figures replace these.

    `env_method` calls the batch's method once. Of an array with N entries each row gets its own, so
    ``env_method("action_masks")`` is what MaskablePPO expects; so it does of the sequences of `render` and
    `get_rng_state`. Any other result is about the whole batch, whatever its length, and every row gets all of it.
    `set_attr` sets an attribute of the whole batch.

    Args:
        envs: with ``autoreset_mode="SameStep"``; credit wrappers of `tokenmdp.wrappers.vector` go inside.

    Raises:
        ValueError: another autoreset mode.
        WrongPlace: a wrapper converts arrays or infos.

    >>> import gymnasium as gym
    >>> envs = gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=2, autoreset_mode="SameStep")
    >>> venv = GymVectorToSB3(envs)
    >>> obs = venv.reset()
    >>> obs, rewards, dones, infos = venv.step(np.array([envs.eos_token_id, 0]))
    >>> dones.tolist(), infos[0]["episode"]["l"], venv.env_method("action_masks")[0].shape
    ([True, False], 1, (32,))
    """

    def __init__(self, envs: VectorEnv) -> None:
        if not isinstance(envs, VectorEnv):
            raise TypeError(
                f"{type(envs).__name__} is not a gymnasium.vector.VectorEnv; single environments go into SB3's "
                "DummyVecEnv"
            )
        check_conversions(envs, "GymVectorToSB3")
        mode = envs.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"autoreset_mode is {mode.value if isinstance(mode, AutoresetMode) else mode}; SB3 starts the next "
                "episode in the step that ends one: gym.make_vec(..., autoreset_mode='SameStep')"
            )
        self.envs = envs
        self._actions = np.zeros(envs.num_envs, dtype=np.int64)
        self._returns = np.zeros(envs.num_envs, dtype=np.float64)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)
        self._started = time.monotonic()
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self) -> Any:
        """Start an episode in every row, with the seeds and options that `seed` and `set_options` have left."""
        seeds = None if all(seed is None for seed in self._seeds) else self._seeds
        obs, infos = self.envs.reset(seed=seeds, options=self._batch_options())  # type: ignore[arg-type]
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_row(infos, row) for row in range(self.num_envs)]
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions (N,) for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all rows: observations, rewards (N,) float32, dones (N,) bool and one info dict per row."""
        obs, rewards, terminations, truncations, infos = self.envs.step(self._actions)
        rewards, dones = rewards.astype(np.float32), terminations | truncations
        self._returns += rewards
        self._lengths += 1
        final = infos.pop("final_info", {})
        last_obs = infos.pop("final_obs", None)
        rows: list[dict[str, Any]] = []
        for row, done in enumerate(dones):
            info = _row(infos, row)
            if done:
                self.reset_infos[row] = info  # in the step that starts the next episode they are about that one
                info = _row(final, row) | {"terminal_observation": last_obs[row], "episode": self._statistics(row)}
            info["TimeLimit.truncated"] = bool(truncations[row] and not terminations[row])
            rows.append(info)
        self._returns[dones] = 0.0
        self._lengths[dones] = 0
        return obs, rewards, dones, rows

    def close(self) -> None:
        """Close the batch."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The batch's attribute, once for each index."""
        return [getattr(self._holder(attr_name), attr_name)] * len(self._rows(indices))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the batch where it is defined, else of the unwrapped environment.

        Raises:
            ValueError: ``indices`` leaves rows out; the rows share their attributes.
        """
        if len(set(self._rows(indices))) != self.num_envs:
            raise ValueError(
                f"set_attr({attr_name!r}) for rows {indices}: the {self.num_envs} rows are one batch and share their "
                "attributes; leave out indices"
            )
        try:
            holder = self._holder(attr_name)
        except AttributeError:
            holder = self.envs.unwrapped
        setattr(holder, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list:
        """Call the batch's method once; one entry of the result for each index, see the class."""
        result = getattr(self._holder(method_name), method_name)(*method_args, **method_kwargs)
        if isinstance(result, np.ndarray):
            a_row_each = result.ndim > 0 and len(result) == self.num_envs
        else:
            a_row_each = method_name in ROW_BY_ROW and result is not None
        return [result[row] if a_row_each else result for row in self._rows(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """Whether a wrapper of this class is around the batch; True for `Monitor`, whose work is done here."""
        found = wrapper_class is Monitor or any(isinstance(layer, wrapper_class) for layer in _layers(self.envs))
        return [found] * len(self._rows(indices))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One frame per row, with ``render_mode="rgb_array"``."""
        if self.render_mode != "rgb_array":
            warnings.warn(f"render_mode is {self.render_mode!r}; images need 'rgb_array'", stacklevel=2)
            return [None] * self.num_envs
        return list(self.envs.render() or ())  # type: ignore[arg-type]  # the frames of "rgb_array" are arrays

    def _statistics(self, row: int) -> dict[str, Any]:
        """The entry that `Monitor` adds for an episode."""
        seconds = round(time.monotonic() - self._started, 6)
        return {"r": round(float(self._returns[row]), 6), "l": int(self._lengths[row]), "t": seconds}

    def _batch_options(self) -> dict[str, Any] | None:
        """SB3's one dict per row as the one dict of the batch: a list of N prompts."""
        unknown = sorted({key for options in self._options for key in options} - {"prompt"})
        if unknown:
            raise ValueError(f"option {unknown[0]!r} cannot be given row by row; set_options takes 'prompt'")
        prompts = [options.get("prompt") for options in self._options]
        return {"prompt": prompts} if any(prompt is not None for prompt in prompts) else None

    def _holder(self, name: str) -> Any:
        """The outermost layer that has the attribute."""
        for layer in _layers(self.envs):
            if name in vars(layer) or hasattr(type(layer), name):
                return layer
        raise AttributeError(f"{self.envs} has no attribute {name!r}")

    def _rows(self, indices: VecEnvIndices) -> list[int]:
        return list(self._get_indices(indices))


def _layers(envs: VectorEnv) -> Iterable[VectorEnv]:
    """The wrappers from the outside in, then the environment."""
    while isinstance(envs, VectorWrapper):
        yield envs
        envs = envs.env
    yield envs


def _row(infos: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a vector info, as the single environment would have said it.

    >>> _row({"score": np.array([2.0, 0.0]), "_score": np.array([True, False])}, row=0)
    {'score': np.float64(2.0)}
    >>> _row({"score": np.array([2.0, 0.0]), "_score": np.array([True, False])}, row=1)
    {}
    """
    info: dict[str, Any] = {}
    for key, column in infos.items():
        if key.startswith("_") or not infos.get(f"_{key}", np.zeros(row + 1, dtype=np.bool_))[row]:
            continue
        if isinstance(column, dict):
            info[key] = _entries(column, row)
        else:
            value = column[row]
            info[key] = bool(value) if isinstance(value, np.bool_) else value
    return info


def _entries(columns: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a dictionary of columns, which may hold further ones."""
    return {
        name: _entries(values, row) if isinstance(values, dict) else values[row]
        for name, values in columns.items()
        if not name.startswith("_")
    }
