"""``tokenmdp train reward-model``: its options, and from them to a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenmdp.agents import algorithm
from tokenmdp.cli.options import as_options, parse_parts
from tokenmdp.runs import training
from tokenmdp.runs.environments import resolve_device
from tokenmdp.runs.reward_model_run import NAME, RewardModelSettings
from tokenmdp.runs.settings import SET_APART, absolute_name

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
    held_out: float = 0.1
    """The share of the prompts that is not learned from, to test what was."""
    seed: int = 1
    """Seeds the new head and the order of the data."""
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
    if arguments.updates is not None and arguments.updates < 1:
        raise ValueError(f"--updates is {arguments.updates}; it must be at least 1")
    kind = algorithm(NAME).config_class
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
    return training.train(settings, out, arguments.updates, CHECKPOINT_EVERY, resume=arguments.resume)
