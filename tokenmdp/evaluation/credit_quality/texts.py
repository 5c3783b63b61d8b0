"""Texts as finished episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tokenmdp.models.encoding import continuing_ids, opening_ids, plain_ids, start_ids
from tokenmdp.models.tokens import check_text
from tokenmdp.types import Episode, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(NamedTuple):
    """One text in tokens."""

    prompt_ids: list[int]
    ids: list[int]  # of the response


def encode(tokenizer: PreTrainedTokenizerBase, text: str, prompt: str = "", place: str = "the text") -> Text:
    """``prompt`` and the response ``text`` in tokens; a blank joins the two where neither has one.

    The prompt begins with what the tokenizer puts before every text, such as <s>.

    Raises:
        ValueError: the text has no tokens, or is not Unicode; ``place`` says where it is from.
    """
    if not isinstance(text, str):
        raise ValueError(f"{place} is {text!r}; a text is needed here, not token ids")
    check_text(text, place)
    check_text(prompt, "the prompt")
    joined = text if not prompt or text[:1].isspace() or prompt[-1:].isspace() else f" {text}"
    start = start_ids(tokenizer)
    prompt_ids = opening_ids(tokenizer, prompt, start) if prompt else start
    ids = continuing_ids(tokenizer, joined) if prompt else plain_ids(tokenizer, joined)
    if not ids:
        raise ValueError(f"{place} is {text!r}, which has no tokens; give at least one word")
    return Text(prompt_ids, ids)


def episodes_of(texts: Sequence[Text]) -> Episode:
    """The texts as episodes; see `tokenmdp.types.lay_out`."""
    return lay_out([text.prompt_ids for text in texts], [text.ids for text in texts])


def text_of(episodes: Episode, row: int) -> Text:
    """The tokens of one episode.

    >>> text_of(episodes_of([Text([5, 6], [7]), Text([], [8, 9])]), 1)
    Text(prompt_ids=[], ids=[8, 9])
    """
    kept, prompt_slots = episodes.attention_mask[row].bool(), episodes.prompt_slots
    ids = episodes.input_ids[row]
    return Text(ids[:prompt_slots][kept[:prompt_slots]].tolist(), ids[prompt_slots:][kept[prompt_slots:]].tolist())
