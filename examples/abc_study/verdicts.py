"""The paper's claims against a study: our figure, its 95% interval, and the verdict that the interval gives.

The paper is Chan, Sun, Holt and van der Schaar, "Dense reward for free in RLHF" (2024); its figures were read from it
or recomputed from the learning curves that its authors published. Here are the claims about one setting; those about
several are in `sweeps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from abc_study.claims import (
    INCONCLUSIVE,
    NO_FIGURE,
    NOT_REPRODUCED,
    PAPER_LENGTH,
    REPRODUCED,
    Claim,
    Verdict,
    find,
    needs,
)
from abc_study.equal_kl import leads_at_equal_kl, leads_over_coefficients
from abc_study.sweeps import collapses, follows_credit_quality, grows_with_length, rises_with_beta

from tokenmdp.study import outcomes
from tokenmdp.study.directory import Study
from tokenmdp.study.labels import NAMES
from tokenmdp.study.results import CellResult
from tokenmdp.study.statistics import (
    FEWEST_RESAMPLED,
    mean_difference,
    overtaking,
    p_of_resamples,
    paired_difference,
)

FEWEST_EVALUATIONS = 4  # the first is the start, and thirds of the others are compared
FIRST_STEPS = "steps 0 to 100 of its 151"  # that the paper's means are over
FIRST_UPDATES = 101  # the same window


def verdicts(study: Study) -> list[Verdict]:
    """Every claim, decided or with what is missing."""
    above = "paired by seed, t interval of {} - {} in mean score over all updates"
    pairs = [
        (
            "attention",
            "sparse",
            Claim("ABC above sparse over training", f"8.32 +- .16 against 7.22 +- .39, {FIRST_STEPS}"),
        ),
        (
            "attention",
            "uniform",
            Claim("ABC above uniform over training", f"8.32 +- .16 against 6.60 +- .19, {FIRST_STEPS}"),
        ),
        (
            "sparse",
            "uniform",
            Claim("uniform below sparse on short texts", f"6.60 +- .19 against 7.22 +- .39, {FIRST_STEPS}"),
        ),
    ]
    return [
        _primary(study),
        _fewer_steps(study),
        *(_compare(study, claim, left, right, outcomes.area, above) for left, right, claim in pairs),
        _between(study, "abc-d", f"6.60 uniform, 6.89 +- .37 ABC-D, 8.32 ABC, {FIRST_STEPS}"),
        _between(study, "abc-d2", f"6.60 uniform, 7.10 +- .22 ABC-D2, 8.32 ABC, {FIRST_STEPS}"),
        rises_with_beta(study),
        grows_with_length(study),
        collapses(study),
        _compare(
            study,
            Claim("ABC spends more KL than uniform", "18.7 against 14.2 nats at the end"),
            "attention",
            "uniform",
            lambda result: outcomes.last_tenth(result, "kl"),
            "paired by seed, t interval of {} - {} in KL over the last tenth of the updates, nats a response",
        ),
        *leads_at_equal_kl(study),
        leads_over_coefficients(study),
        *_gold(study),
        follows_credit_quality(study),
        _compare(
            study,
            Claim("RED above ABC", f"{NO_FIGURE}: not the paper's claim, but ours"),
            "red",
            "attention",
            outcomes.area,
            above,
            None,
        ),
    ]


def _primary(study: Study) -> Verdict:
    """The paper's main claim, over its own window: the one that counts without a correction."""
    claim = Claim(
        f"primary: ABC above sparse over the first {FIRST_UPDATES} updates",
        f"8.32 +- .16 against 7.22 +- .39, {FIRST_STEPS}",
    )
    what = f"paired by seed, t interval of {{}} - {{}} in mean score over the first {FIRST_UPDATES} updates"
    return _compare(
        study, claim, "attention", "sparse", lambda result: outcomes.early_area(result, FIRST_UPDATES), what
    )


def _compare(
    study: Study,
    claim: Claim,
    left: str,
    right: str,
    measure: Callable[[CellResult], float],
    what: str,
    length: tuple[int, int] | None = PAPER_LENGTH,
) -> Verdict:
    """Is ``left`` above ``right``?"""
    if (found := find(study, (left, right), length)) is None:
        return claim.missing(needs((left, right)))
    values, baseline = (np.array([measure(result) for result in group]) for group in found.groups)
    ours = f"{(values - baseline).mean():+.2f} ({values.mean():.2f} against {baseline.mean():.2f})"
    if measure is outcomes.area:
        end, other = (np.array([outcomes.last_tenth(result) for result in group]) for group in found.groups)
        ours += f"; in the last tenth {mean_difference(end - other)}"
    what = what.format(NAMES[left], NAMES[right])
    return claim.decide(paired_difference(values, baseline), len(values), ours, found.place, what)


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
        "percentile bootstrap over seeds; on a plateau sparse's maximum is a peak of noise, which ABC has to pass "
        "too: that leans against the claim"
    )
    return claim.decide(
        result.share,
        len(own),
        ours,
        found.place,
        what,
        threshold=0.5,
        below=True,
        fewest=FEWEST_RESAMPLED,
        p=p_of_resamples(result.resampled, 0.5) if result.resampled.size else None,
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
    when = ("both lie above 0", "one lies below 0")
    decided = [claim.decide(part, len(low), ours, found.place, what, when=when) for part in parts]
    outcome = {verdict.verdict for verdict in decided}
    # Both must hold, so the larger p counts; that one fails has two ways to come about by chance, so twice its p does.
    ps = [verdict.p for verdict in decided if verdict.p is not None]
    fails = [2 * verdict.p for verdict in decided if verdict.p is not None and verdict.verdict == NOT_REPRODUCED]
    return Verdict(
        claim.says,
        paper,
        ours,
        "; ".join(verdict.interval for verdict in decided if verdict.interval),
        next(verdict for verdict in (NOT_REPRODUCED, INCONCLUSIVE, REPRODUCED) if verdict in outcome),
        decided[0].rule,
        found.place.text,
        decided[0].refuted,
        min(1.0, *fails) if fails else max(ps, default=None),
    )


def _gold(study: Study) -> list[Verdict]:
    open_question = f"{NO_FIGURE}: the paper leaves over-optimisation open"
    rises = Claim("ABC raises the score of a second reward model, which trains no policy", open_question)
    holds = Claim("ABC: the second model's score still rises in the last third", open_question)
    above = Claim("ABC above sparse for the second reward model", open_question)
    found = find(study, ("attention", "sparse"), length=None)
    if found is None:
        return [claim.missing(needs(("attention", "sparse"))) for claim in (rises, holds, above)]
    scored = [len(result.evaluations.get("gold", ())) for group in found.groups for result in group]
    if min(scored) < FEWEST_EVALUATIONS:
        why = (
            f"needs {FEWEST_EVALUATIONS} evaluations or more of each run; lower --eval-every"
            if min(scored)
            else "needs a second reward model: --gold"
        )
        return [claim.missing(why) for claim in (rises, holds, above)]
    (_, gold), (_, other) = (outcomes.evaluation_curves(group, "gold") for group in found.groups)
    evaluations = min(len(gold[0]), len(other[0]))
    gold, other = gold[:, :evaluations], other[:, :evaluations]
    proxy = outcomes.evaluation_curves(found.groups[0], "score")[1][:, :evaluations]
    on = f"on one draw of {found.groups[0][0].cell.eval_samples} held-out prompts, which the interval takes as given"
    seeds, third = len(gold), (evaluations - 1) // 3
    late, middle = _late(gold, third), _late(gold, third, 1)
    own = _late(proxy, third) - _late(proxy, third, 1)
    gain = gold[:, -1] - gold[:, 0]
    return [
        rises.decide(
            paired_difference(gold[:, -1], gold[:, 0]),
            seeds,
            f"{gain.mean():+.2f}; the score trained on, in its own units, {(proxy[:, -1] - proxy[:, 0]).mean():+.2f}",
            found.place,
            f"second model's score {on}, end - start, t interval over seeds",
        ),
        holds.decide(
            paired_difference(late, middle),
            seeds,
            f"{(late - middle).mean():+.2f}; the score trained on {own.mean():+.2f}",
            found.place,
            f"second model's score {on}, last third of the evaluations - middle third, t interval over seeds",
        ),
        above.decide(
            paired_difference(gold.mean(1), other.mean(1)),
            seeds,
            f"{(gold.mean(1) - other.mean(1)).mean():+.2f} ({gold.mean():.2f} against {other.mean():.2f})",
            found.place,
            f"paired by seed, t interval of ABC - sparse in the second model's mean score over all evaluations, {on}",
        ),
    ]


def _late(curves: np.ndarray, length: int, earlier: int = 0) -> np.ndarray:
    """Means (R,) of the last ``length`` values of curves (R, K), or of as many values that many times earlier."""
    end = curves.shape[1] - earlier * length
    return curves[:, end - length : end].mean(1)
