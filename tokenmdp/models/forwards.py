"""How the forwards of a model that learns are computed: their precision, and what they keep for the backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from tokenmdp.models.kernels.recompute import recomputing, transformer_layers


@contextlib.contextmanager
def forwards(model: Any, compute_dtype: torch.dtype, recompute: bool = False) -> Iterator[None]:
    """Enter around forwards: autocast for bfloat16; with ``recompute`` layers keep only their inputs."""
    again = recomputing(model) if recompute else contextlib.nullcontext()
    with autocast(model, compute_dtype), again:
        yield


def autocast(model: Any, compute_dtype: torch.dtype) -> torch.autocast:
    """The precision of the forwards. Entered around a whole loop, it casts each weight only once."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=compute_dtype == torch.bfloat16)


def check_recompute(model: Any) -> None:
    """Raise ValueError for a model without layers whose activations can be computed again."""
    transformer_layers(model)
