"""Scores, KL and samples of a policy on given prompts, with intervals, and the table that compares two of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from rich.table import Table

from tokenmdp.files import CheckpointError, write_text
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.report.samples import Sample
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.samples import samples_from_rollout
from tokenmdp.types import Rollout

if TYPE_CHECKING:
    from tokenmdp.models.policy import CausalLMPolicy

KEPT_SAMPLES = 16  # in the report
EVALUATION_SEED = 1_000_003  # far from the seeds of training rows, which count up from small numbers


@dataclass(frozen=True)
class Evaluation:
    """One policy on one list of prompts; index i of every list is episode i."""

    scores: list[float]
    kls: list[float]  # sum over tokens of log pi - log pi_ref, nats; a single sample may be negative
    lengths: list[int]
    samples: list[Sample]  # the first few episodes as text


def evaluate(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy,
    envs: VectorEnv,
    *,
    samples: int,
    seed: int = 0,
) -> Evaluation:
    """Play ``samples`` episodes in ``envs``; the same ``seed`` draws the same prompts whatever the policy."""
    tokenizer = envs.unwrapped.task.tokenizer  # type: ignore[attr-defined]
    result = Evaluation([], [], [], [])
    for rollout in played(envs, policy, reference, samples=samples, seed=seed):
        kept = rollout.response_mask
        result.scores.extend(rollout.scores.tolist())
        result.kls.extend(((rollout.logprobs - rollout.ref_logprobs) * kept).sum(-1).tolist())
        result.lengths.extend(kept.sum(-1).tolist())
        wanted = KEPT_SAMPLES - len(result.samples)
        result.samples.extend(samples_from_rollout(rollout, tokenizer)[: max(wanted, 0)])
    return result


def played(
    envs: VectorEnv, policy: CausalLMPolicy, reference: CausalLMPolicy, *, samples: int, seed: int
) -> Iterator[Rollout]:
    """Rollouts of ``samples`` episodes together, the last one cut; prompts and sampling noise depend on ``seed`` only.

    ``envs`` has no autoreset and is under a credit wrapper.
    """
    generator = torch.Generator(policy.lm.device).manual_seed(EVALUATION_SEED + seed)
    for start in range(0, samples, envs.num_envs):
        rollout, _ = collect(envs, policy, reference, generator, seed=EVALUATION_SEED * (1 + seed) + start)
        yield Rollout(*(None if part is None else part[: samples - start] for part in rollout))  # type: ignore[arg-type]


def save_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write it as JSON, atomically."""
    write_text(path, json.dumps(asdict(evaluation)) + "\n")


def load_evaluation(path: Path) -> Evaluation:
    """Read what `save_evaluation` wrote.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        evaluation = Evaluation(**record)
        return replace(evaluation, samples=[Sample(**sample) for sample in record["samples"]])
    except (RecursionError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} holds no evaluation ({error}); delete it and it is made anew") from error


def comparison(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Estimate]]:
    """Mean and 95% interval of each quantity before and after, and of the change prompt by prompt."""
    quantities: dict[
        str, tuple[Sequence[float], Sequence[float]]
    ] = {  # KL: to the reference, nats per sequence; tokens: of the response
        "score": (before.scores, after.scores),
        "KL": (before.kls, after.kls),
        "tokens": (before.lengths, after.lengths),
    }
    return {
        name: {
            "before": mean_interval(old),
            "after": mean_interval(new),
            "change": mean_interval(np.subtract(new, old).tolist()),
        }
        for name, (old, new) in quantities.items()
    }


def comparison_table(rows: dict[str, dict[str, Estimate]], what: str) -> Table:
    """`comparison` for the terminal; ``what`` was compared."""
    caption = "mean [95% interval]; KL to the reference in nats a sequence; the change is taken prompt by prompt"
    table = Table(title=what, caption=caption)
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, intervals in rows.items():
        table.add_row(name, *(str(intervals[key]) for key in ("before", "after", "change")))
    return table
