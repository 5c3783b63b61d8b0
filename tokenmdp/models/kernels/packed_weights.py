"""A model's weights in the layout in which a CPU multiplies few rows fastest, for the length of a rollout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tokenmdp.models.kernels.onednn import LAYERS, has_onednn, multiply

FEWEST_STEPS = 8  # the copy costs about as much as a few products with it save


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN, which computes these products, is available; PyTorch's own are the same up to rounding."""
    return (
        device.type == "cpu"
        and has_onednn()
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


@contextlib.contextmanager
def packed_layers(model: nn.Module, dtype: torch.dtype, rows: int) -> Iterator[None]:
    """Until the exit, ``nn.Linear`` and ``Conv1D`` layers of ``model`` multiply by rearranged copies of their weights.

    A decoding step has one row per text. With so few, a product spends its time on fetching and rearranging the weights
    again at each token; here that is done once. The copies take the memory of the weights in ``dtype``, know nothing of
    later changes to the weights, and have no gradient.

    Args:
        model: on the CPU.
        dtype: of the products: float32 or bfloat16.
        rows: texts that are decoded together, for which the layout is chosen; other numbers work, too.
    """
    with other_products(model, lambda layer: _product(layer, dtype, rows)):
        yield


@contextlib.contextmanager
def other_products(
    model: nn.Module, product: Callable[[nn.Linear | Conv1D], Callable[[torch.Tensor], torch.Tensor]]
) -> Iterator[None]:
    """Until the exit, ``product(layer)`` replaces the ``forward`` of each ``nn.Linear`` and ``Conv1D`` of ``model``.

    Layers whose weights are not float32, or whose ``forward`` something else replaced, stay as they are.
    """
    layers: list[nn.Linear | Conv1D] = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and type(module) in LAYERS
        and module.weight.dtype == torch.float32
        and "forward" not in vars(module)
    ]
    try:
        for layer in layers:
            vars(layer)["forward"] = product(layer)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _product(layer: nn.Linear | Conv1D, dtype: torch.dtype, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = layer.weight.detach().to(dtype)  # (out, in), or (in, out) of a Conv1D
    weight = weight if isinstance(layer, nn.Linear) else weight.t().contiguous()
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    copy = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda inputs: multiply(inputs.to(dtype), copy, bias)
