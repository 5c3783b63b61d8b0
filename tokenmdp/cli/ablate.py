"""``tokenmdp ablate``: a grid of training runs, then credit quality, statistics and a report."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from tokenmdp.cli.checks import check_directory, check_numbers, check_seed
from tokenmdp.cli.options import ScoreChoice, as_options, parse_parts, preset_in, value_in
from tokenmdp.cli.study_quality import measure_credit_quality
from tokenmdp.files import locked
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.settings import SET_APART, agent_config
from tokenmdp.study.directory import declare, load_study
from tokenmdp.study.grid import expand, expected_cost, read_rates, shard_of
from tokenmdp.study.model_checks import check_models
from tokenmdp.study.presets import PLANS, Plan
from tokenmdp.study.report import terminal
from tokenmdp.study.results import StudyError, cell_file, read_result
from tokenmdp.study.scheduler import default_jobs, run_cells

# These do not change what a cell computes.
VARIED = (
    "methods", "seeds", "lengths", "credit_betas", "kl_coefs", "gae_lambdas", "estimators", "critics", "reward_models",
    "tried_rates", "updates", "eval_every", "eval_samples",
)  # fmt: skip
OF_THE_BASE = ("policy", "prompts", "num_envs", "score")
NOT_OPTIONS = (*SET_APART, "learning_rate")  # each method has a rate of its own
UNRECORDED = ("out", "jobs", "shard", "device", "quality_texts", "report_only")


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """Compare credit methods: many training runs side by side, with statistics and a report.

    Run the same command again to go on: finished runs are kept. Several presets and plans may share a directory; the
    report is about all of them.
    """

    preset: Literal["quick", "tune", "custom", "smoke"] = "quick"
    """quick: minutes on two CPU cores; tune: learning rates; custom: the methods you name; smoke: an untrained toy
    model, seconds. Sets the defaults of all other options."""
    plan: Path | None = None
    """A JSON file of options in place of a preset, such as {"methods": ["sparse", "red"], "seeds": [1, 2]}, as changes
    to the preset custom; the command line changes them in turn. Default: none."""
    out: Path | None = None
    """Directory of the study. Default: runs/ and the name of the preset or of the plan."""
    methods: tuple[str, ...]
    """Credit methods, with options as in attention:credit_beta=0.4 or shapley:budget=64, or module.Class for one of
    your own."""
    seeds: tuple[int, ...]
    """One run per seed and combination of everything else."""
    lengths: tuple[str, ...]
    """Response lengths such as 8-16, which are 8 to 15 tokens, or 16."""
    credit_betas: tuple[float, ...]
    """Dense shares to try in every method that has one; without any, each method's own."""
    kl_coefs: tuple[float, ...]
    """Fixed KL coefficients to try."""
    gae_lambdas: tuple[float, ...]
    """Values of gae_lambda to try; 1 is the reward-to-go, in which a critic's errors do not bias the gradient."""
    estimators: tuple[str, ...]
    """Advantages to try: reward_to_go (GAE), full_return, vine."""
    critics: tuple[str, ...]
    """Critics to try: slow (its head learns at the policy's rate), shared (the default), separate (a transformer of its
    own)."""
    reward_models: tuple[str, ...]
    """Bundled names, directories or hub names of sequence classifiers to try; without any, the preset's."""
    score: ScoreChoice = None
    """Default: by its labels."""
    policy: str
    """Bundled name, directory or hub name of a causal language model, with its tokenizer."""
    gold: str | None = None
    """A second reward model that no policy is trained on, or "none". Default: the preset's, or none with --policy."""
    align: Literal["offsets"] | None = None
    """offsets: the reward model reads with its own tokenizer and credit moves to the policy's tokens."""
    tried_rates: tuple[float, ...]
    """Learning rates to try with every method; in the preset tune one is chosen for each."""
    prompts: str | None
    """File, directory or data-set name; the environment's own if it is None."""
    updates: int
    """Updates of each run."""
    num_envs: int
    """Episodes per update."""
    eval_every: int
    """Updates between evaluations on held-out prompts."""
    eval_samples: int
    """Responses in an evaluation."""
    learning_rate: float | None = None
    """Of every method. Default: the preset's."""
    learning_rates: Path | None = None
    """A JSON file of methods and learning rates, such as the learning_rates.json that the preset tune writes."""
    device: str = "auto"
    """cpu, cuda for all GPUs, or one such as cuda:1; auto is cuda if there is one."""
    jobs: int | None = None
    """Runs at a time. Default: the number of cores, or of GPUs."""
    shard: str | None = None
    """I/N: only every Nth run, from the Ith on, so that N commands share a study; the last to end reports. Default: all
    runs."""
    quality_texts: int = 100
    """Texts on which each reward model's credit is compared with leave-one-out importance after the runs; 0 leaves it
    out (it takes minutes for a large model on a CPU)."""
    report_only: bool = False
    """Run nothing: write the report of what is there."""


def plan_options(preset: str = "quick", **changes: Any) -> Ablate:
    """The options of a preset, with some changed.

    >>> plan_options("smoke", seeds=(1,)).seeds
    (1,)
    """
    plan = PLANS[preset]
    taken = {name: getattr(plan, name) for name in VARIED} | {name: getattr(plan.base, name) for name in OF_THE_BASE}
    return Ablate(**{"preset": preset, **taken, **changes})


def main(arguments: Sequence[str]) -> int:
    """Parse, run and report; returns the exit status."""
    return ablate(*parse_command(arguments))


def parse_command(arguments: Sequence[str]) -> tuple[Ablate, dict[str, Any]]:
    """The options, and the fields of the algorithm's configuration that differ from the preset's.

    Raises:
        StudyError: a plan file is not a JSON object of options that say what to run, or is given beside a preset.
    """
    place = value_in(arguments, "--plan")
    if place is not None and (preset := value_in(arguments, "--preset")) is not None:
        raise StudyError(f"--plan {place} changes the preset custom, and --preset is {preset}; leave out one of them")
    preset = preset_in(arguments, PLANS) if place is None else "custom"
    base = PLANS[preset].base
    config = agent_config(base, updates=1)
    own = as_options(config, NOT_OPTIONS)
    planned = [] if place is None else ["--preset", preset, *_words(read_plan(Path(place), own))]
    parts = {"general": as_options(plan_options(preset)), base.algorithm.replace("-", "_"): own}
    options, chosen = parse_parts("ablate", [*planned, *arguments], inspect.getdoc(Ablate) or "", parts)
    return Ablate(**options), {name: value for name, value in chosen.items() if value != getattr(config, name)}


def read_plan(place: Path, config: Any) -> dict[str, Any]:
    """The options in a plan file.

    Args:
        place: The file.
        config: What `as_options` made of the algorithm's configuration.

    Raises:
        StudyError: it is not a JSON object of options that say what to run.
    """
    known = {one.name for kind in (Ablate, config) for one in fields(kind)}
    known -= {"preset", "plan", "learning_rates", *UNRECORDED}
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
        unknown = ", ".join(sorted(set(record) - known)) if isinstance(record, dict) else "no options"
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(
            f"--plan {place} cannot be read ({error}); give a file of JSON such as "
            '{"methods": ["sparse", "red"], "seeds": [1, 2]}'
        ) from error
    if unknown:
        raise StudyError(f"--plan {place} has {unknown}; it is a JSON object of {', '.join(sorted(known))}")
    return record


def ablate(arguments: Ablate, config: Mapping[str, Any] | None = None) -> int:
    """Run the missing cells of a grid, then report on the whole study; returns the exit status.

    Args:
        arguments: The grid.
        config: Fields of the algorithm's configuration that differ from the preset's.
    """
    logging.disable_progress_bar()
    console = make_console()
    grid = arguments.preset if arguments.plan is None else arguments.plan.stem
    out = arguments.out or Path("runs") / grid
    if arguments.report_only:
        terminal.report(out, grid, console)
        return 0
    device = resolve_device(arguments.device)
    config = config or {}
    check_numbers(arguments, jobs=1, num_envs=1)
    for seed in arguments.seeds:
        check_seed(seed, "--seeds")
    check_directory(out)
    for name in ("learning_rate", "learning_rates"):
        if arguments.tried_rates and getattr(arguments, name) is not None:
            rates, flag = " ".join(f"{rate:g}" for rate in arguments.tried_rates), name.replace("_", "-")
            raise StudyError(
                f"--{flag} is {getattr(arguments, name)}, and this grid tries the rates {rates}; leave out --{flag}, "
                "or pass --tried-rates without a value"
            )
    plan = plan_of(arguments, config)
    cells = expand(plan, None if arguments.learning_rates is None else read_rates(arguments.learning_rates))
    mine = cells if arguments.shard is None else shard_of(cells, arguments.shard)
    most = default_jobs(device)
    jobs = most if arguments.jobs is None else arguments.jobs
    if arguments.quality_texts < 0 or arguments.quality_texts == 1:
        raise StudyError(f"--quality-texts is {arguments.quality_texts}; it must be 0 or at least 2")
    with console.status("loading the models once, to find errors before the work"):
        check_models(cells)
    declare(out, plan.name, cells, {"command": command_of(arguments, config), **_given(arguments, config)})
    share = "" if arguments.shard is None else f" (shard {arguments.shard} of {len(cells)})"
    done = [cell for cell in mine if cell_file(out, cell.id).exists()]
    cost = expected_cost(
        [cell for cell in mine if cell not in done], [read_result(out, cell.id) for cell in done], jobs
    )
    console.print(
        f"{out}: {len(mine)} cells{share}, {len(done)} of them finished; {jobs} at a time on {device}; {cost}",
        highlight=False,
        soft_wrap=True,
    )
    errors = run_cells(out, mine, jobs=jobs, device=device, console=console)
    study = load_study(out)
    left = [cell for cell in cells if cell.id not in study.results.keys() | study.errors.keys() | errors.keys()]
    try:
        if not left and not study.results:
            console.print("no run finished, so there is nothing to report", style="red")
        elif not left:
            if arguments.quality_texts:
                with locked(out / "cells"):  # of two that end at once the second finds it measured
                    measure_credit_quality(out, arguments.quality_texts, device, console)
            terminal.report(out, plan.name, console)
        else:
            console.print(
                f"{len(left)} of {len(cells)} cells are left to other shards; the one that ends last writes the "
                f"report, and so does `tokenmdp ablate --out {out} --report-only`",
                highlight=False,
                soft_wrap=True,
            )
    finally:  # on a full disk the report would fail too
        for cell in mine:
            if cell.id in errors:
                console.print(
                    f"failed: {cell.method}, {cell.setting}, seed {cell.seed}: {errors[cell.id]} "
                    f"(trace: {cell_file(out, cell.id, '.error.txt')}; the same command tries it again)",
                    style="red",
                    highlight=False,
                    soft_wrap=True,
                )
    return 1 if errors else 0


def plan_of(arguments: Ablate, config: Mapping[str, Any]) -> Plan:
    """The preset, or the plan file, with the changes from the command line.

    Models and prompts keep the names that were given, a relative directory too: an absolute one would be of this
    machine, and the cells' IDs with it.
    """
    plan = PLANS[arguments.preset]
    if arguments.plan is not None:
        plan = replace(plan, name=arguments.plan.stem)
    rate = {} if arguments.learning_rate is None else {"learning_rate": arguments.learning_rate}
    base = replace(
        plan.base,
        **{name: getattr(arguments, name) for name in OF_THE_BASE},
        tokenizer=plan.base.tokenizer if arguments.policy == plan.base.policy else arguments.policy,
        align=arguments.align,
        config=plan.base.config | dict(config) | rate,
    )
    gold = plan.gold if base.policy == plan.base.policy else None  # it reads the preset's tokens
    if arguments.gold is not None:
        gold = None if arguments.gold == "none" else arguments.gold
    varied = {name: getattr(arguments, name) for name in VARIED}
    return replace(plan, **{**varied, "seeds": tuple(dict.fromkeys(arguments.seeds))}, base=base, gold=gold)


def command_of(arguments: Ablate, config: Mapping[str, Any]) -> str:
    """The shell command that runs these cells again.

    >>> command_of(plan_options("quick", seeds=(1, 2), jobs=4), {"kl_coef": 0.1, "anneal_lr": True})
    'tokenmdp ablate --preset quick --seeds 1 2 --kl-coef 0.1 --anneal-lr'
    """
    grid = ["--preset", arguments.preset] if arguments.plan is None else ["--plan", str(arguments.plan)]
    return shlex.join(["tokenmdp", "ablate", *grid, *_words(_given(arguments, config))])


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options with JSON values as words of a command line."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value)] if isinstance(value, list) else [f"--{flag}", str(value)]
    return words


def _given(arguments: Ablate, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options given beside the preset or the plan that change what is computed, as JSON values."""
    plan = arguments.plan
    default = (plan_options(arguments.preset), {}) if plan is None else parse_command(["--plan", str(plan)])
    given = {name: value for name, value in asdict(arguments).items() if value != getattr(default[0], name)}
    given = {name: value for name, value in given.items() if name not in ("preset", "plan", *UNRECORDED)}
    given |= {name: value for name, value in config.items() if name not in default[1] or value != default[1][name]}
    return {
        name: list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        for name, value in given.items()
    }
