"""The distribution that a token is drawn from: logits, processed the same way for sampling and for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

NEVER = torch.finfo(torch.float32).min  # not -inf: 0 * -inf would make the entropy NaN


class DecodeState(NamedTuple):
    """Sampling in progress: everything about the N states before response token ``step``."""

    cache: Any  # transformers' cache of keys and values, changed in place by `CausalLMPolicy.append`
    attention_mask: torch.Tensor  # (N, S) int64, S slots seen so far
    step: int  # t, the index of the response token to come
    logits: torch.Tensor  # (N, C) float32, processed: C is the vocabulary, or k with top-k
    support: torch.Tensor | None  # (N, k) int64, the tokens behind the columns of logits; None: the vocabulary
    value: torch.Tensor  # (N,) float32


class TokenScores(NamedTuple):
    """Response tokens scored in one forward; index t means response token t. Nats."""

    logprobs: torch.Tensor  # (N, H) float32
    values: torch.Tensor  # (N, H) float32, the state before token t
    entropy: torch.Tensor  # (N, H) float32, of the distribution token t was drawn from


def process_logits(
    raw_logits: torch.Tensor,
    support: torch.Tensor | None,
    *,
    vocab_size: int,
    temperature: float,
    top_k: int,
    too_early: int,
    eos_token_ids: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is sampled, (N, T, V) or (N, T, k), and the tokens (N, T, k) behind its columns; None: the vocabulary.

    Args:
        raw_logits: (N, T, rows) of T response tokens in a row.
        support: (N, T, k) int64, tokens chosen before; None: those of ``top_k``.
        vocab_size: V; what a padded vocabulary has beyond it is cut off.
        temperature: divides.
        top_k: the most likely tokens that are kept; 0 is all.
        too_early: how many of the T tokens may not end the text.
        eos_token_ids: which end it.
    """
    logits = raw_logits[..., :vocab_size]  # (N, T, V), of the forward's dtype
    if temperature != 1.0:
        logits = logits.float() / temperature
    if too_early > 0:
        for token in eos_token_ids:  # a list as an index would be sent to the device each time
            logits[:, :too_early, token] = torch.finfo(logits.dtype).min  # -inf: see NEVER
    if top_k and support is None:
        support = logits.topk(top_k, dim=-1).indices  # (N, T, k)
    return (logits, None) if support is None else (logits.gather(-1, support), support)


def draw(
    state: DecodeState, uniform: torch.Tensor | None, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `tokenmdp.models.policy.CausalLMPolicy.act`."""
    every_logprob = state.logits.log_softmax(-1)  # (N, C)
    if deterministic:
        column = every_logprob.argmax(-1, keepdim=True)  # (N, 1)
    else:
        if uniform is None:
            uniform = torch.rand(len(every_logprob), dtype=torch.float64, device=every_logprob.device)
        cdf = every_logprob.exp().double().cumsum(-1)  # in float32 the rare tokens of 50,000 would vanish
        column = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
        column = column.clamp(max=cdf.shape[1] - 1)  # a product rounded up to the last sum
    logprob = every_logprob.gather(-1, column)
    token = column if state.support is None else state.support.gather(-1, column)
    return token.squeeze(-1), logprob.squeeze(-1), state.value
