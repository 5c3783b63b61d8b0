"""Claims about one setting, and all of them together, with every outcome; figures against scipy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from abc_study.claims import corrected, multiplicity
from abc_study.verdicts import verdicts
from scipy import stats
from study_doubles import SHORT, Course, grid_cells, make_cell, make_result
from verdict_doubles import check, effect, every_outcome, quiet, study_of, verdict_on, without

from tokenmdp.study.directory import Study

STEPS = "ABC reaches sparse's maximum in fewer than half the steps"
RED = "RED above ABC"
KL = "ABC spends more KL than uniform"
GOLD = "ABC raises the score of a second reward model, which trains no policy"
ABOVE = "ABC above sparse over training"
GOLD_HOLDS = "ABC: the second model's score still rises in the last third"
GOLD_ABOVE = "ABC above sparse for the second reward model"


@every_outcome
@pytest.mark.parametrize(
    ("claim", "better"),
    [
        (ABOVE, "attention"),
        ("ABC above uniform over training", "attention"),
        ("uniform below sparse on short texts", "sparse"),
        (RED, "red"),
    ],
)
def test_paired_comparisons(claim, better, outcome):
    study = study_of(
        grid_cells("imdb", 4, 20),
        lambda cell: quiet(end=5 + effect(outcome, cell) * (cell.method == better), half=5),
    )
    verdict = check(study, claim, outcome)
    assert verdict.where == "grid imdb, 8-16 tokens, 4 seeds"


def test_a_paired_comparison_has_scipys_interval():
    study = study_of(grid_cells("imdb", 5, 20), lambda cell: Course(end=5 + 3 * (cell.method == "attention")))
    areas = {
        method: [np.mean(result.metrics["score_mean"]) for result in results]
        for (_, method), results in study.select("imdb").items()
    }
    interval = stats.ttest_rel(areas["attention"], areas["sparse"]).confidence_interval(0.95)
    verdict = verdict_on(study, ABOVE)
    assert verdict.interval == f"[{interval.low:.2f}, {interval.high:.2f}]"
    means = np.mean(areas["attention"]), np.mean(areas["sparse"])
    said, ends = verdict.ours.split("; in the last tenth ")
    assert said == f"{means[0] - means[1]:+.2f} ({means[0]:.2f} against {means[1]:.2f})"
    last = [
        [np.mean(result.metrics["score_mean"][-2:]) for result in study.select("imdb")["8-16 tokens", method]]
        for method in ("attention", "sparse")
    ]
    end = stats.ttest_rel(*last).confidence_interval(0.95)
    assert ends == f"{np.subtract(*last).mean():.2f} [{end.low:.2f}, {end.high:.2f}]"


@pytest.mark.parametrize(
    ("half", "outcome", "ours"),
    [(6.0, "reproduced", "2"), (60.0, "not reproduced", "never; sparse has"), (14.0, "inconclusive", "5")],
)
def test_fewer_steps(half, outcome, ours):
    """Sparse is half way after 30 updates of 60, ABC earlier or later."""
    study = study_of(
        grid_cells("imdb", 6, 60),
        lambda cell: Course(half=half if cell.method == "attention" else 30.0, noise=0.1, spread=0.6),
    )
    verdict = check(study, STEPS, outcome)
    assert verdict.ours.startswith(ours)
    assert "percentile bootstrap" in verdict.rule


def test_fewer_steps_is_not_decided_on_five_seeds():
    study = study_of(grid_cells("imdb", 5, 60), lambda cell: quiet(half=5 if cell.method == "attention" else 30))
    verdict = verdict_on(study, STEPS)
    assert verdict.verdict == "inconclusive"
    assert verdict.interval == ""  # five seeds are not resampled
    assert verdict.rule.endswith("5 seeds, a decision needs 6")


@pytest.mark.parametrize("method", ["abc-d", "abc-d2"])
@pytest.mark.parametrize(
    ("middle", "outcome"),
    [(0.0, "reproduced"), (2.0, "not reproduced"), (-2.0, "not reproduced"), (None, "inconclusive")],
)
def test_between(method, middle, outcome):
    def course(cell):
        if cell.method == method:
            return quiet(end=6 + (1.02 * (-1.0) ** cell.seed if middle is None else middle), half=5)
        return quiet(end={"uniform": 5, "attention": 7}.get(cell.method, 6), half=5)

    verdict = check(study_of(grid_cells("imdb", 4, 20), course), f"{method.upper()} between uniform and ABC", outcome)
    assert verdict.interval.count("[") == 2


@every_outcome
def test_spends_more_kl(outcome):
    study = study_of(
        grid_cells("imdb", 4, 20),
        lambda cell: quiet(kl=15 + 4 * effect(outcome, cell) * (cell.method == "attention")),
    )
    check(study, KL, outcome)


@every_outcome
def test_gold_confirms(outcome):
    study = study_of(grid_cells("imdb", 4, 30), lambda cell: quiet(gold=6 * effect(outcome, cell), half=5))
    check(study, GOLD, outcome)


@pytest.mark.parametrize(("turns", "outcome"), [((2, 2), "reproduced"), ((0.5, 0.5), "not reproduced"),
                                                ((0.4, 2), "inconclusive")])  # fmt: skip
def test_gold_turns(turns, outcome):
    study = study_of(grid_cells("imdb", 4, 30), lambda cell: quiet(turn=turns[cell.seed % 2], half=5))
    verdict = check(study, GOLD_HOLDS, outcome)
    assert "; the score trained on +" in verdict.ours


@every_outcome
def test_gold_above_sparse(outcome):
    study = study_of(
        grid_cells("imdb", 4, 30),
        lambda cell: quiet(gold=6 + effect(outcome, cell) * (cell.method == "attention"), half=5),
    )
    check(study, GOLD_ABOVE, outcome)


def test_gold_needs_a_second_model():
    study = study_of(grid_cells("imdb", 3, 20), lambda cell: quiet())
    for result in study.results.values():
        del result.evaluations["gold"]
    assert verdict_on(study, GOLD).verdict == "not measured"
    assert "--gold" in verdict_on(study, GOLD_HOLDS).rule


def test_an_empty_study_measures_nothing_and_names_the_command_for_each_claim():
    found = verdicts(Study(Path("study"), {}, {}, {}, {}, {}))
    assert {verdict.verdict for verdict in found} == {"not measured"}
    assert all(verdict.paper and "tokenmdp ablate --plan examples/abc_study/" in verdict.rule for verdict in found)
    assert len({verdict.claim for verdict in found}) == len(found) == 20


def test_two_seeds_decide_nothing():
    grids = {grid: grid_cells(grid, 2, 20) for grid in ("imdb", "beta", "length", "kl", "faithful")}
    cells = [cell for cells in grids.values() for cell in cells]
    study = study_of(cells, lambda cell: quiet(kl=6 / cell.settings.config["kl_coef"]))
    labels = {grid: {cell.id: (cell.setting, cell.method) for cell in cells} for grid, cells in grids.items()}
    found = verdicts(replace(study, grids={grid: list(ids) for grid, ids in labels.items()}, labels=labels))
    assert {verdict.verdict for verdict in found} == {"inconclusive"}
    assert all("2 seeds, a decision needs" in verdict.rule for verdict in found)


def test_only_seeds_of_both_methods_are_paired_and_missing_cells_are_counted():
    study = study_of(grid_cells("imdb", 5, 20), lambda cell: quiet(end=5 + (cell.method == "attention")))
    study = without(study, lambda cell: (cell.method, cell.seed) not in {("attention", 2), ("sparse", 4)})
    assert verdict_on(study, ABOVE).where == ("grid imdb, 8-16 tokens, 3 seeds; 2 cells of the grid not run")


def test_crashed_runs_of_the_compared_methods_decide_nothing():
    """The two that are missing may be the ones that went worst."""
    study = study_of(
        grid_cells("imdb", 5, 20),
        lambda cell: quiet(end=5 + (cell.method == "attention") - (cell.method == "uniform")),
        crashed=lambda cell: cell.method == "attention" and cell.seed < 3,
    )
    study = without(study, lambda cell: (cell.method, cell.seed) != ("red", 1))
    verdict = verdict_on(study, ABOVE)
    assert verdict.verdict == "inconclusive"
    assert verdict.where == ("grid imdb, 8-16 tokens, 3 seeds; 2 cells of the grid crashed; 1 cell of the grid not run")
    assert "2 runs of these methods crashed" in verdict.rule
    assert verdict_on(study, "uniform below sparse on short texts").verdict == "reproduced"


def test_the_papers_short_texts_are_not_decided_on_longer_ones():
    long = [cell for cell in grid_cells("length", 4, 20) if cell.setting == "40-60 tokens"]
    found = {verdict.claim: verdict for verdict in verdicts(study_of(long, lambda cell: quiet(), "custom"))}
    for claim in (
        STEPS,
        ABOVE,
        "uniform below sparse on short texts",
        "ABC-D between uniform and ABC",
        KL,
    ):
        assert found[claim].verdict == "not measured"
    for claim in (RED, GOLD, GOLD_ABOVE):
        assert "40-60 tokens" in found[claim].where


def test_abc_is_known_by_its_settings_not_by_its_label():
    cells = [
        replace(cell, method="attention credit_beta=0.8") if cell.method == "attention" else cell
        for cell in grid_cells("imdb", 4, 20)
    ]
    assert verdict_on(study_of(cells, lambda cell: quiet(), "custom"), ABOVE).where
    other = [make_cell("attention", seed, updates=20, credit_beta=0.4) for seed in range(1, 5)]
    cells = [cell for cell in cells if cell.settings.credit == "sparse"] + other
    assert verdict_on(study_of(cells, lambda cell: quiet(), "custom"), ABOVE).verdict == "not measured"


def test_of_two_labels_of_one_method_the_grids_first_counts():
    """They differ in the learning rate, which may be given for a label."""
    cells = grid_cells("imdb", 4, 20)
    again = [
        replace(
            cell,
            method="red again",
            settings=replace(cell.settings, config=cell.settings.config | {"learning_rate": 1}),
        )
        for cell in cells
        if cell.method == "red"
    ]
    course = quiet(end=5, half=5)
    study = study_of(
        cells + again,
        lambda cell: replace(course, end={"red": 6, "red again": 1}.get(cell.method, 5)),
        crashed=lambda cell: (cell.method, cell.seed) == ("red again", 1),
    )
    check(study, RED, "reproduced")


def test_a_method_of_ones_own_disturbs_nothing():
    cells = grid_cells("imdb", 4, 20)
    own = [replace(cell, method="mine.Own", settings=replace(cell.settings, credit="mine.Own")) for cell in cells[:1]]
    study = study_of(cells, lambda cell: quiet(end=5 + (cell.method == "attention")))
    ids = {cell.id: cell for cell in own}
    results = {cell.id: replace(make_result(cells[0], quiet()), cell=cell) for cell in own}
    study = replace(study, cells=study.cells | ids, results=study.results | results)
    study.grids["imdb"].extend(ids)
    assert verdict_on(study, ABOVE).verdict == "reproduced"


def test_the_reader_is_told_what_the_figures_leave_open():
    grids = {grid: grid_cells(grid, 6, 20) for grid in ("imdb", "beta", "kl")}
    study = study_of([cell for cells in grids.values() for cell in cells], lambda cell: quiet())
    labels = {grid: {cell.id: (cell.setting, cell.method) for cell in cells} for grid, cells in grids.items()}
    study = replace(study, grids={grid: list(ids) for grid, ids in labels.items()}, labels=labels)
    for claim in (GOLD, GOLD_HOLDS, GOLD_ABOVE):
        assert "on one draw of 64 held-out prompts" in verdict_on(study, claim).rule
    assert "peak of noise" in verdict_on(study, STEPS).rule
    for claim in (
        ABOVE,
        "ABC above uniform over training",
        "ABC-D2 between uniform and ABC",
    ):
        assert "steps 0 to 100 of its 151" in verdict_on(study, claim).paper
    found = verdicts(study)
    told = sum(bool(verdict.interval) for verdict in found)
    assert 0 < told < len(found)
    assert f"corrected for the {told} claims that have one" in multiplicity(found)
    after = corrected(found)
    assert all(
        (p is None) == (verdict.p is None) == (not verdict.interval) for p, verdict in zip(after, found, strict=True)
    )
    assert all(p >= verdict.p for p, verdict in zip(after, found, strict=True) if p is not None)
    assert all(verdict.refuted for verdict in found if verdict.interval)


def test_the_papers_grid_comes_before_the_quick_one():
    cells = grid_cells("imdb", 4, 20)
    study = study_of(cells, lambda cell: quiet(), "quick")
    assert "grid quick" in verdict_on(study, ABOVE).where
    study.grids["imdb"] = [cell.id for cell in cells if cell.seed < 3]
    assert "grid imdb, 8-16 tokens, 2 seeds" in verdict_on(study, ABOVE).where


def test_a_run_that_diverged_decides_nothing():
    study = study_of(grid_cells("imdb", 4, 20), lambda cell: quiet(end=5 + (cell.method == "attention")))
    next(iter(study.select("imdb")[SHORT, "attention"])).metrics["score_mean"][-1] = float("nan")
    assert verdict_on(study, ABOVE).verdict == "inconclusive"


def test_two_cells_under_one_label_are_refused():
    cells = grid_cells("imdb", 3, 20)
    cells += [replace(cell, settings=replace(cell.settings, num_envs=8)) for cell in cells]
    with pytest.raises(ValueError, match="6 cells of 3 seeds"):
        verdicts(study_of(cells, lambda cell: quiet()))
