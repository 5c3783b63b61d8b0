"""The start of an episode from ``reset(options=...)``, checked before the old episode is discarded."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from tokenmdp.envs.prompts import NoPrompt, shorten
from tokenmdp.envs.task import TextGenTask
from tokenmdp.models.encoding import continuing_ids
from tokenmdp.models.tokens import check_text


class WrongOptions(TypeError, ValueError):
    """``reset(options=...)`` was given something other than a dictionary."""


class Start(NamedTuple):
    """The prompt, response prefix and horizon with which one episode starts."""

    prompt: list[int] | None  # None: drawn
    response_prefix: list[int]  # response tokens that are in place already
    horizon: int | None  # None: drawn, or H


def checked_options(options: Any) -> dict[str, Any]:
    """What ``reset(options=...)`` was given.

    Raises:
        WrongOptions: it is not a dictionary.
    """
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise WrongOptions(
            f"options is {shorten(repr(options))}; pass a dictionary, such as options={{'prompt': 'the film was'}}"
        )
    return options


def read_start(task: TextGenTask, prompt: Any, response_prefix: Any, horizon: Any) -> Start:
    """Check one episode's reset options.

    A state of the token MDP is a prompt, the response tokens so far and, with ``horizon_range``, the horizon: the three
    together name any state to start from.

    Args:
        task: the environment's.
        prompt: text or token ids; None: drawn.
        response_prefix: text (encoded as the continuation of a text, as a response is) or token ids; None: none.
        horizon: response tokens at which the episode ends, in the task's ``horizon_range``; None: drawn.

    Raises:
        ValueError: the prompt is empty or too long, the horizon out of range, or the prefix holds unknown tokens or
            the end of text, or leaves no token to choose.
        TypeError: something of another type.
    """
    encoded = None if prompt is None else task.encode_prompt(prompt, name="options['prompt']")
    steps = None if horizon is None else _horizon(task, horizon)
    return Start(encoded, _prefix(task, response_prefix, steps), steps)


def _horizon(task: TextGenTask, horizon: Any) -> int:
    if task.horizon_range is None:
        raise ValueError(
            f"options['horizon'] is {horizon!r} and every episode has max_new_tokens={task.max_new_tokens}; "
            "make the environment with horizon_range=(least, most) to choose"
        )
    least, most = task.horizon_range
    try:
        steps = operator.index(horizon)
    except TypeError as error:
        raise TypeError(f"options['horizon'] is a number of tokens, not {horizon!r}") from error
    if not least <= steps <= most:
        raise ValueError(f"options['horizon'] is {steps}, not in horizon_range={task.horizon_range}")
    return steps


def _prefix(task: TextGenTask, prefix: Any, horizon: int | None) -> list[int]:
    name = "options['response_prefix']"
    if prefix is None:
        return []
    if isinstance(prefix, str):
        check_text(prefix, name)
    ids = continuing_ids(task.tokenizer, prefix) if isinstance(prefix, str) else _ids(prefix, name)
    for token in ids:
        if not 0 <= token < task.vocab_size:
            raise ValueError(f"{name} holds token id {token}; legal ids are 0..{task.vocab_size - 1}")
        if token in task.eos_token_ids:
            raise ValueError(
                f"{name} holds the end-of-text token {token}, after which the episode is over; leave it out"
            )
    if isinstance(prefix, str) and task.tokenizer.unk_token_id in ids:
        raise ValueError(f"{name} is {shorten(prefix)!r}, which the tokenizer cannot read in full; give token ids")
    if horizon is None:
        horizon = task.max_new_tokens if task.horizon_range is None else task.horizon_range[0]
    if len(ids) >= horizon:
        longer = "raise max_new_tokens" if task.horizon_range is None else "give options['horizon'] too"
        raise ValueError(
            f"{name} has {len(ids)} tokens and the episode may end after {horizon}, prefix included; shorten it by "
            f"{len(ids) - horizon + 1} or {longer}"
        )
    return ids


def _ids(prefix: Any, name: str) -> list[int]:
    try:
        return [operator.index(token) for token in prefix]
    except TypeError as error:
        raise NoPrompt(f"{name} is a text or a list of token ids, not {prefix!r}") from error
