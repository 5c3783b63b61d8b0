"""Several reward models at token, sentence and text density."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import HashRewardModel, of_words
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp.credit import FineGrainedCredit, FineReward, MissingResource, Resources, make_credit
from tokenmdp.credit.spans import segment_ends
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.preferences import segment_ranking
from tokenmdp.reward_models import LexiconRewardModel, RewardModel, VocabularyMismatch, load_reward_model
from tokenmdp.reward_models.lexicon import TOY_WEIGHTS, toy_lexicon
from tokenmdp.reward_models.retokenized import RetokenizedRewardModel
from tokenmdp.types import Outcome, lay_out
from tokenmdp.wrappers import CreditReward

TOY = load_tokenizer("toy")
TEXTS = [
    ("the film", "was great . but so dull <eos>"),
    ("it was", "bad ."),
    ("this", "fun . <eos>"),
    ("", "lovely"),
]
EPISODE = of_words(*TEXTS, horizon=8)
MASK = EPISODE.response_mask
parts = st.lists(
    st.builds(
        FineReward,
        st.sampled_from([None, toy_lexicon(), HashRewardModel()]),
        st.sampled_from(["token", "sentence", "text"]),
        st.floats(-3, 3),
        st.sampled_from(["prefix", "segment", "whole"]),
        st.floats(-3, 3),
        st.booleans(),
    ),
    min_size=1,
    max_size=3,
)


def rewards(*fine_rewards, model=None, episode=EPISODE, **options):
    model = model or HashRewardModel()
    outcome = Outcome(episode, model(episode), torch.arange(len(episode.input_ids)))
    return FineGrainedCredit(fine_rewards, **options)(outcome, Resources(model, TOY)).token_rewards


def ends(density):
    last = rewards(FineReward(density="text"), model=Constant()) != 0
    if density == "text":
        return last
    if density == "token":
        return MASK
    stops = EPISODE.input_ids[:, EPISODE.prompt_slots :] == TOY.convert_tokens_to_ids(".")
    return (stops | last) & MASK


class Constant(HashRewardModel):
    """Scores 1 whatever it reads."""

    def evaluate(self, episodes, needs):
        return super().evaluate(episodes, needs)._replace(score=torch.ones(len(episodes.input_ids)))


@pytest.mark.parametrize("context", ["prefix", "segment"])
@pytest.mark.parametrize("model", [None, HashRewardModel()])
def test_one_model_with_one_segment_is_sparse_credit(model, context):
    score = HashRewardModel()(EPISODE)
    sparse = make_credit("sparse")(Outcome(EPISODE, score, torch.arange(4)), Resources()).token_rewards
    assert torch.equal(rewards(FineReward(model, "text", 1.0, context)), sparse)


@settings(deadline=None, max_examples=30)
@given(parts)
def test_parts_add_up_and_are_linear_in_their_weights(fine_rewards):
    together = rewards(*fine_rewards)
    alone = sum(part.weight * rewards(dataclasses.replace(part, weight=1.0)) for part in fine_rewards)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not together[~MASK].any()


@settings(deadline=None, max_examples=30)
@given(parts)
def test_rewards_fall_on_the_ends_of_segments_only(fine_rewards):
    union = torch.stack([ends(part.density) for part in fine_rewards]).any(0)
    assert not rewards(*fine_rewards)[~union].any()


def test_ends_that_coincide_keep_the_sum():
    """A sentence's end that is also the text's and a token's gets all three."""
    densities = [FineReward(Constant(), density, context="segment") for density in ("token", "sentence", "text")]
    assert rewards(*densities, model=Constant())[1].tolist() == [1.0, 3.0, 0, 0, 0, 0, 0, 0]  # "bad ."
    total = rewards(*densities).sum(-1)
    torch.testing.assert_close(total, sum(rewards(part).sum(-1) for part in densities))


@pytest.mark.parametrize("density", ["token", "clause", "sentence", "text"])
def test_prefix_rewards_of_a_model_sum_to_its_score(density):
    model = HashRewardModel()
    torch.testing.assert_close(rewards(FineReward(density=density), model=model).sum(-1), model(EPISODE).score)


def test_token_density_is_prefix_differences_plus_the_score_of_the_prompt():
    outcome = Outcome(EPISODE, toy_lexicon()(EPISODE, needs=frozenset({"prefix_scores"})), torch.arange(4))
    red = make_credit("red")(outcome, Resources()).token_rewards
    torch.testing.assert_close(rewards(FineReward(density="token"), model=toy_lexicon()), red)


def test_segments_are_read_alone():
    model = toy_lexicon()
    sentences = rewards(FineReward(density="sentence", context="segment"), model=model)
    assert sentences[0].tolist() == [0, 0, 2.0, 0, 0, 0, -1.0, 0]  # "great" and "dull" with the end-of-text
    assert sentences[2].tolist() == [0, 1.0, 0, 0, 0, 0, 0, 0]
    constant = rewards(FineReward(Constant(), "sentence", context="segment"), model=model)
    assert constant[2].tolist() == [0, 1.0, 0, 0, 0, 0, 0, 0]  # the end-of-text alone is no sentence
    asked = HashRewardModel()
    rewards(FineReward(asked, "sentence", context="segment"), episode=of_words(TEXTS[0], horizon=8))
    texts = [TOY.decode(row) for row in asked.asked[0][0]]
    assert texts == ["the film was great .", "the film but so dull <eos>"]


def test_a_segment_is_answered_for_after_the_whole_text():
    """The model reads what a ranking of segments shows it, and answers for a segment by what comes behind it, too."""
    good, bad = TOY.encode("was great ."), TOY.encode("but so dull <eos>")
    record = segment_ranking(TOY, tuple(TOY.encode("the film")), [[good, bad]], [[True, False]])
    assert record.responses[0] == "was great . but so dull <eos> was great ."  # its end is there already
    asked = HashRewardModel()
    paid = rewards(FineReward(asked, "sentence", context="whole"), episode=of_words(TEXTS[0], horizon=8))
    assert asked.asked[0][0] == [[*record.prompt_ids, *ids] for ids in record.responses_ids]
    asked = HashRewardModel()
    rewards(FineReward(asked, "sentence", context="whole"), episode=of_words(TEXTS[1], horizon=8))
    assert TOY.decode(asked.asked[0][0][0]) == "it was bad . <eos> bad ."
    assert paid[0].bool().tolist() == [False, False, True, False, False, False, True, False]
    words = toy_lexicon()
    paid = rewards(FineReward(words, "sentence", context="whole"), model=words, episode=of_words(TEXTS[0], horizon=8))
    assert paid[0].tolist() == [0, 0, 2.0, 0, 0, 0, 1.0, 0]  # its answers at the ends, not their differences


def test_a_causal_classifier_answers_for_all_segments_in_one_forward():
    model, tokenizer = load_reward_model("imdb-tiny"), load_tokenizer("imdb-tiny")
    texts = [("This film", " is a joy. I loved it"), ("So", " dull"), ("It was", " bad. Truly bad. No.")]
    other = [("This film", " is a joy. I hated it"), *texts[1:]]
    found = []
    for kind, pairs in ((OneText, texts), (Counting, texts), (Counting, other)):
        episode = lay_out(*([tokenizer.encode(text[place]) for text in pairs] for place in (0, 1)))
        asked = kind(model)
        credit = FineGrainedCredit([FineReward(asked, "sentence", context="whole")])
        found.append((asked, credit(Outcome(episode, model(episode), torch.arange(3)), Resources(asked, tokenizer))))
    (slow, expected), (fast, paid), (_, changed) = found
    torch.testing.assert_close(paid.token_rewards, expected.token_rewards, atol=1e-5, rtol=1e-5)
    assert (slow.read, fast.read) == (2 + 1 + 3, 3)
    first = [int(credit.token_rewards[0].nonzero()[0]) for credit in (paid, changed)]
    assert first[0] == first[1]
    assert (paid.token_rewards - changed.token_rewards)[0, first[0]].abs() > 0.1  # only the second sentence differs
    with pytest.raises(MissingResource, match="the context 'whole' needs a tokenizer with an end-of-text token"):
        rewards_without_tokenizer(FineReward(asked, context="whole"))


def rewards_without_tokenizer(part):
    return FineGrainedCredit([part])(Outcome(EPISODE, toy_lexicon()(EPISODE), torch.arange(4)), Resources())


@pytest.mark.parametrize("context", ["prefix", "segment", "whole"])
def test_every_segment_is_shifted_and_its_sign_paid(context):
    plain = rewards(FineReward(HashRewardModel(), "sentence", context=context)).double()
    some = plain != 0
    mean, deviation = plain[some].mean().item(), plain[some].std().item()
    scaled = FineReward(HashRewardModel(), "sentence", 1 / deviation, context, shift=mean)
    expected = torch.where(some, (plain - mean) / deviation, 0.0)
    torch.testing.assert_close(rewards(scaled).double(), expected, atol=1e-5, rtol=1e-5)
    signs = rewards(FineReward(HashRewardModel(), "sentence", 0.3, context, shift=mean, sign=True))
    assert torch.equal(signs, torch.where(some, 0.3 * (plain - mean).sign(), 0.0).float())
    assert {round(number, 1) for number in signs.unique().tolist()} == {-0.3, 0.0, 0.3}


def test_calls_are_counted_and_the_known_score_is_not_asked_again():
    model = HashRewardModel()
    outcome = Outcome(EPISODE, model(EPISODE), torch.arange(4))
    for part, calls in (
        (FineReward(), [0, 0, 0, 0]),
        (FineReward(model), [1, 1, 1, 1]),
        (FineReward(density="token"), [6, 1, 2, 0]),
        (FineReward(density="sentence"), [1, 0, 1, 0]),
    ):
        model.asked.clear()
        report = FineGrainedCredit([part], rows_per_forward=2)(outcome, Resources(model, TOY)).report
        assert report["reward_calls"].tolist() == calls
        assert sum(len(texts) for texts, _ in model.asked) == sum(calls)


class OneText(RewardModel):
    """A model without the scores of all prefixes: it is asked about each text."""

    def __init__(self, inner):
        super().__init__(inner.tokenizer)
        self.inner, self.read = inner, 0

    def evaluate(self, episodes, needs):
        self.read += len(episodes.input_ids)
        return self.inner(episodes, empty_responses=True)


class Counting(OneText):
    """The inner model with all that it provides; its texts are counted."""

    provides = frozenset({"prefix_scores"})

    def evaluate(self, episodes, needs):
        self.read += len(episodes.input_ids)
        return self.inner(episodes, needs=needs, empty_responses=True)


@pytest.mark.parametrize("density", ["token", "clause", "sentence"])
@pytest.mark.parametrize("own", [True, False])
def test_a_causal_classifier_reads_every_text_once_and_the_numbers_are_those_of_single_texts(density, own):
    model, tokenizer = load_reward_model("imdb-tiny"), load_tokenizer("imdb-tiny")
    texts = [("This film", " is a joy, from start to end. I loved it"), ("So", " dull"), ("It was", " bad; truly bad.")]
    episode = lay_out(*([tokenizer.encode(text[place]) for text in texts] for place in (0, 1)))
    outcome, found = Outcome(episode, model(episode), torch.arange(3)), []
    for kind in (OneText, Counting):
        asked = kind(model)
        credit = FineGrainedCredit([FineReward(None if own else asked, density)])
        found.append((asked, credit(outcome, Resources(asked, tokenizer))))
    (slow, expected), (fast, rewards_) = found
    torch.testing.assert_close(rewards_.token_rewards, expected.token_rewards, atol=1e-5, rtol=1e-5)
    assert fast.read == rewards_.report["reward_calls"].sum() <= 3 < slow.read + 3 * own


def test_clauses_end_at_commas_too():
    tokenizer = load_tokenizer("imdb-tiny")
    episode = lay_out([tokenizer.encode("This film")], [tokenizer.encode(" is long, loud; and good. End")])
    pieces = [tokenizer.decode(one) for one in episode.input_ids[0, episode.prompt_slots :]]
    ends = segment_ends(episode, tokenizer, "clauses", wordless_rest=True)[0].tolist()
    assert [piece.strip() for piece, end in zip(pieces, ends, strict=True) if end] == [
        ",",
        ";",
        ".",
        pieces[-1].strip(),
    ]


def test_a_batch_is_its_rows():
    several = [FineReward(density="token", weight=0.5), FineReward(toy_lexicon(), "sentence", 2.0, "segment")]
    together = rewards(*several)
    for row in range(len(TEXTS)):
        alone = rewards(*several, episode=of_words(TEXTS[row], horizon=8))
        assert torch.equal(alone[0], together[row])


def test_names_are_loaded_for_the_environment_and_the_residual_is_reported():
    method = make_credit("fine-grained", parts=[FineReward("lexicon:toy", "token", 0.5), FineReward()])
    env = CreditReward(gym.make("tokenmdp:TextGen-Toy-v0"), method)
    env.reset(options={"prompt": "the film was"})
    for word in ("great", "but", "dull", "<eos>"):
        *_, info = env.step(TOY.convert_tokens_to_ids(word))
    words = LexiconRewardModel(TOY, TOY_WEIGHTS).weights
    named = load_reward_model("lexicon:toy").weights
    expected = [0.5 * named["great"], 0, 0.5 * named["dull"], words["great"] + words["dull"]]
    np.testing.assert_allclose(info["token_rewards"][:4], expected)
    assert info["credit_residual"] == pytest.approx(info["score"] - sum(expected))


def test_bad_input_is_refused_with_the_remedy():
    score = HashRewardModel()(EPISODE)
    outcome = Outcome(EPISODE, score, torch.arange(4))
    with pytest.raises(ValueError, match="fine-grained credit needs parts: make_credit"):
        make_credit("fine-grained")
    with pytest.raises(ValueError, match="parts is empty"):
        FineGrainedCredit([])
    with pytest.raises(ValueError, match="parts is 3; give a list of FineReward"):
        FineGrainedCredit(3)
    with pytest.raises(ValueError, match="reward_model is 3; pass a RewardModel, the name of one"):
        FineReward(reward_model=3)
    with pytest.raises(ValueError, match="weight is 'x'"):
        FineReward(weight="x")
    with pytest.raises(ValueError, match="rows_per_forward is 0"):
        FineGrainedCredit([FineReward()], rows_per_forward=0)
    with pytest.raises(TypeError, match="parts holds 'imdb-tiny'; each part is a FineReward"):
        FineGrainedCredit(["imdb-tiny"])
    with pytest.raises(ValueError, match="density is 'word'; choose one of token, clause, sentence, text"):
        FineReward(density="word")
    with pytest.raises(ValueError, match="context is 'all'"):
        FineReward(context="all")
    with pytest.raises(ValueError, match="weight is nan"):
        FineReward(weight=float("nan"))
    with pytest.raises(ValueError, match="shift is inf; it must be a finite number"):
        FineReward(shift=float("inf"))
    with pytest.raises(ValueError, match="sign is 1; give true or false"):
        FineReward(sign=1)
    with pytest.raises(MissingResource, match="reads the environment's own, and there is none"):
        FineGrainedCredit([FineReward()])(outcome, Resources())
    with pytest.raises(MissingResource, match=r"pass load_reward_model\('lexicon'\) as part"):
        FineGrainedCredit([FineReward("lexicon")])(outcome, Resources(HashRewardModel(), TOY))
    with pytest.raises(VocabularyMismatch, match=r"pass RetokenizedRewardModel\(reward_model, env\.unwrapped"):
        FineGrainedCredit([FineReward(load_reward_model("lexicon"))])(outcome, Resources(HashRewardModel(), TOY))
    with pytest.raises(VocabularyMismatch):
        gym.make("tokenmdp:TextGen-Toy-v0").unwrapped.resources().load_reward_model("lexicon")


def test_the_remedy_for_a_model_of_other_tokens_works():
    """In an environment that aligns, a part given as an object and wrapped reads what a named part reads."""
    env = gym.make("tokenmdp:TextGen-Toy-v0", reward_model="lexicon", align="offsets")
    wrapped = RetokenizedRewardModel(load_reward_model("lexicon"), env.unwrapped.tokenizer)
    seen = []
    for part in ("lexicon", wrapped, load_reward_model("lexicon")):
        env = CreditReward(gym.make("tokenmdp:TextGen-Toy-v0", reward_model="lexicon", align="offsets"),
                           make_credit("fine-grained", parts=[FineReward(part, "token")]))  # fmt: skip
        env.reset(options={"prompt": "the film was"})
        env.step(TOY.convert_tokens_to_ids("great"))
        if part is wrapped or isinstance(part, str):
            *_, info = env.step(TOY.eos_token_id)
            seen.append(info["token_rewards"].tolist())
        else:
            with pytest.raises(VocabularyMismatch, match="pass RetokenizedRewardModel"):
                env.step(TOY.eos_token_id)
    assert seen[0] == seen[1]
    assert any(seen[0])
