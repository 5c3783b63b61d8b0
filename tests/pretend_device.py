"""A second device that the CPU plays: where tensors of two devices meet it raises, and it counts waits and operations.

Its tensors hold numbers on the CPU, say that they are elsewhere, and refuse operations on them and on tensors of the
CPU, scalars and indices apart; nothing else that CUDA refuses. So a run on it shows whether everything is where it
should be, with the numbers of a CPU. What the host would wait for is counted by place: a number or a tensor that is
read, a tensor that is sent, an operation whose result's size depends on its input.

Importing this registers the device with PyTorch and replaces `torch.Generator` and the fused attention for good: only
in a process of its own. (FakeTensorMode cannot do this in a build without CUDA: its backward stops.)

Counts are near those of a GPU, not equal: autocast casts weights at every use here, gradients are clipped tensor by
tensor, and the backward of attention is that of its parts.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import tokenmdp

NAME = "pretend"
DEVICE = torch.device("cpu")  # until it is registered, below
PACKAGE = Path(tokenmdp.__file__).parent
LIBRARIES = ("transformers", "peft", "torch/optim", "torch/nn/utils")  # named beside the line that called them

# On a GPU these launch nothing.
VIEWS = {
    "view", "_unsafe_view", "_reshape_alias", "expand", "slice", "select", "t", "transpose", "permute", "unsqueeze",
    "squeeze", "detach", "detach_", "alias", "as_strided", "split", "split_with_sizes", "unbind", "diagonal", "unfold",
    "lift_fresh", "view_as", "narrow", "chunk", "empty", "new_empty", "empty_like", "empty_strided",
    "new_empty_strided", "is_same_size", "sym_size", "_has_same_storage_numel",
}  # fmt: skip
COPIES = {"_to_copy", "copy_", "_copy_from"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# The size of their result, or the result itself, is on the device and the host needs it.
SIZED_BY_NUMBERS = {
    "nonzero", "nonzero_numpy", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip


class Backend(_DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


class DeviceTensor(torch.Tensor):
    """A tensor on the device; ``inner`` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: None, size: Any, stride: Any) -> DeviceTensor:
        return DeviceTensor(parts["inner"])

    def tolist(self) -> Any:
        """Without a dispatch, so it is counted here."""
        count_wait("tolist")
        return self.inner.tolist()

    def as_subclass(self, kind: Any) -> Any:
        """Of ``kind`` and of the device: PyTorch's own would lose the device."""
        made = torch.Tensor.view_as(self, self)
        made.__class__ = type(kind.__name__, (kind, DeviceTensor), {}) if kind is not torch.Tensor else DeviceTensor
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return perform(operation, args, kwargs or {})


class Watch(TorchDispatchMode):
    """Within the block operations are checked and counted. Outside of one the device does not do everything.

    Attributes:
        waits: (kind, place) -> how often the host would wait.
        operations: name -> how often the host would launch one.
    """

    now: Watch | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.operations: collections.Counter[str] = collections.Counter()
        self.inside_one = 0  # above 0: within an operation that a GPU has as one

    def __enter__(self) -> Watch:
        Watch.now = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Watch.now = None
        super().__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return perform(operation, args, kwargs or {})


def on_device(value: Any) -> bool:
    return isinstance(value, DeviceTensor)


def place() -> str:
    """The line of this library that led here, and the line of another one that it called."""
    frame: Any = sys._getframe()
    library = ""
    while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
        file = frame.f_code.co_filename.partition("site-packages/")[2]
        if not library and file.startswith(LIBRARIES):
            library = f" <- {file}:{frame.f_lineno}"
        frame = frame.f_back
    if frame is None:
        return f"elsewhere{library}"
    return f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}{library}"


def count_wait(kind: str) -> None:
    if Watch.now is not None:
        Watch.now.waits[kind, place()] += 1


def perform(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Do on the CPU what the device was asked for, and say where the result is."""
    name = operation._schema.name.split("::")[1]
    if name == "_fused_sdp_choice":
        return 0  # the kernel made of parts, which `scaled_dot_product_attention` below counts as one
    tensors: list[torch.Tensor] = []
    inner_args, inner_kwargs = inside(args, tensors), {key: inside(value, tensors) for key, value in kwargs.items()}
    there = any(map(on_device, tensors))
    result_there = there
    if kwargs.get("device") is not None:
        result_there = torch.device(kwargs["device"]).type == NAME
        inner_kwargs["device"] = torch.device("cpu")
    wait = crossing(name, args, tensors, result_there) or (wait_for(name, args) if there else None)
    result = operation(*inner_args, **inner_kwargs)
    if wait is not None:
        count_wait(wait)
    if (there or result_there) and name not in VIEWS and Watch.now is not None and not Watch.now.inside_one:
        Watch.now.operations[name] += 1
    if result_there:
        result = pytree.tree_map(lambda leaf: DeviceTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    if result is None or (operation._schema.is_mutable and isinstance(result, (list, tuple))):
        return result
    if any(on_device(tensor) and type(tensor) is not DeviceTensor for tensor in tensors):  # see `as_subclass`
        return args[0] if operation._schema.is_mutable else result
    return return_and_correct_aliasing(operation, args, dict(kwargs), result)


def inside(value: Any, tensors: list[torch.Tensor]) -> Any:
    """``value`` with the numbers of its tensors, which are added to ``tensors``."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.inner if isinstance(value, DeviceTensor) else value
    return type(value)(inside(one, tensors) for one in value) if type(value) in (list, tuple) else value


def crossing(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor], result_there: bool) -> str | None:
    """Which way a copy goes, if it goes from one device to another.

    Raises:
        RuntimeError: no copy, and tensors of both devices.
    """
    if name in COPIES:
        source, target = (args[1], on_device(args[0])) if name == "copy_" else (args[0], result_there)
        return None if on_device(source) == target else "read" if on_device(source) else "sent"
    here = [tensor for tensor in tensors if not on_device(tensor) and tensor.dim()]
    if not here or not any(map(on_device, tensors)):
        return None
    if name in INDEXED and on_device(args[0]) and not any(tensor is value for tensor in here for value in args[2:3]):
        return "sent as an index"
    described = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
    raise RuntimeError(f"{name} of tensors on two devices: {described}")


def wait_for(name: str, args: tuple[Any, ...]) -> str | None:
    """What the host waits for in an operation on the device."""
    if name == "_local_scalar_dense":
        return "item"
    by_mask = (torch.bool, torch.uint8)
    if name in INDEXED and any(isinstance(index, torch.Tensor) and index.dtype in by_mask for index in args[1]):
        return f"{name} by a mask"
    if name in SIZED_BY_NUMBERS or (name == "repeat_interleave" and isinstance(args[-1], torch.Tensor)):
        return name
    return None


class Generator(torch.Generator):
    """Random numbers of the CPU, so that a run draws the same on either device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made._device = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        return self

    @property
    def device(self) -> torch.device:
        return self._device


def empty(size: Any, **options: Any) -> DeviceTensor:
    """Where PyTorch makes a tensor out of the reach of `DeviceTensor.__torch_dispatch__`, as in `torch.tensor`."""
    return DeviceTensor(torch.empty(size, dtype=options.get("dtype")))


def empty_strided(size: Any, stride: Any, **options: Any) -> DeviceTensor:
    return DeviceTensor(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """And where it fills one."""
    inner = [tensor.inner if isinstance(tensor, DeviceTensor) else tensor for tensor in (source, target)]
    inner[1].copy_(inner[0])
    if on_device(source) != on_device(target) and source.numel():
        count_wait("read" if on_device(source) else "sent")
    return target


def in_half(product: Any) -> Any:
    """A product as autocast has it, but that weights are cast at every use."""

    def cast(leaf: Any) -> Any:
        floats = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(torch.get_autocast_dtype(NAME)) if floats else leaf

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(NAME, enabled=False):
            return product(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

    return kernel


def scaled_dot_product_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """One operation, as on a GPU."""
    watch = Watch.now
    if watch is None or not on_device(query):
        return plain_attention(query, *args, **kwargs)
    watch.operations["scaled_dot_product_attention"] += not watch.inside_one
    watch.inside_one += 1
    try:
        return plain_attention(query, *args, **kwargs)
    finally:
        watch.inside_one -= 1


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)
plain_attention = functional.scaled_dot_product_attention
functional.scaled_dot_product_attention = scaled_dot_product_attention
torch.Generator = Generator  # type: ignore[misc]
autocast = torch.library.Library("_", "IMPL")
autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
kernels = torch.library.Library("aten", "IMPL")
kernels.impl("empty.memory_format", empty, "PrivateUse1")
kernels.impl("empty_strided", empty_strided, "PrivateUse1")
kernels.impl("_copy_from", copy_from, "PrivateUse1")
for name in ("linear", "addmm", "mm", "bmm", "matmul", "scaled_dot_product_attention"):
    kernels.impl(name, in_half(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
torch.__future__.set_swap_module_params_on_conversion(True)
