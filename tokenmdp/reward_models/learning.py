"""A sequence classifier while it learns to score: where it starts, its differentiable scores, how it is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenmdp.models.forwards import check_recompute, forwards
from tokenmdp.models.hub import quiet
from tokenmdp.models.loading import find_adapter, load_causal_lm, load_config, load_own_tokenizer, load_weights
from tokenmdp.models.names import ALIASES, Kind
from tokenmdp.reward_models.classifier import HFRewardModel
from tokenmdp.reward_models.scores import READING, Reading
from tokenmdp.types import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLASSIFIER = "ForSequenceClassification"  # how transformers ends the names of such architectures


class LearningClassifier(nn.Module):
    """A one-label classifier whose scores have a gradient. Dropout stays off.

    Args:
        classifier: With one label; changed in place.
        tokenizer: Of the texts.
        append_eos: Read an end-of-text token behind texts that do not end with one. Saved with the model.
        compute_dtype: ``torch.bfloat16`` runs the forwards under autocast; weights and scores stay float32.
        gradient_checkpointing: Compute activations again in the backward: less memory, more time.

    Attributes:
        lm: The classifier; the name under which adapters look for layers.
    """

    def __init__(
        self,
        classifier: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        append_eos: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if classifier.config.num_labels != 1:
            raise ValueError(
                f"{type(classifier).__name__} has {classifier.config.num_labels} labels and a reward model learns one "
                "score: start from a language model, or write the classifier with HFRewardModel.save_one_label first"
            )
        self.lm = classifier.float()
        if gradient_checkpointing:
            check_recompute(classifier)
        self.gradient_checkpointing, self.compute_dtype = gradient_checkpointing, compute_dtype
        self.append_eos = append_eos
        self.set_reading(0.0, 1.0)
        self.reader = HFRewardModel(classifier, tokenizer)
        self.lm.requires_grad_(True)

    def forward(self, *episodes: torch.Tensor) -> torch.Tensor:
        """Scores (N,) of the columns of an `Episode`."""
        with forwards(self.lm, self.compute_dtype, self.gradient_checkpointing):
            return self.reader.score_with_gradient(Episode(*episodes))

    def set_reading(self, shift: float, scale: float) -> None:
        """Record how the scores are read once the model is saved: ``(logit - shift) * scale``."""
        setattr(self.lm.config, READING, Reading(self.append_eos, shift, scale)._asdict())

    def save_pretrained(self, directory: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write a directory that ``AutoModelForSequenceClassification.from_pretrained`` and ``reward_model=`` read."""
        state = self.state_dict() if state is None else state
        with quiet():
            self.lm.save_pretrained(
                directory, state_dict={name.removeprefix("lm."): value for name, value in state.items()}
            )

    @property
    def _no_split_modules(self) -> Any:
        """Class names of the layers, by which accelerate shards."""
        return self.lm._no_split_modules


def empty_classifier(name: str) -> PreTrainedModel:
    """The classifier of this name without its weights, on the meta device: for its sizes."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(load_config(kind_of(name), name))


def kind_of(name: str) -> Kind:
    """What a name stands for as a start: a language model, unless it is the alias of a reward model alone.

    >>> kind_of("imdb-tiny"), kind_of("imdb-gold")
    ('policy', 'reward_model')
    """
    return "policy" if name not in ALIASES or "policy" in ALIASES[name] else "reward_model"


def start_classifier(name: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier with one label to train, and its tokenizer.

    Args:
        name: Alias, directory or hub name. Of a one-label classifier: as it is. Of any other model, such as a causal
            language model or an encoder with a head for masked words: its backbone under a new head, and a new pooler
            where it was saved without one.
        seed: Of the new head.

    Raises:
        ModelNotFound, CheckpointError: as for every model.
        ValueError: it comes without a tokenizer.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    kind = kind_of(name)
    config, tokenizer = load_config(kind, name), load_own_tokenizer(kind, name)
    adapter = find_adapter(kind, name)
    if adapter is not None and adapter.num_labels is not None:  # it brings a head, whatever its base is
        kind = "reward_model"
    if kind == "reward_model" or any(one.endswith(CLASSIFIER) for one in config.architectures or ()):
        loader = AutoModelForSequenceClassification.from_pretrained
        return load_weights(loader, kind, name, torch.float32), tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if adapter is None:
            backbone = load_weights(AutoModel.from_pretrained, kind, name, torch.float32, fresh="pooler.")
        else:  # merged where it belongs, below the head that it was trained with
            backbone = load_causal_lm(name).base_model  # type: ignore[assignment]
        config = copy.deepcopy(backbone.config)
        config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
        config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
        torch.manual_seed(seed)
        classifier = AutoModelForSequenceClassification.from_config(config).float()
    weights = backbone.state_dict()  # RoBERTa's has a pooler, which its classifier does without
    classifier.base_model.load_state_dict({key: weights[key] for key in classifier.base_model.state_dict()})
    return classifier.eval(), tokenizer
