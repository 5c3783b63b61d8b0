"""Memory for time: the backward pass computes a layer's activations again instead of keeping them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model that may be computed again.

    Raises:
        ValueError: it marks none.
    """
    layers: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} marks no layers that can be computed again; set gradient_checkpointing=False"
        )
    return layers


@contextlib.contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Forwards within the block keep the input of each layer alone; gradients are the same.

    transformers' own ``gradient_checkpointing_enable`` acts in training mode only, where dropout would be on.
    """
    layers = transformer_layers(model)
    before = [vars(layer).get("forward") for layer in layers]  # the layer's own, such as one with accelerate's hooks
    for layer in layers:
        # Nothing here draws random numbers, so their state need not be kept.
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward  # the class's own is back
            else:
                layer.forward = own
