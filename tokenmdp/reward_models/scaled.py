"""A reward model whose score is scaled and shifted before any credit is made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tokenmdp.reward_models.base import EmbeddedTexts, RewardModel
from tokenmdp.types import Episode, RewardOutput


class ScaledRewardModel(RewardModel):
    """``score' = scale * (score - shift)``, in every number that the model gives: scores, prefix scores, gradients.

    The token rewards of every method then sum to ``score'`` as they did to ``score``, which a wrapper around the
    environment that changes `reward` cannot bring about. ``gym.make(..., score_scale=, score_shift=)`` puts it around
    a named reward model. Both numbers are constants: a running mean would make equal texts unequal.

    Args:
        inner: the reward model.
        scale: positive.
        shift: in units of the inner score.

    >>> from tokenmdp.reward_models import toy_lexicon
    >>> from tokenmdp.models.tokens import toy_tokenizer
    >>> from tokenmdp.types import lay_out
    >>> tokenizer = toy_tokenizer()
    >>> texts = lay_out([tokenizer.encode("the film")], [tokenizer.encode("was great")])
    >>> [model(texts).score.item() for model in (toy_lexicon(), ScaledRewardModel(toy_lexicon(), 0.1, shift=-1.0))]
    [2.0, 0.30000001192092896]
    """

    def __init__(self, inner: RewardModel, scale: float = 1.0, shift: float = 0.0) -> None:
        if not isinstance(inner, RewardModel):
            raise TypeError(f"{inner!r} is not a RewardModel; load a named one with load_reward_model")
        check_scale(scale, shift)
        super().__init__(inner.tokenizer)
        self.inner, self.scale, self.shift = inner, float(scale), float(shift)
        self.provides, self.max_tokens, self.limit_reason = inner.provides, inner.max_tokens, inner.limit_reason
        self.meaning = f"{scale:g} * ({inner.meaning} - {shift:g})" if inner.meaning else ""

    @classmethod
    def normalised(cls, inner: RewardModel, scores: Sequence[float]) -> ScaledRewardModel:
        """With mean 0 and standard deviation 1 over ``scores``, such as ``tokenmdp.evaluate(env, policy).scores``.

        Raises:
            ValueError: fewer than two scores, or all are the same.
        """
        numbers = torch.as_tensor(scores, dtype=torch.float64)
        if len(numbers) < 2 or not numbers.std() > 0:
            raise ValueError(f"{len(numbers)} scores without a spread have no scale; give the scores of many responses")
        return cls(inner, scale=1 / numbers.std().item(), shift=numbers.mean().item())

    def __call__(
        self, episodes: Episode, *, needs: frozenset[str] = frozenset(), empty_responses: bool = False
    ) -> RewardOutput:
        """What the inner model gives, with its scores scaled; the inner model checks. No token at all is scaled too."""
        output = self.inner(episodes, needs=needs, empty_responses=empty_responses)
        prefixes = None if output.prefix_scores is None else self._scaled(output.prefix_scores)
        spread = None if output.spread is None else self.scale * output.spread
        return output._replace(score=self._scaled(output.score), prefix_scores=prefixes, spread=spread)

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        """As calling it."""
        return self(episodes, needs=needs, empty_responses=True)

    def embedded(self, episodes: Episode) -> EmbeddedTexts:
        """The inner model's texts; the score is scaled, and so are its gradients."""
        texts = self.inner.embedded(episodes)
        return texts._replace(score=lambda embeddings, index: self._scaled(texts.score(embeddings, index)))

    @property
    def device(self) -> torch.device:
        """Of the inner model."""
        return self.inner.device

    def _scaled(self, scores: torch.Tensor) -> torch.Tensor:
        return self.scale * (scores - self.shift)

    def __repr__(self) -> str:
        return f"{self.scale:g} * ({self.inner} - {self.shift:g})"


def check_scale(scale: float, shift: float) -> None:
    """Refuse a scale that is not positive, or a number that is not finite.

    Raises:
        ValueError: with the number.
        TypeError: it is not a number.
    """
    for name, number in (("scale", scale), ("shift", shift)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"the score's {name} is {number!r}; give a number")
        if not math.isfinite(number) or (name == "scale" and number <= 0):
            raise ValueError(
                f"the score's {name} is {number}; give a {'positive' if name == 'scale' else 'finite'} number"
            )
