"""The keys and values of texts in progress, kept so that a further token does not copy those before it."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from tokenmdp.models.attention_rows import IMPLEMENTATION

LEAST_ROOM = 32  # columns


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes new columns into spare ones instead of concatenating.

    ``keys`` and ``values`` (N, heads, L, d) are views of the written columns of a buffer that grows by half whenever it
    is full: T tokens cost O(T) columns of copying, where concatenation costs O(T^2). Replacing them, by a slice or a
    selection of rows, is allowed and costs at most one copy.

    Args:
        wide: on a CPU keep bfloat16 as float32, for an attention that reads it so
            (`tokenmdp.models.kernels.cpu_attention`).
    """

    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self._wide = wide

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Empty, with the dtype and device of what will come."""
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[_Buffer | None] = [None, None]  # of keys and of values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (N, heads, l, d); all keys and values so far. Where autograd records, it concatenates."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            widens = self._wide and key_states.device.type == "cpu" and key_states.dtype == torch.bfloat16
            self.keys, self.values = (
                (key_states.float(), value_states.float()) if widens else (key_states, value_states)
            )
            return key_states, value_states
        keys, values = self.keys, self.values
        assert keys is not None  # since the layer is initialized
        assert values is not None
        if torch.is_grad_enabled():
            return super().update(key_states, value_states)
        self.keys, self.values = self._append(0, keys, key_states), self._append(1, values, value_states)
        return self.keys, self.values

    def _append(self, which: int, written: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """``cat([written, new], -2)``, in place where the columns behind ``written`` are free."""
        buffer = self._buffers[which]
        if buffer is None or not buffer.ends_with(written, new.shape[-2]):
            buffer = self._buffers[which] = _Buffer(written, new.shape[-2])
        return buffer.append(new, written.shape[-2])


class _Buffer:
    """A buffer of columns, the first ``filled`` of which are written; copies of a layer share it.

    Appending advances ``filled``, so another owner, whose columns end before it, detects that and copies.
    """

    def __init__(self, written: torch.Tensor, added: int) -> None:
        rows, heads, length, width = written.shape
        self.buffer = written.new_empty(rows, heads, length + added + max((length + added) // 2, LEAST_ROOM), width)
        self.buffer[:, :, :length] = written
        self.filled = length

    def ends_with(self, written: torch.Tensor, added: int) -> bool:
        """Whether ``written`` is all rows of the buffer up to ``filled``, and there is room after them."""
        first = written.storage_offset() // written.shape[-1]  # a slice may have dropped the columns before it
        return (
            written.untyped_storage().data_ptr() == self.buffer.untyped_storage().data_ptr()
            and written.shape[0] == self.buffer.shape[0]
            and first + written.shape[-2] == self.filled
            and self.filled + added <= self.buffer.shape[-2]
        )

    def append(self, new: torch.Tensor, length: int) -> torch.Tensor:
        """Write ``new`` behind the last ``length`` columns; both together."""
        first, end = self.filled - length, self.filled + new.shape[-2]
        self.buffer[:, :, self.filled : end] = new
        self.filled = end
        return self.buffer[:, :, first:end]


def make_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model: `GrowingLayer` where transformers takes `DynamicLayer`; other kinds stay theirs."""
    cache, wide = DynamicCache(config=config), config._attn_implementation == IMPLEMENTATION
    cache.layers = [GrowingLayer(wide) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
