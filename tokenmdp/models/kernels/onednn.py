"""Float32 products of a model's layers through oneDNN, where PyTorch's own are slow.

PyTorch multiplies float32 matrices with MKL. On x86 processors not made by Intel, MKL leaves the widest vector
instructions unused; oneDNN, which PyTorch has for its other dtypes, uses them. `benchmarks/speed.py changes` measures
the difference on a machine.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def has_onednn() -> bool:
    """Whether this PyTorch has oneDNN products that can be called, and the user has not switched it off."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    )


def onednn_is_faster() -> bool:
    """Whether oneDNN is available and PyTorch's own products are MKL's on an x86 processor not made by Intel."""
    return has_onednn() and torch.backends.mkl.is_available() and _maker() not in ("", "GenuineIntel")


@cache
def _maker() -> str:
    """The maker of an x86 processor under Linux, as it calls itself; elsewhere empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``inputs @ weight.T + bias`` by oneDNN, without gradients; (N, K) ``weight`` may be a copy in oneDNN's layout."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """``a @ b.T + bias`` of a (M, K), b (N, K), bias (N,) or None; its gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return multiply(a, b, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        a, b = ctx.saved_tensors
        of_a, of_b, of_bias = ctx.needs_input_grad
        return (
            _Product.apply(grad, b.t(), None) if of_a else None,
            _Product.apply(grad.t(), a.t(), None) if of_b else None,
            grad.sum(0) if of_bias else None,
        )


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``inputs @ weight.T + bias``: (..., K), (N, K), (N,) or None -> (..., N), float32; differentiable repeatedly."""
    return _Product.apply(inputs.reshape(-1, inputs.shape[-1]), weight, bias).view(*inputs.shape[:-1], weight.shape[0])


def _takes(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Float32 on the CPU, not under autocast, no subclass of a tensor, such as a shard, and not empty."""
    return (
        inputs.device.type == "cpu"
        and inputs.numel() > 0
        and inputs.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and type(inputs) in (torch.Tensor, nn.Parameter)
        and type(weight) in (torch.Tensor, nn.Parameter)
    )


class OneDNNLinear(nn.Linear):
    """An ``nn.Linear`` with `product`."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # noqa: D102
        if _takes(inputs, self.weight):
            return product(inputs, self.weight, self.bias)
        return super().forward(inputs)


class OneDNNConv1D(Conv1D):
    """GPT-2's layer, whose weight is (K, N), with `product`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return product(x, self.weight.t(), self.bias) if _takes(x, self.weight) else super().forward(x)


def use_onednn(model: nn.Module) -> None:
    """Let the ``nn.Linear`` and ``Conv1D`` layers of ``model`` multiply by oneDNN where that is faster.

    Only the layers' class changes: their weights, names and checkpoints stay.
    """
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) in FASTER:
            module.__class__ = FASTER[type(module)]


FASTER: dict[type, type] = {nn.Linear: OneDNNLinear, Conv1D: OneDNNConv1D}
LAYERS = (*FASTER, *FASTER.values())  # exactly these: another subclass may compute something else
