"""``tokenmdp sample``, ``score`` and ``eval``: look at a policy, a reward model or a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

from tokenmdp.checkpoints import recover_directory
from tokenmdp.commands.display import make_console
from tokenmdp.commands.evaluation import comparison, comparison_table, evaluate
from tokenmdp.commands.run_directory import RunDirectory, RunError
from tokenmdp.commands.settings import (
    PRESETS,
    RunSettings,
    make_envs,
    resolve_device,
    settings_from_record,
    split_prompts,
)
from tokenmdp.credit import REWARD_MODEL_NEEDS, CreditMethod, Resources, make_credit
from tokenmdp.loading import load_tokenizer
from tokenmdp.policy import CausalLMPolicy, resolve_dtype
from tokenmdp.rendering import SEPARATOR
from tokenmdp.report import heatmap
from tokenmdp.report.samples import Sample, samples_from_rollout, token_pieces
from tokenmdp.reward_models import RewardModel, load_reward_model
from tokenmdp.rollouts import collect
from tokenmdp.types import Credit, Episode, Outcome

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv
    from transformers import PreTrainedTokenizerBase

    from tokenmdp import cli


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
        RunError: it is not a run, or it has no checkpoint yet.
    """
    run = RunDirectory(path)
    settings = settings_from_record(run.settings())
    if not recover_directory(run.checkpoint).exists():
        raise RunError(f"{path} has no checkpoint yet; run its `tokenmdp train` command until the first one is saved")
    return run, settings


def sample(arguments: cli.Sample) -> int:
    """Write texts with a policy and show the credit of each token."""
    console = make_console()
    if arguments.num < 1:
        raise ValueError(f"--num is {arguments.num}; it must be at least 1")
    if (Path(arguments.source) / "run.json").exists():
        run, settings = open_run(Path(arguments.source))
        name = str(run.checkpoint)
    else:
        name = arguments.source
        settings = replace(PRESETS["quick"].settings, tokenizer=name, policy=name)
    device = resolve_device(arguments.device)
    given: dict[str, Any] = {
        "credit": arguments.credit,
        "reward_model": arguments.reward_model,
        "max_new_tokens": arguments.max_new_tokens,
    }
    settings = replace(settings, device=device, **{key: value for key, value in given.items() if value is not None})
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k}
    options = settings.ppo | {key: value for key, value in sampling.items() if value is not None}
    sources: list[Any] = [[prompt] for prompt in arguments.prompt] or [split_prompts(settings).held_out]
    samples: list[Sample] = []
    policy = None
    generator = torch.Generator(device).manual_seed(arguments.seed)
    for prompts in sources:
        envs = make_envs(settings, arguments.num, prompts)
        policy = policy or load_policy(name, envs, options, settings.device)
        rollout, _ = collect(envs, policy, policy, generator, seed=arguments.seed)
        tokenizer = envs.unwrapped.task.tokenizer  # type: ignore[attr-defined]
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


def score_text(
    tokenizer: PreTrainedTokenizerBase, model: RewardModel, prompt: str, text: str, credit: CreditMethod
) -> tuple[Sample, Credit]:
    """The reward model's score of ``prompt`` + ``text`` and the credit of each token of ``text``.

    A blank joins the two where neither has one. Credit columns (1, T).
    """
    joined = text if not prompt or text[:1].isspace() or prompt[-1:].isspace() else f" {text}"
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    ids = tokenizer.encode(joined, add_special_tokens=False)
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens; give at least one word")
    model.check_tokenizer(tokenizer)
    mask = torch.ones(1, len(prompt_ids) + len(ids), dtype=torch.bool)
    episode = Episode(torch.tensor([prompt_ids + ids]), mask, mask[:, len(prompt_ids) :])
    reward = model(episode, needs=credit.needs & REWARD_MODEL_NEEDS)
    result = credit(Outcome(episode, reward, torch.zeros(1, dtype=torch.long)), Resources(model, tokenizer))
    shown, pieces = token_pieces(tokenizer, ids, prompt_ids)
    return Sample(shown, pieces, result.token_rewards[0].tolist(), reward.score.item()), result


def score(arguments: cli.Score) -> int:
    """Score a text and show the credit of each of its tokens."""
    console = make_console()
    name = arguments.reward_model
    method = make_credit(arguments.credit, credit_beta=arguments.credit_beta)
    model = load_reward_model(name, device=resolve_device(arguments.device))
    tokenizer = model.tokenizer if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer)
    if tokenizer is None:
        raise ValueError(f"the reward model {name!r} has no tokenizer files; pass --tokenizer")
    item, result = score_text(tokenizer, model, arguments.prompt, arguments.text, method)
    console.print(
        heatmap.terminal(item.tokens, item.credits, prompt=item.prompt and item.prompt + SEPARATOR), soft_wrap=True
    )
    console.print(token_table(item))
    console.print(f"score {item.score:+.4f} = sum of the credits {sum(item.credits):+.4f}", highlight=False)
    if "attention_mass" in result.report:
        mass = result.report["attention_mass"].item()
        rest = " (the rest is on the prompt)" if arguments.prompt else ""
        console.print(f"attention mass on the text: {mass:.3f} of the row{rest}", highlight=False)
        console.print("attention credit has the score's sign: how much a token mattered, not which way", style="dim")
        if result.report["credit_fallback"].item():
            console.print("that is below the floor, so the credit is uniform", style="bold")
    if arguments.html is not None:
        page = heatmap.html({name: [item]}, arguments.html, title=f"Token credit: {arguments.credit}")
        console.print(f"page: {page}", highlight=False, soft_wrap=True)
    return 0


def token_table(item: Sample) -> Table:
    """Token, credit and share of the score, one row a token."""
    table = Table()
    table.add_column("#", justify="right")
    table.add_column("token")
    table.add_column("credit", justify="right")
    table.add_column("share", justify="right")
    scale = heatmap.credit_scale([item.credits])
    shares: Sequence[str] = [f"{credit / item.score:.1%}" if item.score else "-" for credit in item.credits]
    for place, (piece, credit, share) in enumerate(zip(item.tokens, item.credits, shares, strict=True), start=1):
        table.add_row(str(place), heatmap.terminal([piece], [credit], scale=scale), f"{credit:+.4f}", share)
    return table


def evaluate_run(arguments: cli.Eval) -> int:
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
        before, after = (
            evaluate(model, reference, settings, split.held_out, samples=arguments.samples, seed=arguments.seed)
            for model in (reference, policy)
        )
    what = f"{len(after.scores)} responses to {split.label}, seed {arguments.seed}"
    console.print(comparison_table(comparison(before, after), what))
    return 0
