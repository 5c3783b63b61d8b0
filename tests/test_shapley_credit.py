"""Shapley and Owen credit: the value of units of text to a reward model."""

import re

import pytest
import torch
from doubles import HashRewardModel, ScoreOnly, of_words
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp.credit import MissingResource, OwenCredit, Resources, ShapleyCredit, make_credit
from tokenmdp.credit.deletion import scores_of_kept
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.reward_models import load_reward_model
from tokenmdp.reward_models.lexicon import TOY_WEIGHTS, toy_lexicon
from tokenmdp.types import Episode, Outcome

TOY = load_tokenizer("toy")
TEXTS = [
    ("the film", "great but very dull ."),
    ("it", "so bad"),
    ("the story was", "fun , not boring ! <eos>"),
    ("", "this"),
]


def outcome_of(episode, model):
    return Outcome(episode, model(episode), torch.arange(len(episode.input_ids)))


def credit_of(method, episode, model, tokenizer=TOY):
    return method(outcome_of(episode, model), Resources(model, tokenizer))


def row_of(episode, row):
    return Episode(*(part[row : row + 1] for part in episode))


@pytest.mark.parametrize(
    "method",
    [ShapleyCredit(), ShapleyCredit(budget=16), ShapleyCredit(units="words"), OwenCredit(), OwenCredit(budget=16)],
    ids=str,
)
def test_a_word_list_gives_every_word_its_weight(method):
    text = "great and dull , but very lovely"
    result = credit_of(method, of_words(("the bad film", text), horizon=9), toy_lexicon())
    weights = [TOY_WEIGHTS.get(word, 0.0) for word in text.split()]
    torch.testing.assert_close(result.token_rewards[0], torch.tensor([*weights, 0.0, 0.0]))
    assert result.report["standard_error"].item() < 1e-6


@pytest.mark.parametrize("units", ["words", "sentences"])
def test_a_units_value_is_spread_evenly_over_its_tokens(units):
    tokenizer, model = load_tokenizer("imdb-tiny"), load_reward_model("lexicon")
    ids = torch.tensor([tokenizer.encode(" unbelievably hilarious. Awful!")])
    mask = torch.ones_like(ids, dtype=torch.bool)
    episode = Episode(ids, mask, mask)  # no prompt
    rewards = credit_of(ShapleyCredit(units=units), episode, model, tokenizer).token_rewards[0]
    cut = [tokenizer.decode(token) for token in ids[0]].index(" A")
    assert rewards[:cut].sum().item() == pytest.approx(2.0)
    assert rewards[cut:].sum().item() == pytest.approx(-2.5)
    torch.testing.assert_close(rewards[cut:], rewards[cut].expand(len(rewards) - cut))
    assert len(rewards[:cut].unique()) == (1 if units == "sentences" else 2)


@pytest.mark.parametrize("method", [ShapleyCredit(budget=14), OwenCredit(budget=30), ShapleyCredit(0.3, budget=64)])
def test_a_batch_is_its_rows_in_any_order(method):
    episode = of_words(*TEXTS, horizon=7)
    together = credit_of(method, episode, HashRewardModel())
    backwards = credit_of(method, Episode(*(part.flip(0) for part in episode)), HashRewardModel())
    assert torch.equal(backwards.token_rewards.flip(0), together.token_rewards)
    for row in range(len(TEXTS)):
        alone = credit_of(method, row_of(episode, row), HashRewardModel())
        assert torch.equal(alone.token_rewards[0], together.token_rewards[row])
        for key, column in together.report.items():
            assert torch.equal(alone.report[key][0], column[row])


def test_padding_and_chunks_cannot_matter():
    tight, wide = of_words(*TEXTS, horizon=7), of_words(*TEXTS, prompt_slots=6, horizon=9, pad=0)
    plain = credit_of(ShapleyCredit(budget=14), tight, toy_lexicon())
    for method, episode in ((ShapleyCredit(budget=14), wide), (ShapleyCredit(budget=14, rows_per_forward=3), tight)):
        other = credit_of(method, episode, toy_lexicon())
        assert torch.equal(other.token_rewards[:, :7], plain.token_rewards)
        assert not other.token_rewards[:, 7:].any()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 28), min_size=1, max_size=6), st.floats(0, 1), st.integers(12, 80))
def test_the_sum_is_the_score(tokens, beta, budget):
    ids = torch.tensor([[3, *tokens]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    episode, model = Episode(ids, mask, mask[:, 1:]), HashRewardModel()
    for method in (ShapleyCredit(beta, budget), OwenCredit(beta, budget, blocks="sentences")):
        result = credit_of(method, episode, model)
        assert result.token_rewards.sum().item() == pytest.approx(model(episode).score.item(), abs=1e-5)
        assert result.report["reward_calls"].item() <= budget


def test_what_is_reported_is_what_was_asked():
    model, episode = HashRewardModel(), of_words(*TEXTS, horizon=7)
    given_outcome = outcome_of(episode, model)
    model.asked.clear()
    report = ShapleyCredit(budget=64, rows_per_forward=50)(given_outcome, Resources(model, TOY)).report
    assert sum(len(texts) for texts, _ in model.asked) == report["reward_calls"].sum().item() - 1  # "" is not read
    assert report["reward_calls"].tolist() == [2**5, 2**2, 2**6, 2]
    assert not report["standard_error"].any()
    assert max(len(texts) for texts, _ in model.asked) == 50


def test_sampled_credit_approaches_the_exact():
    episode, model = of_words(("the film", "great but very dull . so fun"), horizon=7), HashRewardModel()
    exact = credit_of(ShapleyCredit(), episode, model).token_rewards
    errors, seen = [], set()
    for seed in range(40):
        result = credit_of(ShapleyCredit(budget=100, seed=seed), episode, model)
        assert result.report["standard_error"].item() > 0
        seen.add(tuple(result.token_rewards[0].tolist()))
        errors.append((result.token_rewards - exact).abs().mean().item() / result.report["standard_error"].item())
    assert len(seen) == 40  # every seed draws its own permutations
    assert 0.5 < sum(errors) / 40 < 1.2  # of a normal error the mean size is .8 of its standard deviation


def test_credit_beta_mixes_with_sparse():
    episode, model = of_words(*TEXTS, horizon=7), HashRewardModel()
    dense, sparse = (credit_of(ShapleyCredit(beta), episode, model).token_rewards for beta in (1.0, 0.0))
    torch.testing.assert_close(credit_of(ShapleyCredit(0.3), episode, model).token_rewards, 0.3 * dense + 0.7 * sparse)
    assert torch.equal(sparse, make_credit("sparse")(outcome_of(episode, model), Resources()).token_rewards)


def test_deleted_tokens_leave_no_gap():
    """On the bundled reward model: a text with tokens deleted scores as the shorter text."""
    tokenizer, model = load_tokenizer("imdb-tiny"), load_reward_model("imdb-tiny")
    prompt, ids = tokenizer.encode("The acting"), tokenizer.encode(" is not great at all")
    keep = torch.tensor([[True, False, True, False, True], [False] * 5])
    short = [[*prompt, *(token for token, kept in zip(ids, row, strict=True) if kept)] for row in keep.tolist()]

    def episode(row, length):
        mask = torch.ones(1, len(row), dtype=torch.bool)
        return Episode(torch.tensor([row]), mask, mask[:, length:])

    scores = scores_of_kept(model, episode([*prompt, *ids], len(prompt)), torch.zeros(2, dtype=torch.long), keep, 8)
    alone = [model(episode(row, len(prompt)), empty_responses=True).score.item() for row in short]
    torch.testing.assert_close(scores, torch.tensor(alone), atol=1e-5, rtol=1e-5)


def test_bad_input_is_refused_with_the_remedy():
    episode, model = of_words(("the", "great but very dull . so fun"), horizon=7), ScoreOnly()
    with pytest.raises(ValueError, match="budget is 0; a response of one unit takes 2"):
        ShapleyCredit(budget=0)
    with pytest.raises(ValueError, match=r"budget is 13 evaluations and 7 units need at least 14 \(128 for exact"):
        credit_of(ShapleyCredit(budget=13), episode, model)
    with pytest.raises(ValueError, match="units is 'letters'; choose one of tokens, words"):
        ShapleyCredit(units="letters")
    with pytest.raises(ValueError, match="larger blocks are: clauses, sentences"):
        OwenCredit(units="words", blocks="words")
    with pytest.raises(ValueError, match="larger blocks are: none; choose smaller units"):
        OwenCredit(units="sentences")
    with pytest.raises(ValueError, match="rows_per_forward is 0"):
        ShapleyCredit(rows_per_forward=0)
    for options in ({"budget": 64.5}, {"budget": "64"}, {"seed": "x"}, {"seed": 1.5}, {"rows_per_forward": None}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; choose a whole number")):
            ShapleyCredit(**options)
    with pytest.raises(MissingResource, match="shapley credit scores changed texts and there is no reward model"):
        ShapleyCredit()(outcome_of(episode, model), Resources())
    with pytest.raises(MissingResource, match="to find clauses in the response"):
        OwenCredit()(outcome_of(episode, model), Resources(model))
    empty = episode._replace(attention_mask=episode.attention_mask.clone(), response_mask=episode.response_mask & False)
    empty.attention_mask[:, empty.prompt_slots :] = False
    reward = model(empty, empty_responses=True)
    with pytest.raises(ValueError, match="row 0 has an empty response"):
        ShapleyCredit()(Outcome(empty, reward, torch.zeros(1, dtype=torch.long)), Resources(model))
