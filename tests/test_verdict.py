"""The verdict on a reward model's attention row, in words."""

import pytest
from doubles import words

from tokenmdp.credit import SparseCredit
from tokenmdp.evaluation.credit_quality import AttentionVerdict, measure, model_world
from tokenmdp.evaluation.credit_quality.tables import notes
from tokenmdp.evaluation.credit_quality.texts import Text, episodes_of
from tokenmdp.intervals import Estimate
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.reward_models import LexiconRewardModel


@pytest.mark.parametrize(
    ("low", "entropy", "mass", "level", "parts"),
    [
        (0.35, 0.9, 0.6, "informative", ()),
        (0.35, 0.97, 0.6, "weakly informative", ("nearly uniform",)),
        (0.2, 0.5, 0.05, "weakly informative", ("outside the response",)),
        (0.05, 0.5, 0.6, "not informative", ()),
    ],
)
def test_verdict(low, entropy, mass, level, parts):
    verdict = AttentionVerdict(Estimate(low + 0.1, low, low + 0.2), entropy, mass, 0.0, 10)
    assert verdict.level == level
    assert f"The attention is {level}" in str(verdict)
    for part in parts:
        assert part in str(verdict)
    assert "0.3" in str(verdict)
    assert "0.1" in str(verdict)


def test_a_row_that_mostly_falls_back_is_not_informative_whatever_the_texts():
    for below_floor, level in ((0.8, "not informative"), (0.2, "unknown")):
        verdict = AttentionVerdict(Estimate(0.5, 0.4, 0.6), 0.5, 0.01, below_floor, texts=3, unusable=12)
        assert verdict.level == level
        assert ("Choose texts" in str(verdict)) == (level == "unknown")
        assert f"{below_floor:.0%} of the texts fall back" in str(verdict)


def test_texts_without_a_correlation_are_counted_and_most_of_them_leave_the_verdict_open():
    tokenizer = load_tokenizer("toy")
    model = LexiconRewardModel(tokenizer, {"dull": -1.0, "great": 2.0})
    silent, telling = Text([], words("a film the film")), Text([], words("great but dull"))
    verdicts = {}
    for usable in (0, 3, 15):
        texts = [telling] * usable + [silent] * (18 - usable)
        result = measure(model_world(model, tokenizer, episodes_of(texts), "x"), {"sparse": SparseCredit()})
        verdicts[usable] = result.attention, notes(result)[-1]
    assert verdicts[0] == (
        None,
        "Fewer than two texts have a rank correlation of the attention row with |leave-one-out|.",
    )
    verdict, said = verdicts[3]
    assert (verdict.level, verdict.texts, verdict.unusable) == ("unknown", 3, 15)
    assert "on 15 of 18 it has no rank correlation" in said
    assert (verdicts[15][0].level, verdicts[15][0].unusable) == ("informative", 3)
