"""Evaluation: any agent on any environment, a run's policies, their texts, and where credit lands."""

from tokenmdp.evaluation.any_agent import Acts, DrawsActions, EvaluationResult, HoldsPolicy, Predicts, evaluate

__all__ = ["Acts", "DrawsActions", "EvaluationResult", "HoldsPolicy", "Predicts", "evaluate"]
