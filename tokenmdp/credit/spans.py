"""Which word, clause and sentence of the response each token belongs to, read from the text.

Every grain nests in the next: a clause ends where a sentence does, and a word where a clause does.

    words       a token that brings a blank, or that follows a blank, the end of a clause or a special token, begins
                one; punctuation written without a blank belongs to the word before it. A special token is a word.
    clauses     end after , ; : or a dash, and where a sentence ends
    sentences   end after . ! ? or an ellipsis, closing quotes and brackets of the same token included

Whether a sentence ends at a token depends on the text up to that token only, so "8.5" ends one if "8." is a token's
end. Only text with a letter or digit since the last such mark ends at one; special tokens, and punctuation after the
last end, belong to the last clause and sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from tokenmdp.credit.base import MissingResource
from tokenmdp.models.tokens import token_pieces
from tokenmdp.types import Episode

UNITS = ("tokens", "words", "clauses", "sentences")  # each nests in the next
WORD = re.compile(r"\w")
_CLOSED = r"[\s\"')\]}\u201d\u2019»]*$"  # blanks, and quotes and brackets that close
CLAUSE_END = re.compile(r"[,;:\u2013\u2014]" + _CLOSED)
SENTENCE_END = re.compile(r"[.!?…]" + _CLOSED)


def unit_ids(episode: Episode, tokenizer: Any, units: str) -> torch.Tensor:
    """The number of the unit that each response token belongs to, counted from 0; -1 outside. (N, H) int64.

    Args:
        episode: N finished episodes.
        tokenizer: of the response; "tokens" need none.
        units: one of `UNITS`.

    Raises:
        MissingResource: no tokenizer to read the text with.
    """
    mask = episode.response_mask.bool()
    if units == "tokens":
        return torch.where(mask, mask.cumsum(-1) - 1, -1)
    numbers = torch.full(mask.shape, -1)
    for row, (pieces, special) in enumerate(_read(episode, tokenizer, units)):
        find = _words if units == "words" else _segments
        numbers[row, mask[row]] = torch.tensor(find(pieces, special, units), dtype=torch.int64)
    return numbers


def segment_ends(episode: Episode, tokenizer: Any, units: str, *, wordless_rest: bool) -> torch.Tensor:
    """Which response tokens end a sentence or a clause, (N, H) bool.

    The last token ends the unfinished one before it. What follows the last one without a letter or digit, such as the
    end-of-text token, ends another only with ``wordless_rest``.

    Args:
        episode: N finished episodes.
        tokenizer: of the response.
        units: "sentences" or "clauses".
        wordless_rest: whether a rest without words is a segment.
    """
    mask = episode.response_mask.bool()
    every = torch.zeros_like(mask)
    for row, (pieces, special) in enumerate(_read(episode, tokenizer, units)):
        ends, rest = _ends(_readable(pieces, special), units)
        if rest or wordless_rest or not any(ends):
            ends[-1] = True
        every[row, mask[row]] = torch.tensor(ends)
    return every


def _read(episode: Episode, tokenizer: Any, units: str) -> list[tuple[list[str], list[bool]]]:
    """The pieces of each response, and which of its tokens are special."""
    if tokenizer is None:
        raise MissingResource(f"to find {units} in the response it must be read, and there is no tokenizer; pass one")
    special, prompt_slots, rows = set(tokenizer.all_special_ids), episode.prompt_slots, []
    for ids, mask in zip(episode.input_ids, episode.attention_mask.bool(), strict=True):
        prompt, response = ids[:prompt_slots][mask[:prompt_slots]], ids[prompt_slots:][mask[prompt_slots:]].tolist()
        pieces = token_pieces(tokenizer, response, prompt.tolist())[1]
        rows.append((pieces, [token in special for token in response]))
    return rows


def _readable(pieces: Sequence[str], special: Sequence[bool]) -> list[str]:
    return ["" if hidden else piece for piece, hidden in zip(pieces, special, strict=True)]


def _ends(pieces: Sequence[str], units: str) -> tuple[list[bool], bool]:
    """After which pieces a clause or sentence ends, and whether a word follows the last of them."""

    def scan(pattern: re.Pattern[str]) -> tuple[list[bool], str]:
        ends, text = [], ""
        for piece in pieces:
            text += piece
            ends.append(bool(pattern.search(text) and WORD.search(text)))
            if ends[-1]:
                text = ""
        return ends, text

    ends, rest = scan(SENTENCE_END)
    if units == "clauses":
        commas, after_comma = scan(CLAUSE_END)
        ends = [end or comma for end, comma in zip(ends, commas, strict=True)]
        rest = min(rest, after_comma, key=len)
    return ends, bool(WORD.search(rest))


def _segments(pieces: Sequence[str], special: Sequence[bool], units: str) -> list[int]:
    """The number of each token's clause or sentence."""
    ends, rest = _ends(_readable(pieces, special), units)
    numbers = [0, *accumulate(map(int, ends))][:-1]  # a token belongs to what its predecessors left open
    last = max(sum(ends) - (not rest), 0)
    return [min(number, last) for number in numbers]


def _words(pieces: Sequence[str], special: Sequence[bool], units: str) -> list[int]:
    """The number of each token's word."""
    clause_ends, _ = _ends(_readable(pieces, special), "clauses")
    starts = [False] * len(pieces)
    due, waiting = False, None  # a word begins here; the first of the empty tokens before it
    for index, piece in enumerate(pieces):
        first = index if waiting is None else waiting
        if special[index]:
            starts[first], due, waiting = True, True, None
        elif not piece.strip():  # a blank, or some bytes of a character: part of what follows
            due, waiting = due or bool(piece), first
        else:
            starts[first] = due or piece[0].isspace()
            due, waiting = piece[-1].isspace() or clause_ends[index], None
    starts[0] = False
    return list(accumulate(map(int, starts)))
