"""Credit from one tokenizer's tokens to another's, by the characters that both spell.

Each token owns a *span* of the text, ``(start, end)`` in characters, (0, 0) where it spells nothing. The spans of a
tokenizer do not overlap. Where several tokens hold the bytes of one character, they own equal parts of it, in order:
so spans have fractions, nothing is counted twice, and a tokenizer's credit moved to the same tokens stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

UNFINISHED = "\ufffd"  # how a decoder shows bytes that are not a whole character


def shared_length(one: str, other: str, known: int = 0) -> int:
    """How many characters two texts begin with in common; the first ``known`` are taken for granted.

    >>> shared_length("the film", "the fire")
    6
    """
    length = known
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def prefix_ranges(prefixes: Sequence[str]) -> list[tuple[int, int]]:
    """The characters that each of several tokens holds in the last of ``prefixes``; they cover all of it.

    ``prefixes[i]`` is the decoded text of the tokens up to i. Decoding the tokens one by one would lose the blanks
    between words and break characters whose bytes are spread over several tokens. Such a character counts for every
    token that holds some of it, so ranges may share one.

    Args:
        prefixes: texts that grow by one token (or, the first, by any number of tokens).

    Returns:
        For each prefix (start, end); empty, with start == end, for a token that adds nothing to the text.

    >>> prefix_ranges(["a", "a\ufffd", "a\ufffd", "aé!"])
    [(0, 1), (1, 2), (1, 2), (1, 3)]
    """
    ranges = []
    text, done, before = prefixes[-1] if prefixes else "", 0, ""
    for prefix in prefixes:
        stable = shared_length(prefix, text, done)
        start, end = done, stable
        if len(prefix) > stable:  # part of the next character; the rest of its bytes follow
            end = min(stable + 1, len(text))
        elif prefix == before and prefix.endswith(UNFINISHED):  # more bytes of a character that is never completed
            start = done - 1
        ranges.append((start, end))
        done, before = stable, prefix
    return ranges


def token_spans(ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The spans of tokens that hold these characters, in order: k tokens that share a character own 1/k of it each.

    Args:
        ranges: for each token (start, end), as `prefix_ranges` or a fast tokenizer's ``offset_mapping`` gives them.

    Returns:
        (len(ranges), 2) float64.

    >>> token_spans([(0, 2), (1, 3), (0, 0)]).tolist()
    [[0.0, 1.5], [1.5, 3.0], [0.0, 0.0]]
    """
    owners = Counter(place for start, end in ranges if start < end for place in {start, end - 1})
    taken: Counter[int] = Counter()
    owned, reached = [], 0.0
    for start, end in ranges:
        if start >= end:
            owned.append((0.0, 0.0))
            continue
        first = max(reached, float(start))  # where the token before ends, if they share a character
        taken.update({start, end - 1})
        reached = max(first, end - 1 + taken[end - 1] / owners[end - 1])
        owned.append((first, reached))
    return torch.tensor(owned, dtype=torch.float64).reshape(-1, 2)


def overlap_shares(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """``shares[j, i] = |theirs[j] and ours[i]| / |theirs[j]|``; (..., J, 2), (..., T, 2) -> (..., J, T) float64.

    A row sums to the part of their token that our tokens cover, 0 for a token that spells nothing.

    >>> overlap_shares(token_spans([(0, 4)]), token_spans([(0, 1), (1, 4)])).tolist()
    [[0.25, 0.75]]
    """
    theirs, ours = theirs.double().unsqueeze(-2), ours.double().unsqueeze(-3)  # (..., J, 1, 2), (..., 1, T, 2)
    shared = torch.minimum(theirs[..., 1], ours[..., 1]) - torch.maximum(theirs[..., 0], ours[..., 0])
    length = theirs[..., 1] - theirs[..., 0]
    return torch.where(length > 0, shared.clamp(min=0) / length, 0.0)


def move(weights: torch.Tensor, theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """``moved[i] = sum_j weights[j] * |theirs[j] and ours[i]| / |theirs[j]|``: weights, rewards or attributions.

    Each of their tokens spreads its weight evenly over its span, and each of ours collects what lies on its own. The
    sum stays the same where our spans cover theirs. What lies outside our spans is left out and nothing is
    renormalised: the weight of tokens that spell nothing, and of text that none of our tokens hold.

    Args:
        weights: (..., J), of any sign.
        theirs: (..., J, 2) the spans of the weights' tokens; leading axes broadcast.
        ours: (..., T, 2) the spans of the tokens to move to, on the same text.

    Returns:
        (..., T) in the weights' dtype; sums are taken in float64.

    >>> words, pieces = token_spans([(0, 5), (5, 9)]), token_spans([(0, 5), (5, 6), (6, 9)])
    >>> move(torch.tensor([3.0, -4.0]), words, pieces).tolist()
    [3.0, -1.0, -3.0]
    """
    if weights.shape[-1] != theirs.shape[-2]:
        raise ValueError(f"{weights.shape[-1]} weights and {theirs.shape[-2]} spans differ: give one span a weight")
    return (weights.double().unsqueeze(-2) @ overlap_shares(theirs, ours)).squeeze(-2).to(weights.dtype)
