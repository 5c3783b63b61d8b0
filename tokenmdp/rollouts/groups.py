"""Several responses to each of some prompts, sampled through an environment, as groups to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from tokenmdp.models.tokens import response_texts
from tokenmdp.preferences import DifferentPrompts, Group
from tokenmdp.rollouts.collecting import collect, credited_envs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenmdp.models.policy import CausalLMPolicy
    from tokenmdp.types import Rollout


def sample_groups(
    envs: VectorEnv, policy: CausalLMPolicy, responses_per_prompt: int, *, seed: int, batch: int
) -> list[Group | None]:
    """One batch of groups; the same seed and batch give the same one, whatever was sampled before.

    Args:
        envs: N rows without autoreset, under a credit wrapper; their scores are not used.
        policy: Samples.
        responses_per_prompt: K >= 2, which divides N.
        seed: Of the whole collection.
        batch: The number of this batch.

    Returns:
        N / K groups; None where fewer than two of the K responses differ.
    """
    numbers = np.random.SeedSequence((seed, batch)).generate_state(2)
    generator = torch.Generator(policy.lm.device).manual_seed(int(numbers[0]))
    rollout, _ = collect(
        envs, policy, None, generator,
        seed=int(numbers[1]), responses_per_prompt=responses_per_prompt, credited_rows=0,
    )  # fmt: skip
    return groups_from(rollout, credited_envs(envs).task.tokenizer, responses_per_prompt)


def groups_from(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, responses_per_prompt: int) -> list[Group | None]:
    """The N episodes of a rollout as N / K groups, with their ids as they were sampled.

    Responses that are the same are in a group once; it is None if fewer than two are left.

    Raises:
        DifferentPrompts: rows that should share a prompt do not.
        ValueError: K does not divide N, or is less than 2.
    """
    rows, count = len(rollout.scores), responses_per_prompt
    if count < 2 or rows % count:
        raise ValueError(f"{rows} episodes are not groups of {count}; groups have at least 2 episodes, all as many")
    slots, kept = rollout.prompt_slots, rollout.attention_mask
    groups: list[Group | None] = []
    for first in range(0, rows, count):
        members = range(first, first + count)
        prompts = [tuple(rollout.input_ids[row, :slots][kept[row, :slots]].tolist()) for row in members]
        if len(set(prompts)) > 1:
            raise DifferentPrompts(
                f"episodes {first} to {first + count - 1} have {len(set(prompts))} prompts and should have one; "
                f"collect them with responses_per_prompt={count}"
            )
        responses = dict.fromkeys(
            tuple(rollout.input_ids[row, slots:][rollout.response_mask[row]].tolist()) for row in members
        )
        if len(responses) < 2:
            groups.append(None)
            continue
        prompt, texts = response_texts(tokenizer, prompts[0], list(responses))
        groups.append(
            Group(prompt=prompt, responses=tuple(texts), prompt_ids=prompts[0], responses_ids=tuple(responses))
        )
    return groups
