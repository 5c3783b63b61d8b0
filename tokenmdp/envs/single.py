"""The token MDP as a Gymnasium environment."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.error import InvalidAction, ResetNeeded

from tokenmdp.credit import REWARD_MODEL_NEEDS, Resources
from tokenmdp.credit.base import PolicyAttention
from tokenmdp.envs import token_mdp
from tokenmdp.envs.starts import Start, checked_options, read_start
from tokenmdp.envs.task import TextGenTask, make_task
from tokenmdp.types import Episode, Outcome

METADATA: dict[str, Any] = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 4}


class IllegalAction(InvalidAction, ValueError):
    """An action is no token id, or the end-of-text token too early; also a ValueError, as other libraries raise."""


class TokenEpisodes:
    """N rows of the token MDP with their scores: the common part of the single and the vector environment.

    Attributes:
        task: prompts, tokenizer, reward model and lengths.
        outcome: the finished episodes and their scores after a step in which rows ended, else None.
        reward_needs: what to ask of the reward model beyond the score; credit wrappers add to it.
        token_rewards_read: set by agents and adapters that learn from ``info["token_rewards"]``.
        policy_attention: what credit methods that follow the live policy's attention read; agents attach it, see
            `tokenmdp.credit.Resources`. None: none is attached.
        token_credit: (N, H) the credit that `render` shows, NaN where it is unknown; credit wrappers fill it.
        credit_follows: a credit wrapper will show the last line in "human" mode.
    """

    def __init__(self, task: TextGenTask, num_rows: int, render_mode: str | None) -> None:
        modes = METADATA["render_modes"]
        if render_mode is not None and render_mode not in modes:
            raise ValueError(f"render_mode={render_mode!r} is not one of None, {', '.join(map(repr, modes))}")
        self.task = task
        self.render_mode = render_mode
        self.outcome: Outcome | None = None
        self.reward_needs: set[str] = set()
        self.token_rewards_read = False
        self.policy_attention: PolicyAttention | None = None
        self.token_credit = np.full((num_rows, task.max_new_tokens), np.nan, dtype=np.float32)
        self.credit_follows = False
        self._state = token_mdp.blank_state(num_rows, task.max_prompt_tokens, task.max_new_tokens, task.pad_token_id)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose ids are the actions."""
        return self.task.tokenizer

    @property
    def eos_token_id(self) -> int:
        """The action that ends an episode; the first of `eos_token_ids`."""
        return self.task.eos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All actions that end an episode."""
        return self.task.eos_token_ids

    @property
    def min_new_tokens(self) -> int:
        """Tokens before the end-of-text action is legal."""
        return self.task.min_new_tokens

    def require(self, needs: frozenset[str]) -> None:
        """Ask for more than the score, such as "attention", from the next score on; keys of `tokenmdp.credit.NEEDS`.

        Raises:
            ValueError: the reward model does not provide it. A named one that is not loaded yet raises when it is.
        """
        of_the_model = needs & REWARD_MODEL_NEEDS
        self.task.check_needs(of_the_model)
        self.reward_needs |= of_the_model

    def resources(self) -> Resources:
        """The resources that a credit method may use beyond the outcome."""
        task = self.task
        return Resources(
            task.reward_model, task.tokenizer, self.policy_attention, task.load_policy, task.load_reward_model
        )

    def episodes_so_far(self, rows: np.ndarray) -> Episode:
        """The texts of ``rows`` (n,) int64, finished or not, as a reward model reads them; fresh tensors."""
        return token_mdp.finished_episodes(self._state, rows)

    @property
    def horizons(self) -> np.ndarray:
        """Response tokens at which each row's episode ends at the latest, (N,) int64."""
        return self._state.horizon.copy()

    def _begin(self, rows: Sequence[int], rngs: Sequence[np.random.Generator], starts: Sequence[Start]) -> None:
        """Start new episodes in ``rows``; what a start leaves out is drawn. Each row uses its own generator only."""
        task = self.task
        prompts, horizons = [], []
        for rng, start in zip(rngs, starts, strict=True):
            prompts.append(task.draw_prompt(rng) if start.prompt is None else start.prompt)
            horizons.append(task.draw_horizon(rng) if start.horizon is None else start.horizon)
        prefixes = [start.response_prefix for start in starts]
        self._state = token_mdp.start(self._state, rows, prompts, prefixes, horizons, task.pad_token_id)
        self.token_credit[rows] = np.nan

    def _append(self, tokens: np.ndarray) -> np.ndarray:
        """Check and append one token per running row; returns which rows ended, (N,) bool."""
        state, task = self._state, self.task
        for row in np.flatnonzero(state.running & ((tokens < 0) | (tokens >= task.vocab_size))):
            raise IllegalAction(
                f"{_place(row, tokens)}action {tokens[row]} is not a token id; legal ids are 0..{task.vocab_size - 1}"
            )
        too_early = state.n_tokens < task.min_new_tokens
        for row in np.flatnonzero(state.running & np.isin(tokens, task.eos_token_ids) & too_early):
            raise IllegalAction(
                f"{_place(row, tokens)}action {tokens[row]} is the end-of-text token, illegal after "
                f"{state.n_tokens[row]} tokens with min_new_tokens={task.min_new_tokens}; action_masks() marks it"
            )
        self._state, ended = token_mdp.append(state, tokens, task.eos_token_ids)
        self.outcome = None
        return ended

    def _score(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Score the finished episodes of ``rows`` with one call; sets `outcome`, returns their info columns."""
        reward_model = self.task.reward_model
        self.task.check_needs(frozenset(self.reward_needs))  # a model that was not loaded before could not be asked
        episodes = token_mdp.finished_episodes(self._state, rows)
        reward = reward_model(episodes, needs=frozenset(self.reward_needs))
        self.outcome = Outcome(episodes, reward, torch.from_numpy(rows.copy()))
        return {
            "score": reward.score.numpy().copy(),
            "n_tokens": self._state.n_tokens[rows],
            "token_mask": token_mdp.response_mask(self._state)[rows],
        }

    def _observe(self) -> dict[str, np.ndarray]:
        """Fresh arrays with a leading axis of rows."""
        obs = {"input_ids": self._state.input_ids.copy(), "attention_mask": self._state.attention_mask.astype(np.int8)}
        if self.task.horizon_range is not None:
            obs["horizon"] = self._state.horizon[:, None].copy()
        return obs

    def _legal(self) -> np.ndarray:
        task = self.task
        return token_mdp.legal_tokens(self._state, task.vocab_size, task.eos_token_ids, task.min_new_tokens)

    def _frame(self, row: int) -> str | np.ndarray:
        """``row`` in the current render mode."""
        from tokenmdp.envs.rendering import ansi_line, image

        state, n_tokens = self._state, self._state.n_tokens[row]
        slots, mask = state.input_ids[row], state.attention_mask[row]
        prompt = slots[: state.prompt_slots][mask[: state.prompt_slots]].tolist()
        response = slots[state.prompt_slots : state.prompt_slots + n_tokens].tolist()
        # Under SAME_STEP the wrapper writes an episode's credit when its successor already runs in the row.
        known = n_tokens > 0 and not state.running[row] and not np.isnan(self.token_credit[row, 0])
        credits = self.token_credit[row, :n_tokens].tolist() if known else None
        draw = image if self.render_mode == "rgb_array" else ansi_line
        return draw(self.task.tokenizer, prompt, response, credits)


class TextGenEnv(TokenEpisodes, gym.Env):
    """One text, one token per step.

    State: the prompt and the tokens so far. Action: the next token's id, any id in ``[0, V)``. The transition appends
    it. The end-of-text token or the horizon ends the episode: ``terminated``, never ``truncated``. The reward is 0.0
    until the last step, which returns the reward model's score.

    Observation: ``input_ids`` (P+H,) int64 and ``attention_mask`` (P+H,) int8, laid out as in `tokenmdp.types`, and
    with ``horizon_range`` also ``horizon`` (1,) int64. The terminal info holds ``score``, ``n_tokens`` and
    ``token_mask`` (H,) bool; a credit wrapper adds ``token_rewards`` (H,) float32.

    Args:
        render_mode: "ansi", "human" (prints), "rgb_array" or None.
        **arguments: of `tokenmdp.envs.task.make_task`.

    >>> env = gym.make("tokenmdp:TextGen-Toy-v0")
    >>> obs, info = env.reset(seed=0, options={"prompt": "the film was"})
    >>> great, eos = env.unwrapped.tokenizer.convert_tokens_to_ids(["great", "<eos>"])
    >>> env.step(great)[1:3], env.step(eos)[1:3]
    ((0.0, False), (2.0, True))
    """

    metadata: ClassVar[dict[str, Any]] = METADATA  # type: ignore[misc]

    def __init__(self, *, render_mode: str | None = None, **arguments: Any) -> None:
        super().__init__(make_task(**arguments), 1, render_mode)
        self.observation_space = self.task.observation_space()
        self.action_space = gym.spaces.Discrete(self.task.vocab_size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: the same seed draws the same prompts (and horizons) from here on.
            options: ``"prompt"``, text or list of token ids, instead of a drawn prompt; ``"response_prefix"``, text or
                list of token ids: response tokens that are in place already, as if they had been stepped (they are
                in the observation, scored, credited and count towards the horizon); ``"horizon"``, instead of one
                drawn from ``horizon_range``. An error leaves the running episode as it is.
        """
        start = read_start(self.task, *map(checked_options(options).get, Start._fields))
        gym.Env.reset(self, seed=seed)
        self._begin([0], [self.np_random], [start])
        if self.render_mode == "human":
            self.render()
        return self._observation(), self._reset_info()

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Append one token.

        Raises:
            ResetNeeded: before the first reset, or after the end of the episode.
            IllegalAction: not an integer, not a token id, or end-of-text before ``min_new_tokens``.
        """
        if not self._state.running[0]:
            n_tokens = self._state.n_tokens[0]
            raise ResetNeeded(
                f"the episode has ended after {n_tokens} tokens; call reset() to start the next one"
                if n_tokens
                else "no episode has been started; call reset() before step()"
            )
        terminated = bool(self._append(np.array([_token_id(action)]))[0])
        info: dict[str, Any] = {}
        if terminated:
            info = {key: column[0] for key, column in self._score(np.array([0])).items()}
        if self.render_mode == "human" and not (terminated and self.credit_follows):
            self.render()
        return self._observation(), float(info["score"]) if terminated else 0.0, terminated, False, info

    def action_masks(self) -> np.ndarray:
        """Which tokens are legal now: (V,) bool."""
        return self._legal()[0]

    def render(self) -> Any:
        """The text so far; at the end, under a credit wrapper, each token tinted by its credit.

        Returns:
            "ansi": a string. "rgb_array": (height, width, 3) uint8. "human": None, and prints the string.
        """
        if self.render_mode is None:
            gym.logger.warn("render() without a render mode shows nothing; make the env with render_mode='ansi'")
            return None
        frame = self._frame(0)
        if self.render_mode == "human":
            print(frame)
            return None
        return frame

    def _observation(self) -> dict[str, np.ndarray]:
        return {key: rows[0] for key, rows in self._observe().items()}

    def _reset_info(self) -> dict[str, Any]:
        return {} if self.task.horizon_range is None else {"horizon": self._state.horizon[0]}


def _place(row: Any, tokens: np.ndarray) -> str:
    return f"row {row}: " if len(tokens) > 1 else ""


def _token_id(action: Any) -> int:
    """A token id from whatever integer an agent sends: Python or numpy integers, 0-d arrays and tensors."""
    if not isinstance(action, (bool, np.bool_)):
        try:
            return int(np.int64(operator.index(action)))
        except OverflowError as error:
            raise IllegalAction(f"action {action} is not a token id; it does not even fit 64 bits") from error
        except TypeError:
            pass
    raise IllegalAction(f"action {action!r} ({type(action).__name__}) is not an integer; an action is one token id")
