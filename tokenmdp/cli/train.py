"""``tokenmdp train``: from the options to a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenmdp.cli.options import Train
from tokenmdp.reward_models.retokenized import check_template
from tokenmdp.runs import training
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.settings import PRESETS, RunSettings, absolute_name, absolute_options, parse_options


def train(arguments: Train) -> int:
    """Train, or resume, then report; returns the exit status."""
    settings, preset = settings_from(arguments), PRESETS[arguments.preset]
    updates = preset.updates if arguments.updates is None else arguments.updates
    if updates < 1:
        raise ValueError(f"--updates is {updates}; it must be at least 1")
    out = arguments.out or Path("runs") / default_name(arguments.preset, settings)
    return training.train(settings, out, updates, preset.checkpoint_every, resume=arguments.resume)


def default_name(preset: str, settings: RunSettings) -> str:
    """The default run directory, below runs/."""
    rank = settings.ppo.get("lora_rank")
    return f"{preset}-{settings.credit}{f'-lora{rank}' if rank else ''}-seed{settings.seed}"


def settings_from(arguments: Train) -> RunSettings:
    """The preset with the changes from the command line."""
    base = PRESETS[arguments.preset].settings
    names = {
        "policy": arguments.policy,
        "tokenizer": arguments.tokenizer or arguments.policy,
        "reward_model": arguments.reward_model,
        "prompts": arguments.prompts,
        "eval_prompts": arguments.eval_prompts,
    }
    given: dict[str, Any] = {
        **{key: absolute_name(name) for key, name in names.items()},
        "max_new_tokens": arguments.max_new_tokens,
        "max_prompt_tokens": arguments.max_prompt_tokens,
        "truncate_prompt": arguments.truncate_prompt,
        "score": arguments.score,
        "align": arguments.align,
        "reward_template": arguments.reward_template,
        "num_envs": arguments.num_envs,
        "eval_samples": arguments.eval_samples,
    }
    changed: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    leasts = {"num_envs": 1, "max_prompt_tokens": 1, "max_new_tokens": 1, "eval_samples": 2}  # an interval needs two
    for key, least in leasts.items():
        if changed.get(key, least) < least:
            raise ValueError(f"--{key.replace('_', '-')} is {changed[key]}; it must be at least {least}")
    if arguments.reward_template is not None:
        if arguments.align is None:
            raise ValueError(f"--reward-template {arguments.reward_template!r} needs --align offsets")
        check_template(arguments.reward_template)
    credit = arguments.credit or base.credit
    return replace(
        base,
        **changed,
        credit=credit,
        credit_beta=default_beta(credit) if arguments.credit_beta is None else arguments.credit_beta,
        credit_options=absolute_options(parse_options(arguments.credit_option, "--credit-option")),
        seed=arguments.seed,
        device=resolve_device(arguments.device),
        ppo=base.ppo
        | parse_options(arguments.ppo, "--ppo")
        | ({} if arguments.lora_rank is None else {"lora_rank": arguments.lora_rank}),
    )
