"""Score at equal KL, over the KL that all seeds share, and the Pareto front."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_doubles import Course, make_cell, make_result

from tokenmdp.study.equal_kl import (
    difference_at_equal_kl,
    equal_kl,
    leads_in_bins,
    mean_leads,
    pareto_front,
    score_at_kl,
    scores_in_bins,
)
from tokenmdp.study.outcomes import area
from tokenmdp.study.statistics import mean_difference

numbers = st.floats(-100, 100).map(lambda value: round(value, 3))


def runs(method, ends):
    """A list of seeds for each KL coefficient; ``ends[i][j]`` is (KL, score) of coefficient i, seed j + 1."""
    return [
        [
            make_result(
                make_cell(method, seed, updates=20),
                Course(start=0, end=score, half=1e-3, noise=0, spread=0, kl=kl),
            )
            for seed, (kl, score) in enumerate(seeds, 1)
        ]
        for seeds in ends
    ]


def fallen(result):
    """The same run, with a score that ends back at the start."""
    scores = result.metrics["score_mean"]
    return replace(result, metrics=result.metrics | {"score_mean": [*scores[:10], *[0.0] * 10]})


SPARSE = [[(5, 1), (5, 1)], [(15, 3), (15, 3)]]


def test_seeds_are_compared_over_the_kl_that_all_of_them_share():
    """The first seed leads by 1 everywhere, the second by its KL - 8: over 8 to 12 that is 2 on average."""
    own = [[(4, 1.8), (8, 1.6)], [(16, 4.2), (12, 6.4)]]
    found = equal_kl(runs("attention", own), runs("sparse", SPARSE))
    assert found.differences == pytest.approx([1.0, 2.0], abs=0.15)  # the doubles' KL is noisy
    assert found.shared == pytest.approx(4 / 12, abs=0.1)
    assert (found.seeds, found.collapsed) == (2, 0)


def test_little_kl_in_common_is_no_comparison():
    own = [[(14, 1), (14, 1)], [(30, 2), (30, 2)]]  # .01 nat or a few, of 25
    found = equal_kl(runs("attention", own), runs("sparse", SPARSE))
    assert not found.differences.size
    assert 0 <= found.shared < 0.1
    assert found.seeds == 2


def test_one_seed_elsewhere_leaves_nothing_in_common():
    own = [[(5, 1), (40, 1)], [(15, 3), (50, 3)]]
    found = equal_kl(runs("attention", own), runs("sparse", SPARSE))
    assert not found.differences.size
    assert found.shared == 0


def test_a_collapsed_run_is_no_point_of_a_line_through_healthy_ones():
    healthy = [[(5, 2), (5, 2)], [(10, 3), (10, 3)], [(15, 4), (15, 4)]]
    sparse = [[(5, 1), (5, 1)], [(10, 2), (10, 2)], [(15, 3), (15, 3)]]
    own, other = runs("attention", healthy), runs("sparse", sparse)
    other[1][0] = fallen(other[1][0])
    found = equal_kl(own, other)
    assert found.differences == pytest.approx([1.0, 1.0], abs=0.1)
    assert found.collapsed == 1


def test_a_seed_with_one_healthy_run_is_left_out_and_counted():
    own, other = runs("attention", [[(5, 2), (5, 2)], [(15, 4), (15, 4)]]), runs("sparse", SPARSE)
    own[1][1] = fallen(own[1][1])
    found = equal_kl(own, other)
    assert found.differences == pytest.approx([1.0], abs=0.1)
    assert (found.seeds, found.collapsed) == (2, 1)


def of_runs(method, course, seeds=8):
    cells = [make_cell(method, seed, updates=60) for seed in range(1, seeds + 1)]
    return [make_result(cell, replace(course, start=0.0, noise=0.2, spread=0.1)) for cell in cells]


def told(own, baseline):
    return mean_difference(mean_leads(leads_in_bins(own, baseline)))


def test_spending_kl_faster_on_the_same_curve_is_no_lead():
    """Both have score = KL ** (2/3) / 2, the one in a third of the updates: it leads at each update, not at each KL."""
    own, baseline = (
        of_runs(method, Course(end=0.5 * 20 ** (2 / 3), half=half, kl=20.0))
        for method, half in (("attention", 6.0), ("sparse", 18.0))
    )
    ahead = mean_difference([area(left) - area(right) for left, right in zip(own, baseline, strict=True)])
    assert ahead.low > 0.5
    lead = told(own, baseline)
    assert lead.low < 0 < lead.high
    assert abs(lead.value) < 0.15


@pytest.mark.parametrize("effect", [0.5, -0.5])
def test_a_lead_at_equal_kl_is_found_with_its_size_and_sign(effect):
    own = of_runs("attention", Course(end=4.0, half=6.0, kl=20.0))
    other = [replace(r, metrics=r.metrics | {"score_mean": [x - effect for x in r.metrics["score_mean"]]})
             for r in of_runs("attention", Course(end=4.0, half=6.0, kl=20.0))]  # fmt: skip
    lead = told(own, other)
    assert lead.value == pytest.approx(effect)
    assert lead.side() == np.sign(effect)


def test_when_both_methods_collapse_what_they_did_before_is_compared_alike():
    """Half of each method's runs break: no lead, in either direction, and no run is dropped."""
    groups = []
    for method in ("attention", "sparse"):
        healthy, broken = (
            of_runs(method, Course(end=4.0, half=8.0, kl=20.0, collapse=at), seeds=8) for at in (2.0, 0.6)
        )
        groups.append([*healthy[:4], *broken[4:]])
    leads = leads_in_bins(*groups)
    assert leads.shape == (8, 3)
    assert np.isfinite(leads).all()
    lead, back = told(*groups), told(*groups[::-1])
    assert lead.low < 0 < lead.high
    assert (back.low, back.high) == pytest.approx((-lead.high, -lead.low))


def test_a_run_that_never_reaches_a_bin_has_no_lead_there():
    own, other = of_runs("attention", Course(kl=20.0, half=4.0), 2), of_runs("sparse", Course(kl=8.0, half=4.0), 2)
    leads = leads_in_bins(own, other)
    assert np.isfinite(leads[:, 0]).all()
    assert np.isnan(leads[:, 2]).all()
    assert mean_leads(leads[:, 2:]).size == 0


@given(st.lists(st.tuples(st.floats(0, 30), numbers), min_size=1, max_size=20))
def test_bins_hold_each_update_once(updates):
    kl, score = np.array(updates).T
    bins = scores_in_bins(kl, score, (0, 10, 20, 31))
    for place, (low, high) in enumerate([(0, 10), (10, 20), (20, 31)]):
        held = [value for at, value in updates if low <= at < high]
        assert bins[place] == pytest.approx(np.mean(held)) if held else np.isnan(bins[place])


def test_score_at_kl_is_piecewise_linear_and_undefined_outside():
    points = ([3.0, 1.0, 2.0], [9.0, 1.0, 4.0])
    assert score_at_kl(*points, [1.0, 1.5, 2.5, 3.0]).tolist() == [1.0, 2.5, 6.5, 9.0]
    assert np.isnan(score_at_kl(*points, [0.9, 3.1])).all()


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_at_equal_kl_a_shift_in_score_is_the_difference(scores, shift):
    kl = np.arange(len(scores)) * 1.0
    other = np.array(scores) + shift
    between = (0.25, len(scores) - 1.0)
    assert difference_at_equal_kl((kl, other), (kl, scores), between) == pytest.approx(shift, abs=1e-9)
    assert np.isnan(difference_at_equal_kl((kl + 100, other), (kl, scores), between))


def test_spending_more_kl_on_the_same_curve_is_no_difference_at_equal_kl():
    kl = np.linspace(0, 4, 9)
    assert difference_at_equal_kl((2 * kl, 3 * 2 * kl), (kl, 3 * kl), (0.0, 4.0)) == pytest.approx(0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front_is_what_no_point_dominates(points):
    def beaten(point):
        return any(
            other[0] <= point[0] and other[1] >= point[1] and other != point for other in points
        )  # at most its KL, at least its score

    front = pareto_front(*zip(*points, strict=True))
    kept = [points[place] for place in front]
    assert kept == sorted({point for point in points if not beaten(point)})
