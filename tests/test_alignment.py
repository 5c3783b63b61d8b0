"""Credit moved between tokenizers by characters, against plain counting of characters and of bytes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenmdp.reward_models.alignment import move, overlap_shares, prefix_ranges, token_spans

SENTENCES = [
    "the film was great, the plot was dull and the actors were lovely",
    "café naïve élan 😀😀 👍🏽 日本の映画 は 素晴らしい", "it wasn't a very good movie; i would not watch it again",
]  # fmt: skip
CHARACTERS = "abcdefilmnoprstuvwy ABT.,'!é日本😀👍🏽\u0301\u200dß\n"
texts = st.text(CHARACTERS, min_size=1, max_size=24)


def byte_level(vocab_size):
    """A byte-level BPE; 256 has no merges, so that every token is a byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    return tokenizer


def byte_fallback():
    """Characters, and for those it does not know, one token per byte, as in Llama's tokenizer."""
    pieces = {
        piece: index for index, piece in enumerate([*"▁abcdefghilmnoprstuvwy", *(f"<0x{b:02X}>" for b in range(256))])
    }
    tokenizer = Tokenizer(models.BPE(pieces, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def lower_case_words():
    vocabulary = {piece: index for index, piece in enumerate(["?", "the", "a", "b", "##b", "was", "film", "##s", "."])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="?"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[C] $A", special_tokens=[("[C]", 0)])
    return tokenizer


TOKENIZERS = {
    "bytes": byte_level(256), "small": byte_level(300), "large": byte_level(420), "fallback": byte_fallback(),
}  # fmt: skip
names = st.sampled_from(sorted(TOKENIZERS))


def offset_spans(tokenizer, text):
    return token_spans(tokenizer.encode(text, add_special_tokens=False).offsets)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def decoded(tokenizer, ids):
    """The text and the ranges of its tokens."""
    prefixes = [decode(tokenizer, ids[: count + 1]) for count in range(len(ids))]
    return prefixes[-1], prefix_ranges(prefixes)


def numbers(count, seed=0):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_counting(weights, theirs, ours):
    """E2 with whole characters: what each of their tokens gives each of its characters, collected by ours."""
    a_character = {}
    for weight, (start, end) in zip(weights.tolist(), theirs, strict=True):
        for place in range(start, end):
            a_character[place] = a_character.get(place, 0.0) + weight / (end - start)
    return [sum(a_character.get(place, 0.0) for place in range(start, end)) for start, end in ours]


# --- the formula


@settings(deadline=None)
@given(st.text("abcdefghilmnoprstuvwy T.,", min_size=1, max_size=30), names, names)
def test_whole_characters_move_as_counting_says(text, their, our):
    theirs, ours = (TOKENIZERS[name].encode(text).offsets for name in (their, our))
    weights = numbers(len(theirs))
    moved = move(weights, token_spans(theirs), token_spans(ours))
    assert moved.tolist() == pytest.approx(by_counting(weights, theirs, ours), abs=1e-12)


@settings(deadline=None)
@given(texts, names, names)
def test_the_sum_stays_the_same_also_where_characters_are_split(text, their, our):
    theirs, ours = (offset_spans(TOKENIZERS[name], text) for name in (their, our))
    weights = numbers(len(theirs))
    assert move(weights, theirs, ours).sum().item() == pytest.approx(weights.sum().item(), abs=1e-10)
    assert overlap_shares(theirs, ours).sum(-1).allclose(torch.ones(len(theirs), dtype=torch.float64))


@settings(deadline=None)
@given(texts, names)
def test_the_same_tokens_keep_their_weights_to_the_last_bit(text, name):
    spans = offset_spans(TOKENIZERS[name], text)
    weights = numbers(len(spans))
    assert torch.equal(move(weights, spans, spans), weights)
    ids = TOKENIZERS[name].encode(text).ids
    whole, ranges = decoded(TOKENIZERS[name], ids)
    assert whole == text
    assert torch.equal(move(weights, spans, token_spans(ranges)), weights)  # two ways to find them


def test_single_bytes_own_the_parts_of_a_character_that_they_spell():
    text = "a😀é"  # 1, 4 and 2 bytes
    assert offset_spans(TOKENIZERS["bytes"], text).tolist() == [
        [0, 1], [1, 1.25], [1.25, 1.5], [1.5, 1.75], [1.75, 2], [2, 2.5], [2.5, 3],
    ]  # fmt: skip
    characters = token_spans([(0, 1), (1, 2), (2, 3)])
    weights = torch.tensor([1.0, 2.0, -4.0])
    moved = move(weights, characters, offset_spans(TOKENIZERS["bytes"], text))
    assert moved.tolist() == [1, 0.5, 0.5, 0.5, 0.5, -2, -2]
    assert move(moved, offset_spans(TOKENIZERS["bytes"], text), characters).tolist() == weights.tolist()


def test_a_lower_casing_tokenizer_that_drops_blanks_and_accents_keeps_the_originals_places():
    text = "Thé FILMS."
    theirs = lower_case_words().encode(text)
    assert theirs.tokens == ["[C]", "the", "film", "##s", "."]
    assert theirs.offsets == [(0, 0), (0, 3), (4, 8), (8, 9), (9, 10)]
    ours = token_spans([(place, place + 1) for place in range(len(text))])
    moved = move(torch.tensor([5.0, 3.0, 4.0, 1.0, 2.0]), token_spans(theirs.offsets), ours)
    assert moved.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 2]  # no weight for the blank, none from [C]


def test_what_is_not_ours_is_left_out_and_not_renormalised():
    theirs = token_spans([(0, 0), (0, 4), (4, 8), (8, 10)])
    ours = token_spans([(0, 0), (0, 2), (2, 6), (6, 8)])[2:]  # the response: from character 2 on
    assert move(torch.tensor([9.0, 1.0, 1.0, 7.0]), theirs, ours).tolist() == [1.0, 0.5]


def test_leading_axes_are_a_batch_and_empty_slots_get_nothing():
    theirs = torch.stack([token_spans([(0, 2), (2, 4)]), token_spans([(0, 4), (0, 0)])])
    ours = torch.stack([token_spans([(0, 1), (1, 4), (0, 0)]), token_spans([(1, 3), (0, 0), (3, 4)])])
    weights = numbers(2 * 3 * 2).reshape(2, 3, 2).float()
    moved = move(weights, theirs[:, None], ours[:, None])
    assert (moved.shape, moved.dtype) == ((2, 3, 3), torch.float32)
    for row in range(2):
        for head in range(3):
            assert torch.equal(moved[row, head], move(weights[row, head], theirs[row], ours[row]))
    assert not moved[0, :, 2].any()
    assert not moved[1, :, 1].any()
    with pytest.raises(ValueError, match="3 weights and 2 spans differ"):
        move(torch.ones(3), theirs[0], ours[0])


def test_no_tokens_have_no_spans():
    assert token_spans([]).shape == (0, 2)
    assert prefix_ranges([]) == []
    assert move(torch.ones(0), token_spans([]), token_spans([(0, 1)])).tolist() == [0]


# --- characters of sampled tokens


@settings(deadline=None)
@given(names, st.lists(st.integers(0, 255), min_size=1, max_size=12))
def test_any_ids_share_out_all_of_their_text(name, ids):
    """Sampled tokens need not be what encoding gives, nor even spell characters."""
    text, ranges = decoded(TOKENIZERS[name], ids)
    spans = token_spans(ranges)
    assert (spans[:, 1] - spans[:, 0]).sum().item() == pytest.approx(len(text))
    filled = [span for span in spans.tolist() if span[0] < span[1]]
    assert all(left[1] == right[0] for left, right in pairwise(filled))


@pytest.mark.parametrize("name", ["bytes", "fallback"])
def test_an_unfinished_character_belongs_to_the_tokens_that_spell_it(name):
    tokenizer = TOKENIZERS[name]
    emoji = tokenizer.encode("😀").ids
    a, b = tokenizer.encode("a").ids, tokenizer.encode("b").ids
    assert decoded(tokenizer, a + emoji + b) == ("a😀b", [(0, 1), *[(1, 2)] * 4, (2, 3)])
    text, ranges = decoded(tokenizer, emoji[:2] + b)  # never finished; decoders show one or two signs
    assert text.rstrip("b") == "\ufffd" * (len(text) - 1)
    assert ranges[-1] == (len(text) - 1, len(text))
    assert {place for start, end in ranges[:2] for place in range(start, end)} == set(range(len(text) - 1))
    assert all(start < end for start, end in ranges)


def test_a_token_may_end_one_character_and_begin_the_next():
    assert prefix_ranges(["\ufffd", "é\ufffd", "éé"]) == [(0, 1), (0, 2), (1, 2)]
    assert token_spans([(0, 1), (0, 2), (1, 2)]).tolist() == [[0, 0.5], [0.5, 1.5], [1.5, 2]]


def test_a_decoder_that_rewrites_its_last_words_shares_them():
    assert prefix_ranges(["it", "it '", "it's"]) == [(0, 2), (2, 3), (2, 4)]


def test_a_token_without_text_holds_nothing():
    assert prefix_ranges(["the", "the", "the film"]) == [(0, 3), (3, 3), (3, 8)]


def test_ranges_out_of_order_count_no_character_twice():
    spans = token_spans([(0, 3), (1, 2), (3, 4)])
    assert spans.tolist() == [[0, 3], [3, 3], [3, 4]]
