"""Studies made of formulas: cells with courses that a test chooses, written as the real ones are.

path = synthetic_study(tmp_path, grids=("imdb",), seeds=5, course=lambda cell: Course(end=9.0 + cell.seed))
study = load_study(path)
"""

import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tokenmdp.evaluation.credit_quality import METRICS, AttentionVerdict, MethodQuality, WorldQuality
from tokenmdp.evaluation.credit_quality.measure import CONTROLS
from tokenmdp.evaluation.credit_quality.tables import record
from tokenmdp.intervals import Estimate
from tokenmdp.report.samples import Sample
from tokenmdp.runs.credit_options import default_beta
from tokenmdp.runs.settings import RunSettings
from tokenmdp.study.directory import declare
from tokenmdp.study.grid import CRITICS, critic_config
from tokenmdp.study.report import page
from tokenmdp.study.results import Cell, CellResult, cell_file, write_result

METHODS = ("sparse", "uniform", "attention", "abc-d", "abc-d2", "red")
GRIDS = ("imdb", "beta", "length", "kl", "critic", "faithful")
LENGTHS = {"8-16 tokens": (8, 15), "20-30 tokens": (20, 29), "40-60 tokens": (40, 59)}
SHORT = "8-16 tokens"
TEXT = "this film is a quiet , well acted and moving story that stays with you long after it ends"


@dataclass(frozen=True)
class Course:
    """The course of one run: the score rises from start to end and covers half the distance in half updates."""

    start: float = 1.0
    end: float = 9.5
    half: float = 20.0
    noise: float = 0.35  # of one update
    spread: float = 0.15  # of a seed's whole curve
    kl: float = 15.0  # reached at the end, nats
    gold: float = 6.0  # where the gold score would end if it rose all the way
    turn: float = 2.0  # the gold score turns at this share of the run; above 1 it never does
    collapse: float = 2.0  # from this share of the run the score falls to 0; above 1 it never does
    collapsed_kl: float = 450.0  # that a collapse adds; a policy that puts all on a few words is far from the reference
    distinct: float = 0.5  # distinct-2 at the end
    explained: float = 0.7  # of the returns' variance, at the end


SPEED = {"sparse": 20.0, "uniform": 24.0, "attention": 9.5, "abc-d": 20.5, "abc-d2": 19.0, "red": 8.5}
ENDS = {"sparse": 9.5, "uniform": 9.2, "attention": 9.8, "abc-d": 9.3, "abc-d2": 9.4, "red": 9.9}
KLS = {"sparse": 15.5, "uniform": 14.2, "attention": 18.7, "abc-d": 15.0, "abc-d2": 15.2, "red": 19.5}


def paper_like(cell: Cell) -> Course:
    """A course with about the paper's numbers."""
    settings, credit = cell.settings, cell.settings.credit
    speed, end, kl = SPEED[credit], ENDS[credit], KLS[credit]
    if credit == "attention":
        speed = SPEED["sparse"] + (settings.credit_beta / 0.8) * (speed - SPEED["sparse"])
    if settings.reward_model == "imdb-plain" and credit == "attention":
        speed, end = SPEED["uniform"], ENDS["uniform"]
    if settings.horizon_range and settings.horizon_range[0] > 8:
        end += 0.2 if credit == "attention" else 0.0 if credit in ("red", "uniform") else -0.6
    collapses = bool(settings.horizon_range) and settings.horizon_range[0] >= 40 and credit == "sparse"
    if "kl_target" in settings.config and settings.config["kl_target"] is None:
        factor = (0.2 / settings.config["kl_coef"]) ** 0.5
        end, kl = end * (0.75 + 0.25 * factor), kl * factor
    return Course(
        end=end, half=speed, kl=kl, gold=5.9 - 0.05 * kl + 0.05 * speed, turn=0.7 if credit == "red" else 2.0,
        collapse=0.6 if collapses and cell.seed == 2 else 2.0, distinct=0.62 - 0.012 * kl,
    )  # fmt: skip


def base_settings(**changes: object) -> RunSettings:
    """The protocol's settings on the bundled models."""
    given = {
        "env": "TextGen-IMDb-v0", "policy": "imdb-tiny", "tokenizer": "imdb-tiny", "reward_model": "imdb-tiny",
        "prompts": "imdb-tiny", "eval_prompts": None, "max_new_tokens": 15, "min_new_tokens": 8,
        "horizon_range": (8, 15), "num_envs": 16, "config": {"learning_rate": 1e-4, "kl_coef": 0.2, "kl_target": 6},
    }  # fmt: skip
    return RunSettings(**(given | changes))


def make_cell(
    method: str = "attention", seed: int = 1, setting: str = SHORT, updates: int = 150, label: str | None = None,
    **changes: object,
) -> Cell:  # fmt: skip
    """One cell; ``changes`` are fields of its settings."""
    settings = base_settings(**({"credit_beta": default_beta(method)} | changes), credit=method, seed=seed)
    return Cell(label or method, seed, setting, settings, updates, "imdb-gold", max(1, updates // 15), 64)


def grid_cells(grid: str, seeds: int, updates: int) -> list[Cell]:
    """The cells of a grid, as the presets have them but with the given numbers of seeds and updates."""
    cells = []
    for seed in range(1, seeds + 1):
        if grid in ("imdb", "quick"):
            methods = METHODS if grid == "imdb" else ("sparse", "uniform", "attention", "red")
            cells += [make_cell(method, seed, updates=updates) for method in methods]
        elif grid == "beta":
            for beta in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
                label = f"attention credit_beta={beta:g}"
                cells.append(make_cell("attention", seed, updates=updates, label=label, credit_beta=beta, num_envs=8))
        elif grid == "length":
            for name, (least, most) in LENGTHS.items():
                given = {"horizon_range": (least, most), "min_new_tokens": least, "max_new_tokens": most}
                cells += [make_cell(method, seed, name, updates, **given) for method in METHODS]
        elif grid == "kl":
            for coef in (0.05, 0.1, 0.2, 0.4):
                config = {"learning_rate": 1e-4, "kl_coef": coef, "kl_target": None}
                setting = f"{SHORT}, kl_coef={coef:g}"
                cells += [make_cell(method, seed, setting, updates, config=config) for method in
                          ("sparse", "uniform", "attention", "red")]  # fmt: skip
        elif grid == "faithful":
            for model in ("imdb-tiny", "imdb-plain"):
                setting = f"{SHORT}, reward model {model}"
                cells += [make_cell(method, seed, setting, updates, reward_model=model) for method in
                          ("sparse", "uniform", "attention", "red")]  # fmt: skip
        elif grid == "critic":
            for critic in CRITICS:
                config = {"learning_rate": 1e-4, "kl_coef": 0.2, "kl_target": None}
                config |= critic_config(critic, config)
                setting = f"{SHORT}, critic={critic}"
                cells += [make_cell(method, seed, setting, updates, config=config) for method in
                          ("sparse", "attention", "red")]  # fmt: skip
        else:
            raise ValueError(f"no grid {grid!r}")
    return cells


def make_result(cell: Cell, course: Course) -> CellResult:
    """The result of a cell with this course; cells that compute the same have the same noise."""
    settings = cell.settings
    of = (
        settings.credit,
        settings.credit_beta,
        settings.horizon_range,
        settings.reward_model,
        settings.config,
        cell.seed,
    )
    rng = np.random.default_rng(zlib.crc32(repr(of).encode()))
    level = rng.normal(0, course.spread)
    updates = np.arange(1, cell.updates + 1)
    metrics = _columns(cell, course, updates, level)
    noise = rng.normal(0, 1, (3, cell.updates))
    metrics["score_mean"] = metrics.pop("score") + course.noise * noise[0]
    metrics["kl"] = metrics["kl"] * (1 + 0.05 * noise[1])
    kl_coef = np.full(cell.updates, settings.config["kl_coef"])
    metrics |= {
        "update": updates, "entropy": 4.3 - 0.05 * metrics["kl"], "kl_coef": kl_coef,
        "learning_rate": np.full(cell.updates, 1e-4), "approx_kl": np.full(cell.updates, 0.01),
        "clip_fraction": np.full(cell.updates, 0.08), "response_length": 11.5 + 0.2 * noise[2],
        "explained_variance": course.explained * (1 - 0.5 ** (updates / 15)) + 0.02 * noise[2],
    }  # fmt: skip
    if settings.credit in ("attention", "abc-d", "abc-d2"):
        metrics |= {
            "attention_mass": 0.6 + 0.02 * noise[2], "attention_entropy": 0.8 + 0.01 * noise[2],
            "credit_fallback": np.zeros(cell.updates),
        }  # fmt: skip
    at = np.unique([0, *range(cell.eval_every, cell.updates, cell.eval_every), cell.updates])
    evaluations = _columns(cell, course, at, level)
    share = at / cell.updates
    rise = evaluations["score"] - course.start
    gold = course.gold * np.maximum(rise / max(course.end, 1e-9), 0) ** 0.7
    evaluations["gold"] = gold - np.where(share > course.turn, (share - course.turn) * course.gold, 0)
    fall = np.clip(evaluations["kl"] / max(course.kl, 1e-9), 0, 1)
    distinct = np.where(share > course.collapse, 0.05, 0.72 + (course.distinct - 0.72) * fall)
    evaluations |= {
        "update": at, "distinct_1": 0.6 * distinct, "distinct_2": distinct, "distinct_3": np.minimum(1, 1.3 * distinct),
        "self_bleu": 0.12 + 0.5 * (0.72 - distinct), "perplexity": 62 - 22 * fall,
        "response_length": np.full(len(at), 11.5), "ended_by_eos": np.full(len(at), 0.04),
    }  # fmt: skip
    plain = [{key: [float(value) for value in column] for key, column in columns.items()}
             for columns in (metrics, evaluations)]  # fmt: skip
    versions = {"python": "3.11.9", "tokenmdp": "0.1.0", "torch": "2.13.0"}
    return CellResult(cell, *plain, make_samples(cell, evaluations["score"][-1]), 131.5, versions)


def _columns(cell: Cell, course: Course, updates: np.ndarray, level: float) -> dict[str, np.ndarray]:
    share = updates / cell.updates
    way = 1 - 0.5 ** (updates / course.half)
    score = course.start + (course.end - course.start + level) * way
    fallen = np.clip((share - course.collapse) / 0.1, 0, 1)
    return {"score": score * (1 - fallen), "kl": course.kl * way**1.5 + course.collapsed_kl * fallen}


def make_samples(cell: Cell, score: float) -> list[Sample]:
    """Eight texts whose credit sums to their score."""
    rng = np.random.default_rng(cell.seed)
    samples = []
    for place in range(8):
        pieces = [f" {word}" for word in TEXT.split()[place : place + 9 + place % 4]]
        weights = np.zeros(len(pieces))
        if cell.settings.credit == "sparse":
            weights[-1] = 1
        elif cell.settings.credit == "uniform":
            weights[:] = 1 / len(pieces)
        else:
            weights = rng.dirichlet(np.full(len(pieces), 0.6))
        own = score + rng.normal(0, 0.5)
        facts = {"kl": float(abs(rng.normal(15, 2))), "gold": 0.6 * own}
        samples.append(Sample("I saw <b>it</b> &", pieces, (own * weights).tolist(), float(own), facts))
    return samples


def quality_record(model: str, methods: Sequence[str] = METHODS) -> dict:
    """The record of a reward model whose row is faithful, or, for imdb-plain, unrelated to the score's causes."""
    faithful = model != "imdb-plain"
    row = 0.57 if faithful else 0.05
    values = {"reference": 1.0, "random": 0.0, "sparse": 0.1, "uniform": 0.0, "attention": row, "abc-d": 0.12,
              "abc-d2": 0.1, "red": 0.58}  # fmt: skip
    qualities = [
        MethodQuality(method, [], texts=100, reward_forwards=1.0,
                      metrics={name: Estimate(values[method], values[method] - 0.04, values[method] + 0.04)
                               for name in METRICS})
        for method in (*CONTROLS, *methods)
    ]  # fmt: skip
    verdict = AttentionVerdict(Estimate(row, row - 0.03, row + 0.03), 0.79 if faithful else 0.95, 0.8, 0.0, 100)
    world = SimpleNamespace(
        name=f"model {model}", description=f"texts of imdb-tiny, scored by {model}", reference="leave-one-out",
        episodes=SimpleNamespace(input_ids=range(100)),
    )  # fmt: skip
    return record([WorldQuality(world, qualities, verdict, {})], {"reward_model": model})


def synthetic_study(
    path: Path,
    *,
    grids: Sequence[str] = GRIDS,
    seeds: int = 5,
    updates: int = 150,
    course: Callable[[Cell], Course] = paper_like,
    keep: Callable[[Cell], bool] = lambda cell: True,
    crashed: Callable[[Cell], bool] = lambda cell: False,
    quality: Sequence[str] = ("imdb-tiny", "imdb-plain"),
    change: Callable[[CellResult], CellResult] = lambda result: result,
) -> Path:
    """Write a study directory and return it.

    Args:
        path: the directory; may hold a study, which grows.
        grids: names of `GRIDS`, or quick.
        seeds: of every grid, 1 to this.
        updates: of every cell.
        course: how each cell goes.
        keep: False for a cell that is declared but not finished.
        crashed: True for a cell that left an error instead.
        quality: reward models whose credit quality was measured.
        change: applied to every result before it is written.
    """
    path = Path(path)
    for grid in grids:
        cells = grid_cells(grid, seeds, updates)
        declare(path, grid, cells, {"preset": grid, "seeds": list(range(1, seeds + 1)), "updates": updates})
        for cell in cells:
            if crashed(cell):
                trace = cell_file(path, cell.id, ".error.txt")
                trace.parent.mkdir(parents=True, exist_ok=True)
                trace.write_text("Traceback (most recent call last):\nMemoryError: 8.0 GiB for the <logits>\n")
            elif keep(cell):
                write_result(path, change(make_result(cell, course(cell))))
    for model in quality:
        (path / "quality").mkdir(exist_ok=True)
        (path / "quality" / f"{model}.json").write_text(json.dumps(quality_record(model)))
    return path


@contextmanager
def figures_not_drawn():
    """Reports are written with empty figures: drawing takes most of the time."""

    def empty(figure, folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").touch()
        return f'<svg id="{name}"></svg>'

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write_figure", empty)
        yield
