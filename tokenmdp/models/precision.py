"""The precision of a model's forwards."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

DTYPE_VARIABLE = "TOKENMDP_DTYPE"  # what "auto" stands for, if it is set


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The precision of the forwards: "float32", "tf32", "bfloat16", or "auto" for bfloat16 where the hardware has it.

    "tf32" is float32 whose products a GPU computes in TF32. That is PyTorch's switch for a whole process: it is set
    here, stays set, and counts for a float32 reward model, too.

    Where the environment variable ``TOKENMDP_DTYPE`` is set, "auto" is what it says, so that machines can be compared.

    Raises:
        ValueError: another dtype, or another value of the variable; "tf32" without a GPU.

    >>> resolve_dtype("float32", torch.device("cpu"))
    torch.float32
    """
    name = "dtype"
    if dtype == "auto" and DTYPE_VARIABLE in os.environ:
        name, dtype = DTYPE_VARIABLE, os.environ[DTYPE_VARIABLE]
    if dtype == "float32":
        return torch.float32
    if dtype == "tf32":
        if device.type != "cuda":
            raise ValueError(f'{name} is "tf32", which is a precision of GPUs, and this is a {device.type}; '
                             'choose "float32"')  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        logger.info("float32 products on GPUs are computed in TF32 from here on, in this whole process")
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
        raise ValueError(f'{name} is {dtype!r}; choose "auto", "float32", "tf32" or "bfloat16"')
    if not native:
        logger.info("dtype auto: this %s does not compute in bfloat16, falling back to float32", device.type)
    return torch.bfloat16 if native else torch.float32
