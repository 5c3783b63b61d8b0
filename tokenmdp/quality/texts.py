"""Texts as finished episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from tokenmdp.types import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(NamedTuple):
    """One text in tokens."""

    prompt_ids: list[int]
    ids: list[int]  # of the response


def encode(tokenizer: PreTrainedTokenizerBase, text: str, prompt: str = "") -> Text:
    """``prompt`` and the response ``text`` in tokens; a blank joins the two where neither has one.

    Raises:
        ValueError: the text has no tokens.
    """
    joined = text if not prompt or text[:1].isspace() or prompt[-1:].isspace() else f" {text}"
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    ids = tokenizer.encode(joined, add_special_tokens=False)
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens; give at least one word")
    return Text(prompt_ids, ids)


def episodes_of(texts: Sequence[Text]) -> Episode:
    """The texts as episodes, laid out as in `tokenmdp.types`; at least one prompt slot, empty slots hold id 0.

    >>> episodes = episodes_of([Text([5, 6], [7]), Text([], [8, 9])])
    >>> episodes.input_ids.tolist(), episodes.response_mask.int().tolist()
    ([[5, 6, 7, 0], [0, 0, 8, 9]], [[1, 0], [1, 1]])
    """
    prompt_slots = max(1, *(len(text.prompt_ids) for text in texts))  # a policy reads the slot before the response
    horizon = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), prompt_slots + horizon, dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        for first, tokens in ((prompt_slots - len(text.prompt_ids), text.prompt_ids), (prompt_slots, text.ids)):
            ids[row, first : first + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[row, first : first + len(tokens)] = True
    return Episode(ids, mask, mask[:, prompt_slots:])


def text_of(episodes: Episode, row: int) -> Text:
    """The tokens of one episode.

    >>> text_of(episodes_of([Text([5, 6], [7]), Text([], [8, 9])]), 1)
    Text(prompt_ids=[], ids=[8, 9])
    """
    kept, prompt_slots = episodes.attention_mask[row].bool(), episodes.prompt_slots
    ids = episodes.input_ids[row]
    return Text(ids[:prompt_slots][kept[:prompt_slots]].tolist(), ids[prompt_slots:][kept[prompt_slots:]].tolist())
