"""The figures of a study: what they draw, what they leave out and say, and how they look."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_doubles import Course, grid_cells, make_cell, make_result, paper_like, synthetic_study

from tokenmdp.intervals import Estimate
from tokenmdp.report.colours import COLOURS, DARK_COLOURS, DARK_ORDERED, ORDERED, looks
from tokenmdp.report.drawing import inline, new_figure, relative, spread_apart
from tokenmdp.study.directory import load_study
from tokenmdp.study.outcomes import by_setting, family
from tokenmdp.study.report.answers import change_answer, growth_answer, leads_answer, quality_answer, trend_answer
from tokenmdp.study.report.critics import critic_section
from tokenmdp.study.report.figures import diagnostics, learning_curves
from tokenmdp.study.report.lines import draw_band
from tokenmdp.study.report.parts import bands_of
from tokenmdp.study.report.tradeoffs import gold_against_kl, score_against_kl


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A study of the grids that these figures are about."""
    path = tmp_path_factory.mktemp("study")
    return load_study(synthetic_study(path, grids=("imdb", "length", "kl"), seeds=3, updates=30))


def test_the_arrow_says_the_share_of_the_steps(full):
    """Curves without noise: sparse is highest at its end, and attention is there where its formula says."""

    def course(cell):
        half = {"sparse": 20.0, "attention": 8.0}[cell.method]
        return Course(start=0, end=10, half=half, noise=0, spread=0)

    groups = {
        method: [make_result(cell, course(cell)) for cell in (make_cell(method, seed, updates=60) for seed in (1, 2))]
        for method in ("sparse", "attention")
    }
    figure, remarks = learning_curves(groups)
    texts = [text.get_text() for text in figure.axes[0].texts]
    sparse, own = (np.array(groups[method][0].metrics["score_mean"]) for method in ("sparse", "attention"))
    highest = max(np.mean(sparse[end - 5 : end]) for end in range(5, 61))
    step = next(end for end in range(5, 61) if np.mean(own[end - 5 : end]) >= highest)
    assert f"sparse's maximum {highest:.2f} at update 60" in texts
    assert f"ABC is there after {step / 60:.0%} of the steps, update {step}" in texts
    assert remarks == [
        "The arrows say after what share of sparse's steps another method stands where sparse's mean curve is highest; "
        "below 6 seeds they have no interval"
    ]
    assert "fewer than the curves" in learning_curves(groups | {"sparse": groups["sparse"][:1]})[1][1]
    assert learning_curves({"attention": groups["attention"]})[1] == []  # nothing to compare with, so no arrows


def test_a_collapsed_seed_neither_flattens_the_picture_nor_goes_unsaid():
    def course(cell):
        return replace(paper_like(cell), collapse=0.5 if (cell.method, cell.seed) == ("sparse", 2) else 2.0)

    groups = {}
    for cell in grid_cells("quick", seeds=5, updates=40):
        groups.setdefault(cell.method, []).append(make_result(cell, course(cell)))
    figure, remarks = learning_curves(groups)
    assert figure.axes[1].get_ylim()[1] < 40
    kl = np.mean([result.metrics["kl"] for result in groups["sparse"]], axis=0)
    highest = max(np.mean(kl[end - 5 : end]) for end in range(5, 41))
    assert remarks[0] == f"sparse leaves the picture: its mean KL gets to {highest:.3g}"


def test_a_mean_a_little_outside_of_the_picture_widens_it():
    cells = [make_cell("sparse", seed, updates=40) for seed in (1, 2, 3)]
    courses = [Course(kl=kl, noise=0, spread=0) for kl in (10, 10, 15)]
    figure, remarks = learning_curves({"sparse": list(map(make_result, cells, courses))})
    assert remarks == []
    mean = max(figure.axes[1].lines, key=lambda line: line.get_linewidth())
    assert figure.axes[1].get_ylim()[1] > mean.get_ydata().max()


def test_a_collapse_downwards_is_said_too():
    courses = [Course(), Course(collapse=0.5, collapsed_kl=-450), Course()]
    cells = [make_cell("sparse", seed, updates=40) for seed in (1, 2, 3)]
    groups = {"sparse": list(map(make_result, cells, courses)), "red": [make_result(cell, Course()) for cell in cells]}
    figure, remarks = learning_curves(groups)
    assert figure.axes[1].get_ylim()[0] > -20
    assert re.fullmatch(r"sparse leaves the picture: its mean KL gets to \N{MINUS SIGN}\d+(\.\d)?", remarks[0])


def test_a_collapsed_seed_does_not_squeeze_the_points_of_the_others(full):
    settings = {
        setting: {method: list(results) for method, results in groups.items()}
        for setting, groups in by_setting(full, "kl").items()
    }
    cell = settings["8-16 tokens, kl_coef=0.2"]["sparse"][0].cell
    settings["8-16 tokens, kl_coef=0.2"]["sparse"][0] = make_result(cell, Course(collapse=0.5))
    figure, remarks, leads = score_against_kl(settings)
    assert figure.axes[0].get_xlim()[1] < 60
    assert remarks[0] == "Points outside of the picture, drawn out by single seeds: 1"
    with_sparse = [remark for remark in remarks if " \N{MINUS SIGN} sparse at equal KL" in remark]
    assert len(with_sparse) == 3
    assert all("1 collapsed run left out" in remark for remark in with_sparse)
    assert "RED \N{MINUS SIGN} ABC" in leads
    assert len(leads) + sum("0 of 3 seeds" in remark for remark in remarks) == 6  # pairs of four methods


def test_many_methods_without_a_baseline_are_not_compared_and_that_is_said(full):
    methods = ("uniform", "attention", "red", "mine", "yours")
    settings = by_setting(full, "kl")
    five = {setting: dict.fromkeys(methods, groups["red"]) for setting, groups in settings.items()}
    figure, remarks, leads = score_against_kl(five)
    assert [text.get_text() for text in figure.axes[1].texts] == ["no pairs to compare"]
    assert (remarks, leads) == (["Of more than 4 methods only pairs with sparse are compared"], {})


def test_few_runs_are_drawn_one_by_one_and_three_have_a_band():
    look, values = looks(["red"])["red"], np.random.default_rng(0).normal(size=(11, 40))
    for seeds, bands, lines in ((1, 0, 1), (2, 0, 2), (3, 1, 2), (10, 1, 2), (11, 1, 1)):
        axes = new_figure(2, 1).subplots()
        mean = draw_band(axes, np.arange(40.0), values[:seeds], look)
        assert (len(axes.collections), len(axes.lines)) == (bands, lines)
        assert axes.lines[-1].get_ydata() == pytest.approx(mean)
        if lines == 2:
            drawn = axes.lines[0].get_ydata()
            parts = np.array_split(values[seeds - 1], 15)
            assert np.isnan(drawn).sum() == seeds  # one path of as many pieces
            assert drawn[-16:-1] == pytest.approx([part.mean() for part in parts])
            assert axes.lines[0].get_linewidth() < axes.lines[1].get_linewidth() / 3


def test_a_run_that_broke_has_a_cross_at_its_end():
    """Also beside longer runs of another method."""
    cells = [make_cell("sparse", seed, updates=40) for seed in (1, 2, 3)]
    courses = [Course(), Course(collapse=0.5), Course()]
    groups = {"sparse": list(map(make_result, cells, courses))}
    upper = learning_curves(groups | {"red": [make_result(make_cell("red", updates=60), Course())]})[0].axes[0]
    (cross,) = [line for line in upper.lines if line.get_marker() == "X"]
    assert cross.get_xdata() == [40]
    assert upper.get_ylim()[0] <= cross.get_ydata()[0] < 2


def test_an_arrow_has_the_interval_of_its_share():
    """Some resamples of the seeds never get to sparse's maximum: the interval has no upper end and reaches the edge."""
    ends = {"sparse": [9, 9, 9, 9, 9, 9], "attention": [14, 14, 14, 14, 2, 2], "red": [20] * 6}
    groups = {
        method: [make_result(make_cell(method, seed, updates=60), Course(end=end, noise=0, spread=0, half=10))
                 for seed, end in enumerate(own)] for method, own in ends.items()
    }  # fmt: skip
    figure, remarks = learning_curves(groups)
    upper = figure.axes[0]
    assert "brackets: 95% bootstrap intervals" in " ".join(remarks)
    texts = " ".join(text.get_text() for text in upper.texts)
    (low,) = re.findall(r"ABC is there after \d+% \[(\d+)%, never\] of the steps", texts)
    bars = [line for line in upper.lines if line.get_linewidth() == 6]
    assert len(bars) == texts.count("is there after")
    assert max(bar.get_xdata()[1] for bar in bars) == upper.get_xlim()[1]
    assert min(bar.get_xdata()[0] for bar in bars) < 60 * int(low) / 100 + 1


def test_the_gold_score_is_drawn_against_the_root_of_the_kl(full):
    groups = {"red": by_setting(full, "imdb")["8-16 tokens"]["red"]}
    figure, remarks = gold_against_kl(groups)
    thick = [max((line for line in axes.lines if line.get_clip_on()), key=lambda line: line.get_linewidth())
             for axes in figure.axes]  # fmt: skip
    columns = {key: np.array([run.evaluations[key] for run in groups["red"]]) for key in ("kl", "score", "gold")}
    root, score, gold = np.sqrt(columns["kl"]).mean(0), columns["score"].mean(0), columns["gold"].mean(0)
    updates = groups["red"][0].evaluations["update"]
    expected = ((root[1:], score[1:]), (root[1:], gold[1:]), (updates, gold))
    for line, (x, y) in zip(thick, expected, strict=True):
        assert line.get_xdata() == pytest.approx(x)
        assert line.get_ydata() == pytest.approx(y)
    assert remarks == []


def runs(method, ends, **changes):
    return [make_result(make_cell(method, seed, updates=40, **changes), Course(end=end, noise=0, spread=0))
            for seed, end in enumerate(ends)]  # fmt: skip


def evaluated(results, kept):
    """With some of their evaluations."""
    return [replace(run, evaluations={key: column[kept] for key, column in run.evaluations.items()}) for run in results]


def test_captions_say_what_the_intervals_say():
    groups = {"sparse": runs("sparse", [9, 9, 9]), "red": runs("red", [12, 12.1, 12.2]),
              "uniform": runs("uniform", [5, 5.1, 5]), "attention": runs("attention", [6, 9, 13])}  # fmt: skip
    said = leads_answer(groups, "Score")
    assert re.fullmatch(
        r"Score, less sparse's with the same seed: higher with RED \+[^;]*; lower with uniform \N{MINUS SIGN}[^;]*; "
        r"not decided \(the interval includes 0\) ABC \+0.\d\d \[\N{MINUS SIGN}[^;]*\]\.", said,
    )  # fmt: skip
    few = {method: results[:2] for method, results in groups.items()}
    assert "higher with" not in leads_answer(few, "Score")
    assert "too few seeds" in leads_answer(few, "Score")
    assert leads_answer({"red": groups["red"]}, "Score").startswith("Score: RED +")
    assert change_answer(groups, "score", "the score").startswith("Change of the score from update 0 to 40: rises with")
    two = {method: evaluated(own, slice(None, None, 20)) for method, own in groups.items()}  # at updates 0 and 40
    assert change_answer(two, "score", "it", since=2 / 3) == change_answer(groups, "score", "it")
    short = {"red": groups["red"], "sparse": [make_result(make_cell("sparse", 1, updates=20), Course())]}
    assert change_answer(short, "score", "it", since=2 / 3).startswith("Change of it from update 14 to 20: ")
    assert change_answer(two | {"red": evaluated(two["red"], slice(1))}, "score", "it") == ""
    assert "each run, in means of 2 updates" in bands_of(groups, 40)  # 36 trailing means in 15 parts


def test_captions_of_a_sweep_say_whether_it_rises():
    swept = {
        f"{beta}": runs("attention", [7 + 2 * beta + 0.01 * seed * beta for seed in range(3)], credit_beta=beta)
        for beta in (0.0, 0.5, 1.0)
    }
    assert re.search(r"per seed: rises, slope( without the value 0)? \+[^,]*, [^,]*, slope", trend_answer(swept))
    flat = {name: runs("attention", [9, 8 + 2 * beta, 9 - beta], credit_beta=beta)
            for name, beta in (("a", 0.5), ("b", 1.0))}  # fmt: skip
    assert "per seed: not decided (the interval includes 0) slope" in trend_answer(flat)
    assert "without" not in trend_answer(flat)


def test_captions_on_lengths_and_reward_models_follow_the_numbers():
    short = {"sparse": runs("sparse", [9, 9, 9]), "red": runs("red", [10, 10, 10.1])}
    long = {"sparse": runs("sparse", [9, 9, 9]), "red": runs("red", [12, 12, 12.1])}
    assert "from short to long: grows with RED +" in growth_answer({"short": short, "long": long}, "short", "long")
    assert "shrinks with RED" in growth_answer({"short": short, "long": long}, "long", "short")
    quality = {"one": {"red": Estimate(0.5, 0.4, 0.6)}, "two": {"red": Estimate(0.1, 0.0, 0.2)}}
    assert "it does not fall in this order" in quality_answer({"one": short, "two": long}, quality)
    assert "it falls in this order" in quality_answer({"one": long, "two": short}, quality)
    assert "is not decided" in quality_answer({"one": long, "two": long}, quality)
    assert "is not decided" in quality_answer({"one": long, "two": short}, quality | {"two": quality["one"]})


@given(st.lists(st.tuples(st.integers(-9999, 9999), st.integers(-9999, 9999)), min_size=2, max_size=9))
def test_relative_paths_lead_to_the_same_places(points):
    pairs = [f"{x / 10:g} {y / 10:g}" for x, y in points]
    path = relative("M" + "L".join(pairs))
    steps = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", path)
    moved = np.cumsum(np.array(steps, dtype=float).reshape(-1, 2), axis=0)
    assert moved == pytest.approx(np.array(points) / 10)


def test_diagnostics_have_a_panel_for_what_is_recorded_and_say_what_is_zero(full):
    groups = by_setting(full, "imdb")["8-16 tokens"]
    figure, remarks = diagnostics(groups)
    shown = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert len(shown) == 5
    assert remarks == ["Not drawn, 0 throughout: episodes without usable attention"]
    names = {text.get_text() for text in shown["attention on the response"].texts}
    assert names == {"ABC", "ABC-D", "ABC-D2"}
    assert len(shown["entropy of the policy"].texts) == len(groups)


def test_a_diagnostic_that_leaves_its_picture_is_called_by_its_name(full):
    groups = {"sparse": list(by_setting(full, "imdb")["8-16 tokens"]["sparse"])}
    wild = groups["sparse"][0].metrics
    wild = wild | {"explained_variance": [-400.0, *wild["explained_variance"][1:]]}
    groups["sparse"][0] = replace(groups["sparse"][0], metrics=wild)
    _, remarks = diagnostics(groups)
    assert remarks[0].startswith("sparse leaves the picture: its mean explained variance of the returns gets to")


def test_families_differ_in_what_is_varied_alone(full):
    settings = by_setting(full, "kl")
    assert family(settings, ("kl_coef",)).keys() == settings.keys()
    assert len(family(settings | by_setting(full, "length"), ("kl_coef",))) == 4
    assert len(family(settings, ("horizon_range",))) == 1


@given(st.lists(st.floats(-10, 10), max_size=8), st.floats(0.1, 3))
def test_labels_move_apart_in_order_and_no_more_than_needed(places, gap):
    moved = spread_apart(places, gap)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for left, right in itertools.pairwise(order):
        assert moved[right] - moved[left] >= gap - 1e-6
    if all(places[right] - places[left] >= gap for left, right in itertools.pairwise(order)):
        assert moved == pytest.approx(places)
    assert sum(moved) == pytest.approx(sum(places), abs=1e-6)


def test_methods_keep_their_looks_whoever_is_beside_them():
    every = ["sparse", "uniform", "attention", "abc-d", "abc-d2", "red"]
    for methods in (["red"], ["attention", "mine", "red"], [*every, "a", "b"]):
        chosen = looks(methods)
        assert len({look.colour for look in chosen.values()}) == len(methods)
        assert all(chosen[method] == looks(every)[method] for method in methods if method in every)
    assert len(looks([f"method {number}" for number in range(30)])) == 30


def luminance(colour):
    parts = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def test_lines_stand_out_from_their_page():
    for page_colour, colours in (("#fdfdfc", (*COLOURS, *ORDERED)), ("#17181b", (*DARK_COLOURS, *DARK_ORDERED))):
        for colour in colours:
            low, high = sorted((luminance(colour), luminance(page_colour)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def test_an_inlined_figure_has_its_own_names_and_theme_colours():
    svg = (
        '<?xml version="1.0"?><svg xmlns="x" viewBox="0 0 1 1" width="1"><metadata>m</metadata><g id="a" '
        f'style="stroke: {COLOURS[2]}; fill: #fdfdfc" clip-path="url(#b)"><path id="c" d="M0 0L1 1" '
        'style="stroke: #111"/><use xlink:href="#c" x="1" style="fill: #222; stroke: #111"/></g></svg>'
    )
    body = inline(svg, "kl", "a &amp; b")
    assert body == (
        '<svg viewBox="0 0 1 1" role="img" aria-label="a &amp; b"><g style="stroke:var(--f-s2);fill:'
        'var(--f-page)" clip-path="url(#kl-0)"><path id="kl-1" d="M0 0l1 1" style="stroke:#111"/>'
        '<use href="#kl-1" x="1" style="fill:#222"/></g></svg>'
    )
    assert new_figure(2, 1).get_size_inches().tolist() == [2, 1]


EXPLAINED = {"slow": 0.2, "shared": 0.6, "separate": 0.8}  # by sparse's critics, at the end
LEADS = {"slow": 2.0, "shared": 0.5, "separate": 0.0}  # of attention, over a whole run


def by_critic(cell):
    """A course whose critic explains so much, and whose score is as far above sparse's."""
    critic = cell.setting.rpartition("=")[2]
    lead = {"sparse": 0.0, "attention": LEADS[critic], "red": 1.0}[cell.method]
    end = 5.0 + lead + 0.01 * cell.seed
    return Course(start=end, end=end, noise=0, spread=0, explained=EXPLAINED[critic])


def test_leads_stand_over_what_the_critic_explains(tmp_path):
    study = load_study(synthetic_study(tmp_path, grids=("critic",), seeds=3, updates=100, course=by_critic))
    section = critic_section(study)
    picture, _ = section.pictures
    drawn = [line.get_ydata() for line in picture.figure.axes[0].lines if len(line.get_ydata()) == 3]
    assert any(np.allclose(heights, [2.0, 0.5, 0.0]) for heights in drawn)
    assert any(np.allclose(heights, [1.0, 1.0, 1.0]) for heights in drawn)
    caption = picture.caption.replace("\N{MINUS SIGN}", "-")
    assert "from slow to shared: shrinks with ABC -1.50" in caption
    assert "from slow to separate: shrinks with ABC -2.00" in caption
    assert "not decided (the interval includes 0) RED " in caption
    assert "Crosses" not in caption
    told = re.search(r"explains: slow (\S+) .*, shared (\S+) .*, separate (\S+)", caption)
    halfway = 1 - 0.5 ** (17.5 / 15)  # where the median of the first 34 of 100 updates is
    assert [float(number) for number in told.groups()] == pytest.approx(
        [EXPLAINED[name] * halfway for name in EXPLAINED], abs=0.02
    )


def test_each_critic_has_its_curves(tmp_path):
    study = load_study(synthetic_study(tmp_path, grids=("critic",), seeds=3, updates=100, course=by_critic))
    figure = critic_section(study).pictures[1].figure
    upper, lower = figure.axes[:3], figure.axes[3:]
    assert [axes.get_title(loc="left") for axes in upper] == ["slow", "shared", "separate"]
    assert len({axes.get_ylim() for axes in upper}) == len({axes.get_ylim() for axes in lower}) == 1
    for axes, explained in zip(lower, EXPLAINED.values(), strict=True):
        ends = [line.get_ydata()[-1] for line in axes.lines if len(line.get_ydata()) > 50]
        assert ends
        assert ends == pytest.approx([explained] * len(ends), abs=0.05)
    named = {text.get_text() for axes in upper for text in axes.texts}
    assert {"ABC", "RED", "sparse"} <= named


def test_without_sparse_credit_no_critic_is_compared(tmp_path):
    path = synthetic_study(tmp_path, grids=("critic",), seeds=2, updates=20, keep=lambda cell: cell.method != "sparse")
    section = critic_section(load_study(path))
    assert not section.pictures
    assert "--critics" in section.missing
