"""``tokenmdp eval``: a run's policy against the policy before training, on fresh samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from tokenmdp.cli.checks import check_numbers
from tokenmdp.cli.options import parse
from tokenmdp.evaluation.policies import comparison, comparison_table, evaluate
from tokenmdp.files import check_digests
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import evaluation_envs, make_envs, resolve_device, split_prompts
from tokenmdp.runs.opening import load_policy, open_run


@dataclass(frozen=True)
class Eval:
    """Evaluate a run's policy on its held-out prompts again, against the policy before training."""

    run: tyro.conf.Positional[Path]
    """A run directory."""
    samples: int = 256
    """Responses from each policy."""
    seed: int = 0
    """Seeds prompts and sampling; 0 is what training used for its own evaluation."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto is cuda if there is one."""


def main(arguments: Sequence[str]) -> int:
    """Parse and evaluate; returns the exit status."""
    return evaluate_run(parse(Eval, "eval", arguments))


def evaluate_run(arguments: Eval) -> int:
    """Evaluate a run's policy again, against its reference, on its evaluation prompts."""
    console = make_console()
    check_numbers(arguments, samples=2)  # an interval needs two
    run, settings = open_run(arguments.run)
    settings = replace(settings, device=resolve_device(arguments.device))
    check_digests(run.checkpoint)
    split = split_prompts(settings)
    envs = make_envs(settings, 1, split.held_out)
    policy, reference = (
        load_policy(str(path), envs, settings.config, settings.device)
        for path in (run.checkpoint, run.checkpoint / "state" / "reference")
    )
    start = reference  # unless the run was given another one
    if settings.reference is not None:
        start = load_policy(settings.policy, envs, settings.config, settings.device)
    with console.status("evaluating"):
        envs = evaluation_envs(settings, arguments.samples, split.held_out)
        before, after = (
            evaluate(model, reference, envs, samples=arguments.samples, seed=arguments.seed, shown=0)
            for model in (start, policy)
        )
        envs.close()
    what = f"{len(after.scores)} responses to {split.label}, seed {arguments.seed}"
    console.print(comparison_table(comparison(before, after), what))
    return 0
