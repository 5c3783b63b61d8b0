"""Target distributions: which responses a policy should give, as a reweighting of a base model."""

from tokenmdp.targets.distributions import (
    BinaryTarget,
    DistributionalTarget,
    ProductTarget,
    ScalarTarget,
    Target,
    TargetError,
)
from tokenmdp.targets.features import (
    Feature,
    Responses,
    above,
    contains,
    matches,
    model_score,
    of_texts,
    score,
)
from tokenmdp.targets.reading import read_target

__all__ = [
    "BinaryTarget",
    "DistributionalTarget",
    "Feature",
    "ProductTarget",
    "Responses",
    "ScalarTarget",
    "Target",
    "TargetError",
    "above",
    "contains",
    "matches",
    "model_score",
    "of_texts",
    "read_target",
    "score",
]
