"""Soups: one model whose weights are a weighted sum of several models' weights.

``theta = sum_i weight_i theta_i`` with weights that sum to 1. Models that were fine-tuned from one start towards
different rewards often lie in one basin, so their soups trade the rewards off without further training. The claim to
test is ``R_j(theta) >= sum_i weight_i R_j(theta_i)``; nothing guarantees it.

Source: Rame et al., "Rewarded soups: towards Pareto-optimal alignment by interpolating weights fine-tuned on diverse
rewards", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tokenmdp.files import CheckpointError, atomic_directory
from tokenmdp.models.hub import quiet
from tokenmdp.models.loading import load_causal_lm, load_config, load_own_tokenizer
from tokenmdp.models.names import resolve
from tokenmdp.models.policy import VALUE_HEAD_FILE
from tokenmdp.models.sizes import check_finite

State = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
# Entries of a configuration that say nothing about the function.
FREE = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}


class UnequalModels(ValueError):
    """Models of different shapes, vocabularies or starts cannot be averaged."""


def weighted_sum(states: Sequence[State], weights: Sequence[float]) -> State:
    """``sum_i weights[i] * states[i]``, name by name, in float32; a weight of 1 gives that state bit for bit.

    Raises:
        ValueError: fewer than two states, weights that do not sum to 1.
        UnequalModels: other names or shapes.

    >>> weighted_sum([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}], [0.25, 0.75])
    {'w': tensor([2.5000])}
    """
    check_weights(weights, len(states))
    first = states[0]
    for place, state in enumerate(states[1:], start=1):
        if different := [
            name for name in first.keys() | state.keys()
            if name not in first or name not in state or first[name].shape != state[name].shape
        ]:  # fmt: skip
            raise UnequalModels(
                f"models 0 and {place} differ in {len(different)} weights, such as {min(different)}; a soup needs "
                "models of one architecture"
            )
    taken = [(weight, state) for weight, state in zip(weights, states, strict=True) if weight]
    if len(taken) == 1:
        return {name: value.float() for name, value in taken[0][1].items()}
    return {name: sum(weight * state[name].float() for weight, state in taken) for name in first}  # type: ignore[misc]


def check_weights(weights: Sequence[float], models: int) -> None:
    """Refuse weights that are not one per model, or do not sum to 1; negative ones extrapolate."""
    if models < 2:
        raise ValueError(f"a soup of {models} model; give at least 2")
    if len(weights) != models:
        raise ValueError(f"{len(weights)} weights for {models} models; give one each")
    if not all(map(math.isfinite, weights)) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights are {list(weights)} and sum to {sum(weights):g}; they must sum to 1")


def check_equal(directories: Sequence[str | Path]) -> None:
    """Refuse directories of other configurations, vocabularies or starts.

    The start of a checkpoint written here is taken to be its ``state/reference``, which it is unless the run was given
    another reference; of other directories it is not known.

    Raises:
        UnequalModels: with the first difference.
    """
    paths = [Path(resolve("policy", str(one))) for one in directories]
    configs = [_config(path) for path in paths]
    starts = [_start(path) for path in paths]
    tokenizer = load_own_tokenizer("policy", str(paths[0])).get_vocab()
    for path, config, start in zip(paths[1:], configs[1:], starts[1:], strict=True):
        for key in sorted(config.keys() | configs[0].keys()):
            if config.get(key) != configs[0].get(key):
                raise UnequalModels(
                    f"{paths[0]} has {key} = {configs[0].get(key)!r} and {path} {config.get(key)!r}; a soup needs "
                    "models of one configuration"
                )
        if load_own_tokenizer("policy", str(path)).get_vocab() != tokenizer:
            raise UnequalModels(f"{paths[0]} and {path} have other vocabularies, so their weights mean other tokens")
        if start is not None and starts[0] is not None and not _same(start, starts[0]):
            raise UnequalModels(
                f"{paths[0]} and {path} were trained from other starts, between which an average means nothing; train "
                "both from one policy"
            )


def write_soup(directories: Sequence[str | Path], weights: Sequence[float], out: str | Path) -> Path:
    """Write the soup of some models as a directory that ``from_pretrained`` reads, value head and tokenizer included.

    Args:
        directories: Of the members; with adapters, their merged weights are taken.
        weights: One per member; they sum to 1.
        out: Where to; it appears whole or not at all.

    Raises:
        UnequalModels: see `check_equal`.
        CheckpointError: ``out`` holds something else.
    """
    out = Path(out)
    check_weights(weights, len(directories))
    check_equal(directories)
    if out.exists() and not (out / "config.json").exists():
        raise CheckpointError(f"{out} holds other files, which a soup would replace; choose a new directory")
    paths = [Path(resolve("policy", str(one))) for one in directories]
    model = load_causal_lm(str(paths[0]))
    states = [load_causal_lm(str(path)).state_dict() for path in paths]
    model.load_state_dict(weighted_sum(states, weights))
    files = [path / VALUE_HEAD_FILE for path in paths]
    heads = [load_file(file) for file in files] if all(file.exists() for file in files) else []
    for member, path in zip((*states, *heads), (*paths, *files), strict=False):
        check_finite(member, str(path))
    with atomic_directory(out) as new, quiet():
        model.save_pretrained(new)
        if heads:
            save_file(weighted_sum(heads, weights), new / VALUE_HEAD_FILE)
        load_own_tokenizer("policy", str(paths[0])).save_pretrained(new)
    return out


def _config(path: Path) -> dict[str, Any]:
    config = load_config("policy", str(path)).to_dict()
    return {key: value for key, value in config.items() if key not in FREE}


def _start(path: Path) -> Path | None:
    start = path / "state" / "reference" / WEIGHTS
    return start if start.exists() else None


def _same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
