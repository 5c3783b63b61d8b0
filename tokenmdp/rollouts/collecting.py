"""From a policy and a vector environment to one batch of finished episodes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from tokenmdp.envs.vector import TextGenVectorEnv
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.policy_attention import SampledAttention
from tokenmdp.reward_models import HFRewardModel, LexiconRewardModel, RetokenizedRewardModel, ScaledRewardModel
from tokenmdp.rollouts.decoding import SHARE_ENDED, RecordAttention, decode, uniforms_for
from tokenmdp.rollouts.scoring import score_under, values_of
from tokenmdp.training.processes import ALONE, Processes
from tokenmdp.types import Rollout
from tokenmdp.wrappers.base import check_above, find_credit_wrapper
from tokenmdp.wrappers.layers import check_actions, check_conversions, check_infos, check_parts

TEXT = ("input_ids", "attention_mask")  # of an observation
ENVIRONMENT_KEYS = ("score", "n_tokens", "token_mask", "token_rewards")  # the rest of the last info is credit's report

_warned_of_devices: set[str] = set()


def credited_envs(envs: VectorEnv) -> TextGenVectorEnv:
    """The environment under the wrappers, if `collect` can use it.

    Raises:
        gymnasium.error.Error: it resets rows by itself, no credit wrapper gives token_rewards, or a wrapper converts
            arrays or infos.
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
    check_conversions(envs, "an agent")
    return base


@torch.no_grad()
def collect(
    envs: VectorEnv,
    policy: CausalLMPolicy,
    reference: CausalLMPolicy | None,
    generator: torch.Generator | None = None,
    *,
    seed: int | None = None,
    rows_per_forward: int = 64,
    share_ended: float = SHARE_ENDED,
    responses_per_prompt: int = 1,
    credited_rows: int | None = None,
    valued: bool = False,
    processes: Processes = ALONE,
) -> tuple[Rollout, dict[str, float]]:
    """Play one episode in every row and score it under the frozen reference, if there is one.

    Args:
        envs: Vector environment without autoreset, under a credit wrapper. All rows are reset.
        policy: Samples through its KV cache; one transfer to the host per step.
        reference: Scores the same tokens, on the same support. None: nobody does, which saves that forward;
            ``ref_logprobs`` are the policy's own, so that kl is 0.
        generator: Sampling noise, on the policy's device or on the CPU.
        seed: Of the first row (of the first process); default: continue with the environment's random numbers.
        rows_per_forward: Rows a forward of the reference or of a value model takes at a time.
        share_ended: See `tokenmdp.rollouts.decoding.decode`; it changes the time, and numbers by float rounding.
        responses_per_prompt: K; above 1, rows K * j to K * (j + 1) - 1 play the prompt (and the horizon) that the
            first of them drew. It divides the rows of each process.
        credited_rows: How many rows get credit, the first ones (of each process); ``token_rewards`` of the others are
            NaN, all else is the same. Default: all.
        valued: Whether a policy with a value model values the tokens by it, which is a forward of its own; else the
            ``values`` of such a policy are 0.
        processes: Whose rows together are the rollout; each passes its own ``envs`` and the same ``generator`` and
            ``seed``.

    Raises:
        ChangedReward: a wrapper has changed the rewards, which the token rewards do not follow.
        WrongPlace: a wrapper has changed the actions, or what observations and infos hold.

    Returns:
        The rollout on the policy's device, without the columns that are padding in every row (so P and H may be less
        than the environment's), and metrics: score_mean, score_std, response_length, response_tokens, ended_by_eos, kl
        and the mean of every scalar that the credit wrapper reports (of the rows that get credit).
    """
    base = credited_envs(envs)
    if policy.rollout_steps == "recorded" and credited_rows != 0:
        check_recording(envs)
    _warn_of_devices(base, policy)
    base.token_rewards_read = True  # they are in the rollout, so no wrapper needs to warn
    # The numbers of all processes' rows, so that a row draws the same whichever process plays it.
    rows, num_rows = processes.rows(envs.num_envs), envs.num_envs * processes.size
    uniforms = uniforms_for(base.task.max_new_tokens, num_rows, policy.lm.device, generator)[:, rows]
    credited = slice(credited_rows)
    with processes.raise_together(), processes.whole_weights(policy):
        observation, _ = envs.reset(seed=None if seed is None else seed + rows.start)
        check_parts(observation, TEXT, "observation")
        if responses_per_prompt > 1:
            observation = _share_prompts(envs, observation, responses_per_prompt)
        rollout, last_infos = _play(envs, policy, observation, uniforms, share_ended, credited_rows)
    if reference is not None:
        rollout = rollout._replace(ref_logprobs=score_under(reference, rollout, rows_per_forward))
    if valued and policy.value_model is not None:
        rollout = rollout._replace(values=values_of(policy, rollout, rows_per_forward))
    with processes.raise_together():
        _check_finite(rollout, credited_rows, rows.start)
    report = {
        key: column[credited]
        for key, column in last_infos.items()
        if key not in ENVIRONMENT_KEYS and column.ndim == 1 and len(column[credited])
    }
    rollout = processes.gather_rollout(rollout)
    return rollout, _metrics(rollout, policy.eos_token_ids) | _column_means(processes.gather(report))


def check_recording(envs: VectorEnv) -> None:
    """Refuse environments whose credit reads the attention of every step: a replayed one gives none.

    Raises:
        ValueError: they do.
    """
    wrapper = find_credit_wrapper(envs)
    if wrapper is not None and "policy_attention" in wrapper.credit.needs:
        raise ValueError(
            f"rollout_steps='recorded' keeps no attention, which {wrapper.credit.name} credit reads at every token; "
            "choose 'copied' or 'plain'"
        )


def _share_prompts(envs: VectorEnv, drawn: dict[str, np.ndarray], group: int) -> dict[str, np.ndarray]:
    """Start every row again with the prompt and horizon that the first row of its group drew; the observations."""
    base = credited_envs(envs)
    if envs.num_envs % group:
        raise ValueError(
            f"num_envs={envs.num_envs} is not a multiple of responses_per_prompt={group}; change one of them"
        )
    first = np.arange(envs.num_envs) // group * group
    prompts = [ids[kept.astype(bool)].tolist() for ids, kept in zip(*(drawn[key][first] for key in TEXT), strict=True)]
    options: dict[str, Any] = {"prompt": prompts}
    if base.task.horizon_range is not None:
        options["horizon"] = base.horizons[first].tolist()
    return envs.reset(options=options)[0]


def _warn_of_devices(base: TextGenVectorEnv, policy: CausalLMPolicy) -> None:
    """Warn once per reward model if a classifier scores on the CPU what a policy writes on a GPU."""
    model = scorer = base.task.reward_model
    while isinstance(scorer, (RetokenizedRewardModel, ScaledRewardModel)):
        scorer = scorer.inner
    if policy.lm.device.type == "cpu" or scorer.device.type != "cpu" or isinstance(scorer, LexiconRewardModel):
        return
    if str(model) not in _warned_of_devices:
        _warned_of_devices.add(str(model))
        remedy = "make the environment with reward_device='cuda'"
        if scorer.name is None:
            remedy = "move its model to the GPU"
            if isinstance(scorer, HFRewardModel):
                remedy += ": HFRewardModel(model.to('cuda'), tokenizer)"
        if base.score_when != "all_done":
            remedy += ", and with score_when='all_done' for one call per batch"
        warnings.warn(
            f"the policy is on {policy.lm.device} and the reward model {model} on the CPU, where scoring will take "
            f"most of the time; {remedy}",
            stacklevel=3,
        )


def _play(
    envs: VectorEnv,
    policy: CausalLMPolicy,
    observation: dict[str, np.ndarray],
    uniforms: torch.Tensor,
    share_ended: float,
    credited_rows: int | None,
) -> tuple[Rollout, dict[str, np.ndarray]]:
    """The episodes that began with ``observation``, not scored under a reference, and the last info of every row."""
    task, device, wrapper = credited_envs(envs).task, policy.lm.device, find_credit_wrapper(envs)
    assert wrapper is not None  # `credited_envs` refuses that
    # Slots before the longest prompt are padding in every row.
    first_slot = int(observation["attention_mask"].any(0).argmax())
    prompt = slice(first_slot, task.max_prompt_tokens)
    last_infos: dict[str, np.ndarray] = {}
    logprobs = torch.zeros(envs.num_envs, task.max_new_tokens, device=device)
    values, tokens = torch.zeros_like(logprobs), torch.zeros_like(logprobs, dtype=torch.long)
    support = torch.zeros(*logprobs.shape, policy.top_k, dtype=torch.long, device=device) if policy.top_k else None

    length = 0  # no response is longer
    decoding = policy.decoding(envs.num_envs, task.max_new_tokens)
    watched = _attention_attached(envs, policy, prompt.stop - prompt.start, credited_rows)
    with decoding, wrapper.credit_first(credited_rows), watched as reading:
        state = policy.prefill(
            torch.as_tensor(observation["input_ids"][:, prompt], device=device),
            torch.as_tensor(observation["attention_mask"][:, prompt], device=device),
        )
        state = policy.recorded(state, task.max_new_tokens)
        for step in decode(envs, policy, state, uniforms, reading, share_ended):
            check_infos(step.info, "an agent")
            check_above(envs, step.rewards)
            tokens[step.rows, length] = step.token
            logprobs[step.rows, length], values[step.rows, length] = step.logprob, step.value
            if support is not None and step.support is not None:
                support[step.rows, length] = step.support
            _keep(last_infos, step.info)
            observation, length = step.observation, length + 1

    check_parts(last_infos, ("score", "token_mask", "token_rewards")[: 2 if credited_rows == 0 else 3], "last infos")
    seen = slice(first_slot, task.max_prompt_tokens + length)
    chosen = tokens[:, :length].cpu().numpy()
    check_actions(observation["input_ids"][:, task.max_prompt_tokens : seen.stop], chosen, last_infos["token_mask"])
    mask = torch.as_tensor(last_infos["token_mask"][:, :length], device=device)
    token_rewards = torch.full_like(logprobs, torch.nan)
    if credited_rows != 0:
        token_rewards[:credited_rows] = torch.as_tensor(last_infos["token_rewards"][:credited_rows], device=device)
    rollout = Rollout(
        input_ids=torch.as_tensor(observation["input_ids"][:, seen], device=device),
        attention_mask=torch.as_tensor(observation["attention_mask"][:, seen], device=device).bool(),
        response_mask=mask,
        logprobs=logprobs[:, :length] * mask,  # (N, H); rows that ended may have gone on sampling, which is ignored
        ref_logprobs=logprobs[:, :length] * mask,
        values=values[:, :length] * mask,
        token_rewards=token_rewards[:, :length],
        scores=torch.as_tensor(last_infos["score"], dtype=torch.float32, device=device),
        support=None if support is None else support[:, :length],
    )
    return rollout, last_infos


@contextlib.contextmanager
def _attention_attached(
    envs: VectorEnv, policy: CausalLMPolicy, prompt_columns: int, credited_rows: int | None
) -> Iterator[RecordAttention]:
    """Give the environment the policy's attention for one rollout, if its credit needs it.

    Gives what to enter around each decoding step. Afterwards the provider that was attached before is back: rows of a
    finished rollout must not credit the next episode.
    """
    base, wrapper = credited_envs(envs), find_credit_wrapper(envs)
    if wrapper is None or credited_rows == 0 or "policy_attention" not in wrapper.credit.needs:
        yield lambda rows: contextlib.nullcontext()
        return
    recorder = SampledAttention(policy, prompt_columns, envs.num_envs, base.task.max_new_tokens)
    before, base.policy_attention = base.policy_attention, recorder
    try:
        yield recorder.reading
    finally:
        base.policy_attention = before


def _check_finite(rollout: Rollout, credited_rows: int | None, first_row: int) -> None:
    """Refuse numbers that are NaN or infinite: a NaN among the weights still samples, and every mean looks fine.

    Raises:
        FloatingPointError: with the column and the first episode.
    """
    token_rewards = rollout.token_rewards.clone()
    if credited_rows is not None:
        token_rewards[credited_rows:] = 0.0  # they are NaN by intention
    columns = {
        "the policy's log-probabilities": rollout.logprobs,
        "the reference's log-probabilities": rollout.ref_logprobs,
        "the values": rollout.values,
        "the token rewards": token_rewards,
    }
    wrong = torch.stack([(~column.isfinite()).any(-1) for column in columns.values()]).cpu()  # (4, N), one transfer
    for name, rows in zip(columns, wrong, strict=True):
        if rows.any():
            raise FloatingPointError(
                f"{name} are NaN or infinite in {int(rows.sum())} of {len(rows)} episodes, first in row "
                f"{first_row + int(rows.nonzero()[0])}; look for NaN in the weights; in training load the last "
                "checkpoint and lower learning_rate and the critic's rates, or set dtype='float32'"
            )


def _keep(last_infos: dict[str, np.ndarray], info: dict[str, Any]) -> None:
    """Copy the numbers of the rows that ended in this step; vector infos mark them with ``_key``.

    Other wrappers add dictionaries (RecordEpisodeStatistics), words and objects, which are no credit's report.
    """
    for key, present in info.items():
        column = info.get(key[1:]) if key.startswith("_") else None
        if isinstance(column, np.ndarray) and column.dtype.kind in "biuf" and np.shape(present) == column.shape[:1]:
            last_infos.setdefault(key[1:], np.zeros_like(column))[present] = column[present]


def _metrics(rollout: Rollout, eos_token_ids: Sequence[int]) -> dict[str, float]:
    response = rollout.input_ids[:, rollout.prompt_slots :]
    summary = torch.stack(
        [
            rollout.scores.mean(),
            rollout.scores.std(correction=0),
            (rollout.logprobs - rollout.ref_logprobs).sum(-1).mean(),
            rollout.response_mask.sum().float(),
            (torch.isin(response, response.new_tensor(eos_token_ids)) & rollout.response_mask).any(-1).float().mean(),
        ]
    ).tolist()  # one transfer
    metrics = dict(zip(("score_mean", "score_std", "kl", "response_tokens", "ended_by_eos"), summary, strict=True))
    metrics["response_length"] = metrics["response_tokens"] / len(rollout.scores)
    return metrics


def _column_means(reports: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The mean of every column (n,) over all rows of the processes that have it.

    >>> _column_means([{"mass": np.array([0.0, 1.0])}, {"mass": np.array([2.0, 3.0])}])
    {'mass': 1.5}
    """
    names = dict.fromkeys(name for report in reports for name in report)
    return {name: float(np.concatenate([part[name] for part in reports if name in part]).mean()) for name in names}
