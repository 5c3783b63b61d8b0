"""Hugging Face sequence classifiers as reward models: causal (GPT-2, Llama, ...) and encoders (BERT, DistilBERT, ...).

The text is exactly the episode's prompt and response ids; nothing is added, unless the model was trained here with an
end-of-text token behind every text and says so (`tokenmdp.reward_models.scores.Reading`). The pooled token, whose
attention row is the credit row, is the last token of a causal model's text and the first one of an encoder's.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenmdp.models.adapters import refuse_adapters
from tokenmdp.models.attention_rows import capture_rows, install
from tokenmdp.models.encoding import start_ids, vocab_size
from tokenmdp.models.sizes import check_finite, embedding_rows, position_limit
from tokenmdp.models.tokens import VocabularyMismatch
from tokenmdp.reward_models.base import EmbeddedTexts, RewardModel
from tokenmdp.reward_models.compact_texts import Rows, compact, response_positions, response_slots, whole, with_end
from tokenmdp.reward_models.heads import last_token_head, one_label
from tokenmdp.reward_models.padding_probe import reads_padding
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

logger = logging.getLogger(__name__)


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
        check_finite(dict(model.named_parameters()), name or model.name_or_path or type(model).__name__)
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
        self.head = last_token_head(model)
        self._start = [] if tokenizer is None else start_ids(tokenizer)
        if tokenizer is not None and not self._start and self.head is None and tokenizer.cls_token_id is not None:
            self._start = [tokenizer.cls_token_id]
        self.fill = 0
        if self.head is None and model.config.pad_token_id is not None:
            self.fill = model.config.pad_token_id  # RoBERTa derives its positions from it
        pooled_first = self.head is None and model.config.model_type in FIRST_TOKEN_POOLED
        self.by_length = False
        self.by_length = reads_padding(
            model, lambda rows: self._forward(rows)[0], fill=self.fill, max_tokens=self.max_tokens, name=str(self)
        )
        provides = {"gradients"}
        if self.by_length:
            logger.info("%s reads padding: texts of one length are scored together, without attention rows", self)
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
            response=response_positions(rows, episodes),
            score=lambda changed, index: self._forward(Rows(*(part[index] for part in rows)), changed)[0],
            to_slots=lambda row: response_slots(row, rows, episodes),
            average=self._average_embedding,
        )

    def _average_embedding(self) -> torch.Tensor:
        """The mean embedding (C,) over the vocabulary, float32; of what the layer returns, which may scale its rows."""
        ids = torch.arange(embedding_rows(self.model), device=self.model.device)
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
            spare = embedding_rows(self.model) - vocab_size(tokenizer)
            if not 0 <= spare < PADDED_ROWS:
                raise VocabularyMismatch(
                    f"the environment's tokenizer has {len(tokenizer)} tokens and {self} has "
                    f"{embedding_rows(self.model)} rows: these are different vocabularies; pass tokenizer= with the "
                    "tokenizer that the reward model was trained with"
                )
            warnings.warn(
                f"{self} has no tokenizer files, so only the sizes of the vocabularies were compared ({len(tokenizer)} "
                f"tokens, {embedding_rows(self.model)} rows); save its tokenizer into the same directory",
                stacklevel=2,
            )
        self._check_rows(tokenizer)

    def save_one_label(self, directory: str | Path) -> None:
        """Write the model with one output, the score, as other libraries read reward models (TRL: ``num_labels=1``).

        The score is the same number up to rounding; see `tokenmdp.reward_models.heads.one_label`. The tokenizer is
        written too.

        Raises:
            ValueError: the model's last layer is not linear.
        """
        one_label(self.model, self._rule, str(self)).save_pretrained(directory)
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
        if tokenizer is not None and embedding_rows(self.model) < vocab_size(tokenizer):
            raise VocabularyMismatch(
                f"{self} has {embedding_rows(self.model)} embedding rows, fewer than the "
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
        rows = whole(ids)
        with torch.no_grad(), capture_rows(torch.zeros_like(rows.last)[:, None]) as capture:
            self._forward(rows)
        return capture.seen
