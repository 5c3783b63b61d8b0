"""``tokenmdp rlhf``: demonstrations, comparisons, a reward model and a policy, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tokenmdp.cli.checks import check_directory, check_numbers
from tokenmdp.cli.options import CreditName, parse
from tokenmdp.report.pipeline_page import write_page
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.pipeline import PipelineSettings, rlhf
from tokenmdp.runs.pipeline_report import stage_table, summary
from tokenmdp.runs.settings import absolute_name


@dataclass(frozen=True)
class Rlhf:
    """Sample, ask a judge, train a reward model on all comparisons, train the policy on it; round by round.

    Run the same command again to go on after an interruption; raise --rounds to go further.
    """

    policy: str = "imdb-tiny"
    """The start: bundled name, directory or hub name of a causal language model."""
    judge: str = "imdb-gold"
    """Who compares, and says how good each policy is: bundled name, directory or hub name of a sequence classifier."""
    demonstrations: str | None = None
    """Texts for supervised fine-tuning before the first round: a file, directory or data-set name. Default: none."""
    rounds: int = 1
    """Rounds; one is the three-stage pipeline."""
    pairs_per_round: int = 4096
    """Comparisons that the judge makes in each round."""
    temperature: float = 1.0
    """T: the judge prefers a to b with probability sigmoid(T (score a - score b)); inf is always the higher score."""
    error_rate: float = 0.0
    """The share of the judge's answers that are coin flips instead."""
    algorithm: Literal["ppo", "rloo", "dpo"] = "ppo"
    """How the policy learns: on a reward model, or, dpo, from the comparisons themselves."""
    updates: int | None = None
    """Of the policy in each round. Default: 40, or with dpo one pass over the comparisons."""
    credit: CreditName = "red"
    """How the reward model's score is spread over the tokens."""
    start: Literal["sft", "last"] = "sft"
    """Which policy each round trains: the start, or that of the round before."""
    reference: Literal["fixed", "moved"] = "fixed"
    """What a round's KL is measured to: the start, or the policy of the round before."""
    prompts: str | None = None
    """File, directory or data-set name. Default: the bundled prompts."""
    max_new_tokens: int = 16
    """Longest response in tokens."""
    eval_samples: int = 256
    """Responses to held-out prompts by which a policy is judged."""
    seed: int = 1
    """Seeds everything."""
    device: str = "auto"
    """Where models run: cpu, cuda, cuda:1; auto is cuda if there is one."""
    reexec: bool = True
    """Let the command re-execute itself with memory settings of glibc that are faster on CPUs."""
    out: Path = Path("runs/rlhf")
    """Directory of the pipeline."""


def main(arguments: Sequence[str]) -> int:
    """Parse and run; returns the exit status."""
    options = parse(Rlhf, "rlhf", arguments)
    check_numbers(
        options, rounds=1, pairs_per_round=20, updates=1, max_new_tokens=1, eval_samples=2, temperature=0, error_rate=0
    )
    check_directory(options.out)
    if options.algorithm != "ppo" and options.credit != Rlhf.credit:
        raise ValueError(f"--credit {options.credit} makes no difference to {options.algorithm}; leave it out")
    console = make_console()
    given = {one.name: getattr(options, one.name) for one in fields(PipelineSettings) if one.name != "config"}
    names = {key: absolute_name(given[key]) for key in ("policy", "judge", "demonstrations", "prompts")}
    settings = PipelineSettings(**given | names | {"device": resolve_device(options.device)})
    stages = rlhf(settings, options.out, console)
    console.rule()
    pipeline = summary(settings, options.out, stages)
    console.print(stage_table(pipeline))
    page = write_page(options.out, pipeline)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)
    return 0
