"""``tokenmdp train``: its options, and from them to a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from tokenmdp.agents import ALGORITHMS, DEFAULT_ALGORITHM, algorithm
from tokenmdp.cli import train_reward_model
from tokenmdp.cli.checks import check_home, check_numbers
from tokenmdp.cli.options import CreditName, ScoreChoice, as_options, parse_parts, preset_in
from tokenmdp.reward_models.retokenized import check_template
from tokenmdp.runs import training
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.settings import (
    PRESETS,
    SET_APART,
    RunSettings,
    absolute_name,
    absolute_options,
    agent_config,
    parse_options,
    preset_settings,
)

PresetName = Literal["quick", "smoke"]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a policy, then show what changed.

    Run the same command again to go on with an interrupted run.
    """

    preset: PresetName
    """quick: the bundled movie-review model, minutes on two cores; smoke: an untrained toy model, under a minute. Sets
    the defaults of all other options."""
    credit: CreditName
    """How the score is spread over the tokens."""
    credit_beta: float | None = None
    """The dense share of the credit, for methods that have one; 0 is sparse. Default: the method's own."""
    credit_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the credit method, such as --credit-option budget=64; may be repeated."""
    seed: int = 1
    """Seeds sampling, minibatches and prompts."""
    updates: int | None
    """Updates in all; raise it to train a finished run further. Without it, what learns from data makes --epochs passes
    over them."""
    data: str | None = None
    """Learn from this file, directory or data set: comparisons, or texts for sft."""
    held_out: float = 0.0
    """About the share of the comparisons' prompts that is not learned from, to test what was: every k-th, k = 1 / share
    rounded."""
    num_envs: int
    """Episodes per update."""
    policy: str
    """Bundled name, directory or hub name of a causal language model."""
    reference: str | None = None
    """A frozen policy that the KL is measured to. Default: the policy as it starts."""
    tokenizer: str | None = None
    """Bundled name, directory or hub name. Default: the policy's."""
    reward_model: str
    """Bundled name, directory or hub name of a sequence classifier."""
    score: ScoreChoice = None
    """Default: by its labels."""
    align: Literal["offsets"] | None = None
    """offsets: the reward model reads with its own tokenizer and credit moves to the policy's tokens."""
    reward_template: str | None = None
    """With --align offsets, the text that the reward model reads, such as "Q: {prompt} A: {response}". Default: prompt
    and response."""
    prompts: str | None
    """File, directory or data-set name; the environment's own if it is None."""
    eval_prompts: str | None = None
    """Prompts for the evaluation before and after. Default: a fifth of the prompts, kept out of training."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens. Default: the environment's."""
    truncate_prompt: Literal["left", "right"] | None = None
    """Which side a longer prompt loses. Default: longer prompts are refused."""
    max_new_tokens: int
    """Longest response in tokens."""
    eval_samples: int
    """Responses before and after training."""
    eval_every: int
    """Updates between evaluations as it trains; 0: only before and after."""
    judge: str | None = None
    """A second reward model, which scores the responses before and after training."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto is cuda if there is one."""
    out: Path | None = None
    """Run directory. Default: runs/PRESET[-ALGORITHM][-CREDIT][-loraRANK]-seedSEED; the default algorithm, and credit
    that the algorithm does not use, are left out."""
    resume: bool = True
    """Go on from the run directory's checkpoint if it has one."""
    reexec: bool = True
    """Let the command re-execute itself with memory settings of glibc that are faster on CPUs."""


def preset_options(preset: PresetName = "quick", algorithm: str = DEFAULT_ALGORITHM, **changes: Any) -> Train:
    """The options of a preset, with some changed.

    >>> preset_options("smoke", num_envs=4).num_envs
    4
    """
    settings = preset_settings(preset, algorithm)
    changes = {"updates": None, **changes} if from_data(algorithm) else changes
    names = {field.name for field in fields(Train)} & asdict(settings).keys() - {"credit_beta", "tokenizer", "device"}
    taken = {name: getattr(settings, name) for name in names - {"data"}}
    return Train(**{"preset": preset, "updates": PRESETS[preset].updates, **taken, **changes})


def from_data(name: str) -> bool:
    """Whether an algorithm learns from given data instead of episodes."""
    return algorithm(name).learns_from != "episodes"


def left_out(name: str) -> set[str]:
    """Options that an algorithm does not have."""
    without = {"num_envs"} if from_data(name) else {"data"}
    return without if algorithm(name).learns_from == "comparisons" else without | {"held_out"}


def main(arguments: Sequence[str]) -> int:
    """Parse, train and report; returns the exit status.

    Args:
        arguments: The algorithm, unless it is the default one, and options.
    """
    name, rest = DEFAULT_ALGORITHM, list(arguments)
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
    algorithms = f"Algorithms: {', '.join(ALGORITHMS)} (`tokenmdp train NAME --help`)."
    if name == train_reward_model.NAME:
        return train_reward_model.main(rest, algorithms)
    preset = preset_in(rest, PRESETS)
    config = agent_config(preset_settings(preset, name), updates=None if from_data(name) else 1)
    defaults = preset_options(preset, name)
    own = as_options(config, {*SET_APART, *config.unused})
    parts = {"general": as_options(defaults, left_out(name)), name.replace("-", "_"): own}
    options, chosen = parse_parts(f"train {name}", rest, f"{inspect.getdoc(Train)}\n\n{algorithms}", parts)
    return train(replace(defaults, **options), name, chosen)


def train(arguments: Train, name: str = DEFAULT_ALGORITHM, config: Mapping[str, Any] | None = None) -> int:
    """Train with the algorithm called ``name``, or resume, then report; returns the exit status."""
    settings = settings_from(arguments, name, config)
    out = arguments.out or Path("runs") / default_name(arguments.preset, settings)
    every = PRESETS[arguments.preset].checkpoint_every
    return training.train(settings, out, arguments.updates, every, resume=arguments.resume)


def default_name(preset: str, settings: RunSettings) -> str:
    """The default run directory, below runs/."""
    rank = settings.config.get("lora_rank")
    parts = [
        preset,
        *([settings.algorithm] if settings.algorithm != DEFAULT_ALGORITHM else []),
        *([settings.credit] if algorithm(settings.algorithm).uses_credit else []),
        *([f"lora{rank}"] if rank else []),
        f"seed{settings.seed}",
    ]
    return "-".join(parts)


def settings_from(
    arguments: Train, name: str = DEFAULT_ALGORITHM, config: Mapping[str, Any] | None = None
) -> RunSettings:
    """The settings of a run.

    Args:
        arguments: Of any algorithm.
        name: Of the algorithm.
        config: Fields of its configuration; default: those of the preset.

    Raises:
        ValueError: an option out of its range, or one that needs another one.
    """
    # An interval needs two samples.
    check_home(arguments.out)
    check_numbers(arguments, updates=1, num_envs=1, max_prompt_tokens=1, max_new_tokens=1, eval_samples=2, eval_every=0)
    if arguments.reward_template is not None:
        if arguments.align is None:
            raise ValueError(f"--reward-template {arguments.reward_template!r} needs --align offsets")
        check_template(arguments.reward_template)
    base, credit = preset_settings(arguments.preset, name), arguments.credit
    paths = ("policy", "reference", "reward_model", "prompts", "eval_prompts", "data", "judge")
    names: dict[str, Any] = {key: absolute_name(getattr(arguments, key)) for key in paths}
    names["tokenizer"] = absolute_name(arguments.tokenizer or arguments.policy)
    plain = (
        "max_new_tokens", "max_prompt_tokens", "truncate_prompt", "score", "align", "reward_template", "num_envs",
        "eval_samples", "eval_every", "credit", "seed", "held_out",
    )  # fmt: skip
    if margin := (config or {}).get("margin"):
        config = {**dict(config or {}), "margin": absolute_name(margin)}
    settings = replace(
        base,
        **names,
        **{key: getattr(arguments, key) for key in plain},
        credit_beta=default_beta(credit) if arguments.credit_beta is None else arguments.credit_beta,
        credit_options=absolute_options(parse_options(arguments.credit_option, "--credit-option")),
        device=resolve_device(arguments.device),
        config=base.config | dict(config or {}),
    )
    # Only what differs from the algorithm's own defaults, so that a run can be resumed when a field is added.
    own = algorithm(name).config_class()
    full = asdict(agent_config(settings, arguments.updates))
    different = {key: full[key] for key in full if key not in SET_APART and full[key] != getattr(own, key)}
    return replace(settings, config=different)
