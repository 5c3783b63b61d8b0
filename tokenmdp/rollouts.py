"""From a policy and a vector environment to one batch of finished episodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from tokenmdp.decoding import SHARE_ENDED, Reading, decode, uniforms_for
from tokenmdp.policy import CausalLMPolicy
from tokenmdp.policy_attention import SampledAttention
from tokenmdp.types import Rollout
from tokenmdp.vector_env import TextGenVectorEnv
from tokenmdp.wrappers import find_credit_wrapper

ENVIRONMENT_KEYS = ("score", "n_tokens", "token_mask", "token_rewards")  # the rest of the last info is credit's report


def check_envs(envs: VectorEnv) -> TextGenVectorEnv:
    """The environment under the wrappers, if `collect` can use it; its token rewards are now marked as read.

    Raises:
        gymnasium.error.Error: it resets rows by itself, or no credit wrapper gives token_rewards.
        TypeError: it is not a native TextGen vector environment.
    """
    base = envs.unwrapped
    if not isinstance(base, TextGenVectorEnv):
        raise TypeError(
            f"{type(base).__name__} is not a native TextGen vector environment; pass "
            'gym.make_vec("TextGen-IMDb-v0", num_envs=64, autoreset_mode="Disabled")'
        )
    if base.autoreset_mode is not AutoresetMode.DISABLED:
        raise gym.error.Error(
            f"autoreset_mode is {base.autoreset_mode.value!r}, whole batches of episodes need rows that stay ended; "
            'pass gym.make_vec(..., autoreset_mode="Disabled")'
        )
    if find_credit_wrapper(envs) is None:
        raise gym.error.Error(
            "the environment gives no token_rewards because no credit wrapper is on it; "
            "for plain RLHF wrap it: tokenmdp.wrappers.vector.SparseReward(envs)"
        )
    base.token_rewards_read = True
    return base


@torch.no_grad()
def collect(
    envs: VectorEnv,
    policy: CausalLMPolicy,
    reference: CausalLMPolicy,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    rows_per_forward: int = 64,
    share_ended: float = SHARE_ENDED,
) -> tuple[Rollout, dict[str, float]]:
    """Play one episode in every row and score it under the frozen reference.

    Args:
        envs: Vector environment without autoreset, under a credit wrapper. All rows are reset.
        policy: Samples through its KV cache; one transfer to the host a step.
        reference: Scores the same tokens, on the same support.
        generator: Sampling noise, on the policy's device.
        seed: For ``envs.reset``; None goes on with the environment's random numbers.
        rows_per_forward: Rows a reference forward takes at a time.
        share_ended: See `tokenmdp.decoding.decode`; it changes the time alone.

    Returns:
        The rollout on the policy's device, without the columns that are padding in every row (so P and H may be less
        than the environment's), and metrics: score_mean, score_std, response_length, response_tokens, ended_by_eos, kl
        and the mean of every scalar that the credit wrapper reports.
    """
    base = check_envs(envs)
    task, device = base.task, policy.lm.device
    observation, _ = envs.reset(seed=seed)
    # Slots before the longest prompt are padding in every row.
    first_slot = int(observation["attention_mask"].any(0).argmax())
    prompt = slice(first_slot, task.max_prompt_tokens)
    last_infos: dict[str, np.ndarray] = {}
    logprobs = torch.zeros(envs.num_envs, task.max_new_tokens, device=device)
    values = torch.zeros_like(logprobs)
    support = torch.zeros(*logprobs.shape, policy.top_k, dtype=torch.long, device=device) if policy.top_k else None
    uniforms = uniforms_for(task.max_new_tokens, envs.num_envs, device, generator)

    length = 0  # no response is longer
    with policy.autocast(), _attention_attached(envs, policy, prompt.stop - prompt.start) as reading:
        state = policy.prefill(
            torch.as_tensor(observation["input_ids"][:, prompt], device=device),
            torch.as_tensor(observation["attention_mask"][:, prompt], device=device),
        )
        for step in decode(envs, policy, state, uniforms, reading, share_ended):
            logprobs[step.rows, length], values[step.rows, length] = step.logprob, step.value
            if support is not None and step.support is not None:
                support[step.rows, length] = step.support
            _keep(last_infos, step.info)
            observation, length = step.observation, length + 1

    seen = slice(first_slot, task.max_prompt_tokens + length)
    mask = torch.as_tensor(last_infos["token_mask"][:, :length], device=device)
    rollout = Rollout(
        input_ids=torch.as_tensor(observation["input_ids"][:, seen], device=device),
        attention_mask=torch.as_tensor(observation["attention_mask"][:, seen], device=device).bool(),
        response_mask=mask,
        logprobs=logprobs[:, :length] * mask,  # (N, H); rows that ended may have sampled on in vain
        ref_logprobs=torch.zeros(mask.shape, device=device),
        values=values[:, :length] * mask,
        token_rewards=torch.as_tensor(last_infos["token_rewards"][:, :length], dtype=torch.float32, device=device),
        scores=torch.as_tensor(last_infos["score"], dtype=torch.float32, device=device),
        support=None if support is None else support[:, :length],
    )
    rollout = rollout._replace(ref_logprobs=score_under(reference, rollout, rows_per_forward))
    return rollout, _metrics(rollout, last_infos, policy.eos_token_id)


@contextlib.contextmanager
def _attention_attached(envs: VectorEnv, policy: CausalLMPolicy, prompt_columns: int) -> Iterator[Reading]:
    """Lend the environment the policy's attention for one rollout, if its credit needs it.

    Gives what to enter around each decoding step. Afterwards the provider that was attached before is back: rows of a
    finished rollout must not credit the next episode.
    """
    base, wrapper = check_envs(envs), find_credit_wrapper(envs)
    if wrapper is None or "policy_attention" not in wrapper.credit.needs:
        yield lambda rows: contextlib.nullcontext()
        return
    recorder = SampledAttention(policy, prompt_columns, envs.num_envs, base.task.max_new_tokens)
    before, base.policy_attention = base.policy_attention, recorder
    try:
        yield recorder.reading
    finally:
        base.policy_attention = before


@torch.no_grad()
def score_under(policy: CausalLMPolicy, rollout: Rollout, rows_per_forward: int = 64) -> torch.Tensor:
    """Log-probabilities (N, H) of a rollout's response tokens under another policy, 0 outside the response."""
    parts = []
    for rows in torch.arange(len(rollout.scores), device=rollout.scores.device).split(rows_per_forward):
        support = None if rollout.support is None else rollout.support[rows]
        ids, mask = rollout.input_ids[rows], rollout.attention_mask[rows]
        parts.append(policy.evaluate(ids, mask, rollout.prompt_slots, support).logprobs)
    return torch.cat(parts) * rollout.response_mask


def _keep(last_infos: dict[str, np.ndarray], info: dict[str, Any]) -> None:
    """Copy the info of the rows that ended in this step; vector infos mark them with ``_key``."""
    for key, present in info.items():
        if key.startswith("_"):
            column = np.asarray(info[key[1:]])
            last_infos.setdefault(key[1:], np.zeros_like(column))[present] = column[present]


def _metrics(rollout: Rollout, last_infos: dict[str, np.ndarray], eos_token_id: int) -> dict[str, float]:
    response = rollout.input_ids[:, rollout.prompt_slots :]
    summary = torch.stack(
        [
            rollout.scores.mean(),
            rollout.scores.std(correction=0),
            (rollout.logprobs - rollout.ref_logprobs).sum(-1).mean(),
            rollout.response_mask.sum().float(),
            ((response == eos_token_id) & rollout.response_mask).any(-1).float().mean(),
        ]
    ).tolist()  # one transfer
    metrics = dict(zip(("score_mean", "score_std", "kl", "response_tokens", "ended_by_eos"), summary, strict=True))
    metrics["response_length"] = metrics["response_tokens"] / len(rollout.scores)
    report = {key: column for key, column in last_infos.items() if key not in ENVIRONMENT_KEYS and column.ndim == 1}
    return metrics | {key: float(column.mean()) for key, column in report.items()}
