"""A reward model that reads the policy's text with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import TYPE_CHECKING, NamedTuple

import torch

from tokenmdp.models.encoding import CHAT, chat_format, chat_frame, start_ids
from tokenmdp.models.tokens import VocabularyMismatch, decoded, growing_texts
from tokenmdp.reward_models.alignment import UNFINISHED, move, overlap_shares, prefix_ranges, shared_length, token_spans
from tokenmdp.reward_models.base import EmbeddedTexts, RewardModel
from tokenmdp.types import Episode, RewardOutput, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "{prompt}{response}"
MOVABLE = frozenset({"attention", "attention_layers", "prefix_scores", "gradients"})
TEXTS_AT_ONCE = 256  # prefixes in one forward: a batch of episodes has one text per token


class _Row(NamedTuple):
    """One episode in the environment's tokens, special tokens left out."""

    prompt_ids: list[int]
    ids: list[int]
    slots: list[int]  # the response slot of each of ``ids``


class _Text(NamedTuple):
    """A filled template and where the response is in it, in characters."""

    whole: str
    start: int
    end: int


class _Reading(NamedTuple):
    """N filled templates in the inner model's tokens; its response is J slots, from ours to the end of the text."""

    episodes: Episode
    spans: torch.Tensor  # (N, J, 2) float64
    silent: torch.Tensor  # (N,) bool: no text; one token stands in


class RetokenizedRewardModel(RewardModel):
    """``inner`` reads ``template`` filled with the decoded prompt and response; credit comes back by characters.

    ``attention[i] = sum_j inner_attention[j] * |span of j and span of i| / |span of j|`` over the tokens j of
    ``inner`` that hold some of the response (see `tokenmdp.reward_models.alignment`). What ``inner`` says about the
    prompt, the template and tokens without text belongs to no response token.

    The text: prompt and response as the environment's tokenizer decodes them, without its special tokens (end of text
    among them), so these get no credit. A character begun in the prompt and finished in the response belongs to the
    response. ``inner`` reads the text as its tokenizer encodes it, with what that adds ([CLS] and [SEP], <s>), unless
    the text begins with it already. Special tokens spelled out in the template or the response are read as such.

    ``prefix_scores[t]`` is the score of the template filled with the first t response tokens. That costs one forward
    per token: prefixes do not end at the ends of ``inner``'s tokens, so a single forward does not give their scores.

    Args:
        inner: a reward model with a fast tokenizer.
        tokenizer: of the episodes, the environment's.
        template: has ``{response}`` once and may have ``{prompt}``; literal braces are doubled. "chat": the chat
            template of ``inner``'s tokenizer, with the prompt as the user's message (taken out of the chat template of
            ``tokenizer``, if it stands in one) and nothing added by the tokenizer.
        add_special_tokens: False leaves out what ``inner``'s tokenizer adds.

    Raises:
        ValueError: a template without ``{response}``, or ``inner`` has no tokenizer that gives character offsets.

    >>> from tokenmdp.models.loading import load_tokenizer
    >>> from tokenmdp.reward_models.lexicon import load_lexicon
    >>> model = RetokenizedRewardModel(load_lexicon("lexicon"), load_tokenizer("toy"))
    >>> ids = torch.tensor([model.tokenizer("the film was great but dull")["input_ids"]])
    >>> mask = torch.ones_like(ids, dtype=torch.bool)
    >>> output = model(Episode(ids, mask, mask[:, 3:]), needs=frozenset({"attention"}))
    >>> output.score.item(), [round(share, 2) for share in output.attention[0].tolist()]
    (0.5, [0.57, 0.0, 0.43])
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        inner: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str = PLAIN,
        add_special_tokens: bool = True,
    ) -> None:
        super().__init__(tokenizer)
        if inner.tokenizer is None:
            raise ValueError(
                f"{inner} has no tokenizer files, so it cannot read text; save its tokenizer into the same directory"
            )
        if not inner.tokenizer.is_fast:
            raise ValueError(
                f"{inner} reads with {type(inner.tokenizer).__name__}, a slow tokenizer, which gives no character "
                "offsets to move credit by; load its fast form, which AutoTokenizer builds from a tokenizer.json"
            )
        check_template(template)
        self.inner = inner
        self.inner_tokenizer = inner.tokenizer
        self.template = chat_format(inner.tokenizer) if template == CHAT else template
        self._adds = add_special_tokens and template != CHAT
        self._start = start_ids(inner.tokenizer) if self._adds else []
        self.provides = inner.provides & MOVABLE
        self.meaning = inner.meaning
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | set(tokenizer.all_special_ids)
        self._frame = chat_frame(tokenizer, self._special) if template == CHAT else None

    def evaluate(self, episodes: Episode, needs: frozenset[str]) -> RewardOutput:
        """Scores (N,) and what is asked for: one forward of ``inner``, and for prefix scores one more per token."""
        rows = self._rows(episodes)
        texts = [self._fill(row) for row in rows]
        reading = self._encode(texts)
        output = self._ask(reading, needs - {"prefix_scores"})
        attention, layers, prefixes = output.attention, output.attention_layers, None
        if attention is not None or layers is not None:
            theirs, ours = reading.spans, self._spans(rows, texts, episodes.response_mask.shape[-1])
            attention = None if attention is None else move(attention, theirs, ours)
            layers = None if layers is None else move(layers, theirs[:, None, None], ours[:, None, None])
        if "prefix_scores" in needs:
            prefixes = self._prefix_scores(rows, output.score, episodes)
        return RewardOutput(output.score, attention, layers, prefixes)

    def embedded(self, episodes: Episode) -> EmbeddedTexts:
        """The texts as ``inner``'s input embeddings; ``response`` marks its tokens that hold some of the response."""
        rows = self._rows(episodes)
        texts = [self._fill(row) for row in rows]
        reading = self._encode(texts)
        inner = self.inner.embedded(reading.episodes)
        device = inner.embeddings.device
        theirs = reading.spans.to(device)
        ours = self._spans(rows, texts, episodes.response_mask.shape[-1]).to(device)
        silent = reading.silent.to(device)
        positions = torch.arange(1, inner.response.shape[-1] + 1, dtype=torch.float64, device=device)  # 0: none
        places = inner.to_slots(positions.expand(inner.response.shape)).long()  # (N, L) -> (N, J)
        held = overlap_shares(theirs, ours).any(-1)  # (N, J): tokens of the prompt or the template alone are not
        response = torch.zeros(len(places), len(positions) + 1, dtype=torch.bool, device=device)
        response.scatter_(-1, places * held, True)
        return EmbeddedTexts(
            embeddings=inner.embeddings,
            response=response[:, 1:],
            score=lambda changed, index: inner.score(changed, index).masked_fill(silent[index], 0.0),
            to_slots=lambda numbers: move(inner.to_slots(numbers), theirs, ours),
            average=inner.average,
        )

    @property
    def device(self) -> torch.device:
        """The device of ``inner``."""
        return self.inner.device

    def remedy(self) -> str:
        """How to get a named model instead of this object."""
        return "Give the environment the inner model's name with align='offsets' and reward_template="

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def _rows(self, episodes: Episode) -> list[_Row]:
        """The tokens that the masks show, in order."""
        rows, first = [], episodes.prompt_slots
        for ids, shown in zip(episodes.input_ids.tolist(), episodes.attention_mask.bool().tolist(), strict=True):
            kept = [slot for slot in range(len(ids)) if shown[slot] and ids[slot] not in self._special]
            response = [slot for slot in kept if slot >= first]
            prompt_ids = [ids[slot] for slot in kept if slot < first]
            rows.append(_Row(prompt_ids, [ids[slot] for slot in response], [slot - first for slot in response]))
        return rows

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded(self.tokenizer, ids)

    def _fill(self, row: _Row) -> _Text:
        """The template with the row's prompt and response."""
        decoded = self._decode(row.prompt_ids + row.ids)
        end = shared_length(self._decode(row.prompt_ids).rstrip(UNFINISHED), decoded)
        prompt, response = decoded[:end], decoded[end:]  # of the response ids alone, the first blank would be lost
        if self._frame is not None:  # a chat prompt: its message alone
            head, tail = self._frame
            if prompt.startswith(head) and prompt.endswith(tail) and len(prompt) >= len(head + tail):
                prompt = prompt[len(head) : len(prompt) - len(tail)]
        whole, start = "", 0
        for literal, name, _, _ in Formatter().parse(self.template):
            whole += literal
            if name == "response":
                start = len(whole)
            whole += {"prompt": prompt, "response": response, None: ""}[name]
        return _Text(whole, start, start + len(response))

    def _encode(self, texts: Sequence[_Text]) -> _Reading:
        """The texts in ``inner``'s tokens. The response lasts to the end: its last token may be the pooled one.

        Raises:
            ValueError: more tokens than ``inner`` has positions.
        """
        rows = [
            self.inner_tokenizer(
                text.whole,
                add_special_tokens=self._adds,
                return_offsets_mapping=True,
                truncation=False,
                verbose=False,  # of long texts; the error below says more
            )
            for text in texts
        ]
        double = len(self._start)  # start tokens that the text spells out, so that they would be read twice
        encoded = {
            key: [row[key][double if row["input_ids"][: 2 * double] == 2 * self._start else 0 :] for row in rows]
            for key in ("input_ids", "offset_mapping")
        }
        heads, tails, owned, limit = [], [], [], self.inner.max_tokens
        for row, text in enumerate(texts):
            ids, ranges = encoded["input_ids"][row], encoded["offset_mapping"][row]
            if limit is not None and len(ids) > limit:
                raise ValueError(
                    f"the text of row {row} has {len(ids)} tokens of {self.inner}, which has {limit} positions; lower "
                    "max_new_tokens or max_prompt_tokens, shorten the template, or use a reward model with more "
                    "positions"
                )
            before = [place for place, (start, end) in enumerate(ranges) if start < end <= text.start]
            first = before[-1] + 1 if before else 0
            heads.append(ids[:first] if ids else [0])
            tails.append(ids[first:])
            owned.append(token_spans(ranges)[first:])
        theirs = torch.nn.utils.rnn.pad_sequence(owned, batch_first=True)  # (N, J, 2)
        silent = torch.tensor([not ids for ids in encoded["input_ids"]])
        return _Reading(lay_out(heads, tails), theirs, silent)

    def _ask(self, reading: _Reading, needs: frozenset[str] = frozenset()) -> RewardOutput:
        """The output of ``inner``; a text without any token scores 0."""
        output = self.inner(reading.episodes, needs=needs, empty_responses=True)
        return output._replace(score=output.score.masked_fill(reading.silent, 0.0))

    def _spans(self, rows: Sequence[_Row], texts: Sequence[_Text], horizon: int) -> torch.Tensor:
        """The spans (N, H, 2) of the environment's response tokens in the filled texts."""
        ours = torch.zeros(len(rows), horizon, 2, dtype=torch.float64)
        for own, row, text in zip(ours, rows, texts, strict=True):
            # The prompt is one more token, which may hold part of the response's first character.
            prefixes = growing_texts(self._decode, row.prompt_ids + row.ids, len(row.prompt_ids))
            own[row.slots] = token_spans(prefix_ranges(prefixes))[1:] + (text.end - len(prefixes[-1]))
        return ours

    def _prefix_scores(self, rows: Sequence[_Row], score: torch.Tensor, episodes: Episode) -> torch.Tensor:
        """(N, H+1): the score of the prompt and the first t response tokens, 0 after the end."""
        texts = [
            self._fill(_Row(row.prompt_ids, row.ids[:count], row.slots[:count]))
            for row in rows
            for count in range(len(row.ids))
        ]
        parts = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
        scores = torch.cat([score[:0], *(self._ask(self._encode(part)).score for part in parts)])
        masks = episodes.response_mask.bool().cpu()
        prefixes = torch.zeros(len(rows), masks.shape[-1] + 1)
        each = scores.split([len(row.ids) for row in rows])
        for prefix, row, before, last, mask in zip(prefixes, rows, each, score, masks, strict=True):
            by_count = torch.cat([before, last[None]])
            added = torch.zeros_like(mask, dtype=torch.long)
            added[row.slots] = 1  # a special token adds nothing to the text
            prefix[0] = by_count[0]
            prefix[1:] = by_count[added.cumsum(0)] * mask
        return prefixes


def readable_by(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, template: str = PLAIN, add_special_tokens: bool = True
) -> RewardModel | RetokenizedRewardModel:
    """``model`` if it reads the ids of ``tokenizer`` and the template adds nothing, else a model that decodes them.

    Raises:
        ValueError: of `RetokenizedRewardModel`, or of ``model`` if it has no tokenizer and its vocabulary differs.
    """
    if template == PLAIN:
        try:
            model.check_tokenizer(tokenizer)
        except VocabularyMismatch:
            if model.tokenizer is None:
                raise
        else:
            return model
    return RetokenizedRewardModel(model, tokenizer, template, add_special_tokens)


def check_template(template: str) -> None:
    """Refuse a template that does not show the response exactly once.

    Raises:
        ValueError: with the template.
    """
    if template == CHAT:
        return
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"the template {template!r} is not a format string ({error}); double literal braces"
        ) from error
    known = all(field in (("prompt", "", None), ("response", "", None)) for field in fields)
    if not known or sum(field[0] == "response" for field in fields) != 1:
        raise ValueError(
            f"the template {template!r} must have {{response}} once and nothing else in braces but {{prompt}}, for "
            f"example {PLAIN!r}; double literal braces"
        )
