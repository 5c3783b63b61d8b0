"""Attention in bfloat16 on a CPU, where PyTorch's fused kernel is slower than its parts."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

MOST_WEIGHTS = 1 << 22  # N * heads * S * T; beyond, the memory to keep them costs more than the speed is worth


def attends(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `attend` applies to these tensors."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return False
    return query.shape[2] == 1 or math.prod(query.shape[:3]) * key.shape[2] <= MOST_WEIGHTS


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    is_causal: bool,
) -> torch.Tensor:
    """``softmax(q K^T * scaling + mask) V``, (N, S, heads, D) in the query's dtype.

    One new token reads a cache of float32 keys and values (`tokenmdp.models.kv_cache`) in float32, because the
    conversion of a whole cache at each token would cost more than the sums. A whole text has its products rounded to
    bfloat16, like all products under autocast, and their softmax in float32.

    Args:
        query: (N, heads, S, D) bfloat16.
        key: (N, key heads, T, D) bfloat16, or float32 from a cache.
        value: as ``key``.
        mask: (N, 1 or heads, 1 or S, T) bool, True where a query sees a key, or additive; None: see ``is_causal``.
        scaling: of the products; None: ``D ** -0.5``.
        is_causal: without a mask, whether the S queries are the last of the T tokens and see none behind them.
    """
    shared = query.shape[1] // key.shape[1]  # query heads that share a key head
    with torch.autocast("cpu", enabled=False):
        if query.shape[2] == 1:
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.float()
            out = scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=mask, scale=scaling, enable_gqa=shared > 1
            ).to(query.dtype)  # fmt: skip
        else:
            key, value = key.to(query.dtype), value.to(query.dtype)
            if shared > 1:
                key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
            scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if mask is None and is_causal:
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # -inf: rows of padding are NaN
            elif mask is not None:
                scores = scores + mask
            out = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    return out.transpose(1, 2).contiguous()
