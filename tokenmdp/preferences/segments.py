"""Segments of responses, good and bad, as a ranking: what a reward model for single segments learns from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenmdp.preferences.errors import BadPreferences
from tokenmdp.preferences.records import Ids, Ranking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def segment_ranking(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Ids,
    responses: Sequence[Sequence[Ids]],
    good: Sequence[Sequence[bool | None]],
) -> Ranking:
    """Segments of several responses to one prompt: every good one is preferred to every bad one.

    Segment j of a response y becomes ``y + end of text + y up to the end of j``, which is how a part of
    `tokenmdp.credit.FineGrainedCredit` with ``context="whole"`` asks: a causal reward model that is trained on these
    rankings answers at the end of a segment and has read all of y, also what comes behind it. A y that ends with an
    end-of-text token gets no second one. Segments of different responses are compared with each other, so that a bad
    one does not only lose to its neighbours.

    Args:
        tokenizer: of the ids.
        prompt_ids: of the prompt.
        responses: for each response its segments, in order.
        good: for each segment whether it is a good one; None leaves it out.

    Raises:
        BadPreferences: labels and segments differ in number, or the tokenizer has no end-of-text token.
        AllTied: no good segment, or no bad one.
        EmptyText: a prompt or a segment without tokens.

    >>> from tokenmdp.models.tokens import toy_tokenizer
    >>> toy, encode = toy_tokenizer(), lambda text: tuple(toy_tokenizer().encode(text))
    >>> found = segment_ranking(toy, encode("it was"), [[encode("good ."), encode("bad .")]], [[True, False]])
    >>> found.responses, found.ranks
    (('good . bad . <eos> good .', 'good . bad . <eos> good . bad .'), (1, 2))
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise BadPreferences(f"the tokenizer's end-of-text token is {end!r}, and segments are read behind one; set it")
    texts: list[Ids] = []
    ranks: list[int] = []
    for segments, labels in zip(responses, good, strict=True):
        if len(segments) != len(labels):
            raise BadPreferences(f"{len(segments)} segments and {len(labels)} labels; give one label each")
        whole = tuple(token for segment in segments for token in segment)
        read = whole if whole[-1:] == (end,) else (*whole, end)
        for segment, label in zip(segments, labels, strict=True):
            read += tuple(segment)
            if label is not None:
                texts.append(read)
                ranks.append(1 if label else 2)
    return Ranking(
        prompt=str(tokenizer.decode(list(prompt_ids))),
        responses=tuple(str(tokenizer.decode(list(text))) for text in texts),
        prompt_ids=tuple(prompt_ids),
        responses_ids=tuple(texts),
        ranks=tuple(ranks),
    )
