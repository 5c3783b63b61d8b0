"""A model's layers by bfloat16 copies of their weights, for the length of a rollout on a GPU.

Autocast casts a weight that learns once per rollout, but a frozen one, as beside adapters, at every use, and a recorded
step would cast each of them again. The products are of the same casts; on a CPU they are the same bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tokenmdp.models.kernels.packed_weights import other_products


class WeightCopies:
    """Copies that keep their memory, half the weights', as long as this object lives: a recording needs it.

    >>> layer, copies = nn.Linear(2, 1), WeightCopies()
    >>> with copies.used(layer):
    ...     layer(torch.ones(1, 2)).dtype
    torch.bfloat16
    >>> layer(torch.ones(1, 2)).dtype
    torch.float32
    """

    def __init__(self) -> None:
        self._copies: dict[nn.Module, tuple[torch.Tensor, torch.Tensor | None]] = {}

    @contextlib.contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Until the exit the layers of ``model`` multiply by copies of their weights as they are now."""
        with torch.no_grad(), other_products(model, self._product):
            yield

    def _product(self, layer: nn.Linear | Conv1D) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()  # (out, in)
        bias: torch.Tensor | None = layer.bias
        if layer not in self._copies:
            made = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
            self._copies[layer] = (made, None if bias is None else torch.empty_like(bias, dtype=torch.bfloat16))
        copy, bias_copy = self._copies[layer]
        copy.copy_(weight)
        if bias is not None and bias_copy is not None:
            bias_copy.copy_(bias)
        return lambda inputs: nn.functional.linear(inputs.to(torch.bfloat16), copy, bias_copy)
