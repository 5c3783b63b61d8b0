"""Whether the sizes in a directory's config.json can be those of its weights, before a model of that size is made.

A damaged number would otherwise be found after minutes, or after the memory is full: 10**7 layers, a width of 64.5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tokenmdp.files import CheckpointError

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size")
OTHERS = ("num_attention_heads", "n_head", "n_heads", "max_position_embeddings", "n_positions", "n_ctx")
MOST = 10**9  # positions of any model


def check_stored_sizes(directory: Path) -> None:
    """Refuse sizes that are not whole positive numbers, or more than the stored weights can fill.

    Raises:
        CheckpointError: with the number and what the weights hold.
    """
    place = directory / "config.json"
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is damaged ({error}); restore a copy or save the model again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{place} holds a {type(config).__name__}, not an object; restore a copy")
    text_config = config.get("text_config")
    given = [*_sizes(config, place), *(_sizes(text_config, place) if isinstance(text_config, dict) else ())]
    count, longest = _weights(directory)
    for name, size in given:
        limit, what = MOST, ""
        if count and name in LAYERS:
            limit, what = count, f"model.safetensors holds {count} weights"
        elif count and name in WIDTHS:
            limit, what = longest, f"the longest side of a weight in model.safetensors is {longest}"
        if size > limit:
            raise CheckpointError(
                f"{place} says {name} {size}, and {what or 'no model has so many'}: it is damaged, or belongs to other "
                "weights; restore a copy"
            )


def _sizes(config: dict[str, Any], place: Path) -> Iterator[tuple[str, int]]:
    for name in (*LAYERS, *WIDTHS, *OTHERS):
        size = config.get(name)
        if size is None:  # some architectures have none; where one is needed, transformers says so
            continue
        if isinstance(size, list):  # one per layer or stage
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            least = "a whole number of at least 1"
            raise CheckpointError(f"{place} says {name} {json.dumps(size)}; it must be {least}: restore a copy")
        yield name, size


def _weights(directory: Path) -> tuple[int, int]:
    """How many weights the model's safetensors files hold and the longest side of one; (0, 0) without such files."""
    count, longest = 0, 0
    for file in directory.glob("model*.safetensors"):
        try:
            with safe_open(file, framework="pt") as stream:
                for key in stream.keys():  # noqa: SIM118 (no mapping)
                    shape = stream.get_slice(key).get_shape()
                    count, longest = count + 1, max(longest, *shape, 1)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}; restore a copy or save the model again") from error
    return count, longest
