"""Claims about methods that have spent the same KL."""

from __future__ import annotations

from itertools import pairwise

from abc_study.claims import (
    INCONCLUSIVE,
    NO_FIGURE,
    Claim,
    Verdict,
    cells_of,
    command,
    families,
    find,
    needs,
    place_of,
)

from tokenmdp.intervals import mean_interval
from tokenmdp.study import outcomes
from tokenmdp.study.directory import Study
from tokenmdp.study.equal_kl import EDGES, LEAST_SHARED, equal_kl, leads_in_bins, mean_leads
from tokenmdp.study.labels import NAMES
from tokenmdp.study.statistics import mean_difference
from tokenmdp.wording import count

PAIR = ("attention", "sparse")
PAIRS = (PAIR, ("attention", "uniform"), ("red", "attention"))  # the claim is that the first is above the second


def leads_at_equal_kl(study: Study) -> list[Verdict]:
    """Is one method above the other in the updates in which their runs have the same KL?"""
    return [_leads(study, *pair) for pair in PAIRS]


def _leads(study: Study, left: str, right: str) -> Verdict:
    paper = f"{NO_FIGURE}: the paper shows reward alone; asked of the first edition after its runs"
    claim = Claim(f"{NAMES[left]} above {NAMES[right]} at equal KL", paper)
    if (found := find(study, (left, right))) is None:
        return claim.missing(needs((left, right)))
    leads = leads_in_bins(*found.groups)
    seeds = mean_leads(leads)
    bins = f"{EDGES[0]:g} to {EDGES[-1]:g} nats"
    if not seeds.size:
        why = f"no seed has updates of both methods in one bin of {bins}"
        return Verdict(claim.says, claim.paper, "", "", INCONCLUSIVE, why, found.place.text)
    parts = [
        f"{low:g}-{high:g} nats {mean_difference(some) if (some := column[column == column]).size else 'none'}"
        f" ({len(some)})"
        for (low, high), column in zip(pairwise(EDGES), leads.T, strict=True)
    ]
    return claim.decide(
        mean_difference(seeds),
        len(seeds),
        f"{seeds.mean():+.2f}; in bins (seeds) {', '.join(parts)}",
        found.place,
        f"mean score of the updates whose KL lies in a bin, {NAMES[left]} - {NAMES[right]}, paired by seed; each "
        f"seed's mean over the bins of {bins} that both its runs visit; no run is left out; t interval over seeds",
    )


def leads_over_coefficients(study: Study) -> Verdict:
    """Is ABC above sparse where runs under several KL coefficients end at the same KL?"""
    claim = Claim("ABC above sparse at equal KL, where runs end", f"{NO_FIGURE}: the paper shows reward alone")
    for grid in ("kl", "custom"):
        settings = families(study, grid, PAIR, outcomes.KL_COEF)
        found = equal_kl(*zip(*settings, strict=True)) if len(settings) > 1 else None
        if found is None or not found.seeds:
            continue
        seeds = len(found.differences)
        place = place_of(study, grid, f"{len(settings)} KL coefficients", seeds, cells_of(study, grid, PAIR))
        left_out = f"; {count(found.collapsed, 'collapsed run')} left out" if found.collapsed else ""
        over = (
            f"the KL that all seeds of both methods cover, {found.shared:.0%} of what any covers (a decision needs "
            f"{LEAST_SHARED:.0%}){left_out}"
        )
        if not seeds:
            why = f"too little KL in common: compared is {over}; add KL coefficients to the grid"
            return Verdict(claim.says, claim.paper, "", "", INCONCLUSIVE, why, place.text)
        return claim.decide(
            mean_interval(found.differences),
            seeds,
            f"{found.differences.mean():+.2f} at the same KL, {seeds} of {count(found.seeds, 'seed')}",
            place,
            "scores and KL of the last tenth, interpolated between the coefficients; each seed's mean difference over "
            f"{over}; t interval over seeds",
        )
    return claim.missing(f"needs ABC and sparse at several KL coefficients under one seed: {command('kl')}")
