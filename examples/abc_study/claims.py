"""Verdicts: a claim, the interval that decides it, and the cells that it is based on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tokenmdp.intervals import Estimate
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.study import outcomes
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import NAMES
from tokenmdp.study.results import Cell, CellResult
from tokenmdp.study.statistics import FEWEST_DECIDING, holm, p_of_interval
from tokenmdp.wording import count

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
INCONCLUSIVE, NOT_MEASURED = "inconclusive", "not measured"
MAIN_GRIDS = ("imdb", "gpt2", "custom", "quick")  # where the paper's main comparison may be, the best first
NO_FIGURE = "no figure"  # of the paper
PAPER_LENGTH = (8, 15)  # of the paper's main comparison, both ends included


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
    refuted: str = ""  # what would refute it: when it is "not reproduced"
    p: float | None = None  # two-sided, of the same test as the interval; None without one

    @property
    def own(self) -> bool:
        """Whether it is a question of our own, not a claim of the paper."""
        return self.paper.startswith(NO_FIGURE)


class Place(NamedTuple):
    """The data that a verdict is based on."""

    text: str  # grid, setting, number of seeds, and what is missing
    crashed: int  # runs of the compared methods: rarely the good ones, so the others may not represent all


@dataclass(frozen=True)
class Claim:
    """The claim, with the paper's figure."""

    says: str
    paper: str

    def missing(self, why: str) -> Verdict:
        """The verdict on a claim that the study has no data on."""
        return Verdict(self.says, self.paper, "", "", NOT_MEASURED, why)

    def decide(
        self,
        estimate: Estimate,
        seeds: int,
        ours: str,
        place: Place,
        what: str,
        *,
        threshold: float = 0.0,
        below: bool = False,
        fewest: int = FEWEST_DECIDING,
        when: tuple[str, str] | None = None,
        p: float | None = None,
    ) -> Verdict:
        """By the interval alone: reproduced if all of it lies on the claim's side of ``threshold``, refuted if beyond.

        Nothing is decided on fewer than ``fewest`` seeds, nor where runs crashed. ``when`` says in words when the claim
        is reproduced and when it is refuted, where it takes more than this interval. ``p`` is that of the interval;
        None: it is a t interval of ``seeds`` values.
        """
        side = estimate.side(threshold) * (-1 if below else 1)
        verdict = (NOT_REPRODUCED, INCONCLUSIVE, REPRODUCED)[side + 1]
        sides = ("below", "above") if below else ("above", "below")
        holds, fails = when or tuple(f"the interval lies {where} {threshold:g}" for where in sides)
        if p is None and math.isfinite(estimate.high - estimate.low) and seeds >= fewest:
            p = p_of_interval(estimate, seeds, threshold)
        rule = f"{what}; reproduced if {holds}"
        decided = Verdict(self.says, self.paper, ours, bounds(estimate), verdict, rule, place.text, fails, p)
        if seeds < fewest:
            decided = undecided(decided, f"{count(seeds, 'seed')}, a decision needs {fewest}")
        if place.crashed:
            lost = count(place.crashed, "run")
            decided = undecided(decided, f"{lost} of these methods crashed, which may be no accident")
        return decided


def undecided(verdict: Verdict, why: str) -> Verdict:
    """Inconclusive, whatever the interval says."""
    return replace(verdict, verdict=INCONCLUSIVE, rule=f"{verdict.rule}; {why}")


def corrected(decided: Sequence[Verdict]) -> list[float | None]:
    """Each claim's p after Holm's correction for all that have one; None for the others."""
    told = iter(holm([verdict.p for verdict in decided if verdict.p is not None]).tolist())
    return [None if verdict.p is None else next(told) for verdict in decided]


def p_text(p: float | None) -> str:
    """A p to two digits; empty where there is none.

    >>> p_text(0.0123), p_text(0.00004), p_text(0.5), p_text(None)
    ('.012', '< .0001', '.50', '')
    """
    if p is None:
        return ""
    return "< .0001" if p < 1e-4 else f"{p:#.2g}".removeprefix("0") if p < 0.995 else "1"


def multiplicity(decided: Sequence[Verdict]) -> str:
    """The note on multiple comparisons for a reader of many claims.

    >>> multiplicity([Verdict("a", "", "1", "[0, 2]", REPRODUCED, "", p=0.01)] * 12)[-73:]
    'Of the 12 decided claims, 0 keep a p below .05 after the correction.'
    """
    after = corrected(decided)
    if not any(p is not None for p in after):
        return "No claim has an interval: the runs are too few, or other ones."
    settled = [p for verdict, p in zip(decided, after, strict=True) if verdict.verdict in (REPRODUCED, NOT_REPRODUCED)]
    kept = sum(p is not None and p < 0.05 for p in settled)
    return (
        f"Verdicts go by each claim's own interval, and one interval in twenty misses by chance. So there are two p: "
        f"that of the claim's own test, and Holm's, corrected for the {sum(p is not None for p in after)} claims that "
        "have one. Several claims share their runs, so that they tend to be right or wrong together. Of the "
        f"{count(len(settled), 'decided claim')}, {kept} keep a p below .05 after the correction."
    )


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
    place: Place


def find(study: Study, methods: Sequence[str], length: tuple[int, int] | None = PAPER_LENGTH) -> Found | None:
    """The setting with most seeds in the first of `MAIN_GRIDS` where all methods have cells in common seeds.

    Of settings with this response length only, unless that is None.
    """
    for grid in MAIN_GRIDS:
        best: tuple[str, list[tuple[CellResult, ...]]] = ("", [])
        for setting, groups in with_methods(study, grid, methods).items():
            if length is None or outcomes.length_of(groups[methods[0]][0].cell) == length:
                rows = outcomes.paired(*(groups[method] for method in methods))
                best = max(best, (setting, rows), key=lambda found: len(found[1]))
        chosen, rows = best
        if rows:
            place = place_of(study, grid, chosen, len(rows), cells_of(study, grid, methods, chosen))
            return Found([list(column) for column in zip(*rows, strict=True)], place)
    return None


def with_methods(study: Study, grid: str, methods: Sequence[str]) -> dict[str, dict[str, list[CellResult]]]:
    """Setting -> method -> cells, of the settings that have all methods; `plain_cells` says which those are."""
    plain = plain_cells(study, grid, methods)
    found: dict[str, dict[str, list[CellResult]]] = {}
    for (setting, _), results in study.select(grid).items():
        if results[0].cell.id in plain:
            found.setdefault(setting, {})[str(plain_method(results[0].cell))] = results
    return {setting: groups for setting, groups in found.items() if len(groups) == len(methods)}


def plain_cells(study: Study, grid: str, methods: Sequence[str]) -> dict[str, Cell]:
    """Id -> cell of a grid's cells with these methods, finished or not.

    Where a setting has one method under two labels, such as ``red`` and ``red:credit_beta=1``, the grid's first wins.
    """
    labels: dict[tuple[str, str], str] = {}
    found = {}
    for cell in study.declared(grid):
        method = plain_method(cell)
        if method in methods and labels.setdefault((cell.setting, str(method)), cell.method) == cell.method:
            found[cell.id] = cell
    return found


def plain_method(cell: Cell) -> str | None:
    """The method of `NAMES` that a cell uses with its default options, whatever its label; None for all others."""
    settings = cell.settings
    if settings.credit not in NAMES or settings.credit_options:
        return None
    return settings.credit if settings.credit_beta == default_beta(settings.credit) else None


def families(study: Study, grid: str, methods: Sequence[str], varied: Sequence[str]) -> list[list[list[CellResult]]]:
    """The cells of the methods at the settings of a grid that differ in nothing but ``varied``.

    One entry per setting, in the grid's order; in it one list per method. If there are several families, the largest.
    """
    found = outcomes.family(with_methods(study, grid, methods), varied)
    return [[list(groups[method]) for method in methods] for groups in found.values()]


def cells_of(study: Study, grid: str, methods: Sequence[str], setting: str | None = None) -> set[str]:
    """The ids of `plain_cells`; of one setting if it is given."""
    cells = plain_cells(study, grid, methods)
    return {id for id, cell in cells.items() if setting in (None, cell.setting)}


def place_of(study: Study, grid: str, setting: str, seeds: int, compared: Collection[str]) -> Place:
    """Grid, setting and seeds in words, with the numbers of cells that crashed or did not run.

    Args:
        study: where.
        grid: of it.
        setting: what to call what is compared.
        seeds: that are compared.
        compared: ids of the cells whose crash would leave the comparison one-sided.
    """
    left = [id for id in study.grids[grid] if id not in study.results]
    crashed = sum(id in study.errors for id in left)
    waiting = len(left) - crashed
    notes = f"; {count(crashed, 'cell')} of the grid crashed" if crashed else ""
    notes += f"; {count(waiting, 'cell')} of the grid not run" if waiting else ""
    lost = len(study.errors.keys() & set(compared))
    return Place(f"grid {grid}, {setting}, {count(seeds, 'seed')}{notes}", lost)


def needs(methods: Sequence[str]) -> str:
    """What a comparison of the methods lacks, and the command that supplies it."""
    names = ", ".join(NAMES[method] for method in methods)
    return f"needs finished cells of {names} under one seed: {command('imdb')}"


def command(plan: str) -> str:
    """The command that runs a plan of this folder."""
    return f"tokenmdp ablate --plan examples/abc_study/{plan}.json"
