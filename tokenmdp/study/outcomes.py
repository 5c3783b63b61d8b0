"""One number per finished cell, and cells side by side: the basis of tables, verdicts and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from tokenmdp.runs.settings import settings_record
from tokenmdp.study.directory import Study
from tokenmdp.study.results import Cell, CellResult
from tokenmdp.study.statistics import trailing_mean

BASELINE = "sparse"  # the baseline that every method is compared with
WINDOW = 5  # updates in a trailing mean, before a level is looked for
TENTH = 10
KEPT = 0.5  # a run that ends with less of its gain than this has collapsed
LEAST_GAIN = 5.0  # standard errors of a trailing mean, since the highest of many is above the start by noise alone
LENGTH = ("horizon_range", "min_new_tokens", "max_new_tokens")  # what a family of lengths differs in
KL_COEF = ("kl_coef",)
REWARD_MODEL = ("reward_model",)
CRITIC = ("vf_learning_rate", "value_model")
Groups: TypeAlias = Mapping[str, Sequence[CellResult]]  # method -> its seeds


def critic_of(cell: Cell) -> tuple[object, ...]:
    """What tells the cell's critic from another one."""
    return tuple(cell.settings.config.get(name) for name in CRITIC)


def area(result: CellResult) -> float:
    """Area under the learning curve: the mean over updates of the mean score of the update's episodes."""
    return float(np.mean(result.metrics["score_mean"]))


def early_area(result: CellResult, updates: int) -> float:
    """`area` of the first ``updates`` updates."""
    return float(np.mean(result.metrics["score_mean"][:updates]))


def areas(rows: Sequence[Sequence[CellResult]]) -> np.ndarray:
    """`area` of every cell: rows of n cells, (R, n)."""
    return np.array([[area(result) for result in row] for row in rows])


def last_tenth(result: CellResult, key: str = "score_mean") -> float:
    """Mean of a metric over the last tenth of the updates, rounded up: where training ended."""
    values = result.metrics[key]
    return float(np.mean(values[-(-len(values) // TENTH) * -1 :]))


def start(result: CellResult) -> float:
    """The score before training: of the evaluation at update 0, else of the first update's episodes."""
    evaluations = result.evaluations
    if evaluations.get("update") and evaluations["update"][0] == 0:
        return evaluations["score"][0]
    return result.metrics["score_mean"][0]


def kept_of_gain(result: CellResult) -> float:
    """The share of its highest gain (trailing mean less the start) that a run's last tenth has.

    nan with no gain beyond noise: `LEAST_GAIN` standard errors of a trailing mean, from the differences of updates.
    """
    scores, first = np.asarray(result.metrics["score_mean"]), start(result)
    window = window_for(len(scores))
    noise = float(np.diff(scores).std()) / math.sqrt(2 * window) if len(scores) > 1 else math.inf
    gain = float(trailing_mean(scores, window).max()) - first
    return (last_tenth(result) - first) / gain if gain > LEAST_GAIN * noise else math.nan


def collapsed(result: CellResult) -> bool:
    """Whether the run lost what it had gained: less than `KEPT` of it is left.

    A run with no gain beyond noise has not.
    """
    return kept_of_gain(result) < KEPT


def curves(results: Sequence[CellResult], key: str = "score_mean") -> tuple[np.ndarray, np.ndarray]:
    """Updates (K,) and a metric of every cell (R, K), cut to the shortest cell."""
    return _cut([result.metrics for result in results], key)


def evaluation_curves(results: Sequence[CellResult], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Updates (K,) and a column of the evaluations of every cell (R, K), cut to the shortest cell."""
    return _cut([result.evaluations for result in results], key)


def _cut(tables: Sequence[Mapping[str, Sequence[float]]], key: str) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(table[key]) for table in tables)
    updates = np.asarray(tables[0]["update"][:length], dtype=np.float64)
    return updates, np.array([table[key][:length] for table in tables], dtype=np.float64)


def window_for(updates: int) -> int:
    """`WINDOW`, or less for a curve so short that such a mean would leave little of it."""
    return max(1, min(WINDOW, updates // 8))


def by_seed(results: Sequence[CellResult]) -> dict[int, CellResult]:
    """Seed -> cell.

    Raises:
        ValueError: two cells of one seed, so they differ in something that their labels do not name.
    """
    cells = {result.cell.seed: result for result in results}
    if len(cells) != len(results):
        label = f"{results[0].cell.method!r} in {results[0].cell.setting!r}"
        raise ValueError(
            f"{label} has {len(results)} cells of {len(cells)} seeds: the labels do not say in what they differ; "
            "report the grids in directories of their own"
        )
    return cells


def paired(*groups: Sequence[CellResult]) -> list[tuple[CellResult, ...]]:
    """The cells of the seeds that all groups have, one tuple per seed, by seed."""
    columns = [by_seed(group) for group in groups]
    seeds = sorted(set(columns[0]).intersection(*columns[1:]))
    return [tuple(column[seed] for column in columns) for seed in seeds]


def length_of(cell: Cell) -> tuple[int, int]:
    """The shortest and the longest response that a cell may write."""
    settings = cell.settings
    return settings.horizon_range or (settings.max_new_tokens, settings.max_new_tokens)


def credit_quality(study: Study, reward_model: str) -> dict[str, Any] | None:
    """The record in ``quality/`` of a reward model's attention row: its level, entropy, mass and rank correlation.

    None if it was not measured, or the model shows no attention.
    """
    record: Mapping[str, Any] = study.quality.get(reward_model, {})
    rows = (world["attention"] for world in record.get("worlds", ()))
    return next((row for row in rows if row is not None), None)


def by_setting(study: Study, grid: str) -> dict[str, dict[str, list[CellResult]]]:
    """Setting -> method -> finished cells, under the grid's labels."""
    found: dict[str, dict[str, list[CellResult]]] = {}
    for (setting, method), results in study.select(grid).items():
        found.setdefault(setting, {})[method] = results
    return found


def family(settings: Mapping[str, Groups], varied: Sequence[str]) -> dict[str, Groups]:
    """The settings that differ in nothing but ``varied``; of several such families the largest."""
    first = {name: groups.get(BASELINE, next(iter(groups.values())))[0].cell for name, groups in settings.items()}
    return {name: settings[name] for name in alike(first, varied)}


def alike(cells: Mapping[str, Cell], varied: Sequence[str]) -> list[str]:
    """The names of the cells that differ in nothing but ``varied``; of several such families the largest."""
    families: dict[str, list[str]] = {}
    for name, cell in cells.items():
        families.setdefault(apart_from(cell, varied), []).append(name)
    return max(families.values(), key=len, default=[])


def apart_from(cell: Cell, names: Sequence[str]) -> str:
    """A cell's settings without its seed and some settings or options of its algorithm, to be compared."""
    left_out = {"seed", *names}
    record = settings_record(cell.settings)
    config = {key: value for key, value in record["config"].items() if key not in left_out}
    kept = {key: value for key, value in record.items() if key not in left_out}
    return json.dumps(kept | {"config": config, "updates": cell.updates}, sort_keys=True)
