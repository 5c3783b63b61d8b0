"""LoRA through peft: small trained matrices beside frozen weights.

``W x + alpha / rank * B A x``, where A and B alone learn (Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models", 2021). B is 0 at first. With the adapters switched off the model is the one that training started from, so a
frozen reference costs no second copy of the weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gymnasium.error import DependencyNotInstalled
from torch import nn

from tokenmdp.models.policy import SETTINGS, CausalLMPolicy
from tokenmdp.models.token_distribution import DecodeState, TokenScores

State = dict[str, torch.Tensor]


def add_adapters(policy: Any, rank: int, alpha: float, target_modules: str, seed: int) -> None:
    """Freeze a model and put trained adapters beside its layers; a value head or a classifier's head still learns.

    Args:
        policy: a `CausalLMPolicy`, or another module with a transformers model as ``lm``; changed in place, and what it
            computes stays what it is.
        rank: columns of B and rows of A.
        alpha: the adapters' output is multiplied by ``alpha / rank``.
        target_modules: "all-linear", every linear layer but the output layer; or a regular expression for names.
        seed: of the random A.

    Raises:
        gymnasium.error.DependencyNotInstalled: peft is missing.
        ValueError: no layer has such a name, or one is not linear.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DependencyNotInstalled(f"lora_rank={rank} needs peft: pip install 'tokenmdp[lora]'") from error
    # Of a classifier peft then leaves out the head, which is new and learns as a whole.
    task = None if policy.lm.get_output_embeddings() is not None else "SEQ_CLS"
    heads = [] if task is None else _head_weights(policy.lm)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, task_type=task)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft then sets it, as GPT-2 needs
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, policy.lm)
        except ValueError as error:
            kinds = ("Linear", "Conv1D")  # GPT-2's are called Conv1D
            layers = (name for name, layer in policy.lm.named_modules() if type(layer).__name__ in kinds)
            raise ValueError(
                f"lora_target_modules={target_modules!r} cannot be adapted ({error}); choose 'all-linear', or a "
                f"regular expression for whole names such as {next(layers, 'transformer.h.0.attn.c_attn')}"
            ) from error
    for weight in heads:
        weight.requires_grad_(True)
    for name, layer in _adapted_layers(policy):
        if not layer.lora_A:
            raise ValueError(
                f"lora_target_modules={target_modules!r} takes in {name}, a {type(layer.base_layer).__name__}; "
                "choose linear layers"
            )


class WithoutAdapters(CausalLMPolicy):
    """The policy that `add_adapters` was given, from the same weights: adapters are off in its forwards.

    Its values are those of the adapted policy's head, which learns. It is a view without parameters of its own, so
    freezing or moving it changes nothing. How it processes logits (temperature, top_k, ...) is its own. ``copy.copy``
    gives another view of the same weights, ``copy.deepcopy`` copies the adapted policy too.
    """

    _adapted: CausalLMPolicy

    def __init__(self, adapted: CausalLMPolicy) -> None:
        torch.nn.Module.__init__(self)
        # Not as submodules: requires_grad_(False) of a reference would freeze the adapters too.
        vars(self).update(_adapted=adapted, lm=adapted.lm, value_head=adapted.value_head, training=False)
        self.value_model = None
        vars(self).update({name: getattr(adapted, name) for name in SETTINGS})
        self.gradient_checkpointing = False  # no layer keeps anything for a backward: none of its weights learns
        self.rollout_steps = "plain"  # a recording would be of the weights with the adapters

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, step: int = 0) -> DecodeState:  # noqa: D102
        with self._lent() as policy:
            return policy.prefill(input_ids, attention_mask, step)

    def append(self, state: DecodeState, token: torch.Tensor) -> DecodeState:  # noqa: D102
        with self._lent() as policy:
            return policy.append(state, token)

    def evaluate(self, *arguments: Any, **options: Any) -> TokenScores:  # noqa: D102
        with self._lent() as policy:
            return policy.evaluate(*arguments, **options)

    def save_pretrained(self, directory: str | Path, state: State | None = None) -> None:
        """As `CausalLMPolicy.save_pretrained`: the weights without the adapters, and the value head."""
        super().save_pretrained(directory, base_state(self._adapted.state_dict()) if state is None else state)

    @contextlib.contextmanager
    def _lent(self) -> Iterator[CausalLMPolicy]:
        """The adapted policy with its adapters off and the settings of this one.

        The methods must be those of the adapted policy itself: they gather its weights where those are sharded.
        """
        adapted, mine = self._adapted, vars(self)
        layers = [layer for _, layer in _adapted_layers(adapted)]
        before = {name: getattr(adapted, name) for name in SETTINGS}
        try:
            vars(adapted).update({name: mine[name] for name in SETTINGS})
            for layer in layers:
                layer.enable_adapters(False)
            yield adapted
        finally:
            vars(adapted).update(before)
            for layer in layers:
                layer.enable_adapters(True)


def base_state(state: State) -> State:
    """The weights of an adapted policy without the adapters, under the names they had before.

    >>> base_state({"lm.q.base_layer.weight": torch.ones(1), "lm.q.lora_A.default.weight": torch.ones(1)})
    {'lm.q.weight': tensor([1.])}
    """
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def adapter_state(model: nn.Module, state: State) -> State:
    """The part of an adapted model's weights that learns: adapters and new heads.

    Args:
        model: the adapted one.
        state: its whole weights by name.
    """
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: value for name, value in state.items() if name in learning}


def merged_state(policy: nn.Module, state: State) -> State:
    """One weight ``W + alpha / rank * B A`` for each adapted layer, under the names of a model without adapters.

    Args:
        policy: the adapted one.
        state: its whole weights by name, float32.
    """
    merged = base_state(state)
    for name, layer in _adapted_layers(policy):
        a, b = (state[f"lm.{name}.lora_{matrix}.default.weight"] for matrix in "AB")
        change = layer.scaling["default"] * (b @ a)  # (out, in)
        merged[f"lm.{name}.weight"] = merged[f"lm.{name}.weight"] + (change.T if layer.fan_in_fan_out else change)
    return merged


def _head_weights(classifier: Any) -> list[nn.Parameter]:
    """What a classifier has beside its backbone."""
    backbone = set(classifier.base_model.parameters())
    return [weight for weight in classifier.parameters() if weight not in backbone]


def _adapted_layers(policy: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in policy.lm.named_modules() if isinstance(layer, LoraLayer)]
