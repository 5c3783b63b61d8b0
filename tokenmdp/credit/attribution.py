"""Signed credit from the reward model's gradients: what each token's embedding did to the score."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tokenmdp.credit.base import MissingResource, Resources
from tokenmdp.credit.options import check_whole
from tokenmdp.credit.rescale import rescale_multipliers
from tokenmdp.credit.weights import check_credit_beta, conserve
from tokenmdp.models.encoding import vocab_size
from tokenmdp.types import Credit, Episode, Outcome

if TYPE_CHECKING:
    from tokenmdp.reward_models import RewardModel
    from tokenmdp.reward_models.base import EmbeddedTexts

BASELINES = ("mean", "zero", "pad")
# (score (M, L, C), (M,) -> (M,), embeddings, baseline (M, L, C), index (M,)) -> attribution of every channel (M, L, C)
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Attribute = Callable[[Score, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


# An attribution is incomplete for a text where it misses more than this share of the difference it explains, and more
# than `SMALL`; a warning is given if that is so for `MANY` of the texts.
INCOMPLETE, SMALL, MANY = 0.05, 0.02, 0.1
_warned: set[tuple[str, str]] = set()  # method and model, warned of once per process: a batch has many episodes


class IncompleteAttribution(UserWarning):
    """Warning: attributions do not sum to the difference of the scores that they explain."""


@dataclass(frozen=True)
class IntegratedGradientsCredit:
    """``token_rewards[t] = credit_beta * attribution[t] + ...`` by integrated gradients, computed by captum.

    ``attribution[t] = sum over channels of (e[t] - b[t]) * integral over a in [0, 1] of
    d score(b + a * (e - b)) / d e[t] da`` with e the input embeddings and b the baseline's. In b the response's
    embeddings are replaced and the prompt's are not, so the prompt gets nothing. Signs may differ between tokens. The
    attributions sum to ``score - baseline_score`` up to the error of the integral; that rest, ``baseline_score`` and
    ``1 - credit_beta`` of the sum go to the last token (see `conserve`).

    Reports ``baseline_score``, the score of b, and ``completeness_error``, what the attributions sum to beyond
    ``score - baseline_score``. Costs ``steps`` forwards and backwards; all in float32 unless the model's weights are
    smaller.

    Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017.

    Args:
        credit_beta: 0 is sparse, 1 is dense only.
        steps: points of the Gauss-Legendre rule; raise it where ``completeness_error`` matters.
        baseline: what stands in for a response token's embedding. "mean" is the mean over the vocabulary; "zero" is
            zero, where models that normalise embeddings before all else (RMSNorm: Llama, Mistral) are singular and
            attributions useless; "pad" is the tokenizer's padding, which many models never learned to read; a number
            is the token of that id, such as a mask or an end-of-text token.
        rows_per_forward: texts, or points of a text's integral, that the reward model reads at a time.

    Raises:
        MissingResource: captum is not installed.
        ValueError: an argument out of range.
    """

    credit_beta: float = 1.0
    steps: int = 32
    baseline: str | int = "mean"
    rows_per_forward: int = 64
    name: ClassVar[str] = "integrated-gradients"
    remedy: ClassVar[str] = "raise steps"
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def __post_init__(self) -> None:
        check_credit_beta(self.credit_beta)
        _check(self.baseline, self.rows_per_forward)
        check_whole("steps", self.steps, 1)
        _captum()  # missing it should not wait for the first episode's end

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) of any sign, and the report.

        Raises:
            MissingResource: there is no reward model.
            ValueError: the reward model has no embeddings, or no such baseline.
        """
        return _credit(self, self._attribute, outcome, resources)

    def _attribute(
        self, score: Score, embeddings: torch.Tensor, baseline: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        method = _captum().IntegratedGradients(score)
        return method.attribute(
            embeddings,
            baseline,
            additional_forward_args=index,
            n_steps=self.steps,
            method="gausslegendre",
            internal_batch_size=self.rows_per_forward,
        )


@dataclass(frozen=True)
class DeepLiftCredit:
    """``token_rewards[t] = credit_beta * attribution[t] + ...`` by DeepLIFT, with rules for what transformers do.

    ``attribution[t] = sum over channels of (e[t] - b[t]) * multiplier[t]``, where the multipliers carry the difference
    ``score(e) - score(b)`` back through the model in one pass: the Rescale rule at activations, the mean of both
    factors at products, and averaged gradients at softmax, attention and normalisation (see `tokenmdp.credit.rescale`).
    On a network of nn.ReLU or nn.Tanh modules these are captum's DeepLift attributions; captum itself has no rules for
    a transformer and gives ``(e - b) * gradient`` there, so it is not used.

    Signs, the prompt, the last token and the report are as for `IntegratedGradientsCredit`. An operation that has no
    rule shows as ``completeness_error``. Costs two forwards and a backward, in which attention and normalisation run
    `tokenmdp.credit.rescale.POINTS` times.

    Args:
        credit_beta: 0 is sparse, 1 is dense only.
        baseline: what stands in for a response token; see `IntegratedGradientsCredit`.
        rows_per_forward: texts that the reward model reads at a time.

    Raises:
        ValueError: an argument out of range.
    """

    credit_beta: float = 1.0
    baseline: str | int = "mean"
    rows_per_forward: int = 64
    name: ClassVar[str] = "deeplift"
    remedy: ClassVar[str] = (
        "use integrated-gradients, whose error falls with its steps: an operation of the model has no rule in "
        "tokenmdp.credit.rescale"
    )
    conserves_return: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    potential_based: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def __post_init__(self) -> None:
        check_credit_beta(self.credit_beta)
        _check(self.baseline, self.rows_per_forward)

    def __call__(self, outcome: Outcome, resources: Resources) -> Credit:
        """Token rewards (N, H) of any sign, and the report; raises as `IntegratedGradientsCredit` does."""
        return _credit(self, self._attribute, outcome, resources)

    def _attribute(
        self, score: Score, embeddings: torch.Tensor, baseline: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        multipliers = rescale_multipliers(lambda changed: score(changed, index), embeddings, baseline)
        return (embeddings - baseline) * multipliers


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise MissingResource(
            'integrated gradients are computed by captum, which is not installed: pip install "tokenmdp[attribution]"'
        ) from error
    return captum.attr


def _check(baseline: str | int, rows_per_forward: int) -> None:
    check_whole("baseline", baseline, 0, BASELINES)  # the number is the id of a token
    check_whole("rows_per_forward", rows_per_forward, 1)


def _credit(
    method: IntegratedGradientsCredit | DeepLiftCredit, attribute: Attribute, outcome: Outcome, resources: Resources
) -> Credit:
    """The credit that follows the attributions (M, L, C) of ``attribute``, asked for a few texts at a time."""
    model = resources.reward_model
    if model is None:
        raise MissingResource(f"{method.name} credit differentiates a reward model's score, and there is none here")
    # A rollout runs without gradients, maybe in inference mode, whose tensors no graph can hold: so copies.
    with torch.inference_mode(False), torch.enable_grad():
        episode = Episode(*(part.clone() for part in outcome.episode))
        texts = model.embedded(episode)
        dtype, device = texts.embeddings.dtype, texts.embeddings.device
        embeddings = texts.embeddings.float()  # (N, L, C)
        baseline = _baseline_embeddings(method.baseline, texts, episode, model, resources).float()

        def score(changed: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return texts.score(changed.to(dtype), index)

        channels, baseline_scores = [], []
        with torch.autocast(device.type, enabled=False):
            for index in torch.arange(len(embeddings), device=device).split(method.rows_per_forward):
                channels.append(attribute(score, embeddings[index], baseline[index], index).detach())
                with torch.no_grad():
                    baseline_scores.append(score(baseline[index], index))
        attribution = texts.to_slots(torch.cat(channels).sum(-1)).cpu()  # (N, L) -> (N, H)
        baseline_score = torch.cat(baseline_scores).float().cpu()
    mask, final = outcome.episode.response_mask, outcome.reward.score
    explained = torch.where(mask, attribution.double(), 0.0).sum(-1)
    difference = final.double() - baseline_score.double()
    error = explained - difference
    _judge(method, model, error, difference)
    report = {"baseline_score": baseline_score, "completeness_error": error.float()}
    return Credit(conserve(attribution, final, mask, method.credit_beta), report)


def _judge(
    method: IntegratedGradientsCredit | DeepLiftCredit,
    model: RewardModel,
    error: torch.Tensor,
    difference: torch.Tensor,
) -> None:
    """Warn once if ``error`` (N,) exceeds rounding of ``difference`` (N,): the last token gets the rest."""
    incomplete = error.abs() > INCOMPLETE * difference.abs() + SMALL
    if incomplete.double().mean() > MANY and (key := (method.name, repr(model))) not in _warned:
        _warned.add(key)
        row = int(error.abs().argmax())
        warnings.warn(
            f"{method.name} attributions of {model} are incomplete in {int(incomplete.sum())} of {len(error)} texts: "
            f"in the worst they sum to {(difference + error)[row]:.3f} where the score differs from the baseline's by "
            f"{difference[row]:.3f}. The last token gets what is left. To explain it, {method.remedy}",
            IncompleteAttribution,
            stacklevel=4,
        )


def _baseline_embeddings(
    baseline: str | int, texts: EmbeddedTexts, episode: Episode, model: RewardModel, resources: Resources
) -> torch.Tensor:
    """The embeddings (N, L, C) of ``texts`` with those of the response replaced."""
    if baseline == "zero":
        return texts.embeddings.masked_fill(texts.response[..., None], 0.0)
    if baseline == "mean":
        if texts.average is None:
            raise ValueError(f"baseline='mean', and {model} knows no mean over a vocabulary; use 'zero'")
        return torch.where(texts.response[..., None], texts.average().to(texts.embeddings), texts.embeddings)
    tokenizer = resources.tokenizer
    if not isinstance(baseline, str):
        token = int(baseline)
    elif tokenizer is None or tokenizer.pad_token_id is None:
        raise ValueError("baseline='pad', and there is no padding token; use 'mean' or the id of a token")
    else:
        token = tokenizer.pad_token_id
    if tokenizer is not None and token >= (size := vocab_size(tokenizer)):
        raise ValueError(f"baseline is {token}, and the tokenizer's ids are 0..{size - 1}")
    ids = episode.input_ids.clone()
    ids[:, episode.prompt_slots :] = token
    blank = model.embedded(episode._replace(input_ids=ids))
    if not torch.equal(blank.response, texts.response):
        raise ValueError(f"baseline={baseline!r} is a token of the policy's, and {model} reads others; use 'mean'")
    return blank.embeddings
