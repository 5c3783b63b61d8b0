"""f-DPG: a policy approaches a target distribution, in any of four divergences. No critic.

One update: episodes of a proposal q, which is the policy or an earlier state of it; their probabilities under policy
and frozen reference, from the same forward; the target's normaliser Z and each response's pseudo-reward; REINFORCE
steps, weighted by pi / q. Reads top to bottom.

    import gymnasium as gym
    from tokenmdp.agents.f_dpg import FDPG, FDPGConfig
    from tokenmdp.wrappers import vector

    envs = gym.make_vec("tokenmdp:TextGen-IMDb-v0", num_envs=256, autoreset_mode="Disabled")
    agent = FDPG("imdb-tiny", vector.SparseReward(envs), FDPGConfig(target="word:excellent", divergence="js", seed=1))
    agent.learn(num_updates=40)

A target is about whole responses, so how a score is spread over tokens makes no difference. With the reverse KL and
the target ``score/BETA`` this is REINFORCE on ``score - BETA * KL``, PPO's objective.

Sources: Khalifa et al., "A Distributional Approach to Controlled Text Generation", ICLR 2021 (DPG and the lagged
proposal); Korbak et al., "On Reinforcement Learning and Distribution Matching for Fine-Tuning Language Models with no
Catastrophic Forgetting", NeurIPS 2022 (the baseline); Go et al., "Aligning Language Models with Preferences through
f-divergence Minimization", ICML 2023 (f-DPG).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from tokenmdp.agents.base import Agent, AgentConfig, Metrics
from tokenmdp.agents.learner import without_value_head
from tokenmdp.divergences import f_over_t, kl_k3, pseudo_reward
from tokenmdp.models.token_distribution import TokenScores
from tokenmdp.models.tokens import distinct_n
from tokenmdp.rollouts.scoring import score_under
from tokenmdp.targets import Responses, Target, TargetError, read_target
from tokenmdp.training.checkpoint import Format
from tokenmdp.training.typed import require
from tokenmdp.types import Episode, Rollout, response_tokens

REMEDY = "play more episodes per update (--num-envs), or begin with an easier target"
MOST_EMPTY = 10  # updates without any response that meets the target, after which a run ends with an error
LARGEST_LOG = 700.0  # of exp in float64


@dataclass(frozen=True)
class FDPGConfig(AgentConfig):
    """The numbers of one run. Defaults fit the bundled 4.5M-parameter policy with a few hundred episodes per update."""

    unused: ClassVar[tuple[str, ...]] = ("clip_coef", "kl_coef", "kl_target", "kl_horizon", "top_k")

    target: str = "score/0.5"  # such as word:great, words:a,b, reward:>2, score/0.5, word:great@0.5; agents/README.md
    divergence: Literal["forward-kl", "reverse-kl", "js", "tv"] = "js"  # measures the distance
    normaliser: Literal["shared", "prompt"] = "shared"  # one Z for all prompts, or one for each
    responses_per_prompt: int = 1  # K, divides num_envs; at least 2 with one Z for each prompt
    weight_clip: float | None = None  # importance weights above it are cut, which biases; None: none are
    baseline_updates: int = 5  # past updates whose mean pseudo-reward is the baseline
    moment_samples: int = 2048  # responses before the first update, for a target with moments
    proposal: Literal["policy", "lagged"] = "policy"  # who writes: the policy, or the nearest one to the target so far

    update_epochs: int = 1  # passes over the episodes of an update
    num_minibatches: int = 2  # steps per pass

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "responses_per_prompt weight_clip baseline_updates moment_samples", "positive")
        if self.normaliser == "prompt" and self.responses_per_prompt < 2:
            raise ValueError(
                "normaliser='prompt' needs several responses, and responses_per_prompt is 1; set it to at least 2"
            )
        for part in read_target(self.target).fixed:
            part.check_divergence(self.divergence)


class FDPG(Agent):
    """Distributional policy gradients for f-divergences.

    Arguments and attributes as `Agent`'s, and:

    Attributes:
        target: `tokenmdp.targets.Target`; with moments it is fitted in the first update. Assign one of your own
            before the first update, such as ``BinaryTarget(of_texts(function, "name", is_binary=True))``, and again
            after `load`, which knows its name alone.
        proposal: Weights of the lagged proposal by name; empty: the policy itself.
        z_sums: What Z is known from: prompt (as token ids), or "" -> [log of the sum of P / q, number of responses].
        baseline: Mean pseudo-reward of past updates.
        skipped_updates: Updates without a step, as no response so far had P > 0.
    """

    config_class = FDPGConfig
    format = Format("f-dpg", 1)
    uses_credit = False
    state = (
        "lambdas", "z_sums", "baseline", "baseline_count", "skipped_updates", "target_name", "proposal", "proposal_age",
    )  # fmt: skip
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"learning_rate": 1e-4},
        "smoke": {"learning_rate": 3e-3, "target": "word:great"},
    }
    config: FDPGConfig

    def check(self) -> None:
        """Refuse rows that are not whole groups; set the state up."""
        self.check_groups(self.config.responses_per_prompt)
        self.wanted = read_target(self.config.target)
        self.target: Target | None = None if self.wanted.moments else self.wanted.fitted()
        self.lambdas: dict[str, float] = {}
        self.z_sums: dict[str, list[float]] = {}
        self.baseline, self.baseline_count, self.skipped_updates, self.proposal_age = 0.0, 0, 0, 0
        self.target_name, self.proposal = "", dict[str, torch.Tensor]()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The language model or its adapters; the value head is not used and stays as it is."""
        return without_value_head(self.policy, self.config.learning_rate)

    def finish(self, metrics: Metrics) -> None:
        """Nothing: there is no coefficient to adapt."""

    def warning(self) -> str | None:
        """A warning after the first and after the last update if no response so far met the target."""
        message = f"no response so far meets the target {self.target_name!r}, so no step was taken; {REMEDY}"
        return message if self.num_updates_done == self.skipped_updates in (1, self.config.total_updates) else None

    def update(self) -> Metrics:
        """One update; README.md beside this file defines the metrics."""
        cfg, target = self.config, self._fitted_target()

        # 1 Sample from q.
        rollout, log_q, metrics = self._play()
        log_pi, log_a = (_whole(part, rollout.response_mask) for part in (rollout.logprobs, rollout.ref_logprobs))
        shares = (log_pi - log_q).softmax(0)  # pi / q, of sum 1: means with them are the policy's.  (N,)

        # 2 The target p = P / Z; Z is the mean of P / q over all responses so far.  (N,) float64
        responses = self._responses(rollout)
        log_weights = target.log_unnormalised(log_a, responses) - log_q  # log P / q
        log_z = self._log_z(rollout, log_weights)
        known = log_z > -torch.inf  # False: no response (to this prompt) has met the target, so p is unknown
        log_p = torch.where(known, log_weights + log_q - log_z, 0.0)
        log_t = torch.where(known, log_pi - log_p, 0.0)  # t = pi / p
        metrics |= self._measured(rollout, target, responses, log_weights, log_z, known, log_t, shares)
        metrics["kl"] = (shares @ (log_pi - log_a)).item()
        if cfg.proposal == "lagged":
            distance = _mean((1 - (log_p - log_q).exp()).clamp(min=0), known)  # total variation between q and p
            metrics |= {"proposal_tv": distance, "proposal_age": self.proposal_age}
            if metrics["tv"] < distance or not self.proposal:  # nearer to p than q, or the first update
                self.proposal, self.proposal_age = self._learned(), 0  # before the steps, as it was measured
            self.proposal_age += 1

        # 3 The baseline: past pseudo-rewards, so that it is independent of these responses. The first time, their mean:
        # it makes the gradient shorter by 1/N, and no other.
        if not known.any():
            return metrics | self._skip(len(known))
        mean_reward = _mean(pseudo_reward(cfg.divergence, log_t), known, shares)
        baseline = self.baseline if self.baseline_count else mean_reward
        self.baseline_count = min(self.baseline_count + 1, cfg.baseline_updates)
        self.baseline += (mean_reward - self.baseline) / self.baseline_count

        # 4 Steps: -mean_i (pi / q)_i (-f'(t_i) - baseline) log pi_i. Per token, as in PPO, so that max_grad_norm fits.
        length = metrics["response_length"]

        def losses(new: TokenScores, old: Rollout, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            kept = old.response_mask
            seq_logprobs = _whole(new.logprobs, kept)  # (n,) float64
            now = seq_logprobs.detach()
            weights = (now - log_q[rows]).exp()  # exactly 1 on paper in the first step, up to rounding in fact
            used = weights if cfg.weight_clip is None else weights.clamp(max=cfg.weight_clip)
            # 0 before the product: where Z is unknown the pseudo-reward may be infinite.
            advantages = torch.where(known[rows], pseudo_reward(cfg.divergence, now - log_p[rows]) - baseline, 0.0)
            gains = used * advantages * seq_logprobs
            moved = kl_k3(torch.zeros_like(new.logprobs), torch.where(kept, new.logprobs - old.logprobs, 0.0)).detach()
            return {
                "approx_kl": _whole(moved, kept).mean() / length, "loss": -gains.mean() / length,
                "entropy": _whole(new.entropy, kept).mean() / length, "weight": weights.mean(),
                "weight_square": weights.square().mean(), "clip_fraction": (used < weights).double().mean(),
            }  # fmt: skip

        taken = self.take_steps(rollout, losses, counts=torch.ones_like(log_q))
        taken["ess"] = taken.pop("weight") ** 2 / taken.pop("weight_square")
        return metrics | {"baseline": baseline} | taken

    def _play(self, seeded: bool = True) -> tuple[Rollout, torch.Tensor, Metrics]:
        """Episodes of the proposal q, and log q of them, (N,).

        Log-probabilities, in the rollout the policy's, are of a forward over whole texts, as the reference's are. Those
        of the sampler's cache differ by rounding, which alone would decide the sign of t - 1 near 1.
        """
        own = self._learned() if self.proposal else {}
        self._put(self.proposal)
        try:
            rollout, metrics = self.play(self.config.responses_per_prompt, seeded=seeded)
            scored = self._scored(rollout)
        finally:
            self._put(own)
        log_q = _whole(scored, rollout.response_mask)
        return rollout._replace(logprobs=self._scored(rollout) if own else scored), log_q, metrics

    def _scored(self, rollout: Rollout) -> torch.Tensor:
        with self.processes.whole_weights(self.policy):
            return score_under(self.policy, rollout, self.rows_per_forward)

    def _learned(self) -> dict[str, torch.Tensor]:
        """A copy of the weights that learn, by name."""
        names = {name for name, weight in self.policy.named_parameters() if weight.requires_grad}
        state = self.processes.policy_state(self.policy)
        return {name: weight.detach().clone() for name, weight in state.items() if name in names}

    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        if weights:
            self.processes.load_policy_state(self.policy, weights)

    def _responses(self, rollout: Rollout) -> Responses:
        episodes = Episode(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
        return Responses.of(episodes, self.tokenizer, rollout.scores)

    def _fitted_target(self) -> Target:
        """The target; its moments are fitted once, on samples of the policy before its first step."""
        if self.target is None and self.lambdas:
            self.target = self.wanted.with_lambdas(self.lambdas)
        if self.target is None:
            texts: list[str] = []
            parts = []
            while len(texts) < self.config.moment_samples:
                rollout, log_q, _ = self._play(seeded=not texts)
                texts += self._responses(rollout).texts
                ratio = _whole(rollout.ref_logprobs, rollout.response_mask) - log_q
                parts.append(torch.stack([rollout.scores.double(), ratio]).cpu())
            scores, log_weights = torch.cat(parts, 1)
            self.target = self.wanted.fitted(Responses(texts, scores), log_weights)
            self.lambdas = dict(self.target.factors()[-1].lambdas)  # type: ignore[attr-defined]
        self.target.check_divergence(self.config.divergence)
        if self.target_name not in ("", self.target.name):
            raise TargetError(
                f"this run began with {self.target_name!r}; assign that to agent.target, not {self.target.name!r}"
            )
        self.target_name = self.target.name
        return self.target

    def _log_z(self, rollout: Rollout, log_weights: torch.Tensor) -> torch.Tensor:
        """Add a batch to what Z is known from; the log of ``mean P / q`` for the prompt of each response, (N,)."""
        keys = [""] * len(log_weights)
        if self.config.normaliser == "prompt":
            seen = rollout.attention_mask[:, : rollout.prompt_slots].cpu()
            prompts = zip(rollout.input_ids[:, : rollout.prompt_slots].cpu(), seen, strict=True)
            keys = [" ".join(map(str, ids[kept].tolist())) for ids, kept in prompts]
        rows: dict[str, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        for key, members in rows.items():
            total, count = self.z_sums.get(key, [-math.inf, 0])
            new = torch.cat([log_weights.new_tensor([total]), log_weights[members]]).logsumexp(0).item()
            self.z_sums[key] = [new, count + len(members)]
        means = {key: self.z_sums[key][0] - math.log(self.z_sums[key][1]) for key in rows}
        return log_weights.new_tensor([means[key] for key in keys])

    def _measured(
        self, rollout: Rollout, target: Target, responses: Responses, log_weights: torch.Tensor, log_z: torch.Tensor,
        known: torch.Tensor, log_t: torch.Tensor, shares: torch.Tensor,
    ) -> Metrics:  # fmt: skip
        """How near the policy is to the target, and how much the estimates rest on."""
        found = {name: (shares @ numbers.to(shares)).item() for name, numbers in target.measures(responses).items()}
        found["tv"] = _mean((1 - (-log_t).exp()).clamp(min=0), known, shares)  # in [0, 1]
        divergences = {"forward_kl": "forward-kl", "js": "js"}
        if not target.has_zeros:
            divergences["reverse_kl"] = "reverse-kl"
        for metric, name in divergences.items():
            values = f_over_t(name, log_t)  # type: ignore[arg-type]
            found[metric] = _mean(values, known, shares) / (2 if name == "js" else 1)
        concentration = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp() / len(log_weights)
        return found | {
            "z": log_z.clamp(max=LARGEST_LOG).exp().mean().item(),
            "unknown_z": 1 - known.double().mean().item(),
            "target_ess": concentration.nan_to_num(0.0).item(),
            "distinct_2": distinct_n(response_tokens(rollout), 2),
            "entropy": -(rollout.logprobs.sum() / rollout.response_mask.sum()).item(),  # of samples, if no step follows
            "skipped_updates": self.skipped_updates,
        }

    def _skip(self, episodes: int) -> Metrics:
        """No response so far has P > 0: count it, take no step."""
        self.skipped_updates += 1
        if self.skipped_updates >= MOST_EMPTY and self.num_updates_done + 1 == self.skipped_updates:
            raise TargetError(
                f"none of {self.skipped_updates * episodes} responses meets the target {self.target_name!r}, so there "
                f"is nothing to learn from; {REMEDY}"
            )
        names = ("baseline", "approx_kl", "loss", "clip_fraction", *self.norms, "minibatches")
        return dict.fromkeys(names, 0.0) | {"ess": 1.0, "skipped_updates": self.skipped_updates}


def _whole(per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sum over a response's tokens in float64, in which whole responses are compared; (n, T) -> (n,)."""
    return torch.where(mask, per_token, 0.0).double().sum(-1)


def _mean(values: torch.Tensor, known: torch.Tensor, shares: torch.Tensor | None = None) -> float:
    """The mean of the known ones of (N,), each with its share; 0 if none is known."""
    weights = known.double() if shares is None else torch.where(known, shares, 0.0)
    return (torch.where(known, values, 0.0) @ weights / weights.sum()).item() if known.any() else 0.0
