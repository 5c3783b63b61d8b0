"""Claims about what changes over settings: credit_beta, response length, reward model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from abc_study.claims import (
    INCONCLUSIVE,
    NO_FIGURE,
    NOT_REPRODUCED,
    Claim,
    Verdict,
    cells_of,
    command,
    families,
    place_of,
    plain_cells,
    undecided,
)
from abc_study.estimates import difference_of_shares, fisher, jackknife, slope

from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.study import outcomes
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import NAMES, model_name
from tokenmdp.study.results import Cell, CellResult
from tokenmdp.study.statistics import mean_difference

COLLAPSE_TOKENS = 90  # the length from which on the paper sees it
PAPER_SHARE = 0.2  # of sparse's runs, where the paper sees it
LENGTH_GRIDS = ("length", "custom", "gpt2")  # where several lengths may be, the best first
SAME_SCORES = {"imdb-tiny", "imdb-uniform"}  # bundled models that differ in nothing but their attention row
PAIR = ("attention", "sparse")


def rises_with_beta(study: Study) -> Verdict:
    """Is there a trend? A maximum between the ends may be hidden in one, so all means are given."""
    claim = Claim(
        "the score over training rises with credit_beta (linear trend)",
        "7.94 (0), 8.28 (.2), 8.40 (.4), 8.50 (.6), 8.64 (.8), 8.80 (1); n=10",
    )
    for grid in ("beta", "custom"):
        swept: dict[str, dict[float, list[CellResult]]] = {}
        for (setting, _), results in study.select(grid).items():
            if _reads_attention(results[0].cell):
                swept.setdefault(setting, {}).setdefault(results[0].cell.settings.credit_beta, results)
        for setting, groups in swept.items():
            betas = sorted(groups)
            rows = outcomes.paired(*(groups[beta] for beta in betas))
            if len(betas) < 3 or not rows:
                continue
            areas = outcomes.areas(rows)  # (R, betas)
            slopes, means = slope(areas, betas), areas.mean(0)
            ends = slope(np.array([[outcomes.last_tenth(result) for result in row] for row in rows]), betas)
            swept_cells = {
                cell.id for cell in study.declared(grid) if cell.setting == setting and _reads_attention(cell)
            }
            listed = ", ".join(f"{value:.2f} ({beta:g})" for beta, value in zip(betas, means, strict=True))
            return claim.decide(
                mean_interval(slopes),
                len(rows),
                f"slope {slopes.mean():+.2f}: {listed}; in the last tenth {mean_difference(ends)}",
                place_of(study, grid, setting, len(rows), swept_cells),
                "each seed's least-squares slope of the mean score in credit_beta, t interval over seeds",
            )
    return claim.missing(f"needs ABC at three values of credit_beta under one seed: {command('beta')}")


def _reads_attention(cell: Cell) -> bool:
    """Whether the cell's method is ABC with any credit_beta."""
    return cell.settings.credit == "attention" and not cell.settings.credit_options


def _lengths(study: Study) -> tuple[str, dict[tuple[int, int], list[list[CellResult]]]]:
    """The first grid with several lengths, and its cells of `PAIR` at each length, the shortest first."""
    for grid in LENGTH_GRIDS:
        found = {outcomes.length_of(pair[0][0].cell): pair for pair in families(study, grid, PAIR, outcomes.LENGTH)}
        if len(found) > 1:
            return grid, dict(sorted(found.items()))
    return "", {}


def grows_with_length(study: Study) -> Verdict:
    """Is ABC - sparse larger for longer responses?"""
    claim = Claim(
        "ABC's advantage over sparse grows with length",
        "+1.10 (8-16), +0.92 (20-30), +1.27 (40-60), +3.24 (90-110), +3.74 (140-160)",
    )
    grid, lengths = _lengths(study)
    rows = outcomes.paired(*(group for groups in lengths.values() for group in groups)) if lengths else []
    if not rows:
        return claim.missing(f"needs ABC and sparse at two lengths under the same seeds: {command('length')}")
    areas = outcomes.areas(rows).reshape(len(rows), len(lengths), 2)
    advantage = areas[..., 0] - areas[..., 1]  # (R, lengths)
    slopes = 10 * slope(advantage, [(low + high) / 2 for low, high in lengths])
    listed = ", ".join(f"{value:+.2f} ({_range(at)})" for value, at in zip(advantage.mean(0), lengths, strict=True))
    uniform = families(study, grid, ("attention", "uniform"), outcomes.LENGTH)
    leads = [outcomes.areas(found).mean(0) @ [1, -1] for pair in uniform if (found := outcomes.paired(*pair))]
    over = f"; over uniform {', '.join(f'{value:+.2f}' for value in leads)}" if len(leads) == len(lengths) else ""
    return claim.decide(
        mean_interval(slopes),
        len(rows),
        f"{listed}; {slopes.mean():+.2f} for ten tokens more{over}",
        place_of(study, grid, f"{len(lengths)} lengths", len(rows), cells_of(study, grid, PAIR)),
        "each seed's slope of (ABC - sparse) in mean score against the mean length, for ten tokens; t interval over "
        "seeds",
    )


def _range(length: tuple[int, int]) -> str:
    """The length as in the paper, with an exclusive upper end."""
    low, high = length
    return str(low) if low == high else f"{low}-{high + 1}"


def collapses(study: Study) -> Verdict:
    """Do more of sparse's runs than of ABC's lose what they had gained, at the longest length?"""
    claim = Claim(
        "sparse collapses at length, ABC does not",
        "9.19 (40-60), then 7.42 +- 1.74 (90-110) and 7.03 +- 1.65 (140-160); ABC stays above 10.4; elsewhere two of "
        "ten runs",
    )
    if (found := _longest(study)) is None:
        return claim.missing(f"needs sparse at several lengths: {command('length')}")
    grid, longest = found
    at = outcomes.length_of(longest)
    lost = {method: _runs_lost(study, grid, longest.setting, method) for method in NAMES}
    told = [f"{NAMES[method]} {_told(*found)}" for method, found in lost.items() if found.runs + found.crashed]
    ours = f"runs lost: {', '.join(sorted(told, key=lambda text: not text.startswith('sparse')))}"
    counted = [(found.fallen + found.crashed, found.runs + found.crashed) for found in map(lost.get, PAIR[::-1])]
    if none := [name for name, (_, runs) in zip(("sparse", "ABC"), counted, strict=True) if not runs]:
        return claim.missing(f"needs runs with a gain beyond noise of {' and '.join(none)} at {_range(at)} tokens")
    place = place_of(study, grid, f"{_range(at)} tokens, its longest", counted[0][1], ())  # the crashed ones count

    def decided(pair: Sequence[tuple[int, int]]) -> Verdict:
        difference = difference_of_shares(*pair)
        verdict = claim.decide(
            difference,
            min(runs for _, runs in pair),
            ours,
            place,
            f"runs whose last tenth has less than {outcomes.KEPT:.0%} of their highest gain (trailing mean less the "
            "start), and crashed ones; those with no gain beyond noise are left out; sparse's share less ABC's, from "
            "Clopper-Pearson intervals of 97.5% of each; p of Fisher's exact test",
            when=("the interval lies above 0", f"it lies below {PAPER_SHARE:g}, the paper's two of ten runs"),
            p=fisher(*pair),
        )
        if verdict.verdict == INCONCLUSIVE and difference.high < PAPER_SHARE:
            return replace(verdict, verdict=NOT_REPRODUCED)
        return verdict

    verdict = decided(counted)
    finished = [(found.fallen, found.runs) for found in map(lost.get, PAIR[::-1])]
    if not all(runs for _, runs in finished) or decided(finished).verdict != verdict.verdict:
        return undecided(verdict, "which hangs on the runs that crashed")
    if at[1] < COLLAPSE_TOKENS:
        return undecided(
            verdict,
            f"the paper sees it from {COLLAPSE_TOKENS} tokens on and not below, so shorter texts neither reproduce nor "
            "refute it",
        )
    return verdict


def _longest(study: Study) -> tuple[str, Cell] | None:
    """The first grid with sparse at several lengths, and such a cell of the longest; a run may have crashed there."""
    for grid in LENGTH_GRIDS:
        cells = plain_cells(study, grid, ("sparse",))
        tried = {cell.setting: cell for id, cell in cells.items() if id in study.results or id in study.errors}
        family = [tried[setting] for setting in outcomes.alike(tried, outcomes.LENGTH)]
        if len(family) > 1:
            return grid, max(family, key=outcomes.length_of)
    return None


class _Lost(NamedTuple):
    """Counts of a method's runs in a setting."""

    fallen: int  # collapsed
    runs: int  # finished with a gain beyond noise
    crashed: int


def _runs_lost(study: Study, grid: str, setting: str, method: str) -> _Lost:
    cells = cells_of(study, grid, (method,), setting)
    kept = np.array([outcomes.kept_of_gain(study.results[id]) for id in cells & study.results.keys()])
    return _Lost(int((kept < outcomes.KEPT).sum()), int(np.isfinite(kept).sum()), len(cells & study.errors.keys()))


def _told(fallen: int, runs: int, crashed: int) -> str:
    """Such as ``3 of 10 (1 crashed)``."""
    return f"{fallen + crashed} of {runs + crashed}{f' ({crashed} crashed)' if crashed else ''}"


def follows_credit_quality(study: Study) -> Verdict:
    """Does ABC gain more on the reward model whose attention agrees with leave-one-out?"""
    claim = Claim(
        "ABC gains more on a faithful attention row than on one that says nothing",
        f"{NO_FIGURE}: the paper does not ask",
    )
    why = f"needs ABC and sparse on two reward models of measured credit quality: {command('faithful')}"
    for grid in ("faithful", "custom"):
        groups, quality = {}, {}
        for pair in families(study, grid, PAIR, outcomes.REWARD_MODEL):
            model = pair[0][0].cell.settings.reward_model
            if (row := outcomes.credit_quality(study, model)) is not None:
                groups[model], quality[model] = pair, row
        if len(groups) < 2:
            continue
        order = sorted(groups, key=lambda model: -Estimate(*quality[model]["spearman"]).value)
        chosen = [model for model in order if model in SAME_SCORES] if groups.keys() >= SAME_SCORES else order
        most, least = chosen[0], chosen[-1]
        rows = outcomes.paired(*groups[most], *groups[least])
        if not rows:
            why = f"no seed has the cells of ABC and sparse on both {model_name(most)} and {model_name(least)}"
            continue
        runs = np.stack([_areas_and_start(rows), _areas_and_start([row[2:] for row in rows])], axis=1)  # (R, 2, 3)
        gains = runs[..., 1] - runs[..., 2]
        least_gains = gains.sum(0) - (gains.max(0) if len(rows) > 1 else 0)  # whichever seed is left out
        if not (least_gains > 0).all():
            why = f"sparse gains too little on {model_name(most)} or {model_name(least)} for a share of its gain"
            continue
        compared = {
            id
            for id in cells_of(study, grid, PAIR)
            if study.cells[id].settings.reward_model in (most, least)  # a third model is only shown
        }
        direct = ""
        if {most, least} == SAME_SCORES:  # whose scores have one scale
            direct = f"; ABC's own score differs by {mean_difference(runs[:, 0, 0] - runs[:, 1, 0])}"
        verdict = replace(
            claim,
            says=f"ABC gains more on {model_name(most)} than on {model_name(least)} ({quality[most]['level']} "
            f"attention row, {quality[least]['level']})",
        ).decide(
            jackknife(runs, lambda kept: _share_of_gain(kept[:, 0]) - _share_of_gain(kept[:, 1])),
            len(rows),
            ", ".join(
                f"{_share_told(groups[model])} on {model_name(model)} "
                f"(its attention: {quality[model]['spearman'][0]:.2f})"
                for model in order
            )
            + direct,
            place_of(study, grid, f"{len(order)} reward models", len(rows), compared),
            # Reward models differ in scale, so the advantage is taken as a share.
            "(ABC - sparse) in mean score as a share of sparse's mean gain, the first model's less the other's; t "
            "interval of the jackknife over seeds, since sparse's gain is an estimate too; in brackets the rank "
            "correlation of a model's attention row with leave-one-out without signs",
        )
        if Estimate(*quality[most]["spearman"]).low <= Estimate(*quality[least]["spearman"]).high:
            return undecided(verdict, "the models' rank correlations with leave-one-out do not differ")
        return verdict
    return claim.missing(why)


def _areas_and_start(rows: Sequence[Sequence[CellResult]]) -> np.ndarray:
    """(R, 3): ABC's area, sparse's, and sparse's start, of rows that begin with a cell of each."""
    return np.array([(outcomes.area(row[0]), outcomes.area(row[1]), outcomes.start(row[1])) for row in rows])


def _share_told(pair: Sequence[Sequence[CellResult]]) -> str:
    """`_share_of_gain` of the seeds of both methods, if there are any and sparse gains."""
    if not (rows := outcomes.paired(*pair)):
        return "no seed of both methods"
    runs = _areas_and_start(rows)
    _, other, start = runs.mean(0)
    return f"{_share_of_gain(runs):+.0%}" if other > start else "no gain to share"


def _share_of_gain(runs: np.ndarray) -> float:
    """(ABC - sparse) / (sparse - start) of the means over seeds of `_areas_and_start`."""
    own, other, start = runs.mean(0)
    return float((own - other) / (other - start))
