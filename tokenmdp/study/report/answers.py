"""What each figure of a study's page shows, in one sentence of its caption, worded by the intervals of its numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from tokenmdp.intervals import Estimate
from tokenmdp.report.drawing import finite, with_interval
from tokenmdp.study.labels import model_name, name_of
from tokenmdp.study.outcomes import BASELINE, Groups, area, evaluation_curves, paired
from tokenmdp.study.results import CellResult
from tokenmdp.study.statistics import level, mean_difference

UNDECIDED, TOO_FEW = "not decided (the interval includes 0)", "not decided (too few seeds for an interval)"
ORDERS = {
    1: "it falls in this order",
    0: "whether it falls in this order is not decided by the intervals",
    -1: "it does not fall in this order",
}


def sorted_by_sign(estimates: Mapping[str, Estimate], above: str, below: str) -> str:
    """Names with their numbers, sorted by what the intervals say: ``above`` 0, ``below`` 0, or neither.

    >>> sorted_by_sign({"a": Estimate(2, 1, 3), "b": Estimate(1, 0, 3), "c": Estimate(3, 2, 4)}, "higher", "lower")
    'higher c +3.00 [2.00, 4.00], a +2.00 [1.00, 3.00]; not decided (the interval includes 0) b +1.00 [0.00, 3.00]'
    """
    found: dict[str, list[str]] = {above: [], below: [], UNDECIDED: [], TOO_FEW: []}
    for name, estimate in sorted(estimates.items(), key=lambda item: -item[1].value):
        undecided = UNDECIDED if finite(estimate.low, estimate.high) else TOO_FEW
        found[{1: above, -1: below, 0: undecided}[estimate.side()]].append(f"{name} {with_interval(estimate)}")
    return "; ".join(f"{what} {', '.join(names)}" for what, names in found.items() if names)


def lead(groups: Groups, method: str, measure: Callable[[CellResult], float] = area) -> Estimate | None:
    """A measure, by default the mean score over training, less that of sparse credit, paired by seed; or None."""
    pairs = paired(groups[method], groups[BASELINE]) if BASELINE in groups else []
    return mean_difference([measure(own) - measure(other) for own, other in pairs]) if pairs else None


def leads_answer(groups: Groups, what: str, measure: Callable[[CellResult], float] = area) -> str:
    """How every method's measure, in words ``what``, compares with the baseline's; without one, all the levels."""
    leads = {name_of(method): lead(groups, method, measure) for method in groups if method != BASELINE}
    known = {name: found for name, found in leads.items() if found is not None}
    if known:
        return f"{what}, less {BASELINE}'s with the same seed: {sorted_by_sign(known, 'higher with', 'lower with')}."
    levels = {name_of(method): level([measure(result) for result in results]) for method, results in groups.items()}
    ranked = sorted(levels.items(), key=lambda item: -item[1].value)
    return f"{what}: {', '.join(f'{name} {with_interval(found)}' for name, found in ranked)}."


def trend_answer(groups: Groups) -> str:
    """Whether the mean score over training rises with credit_beta: its slope per seed, with and without the value 0."""
    by_beta = {results[0].cell.settings.credit_beta: results for results in groups.values()}
    slopes = {}
    for where, betas in (("slope", sorted(by_beta)), ("slope without the value 0", sorted(by_beta.keys() - {0}))):
        rows = paired(*(by_beta[beta] for beta in betas)) if len(betas) > 1 else []
        fitted = [float(np.polyfit(betas, [area(result) for result in row], 1)[0]) for row in rows]
        if fitted and (where == "slope" or 0 in by_beta):
            slopes[where] = mean_difference(fitted)
    said = sorted_by_sign(slopes, "rises,", "falls,")
    return f"Mean score over training against credit_beta, a straight line per seed: {said}." if slopes else ""


def growth_answer(settings: Mapping[str, Groups], near: str, far: str) -> str:
    """How every method's lead over the baseline changes from one setting to another, by the seeds that have both."""
    first, last, changes = settings[near], settings[far], {}
    for method in first:
        if method != BASELINE and method in last and BASELINE in first and BASELINE in last:
            rows = paired(first[method], first[BASELINE], last[method], last[BASELINE])
            values = [
                area(there) - area(base_there) - area(here) + area(base) for here, base, there, base_there in rows
            ]
            if values:
                changes[name_of(method)] = mean_difference(values)
    said = sorted_by_sign(changes, "grows with", "shrinks with")
    return f"Change of the lead over {BASELINE} from {near} to {far}: {said}." if changes else ""


def change_answer(groups: Groups, key: str, what: str, since: float = 0.0) -> str:
    """How a column of the evaluations, in words ``what``, changes by run from the share ``since`` of training on.

    It takes evaluations that all methods have made; with fewer than two of them it is empty.
    """
    columns = {name_of(method): evaluation_curves(results, key) for method, results in groups.items()}
    shared = functools.reduce(np.intersect1d, (updates for updates, _ in columns.values()))
    if len(shared) < 2:
        return ""
    *earlier, last = shared
    first = min(earlier, key=lambda update: abs(update - since * last))
    changes = {
        name: mean_difference(np.diff(values[:, np.isin(updates, (first, last))])[:, 0])
        for name, (updates, values) in columns.items()
    }
    said = sorted_by_sign(changes, "rises with", "falls with")
    return f"Change of {what} from update {first:g} to {last:g}: {said}."


def above(one: Estimate, other: Estimate) -> int:
    """1 if the interval of ``one`` lies above that of ``other``, -1 if below, 0 if they overlap."""
    return (one.low > other.high) - (one.high < other.low)


def quality_answer(models: Mapping[str, Groups], correlations: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One method's lead over the baseline on each reward model, in the order of its credit quality there.

    The lead falls if all intervals of neighbours, of the correlation and of the lead, are apart in this order; it does
    not if somewhere those of the lead are apart the other way.
    """
    for method in ("attention", *next(iter(models.values()))):
        found = {
            model: (Estimate(*correlations[model][method]), gain)
            for model, groups in models.items()
            if method in groups and method in correlations[model] and (gain := lead(groups, method)) is not None
        }
        rows = sorted(found.items(), key=lambda item: -item[1][0].value)
        if method != BASELINE and len(rows) > 1:
            steps = [above(one[0], other[0]) * above(one[1], other[1]) for (_, one), (_, other) in pairwise(rows)]
            listed = ", ".join(
                f"{with_interval(gain)} on {model_name(model)} ({with_interval(quality)})"
                for model, (quality, gain) in rows
            )
            lead_of = f"{name_of(method)}'s lead over {BASELINE}, by correlation (in parentheses), the highest first"
            return f"{lead_of}: {listed}; {ORDERS[min(steps)]}."
    return ""
