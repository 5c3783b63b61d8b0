"""The result of the grid "tune": per method the rate with the best area under its learning curve within a bound.

Reward alone would choose the rate at which the policy soonest writes one and the same text that the reward model likes:
on the bundled models every method's area is highest, or nearly so, where the KL is beyond 20 nats and one bigram in
twenty is distinct. So only rates count whose policies end within `MOST_KL` of the reference. That bound was set after
the first search had been seen, and it decides: so the record also says which methods it held back, and what
`OTHER_BOUNDS` would have chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenmdp.runs.settings import agent_config
from tokenmdp.study.directory import Study
from tokenmdp.study.outcomes import area, last_tenth
from tokenmdp.study.results import Cell, rounded

SEARCH = "tune"  # the grid that searches for learning rates
MOST_KL = 20.0  # nats per response over the last tenth of the updates; the paper's policies end at 14.2 to 18.7
OTHER_BOUNDS = (18.7, 25.0)  # as defensible


class Run(NamedTuple):
    """The settings on which a method's learning rates are compared."""

    setting: str  # without the rate
    seed: int


class _Ranked(NamedTuple):
    """A learning rate that finished everywhere."""

    area: float  # mean over settings and seeds, as is
    kl: float  # at the end


def chosen_rates(study: Study, grid: str = SEARCH) -> dict[str, Any]:
    """The record of the whole search.

    ``learning_rates``: method -> the rate whose area under the learning curve (`area`) is the highest on average over
    settings and seeds, of those whose mean KL at the end is at most `MOST_KL`. Only rates that finished under every
    setting and seed are ranked: a run that crashed is rarely a good one, and without it the rate would look better than
    it is. Of equal ones the lower wins. A method without such a rate is left out.
    ``at_the_edge_of_the_search``: methods whose rate is the lowest or the highest of several that were tried.
    ``limited_by_kl``: methods for which a rate with more KL has a better area than the chosen one.
    ``with_other_bounds``: each of `OTHER_BOUNDS` as text -> method -> the rate that it would have chosen, where that is
    another one; None for no rate.
    ``search``: for every method, setting and rate the area of each seed, their mean, the mean KL at the end, and the
    seeds that crashed or have not run.
    """
    tried: dict[str, dict[float, dict[Run, Cell]]] = {}
    for cell in study.declared(grid):
        run = Run(cell.setting.partition(", learning_rate=")[0], cell.seed)
        tried.setdefault(cell.method, {}).setdefault(cell.settings.config["learning_rate"], {})[run] = cell
    ranked = {method: _ranked(study, rates) for method, rates in tried.items()}
    best = _best(ranked, MOST_KL)
    anywhere = _best(ranked, math.inf)
    limited = [method for method, rate in best.items() if ranked[method][anywhere[method]].kl > MOST_KL]
    others = {f"{bound:g}": _best(ranked, bound) for bound in OTHER_BOUNDS}
    differing = {
        bound: {method: rates.get(method) for method in ranked if rates.get(method) != best.get(method)}
        for bound, rates in others.items()
    }
    at_the_edge = [method for method, rate in best.items() if len(tried[method]) > 1 and rate in _ends(tried[method])]
    search = [
        _row(study, method, rate, setting, cells)
        for method, rates in tried.items()
        for rate, cells in sorted(rates.items())
        for setting in dict.fromkeys(run.setting for run in cells)
    ]
    return {
        "learning_rates": best,
        "at_the_edge_of_the_search": at_the_edge,
        "limited_by_kl": limited,
        "with_other_bounds": differing,
        "search": search,
    }


def _ranked(study: Study, rates: Mapping[float, Mapping[Run, Cell]]) -> dict[float, _Ranked]:
    """A method's rates that finished under every setting and seed, the lowest first."""
    wanted = {run for cells in rates.values() for run in cells}
    return {
        rate: _Ranked(float(np.mean(list(areas.values()))), _kl(study, cells.values()))
        for rate, cells in sorted(rates.items())
        if (areas := _areas(study, cells)).keys() == wanted
    }


def _best(ranked: Mapping[str, Mapping[float, _Ranked]], most_kl: float) -> dict[str, float]:
    """Method -> its rate with the highest area of those with at most this KL, the lower of equal ones."""
    allowed = {
        method: {rate: found.area for rate, found in rates.items() if found.kl <= most_kl}
        for method, rates in ranked.items()
    }
    return {method: max(areas, key=areas.__getitem__) for method, areas in allowed.items() if areas}


def rates_of(cells: Sequence[Cell]) -> dict[float, list[str]]:
    """Learning rate -> the methods trained with it, both in order."""
    found: dict[float, list[str]] = {}
    for cell in cells:
        methods = found.setdefault(agent_config(cell.settings, cell.updates).learning_rate, [])
        if cell.method not in methods:
            methods.append(cell.method)
    return dict(sorted(found.items()))


def edge_note(record: Mapping[str, Any]) -> str:
    """Sentences on where the choice depends on the edge of the search or on the bound on the KL; empty if nowhere.

    A record of an earlier version says nothing about the bound.

    >>> edge_note({"at_the_edge_of_the_search": ["sparse", "red"], "learning_rates": {"sparse": 1e-3, "red": 3e-5}})
    'At the edge of the search, so a rate beyond it may be better: sparse (0.001), red (3e-05).'
    """
    chosen, limited = record["learning_rates"], record.get("limited_by_kl", ())
    notes = []
    if edge := record["at_the_edge_of_the_search"]:
        notes.append(f"At the edge of the search, so a rate beyond it may be better: {_listed(chosen, edge)}.")
    if limited:
        notes.append(
            f"Held back by the bound of {MOST_KL:g} nats of KL, beyond which a rate has a better mean score: "
            f"{_listed(chosen, limited)}."
        )
    for bound, rates in record.get("with_other_bounds", {}).items():
        if rates:
            notes.append(f"A bound of {bound} nats would choose otherwise for {_listed(rates, rates)}.")
    return " ".join(notes)


def _listed(rates: Mapping[str, float | None], methods: Iterable[str]) -> str:
    """Such as ``sparse (0.001), red (none)``."""
    shown = {method: rates[method] for method in methods}
    return ", ".join(f"{method} ({'none' if rate is None else f'{rate:g}'})" for method, rate in shown.items())


def _areas(study: Study, cells: Mapping[Run, Cell]) -> dict[Run, float]:
    """The areas of the finished runs."""
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
