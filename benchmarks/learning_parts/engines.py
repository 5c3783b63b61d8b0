"""TRL and our agent behind one call: make the next update and report its numbers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from speed_parts.trl_process import TRLProcess, as_it_comes, make_environment

from learning_parts.protocol import TRL_ALLOCATOR, Protocol, Run
from tokenmdp.agents.ppo import PPO
from tokenmdp.models.names import resolve
from tokenmdp.reward_models import RewardModel
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.environments import make_envs, split_prompts
from tokenmdp.runs.settings import PRESETS, RunSettings
from tokenmdp.types import Episode

Record = dict[str, float]
Update = Callable[[], Record]

SCORE_TOLERANCE = 1e-4  # two versions of transformers add floats in another order


@contextlib.contextmanager
def opened(run: Run, trl_venv: Path) -> Iterator[tuple[Update, dict[str, str]]]:
    """A function that makes the run's next update, and the versions of TRL's packages where TRL runs it.

    A record holds: update; score, the mean of the batch; kl, the mean of ``sum_t (logprob - ref_logprob)`` per
    sequence; objective, ``score - kl_coef * kl``; explained_variance, ``1 - Var(returns - values) / Var(returns)``
    before the update; entropy, nats per token; response_length; seconds, of sampling, scoring and learning.
    """
    settings = run_settings(run)
    prompts = split_prompts(settings).training
    if not run.engine.is_trl:
        envs = make_envs(settings, settings.num_envs, prompts)
        agent = PPO(settings.policy, envs, run.engine.config(run.protocol, run.seed))
        yield lambda: our_update(agent, run.protocol), {}
        return
    envs = make_envs(settings, 1, prompts)
    environ = dict(os.environ) if run.engine.name == TRL_ALLOCATOR else as_it_comes(os.environ)
    with TRLProcess(make_environment(trl_venv), trl_order(run, settings, envs), environ) as process:
        number, reward_model = 0, envs.unwrapped.task.reward_model  # type: ignore[attr-defined]

        def update() -> Record:
            nonlocal number
            answer, number = process.iteration(), number + 1
            if number == 1:
                check_scores(process, answer, reward_model)
            return trl_record(answer, number, run.protocol)

        yield update, process.versions


def run_settings(run: Run) -> RunSettings:
    """The settings that ``tokenmdp train`` would be given."""
    return replace(
        PRESETS["quick"].settings,
        num_envs=run.protocol.episodes,
        max_new_tokens=run.protocol.response_tokens,
        credit=run.engine.credit,
        credit_beta=default_beta(run.engine.credit),
        seed=run.seed,
    )


def trl_order(run: Run, settings: RunSettings, envs: VectorEnv) -> dict[str, Any]:
    """The start order for TRL's process: the same models, and the token ids that our environment draws from."""
    return {
        "policy": str(Path(resolve("policy", settings.policy)).resolve()),
        "reward_model": str(Path(resolve("reward_model", settings.reward_model)).resolve()),
        "prompts": envs.unwrapped.task.prompts.encoded,  # type: ignore[attr-defined]
        "response": (settings.min_new_tokens, run.protocol.response_tokens),
        "ppo": run.engine.trl(run.protocol),
        "seed": run.seed,
        "threads": run.protocol.threads,
        "device": "cpu",
    }


def our_update(agent: PPO, protocol: Protocol) -> Record:
    """`PPO.learn` for one update."""
    agent.learn(1)
    metrics = agent.history[-1]
    return record(
        protocol,
        metrics["score_mean"],
        {key: metrics[key] for key in ("update", "kl", "explained_variance", "entropy", "response_length", "seconds")},
    )


def trl_record(answer: dict[str, Any], number: int, protocol: Protocol) -> Record:
    """The same record from an answer of TRL's process."""
    numbers = {key: answer[key] for key in ("kl", "explained_variance", "entropy", "seconds")}
    count = len(answer["scores"])
    numbers |= {"update": number, "response_length": answer["tokens"] / count}
    return record(protocol, sum(answer["scores"]) / count, numbers)


def record(protocol: Protocol, score: float, numbers: Record) -> Record:
    """The numbers with the score and the objective that both sides maximise.

    >>> record(Protocol(kl_coef=0.5), 2.0, {"kl": 3.0})
    {'score': 2.0, 'objective': 0.5, 'kl': 3.0}
    """
    return {"score": score, "objective": score - protocol.kl_coef * numbers["kl"], **numbers}


def check_scores(process: TRLProcess, answer: dict[str, Any], reward_model: RewardModel) -> None:
    """Refuse a TRL side that scores the same token ids differently from our environment.

    The texts are those of its first update, and the same with an end-of-text token after them.

    Raises:
        RuntimeError: a score differs.
    """
    texts, tokenizer = answer["texts"], reward_model.tokenizer
    assert tokenizer is not None
    ended = [[*text, tokenizer.eos_token_id] for text in texts]
    theirs = torch.tensor([*answer["scores"], *process.scores(ended)])
    ours = our_scores([*texts, *ended], reward_model)
    worst = int((ours - theirs).abs().argmax())
    if not torch.allclose(ours, theirs, rtol=0, atol=SCORE_TOLERANCE):
        raise RuntimeError(
            f"TRL's side scores {tokenizer.decode([*texts, *ended][worst])!r} as {theirs[worst]:.5f} and our "
            f"environment as {ours[worst]:.5f}; the two would learn different rewards"
        )


def our_scores(texts: Sequence[Sequence[int]], reward_model: RewardModel) -> torch.Tensor:
    """Scores of whole texts (token ids each) by our environment's reward model; (N,)."""
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.tensor([[len(text)] for text in texts])
    return reward_model(Episode(rows, mask, mask[:, 1:]), needs=frozenset()).score
