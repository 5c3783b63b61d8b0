"""The protocol: the numbers that all engines share, and the ways in which engines differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tokenmdp.agents.ppo import PPOConfig
from tokenmdp.runs.settings import preset_settings

MAIN_JOB = preset_settings("quick", "ppo")
TRL, TRL_ALLOCATOR, OURS = "trl", "trl-allocator", "ours"


@dataclass(frozen=True)
class Protocol:
    """The numbers that both sides share. Models and prompts are those that ``tokenmdp train`` uses by default."""

    updates: int = 60
    episodes: int = 64  # per update
    threads: int = 1
    response_tokens: int = 16  # at most: end-of-text may come earlier
    num_minibatches: int = 4
    update_epochs: int = 4
    learning_rate: float = 3e-5
    kl_coef: float = 0.3  # fixed
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    clip_coef_value: float = 1.0
    vf_coef: float = 0.1
    max_grad_norm: float = 1.0

    def ours(self) -> dict[str, Any]:
        """The fields of our `PPOConfig`, whose names these are."""
        return {name: value for name, value in asdict(self).items() if name in PPO_FIELDS}

    def trl(self) -> dict[str, Any]:
        """The fields of TRL's PPOConfig.

        >>> Protocol(episodes=64, num_minibatches=4).trl()["mini_batch_size"]
        16
        """
        return {
            "batch_size": self.episodes,
            "mini_batch_size": self.episodes // self.num_minibatches,
            "ppo_epochs": self.update_epochs,
            "learning_rate": self.learning_rate,
            "adap_kl_ctrl": False,
            "init_kl_coef": self.kl_coef,
            "gamma": self.gamma,
            "lam": self.gae_lambda,
            "cliprange": self.clip_coef,
            "cliprange_value": self.clip_coef_value,
            "vf_coef": self.vf_coef,
            "max_grad_norm": self.max_grad_norm,
        }


@dataclass(frozen=True)
class Engine:
    """One line of the figure or of the table.

    Attributes:
        name: "trl" and what begins with it ("trl-allocator": with the allocator settings of the ``tokenmdp``
            command), or one of ours.
        credit: Of ours: a name of `tokenmdp.credit.CREDIT_METHODS`. TRL's reward is sparse.
        fields: On top of the protocol: fields of it, or of ours, of `PPOConfig`.
    """

    name: str
    credit: str = "sparse"
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trl(self) -> bool:
        """Whether this is a run of TRL."""
        return self.name.split("-")[0] == TRL

    def trl(self, protocol: Protocol) -> dict[str, Any]:
        """TRL's configuration."""
        return replace(protocol, **self.fields).trl()

    def config(self, protocol: Protocol, seed: int) -> PPOConfig:
        """Our agent's configuration.

        Raises:
            ValueError: a field that does not exist, or a value that it does not take.
        """
        if unknown := sorted(self.fields.keys() - PPO_FIELDS):
            raise ValueError(
                f"PPOConfig has no field {', '.join(unknown)}; choose from {', '.join(sorted(PPO_FIELDS))}"
            )
        return PPOConfig(**protocol.ours() | self.fields, seed=seed, device="cpu")


PPO_FIELDS = {item.name for item in dataclasses.fields(PPOConfig)} - {"seed", "device"}
# One pass over the episodes of an update, in larger steps: fewer seconds per update.
ONE_PASS = {"update_epochs": 1, "learning_rate": 1.5e-4}
RACERS = {
    engine.name: engine
    for engine in (
        Engine(TRL),
        Engine("ours-sparse"),
        Engine("ours-attention", "attention"),
        Engine("ours-red", "red"),
        Engine("ours-train", MAIN_JOB.credit, MAIN_JOB.config),  # as `tokenmdp train` learns by default
        Engine("trl-one-pass", fields=ONE_PASS),
        Engine("ours-one-pass-sparse", fields=ONE_PASS),
        Engine("ours-one-pass-red", "red", ONE_PASS),
        Engine(TRL_ALLOCATOR),
    )
}


@dataclass(frozen=True)
class Run:
    """One engine with one seed."""

    engine: Engine
    protocol: Protocol
    seed: int

    @property
    def name(self) -> str:
        """Such as "ours-seed1"; also the name of its file."""
        return f"{self.engine.name}-seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """The run as JSON values, for `run_from`."""
        return {"engine": asdict(self.engine), "protocol": asdict(self.protocol), "seed": self.seed}


def run_from(record: Mapping[str, Any]) -> Run:
    """The run that a file or another process describes.

    >>> run = Run(Engine("ours", fields={"ent_coef": 0.1}), Protocol(), seed=2)
    >>> run_from(run.to_json() | {"more": 1}) == run
    True
    """
    return Run(Engine(**record["engine"]), Protocol(**record["protocol"]), record["seed"])


def curve_engines(config: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Engine]:
    """TRL, ours, and ours with further fields of `PPOConfig` under a label each.

    >>> list(curve_engines({}, {"entropy": {"ent_coef": 0.1}}))
    ['trl', 'ours', 'ours-entropy']
    """
    ours = Engine(OURS, fields=dict(config))
    labelled = (replace(ours, name=f"{OURS}-{label}", fields={**config, **more}) for label, more in variants.items())
    return {engine.name: engine for engine in (Engine(TRL), ours, *labelled)}
