"""The data that a run learns from, and the part of it that is held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tokenmdp.agents import algorithm
from tokenmdp.preferences import read_demonstrations, read_preferences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = TypeVar("Record")


def read_data(name: str, source: str, tokenizer: PreTrainedTokenizerBase) -> Sequence[Any]:
    """What the algorithm called ``name`` learns from.

    Raises:
        BadPreferences: a row that cannot be used.
    """
    read = read_demonstrations if algorithm(name).learns_from == "texts" else read_preferences
    return read(source, tokenizer)


def split_data(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Records to learn from, and those of every k-th prompt, k = 1 / share, for tests: no prompt is in both.

    >>> from types import SimpleNamespace
    >>> records = [SimpleNamespace(prompt_ids=(prompt,)) for prompt in (1, 1, 2, 3, 4)]
    >>> learning, held_out = split_data(records, share=0.5)
    >>> [one.prompt_ids[0] for one in learning], [one.prompt_ids[0] for one in held_out]
    ([2, 4], [1, 1, 3])
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"held_out is {share}; it is a share of the prompts, from 0 to 0.5")
    if not share:
        return list(records), []
    every, places = max(2, round(1 / share)), dict[Any, int]()
    for record in records:
        places.setdefault(record.prompt_ids, len(places))  # type: ignore[attr-defined]
    parts: tuple[list[Record], list[Record]] = [], []
    for record in records:
        parts[places[record.prompt_ids] % every == 0].append(record)  # type: ignore[attr-defined]
    if not parts[0]:
        raise ValueError(f"{len(records)} records answer one prompt, so none can be held out; pass --held-out 0")
    return parts
