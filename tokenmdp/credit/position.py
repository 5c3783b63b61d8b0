"""Credit by position alone: what is left of attention credit when the content of the row is averaged out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenmdp.credit.base import MissingResource, Resources
from tokenmdp.credit.draws import generator_for
from tokenmdp.credit.options import check_whole
from tokenmdp.credit.weights import (
    ATTENTION_FLOOR,
    attention_weights,
    blend,
    check_credit_beta,
    redistribute,
    row_entropy,
)
from tokenmdp.types import Credit, Episode, Outcome


@dataclass(frozen=True)
class PositionCredit:
    """``token_rewards[t] = score * (credit_beta * mean_k alpha_k[t] + (1 - credit_beta) * 1[t = last])``: a control.

    alpha_k is the attention row, as `AttentionCredit` reads it, of the same prompt with the response's tokens in the
    k-th of ``orders`` random orders; the last token, which may be an end of text, stays. So each position gets the
    attention that it gets with any of these tokens on it: the profile of the row without its content. Two responses of
    the same tokens in different order, with one last token, have the same profile, exactly, since the orders are drawn
    from ``seed``, the prompt and the *sorted* tokens, and applied to those. It needs no other texts: a text's credit
    does not depend on the batch or on what was seen before.

    The profile costs ``orders`` further reward-model forwards a text. Reports ``attention_mass`` (mean over the
    orders), ``attention_entropy`` (of the profile), ``credit_fallback`` (True where all orders had less mass than
    `ATTENTION_FLOOR` and the profile is uniform) and ``reward_calls``.

    Args:
        credit_beta: 0 is sparse, 1 is dense only.
        orders: how many random orders of the response are averaged.
        seed: of the orders.
        rows_per_forward: texts that the reward model reads at a time.
    """

    credit_beta: float = 0.8
    orders: int = 8
    seed: int = 0
    rows_per_forward: int = 256
    name: ClassVar[str] = "position"
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "reward_calls"})

    def __post_init__(self) -> None:
        check_credit_beta(self.credit_beta)
        check_whole("orders", self.orders, 1)
        check_whole("seed", self.seed)
        check_whole("rows_per_forward", self.rows_per_forward, 1)

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) that depend on the position alone, and the report.

        Raises:
            MissingResource: no reward model, or one that gives no attention row.
        """
        if resources.reward_model is None:
            raise MissingResource(f"{self.name} credit reads changed texts and there is no reward model to ask")
        mask = outcome.episode.response_mask.bool()  # (N, H)
        changed = self._in_other_orders(outcome.episode)  # N * orders episodes
        parts = zip(*(part.split(self.rows_per_forward) for part in changed), strict=True)
        rows = [resources.reward_model(Episode(*part), needs=frozenset({"attention"})).attention for part in parts]
        given = [row for row in rows if row is not None]
        if len(given) < len(rows):
            raise MissingResource("the reward model returned no attention row; use one that provides it")
        weights, mass, fell_back = attention_weights(torch.cat(given), changed.response_mask.bool(), ATTENTION_FLOOR)
        profile = weights.unflatten(0, (-1, self.orders)).mean(1)
        profile = profile / profile.sum(-1, keepdim=True)
        report = {
            "attention_mass": mass.unflatten(0, (-1, self.orders)).mean(1).float(),
            "attention_entropy": row_entropy(profile, mask).float(),
            "credit_fallback": fell_back.unflatten(0, (-1, self.orders)).all(1),
            "reward_calls": torch.full((len(mask),), self.orders),
        }
        return Credit(redistribute(outcome.reward.score, blend(profile, mask, self.credit_beta)), report)

    def _in_other_orders(self, episode: Episode) -> Episode:
        """Each episode ``orders`` times, with its response's tokens in random orders."""
        repeated = Episode(*(part.repeat_interleave(self.orders, 0) for part in episode))
        ids, slots = repeated.input_ids.clone(), episode.prompt_slots
        for place, mask in enumerate(episode.response_mask.bool()):
            prompt = episode.input_ids[place, :slots][episode.attention_mask[place, :slots].bool()]
            tokens = episode.input_ids[place, slots:][mask]
            moving, last = tokens[:-1].sort().values, tokens[-1:]
            generator = generator_for(torch.cat([prompt, moving, last]), self.seed)
            for row in range(place * self.orders, (place + 1) * self.orders):
                order = torch.randperm(len(moving), generator=generator)
                ids[row, slots:][mask] = torch.cat([moving[order], last])
        return repeated._replace(input_ids=ids)
