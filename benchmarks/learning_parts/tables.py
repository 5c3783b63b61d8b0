"""Tables of the results, as people read them and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from speed_parts.timing import ratio_interval

from learning_parts.engines import Record
from learning_parts.race import WINDOW, Reached, reached
from learning_parts.results import CurveResult, RaceResult, protocol_of
from tokenmdp.intervals import Estimate, mean_interval
from tokenmdp.wording import count

COLUMNS = {"score": "score", "kl": "KL", "objective": "objective", "explained_variance": "explained variance"}
BLOCK = 10  # updates in a row of the table of curves

Curves = dict[str, dict[int, list[Record]]]  # engine -> seed -> records


class Table(NamedTuple):
    """Headings, rows of texts, and what to say about them."""

    title: str
    note: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """With the note above it."""
        lines = [self.headings, ("---",) * len(self.headings), *self.rows]
        return "\n".join([self.note, "", *("| " + " | ".join(line) + " |" for line in lines)])


def finished(results: Sequence[CurveResult]) -> Curves:
    """The records of all runs that are finished, in the order of ``results``."""
    curves: Curves = {}
    for result in results:
        if result.finished:
            curves.setdefault(result.run.engine.name, {})[result.run.seed] = result.records
    return curves


def blocks(updates: int) -> list[tuple[int, int]]:
    """First and last update of each row.

    >>> blocks(25)
    [(1, 10), (11, 20), (21, 25)]
    """
    return [(first, min(first + BLOCK - 1, updates)) for first in range(1, updates + 1, BLOCK)]


def block_mean(records: Sequence[Record], key: str, block: tuple[int, int]) -> float:
    """The mean of a number over the updates of a block."""
    return float(np.mean([record[key] for record in records[block[0] - 1 : block[1]]]))


def paired_difference(
    curves: Mapping[int, Sequence[Record]], base: Mapping[int, Sequence[Record]], key: str, block: tuple[int, int]
) -> Estimate | None:
    """The mean over the seeds of both of what ``curves`` has more than ``base`` in a block; None: no seed in common."""
    seeds = sorted(curves.keys() & base.keys())
    if not seeds:
        return None
    return mean_interval([block_mean(curves[seed], key, block) - block_mean(base[seed], key, block) for seed in seeds])


def curve_table(results: Sequence[CurveResult]) -> Table:
    """Score, KL, objective and explained variance by tens of updates, and the first engine's objective taken off.

    Raises:
        ResultError: the runs differ in their protocols.
    """
    curves, protocol = finished(results), protocol_of(results)
    names = list(curves)
    rows = []
    for block in blocks(protocol.updates):
        for name in names:
            means = {
                key: mean_interval([block_mean(records, key, block) for records in curves[name].values()])
                for key in COLUMNS
            }
            base = {} if name == names[0] else curves[names[0]]
            less = paired_difference(curves[name], base, "objective", block)
            rows.append((f"{block[0]} to {block[1]}", name, *map(shown, means.values()), shown(less) if less else ""))
    seeds = "; ".join(f"{name}: {', '.join(map(str, sorted(found)))}" for name, found in curves.items())
    left = [f"{result.run.name} ({len(result.records)} updates)" for result in results if not result.finished]
    note = (
        f"Means over seeds ({seeds}) with their 95% intervals (Student's t). KL in nats per sequence; objective = "
        f"score - {protocol.kl_coef} * KL. The last column is the mean of the differences between equal seeds."
        + (f" Not finished and left out: {', '.join(left)}." if left else "")
    )
    difference = f"objective, difference from {names[0]}"
    return Table("Learning by updates", note, ("updates", "engine", *COLUMNS.values(), difference), rows)


def race_table(results: Sequence[RaceResult]) -> Table:
    """Seconds and updates until each target, and the first side's seconds over those of each."""
    names, targets = list(results[0].runs), results[0].targets
    seeds = ", ".join(str(result.seed) for result in results)
    rows = []
    for target in targets:
        found = {name: [reached(result.records[name], target) for result in results] for name in names}
        for name in names:
            pairs = zip(found[names[0]], found[name], strict=True)
            both = list(zip(found[name], results, strict=True))
            ratios = [base.seconds / own.seconds if base and own else None for base, own in pairs]
            known = [ratio for ratio in ratios if ratio is not None]
            row = [
                f"{target:g}",
                name,
                listed([own and f"{own.seconds:.0f}" for own in found[name]]),
                listed([own and str(own.update) for own in found[name]]),
                listed([own and f"{window_kl(result.records[name], own):.1f}" for own, result in both]),
            ]
            if name == names[0]:
                row += ["", ""]
            else:
                # Without the seeds that did not reach it the mean would be of the lucky ones.
                mean = shown(ratio_interval(known, np.ones(len(known)))) if len(known) == len(ratios) else ""
                row += [listed([None if ratio is None else f"{ratio:.2f}" for ratio in ratios]), mean]
            rows.append(tuple(row))
    note = (
        f"Seconds of a side's own updates until the mean score of {WINDOW} consecutive updates reaches the target, and "
        f"how many updates that took, with the mean KL of these {WINDOW} updates, nats per sequence (larger steps may "
        f"spend more of it); seeds {seeds}, in this order. The last column is the geometric mean with its 95% "
        f"interval (Student's t on the logarithms). At most {results[0].runs[names[0]].protocol.updates} updates."
    )
    ratio = f"{names[0]} / side"
    return Table(
        "Time to a score", note, ("mean score", "side", "seconds", "updates", "KL", ratio, f"{ratio}, mean"), rows
    )


def window_kl(records: Sequence[Record], at: Reached) -> float:
    """The mean KL over the updates whose mean score reached the target."""
    return float(np.mean([record["kl"] for record in records[at.update - WINDOW : at.update]]))


def described(machine: Mapping[str, Any]) -> str:
    """A line about where the results were made."""
    ours = f"torch {machine['torch']}, transformers {machine['transformers']}"
    versions = machine["trl_versions"]
    theirs = (
        f"; TRL {versions['trl']} with torch {versions['torch']}, transformers {versions['transformers']}"
        if versions
        else ""
    )
    return (
        f"{machine['cpu']}, {count(machine['threads'], 'thread')} of {count(machine['cores'], 'core')}, our default "
        f"dtype {machine['default_dtype']}, {ours}{theirs}"
    )


def shown(interval: Estimate) -> str:
    """The mean with its interval; of a single seed the mean alone.

    >>> shown(Estimate(1.0, 0.5, 1.5)), shown(Estimate(1.0, -math.inf, math.inf))
    ('1.00 [0.50, 1.50]', '1.00')
    """
    return str(interval) if math.isfinite(interval.high) else str(interval).partition(" ")[0]


def listed(numbers: Sequence[str | None]) -> str:
    """One per seed.

    >>> listed(["61", None])
    '61, not reached'
    """
    return ", ".join(number or "not reached" for number in numbers)
