"""Policy-gradient estimators in expectation, by enumeration: no sampling, no network, float64.

The policy is the tabular softmax policy of a `ToyMDP`, so a gradient is a table (num_prefixes, V) as its logits are.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from tokenmdp.testing.toy_mdp import ToyMDP, expectation

Estimator = Literal["reward_to_go", "full_return"]


def policy_gradient(
    mdp: ToyMDP, logits: torch.Tensor, token_rewards: torch.Tensor, estimator: Estimator = "reward_to_go"
) -> torch.Tensor:
    """``E_pi[sum_t grad log pi(y[t] | s[t]) * G[t]]``, exact.

    * "reward_to_go": ``G[t] = sum_{k >= t} token_rewards[k]``. What GAE with lambda 1 estimates (a critic's values are
      a baseline, which adds 0).
    * "full_return": ``G[t] = sum_k token_rewards[k]``.

    For a softmax policy ``grad log pi(a | s) = onehot(a) - pi(. | s)`` with respect to the logits of s.

    Args:
        mdp: the M responses.
        logits: (num_prefixes, V) float64 of the policy.
        token_rewards: (M, H), zero outside the responses.
        estimator: which return a token is weighted with.

    Returns:
        (num_prefixes, V) float64.

    >>> mdp = ToyMDP.random()
    >>> logits = torch.zeros(mdp.num_prefixes, mdp.vocab_size, dtype=torch.float64)
    >>> sparse = torch.nn.functional.pad(mdp.scores[:, None], (2, 0))
    >>> torch.allclose(policy_gradient(mdp, logits, sparse), score_gradient(mdp, logits))
    True
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator is {estimator!r}; choose one of {', '.join(get_args(Estimator))}")
    to_go = rewards_to_go(token_rewards)
    returns = to_go if estimator == "reward_to_go" else to_go[:, :1].expand_as(to_go)
    weights = _probabilities(mdp, logits)[:, None] * returns * mdp.mask  # (M, H)
    of_actions = _table(mdp, weights)
    return of_actions - of_actions.sum(-1, keepdim=True) * logits.softmax(-1)


def score_gradient(mdp: ToyMDP, logits: torch.Tensor) -> torch.Tensor:
    """``grad E_pi[score]`` (num_prefixes, V) by automatic differentiation: what every estimator should be."""
    parameters = logits.detach().clone().requires_grad_()
    value = expectation(mdp.tabular_seq_logprobs(parameters), mdp.scores)
    return torch.autograd.grad(value, parameters)[0]


class ActionValues(NamedTuple):
    """Values of states and actions under token rewards; 0 for actions that no response takes."""

    q: torch.Tensor  # (num_prefixes, V): E[sum_{k >= t} token_rewards[k] | s[t] = s, y[t] = a]
    v: torch.Tensor  # (num_prefixes,): sum_a pi(a | s) * q(s, a)

    @property
    def advantage(self) -> torch.Tensor:
        """``q(s, a) - v(s)``, (num_prefixes, V)."""
        return self.q - self.v[:, None]


def action_values(mdp: ToyMDP, logits: torch.Tensor, token_rewards: torch.Tensor) -> ActionValues:
    """Exact Q and V of the policy with ``logits`` (num_prefixes, V) under ``token_rewards`` (M, H).

    Token rewards that depend on the finished text are not a function of state and action; Q is then their conditional
    expectation under this policy.

    >>> mdp = ToyMDP.random(vocab_size=2, horizon=1)
    >>> values = action_values(mdp, torch.zeros(1, 2, dtype=torch.float64), mdp.scores[:, None])
    >>> torch.equal(values.q[0], mdp.scores), torch.equal(values.v[0], mdp.scores.mean())
    (True, True)
    """
    probabilities = _probabilities(mdp, logits)[:, None] * mdp.mask
    mass = _table(mdp, probabilities)
    total = _table(mdp, probabilities * rewards_to_go(token_rewards))
    q = torch.where(mass > 0, total / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    return ActionValues(q, (logits.softmax(-1) * q).sum(-1))


def rewards_to_go(token_rewards: torch.Tensor) -> torch.Tensor:
    """``G[t] = sum_{k >= t} token_rewards[k]`` over the trailing axis.

    >>> rewards_to_go(torch.tensor([1.0, 2.0, 4.0])).tolist()
    [7.0, 6.0, 4.0]
    """
    return token_rewards.flip(-1).cumsum(-1).flip(-1)


class Agreement(NamedTuple):
    """How a gradient estimate relates to the true gradient."""

    cosine: float  # 1: the same direction
    relative_norm: float  # length of the estimate over that of the true gradient


def agreement(estimate: torch.Tensor, truth: torch.Tensor) -> Agreement:
    """Compare two gradients of any shape.

    >>> agreement(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    Agreement(cosine=1.0, relative_norm=2.0)
    """
    lengths = estimate.norm(), truth.norm()
    if not lengths[1] > 0:
        raise ValueError("the true gradient is 0, which has no direction: all scores are the same")
    cosine = (estimate * truth).sum() / (lengths[0] * lengths[1]) if lengths[0] > 0 else torch.zeros(())
    return Agreement(cosine.item(), (lengths[0] / lengths[1]).item())


def _probabilities(mdp: ToyMDP, logits: torch.Tensor) -> torch.Tensor:
    return mdp.tabular_seq_logprobs(logits).exp()


def _table(mdp: ToyMDP, per_token: torch.Tensor) -> torch.Tensor:
    """Sum (M, H) over the responses that take each action in each state: (num_prefixes, V)."""
    cells = mdp.prefixes() * mdp.vocab_size + mdp.tokens
    flat = per_token.new_zeros(mdp.num_prefixes * mdp.vocab_size)
    # Padding has the number of some state after the end; its entries are 0.
    return flat.index_add(0, cells.flatten(), per_token.flatten()).view(mdp.num_prefixes, mdp.vocab_size)
