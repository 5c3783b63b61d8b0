"""Every claim with every outcome, on studies whose courses are formulas; figures against scipy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from study_doubles import LENGTHS, SHORT, Course, grid_cells, make_cell, make_result, quality_record

from tokenmdp.study.results import Study
from tokenmdp.study.verdicts import verdicts

STEPS = "ABC reaches sparse's maximum in fewer than half the steps"
RED = "RED above ABC"
BETA = "the larger credit_beta, the better"
GROWS = "ABC's advantage over sparse grows with length"
COLLAPSE = "sparse collapses at length"
KL = "ABC spends more KL than uniform"
EQUAL_KL = "ABC above sparse at equal KL"
GOLD = "a second reward model, never trained on, confirms what ABC gains"
GOLD_HOLDS = "ABC: the second model's score still rises at the end (no over-optimisation yet)"
GOLD_ABOVE = "ABC above sparse for the second reward model"
QUALITY = "ABC's gain follows the quality of the attention it reads"
OUTCOMES = {"reproduced": 1.0, "not reproduced": -1.0, "inconclusive": None}


def study_of(cells, course, grid="imdb", quality=("imdb-tiny", "imdb-plain")):
    """A study of one grid in memory."""
    results = {cell.id: make_result(cell, course(cell)) for cell in cells}
    return Study(
        Path("study"),
        {grid: [cell.id for cell in cells]},
        {cell.id: cell for cell in cells},
        results,
        {},
        {model: quality_record(model) for model in quality},
    )


def without(study, keep):
    """The study with only those results whose cell passes."""
    return replace(study, results={id: result for id, result in study.results.items() if keep(result.cell)})


def verdict_on(study, claim):
    """The one verdict on a claim."""
    (found,) = (verdict for verdict in verdicts(study) if verdict.claim == claim)
    return found


def effect(outcome, cell):
    """On the claim's side, on the other, or on either by seed."""
    return OUTCOMES[outcome] or (-1.0) ** cell.seed


def quiet(**course):
    return Course(**({"noise": 0.05, "spread": 0.02} | course))


def check(study, claim, outcome):
    verdict = verdict_on(study, claim)
    assert verdict.verdict == outcome, verdict
    assert verdict.ours
    assert verdict.interval
    assert "seeds" in verdict.where
    return verdict


every_outcome = pytest.mark.parametrize("outcome", OUTCOMES)


@every_outcome
@pytest.mark.parametrize(
    ("claim", "better"),
    [
        ("ABC above sparse", "attention"),
        ("ABC above uniform", "attention"),
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
    verdict = verdict_on(study, "ABC above sparse")
    assert verdict.interval == f"[{interval.low:.2f}, {interval.high:.2f}]"
    means = np.mean(areas["attention"]), np.mean(areas["sparse"])
    assert verdict.ours == f"{means[0] - means[1]:+.2f} ({means[0]:.2f} against {means[1]:.2f})"


@pytest.mark.parametrize(
    ("half", "outcome", "ours"),
    [(6.0, "reproduced", "2"), (60.0, "not reproduced", "never; sparse has"), (14.0, "inconclusive", "5")],
)
def test_fewer_steps(half, outcome, ours):
    """Sparse has half its way behind it after 30 updates of 60, ABC earlier or later."""
    study = study_of(
        grid_cells("imdb", 6, 60),
        lambda cell: Course(half=half if cell.method == "attention" else 30.0, noise=0.1, spread=0.6),
    )
    verdict = check(study, STEPS, outcome)
    assert verdict.ours.startswith(ours)
    assert "percentile bootstrap" in verdict.rule


def test_fewer_steps_is_not_decided_on_five_seeds():
    study = study_of(grid_cells("imdb", 5, 60), lambda cell: quiet(half=5 if cell.method == "attention" else 30))
    verdict = check(study, STEPS, "inconclusive")
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
def test_larger_beta(outcome):
    study = study_of(
        grid_cells("beta", 4, 20),
        lambda cell: quiet(end=6 + effect(outcome, cell) * cell.settings.credit_beta, half=5),
        "beta",
    )
    verdict = check(study, BETA, outcome)
    assert verdict.ours.count("(") == 6
    if outcome != "inconclusive":
        assert f"rank correlation {effect(outcome, None):.2f}" in verdict.ours


@every_outcome
def test_advantage_grows_with_length(outcome):
    def course(cell):
        longer = list(LENGTHS).index(cell.setting)
        return quiet(end=6 + (0.5 + longer * effect(outcome, cell)) * (cell.method == "attention"), half=5)

    verdict = check(study_of(grid_cells("length", 3, 20), course, "length"), GROWS, outcome)
    assert "(8-16), " in verdict.ours
    assert "(40-60); " in verdict.ours


def test_a_slope_in_length_is_for_ten_tokens():
    def course(cell):
        low, high = LENGTHS[cell.setting]
        return Course(
            end=1 + (low + high) / 2 / 10 * (cell.method == "attention"), half=1e-3, noise=0, spread=0, start=1
        )

    study = study_of(grid_cells("length", 3, 20), course, "length")
    assert verdict_on(study, GROWS).ours.endswith("+1.00 for ten tokens more")


@pytest.mark.parametrize(
    ("tokens", "fallen", "outcome"),
    [
        (59, 3, "reproduced"),
        (59, 0, "inconclusive"),  # the paper sees no collapse at this length either
        (109, 3, "reproduced"),
        (109, 0, "not reproduced"),
        (109, 2, "inconclusive"),
    ],
)
def test_sparse_collapses(tokens, fallen, outcome):
    given = {"horizon_range": (tokens - 19, tokens), "min_new_tokens": tokens - 19, "max_new_tokens": tokens}
    cells = [make_cell("sparse", seed, updates=30) for seed in (1, 2, 3)]
    cells += [make_cell("sparse", seed, f"{tokens - 19}-{tokens + 1} tokens", 30, **given) for seed in (1, 2, 3)]
    study = study_of(
        cells,
        lambda cell: quiet(half=4, collapse=0.5 if cell.setting != SHORT and cell.seed <= fallen else 2),
        "length",
    )
    verdict = check(study, COLLAPSE, outcome)
    assert f"{fallen} of 3 runs" in verdict.ours
    assert f"{tokens - 19}-{tokens + 1} tokens" in verdict.where
    assert ("says nothing" in verdict.rule) == (tokens == 59 and not fallen)


@every_outcome
def test_spends_more_kl(outcome):
    study = study_of(
        grid_cells("imdb", 4, 20),
        lambda cell: quiet(kl=15 + 4 * effect(outcome, cell) * (cell.method == "attention")),
    )
    check(study, KL, outcome)


@every_outcome
def test_equal_kl(outcome):
    """Score is a function of KL, shifted for ABC, which always spends more."""

    def course(cell):
        kl = 2 / cell.settings.ppo["kl_coef"] + 4 * (cell.method == "attention")
        return quiet(end=0.1 * kl + effect(outcome, cell) * (cell.method == "attention"), half=1e-3, kl=kl, start=0)

    verdict = check(study_of(grid_cells("kl", 4, 20), course, "kl"), EQUAL_KL, outcome)
    assert "4 KL coefficients" in verdict.where
    if outcome != "inconclusive":
        assert float(verdict.ours.split()[0]) == pytest.approx(effect(outcome, None), abs=0.1)


def test_equal_kl_needs_a_common_kl():
    study = study_of(
        grid_cells("kl", 3, 20),
        lambda cell: quiet(kl=1 / cell.settings.ppo["kl_coef"] + 50 * (cell.method == "attention"), half=2),
        "kl",
    )
    verdict = verdict_on(study, EQUAL_KL)
    assert verdict.verdict == "not measured"
    assert "add KL coefficients" in verdict.rule


@every_outcome
def test_gold_confirms(outcome):
    study = study_of(grid_cells("imdb", 4, 30), lambda cell: quiet(gold=6 * effect(outcome, cell), half=5))
    check(study, GOLD, outcome)


@pytest.mark.parametrize(("turns", "outcome"), [((2, 2), "reproduced"), ((0.5, 0.5), "not reproduced"),
                                                ((0.4, 2), "inconclusive")])  # fmt: skip
def test_gold_turns(turns, outcome):
    study = study_of(grid_cells("imdb", 4, 30), lambda cell: quiet(turn=turns[cell.seed % 2], half=5))
    verdict = check(study, GOLD_HOLDS, outcome)
    turned = float(verdict.ours.split("update ")[1].split(" of")[0])
    assert (turned == 30) == (outcome == "reproduced")


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


def credit_quality_study(outcome, scale=1.0, **options):
    def course(cell):
        faithful = cell.settings.reward_model == "imdb-tiny"
        gain = (effect(outcome, cell) if faithful else 0) * (cell.method == "attention")
        return quiet(start=0, end=(6 + gain) * (1 if faithful else scale), half=5)

    return study_of(grid_cells("faithful", 4, 20), course, "faithful", **options)


@every_outcome
def test_gain_follows_credit_quality(outcome):
    verdict = check(credit_quality_study(outcome), QUALITY, outcome)
    assert verdict.ours.index("imdb-tiny (rank correlation 0.57)") < verdict.ours.index("imdb-plain")


def test_credit_quality_does_not_depend_on_the_scale_of_a_reward_model():
    shares = [verdict_on(credit_quality_study("reproduced", scale), QUALITY).ours.split()[0] for scale in (1.0, 10.0)]
    assert shares[0] == shares[1]


def test_models_of_like_credit_quality_decide_nothing():
    study = credit_quality_study("reproduced")
    study = replace(study, quality={model: quality_record("imdb-tiny") for model in study.quality})
    verdict = verdict_on(study, QUALITY)
    assert verdict.verdict == "inconclusive"
    assert verdict.rule.endswith("do not differ")


def test_unmeasured_credit_quality_is_said():
    verdict = verdict_on(credit_quality_study("reproduced", quality=("imdb-tiny",)), QUALITY)
    assert verdict.verdict == "not measured"
    assert "credit quality" in verdict.rule


def test_an_empty_study_measures_nothing_and_names_the_command_for_each_claim():
    found = verdicts(Study(Path("study"), {}, {}, {}, {}, {}))
    assert {verdict.verdict for verdict in found} == {"not measured"}
    assert all(verdict.paper and "tokenmdp ablate --preset" in verdict.rule for verdict in found)
    assert len({verdict.claim for verdict in found}) == len(found) == 16


def test_two_seeds_decide_nothing():
    grids = {grid: grid_cells(grid, 2, 20) for grid in ("imdb", "beta", "length", "kl", "faithful")}
    cells = [cell for cells in grids.values() for cell in cells]
    study = study_of(cells, lambda cell: quiet(kl=2 / cell.settings.ppo["kl_coef"]))
    labels = {grid: {cell.id: (cell.setting, cell.method) for cell in cells} for grid, cells in grids.items()}
    found = verdicts(replace(study, grids={grid: list(ids) for grid, ids in labels.items()}, labels=labels))
    assert {verdict.verdict for verdict in found} == {"inconclusive"}
    assert all("2 seeds, a decision needs" in verdict.rule for verdict in found)


def test_only_seeds_of_both_methods_are_paired_and_missing_cells_are_counted():
    study = study_of(grid_cells("imdb", 5, 20), lambda cell: quiet(end=5 + (cell.method == "attention")))
    study = without(study, lambda cell: (cell.method, cell.seed) not in {("attention", 2), ("sparse", 4)})
    assert verdict_on(study, "ABC above sparse").where == (
        "grid imdb, 8-16 tokens, 3 seeds; 2 cells of the grid missing"
    )


def test_the_papers_grid_comes_before_the_quick_one():
    cells = grid_cells("imdb", 4, 20)
    study = study_of(cells, lambda cell: quiet(), "quick")
    assert "grid quick" in verdict_on(study, "ABC above sparse").where
    study.grids["imdb"] = [cell.id for cell in cells if cell.seed < 3]
    assert "grid imdb, 8-16 tokens, 2 seeds" in verdict_on(study, "ABC above sparse").where


def test_lengths_that_differ_in_more_than_length_are_not_compared():
    cells = grid_cells("length", 3, 20)
    mixed = [cell for cell in cells if cell.setting == SHORT]
    mixed += [
        replace(cell, settings=replace(cell.settings, num_envs=8)) for cell in cells if cell.setting == "40-60 tokens"
    ]
    assert verdict_on(study_of(mixed, lambda cell: quiet(), "length"), GROWS).verdict == "not measured"


def test_a_run_that_diverged_decides_nothing():
    study = study_of(grid_cells("imdb", 4, 20), lambda cell: quiet(end=5 + (cell.method == "attention")))
    next(iter(study.select("imdb")[SHORT, "attention"])).metrics["score_mean"][-1] = float("nan")
    assert verdict_on(study, "ABC above sparse").verdict == "inconclusive"


def test_two_cells_under_one_label_are_refused():
    cells = grid_cells("imdb", 3, 20)
    cells += [replace(cell, settings=replace(cell.settings, num_envs=8)) for cell in cells]
    with pytest.raises(ValueError, match="6 cells of 3 seeds"):
        verdicts(study_of(cells, lambda cell: quiet()))
