"""Word-list reward models, and the checks that every subclass of RewardModel gets."""

import pytest
import torch
from doubles import episode, of_words, words

from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import toy_tokenizer
from tokenmdp.reward_models import LexiconRewardModel, NonFiniteScore, RewardModel, load_reward_model, toy_lexicon
from tokenmdp.types import RewardOutput

ATTENTION = frozenset({"attention"})
EOS = 30
TEXTS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10, 11, EOS])]


def test_lexicon_counts_the_words_of_the_response_only():
    output = toy_lexicon()(of_words(("awful bad", "great film and great"), ("great", "very dull , it"), prompt_slots=2))
    assert output.score.tolist() == [4.0, -1.0]
    assert output.attention is None


def test_lexicon_attention_is_the_share_of_absolute_weight():
    output = toy_lexicon()(of_words(("the", "great but dull"), ("the", "film was")), needs=ATTENTION)
    torch.testing.assert_close(output.attention[0, :3], torch.tensor([2 / 3, 0.0, 1 / 3]), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.attention[1, :2], torch.tensor([0.5, 0.5]))  # nothing listed: uniform
    assert (output.attention[0, 3:] == 0).all()
    torch.testing.assert_close(output.attention.sum(-1), torch.ones(2))


def test_lexicon_ends_in_eos_and_ignores_it():
    batch = episode((words("the"), [*words("great"), EOS]))
    output = toy_lexicon()(batch, needs=ATTENTION)
    assert output.score.tolist() == [2.0]
    assert 0 < output.attention[0, 1] < 1e-5


def test_lexicon_spreads_a_word_over_its_tokens(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġw", "on", "Ġwon"]
    pieces = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, [("Ġ", "w"), ("o", "n")]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, clean_up_tokenization_spaces=False)
    ids = tokenizer(" Won, won é!")["input_ids"]  # é is two byte tokens
    assert tokenizer.convert_ids_to_tokens(ids)[4:6] == ["Ġw", "on"]
    model = LexiconRewardModel(tokenizer, {"won": -3.0})
    output = model(episode(([5], ids), horizon=len(ids)), needs=ATTENTION)
    assert output.score.tolist() == [-6.0]
    row = output.attention[0]
    assert row[4] == pytest.approx(1 / 6, abs=1e-4)  # one letter of three, of one word of two
    assert row[5] == pytest.approx(2 / 6, abs=1e-4)
    assert row.sum() == pytest.approx(1.0, abs=1e-6)


def test_lexicon_decodes_a_long_response_a_few_times_whatever_is_asked(monkeypatch):
    model, counted = toy_lexicon(), []
    ids = words("great film but dull and " * 60)
    decode = model._decode
    monkeypatch.setattr(model, "_decode", lambda part: counted.append(len(part)) or decode(part))
    rows = episode((words("the"), ids), horizon=len(ids))
    output = model(rows, needs=frozenset({"attention", "prefix_scores"}))
    assert sum(counted) < 8 * len(ids)  # each prefix by itself takes len(ids) / 2 times as many
    ends = [0, 1, 7, len(ids)]
    alone = [model(episode((words("the"), ids[:end]), horizon=len(ids))).score.item() if end else 0.0 for end in ends]
    assert output.prefix_scores[0, ends].tolist() == alone
    assert output.score.tolist() == alone[-1:] == [60.0]


def test_lexicon_by_name_with_another_tokenizer():
    lexicon = load_reward_model("lexicon:toy")
    assert lexicon.tokenizer is load_tokenizer("toy")
    assert lexicon(of_words(("the", "great film"))).score.tolist() == [2.0]
    assert load_reward_model(**lexicon.to_json()) is lexicon


class Constant(RewardModel):
    """Three lines suffice for a reward model."""

    def evaluate(self, episodes, needs):
        return RewardOutput(torch.full((len(episodes.input_ids),), 2.0, dtype=torch.float64))


def test_a_subclass_gets_the_checks_and_the_dtype():
    model = Constant(toy_tokenizer())
    assert model(episode(*TEXTS)).score.dtype == torch.float32
    with pytest.raises(ValueError, match=r"does not provide attention \(it provides nothing but the score\)"):
        model(episode(*TEXTS), needs=ATTENTION)
    with pytest.warns(UserWarning, match="could not be compared"):
        Constant(None).check_tokenizer(toy_tokenizer())


class Given(RewardModel):
    """Returns what it is told to."""

    provides = ATTENTION

    def __init__(self, score, attention):
        super().__init__(toy_tokenizer())
        self.output = RewardOutput(torch.tensor(score), torch.tensor(attention))

    def evaluate(self, episodes, needs):
        return self.output


@pytest.mark.parametrize(
    ("score", "attention", "error", "message"),
    [
        ([[1.0], [2.0]], [[0.1] * 6] * 2, ValueError, r"scores of shape \(2, 1\) for 2 episodes"),
        ([1.0, 2.0], [[0.5]] * 2, ValueError, r"attention of shape \(2, 1\).*shape \(2, 6\)"),
        (
            [1.0, 2.0],
            [[0.1] * 6, [float("nan")] * 6],
            NonFiniteScore,
            "row that sums to nan for row 1 of 2.*'.*good'",
        ),
    ],
)
def test_what_would_spread_silently_is_refused(score, attention, error, message):
    rows = of_words(("the plot", "was bad"), ("the film", "good"))
    assert rows.response_mask.shape == (2, 6)
    with pytest.raises(error, match=message):
        Given(score, attention)(rows, needs=ATTENTION)


def test_attention_in_the_padding_is_nobodys_concern():
    rows = of_words(("the plot", "was bad"), ("the film", "good"))
    Given([1.0, 2.0], [[0.1] * 6, [0.1] + [float("nan")] * 5])(rows, needs=ATTENTION)
