"""What the grid "tune" found: for each method the learning rate with the best area under its learning curve.

Reward alone would choose the rate at which the policy soonest writes one and the same text that the reward model likes:
on the bundled models every method's area is highest, or nearly so, where the KL is beyond 20 nats and one bigram in
twenty is distinct. So only rates count whose policies end within `MOST_KL` of the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tokenmdp.study.outcomes import area, last_tenth
from tokenmdp.study.results import Cell, Study, rounded

MOST_KL = 20.0  # nats a response over the last tenth of the updates; the paper's policies end at 14.2 to 18.7


class Run(NamedTuple):
    """What a method's learning rates are compared on."""

    setting: str  # without the rate
    seed: int


def chosen_rates(study: Study, grid: str = "tune") -> dict[str, Any]:
    """The record of the whole search.

    ``learning_rates``: method -> the rate whose area under the learning curve (`area`) is the highest on average over
    settings and seeds, of those whose mean KL at the end is at most `MOST_KL`. Only rates that finished under every
    setting and seed are ranked: a run that crashed is seldom a good one, and without it the rate would look better than
    it is. Of equal ones the lower wins. A method without such a rate is left out.
    ``at_the_edge_of_the_search``: methods whose rate is the lowest or the highest of several that were tried.
    ``search``: for every method, setting and rate the area of each seed, their mean, the mean KL at the end, and the
    seeds that crashed or have not run.
    """
    tried: dict[str, dict[float, dict[Run, Cell]]] = {}
    for cell in study.declared(grid):
        run = Run(cell.setting.partition(", learning_rate=")[0], cell.seed)
        tried.setdefault(cell.method, {}).setdefault(cell.settings.ppo["learning_rate"], {})[run] = cell
    best = {}
    for method, rates in tried.items():
        wanted = {run for cells in rates.values() for run in cells}
        means = {
            rate: float(np.mean(list(areas.values())))
            for rate, cells in sorted(rates.items())
            if (areas := _areas(study, cells)).keys() == wanted and _kl(study, cells.values()) <= MOST_KL
        }
        if means:
            best[method] = max(means, key=means.__getitem__)
    at_the_edge = [method for method, rate in best.items() if len(tried[method]) > 1 and rate in _ends(tried[method])]
    search = [
        _row(study, method, rate, setting, cells)
        for method, rates in tried.items()
        for rate, cells in sorted(rates.items())
        for setting in dict.fromkeys(run.setting for run in cells)
    ]
    return {"learning_rates": best, "at_the_edge_of_the_search": at_the_edge, "search": search}


def edge_note(record: Mapping[str, Any]) -> str:
    """A sentence on the methods whose best rate may lie outside of the search; empty if there are none.

    >>> edge_note({"at_the_edge_of_the_search": ["sparse", "red"], "learning_rates": {"sparse": 1e-3, "red": 3e-5}})
    'At the edge of the search, so a rate beyond it may be better: sparse (0.001), red (3e-05).'
    """
    listed = ", ".join(
        f"{method} ({record['learning_rates'][method]:g})" for method in record["at_the_edge_of_the_search"]
    )
    return f"At the edge of the search, so a rate beyond it may be better: {listed}." if listed else ""


def _areas(study: Study, cells: Mapping[Run, Cell]) -> dict[Run, float]:
    """Of the finished ones."""
    return {run: rounded(area(study.results[cell.id])) for run, cell in cells.items() if cell.id in study.results}


def _kl(study: Study, cells: Iterable[Cell]) -> float:
    """Mean over the finished ones."""
    return float(np.mean([last_tenth(study.results[cell.id], "kl") for cell in cells if cell.id in study.results]))


def _row(study: Study, method: str, rate: float, setting: str, cells: Mapping[Run, Cell]) -> dict[str, Any]:
    here = {run: cell for run, cell in cells.items() if run.setting == setting}
    areas = {run.seed: value for run, value in _areas(study, here).items()}
    left = {run.seed: cell.id in study.errors for run, cell in here.items() if cell.id not in study.results}
    return {
        "method": method,
        "learning_rate": rate,
        "setting": setting,
        "areas": areas,
        "mean": rounded(float(np.mean(list(areas.values())))) if areas else None,
        "kl": rounded(_kl(study, here.values())) if areas else None,
        "crashed": [seed for seed, crashed in left.items() if crashed],
        "not_run": [seed for seed, crashed in left.items() if not crashed],
    }


def _ends(rates: Mapping[float, object]) -> tuple[float, float]:
    return min(rates), max(rates)
