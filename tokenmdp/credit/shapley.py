"""Credit by cooperative game: what each token, word, clause or sentence is worth to the score, over all coalitions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenmdp.credit.base import MissingResource, Resources
from tokenmdp.credit.deletion import scores_of_kept
from tokenmdp.credit.draws import generator_for
from tokenmdp.credit.games import Plan, make_plan
from tokenmdp.credit.options import check_whole
from tokenmdp.credit.spans import UNITS, unit_ids
from tokenmdp.credit.weights import check_credit_beta, conserve
from tokenmdp.types import Credit, Episode, Outcome


@dataclass(frozen=True)
class ShapleyCredit:
    """``token_rewards[t] = credit_beta * phi[unit of t] / (tokens of the unit) + ...``, phi the units' Shapley values.

    The units of a response play the game ``v(S) = score of the prompt and the response with the units outside S
    deleted``. phi sums to ``score - v(nothing)``; the score of the prompt alone and ``1 - credit_beta`` of the sum go
    to the last token (see `conserve`). All 2**n deletions are scored where ``budget`` allows, so 1024 is exact up to 10
    units; beyond it permutations are sampled. Reports ``reward_calls``, the texts that the reward model read for it,
    and ``standard_error``, the mean of that of phi over the units (0 where exact).

    The permutations are drawn from ``seed`` and the text's own token ids, so a text's credit does not depend on the
    batch, and the sampling errors of different texts are independent.

    Source: Cao et al., "SCAR: Shapley Credit Assignment for More Efficient RLHF", 2025; the budget is ours.

    Args:
        credit_beta: 0 is sparse, 1 is dense only.
        budget: the most texts that the reward model reads per episode; n units need min(2**n, 2 * n).
        units: "tokens", "words", "clauses" or "sentences"; see `tokenmdp.credit.spans`.
        seed: of the sampled permutations.
        rows_per_forward: texts that the reward model reads at a time.
    """

    credit_beta: float = 1.0
    budget: int = 1024
    units: str = "tokens"
    seed: int = 0
    rows_per_forward: int = 256
    name: ClassVar[str] = "shapley"
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reward_calls"})

    def __post_init__(self) -> None:
        check_credit_beta(self.credit_beta)
        if self.units not in UNITS:
            raise ValueError(f"units is {self.units!r}; choose one of {', '.join(UNITS)}")
        check_whole("seed", self.seed)
        check_whole("rows_per_forward", self.rows_per_forward, 1)
        check_whole("budget", self.budget)
        if self.budget < 2:
            raise ValueError(
                f"budget is {self.budget}; a response of one unit takes 2 evaluations and one of n units "
                "min(2**n, 2 * n)"
            )

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) of any sign, and the report.

        Raises:
            MissingResource: no reward model, or no tokenizer to find words with.
            ValueError: the budget is too small for a response, or a response is empty.
        """
        if resources.reward_model is None:
            raise MissingResource(f"{self.name} credit scores changed texts and there is no reward model to ask")
        episode, score = outcome.episode, outcome.reward.score
        mask = episode.response_mask.bool()
        if not mask.any(-1).all():
            row = int((~mask.any(-1)).nonzero()[0])
            raise ValueError(f"row {row} has an empty response, which has no units; pass the rows that ended")
        units, blocks = unit_ids(episode, resources.tokenizer, self.units), self._blocks(episode, resources)
        plans = [self._plan(episode, row, units[row], blocks[row]) for row in range(len(score))]
        sizes = [len(plan.keep) for plan in plans]
        rows = torch.arange(len(plans)).repeat_interleave(torch.tensor(sizes))
        keep = torch.cat([plan.keep[:, unit.clamp(min=0)] for plan, unit in zip(plans, units, strict=True)])  # (M, H)
        answers = scores_of_kept(resources.reward_model, episode, rows, keep, self.rows_per_forward)
        phi, errors = torch.zeros(mask.shape, dtype=torch.float64), []
        for row, (plan, answer) in enumerate(zip(plans, answers.split(sizes), strict=True)):
            values, standard_error = plan.estimate(answer)
            own = units[row, mask[row]]
            phi[row, mask[row]] = (values / own.bincount())[own]  # a unit's value, spread evenly over its tokens
            errors.append(standard_error.mean())
        report = {"reward_calls": torch.tensor(sizes), "standard_error": torch.stack(errors).float()}
        return Credit(conserve(phi, score, mask, self.credit_beta), report)

    def _blocks(self, episode: Episode, resources: Resources) -> torch.Tensor:
        """The block of each response token, (N, H) int64: one for the whole response."""
        return torch.zeros_like(episode.response_mask, dtype=torch.int64)

    def _plan(self, episode: Episode, row: int, units: torch.Tensor, blocks: torch.Tensor) -> Plan:
        """Which deletions of one response to score."""
        ids = episode.input_ids[row][episode.attention_mask[row].bool()]
        count = int(units.max()) + 1
        first = (units == torch.arange(count)[:, None]).int().argmax(-1)  # units nest in blocks: one token tells
        return make_plan(blocks[first], self.budget, generator_for(ids, self.seed))


@dataclass(frozen=True)
class OwenCredit(ShapleyCredit):
    """``token_rewards[t] = phi[unit of t] / tokens in it``: Shapley values for units that come in blocks (Owen values).

    All else is as in `ShapleyCredit`. A unit joins whole blocks outside its own and any part of its own, which respects
    what belongs together in the text and takes fewer deletions: two clauses of 8 tokens are exact with 1020 where
    Shapley needs 65536.

    Args:
        credit_beta: 0 is sparse, 1 is dense only.
        budget: the most texts that the reward model reads per episode.
        units: smaller than the blocks.
        seed: of the sampled permutations.
        rows_per_forward: texts that the reward model reads at a time.
        blocks: "words", "clauses" or "sentences".
    """

    blocks: str = "clauses"
    name: ClassVar[str] = "owen"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks not in UNITS or UNITS.index(self.blocks) <= UNITS.index(self.units):
            larger = ", ".join(UNITS[UNITS.index(self.units) + 1 :]) or "none; choose smaller units"
            raise ValueError(f"blocks is {self.blocks!r} and units is {self.units!r}; larger blocks are: {larger}")

    def _blocks(self, episode: Episode, resources: Resources) -> torch.Tensor:
        return unit_ids(episode, resources.tokenizer, self.blocks)
