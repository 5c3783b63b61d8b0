"""Checkpoints: what a learner's ``save`` writes and its ``load`` reads, for any algorithm.

config.json, model.safetensors, tokenizer files     the model, adapters merged in
value_head.safetensors                              of a policy
value_model.safetensors                             of a policy whose values have a transformer of their own
ALGORITHM_config.json
state/trainer.safetensors                           optimizer, random numbers, updates done, the algorithm's own
state/envs.json, state/history.json                 the environments' random numbers, if there are some; metrics
state/reference/                                    the frozen reference, if there is one
state/adapters.safetensors                          with LoRA: what learns, beside a frozen model, which is
state/base/                                         here unless it is the reference
state/sha256sums.txt                                a digest of every file above, compared when it is read
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from tokenmdp.files import (
    DIGESTS,
    CheckpointError,
    atomic_directory,
    check_digests,
    load_state,
    read_json,
    recover_directory,
    save_state,
    write_digests,
    write_text,
)
from tokenmdp.models.lora import WithoutAdapters, adapter_state, base_state, merged_state
from tokenmdp.models.precision import DTYPE_VARIABLE, precision
from tokenmdp.training.processes import ALONE, Processes

logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """The mark that distinguishes an algorithm's checkpoints from all others.

    >>> str(Format("ppo", 2)), Format("ppo", 2).config_file
    ('tokenmdp-ppo-2', 'ppo_config.json')
    """

    algorithm: str
    version: int

    @property
    def config_file(self) -> str:
        """The file that holds the format and the agent's configuration."""
        return f"{self.algorithm}_config.json"

    def __str__(self) -> str:
        return f"tokenmdp-{self.algorithm}-{self.version}"


class Learner(Protocol):
    """The parts of a learner that a checkpoint holds."""

    config: Any  # a dataclass with seed, dtype and lora_rank
    processes: Processes
    model: Any  # a module with `save_pretrained`, such as a `CausalLMPolicy`
    reference: Any  # the same, or None
    optimizer: Any
    generator: torch.Generator
    num_updates_done: int
    history: list[dict[str, float]]

    @property
    def tokenizer(self) -> Any:
        """Saved beside the model."""

    def rng_states(self) -> list[Any]:
        """Of its source of data, this process's part."""

    def set_rng_states(self, states: list[Any]) -> None:
        """Put them back, those of all processes; raises ValueError where they do not fit."""


class Checkpoint(NamedTuple):
    """A checkpoint whose small files are read."""

    path: Path
    config: dict[str, Any]  # of the learner
    trainer: dict[str, Any]
    rng_states: list[Any]  # one per row of all processes
    history: list[dict[str, float]]

    @property
    def model(self) -> Path:
        """The directory to make the model from, as it is without adapters."""
        if not self.config.get("lora_rank"):
            return self.path
        return self.path / "state" / ("reference" if self.trainer["adapters_off"] else "base")

    @property
    def reference(self) -> Path | None:
        """The directory to make the reference from; None: there is none, or it is the policy without its adapters."""
        none = self.trainer.get("adapters_off") or not self.trainer.get("has_reference", True)
        return None if none else self.path / "state" / "reference"


def save(learner: Learner, directory: str | Path, form: Format, extra: dict[str, Any]) -> None:
    """Write a checkpoint; every process calls this, the first writes.

    Args:
        learner: What to save.
        directory: Where to.
        form: Of the algorithm.
        extra: Further numbers and tensors of the algorithm, which `restore` gives back.

    Raises:
        CheckpointError: the directory holds something else, or cannot be written.
    """
    path, processes, reference = Path(directory), learner.processes, learner.reference
    state, optimizer = processes.policy_state(learner.model), processes.optimizer_state(learner.optimizer)
    adapters_off = isinstance(reference, WithoutAdapters)
    has_reference = reference is not None and not adapters_off
    reference_state = processes.policy_state(reference) if has_reference else {}
    rng_states = [row for rows in processes.gather(learner.rng_states()) for row in rows]
    trainer = extra | {
        "num_updates_done": learner.num_updates_done,
        "device": learner.generator.device.type,
        "dtype": _dtype(learner),
        "generator": learner.generator.get_state(),
        "optimizer": optimizer,
        "adapters_off": adapters_off,
        "has_reference": has_reference,
    }
    with processes.raise_together():
        if processes.rank:
            return
        if path.exists() and not (path / form.config_file).exists() and (path.is_file() or any(path.iterdir())):
            raise CheckpointError(f"{path} holds other files, which saving would replace; choose a new directory")
        try:
            with atomic_directory(path) as new:
                record = {"format": str(form), "config": asdict(learner.config)}
                write_text(new / form.config_file, json.dumps(record, indent=2) + "\n")
                _save_tokenizer(learner.tokenizer, new)
                if learner.config.lora_rank:
                    learner.model.save_pretrained(new, merged_state(learner.model, state))
                    frozen = new / "state" / ("reference" if adapters_off else "base")
                    learner.model.save_pretrained(frozen, base_state(state))
                    _save_tokenizer(learner.tokenizer, frozen)  # for learners that read their data with the model's own
                    save_state(new / "state" / "adapters.safetensors", adapter_state(learner.model, state))
                else:
                    learner.model.save_pretrained(new, state)
                if has_reference:
                    reference.save_pretrained(new / "state" / "reference", reference_state)
                save_state(new / "state" / "trainer.safetensors", trainer)
                write_text(new / "state" / "envs.json", json.dumps(rng_states))
                write_text(new / "state" / "history.json", json.dumps(learner.history))
                write_digests(new)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint {path} ({error}); save to a writable directory"
            ) from error


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """With padding on the left, as `generate` of a causal language model needs it; the tokenizer stays as it is."""
    tokenizer.save_pretrained(directory)
    place = directory / "tokenizer_config.json"
    config = json.loads(place.read_text(encoding="utf-8")) | {"padding_side": "left"}
    write_text(place, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def read(directory: str | Path, form: Format, processes: Processes = ALONE) -> Checkpoint:
    """Read what `save` wrote, apart from the weights; every process calls this.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or from another program.
    """
    path, config_file = Path(directory), Path(directory) / form.config_file
    with processes.raise_together():
        if not processes.rank:  # it may rename, which one process can do
            recover_directory(path)
            if not check_digests(path) and config_file.exists():
                logger.warning("%s has no %s, so damage to its files would not be seen", path, DIGESTS)
    if not config_file.exists() and (path / "checkpoint" / form.config_file).exists():
        raise CheckpointError(
            f"{path} is a run of `tokenmdp train`; its checkpoint is {path / 'checkpoint'}: pass that"
        )
    record = read_json(config_file)
    if not isinstance(record, dict) or record.get("format") != str(form) or not isinstance(record.get("config"), dict):
        theirs = record.get("format") if isinstance(record, dict) else None
        raise CheckpointError(
            f"{config_file} has format {theirs!r} and this version reads {str(form)!r}; start a new run from the "
            f"weights in {path} (on the command line --policy, of a reward model --init)"
        )
    return Checkpoint(
        path,
        record["config"],
        load_state(path / "state" / "trainer.safetensors"),
        read_json(path / "state" / "envs.json"),
        read_json(path / "state" / "history.json"),
    )


def restore(learner: Learner, checkpoint: Checkpoint, extra: Sequence[str]) -> dict[str, Any]:
    """Restore everything but the weights of model and reference into a new learner; with LoRA, its adapters too.

    Args:
        learner: Made from ``checkpoint.config``.
        checkpoint: What `read` gave.
        extra: The keys of what the algorithm saved beside it.

    Returns:
        What it saved there.

    Raises:
        CheckpointError: the learner or its source of data do not fit.
    """
    path, trainer, processes = checkpoint.path, checkpoint.trainer, learner.processes
    if learner.config.lora_rank:
        _load_adapters(learner, path / "state" / "adapters.safetensors")
    try:
        learner.num_updates_done, own = trainer["num_updates_done"], {name: trainer[name] for name in extra}
        if trainer["device"] == learner.generator.device.type:
            learner.generator.set_state(trainer["generator"])
        else:
            learner.generator.manual_seed(learner.config.seed + learner.num_updates_done)
            logger.warning("saved on %s: sampling goes on with other random numbers here", trainer["device"])
        if learner.config.dtype == "auto" and trainer.get("dtype", _dtype(learner)) != _dtype(learner):
            logger.warning(
                "saved by a run in %s, which goes on in %s, with other roundings; set the environment variable %s=%s "
                "to keep it", trainer["dtype"], _dtype(learner), DTYPE_VARIABLE, trainer["dtype"],
            )  # fmt: skip
        processes.load_optimizer_state(learner.optimizer, trainer["optimizer"])
        learner.set_rng_states(checkpoint.rng_states)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path / 'state'} does not fit ({error}); pass what it was saved with, "
            f"or start a new run from the weights: {type(learner).__name__}({str(path)!r}, ...)"
        ) from error
    learner.history = checkpoint.history
    return own


def _dtype(learner: Learner) -> str:
    return precision(learner.config.dtype, learner.generator.device)


def _load_adapters(learner: Learner, path: Path) -> None:
    state = load_state(path)
    try:
        learner.processes.load_policy_state(learner.model, state)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit the model ({error}); restore a copy, use the peft version it was saved with, or "
            f"start a new run from the weights: {type(learner).__name__}({str(path.parent.parent)!r}, ...)"
        ) from error
