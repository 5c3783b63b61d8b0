"""The ``tokenmdp`` command: ``train``, ``sample``, ``score`` and ``eval``.

This module only parses arguments and reports errors. Everything that needs torch is imported when a command runs, so
that ``tokenmdp --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import tyro
from gymnasium.error import Error as GymnasiumError
from rich.console import Console
from rich.text import Text

CreditName = Literal["sparse", "uniform", "attention"]


@dataclass(frozen=True)
class Train:
    """Train a policy with PPO against a reward model, then show what changed.

    Run the same command again to go on with an interrupted run.
    """

    preset: Literal["quick", "smoke"] = "quick"
    """quick: the bundled movie-review model, minutes on two CPU cores; smoke: an untrained toy model, seconds."""
    credit: CreditName = "attention"
    """How the score is spread over the tokens."""
    credit_beta: float = 0.8
    """For attention credit: the dense share; 0 is sparse."""
    seed: int = 1
    """Seeds sampling, minibatches and prompts."""
    updates: int | None = None
    """PPO updates in all; None takes the preset's. Raise it to train a finished run further."""
    num_envs: int | None = None
    """Episodes an update; None takes the preset's."""
    policy: str | None = None
    """Bundled name, directory or hub name of a causal language model; None takes the preset's."""
    tokenizer: str | None = None
    """Bundled name, directory or hub name; None takes the policy's."""
    reward_model: str | None = None
    """Bundled name, directory or hub name of a sequence classifier; None takes the preset's."""
    prompts: str | None = None
    """File, directory or data-set name; None takes the preset's."""
    eval_prompts: str | None = None
    """Prompts for the evaluation before and after; None keeps a fifth of the prompts out of training."""
    max_new_tokens: int | None = None
    """Longest response in tokens; None takes the preset's."""
    ppo: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of PPOConfig, such as --ppo kl_coef=0.1; may be repeated."""
    eval_samples: int | None = None
    """Responses before and after training; None takes the preset's."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""
    out: Path | None = None
    """Run directory; None is runs/PRESET-CREDIT-seedSEED."""
    resume: bool = True
    """Go on from the run directory's checkpoint if it has one."""
    reexec: bool = True
    """Let the command execute itself once more with glibc's allocator told to keep its memory (faster on CPU)."""


@dataclass(frozen=True)
class Sample:
    """Write texts with a trained policy and tint each token by its credit."""

    source: tyro.conf.Positional[str]
    """A run directory, or the name or directory of a model."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An opening to continue; may be repeated. None: held-out prompts of the run, or bundled ones."""
    num: int = 8
    """How many texts (for each prompt that is given)."""
    credit: CreditName | None = None
    """How the score is spread over the tokens; None takes the run's, or attention."""
    reward_model: str | None = None
    """Bundled name, directory or hub name of a sequence classifier; None takes the run's, or the bundled one."""
    max_new_tokens: int | None = None
    """Longest response in tokens; None takes the run's, or 16."""
    temperature: float | None = None
    """Below 1 sharpens the distribution, towards the likeliest token at every step; None takes the run's, or 1."""
    top_k: int | None = None
    """Sample among the k likeliest tokens, 0 is all; None takes the run's, or 0."""
    seed: int = 0
    """Seeds the sampling."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""
    html: Path | None = None
    """Also write a page with the numbers to this file."""


@dataclass(frozen=True)
class Score:
    """Score a text and show the credit of each of its tokens."""

    text: tyro.conf.Positional[str]
    """The response to score."""
    prompt: str = ""
    """Text before it, which is scored too but gets no credit."""
    credit: CreditName = "attention"
    """How the score is spread over the tokens."""
    credit_beta: float = 1.0
    """For attention credit: the dense share; 1 shows the attention alone."""
    reward_model: str = "imdb-tiny"
    """Bundled name, directory or hub name of a sequence classifier."""
    tokenizer: str | None = None
    """Bundled name, directory or hub name; None takes the reward model's."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""
    html: Path | None = None
    """Also write a page with the numbers to this file."""


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
    """Where policy and reward model run: cpu, cuda, cuda:1; auto takes cuda if there is one."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
)


def installed_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("tokenmdp")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def run(command: Train | Sample | Score | Eval) -> int:
    """Carry out one parsed command; returns the exit status."""
    if isinstance(command, Train):
        from tokenmdp.commands.train import train

        return train(command)
    from tokenmdp.commands import inspection

    if isinstance(command, Sample):
        return inspection.sample(command)
    if isinstance(command, Score):
        return inspection.score(command)
    return inspection.evaluate_run(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``tokenmdp`` command.

    Returns:
        0; 2 for a user's error, which is one line on standard error; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"tokenmdp {installed_version()}")
        return 0
    command: Train | Sample | Score | Eval = tyro.cli(
        Command,
        prog="tokenmdp",
        description="Text generation as a token MDP: train, sample, score, evaluate.",
        args=arguments,
    )
    if isinstance(command, Train) and command.reexec and argv is None:
        from tokenmdp.commands.allocator import reexecute_with_settings

        reexecute_with_settings()
    try:
        return run(command)
    except KeyboardInterrupt:
        print("interrupted" + ("; run the same command to go on" if isinstance(command, Train) else ""))
        return 130
    except (ValueError, OSError, FloatingPointError, RuntimeError, GymnasiumError) as error:
        own = type(error).__module__.startswith("tokenmdp")
        if os.environ.get("TOKENMDP_TRACEBACK") or (isinstance(error, RuntimeError) and not own):
            raise
        # These errors name the value and the remedy; a trace above them would hide both.
        kind = "" if own or type(error) is ValueError else f"{type(error).__name__}: "
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(Text.assemble(("error: ", "bold red"), f"{kind}{error}"))
        console.print("(TOKENMDP_TRACEBACK=1 shows where)", style="dim")
        return 2


if __name__ == "__main__":
    sys.exit(main())
