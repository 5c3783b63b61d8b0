"""Next-token logits and values of the states in observations, feeding the model only the tokens that are new.

A tool outside this package hands a policy one observation per step and nothing else, so a policy that must not read
each text from its start at every step finds out by itself which rows grew by one token. It needs no reset signal.

Rows end at different times, so the cache is right-aligned: the last column is the last token of every row, and a row's
text takes as many columns as it is long.

    row 0, running          a b c d e           x marks columns that the attention mask hides
    row 1, a new prompt     x x x p q           its p and q were read apart and written over the old episode

Both then grow by the same one column. Positions come from the mask, so a row's numbers do not depend on the others.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from tokenmdp.models.kv_cache import GrowingLayer, make_cache
from tokenmdp.models.policy import SETTINGS, CausalLMPolicy
from tokenmdp.models.token_distribution import DecodeState

logger = logging.getLogger(__name__)

LEAST_ELEMENTS = 64  # of a tensor's, looked at for changes
EMPTY = -1  # stands in slots without a token


def last_slots(attention_mask: torch.Tensor) -> torch.Tensor:
    """The slot of each row's last token: (N, S) bool -> (N, 1) int64.

    >>> last_slots(torch.tensor([[False, True, True, False]])).tolist()
    [[2]]
    """
    slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (slots * attention_mask).argmax(1, keepdim=True)


def without_early_end(policy: CausalLMPolicy) -> CausalLMPolicy:
    """A view of the same modules with ``min_new_tokens=0``: rows are at different tokens, so the caller masks them."""
    view = copy.copy(policy)
    view.min_new_tokens = 0
    return view


def read_states(policy: CausalLMPolicy, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> DecodeState:
    """Read whole texts: the state behind the last token of each row. Gradients flow where they are enabled.

    Args:
        policy: Its ``step`` counts from the state read; with ``min_new_tokens`` pass `without_early_end` of it.
        input_ids: (N, S) int64, each row one run of visible slots, anywhere.
        attention_mask: (N, S) bool.
    """
    last = last_slots(attention_mask)  # (N, 1)
    width = int(attention_mask.sum(1).max())  # slots before the longest text are padding in every row
    source = last + 1 - width + torch.arange(width, device=last.device)  # (N, width): the right-aligned texts' slots
    inside = source.clamp(min=0)
    return policy.prefill(input_ids.gather(1, inside), attention_mask.gather(1, inside) & (source >= 0))


class StateReader:
    """`read_states` for successive observations of the same environments, through one key-value cache.

    A row whose text is that of the last call and one more token costs that token; any other row is read again; if no
    text changed, the last answer is returned. Changed weights and settings of the policy empty the cache, because keys
    and values of older weights would mix two policies; `WeightSample` says which changes of the weights are seen. After
    any other change call `forget`.

    Pickles and copies leave the cache behind.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        self._policy = policy
        layers = make_cache(policy.lm.config).layers
        # Others drop or fold in what they have read, so no row of theirs can be replaced alone.
        self._reuses = all(type(layer) is GrowingLayer for layer in layers)
        if not self._reuses:
            logger.warning(
                "%s has sliding-window or recurrent layers, whose cache cannot be kept row by row; every step reads "
                "the whole text", type(policy.lm).__name__,
            )  # fmt: skip
        self.forget()

    def forget(self) -> None:
        """Drop the cache; the next call reads whole texts."""
        self._state: DecodeState | None = None
        self._texts = torch.empty(0)  # (N, S) the ids last read, EMPTY outside the text
        self._weights: WeightSample | None = None
        self._settings: tuple[object, ...] = ()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_state": None, "_texts": torch.empty(0), "_weights": None}

    @torch.no_grad()
    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> DecodeState:
        """The state behind the last token of each row; arguments as in `read_states`. The result is not to be kept."""
        if not self._reuses:
            return read_states(self._policy, input_ids, attention_mask)
        texts = input_ids.where(attention_mask, EMPTY)
        # By part: a policy may use another's weights (`tokenmdp.models.lora.WithoutAdapters`) and have none of its own.
        weights = [*self._policy.lm.parameters(), *self._policy.value_head.parameters()]
        settings = tuple(getattr(self._policy, name) for name in SETTINGS)
        if self._weights is None or settings != self._settings or not self._weights.still_that_of(weights):
            self._state, self._weights, self._settings = None, WeightSample(weights), settings
        # The cache changes in place: after an exception half way nothing of it may be used.
        state, self._state = self._state, None
        if state is None or texts.shape != self._texts.shape:
            state = read_states(self._policy, input_ids, attention_mask)
        elif not torch.equal(texts, self._texts):
            went_on = (texts.scatter(1, last_slots(attention_mask), EMPTY) == self._texts).all(1)
            state = self._advance(state, input_ids, attention_mask, went_on)
        self._state, self._texts = state, texts
        return state

    def _advance(
        self, state: DecodeState, input_ids: torch.Tensor, attention_mask: torch.Tensor, went_on: torch.Tensor
    ) -> DecodeState:
        """Feed one token to the rows (N,) bool that ``went_on`` and read the others from the start."""
        if not went_on.any():
            return read_states(self._policy, input_ids, attention_mask)
        state = _hide(state, ~went_on)
        state = self._policy.append(state, input_ids.gather(1, last_slots(attention_mask)).squeeze(1))
        if not went_on.all():
            fresh = read_states(self._policy, input_ids[~went_on], attention_mask[~went_on])
            state = _put(state, fresh, ~went_on)
        return state


class WeightSample:
    """A sample of some weights, to notice later whether they have changed.

    Seen are weights in other memory, whatever PyTorch counts as written, and any change of the elements that are looked
    at: of each tensor all up to 191 and of larger ones every k-th, at least 64 (k odd, so that all columns have their
    turn). PyTorch does not count what is written through ``parameter.data``, as TorchRL's `update_policy_weights_`
    does, or by fused optimizers; those change nearly all elements. Not seen is an uncounted write that leaves every
    element looked at as it was, for instance to a single row of an embedding.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._marks = _marks(weights)
        self._views = [_every_kth(weight.detach()) for weight in weights]  # holding on, so no address is given away
        self._elements = torch.cat(self._views)

    def still_that_of(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether no change is seen."""
        return _marks(weights) == self._marks and torch.equal(torch.cat(self._views), self._elements)


def _marks(weights: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return [(weight.data_ptr(), weight._version) for weight in weights]


def _every_kth(weight: torch.Tensor) -> torch.Tensor:
    """A view (n,) of evenly spread elements, in the order of memory.

    >>> _every_kth(torch.arange(6).reshape(2, 3)).tolist(), len(_every_kth(torch.zeros(300, 300)))
    ([0, 1, 2, 3, 4, 5], 65)
    """
    span = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    k = (max(span // LEAST_ELEMENTS, 1) - 1) | 1
    return weight.as_strided(((span - 1) // k + 1,), (k,))


def _hide(state: DecodeState, rows: torch.Tensor) -> DecodeState:
    """Empty ``rows`` (N,) bool, and drop the first columns that no other row needs."""
    mask = state.attention_mask.masked_fill(rows[:, None], 0)
    unused = mask.shape[1] - int(mask.sum(1).max())
    for layer in state.cache.layers:
        layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
    return state._replace(attention_mask=mask[:, unused:])


def _put(state: DecodeState, fresh: DecodeState, rows: torch.Tensor) -> DecodeState:
    """Write the texts of ``fresh`` (n rows) into the n ``rows`` (N,) bool of ``state``, aligned right."""
    width = fresh.attention_mask.shape[1]
    missing = max(width - state.attention_mask.shape[1], 0)
    mask = pad(state.attention_mask, (missing, 0))  # (N, L)
    mask[rows] = pad(fresh.attention_mask, (mask.shape[1] - width, 0))
    for layer, new in zip(state.cache.layers, fresh.cache.layers, strict=True):
        layer.keys = pad(layer.keys, (0, 0, missing, 0))  # (N, heads, L, d)
        layer.values = pad(layer.values, (0, 0, missing, 0))
        layer.keys[rows, :, -width:], layer.values[rows, :, -width:] = new.keys, new.values
    state.logits[rows], state.value[rows] = fresh.logits, fresh.value
    return state._replace(attention_mask=mask)
