"""Soups of two runs, each evaluated on every objective, and the front that they draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenmdp.evaluation.policies import gold_scores, played
from tokenmdp.files import CheckpointError, read_json, write_text
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.models.loading import fingerprint
from tokenmdp.models.names import Kind, resolve
from tokenmdp.models.soup import check_equal, write_soup
from tokenmdp.runs.directory import claim
from tokenmdp.runs.environments import evaluation_envs, split_prompts
from tokenmdp.runs.opening import load_policy
from tokenmdp.runs.settings import RunSettings

MOST_SOUPS = 1000


@dataclass(frozen=True)
class Point:
    """One policy of a front; index i of the lists is response i."""

    weight: float  # of the second member
    directory: str
    scores: dict[str, list[float]]  # by objective
    kls: list[float]  # to the common start, nats

    def score(self, objective: str) -> Estimate:
        """The mean of one objective."""
        return mean_interval(self.scores[objective])

    @property
    def kl(self) -> Estimate:
        """To the start."""
        return mean_interval(self.kls)


def weights_of(text: str) -> list[float]:
    """``FIRST:LAST:STEP`` or numbers with commas between them.

    Raises:
        ValueError: anything else.

    >>> weights_of("0:1:0.25"), weights_of("0.5,0.7")
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.5, 0.7])
    """
    try:
        if ":" in text:
            if text.count(":") != 2:
                raise ValueError("a range has three numbers")
            first, last, step = map(_number, text.split(":"))
            if not step:
                raise ValueError("the step is 0")
            number = round((last - first) / step)
            if step <= 0 or number < 0:
                raise ValueError("the step leads away from the end")
            if number >= MOST_SOUPS:
                raise ValueError(f"{number + 1} soups, and at most {MOST_SOUPS} are made")
            return [round(first + place * step, 10) for place in range(number + 1)]
        weights = [_number(part) for part in text.split(",")]
        if not np.isfinite(weights).all():
            raise ValueError("a weight is not finite")
        return weights
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"--weights is {text!r} ({error}); give FIRST:LAST:STEP such as 0:1:0.25, or numbers such as 0.3,0.6"
        ) from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error


def soups(
    members: tuple[str, str],
    settings: RunSettings,
    weights: Sequence[float],
    objectives: Sequence[str],
    start: str,
    samples: int,
    out: Path,
    console: Console,
) -> list[Point]:
    """Write and evaluate a soup for each weight of the second member; those that are done already are read.

    Args:
        members: Directories of the two models.
        settings: Of the environment in which responses are sampled.
        weights: Of the second member.
        objectives: Names of reward models.
        start: The policy that the KL is measured to.
        samples: Responses per soup; all soups answer the same prompts.
        out: Of the soups, one directory each.
        console: For progress.

    Raises:
        UnequalModels: members that cannot be averaged.
        ValueError: the same member twice.
        RunError: ``out`` holds soups of other members, or something else.
        CheckpointError: a soup that is done already has a damaged record.
    """
    if resolve("policy", members[0]) == resolve("policy", members[1]):
        raise ValueError(f"both members of the soup are {members[0]}; give two policies trained from one start")
    check_equal(members)
    used: dict[Kind, Sequence[str]] = {"policy": (*members, start), "reward_model": objectives}
    files = {one: fingerprint(resolve(kind, one)) for kind, names in used.items() for one in names}
    made_of = {"members": list(members), "objectives": list(objectives), "start": start, "samples": samples}
    claim(out / "soups.json", "soups", made_of | {f"time of {one}": dict(times) for one, times in files.items()})
    split = split_prompts(settings)
    found = []
    for weight in weights:
        place, record = out / f"soup-{weight:g}", out / f"soup-{weight:g}.json"
        if not record.exists():
            with console.status(f"soup with weight {weight:g}"):
                write_soup(members, (1 - weight, weight), place)
                envs = evaluation_envs(settings, samples, split.held_out)
                policy, reference = (
                    load_policy(str(one), envs, settings.config, settings.device) for one in (place, start)
                )
                task = envs.unwrapped.task  # type: ignore[attr-defined]
                models = {name: task.load_reward_model(name) for name in objectives}  # which checks that they read it
                scores: dict[str, list[float]] = {name: [] for name in objectives}
                kls: list[float] = []
                for rollout in played(envs, policy, reference, samples=samples, seed=0, credited=0):
                    kls += (rollout.logprobs - rollout.ref_logprobs).sum(-1).tolist()
                    for name, model in models.items():
                        scores[name] += gold_scores(model, rollout).tolist()
                envs.close()
            write_text(record, json.dumps({"weight": weight, "scores": scores, "kls": kls}) + "\n")
        found.append(_read_point(record, str(place), objectives))
    return found


def _read_point(record: Path, place: str, objectives: Sequence[str]) -> Point:
    read = read_json(record)
    try:
        point = Point(float(read["weight"]), place, {name: read["scores"][name] for name in objectives}, read["kls"])
        for numbers in (*point.scores.values(), point.kls):
            mean_interval(numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{record} holds no soup ({error!r}); delete it and it is made anew") from error
    return point


def above_chord(points: Sequence[Point], objective: str) -> list[Estimate | None]:
    """By how much each soup's mean exceeds the weighted mean of the ends', prompt by prompt; None without the ends."""
    ends = {point.weight: np.array(point.scores[objective]) for point in points if point.weight in (0.0, 1.0)}
    if len(ends) < 2:
        return [None] * len(points)
    return [
        mean_interval(
            np.array(point.scores[objective]) - (1 - point.weight) * ends[0.0] - point.weight * ends[1.0]
        )
        for point in points
    ]  # fmt: skip


def table(points: Sequence[Point], objectives: Sequence[str], names: Sequence[str]) -> Table:
    """One line per soup."""
    shown = Table(
        title=f"{len(points[0].kls)} responses to held-out prompts",
        caption="mean [95% interval]; KL to the start in nats per sequence; above the chord: the soup's mean less the "
        "weighted mean of both ends, prompt by prompt",
    )
    shown.add_column("weight")
    for name in names:
        shown.add_column(name, justify="right")
        shown.add_column("above the chord", justify="right")
    shown.add_column("KL", justify="right")
    gains = [above_chord(points, objective) for objective in objectives]
    for place, point in enumerate(points):
        cells: list[str] = []
        for objective, gain in zip(objectives, gains, strict=True):
            cells += [str(point.score(objective)), str(gain[place] or "")]
        shown.add_row(f"{point.weight:g}", *cells, str(point.kl))
    return shown
