"""Texts as a classifier reads them, every row without gaps and right-padded, and the way back to an episode's slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from tokenmdp.types import Episode


class Rows(NamedTuple):
    """Texts without gaps: every row's tokens from position 0, right-padded."""

    input_ids: torch.Tensor  # (N, L) int64
    mask: torch.Tensor  # (N, L) bool
    slots: torch.Tensor  # (N, L) int64: the episode slot that each came from

    @property
    def last(self) -> torch.Tensor:
        """The index of each row's last token, (N,)."""
        return self.mask.sum(-1) - 1


def compact(episodes: Episode, fill: int = 0) -> Rows:
    """Close the gaps of left-padded prompts and right-padded responses; L is the longest text, ``fill`` the padding.

    >>> mask = torch.tensor([[False, True, True, False]])
    >>> rows = compact(Episode(torch.tensor([[9, 5, 6, 9]]), mask, mask[:, 2:]))
    >>> rows.input_ids.tolist(), rows.slots.tolist()
    ([[5, 6]], [[1, 2]])
    """
    occupied = episodes.attention_mask.bool()
    lengths = occupied.sum(-1)
    slots = (~occupied).int().argsort(dim=-1, stable=True)[:, : int(lengths.max())]  # occupied first, in order
    mask = torch.arange(slots.shape[-1], device=slots.device) < lengths[:, None]
    return Rows(torch.where(mask, episodes.input_ids.gather(-1, slots), fill), mask, slots)


def response_slots(row: torch.Tensor, rows: Rows, episodes: Episode) -> torch.Tensor:
    """Put rows over compact positions (N, ..., L) back on the response slots (N, ..., H), zero where there is no token.

    >>> mask = torch.tensor([[False, True, True, False]])
    >>> episodes = Episode(torch.tensor([[9, 5, 6, 9]]), mask, mask[:, 2:])
    >>> response_slots(torch.tensor([[0.25, 0.75]]), compact(episodes), episodes).tolist()
    [[0.75, 0.0]]
    """
    middle, slots_in_all = (1,) * (row.dim() - 2), episodes.input_ids.shape[-1]
    slots = rows.slots.to(row.device).view(len(row), *middle, -1).expand_as(row)
    mask = rows.mask.to(row.device).view(len(row), *middle, -1)
    full = torch.zeros(*row.shape[:-1], slots_in_all + 1, dtype=row.dtype, device=row.device)  # and an end's slot
    full.scatter_(-1, slots, row * mask)  # (N, ..., P+H+1)
    response_mask = episodes.response_mask.to(row.device).view(len(row), *middle, -1)
    return full[..., episodes.prompt_slots : slots_in_all] * response_mask


def response_positions(rows: Rows, episodes: Episode) -> torch.Tensor:
    """Which compact positions hold response tokens, (N, L) bool."""
    return rows.mask & (rows.slots >= episodes.prompt_slots) & (rows.slots < episodes.input_ids.shape[-1])


def with_end(rows: Rows, end: int, slot: int) -> Rows:
    """The texts with the token ``end`` behind those that do not end with it; ``slot`` is where those come from.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> rows = with_end(Rows(torch.tensor([[5, 9], [6, 0]]), mask, torch.tensor([[0, 1], [0, 1]])), end=9, slot=2)
    >>> rows.input_ids.tolist(), rows.mask.sum(-1).tolist(), rows.slots.tolist()
    ([[5, 9, 0], [6, 9, 0]], [2, 2], [[0, 1, 2], [0, 2, 2]])
    """
    lacks = (rows.input_ids.gather(-1, rows.last[:, None])[:, 0] != end).nonzero()[:, 0]
    ids, mask, slots = (pad(part, (0, 1), value=value) for part, value in zip(rows, (0, False, slot), strict=True))
    behind = rows.last[lacks] + 1
    ids[lacks, behind], mask[lacks, behind], slots[lacks, behind] = end, True, slot
    return Rows(ids, mask, slots)


def whole(ids: torch.Tensor) -> Rows:
    """Texts without padding."""
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1]).expand_as(ids))
