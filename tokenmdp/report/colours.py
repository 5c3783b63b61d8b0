"""The palette of figures: colours, dashes and markers of lines, told apart by colour-blind readers too.

Each colour stands out from its page by at least 4.5:1, as names are written in it. All pairs of `COLOURS` are at least
12 apart (CIEDE2000), also as seen without red, green or blue cones; so are those of `ORDERED` with the same dashes.
``tests/test_colours.py`` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count

COLOURS = ("#3172c5", "#c64c02", "#196849", "#560277", "#403902", "#697276", "#784b82", "#143729")
DARK_COLOURS = ("#67abf9", "#ee700a", "#63fcc5", "#b779a9", "#f7da5b", "#a69f98", "#c4e0fd", "#9cb87a")
DASHES = (
    (0, (5, 1.5)), "solid", (0, (8, 1.5)), (0, (1.2, 1.2)), (0, (4, 1.2, 1.2, 1.2)), "solid",
    (0, (4, 1.2, 1.2, 1.2, 1.2, 1.2)), (0, (2.5, 1.2)),
)  # fmt: skip
MARKERS = "sDP^voh*"
METHODS = ("uniform", "attention", "red", "abc-d", "abc-d2", "sparse")  # keep their looks in every figure
ORDERED = ("#2f1633", "#242e5b", "#2b5176", "#156e62", "#5d7353", "#6f6f30", "#d61b03")
DARK_ORDERED = ("#8972f1", "#778ab9", "#8bb2d6", "#08cab6", "#acc263", "#deef72", "#fff1cf")


@dataclass(frozen=True)
class Look:
    """How one line is drawn."""

    colour: str
    dashes: object
    marker: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """One look per method: the known ones have their own, others get the colours left, then colours with other dashes.

    >>> looks(["red", "mine"])["red"] == looks(["red"])["red"]
    True
    """
    every = range(len(COLOURS))
    free = [place for place in every if place >= len(METHODS) or METHODS[place] not in methods]
    free.sort(key=lambda place: place < len(METHODS))  # the colours of absent known methods come last
    left = chain(((0, place) for place in free), ((again, place) for again in count(1) for place in every))
    chosen = {}
    for method in methods:
        again, place = (0, METHODS.index(method)) if method in METHODS else next(left)
        style = (place + again) % len(DASHES)
        chosen[method] = Look(COLOURS[place], DASHES[style], MARKERS[style])
    return chosen


def ordered_looks(count: int) -> list[Look]:
    """Looks of ``count`` values in order, dark to light; neighbours among all of `ORDERED` differ in dashes too.

    More values than there are colours share them; those of one colour differ in dashes and markers.
    """
    last = len(ORDERED) - 1
    places = [round(place * last / max(count - 1, 1)) for place in range(count)]
    if count > len(ORDERED):
        return [
            Look(ORDERED[place], DASHES[n % len(DASHES)], MARKERS[n % len(MARKERS)]) for n, place in enumerate(places)
        ]
    return [Look(ORDERED[place], DASHES[0] if place % 2 else "solid", MARKERS[place]) for place in places]
