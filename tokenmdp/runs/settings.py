"""The settings that define a run, kept in ``run.json``, and the presets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

from tokenmdp.agents import DEFAULT_ALGORITHM, algorithm
from tokenmdp.files import expand_home
from tokenmdp.models.names import ALIASES
from tokenmdp.runs.credit_options import POLICIES

TOY_POLICY = "toy"  # a random model for the toy tokenizer, built in code
HELD_OUT = 0.1  # of the prompts of comparisons
EVAL_EVERY = 50  # updates, of what learns from comparisons
SET_APART = ("seed", "device", "total_updates")  # fields of a configuration that a run sets by itself
EXAMPLES = {"--credit-option": "budget=64", "--option": "shapley.budget=64"}
LATER_SETTINGS = (
    "score", "credit_options", "align", "reward_template", "horizon_range", "min_new_tokens", "max_prompt_tokens",
    "truncate_prompt", "data", "judge", "reference", "held_out", "eval_every",
)  # fmt: skip


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides what a run computes. The number of updates is not here: a run may be extended."""

    env: str
    policy: str
    tokenizer: str
    reward_model: str
    prompts: str | None  # None: the environment's own
    eval_prompts: str | None
    max_new_tokens: int
    credit: str = "attention"
    credit_beta: float = 0.8
    credit_options: dict[str, Any] = field(default_factory=dict)  # of the credit method, other than credit_beta
    score: str | None = None  # which number of the reward model: an index, a label or "LABEL - LABEL"; None: "auto"
    align: str | None = None  # "offsets": the reward model has a tokenizer of its own
    reward_template: str | None = None  # with align: the text that it reads; None: prompt and response
    horizon_range: tuple[int, int] | None = None  # each episode's horizon is drawn from it, both ends included
    min_new_tokens: int = 0  # tokens before end-of-text becomes legal
    max_prompt_tokens: int | None = None  # None: the environment's own
    truncate_prompt: str | None = None  # "left", "right"; None: a longer prompt is refused
    num_envs: int = 64
    seed: int = 1
    device: str = "cpu"
    eval_samples: int = 256
    eval_every: int = 0  # updates between evaluations as it trains; 0: only before and after
    algorithm: str = DEFAULT_ALGORITHM
    config: dict[str, Any] = field(default_factory=dict)  # fields of the algorithm's configuration but `SET_APART`
    data: str | None = None  # what an algorithm learns from that plays no episodes
    held_out: float = 0.0  # share of the data's prompts that is not learned from
    judge: str | None = None  # a second reward model, for the evaluation
    reference: str | None = None  # what the KL is measured to; None: the policy as it starts


class Preset(NamedTuple):
    """Settings, to which each algorithm adds its configuration, number of updates and checkpoint interval."""

    settings: RunSettings
    updates: int
    checkpoint_every: int


PRESETS = {
    "quick": Preset(
        RunSettings(
            env="TextGen-IMDb-v0",
            policy="imdb-tiny",
            tokenizer="imdb-tiny",
            reward_model="imdb-tiny",
            prompts="imdb-tiny",
            eval_prompts=None,
            max_new_tokens=16,
            credit="red",
            credit_beta=1.0,
        ),
        updates=40,
        checkpoint_every=10,
    ),
    "smoke": Preset(
        RunSettings(
            env="TextGen-Toy-v0",
            policy=TOY_POLICY,
            tokenizer="toy",
            reward_model="toy-lexicon",
            prompts=None,
            eval_prompts=None,
            max_new_tokens=8,
            num_envs=32,
            eval_samples=128,
        ),
        updates=20,
        checkpoint_every=10,
    ),
}


def preset_settings(preset: str, name: str) -> RunSettings:
    """The settings of a preset with the algorithm called ``name``, which says what configuration suits the preset."""
    kind, settings = algorithm(name), PRESETS[preset].settings
    if not kind.uses_credit:
        settings = replace(settings, credit="sparse")
    if kind.learns_from == "comparisons":
        settings = replace(settings, held_out=HELD_OUT, eval_every=EVAL_EVERY)
    return replace(settings, algorithm=name, config=dict(kind.presets.get(preset, {})))


def agent_config(settings: Any, updates: int | None) -> Any:
    """The configuration of the run's algorithm; a learning-rate schedule ends with the run.

    Raises:
        ValueError: ``settings.config`` has a field that does not exist or that the run sets by itself, or a value of
            the wrong type or range.
    """
    kind = algorithm(settings.algorithm).config_class
    known = {item.name for item in fields(kind)} - {*SET_APART, *kind.unused}
    if unknown := sorted(settings.config.keys() - known):
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    return kind(**settings.config, seed=settings.seed, device=settings.device, total_updates=updates)


def absolute_name(name: str | None) -> str | None:
    """An existing path made absolute, since a later command may run in another directory; other names as they are."""
    if not name or name in ALIASES:
        return name
    if expand_home(name).exists():
        return str(expand_home(name).resolve())
    file, colon, column = name.rpartition(":")  # FILE:COLUMN, DIR:SPLIT and DIR:SPLIT:COLUMN of prompts
    return f"{absolute_name(file)}{colon}{column}" if file else name


def absolute_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Credit options with the policies and reward models among them as absolute paths, where they are paths."""

    def absolute(value: Any) -> Any:
        return absolute_name(value) if isinstance(value, str) else value

    found = {key: absolute(value) if key in POLICIES else value for key, value in options.items()}
    if isinstance(parts := found.get("parts"), list):
        found["parts"] = [
            {**part, "reward_model": absolute(part["reward_model"])}
            if isinstance(part, dict) and "reward_model" in part
            else part
            for part in parts
        ]
    return found


def parse_options(options: Sequence[str], flag: str) -> dict[str, Any]:
    """``name=value`` strings of ``flag`` as a dict; a value is read as JSON if it is JSON, else as a string.

    >>> parse_options(["budget=64", "heads=max"], "--credit-option")
    {'budget': 64, 'heads': 'max'}
    """
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name.rpartition(".")[2].isidentifier():
            raise ValueError(f"{flag} {option!r} is not name=value, such as {EXAMPLES.get(flag, 'credit_beta=0.4')}")
        try:
            parsed[name] = json.loads(text)
        except json.JSONDecodeError:
            parsed[name] = text
    return parsed


def settings_record(settings: RunSettings) -> dict[str, Any]:
    """The record in ``run.json``: all but the device, since a run may move to another one.

    Later additions are left out where they are unset, so that a run that does not use them can be resumed.
    """
    without = {"device"} | {name for name in LATER_SETTINGS if not getattr(settings, name)}
    record = {key: value for key, value in asdict(settings).items() if key not in without}
    if settings.horizon_range is not None:
        record["horizon_range"] = list(settings.horizon_range)  # as JSON gives it back
    return record


def settings_from_record(record: Mapping[str, Any]) -> RunSettings:
    """The settings that `RunDirectory.settings` read back.

    Raises:
        ValueError: fields are missing or unknown, so another version wrote them.
    """
    try:
        settings = RunSettings(**record)
        least_and_most = None if settings.horizon_range is None else (*settings.horizon_range,)
        return replace(settings, horizon_range=least_and_most)
    except TypeError as error:
        raise ValueError(f"these run settings were written by another version of tokenmdp ({error})") from error
