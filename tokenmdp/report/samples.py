"""A finished episode as readable text: one record per sample, one piece of text per token."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """One finished episode as text; ``tokens[t]`` and ``credits[t]`` belong to response token t."""

    prompt: str
    tokens: list[str]
    credits: list[float]
    score: float
    facts: dict[str, float] = field(default_factory=dict)  # further numbers to show, such as kl

    @property
    def text(self) -> str:
        """The prompt and the response as one string."""
        return self.prompt + "".join(self.tokens)
