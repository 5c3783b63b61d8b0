"""Claims about credit_beta, length, KL coefficient and reward model, with every outcome."""

import json
from dataclasses import replace

import numpy as np
import pytest
from abc_study.verdicts import verdicts
from scipy import stats
from study_doubles import LENGTHS, SHORT, Course, grid_cells, make_cell, make_result, quality_record
from verdict_doubles import check, effect, every_outcome, quiet, study_of, verdict_on, without

from tokenmdp.study.outcomes import collapsed

BETA = "the score over training rises with credit_beta (linear trend)"
GROWS = "ABC's advantage over sparse grows with length"
COLLAPSE = "sparse collapses at length, ABC does not"
EQUAL_KL = "ABC above sparse at equal KL, where runs end"
QUALITY = "ABC gains more on imdb-tiny than on imdb-plain (informative attention row, not informative)"
UNMEASURED_QUALITY = "ABC gains more on a faithful attention row than on one that says nothing"


@every_outcome
def test_larger_beta(outcome):
    study = study_of(
        grid_cells("beta", 4, 20),
        lambda cell: quiet(end=6 + effect(outcome, cell) * cell.settings.credit_beta, half=5),
        "beta",
    )
    verdict = check(study, BETA, outcome)
    assert verdict.ours.count("(") == 6
    ends = float(verdict.ours.partition("in the last tenth ")[2].split(" [")[0])
    if outcome != "inconclusive":
        assert ends * effect(outcome, None) > 0


@every_outcome
def test_advantage_grows_with_length(outcome):
    def course(cell):
        longer = list(LENGTHS).index(cell.setting)
        return quiet(end=6 + (0.5 + longer * effect(outcome, cell)) * (cell.method == "attention"), half=5)

    verdict = check(study_of(grid_cells("length", 3, 20), course, "length"), GROWS, outcome)
    assert "(8-16), " in verdict.ours
    assert "(40-60); " in verdict.ours
    assert verdict.ours.partition("; over uniform ")[2].count(", ") == 2


def test_a_slope_in_length_is_for_ten_tokens():
    def course(cell):
        low, high = LENGTHS[cell.setting]
        return Course(
            end=1 + (low + high) / 2 / 10 * (cell.method == "attention"), half=1e-3, noise=0, spread=0, start=1
        )

    study = study_of(grid_cells("length", 3, 20), course, "length")
    assert verdict_on(study, GROWS).ours.partition("; over")[0].endswith("+1.00 for ten tokens more")


def collapse_study(tokens, seeds, fallen, crashed=0, abc=0):
    """Sparse and ABC at 8-16 tokens and a longer length, where of sparse's runs some collapse and others crash."""
    given = {"horizon_range": (tokens - 19, tokens), "min_new_tokens": tokens - 19, "max_new_tokens": tokens}
    long = f"{tokens - 19}-{tokens + 1} tokens"
    cells = []
    for seed in range(1, seeds + 1):
        for method in ("sparse", "attention"):
            cells += [make_cell(method, seed, updates=30), make_cell(method, seed, long, 30, **given)]

    def lost(cell):
        most = {"sparse": fallen, "attention": abc}[cell.method]
        return cell.setting == long and cell.seed <= most

    return study_of(
        cells,
        lambda cell: quiet(half=4, collapse=0.5 if lost(cell) else 2),
        "length",
        crashed=lambda cell: (cell.setting, cell.method) == (long, "sparse") and cell.seed > seeds - crashed,
    )


@pytest.mark.parametrize(
    ("tokens", "seeds", "fallen", "outcome"),
    [
        (109, 10, 2, "inconclusive"),  # what the paper itself reports: as like as not by chance
        (109, 10, 8, "reproduced"),
        (109, 3, 3, "inconclusive"),
        (109, 3, 0, "inconclusive"),  # of three runs a minority event may well miss all
        (109, 24, 0, "not reproduced"),
        (59, 24, 0, "inconclusive"),  # the paper sees no collapse at this length, so neither outcome is about its claim
        (59, 10, 10, "inconclusive"),
    ],
)
def test_sparse_collapses(tokens, seeds, fallen, outcome):
    verdict = check(collapse_study(tokens, seeds, fallen), COLLAPSE, outcome)
    sparse, abc = (stats.binomtest(number, seeds).proportion_ci(0.975) for number in (fallen, 0))
    ends = (sparse.low - abc.high, sparse.high - abc.low)
    assert verdict.interval == "[{:.2f}, {:.2f}]".format(*(round(end, 2) + 0.0 for end in ends))
    assert verdict.p == pytest.approx(stats.fisher_exact([[fallen, seeds - fallen], [0, seeds]]).pvalue)
    assert not verdict.p < 0.05 if ends[0] < 0 < ends[1] and seeds < 10 else True
    assert verdict.ours == f"runs lost: sparse {fallen} of {seeds}, ABC 0 of {seeds}"
    assert f"{tokens - 19}-{tokens + 1} tokens" in verdict.where
    assert ("neither reproduce nor refute" in verdict.rule) == (tokens == 59)


def test_noise_alone_is_no_collapse():
    """The highest of many trailing means lies above a start that is as noisy, and nothing of that lasts."""
    rng = np.random.default_rng(0)
    cell = make_cell("sparse", 1, updates=150)
    result = make_result(cell, quiet())
    fallen = 0
    for scores in rng.normal(2.5, 0.6, (400, 150)):
        start = {"update": [0], "score": [2.5 + rng.normal(0, 0.3)]}  # of four times as many episodes
        fallen += collapsed(replace(result, metrics={"score_mean": scores.tolist()}, evaluations=start))
    assert fallen <= 0.05 * 400


def test_a_run_of_one_update_has_not_collapsed():
    assert not collapsed(make_result(make_cell("sparse", 1, updates=1), quiet()))


def test_the_rule_is_the_same_for_both_methods():
    """A collapse that both share decides nothing, and ABC's alone refutes as sparse's alone reproduces."""
    check(collapse_study(109, 10, 5, abc=5), COLLAPSE, "inconclusive")
    shared = verdict_on(collapse_study(109, 10, 9, abc=9), COLLAPSE)
    assert shared.p == pytest.approx(1)
    own, other = (
        check(collapse_study(109, 10, 9), COLLAPSE, "reproduced"),
        verdict_on(collapse_study(109, 10, 0, abc=9), COLLAPSE),
    )
    assert other.verdict == "not reproduced"
    assert other.p == pytest.approx(own.p)


@pytest.mark.parametrize("others", ["sparse", "both"])
def test_a_longest_length_at_which_every_run_crashed_is_not_passed_over(others):
    study = collapse_study(109, 4, 0, crashed=4)
    if others == "both":
        study = without(study, lambda cell: (cell.setting, cell.method) != ("90-110 tokens", "attention"))
        verdict = verdict_on(study, COLLAPSE)
        assert verdict.verdict == "not measured"
        assert "of ABC at 90-110 tokens" in verdict.rule
        return
    verdict = check(study, COLLAPSE, "inconclusive")
    assert verdict.ours == "runs lost: sparse 4 of 4 (4 crashed), ABC 0 of 4"
    assert "90-110 tokens" in verdict.where


def test_the_scores_of_two_rows_of_one_model_are_compared_directly():
    def course(cell):
        ahead = cell.method == "attention" and cell.settings.reward_model == "imdb-tiny"
        return Course(end=5 + 2 * ahead, half=1e-3, noise=0, spread=0, start=1)

    cells = [
        replace(
            cell, settings=replace(cell.settings, reward_model=cell.settings.reward_model.replace("plain", "uniform"))
        )
        for cell in grid_cells("faithful", 3, 20)
    ]
    records = {"imdb-tiny": quality_record("imdb-tiny"), "imdb-uniform": quality_record("imdb-plain")}
    study = replace(study_of(cells, course, "faithful"), quality=records)
    verdict = next(verdict for verdict in verdicts(study) if "imdb-uniform" in verdict.claim)
    assert verdict.ours.endswith("; ABC's own score differs by 2.00 [2.00, 2.00]")


def test_abcs_collapses_stand_beside_sparses():
    assert verdict_on(collapse_study(109, 4, 3, abc=2), COLLAPSE).ours == "runs lost: sparse 3 of 4, ABC 2 of 4"


def test_a_run_that_never_gained_has_not_collapsed():
    study = collapse_study(109, 4, 2)
    for result in study.select("length")["90-110 tokens", "sparse"][-1:]:
        result.metrics["score_mean"][:] = np.linspace(0.9, -5, 30)  # its first update is below the start
    assert verdict_on(study, COLLAPSE).ours.startswith("runs lost: sparse 2 of 3")


@pytest.mark.parametrize(
    ("fallen", "crashed", "outcome"), [(9, 1, "reproduced"), (0, 10, "inconclusive"), (2, 8, "inconclusive")]
)
def test_crashed_runs_count_as_collapsed_but_alone_decide_nothing(fallen, crashed, outcome):
    verdict = check(collapse_study(109, 10, fallen, crashed), COLLAPSE, outcome)
    assert verdict.ours.startswith(f"runs lost: sparse {fallen + crashed} of 10 ({crashed} crashed)")
    assert ("hangs on the runs that crashed" in verdict.rule) == (outcome == "inconclusive")


@every_outcome
def test_equal_kl(outcome):
    """Score is a function of KL, shifted for ABC, which always spends more."""

    def course(cell):
        kl = 2 / cell.settings.config["kl_coef"] + 4 * (cell.method == "attention")
        return quiet(end=0.1 * kl + effect(outcome, cell) * (cell.method == "attention"), half=1e-3, kl=kl, start=0)

    verdict = check(study_of(grid_cells("kl", 4, 20), course, "kl"), EQUAL_KL, outcome)
    assert "4 KL coefficients" in verdict.where
    assert verdict.ours.endswith("4 of 4 seeds")
    if outcome != "inconclusive":
        assert float(verdict.ours.split()[0]) == pytest.approx(effect(outcome, None), abs=0.1)


def test_equal_kl_needs_a_common_kl():
    study = study_of(
        grid_cells("kl", 3, 20),
        lambda cell: quiet(kl=1 / cell.settings.config["kl_coef"] + 50 * (cell.method == "attention"), half=2),
        "kl",
    )
    verdict = verdict_on(study, EQUAL_KL)
    assert verdict.verdict == "inconclusive"
    assert "too little KL in common" in verdict.rule
    assert "0% of what any covers" in verdict.rule


def test_equal_kl_leaves_collapsed_runs_out_and_says_so():
    def course(cell):
        kl = 2 / cell.settings.config["kl_coef"]
        fallen = cell.method == "sparse" and cell.seed == 2 and cell.settings.config["kl_coef"] == 0.1
        return quiet(end=0.1 * kl + (cell.method == "attention"), kl=kl, half=1, start=0, collapse=0.5 if fallen else 2)

    verdict = check(study_of(grid_cells("kl", 4, 20), course, "kl"), EQUAL_KL, "reproduced")
    assert "1 collapsed run left out" in verdict.rule
    assert float(verdict.ours.split()[0]) == pytest.approx(1, abs=0.15)


def credit_quality_study(outcome, scale=1.0, **options):
    def course(cell):
        faithful = cell.settings.reward_model == "imdb-tiny"
        gain = (effect(outcome, cell) if faithful else 0) * (cell.method == "attention")
        return quiet(start=0, end=(6 + gain) * (1 if faithful else scale), half=5)

    return study_of(grid_cells("faithful", 4, 20), course, "faithful", **options)


@every_outcome
def test_gain_follows_credit_quality(outcome):
    verdict = check(credit_quality_study(outcome), QUALITY, outcome)
    assert verdict.ours.index("imdb-tiny (its attention: 0.57)") < verdict.ours.index("imdb-plain")
    assert "jackknife" in verdict.rule


def test_an_uncertain_gain_of_sparse_widens_the_interval():
    """ABC leads by .6 in every seed, so only the noise of sparse's gain is left in the shares."""

    def course(cell):
        faithful = cell.settings.reward_model == "imdb-tiny"
        lead = 0.6 * faithful * (cell.method == "attention")
        return quiet(start=0, end=[1.5, 9.0, 3.0, 7.0][cell.seed - 1] + lead, half=1e-3, noise=0, spread=0)

    low, high = json.loads(verdict_on(study_of(grid_cells("faithful", 4, 20), course, "faithful"), QUALITY).interval)
    assert high - low > 0.1


def three_models(seeds=4, **options):
    """As `credit_quality_study`, with a third reward model that has imdb-tiny's scores and another row."""
    cells = grid_cells("faithful", seeds, 20)
    for cell in [cell for cell in cells if cell.settings.reward_model == "imdb-plain"]:
        settings = replace(cell.settings, reward_model="imdb-uniform")
        cells.append(replace(cell, setting=f"{SHORT}, reward model imdb-uniform", settings=settings))
    study = study_of(cells, lambda cell: quiet(start=0, half=5), "faithful", ("imdb-tiny", "imdb-plain"), **options)
    uniform = quality_record("imdb-plain")
    uniform["worlds"][0]["attention"]["spearman"] = [0.08, 0.06, 0.1]
    study.quality["imdb-uniform"] = uniform
    return study


def gain_verdict(study):
    return next(verdict for verdict in verdicts(study) if verdict.claim.startswith("ABC gains more on"))


def test_models_that_differ_in_nothing_but_their_row_are_compared_and_all_are_shown():
    """imdb-plain has the lower correlation here, but other scores too."""
    verdict = gain_verdict(three_models())
    assert verdict.claim.startswith("ABC gains more on imdb-tiny than on imdb-uniform (")
    assert all(model in verdict.ours for model in ("imdb-tiny", "imdb-plain", "imdb-uniform"))


def test_a_third_model_is_shown_as_far_as_it_goes_and_decides_nothing():
    plain = {"reward_model": "imdb-plain"}

    def on_plain(cell, seed=None):
        return cell.settings.reward_model == plain["reward_model"] and seed in (None, cell.seed)

    whole = gain_verdict(three_models())
    crashed = gain_verdict(three_models(crashed=lambda cell: on_plain(cell, 1)))
    assert (crashed.verdict, crashed.interval) == (whole.verdict, whole.interval)
    assert "crashed, which may be no accident" not in crashed.rule
    apart = without(three_models(), lambda cell: not on_plain(cell) or (cell.method == "sparse") == (cell.seed < 3))
    assert "no seed of both methods on imdb-plain" in gain_verdict(apart).ours
    flat = three_models()
    for result in flat.results.values():
        if on_plain(result.cell):
            result.metrics["score_mean"][:] = [-1.0] * 20
    assert "no gain to share on imdb-plain" in gain_verdict(flat).ours
    assert gain_verdict(flat).interval == whole.interval


def test_credit_quality_does_not_depend_on_the_scale_of_a_reward_model():
    shares = [verdict_on(credit_quality_study("reproduced", scale), QUALITY).ours.split()[0] for scale in (1.0, 10.0)]
    assert shares[0] == shares[1]


def test_models_of_like_credit_quality_decide_nothing():
    study = credit_quality_study("reproduced")
    study = replace(study, quality={model: quality_record("imdb-tiny") for model in study.quality})
    verdict = verdict_on(study, QUALITY.replace("not informative", "informative"))
    assert verdict.verdict == "inconclusive"
    assert verdict.rule.endswith("do not differ")


def test_unmeasured_credit_quality_is_said():
    verdict = verdict_on(credit_quality_study("reproduced", quality=("imdb-tiny",)), UNMEASURED_QUALITY)
    assert verdict.verdict == "not measured"
    assert "credit quality" in verdict.rule


@pytest.mark.parametrize(
    ("grid", "claim"), [("beta", BETA), ("length", GROWS), ("kl", EQUAL_KL), ("faithful", QUALITY)]
)
def test_crashed_runs_decide_nothing_over_several_settings_either(grid, claim):
    cells = grid_cells(grid, 5, 20)
    lost = next(cell.id for cell in cells if cell.method.startswith("attention") and cell.seed == 5)
    study = study_of(
        cells, lambda cell: quiet(kl=2 / cell.settings.config["kl_coef"]), grid, crashed=lambda cell: cell.id == lost
    )
    assert "1 run of these methods crashed" in verdict_on(study, claim).rule


def test_lengths_that_differ_in_more_than_length_are_not_compared():
    cells = grid_cells("length", 3, 20)
    mixed = [cell for cell in cells if cell.setting == SHORT]
    mixed += [
        replace(cell, settings=replace(cell.settings, num_envs=8)) for cell in cells if cell.setting == "40-60 tokens"
    ]
    assert verdict_on(study_of(mixed, lambda cell: quiet(), "length"), GROWS).verdict == "not measured"
