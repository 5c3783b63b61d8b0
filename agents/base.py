"""What every agent that plays needs: episodes in its environments, and steps on what they show.

An agent is a subclass with a configuration, `Agent.update`, and whatever its update needs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from tokenmdp.agents.learner import Learner, LearnerConfig, Metrics, policy_and_reference
from tokenmdp.models.token_distribution import TokenScores
from tokenmdp.rollouts.collecting import check_recording, collect, credited_envs
from tokenmdp.training.batches import FORWARD_SLOTS, by_length, row_lengths
from tokenmdp.training.typed import require
from tokenmdp.types import Rollout
from tokenmdp.wording import count

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

LOGITS_AT_ONCE = 1 << 28  # of a reference forward on a GPU: 1 GiB in float32

Losses = Callable[[TokenScores, Rollout, torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class AgentConfig(LearnerConfig):
    """The numbers of one run that every algorithm has which plays episodes."""

    update_epochs: int = 4  # passes over the episodes of an update
    num_minibatches: int = 4  # steps per pass
    target_kl: float | None = None  # ends an update's epochs once approx_kl of a minibatch exceeds it
    clip_coef: float = 0.2  # of the ratio of new to old probability

    kl_coef: float = 0.3  # weight of the KL to the reference; the initial one, if kl_target is set
    kl_target: float | None = None  # nats per sequence; kl_coef is adapted so that kl approaches it
    kl_horizon: int = 10_000  # episodes over which the coefficient adapts

    temperature: float = 1.0  # of the policy's distribution, while it samples and while it learns
    top_k: int = 0  # the policy chooses among its k likeliest tokens; 0: among all
    rollout_steps: Literal["plain", "copied", "recorded"] = "plain"  # how a GPU decodes: agents/README.md, 21

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "update_epochs num_minibatches clip_coef target_kl kl_target kl_horizon temperature", "positive")
        require(self, "kl_coef top_k", "not negative")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(
                f"kl_target is {self.kl_target} and kl_coef is 0, which no factor can change; set kl_coef above 0, or "
                "leave out kl_target"
            )


class Agent(Learner):
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

    config: Any
    learns_from = "episodes"
    uses_credit = True
    state: ClassVar[tuple[str, ...]] = ("kl_coef",)
    # Of `tokenmdp train`: fields of the configuration by preset. One epoch, in larger steps, takes less time than four.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"learning_rate": 1e-4, "kl_coef": 0.45, "update_epochs": 1, "num_minibatches": 8},
        "smoke": {"learning_rate": 3e-3, "kl_coef": 0.5},
    }

    def __init__(
        self,
        policy: str | Any,
        envs: VectorEnv,
        config: Any = None,
        reference: str | Any | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        super().__init__(config, accelerator)
        self.envs, cfg, task = envs, self.config, credited_envs(envs).task
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
        if cfg.rollout_steps == "recorded":
            check_recording(envs)
            if self.processes.size > 1:
                raise ValueError(
                    f"rollout_steps='recorded' needs weights that stay where they are, and {self.processes.size} "
                    "processes may move them; choose 'copied' or 'plain'"
                )
        self.policy, reference = policy_and_reference(
            policy, reference, task, cfg, self.processes, temperature=cfg.temperature, top_k=cfg.top_k,
            rollout_steps=cfg.rollout_steps,
        )  # fmt: skip
        if cfg.rollout_steps == "recorded" and self.policy.lm.device.type != "cuda":
            logger.warning("rollout_steps='recorded': nothing is recorded on %s", self.policy.lm.device)
        self.kl_coef = cfg.kl_coef
        self.prepare(self.policy, reference)

    def check(self) -> None:
        """Raise for environments that do not fit the algorithm; called before the models are loaded."""

    def check_groups(self, size: int) -> None:
        """Refuse rows that are not whole groups of ``size`` responses to one prompt."""
        if (rows := self.envs.num_envs) % size:
            raise ValueError(
                f"num_envs={rows} is not a multiple of responses_per_prompt={size}; change one of them (in the "
                "command, --num-envs or --responses-per-prompt)"
            )

    def finish(self, metrics: Metrics) -> None:
        """Log the coefficient of the KL and adapt it for the next update."""
        metrics["kl_coef"] = self.kl_coef
        cfg = self.config
        if cfg.kl_target is not None:
            self.kl_coef = adapt_kl_coef(self.kl_coef, metrics["kl"], cfg.kl_target, cfg.kl_horizon, self.num_episodes)

    @classmethod
    def load(cls, directory: str | Path, envs: VectorEnv, **options: Any) -> Self:  # type: ignore[override]
        """As `Learner.load`, from the same environments: same arguments, same num_envs over all processes."""
        return super().load(directory, envs, **options)

    @property
    def tokenizer(self) -> Any:
        """The environments'."""
        return self.envs.unwrapped.tokenizer  # type: ignore[attr-defined]

    def batch_words(self) -> str:
        """Such as "64 episodes of up to 16 tokens"."""
        task = self.envs.unwrapped.task  # type: ignore[attr-defined]
        return f"{count(self.num_episodes, 'episode')} of up to {count(task.max_new_tokens, 'token')}"

    def rng_states(self) -> list[Any]:
        """Of the environments, one per row."""
        return self.envs.unwrapped.get_rng_state()  # type: ignore[attr-defined]

    def set_rng_states(self, states: list[Any]) -> None:
        """Put the states of the rows of all processes back."""
        if len(states) != self.num_episodes:
            raise ValueError(f"{len(states)} random-number states for {self.num_episodes} rows")
        mine = states[self.processes.rows(self.envs.num_envs)]
        self.envs.unwrapped.set_rng_state(mine)  # type: ignore[attr-defined]

    @property
    def rows_per_forward(self) -> int:
        """Rows that the reference scores at a time: as many as a minibatch has, and on a GPU all, if they fit.

        There a forward of few rows costs what one of many does.
        """
        rows, task = math.ceil(self.envs.num_envs / self.config.num_minibatches), credited_envs(self.envs).task
        if self.policy.lm.device.type == "cpu":
            return rows
        return max(rows, min(self.envs.num_envs, LOGITS_AT_ONCE // (task.max_new_tokens * task.vocab_size)))

    def play(self, responses_per_prompt: int = 1, *, seeded: bool = True) -> tuple[Rollout, Metrics]:
        """One episode in every row, scored by the reward model and credited by the wrapper; see `collect`.

        Args:
            responses_per_prompt: K; above 1, K rows that follow each other play one prompt.
            seeded: The first update seeds the environments. False: they go on with their random numbers, for an
                update that plays several times.
        """
        return collect(
            self.envs,
            self.policy,
            self.reference,
            self.generator,
            seed=environment_seed(self.config.seed) if self.num_updates_done == 0 and seeded else None,
            rows_per_forward=self.rows_per_forward,
            responses_per_prompt=responses_per_prompt,
            valued=True,
            processes=self.processes,
        )

    def take_steps(self, rollout: Rollout, losses: Losses, counts: torch.Tensor | None = None) -> Metrics:
        """``update_epochs`` passes over the rollout in ``num_minibatches`` random parts of its episodes.

        Args:
            rollout: All episodes of the update.
            losses: ``losses(new, old, rows)`` for some episodes: their scores under the policy that learns, their part
                of the rollout, and which rows of the rollout they are, (n,) int64. Returns means over their tokens:
                ``"loss"``, which has the gradient, ``"approx_kl"``, which ``target_kl`` bounds, and others to log.
            counts: (N,) What each episode counts for in these means; default: its tokens. Ones: means over episodes.

        Returns:
            The means over all steps of what ``losses`` returned and of the gradient norms, and the number of steps.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        cfg, steps = self.config, []
        lengths = row_lengths(rollout)
        counts = rollout.response_mask.sum(-1) if counts is None else counts
        host_counts = counts.cpu()  # like the rows of a minibatch, which then costs a GPU one transfer
        # Processes wait for each other in every backward, so all must have the same number of them.
        forward_slots = FORWARD_SLOTS if self.processes.size == 1 else math.inf

        def parts(rows: torch.Tensor, weight: float) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
            total = host_counts[rows].sum()
            for members, old in by_length(rollout, rows, lengths, forward_slots):
                new = self.learner(old.input_ids, old.attention_mask, old.prompt_slots, old.support)
                yield weight * counts[members].sum() / total, losses(new, old, members)

        for minibatch in self._minibatches(len(rollout.scores)):
            rows, weight = self.processes.part(minibatch, host_counts)
            steps.append(self.gradient(parts(rows, weight)))
            if cfg.target_kl is not None and steps[-1]["approx_kl"] > cfg.target_kl:
                break  # before the step: it would go further in the direction that is already too far
            self.optimizer.step()
        return self.means(steps) | {"minibatches": len(steps)}

    def _minibatches(self, num_episodes: int) -> Iterator[torch.Tensor]:
        for _ in range(self.config.update_epochs):
            order = torch.randperm(num_episodes, generator=self.generator, device=self.generator.device)
            yield from order.cpu().tensor_split(self.config.num_minibatches)  # chunk(4) makes 3 parts of 5 episodes


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
