"""How often comparisons that were held out are predicted, beside the ceiling that the labels' own noise sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tokenmdp.intervals import Estimate, bootstrap_interval
from tokenmdp.preferences import Comparison, ceiling, pairs_of
from tokenmdp.report import calibration
from tokenmdp.wording import count

WORDS = {
    "accuracy": "the model prefers the preferred response",
    "ceiling": "at most, with labels as noisy as these",
    "order": "in the judge's own order",
}


class Scorer(Protocol):
    """What has learned from comparisons."""

    @property
    def coin_flips(self) -> float | None:
        """The share of labels that it takes for coin flips; None: its scores are not log-odds of the labels."""

    def score_pairs(self, pairs: Sequence[Comparison]) -> torch.Tensor:
        """Scores of chosen and rejected responses; (n, 2) float32 on the CPU."""


@dataclass(frozen=True)
class Judged:
    """What a model says about held-out pairs."""

    gaps: np.ndarray  # (n,) score of the chosen response less that of the rejected one
    chances: np.ndarray  # (k,) P that the annotator prefers the chosen one, of the pairs that say so
    order: np.ndarray  # (n,) the same difference of the judge's own scores; NaN where there are none

    def table(self) -> dict[str, Estimate]:
        """Accuracy, its ceiling, and how often the judge's own order is met."""
        rows = {"accuracy": bootstrap_interval(_right(self.gaps))}
        if len(self.chances):
            best = ceiling(self.chances)
            rows["ceiling"] = Estimate(best, -math.inf, math.inf)
        known = ~np.isnan(self.order) & (self.order != 0)
        if known.any():
            rows["order"] = bootstrap_interval(_right(self.gaps[known] * np.sign(self.order[known])))
        return rows


def judged(scorer: Scorer, records: Sequence[Any]) -> Judged:
    """Score held-out pairs with a model as it is."""
    pairs: list[Comparison] = pairs_of(records)
    scores = scorer.score_pairs(pairs)
    order = [
        math.nan if pair.score_chosen is None or pair.score_rejected is None
        else pair.score_chosen - pair.score_rejected
        for pair in pairs
    ]  # fmt: skip
    chances = [pair.probability for pair in pairs if pair.probability is not None]
    return Judged((scores[:, 0] - scores[:, 1]).numpy(), np.array(chances), np.array(order))


def report_held_out(
    scorer: Scorer, records: Sequence[Any], report: Path, console: Console
) -> tuple[dict[str, Any], list[tuple[str, Path]]]:
    """Print the table of held-out pairs and draw their calibration.

    Returns:
        What the run's summary holds of it, and the figures by name.
    """
    if not records:
        console.print("nothing was held out, so there is no accuracy to report (--held-out)")
        return {}, []
    found = judged(scorer, records)
    rows = found.table()
    table = Table(title=count(len(found.gaps), "held-out pair"), title_justify="left")
    table.add_column("")
    table.add_column("share of pairs [95% interval]", justify="right")
    for key, number in rows.items():
        table.add_row(WORDS[key], str(number))
    console.print(table)
    files, shown = [], {}
    if scorer.coin_flips is not None:
        bins = calibration.bins(found.gaps, error_rate=scorer.coin_flips)
        shown["calibration"] = [one._asdict() | {"observed": one.observed._asdict()} for one in bins]
        if bins:
            files.append(("calibration", calibration.plot(bins, len(found.gaps), report / "calibration.png")))
        else:
            console.print(f"fewer than {calibration.FEWEST} held-out pairs: too few to draw their calibration")
    shares = {key: {"value": one.value} if math.isinf(one.low) else one._asdict() for key, one in rows.items()}
    return {"pairs": len(found.gaps), **shares, **shown}, files


def _right(gaps: np.ndarray) -> np.ndarray:
    return (gaps > 0) + (gaps == 0) / 2
