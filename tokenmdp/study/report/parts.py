"""The parts that the sections of a study's page have in common: captions, numbers, the grids that they show."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from tokenmdp.study.directory import Study
from tokenmdp.study.labels import name_of
from tokenmdp.study.outcomes import Groups, by_setting, collapsed, family, window_for
from tokenmdp.study.report.lines import MOST_RUNS, RUN_POINTS
from tokenmdp.study.statistics import FEWEST_DECIDING
from tokenmdp.study.tuning import SEARCH
from tokenmdp.wording import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Picture:
    """A figure of the page."""

    name: str  # of its files
    figure: Figure
    title: str  # what it shows, in one line
    caption: str  # begins with what the reader should see

    def __post_init__(self) -> None:
        self.caption = self.caption.lstrip()  # its first sentence may be empty


@dataclass
class Section:
    """A part of the page; with nothing to show it is only a line that says why."""

    id: str
    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    grids: list[str] = field(default_factory=list)  # whose table of methods follows
    models: list[str] = field(default_factory=list)  # reward models whose table of credit quality follows
    missing: str = ""  # what a figure would need
    html: str = ""  # after the introduction
    markdown: str = ""  # of tables.md


def compared_grids(study: Study) -> list[str]:
    """The grids with finished cells, without the search for learning rates."""
    return [grid for grid in study.grids if grid != SEARCH and study.select(grid)]


def main_grids(study: Study) -> list[str]:
    """The grids that compare methods at one setting, the one with most finished cells first; if there is none, all."""
    sizes = {grid: sum(map(len, study.select(grid).values())) for grid in compared_grids(study)}
    plain = [grid for grid in sizes if _compares_methods_alone(study, grid)]
    return sorted(plain or sizes, key=lambda grid: -sizes[grid])


def _compares_methods_alone(study: Study, grid: str) -> bool:
    settings = by_setting(study, grid)
    credits = {results[0].cell.settings.credit for groups in settings.values() for results in groups.values()}
    return len(settings) == 1 and len(credits) > 1


def families(
    study: Study, varied: Sequence[str], value: Callable[[Groups], Hashable]
) -> Iterator[tuple[str, dict[str, Groups], Groups]]:
    """Grids with settings that differ in nothing but ``varied``: the grid, these settings, and all their groups.

    ``value`` says what a setting has of what varies.
    """
    for grid in compared_grids(study):
        found = family(by_setting(study, grid), varied)
        if len({value(groups) for groups in found.values()}) > 1:
            yield grid, found, {f"{name} {method}": cells for name in found for method, cells in found[name].items()}


def first_setting(study: Study, *keys: str) -> tuple[str, str, Groups] | None:
    """The first main grid and setting whose cells all have these columns of evaluations, with its methods."""
    for grid in main_grids(study):
        for setting, groups in by_setting(study, grid).items():
            if all(result.evaluations.get(key) for results in groups.values() for result in results for key in keys):
                return grid, setting, groups
    return None


def seeds_of(groups: Groups) -> str:
    """Such as ``n = 10 seeds each`` or ``n = 2 to 3 seeds each``."""
    counts = sorted({len(results) for results in groups.values()})
    number = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else count(counts[0], "seed")
    return f"n = {number} each"


def updates_of(groups: Groups) -> int:
    """The length of the shortest run."""
    return min(len(result.metrics["update"]) for results in groups.values() for result in results)


def lost_runs(settings: Mapping[str, Groups], mark: str = "Crosses: runs") -> list[str]:
    """A remark on the runs that lost what they had gained, which `draw_curves` marks; a setting may have no name."""
    told = [
        f"{f'{name}: ' * bool(name)}{lost} of {len(results)} of {name_of(method)}'s"
        for name, groups in settings.items()
        for method, results in groups.items()
        if (lost := sum(map(collapsed, results)))
    ]
    return [f"{mark} that lost more than half of what they had gained ({'; '.join(told)})"] if told else []


def bands_of(groups: Groups, updates: int = 0) -> str:
    """A description of what `draw_band` draws for a figure's curves; ``updates`` of each, unless it shows every one."""
    counts = {len(results) for results in groups.values()}
    averaged = round((updates - window_for(updates) + 1) / RUN_POINTS)
    parts = ["Thick: the mean"]
    parts += [f"thin: each run{f', in means of {averaged} updates' * (averaged > 1)}"] * any(
        1 < number <= MOST_RUNS for number in counts
    )
    parts += ["band: 95% t interval of the mean"] * (max(counts) >= FEWEST_DECIDING)
    return f"{'; '.join(parts)}."


def caption_remarks(remarks: Sequence[str]) -> str:
    """Sentences at the end of a caption."""
    return "".join(f" {remark}." for remark in remarks)


def typeset(text: str) -> str:
    """With the signs that a keyboard lacks.

    >>> typeset("ABC - sparse: -0.25 +- 0.10 [-0.30, 0.20], 8-16 tokens")
    'ABC \N{MINUS SIGN} sparse: \N{MINUS SIGN}0.25 ± 0.10 [\N{MINUS SIGN}0.30, 0.20], 8-16 tokens'
    """
    return re.sub(r"(?<![\w.])-(?=[\d. ])", "\N{MINUS SIGN}", text.replace("+-", "±"))


def number_cell(text: str) -> str:
    """The HTML of a table's cell, with the interval below its number."""
    number, bracket, interval = typeset(text).partition(" [")
    below = f"<small>[{escape(interval)}</small>" if bracket else ""
    return f"<td>{escape(number) or '&ndash;'}{below}</td>"
