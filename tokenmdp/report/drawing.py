"""Shared by all figures: axes, direct labels, files, and figures in a page of two themes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmdp.files import write_bytes, write_text
from tokenmdp.report.colours import COLOURS, DARK_COLOURS, DARK_ORDERED, ORDERED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tokenmdp.intervals import Estimate

PAPER, INK, FAINT, GRID = "#fdfdfc", "#1c1c1e", "#66666b", "#dedee3"


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot, which would look for a display and keep state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def lay_out(figure: Figure) -> None:
    """Fix the positions of the axes, which the labels' spacing depends on."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)


def dress(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Faint grid, no box, labels."""
    axes.set_facecolor("none")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=9)
    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.set_ylabel(ylabel, color=INK, fontsize=10)
    if title:
        axes.set_title(title, color=INK, fontsize=10.5, loc="left")


def spread_apart(places: Sequence[float], gap: float) -> list[float]:
    """The same places moved as little as needed so that neighbours are at least ``gap`` apart; the order stays.

    >>> spread_apart([1.0, 1.0, 5.0], 1.0)
    [0.5, 1.5, 5.0]
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    groups: list[list[float]] = []  # [sum of wanted first places, members]
    for rank, index in enumerate(order):
        groups.append([places[index] - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, members = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += members
    moved, rank = [0.0] * len(places), 0
    for total, members in groups:
        for _ in range(int(members)):
            moved[order[rank]] = total / members + rank * gap
            rank += 1
    return moved


def label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]], size: float = 9) -> None:
    """Names at the right edge, ``label -> (height, colour)``, moved apart where they would overlap.

    Call it when the limits of the axes are final.
    """
    ends = {label: end for label, end in ends.items() if math.isfinite(end[0])}
    low, high = axes.get_ylim()
    box = axes.get_window_extent()
    inches = box.height / axes.figure.dpi
    gap = (high - low) * size * 1.25 / 72 / max(inches, 0.5)
    wanted = [min(max(height, low), high) for height, _ in ends.values()]
    places = spread_apart(wanted, gap)
    lift = max(low + gap / 2 - min(places, default=low), 0) or min(high - max(places, default=high), 0)
    for (label, (height, colour)), place in zip(ends.items(), [place + lift for place in places], strict=True):
        shown = min(max(height, low), high)
        across = axes.get_yaxis_transform()
        axes.plot([1.004, 1.034], [shown, place], color=colour, linewidth=0.7, transform=across, clip_on=False)
        axes.text(1.045, place, label, color=colour, fontsize=size, va="center", transform=across)


def signed(value: float) -> str:
    """With two decimals, a sign, and no zero below zero.

    >>> signed(0.256), signed(-0.001)
    ('+0.26', '0.00')
    """
    text = f"{round(value, 2) + 0.0:+.2f}"
    return "0.00" if text == "+0.00" else text.replace("-", "\N{MINUS SIGN}")


def with_interval(estimate: Estimate) -> str:
    """`signed`, with the interval if there is one.

    >>> from tokenmdp.intervals import Estimate
    >>> with_interval(Estimate(0.5, 0.25, 0.75)), with_interval(Estimate(0.5, -math.inf, math.inf))
    ('+0.50 [0.25, 0.75]', '+0.50')
    """
    ends = [signed(end).lstrip("+") for end in estimate[1:] if finite(end)]
    return f"{signed(estimate.value)} [{', '.join(ends)}]" if len(ends) == 2 else signed(estimate.value)


def finite(*numbers: float) -> bool:
    """Whether all can be drawn."""
    return all(map(math.isfinite, numbers))


def error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """What ``errorbar`` takes as ``yerr``: how far each interval reaches below and above its value; 0 without one.

    >>> from tokenmdp.intervals import Estimate
    >>> error_bars([Estimate(2.0, 1.5, 2.25), Estimate(1.0, -math.inf, math.inf)])
    [[0.5, 0.0], [0.25, 0.0]]
    """
    ends = [(one.low, one.high) if math.isfinite(one.low) else (one.value, one.value) for one in estimates]
    below = [one.value - low for one, (low, _) in zip(estimates, ends, strict=True)]
    return [below, [high - one.value for one, (_, high) in zip(estimates, ends, strict=True)]]


def write_png(figure: Figure, path: str | Path) -> Path:
    """Write a picture in one step; returns its path."""
    png = io.BytesIO()
    figure.savefig(png, dpi=130, format="png", metadata={"Software": None})
    write_bytes(path, png.getvalue())
    return Path(path)


def write_figure(figure: Figure, folder: Path, name: str) -> str:
    """Write ``name.png`` and ``name.svg``, which do not depend on the page, and return the SVG's text."""
    import matplotlib as mpl

    svg = io.StringIO()
    lay_out(figure)
    figure.set_layout_engine("none")  # each file would do it again
    # Text stays text, to be read aloud, found and copied; without a date and with a fixed salt the same numbers give
    # the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        write_png(figure, folder / f"{name}.png")
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    # A tenth of a point is enough for what is drawn, and spaces beside its letters say nothing; what is written stays.
    drawn = re.compile(r'\b(?:d|x|y|x1|x2|y1|y2|width|height|transform|points)="[^"]*"')
    text = drawn.sub(lambda match: re.sub(r"\.0(?!\d)", "", re.sub(r"(\.\d)\d+", r"\1", match[0])), svg.getvalue())
    text = re.sub(r'\bd="[^"]*"', lambda match: re.sub(r"\s*([MLCQz])\s*", r"\1", match[0]), text)
    write_text(folder / f"{name}.svg", text)
    return text


def theme_colours() -> str:
    """The style sheet that gives figures inside a page their colours in both themes."""
    light = dict(zip(_NAMES, (PAPER, INK, FAINT, GRID, *COLOURS, *ORDERED), strict=True))
    dark_page = ("#17181b", "#ececee", "#a0a0a8", "#34363c")
    dark = dict(zip(_NAMES, (*dark_page, *DARK_COLOURS, *DARK_ORDERED), strict=True))
    rules = [" ".join(f"--f-{name}: {colour};" for name, colour in colours.items()) for colours in (light, dark)]
    return (
        f":root {{ {rules[0]} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {rules[1]} }} }}\n"
        f":root[data-theme=dark] {{ {rules[1]} }}\n"
        "svg text { font-family: 'DejaVu Sans', 'Bitstream Vera Sans', Verdana, Geneva, sans-serif; }\n"
    )


_NAMES = (
    "page", "ink", "faint", "grid", *(f"s{place}" for place in range(len(COLOURS))),
    *(f"o{place}" for place in range(len(ORDERED))),
)  # fmt: skip


def relative(path: str) -> str:
    """The ``d`` of an SVG's path with relative lines, less than half as long: all in whole tenths, so no error adds up.

    >>> relative("M10.5 20L11 19.5L12.2 30zM0 0C1 1 2 2 3 3L4 4")
    'M10.5 20l.5-.5 1.2 10.5zM0 0C1 1 2 2 3 3l1 1'
    """
    found, last, at = "", "", [0, 0]
    for letter, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        place = [round(10 * float(number)) for number in numbers.split()][-2:]
        if letter == "L":
            steps = [f"{(there - here) / 10:g}" for here, there in zip(at, place, strict=True)]
            letter, numbers = "l", " ".join(re.sub(r"^(-?)0\.", r"\1.", step) for step in steps).replace(" -", "-")
        again = letter == last == "l"
        found += (" " * (numbers[0] != "-") if again else letter) + numbers
        last, at = letter, place or at
    return found


def inline(svg: str, name: str, description: str) -> str:
    """An SVG of `write_figure` as part of a page: colours by theme, identifiers of its own, a description.

    Args:
        svg: the file's text.
        name: unique on the page.
        description: what the picture shows, for those who cannot see it; HTML.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r"\n +", "\n", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # only shapes and clips are referred to
    body = re.sub(r'\bstyle="[^"]*"', lambda match: match[0].replace(": ", ":").replace("; ", ";"), body)
    body = re.sub(r'font-family:[^;"]*;?', "", body)  # of all, in `theme_colours`
    body = body.replace(' \n"', '"')
    group = re.compile(r"<g>\n((?:(?!</?g\b).)*?)</g>\n", re.DOTALL)
    while (shorter := group.sub(r"\1", body)) != body:
        body = shorter  # a group without attributes says nothing
    body = re.sub(r'\bd="([^"]*)"', lambda match: f'd="{relative(match[1])}"', body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"', "", body)  # level text, said at length
    body = body.replace("xlink:href=", "href=").replace("text-anchor:start;", "")  # the defaults of HTML's SVG
    marks = "|".join(re.findall(r'<path id="(\w+)"[^>]* style="stroke', body))  # their uses need no stroke of their own
    body = re.sub(rf'(<use href="#(?:{marks})"[^>]* style="fill[^"]*?);stroke[^"]*', r"\1", body)
    named = re.compile(r'(\bid="|url\(#|href="#)([^")]*)')
    names = {id: f"{name}-{place}" for place, id in enumerate(dict.fromkeys(id for _, id in named.findall(body)))}
    body = named.sub(lambda match: match[1] + names[match[2]], body)
    colours = dict(zip((PAPER, INK, FAINT, GRID, *COLOURS, *ORDERED), _NAMES, strict=True))
    pattern = re.compile("|".join(map(re.escape, sorted(colours, key=len, reverse=True))))
    body = pattern.sub(lambda match: f"var(--f-{colours[match[0]]})", body)
    body = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{description}">', body
    )
    return body.strip()
