"""Words, clauses and sentences of responses."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmdp.credit.base import MissingResource
from tokenmdp.credit.spans import UNITS, segment_ends, unit_ids
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import token_pieces
from tokenmdp.types import Episode

TOKENIZER = load_tokenizer("imdb-tiny")
texts = st.text(st.sampled_from(list("ab é🙂.,!?;:'\")…—8 \n")), min_size=1, max_size=24)


unhurried = settings(deadline=None)  # the first example pays for the tokenizer


def response(*texts, prompt="The film", eos=0, horizon=None):
    """Each text in its own tokens."""
    ids = [token for text in texts for token in TOKENIZER.encode(text)] + [TOKENIZER.eos_token_id] * eos
    first = TOKENIZER.encode(prompt)
    rest = 0 if horizon is None else horizon - len(ids)
    row = torch.tensor([[*first, *ids, *[TOKENIZER.eos_token_id] * rest]])
    mask = torch.arange(row.shape[1])[None] < len(first) + len(ids)
    return Episode(row, mask, mask[:, len(first) :])


def parts(text, units, **options):
    """The text of each unit."""
    episode = response(text, **options)
    ids = episode.input_ids[0, episode.prompt_slots :][episode.response_mask[0]].tolist()
    pieces = token_pieces(TOKENIZER, ids, episode.input_ids[0, : episode.prompt_slots].tolist())[1]
    numbers = unit_ids(episode, TOKENIZER, units)[0][episode.response_mask[0]].tolist()
    joined = [""] * (numbers[-1] + 1)
    for piece, number in zip(pieces, numbers, strict=True):
        joined[number] += piece
    return joined


def test_what_each_unit_is():
    text = " was great, really! I hated the ending, though"
    assert parts(text, "words", eos=1) == [
        " was", " great,", " really!", " I", " hated", " the", " ending,", " though", "<|endoftext|>",
    ]  # fmt: skip
    assert parts(text, "clauses", eos=1) == [" was great,", " really!", " I hated the ending,", " though<|endoftext|>"]
    assert parts(text, "sentences", eos=1) == [" was great, really!", " I hated the ending, though<|endoftext|>"]


def test_words_written_without_blanks():
    assert parts(" good,bad", "words") == [" good,", "bad"]
    assert parts(" naïve don't", "words") == [" naïve", " don't"]
    assert parts("!", "words") == ["!"]


def test_quotes_and_dots_after_the_end_make_no_sentence():
    assert parts(' He said "yes." Then...', "sentences") == [' He said "yes."', " Then..."]
    assert parts(" It was great. !", "sentences") == [" It was great. !"]


@pytest.mark.parametrize("eos", [0, 1])
@unhurried
@given(text=texts)
def test_units_are_numbered_in_order_and_nest(eos, text):
    episode = response(text, eos=eos, horizon=80)
    mask = episode.response_mask[0]
    numbers = [unit_ids(episode, TOKENIZER, units)[0] for units in UNITS]
    for unit in numbers:
        assert (unit[~mask] == -1).all()
        assert unit[0] == 0
        assert set(unit[mask].diff().tolist()) <= {0, 1}
    assert torch.equal(numbers[0][mask], torch.arange(mask.sum()))
    for fine, coarse in pairwise(numbers):
        borders = coarse[mask].diff().bool()
        assert fine[mask].diff().bool()[borders].all()  # where a coarse unit ends, so does a fine one


@unhurried
@given(texts, texts)
def test_whether_a_sentence_ends_does_not_depend_on_what_follows(first, second):
    settled = len(TOKENIZER.encode(first)) - 1  # the last token ends one because the response does
    texts = [response(first), response(first, second)]
    ends = [segment_ends(text, TOKENIZER, "sentences", wordless_rest=True)[0] for text in texts]
    assert torch.equal(ends[0][:settled], ends[1][:settled])


def test_ends_of_sentences():
    episode = response(" Great. Dull.", eos=1)
    last = int(episode.response_mask.sum()) - 1
    for wordless_rest in (False, True):
        ends = segment_ends(episode, TOKENIZER, "sentences", wordless_rest=wordless_rest)[0]
        assert ends.sum() == 2 + wordless_rest
        assert ends[last] == wordless_rest
    silent = segment_ends(response("", eos=1), TOKENIZER, "sentences", wordless_rest=False)[0]
    assert silent.tolist() == [True]


def test_tokens_need_no_tokenizer_and_words_do():
    assert unit_ids(response(" great"), None, "tokens").tolist() == [[0]]
    with pytest.raises(MissingResource, match="to find words in the response it must be read"):
        unit_ids(response(" great"), None, "words")
