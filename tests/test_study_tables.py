"""Rows of the tables against the numbers that they are made of."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from study_doubles import SHORT, Course, grid_cells, synthetic_study

from tokenmdp.intervals import Estimate
from tokenmdp.study.directory import load_study
from tokenmdp.study.report.terminal import tables_of
from tokenmdp.study.statistics import censored_median
from tokenmdp.study.tables import (
    LEGEND,
    METHOD_HEADINGS,
    markdown,
    method_table,
    method_texts,
    steps_text,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return load_study(
        synthetic_study(tmp_path_factory.mktemp("study"), grids=("imdb", "length", "faithful"), seeds=5, updates=30)
    )


def row_of(study, grid, method, setting=SHORT):
    (found,) = (row for row in method_table(study, grid) if (row.method, row.setting) == (method, setting))
    return found


def test_numbers_of_a_row_are_those_of_its_cells(study):
    own, other = (study.select("imdb")[SHORT, method] for method in ("attention", "sparse"))
    areas, others = ([np.mean(result.metrics["score_mean"]) for result in results] for results in (own, other))
    row = row_of(study, "imdb", "attention")
    assert row.seeds == 5
    assert row.mean.value == pytest.approx(np.mean(areas))
    assert row.mean.low < row.mean.value < row.mean.high
    assert row.iqm.value == pytest.approx(stats.trim_mean(areas, 0.25))
    assert row.paper == pytest.approx((np.mean(areas), 2 * stats.sem(areas)))
    assert row.last.value == pytest.approx(np.mean([result.metrics["score_mean"][-3:] for result in own]))
    assert row.kl.value == pytest.approx(np.mean([result.metrics["kl"][-3:] for result in own]))
    interval = stats.ttest_rel(areas, others).confidence_interval(0.95)
    assert row.difference == pytest.approx((np.subtract(areas, others).mean(), interval.low, interval.high))
    assert row.improvement.value == stats.mannwhitneyu(areas, others).statistic / 25


def test_steps_are_the_median_seeds_update_at_sparses_maximum(study):
    own, other = (
        np.array([result.metrics["score_mean"] for result in study.select("imdb")[SHORT, method]])
        for method in ("attention", "sparse")
    )

    def smoothed(curve):
        return np.convolve(curve, np.full(5, 0.2), mode="valid")

    level = smoothed(other.mean(0)).max()
    steps = sorted(next((update for update, score in enumerate(smoothed(curve), 5) if score >= level), np.inf)
                   for curve in own)  # fmt: skip
    assert row_of(study, "imdb", "attention").steps.value == steps[2]


def test_sparse_is_not_compared_with_itself(study):
    row = row_of(study, "imdb", "sparse")
    assert row.difference is None
    assert row.improvement is None
    assert row.steps is not None


def test_all_settings_keep_strata_apart(study):
    row = row_of(study, "length", "attention", "all 3 settings")
    selected = study.select("length")
    areas = {
        method: np.array(
            [
                [np.mean(result.metrics["score_mean"]) for result in results]
                for (_, name), results in selected.items()
                if name == method
            ]
        )
        for method in ("attention", "sparse")
    }
    assert row.seeds == 15
    assert row.mean.value == pytest.approx(areas["attention"].mean())
    by_seed = (areas["attention"] - areas["sparse"]).mean(0)  # five numbers, not fifteen
    assert row.difference == pytest.approx(
        (by_seed.mean(), *stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)), nan_ok=False
    )
    assert row.steps is None
    assert row.paper is None


def test_scores_of_different_reward_models_are_not_averaged(study):
    assert not [row for row in method_table(study, "faithful") if row.setting.startswith("all")]


def test_without_sparse_nothing_is_compared(tmp_path):
    path = synthetic_study(tmp_path, grids=("imdb",), seeds=2, updates=20, keep=lambda cell: cell.method != "sparse")
    rows = method_table(load_study(path), "imdb")
    assert len(rows) == 5
    assert all((row.difference, row.improvement, row.steps) == (None, None, None) for row in rows)


def test_one_seed_has_numbers_without_intervals(tmp_path):
    path = synthetic_study(tmp_path, grids=("imdb",), seeds=1, updates=3)
    rows = method_table(load_study(path), "imdb")
    assert [row.improvement for row in rows] == [None] * 6  # of one run against another it is 0 or 1
    assert sum(row.difference is not None for row in rows) == 5
    texts = [text for row in rows for text in method_texts(row)]
    assert not any("[" in text or "inf" in text or "nan" in text for text in texts)


def test_a_method_that_never_arrives(tmp_path):
    def course(cell):
        return Course(end=3.0 if cell.method == "uniform" else 9.0)

    path = synthetic_study(tmp_path, grids=("imdb",), seeds=3, updates=40, course=course)
    row = row_of(load_study(path), "imdb", "uniform")
    assert steps_text(row.steps) == "never"


def table_of(study):
    return markdown(METHOD_HEADINGS, map(method_texts, method_table(study, "imdb")))


def test_markdown_has_as_many_columns_as_headings(study):
    rows = method_table(study, "imdb")
    lines = table_of(study).splitlines()
    assert len(lines) == len(rows) + 2
    assert {line.count("|") for line in lines} == {len(METHOD_HEADINGS) + 1}


def test_markdown_escapes_bars():
    assert markdown(["one", "two"], [["a|b", ""]]) == "| one | two |\n|---|---|\n| a\\|b |  |\n"


def test_few_seeds_have_t_intervals_of_means_and_no_bootstrap(study):
    row = row_of(study, "imdb", "attention")  # five seeds
    areas = [np.mean(result.metrics["score_mean"]) for result in study.select("imdb")[SHORT, "attention"]]
    theirs = stats.ttest_1samp(areas, 0).confidence_interval()
    assert row.mean[1:] == pytest.approx((theirs.low, theirs.high))
    assert all(np.isfinite(estimate.low) for estimate in (row.last, row.kl, row.difference))
    assert all(np.isinf(estimate.low) for estimate in (row.iqm, row.improvement, row.steps))
    over_all = row_of(study, "length", "attention", "all 3 settings")
    assert np.isinf(over_all.mean.low)


def test_enough_seeds_are_resampled_but_a_point_is_no_interval(tmp_path):
    def course(cell):
        return Course(end={"uniform": 3.0, "attention": 9.1}.get(cell.method, 9.0), spread=0.5)

    found = load_study(synthetic_study(tmp_path, grids=("imdb",), seeds=8, updates=30, course=course))
    row, worse = (row_of(found, "imdb", method) for method in ("attention", "uniform"))
    assert row.iqm.low < row.iqm.value < row.iqm.high
    assert row.improvement.low < row.improvement.value < row.improvement.high
    assert str(worse.improvement) == "0.00"
    assert steps_text(worse.steps) == "never"


def test_the_legend_says_what_never_means():
    """Half of the seeds are enough for a median, as `censored_median` has it."""
    assert np.isfinite(censored_median(np.array([1.0, 2.0, 9.0, 9.0]), np.array([True, True, False, False])))
    assert "never: more than half of the seeds" in LEGEND


def test_an_unknown_grid_has_no_rows(study):
    assert method_table(study, "quick") == []


def test_the_same_study_gives_the_same_table_whatever_the_order_of_its_files(study):
    turned = replace(study, results=dict(reversed(study.results.items())))
    assert table_of(turned) == table_of(study)
    assert str(Estimate(1.0, 0.5, 1.5)) == "1.00 [0.50, 1.50]"
    assert len(grid_cells("imdb", 5, 30)) == len(study.grids["imdb"])


@pytest.mark.parametrize(("width", "parts", "between"), [(200, 1, " "), (149, 1, "\n"), (116, 1, "\n"), (80, 2, "\n")])
def test_no_interval_is_broken_in_a_narrow_terminal(study, width, parts, between):
    tables = tables_of(study, "imdb", width)
    assert len(tables) == parts
    console = Console(file=io.StringIO(), width=width)
    for table in tables:
        console.print(table)
    said = console.file.getvalue()
    assert said.count("[") == said.count("]") > 20
    assert all(line.count("[") == line.count("]") for line in said.splitlines())
    row = next(row for row in method_table(study, "imdb") if row.method == "attention")
    assert (str(row.mean) in said) == (between == " ")
    assert str(row.mean).partition(" ")[2] in said


def test_the_terminal_shows_brackets_in_names_and_numbers(tmp_path):
    def course(cell):
        return Course(end=3.0 if cell.method == "uniform" else 9.0)

    path = synthetic_study(tmp_path, grids=("imdb",), seeds=6, updates=40, course=course)
    study = load_study(path)
    labels = {id: (setting, f"{method} kinds=[a]") for id, (setting, method) in study.labels["imdb"].items()}
    console = Console(file=io.StringIO(), width=300)
    console.print(*tables_of(replace(study, labels={"imdb": labels}), "imdb", 300))
    assert "uniform kinds=[a]" in console.file.getvalue()
