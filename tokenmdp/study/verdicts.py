"""The paper's claims against a study: our figure, its 95% interval, and the verdict that the interval gives.

The paper is Chan, Sun, Holt and van der Schaar, "Dense reward for free in RLHF" (2024); its figures were read from it
or recomputed from the learning curves that its authors published. Each claim has an interval of its own: with twenty
claims, about one interval is expected to miss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from tokenmdp.study import outcomes
from tokenmdp.study.claims import (
    FEWEST_RESAMPLED,
    INCONCLUSIVE,
    NAMES,
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    Verdict,
    family,
    find,
    needs,
    where_of,
)
from tokenmdp.study.results import CellResult, Study
from tokenmdp.study.statistics import (
    Estimate,
    difference_at_equal_kl,
    overtaking,
    paired_difference,
    slope,
    trailing_mean,
)

COLLAPSE_TOKENS = 90  # from this length on the paper sees it
KEPT = 0.5  # a run that ends with less of its gain than this has collapsed
NO_FIGURE = "no figure"
LENGTH = ("horizon_range", "min_new_tokens", "max_new_tokens")


def verdicts(study: Study) -> list[Verdict]:
    """Every claim, decided or with what it lacks."""
    above = "paired by seed, t interval of {} - {} in mean score over all updates"
    pairs = [
        ("attention", "sparse", Claim("ABC above sparse", "8.32 +- .16 against 7.22 +- .39 (8-16 tokens)")),
        ("attention", "uniform", Claim("ABC above uniform", "8.32 +- .16 against 6.60 +- .19")),
        ("sparse", "uniform", Claim("uniform below sparse on short texts", "6.60 +- .19 against 7.22 +- .39")),
    ]
    return [
        _fewer_steps(study),
        *(_compare(study, claim, left, right, outcomes.area, above) for left, right, claim in pairs),
        _between(study, "abc-d", "6.60 uniform, 6.89 +- .37 ABC-D, 8.32 ABC"),
        _between(study, "abc-d2", "6.60 uniform, 7.10 +- .22 ABC-D2, 8.32 ABC"),
        _larger_beta(study),
        _grows_with_length(study),
        _collapse(study),
        _compare(
            study,
            Claim("ABC spends more KL than uniform", "18.7 against 14.2 nats at the end"),
            "attention",
            "uniform",
            lambda result: outcomes.last_tenth(result, "kl"),
            "paired by seed, t interval of {} - {} in KL over the last tenth of the updates, nats a response",
        ),
        _equal_kl(study),
        *_gold(study),
        _credit_quality(study),
        _compare(
            study,
            Claim("RED above ABC", f"{NO_FIGURE}: not the paper's claim, but ours"),
            "red",
            "attention",
            outcomes.area,
            above,
        ),
    ]


def _compare(
    study: Study, claim: Claim, left: str, right: str, measure: Callable[[CellResult], float], what: str
) -> Verdict:
    """Is ``left`` above ``right``?"""
    if (found := find(study, (left, right))) is None:
        return claim.missing(needs((left, right)))
    values, baseline = (np.array([measure(result) for result in group]) for group in found.groups)
    ours = f"{(values - baseline).mean():+.2f} ({values.mean():.2f} against {baseline.mean():.2f})"
    what = what.format(NAMES[left], NAMES[right])
    return claim.decide(paired_difference(values, baseline), len(values), ours, found.where, what)


def _fewer_steps(study: Study) -> Verdict:
    claim = Claim("ABC reaches sparse's maximum in fewer than half the steps", "46%: iteration 41 against 89")
    if (found := find(study, ("attention", "sparse"))) is None:
        return claim.missing(needs(("attention", "sparse")))
    (updates, own), (others, baseline) = (outcomes.curves(group) for group in found.groups)
    shortest = min(len(updates), len(others))
    window = outcomes.window_for(shortest)
    result = overtaking(own[:, :shortest], baseline[:, :shortest], updates[:shortest], window=window)
    maximum = f"sparse has its maximum, {result.level:.2f}, at update {result.baseline_step:.0f}"
    if result.step == math.inf:
        ours = f"never; {maximum}"
    else:
        ours = f"{result.share.value:.0%}: update {result.step:.0f}; {maximum}"
    what = (
        f"steps of ABC's mean curve / steps of sparse's to its maximum, trailing mean over {window} updates; "
        "percentile bootstrap over seeds"
    )
    return claim.decide(
        result.share, len(own), ours, found.where, what, threshold=0.5, below=True, fewest=FEWEST_RESAMPLED
    )


def _between(study: Study, method: str, paper: str) -> Verdict:
    name = NAMES[method]
    claim = Claim(f"{name} between uniform and ABC", paper)
    order = ("uniform", method, "attention")
    if (found := find(study, order)) is None:
        return claim.missing(needs(order))
    low, middle, high = (np.array([outcomes.area(result) for result in group]) for group in found.groups)
    ours = f"{low.mean():.2f} uniform, {middle.mean():.2f} {name}, {high.mean():.2f} ABC"
    what = f"paired by seed, t intervals of {name} - uniform and of ABC - {name} in mean score over all updates"
    parts = [paired_difference(middle, low), paired_difference(high, middle)]
    decided = [claim.decide(part, len(low), ours, found.where, what) for part in parts]
    outcome = {verdict.verdict for verdict in decided}
    return Verdict(
        claim.says,
        paper,
        ours,
        "; ".join(verdict.interval for verdict in decided if verdict.interval),
        next(verdict for verdict in (NOT_REPRODUCED, INCONCLUSIVE, REPRODUCED) if verdict in outcome),
        decided[0].rule.replace("the interval lies", "both lie") + "; not reproduced if one lies below",
        found.where,
    )


def _larger_beta(study: Study) -> Verdict:
    claim = Claim(
        "the larger credit_beta, the better", "7.94 (0), 8.28 (.2), 8.40 (.4), 8.50 (.6), 8.64 (.8), 8.80 (1); n=10"
    )
    for grid in ("beta", "custom"):
        swept: dict[str, dict[float, list[CellResult]]] = {}
        for (setting, _), results in study.select(grid).items():
            settings = results[0].cell.settings
            if settings.credit == "attention" and not settings.credit_options:
                swept.setdefault(setting, {})[settings.credit_beta] = results
        for setting, groups in swept.items():
            betas = sorted(groups)
            rows = outcomes.paired(*(groups[beta] for beta in betas))
            if len(betas) < 3 or not rows:
                continue
            areas = outcomes.areas(rows)  # (R, betas)
            slopes, means = slope(areas, betas), areas.mean(0)
            rank = stats.spearmanr(betas, means).statistic if np.ptp(means) else math.nan
            listed = ", ".join(f"{value:.2f} ({beta:g})" for beta, value in zip(betas, means, strict=True))
            return claim.decide(
                _over_seeds(slopes),
                len(rows),
                f"slope {slopes.mean():+.2f}: {listed}; rank correlation {rank:.2f}",
                where_of(study, grid, setting, len(rows)),
                "each seed's least-squares slope of the mean score in credit_beta, t interval over seeds",
            )
    return claim.missing("needs ABC at three values of credit_beta under one seed: tokenmdp ablate --preset beta")


def _over_seeds(values: np.ndarray) -> Estimate:
    """One number a seed that is itself a difference or is compared with a threshold."""
    return paired_difference(values, np.zeros_like(values))


def _lengths(study: Study, methods: Sequence[str]) -> tuple[str, dict[tuple[int, int], list[list[CellResult]]]]:
    """The first grid with several lengths, and its cells of the methods at each length, the shortest first."""
    for grid in ("length", "custom", "gpt2"):
        found = {outcomes.length_of(groups[0][0]): groups for groups in family(study, grid, methods, LENGTH)}
        if len(found) > 1:
            return grid, dict(sorted(found.items()))
    return "", {}


def _grows_with_length(study: Study) -> Verdict:
    claim = Claim(
        "ABC's advantage over sparse grows with length",
        "+1.10 (8-16), +0.92 (20-30), +1.27 (40-60), +3.24 (90-110), +3.74 (140-160)",
    )
    grid, lengths = _lengths(study, ("attention", "sparse"))
    rows = outcomes.paired(*(group for groups in lengths.values() for group in groups)) if lengths else []
    if not rows:
        return claim.missing(
            "needs ABC and sparse at two lengths under the same seeds: tokenmdp ablate --preset length"
        )
    areas = outcomes.areas(rows).reshape(len(rows), len(lengths), 2)
    advantage = areas[..., 0] - areas[..., 1]  # (R, lengths)
    slopes = 10 * slope(advantage, [(low + high) / 2 for low, high in lengths])
    listed = ", ".join(f"{value:+.2f} ({_range(at)})" for value, at in zip(advantage.mean(0), lengths, strict=True))
    return claim.decide(
        _over_seeds(slopes),
        len(rows),
        f"{listed}; {slopes.mean():+.2f} for ten tokens more",
        where_of(study, grid, f"{len(lengths)} lengths", len(rows)),
        "each seed's slope of (ABC - sparse) in mean score against the mean length, for ten tokens; t interval over "
        "seeds",
    )


def _range(length: tuple[int, int]) -> str:
    """As the paper writes it, whose upper end is exclusive."""
    low, high = length
    return str(low) if low == high else f"{low}-{high + 1}"


def _collapse(study: Study) -> Verdict:
    claim = Claim(
        "sparse collapses at length",
        "9.19 (40-60), then 7.42 +- 1.74 (90-110) and 7.03 +- 1.65 (140-160); ABC stays above 10.4",
    )
    grid, lengths = _lengths(study, ("sparse",))
    if not lengths:
        return claim.missing("needs sparse at several lengths: tokenmdp ablate --preset length")
    at, (results,) = list(lengths.items())[-1]
    kept = np.array([_kept(result) for result in results])
    verdict = claim.decide(
        _over_seeds(kept),
        len(kept),
        f"{kept.mean():.0%} of the gain kept to the end; {(kept < KEPT).sum()} of {len(kept)} runs keep less than half",
        where_of(study, grid, f"{_range(at)} tokens, its longest", len(kept)),
        "share of a run's highest gain (trailing mean less the start) that its last tenth still has; t interval over "
        "seeds",
        threshold=KEPT,
        below=True,
    )
    if verdict.verdict == NOT_REPRODUCED and at[1] < COLLAPSE_TOKENS:
        return _undecided(
            verdict, f"below {COLLAPSE_TOKENS} tokens the paper sees no collapse either, so its absence says nothing"
        )
    return verdict


def _undecided(verdict: Verdict, why: str) -> Verdict:
    return replace(verdict, verdict=INCONCLUSIVE, rule=f"{verdict.rule}; {why}")


def _kept(result: CellResult) -> float:
    scores, start = np.asarray(result.metrics["score_mean"]), outcomes.start(result)
    gain = float(trailing_mean(scores, outcomes.window_for(len(scores))).max()) - start
    return (outcomes.last_tenth(result) - start) / gain if gain > 0 else 0.0


def _equal_kl(study: Study) -> Verdict:
    claim = Claim("ABC above sparse at equal KL", f"{NO_FIGURE}: the paper shows reward alone")
    why = "needs ABC and sparse at several KL coefficients under one seed: tokenmdp ablate --preset kl"
    for grid in ("kl", "custom"):
        settings = family(study, grid, ("attention", "sparse"), ("kl_coef",))
        rows = outcomes.paired(*(group for groups in settings for group in groups)) if len(settings) > 1 else []
        if not rows:
            continue
        ends = np.array(
            [[(outcomes.last_tenth(cell, "kl"), outcomes.last_tenth(cell)) for cell in row] for row in rows]
        )
        own, other = ends[:, ::2], ends[:, 1::2]  # (R, settings, 2)
        differences = np.array(
            [difference_at_equal_kl(tuple(left.T), tuple(right.T)) for left, right in zip(own, other, strict=True)]
        )
        shared = differences[np.isfinite(differences)]
        if not shared.size:
            why = "the methods end at different KL under every seed; add KL coefficients to the grid"
            continue
        return claim.decide(
            _over_seeds(shared),
            len(shared),
            f"{shared.mean():+.2f} at the same KL",
            where_of(study, grid, f"{len(settings)} KL coefficients", len(shared)),
            "scores and KL of the last tenth, interpolated between the coefficients; each seed's mean difference over "
            "the KL that both methods cover; t interval over seeds",
        )
    return claim.missing(why)


def _gold(study: Study) -> list[Verdict]:
    open_question = f"{NO_FIGURE}: the paper leaves over-optimisation open"
    rises = Claim("a second reward model, never trained on, confirms what ABC gains", open_question)
    holds = Claim("ABC: the second model's score still rises at the end (no over-optimisation yet)", open_question)
    above = Claim("ABC above sparse for the second reward model", open_question)
    found = find(study, ("attention", "sparse"))
    if found is None:
        return [claim.missing(needs(("attention", "sparse"))) for claim in (rises, holds, above)]
    if any(len(result.evaluations.get("gold", ())) < 4 for group in found.groups for result in group):
        why = "needs a second reward model (--gold) and four evaluations or more"
        return [claim.missing(why) for claim in (rises, holds, above)]
    evaluations = min(len(result.evaluations["gold"]) for group in found.groups for result in group)
    gold, other = (np.array([result.evaluations["gold"][:evaluations] for result in group]) for group in found.groups)
    proxy = np.array([result.evaluations["score"][:evaluations] for result in found.groups[0]])
    updates = found.groups[0][0].evaluations["update"]
    seeds, third = len(gold), (evaluations - 1) // 3
    late, middle = gold[:, -third:].mean(1), gold[:, -2 * third : -third].mean(1)
    turn = updates[int(gold.mean(0).argmax())]
    gain = gold[:, -1] - gold[:, 0]
    return [
        rises.decide(
            paired_difference(gold[:, -1], gold[:, 0]),
            seeds,
            f"{gain.mean():+.2f}, while the score trained on gains {(proxy[:, -1] - proxy[:, 0]).mean():+.2f}",
            found.where,
            "second model's score on held-out prompts, end - start, t interval over seeds",
        ),
        holds.decide(
            paired_difference(late, middle),
            seeds,
            f"{(late - middle).mean():+.2f}; highest at update {turn:.0f} of {updates[evaluations - 1]:.0f}",
            found.where,
            "second model's score, last third of the evaluations - middle third, t interval over seeds",
        ),
        above.decide(
            paired_difference(gold.mean(1), other.mean(1)),
            seeds,
            f"{(gold.mean(1) - other.mean(1)).mean():+.2f} ({gold.mean():.2f} against {other.mean():.2f})",
            found.where,
            "paired by seed, t interval of ABC - sparse in the second model's mean score over all evaluations",
        ),
    ]


def _credit_quality(study: Study) -> Verdict:
    claim = Claim("ABC's gain follows the quality of the attention it reads", f"{NO_FIGURE}: the paper does not ask")
    why = "needs ABC and sparse on two reward models of measured credit quality: tokenmdp ablate --preset faithful"
    for grid in ("faithful", "custom"):
        groups, quality = {}, {}
        for pair in family(study, grid, ("attention", "sparse"), ("reward_model",)):
            model = pair[0][0].cell.settings.reward_model
            if (row := outcomes.credit_quality(study, model)) is not None:
                groups[model], quality[model] = pair, Estimate(*row["spearman"])
        if len(groups) < 2:
            continue
        order = sorted(groups, key=lambda model: quality[model].value)
        models = order[-1], order[0]  # the most and the least faithful
        rows = outcomes.paired(*groups[models[0]], *groups[models[1]])
        gains = [np.mean([outcomes.area(row[sparse]) - outcomes.start(row[sparse]) for row in rows] or 0)
                 for sparse in (1, 3)]  # fmt: skip
        if min(gains) <= 0:
            why = f"sparse gains nothing on one of {models[0]} and {models[1]}, or no seed has all four cells"
            continue
        areas = outcomes.areas(rows)  # (R, 4)
        shares = [(areas[:, 0] - areas[:, 1]) / gains[0], (areas[:, 2] - areas[:, 3]) / gains[1]]
        ours = " and ".join(
            f"{share.mean():+.0%} on {model} (rank correlation {quality[model].value:.2f})"
            for share, model in zip(shares, models, strict=True)
        )
        verdict = claim.decide(
            paired_difference(*shares),
            len(rows),
            ours,
            where_of(study, grid, f"{models[0]} and {models[1]}", len(rows)),
            # Reward models differ in scale, so the advantage is taken as a share.
            "(ABC - sparse) in mean score as a share of sparse's mean gain, most - least faithful reward model, paired "
            "by seed, t interval",
        )
        if quality[models[0]].low <= quality[models[1]].high:
            return _undecided(verdict, "the models' rank correlations with leave-one-out do not differ")
        return verdict
    return claim.missing(why)
