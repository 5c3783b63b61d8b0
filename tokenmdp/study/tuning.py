"""What the grid "tune" found: for each method the learning rate with the best area under its learning curve."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokenmdp.study.results import Study, rounded


def chosen_rates(study: Study, grid: str = "tune") -> dict[str, Any]:
    """The record of the whole search: ``learning_rates``, and the area of every rate and seed that it came from.

    The area is the mean of ``score_mean`` over updates; a rate's is its mean over seeds. Of equal ones the lower rate
    wins. Methods without a finished cell are left out.
    """
    areas: dict[str, dict[float, dict[int, float]]] = {}
    for (_, method), results in study.select(grid).items():
        for result in results:
            rate = result.cell.settings.ppo["learning_rate"]
            area = rounded(float(np.mean(result.metrics["score_mean"])))
            areas.setdefault(method, {}).setdefault(rate, {})[result.cell.seed] = area
    best = {
        method: max(sorted(rates), key=lambda rate: float(np.mean(list(rates[rate].values()))))
        for method, rates in areas.items()
    }
    search = [
        {"method": method, "learning_rate": rate, "areas": seeds, "mean": rounded(float(np.mean(list(seeds.values()))))}
        for method, rates in areas.items()
        for rate, seeds in sorted(rates.items())
    ]
    at_the_edge = [method for method, rate in best.items() if len(areas[method]) > 1 and rate in _ends(areas[method])]
    return {"learning_rates": best, "at_the_edge_of_the_search": at_the_edge, "search": search}


def _ends(rates: dict[float, dict[int, float]]) -> tuple[float, float]:
    return min(rates), max(rates)
