"""What `PPO.save` writes and `PPO.load` reads; the algorithm is in ppo.py.

config.json, model.safetensors, tokenizer files     the policy, adapters merged in
value_head.safetensors, ppo_config.json
state/trainer.safetensors                           optimizer, random numbers, kl_coef, updates done
state/envs.json, state/history.json                 the environments' random numbers; metrics
state/reference/                                    the frozen reference
state/adapters.safetensors                          with LoRA: what learns, beside a frozen model, which is
state/base/                                         here unless it is the reference
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenmdp.files import (
    CheckpointError,
    atomic_directory,
    load_state,
    read_json,
    recover_directory,
    save_state,
    write_text,
)
from tokenmdp.models.lora import WithoutAdapters, adapter_state, base_state, merged_state
from tokenmdp.models.policy import VALUE_HEAD_FILE
from tokenmdp.rollouts.collecting import check_envs
from tokenmdp.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from tokenmdp.agents.ppo import PPO

FORMAT = "tokenmdp-ppo-2"  # 2: the value head has a learning rate of its own
CONFIG_FILE = "ppo_config.json"
logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A checkpoint whose small files are read."""

    path: Path
    config: dict[str, Any]  # of PPOConfig
    trainer: dict[str, Any]
    rng_states: list[Any]  # one a row of all processes
    history: list[dict[str, float]]

    @property
    def policy(self) -> Path:
        """The directory to make the policy from, as it is without adapters."""
        if not self.config.get("lora_rank"):
            return self.path
        return self.path / "state" / ("reference" if self.trainer["adapters_off"] else "base")

    @property
    def reference(self) -> Path | None:
        """The directory to make the reference from; None: the policy without its adapters."""
        return None if self.trainer.get("adapters_off") else self.path / "state" / "reference"


def save(agent: PPO, directory: str | Path) -> None:
    """Write a checkpoint; every process calls this, the first writes.

    Raises:
        CheckpointError: the directory holds something else, or cannot be written.
    """
    path, envs, processes = Path(directory), check_envs(agent.envs), agent.processes
    state, optimizer = processes.policy_state(agent.policy), processes.optimizer_state(agent.optimizer)
    adapters_off = isinstance(agent.reference, WithoutAdapters)
    reference_state = {} if adapters_off else processes.policy_state(agent.reference)
    rng_states = [row for rows in processes.gather(envs.get_rng_state()) for row in rows]
    trainer = {
        "num_updates_done": agent.num_updates_done,
        "kl_coef": agent.kl_coef,
        "device": agent.generator.device.type,
        "generator": agent.generator.get_state(),
        "optimizer": optimizer,
        "adapters_off": adapters_off,
    }
    with processes.together():
        if processes.rank:
            return
        if path.exists() and not (path / CONFIG_FILE).exists() and (path.is_file() or any(path.iterdir())):
            raise CheckpointError(f"{path} holds other files, which saving would replace; choose a new directory")
        try:
            with atomic_directory(path) as new:
                record = {"format": FORMAT, "config": asdict(agent.config)}
                write_text(new / CONFIG_FILE, json.dumps(record, indent=2) + "\n")
                envs.tokenizer.save_pretrained(new)
                if agent.config.lora_rank:
                    agent.policy.save_pretrained(new, merged_state(agent.policy, state))
                    frozen = new / "state" / ("reference" if adapters_off else "base")
                    agent.policy.save_pretrained(frozen, base_state(state))
                    save_state(new / "state" / "adapters.safetensors", adapter_state(state))
                else:
                    agent.policy.save_pretrained(new, state)
                if not adapters_off:
                    agent.reference.save_pretrained(new / "state" / "reference", reference_state)
                save_state(new / "state" / "trainer.safetensors", trainer)
                write_text(new / "state" / "envs.json", json.dumps(rng_states))
                write_text(new / "state" / "history.json", json.dumps(agent.history))
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint {path} ({error}); save to a writable directory"
            ) from error


def read(directory: str | Path, processes: Processes = ALONE) -> Checkpoint:
    """What `save` wrote, apart from the weights; every process calls this.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another program.
    """
    path = Path(directory)
    with processes.together():
        if not processes.rank:  # it may rename, which one process can do
            recover_directory(path)
    if not (path / CONFIG_FILE).exists() and (path / "checkpoint" / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{path} is a run of `tokenmdp train`; its checkpoint is {path / 'checkpoint'}: pass that"
        )
    record = read_json(path / CONFIG_FILE)
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("config"), dict):
        theirs = record.get("format") if isinstance(record, dict) else None
        raise CheckpointError(
            f"{path / CONFIG_FILE} has format {theirs!r} and this version reads {FORMAT!r}; start a new run from the "
            f"weights: PPO(policy={str(path)!r}, ...), on the command line --policy {path}"
        )
    if not (path / VALUE_HEAD_FILE).exists():
        raise CheckpointError(f"{path / VALUE_HEAD_FILE} is missing; restore a copy of the checkpoint")
    return Checkpoint(
        path,
        record["config"],
        load_state(path / "state" / "trainer.safetensors"),
        read_json(path / "state" / "envs.json"),
        read_json(path / "state" / "history.json"),
    )


def restore(agent: PPO, checkpoint: Checkpoint) -> None:
    """Put everything but the weights of policy and reference into a new agent; with LoRA, its adapters too.

    Raises:
        CheckpointError: the agent or its environments do not fit.
    """
    path, trainer, envs, processes = checkpoint.path, checkpoint.trainer, check_envs(agent.envs), agent.processes
    if agent.config.lora_rank:
        _load_adapters(agent, path / "state" / "adapters.safetensors")
    try:
        agent.num_updates_done, agent.kl_coef = trainer["num_updates_done"], trainer["kl_coef"]
        if trainer["device"] == agent.generator.device.type:
            agent.generator.set_state(trainer["generator"])
        else:
            agent.generator.manual_seed(agent.config.seed + agent.num_updates_done)
            logger.warning("saved on %s: sampling goes on with other random numbers here", trainer["device"])
        processes.load_optimizer_state(agent.optimizer, trainer["optimizer"])
        if len(checkpoint.rng_states) != agent.num_episodes:
            raise ValueError(f"{len(checkpoint.rng_states)} random-number states for {agent.num_episodes} rows")
        envs.set_rng_state(checkpoint.rng_states[processes.rows(envs.num_envs)])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path / 'state'} does not fit ({error}); pass environments like those it was saved with, "
            f"or start a new run from the weights: PPO(policy={str(path)!r}, ...)"
        ) from error
    agent.history = checkpoint.history


def _load_adapters(agent: PPO, path: Path) -> None:
    state = load_state(path)
    try:
        agent.processes.load_policy_state(agent.policy, state)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit the policy ({error}); restore a copy, use the peft version it was saved with, or "
            f"start a new run from the weights: PPO(policy={str(path.parent.parent)!r}, ...)"
        ) from error
