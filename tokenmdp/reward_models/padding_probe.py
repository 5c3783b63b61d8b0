"""Whether a classifier reads the padding behind a text, tried on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tokenmdp.models.sizes import embedding_rows
from tokenmdp.reward_models.compact_texts import Rows, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONG_PROBE, SHORT_PROBES = 48, 3  # the length of one text, the number of shorter ones, which try what padding changes
PROBE_TOLERANCE = 1e-4  # of the largest score


def reads_padding(
    model: PreTrainedModel, score: Callable[[Rows], torch.Tensor], *, fill: int, max_tokens: int | None, name: str
) -> bool:
    """Whether a text's score changes with the padding behind it; then texts of one length are read together.

    Args:
        model: the classifier.
        score: its scores (N,) of compact texts.
        fill: the id of the padding.
        max_tokens: the longest text that it reads; None: there is no limit.
        name: for the message.

    Raises:
        ValueError: it changes with the other texts even where all have one length.
    """
    room = LONG_PROBE if max_tokens is None else min(max_tokens, LONG_PROBE)
    short, long = _probe(model, SHORT_PROBES, max(room // 4, 1)), _probe(model, 1, room)
    padded = torch.full((SHORT_PROBES, room), fill, device=model.device)
    padded[:, : short.shape[1]] = short
    mask = torch.ones(SHORT_PROBES + 1, room, dtype=torch.bool, device=model.device)
    mask[:-1, short.shape[1] :] = False
    with torch.no_grad():
        alone = torch.cat([score(whole(row[None])) for row in short])
        together = score(whole(short))
        ids = torch.cat([padded, long])
        beside = score(Rows(ids, mask, torch.arange(room).expand_as(ids)))
    if not torch.isfinite(beside).all():
        return False  # its first scores are refused as such
    rounding = max(PROBE_TOLERANCE, 8 * torch.finfo(model.dtype).eps) * float(beside.abs().max()) + 1e-6
    if (together - alone).abs().max() > rounding:
        raise ValueError(
            f"{name} scores a text otherwise beside other texts of its length (largest difference "
            f"{(together - alone).abs().max():.3g}), so its scores would depend on the batch; use another "
            "reward model, such as GPT-2, Llama, BERT or DistilBERT"
        )
    return bool((beside[:-1] - alone).abs().max() > rounding)


def _probe(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """(rows, length) ids, the same at every call, none of them the padding's."""
    kept = [index for index in range(embedding_rows(model)) if index != model.config.pad_token_id][:1000]
    places = torch.arange(rows * length).view(rows, length) * 7 + 3
    return torch.tensor(kept)[places % len(kept)].to(model.device)
