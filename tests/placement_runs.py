"""The runs of placement_cases.py on the CPU and on the device of pretend_device.py, for test_device_placement.py.

python tests/placement_runs.py DIRECTORY NAME ...    # of RUNS, "credit" or "all"; writes DIRECTORY/runs.json
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pretend_device
import torch
from placement_cases import (
    EPISODES,
    RUNS,
    SHORT,
    UPDATES,
    Run,
    credited,
    make_agent,
    make_envs,
    reward_model,
    timeless,
)
from pretend_device import Watch

import tokenmdp
from tokenmdp.credit import CREDIT_METHODS
from tokenmdp.rollouts.collecting import collect
from tokenmdp.runs.environments import toy_policy


def play(run: Run, device: torch.device, directory: Path) -> dict[str, Any]:
    """Learn, watched, and save; then load and evaluate: the metrics, the mean score of new texts, what was counted."""
    plain = make_envs(reward_model(run.reward_model, device), **run.env)
    envs = credited(plain, run.credit, run.options, device)
    agent = make_agent(run, envs, device)
    at: dict[str, list[int]] = {"act": [], "gradient": [], "step": [], "evaluate": []}  # waits before each call
    called = ((agent.policy, "act"), (agent, "gradient"), (agent.optimizer, "step"), (agent.reference, "evaluate"))
    for owner, name in called:
        setattr(owner, name, noting(getattr(owner, name), at[name]))
    with Watch() as watch:
        agent.learn(UPDATES)
    agent.save(directory)
    loaded = type(agent).load(directory, envs)
    with Watch():
        evaluation = tokenmdp.evaluate(plain, loaded, episodes=EPISODES)
    return {
        "history": timeless(agent.history),
        "score": evaluation.score.value,
        "waits": [[kind, place, count] for (kind, place), count in watch.waits.most_common()],
        "waits of a token": np.diff(at["act"]).tolist(),
        "waits of a minibatch": np.subtract(at["step"], at["gradient"][: len(at["step"])]).tolist(),
        "reference forwards": len(at["evaluate"]),
        "operations": watch.operations,
    }


def noting(call: Callable[..., Any], waits: list[int]) -> Callable[..., Any]:
    """``call``, which notes how often the host has waited before it."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        waits.append(0 if Watch.now is None else Watch.now.waits.total())
        return call(*args, **kwargs)

    return noted


def credit(device: torch.device) -> dict[str, Any]:
    """The token rewards that every method of the registry gives to the same texts, by method."""
    model, policy = reward_model("gpt2", device), None
    found = {}
    for run in (RUNS[name] for name in CREDIT_METHODS):
        envs = credited(make_envs(model, **SHORT), run.credit, run.options, device)
        if policy is None:
            policy = tokenmdp.CausalLMPolicy.for_task(toy_policy(seed=0), envs.unwrapped.task).to(device)
        with Watch():
            rollout, _ = collect(envs, policy, None, torch.Generator(device).manual_seed(0), seed=0)
        found[run.credit] = rollout.token_rewards.tolist()
    return found


def mistakes(device: torch.device) -> list[str]:
    """What is said of operations on tensors of both devices."""
    here, there = torch.arange(3), torch.arange(3).to(device)
    weights = torch.ones(3, 2).to(device)
    wrong: list[Callable[[], Any]] = [
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: torch.nn.functional.embedding(here, weights),
        lambda: weights.index_put_((there,), torch.zeros(3, 2)),
    ]
    said = []
    with Watch():
        assert (there + torch.tensor(1)).tolist() == [1, 2, 3]  # a number may come from anywhere
        for call in wrong:
            try:
                call()
            except RuntimeError as error:
                said.append(str(error))
    return said


def main(directory: Path, names: list[str]) -> None:
    devices = {"there": pretend_device.DEVICE, "here": torch.device("cpu")}
    found: dict[str, Any] = {"mistakes": mistakes(pretend_device.DEVICE)}
    for name in names:
        try:
            found[name] = {
                where: credit(device) if name == "credit" else play(RUNS[name], device, directory / name / where)
                for where, device in devices.items()
            }
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    (directory / "runs.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(RUNS) if sys.argv[2:] == ["all"] else sys.argv[2:])
