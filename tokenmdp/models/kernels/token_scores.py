"""Cheaper equivalents of what transformers and PyTorch compute step by step; tests compare each with the plain path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CHUNK_NUMBERS = {"cpu": 1 << 18}  # float32 numbers at a time: what fits into a core's cache
OTHER_CHUNK_NUMBERS = 1 << 26  # 256 MiB


def token_scores(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``log softmax(logits)[tokens]`` and ``-sum_v p_v log p_v``, both float32 and differentiable once.

    A few rows at a time, and the backward keeps nothing of the size of ``logits`` but ``logits`` itself; step by step
    the same takes six such arrays in float32.

        d logprob / d logits = onehot - p        d entropy / d logits = -p * (log p + entropy)

    Args:
        logits: (..., V), any floating dtype; all finite.
        tokens: (...) int64.

    >>> logprob, entropy = token_scores(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> logprob.exp().tolist(), entropy.exp().round(decimals=4).tolist()
    ([0.25, 0.25], [4.0, 4.0])
    """
    logprob, entropy = _TokenScores.apply(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1))
    return logprob.view(tokens.shape), entropy.view(tokens.shape)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprob, entropy = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        with torch.autocast(logits.device.type, enabled=False):  # it would round the dot product to bfloat16
            for rows in _chunks(logits):
                wide = logits[rows].float()
                every_logprob = wide.log_softmax(-1)
                logprob[rows] = every_logprob.gather(-1, tokens[rows, None])[:, 0]
                entropy[rows] = -torch.linalg.vecdot(wide.softmax(-1), every_logprob)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprob: torch.Tensor | None, of_entropy: torch.Tensor | None) -> tuple[Any, None]:
        logits, tokens, entropy = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            wide = logits[rows].float()
            shares = wide.softmax(-1)
            part = torch.zeros_like(shares) if of_logprob is None else shares * -of_logprob[rows, None]
            if of_logprob is not None:
                part.scatter_add_(-1, tokens[rows, None], of_logprob[rows, None])
            if of_entropy is not None:
                # p first: p * log p is finite for every logit, while the slope times log p may overflow.
                change = (wide.log_softmax(-1) + entropy[rows, None]).mul_(shares)
                part.addcmul_(change, of_entropy[rows, None], value=-1.0)
            grad[rows] = part
        return grad, None


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    numbers = CHUNK_NUMBERS.get(logits.device.type, OTHER_CHUNK_NUMBERS)
    size = max(numbers // logits.shape[-1], 1)
    return (slice(first, first + size) for first in range(0, len(logits), size))


def fuse_activations(model: nn.Module) -> None:
    """Compute GPT-2's tanh approximation of GELU in one kernel instead of eight; the same up to rounding."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))
