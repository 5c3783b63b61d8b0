"""What can be wrong with comparisons, one class each; every message names the place and the remedy."""

from __future__ import annotations


class BadPreferences(ValueError):
    """Comparisons, or answers to them, that cannot be used as they are."""


class IdenticalResponses(BadPreferences):
    """Two responses of a comparison are the same tokens, so nothing can be preferred."""


class DifferentPrompts(BadPreferences):
    """Responses that are compared answer different prompts."""


class EmptyText(BadPreferences):
    """A prompt or a response has no tokens."""


class MissingColumns(BadPreferences):
    """A row lacks columns, or a column holds something of another kind."""


class UnknownTokenIds(BadPreferences):
    """Token ids are negative or beyond the vocabulary."""


class WrongRanks(BadPreferences):
    """Ranks that are not one per response, or that no ranking has."""


class NonFiniteNumber(BadPreferences):
    """A score, margin or probability is NaN, or is outside its range."""


class AllTied(BadPreferences):
    """Nothing is preferred to anything."""


class NoChatTemplate(BadPreferences):
    """Chat messages, and a tokenizer that does not say how to write them as a text."""


class OtherPairs(BadPreferences):
    """A person's answers belong to other pairs than those at hand."""


class Interrupted(BadPreferences):
    """A file ends in the middle, or has fewer groups than were asked for."""


class OtherSettings(BadPreferences):
    """A file was made with other settings, or by something else."""
