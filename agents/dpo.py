"""DPO: a policy learns from comparisons alone; the reward that it implies takes the place of a reward model.

One update: the log-probabilities of chosen and rejected responses, those of the frozen reference (scored once, before
training) taken off; the loss of their difference; one step. With a margin, MODPO: other objectives' reward models say
how much of the preference is theirs. Reads top to bottom.

    from tokenmdp.agents.dpo import DPO, DPOConfig
    from tokenmdp.models.loading import load_tokenizer
    from tokenmdp.preferences import read_preferences

    records = read_preferences("runs/pairs.jsonl", load_tokenizer("imdb-tiny"))
    agent = DPO("imdb-tiny", records, DPOConfig(dpo_beta=0.1, total_updates=90))
    agent.learn(90)

Sources: those of `tokenmdp.preference_losses.dpo_loss`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tokenmdp.agents.data import DataConfig, Example
from tokenmdp.agents.policy_data import PolicyFromData
from tokenmdp.preference_losses import dpo_loss
from tokenmdp.preferences import Comparison, Preference, pairs_of
from tokenmdp.reward_models import load_reward_model
from tokenmdp.training.checkpoint import Format
from tokenmdp.training.typed import require
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DPOConfig(DataConfig):
    """The numbers of one run. Defaults fit the bundled 4.5M-parameter policy and a few thousand pairs."""

    batch_size: int = 32  # pairs per update
    dpo_beta: float = 0.1  # how closely the policy stays with the reference
    form: Literal["sigmoid", "ipo", "robust"] = "sigmoid"  # robust: label_smoothing is the share of wrong labels
    label_smoothing: float = 0.0  # below 0.5
    length_normalised: bool = False  # divides log-probabilities by the number of tokens
    margin: str = ""  # MODPO: the reward model of the other objective, in the same unit as the labels' log-odds
    objective_weight: float = 1.0  # MODPO: of the objective that was labelled; the other one has the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "dpo_beta", "positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it lies in [0, 0.5)")
        if self.form == "ipo" and (self.label_smoothing or self.margin):
            raise ValueError('form="ipo" uses no label_smoothing and no margin; leave them out, or take another form')
        if self.form == "robust" and not self.label_smoothing:
            raise ValueError('form="robust" needs label_smoothing, the share of wrong labels; or take "sigmoid"')
        if not 0 < self.objective_weight <= 1:
            raise ValueError(f"objective_weight is {self.objective_weight}; it lies in (0, 1]")
        if bool(self.margin) != (self.objective_weight < 1):
            raise ValueError(
                f"margin is {self.margin!r} and objective_weight {self.objective_weight:g}; two objectives need both: "
                "a reward model, and a weight below 1"
            )


class DPO(PolicyFromData):
    """Direct preference optimization.

    Args:
        policy: Alias, directory or hub name of a causal language model, or such a model (trained in place).
        records: Comparisons and rankings, in the tokens of that model; a ranking counts pair by pair.
        config: The run's numbers.
        reference: Name or model that the policy stays close to; default ``policy`` as it starts.
        accelerator: For a run in several processes.
        tokenizer: Of a policy that is an object; that of a named one is loaded.
    """

    config_class = DPOConfig
    format = Format("dpo", 1)
    learns_from = "comparisons"
    config: DPOConfig

    def __init__(
        self,
        policy: str | Any,
        records: Sequence[Preference],
        config: DPOConfig | None = None,
        reference: str | Any | None = None,
        accelerator: Accelerator | None = None,
        tokenizer: Any = None,
    ) -> None:
        examples = [
            Example(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids), facts=pair.margin or 0.0)
            for pair in pairs_of(records)
        ]
        super().__init__(policy, examples, config, reference, accelerator, tokenizer)
        with self.processes.whole_weights(self.reference):
            self.ref_logprobs = self._of_all(self._reference_logprobs, examples)
        self.margins = torch.tensor([one.facts for one in examples], dtype=torch.float64)
        if self.config.form == "ipo" and self.margins.any():
            raise ValueError(
                'records have margins, which form="ipo" does not use; take another form, or leave them out'
            )
        self.other = None
        if self.config.margin:
            self.other = load_reward_model(self.config.margin, device=str(self.generator.device))
            self.other.check_tokenizer(self.tokenizer)
            scores = self._of_all(self._other_scores, examples)
            gaps = scores[:, 0] - scores[:, 1]
            logger.info("the other objective's differences have sd %.2f; they should be log-odds", float(gaps.std()))
            self.margins += (1 - self.config.objective_weight) * gaps

    def losses(self, rows: np.ndarray, episodes: Episode) -> dict[str, torch.Tensor]:
        """The loss of the pairs; how often the implicit reward agrees; log-ratios of both responses, in nats."""
        cfg, every = self.config, self._sequence_logprobs(self.learner, episodes).view(-1, 2)  # (n, 2)
        ref = self.ref_logprobs[rows].to(every)
        loss = dpo_loss(
            every[:, 0], every[:, 1], ref[:, 0], ref[:, 1], cfg.dpo_beta, cfg.label_smoothing,
            form=cfg.form, margin=self.margins[rows].to(every), objective_weight=cfg.objective_weight,
        )  # fmt: skip
        ratios = (every - ref).detach()
        gap = ratios[:, 0] - ratios[:, 1]
        return {
            "loss": loss,
            "accuracy": ((gap > 0).float() + (gap == 0).float() / 2).mean(),
            "chosen_logratio": ratios[:, 0].mean(),
            "rejected_logratio": ratios[:, 1].mean(),
        }

    @property
    def coin_flips(self) -> float | None:
        """The share of labels that it takes for coin flips; None: what it implies are not log-odds of the labels."""
        smoothing, form = self.config.label_smoothing, self.config.form
        return 2 * smoothing if form == "robust" or (form == "sigmoid" and not smoothing) else None

    def score_pairs(self, pairs: Sequence[Comparison]) -> torch.Tensor:
        """The rewards that the policy implies, ``dpo_beta`` times the log-ratio to the reference.

        With a margin, those of the labelled objective: less the other one's share, divided by ``objective_weight``.

        Args:
            pairs: n comparisons.

        Returns:
            (n, 2) of chosen and rejected responses, float32 on the CPU.
        """
        cfg = self.config
        examples = [Example(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
        policy = self._of_all(lambda episodes: self._sequence_logprobs(self.policy, episodes), examples)
        rewards = cfg.dpo_beta * (policy - self._of_all(self._reference_logprobs, examples))
        if self.other is not None:
            rewards = rewards - (1 - cfg.objective_weight) * self._of_all(self._other_scores, examples)
        return rewards / cfg.objective_weight

    def _sequence_logprobs(self, model: Any, episodes: Episode) -> torch.Tensor:
        found = self.logprobs(model, episodes).sum(-1)
        return found / episodes.response_mask.sum(-1) if self.config.length_normalised else found

    def _reference_logprobs(self, episodes: Episode) -> torch.Tensor:
        return self._sequence_logprobs(self.reference, episodes)

    def _other_scores(self, episodes: Episode) -> torch.Tensor:
        assert self.other is not None
        return self.other(episodes).score

    def _of_all(self, numbers: Callable[[Episode], torch.Tensor], examples: Sequence[Example]) -> torch.Tensor:
        """A number of every response, (pairs, 2) float32 on the CPU, computed a batch at a time."""
        size = self.config.batch_size
        with torch.no_grad():
            parts = (examples[start : start + size] for start in range(0, len(examples), size))
            return torch.cat([numbers(self.lay_out(part)).view(-1, 2).cpu() for part in parts])
