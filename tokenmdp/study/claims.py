"""What a verdict is: a claim, the interval that decides it, and the cells that it is decided on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmdp.study import outcomes
from tokenmdp.study.results import CellResult, Study
from tokenmdp.study.statistics import Estimate

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
INCONCLUSIVE, NOT_MEASURED = "inconclusive", "not measured"
MAIN_GRIDS = ("imdb", "gpt2", "custom", "quick")  # where the paper's main comparison may be, the best first
NAMES = {
    "attention": "ABC",
    "abc-d": "ABC-D",
    "abc-d2": "ABC-D2",
    "red": "RED",
    "sparse": "sparse",
    "uniform": "uniform",
}
FEWEST_SEEDS = 3
FEWEST_RESAMPLED = 6  # resamples stay within n seeds' range, which misses a median with probability 2**(1 - n)


@dataclass(frozen=True)
class Verdict:
    """One row of the table of claims."""

    claim: str
    paper: str  # the paper's figure
    ours: str
    interval: str
    verdict: str  # "reproduced", "not reproduced", "inconclusive" or "not measured"
    rule: str  # how it was decided, or what is missing
    where: str = ""  # grid, setting and number of seeds


@dataclass(frozen=True)
class Claim:
    """What is said, with the paper's figure."""

    says: str
    paper: str

    def missing(self, why: str) -> Verdict:
        """The verdict on a claim that the study says nothing about."""
        return Verdict(self.says, self.paper, "", "", NOT_MEASURED, why)

    def decide(
        self,
        estimate: Estimate,
        seeds: int,
        ours: str,
        where: str,
        what: str,
        *,
        threshold: float = 0.0,
        below: bool = False,
        fewest: int = FEWEST_SEEDS,
    ) -> Verdict:
        """By the interval alone: reproduced if all of it lies on the claim's side of ``threshold``."""
        side = estimate.side(threshold) * (-1 if below else 1)
        verdict = (NOT_REPRODUCED, INCONCLUSIVE, REPRODUCED)[side + 1]
        rule = f"{what}; reproduced if the interval lies {'below' if below else 'above'} {threshold:g}"
        if seeds < fewest:
            verdict = INCONCLUSIVE
            rule += f"; {counted(seeds, 'seed')}, a decision needs {fewest}"
        return Verdict(self.says, self.paper, ours, bounds(estimate), verdict, rule, where)


def bounds(estimate: Estimate) -> str:
    """The interval as text; empty where there is none.

    >>> bounds(Estimate(1.0, 0.5, 1.5)), bounds(Estimate(0.5, 0.4, math.inf))
    ('[0.50, 1.50]', '[0.40, never]')
    """
    if math.isinf(estimate.low) and estimate.low < 0:
        return ""
    low, high = ("never" if end == math.inf else f"{round(end, 2) + 0.0:.2f}" for end in estimate[1:])
    return f"[{low}, {high}]"


@dataclass(frozen=True)
class Found:
    """Methods of one setting, paired: ``groups[i][j]`` is method i under seed j."""

    groups: list[list[CellResult]]
    where: str


def find(study: Study, methods: Sequence[str]) -> Found | None:
    """The setting with most seeds in the first of `MAIN_GRIDS` where all methods have cells in common seeds."""
    for grid in MAIN_GRIDS:
        selected = study.select(grid)
        best: tuple[str, list[tuple[CellResult, ...]]] = ("", [])
        for setting in dict.fromkeys(setting for setting, _ in selected):
            if all((setting, method) in selected for method in methods):
                rows = outcomes.paired(*(selected[setting, method] for method in methods))
                best = max(best, (setting, rows), key=lambda found: len(found[1]))
        setting, rows = best
        if rows:
            return Found(
                [list(column) for column in zip(*rows, strict=True)], where_of(study, grid, setting, len(rows))
            )
    return None


def family(study: Study, grid: str, methods: Sequence[str], varied: Sequence[str]) -> list[list[list[CellResult]]]:
    """The cells of the methods at the settings of a grid that differ in nothing but ``varied``.

    One entry a setting, in the grid's order; in it one list a method. If there are several families, the largest.
    """
    selected = study.select(grid)
    families: dict[str, list[list[list[CellResult]]]] = {}
    for setting in dict.fromkeys(setting for setting, _ in selected):
        if all((setting, method) in selected for method in methods):
            groups = [selected[setting, method] for method in methods]
            families.setdefault(outcomes.apart_from(groups[0][0], varied), []).append(groups)
    return max(families.values(), key=len, default=[])


def where_of(study: Study, grid: str, setting: str, seeds: int) -> str:
    """Grid, setting and seeds in words, with the number of cells that are missing."""
    missing = sum(cell.id not in study.results for cell in study.declared(grid))
    note = f"; {counted(missing, 'cell')} of the grid missing" if missing else ""
    return f"grid {grid}, {setting}, {counted(seeds, 'seed')}{note}"


def counted(number: int, what: str) -> str:
    """Such as ``3 seeds``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def needs(methods: Sequence[str]) -> str:
    """What a comparison of the methods lacks, and the command that makes it."""
    names = ", ".join(NAMES[method] for method in methods)
    return f"needs finished cells of {names} under one seed: tokenmdp ablate --preset imdb"
