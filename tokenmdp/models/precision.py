"""The precision of a model's forwards."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

DTYPE_VARIABLE = "TOKENMDP_DTYPE"  # what "auto" stands for, if it is set


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision of the forwards: "float32", "bfloat16", or "auto" for bfloat16 where the hardware computes it.

    Where the environment variable ``TOKENMDP_DTYPE`` is set, "auto" is what it says, so that machines can be compared.

    Raises:
        ValueError: another dtype, or another value of the variable.

    >>> resolve_dtype("float32", torch.device("cpu"))
    torch.float32
    """
    name = "dtype"
    if dtype == "auto" and DTYPE_VARIABLE in os.environ:
        name, dtype = DTYPE_VARIABLE, os.environ[DTYPE_VARIABLE]
    if dtype == "float32":
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == "bfloat16":
        if not native:
            logger.warning("this %s emulates bfloat16: it is slower than float32 here", device.type)
        return torch.bfloat16
    if dtype != "auto":
        raise ValueError(f'{name} is {dtype!r}; choose "auto", "float32" or "bfloat16"')
    if not native:
        logger.info("dtype auto: this %s does not compute in bfloat16, falling back to float32", device.type)
    return torch.bfloat16 if native else torch.float32
