"""A token MDP small enough to enumerate, so that every expectation is exact.

`ToyMDP` lists every response a policy over V tokens can give within a horizon. A policy is then one vector of sequence
log-probabilities (M,), and what an algorithm estimates from samples has a number to be compared with: the objective,
the KL, the optimum of the KL-regularised objective. V ** H sequences are held in memory: keep V and H below 5 or so.

    mdp = ToyMDP.random(vocab_size=3, horizon=3, seed=0)
    logits = torch.zeros(mdp.num_prefixes, mdp.vocab_size, dtype=torch.float64)      # a tabular softmax policy
    seq_logprobs = mdp.tabular_seq_logprobs(logits)                                  # (M,)
    mdp.objective(seq_logprobs, ref_seq_logprobs, kl_coef=0.5)                       # exact, differentiable

A language model is a policy too: `ToyMDP.episodes` lays all responses out for ``CausalLMPolicy.evaluate``.
`ToyMDP.outcome` gives all responses with their scores in float64, for any credit method.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from tokenmdp.types import Episode, Outcome, RewardOutput

Text = tuple[int, ...]


@dataclass(frozen=True)
class ToyMDP:
    """Every response of at most ``horizon`` tokens, with its score.

    Attributes:
        vocab_size: V.
        horizon: H, where every response ends.
        eos_token_id: Ends a response early and is its last token; None: all have H tokens.
        tokens: (M, H) int64, 0 in the padding.
        mask: (M, H) bool, True on the response.
        scores: (M,) float64.
        prefix_scores: (M, H+1) float64: what a reward model says about the first t tokens; ``prefix_scores[T]`` is the
            score, 0 after it.
    """

    vocab_size: int
    horizon: int
    eos_token_id: int | None
    tokens: torch.Tensor
    mask: torch.Tensor
    scores: torch.Tensor
    prefix_scores: torch.Tensor

    @classmethod
    def random(cls, vocab_size: int = 3, horizon: int = 3, eos_token_id: int | None = None, seed: int = 0) -> ToyMDP:
        """All responses; scores, and those of all prefixes, are drawn once from a standard normal distribution.

        >>> len(ToyMDP.random(vocab_size=3, horizon=3).tokens)
        27
        >>> len(ToyMDP.random(vocab_size=3, horizon=3, eos_token_id=0).tokens)       # 1 + 2 + 4 * 3
        15
        """
        tokens, mask = enumerate_responses(vocab_size, horizon, eos_token_id)
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(len(tokens), dtype=torch.float64, generator=generator)
        of_states = torch.randn(_num_prefixes(vocab_size, horizon), dtype=torch.float64, generator=generator)
        before = torch.where(mask, of_states[_prefixes(tokens, vocab_size)], 0.0)  # (M, H)
        prefix_scores = torch.cat([before, torch.zeros(len(tokens), 1, dtype=torch.float64)], dim=1)
        prefix_scores.scatter_(1, mask.sum(1, keepdim=True), scores[:, None])
        return cls(vocab_size, horizon, eos_token_id, tokens, mask, scores, prefix_scores)

    @property
    def num_prefixes(self) -> int:
        """States in which a token is chosen, ``sum_{t < H} V ** t``."""
        return _num_prefixes(self.vocab_size, self.horizon)

    def prefixes(self) -> torch.Tensor:
        """(M, H) int64: the number of the state before token t, unique over lengths and contents."""
        return _prefixes(self.tokens, self.vocab_size)

    def tabular_logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """Token log-probabilities (M, H), 0 in the padding, of the softmax policy with ``logits`` (num_prefixes, V)."""
        every = logits.log_softmax(-1)[self.prefixes()]  # (M, H, V)
        return every.gather(-1, self.tokens[..., None]).squeeze(-1) * self.mask

    def tabular_seq_logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """Sequence log-probabilities (M,) of the softmax policy with ``logits`` (num_prefixes, V).

        >>> mdp = ToyMDP.random(vocab_size=2, horizon=2)
        >>> mdp.tabular_seq_logprobs(torch.zeros(mdp.num_prefixes, 2)).exp().tolist()
        [0.25, 0.25, 0.25, 0.25]
        """
        return self.tabular_logprobs(logits).sum(-1)

    def episodes(self, prompt: list[int], prompt_slots: int) -> Episode:
        """All responses after one prompt, as a reward model or ``CausalLMPolicy.evaluate`` reads them: M rows."""
        left = torch.zeros(prompt_slots, dtype=torch.int64)
        left[prompt_slots - len(prompt) :] = torch.tensor(prompt)
        seen = torch.arange(prompt_slots) >= prompt_slots - len(prompt)
        rows = len(self.tokens)
        return Episode(
            input_ids=torch.cat([left.expand(rows, -1), self.tokens], dim=1),
            attention_mask=torch.cat([seen.expand(rows, -1), self.mask], dim=1),
            response_mask=self.mask,
        )

    def outcome(
        self,
        attention: torch.Tensor | None = None,
        attention_layers: torch.Tensor | None = None,
        prompt_slots: int = 1,
    ) -> Outcome:
        """All responses to the prompt [0] as finished and scored, in float64, which no reward model gives.

        Args:
            attention: (M, H) rows, as in `tokenmdp.types.RewardOutput`.
            attention_layers: (M, layers, heads, H).
            prompt_slots: P; all but one are padding.
        """
        reward = RewardOutput(self.scores, attention, attention_layers, self.prefix_scores)
        return Outcome(self.episodes([0], prompt_slots), reward, torch.arange(len(self.tokens)))

    def texts(self) -> dict[Text, float]:
        """The scores of everything that may be written so far: all prefixes, the empty one too, and all responses.

        >>> mdp = ToyMDP.random(vocab_size=2, horizon=2)
        >>> list(mdp.texts())
        [(), (0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1)]
        """
        scores: dict[Text, float] = {}
        for row, length, numbers in zip(
            self.tokens.tolist(), self.mask.sum(1).tolist(), self.prefix_scores.tolist(), strict=True
        ):
            for end in range(length + 1):
                scores[tuple(row[:end])] = numbers[end]
        return scores

    def score_of(self, tokens: Text) -> float:
        """The score of one response (its end-of-text included), for a reward function.

        >>> mdp = ToyMDP.random(vocab_size=2, horizon=2)
        >>> mdp.score_of((0, 1)) == mdp.scores[1].item()
        True
        """
        for row, mask, score in zip(self.tokens, self.mask, self.scores, strict=True):
            if tuple(row[mask].tolist()) == tuple(tokens):
                return score.item()
        raise KeyError(f"{tokens} is not a complete response of {self.horizon} tokens over {self.vocab_size}")

    def objective(
        self, seq_logprobs: torch.Tensor, ref_seq_logprobs: torch.Tensor, kl_coef: float = 0.0
    ) -> torch.Tensor:
        """``J = E_pi[score] - kl_coef * KL(pi || ref)``, exact and differentiable."""
        return expectation(seq_logprobs, self.scores) - kl_coef * kl(seq_logprobs, ref_seq_logprobs)

    def optimum(self, ref_seq_logprobs: torch.Tensor, kl_coef: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The maximiser of `objective` and its value.

        ``pi*(y) = ref(y) * exp(score(y) / kl_coef) / Z`` and ``J* = kl_coef * log Z``; for any policy
        ``J(pi) = J* - kl_coef * KL(pi || pi*)``. Source: Korbak et al., "RL with KL penalties is better viewed as
        Bayesian inference", 2022.

        Returns:
            seq_logprobs (M,) of pi*, J* ().
        """
        unnormalised = ref_seq_logprobs + self.scores / kl_coef
        log_z = unnormalised.logsumexp(0)
        return unnormalised - log_z, kl_coef * log_z

    def state_values(self, seq_logprobs: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
        """(M, H): ``E_pi[outcome | the prefix before token t]``, 0 in the padding.

        With ``outcomes = scores`` the values of the unregularised policy; with
        ``outcomes = exp(scores / kl_coef)`` under the reference, ``kl_coef * log`` of it is the soft optimal value V*.
        """
        probabilities = seq_logprobs.exp()
        prefixes = torch.where(self.mask, self.prefixes(), self.num_prefixes)  # padding gets a bin of its own
        values = []
        for prefix in prefixes.T:  # (M,): the states before token t
            bins = torch.zeros(self.num_prefixes + 1, dtype=probabilities.dtype)
            mass = bins.index_add(0, prefix, probabilities)
            values.append((bins.index_add(0, prefix, probabilities * outcomes) / mass)[prefix])
        return torch.where(self.mask, torch.stack(values, dim=1), 0.0)


def _num_prefixes(vocab_size: int, horizon: int) -> int:
    return sum(vocab_size**t for t in range(horizon))


def _prefixes(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(M, H) int64: prefixes of length t are numbered from ``sum_{s < t} V ** s``, in base V."""
    index = torch.zeros(len(tokens), dtype=torch.int64)
    columns, first_of_length = [], 0
    for t in range(tokens.shape[1]):
        columns.append(first_of_length + index)
        first_of_length += vocab_size**t
        index = index * vocab_size + tokens[:, t]
    return torch.stack(columns, dim=1)


def enumerate_responses(
    vocab_size: int, horizon: int, eos_token_id: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every response: tokens (M, H) int64, 0 in the padding, and mask (M, H) bool.

    >>> tokens, mask = enumerate_responses(vocab_size=2, horizon=2, eos_token_id=1)
    >>> [row[seen].tolist() for row, seen in zip(tokens, mask)]
    [[0, 0], [0, 1], [1]]
    """
    if vocab_size**horizon > 100_000:
        raise ValueError(f"{vocab_size} ** {horizon} responses are too many to enumerate; stay below 100000")
    responses: dict[tuple[int, ...], None] = {}  # a dict keeps the order and drops what repeats after its end
    for sequence in product(range(vocab_size), repeat=horizon):
        end = sequence.index(eos_token_id) + 1 if eos_token_id in sequence else horizon
        responses[sequence[:end]] = None
    tokens = torch.tensor([list(response) + [0] * (horizon - len(response)) for response in responses])
    lengths = torch.tensor([len(response) for response in responses])
    return tokens, torch.arange(horizon) < lengths[:, None]


def expectation(seq_logprobs: torch.Tensor, outcomes: torch.Tensor) -> torch.Tensor:
    """``sum_y pi(y) * outcomes(y)``.

    >>> expectation(torch.tensor([0.25, 0.75]).log(), torch.tensor([0.0, 4.0])).item()
    3.0
    """
    return (seq_logprobs.exp() * outcomes).sum()


def kl(seq_logprobs: torch.Tensor, ref_seq_logprobs: torch.Tensor) -> torch.Tensor:
    """``KL(pi || ref) = sum_y pi(y) * (log pi(y) - log ref(y))`` in nats.

    >>> round(kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).item(), 4)
    0.1438
    """
    return expectation(seq_logprobs, seq_logprobs - ref_seq_logprobs)


def total_variation(seq_logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``TV = sum_y |pi(y) - other(y)| / 2``, between 0 and 1.

    >>> round(total_variation(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).item(), 4)
    0.25
    """
    return (seq_logprobs.exp() - other.exp()).abs().sum() / 2
