"""What each figure of a study's page shows, in one sentence of its caption, worded by the intervals of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tokenmdp.intervals import Estimate
from tokenmdp.report.drawing import finite, with_interval
from tokenmdp.study.labels import model_name, name_of
from tokenmdp.study.outcomes import BASELINE, Groups, area, evaluation_curves, paired
from tokenmdp.study.results import CellResult
from tokenmdp.study.statistics import level, mean_difference

UNDECIDED, TOO_FEW = "not decided (the interval includes 0)", "not decided (too few seeds for an interval)"


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


def growth_answer(settings: Mapping[str, Groups], shortest: str, longest: str) -> str:
    """How every method's lead over the baseline changes from one length to another, by the seeds that have both."""
    first, last, changes = settings[shortest], settings[longest], {}
    for method in first:
        if method != BASELINE and method in last and BASELINE in first and BASELINE in last:
            rows = paired(first[method], first[BASELINE], last[method], last[BASELINE])
            values = [area(far) - area(base_far) - area(near) + area(base) for near, base, far, base_far in rows]
            if values:
                changes[name_of(method)] = mean_difference(values)
    said = sorted_by_sign(changes, "grows with", "shrinks with")
    return f"Change of the lead over {BASELINE} from {shortest} to {longest}: {said}." if changes else ""


def change_answer(groups: Groups, key: str, what: str, since: float = 0.0) -> str:
    """How a column of the evaluations, in words ``what``, changes by run from the share ``since`` of training on."""
    changes = {}
    for method, results in groups.items():
        updates, values = evaluation_curves(results, key)
        place = int(np.abs(updates - since * updates[-1]).argmin())
        changes[name_of(method)] = mean_difference(values[:, -1] - values[:, place])
    said = sorted_by_sign(changes, "rises with", "falls with")
    return f"Change of {what} from update {updates[place]:g} to {updates[-1]:g}: {said}."


def quality_answer(models: Mapping[str, Groups], correlations: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """One method's lead over the baseline on each reward model, in the order of its credit quality there."""
    for method in ("attention", *next(iter(models.values()))):
        found = {
            model: (Estimate(*correlations[model][method]), gain)
            for model, groups in models.items()
            if method in groups and method in correlations[model] and (gain := lead(groups, method)) is not None
        }
        rows = sorted(found.items(), key=lambda item: -item[1][0].value)
        if method != BASELINE and len(rows) > 1:
            gains = [gain.value for _, (_, gain) in rows]
            order = "falls" if gains == sorted(gains, reverse=True) else "does not fall"
            listed = ", ".join(
                f"{with_interval(gain)} on {model_name(model)} ({with_interval(quality)})"
                for model, (quality, gain) in rows
            )
            lead_of = f"{name_of(method)}'s lead over {BASELINE}, by correlation (in parentheses), the highest first"
            return f"{lead_of}: {listed}; it {order} in this order."
    return ""
