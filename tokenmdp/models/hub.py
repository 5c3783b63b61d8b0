"""Calls of transformers' ``from_pretrained``: local files first, then the Hugging Face hub, with a remedy in errors."""

from __future__ import annotations

import contextlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tokenmdp.files import CheckpointError, check_digests
from tokenmdp.models.names import ALIASES, STUDY_MODELS, Kind, ModelNotFound, bundled, check_name, resolve, words
from tokenmdp.models.stored_sizes import check_stored_sizes

Loaded = TypeVar("Loaded")

HUB_TIMEOUT = 3.0  # seconds; transformers alone retries an unreachable hub for 25


def from_pretrained(loader: Callable[..., Loaded], kind: Kind, name: str, **options: Any) -> Loaded:
    """Call a transformers ``from_pretrained``: local files first, then the hub, with errors that name the remedy."""
    options["trust_remote_code"] = False  # left out, transformers asks on the terminal and runs the code after a "y"
    path = resolve(kind, name)
    if Path(path).is_dir():
        check_digests(Path(path), below=False, weights=kind != "tokenizer")
        if kind != "tokenizer":
            check_stored_sizes(Path(path))
        try:
            with quiet():
                return loader(path, local_files_only=True, **options)
        except ImportError:
            raise  # a package is missing, not a file
        except Exception as error:  # of many types: tokenizers raises Exception itself for a damaged tokenizer.json
            said = str(error).strip() or type(error).__name__
            raise CheckpointError(
                f"cannot load a {words(kind)} from {path}: {said}. It needs config.json, model.safetensors "
                "and the tokenizer files as save_pretrained writes them (pytorch_model.bin is not read); "
                "restore a copy or save it again"
            ) from error
    if name in ALIASES:
        if kind not in ALIASES[name]:
            raise ModelNotFound(
                f"{name!r} is bundled as {' and '.join(ALIASES[name])} only; as {kind} there is {bundled(kind)}"
            )
        if STUDY_MODELS in Path(path).parents:
            raise ModelNotFound(
                f"{name!r} is not in the wheel: it lies in examples/abc_study/models/{name} of the source checkout; "
                "pass its path"
            )
        raise ModelNotFound(f"the bundled {name!r} has no {path}; reinstall tokenmdp, or pass a directory or hub name")
    check_name(kind, name)
    try:
        with quiet():
            return loader(name, local_files_only=True, **options)
    except (OSError, ValueError):
        _check_hub_answers(kind, name)
    try:
        return loader(name, **options)
    except (OSError, ValueError) as error:
        raise _not_found(kind, name, f"the hub has no such model or not its files ({error})") from error


def _check_hub_answers(kind: Kind, name: str) -> None:
    """Ask the hub once with a short time limit, instead of transformers' five retries."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise _not_found(kind, name, "it is not in the local cache and HF_HUB_OFFLINE forbids the hub")
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError as error:
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, ssl.SSLError):
            return  # it answered with a certificate that the hub's own client may know
        reason = f"it is not in the local cache and {constants.ENDPOINT} did not answer ({error})"
        raise _not_found(kind, name, reason) from error


def _not_found(kind: Kind, name: str, reason: str) -> ModelNotFound:
    return ModelNotFound(
        f"no {words(kind)} {name!r}: tried the aliases, a local directory and the hub; {reason}. "
        f"With a network run `hf download {name} --local-dir DIR` and pass DIR as the name. Bundled: {bundled(kind)}"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar: loading a few megabytes is not worth one in every gym.make."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
