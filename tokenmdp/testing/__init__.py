"""Token MDPs small enough to enumerate: exact expectations to test algorithms against, and checks of credit methods."""

from tokenmdp.testing.conformance import CreditPropertyError, check_credit_method
from tokenmdp.testing.gradients import (
    ActionValues,
    Agreement,
    action_values,
    agreement,
    policy_gradient,
    rewards_to_go,
    score_gradient,
)
from tokenmdp.testing.restricted import RestrictedTask, likely_tokens, restrict
from tokenmdp.testing.reward_table import TablePolicyAttention, TableRewardModel, toy_outcome, toy_resources
from tokenmdp.testing.toy_mdp import ToyMDP, enumerate_responses, expectation, kl, total_variation

__all__ = [
    "ActionValues",
    "Agreement",
    "CreditPropertyError",
    "RestrictedTask",
    "TablePolicyAttention",
    "TableRewardModel",
    "ToyMDP",
    "action_values",
    "agreement",
    "check_credit_method",
    "enumerate_responses",
    "expectation",
    "kl",
    "likely_tokens",
    "policy_gradient",
    "restrict",
    "rewards_to_go",
    "score_gradient",
    "total_variation",
    "toy_outcome",
    "toy_resources",
]
