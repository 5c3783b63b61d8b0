"""Hugging Face sequence classifiers as reward models: causal (GPT-2, Llama, ...) and encoders (BERT, DistilBERT, ...).

The text is exactly the episode's prompt and response ids; nothing is added, unless the model was trained here with an
end-of-text token behind every text and says so (`tokenmdp.reward_models.scores.Reading`). The pooled token, whose attention row is
the credit row, is the last response token of a causal model and the first token of an encoder.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from tokenmdp.models.adapters import HEADS, refuse_adapters
from tokenmdp.models.attention_rows import capture_rows, install
from tokenmdp.models.encoding import start_ids, vocab_size
from tokenmdp.models.loading import ModelNotFound, from_pretrained, load_weights, tokenizer_home
from tokenmdp.models.sizes import check_finite, position_limit
from tokenmdp.models.tokens import VocabularyMismatch
from tokenmdp.reward_models.base import EmbeddedTexts, RewardModel
from tokenmdp.reward_models.scores import Reading, Score, score_rule
from tokenmdp.types import Episode, RewardOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Encoders whose classification head reads the first token and whose attention goes through AttentionInterface.
FIRST_TOKEN_POOLED = frozenset({"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "albert"})
PADDED_ROWS = 1024  # a vocabulary padded for speed has fewer unused rows than this; with more it is another vocabulary
IDS_AT_ONCE = 4096  # embeddings to hold while they are averaged
SLOTS_AT_ONCE = {"cpu": 1 << 12}  # texts times length in a forward
OTHER_SLOTS_AT_ONCE = 1 << 17
LONG_PROBE, SHORT_PROBES = 48, 3  # the length of one text, the number of shorter ones, which try what padding changes
PROBE_TOLERANCE = 1e-4  # of the largest score
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

logger = logging.getLogger(__name__)


class Rows(NamedTuple):
    """Texts without gaps: every row's tokens from position 0, right-padded."""

    input_ids: torch.Tensor  # (N, L) int64
    mask: torch.Tensor  # (N, L) bool
    slots: torch.Tensor  # (N, L) int64: the episode slot that each came from

    @property
    def last(self) -> torch.Tensor:
        """The index of each row's last token, (N,)."""
        return self.mask.sum(-1) - 1


def compact(episodes: Episode, fill: int = 0) -> Rows:
    """Close the gaps of left-padded prompts and right-padded responses; L is the longest text, ``fill`` the padding.

    >>> mask = torch.tensor([[False, True, True, False]])
    >>> rows = compact(Episode(torch.tensor([[9, 5, 6, 9]]), mask, mask[:, 2:]))
    >>> rows.input_ids.tolist(), rows.slots.tolist()
    ([[5, 6]], [[1, 2]])
    """
    occupied = episodes.attention_mask.bool()
    lengths = occupied.sum(-1)
    slots = (~occupied).int().argsort(dim=-1, stable=True)[:, : int(lengths.max())]  # occupied first, in order
    mask = torch.arange(slots.shape[-1], device=slots.device) < lengths[:, None]
    return Rows(torch.where(mask, episodes.input_ids.gather(-1, slots), fill), mask, slots)


def response_slots(row: torch.Tensor, rows: Rows, episodes: Episode) -> torch.Tensor:
    """Put rows over compact positions (N, ..., L) back on the response slots (N, ..., H), zero where there is no token.

    >>> mask = torch.tensor([[False, True, True, False]])
    >>> episodes = Episode(torch.tensor([[9, 5, 6, 9]]), mask, mask[:, 2:])
    >>> response_slots(torch.tensor([[0.25, 0.75]]), compact(episodes), episodes).tolist()
    [[0.75, 0.0]]
    """
    middle, slots_in_all = (1,) * (row.dim() - 2), episodes.input_ids.shape[-1]
    slots = rows.slots.to(row.device).view(len(row), *middle, -1).expand_as(row)
    mask = rows.mask.to(row.device).view(len(row), *middle, -1)
    full = torch.zeros(*row.shape[:-1], slots_in_all + 1, dtype=row.dtype, device=row.device)  # and an end's slot
    full.scatter_(-1, slots, row * mask)  # (N, ..., P+H+1)
    response_mask = episodes.response_mask.to(row.device).view(len(row), *middle, -1)
    return full[..., episodes.prompt_slots : slots_in_all] * response_mask


def _response_positions(rows: Rows, episodes: Episode) -> torch.Tensor:
    """Which compact positions hold response tokens, (N, L) bool."""
    return rows.mask & (rows.slots >= episodes.prompt_slots) & (rows.slots < episodes.input_ids.shape[-1])


def with_end(rows: Rows, end: int, slot: int) -> Rows:
    """The texts with the token ``end`` behind those that do not end with it; ``slot`` is where those come from.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> rows = with_end(Rows(torch.tensor([[5, 9], [6, 0]]), mask, torch.tensor([[0, 1], [0, 1]])), end=9, slot=2)
    >>> rows.input_ids.tolist(), rows.mask.sum(-1).tolist(), rows.slots.tolist()
    ([[5, 9, 0], [6, 9, 0]], [2, 2], [[0, 1, 2], [0, 2, 2]])
    """
    lacks = (rows.input_ids.gather(-1, rows.last[:, None])[:, 0] != end).nonzero()[:, 0]
    ids, mask, slots = (pad(part, (0, 1), value=value) for part, value in zip(rows, (0, False, slot), strict=True))
    behind = rows.last[lacks] + 1
    ids[lacks, behind], mask[lacks, behind], slots[lacks, behind] = end, True, slot
    return Rows(ids, mask, slots)


class HFRewardModel(RewardModel):
    """A transformers sequence classifier.

    ``score="auto"``: the logit of a model with one label, ``logit[positive] - logit[negative]`` of one with two whose
    names say which is which; an index or a label picks one logit, "A - B" a difference (see
    `tokenmdp.reward_models.scores.score_rule`; ``meaning`` says in words what was taken). Scores are float32 whatever
    the model's dtype. The model is put in eval mode and switched to an attention implementation that is sdpa and can
    capture a row.

    Scores of a text do not depend on the texts beside it: that is tried on a few tokens, and where the model reads the
    padding behind a text (FNet, ConvBERT, ...) only texts of one length are read together, and no rows are captured.

    Args:
        model: from AutoModelForSequenceClassification, on its device and in its dtype.
        tokenizer: the model's own; None compares vocabulary sizes only.
        score: "auto", the index of a label, its name, or "LABEL - LABEL".
        name: what `load_reward_model` reloads it from (specs and pickles).

    Raises:
        ValueError: several labels that do not tell the score and no index, an index out of range, an encoder-decoder,
            adapters of peft, a model that mixes the texts of a batch.
        VocabularyMismatch: the tokenizer has more tokens than the model has rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        score: Score = "auto",
        name: str | None = None,
    ) -> None:
        refuse_adapters(model)
        check_finite(model, name or type(model).__name__)
        dtype = str(model.dtype).removeprefix("torch.")
        super().__init__(tokenizer, name=name, options={"score": score, "dtype": dtype, "device": str(model.device)})
        if model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} is an encoder-decoder; use a causal classifier or an encoder")
        reading = Reading.of(model.config, name or type(model).__name__)
        self._rule = score_rule(score, model.config, name or type(model).__name__).moved(reading)
        self.meaning = self._rule.words
        self.model = model.eval()
        self.score = score
        if getattr(model.config, "attention_type", None) == "block_sparse":
            raise ValueError(
                f"{type(model).__name__} with attention_type='block_sparse' draws its attention at random and changes "
                "it for good with the first short text; load it with attention_type='original_full' (in config.json)"
            )
        self.end = self._end_token(tokenizer) if reading.append_eos else None
        if (limit := position_limit(model)) is not None:
            self.max_tokens, self.limit_reason = limit
            if self.end is not None:
                self.max_tokens -= 1
                self.limit_reason += ", one of them for the end-of-text token"
        self._check_rows(tokenizer)
        can_capture = install(model)
        self.head = _last_token_head(model)
        self._start = [] if tokenizer is None else start_ids(tokenizer)
        if tokenizer is not None and not self._start and self.head is None and tokenizer.cls_token_id is not None:
            self._start = [tokenizer.cls_token_id]
        self.fill = 0
        if self.head is None and model.config.pad_token_id is not None:
            self.fill = model.config.pad_token_id  # RoBERTa derives its positions from it
        pooled_first = self.head is None and model.config.model_type in FIRST_TOKEN_POOLED
        self.by_length = False
        self.by_length = self._reads_padding()
        provides = {"gradients"}
        if self.by_length:
            self.provides = frozenset(provides)
            return
        if can_capture and (self.head is not None or pooled_first) and self._captures():
            provides |= {"attention", "attention_layers"}
        # An encoder's first token has read the whole text, and a prefix has no end-of-text token behind it.
        if self.head is not None and self.end is None:
            provides |= {"prefix_scores"}
        self.provides = frozenset(provides)

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        """Scores (N,) and, from the same forward, the pooled token's rows and the scores of all prefixes, if asked.

        The rows are those of `RewardOutput`; prefix scores are the head's answer at every position of a causal model.
        Many texts are read a part at a time, so that memory does not grow with their number.
        """
        slots = SLOTS_AT_ONCE.get(self.device.type, OTHER_SLOTS_AT_ONCE)
        size = max(slots // episodes.input_ids.shape[-1], 1)
        parts = zip(*(column.split(size) for column in episodes), strict=True)
        outputs = [self._read(Episode(*part), needs) for part in parts]
        return RewardOutput._make(
            None if column[0] is None else torch.cat(column) for column in zip(*outputs, strict=True)
        )

    def _read(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        rows = self._prepare(episodes)
        pooled = torch.zeros_like(rows.last) if self.head is None else rows.last
        with torch.no_grad():
            if not needs & {"attention", "attention_layers"}:
                capture, (score, hidden) = None, self._forward(rows)
            else:
                with capture_rows(pooled[:, None], every_layer="attention_layers" in needs) as capture:
                    score, hidden = self._forward(rows)
            row = layers = prefixes = None
            if capture is not None and "attention" in needs:
                row = response_slots(capture.rows()[:, 0], rows, episodes)
            if capture is not None and "attention_layers" in needs:
                layers = response_slots(capture.layers()[..., 0, :], rows, episodes)
            if "prefix_scores" in needs:
                prefixes = self._prefix_scores(hidden, rows, episodes)
        return RewardOutput(score, row, layers, prefixes)

    def score_with_gradient(self, episodes: Episode) -> torch.Tensor:
        """The scores (N,), float32, differentiable in the model's weights."""
        return self._forward(self._prepare(episodes))[0]

    def embedded(self, episodes: Episode) -> EmbeddedTexts:
        """The texts as the model's input embeddings, with a differentiable score of them."""
        rows = self._prepare(episodes)
        with torch.no_grad():
            embeddings = self.model.get_input_embeddings()(rows.input_ids)  # (N, L, C)
        return EmbeddedTexts(
            embeddings=embeddings,
            response=_response_positions(rows, episodes),
            score=lambda changed, index: self._forward(Rows(*(part[index] for part in rows)), changed)[0],
            to_slots=lambda row: response_slots(row, rows, episodes),
            average=self._average_embedding,
        )

    def _average_embedding(self) -> torch.Tensor:
        """The mean embedding (C,) over the vocabulary, float32; of what the layer returns, which may scale its rows."""
        ids = torch.arange(_vocabulary_rows(self.model), device=self.model.device)
        layer, total = self.model.get_input_embeddings(), torch.zeros(())
        with torch.no_grad():
            for part in ids.split(IDS_AT_ONCE):
                total = total + layer(part).float().sum(0)
        return total / len(ids)

    def _prepare(self, episodes: Episode) -> Rows:
        """The texts without gaps, on the model's device; the model in eval mode."""
        if self.model.training:  # dropout would make scores random; the owner may have trained it since
            self.model.eval()
        rows = compact(episodes, self.fill)
        self._check_first_token(rows)
        if self.end is not None:
            rows = with_end(rows, self.end, episodes.input_ids.shape[-1])
        return Rows(*(part.to(self.model.device) for part in rows))

    def _forward(self, rows: Rows, embeddings: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores (N,) float32 of compact rows, and a causal model's hidden states (N, L, C).

        ``embeddings`` (N, L, C), if given, stand in for those of ``rows.input_ids``.
        """
        if self.by_length and not rows.mask.all():
            return self._forward_by_length(rows, embeddings), None
        inputs = {"input_ids": rows.input_ids} if embeddings is None else {"inputs_embeds": embeddings}
        if self.head is None:
            return self._number(self.model(attention_mask=rows.mask.long(), **inputs).logits), None
        # Causality hides right padding, so the mask is all ones: a mask with zeros would become T x T. The explicit
        # index, because the model's own search for the last id that is not pad skips an end token with pad's id.
        everything = torch.ones_like(rows.input_ids)
        hidden = self.model.base_model(attention_mask=everything, use_cache=False, **inputs).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), rows.last]  # (N, L, C) -> (N, C)
        return self._number(self.head(last)), hidden

    def _forward_by_length(self, rows: Rows, embeddings: torch.Tensor | None) -> torch.Tensor:
        """Scores (N,) from one forward per length of text, so that there is no padding to read."""
        lengths, scores, places = rows.last + 1, [], []
        for length in lengths.unique().tolist():
            members = (lengths == length).nonzero()[:, 0]
            part = Rows(*(column[members, :length] for column in rows))
            scores.append(self._forward(part, None if embeddings is None else embeddings[members, :length])[0])
            places.append(members)
        return torch.cat(scores)[torch.cat(places).argsort()]

    def _reads_padding(self) -> bool:
        """Whether a text's score changes with the padding behind it; then texts of one length are read together.

        Raises:
            ValueError: it changes with the other texts even where all have one length.
        """
        room = LONG_PROBE if self.max_tokens is None else min(self.max_tokens, LONG_PROBE)
        short, long = _probe(self.model, SHORT_PROBES, max(room // 4, 1)), _probe(self.model, 1, room)
        padded = torch.full((SHORT_PROBES, room), self.fill, device=self.model.device)
        padded[:, : short.shape[1]] = short
        mask = torch.ones(SHORT_PROBES + 1, room, dtype=torch.bool, device=self.model.device)
        mask[:-1, short.shape[1] :] = False
        with torch.no_grad():
            alone = torch.cat([self._forward(_whole(row[None]))[0] for row in short])
            together = self._forward(_whole(short))[0]
            ids = torch.cat([padded, long])
            beside = self._forward(Rows(ids, mask, torch.arange(room).expand_as(ids)))[0]
        if not torch.isfinite(beside).all():
            return False  # its first scores are refused as such
        rounding = max(PROBE_TOLERANCE, 8 * torch.finfo(self.model.dtype).eps) * float(beside.abs().max()) + 1e-6
        if (together - alone).abs().max() > rounding:
            raise ValueError(
                f"{self} scores a text otherwise beside other texts of its length (largest difference "
                f"{(together - alone).abs().max():.3g}), so its scores would depend on the batch; use another "
                "reward model, such as GPT-2, Llama, BERT or DistilBERT"
            )
        if (beside[:-1] - alone).abs().max() <= rounding:
            return False
        logger.info("%s reads padding: texts of one length are scored together, without attention rows", self)
        return True

    def _number(self, logits: torch.Tensor) -> torch.Tensor:
        """The score that the logits (..., K) stand for; (...,) float32."""
        return self._rule(logits)

    def _prefix_scores(self, hidden: torch.Tensor | None, rows: Rows, episodes: Episode) -> torch.Tensor:
        """(N, H+1): the score of the prompt and the first t response tokens; 0 after the end and for an empty text."""
        assert hidden is not None  # `provides` names prefix_scores for causal models only
        assert self.head is not None
        every = self._number(self.head(hidden))  # (N, L): after each token
        full = torch.zeros(episodes.input_ids.shape, dtype=every.dtype, device=every.device)
        full.scatter_(-1, rows.slots, every * rows.mask)  # (N, P+H)
        prompt_slots = episodes.prompt_slots
        asked = episodes.attention_mask[:, :prompt_slots].to(every.device)
        lengths = asked.sum(-1)
        alone = every[:, 0].new_zeros(len(every))
        if prompt_slots:
            alone = every.gather(-1, (lengths - 1).clamp(min=0)[:, None])[:, 0] * (lengths > 0)
        response = full[:, prompt_slots:] * episodes.response_mask.to(full.device)
        return torch.cat([alone[:, None], response], dim=-1)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise VocabularyMismatch unless every id of ``tokenizer`` names the same token in this model."""
        if self.tokenizer is not None:
            super().check_tokenizer(tokenizer)
        else:
            spare = _vocabulary_rows(self.model) - vocab_size(tokenizer)
            if not 0 <= spare < PADDED_ROWS:
                raise VocabularyMismatch(
                    f"the environment's tokenizer has {len(tokenizer)} tokens and {self} has "
                    f"{_vocabulary_rows(self.model)} rows: these are different vocabularies; pass tokenizer= with the "
                    "tokenizer that the reward model was trained with"
                )
            warnings.warn(
                f"{self} has no tokenizer files, so only the sizes of the vocabularies were compared ({len(tokenizer)} "
                f"tokens, {_vocabulary_rows(self.model)} rows); save its tokenizer into the same directory",
                stacklevel=2,
            )
        self._check_rows(tokenizer)

    def save_one_label(self, directory: str | Path) -> None:
        """Write the model with one output, the score, as other libraries read reward models (TRL: ``num_labels=1``).

        The head's rows are subtracted, in float32: ``score = (w[plus] - w[minus]) h + b[plus] - b[minus]``, the same
        number up to rounding. The tokenizer is written too.

        Raises:
            ValueError: the model's last layer is not linear.
        """
        name = next((name for name in HEADS if _is_head(self.model, name)), None)
        if name is None:
            raise ValueError(f"{self} ends in no linear layer with a row per label, so its outputs cannot become one")
        plain = copy.deepcopy(self.model).float()
        head, rule = plain.get_submodule(name), self._rule
        one = nn.Linear(head.in_features, 1, bias=head.bias is not None)
        for part, whole in ((one.weight, head.weight), (one.bias, head.bias)):
            if part is not None:
                rows = whole[rule.plus] if rule.minus is None else whole[rule.plus] - whole[rule.minus]
                part.data.copy_(rows.detach())
        plain.set_submodule(name, one)
        plain.config.num_labels = plain.num_labels = 1
        plain.config.id2label, plain.config.label2id = {0: rule.words}, {rule.words: 0}
        plain.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    def remedy(self) -> str:
        """How to get a named model instead of this object."""
        return (
            "Write it with model.save_pretrained(DIR) and tokenizer.save_pretrained(DIR), and pass DIR as reward_model"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is None:
            raise TypeError(f"{self} was built from objects, so it cannot be pickled. {self.remedy()}")
        return super().__reduce__()

    def _end_token(self, tokenizer: PreTrainedTokenizerBase | None) -> int:
        found = self.model.config.eos_token_id if tokenizer is None else tokenizer.eos_token_id
        if not isinstance(found, int):
            raise ValueError(
                f"{self} was trained with an end-of-text token behind every text (append_eos in its config.json), and "
                f"its end-of-text token is {found!r}; save its tokenizer into the same directory"
            )
        return found

    def _check_rows(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        if tokenizer is not None and _vocabulary_rows(self.model) < vocab_size(tokenizer):
            raise VocabularyMismatch(
                f"{self} has {_vocabulary_rows(self.model)} embedding rows, fewer than the "
                f"{vocab_size(tokenizer)} ids of the tokenizer; pass the tokenizer it was trained with, without tokens "
                "that were added later such as [PAD], or call model.resize_token_embeddings and train"
            )

    def _check_first_token(self, rows: Rows) -> None:
        first = rows.input_ids[:, : len(self._start)].cpu()
        if not self._start or first.shape[1] < len(self._start) or (first == torch.tensor(self._start)).all():
            return
        assert self.tokenizer is not None  # it has start tokens
        pooled = " and pools the first token" if self.head is None else ""
        warnings.warn(
            f"{self} reads texts that begin with {self.tokenizer.decode(self._start)!r}{pooled}, and this text does "
            "not; it is scored as it is, so begin the prompts with it (an environment does so for prompts given as "
            "texts)",
            stacklevel=4,
        )

    def _captures(self) -> bool:
        """Whether attention calls of this architecture reach our implementation; tested on two tokens."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        rows = Rows(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(2)[None])
        with torch.no_grad(), capture_rows(torch.zeros_like(rows.last)[:, None]) as capture:
            self._forward(rows)
        return capture.seen


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether the module ``name`` is a linear layer with a row per label."""
    module = dict(model.named_modules()).get(name)
    return isinstance(module, nn.Linear) and module.out_features == model.config.num_labels


def _probe(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """(rows, length) ids, the same at every call, none of them the padding's."""
    kept = [index for index in range(_vocabulary_rows(model)) if index != model.config.pad_token_id][:1000]
    places = torch.arange(rows * length).view(rows, length) * 7 + 3
    return torch.tensor(kept)[places % len(kept)].to(model.device)


def _whole(ids: torch.Tensor) -> Rows:
    """Texts without padding."""
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1]).expand_as(ids))


def load_classifier(name: str, *, score: Score, dtype: str, device: str) -> HFRewardModel:
    """A sequence classifier and its tokenizer from an alias, a directory or a hub repository.

    Raises:
        ModelNotFound: nothing has this name, or the hub cannot be reached.
        CheckpointError: the directory is damaged or holds no trained classifier.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asks for a GPU and torch sees none; pass 'cpu'")
    model = load_weights(AutoModelForSequenceClassification.from_pretrained, "reward_model", name, DTYPES[dtype])
    home, tokenizer = tokenizer_home("reward_model", name), None
    if home is not None:
        try:
            tokenizer = from_pretrained(AutoTokenizer.from_pretrained, "reward_model", home)
        except ModelNotFound:  # a hub repository without tokenizer files: sizes are compared instead
            tokenizer = None
    model.to(torch.device(device))  # type: ignore[arg-type]
    loaded = HFRewardModel(model, tokenizer, score=score, name=name)
    logger.info("the score of %s is %s", loaded, loaded.meaning)
    loaded.options = {"score": score, "dtype": dtype, "device": device}  # "cuda", not the "cuda:0" it became
    return loaded


def _vocabulary_rows(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def _last_token_head(model: PreTrainedModel) -> nn.Module | None:
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
