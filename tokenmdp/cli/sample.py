"""``tokenmdp sample``: texts of a policy or of a finished run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import tyro
from rich.text import Text

from tokenmdp.cli.options import CreditName, ScoreChoice, parse
from tokenmdp.envs.prompts import unknown_words
from tokenmdp.envs.rendering import SEPARATOR
from tokenmdp.files import recover_directory
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.precision import resolve_dtype
from tokenmdp.models.tokens import check_text
from tokenmdp.report import heatmap
from tokenmdp.report.samples import Sample
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.samples import samples_from_rollout
from tokenmdp.runs import reward_model_run
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.directory import RunDirectory, RunError
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import make_envs, resolve_device, split_prompts
from tokenmdp.runs.settings import PRESETS, RunSettings, absolute_options, parse_options, settings_from_record

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


@dataclass(frozen=True)
class SampleOptions:
    """Write texts with a trained policy and tint each token by its credit."""

    source: tyro.conf.Positional[str]
    """A run directory, or the name or directory of a model."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An opening to continue; may be repeated. Default: held-out prompts of the run, or bundled ones."""
    num: int = 8
    """How many texts (per prompt, if prompts are given)."""
    credit: CreditName | None = None
    """How the score is spread over the tokens. Default: the run's, or attention."""
    credit_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An option of the credit method, such as --credit-option budget=64; may be repeated."""
    reward_model: str | None = None
    """Bundled name, directory or hub name of a sequence classifier. Default: the run's, or the bundled one."""
    score: ScoreChoice = None
    """Default: the run's, or by its labels."""
    align: Literal["offsets"] | None = None
    """offsets: the reward model reads with its own tokenizer. Default: the run's."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens. Default: the run's, or the environment's."""
    truncate_prompt: Literal["left", "right"] | None = None
    """Which side a longer prompt loses. Default: the run's choice, or such prompts are refused."""
    max_new_tokens: int | None = None
    """Longest response in tokens. Default: the run's, or 16."""
    temperature: float | None = None
    """Below 1 sharpens the distribution, towards the likeliest token at every step. Default: the run's, or 1."""
    top_k: int | None = None
    """Sample among the k likeliest tokens, 0 is all. Default: the run's, or 0."""
    seed: int = 0
    """Seeds the sampling."""
    device: str = "auto"
    """Where policy and reward model run: cpu, cuda, cuda:1; auto is cuda if there is one."""
    html: Path | None = None
    """Also write a page with the numbers to this file."""


def main(arguments: Sequence[str]) -> int:
    """Parse and sample; returns the exit status."""
    return sample(parse(SampleOptions, "sample", arguments))


def load_policy(name: str, envs: VectorEnv, options: dict[str, Any], device: str) -> CausalLMPolicy:
    """A policy for ``envs``; ``options`` are of the algorithm's configuration, as far as they concern sampling."""
    policy = CausalLMPolicy.for_task(
        name,
        envs.unwrapped.task,  # type: ignore[attr-defined]
        temperature=options.get("temperature", 1.0),
        top_k=options.get("top_k", 0),
        compute_dtype=resolve_dtype(options.get("dtype", "auto"), torch.device(device)),
    )
    return policy.to(torch.device(device))


def open_run(path: Path) -> tuple[RunDirectory, RunSettings]:
    """A run with a checkpoint, and its settings.

    Raises:
        RunError: this is not a run of a policy, or it has no checkpoint yet.
    """
    run = RunDirectory(path)
    record = run.settings()
    if record.get("algorithm") == reward_model_run.NAME:
        raise RunError(
            f"{path} is a run of a reward model, which writes no texts; score some with `tokenmdp score TEXT "
            f"--reward-model {run.checkpoint}`"
        )
    settings = settings_from_record(record)
    if not recover_directory(run.checkpoint).exists():
        raise RunError(f"{path} has no checkpoint yet; run its `tokenmdp train` command until the first one is saved")
    return run, settings


def open_source(source: str) -> tuple[str, RunSettings]:
    """The policy of a run and its settings; of any other model, the settings of the preset quick with it.

    Raises:
        RunError: a directory that holds neither, or a run without a checkpoint.
    """
    if (Path(source) / "run.json").exists():
        run, settings = open_run(Path(source))
        return str(run.checkpoint), settings
    files = ("config.json", "adapter_config.json")
    if Path(source).is_dir() and not any((Path(source) / file).exists() for file in files):
        raise RunError(
            f"{source} is neither a run nor a model: it holds no run.json and no config.json; pass a run directory, "
            "its checkpoint/, or a directory that save_pretrained wrote"
        )
    quick = PRESETS["quick"].settings
    return source, replace(
        quick, tokenizer=source, policy=source, credit="attention", credit_beta=default_beta("attention")
    )


def sample(arguments: SampleOptions) -> int:
    """Write texts with a policy and show the credit of each token."""
    console = make_console()
    if arguments.num < 1:
        raise ValueError(f"--num is {arguments.num}; it must be at least 1")
    name, settings = open_source(arguments.source)
    device = resolve_device(arguments.device)
    given: dict[str, Any] = {
        "credit": arguments.credit,
        "reward_model": arguments.reward_model,
        "score": arguments.score,
        "align": arguments.align,
        "max_prompt_tokens": arguments.max_prompt_tokens,
        "truncate_prompt": arguments.truncate_prompt,
        "max_new_tokens": arguments.max_new_tokens,
    }
    if arguments.credit is not None:  # the run's options belong to the run's method
        settings = replace(settings, credit_beta=default_beta(arguments.credit), credit_options={})
    if arguments.reward_model is not None:  # the run's score is an output of the run's model
        settings = replace(settings, score=None)
    own = settings.credit_options | parse_options(arguments.credit_option, "--credit-option")
    given["credit_options"] = absolute_options(own)
    settings = replace(settings, device=device, **{key: value for key, value in given.items() if value is not None})
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    options = settings.config | {key: value for key, value in sampling.items() if value is not None}
    tokenizer = load_tokenizer(settings.tokenizer)
    for prompt in arguments.prompt:
        check_text(prompt, "--prompt")
        if unknown := unknown_words(tokenizer, prompt):
            words = ", ".join(map(repr, unknown))
            warnings.warn(f"not in the vocabulary, so read as {tokenizer.unk_token}: {words}", stacklevel=2)
    sources: list[Any] = [[prompt] for prompt in arguments.prompt] or [split_prompts(settings).held_out]
    samples: list[Sample] = []
    policy = None
    generator = torch.Generator(device).manual_seed(arguments.seed)
    for prompts in sources:
        envs = make_envs(settings, arguments.num, prompts)
        policy = policy or load_policy(name, envs, options, settings.device)
        rollout, _ = collect(envs, policy, None, generator, seed=arguments.seed)
        samples += [replace(item, facts={}) for item in samples_from_rollout(rollout, tokenizer)]
    scale = heatmap.credit_scale([item.credits for item in samples])
    for item in samples:
        line = heatmap.terminal(item.tokens, item.credits, prompt=item.prompt + SEPARATOR, scale=scale)
        console.print(Text(f"{item.score:+7.2f}  ").append_text(line), soft_wrap=True)
    if arguments.html is not None:
        note = f"{settings.credit} credit, seed {arguments.seed}"
        page = heatmap.html({"Samples": samples}, arguments.html, title=f"Samples of {arguments.source}", note=note)
        console.print(f"page: {page}", highlight=False, soft_wrap=True)
    return 0
