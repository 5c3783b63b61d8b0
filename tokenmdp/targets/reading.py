"""Targets as texts, for configurations and the command.

    target   = part, or several joined by " & "          their product
    part     = feature                                    binary: every response has it
             | feature@MOMENT                             distributional: its mean over responses is MOMENT
             | score/BETA                                 scalar: a exp(score / BETA)
    feature  = word:WORD | words:WORD,WORD | regex:PATTERN | reward:>NUMBER | score (only with @ and /)

``word:great``, ``words:great,not bad``, ``regex:^ The``, ``reward:>2``, ``score/0.5``, ``word:great@0.5``,
``score@1.5``, ``word:great & score/0.5``. All parts with @ are one distributional target, fitted together. Words are
whole and in upper or lower case; reward and score are what the environment's reward model says. In a pattern, a space
before or after & is written as [ ], and an @ before a number at the end as [@].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokenmdp.targets.distributions import BinaryTarget, DistributionalTarget, ProductTarget, ScalarTarget, Target
from tokenmdp.targets.features import Feature, Responses, TargetError, above, contains, matches, score

KINDS = "word:WORD, words:WORD,WORD, regex:PATTERN, reward:>NUMBER, each with or without @MOMENT, and score/BETA"
MOMENT = re.compile(r"(.*)@([^@]*)")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class WrittenTarget:
    """A target that `read_target` read; the moments in it are still to be fitted.

    Attributes:
        text: What was read.
        fixed: The binary and scalar parts.
        features, moments: Of the distributional part, by the feature's text; empty where there is none.
    """

    text: str
    fixed: tuple[Target, ...]
    features: Mapping[str, Feature]
    moments: Mapping[str, float]

    @property
    def has_zeros(self) -> bool:
        """Whether P is 0 for some responses."""
        return any(part.has_zeros for part in self.fixed)

    def fitted(self, responses: Responses | None = None, log_weights: torch.Tensor | None = None) -> Target:
        """The target, its moments fitted on samples of the base model if it has some.

        The moments hold for the distributional part alone; the other parts then move them.

        Args:
            responses: N samples of the base model.
            log_weights: (N,) float64, ``log a - log q`` where they are samples of another policy q.

        Raises:
            TargetError: there are moments and no samples, or they are out of reach.
        """
        if not self.moments:
            return self._product()
        if responses is None:
            raise TargetError(
                f"the target {self.text!r} has moments, which are fitted on samples of the base; pass them"
            )
        return self._product(DistributionalTarget.fit(self.features, self.moments, responses, log_weights))

    def with_lambdas(self, lambdas: Mapping[str, float]) -> Target:
        """The target with lambdas that were fitted before."""
        return self._product(DistributionalTarget(self.features, lambdas, {})) if self.moments else self._product()

    def _product(self, *further: Target) -> Target:
        parts = (*self.fixed, *further)
        return parts[0] if len(parts) == 1 else ProductTarget(*parts)


def read_target(text: str) -> WrittenTarget:
    """Read a target; the grammar is at the top of this file.

    Raises:
        TargetError: an unknown kind of feature, a number that is none, an empty word, a pattern that is no regular
            expression, or a feature that has two moments.

    >>> read_target("word:great & score/0.5").fitted().name
    'great & score/0.5'
    >>> read_target("wrd:great")        # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tokenmdp.targets.features.TargetError: 'wrd:great' is no target; write word:WORD, words:WORD,WORD, ...
    """
    fixed: list[Target] = []
    features: dict[str, Feature] = {}
    moments: dict[str, float] = {}
    for part in text.split(" & "):
        part = part.strip()
        moment = MOMENT.fullmatch(part)
        if moment and NUMBER.fullmatch(moment[2].strip()):
            name = moment[1].strip()
            if name in moments:
                raise TargetError(f"{name!r} has two moments in {text!r}; give one")
            features[name], moments[name] = score if name == "score" else _feature(name), float(moment[2])
        elif part.startswith("score/"):
            fixed.append(ScalarTarget(_number(part.removeprefix("score/"), part)))
        else:
            fixed.append(BinaryTarget(_feature(part)))
    return WrittenTarget(text, tuple(fixed), features, moments)


def _feature(text: str) -> Feature:
    kind, colon, rest = text.partition(":")
    if colon and rest.strip():
        match kind:
            case "word":
                return contains(rest)
            case "words":
                return contains(*rest.split(","))
            case "regex":
                return matches(rest)
            case "reward" if rest.startswith(">"):
                return above(score, _number(rest.removeprefix(">"), text))
    raise TargetError(f"{text!r} is no target; write {KINDS}, or several joined by ' & '")


def _number(text: str, part: str) -> float:
    if not NUMBER.fullmatch(text.strip()):
        raise TargetError(f"{text!r} in the target {part!r} is no number; write one such as 0.5")
    return float(text)
