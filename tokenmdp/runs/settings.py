"""What a run is made of: the settings that ``run.json`` keeps, the presets, and the environments built from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import torch

from tokenmdp.credit import CreditMethod
from tokenmdp.envs.prompts import FILE_SUFFIXES, read_prompt_file
from tokenmdp.models.loading import ALIASES, load_tokenizer, resolve
from tokenmdp.reward_models.retokenized import check_template
from tokenmdp.runs.credit_options import POLICIES, credit_method, default_beta
from tokenmdp.wrappers import vector

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmdp.cli import Train

TOY_POLICY = "toy"  # a random model for the toy tokenizer, built in code
HELD_OUT_EVERY = 5  # every fifth prompt is kept out of training
EXAMPLES = {"--ppo": "kl_coef=0.1", "--credit-option": "budget=64", "--option": "shapley.budget=64"}
LATER_SETTINGS = (
    "credit_options", "align", "reward_template", "horizon_range", "min_new_tokens", "max_prompt_tokens",
    "truncate_prompt",
)  # fmt: skip
FEWEST_TO_SPLIT = 20  # with fewer prompts than this, evaluation uses the training prompts


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
    align: str | None = None  # "offsets": the reward model has a tokenizer of its own
    reward_template: str | None = None  # with align: the text that it reads; None: prompt and response
    horizon_range: tuple[int, int] | None = None  # each episode's horizon is drawn from it, both ends included
    min_new_tokens: int = 0  # tokens before end-of-text becomes legal
    max_prompt_tokens: int | None = None  # None: the environment's own
    truncate_prompt: str | None = None  # "left", "right"; None refuses a longer prompt
    num_envs: int = 64
    seed: int = 1
    device: str = "cpu"
    eval_samples: int = 256
    ppo: dict[str, Any] = field(default_factory=dict)  # PPOConfig fields other than seed and device


class Preset(NamedTuple):
    """Settings with the pace of the job."""

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
        ),
        updates=80,
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
            ppo={"learning_rate": 3e-3, "kl_coef": 0.5},
        ),
        updates=20,
        checkpoint_every=10,
    ),
}


def settings_from(arguments: Train) -> RunSettings:
    """The preset with what the command line changes."""
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
    return replace(
        base,
        **changed,
        credit=arguments.credit,
        credit_beta=default_beta(arguments.credit) if arguments.credit_beta is None else arguments.credit_beta,
        credit_options=absolute_options(parse_options(arguments.credit_option, "--credit-option")),
        seed=arguments.seed,
        device=resolve_device(arguments.device),
        ppo=base.ppo
        | parse_options(arguments.ppo, "--ppo")
        | ({} if arguments.lora_rank is None else {"lora_rank": arguments.lora_rank}),
    )


def absolute_name(name: str | None) -> str | None:
    """An existing path made absolute, since a later command may run in another directory; other names as they are."""
    if name is None or name in ALIASES or not Path(name).expanduser().exists():
        return name
    return str(Path(name).expanduser().resolve())


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

    >>> parse_options(["kl_coef=0.1", "dtype=auto", "shapley.budget=64"], "--ppo")
    {'kl_coef': 0.1, 'dtype': 'auto', 'shapley.budget': 64}
    """
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name.rpartition(".")[2].isidentifier():
            raise ValueError(f"{flag} {option!r} is not name=value, such as {EXAMPLES[flag]}")
        try:
            parsed[name] = json.loads(text)
        except json.JSONDecodeError:
            parsed[name] = text
    return parsed


def settings_record(settings: RunSettings) -> dict[str, Any]:
    """What ``run.json`` keeps: all but the device, since a run may move to another one.

    Later additions are left out where they are unset, so that the runs of earlier versions go on.
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


class PromptSplit(NamedTuple):
    """Prompts for training and for evaluation: names or lists, or None for the environment's own."""

    training: str | list[Any] | None
    held_out: str | list[Any] | None
    label: str  # what the evaluation prompts are, for headings
    note: str  # where they come from, for the log


def split_prompts(settings: RunSettings) -> PromptSplit:
    """Keep prompts for evaluation apart from those for training.

    Lists (the bundle, a file): every fifth is held out. A data set ``name``: its split ``test``. Otherwise, and for
    lists too short to split, both use the same prompts and the note says so.
    """
    source = settings.prompts
    if settings.eval_prompts is not None:
        return PromptSplit(
            source, settings.eval_prompts, "given prompts", f"evaluation prompts: {settings.eval_prompts}"
        )
    if source is None:
        return PromptSplit(
            None, None, "training prompts", f"evaluation uses the training prompts: the few of {settings.env}"
        )
    path = Path(resolve("prompts", source))
    if path.suffix in FILE_SUFFIXES and path.is_file():
        prompts = read_prompt_file(path)
        if len(prompts) < FEWEST_TO_SPLIT:
            return PromptSplit(
                prompts,
                prompts,
                "training prompts",
                f"evaluation uses the training prompts: {source} has {len(prompts)}",
            )
        held_out = prompts[::HELD_OUT_EVERY]
        training = [prompt for place, prompt in enumerate(prompts) if place % HELD_OUT_EVERY]
        return PromptSplit(
            training, held_out, "held-out prompts", f"{len(held_out)} of {len(prompts)} prompts held out for evaluation"
        )
    if ":" not in source:
        return PromptSplit(source, f"{source}:test", "held-out prompts", f"evaluation prompts: split test of {source}")
    return PromptSplit(
        source, source, "training prompts", f"evaluation uses the training prompts: {source} names one split"
    )


def credit_of(settings: RunSettings) -> CreditMethod:
    """The run's credit method.

    Raises:
        ValueError: an option that the method does not take.
    """
    return credit_method(settings.credit, {"credit_beta": settings.credit_beta, **settings.credit_options})


def make_envs(settings: RunSettings, num_envs: int, prompts: str | Sequence[Any] | None) -> gym.vector.VectorEnv:
    """The vector environment of a run under its credit wrapper, with its reward model loaded and checked."""
    given: dict[str, Any] = {
        "prompts": prompts,
        "reward_template": settings.reward_template,
        "horizon_range": settings.horizon_range,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "truncate_prompt": settings.truncate_prompt,
    }
    envs = gym.make_vec(
        f"tokenmdp:{settings.env}",
        num_envs=num_envs,
        autoreset_mode="Disabled",
        score_when="all_done",  # one reward-model call an update
        tokenizer=settings.tokenizer,
        reward_model=settings.reward_model,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        reward_device=settings.device,
        align=settings.align,
        **{key: value for key, value in given.items() if value is not None},
    )
    wrapped = vector.CreditReward(envs, credit_of(settings))
    _ = wrapped.unwrapped.task.reward_model  # type: ignore[attr-defined]  # loads it: errors belong before the work
    return wrapped


def toy_policy(seed: int) -> PreTrainedModel:
    """A GPT-2 of two layers with random weights, for the toy tokenizer's 32 symbols."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = load_tokenizer("toy")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def resolve_device(name: str) -> str:
    """``auto`` as "cuda" or "cpu"; any other name checked.

    >>> resolve_device("cpu")
    'cpu'

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device name; use cpu, cuda, cuda:1 or auto") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name!r} asks for a GPU and torch sees none; use cpu or auto")
    return name
