"""``tokenmdp sample`` and ``eval``: look at a policy or a finished run."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from tokenmdp.cli.options import Eval
from tokenmdp.cli.options import Sample as SampleOptions
from tokenmdp.envs.prompts import unknown_words
from tokenmdp.envs.rendering import SEPARATOR
from tokenmdp.evaluation.policies import comparison, comparison_table, evaluate
from tokenmdp.files import recover_directory
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.policy import CausalLMPolicy, resolve_dtype
from tokenmdp.models.tokens import check_text
from tokenmdp.report import heatmap
from tokenmdp.report.samples import Sample
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.samples import samples_from_rollout
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.directory import RunDirectory, RunError
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import evaluation_envs, make_envs, resolve_device, split_prompts
from tokenmdp.runs.settings import PRESETS, RunSettings, absolute_options, parse_options, settings_from_record

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


def load_policy(name: str, envs: VectorEnv, options: dict[str, Any], device: str) -> CausalLMPolicy:
    """A policy for ``envs``; ``options`` are the PPOConfig fields that shape its distribution, and dtype."""
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
        RunError: this is not a run, or it has no checkpoint yet.
    """
    run = RunDirectory(path)
    settings = settings_from_record(run.settings())
    if not recover_directory(run.checkpoint).exists():
        raise RunError(f"{path} has no checkpoint yet; run its `tokenmdp train` command until the first one is saved")
    return run, settings


def sample(arguments: SampleOptions) -> int:
    """Write texts with a policy and show the credit of each token."""
    console = make_console()
    if arguments.num < 1:
        raise ValueError(f"--num is {arguments.num}; it must be at least 1")
    if (Path(arguments.source) / "run.json").exists():
        run, settings = open_run(Path(arguments.source))
        name = str(run.checkpoint)
    else:
        name = arguments.source
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise RunError(
                f"{name} is neither a run nor a model: it holds no run.json and no config.json; pass a run directory, "
                "its checkpoint/, or a directory that save_pretrained wrote"
            )
        quick = PRESETS["quick"].settings
        settings = replace(
            quick, tokenizer=name, policy=name, credit="attention", credit_beta=default_beta("attention")
        )
    device = resolve_device(arguments.device)
    given: dict[str, Any] = {
        "credit": arguments.credit,
        "reward_model": arguments.reward_model,
        "align": arguments.align,
        "max_prompt_tokens": arguments.max_prompt_tokens,
        "truncate_prompt": arguments.truncate_prompt,
        "max_new_tokens": arguments.max_new_tokens,
    }
    if arguments.credit is not None:  # the run's options belong to the run's method
        settings = replace(settings, credit_beta=default_beta(arguments.credit), credit_options={})
    own = settings.credit_options | parse_options(arguments.credit_option, "--credit-option")
    given["credit_options"] = absolute_options(own)
    settings = replace(settings, device=device, **{key: value for key, value in given.items() if value is not None})
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    options = settings.ppo | {key: value for key, value in sampling.items() if value is not None}
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
        rollout, _ = collect(envs, policy, policy, generator, seed=arguments.seed)
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


def evaluate_run(arguments: Eval) -> int:
    """Evaluate a run's policy again, against its reference, on its evaluation prompts."""
    console = make_console()
    if arguments.samples < 2:
        raise ValueError(f"--samples is {arguments.samples}; an interval needs at least 2")
    run, settings = open_run(arguments.run)
    settings = replace(settings, device=resolve_device(arguments.device))
    split = split_prompts(settings)
    envs = make_envs(settings, 1, split.held_out)
    policy, reference = (
        load_policy(str(path), envs, settings.ppo, settings.device)
        for path in (run.checkpoint, run.checkpoint / "state" / "reference")
    )
    with console.status("evaluating"):
        envs = evaluation_envs(settings, arguments.samples, split.held_out)
        before, after = (
            evaluate(model, reference, envs, samples=arguments.samples, seed=arguments.seed)
            for model in (reference, policy)
        )
        envs.close()
    what = f"{len(after.scores)} responses to {split.label}, seed {arguments.seed}"
    console.print(comparison_table(comparison(before, after), what))
    return 0
