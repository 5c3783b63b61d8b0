"""The precision of a model's forwards."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

DTYPE_VARIABLE = "TOKENMDP_DTYPE"  # what "auto" stands for, if it is set


def precision(dtype: str, device: torch.device) -> str:
    """What ``dtype`` stands for on a device: "float32", "tf32" or "bfloat16".

    "auto" is bfloat16 where the hardware computes it and float32 elsewhere, or what the environment variable
    ``TOKENMDP_DTYPE`` says, so that machines can be compared. "tf32" is float32 whose products a GPU may compute in
    TF32; elsewhere it is float32.

    Raises:
        ValueError: another dtype, or another value of the variable.

    >>> precision("float32", torch.device("cpu")), precision("tf32", torch.device("cpu"))
    ('float32', 'float32')
    """
    name, dtype = _asked(dtype)
    if dtype not in ("auto", "float32", "tf32", "bfloat16"):
        raise ValueError(f'{name} is {dtype!r}; choose "auto", "float32", "tf32" or "bfloat16"')
    if dtype == "auto":
        return "bfloat16" if _native(device) else "float32"
    return "float32" if dtype == "tf32" and device.type != "cuda" else dtype


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the forwards, by `precision`; says in the log what differs from what one may expect.

    "tf32" is PyTorch's switch for a whole process: it is set here, stays set, and counts for a float32 reward model,
    too.

    >>> resolve_dtype("float32", torch.device("cpu"))
    torch.float32
    """
    found, (_, dtype) = precision(dtype, device), _asked(dtype)
    if dtype == "auto" and found == "float32":
        logger.info("dtype auto: this %s does not compute in bfloat16, falling back to float32", device.type)
    if dtype == "tf32" and found == "float32":
        logger.warning("tf32 is a precision of GPUs: this %s computes in float32", device.type)
    if found == "bfloat16" and not _native(device):
        logger.warning("this %s emulates bfloat16: it is slower than float32 here", device.type)
    if found == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        logger.info("float32 products on GPUs may be computed in TF32 from here on, in this whole process")
    return torch.bfloat16 if found == "bfloat16" else torch.float32


def _asked(dtype: str) -> tuple[str, str]:
    """Where the precision is asked for, and which: the environment variable stands for "auto"."""
    if dtype == "auto" and DTYPE_VARIABLE in os.environ:
        return DTYPE_VARIABLE, os.environ[DTYPE_VARIABLE]
    return "dtype", dtype


def _native(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
