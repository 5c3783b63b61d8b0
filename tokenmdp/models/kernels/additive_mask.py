"""Attention masks for a GPU: made once for all layers, in the dtype they compute in, without looking at the numbers.

transformers first asks whether there is any padding, for which the host waits until the device has done everything
before. Then PyTorch turns the mask of booleans into one that is added, anew in each layer. On a CPU both cost nothing
and a missing mask is quicker, so there these masks are not used.
"""

from __future__ import annotations

import torch

ALIGNED = 16  # columns; PyTorch's memory-efficient attention copies masks whose rows begin elsewhere, in each layer


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where ``visible`` (N, 1, S, T) bool, and the dtype's lowest number elsewhere; within autocast in its dtype.

    Not -inf: a query that sees nothing, as in the padding before a prompt, would have NaN for its attention.

    >>> additive_mask(torch.tensor([[[[True, False]]]]), torch.float32)
    tensor([[[[ 0.0000e+00, -3.4028e+38]]]])
    """
    kind, (*shape, columns) = visible.device.type, visible.shape
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    mask = torch.zeros(*shape, -(-columns // ALIGNED) * ALIGNED, dtype=dtype, device=visible.device)[..., :columns]
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def padding_mask(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(N, 1, 1, T): every query sees the tokens that are ``kept`` (N, T) bool."""
    return additive_mask(kept[:, None, None, :], dtype)


def causal_mask(kept: torch.Tensor, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, 1, S, T): query s, of the S last of T tokens, sees those that are ``kept`` (N, T) bool and not behind it.

    >>> (causal_mask(torch.tensor([[False, True, True]]), 2, torch.float32)[0, 0] == 0).tolist()
    [[False, True, False], [False, True, True]]
    """
    visible, tokens = kept[:, None, None, :], kept.shape[1]  # (N, 1, 1, T)
    if queries > 1:
        at = torch.arange(tokens, device=kept.device)
        visible = visible & (at <= at[tokens - queries :, None])  # (N, 1, S, T)
    return additive_mask(visible, dtype)
