"""Credit assignment: methods that spread one score over the tokens, and the registry of them.

``CREDIT_METHODS[name]`` is the class and ``make_credit(name, **options)`` an instance; `tokenmdp credits` prints what
each declares. A method of your own needs no registration: bind it with ``CreditReward(env, credit)``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tokenmdp.credit.attention import AttentionCredit, LastPolicyAttentionCredit, PolicyAttentionCredit
from tokenmdp.credit.attribution import DeepLiftCredit, IncompleteAttribution, IntegratedGradientsCredit
from tokenmdp.credit.base import NEEDS, REWARD_MODEL_NEEDS, CreditMethod, MissingResource, Resources
from tokenmdp.credit.fine_grained import FineGrainedCredit, FineReward
from tokenmdp.credit.implicit import ImplicitRewardCredit
from tokenmdp.credit.options import required_options
from tokenmdp.credit.position import PositionCredit
from tokenmdp.credit.prefix import PrefixDifferenceCredit, prefix_differences
from tokenmdp.credit.score_only import SparseCredit, UniformCredit
from tokenmdp.credit.shapley import OwenCredit, ShapleyCredit
from tokenmdp.credit.weights import (
    ATTENTION_FLOOR,
    attention_weights,
    blend,
    conserve,
    redistribute,
    row_entropy,
    sparse_weights,
    uniform_weights,
)

__all__ = [
    "ATTENTION_FLOOR",
    "CREDIT_METHODS",
    "NEEDS",
    "REWARD_MODEL_NEEDS",
    "AttentionCredit",
    "CreditMethod",
    "DeepLiftCredit",
    "FineGrainedCredit",
    "FineReward",
    "ImplicitRewardCredit",
    "IncompleteAttribution",
    "IntegratedGradientsCredit",
    "LastPolicyAttentionCredit",
    "MissingResource",
    "OwenCredit",
    "PolicyAttentionCredit",
    "PositionCredit",
    "PrefixDifferenceCredit",
    "Resources",
    "ShapleyCredit",
    "SparseCredit",
    "UniformCredit",
    "attention_weights",
    "blend",
    "conserve",
    "make_credit",
    "prefix_differences",
    "redistribute",
    "row_entropy",
    "sparse_weights",
    "uniform_weights",
]

CREDIT_METHODS: dict[str, type] = {
    method.name: method
    for method in (
        SparseCredit,
        UniformCredit,
        PositionCredit,
        AttentionCredit,
        PolicyAttentionCredit,
        LastPolicyAttentionCredit,
        PrefixDifferenceCredit,
        IntegratedGradientsCredit,
        DeepLiftCredit,
        ShapleyCredit,
        OwenCredit,
        FineGrainedCredit,
        ImplicitRewardCredit,
    )
}


def make_credit(name: str, **options: Any) -> CreditMethod:
    """The credit method called ``name`` with these options; ``credit_beta`` is dropped where a method has none.

    >>> make_credit("sparse", credit_beta=0.5), make_credit("uniform", credit_beta=0.5)
    (SparseCredit(), UniformCredit(credit_beta=0.5))

    Raises:
        ValueError: no method has this name, or the method has no such option or needs one that is not given.
    """
    if name not in CREDIT_METHODS:
        raise ValueError(f"credit is {name!r}; choose one of {', '.join(CREDIT_METHODS)}")
    method = CREDIT_METHODS[name]
    known = [field.name for field in fields(method)]
    if "credit_beta" not in known:
        options = {key: value for key, value in options.items() if key != "credit_beta"}
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"{name} credit has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    if missing := sorted(set(required_options(method)) - options.keys()):
        raise ValueError(f"{name} credit needs {', '.join(missing)}: make_credit({name!r}, {missing[0]}=...)")
    return method(**options)
