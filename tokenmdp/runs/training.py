"""``tokenmdp train``: one resumable run of any algorithm, and the report on what changed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers.utils import logging

from tokenmdp.agents.learner import Learner
from tokenmdp.files import CheckpointError
from tokenmdp.runs import process_settings
from tokenmdp.runs.directory import RunDirectory, tensorboard_tag
from tokenmdp.runs.display import Interruption, OutputClosed, TrainingDisplay, make_console
from tokenmdp.runs.policy_run import PolicyRun
from tokenmdp.runs.reward_model_run import RewardModelRun, RewardModelSettings
from tokenmdp.runs.settings import RunSettings
from tokenmdp.training.accelerated import launched, processes_of
from tokenmdp.wording import count

if TYPE_CHECKING:
    from accelerate import Accelerator


class Stop(Exception):
    """Ends training between two updates."""


def train(
    settings: RunSettings | RewardModelSettings,
    out: Path,
    updates: int | None,
    checkpoint_every: int,
    *,
    resume: bool = True,
) -> int:
    """Train in the run directory ``out``, or resume there, then report; returns the exit status.

    Args:
        settings: Of the run.
        out: Its directory.
        updates: In all; None, where the algorithm learns from data: as its configuration says.
        checkpoint_every: Updates between checkpoints.
        resume: Continue from the directory's checkpoint if it has one.
    """
    logging.disable_progress_bar()  # transformers draws a progress bar for every checkpoint
    accelerator = launched(settings.device)
    kind = RewardModelRun(settings) if isinstance(settings, RewardModelSettings) else PolicyRun(settings)
    try:
        return _train(kind, out, updates, checkpoint_every, resume, accelerator)
    finally:
        if accelerator is not None:
            accelerator.end_training()


def _train(
    kind: Any,
    out: Path,
    updates: int | None,
    checkpoint_every: int,
    resume: bool,
    accelerator: Accelerator | None,
) -> int:
    processes = processes_of(accelerator)
    console = Console(quiet=True) if processes.rank else make_console()
    kind.check(updates, processes)
    run = RunDirectory(out)
    with contextlib.ExitStack() as held:
        with processes.raise_together():
            if not processes.rank:
                held.enter_context(run.alone())
        with run.setting_up():
            learner = set_up(kind, run, updates, resume, accelerator, console)
        total: int = learner.config.total_updates if updates is None else updates

        with processes.raise_together(), processes.whole_weights(learner.model, *learner.references()):
            if not processes.rank:
                # Only now, so that a failed set-up leaves no half-made run behind.
                with run.setting_up(), run.claimed(kind.record(), torch.get_num_threads()):
                    kind.before(run, learner, console)
        if learn(kind, run, learner, total, checkpoint_every, console):
            # As at any other time; the checkpoint is saved.
            raise OutputClosed if console.quiet and not processes.rank else KeyboardInterrupt
        with processes.raise_together(), processes.whole_weights(learner.model, *learner.references()):
            if not processes.rank:
                kind.report(run, learner, console)
    return 0


def set_up(
    kind: Any,
    run: RunDirectory,
    updates: int | None,
    resume: bool,
    accelerator: Accelerator | None,
    console: Console,
) -> Learner:
    """What learns, new or from the run's checkpoint.

    Raises:
        RunError: another run, or something else, is in the directory.
    """
    processes = processes_of(accelerator)
    with processes.raise_together():
        has_checkpoint = not processes.rank and run.check(kind.record(), resume=resume)
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
    if not has_checkpoint:
        return kind.set_up(None, updates, accelerator, console)
    try:
        learner = kind.set_up(run.checkpoint, updates, accelerator, console)
    except (CheckpointError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the run in {run.path} cannot be continued: {error}. To start afresh choose another --out, "
            f"or delete {run.path}"
        ) from error
    total = learner.config.total_updates if updates is None else updates
    if learner.num_updates_done < total:
        console.print(f"going on after update {learner.num_updates_done} of {total}")
    return learner


def learn(kind: Any, run: RunDirectory, agent: Learner, updates: int, checkpoint_every: int, console: Console) -> bool:
    """Train up to ``updates``, log, evaluate and save; True if the user interrupted. The checkpoint is then up to date.

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
        asked = "" if done == updates else f", {updates} asked for"
        console.print(f"{count(done, 'update')} done{asked}; raise --updates to train further")
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
        if kind.eval_every and agent.num_updates_done % kind.eval_every == 0 and agent.num_updates_done < updates:
            # Before the checkpoint, so that a run which goes on from it has been evaluated.
            with processes.raise_together(), processes.whole_weights(agent.model, *agent.references()):
                if not processes.rank:
                    kind.along(run, agent, console)
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
