"""The head of a classifier: the one that reads the last token, and the one that has a single output instead."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from tokenmdp.models.adapters import HEADS
from tokenmdp.reward_models.scores import ScoreRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_token_head(model: PreTrainedModel) -> nn.Module | None:
    """The head of a causal classifier that pools the last token; None for every other model.

    transformers' causal classifiers all call their linear head ``score``. Whether the backbone is causal is tested, not
    assumed: the first token's hidden state must not change with the second token.
    """
    head = dict(model.named_children()).get("score")
    if not isinstance(head, nn.Linear):
        return None
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    return head if torch.allclose(hidden[0, 0], hidden[1, 0], atol=1e-6, equal_nan=True) else None


def one_label(model: PreTrainedModel, rule: ScoreRule, name: str) -> PreTrainedModel:
    """A copy of a classifier in float32 whose only output is the score.

    The head's rows are subtracted: ``score = (w[plus] - w[minus]) h + b[plus] - b[minus]``, the same number up to
    rounding.

    Raises:
        ValueError: the last layer of the model, ``name`` in the message, is not linear.
    """
    place = next((place for place in HEADS if _is_head(model, place)), None)
    if place is None:
        raise ValueError(f"{name} ends in no linear layer with a row per label, so its outputs cannot become one")
    plain = copy.deepcopy(model).float()
    head = plain.get_submodule(place)
    one = nn.Linear(head.in_features, 1, bias=head.bias is not None)
    for part, whole in ((one.weight, head.weight), (one.bias, head.bias)):
        if part is not None:
            rows = whole[rule.plus] if rule.minus is None else whole[rule.plus] - whole[rule.minus]
            part.data.copy_(rows.detach())
    plain.set_submodule(place, one)
    plain.config.num_labels = plain.num_labels = 1
    plain.config.id2label, plain.config.label2id = {0: rule.words}, {rule.words: 0}
    return plain


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether the module ``name`` is a linear layer with a row per label."""
    module = dict(model.named_modules()).get(name)
    return isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
