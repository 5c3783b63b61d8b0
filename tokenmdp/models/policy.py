"""A causal language model with a value head: sampling through a KV cache, scoring in one forward.

Sampling and scoring apply the *same* processing to the logits (the vocabulary's size, temperature, no early end of
text, top-k), because a log-probability under any other distribution makes the KL to the reference negative.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from tokenmdp.models.adapters import refuse_adapters
from tokenmdp.models.attention_rows import install
from tokenmdp.models.forwards import autocast, check_recompute, forwards
from tokenmdp.models.hub import quiet
from tokenmdp.models.kernels import packed_weights
from tokenmdp.models.kernels.onednn import use_onednn
from tokenmdp.models.kernels.token_scores import fuse_activations, token_scores
from tokenmdp.models.kernels.weight_copies import WeightCopies
from tokenmdp.models.kv_cache import make_cache
from tokenmdp.models.loading import check_loads, load_causal_lm
from tokenmdp.models.names import resolve
from tokenmdp.models.policy_checks import check_logits, reads_padding
from tokenmdp.models.policy_fit import check_positions, check_rows, check_vocabulary, warn_of_other_ends
from tokenmdp.models.recorded_steps import COLUMNS, RecordedSteps
from tokenmdp.models.sizes import capped, check_finite, logit_cap, output_layer
from tokenmdp.models.token_distribution import DecodeState, TokenScores, draw, process_logits
from tokenmdp.models.values import heads_values, load_part, new_head
from tokenmdp.types import TokenSpace, response_rows

VALUE_HEAD_FILE, VALUE_MODEL_FILE = "value_head.safetensors", "value_model.safetensors"
# What a policy does to its logits, and how it computes.
SETTINGS = (
    "vocab_size", "eos_token_id", "eos_token_ids", "min_new_tokens", "temperature", "top_k", "compute_dtype",
    "gradient_checkpointing", "rollout_steps",
)  # fmt: skip
ROLLOUT_STEPS = ("plain", "copied", "recorded")
# Of transformers from 5.24 on; before it, of attention and of Mamba.
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")


class CausalLMPolicy(nn.Module):
    """Language model plus value head (zero at first, so a fresh policy values every state at 0).

    Attributes:
        lm: Any Hugging Face causal language model whose logits are ``lm_head(backbone(ids))`` or the soft cap of that,
            and which reads behind padding and through its cache as it reads a whole text (all three are tried). Where
            only the padding before a prompt matters, prompts of one length are needed. It is changed in place,
            to the same function: attention goes through `tokenmdp.models.attention_rows` where the architecture allows
            it (sdpa, whose rows can be captured), GPT-2's activation becomes one kernel, and on some CPUs layers
            multiply by oneDNN.
        value_model: None, or a transformer and a head that compute the values apart; see `separate_values`.
        vocab_size: V; models with padded vocabularies are sliced to the first V logits.
        eos_token_id: Masked out of the first ``min_new_tokens`` response tokens; the first of ``eos_token_ids``, which
            all are.
        min_new_tokens: Response tokens before the text may end.
        temperature: Divides the logits.
        top_k: Sample among the k most likely tokens; 0 is all.
        compute_dtype: ``torch.bfloat16`` runs the forwards under autocast; weights, softmax and values stay float32.
        gradient_checkpointing: A backward through `evaluate` computes the layers' activations again instead of keeping
            them: less memory, more time, the same gradients.
        rollout_steps: How `decoding` computes on a GPU; not run on one yet. ``"copied"``: by bfloat16 copies of the
            weights, where that is the ``compute_dtype``. ``"recorded"``: `collect` also replays a step that is
            recorded once (`tokenmdp.models.recorded_steps`), and ended rows stay.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        vocab_size: int,
        eos_token_id: int | Sequence[int],
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        compute_dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        rollout_steps: str = "plain",
    ):
        super().__init__()
        refuse_adapters(lm)
        check_finite(dict(lm.named_parameters()), lm.name_or_path or type(lm).__name__)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it divides the logits and must be positive")
        if not 0 <= top_k <= vocab_size:
            raise ValueError(f"top_k is {top_k}; choose 0 (all tokens) to {vocab_size} (the vocabulary)")
        if rollout_steps not in ROLLOUT_STEPS:
            raise ValueError(f"rollout_steps is {rollout_steps!r}; choose one of {', '.join(ROLLOUT_STEPS)}")
        check_rows(lm, vocab_size)
        self.rows, width = (int(size) for size in output_layer(lm).weight.shape)  # type: ignore[union-attr]
        self.lm = lm
        self.logit_cap = logit_cap(lm)
        accepted = inspect.signature(type(lm.base_model).forward).parameters
        self.takes_positions = "position_ids" in accepted
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in accepted), None)
        attends = hasattr(lm.config.get_text_config(), "num_attention_heads")
        self._recurrent = getattr(lm, "_is_stateful", False) and not attends  # as Mamba and xLSTM
        if self._cache_argument is None:
            raise ValueError(
                f"{type(lm).__name__} keeps no cache of what it has read, so it cannot sample a token at a time; use a "
                "causal language model such as GPT-2, Llama or Qwen2"
            )
        fuse_activations(lm)
        use_onednn(lm)
        install(lm)
        self.value_head = new_head(width, lm.device)
        self.value_model: nn.ModuleDict | None = None
        self._directory: Path | None = None
        self.eos_token_ids = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        self.vocab_size, self.eos_token_id, self.min_new_tokens = vocab_size, self.eos_token_ids[0], min_new_tokens
        self.temperature, self.top_k, self.compute_dtype = temperature, top_k, compute_dtype
        self.gradient_checkpointing, self.rollout_steps = gradient_checkpointing, rollout_steps
        self._recorded: RecordedSteps | None = None
        self._forget()
        if gradient_checkpointing:
            check_recompute(lm)
        self.eval()
        check_logits(self)
        self._one_prompt_length = reads_padding(self)

    @classmethod
    def from_pretrained(
        cls, name: str, vocab_size: int, eos_token_id: int | Sequence[int], **options: Any
    ) -> CausalLMPolicy:
        """Load an alias, a local directory or a hub name; a `save_pretrained` directory brings its value head.

        Raises:
            CheckpointError: the value head's file is damaged or belongs to another model.
            tokenmdp.models.names.ModelNotFound: there is no such model.
        """
        policy = cls(load_causal_lm(name, dtype=torch.float32), vocab_size, eos_token_id, **options)
        policy._directory = Path(resolve("policy", name))
        load_part(policy.value_head, policy._directory / VALUE_HEAD_FILE, "value head")
        return policy

    def separate_values(self) -> None:
        """Compute the values by a transformer of their own: a copy of the policy's, with its value head.

        Or by the one that `save_pretrained` wrote where this policy was loaded from. ``value_head`` is then a new one,
        0 and frozen. While it samples the policy gives values of 0, as it would read every token twice; `values` and
        `evaluate` give the value model's.
        """
        self.value_model = nn.ModuleDict({"lm": copy.deepcopy(self.lm.base_model), "head": self.value_head})
        self.value_head = new_head(self.value_head.in_features, self.lm.device).requires_grad_(False)
        if self._directory is not None:
            load_part(self.value_model, self._directory / VALUE_MODEL_FILE, "value model")

    @classmethod
    def for_task(cls, model: str | PreTrainedModel, task: TokenSpace, **options: Any) -> CausalLMPolicy:
        """A policy for the environments of ``task``; ``options`` are the others of the constructor.

        Raises:
            VocabularyMismatch: a named model whose own tokenizer is another one.
            ValueError: prompt and response do not fit its positions.
        """
        options |= {
            "vocab_size": task.vocab_size,
            "eos_token_id": task.eos_token_ids,
            "min_new_tokens": task.min_new_tokens,
        }
        if isinstance(model, str):
            check_vocabulary(model, task.tokenizer)
            policy = cls.from_pretrained(model, **options)
        else:
            policy = cls(model.float(), **options)
        warn_of_other_ends(policy.lm, policy.eos_token_ids)
        policy.check_positions(task.max_prompt_tokens + task.max_new_tokens)
        return policy

    def save_pretrained(self, directory: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write a directory that any ``from_pretrained`` reads, with the value head beside the model.

        Args:
            directory: created if it does not exist.
            state: weights to write instead of the policy's own, named as in its ``state_dict()``.

        Raises:
            CheckpointError: what was written cannot be loaded again.
        """
        state = self.state_dict() if state is None else state
        lm, head, value_model = (
            {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
            for part in ("lm.", "value_head.", "value_model.")
        )
        with quiet():
            self.lm.save_pretrained(directory, state_dict=lm)
        save_file(head, Path(directory) / VALUE_HEAD_FILE)
        place = Path(directory) / VALUE_MODEL_FILE
        if value_model:
            save_file(value_model, place)
        else:  # of what was saved here before
            place.unlink(missing_ok=True)
        check_loads(directory)

    def parameter_groups(
        self, learning_rate: float, vf_learning_rate: float, value_model_learning_rate: float = 0.0
    ) -> list[dict[str, Any]]:
        """The trained parameters in optimizer groups: the language model (or its adapters), then the value head.

        The head is new and the language model is not: at the rate that keeps a pretrained model intact, a head that
        starts at zero explains next to nothing of the returns for many updates. With a value model, its head is the
        second group and its transformer the third.

        Args:
            learning_rate: of the language model.
            vf_learning_rate: of the value head.
            value_model_learning_rate: of the value model's transformer, if there is one.

        Raises:
            ValueError: no weight of the language model learns, so that training would change nothing.
        """
        body = [weight for weight in self.lm.parameters() if weight.requires_grad]
        if not body:
            raise ValueError(
                f"no weight of the language model {type(self.lm).__name__} learns (all have requires_grad=False), so "
                "training would change nothing; call model.requires_grad_(True) before, or set lora_rank to train "
                "adapters beside frozen weights"
            )
        head = self.value_head if self.value_model is None else self.value_model["head"]
        groups = [{"params": body, "lr": learning_rate}, {"params": list(head.parameters()), "lr": vf_learning_rate}]
        if self.value_model is not None:
            learning = [weight for weight in self.value_model["lm"].parameters() if weight.requires_grad]
            groups.append({"params": learning, "lr": value_model_learning_rate})
        return groups

    @property
    def _no_split_modules(self) -> Any:
        """Class names of the layers, by which accelerate shards."""
        return self.lm._no_split_modules

    def train(self, mode: bool = True) -> CausalLMPolicy:
        """Stay in eval mode: dropout would move the log-probabilities before any update did."""
        return super().train(False)

    def autocast(self) -> torch.autocast:
        """The precision of the forwards. Entered around a whole loop, it casts each weight only once."""
        return autocast(self.lm, self.compute_dtype)

    @contextlib.contextmanager
    def decoding(self, rows: int, steps: int) -> Iterator[None]:
        """Enter around ``steps`` calls of `append` with ``rows`` texts: `autocast`, and packed weights where they pay.

        On a GPU bfloat16 copies of the weights, if ``rollout_steps`` asks for them. Without gradients; the weights must
        not change meanwhile.
        """
        device, dtype = self.lm.device, self.compute_dtype
        layers: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if steps >= packed_weights.FEWEST_STEPS and packed_weights.can_pack(device, dtype):
            layers = packed_weights.packed_layers(self.lm, dtype, rows)
        elif self.rollout_steps != "plain" and device.type != "cpu" and dtype == torch.bfloat16:
            copies = self._copies if self.rollout_steps == "recorded" else WeightCopies()
            layers = copies.used(self.lm)
        with torch.no_grad(), self.autocast(), layers:
            yield

    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, step: int = 0) -> DecodeState:
        """Read left-padded prompts (N, P), of different length if need be; the state before response token 0.

        With ``step`` every row's last ``step`` tokens are its response so far: the state before response token
        ``step``.
        """
        self._check_padding(attention_mask)
        return self._advance(make_cache(self.lm.config), input_ids, attention_mask.long(), step)

    def recorded(self, state: DecodeState, steps: int) -> DecodeState:
        """A state after `prefill`, to go on from by at most ``steps`` steps of one shape, if that is asked for.

        Within `decoding`. One recording is held, the last one, with its cache.

        Raises:
            ValueError: steps of this model cannot have one shape.
        """
        if self.rollout_steps != "recorded":
            return state
        rows, slots = state.attention_mask.shape
        shape = rows, -(-(slots + steps) // COLUMNS) * COLUMNS
        if self._recorded is None or self._recorded.shape != shape:
            self._recorded = None  # before the next one takes memory
            self._recorded = RecordedSteps(self, state, shape[1], steps)
        return self._recorded.begin(state)

    def _apply(self, *arguments: Any, **options: Any) -> CausalLMPolicy:
        """What moves weights, such as ``to``: a recording and copies are of the weights where they were."""
        self._forget()
        return super()._apply(*arguments, **options)

    def _forget(self) -> None:
        self._copies, self._recorded = WeightCopies(), None

    def append(self, state: DecodeState, token: torch.Tensor) -> DecodeState:
        """Append one token (N,) to every row; the cache of ``state`` is used up."""
        if isinstance(state.cache, RecordedSteps):
            with self.autocast():
                raw_logits, hidden = state.cache.append(self, token)
            return self._state(state.cache, state.attention_mask, state.step + 1, raw_logits, hidden)
        attention_mask = torch.cat([state.attention_mask, state.attention_mask.new_ones(len(token), 1)], dim=1)
        return self._advance(state.cache, token[:, None], attention_mask, state.step + 1)

    def select(self, state: DecodeState, rows: torch.Tensor) -> DecodeState:
        """The state of some ``rows`` (n,) int64 alone; the cache of ``state`` is used up.

        Raises:
            NotImplementedError: the model's cache has layers whose rows cannot be selected.
        """
        state.cache.batch_select_indices(rows)
        support = None if state.support is None else state.support[rows]
        return DecodeState(
            state.cache, state.attention_mask[rows], state.step, state.logits[rows], support, state.value[rows]
        )

    def act(
        self, state: DecodeState, uniform: torch.Tensor | None = None, deterministic: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose response token ``state.step``: (token int64, logprob float32, value float32), each (N,).

        Token c is drawn where ``CDF[c-1] <= uniform < CDF[c]``: one random number per row, so what a row draws does not
        depend on the other rows.

        Args:
            state: before the token.
            uniform: (N,) float64 in [0, 1); None draws from PyTorch's own generator.
            deterministic: takes the most likely token; its logprob is still the one under the distribution.
        """
        return draw(state, uniform, deterministic)

    def evaluate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_slots: int,
        support: torch.Tensor | None = None,
    ) -> TokenScores:
        """Score the response tokens of finished episodes: one forward, and one more of the value model if there is one.

        Args:
            input_ids: (N, P+H) int64.
            attention_mask: (N, P+H) bool.
            prompt_slots: P.
            support: (N, H, k) int64, the tokens the sampler chose among. Under top-k both policies must be compared
                on the sampler's tokens: on its own top k a changed policy may give a sampled token probability 0 and
                the ratio, like the KL, is infinite. None: this policy's own top k.
        """
        mask = attention_mask.long()
        self._check_padding(mask[:, :prompt_slots])
        with forwards(self.lm, self.compute_dtype, self.gradient_checkpointing):
            # The last token predicts nothing, so it is not read.
            hidden = self.read(input_ids[:, :-1], mask[:, :-1], use_cache=False).last_hidden_state
            hidden = response_rows(hidden, prompt_slots).contiguous()  # (N, H, C): row t speaks about response token t
            raw_logits = self.logits(hidden)  # only at response rows: V is the wide axis
        logits, support = self._process(raw_logits, 0, support)  # (N, H, V) or (N, H, k)
        response = input_ids[:, prompt_slots:]
        column = response if support is None else (support == response[..., None]).int().argmax(-1)
        logprobs, entropy = token_scores(logits, column)
        if self.value_model is None:
            values = self._values(hidden)
        else:  # the class's, as in `forward`
            values = type(self).values(self, input_ids, attention_mask, prompt_slots)
        return TokenScores(logprobs, values, entropy)

    def values(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_slots: int) -> torch.Tensor:
        """Values (N, H) of the response tokens by the value model; arguments as those of `evaluate`.

        Raises:
            ValueError: there is no value model.
        """
        if self.value_model is None:
            raise ValueError("the policy has no value model; call separate_values() first, or use evaluate().values")
        lm, head = self.value_model["lm"], self.value_model["head"]
        mask = attention_mask.long()
        with forwards(lm, self.compute_dtype, self.gradient_checkpointing):
            hidden = self.read(input_ids[:, :-1], mask[:, :-1], lm, use_cache=False).last_hidden_state
        return heads_values(head, response_rows(hidden, prompt_slots))

    def forward(self, *arguments: Any, **options: Any) -> TokenScores:
        """What data-parallel wrappers call: `evaluate`."""
        # The class's: sharding wraps the instance's own in a second pair of its forward hooks.
        return type(self).evaluate(self, *arguments, **options)

    def read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, transformer: Any = None, **options: Any
    ) -> Any:
        """The output of the model without its output layer; padding, where ``attention_mask`` is 0, takes no position.

        Args:
            input_ids: (N, L) int64.
            attention_mask: (N, S) int64, S >= L: of the cached slots too.
            transformer: of this architecture; default: the policy's.
            **options: further arguments of the model.
        """
        if self.takes_positions:
            options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if self._recurrent:  # its layers multiply their inputs by the mask
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        transformer = self.lm.base_model if transformer is None else transformer
        return transformer(input_ids, attention_mask=attention_mask, **options)

    def caching(self, cache: Any) -> dict[str, Any]:
        """Arguments of the backbone for reading behind ``cache`` and adding to it."""
        assert self._cache_argument is not None
        return {self._cache_argument: cache, "use_cache": True}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's logits (..., rows) of hidden states (..., C), a soft cap included."""
        return capped(self.lm.get_output_embeddings()(hidden), self.logit_cap)

    def _check_padding(self, prompt_mask: torch.Tensor) -> None:
        if self._one_prompt_length and not prompt_mask.all():
            raise ValueError(
                f"{type(self.lm).__name__} reads the padding before a prompt, so its numbers would depend on the other "
                "prompts; give prompts of one length in tokens (prompt_tokens=(K, K) for a data set), or use a model "
                "with attention, such as GPT-2, Llama or Qwen2"
            )

    def _advance(self, cache: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, step: int) -> DecodeState:
        with self.autocast():
            output = self.read(input_ids, attention_mask, **self.caching(cache))
            hidden = output.last_hidden_state[:, -1:]  # (N, 1, C)
            raw_logits = self.logits(hidden)
        return self._state(cache, attention_mask, step, raw_logits, hidden)

    def _state(
        self, cache: Any, attention_mask: torch.Tensor, step: int, raw_logits: torch.Tensor, hidden: torch.Tensor
    ) -> DecodeState:
        logits, support = self._process(raw_logits, step, None)
        chosen_from = None if support is None else support[:, 0]
        return DecodeState(cache, attention_mask, step, logits[:, 0].float(), chosen_from, self._values(hidden)[:, 0])

    def _values(self, hidden: torch.Tensor) -> torch.Tensor:
        return heads_values(self.value_head, hidden)

    def _process(
        self, raw_logits: torch.Tensor, first_step: int, support: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`process_logits` of response tokens first_step, first_step + 1, .."""
        return process_logits(
            raw_logits, support, vocab_size=self.vocab_size, temperature=self.temperature, top_k=self.top_k,
            too_early=self.min_new_tokens - first_step, eos_token_ids=self.eos_token_ids,
        )  # fmt: skip

    def check_positions(self, slots: int) -> None:
        """`tokenmdp.models.policy_fit.check_positions` of this policy's language model."""
        check_positions(self.lm, slots)
