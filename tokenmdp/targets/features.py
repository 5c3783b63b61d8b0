"""Features of whole responses: a number each, from its text, its score or a reward model of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from tokenmdp.models.tokens import response_texts
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenmdp.reward_models import RewardModel


class TargetError(ValueError):
    """A target that cannot be met or cannot be computed; the message names it."""


class Responses(NamedTuple):
    """N finished responses, as features read them."""

    texts: Sequence[str]  # (N) what each response adds to its prompt, without the end-of-text token
    scores: torch.Tensor | None = None  # (N,) of the environment's reward model
    episodes: Episode | None = None  # the tokens, for a reward model of a feature's own

    @classmethod
    def of(cls, episodes: Episode, tokenizer: PreTrainedTokenizerBase, scores: torch.Tensor | None = None) -> Responses:
        """The responses of finished episodes, decoded.

        >>> from tokenmdp.models.tokens import toy_tokenizer
        >>> from tokenmdp.types import lay_out
        >>> Responses.of(lay_out([[1, 20], [1]], [[6, 30], [7]]), toy_tokenizer()).texts
        [' film', ' story']
        """
        prompt_slots, texts = episodes.prompt_slots, []
        for ids, seen in zip(episodes.input_ids.cpu(), episodes.attention_mask.bool().cpu(), strict=True):
            prompt, response = (ids[part][seen[part]].tolist() for part in _halves(prompt_slots))
            texts += response_texts(tokenizer, prompt, [response])[1]
        return cls(texts, scores, episodes)


def _halves(prompt_slots: int) -> tuple[slice, slice]:
    return slice(prompt_slots), slice(prompt_slots, None)


@dataclass(frozen=True)
class Feature:
    """A number of each response. Calling it gives (N,) float64.

    Attributes:
        name: For messages and metrics.
        function: Takes `Responses` and returns N numbers or truth values.
        is_binary: It is 0 or 1; a binary target needs such a feature.
    """

    name: str
    function: Callable[[Responses], torch.Tensor | Sequence[float]]
    is_binary: bool = False

    def __call__(self, responses: Responses) -> torch.Tensor:
        """The numbers (N,), float64.

        Raises:
            TargetError: one is NaN or infinite, or neither 0 nor 1 though the feature is binary; or not N numbers.
        """
        numbers = torch.as_tensor(self.function(responses), dtype=torch.float64).cpu()
        if numbers.shape != (len(responses.texts),):
            raise TargetError(
                f"the feature {self.name!r} gave shape {tuple(numbers.shape)} for {len(responses.texts)} responses; it "
                "returns one number per response"
            )
        wrong = ~numbers.isfinite() | ((numbers != 0) & (numbers != 1) if self.is_binary else False)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            expected = "0 or 1" if self.is_binary else "a finite number"
            raise TargetError(
                f"the feature {self.name!r} is {numbers[row].item()} for response {row} of {len(numbers)}, "
                f"{responses.texts[row]!r}; it must be {expected}"
            )
        return numbers


def contains(*words: str) -> Feature:
    """Whether a response has one of some words or phrases: whole words, in upper or lower case.

    >>> contains("film", "great plot")(Responses([" a Film.", " films", " the great plot"])).tolist()
    [1.0, 0.0, 1.0]
    """
    if not words or not all(word.strip() for word in words):
        raise TargetError(f"the words are {words}; give at least one, and none that is empty")
    # Not \b, which is no boundary behind a word that ends in a full stop.
    pattern = "|".join(re.escape(word.strip()) for word in words)
    return matches(rf"(?i)(?<!\w)(?:{pattern})(?!\w)", name=",".join(word.strip() for word in words))


def matches(pattern: str, name: str = "") -> Feature:
    """Whether a regular expression is found anywhere in a response.

    Raises:
        TargetError: it is no regular expression.

    >>> matches("^ The .*!$")(Responses([" The film!", " A film!"])).tolist()
    [1.0, 0.0]
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression ({error}); see the documentation of re") from error
    return of_texts(
        lambda texts: [compiled.search(text) is not None for text in texts], name or pattern, is_binary=True
    )


def of_texts(
    function: Callable[[Sequence[str]], torch.Tensor | Sequence[float]], name: str, is_binary: bool = False
) -> Feature:
    """Any function of the texts.

    >>> of_texts(lambda texts: [len(text.split()) for text in texts], "words")(Responses(["a b", "c"])).tolist()
    [2.0, 1.0]
    """
    return Feature(name, lambda responses: function(responses.texts), is_binary)


def _scores(responses: Responses) -> torch.Tensor:
    if responses.scores is None:
        raise TargetError("the feature 'score' needs the scores of the responses; pass Responses(texts, scores)")
    return responses.scores


score = Feature("score", _scores)  # what the environment's reward model says


def model_score(model: RewardModel, name: str = "") -> Feature:
    """The score of a reward model of the feature's own, which reads the environment's tokens.

    Raises:
        TargetError: (when called) the responses have no tokens.
    """

    def scores(responses: Responses) -> torch.Tensor:
        if responses.episodes is None:
            raise TargetError(f"{model} scores tokens; make the responses with Responses.of(episodes, tokenizer)")
        return model(responses.episodes).score

    return Feature(name or str(model), scores)


def above(feature: Feature, threshold: float) -> Feature:
    """Whether a feature is above a number.

    >>> above(score, 2)(Responses(["a", "b"], torch.tensor([2.0, 2.5]))).tolist()
    [0.0, 1.0]
    """
    return Feature(f"{feature.name}>{threshold:g}", lambda responses: feature(responses) > threshold, is_binary=True)
