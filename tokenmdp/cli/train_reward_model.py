"""``tokenmdp train reward-model``: its options, and from them to a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenmdp.agents import algorithm
from tokenmdp.cli.checks import check_directory, check_numbers
from tokenmdp.cli.options import as_options, parse_parts
from tokenmdp.reward_models.ensemble import write_ensemble
from tokenmdp.runs import training
from tokenmdp.runs.directory import refuse_strangers
from tokenmdp.runs.display import make_console
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.reward_model_run import NAME, RewardModelSettings
from tokenmdp.runs.settings import HELD_OUT, SET_APART, absolute_name

CHECKPOINT_EVERY = 20  # updates


@dataclass(frozen=True, kw_only=True)
class TrainRewardModel:
    """Train a reward model on comparisons, and report how often it is right about held-out ones.

    Its checkpoint/ is a directory for --reward-model. Run the same command again to go on with an interrupted run.
    """

    data: str | None = None
    """Comparisons or rankings: a file that `tokenmdp prefer` wrote, another one, a directory or a data-set name."""
    init: str = "imdb-tiny"
    """What it starts from: bundled name, directory or hub name of a language model, or of a one-label classifier."""
    held_out: float = HELD_OUT
    """About the share of the prompts that is not learned from, to test what was: every k-th, k = 1 / share rounded."""
    seed: int = 1
    """Seeds the new head and the order of the data."""
    members: int = 1
    """Above 1: an ensemble. Each member learns from its own bootstrap of the data, and --out is the directory for
    --reward-model."""
    penalty: float = 0.0
    """Of an ensemble: the score is the members' mean less this many of their sds."""
    updates: int | None = None
    """Updates in all; raise it to train a finished run further. Default: as many as --epochs of the data take."""
    device: str = "auto"
    """Where it runs: cpu, cuda, cuda:1; auto is cuda if there is one."""
    out: Path | None = None
    """Run directory. Default: runs/reward-model-seedSEED."""
    resume: bool = True
    """Go on from the run directory's checkpoint if it has one."""
    reexec: bool = True
    """Let the command re-execute itself with memory settings of glibc that are faster on CPUs."""


def main(arguments: Sequence[str], algorithms: str) -> int:
    """Parse, train and report; returns the exit status."""
    config = as_options(algorithm(NAME).config_class(), SET_APART)
    parts = {"general": as_options(TrainRewardModel()), NAME.replace("-", "_"): config}
    about = f"{inspect.getdoc(TrainRewardModel)}\n\n{algorithms}"
    options, chosen = parse_parts(f"train {NAME}", arguments, about, parts)
    return train(TrainRewardModel(**options), chosen)


def train(arguments: TrainRewardModel, config: Mapping[str, Any] | None = None) -> int:
    """Train a reward model, or resume, then report; returns the exit status."""
    if arguments.data is None:
        raise ValueError(f"--data is missing: {NAME} learns from comparisons; `tokenmdp prefer` makes some")
    check_numbers(arguments, updates=1, members=1, penalty=0)
    check_directory(arguments.out)
    if arguments.members > 1 and arguments.out is not None:
        refuse_strangers(arguments.out / "member-0", "an ensemble")
    if math.isinf(arguments.penalty):
        raise ValueError(f"--penalty is {arguments.penalty}; it is a number of sds: give a finite one")
    if arguments.penalty and arguments.members == 1:
        raise ValueError(f"--penalty {arguments.penalty} is a number of sds of an ensemble's members: pass --members")
    kind = algorithm(NAME).config_class
    if arguments.members > 1:  # raw logits of several models have no common unit
        config = dict(config or {}) | {"unit_scale": True}
    full, own = asdict(kind(**dict(config or {}))), asdict(kind())
    settings = RewardModelSettings(
        data=absolute_name(arguments.data) or arguments.data,
        policy=absolute_name(arguments.init) or arguments.init,
        held_out=arguments.held_out,
        seed=arguments.seed,
        device=resolve_device(arguments.device),
        config={key: value for key, value in full.items() if key not in SET_APART and value != own[key]},
    )
    out = arguments.out or Path("runs") / f"{NAME}-seed{arguments.seed}"
    if arguments.members == 1:
        return training.train(settings, out, arguments.updates, CHECKPOINT_EVERY, resume=arguments.resume)
    members = [f"member-{place}" for place in range(arguments.members)]
    for place, member in enumerate(members):
        own_settings = replace(settings, member=place)
        training.train(own_settings, out / member, arguments.updates, CHECKPOINT_EVERY, resume=arguments.resume)
    write_ensemble(out, [f"{member}/checkpoint" for member in members], arguments.penalty)
    make_console().print(f"ensemble of {len(members)}, for --reward-model: {out}", highlight=False, soft_wrap=True)
    return 0
