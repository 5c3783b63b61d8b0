"""Credit methods measured in a world: every method on the same texts, with intervals over texts and counted cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from tokenmdp.credit import (
    REWARD_MODEL_NEEDS,
    CreditMethod,
    MissingResource,
    attention_weights,
    row_entropy,
)
from tokenmdp.evaluation.credit_quality.ablation import AblatedScores, curve_areas, leave_one_out
from tokenmdp.evaluation.credit_quality.counting import NO_POLICY, PolicyAccess, run_counted
from tokenmdp.evaluation.credit_quality.metrics import area_under_roc, credit_order, important_tokens, rank_correlation
from tokenmdp.evaluation.credit_quality.verdict import AttentionVerdict
from tokenmdp.evaluation.credit_quality.worlds import World
from tokenmdp.intervals import Estimate, bootstrap_interval
from tokenmdp.reward_models import RewardModel, readable_by
from tokenmdp.types import Episode

METRICS = ("spearman", "spearman_abs", "auc", "deletion", "insertion")
CONTROLS = ("reference", "random")  # the ceiling and the floor of each column
TEXTS_AT_ONCE = 20
EXAMPLES = 4
MAX_FORWARDS = 65_000  # 500 texts of a Shapley game with a budget of 128


@dataclass
class MethodQuality:
    """One method's row of the table."""

    name: str
    needs: list[str]
    unavailable: str | None = None  # the reason
    stopped: str | None = None  # if it covers fewer texts than there are: the reason
    texts: int = 0
    reward_forwards: float = 0.0  # per text, including the forward that scores
    policy_forwards: float = 0.0  # per text
    metrics: dict[str, Estimate] = field(default_factory=dict)


@dataclass
class WorldQuality:
    """The measurements in one world."""

    world: World
    methods: list[MethodQuality]  # the controls first
    attention: AttentionVerdict | None  # None: the reward model shows no attention
    examples: dict[str, torch.Tensor]  # method -> credit (n, H) of the world's first texts


class _Tally:
    """One method's results so far."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
        self.examples: torch.Tensor | None = None
        self.texts = self.reward_forwards = self.policy_forwards = 0
        self.unavailable: str | None = None
        self.stopped: str | None = None

    def add(self, credit: torch.Tensor, metrics: Mapping[str, torch.Tensor]) -> None:
        if self.examples is None:
            self.examples = credit[:EXAMPLES]
        self.texts += len(credit)
        for name, column in metrics.items():
            self.columns[name].append(column.numpy())

    def quality(self, name: str, needs: frozenset[str], seed: int) -> MethodQuality:
        if self.unavailable is not None:
            return MethodQuality(name, sorted(needs), self.unavailable)
        if not self.texts:
            return MethodQuality(name, sorted(needs), self.stopped)
        intervals = {}
        for metric, parts in self.columns.items():
            column = np.concatenate(parts)
            defined = column[np.isfinite(column)]
            if len(defined) > 1:
                intervals[metric] = bootstrap_interval(defined, seed)
        reward_forwards, policy_forwards = self.reward_forwards / self.texts, self.policy_forwards / self.texts
        return MethodQuality(
            name, sorted(needs), None, self.stopped, self.texts, reward_forwards, policy_forwards, intervals
        )


def measure(
    world: World,
    methods: Mapping[str, CreditMethod],
    *,
    access: PolicyAccess = NO_POLICY,
    max_forwards: int = MAX_FORWARDS,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> WorldQuality:
    """Compare the credit of every method with the world's reference, on the same texts.

    Per text: Spearman's correlation with the reference, and of the absolute values; the area under the ROC curve of
    ``|credit|`` for the reference's top quarter of tokens (`important_tokens`); the areas of the deletion and the
    insertion curve (`curve_areas`). Means over texts with bootstrap intervals; texts on which a number is not defined
    are left out of it. Two controls: "reference" has the reference as its credit, "random" noise.

    The credit is taken as the method delivers it, with what it adds to the last token so that the sum is the score.
    Costs are counted, not estimated, see `run_counted`; the forwards that measure are not among them. A method
    stops after the batch of texts in which it has spent ``max_forwards``, so an expensive one is measured on the first
    texts only; it also stops at a text that it refuses; `MethodQuality.stopped` says why. A method that needs something
    that is missing is reported with the reason.

    Args:
        world: texts, reward model and reference.
        methods: name -> method.
        access: the policies that methods may read.
        max_forwards: of the reward model, per method.
        seed: of the resampling, the random control and the order of equal credit.
        progress: called with the number of texts done.
    """
    tallies = {name: _Tally() for name in (*CONTROLS, *methods)}
    plain = readable_by(world.model, world.tokenizer)
    rows = _RowStatistics()
    num = len(world.episodes.input_ids)
    for start in range(0, num, TEXTS_AT_ONCE):
        noise = torch.Generator().manual_seed(seed + start)
        part = slice(start, start + TEXTS_AT_ONCE)
        episodes = Episode(*(tensor[part] for tensor in world.episodes))
        mask = episodes.response_mask
        scores = AblatedScores(plain, episodes)
        importance = leave_one_out(scores, mask)
        reference = importance if world.known is None else world.known[part]
        score = scores(mask[:, None])[:, 0]
        credits = {"reference": reference, "random": torch.randn(mask.shape, generator=noise) * mask}
        tallies["reference"].reward_forwards += int(mask.sum()) + len(mask) if world.known is None else 0
        for name, method in methods.items():
            tally = tallies[name]
            if tally.unavailable is None and tally.stopped is None:
                if tally.reward_forwards >= max_forwards:
                    tally.stopped = f"it has spent its {max_forwards} reward-model forwards (--max-forwards)"
                    continue
                if lacking := (method.needs & REWARD_MODEL_NEEDS) - plain.provides:
                    tally.unavailable = f"{plain} does not provide {', '.join(sorted(lacking))}"
                    continue
                try:
                    counted = run_counted(method, episodes, world.model, world.tokenizer, access)
                except MissingResource as error:
                    tally.unavailable = str(error)
                    continue
                except ValueError as error:
                    tally.stopped = f"it failed in texts {start + 1} to {start + len(mask)}: {error}"
                    continue
                credits[name] = counted.credit.token_rewards.detach()
                tally.reward_forwards += counted.reward_forwards
                tally.policy_forwards += counted.policy_forwards
        for name, credit in credits.items():
            ties = torch.Generator().manual_seed(seed + start)  # its own, so that no method depends on the others
            order = credit_order(credit, score, mask, ties)
            areas = curve_areas(scores, order, mask, score, reference.abs().sum(-1))
            metrics = {
                "spearman": rank_correlation(credit, reference, mask),
                "spearman_abs": rank_correlation(credit.abs(), reference.abs(), mask),
                "auc": area_under_roc(credit, important_tokens(reference, mask), mask),
                **areas._asdict(),
            }
            tallies[name].add(credit, metrics)
        rows.add(plain, episodes, importance)
        if progress is not None:
            progress(min(start + TEXTS_AT_ONCE, num))
    needs = {name: frozenset[str]() for name in CONTROLS} | {name: method.needs for name, method in methods.items()}
    qualities = [tally.quality(name, needs[name], seed) for name, tally in tallies.items()]
    examples = {name: tally.examples for name, tally in tallies.items() if tally.examples is not None}
    return WorldQuality(world, qualities, rows.verdict(seed), examples)


class _RowStatistics:
    """The attention rows of the texts so far, if the model shows them."""

    def __init__(self) -> None:
        self.columns: list[torch.Tensor] = []  # (n, 4) each: Spearman, entropy, mass, fell back

    def add(self, model: RewardModel, episodes: Episode, importance: torch.Tensor) -> None:
        if "attention" not in model.provides:
            return
        mask = episodes.response_mask
        row = model(episodes, needs=frozenset({"attention"})).attention
        assert row is not None  # the model declares that it provides it
        alpha, mass, fell_back = attention_weights(row, mask)
        correlation = rank_correlation(alpha, importance.abs(), mask)
        self.columns.append(torch.stack([correlation, row_entropy(alpha, mask), mass, fell_back.double()], dim=-1))

    def verdict(self, seed: int) -> AttentionVerdict | None:
        if not self.columns:
            return None
        every = torch.cat(self.columns)
        correlations = every[:, 0][every[:, 0].isfinite()]
        if len(correlations) < 2:
            return None
        _, entropy, mass, fell_back = every.mean(0).tolist()
        return AttentionVerdict(
            bootstrap_interval(correlations.numpy(), seed), entropy, mass, fell_back,
            texts=len(correlations), unusable=len(every) - len(correlations),
        )  # fmt: skip
