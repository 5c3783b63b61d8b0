"""Does a credit method do what it declares? Every property is checked by enumeration, or refuted with numbers.

from tokenmdp.testing import check_credit_method

check_credit_method(MyCredit())
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenmdp.credit.base import NEEDS, CreditMethod, Resources
from tokenmdp.testing.gradients import policy_gradient, score_gradient
from tokenmdp.testing.reward_table import response_texts, toy_outcome, toy_resources
from tokenmdp.testing.toy_mdp import ToyMDP
from tokenmdp.types import Credit, Outcome


class CreditPropertyError(AssertionError):
    """A credit method does not do what it declares; the message shows where and by how much."""


def check_credit_method(
    method: CreditMethod,
    *,
    mdp: ToyMDP | None = None,
    resources: Callable[[ToyMDP], Resources] = toy_resources,
    tolerance: float = 1e-5,
) -> None:
    """Credit all responses of small token MDPs and check what ``method`` declares about itself.

    Always: token rewards of the right shape and dtype, finite, zero outside the response; a report of one number per
    row; needs that exist; and no influence of the other rows, their order or the prompt's padding. As declared:
    ``conserves_return`` (sums are scores), ``causal`` (responses that begin alike are credited alike, except on their
    last token) and ``potential_based`` (the exact reward-to-go gradient of a random policy is the true gradient).

    Args:
        method: a credit method of any origin.
        mdp: the responses to credit; default two worlds of 27 and 15 responses, the second with an end of text.
        resources: what the method may use in a world; default tables for everything but preference-tuned policies.
        tolerance: the largest error, as a share of the largest score (or gradient entry). Reward models answer in
            float32, so a method that asks for more scores is not exact to float64.

    Raises:
        CreditPropertyError: a property does not hold.
        MissingResource: the method needs something that ``resources`` does not hold.

    >>> from tokenmdp.credit import PrefixDifferenceCredit
    >>> check_credit_method(PrefixDifferenceCredit(credit_beta=0.5))
    """
    if unknown := sorted(method.needs - NEEDS.keys()):
        raise CreditPropertyError(f"{method.name} needs {', '.join(unknown)}; choose among {', '.join(NEEDS)}")
    worlds = [ToyMDP.random(seed=1), ToyMDP.random(eos_token_id=1, seed=2)] if mdp is None else [mdp]
    for world in worlds:
        lent = resources(world)
        outcome = toy_outcome(world)
        credit = method(outcome, lent)
        error = tolerance * world.scores.abs().max().item()
        _check_form(method, credit, outcome)
        _check_rows(method, credit, world, lent, error)
        if method.conserves_return:
            _check_sums(method, credit, outcome, error)
        if method.causal:
            _check_causality(method, credit, outcome, error)
        if method.potential_based:
            _check_gradient(method, credit, world, tolerance)


def _check_form(method: CreditMethod, credit: Credit, outcome: Outcome) -> None:
    rewards, mask, score = credit.token_rewards, outcome.episode.response_mask, outcome.reward.score
    if rewards.shape != mask.shape or rewards.dtype != score.dtype:
        raise CreditPropertyError(
            f"{method.name} gave token rewards {tuple(rewards.shape)} of {rewards.dtype} for a response mask "
            f"{tuple(mask.shape)} and scores of {score.dtype}; shape and dtype must be theirs"
        )
    if not torch.isfinite(rewards).all():
        row = int((~torch.isfinite(rewards)).any(-1).nonzero()[0])
        raise CreditPropertyError(f"{method.name} gave {rewards[row].tolist()} for {_text(outcome, row)}")
    if rewards[~mask].any():
        row = int(rewards.masked_fill(mask, 0).any(-1).nonzero()[0])
        raise CreditPropertyError(
            f"{method.name} credits padding: {rewards[row].tolist()} for {_text(outcome, row)}; multiply by the mask"
        )
    for key, column in credit.report.items():
        if column.shape != score.shape:
            raise CreditPropertyError(
                f"{method.name} reports {key} of shape {tuple(column.shape)}; one number per row is needed: "
                f"{score.shape}"
            )


def _check_rows(method: CreditMethod, credit: Credit, mdp: ToyMDP, resources: Resources, error: float) -> None:
    """Half of the rows in another order, after a prompt with more padding."""
    order = torch.arange(len(mdp.tokens)).flip(0)[::2]
    wide = toy_outcome(mdp, prompt_slots=3)
    part = method(wide.take(order), resources).token_rewards
    gap = (part - credit.token_rewards[order]).abs().amax(-1)
    if gap.max() > error:
        worst = int(gap.argmax())
        raise CreditPropertyError(
            f"{method.name} depends on the batch or on padding: {_text(wide, int(order[worst]))} gets "
            f"{credit.token_rewards[order[worst]].tolist()} among all responses and {part[worst].tolist()} among half"
        )


def _check_sums(method: CreditMethod, credit: Credit, outcome: Outcome, error: float) -> None:
    sums, scores = credit.token_rewards.sum(-1), outcome.reward.score
    gap = (sums - scores).abs()
    if gap.max() > error:
        worst = int(gap.argmax())
        raise CreditPropertyError(
            f"{method.name} declares conserves_return, but the token rewards of {_text(outcome, worst)} sum to "
            f"{sums[worst].item():.8g} and its score is {scores[worst].item():.8g}"
        )


def _check_causality(method: CreditMethod, credit: Credit, outcome: Outcome, error: float) -> None:
    """Responses that share their tokens up to t, where none of them ends, share token_rewards[t]."""
    first: dict[tuple[int, ...], int] = {}
    for row, text in enumerate(response_texts(outcome.episode)):
        for t in range(len(text) - 1):
            other = first.setdefault(text[: t + 1], row)
            rewards = credit.token_rewards[other, t].item(), credit.token_rewards[row, t].item()
            if abs(rewards[0] - rewards[1]) > error:
                raise CreditPropertyError(
                    f"{method.name} declares causal, but token {t} gets {rewards[0]:.8g} in {_text(outcome, other)} "
                    f"and {rewards[1]:.8g} in {_text(outcome, row)}, which agree up to there"
                )


def _check_gradient(method: CreditMethod, credit: Credit, mdp: ToyMDP, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(mdp.num_prefixes, mdp.vocab_size, generator=generator, dtype=torch.float64)
    truth = score_gradient(mdp, logits)
    gap = (policy_gradient(mdp, logits, credit.token_rewards, "reward_to_go") - truth).abs().max()
    if gap > tolerance * truth.abs().max():
        raise CreditPropertyError(
            f"{method.name} declares potential_based, but its reward-to-go gradient is off by {gap.item():.3g}, where "
            f"the true gradient's largest entry is {truth.abs().max().item():.3g}"
        )


def _text(outcome: Outcome, row: int) -> str:
    ids = outcome.episode.input_ids[row, outcome.episode.prompt_slots :]
    return f"response {ids[outcome.episode.response_mask[row]].tolist()}"
