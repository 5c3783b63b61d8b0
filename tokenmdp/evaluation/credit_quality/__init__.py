"""Does credit land on the right token? Worlds with known or measured worth, metrics, costs and a verdict."""

from tokenmdp.evaluation.credit_quality.counting import Counted, PolicyAccess, run_counted
from tokenmdp.evaluation.credit_quality.measure import METRICS, MethodQuality, WorldQuality, measure
from tokenmdp.evaluation.credit_quality.metrics import (
    area_over_line,
    area_under_roc,
    credit_order,
    important_tokens,
    rank_correlation,
)
from tokenmdp.evaluation.credit_quality.verdict import AttentionVerdict
from tokenmdp.evaluation.credit_quality.worlds import NegationLexicon, World, keyword_world, model_world, negation_world

__all__ = [
    "METRICS",
    "AttentionVerdict",
    "Counted",
    "MethodQuality",
    "NegationLexicon",
    "PolicyAccess",
    "World",
    "WorldQuality",
    "area_over_line",
    "area_under_roc",
    "credit_order",
    "important_tokens",
    "keyword_world",
    "measure",
    "model_world",
    "negation_world",
    "rank_correlation",
    "run_counted",
]
