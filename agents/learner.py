"""What everything that learns here needs, once: settings, optimizer, the loop over updates, one step, checkpoints.

`tokenmdp.agents.base.Agent` learns from episodes that it plays, `tokenmdp.agents.data.DataLearner` from given data.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import nn

from tokenmdp.files import CheckpointError
from tokenmdp.models.lora import WithoutAdapters, add_adapters
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.precision import resolve_dtype
from tokenmdp.training import checkpoint
from tokenmdp.training.accelerated import processes_of
from tokenmdp.training.processes import Processes
from tokenmdp.training.typed import check_types, require
from tokenmdp.types import TokenSpace

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass(frozen=True)
class LearnerConfig:
    """The numbers of one run that every algorithm has. Each value is checked by its type and its range."""

    needs_total: ClassVar[bool] = True  # annealing needs total_updates; else the data gives it
    unused: ClassVar[tuple[str, ...]] = ()  # fields that the algorithm does not read: they keep their defaults

    seed: int = 1  # of sampling and minibatches
    learning_rate: float = 3e-5  # of the language model
    anneal_lr: bool = False  # learning rates fall linearly to 0 over total_updates
    total_updates: int | None = None  # only for anneal_lr
    adam_eps: float = 1e-8  # added to the denominator of Adam's steps
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm

    dtype: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"  # of the forwards; auto: bfloat16 if native
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    gradient_checkpointing: bool = False  # recomputes activations in the backward pass: less memory, more time
    lora_rank: int = 0  # above 0: only adapters of this rank and new heads learn; docs/processes_and_memory.md
    lora_alpha: float = 16.0  # the adapters' output is scaled by lora_alpha / lora_rank
    lora_target_modules: str = "all-linear"  # layers with adapters: "all-linear", or a regular expression for names

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.unused:
            if (value := getattr(self, name)) != (default := getattr(type(self), name)):
                raise ValueError(f"{name} is {value}, and this algorithm does not use it; leave it at {default}")
        require(self, "learning_rate adam_eps max_grad_norm total_updates lora_alpha", "positive")
        require(self, "seed lora_rank", "not negative")
        if self.anneal_lr and self.needs_total and not self.total_updates:
            raise ValueError(
                "anneal_lr lowers the learning rate over total_updates: set total_updates to the run's length"
            )


class Learner:
    """A model that learns in updates, with everything that a run of it needs.

    Args:
        config: The run's numbers; default: those of ``config_class``.
        accelerator: For a run in several processes.

    Attributes:
        model: What learns.
        num_updates_done: Updates so far, over all calls of `learn` and all resumed runs.
        history: One dict of metrics per update.
    """

    config_class: ClassVar[type[LearnerConfig]]
    format: ClassVar[checkpoint.Format]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # of `tokenmdp train`: fields of the configuration by preset
    learns_from: ClassVar[Literal["episodes", "comparisons", "texts"]]
    model_name: ClassVar[str] = "policy"  # for the log
    uses_credit: ClassVar[bool] = False  # False: how a score is spread over the tokens makes no difference
    state: ClassVar[tuple[str, ...]] = ()  # numbers of the algorithm that a checkpoint holds, by attribute

    def __init__(self, config: Any = None, accelerator: Accelerator | None = None) -> None:
        self.config: Any = config or self.config_class()
        self.processes = processes_of(accelerator)
        if not isinstance(self.config, self.config_class):
            raise TypeError(f"config is {self.config!r}; {type(self).__name__} takes a {self.config_class.__name__}")
        self.num_updates_done = 0
        self.history: list[Metrics] = []

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the gradient norms, one per optimizer group."""
        return ("grad_norm",)

    def prepare(self, model: nn.Module, reference: nn.Module | None = None) -> None:
        """Take a model on its device as the one that learns: optimizer, processes, random numbers."""
        cfg = self.config
        self.model: Any = model
        self.reference: Any = reference
        self.optimizer = self.make_optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.learner = self.processes.prepare(model, reference, self.optimizer)
        self.generator = torch.Generator(self.processes.device(cfg.device)).manual_seed(cfg.seed)

    def make_optimizer(self) -> Any:
        """What takes the steps, with the interface of `torch.optim.Optimizer`."""
        return torch.optim.Adam(self.parameter_groups(), eps=self.config.adam_eps, fused=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, in optimizer groups; each has its gradient norm, and the first one's rate is logged."""
        raise NotImplementedError

    def update(self) -> Metrics:
        """One update; returns its metrics, ``response_tokens`` among them."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """Of the model; a checkpoint holds it."""
        raise NotImplementedError

    def references(self) -> list[Any]:
        """The frozen reference, if there is one."""
        return [] if self.reference is None else [self.reference]

    def batch_words(self) -> str:
        """What an update learns from, for the log."""
        raise NotImplementedError

    def rng_states(self) -> list[Any]:
        """The state of what is random in its source of data, this process's part."""
        return []

    def set_rng_states(self, states: list[Any]) -> None:
        """Put back what the `rng_states` of all processes gave; raises ValueError where it does not fit."""

    def finish(self, metrics: Metrics) -> None:
        """What follows an update: add to its metrics, prepare the next one."""

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
                "learning_rate": learning_rate,
                "seconds": seconds,
                "tokens_per_second": metrics["response_tokens"] / seconds,
            }
            self.finish(metrics)
            self.history.append(metrics)
            if not self.processes.rank and (warning := self.warning()):
                logger.warning(warning)
            if callback is not None:
                callback(metrics)
        return self

    def gradient(self, parts: Iterable[tuple[Any, dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        """Add up the gradient of one step from the parts of its batch, one after the other, and scale it down.

        Args:
            parts: Each part's share of the batch and its means: ``"loss"``, which has the gradient, and others to log.

        Returns:
            The means over the batch, of all processes, and the norms before they were scaled; () each.
        """
        self.optimizer.zero_grad()
        totals: dict[str, torch.Tensor] = {}
        for share, found in parts:
            (found["loss"] * share).backward()  # the gradients are averaged over processes
            for name, number in found.items():
                totals[name] = totals.get(name, 0.0) + number.detach() * share
        # Apart: under one norm a wrong value would shrink the step of the policy.
        norms = [
            self.processes.clip_grad_norm(group["params"], self.config.max_grad_norm)
            for group in self.optimizer.param_groups
        ]
        numbers = self.processes.reduce_mean(torch.stack(list(totals.values())))
        return dict(zip((*totals, *self.norms), torch.cat([numbers, torch.stack(norms)]), strict=True))

    def means(self, steps: list[dict[str, torch.Tensor]]) -> Metrics:
        """The means of what `gradient` returned over the steps of an update.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        numbers = torch.stack([torch.stack(list(step.values())) for step in steps]).mean(0).tolist()  # one transfer
        metrics = dict(zip(steps[0], numbers, strict=True))
        if not all(map(math.isfinite, metrics.values())):
            rates = ", ".join(f"{group['lr']:g}" for group in self.optimizer.param_groups)
            raise FloatingPointError(
                f"update {self.num_updates_done + 1} gave {metrics}; load the last checkpoint and lower learning_rate "
                f"(rates now: {rates}), or set dtype='float32'"
            )
        return metrics

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
        checkpoint.save(self, directory, self.format, {name: getattr(self, name) for name in self.state})

    @classmethod
    def load(
        cls, directory: str | Path, source: Any, *, accelerator: Accelerator | None = None, **overrides: Any
    ) -> Self:
        """Resume from `save`: on the same machine in float32, ``learn(n)`` continues bit for bit.

        Args:
            directory: What `save` wrote.
            source: What it learns from. The same environments: same arguments, same num_envs (over all processes, whose
                number may change). Or the same data.
            accelerator: As in the constructor.
            **overrides: Fields of the configuration to change, such as ``device="cpu"`` (not those that are saved
                state).

        Raises:
            CheckpointError: the checkpoint is missing, damaged or from another program, or ``source`` is another one.
        """
        saved_state = {"seed", "adam_eps", "lora_rank", "lora_alpha", "lora_target_modules", *cls.state}
        if fixed := sorted(saved_state & overrides.keys()):
            raise ValueError(f"{', '.join(fixed)} cannot change on resuming: the saved state holds the current value")
        saved = checkpoint.read(directory, cls.format, processes_of(accelerator))
        try:
            config = cls.config_class(**saved.config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{saved.path / cls.format.config_file} does not fit this version ({error})"
            ) from error
        reference = {} if saved.reference is None else {"reference": str(saved.reference)}
        made: Any = cls  # subclasses begin with a model and what it learns from
        learner = made(str(saved.model), source, replace(config, **overrides), accelerator=accelerator, **reference)
        for name, value in checkpoint.restore(learner, saved, extra=cls.state).items():
            setattr(learner, name, value)
        return learner


def policy_and_reference(
    policy: str | Any,
    reference: str | Any | None,
    task: TokenSpace,
    config: LearnerConfig,
    processes: Processes,
    **options: Any,
) -> tuple[CausalLMPolicy, CausalLMPolicy]:
    """The policy that learns and the frozen one that its KL is measured to, on the run's device.

    Args:
        policy: Alias, directory or hub name of a causal language model, or such a model (trained in place).
        reference: The same; None: ``policy`` as it is, a frozen copy or, with LoRA, the policy with its adapters off.
        task: What is written.
        config: Of the run.
        processes: Of the run.
        **options: Further arguments of `CausalLMPolicy`.
    """
    if reference is policy and not isinstance(policy, str):
        raise ValueError(
            "policy and reference are one model object, which freezing the reference would keep from learning; "
            "leave out reference, which then is a copy, or pass copy.deepcopy(model)"
        )
    device = processes.device(config.device)
    options |= {
        "compute_dtype": resolve_dtype(config.dtype, device),
        "gradient_checkpointing": config.gradient_checkpointing,
    }
    learning = CausalLMPolicy.for_task(policy, task, **options)
    if config.lora_rank:
        add_adapters(learning, config.lora_rank, config.lora_alpha, config.lora_target_modules, config.seed)
    learning.to(device)
    options["rollout_steps"] = "plain"  # of a reference, which hardly plays and would keep a cache
    if reference is not None:
        frozen = CausalLMPolicy.for_task(reference, task, **options).to(device)
    elif config.lora_rank:
        frozen = WithoutAdapters(learning)
    else:
        frozen = copy.deepcopy(learning)
        frozen.rollout_steps = "plain"
    return learning, frozen.requires_grad_(False)


def without_value_head(policy: CausalLMPolicy, learning_rate: float) -> list[dict[str, Any]]:
    """The optimizer's group where only the language model or its adapters learn; the value head is frozen."""
    policy.value_head.requires_grad_(False)
    body, _ = policy.parameter_groups(learning_rate, 0.0)
    return [body]
