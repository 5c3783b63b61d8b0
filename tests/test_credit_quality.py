"""Metrics against brute force and scipy, worlds against their rules, costs against counted calls."""

import itertools

import numpy as np
import pytest
import torch
from doubles import ScoreOnly, words
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tokenmdp.credit import MissingResource, SparseCredit, make_credit
from tokenmdp.evaluation.credit_quality import (
    NegationLexicon,
    PolicyAccess,
    area_over_line,
    area_under_roc,
    credit_order,
    important_tokens,
    keyword_world,
    measure,
    model_world,
    negation_world,
    rank_correlation,
    run_counted,
)
from tokenmdp.evaluation.credit_quality.ablation import AblatedScores, curve_areas, leave_one_out
from tokenmdp.evaluation.credit_quality.counting import CountingRewardModel
from tokenmdp.evaluation.credit_quality.tables import markdown, notes
from tokenmdp.evaluation.credit_quality.texts import Text, encode, episodes_of, text_of
from tokenmdp.intervals import bootstrap_interval
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.reward_models import load_reward_model
from tokenmdp.reward_models.lexicon import LexiconRewardModel, load_lexicon, toy_lexicon

TOKENS = st.lists(st.integers(-3, 3), min_size=2, max_size=9)


def padded(values, fill):
    """One text with two empty slots, and its mask."""
    row = torch.tensor([*map(float, values), fill, fill])
    mask = torch.arange(len(row)) < len(values)
    return row, mask


@given(TOKENS, st.data())
def test_rank_correlation_is_scipys_and_ignores_padding(reference, data):
    credit = data.draw(st.lists(st.integers(-3, 3), min_size=len(reference), max_size=len(reference)))
    ours, mask = padded(credit, float("nan"))
    theirs, _ = padded(reference, 99.0)
    found = rank_correlation(ours, theirs, mask).item()
    if len(set(reference)) == 1:
        assert np.isnan(found)
    elif len(set(credit)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(credit, reference).statistic, abs=1e-12)


@given(TOKENS, st.data())
def test_area_under_roc_is_the_share_of_pairs_in_the_right_order(credit, data):
    chosen = data.draw(st.lists(st.booleans(), min_size=len(credit), max_size=len(credit)))
    row, mask = padded(credit, 50.0)
    important = torch.tensor([*chosen, True, True])
    found = area_under_roc(row, important, mask).item()
    pairs = [
        (abs(a) > abs(b)) + 0.5 * (abs(a) == abs(b))
        for (a, good), (b, bad) in itertools.product(zip(credit, chosen, strict=True), repeat=2)
        if good and not bad
    ]
    assert found == pytest.approx(np.mean(pairs), abs=1e-12) if pairs else np.isnan(found)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ([0, 0, 5], [0, 0, 1]),
        ([1, -2, 3, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]),
        ([2, -2, 1, 2], [1, 1, 0, 1]),  # ties with the last of the quarter count
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
        ([3], [1]),
    ],
)
def test_important_tokens_are_the_top_quarter_without_zeros(reference, expected):
    row, mask = padded(reference, 100.0)
    assert important_tokens(row, mask).int().tolist() == [*expected, 0, 0]


def test_credit_order_follows_the_scores_sign_and_breaks_ties_evenly():
    credit, mask = torch.tensor([[1.0, 1.0, -2.0, 5.0]]).expand(400, -1), torch.tensor([1, 1, 1, 0]).bool()
    generator = torch.Generator().manual_seed(0)
    up = credit_order(credit, torch.ones(400), mask.expand(400, -1), generator)
    assert (up[:, 2] == 2).all()
    assert (up[:, 3] == 4).all()
    assert 150 < (up[:, 0] == 0).sum() < 250
    down = credit_order(credit, -torch.ones(400), mask.expand(400, -1), generator)
    assert (down[:, 2] == 0).all()


def test_area_over_line_of_a_straight_line_is_zero_whatever_the_steps():
    fractions = torch.tensor([0.0, 0.1, 0.7, 1.0])
    assert area_over_line(3 - 2 * fractions, fractions).item() == pytest.approx(0, abs=1e-7)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=8).filter(any), st.integers(0, 2**16))
def test_no_order_of_an_additive_score_beats_its_own_parts(parts, seed):
    """And the areas of an order and its reverse cancel, so a random order has 0 on average."""
    parts = torch.tensor(parts, dtype=torch.float64)
    mask, score = torch.ones(1, len(parts), dtype=torch.bool), parts.sum()[None]

    def additive(keep):
        return (keep * parts).sum(-1)

    def areas(credit):
        order = credit_order(credit[None], score, mask, torch.Generator().manual_seed(seed))
        return curve_areas(additive, order, mask, score, parts.abs().sum()[None])

    noise = torch.randn(len(parts), generator=torch.Generator().manual_seed(seed))
    best, other, reverse = areas(parts), areas(noise), areas(-noise)
    for ours, theirs, back in zip(best, other, reverse, strict=True):
        assert theirs.item() <= ours.item() + 1e-12 <= 0.5 + 1e-12
        assert theirs.item() == pytest.approx(-back.item(), abs=1e-12)


def test_bootstrap_interval_is_scipys():
    values = np.random.default_rng(0).normal(2, 1, 80)
    ours = bootstrap_interval(values, seed=3)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.03), pytest.approx(theirs.high, abs=0.03))
    assert ours == bootstrap_interval(values, seed=3)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])


# --- ablation ---------------------------------------------------------------------------------------------------------


def test_ablated_scores_are_those_of_the_shorter_texts_and_ask_once():
    texts = [Text(words("the film"), words("great but dull")), Text([], words("bad"))]
    model = CountingRewardModel(toy_lexicon())
    scores = AblatedScores(model, episodes_of(texts))
    keep = torch.tensor([[[1, 1, 1], [0, 1, 1], [0, 0, 0]], [[1, 0, 0], [1, 1, 0], [0, 1, 0]]]).bool()
    assert scores(keep).tolist() == [[1.0, -1.0, 0.0], [-2.0, -2.0, 0.0]]
    asked = model.forwards
    assert asked == 4  # one text of the second row is the same twice, and an empty text needs no model
    scores(keep)
    assert model.forwards == asked


def test_leave_one_out_of_single_words_is_their_weight():
    episodes = episodes_of([Text([], words("great but dull")), Text([], words("bad"))])
    found = leave_one_out(AblatedScores(toy_lexicon(), episodes), episodes.response_mask)
    assert found.tolist() == [[2.0, 0.0, -1.0], [-2.0, 0.0, 0.0]]


# --- worlds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (" good", [1]),
        (" not good", [-2, 1]),
        (" very good", [1, 1]),
        (" not very good", [-4, 1, 1]),
        (" very not good", [-1, -2, 1]),
        (" slightly bad", [1, -2]),
        (" not the good", [0, 0, 1]),
        (" good not", [1, 0]),
        (" not, good", [0, 0, 1]),
        (" not film very", [0, 0, 0]),
    ],
)
def test_negation_and_intensity_by_hand(text, worth):
    tokenizer = load_tokenizer("imdb-tiny")
    model = NegationLexicon(tokenizer, {"good": 1.0, "bad": -2.0})
    ids = tokenizer.encode(text)
    assert model.token_credit(ids).tolist() == worth
    assert model(episodes_of([Text([], ids)])).score.item() == sum(worth)


def test_a_words_worth_is_spread_over_its_tokens_by_characters():
    tokenizer = load_tokenizer("imdb-tiny")
    ids = tokenizer.encode(" hated", add_special_tokens=False)
    assert len(ids) == 2
    first = len(tokenizer.decode(ids[:1]).strip())
    model = LexiconRewardModel(tokenizer, {"hated": -2.0})
    assert model.token_credit(ids).tolist() == pytest.approx([-2 * first / 5, -2 * (5 - first) / 5])


@pytest.mark.parametrize("make", [negation_world, keyword_world])
def test_known_worth_sums_to_the_score_and_the_seed_decides(make):
    tokenizer = load_tokenizer("imdb-tiny")
    world = make(tokenizer, 12, seed=5)
    score = world.model(world.episodes).score
    torch.testing.assert_close(world.known.sum(-1).float(), score)
    assert not world.known[~world.episodes.response_mask].any()
    assert (world.known != 0).any(-1).all()
    assert torch.equal(world.episodes.input_ids, make(tokenizer, 12, seed=5).episodes.input_ids)
    if make is keyword_world:
        assert ((world.known != 0).sum(-1) == 1).all()
        assert set(score.tolist()) == {3.0, -3.0}


def test_the_keyword_world_needs_words_and_room():
    with pytest.raises(ValueError, match="at least 6"):
        keyword_world(load_tokenizer("imdb-tiny"), 2, max_new_tokens=5)
    with pytest.raises(ValueError, match="whole word with a blank"):
        keyword_world(load_tokenizer("toy"), 2)


# --- measuring --------------------------------------------------------------------------------------------------------


def by_name(result):
    return {method.name: method for method in result.methods}


@pytest.fixture(scope="module")
def keyword():
    names = ("sparse", "uniform", "attention", "red", "abc-d", "integrated-gradients")
    methods = {name: make_credit(name, credit_beta=1.0) for name in names}
    return measure(keyword_world(load_tokenizer("imdb-tiny"), 30, seed=1), methods)


def test_methods_that_find_the_keyword_equal_the_reference(keyword):
    rows = by_name(keyword)
    for name in ("attention", "red"):
        assert rows[name].metrics == rows["reference"].metrics
    assert rows["reference"].metrics["auc"] == (1, 1, 1)
    assert rows["reference"].metrics["deletion"].value > 0.4
    assert rows["uniform"].metrics["auc"] == (0.5, 0.5, 0.5)
    assert rows["uniform"].metrics["spearman"] == (0, 0, 0)
    assert rows["random"].metrics["deletion"].low < 0.05 < 0.4
    assert keyword.attention.level == "informative"


def test_what_cannot_run_is_listed_with_its_reason(keyword):
    rows = by_name(keyword)
    assert "no agent has attached one" in rows["abc-d"].unavailable
    assert "does not provide gradients" in rows["integrated-gradients"].unavailable
    assert (rows["abc-d"].texts, rows["abc-d"].metrics) == (0, {})


def test_a_method_does_not_depend_on_the_others(keyword):
    world = keyword_world(load_tokenizer("imdb-tiny"), 30, seed=1)
    alone = by_name(measure(world, {"uniform": make_credit("uniform")}))
    for name in ("random", "uniform"):
        assert alone[name] == by_name(keyword)[name]


def test_attention_without_signs_loses_exactly_the_signs():
    world = negation_world(load_tokenizer("imdb-tiny"), 60, seed=2)
    nonzero = world.known.sum(-1).abs() > 1e-6  # without a score there is nothing to distribute
    rows = by_name(measure(world, {"attention": make_credit("attention", credit_beta=1.0)}))
    assert rows["attention"].metrics["spearman_abs"].value == pytest.approx(nonzero.double().mean().item(), abs=1e-6)
    assert rows["attention"].metrics["spearman"].high < 0.8
    assert rows["attention"].metrics["deletion"].high < rows["reference"].metrics["deletion"].low


def test_expensive_methods_stop_after_the_batch_that_spends_the_forwards():
    world = keyword_world(load_tokenizer("imdb-tiny"), 50, seed=1)
    done = []
    methods = {"shapley": make_credit("shapley", budget=32), "sparse": make_credit("sparse")}
    rows = by_name(measure(world, methods, max_forwards=21, progress=done.append))
    assert (rows["shapley"].texts, rows["sparse"].texts) == (20, 40)  # 20 texts at a time
    assert 2 < rows["shapley"].reward_forwards <= 33
    assert done == [20, 40, 50]


def test_a_real_model_is_measured_against_leave_one_out():
    model, tokenizer = load_reward_model("imdb-tiny"), load_tokenizer("imdb-tiny")
    lines = ("I hated this awful mess.", "A great film with a lovely cast!", "It was not good, sadly.")
    world = model_world(model, tokenizer, episodes_of([encode(tokenizer, line, "Well:") for line in lines]), "lines")
    methods = {"attention": make_credit("attention", credit_beta=1.0), "sparse": make_credit("sparse")}
    result = measure(world, methods)
    rows = by_name(result)
    lengths = world.episodes.response_mask.sum(-1).double()
    assert rows["reference"].reward_forwards == pytest.approx((lengths + 1).mean().item())
    assert rows["reference"].metrics["spearman"] == (1, 1, 1)
    assert result.attention.spearman == rows["attention"].metrics["spearman_abs"]
    mask = world.episodes.response_mask
    assert torch.equal(result.examples["sparse"].bool(), mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True)))


def test_a_model_with_another_vocabulary_or_without_attention_is_measured_too():
    tokenizer = load_tokenizer("imdb-tiny")
    lines = ("a great film", "not bad, but dull", "good fun and a poor plot")
    episodes = episodes_of([encode(tokenizer, line) for line in lines])
    result = measure(model_world(load_lexicon("lexicon:toy"), tokenizer, episodes, "lines"),
                     {"red": make_credit("red")})  # fmt: skip
    assert by_name(result)["red"].reward_forwards > 1  # with another vocabulary each prefix costs a forward
    toy = episodes_of([Text([], words("great but dull")), Text([], words("bad film"))])
    result = measure(model_world(ScoreOnly(), load_tokenizer("toy"), toy, "words"), {"sparse": make_credit("sparse")})
    assert result.attention is None


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    tokenizer = load_tokenizer("imdb-tiny")
    return tokenizer, episodes_of([encode(tokenizer, "not a good film", "It was"), encode(tokenizer, "great", "It is")])


@pytest.mark.parametrize(
    ("name", "options", "forwards"),
    [
        ("sparse", {}, 1),
        ("attention", {}, 1),
        ("red", {}, 1),  # all prefixes from the forward that scores
        ("integrated-gradients", {"steps": 4}, 1 + 4 * (1 + 2) + 1),  # a step is a forward and a backward; baseline
        ("deeplift", {}, 1 + 2 + 2 + 1),
    ],
)
def test_costs_are_counted(texts, name, options, forwards):
    tokenizer, episodes = texts
    counted = run_counted(
        make_credit(name, **options), episodes, load_reward_model("imdb-tiny"), tokenizer, PolicyAccess()
    )
    assert counted.reward_forwards == forwards * len(episodes.input_ids)
    assert counted.policy_forwards == 0


def test_shapleys_cost_is_what_it_reports(texts):
    tokenizer, episodes = texts
    method = make_credit("shapley", budget=64)
    counted = run_counted(method, episodes, load_reward_model("imdb-tiny"), tokenizer, PolicyAccess())
    assert counted.reward_forwards == counted.credit.report["reward_calls"].sum() + 2


def test_other_reward_models_and_policies_count(texts):
    from tokenmdp.runs.credit_options import policy_access

    tokenizer, episodes = texts
    model = load_reward_model("imdb-tiny")
    needs = frozenset({"policy_attention", "tuned_policy"})
    access = policy_access("imdb-tiny", tokenizer, episodes.prompt_slots, episodes.response_mask.shape[1], "cpu", needs)
    counted = run_counted(make_credit("abc-d"), episodes, model, tokenizer, access)
    assert (counted.reward_forwards, counted.policy_forwards) == (2, 2)
    counted = run_counted(make_credit("rto", tuned="imdb-tiny"), episodes, model, tokenizer, access)
    assert (counted.reward_forwards, counted.policy_forwards) == (2, 4)
    with pytest.raises(MissingResource, match="because"):
        run_counted(make_credit("abc-d"), episodes, model, tokenizer, PolicyAccess(refusal="because"))


def test_counting_changes_nothing(texts):
    _, episodes = texts
    model = load_reward_model("imdb-tiny")
    counting = CountingRewardModel(model)
    needs = frozenset({"attention", "prefix_scores"})
    for ours, theirs in zip(counting(episodes, needs=needs), model(episodes, needs=needs), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert counting.provides == model.provides
    assert repr(counting) == repr(model)
    assert counting.forwards == 2


# --- texts and words --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=4), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
                min_size=1, max_size=4))  # fmt: skip
def test_texts_survive_the_layout(pairs):
    episodes = episodes_of([Text(*pair) for pair in pairs])
    assert [tuple(text_of(episodes, row)) for row in range(len(pairs))] == pairs


class FailsAtLength(SparseCredit):
    """Refuses texts of many tokens, as a game beyond its budget does."""

    name, longest = "fails", 3

    def __call__(self, outcome, resources):
        if outcome.episode.response_mask.sum(-1).max() > self.longest:
            raise ValueError("budget is 6")
        return super().__call__(outcome, resources)


class Lost(SparseCredit):
    """Needs something that is not attached."""

    def __call__(self, outcome, resources):
        raise MissingResource("nobody is here")


def test_a_failure_is_not_called_unavailable_and_what_was_measured_stays():
    tokenizer = load_tokenizer("toy")
    texts = [Text([], words("great but dull"))] * 20 + [Text([], words("a very dull film"))] * 5
    world = model_world(LexiconRewardModel(tokenizer, {"dull": -1.0, "great": 2.0}), tokenizer, episodes_of(texts), "x")
    methods = {"fails": FailsAtLength(), "lost": Lost(), "sparse": SparseCredit(), "deeplift": make_credit("deeplift")}
    result = measure(world, methods, max_forwards=22)
    rows = {method.name: method for method in result.methods}
    assert (rows["fails"].unavailable, rows["fails"].texts) == (None, 20)
    assert rows["fails"].stopped == "it failed in texts 21 to 25: budget is 6"
    assert (rows["lost"].unavailable, rows["lost"].stopped) == ("nobody is here", None)
    assert rows["deeplift"].unavailable.endswith("does not provide gradients")
    assert (rows["sparse"].texts, rows["sparse"].stopped) == (25, None)
    assert "fails: the first texts only, because it failed in texts 21 to 25: budget is 6" in notes(result)
    assert "| fails | 20 of 25 |" in markdown([result], {}, "")
    spent = measure(world, {"sparse": SparseCredit()}, max_forwards=5).methods[-1]
    assert (spent.texts, spent.stopped) == (20, "it has spent its 5 reward-model forwards (--max-forwards)")
