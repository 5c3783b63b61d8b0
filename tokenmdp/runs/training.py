"""``tokenmdp train``: one resumable run, and the report on what changed."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers.utils import logging

from tokenmdp.agents import algorithm
from tokenmdp.agents.base import Agent
from tokenmdp.envs.rendering import SEPARATOR
from tokenmdp.evaluation.policies import (
    Evaluation,
    comparison,
    comparison_table,
    evaluate,
    load_evaluation,
    save_evaluation,
)
from tokenmdp.files import CheckpointError, write_text
from tokenmdp.report import curves, heatmap
from tokenmdp.runs import process_settings
from tokenmdp.runs.directory import RunDirectory, tensorboard_tag
from tokenmdp.runs.display import Interruption, OutputClosed, TrainingDisplay, make_console
from tokenmdp.runs.environments import PromptSplit, credit_of, evaluation_envs, make_envs, split_prompts, toy_policy
from tokenmdp.runs.settings import TOY_POLICY, RunSettings, agent_config, settings_record
from tokenmdp.training.processes import launched, processes_of
from tokenmdp.wording import count

if TYPE_CHECKING:
    from accelerate import Accelerator


SHOWN_SAMPLES = 4  # in the terminal; the page shows all that were kept
CURVES = ("score_mean", "kl", "explained_variance", "entropy")
SMOOTHING = 1 / 10  # share of the updates that each point of the thick curve averages


class Stop(Exception):
    """Ends training between two updates."""


def train(settings: RunSettings, out: Path, updates: int, checkpoint_every: int, *, resume: bool = True) -> int:
    """Train in the run directory ``out``, or resume there, then report; returns the exit status.

    Args:
        settings: Of the run.
        out: Its directory.
        updates: In all.
        checkpoint_every: Updates between checkpoints.
        resume: Continue from the directory's checkpoint if it has one.
    """
    logging.disable_progress_bar()  # transformers draws a progress bar for every checkpoint
    accelerator = launched(settings.device)
    try:
        return _train(settings, out, updates, checkpoint_every, resume, accelerator)
    finally:
        if accelerator is not None:
            accelerator.end_training()


def _train(
    settings: RunSettings, out: Path, updates: int, checkpoint_every: int, resume: bool, accelerator: Accelerator | None
) -> int:
    processes = processes_of(accelerator)
    console = Console(quiet=True) if processes.rank else make_console()
    if settings.num_envs % processes.size:
        raise ValueError(
            f"--num-envs is {settings.num_envs}, which {processes.size} processes cannot share equally; "
            f"choose a multiple of {processes.size}"
        )
    settings = replace(settings, device=str(processes.device(settings.device)))
    agent_config(settings, updates)  # raises for a wrong field before a directory is made, and so does this:
    credit_of(settings)
    run = RunDirectory(out)
    with contextlib.ExitStack() as held:
        with processes.raise_together():
            if not processes.rank:
                held.enter_context(run.alone())
        with run.setting_up():
            agent, split = set_up(run, settings, updates, resume, accelerator, console)

        before: Evaluation | None = None
        with processes.raise_together(), processes.whole_weights(agent.policy, agent.reference):
            if not processes.rank:
                run.claim(
                    settings_record(settings), torch.get_num_threads()
                )  # only now, so that a failed set-up leaves no half-made run behind
                before = evaluate_before(run, agent, settings, split, console)
        if learn(run, agent, updates, checkpoint_every, console):
            # As at any other time; the checkpoint is saved.
            raise OutputClosed if console.quiet and not processes.rank else KeyboardInterrupt
        with processes.raise_together(), processes.whole_weights(agent.policy, agent.reference):
            if before is not None:
                report(run, agent, settings, split, before, console)
    return 0


def set_up(
    run: RunDirectory,
    settings: RunSettings,
    updates: int,
    resume: bool,
    accelerator: Accelerator | None,
    console: Console,
) -> tuple[Agent, PromptSplit]:
    """The agent, new or from the run's checkpoint, and the prompts.

    Raises:
        RunError: another run, or something else, is in the directory.
    """
    processes = processes_of(accelerator)
    with processes.raise_together():
        has_checkpoint = not processes.rank and run.check(settings_record(settings), resume=resume)
        began_with = run.threads() if not processes.rank and run.record.exists() else None
    has_checkpoint, began_with = processes.broadcast((has_checkpoint, began_with))
    console.print(f"run directory: {run.path}", highlight=False)
    threads, reason = process_settings.thread_count(os.environ, began_with)
    if threads is not None:
        torch.set_num_threads(threads)
    taken = f"{count(torch.get_num_threads(), 'thread')}{reason and f' ({reason})'}"
    console.print(
        f"{process_settings.describe(os.environ)}; {taken}",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    if processes.size > 1:
        console.print(f"{processes.size} processes with {count(settings.num_envs // processes.size, 'episode')} each")

    split = split_prompts(settings)
    envs = make_envs(settings, settings.num_envs // processes.size, split.training)
    if has_checkpoint:
        agent = load_agent(run, settings, envs, updates, accelerator)
        console.print(f"going on after update {agent.num_updates_done} of {updates}")
    else:
        policy = toy_policy(settings.seed) if settings.policy == TOY_POLICY else settings.policy
        agent = algorithm(settings.algorithm)(policy, envs, agent_config(settings, updates), accelerator=accelerator)
        if settings.policy == TOY_POLICY:
            console.print("the toy policy starts untrained: random weights, random words")
            if agent.config.lora_rank:
                console.print("adapters learn little on it: the weights beside them stay random")
    console.print(f"{describe(agent)}; {split.note}", highlight=False, soft_wrap=True)
    if meaning := envs.unwrapped.task.reward_model.meaning:  # type: ignore[attr-defined]
        console.print(f"the score is {meaning}", highlight=False, soft_wrap=True)
    return agent, split


def load_agent(
    run: RunDirectory, settings: RunSettings, envs: Any, updates: int, accelerator: Accelerator | None
) -> Agent:
    """The agent of the run's checkpoint."""
    try:
        return algorithm(settings.algorithm).load(
            run.checkpoint, envs, accelerator=accelerator, device=settings.device, total_updates=updates
        )
    except (CheckpointError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the run in {run.path} cannot be continued: {error}. To start afresh choose another --out, "
            f"or delete {run.path}"
        ) from error


def describe(agent: Agent) -> str:
    """Model, episodes and precision in a few words."""
    parameters = sum(weight.numel() for weight in agent.policy.lm.parameters())
    learned = sum(weight.numel() for weight in agent.policy.lm.parameters() if weight.requires_grad)
    adapters = f" ({learned / 1e6:.2f}M of them in adapters, which learn)" if learned < parameters else ""
    task = agent.envs.unwrapped.task  # type: ignore[attr-defined]
    precision = str(agent.policy.compute_dtype).removeprefix("torch.")
    return (
        f"policy of {parameters / 1e6:.2f}M parameters{adapters} in {precision} on {agent.policy.lm.device}; "
        f"{count(agent.num_episodes, 'episode')} of up to {count(task.max_new_tokens, 'token')} per update"
    )


def evaluate_before(
    run: RunDirectory, agent: Agent, settings: RunSettings, split: PromptSplit, console: Console
) -> Evaluation:
    """The evaluation of the policy as it started; made once per run, from the frozen reference."""
    if run.before.exists():
        return load_evaluation(run.before)
    with console.status("evaluating the policy before training"):
        envs = evaluation_envs(settings, settings.eval_samples, split.held_out)
        before = evaluate(agent.reference, agent.reference, envs, samples=settings.eval_samples)
        envs.close()
    save_evaluation(run.before, before)
    return before


def learn(run: RunDirectory, agent: Agent, updates: int, checkpoint_every: int, console: Console) -> bool:
    """Train up to ``updates``, logging and saving; True if the user interrupted. The checkpoint is then up to date.

    With several processes, all learn and the first one writes.
    """
    from torch.utils.tensorboard import SummaryWriter

    done, processes = agent.num_updates_done, agent.processes
    writer: SummaryWriter | None = None
    with processes.raise_together():
        if not processes.rank:
            if wrong := run.restore_metrics(agent.history):
                console.print(wrong, highlight=False, soft_wrap=True)
            writer = SummaryWriter(run.tensorboard, purge_step=done + 1) if done < updates else None
    if done >= updates:
        console.print(f"all {updates} updates are done; raise --updates to train further")
        return False
    saved, interrupted = done, False

    def after_update(metrics: dict[str, Any]) -> None:
        nonlocal saved, interrupted
        with processes.raise_together():
            if writer is not None:
                run.append_metrics(metrics)
                for key, value in metrics.items():
                    if key != "update":
                        writer.add_scalar(tensorboard_tag(key), value, metrics["update"])
            try:
                display.show(metrics)
            except OutputClosed:  # nobody reads the log any more: save, then end
                interruption.asked = True
        if agent.num_updates_done % checkpoint_every == 0:
            agent.save(run.checkpoint)
            saved = agent.num_updates_done
        interrupted = processes.any(interruption.asked)
        if interrupted:
            raise Stop

    waits = Interruption(console, patient=processes.size > 1)
    try:
        with waits as interruption, TrainingDisplay(console, done, updates) as display:
            # Not KeyboardInterrupt: that one comes in the middle of an update, whose state must not be saved.
            with contextlib.suppress(Stop):
                agent.learn(updates - done, callback=after_update)
            if saved != agent.num_updates_done:
                agent.save(run.checkpoint)
            return interrupted and agent.num_updates_done < updates
    finally:
        if writer is not None:
            writer.close()


def report(
    run: RunDirectory, agent: Agent, settings: RunSettings, split: PromptSplit, before: Evaluation, console: Console
) -> None:
    """Evaluate after training; print the table and samples; write curve, page and summary."""
    with console.status("evaluating the policy after training"):
        envs = evaluation_envs(settings, settings.eval_samples, split.held_out)
        after = evaluate(agent.policy, agent.reference, envs, samples=settings.eval_samples)
        envs.close()
    save_evaluation(run.path / "after.json", after)
    rows = comparison(before, after)
    summary = {
        "updates": agent.num_updates_done,
        "samples": len(after.scores),
        **{
            name: {key: {"mean": mean, "low": low, "high": high} for key, (mean, low, high) in row.items()}
            for name, row in rows.items()
        },
    }
    write_text(run.report / "summary.json", json.dumps(summary, indent=2) + "\n")
    records = curves.read_metrics(run.metrics)
    curve = curves.plot_learning_curves(
        {settings.credit: [records]},
        run.report / "learning_curve.png",
        metric=[name for name in CURVES if name in records[0]],
        window=1 + int(SMOOTHING * len(records)),
        title=f"{settings.algorithm} on {settings.env}, {settings.credit} credit, seed {settings.seed}",
    )
    note = f"{settings.env}, {split.label}, {agent.num_updates_done} updates, seed {settings.seed}"
    if settings.credit == "attention":
        note += f"; the last token also carries {1 - settings.credit_beta:.0%} of the score (1 - credit_beta)"
    page = heatmap.html(
        {"Before training": before.samples, "After training": after.samples},
        run.report / "samples.html",
        title=f"Token credit: {settings.credit}",
        note=note,
    )
    print_samples(console, before, after)
    console.print(comparison_table(rows, f"{len(after.scores)} responses to {split.label}"))
    for name, path in (
        ("learning curve", curve),
        ("samples with credit", page),
        ("metrics", run.metrics),
        ("policy", run.checkpoint),
    ):
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)


def print_samples(console: Console, before: Evaluation, after: Evaluation) -> None:
    """The first samples before and after, one scale of colour for all."""
    pairs = list(zip(before.samples, after.samples, strict=True))[:SHOWN_SAMPLES]
    scale = heatmap.credit_scale([sample.credits for pair in pairs for sample in pair])
    for pair in pairs:
        console.print()
        for label, sample in zip(("before", "after "), pair, strict=True):
            line = heatmap.terminal(sample.tokens, sample.credits, prompt=sample.prompt + SEPARATOR, scale=scale)
            console.print(f"{label} {sample.score:+6.2f} ", line, sep="", highlight=False, soft_wrap=True)
    console.print()
