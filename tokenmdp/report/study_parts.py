"""What the sections of a study's page are made of, and what their captions say alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenmdp.study.claims import FEWEST_SEEDS, MAIN_GRIDS
from tokenmdp.study.directory import Study
from tokenmdp.study.outcomes import Groups
from tokenmdp.wording import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Picture:
    """A figure of the page."""

    name: str  # of its files
    figure: Figure
    title: str  # what it shows, in a line
    caption: str


@dataclass
class Section:
    """A part of the page; without pictures and tables it is only a line that says why."""

    id: str
    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    grids: list[str] = field(default_factory=list)  # whose table of methods follows
    models: list[str] = field(default_factory=list)  # reward models whose table of credit quality follows
    missing: str = ""  # what a figure would need


def main_grids(study: Study) -> list[str]:
    """The grids of the paper's main comparison that have finished cells, the best first."""
    return [grid for grid in MAIN_GRIDS if study.select(grid)]


def seeds_of(groups: Groups) -> str:
    """Such as ``10 seeds`` or ``2 to 3 seeds``."""
    counts = sorted({len(results) for results in groups.values()})
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else count(counts[0], "seed")


def bands_of(groups: Groups) -> str:
    """What is drawn around the means of a figure: as `draw_band` does."""
    counts = {len(results) for results in groups.values()}
    parts = ["Bands: 95% t interval of the mean over seeds."] if max(counts) >= FEWEST_SEEDS else []
    parts += ["Faint lines: the two seeds of a method that has no more."] if 2 in counts else []
    return " ".join(parts or ["No bands."])


def told(remarks: Sequence[str]) -> str:
    """Sentences at the end of a caption."""
    return "".join(f" {remark}." for remark in remarks)
