"""A reward model from comparisons: Bradley-Terry, noisy labels, margins, or utilities by kind of prompt.

One update: one forward per response of a batch of prompts, however many pairs a ranking gives; the loss of the pairs'
scores; one step. Reads top to bottom.

    from tokenmdp.agents.reward_model import RewardModelLearner, RewardModelConfig
    from tokenmdp.models.loading import load_tokenizer
    from tokenmdp.preferences import read_preferences

    records = read_preferences("runs/pairs.jsonl", load_tokenizer("imdb-tiny"))
    learner = RewardModelLearner("imdb-tiny", records, RewardModelConfig(total_updates=100))
    learner.learn(100)
    learner.save("runs/rm/checkpoint")                    # a directory for reward_model=

Scores are log-odds of being preferred. Their constant says nothing; a checkpoint records the mean over (some of) the
responses of the data as ``shift``, so that its scores start near 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tokenmdp.agents.data import DataConfig, DataLearner, Example, Reads
from tokenmdp.models.lora import add_adapters
from tokenmdp.models.precision import resolve_dtype
from tokenmdp.models.sizes import embedding_rows, position_limit
from tokenmdp.preference_losses import UTILITIES, bradley_terry_loss, utility_loss
from tokenmdp.preferences import BadPreferences, Comparison, Preference
from tokenmdp.reward_models.learning import LearningClassifier, empty_classifier, start_classifier
from tokenmdp.training.checkpoint import Format
from tokenmdp.training.typed import require
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from accelerate import Accelerator

EXAMPLES_TO_CENTRE = 256  # of the data; the mean score of their responses becomes the shift


@dataclass(frozen=True)
class RewardModelConfig(DataConfig):
    """The numbers of one run. Defaults fit the bundled 4.5M-parameter model and some thousand pairs."""

    learning_rate: float = 3e-4  # of the whole model
    batch_size: int = 32  # prompts with their responses per update
    utilities: str = ""  # "" is Bradley-Terry; a utility for all prompts, such as "x"; or by kind: "closed=x,open=-1/x"
    error_rate: float = 0.0  # Bradley-Terry: the share of labels that are coin flips
    centring: float = 0.0  # Bradley-Terry: weight of (sum of both scores)**2
    append_eos: bool = False  # reads an end-of-text token behind every text; saved with the model, which then does so
    unit_scale: bool = False  # a checkpoint's scores also have sd 1 on the data; else they are log-odds

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "centring", "not negative")
        if not 0 <= self.error_rate < 1:
            raise ValueError(f"error_rate is {self.error_rate}; it is a share of labels below 1")
        utilities = read_utilities(self.utilities)
        if utilities and (self.error_rate or self.centring):
            raise ValueError("error_rate and centring belong to Bradley-Terry; leave them out with utilities")


def read_utilities(text: str) -> dict[str, str]:
    """Kind of prompt -> utility; "" stands for all other kinds.

    Raises:
        ValueError: there is no such utility.

    >>> read_utilities("closed=x,open=-1/x"), read_utilities("x"), read_utilities("")
    ({'closed': 'x', 'open': '-1/x'}, {'': 'x'}, {})
    """
    found = {}
    for part in filter(None, text.split(",")):
        kind, _, name = part.rpartition("=")
        if name.strip() not in UTILITIES:
            raise ValueError(f"utilities has {part!r}; a utility is one of {', '.join(UTILITIES)}, as in closed=x")
        found[kind.strip()] = name.strip()
    return found


class Pairs(NamedTuple):
    """Which responses of one example are preferred to which others."""

    better: list[int]
    worse: list[int]
    margins: list[float]
    kind: str


class RewardModelLearner(DataLearner):
    """A sequence classifier that learns to score responses as they were preferred.

    Args:
        model: Alias, directory or hub name: a causal language model or an encoder gets a new head, a one-label
            classifier goes on learning.
        records: Comparisons and rankings, in the tokens of that model.
        config: The run's numbers.
        accelerator: For a run in several processes.

    Raises:
        BadPreferences: a kind of prompt without a utility, or margins with utilities.
        UnknownTokenIds: ids that the model does not have.
    """

    config_class = RewardModelConfig
    format = Format("reward-model", 1)
    learns_from = "comparisons"
    model_name = "reward model"
    config: RewardModelConfig

    def __init__(
        self,
        model: str,
        records: Sequence[Preference],
        config: RewardModelConfig | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        super().__init__([example_of(record) for record in records], config, accelerator)
        cfg, device = self.config, self.processes.device(self.config.device)
        self.utilities = read_utilities(cfg.utilities)
        self._check_kinds()
        classifier, self._tokenizer = start_classifier(model, cfg.seed)
        learning = LearningClassifier(
            classifier.to(device),  # type: ignore[arg-type]
            self._tokenizer, cfg.append_eos, resolve_dtype(cfg.dtype, device), cfg.gradient_checkpointing,
        )  # fmt: skip
        Reads(model, embedding_rows(classifier), learning.reader.max_tokens).check(self.examples)
        if cfg.lora_rank:
            add_adapters(learning, cfg.lora_rank, cfg.lora_alpha, cfg.lora_target_modules, cfg.seed)
        self.prepare(learning)

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        return self._tokenizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The whole model, or its adapters and head."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": self.config.learning_rate}]

    def losses(self, rows: np.ndarray, episodes: Episode) -> dict[str, torch.Tensor]:
        """The loss of the pairs, and how often and by how much the preferred response scores higher."""
        scores = self.learner(*episodes)  # (sum of K,)
        found, start = [], 0
        for row in rows:
            one = self.examples[row]
            pairs: Pairs = one.facts
            own = scores[start : start + len(one.responses)]
            start += len(one.responses)
            better, worse = own[pairs.better], own[pairs.worse]
            gap = (better - worse).detach()
            correct = (gap > 0).float() + (gap == 0).float() / 2
            found.append(torch.stack([self._loss(better, worse, pairs), correct.mean(), gap.mean()]))
        means = torch.stack(found).mean(0)
        return dict(zip(("loss", "accuracy", "score_gap"), means, strict=True))

    def _loss(self, better: torch.Tensor, worse: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        if self.utilities:
            return utility_loss(better, worse, self.utilities.get(pairs.kind, self.utilities.get("", "")))
        margins = better.new_tensor(pairs.margins)
        return bradley_terry_loss(better, worse, margins, self.config.centring, self.config.error_rate)

    @property
    def coin_flips(self) -> float | None:
        """The share of labels that it takes for coin flips; None: with utilities, scores are not log-odds."""
        return None if self.utilities else self.config.error_rate

    def score_pairs(self, pairs: Sequence[Comparison]) -> torch.Tensor:
        """The raw scores, without shift and scale, of chosen and rejected responses; (n, 2) float32 on the CPU."""
        return self.scores([example_of(pair) for pair in pairs]).view(-1, 2)

    def scores(self, examples: Sequence[Example]) -> torch.Tensor:
        """The raw scores of all responses, example by example, on the CPU, without gradient."""
        size = self.config.batch_size
        with torch.no_grad():
            found = [
                self.model(*self.lay_out(examples[start : start + size])).cpu()
                for start in range(0, len(examples), size)
            ]
        return torch.cat(found)

    def save(self, directory: Any) -> None:
        """As `Learner.save`; shift and scale are those of the responses of the first `EXAMPLES_TO_CENTRE` examples."""
        with self.processes.whole_weights(self.model):
            scores = self.scores(self.examples[:EXAMPLES_TO_CENTRE])
        spread = float(scores.std(correction=0))
        self.model.set_reading(float(scores.mean()), 1 / spread if self.config.unit_scale and spread else 1.0)
        super().save(directory)

    def _check_kinds(self) -> None:
        if not self.utilities:
            return
        for place, one in enumerate(self.examples):
            if one.facts.kind not in self.utilities and "" not in self.utilities:
                raise BadPreferences(
                    f"record {place} has the kind {one.facts.kind!r}, and utilities has none for it "
                    f"({self.config.utilities!r}); add {one.facts.kind or 'KIND'}=U, or one U for all other kinds"
                )
            if any(one.facts.margins):
                raise BadPreferences(f"record {place} has a margin, which only Bradley-Terry uses; leave out utilities")


def what_it_reads(name: str, append_eos: bool) -> Reads:
    """Of a start that is not loaded yet."""
    model = empty_classifier(name)
    limit = position_limit(model)
    return Reads(name, embedding_rows(model), limit and limit.tokens - append_eos)


def example_of(record: Preference) -> Example:
    """The tokens of a comparison or a ranking, and its pairs."""
    if isinstance(record, Comparison):
        pairs = Pairs([0], [1], [record.margin or 0.0], record.kind)
        return Example(record.prompt_ids, (record.chosen_ids, record.rejected_ids), facts=pairs)
    ordered = [
        (one, other) if record.ranks[one] < record.ranks[other] else (other, one)
        for one, other in combinations(range(len(record.ranks)), 2)
        if record.ranks[one] != record.ranks[other]
    ]
    better, worse = (list(places) for places in zip(*ordered, strict=True))
    return Example(
        record.prompt_ids, record.responses_ids, facts=Pairs(better, worse, [0.0] * len(better), record.kind)
    )
