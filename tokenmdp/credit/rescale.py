"""DeepLIFT's multipliers for any differentiable score, transformers included.

A `Paired` tensor is a value and, beside it, what the value would be for the reference input. Both run through the same
code of the model, and operations that are not linear swap their gradient for one that explains the whole difference:

    multiplier = integral over a in [0, 1] of gradient f(reference + a * (value - reference)) da

so that ``sum multiplier * (value - reference) == f(value) - f(reference)`` at every operation and, by the chain rule,
from end to end. For a function of one number this is the slope ``(f(x) - f(x')) / (x - x')``, the Rescale rule of
Shrikumar et al., "Learning Important Features Through Propagating Activation Differences", ICML 2017. For a product it
is the gradient at the mean of both inputs, the Shapley value of the two factors. For softmax, normalisation and
attention, for which the source has no rule, it is a sum over `POINTS` points. Splitting those three into exponentials,
divisions and products instead also adds up, but to huge multipliers that cancel.

captum's DeepLift knows modules such as nn.ReLU only. On a transformer, whose operations are functions or modules that
it does not know, it gives gradient * difference, which does not sum to the difference of the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

Function = Callable[..., torch.Tensor]

POINTS = 16  # of the Gauss-Legendre rule
SAME = 1e-9  # a difference below which the slope is the derivative
# By name: `x * y`, `x.mul(y)` and `torch.mul(x, y)` are different functions, and `x *= y` is "mul_", which takes the
# rule of "mul". An operation that is not listed is taken as linear; if it is not, such as a mask that the input decides
# or a gradient written by hand, the multipliers explain too little or too much, and the credit method says so.
ONE_NUMBER = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "softsign",
    "hardtanh", "hardswish", "hardsigmoid", "tanh", "sigmoid", "special_expit", "logsigmoid", "exp", "exp2", "expm1",
    "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "pow", "__pow__", "__rpow__", "__rdiv__",
    "__rtruediv__", "erf", "special_erf", "abs", "clamp", "clip", "sin", "cos",
})  # fmt: skip
PRODUCTS = frozenset({
    "mul", "multiply", "__mul__", "__rmul__", "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "dot", "bmm", "addmm",
    "addbmm", "addcmul", "baddbmm", "einsum",
})  # fmt: skip
JOINT = frozenset({
    "div", "divide", "true_divide", "__truediv__", "addcdiv", "softmax", "softmin", "log_softmax", "logsumexp",
    "special_logsumexp", "prod", "glu", "std", "var", "norm", "linalg_norm", "linalg_vector_norm", "layer_norm",
    "rms_norm", "group_norm", "normalize", "scaled_dot_product_attention",
})  # fmt: skip
# What takes indices or masks, which then must not differ between the input and the reference.
SELECTIONS = frozenset({
    "__getitem__", "__setitem__", "masked_select", "masked_scatter", "masked_scatter_", "index_put", "index_put_",
    "index_add", "index_add_", "index_select", "index_copy", "index_copy_", "gather", "scatter", "scatter_",
    "scatter_add", "scatter_add_", "take", "take_along_dim", "nonzero", "one_hot", "bincount", "histc", "embedding",
    "tolist", "item", "__bool__",
})  # fmt: skip
RULES = ONE_NUMBER | PRODUCTS | JOINT


def rescale_multipliers(
    score: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
    """``multipliers`` with ``sum (multipliers * (inputs - reference))[n] == score(inputs)[n] - score(reference)[n]``.

    Equal but for rounding, for the quadrature of joint functions and for operations without a rule.

    Raises:
        PathDependsOnInput: the score picks things by their values, as a mixture of experts does.

    Args:
        score: (N, ...) -> (N,), each row on its own, made of torch functions.
        inputs: (N, ...) float.
        reference: of the same shape.

    Returns:
        (N, ...).

    >>> rescale_multipliers(lambda x: x.relu().sum(-1), torch.tensor([[3.0, 2.0]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[0.7500, 1.0000]])
    """
    with torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_()
        # Clones, because a score may begin with an operation in place.
        total = score(_pair(leaf.clone(), reference.clone())).as_subclass(torch.Tensor).sum()
        return torch.autograd.grad(total, leaf)[0]


class Paired(torch.Tensor):
    """A tensor that depends on the input, with its ``reference``: the same number for the reference input."""

    reference: torch.Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on the values and on the references, with the gradient that its rule says."""
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        if options.pop("inplace", False):
            return _in_place(func, types, args, options)
        if name.endswith("_") and not name.endswith("__"):
            if not isinstance(args[0], Paired):
                raise ValueError(f"the score calls {name} on a tensor that has no reference; write it out of place")
            if name[:-1] in RULES:
                return _in_place(getattr(torch.Tensor, name[:-1]), types, args, options)
        call = (args, options)
        with torch._C.DisableTorchFunctionSubclass():
            with torch.no_grad():
                others, named = tree_map_only(Paired, lambda paired: paired.reference, call)
                reference = func(*others, **named)
            value = _value(func, call)
            _check_path(name, call, value, reference)
            return tree_map(_pair, value, reference)


class PathDependsOnInput(ValueError):
    """The score takes other steps for the input than for the reference, so that nothing stands beside anything."""


def _check_path(name: str, call: tuple[Any, dict[str, Any]], value: Any, reference: Any) -> None:
    """Refuse indices and sizes that the input decides: then the nth number is not about the same thing in both.

    A mixture of experts picks tokens by their scores, across the whole batch, and pairs of different tokens would make
    one text's multipliers depend on another text.
    """
    pairs = zip(tree_flatten(value)[0], tree_flatten(reference)[0], strict=True)
    differs = any(isinstance(here, torch.Tensor) and here.shape != there.shape for here, there in pairs)
    if name in SELECTIONS and not differs:
        chosen = [leaf for leaf in tree_flatten(call)[0] if isinstance(leaf, Paired) and not _varies(leaf)]
        differs = any(not torch.equal(index.as_subclass(torch.Tensor), index.reference) for index in chosen)
    if differs:
        raise PathDependsOnInput(
            f"{name} picks other things for the text than for its baseline, as the router of a mixture of experts "
            "does, so DeepLIFT has no pairs of numbers to compare; use integrated-gradients"
        )


def _varies(number: torch.Tensor) -> bool:
    """Whether it is a number to explain, and not an index or a mask."""
    return number.is_floating_point() or number.is_complex()


def _in_place(func: Any, types: Any, args: Any, options: dict[str, Any]) -> Paired:
    """``args[0]`` filled with what ``func``, which is out of place, makes of it."""
    target, result = args[0], Paired.__torch_function__(func, types, args, options)
    with torch._C.DisableTorchFunctionSubclass():
        target.copy_(result)
        with torch.no_grad():
            target.reference.copy_(result.reference)
    return target


def _pair(value: Any, reference: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    paired = value.as_subclass(Paired)
    paired.reference = reference
    return paired


def _value(func: Any, call: tuple[Any, dict[str, Any]]) -> Any:
    """``func`` of the values, with the multiplier for a gradient where there is a rule."""
    name, (leaves, structure) = getattr(func, "__name__", ""), tree_flatten(call)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Paired) and leaf.requires_grad]
    moving = [leaves[place] for place in places]
    one_number, product = name in ONE_NUMBER and len(moving) == 1, name in PRODUCTS and len(moving) > 1
    joint = name in JOINT or name in ONE_NUMBER  # a power may have a moving exponent too
    if not torch.is_grad_enabled() or not moving or not (product or joint):
        return func(*call[0], **call[1])
    fixed = [leaf.detach() if isinstance(leaf, Paired) else leaf for leaf in leaves]

    def of_moving(*values: torch.Tensor) -> torch.Tensor:
        exact = values[0].dtype == torch.float64  # as `_slope` asks; the weight of prelu must follow
        filled = [leaf.double() if exact and _is_float(leaf) else leaf for leaf in fixed]
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        args, kwargs = tree_unflatten(filled, structure)
        return func(*args, **kwargs)

    points = 1 if product and len(moving) == 2 else POINTS
    rule = _slope if one_number else partial(_averaged, points)
    return _Explained.apply(of_moving, rule, [one.reference for one in moving], *moving)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


class _Explained(torch.autograd.Function):
    """A function whose gradient is what ``rule`` makes of it; the points are computed in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, function: Function, rule: Any, references: list[torch.Tensor], *values: Any) -> torch.Tensor:
        ctx.function, ctx.rule = function, rule
        # Clones, which what the score does in place later does not reach; plain, as __torch_function__ is off here.
        ctx.values = [value.detach().clone() for value in values]
        ctx.references = [reference.clone() for reference in references]
        return function(*values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            return None, None, None, *ctx.rule(ctx.function, ctx.values, ctx.references, grads[0])


def _slope(
    function: Function, values: list[torch.Tensor], references: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """``grad * (f(x) - f(x')) / (x - x')``, in float64, as both differences may be tiny."""
    here, there = values[0].double(), references[0].double()
    middle = ((here + there) / 2).requires_grad_()
    derivative = torch.autograd.grad(function(middle).sum(), middle)[0]
    apart = (here - there).abs() > SAME
    slope = (function(here) - function(there)) / torch.where(apart, here - there, 1.0)
    return [grad * torch.where(apart, slope, derivative).to(grad.dtype)]


def _averaged(
    points: int, function: Function, values: list[torch.Tensor], references: list[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients on the straight line between the references and the values, averaged."""
    pairs = list(zip(values, references, strict=True))
    # Where both are -inf, as under a mask, their difference would be NaN.
    apart = [torch.where(value == reference, 0.0, value - reference) for value, reference in pairs]
    totals = [torch.zeros_like(value) for value in values]
    nodes, weights = np.polynomial.legendre.leggauss(points)  # on [-1, 1]
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        back = (1 - node) / 2
        between = [(value - back * step).requires_grad_() for value, step in zip(values, apart, strict=True)]
        gradients = torch.autograd.grad(function(*between), between, grad)
        totals = [total + weight / 2 * gradient for total, gradient in zip(totals, gradients, strict=True)]
    return totals
