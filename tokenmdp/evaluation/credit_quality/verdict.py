"""Whether a reward model's attention row says anything about where its score came from, in words."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmdp.credit.weights import NEARLY_UNIFORM
from tokenmdp.intervals import Estimate

# Of the mean Spearman correlation with |leave-one-out|. Small models trained from scratch have means of .0 to .2
# without further training; a model whose row was trained to follow leave-one-out reaches .57.
WEAK, INFORMATIVE = 0.1, 0.3
LITTLE_MASS = 0.1


@dataclass(frozen=True)
class AttentionVerdict:
    """Statistics of the attention rows of N texts over the response."""

    spearman: Estimate  # of the row with |leave-one-out|, per text
    entropy: float  # of the renormalised row, as a share of its maximum; mean
    mass: float  # the row's share on the response, before renormalising; mean
    below_floor: float  # share of texts whose mass is too small to use
    texts: int  # with a rank correlation
    unusable: int = 0  # without one: the row or leave-one-out is the same for all tokens

    @property
    def level(self) -> str:
        """One of "informative", "weakly informative", "not informative" and "unknown".

        Not: most texts fall back to uniform credit, or the interval of the rank correlation reaches below `WEAK`.
        Unknown: at most half of the texts have a rank correlation. Informative: the interval lies above `INFORMATIVE`
        as a whole, and the entropy is at most `NEARLY_UNIFORM`. Weakly: everything between.
        """
        if self.below_floor > 0.5:  # they have no rank correlation either, and no other texts would help
            return "not informative"
        if self.unusable >= self.texts:
            return "unknown"
        if self.spearman.low < WEAK:
            return "not informative"
        if self.spearman.low >= INFORMATIVE and self.entropy <= NEARLY_UNIFORM:
            return "informative"
        return "weakly informative"

    def __str__(self) -> str:
        """One paragraph with the numbers and the thresholds."""
        notes = []
        if self.entropy > NEARLY_UNIFORM:
            notes.append("the row is nearly uniform, so attention credit is nearly uniform credit")
        if self.mass < LITTLE_MASS:
            notes.append("most of the row lies outside the response")
        if self.below_floor:
            notes.append(f"{self.below_floor:.0%} of the texts fall back to uniform credit")
        verdict = f"The attention is {self.level}"
        if self.level == "unknown":
            verdict = (
                f"These texts do not show whether the attention is informative: on {self.unusable} of "
                f"{self.unusable + self.texts} it has no rank correlation with |leave-one-out|, because one of the two "
                "is the same for all tokens. Choose texts (--texts) with words that the reward model minds"
            )
        return (
            f"{verdict}{''.join(f'; {note}' for note in notes)}. Spearman correlation of the row "
            f"with |leave-one-out| {self.spearman} over {self.texts} texts, entropy {self.entropy:.2f} of its maximum, "
            f"response mass {self.mass:.2f}. Informative: the whole interval at least {INFORMATIVE} and entropy at "
            f"most {NEARLY_UNIFORM}; not informative: most texts fall back, or the interval reaches below {WEAK}; "
            "weakly: between."
        )
