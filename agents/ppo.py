"""PPO for language models, with the reward of each token where the credit wrapper put it.

One update: every row of the vector environment plays one episode; the KL to a frozen reference is taken off the token
rewards; GAE turns them into advantages; several epochs of minibatches take clipped steps. Reads top to bottom;
README.md beside this file numbers the details and defines every metric.

    import gymnasium as gym
    from tokenmdp.agents.ppo import PPO, PPOConfig
    from tokenmdp.wrappers import vector

    envs = gym.make_vec("tokenmdp:TextGen-IMDb-v0", num_envs=64, autoreset_mode="Disabled")
    agent = PPO("imdb-tiny", vector.AttentionCreditReward(envs, credit_beta=0.8), PPOConfig(seed=1))
    agent.learn(num_updates=150)
    agent.save("runs/first")

Sources: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; Ziegler et al., "Fine-Tuning Language Models
from Human Preferences", 2019 (KL penalty in the reward, adaptive coefficient); Huang et al., "The N Implementation
Details of RLHF with PPO", 2023; Chan et al., "Dense Reward for Free in RLHF", ICML 2024 (token rewards).
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from tokenmdp.divergences import kl_k1
from tokenmdp.files import CheckpointError
from tokenmdp.losses import clipped_policy_loss, clipped_value_loss, entropy_bonus
from tokenmdp.models.lora import WithoutAdapters, add_adapters
from tokenmdp.models.policy import CausalLMPolicy, resolve_dtype
from tokenmdp.returns import explained_variance, full_return, gae, vine_advantages, whiten
from tokenmdp.rollouts.collecting import collect, credited_envs
from tokenmdp.rollouts.continuations import monte_carlo_values
from tokenmdp.training import checkpoint
from tokenmdp.training.batches import FORWARD_SLOTS, by_length, row_lengths
from tokenmdp.training.processes import processes_of
from tokenmdp.types import Rollout
from tokenmdp.wrappers import find_credit_wrapper

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = checkpoint.Format("ppo", 2)  # 2: the value head has a learning rate of its own
logger = logging.getLogger(__name__)

Metrics = dict[str, float]
Estimator = Literal["reward_to_go", "full_return", "vine"]


@dataclass(frozen=True)
class PPOConfig:
    """The numbers of one run. Defaults fit the bundled 4.5M-parameter policy with 64 episodes of 16 tokens."""

    seed: int = 1
    learning_rate: float = 3e-5  # of the language model
    vf_learning_rate: float = 3e-3  # of the value head, which starts at zero; README.md, detail 17
    anneal_lr: bool = False  # both, linearly to 0 over total_updates
    total_updates: int | None = None  # only for anneal_lr
    adam_eps: float = 1e-8
    update_epochs: int = 4
    num_minibatches: int = 4
    max_grad_norm: float = 1.0
    target_kl: float | None = None  # ends an update's epochs once approx_kl of a minibatch exceeds it

    estimator: Estimator = "reward_to_go"  # of advantages; README.md, details 10 to 12
    vine_rollouts: int = 4  # only for vine: continuations of each prefix
    gamma: float = 1.0  # below 1 credit that arrives early counts more, whatever the method
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    clip_coef_value: float | None = 1.0  # in units of the score; None: no clipping
    vf_coef: float = 0.1
    ent_coef: float = 0.0

    kl_coef: float = 0.3  # the initial one, if kl_target is set
    kl_target: float | None = None  # nats per sequence; kl_coef is adapted so that kl approaches it
    kl_horizon: int = 10_000  # episodes over which the coefficient adapts

    temperature: float = 1.0
    top_k: int = 0  # 0: every token
    dtype: str = "auto"  # of the forwards: "auto", "float32", "bfloat16"; weights stay float32
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    gradient_checkpointing: bool = False  # recomputes activations in the backward pass: less memory, more time
    lora_rank: int = 0  # above 0: only adapters of this rank and the value head learn; see `tokenmdp.models.lora`
    lora_alpha: float = 16.0  # the adapters' output is scaled by lora_alpha / lora_rank
    lora_target_modules: str = "all-linear"  # or a regular expression for names of layers

    def __post_init__(self) -> None:
        if self.estimator not in get_args(Estimator):
            raise ValueError(f"estimator is {self.estimator!r}; choose one of {', '.join(get_args(Estimator))}")
        if self.estimator != "reward_to_go" and self.gamma != 1:
            raise ValueError(f"gamma is {self.gamma}; estimator={self.estimator!r} does not discount: set gamma=1")
        positive = (
            "learning_rate",
            "vf_learning_rate",
            "update_epochs",
            "num_minibatches",
            "max_grad_norm",
            "clip_coef",
        )
        for name in (*positive, "kl_horizon", "vine_rollouts", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name in ("update_epochs", "num_minibatches", "vine_rollouts", "lora_rank"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number")
        for name in ("kl_coef", "vf_coef", "ent_coef", "lora_rank"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("kl_target", "target_kl", "clip_coef_value"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive, or None to switch it off")
        if self.anneal_lr and not self.total_updates:
            raise ValueError(
                "anneal_lr lowers the learning rate over total_updates: set total_updates to the run's length"
            )


class PPO:
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

    def __init__(
        self,
        policy: str | Any,
        envs: VectorEnv,
        config: PPOConfig | None = None,
        reference: str | Any | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.envs, self.config, self.processes = envs, config or PPOConfig(), processes_of(accelerator)
        cfg, task = self.config, credited_envs(envs).task
        if len(set(shares := self.processes.gather(envs.num_envs))) > 1:
            raise ValueError(
                f"num_envs is {shares} in the {len(shares)} processes; all must play the same number of episodes"
            )
        self.num_episodes = sum(shares)
        if self.num_episodes < cfg.num_minibatches:
            raise ValueError(
                f"num_envs={self.num_episodes} does not fill num_minibatches={cfg.num_minibatches}; raise num_envs or "
                "lower num_minibatches (in the command, --num-envs or --ppo num_minibatches=...)"
            )
        credit = find_credit_wrapper(envs)
        if cfg.estimator == "vine" and credit is not None and not credit.credit.conserves_return:
            raise ValueError(
                f"estimator='vine' values prefixes by the score alone and {credit.credit.name} credit adds other "
                "rewards; choose a credit method that conserves the return, or another estimator"
            )
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
        groups = self.policy.parameter_groups(cfg.learning_rate, cfg.vf_learning_rate)
        self.optimizer = torch.optim.Adam(groups, eps=cfg.adam_eps, fused=True)
        self.learner = self.processes.prepare(self.policy, self.reference, self.optimizer)
        self.generator = torch.Generator(device).manual_seed(cfg.seed)  # sampling and minibatches
        self.kl_coef = cfg.kl_coef
        self.num_updates_done = 0
        self.history: list[Metrics] = []

    def learn(self, num_updates: int, callback: Callable[[Metrics], None] | None = None) -> PPO:
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

            # 1 Sample: one episode per row, scored by the reward model, credited by the wrapper.
            rollout, metrics = collect(
                self.envs,
                self.policy,
                self.reference,
                self.generator,
                seed=environment_seed(cfg.seed) if self.num_updates_done == 0 else None,
                rows_per_forward=math.ceil(self.envs.num_envs / cfg.num_minibatches),
                processes=self.processes,
            )
            mask = rollout.response_mask

            # 2 Rewards: credit and, apart from it, the KL penalty, token by token.  (N, H)
            penalties = -self.kl_coef * kl_k1(rollout.logprobs, rollout.ref_logprobs)

            # 3 Advantages. Whitening rewards would break sum == score, so only advantages are whitened.
            advantages, returns = self._advantages(rollout, penalties)
            metrics["explained_variance"] = explained_variance(rollout.values, returns, mask).item()

            # 4 Epochs of minibatches.
            metrics |= self._optimise(rollout, whiten(advantages, mask), returns)

            # 5 Log, then adapt the coefficient that the next update uses.
            self.num_updates_done += 1
            seconds = time.perf_counter() - started
            metrics |= {
                "update": self.num_updates_done,
                "kl_coef": self.kl_coef,
                "learning_rate": learning_rate,
                "seconds": seconds,
                "tokens_per_second": metrics["response_tokens"] / seconds,
            }
            if cfg.kl_target is not None:
                self.kl_coef = adapt_kl_coef(
                    self.kl_coef, metrics["kl"], cfg.kl_target, cfg.kl_horizon, self.num_episodes
                )
            self.history.append(metrics)
            if not self.processes.rank and (warning := critic_warning(self.history, cfg)):
                logger.warning(warning)
            if callback is not None:
                callback(metrics)
        return self

    def _schedule(self) -> float:
        """Set this update's learning rates and return the language model's.

        They depend only on the number of updates done, so that a resumed run has the same rates.
        """
        cfg = self.config
        left = 1 - self.num_updates_done / cfg.total_updates if cfg.anneal_lr and cfg.total_updates else 1.0
        body, head = self.optimizer.param_groups
        body["lr"], head["lr"] = cfg.learning_rate * left, cfg.vf_learning_rate * left
        return body["lr"]

    def _advantages(self, rollout: Rollout, penalties: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Advantages and the value function's targets by ``config.estimator``, (N, H) each."""
        cfg, values, mask = self.config, rollout.values, rollout.response_mask
        if cfg.estimator == "full_return":
            return full_return(rollout.token_rewards + penalties, values, mask)
        if cfg.estimator == "reward_to_go":
            return gae(rollout.token_rewards + penalties, values, mask, cfg.gamma, cfg.gae_lambda)
        prefix_values = monte_carlo_values(
            self.envs, self.policy, rollout, cfg.vine_rollouts, self.generator, self.processes
        )
        advantages, returns = gae(penalties, values, mask, cfg.gamma, cfg.gae_lambda)  # the critic sees no score
        return advantages + vine_advantages(rollout.scores, prefix_values, mask), returns

    def _optimise(self, rollout: Rollout, advantages: torch.Tensor, returns: torch.Tensor) -> Metrics:
        """``update_epochs`` passes over the rollout in ``num_minibatches`` random parts of its episodes."""
        cfg, records = self.config, []
        lengths = row_lengths(rollout)
        # Processes wait for each other in every backward, so all must have the same number of them.
        forward_slots = FORWARD_SLOTS if self.processes.size == 1 else math.inf
        for minibatch in self._minibatches(len(rollout.scores)):
            self.optimizer.zero_grad()
            numbers = torch.zeros(6, device=rollout.scores.device)
            rows, weight = self.processes.part(minibatch, rollout.response_mask)
            tokens = lengths[rows.cpu(), 1].sum()
            for members, old in by_length(rollout, rows, lengths, forward_slots):
                mask = old.response_mask
                share = weight * mask.sum() / tokens  # losses are means over tokens
                responses = slice(mask.shape[1])
                adv, targets = advantages[members, responses], returns[members, responses]
                new = self.learner(old.input_ids, old.attention_mask, old.prompt_slots, old.support)
                policy = clipped_policy_loss(new.logprobs, old.logprobs, adv, mask, cfg.clip_coef)
                value_loss = clipped_value_loss(new.values, old.values, targets, mask, cfg.clip_coef_value)
                entropy = entropy_bonus(new.entropy, mask)
                loss = policy.loss + cfg.vf_coef * value_loss
                if cfg.ent_coef:  # a zero would still cost a pass over the vocabulary in the backward
                    loss = loss - cfg.ent_coef * entropy
                (loss * share).backward()  # the gradients are averaged over processes
                losses = (policy.approx_kl, loss, policy.loss, value_loss, entropy, policy.clip_fraction)
                numbers += torch.stack([number.detach() for number in losses]) * share
            # Apart: under one norm a wrong value would shrink the step of the policy.
            norms = [
                self.processes.clip_grad_norm(group["params"], cfg.max_grad_norm)
                for group in self.optimizer.param_groups
            ]
            numbers = self.processes.reduce_mean(numbers)
            records.append(torch.cat([numbers, torch.stack(norms)]))
            if cfg.target_kl is not None and numbers[0] > cfg.target_kl:
                break  # before the step: it would go further in the direction that is already too far
            self.optimizer.step()
        names = (
            "approx_kl", "loss", "policy_loss", "value_loss", "entropy", "clip_fraction", "grad_norm", "vf_grad_norm",
        )  # fmt: skip
        metrics = dict(zip(names, torch.stack(records).mean(0).tolist(), strict=True))  # one transfer per update
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(
                f"update {self.num_updates_done + 1} gave {metrics}; load the last checkpoint and lower learning_rate "
                f"(now {cfg.learning_rate}) or vf_learning_rate (now {cfg.vf_learning_rate}), or set dtype='float32'"
            )
        return metrics | {"minibatches": len(records)}

    def _minibatches(self, num_episodes: int) -> Any:
        for _ in range(self.config.update_epochs):
            order = torch.randperm(num_episodes, generator=self.generator, device=self.generator.device)
            yield from order.tensor_split(self.config.num_minibatches)  # chunk(4) makes 3 parts of 5 episodes

    def save(self, directory: str | Path) -> None:
        """Write a checkpoint that ``from_pretrained`` reads and `load` continues from.

        Its files: `tokenmdp.training.checkpoint`.

        The directory appears whole or not at all: an interrupted save leaves the previous checkpoint. With several
        processes, all call this and the first one writes.

        Raises:
            CheckpointError: the directory holds something else, or cannot be written.
        """
        checkpoint.save(self, directory, FORMAT, {"kl_coef": self.kl_coef})

    @classmethod
    def load(
        cls, directory: str | Path, envs: VectorEnv, *, accelerator: Accelerator | None = None, **overrides: Any
    ) -> PPO:
        """Resume from `save`: on the same machine in float32, ``learn(n)`` continues bit for bit.

        Args:
            directory: What `save` wrote.
            envs: The same environments: same arguments, same num_envs (over all processes, whose number may change).
            accelerator: As in the constructor.
            **overrides: Fields of `PPOConfig` to change, such as ``device="cpu"`` (not those that are saved state).

        Raises:
            CheckpointError: the checkpoint is missing, damaged or from another program, or ``envs`` has other rows.
        """
        saved_state = {"seed", "kl_coef", "adam_eps", "lora_rank", "lora_alpha", "lora_target_modules"}
        if fixed := sorted(saved_state & overrides.keys()):
            raise ValueError(f"{', '.join(fixed)} cannot change on resuming: the saved state holds the current value")
        saved = checkpoint.read(directory, FORMAT, processes_of(accelerator))
        try:
            config = PPOConfig(**saved.config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.path / FORMAT.config_file} does not fit this version ({error})") from error
        reference = None if saved.reference is None else str(saved.reference)
        agent = cls(str(saved.policy), envs, replace(config, **overrides), reference, accelerator=accelerator)
        agent.kl_coef = checkpoint.restore(agent, saved, extra=("kl_coef",))["kl_coef"]
        return agent


CRITIC_DUE = 20  # updates after which a critic explains some of the returns
CRITIC_LEAST = 0.1  # explained variance


def critic_warning(history: list[Metrics], config: PPOConfig) -> str | None:
    """A warning after update `CRITIC_DUE` if the critic explains less than `CRITIC_LEAST` of returns that vary.

    A method that gives rewards early needs a critic less, so with such a critic a comparison of credit methods
    measures the critic. With ``estimator="vine"`` the critic sees only the KL penalty, and no warning is given.

    >>> critic_warning(20 * [{"explained_variance": 0.6, "score_std": 1.0}], PPOConfig()) is None
    True
    """
    if len(history) != CRITIC_DUE or config.estimator == "vine":
        return None
    recent = history[CRITIC_DUE // 2 :]
    explained, spread = (
        sum(record[key] for record in recent) / len(recent) for key in ("explained_variance", "score_std")
    )
    if explained >= CRITIC_LEAST or spread < 1e-6:
        return None
    change = "lower" if explained < -CRITIC_LEAST else "raise"
    return (
        f"the critic explains {explained:.2f} of the variance of the returns in updates {CRITIC_DUE // 2 + 1} to "
        f"{CRITIC_DUE}, though scores vary: advantages are hardly better than returns; {change} vf_learning_rate (now "
        f"{config.vf_learning_rate:g}), or play more episodes per update"
    )


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
