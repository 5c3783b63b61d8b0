"""The numbers of a grid as rows, for the terminal, the page and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tokenmdp.intervals import Estimate
from tokenmdp.study import outcomes
from tokenmdp.study.directory import Study
from tokenmdp.study.equal_kl import EDGES, leads_in_bins, mean_leads
from tokenmdp.study.outcomes import BASELINE
from tokenmdp.study.results import Cell, CellResult
from tokenmdp.study.statistics import (
    FEWEST_RESAMPLED,
    interquartile_mean,
    mean_difference,
    mean_level,
    median_steps,
    paired_difference,
    probability_of_improvement,
    steps_to_reach,
    stratified_bootstrap,
    trailing_mean,
    two_standard_errors,
)

METHOD_HEADINGS = (
    "setting",
    "method",
    "seeds",
    "mean score",
    "IQM",
    "last tenth",
    "KL, last tenth",
    "- sparse",
    "P(> sparse)",
    "median seed's updates to sparse's maximum",
    "mean +- 2 SE",
)
EQUAL_KL_HEADINGS = (
    "setting",
    "method",
    *(f"- sparse at {low:g} to {high:g} nats" for low, high in pairwise(EDGES)),
    "mean of these",
)
EQUAL_KL_LEGEND = (
    "Lead at equal KL: mean score of the updates in which a run's KL lies in the range, less that of sparse's run of "
    "the same seed, [95% t interval]; n: seeds whose runs of both methods are ever there. No run is left out. Last: "
    "each seed's mean over the ranges that it has."
)
LEGEND = (
    "Mean score and IQM (interquartile mean): over all updates, then over seeds, [95% stratified bootstrap interval]; "
    "below four seeds the IQM is the mean. "
    "Last tenth: the same of the last tenth of the updates; KL in nats a response. "
    "- sparse: difference of the mean scores, paired by seed, [95% t interval]. "
    "P(> sparse): probability that one run is better than one of sparse's, [bootstrap]; left out for one run of each. "
    f"Resamples of a few seeds stay within their range, so a bootstrap interval is too narrow: of {FEWEST_RESAMPLED} "
    "seeds with normal noise it holds the truth 86 times in 100, of ten 89 times. With fewer seeds than "
    f"{FEWEST_RESAMPLED} means of one setting have a t interval instead and other numbers none, nor have numbers that "
    "are the same in all resamples. "
    "Median seed's updates to sparse's maximum: the maximum of sparse's mean curve, and the Kaplan-Meier median over "
    "seeds of the updates until a seed's own curve is there, both as trailing means over up to "
    f"{outcomes.WINDOW} updates; never: "
    "more than half of the seeds did not get there. A single seed's curve is noisier than the mean curve that it is "
    "compared with, and may touch the level by chance; the interval takes the level as known. "
    "Mean +- 2 SE: the paper's summary, with the standard error over seeds."
)


@dataclass(frozen=True)
class MethodRow:
    """One method in one setting; what needs sparse under the same seeds is None without it."""

    setting: str
    method: str
    seeds: int  # finished cells
    mean: Estimate  # of the area under the learning curve
    iqm: Estimate
    last: Estimate  # mean score of the last tenth of the updates
    kl: Estimate  # of the last tenth
    difference: Estimate | None  # to sparse in area, paired by seed
    improvement: Estimate | None  # probability of improvement over sparse; None too for one run of each
    steps: Estimate | None  # updates to the maximum of sparse's mean curve; censored, so it may be infinite
    paper: tuple[float, float] | None  # mean and two standard errors; None over several settings


def method_table(study: Study, grid: str) -> list[MethodRow]:
    """The rows of a grid in its order; last each method over all settings, unless they differ in `_kind`.

    Over all settings the seeds are resampled within each; a paired difference is averaged over the settings first, and
    only seeds that have all of them count, since one seed's cells share their prompts.
    """
    selected = study.select(grid)
    settings = list(dict.fromkeys(setting for setting, _ in selected))
    methods = list(dict.fromkeys(method for _, method in selected))
    rows = []
    for setting, method in selected:
        rows.append(_row(setting, method, [selected[setting, method]], [selected.get((setting, BASELINE), [])]))
    for method in methods:
        strata = [selected.get((setting, method), []) for setting in settings]
        if len(settings) > 1 and all(strata) and len({_kind(group[0].cell) for group in strata}) == 1:
            baseline = [selected.get((setting, BASELINE), []) for setting in settings]
            rows.append(_row(f"all {len(settings)} settings", method, strata, baseline))
    return rows


def _kind(cell: Cell) -> tuple[object, ...]:
    """What no mean is taken over: scores have each model's scale, and leads depend on the critic and the rate."""
    return cell.settings.reward_model, cell.settings.config.get("learning_rate"), outcomes.critic_of(cell)


def equal_kl_table(study: Study, grid: str) -> list[tuple[str, ...]]:
    """Every method's lead over sparse at equal KL, setting by setting, as the texts under `EQUAL_KL_HEADINGS`."""
    rows = []
    for setting, groups in outcomes.by_setting(study, grid).items():
        for method, results in groups.items():
            if method == BASELINE or BASELINE not in groups:
                continue
            leads = leads_in_bins(results, groups[BASELINE])
            if np.isfinite(leads).any():
                rows.append((setting, method, *map(_lead_text, leads.T), _lead_text(mean_leads(leads))))
    return rows


def _lead_text(values: np.ndarray) -> str:
    kept = values[np.isfinite(values)]
    return f"{mean_difference(kept)}, n={kept.size}" if kept.size else ""


def _row(
    setting: str, method: str, strata: Sequence[Sequence[CellResult]], baseline: Sequence[Sequence[CellResult]]
) -> MethodRow:
    areas = [[outcomes.area(result) for result in results] for results in strata]
    every = np.concatenate(areas)
    compared = method != BASELINE and all(baseline)
    return MethodRow(
        setting,
        method,
        len(every),
        mean_level(areas),
        stratified_bootstrap(areas, interquartile_mean),
        mean_level([[outcomes.last_tenth(result) for result in results] for results in strata]),
        mean_level([[outcomes.last_tenth(result, "kl") for result in results] for results in strata]),
        _difference(strata, baseline) if compared else None,
        probability_of_improvement(areas, [[outcomes.area(cell) for cell in cells] for cells in baseline])
        if compared and len(every) + sum(map(len, baseline)) > 2 * len(areas)  # of two runs it is 0 or 1
        else None,
        _steps(strata[0], baseline[0]) if len(strata) == 1 and baseline[0] else None,
        (float(every.mean()), two_standard_errors(every)) if len(strata) == 1 else None,
    )


def _difference(strata: Sequence[Sequence[CellResult]], baseline: Sequence[Sequence[CellResult]]) -> Estimate | None:
    rows = outcomes.paired(*strata, *baseline)
    if not rows:
        return None
    areas = outcomes.areas(rows)  # (R, 2 * settings)
    return paired_difference(areas[:, : len(strata)].mean(1), areas[:, len(strata) :].mean(1))


def _steps(results: Sequence[CellResult], baseline: Sequence[CellResult]) -> Estimate:
    """Updates until each seed reaches the maximum of sparse's mean curve; seeds that do not are censored at the end."""
    updates, own = outcomes.curves(results)
    others, other = outcomes.curves(baseline)
    window = outcomes.window_for(min(len(updates), len(others)))
    level = trailing_mean(other.mean(0), window).max()
    first = steps_to_reach(trailing_mean(own, window), level)
    reached = np.isfinite(first)
    places = updates[window - 1 :]
    return median_steps(np.where(reached, places[np.where(reached, first, -1).astype(int)], places[-1]), reached)


def method_texts(row: MethodRow) -> tuple[str, ...]:
    """A row as the texts under `METHOD_HEADINGS`."""
    return (
        row.setting,
        row.method,
        str(row.seeds),
        *map(str, (row.mean, row.iqm, row.last, row.kl)),
        "" if row.difference is None else str(row.difference),
        "" if row.improvement is None else str(row.improvement),
        "" if row.steps is None else steps_text(row.steps),
        "" if row.paper is None else paper_text(*row.paper),
    )


def paper_text(centre: float, two_errors: float) -> str:
    """A mean with two standard errors, which one seed does not have.

    >>> paper_text(8.316, 0.163), paper_text(8.316, math.nan)
    ('8.32 +- 0.16', '8.32')
    """
    return f"{centre:.2f}" + ("" if math.isnan(two_errors) else f" +- {two_errors:.2f}")


def steps_text(steps: Estimate) -> str:
    """Numbers of updates, "never" where infinite.

    >>> steps_text(Estimate(41.0, 38.5, math.inf)), steps_text(Estimate(41.0, -math.inf, math.inf))
    ('41 [38, never]', '41')
    """
    value, low, high = ("never" if end == math.inf else f"{end:.0f}" for end in steps)
    return value if steps.low == -math.inf else f"{value} [{low}, {high}]"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    texts = ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in (headings, *rows)]
    return "\n".join([texts[0], "|" + "---|" * len(headings), *texts[1:]]) + "\n"
