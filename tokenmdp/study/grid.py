"""From a plan to its cells: one for every combination, with the labels that figures and tables use."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tokenmdp.agents.ppo import PPOConfig
from tokenmdp.credit import CREDIT_METHODS
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.environments import credit_of
from tokenmdp.runs.settings import RunSettings, agent_config, parse_options
from tokenmdp.study.labels import model_name, without_directories
from tokenmdp.study.presets import LEARNING_RATE, Plan
from tokenmdp.study.results import Cell, CellResult, StudyError
from tokenmdp.wording import count

CRITICS = ("slow", "shared", "separate")  # see `critic_config`

CELL_BYTES = 22_000  # of a finished cell's file, on average over the first edition's


class Method(NamedTuple):
    """A credit method with the options that its specification gives."""

    label: str
    credit: str
    credit_beta: float
    options: dict[str, Any]  # others


def parse_method(specification: str) -> Method:
    """``NAME`` or ``NAME:option=value,option=value``; NAME is in the registry or a ``module.Class``.

    >>> parse_method("attention:credit_beta=0.4")
    Method(label='attention credit_beta=0.4', credit='attention', credit_beta=0.4, options={})

    Raises:
        StudyError: no such method, or a credit_beta that is not a number.
        ValueError: an option without a value.
    """
    name, _, text = specification.partition(":")
    register(name)
    options = parse_options(re.split(r",(?=\w+=)", text), f"--methods {name}:") if text else {}
    label = without_directories(" ".join([name, *(f"{key}={value}" for key, value in options.items())]))
    beta = options.pop("credit_beta", default_beta(name))
    if not isinstance(beta, int | float):
        raise StudyError(f"--methods {specification!r}: credit_beta is {beta!r}, which is not a number")
    return Method(label, name, float(beta), options)


def register(name: str) -> None:
    """Register a user's own method, called ``module.Class``, in this process; others are already registered.

    Modules of the working directory are found too.

    Raises:
        StudyError: no method has this name, or its module cannot be imported, for whatever reason.
    """
    if name in CREDIT_METHODS:
        return
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise StudyError(
            f"--methods {name!r} names no credit method; choose from {', '.join(CREDIT_METHODS)}, or name a class of "
            "your own as module.Class"
        )
    try:
        with _working_directory_on_path():
            method = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is the user's own
        raise StudyError(
            f"--methods {name!r} cannot be imported ({error!r}); mend {module}, or run it where {module} is found"
        ) from error
    if not isinstance(method, type) or not is_dataclass(method):
        raise StudyError(f"--methods {name!r} is not a dataclass whose instances are credit methods; see CreditMethod")
    CREDIT_METHODS[name] = method


class Length(NamedTuple):
    """Response lengths, both ends included."""

    least: int
    most: int


def parse_length(text: str) -> Length:
    """``LEAST-END``, the end excluded as in the paper, or one length.

    >>> parse_length("8-16"), parse_length("16")
    (Length(least=8, most=15), Length(least=16, most=16))

    Raises:
        StudyError: it is neither.
    """
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least = int(numbers[1]) if numbers else 0
    most = int(numbers[2]) - 1 if numbers and numbers[2] else least
    if not 1 <= least <= most:
        raise StudyError(
            f"--lengths {text!r} is neither a range of tokens such as 8-16, which are 8 to 15, nor one length"
        )
    return Length(least, most)


def critic_config(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `PPOConfig` that make a critic, as far as they differ from ``config`` and from the defaults.

    slow: a head at the policy's rate, as in the first edition (but with a gradient norm of its own); shared: at its own
    rate; separate: with a transformer of its own.

    >>> critic_config("slow", {"learning_rate": 1e-4}), critic_config("shared", {})
    ({'vf_learning_rate': 0.0001}, {})

    Raises:
        StudyError: there is no such critic.
    """
    if name not in CRITICS:
        raise StudyError(f"--critics {name!r} is none of {', '.join(CRITICS)}")
    made: dict[str, Any] = {"value_model": "separate" if name == "separate" else "shared"}
    if name == "slow":
        made["vf_learning_rate"] = config["learning_rate"]
    return {field: value for field, value in made.items() if config.get(field, getattr(PPOConfig, field)) != value}


def expand(plan: Plan, rates: Mapping[str, float] | None = None) -> list[Cell]:
    """The plan's cells, the first seed of everything before the second, so that a study stopped early is balanced.

    Args:
        plan: what varies.
        rates: label or name of a method -> its learning rate; None: the bundled one, unless the plan's base has one.

    Raises:
        StudyError: nothing to run, or two methods with one label, or a method without a learning rate in ``rates``.
        ValueError: invalid settings for a run.
    """
    for name in ("methods", "seeds", "lengths"):
        if not getattr(plan, name):
            raise StudyError(f"the grid {plan.name!r} is empty: it has no {name}; pass --{name}")
    for name, least in (("updates", 1), ("eval_every", 1), ("eval_samples", 2)):
        if getattr(plan, name) < least:
            flag = name.replace("_", "-")
            raise StudyError(f"--{flag} is {getattr(plan, name)}; it must be at least {least}")
    methods = _with_betas([parse_method(method) for method in plan.methods], plan.credit_betas)
    lengths = [(text, parse_length(text)) for text in plan.lengths]
    cells: dict[str, Cell] = {}
    for seed, (text, length), model, kl_coef, gae_lambda, estimator, critic, tried, method in product(
        plan.seeds,
        lengths,
        plan.reward_models or (plan.base.reward_model,),
        plan.kl_coefs or (None,),
        plan.gae_lambdas or (None,),
        plan.estimators or (None,),
        plan.critics or (None,),
        plan.tried_rates or (None,),
        methods,
    ):
        config = dict(plan.base.config)
        if tried is not None or rates is not None or "learning_rate" not in config:
            config["learning_rate"] = _rate(method, rates) if tried is None else tried
        if kl_coef is not None:
            config |= {"kl_coef": kl_coef, "kl_target": None}
        if gae_lambda is not None:
            config["gae_lambda"] = gae_lambda
        if estimator is not None:
            config["estimator"] = estimator
        if critic is not None:
            config |= critic_config(critic, config)
        label = [f"{text} tokens"]
        label += [f"reward model {model_name(model)}"] * (len(plan.reward_models) > 1)
        label += [] if kl_coef is None else [f"kl_coef={kl_coef:g}"]
        label += [] if gae_lambda is None else [f"gae_lambda={gae_lambda:g}"]
        label += [] if estimator is None else [f"estimator={estimator}"]
        label += [] if critic is None else [f"critic={critic}"]
        label += [] if tried is None else [f"learning_rate={tried:g}"]
        settings = replace(
            plan.base,
            credit=method.credit,
            credit_beta=method.credit_beta,
            credit_options=method.options,
            seed=seed,
            reward_model=model,
            max_new_tokens=length.most,
            min_new_tokens=length.least if length.least < length.most else 0,
            horizon_range=(length.least, length.most) if length.least < length.most else None,
            config=config,
        )
        cell = Cell(
            method.label, seed, ", ".join(label), settings, plan.updates, plan.gold, plan.eval_every, plan.eval_samples
        )
        other = cells.setdefault(cell.id, cell)
        if plan.critics and other.setting != cell.setting:
            rate = config.get("vf_learning_rate", PPOConfig.vf_learning_rate)
            raise StudyError(
                f"{cell.setting} and {other.setting} are the same run: both heads learn at "
                f"{rate:g}; leave out one critic, or choose another learning rate or "
                "--vf-learning-rate"
            )
    names: dict[tuple[str, str, int], Cell] = {}
    for cell in cells.values():
        other = names.setdefault((cell.setting, cell.method, cell.seed), cell)
        if other is not cell:
            raise StudyError(
                f"two different cells would both be called {cell.method!r} in {cell.setting!r}; give directories "
                "names of their own"
            )
    for cell in names.values():
        parts = agent_config(cell.settings, cell.updates).num_minibatches
        if cell.settings.num_envs < parts:
            raise StudyError(
                f"--num-envs is {cell.settings.num_envs}, which does not fill num_minibatches={parts}; raise it, or "
                "pass --num-minibatches 1"
            )
        credit_of(cell.settings)
    return list(cells.values())


def read_rates(path: Path) -> dict[str, float]:
    """Learning rates from what the grid "tune" wrote, or from a JSON object of methods and numbers.

    Raises:
        StudyError: the file holds neither, or does not exist.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(f"--learning-rates {path} cannot be read: {error.strerror}") from error
    try:
        record = json.loads(text)
        rates = record.get("learning_rates", record)
        return {str(method): float(rate) for method, rate in rates.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise StudyError(
            f'--learning-rates {path} is not a JSON object such as {{"sparse": 1e-4, "attention": 3e-5}} ({error})'
        ) from error


def shard_of(cells: list[Cell], shard: str) -> list[Cell]:
    """Every Nth cell, the Ith of each N: ``"I/N"`` with I from 1 to N.

    Raises:
        StudyError: it is not such a pair.
    """
    numbers = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise StudyError(f"--shard {shard!r} is not I/N with I from 1 to N, such as 2/8")
    return cells[int(numbers[1]) - 1 :: int(numbers[2])]


def load_cost(cell: Cell) -> float:
    """Tokens that a cell trains on, twice with a value model, and evaluates: to distribute the remaining time."""
    settings: RunSettings = cell.settings
    longest = settings.max_new_tokens
    tokens = (longest + (settings.horizon_range or (longest,))[0]) / 2
    models = 2 if settings.config.get("value_model") == "separate" else 1
    evaluated = cell.updates / cell.eval_every * cell.eval_samples / 4
    return tokens * (models * cell.updates * settings.num_envs + evaluated)


def expected_cost(waiting: list[Cell], finished: list[CellResult], jobs: int) -> str:
    """Cells, minutes and disk of what is left to run, in words; before a cell has finished the time is not known.

    The finished cells of the same grid tell the seconds of a token that is trained on, and the size of a file.

    >>> expected_cost([], [], 2)
    'nothing left to run'
    """
    if not waiting:
        return "nothing left to run"
    disk = f"about {max(1, round(len(waiting) * CELL_BYTES / 1e6))} MB"
    if not finished:
        return f"{count(len(waiting), 'cell')} to run, {disk} on disk; how long it takes is told once one has finished"
    seconds = sum(result.seconds for result in finished) / sum(load_cost(result.cell) for result in finished)
    minutes = seconds * sum(map(load_cost, waiting)) / jobs / 60
    return f"{count(len(waiting), 'cell')} to run, about {max(1, round(minutes))} min, {disk} on disk"


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.pop(0)


def _with_betas(methods: list[Method], betas: tuple[float, ...]) -> list[Method]:
    """Each method that has a credit_beta with every one of ``betas``; the others once."""
    found: dict[str, Method] = {}
    for method in methods:
        known = {field.name for field in fields(CREDIT_METHODS[method.credit])}
        several = betas if "credit_beta" in known else ()
        for beta in several:
            labelled = method._replace(label=f"{method.label} credit_beta={beta:g}", credit_beta=beta)
            found[labelled.label] = labelled
        if not several:
            found[method.label] = method
    return list(found.values())


def _rate(method: Method, rates: Mapping[str, float] | None) -> float:
    if rates is None:
        return LEARNING_RATE
    for name in (method.label, method.credit):
        if name in rates:
            return rates[name]
    raise StudyError(
        f"--learning-rates has none for {method.credit}, only for {', '.join(rates) or 'nothing'}; add it, or run "
        f"`tokenmdp ablate --preset tune --methods {method.credit}`"
    )
