"""The value of a prefix, estimated by playing it to the end many times."""

from __future__ import annotations

from collections import deque

import torch
from gymnasium.vector import VectorEnv

from tokenmdp.envs.vector import TextGenVectorEnv
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.rollouts.collecting import credited_envs
from tokenmdp.rollouts.decoding import decode, uniforms_for
from tokenmdp.training.processes import ALONE, Processes
from tokenmdp.types import Rollout


@torch.no_grad()
def monte_carlo_values(
    envs: VectorEnv,
    policy: CausalLMPolicy,
    rollout: Rollout,
    num_rollouts: int,
    generator: torch.Generator | None = None,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """``values[t] = mean over num_rollouts continuations of y[<t] of their score``, sampled through the environment.

    For every state of the rollout the environment is reset to its prompt, prefix and horizon, and the policy plays on.
    That is ``num_rollouts`` episodes per response token, all of one t together: T reward-model calls on up to
    ``N * num_rollouts`` texts each. The rows of ``envs`` are left alone; the reward model is shared.

    Source: Kazemnejad et al., "VinePPO: Refining Credit Assignment in RL Training of LLMs", 2024.

    Args:
        envs: the environments that the rollout was collected in, not reset since then.
        policy: continues the prefixes; for an advantage, the one that sampled the rollout.
        rollout: N episodes.
        num_rollouts: continuations of each prefix, at least 1.
        generator: sampling noise, on the policy's device or on the CPU.
        processes: whose rows together are the rollout; each continues those of its own ``envs``.

    Returns:
        (N, H) float32 on the rollout's device, zero outside the response; unbiased for ``E[score | y[<t]]``.
    """
    base = credited_envs(envs)
    if num_rollouts < 1:
        raise ValueError(f"num_rollouts={num_rollouts}; a mean needs at least 1 continuation")
    if len(rollout.scores) != envs.num_envs * processes.size:
        raise ValueError(
            f"a rollout of {len(rollout.scores)} episodes was not collected in {envs.num_envs * processes.size} rows; "
            "pass its envs"
        )
    ids, mask, prompt_slots = rollout.input_ids, rollout.attention_mask, rollout.prompt_slots
    mine = processes.rows(envs.num_envs)
    horizons = base.horizons.tolist()
    values = torch.zeros_like(rollout.values)
    horizon = base.task.max_new_tokens
    with (
        processes.raise_together(),
        processes.whole_weights(policy),
        policy.decoding(envs.num_envs * num_rollouts, horizon),
    ):
        for t in range(rollout.response_mask.shape[1]):
            rows = rollout.response_mask[:, t].nonzero()[:, 0]
            branches = rows.repeat(num_rollouts)
            uniforms = uniforms_for(base.task.max_new_tokens - t, len(branches), values.device, generator)
            own = (branches >= mine.start) & (branches < mine.stop)
            if not own.any():
                continue
            rows, branches = rows[(rows >= mine.start) & (rows < mine.stop)], branches[own]
            seen = slice(prompt_slots + t)
            options: dict[str, list[object]] = {"prompt": [], "response_prefix": []}
            for text, shown in zip(ids[branches, seen].cpu(), mask[branches, seen].cpu(), strict=True):
                options["prompt"].append(text[:prompt_slots][shown[:prompt_slots]].tolist())
                options["response_prefix"].append(text[prompt_slots:].tolist())
            if base.task.horizon_range is not None:
                options["horizon"] = [horizons[row - mine.start] for row in branches.tolist()]
            continuations = TextGenVectorEnv(
                len(branches), task=base.task, autoreset_mode="Disabled", score_when="all_done"
            )
            continuations.reset(options=options)
            state = policy.prefill(ids[branches, seen], mask[branches, seen], step=t)
            (last,) = deque(decode(continuations, policy, state, uniforms[:, own]), maxlen=1)  # it gives all scores
            scores = torch.as_tensor(last.rewards, dtype=torch.float32, device=values.device)
            values[rows, t] = scores.view(num_rollouts, -1).mean(0)
    return processes.reduce_mean(values) * processes.size  # every other process left these rows at 0
