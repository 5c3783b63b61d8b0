"""Tables and figures of the frontier, from the cells that are there."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from matplotlib.axes import Axes

from frontier_parts.lines import EQUAL_TIME_BASELINE, FARTHEST, FIRST, KL_COEFS, LINES, place
from tokenmdp.files import write_text
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.report.colours import COLOURS, MARKERS
from tokenmdp.report.curves import read_metrics
from tokenmdp.report.drawing import FAINT, dress, error_bars, new_figure, write_figure
from tokenmdp.study.equal_kl import score_at_kl
from tokenmdp.wording import count

LEVELS = (1.5, 2.5, 5.0)  # nats, at which lines are compared
SEEDS = range(1, 100)
WHOLE = 5  # seeds; a mean over fewer says so
PAIRS = (  # compared beside all lines with the first one
    ("reward to go, red", "reward to go, sparse"), ("reward to go, attention", "reward to go, sparse"),
    ("PPO, red", "PPO, sparse"), ("PPO, attention", "PPO, sparse"), ("f-DPG, reverse-kl", "f-DPG, forward-kl"),
    ("best of n", "soup"), ("soup", "f-DPG, reverse-kl"), ("PPO, red", "DPO"),
)  # fmt: skip
MIDDLE = KL_COEFS[1]  # the kl_coef at which lines are compared at equal time
LAST = 5  # updates that are averaged
KL_LABEL = "KL to the start, nats (drawn by its root)"
DRAWN = 10.5  # nats; lines that go on are cut there (`FARTHEST` have a figure of their own)


class Cell(NamedTuple):
    """Means over the texts of one policy; one line of ``cells.csv``."""

    line: str
    value: float  # of the knob
    seed: int
    judge: float
    reward_model: float
    kl: float  # to the start, nats per sequence
    distinct_2: float
    seconds: float
    texts_scored: int


class Timed(NamedTuple):
    """The objective that one run reaches, a mean of `LAST` updates; one line of ``equal_time.csv``."""

    line: str
    seed: int
    seconds: float  # of the whole run
    at_samples: float  # at its end
    at_seconds: float  # when the seed's fastest run ended; nan: it had not made enough updates


def report(out: Path) -> None:
    """Write ``cells.csv``, ``equal_time.csv``, ``table.md`` and the figures, and print the tables.

    Where the runs themselves are not, the two csv files are read instead. Intervals are those of Student's t over the
    seeds' means.
    """
    if (out / "runs").exists():
        cells, start = read(out)
        timed = equal_time(out)
        no_value = Cell("start", 0, 0, start, math.nan, 0, math.nan, 0, 0)
        write_csv(out / "cells.csv", [no_value, *cells] if cells else [])
        write_csv(out / "equal_time.csv", timed)
    else:
        rows, timed = read_csv(out / "cells.csv", Cell), read_csv(out / "equal_time.csv", Timed)
        cells, start = rows[1:], rows[0].judge if rows else math.nan
    if not cells:
        print(f"{out} holds no finished cell yet")
        return
    text = "\n".join([*every_cell(cells), "", *equal_kl(cells), "", *pairs(cells, timed), *equal_time_table(timed)])
    write_text(out / "table.md", text + "\n")
    print(text)
    draw(cells, start, out)
    draw_both_scores(cells, start, out)


def write_csv(path: Path, rows: Sequence[NamedTuple]) -> None:
    """A line of names, then one per row; nothing if there is none."""

    def text(field: Any) -> str:
        return f'"{field}"' if isinstance(field, str) else f"{field:.5g}" if isinstance(field, float) else str(field)

    path.unlink(missing_ok=True)
    if rows:
        texts = [",".join(map(text, row)) for row in rows]
        write_text(path, "\n".join([",".join(rows[0]._fields), *texts]) + "\n")


def read_csv(path: Path, kind: Any) -> list[Any]:
    """What `write_csv` wrote; nothing if it is not there."""
    if not path.exists():
        return []
    types = get_type_hints(kind).values()
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return [kind(*(made(field) for made, field in zip(types, row, strict=True))) for row in rows]


def read(out: Path) -> tuple[list[Cell], float]:
    """The finished cells, and the judge's mean score of the policy that all start from."""
    cells, start = [], math.nan
    for name, line in LINES.items():
        for value in line.values:
            for seed in SEEDS:
                path = place(out, name, value, seed).with_suffix(".json")
                if path.exists():
                    one = json.loads(path.read_text())
                    means = [float(np.mean(one[key])) for key in ("judge", "reward_model", "kl")]
                    cells.append(
                        Cell(name, value, seed, *means, one["distinct_2"], one["seconds"], one["texts_scored"])
                    )
                    if "start" in one:
                        start = float(np.mean(one["start"]))
    return cells, start


def every_cell(cells: Sequence[Cell]) -> list[str]:
    """A line of a table for each value of a knob."""
    lines = [
        "| | knob | seeds | judge's score | reward model's score | KL, nats | distinct-2 | seconds | texts scored |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, line in LINES.items():
        for value in line.values:
            if some := [cell for cell in cells if (cell.line, cell.value) == (name, value)]:
                judge, proxy = (mean_interval([getattr(one, key) for one in some]) for key in ("judge", "reward_model"))
                kl, variety, seconds, scored = (
                    np.mean([getattr(one, key) for one in some])
                    for key in ("kl", "distinct_2", "seconds", "texts_scored")
                )
                knob = line.changes(value)[line.knob]
                lines.append(
                    f"| {name} | {line.knob} {knob} | {len(some)} | {judge} | {proxy} | {kl:.2f} | {variety:.3f} | "
                    f"{seconds:.0f} | {scored:.0f} |"
                )
    return lines


def equal_kl(cells: Sequence[Cell]) -> list[str]:
    """Each line's judge's score at `LEVELS`, and its difference from the first line's, seed by seed."""
    lines = [
        f"| at equal KL | {' | '.join(f'{level:g} nats | less {FIRST}' for level in LEVELS)} |",
        f"|---|{'---|---|' * len(LEVELS)}",
    ]
    for name in LINES:
        own = {seed: at(cells, name, seed) for seed in SEEDS}
        gained = gains(cells, name, FIRST)
        shown = []
        for place_of_level, gain in enumerate(gained):
            scores = [found[place_of_level] for found in own.values()]
            shown.append(mean([score for score in scores if score is not None]))
            shown.append("" if name == FIRST else gain)
        if any(shown):
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def pairs(cells: Sequence[Cell], timed: Sequence[Timed]) -> list[str]:
    """Further differences between lines, seed by seed: at `LEVELS`, and of the objective at equal samples."""
    lines = [
        f"| | {' | '.join(f'{level:g} nats' for level in LEVELS)} | objective at equal samples |",
        f"|---|{'---|' * len(LEVELS)}---|",
    ]
    ends = {(one.line, one.seed): one.at_samples for one in timed}
    for one, other in PAIRS:
        seeds = [seed for seed in SEEDS if (one, seed) in ends and (other, seed) in ends]
        last = mean([ends[one, seed] - ends[other, seed] for seed in seeds])
        lines.append(f"| {one} less {other} | {' | '.join([*gains(cells, one, other), last])} |")
    return lines


def gains(cells: Sequence[Cell], one: str, other: str) -> list[str]:
    """How much a line is above another at each of `LEVELS`, over the seeds in which both are there."""
    found = [(at(cells, one, seed), at(cells, other, seed)) for seed in SEEDS]
    columns = zip(*(zip(own, base, strict=True) for own, base in found), strict=True)
    return [mean([own - base for own, base in column if own is not None and base is not None]) for column in columns]


def mean(values: Sequence[float]) -> str:
    """Mean and interval in words, with the number of values where some seeds are missing."""
    if not values:
        return ""
    return str(mean_interval(values)) + (f" ({count(len(values), 'seed')})" if len(values) < WHOLE else "")


def at(cells: Sequence[Cell], name: str, seed: int) -> list[float | None]:
    """One seed's score at `LEVELS`: linear in the root of the KL between two of its policies; None beyond them."""
    points = [(max(one.kl, 0.0), one.judge) for one in cells if (one.line, one.seed) == (name, seed)]
    if not points:
        return [None] * len(LEVELS)
    kls, scores = zip(*points, strict=True)
    found = score_at_kl(np.sqrt(kls), scores, np.sqrt(LEVELS))
    return [None if math.isnan(score) else float(score) for score in found]


def equal_time(out: Path) -> list[Timed]:
    """``score - kl_coef * KL``, mean of the last updates: at equal samples, and where the seed's fastest run ended.

    Only seeds that every line shown has, so that a column has one budget.
    """
    curves = objectives(out)
    seeds = sorted(set.intersection(*(set(runs) for runs in curves.values()))) if curves else []
    budgets = {seed: min(runs[seed][-1, 0] for runs in curves.values()) for seed in seeds}
    found = []
    for name, runs in curves.items():
        for seed in seeds:
            within = runs[seed][runs[seed][:, 0] <= budgets[seed]]
            ends = [float(part[-LAST:, 1].mean()) if len(part) >= LAST else math.nan for part in (runs[seed], within)]
            found.append(Timed(name, seed, float(runs[seed][-1, 0]), *ends))
    return found


def equal_time_table(timed: Sequence[Timed]) -> list[str]:
    """The means over seeds, and how much they are above `EQUAL_TIME_BASELINE`, seed by seed; nothing without runs."""
    if not timed:
        return []
    lines = [
        "",
        f"| score - kl_coef KL at kl_coef {MIDDLE:g} | seeds | seconds | at equal samples | less {EQUAL_TIME_BASELINE} "
        f"| at equal seconds | less {EQUAL_TIME_BASELINE} |",
        "|---|---|---|---|---|---|---|",
    ]
    base = [one for one in timed if one.line == EQUAL_TIME_BASELINE]
    for name in dict.fromkeys(one.line for one in timed):
        some = [one for one in timed if one.line == name]
        row = [name, str(len(some)), f"{np.mean([one.seconds for one in some]):.0f}"]
        for key in ("at_samples", "at_seconds"):
            own, other = ([getattr(one, key) for one in part] for part in (some, base))
            if not np.isfinite([*own, *other]).all():
                row += ["", ""]
                continue
            row.append(str(mean_interval(own)))
            row.append("" if name == EQUAL_TIME_BASELINE else str(mean_interval(np.subtract(own, other))))
        lines.append(f"| {' | '.join(row)} |")
    return lines


def objectives(out: Path) -> dict[str, dict[int, np.ndarray]]:
    """Line -> seed -> seconds so far and ``score - kl_coef * KL`` of each update, (K, 2), at `MIDDLE`.

    Both are of the responses that an update learns from. Lines without kl_coef are left out; so are all, if
    `EQUAL_TIME_BASELINE` is not there.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, line in LINES.items():
        for seed in SEEDS if line.knob == "kl_coef" else ():
            run = place(out, name, MIDDLE, seed)
            if run.with_suffix(".json").exists():
                records = read_metrics(run / "metrics.jsonl")
                seconds = np.cumsum([one["seconds"] for one in records])
                scores = [one["score_mean"] - one["kl_coef"] * one["kl"] for one in records]
                found.setdefault(name, {})[seed] = np.stack([seconds, scores], axis=-1)
    return found if EQUAL_TIME_BASELINE in found else {}


def draw_both_scores(cells: Sequence[Cell], start: float, out: Path) -> None:
    """The judge's score and the learned reward model's against the root of the KL, of the lines that go farthest."""
    figure = new_figure(9.5, 4.2)
    for axes, (title, key) in zip(
        figure.subplots(1, 2), (("judge", "judge"), ("the learned reward model", "reward_model")), strict=True
    ):
        for number, name in enumerate(FARTHEST):
            if points := along(cells, name, key):
                axes.errorbar(
                    [kl for kl, _ in points], [one.value for _, one in points],
                    yerr=error_bars([one for _, one in points]), capsize=3, marker=MARKERS[number], markersize=5,
                    color=COLOURS[number], label=f"{name}, by {LINES[name].knob}",
                )  # fmt: skip
        if axes.has_data() and key == "judge":
            axes.axhline(start, color=FAINT, linewidth=0.8, linestyle=":", label="start")
        dress(axes, title, KL_LABEL, "mean score")
        nats_on(axes, (0.0, 1.0, 5.0, 10.0, 20.0, 40.0))
        if axes.has_data():
            axes.legend(frameon=False, fontsize=8, loc="upper left")
    write_figure(figure, out, "both_scores")


def nats_on(axes: Axes, nats: Sequence[float]) -> None:
    """Name places of an axis of roots by what they are roots of."""
    axes.set_xticks([math.sqrt(value) for value in nats], [f"{value:g}" for value in nats])
    axes.set_xlim(left=-0.1)


def along(cells: Sequence[Cell], name: str, key: str) -> list[tuple[float, Estimate]]:
    """Root of the mean KL and score of a line's policies, by that root."""
    points = []
    for value in LINES[name].values:
        if some := [cell for cell in cells if (cell.line, cell.value) == (name, value)]:
            kl = max(0.0, float(np.mean([one.kl for one in some])))
            points.append((math.sqrt(kl), mean_interval([getattr(one, key) for one in some])))
    return sorted(points, key=lambda point: point[0])


def draw(cells: Sequence[Cell], start: float, out: Path) -> None:
    """Score against the root of the KL, up to `DRAWN`: three panels with the same axes, the first line in each."""
    panels = {
        "PPO": [name for name in LINES if name.startswith("PPO")],
        "without a critic": ["RLOO", "GRPO", *(name for name in LINES if name.startswith("reward to go"))],
        "f-DPG, DPO, best of n, soups": [
            *(name for name in LINES if name.startswith("f-DPG")), "DPO", "best of n", "soup",
        ],
    }  # fmt: skip
    figure = new_figure(13, 4.6)
    every = figure.subplots(1, len(panels), sharex=True, sharey=True)
    for axes, (title, names) in zip(every, panels.items(), strict=True):
        for number, name in enumerate([FIRST, *(one for one in names if one != FIRST)]):
            points = along(cells, name, "judge")
            if points:
                points = [(0.0, Estimate(start, start, start)), *points]
                axes.errorbar(
                    [kl for kl, _ in points], [one.value for _, one in points],
                    yerr=error_bars([one for _, one in points]), capsize=3, marker=MARKERS[number], markersize=5,
                    color="black" if name == FIRST else COLOURS[number - 1], linestyle=":" if name == FIRST else "-",
                    label=name,
                )  # fmt: skip
        dress(axes, title, KL_LABEL, "mean score of the judge")
        nats_on(axes, (0.0, 0.5, *LEVELS, 7.5, 10.0))
        if axes.has_data():
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    near = [one.judge for one in cells if one.kl < DRAWN]
    every[0].set_xlim(right=math.sqrt(DRAWN))
    if near:
        every[0].set_ylim(np.nanmin([start, *near]) - 0.2, max(near) + 0.3)
    write_figure(figure, out, "frontier")
