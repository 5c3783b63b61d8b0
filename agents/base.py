"""What every agent here needs, once: settings, models, optimizer, the loop over updates, steps, checkpoints.

An agent is a subclass with a configuration, `Agent.update`, and whatever its update needs.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from tokenmdp.files import CheckpointError
from tokenmdp.models.lora import WithoutAdapters, add_adapters
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.precision import resolve_dtype
from tokenmdp.models.token_distribution import TokenScores
from tokenmdp.rollouts.collecting import collect, credited_envs
from tokenmdp.training import checkpoint
from tokenmdp.training.accelerated import processes_of
from tokenmdp.training.batches import FORWARD_SLOTS, by_length, row_lengths
from tokenmdp.training.typed import check_types, require
from tokenmdp.types import Rollout

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Metrics = dict[str, float]
Losses = Callable[[TokenScores, Rollout, torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class AgentConfig:
    """The numbers of one run that every algorithm has. Each value is checked by its type and its range."""

    seed: int = 1  # of sampling, minibatches and prompts
    learning_rate: float = 3e-5  # of the language model
    anneal_lr: bool = False  # learning rates fall linearly to 0 over total_updates
    total_updates: int | None = None  # only for anneal_lr
    adam_eps: float = 1e-8  # added to the denominator of Adam's steps
    update_epochs: int = 4  # passes over the episodes of an update
    num_minibatches: int = 4  # steps per pass
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    target_kl: float | None = None  # ends an update's epochs once approx_kl of a minibatch exceeds it
    clip_coef: float = 0.2  # of the ratio of new to old probability

    kl_coef: float = 0.3  # weight of the KL to the reference; the initial one, if kl_target is set
    kl_target: float | None = None  # nats per sequence; kl_coef is adapted so that kl approaches it
    kl_horizon: int = 10_000  # episodes over which the coefficient adapts

    temperature: float = 1.0  # of the policy's distribution, while it samples and while it learns
    top_k: int = 0  # the policy chooses among its k likeliest tokens; 0: among all
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the forward passes; weights stay float32
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    gradient_checkpointing: bool = False  # recomputes activations in the backward pass: less memory, more time
    lora_rank: int = 0  # above 0: only adapters of this rank learn (and PPO's value head); docs/processes_and_memory.md
    lora_alpha: float = 16.0  # the adapters' output is scaled by lora_alpha / lora_rank
    lora_target_modules: str = "all-linear"  # layers with adapters: "all-linear", or a regular expression for names

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "learning_rate adam_eps update_epochs num_minibatches max_grad_norm clip_coef", "positive")
        require(self, "total_updates target_kl kl_target kl_horizon temperature lora_alpha", "positive")
        require(self, "seed kl_coef top_k lora_rank", "not negative")
        if self.anneal_lr and not self.total_updates:
            raise ValueError(
                "anneal_lr lowers the learning rate over total_updates: set total_updates to the run's length"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(
                f"kl_target is {self.kl_target} and kl_coef is 0, which no factor can change; set kl_coef above 0, or "
                "leave out kl_target"
            )


class Agent:
    """A policy, its frozen reference and the environments it learns in.

    Args:
        policy: Alias, directory or hub name of a causal language model, or such a model (trained in place).
        envs: Vector environment with ``autoreset_mode="Disabled"`` under a credit wrapper. One update plays one
            episode in each row.
        config: The run's numbers.
        reference: Name or model that the KL is measured to; default ``policy`` as it starts: a frozen copy, or, with
            LoRA, the policy with its adapters off.
        accelerator: For a run in several processes, each of which passes its own rows as ``envs``.

    Attributes:
        policy, reference: `CausalLMPolicy`.
        num_episodes: Episodes per update, over all processes.
        num_updates_done: Updates so far, over all calls of `learn` and all resumed runs.
        history: One dict of metrics per update.
        kl_coef: The coefficient of the next update.
    """

    config_class: ClassVar[type[AgentConfig]]
    format: ClassVar[checkpoint.Format]
    # Of `tokenmdp train`: fields of the configuration by preset. Two epochs take three fifths of the time of four, and
    # larger steps compensate.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"learning_rate": 6e-5, "kl_coef": 0.38, "update_epochs": 2},
        "smoke": {"learning_rate": 3e-3, "kl_coef": 0.5},
    }
    uses_credit: ClassVar[bool] = True  # False: only the sum of an episode's rewards matters
    norms: ClassVar[tuple[str, ...]] = ("grad_norm",)  # names of the gradient norms, one per optimizer group

    def __init__(
        self,
        policy: str | Any,
        envs: VectorEnv,
        config: Any = None,
        reference: str | Any | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.envs, self.config, self.processes = envs, config or self.config_class(), processes_of(accelerator)
        cfg, task = self.config, credited_envs(envs).task
        if not isinstance(cfg, self.config_class):
            raise TypeError(f"config is {cfg!r}; {type(self).__name__} takes a {self.config_class.__name__}")
        if len(set(shares := self.processes.gather(envs.num_envs))) > 1:
            raise ValueError(
                f"num_envs is {shares} in the {len(shares)} processes; all must play the same number of episodes"
            )
        self.num_episodes = sum(shares)
        if self.num_episodes < cfg.num_minibatches:
            raise ValueError(
                f"num_envs={self.num_episodes} does not fill num_minibatches={cfg.num_minibatches}; raise num_envs or "
                "lower num_minibatches (in the command, --num-envs or --num-minibatches)"
            )
        self.check()
        device = self.processes.device(cfg.device)
        options = {
            "temperature": cfg.temperature,
            "top_k": cfg.top_k,
            "compute_dtype": resolve_dtype(cfg.dtype, device),
            "gradient_checkpointing": cfg.gradient_checkpointing,
        }
        if reference is policy and not isinstance(policy, str):
            raise ValueError(
                "policy and reference are one model object, which freezing the reference would keep from learning; "
                "leave out reference, which then is a copy, or pass copy.deepcopy(model)"
            )
        self.policy = CausalLMPolicy.for_task(policy, task, **options)
        if cfg.lora_rank:
            add_adapters(self.policy, cfg.lora_rank, cfg.lora_alpha, cfg.lora_target_modules, cfg.seed)
        self.policy.to(device)
        if reference is not None:
            self.reference = CausalLMPolicy.for_task(reference, task, **options).to(device)
        elif cfg.lora_rank:
            self.reference = WithoutAdapters(self.policy)
        else:
            self.reference = copy.deepcopy(self.policy)
        self.reference.requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.parameter_groups(), eps=cfg.adam_eps, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.learner = self.processes.prepare(self.policy, self.reference, self.optimizer)
        self.generator = torch.Generator(device).manual_seed(cfg.seed)  # sampling and minibatches
        self.kl_coef = cfg.kl_coef
        self.num_updates_done = 0
        self.history: list[Metrics] = []

    def check(self) -> None:
        """Raise for environments that do not fit the algorithm; called before the models are loaded."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, in optimizer groups; each has its gradient norm, and the first one's rate is logged."""
        raise NotImplementedError

    def update(self) -> Metrics:
        """Play one episode in every row and learn from them; returns the update's metrics."""
        raise NotImplementedError

    def warning(self) -> str | None:
        """What the user should know after the update that has just ended; None: nothing."""
        return None

    def learn(self, num_updates: int, callback: Callable[[Metrics], None] | None = None) -> Self:
        """Run ``num_updates`` further updates; ``callback(metrics)`` follows each, and may raise to stop.

        Raises:
            FloatingPointError: an update produced a NaN; go back to the last checkpoint.
        """
        cfg = self.config
        if cfg.anneal_lr and self.num_updates_done + num_updates > (cfg.total_updates or 0):
            raise ValueError(
                f"{self.num_updates_done} updates are done and {num_updates} more exceed total_updates="
                f"{cfg.total_updates}, where the learning rate is 0; raise total_updates"
            )
        for _ in range(num_updates):
            started = time.perf_counter()
            learning_rate = self._schedule()
            metrics = self.update()
            self.num_updates_done += 1
            seconds = time.perf_counter() - started
            metrics |= {
                "update": self.num_updates_done,
                "kl_coef": self.kl_coef,
                "learning_rate": learning_rate,
                "seconds": seconds,
                "tokens_per_second": metrics["response_tokens"] / seconds,
            }
            if cfg.kl_target is not None:  # for the next update
                self.kl_coef = adapt_kl_coef(
                    self.kl_coef, metrics["kl"], cfg.kl_target, cfg.kl_horizon, self.num_episodes
                )
            self.history.append(metrics)
            if not self.processes.rank and (warning := self.warning()):
                logger.warning(warning)
            if callback is not None:
                callback(metrics)
        return self

    def play(self, responses_per_prompt: int = 1) -> tuple[Rollout, Metrics]:
        """One episode in every row, scored by the reward model and credited by the wrapper; see `collect`."""
        return collect(
            self.envs,
            self.policy,
            self.reference,
            self.generator,
            seed=environment_seed(self.config.seed) if self.num_updates_done == 0 else None,
            rows_per_forward=math.ceil(self.envs.num_envs / self.config.num_minibatches),
            responses_per_prompt=responses_per_prompt,
            processes=self.processes,
        )

    def take_steps(self, rollout: Rollout, losses: Losses) -> Metrics:
        """``update_epochs`` passes over the rollout in ``num_minibatches`` random parts of its episodes.

        Args:
            rollout: All episodes of the update.
            losses: ``losses(new, old, rows)`` for some episodes: their scores under the policy that learns, their part
                of the rollout, and which rows of the rollout they are, (n,) int64. Returns means over their tokens:
                ``"loss"``, which has the gradient, ``"approx_kl"``, which ``target_kl`` bounds, and others to log.

        Returns:
            The means over all steps of what ``losses`` returned and of the gradient norms, and the number of steps.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        cfg, records, names = self.config, [], []
        lengths = row_lengths(rollout)
        # Processes wait for each other in every backward, so all must have the same number of them.
        forward_slots = FORWARD_SLOTS if self.processes.size == 1 else math.inf
        for minibatch in self._minibatches(len(rollout.scores)):
            self.optimizer.zero_grad()
            numbers = torch.zeros((), device=rollout.scores.device)
            rows, weight = self.processes.part(minibatch, rollout.response_mask)
            tokens = lengths[rows.cpu(), 1].sum()
            for members, old in by_length(rollout, rows, lengths, forward_slots):
                share = weight * old.response_mask.sum() / tokens  # losses are means over tokens
                new = self.learner(old.input_ids, old.attention_mask, old.prompt_slots, old.support)
                found = losses(new, old, members)
                (found["loss"] * share).backward()  # the gradients are averaged over processes
                names = list(found)
                numbers = numbers + torch.stack([number.detach() for number in found.values()]) * share
            # Apart: under one norm a wrong value would shrink the step of the policy.
            norms = [
                self.processes.clip_grad_norm(group["params"], cfg.max_grad_norm)
                for group in self.optimizer.param_groups
            ]
            numbers = self.processes.reduce_mean(numbers)
            records.append(torch.cat([numbers, torch.stack(norms)]))
            if cfg.target_kl is not None and numbers[names.index("approx_kl")] > cfg.target_kl:
                break  # before the step: it would go further in the direction that is already too far
            self.optimizer.step()
        means = torch.stack(records).mean(0).tolist()  # one transfer per update
        metrics = dict(zip((*names, *self.norms), means, strict=True))
        if not all(map(math.isfinite, metrics.values())):
            rates = ", ".join(f"{group['lr']:g}" for group in self.optimizer.param_groups)
            raise FloatingPointError(
                f"update {self.num_updates_done + 1} gave {metrics}; load the last checkpoint and lower learning_rate "
                f"(rates now: {rates}), or set dtype='float32'"
            )
        return metrics | {"minibatches": len(records)}

    def _minibatches(self, num_episodes: int) -> Iterator[torch.Tensor]:
        for _ in range(self.config.update_epochs):
            order = torch.randperm(num_episodes, generator=self.generator, device=self.generator.device)
            yield from order.tensor_split(self.config.num_minibatches)  # chunk(4) makes 3 parts of 5 episodes

    def _schedule(self) -> float:
        """Set this update's learning rates and return the language model's.

        They depend only on the number of updates done, so that a resumed run has the same rates.
        """
        cfg = self.config
        left = 1 - self.num_updates_done / cfg.total_updates if cfg.anneal_lr and cfg.total_updates else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * left
        return self.rates[0] * left

    def save(self, directory: str | Path) -> None:
        """Write a checkpoint that ``from_pretrained`` reads and `load` continues from.

        Its files: `tokenmdp.training.checkpoint`.

        The directory appears whole or not at all: an interrupted save leaves the previous checkpoint. With several
        processes, all call this and the first one writes.

        Raises:
            CheckpointError: the directory holds something else, or cannot be written.
        """
        checkpoint.save(self, directory, self.format, {"kl_coef": self.kl_coef})

    @classmethod
    def load(
        cls, directory: str | Path, envs: VectorEnv, *, accelerator: Accelerator | None = None, **overrides: Any
    ) -> Self:
        """Resume from `save`: on the same machine in float32, ``learn(n)`` continues bit for bit.

        Args:
            directory: What `save` wrote.
            envs: The same environments: same arguments, same num_envs (over all processes, whose number may change).
            accelerator: As in the constructor.
            **overrides: Fields of the configuration to change, such as ``device="cpu"`` (not those that are saved
                state).

        Raises:
            CheckpointError: the checkpoint is missing, damaged or from another program, or ``envs`` has other rows.
        """
        saved_state = {"seed", "kl_coef", "adam_eps", "lora_rank", "lora_alpha", "lora_target_modules"}
        if fixed := sorted(saved_state & overrides.keys()):
            raise ValueError(f"{', '.join(fixed)} cannot change on resuming: the saved state holds the current value")
        saved = checkpoint.read(directory, cls.format, processes_of(accelerator))
        try:
            config = cls.config_class(**saved.config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{saved.path / cls.format.config_file} does not fit this version ({error})"
            ) from error
        reference = None if saved.reference is None else str(saved.reference)
        agent = cls(str(saved.policy), envs, replace(config, **overrides), reference, accelerator=accelerator)
        agent.kl_coef = checkpoint.restore(agent, saved, extra=("kl_coef",))["kl_coef"]
        return agent


def adapt_kl_coef(kl_coef: float, kl: float, kl_target: float, kl_horizon: int, num_episodes: int) -> float:
    """``kl_coef * (1 + clip(kl / kl_target - 1, -0.2, 0.2) * num_episodes / kl_horizon)``.

    Source: Ziegler et al. 2019, section 2.2, as TRL's AdaptiveKLController has it.

    >>> round(adapt_kl_coef(0.2, kl=12.0, kl_target=6.0, kl_horizon=100, num_episodes=50), 6)
    0.22
    """
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / kl_horizon)


def environment_seed(seed: int) -> int:
    """A seed for ``envs.reset``. Row i is seeded with it plus i, so runs 1 and 2 must not start from 1 and 2.

    >>> environment_seed(1) == environment_seed(1), abs(environment_seed(1) - environment_seed(2)) > 10_000
    (True, True)
    """
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
