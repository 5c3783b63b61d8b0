"""Value heads: one layer on the hidden states of the policy, or of a transformer of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tokenmdp.files import CheckpointError
from tokenmdp.models.sizes import check_finite


def new_head(width: int, device: torch.device) -> nn.Linear:
    """``v = w . h + b`` in float32 with w = b = 0, so that a fresh policy values every state at 0."""
    head = nn.Linear(width, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def heads_values(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Values (...) float32 of hidden states (..., C)."""
    with torch.autocast(hidden.device.type, enabled=False):  # a caller may have entered autocast around us
        return head(hidden.float()).squeeze(-1)


def load_part(module: nn.Module, path: Path, what: str) -> None:
    """Load the weights that lie beside a model, if they are there.

    Raises:
        CheckpointError: the file is damaged or belongs to another model.
    """
    if not path.exists():
        return
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not this model's {what} ({error}); restore or delete it") from error
    check_finite(module.state_dict(), str(path))
