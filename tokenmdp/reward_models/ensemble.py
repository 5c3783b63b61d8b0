"""Several reward models as one: the mean of their normalised scores, and how much they disagree."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenmdp.files import CheckpointError, read_json, write_text
from tokenmdp.reward_models.base import RewardModel
from tokenmdp.types import Episode, RewardOutput

ENSEMBLE_FILE = "ensemble.json"
FORMAT = "tokenmdp-ensemble-1"


class EnsembleRewardModel(RewardModel):
    """``score = mean_k(score_k) - penalty * sd_k(score_k)`` over K members, sd with K - 1 in its denominator.

    Members trained on other samples of the same comparisons agree where there were many and differ where they guess, so
    a penalty keeps a policy away from what they only guess (Coste et al., "Reward Model Ensembles Help Mitigate
    Overoptimization", 2023). The sd is in the infos of finished episodes as ``score_sd``.

    Args:
        members: At least two, which read the same tokens. Their scores should have one unit: a model trained with
            ``unit_scale`` has mean 0 and sd 1 on the responses of its data. Means of raw logits can invert the order.
        penalty: 0 or more.
        name: What `load_reward_model` reloads it from.

    Raises:
        ValueError: fewer than two members, or a negative penalty.
        VocabularyMismatch: members that read other tokens.
    """

    def __init__(self, members: Sequence[RewardModel], penalty: float = 0.0, *, name: str | None = None) -> None:
        if len(members) < 2:
            raise ValueError(f"an ensemble of {len(members)}; members disagree only where there are at least 2")
        if not (math.isfinite(penalty) and penalty >= 0):
            raise ValueError(f"penalty is {penalty}; it is a finite number of sds to take off, at least 0")
        first = next((member.tokenizer for member in members if member.tokenizer is not None), None)
        for member in members:
            if first is not None and member.tokenizer is not None:
                member.check_tokenizer(first)
        super().__init__(first, name=name)
        self.members, self.penalty = tuple(members), penalty
        self.provides = frozenset.intersection(*(member.provides for member in members)) & {"prefix_scores"}
        limits = [member for member in members if member.max_tokens is not None]
        if limits:
            shortest = min(limits, key=lambda member: member.max_tokens or 0)
            self.max_tokens, self.limit_reason = shortest.max_tokens, shortest.limit_reason
        self.meaning = f"the mean of {len(members)} members' scores"
        if penalty:
            self.meaning += f" less {penalty:g} times their sd"

    def member_scores(self, episodes: Episode) -> torch.Tensor:
        """(K, N) float32: the score of every member."""
        return torch.stack([member(episodes, empty_responses=True).score for member in self.members])

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        """Scores, the members' sd, and if asked the same of every prefix."""
        outputs = [member(episodes, needs=needs, empty_responses=True) for member in self.members]
        scores = torch.stack([output.score for output in outputs])  # (K, N)
        prefixes = None
        if "prefix_scores" in needs:
            prefixes = self._together(torch.stack([output.prefix_scores for output in outputs]))  # type: ignore[misc]
        return RewardOutput(self._together(scores), prefix_scores=prefixes, spread=scores.std(0))

    def _together(self, scores: torch.Tensor) -> torch.Tensor:
        """(K, ...) -> (...)."""
        return scores.mean(0) - self.penalty * scores.std(0) if self.penalty else scores.mean(0)

    @property
    def device(self) -> torch.device:
        """Of the first member."""
        return self.members[0].device

    def check_tokenizer(self, tokenizer: Any) -> None:
        """As every member."""
        for member in self.members:
            member.check_tokenizer(tokenizer)


def write_ensemble(directory: str | Path, members: Sequence[str], penalty: float = 0.0) -> Path:
    """Write the file that makes a directory an ensemble for `load_reward_model`.

    Args:
        directory: Of the ensemble.
        members: Paths of the members' directories below it.
        penalty: As `EnsembleRewardModel`'s.
    """
    record = {"format": FORMAT, "members": list(members), "penalty": penalty}
    path = Path(directory) / ENSEMBLE_FILE
    write_text(path, json.dumps(record, indent=2) + "\n")
    return path


def read_ensemble(directory: str | Path) -> tuple[list[str], float] | None:
    """The paths of the members and the penalty; None for a directory that is not an ensemble.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = Path(directory) / ENSEMBLE_FILE
    if not path.exists():
        return None
    record = read_json(path)
    members = record.get("members") if isinstance(record, dict) and record.get("format") == FORMAT else None
    penalty = record.get("penalty", 0.0) if isinstance(record, dict) else None
    if (
        not isinstance(members, list)
        or not all(isinstance(member, str) for member in members)
        or isinstance(penalty, bool)
        or not isinstance(penalty, int | float)
    ):
        raise CheckpointError(
            f"{path} is not the list of an ensemble's members; train it again: tokenmdp train reward-model --members K"
        )
    return [str(Path(directory) / member) for member in members], float(penalty)
