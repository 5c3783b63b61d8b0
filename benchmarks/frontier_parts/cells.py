"""One cell of the frontier: a policy is trained, or made from others, and evaluated on held-out prompts."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from frontier_parts.lines import FIRST, LINES, place
from tokenmdp.evaluation.policies import EVALUATION_SEED, Evaluation, evaluate, gold_scores, load_evaluation
from tokenmdp.models.names import resolve
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.soup import write_soup
from tokenmdp.models.tokens import distinct_n
from tokenmdp.reward_models import load_reward_model
from tokenmdp.rollouts import collect
from tokenmdp.runs import training
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.environments import evaluation_envs, split_prompts
from tokenmdp.runs.opening import load_policy
from tokenmdp.runs.settings import PRESETS, preset_settings
from tokenmdp.types import Rollout, response_tokens

JUDGE = "imdb-gold"
SAMPLES = 256


class MemberMissing(RuntimeError):
    """A soup's member is not trained yet; which one."""


@dataclass(frozen=True)
class Sources:
    """What all cells learn from, and where they write."""

    data: Path  # comparisons, for DPO
    reward_model: str  # a directory: what all others follow
    out: Path
    updates: int  # of what plays episodes


def measured(sources: Sources, name: str, value: float, seed: int) -> dict[str, Any]:
    """Scores of judge and reward model, KL and texts of one policy on held-out prompts."""
    line = LINES[name]
    if line.algorithm == "best-of-n":
        return best_of(int(value), sources.reward_model, seed)
    if line.algorithm == "soup":
        return soup(value, sources, seed)
    settings = preset_settings("quick", line.algorithm)
    settings = replace(
        settings, judge=JUDGE, reward_model=sources.reward_model, seed=seed, eval_samples=SAMPLES, eval_every=0,
        config=settings.config | line.changes(value),
    )  # fmt: skip
    if line.credit is not None:
        settings = replace(settings, credit=line.credit, credit_beta=default_beta(line.credit))
    learns_from_data = line.algorithm == "dpo"
    if learns_from_data:
        settings = replace(settings, data=str(sources.data), held_out=0.0)
    out = place(sources.out, name, value, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        training.train(settings, out, None if learns_from_data else sources.updates, PRESETS["quick"].checkpoint_every)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return found(
        load_evaluation(out / "after.json"),
        sum(record["seconds"] for record in records),
        0 if learns_from_data else settings.num_envs * len(records),
    ) | {"start": load_evaluation(out / "before.json").gold}


def found(evaluation: Evaluation, seconds: float, texts_scored: int) -> dict[str, Any]:
    """A cell: what was evaluated, and what it cost."""
    return {
        "judge": evaluation.gold, "reward_model": evaluation.scores, "kl": evaluation.kls,
        "distinct_2": distinct_n(evaluation.tokens, 2), "seconds": seconds, "texts_scored": texts_scored,
    }  # fmt: skip


def soup(weight: float, sources: Sources, seed: int) -> dict[str, Any]:
    """The average of PPO's strongest policy, with that weight, and its start; it costs what that policy did."""
    strongest = min(LINES[FIRST].values)
    member = place(sources.out, FIRST, strongest, seed)
    if not member.with_suffix(".json").exists():
        raise MemberMissing(f"{FIRST}, kl_coef {strongest:g}, seed {seed}")
    cost = json.loads(member.with_suffix(".json").read_text())
    out = place(sources.out, "soup", weight, seed)
    start = str(resolve("policy", "imdb-tiny"))
    write_soup((start, str(member / "checkpoint")), (1 - weight, weight), out)
    envs = held_out_envs(sources.reward_model)
    policy, reference = (load_policy(str(one), envs, {}, "cpu") for one in (out, start))
    after = evaluate(policy, reference, envs, samples=SAMPLES, judge=load_reward_model(JUDGE), shown=0)
    envs.close()
    return found(after, cost["seconds"], cost["texts_scored"])


def best_of(n: int, reward_model: str, seed: int) -> dict[str, Any]:
    """The best of n responses by the reward model; its KL is at most log n - (n - 1) / n."""
    envs = held_out_envs(reward_model)
    policy, judge = load_policy("imdb-tiny", envs, {}, "cpu"), load_reward_model(JUDGE)
    judged, scored, texts = [], [], []
    for draw in range(n):
        rows: dict[str, list[Any]] = defaultdict(list)
        # The prompts are those of every evaluation, and every draw continues them with noise of its own.
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        for rollout in _played(envs, policy, generator):
            rows["scored"] += rollout.scores.tolist()
            rows["judged"] += gold_scores(judge, rollout).tolist()
            rows["texts"] += response_tokens(rollout)
        scored.append(rows["scored"]), judged.append(rows["judged"]), texts.append(rows["texts"])
    envs.close()
    best = np.argmax(scored, axis=0)
    columns = range(SAMPLES)
    return {
        "judge": [judged[best[one]][one] for one in columns],
        "reward_model": [scored[best[one]][one] for one in columns],
        "kl": [math.log(n) - (n - 1) / n] * SAMPLES,
        "distinct_2": distinct_n([texts[best[one]][one] for one in columns], 2),
        "seconds": 0.0,
        "texts_scored": n,  # for each text that is wanted
    }


def held_out_envs(reward_model: str) -> VectorEnv:
    """Where policies are measured that no run of ours has trained."""
    settings = replace(preset_settings("quick", "rloo"), reward_model=reward_model)
    return evaluation_envs(settings, SAMPLES, split_prompts(settings).held_out)


def _played(envs: VectorEnv, policy: CausalLMPolicy, generator: torch.Generator) -> Iterator[Rollout]:
    for start in range(0, SAMPLES, envs.num_envs):
        yield collect(envs, policy, None, generator, seed=EVALUATION_SEED + start, credited_rows=0)[0]
