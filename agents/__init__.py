"""Agents, one readable file each; installed as ``tokenmdp.agents``. Only `ALGORITHMS` names them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmdp.agents.learner import Learner

ALGORITHMS = {  # name in the command -> module and class; the first is the default
    "ppo": "tokenmdp.agents.ppo:PPO",
    "rloo": "tokenmdp.agents.rloo:RLOO",
    "grpo": "tokenmdp.agents.grpo:GRPO",
    "f-dpg": "tokenmdp.agents.f_dpg:FDPG",
    "sft": "tokenmdp.agents.sft:SFT",
    "reward-model": "tokenmdp.agents.reward_model:RewardModelLearner",
    "dpo": "tokenmdp.agents.dpo:DPO",
}
DEFAULT_ALGORITHM = next(iter(ALGORITHMS))


def algorithm(name: str) -> type[Learner]:
    """The class of an algorithm in `ALGORITHMS`.

    Raises:
        ValueError: there is none of this name.

    >>> algorithm("ppo").__name__
    'PPO'
    """
    if name not in ALGORITHMS:
        raise ValueError(f"there is no algorithm {name!r}; choose one of {', '.join(ALGORITHMS)}")
    module, _, class_name = ALGORITHMS[name].partition(":")
    return getattr(import_module(module), class_name)
