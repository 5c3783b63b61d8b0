"""What every learner needs that learns from given data: batches that a resumed run repeats, one step per update."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch

from tokenmdp.agents.learner import Learner, LearnerConfig, Metrics
from tokenmdp.files import CheckpointError
from tokenmdp.preferences import BadPreferences
from tokenmdp.preferences.records import check_vocabulary
from tokenmdp.training.batches import FORWARD_SLOTS, length_groups
from tokenmdp.training.typed import require
from tokenmdp.types import Episode, lay_out
from tokenmdp.wording import count

if TYPE_CHECKING:
    from accelerate import Accelerator

Ids = Sequence[int]


@dataclass(frozen=True)
class DataConfig(LearnerConfig):
    """The numbers of one run that every algorithm has which learns from data."""

    needs_total: ClassVar[bool] = False

    batch_size: int = 64  # examples per update: prompts with their responses
    epochs: int = 1  # passes over the data, unless the number of updates is given
    learning_rate: float = 1e-4  # of the language model
    anneal_lr: bool = True  # learning rates fall linearly to 0 over total_updates

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "batch_size epochs", "positive")


@dataclass(frozen=True)
class Example:
    """A prompt and its responses in tokens, as one record of the data gives them."""

    prompt: Ids
    responses: tuple[Ids, ...]
    size: float = 1.0  # what it counts for in the mean over a batch
    facts: Any = None  # whatever else the algorithm needs of the record, as JSON has it


class Reads(NamedTuple):
    """What a model reads."""

    model: str
    vocab_size: int
    max_tokens: int | None  # None: there is no limit

    def check(self, examples: Sequence[Example], source: str | None = None) -> None:
        """Refuse examples with other ids, or with more of them.

        Args:
            examples: All that the model is to read.
            source: Where they come from, one by one, for the message; None: the caller has them.

        Raises:
            BadPreferences: with the first such example.
        """
        for place, one in enumerate(examples):
            where = f"record {place}" if source is None else f"{source}: record {place + 1}"
            for ids in (one.prompt, *one.responses):
                check_vocabulary(ids, self.vocab_size, where)
            length = len(one.prompt) + max(map(len, one.responses))
            if self.max_tokens is not None and length > self.max_tokens:
                raise BadPreferences(
                    f"{where}: a prompt with its longest response has {length} tokens and {self.model} reads "
                    f"{self.max_tokens}; leave such records out, or start from a model with more positions"
                )


class DataLearner(Learner):
    """Learns from a list of examples, ``batch_size`` per update, in a new random order in every pass over them.

    Args:
        examples: All processes pass the same ones.
        config: The run's numbers.
        accelerator: For a run in several processes.

    Raises:
        ValueError: there are no examples.
    """

    state = ("data_digest",)

    def __init__(self, examples: Sequence[Example], config: Any, accelerator: Accelerator | None) -> None:
        super().__init__(config, accelerator)
        if not examples:
            raise ValueError(f"{type(self).__name__} got no examples to learn from; give at least one")
        self.examples = examples
        self.sizes = torch.tensor([one.size for one in examples], dtype=torch.float64)
        self.lengths = np.array([(len(one.prompt), max(map(len, one.responses))) for one in examples])
        self._digest = digest(examples)
        if self.config.total_updates is None:
            self.config = replace(self.config, total_updates=self.config.epochs * self.updates_per_epoch)

    @property
    def updates_per_epoch(self) -> int:
        """Updates that see every example once."""
        return math.ceil(len(self.examples) / self.config.batch_size)

    @property
    def data_digest(self) -> str:
        """Of the examples; a checkpoint goes on with the same ones only."""
        return self._digest

    @data_digest.setter
    def data_digest(self, saved: str) -> None:
        if saved != self._digest:
            raise CheckpointError(
                f"the checkpoint was trained on other data: digest {saved[:12]}, and of these {len(self.examples)} "
                f"examples {self._digest[:12]}; pass the same data, or start a new run from its weights"
            )

    def losses(self, rows: np.ndarray, episodes: Episode) -> dict[str, torch.Tensor]:
        """Means over some examples, weighted by their sizes: ``"loss"``, which has the gradient, and others to log.

        Args:
            rows: (n,) of ``examples``.
            episodes: All their responses, example by example, on the model's device.
        """
        raise NotImplementedError

    def update(self) -> Metrics:
        """One step on the batch of this update."""
        batch = self._batch(self.num_updates_done)
        rows, weight = self.processes.part(batch, self.sizes)
        metrics = self.means([self.gradient(self._parts(rows.numpy(), weight))])
        self.optimizer.step()
        tokens = sum(len(one) for row in batch.tolist() for one in self.examples[row].responses)
        return metrics | {"epoch": self.num_updates_done / self.updates_per_epoch, "response_tokens": float(tokens)}

    def batch_words(self) -> str:
        """Such as "64 of 1024 examples"."""
        return f"{min(self.config.batch_size, len(self.examples))} of {count(len(self.examples), 'example')}"

    def lay_out(self, examples: Sequence[Example]) -> Episode:
        """All responses of some examples, example by example, on the model's device."""
        prompts = [one.prompt for one in examples for _ in one.responses]
        responses = [response for one in examples for response in one.responses]
        return Episode(*(column.to(self.generator.device) for column in lay_out(prompts, responses)))

    def _parts(self, rows: np.ndarray, weight: float) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
        # Processes wait for each other in every backward, so all must have the same number of them.
        forward_slots = FORWARD_SLOTS if self.processes.size == 1 else math.inf
        for group in length_groups(self.lengths[rows, 0], self.lengths[rows, 1], forward_slots):
            chosen = rows[group]
            share = float(self.sizes[chosen].sum() / self.sizes[rows].sum())
            yield weight * share, self.losses(chosen, self.lay_out([self.examples[row] for row in chosen]))

    def _batch(self, update: int) -> torch.Tensor:
        """The rows of an update (n,): they depend on the seed and its number only, so a resumed run repeats them."""
        epoch, place = divmod(update, self.updates_per_epoch)
        seed = int(np.random.SeedSequence((self.config.seed, epoch)).generate_state(1)[0])
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(seed))
        return order[place * self.config.batch_size :][: self.config.batch_size]


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the tokens and of what is said about them, hexadecimal."""
    found = hashlib.sha256()
    for one in examples:
        ids = [list(map(int, one.prompt)), [list(map(int, response)) for response in one.responses]]
        found.update(json.dumps([*ids, one.facts]).encode())
    return found.hexdigest()
