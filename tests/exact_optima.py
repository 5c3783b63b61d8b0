"""Where each algorithm ends on 15 texts that can be enumerated, beside its optimum in closed form: one row per option.

`docs/exact_table.py` writes the rows into a page, `test_exact_optima.py` holds each to its bound.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import gymnasium as gym
import torch
from data_doubles import classifier, every_logprob, labelled, saved, three_words
from scipy.optimize import brentq
from tabular import dpo_optimum, ordered_pairs, preferred, toy_mdp, toy_reference
from transformers import GPT2Config, GPT2LMHeadModel

from tokenmdp.agents.dpo import DPO, DPOConfig
from tokenmdp.agents.f_dpg import FDPG
from tokenmdp.agents.grpo import GRPO
from tokenmdp.agents.ppo import PPO
from tokenmdp.agents.rloo import RLOO
from tokenmdp.agents.sft import SFT, SFTConfig
from tokenmdp.credit import make_credit
from tokenmdp.preferences import Demonstration
from tokenmdp.reward_models import load_reward_model
from tokenmdp.targets import Responses
from tokenmdp.testing import TableRewardModel
from tokenmdp.wrappers import vector

SHORT = 0.08  # bound of rows with 30 updates of GRPO, which are not quite there yet
MDP = toy_mdp()
SCORES = MDP.scores
OTHER = torch.randn(len(SCORES), dtype=torch.float64, generator=torch.Generator().manual_seed(5))  # second objective
FLOAT32 = {"dtype": "float32", "device": "cpu"}


class Ending(NamedTuple):
    """Sequence log-probabilities (M,) float64 of three policies."""

    start: torch.Tensor
    reached: torch.Tensor
    optimum: torch.Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        algorithm, options: What is trained.
        optimum: The closed form, in words.
        how: What "reached" means: trained on samples, or the expected loss minimised.
        ending: Trains with a seed.
        bound: Of the total variation between what is reached and the optimum.
        long: Left out of the default tests.
    """

    algorithm: str
    options: str
    optimum: str
    how: str
    ending: Callable[[int], Ending]
    bound: float = 0.05
    long: bool = True


def tiny_lm():
    """A causal language model for `three_words`, of one layer."""
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 24, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=3, bos_token_id=2, eos_token_id=2, **shape))


def enumerable(num_envs=256, credit="sparse"):
    """Environments whose responses are those of `MDP`."""
    envs = gym.make_vec(
        "tokenmdp:TextGen-v0", num_envs=num_envs, autoreset_mode="Disabled", tokenizer=three_words(),
        reward_model=TableRewardModel(MDP), prompts=["a"], max_new_tokens=3, max_prompt_tokens=2,
    )  # fmt: skip
    return vector.CreditReward(envs, make_credit(credit))


def tilted(exponent, reference):
    """``reference * exp(exponent) / Z`` as log-probabilities."""
    return (reference + exponent).log_softmax(-1)


def player(kind, updates, seed, num_envs=256, credit="sparse", model=None, **options):
    """An agent that has learned, beginning as ``model`` or `tiny_lm`, and what its policy was before."""
    config = {"anneal_lr": True, "total_updates": updates, "num_minibatches": 2, "learning_rate": 1e-2}
    full = kind.config_class(**FLOAT32 | config | options, seed=seed)
    agent = kind(model or tiny_lm(), enumerable(num_envs, credit), full)
    start = every_logprob(agent.policy)
    return agent.learn(updates), start


def penalised(kind, updates=30, **options):
    """Rewards less a penalty for the KL; the baselines make each step noisy, so many small ones are taken."""

    def ending(seed):
        agent, start = player(kind, updates, seed, kl_coef=0.5, learning_rate=6e-3, **options)
        return Ending(start, every_logprob(agent.policy), MDP.optimum(start, 0.5)[0])

    return ending


def in_rounds(rounds, updates, **options):
    """Rounds of PPO, each of which begins as the last policy and measures the KL to it, so that scores add up."""

    def ending(seed):
        model, starts = None, []
        for number in range(rounds):
            agent, start = player(
                PPO, updates, seed + 1000 * number, model=model, kl_coef=0.5 * rounds, learning_rate=6e-3, **options
            )
            model = agent.policy.lm
            starts.append(start)
        return Ending(starts[0], every_logprob(agent.policy), MDP.optimum(starts[0], 0.5)[0])

    return ending


def towards(target, divergence, **options):
    """A target distribution."""
    updates = 28 if divergence == "tv" else 16  # its rewards have one size, so its steps stay noisy to the end

    def ending(seed):
        agent, start = player(FDPG, updates, seed, target=target, divergence=divergence, update_epochs=3, **options)
        responses = Responses.of(MDP.episodes([0], 1), agent.tokenizer, SCORES)
        unnormalised = agent.target.log_unnormalised(start, responses)
        return Ending(start, every_logprob(agent.policy), unnormalised.log_softmax(0))

    return ending


def compared(form_of, beta=0.5, updates=120, other=False, wrong=0.0, **options):
    """A DPO agent; ``form_of(reference, scores, beta)`` is the optimum, ``wrong`` the share of flipped labels."""

    def ending(seed):
        labels = SCORES / 2  # chances nearer to 1/2, which a few copies of a pair express better
        scores, config = labels, dict(options)
        with tempfile.TemporaryDirectory() as place:
            if other:
                config["margin"] = saved(classifier(vocab_size=3, eos=2), place, three_words())
                judged = load_reward_model(config["margin"])(MDP.episodes([0], 1)).score.double()
                scores = config["objective_weight"] * labels + (1 - config["objective_weight"]) * judged
            full = DPOConfig(
                **FLOAT32 | {"learning_rate": 1e-2, "anneal_lr": True, "batch_size": 150} | config, dpo_beta=beta,
                total_updates=updates, seed=seed,
            )  # fmt: skip
            agent = DPO(tiny_lm(), labelled(labels, wrong=wrong), full, tokenizer=three_words())
        start = every_logprob(agent.policy)
        agent.learn(updates)
        return Ending(start, every_logprob(agent.policy), form_of(start, scores, beta))

    return ending


def minimised(form_of, beta=0.5, chances=None, **options):
    """The expectation of the DPO loss over all pairs, minimised over tabular policies."""

    def ending(seed):
        del seed  # nothing is drawn
        reference = toy_reference(MDP)
        logits = dpo_optimum(MDP, reference, RIGHT if chances is None else chances, dpo_beta=beta, **options)
        return Ending(reference, MDP.tabular_seq_logprobs(logits), form_of(reference, SCORES, beta))

    return ending


def plain(reference, scores, beta):
    """Of DPO."""
    return tilted(scores / beta, reference)


def ipo(reference, scores, beta):
    """Of IPO, where all pairs are equally frequent."""
    return tilted((scores[:, None] - scores).sigmoid().mean(1) / beta, reference)


def length_normalised(reference, scores, beta):
    """Of DPO on log-probabilities per token: c makes it sum to 1."""
    lengths = MDP.mask.sum(-1).double()
    c = brentq(lambda c: float((reference + lengths * (scores + c) / beta).logsumexp(0)), -50, 50, xtol=1e-14)
    return reference + lengths * (scores + c) / beta


def two_objectives(reference, scores, beta, weight=0.4):
    """Of MODPO, and of a soup of two such policies at horizon 1."""
    others = OTHER[: len(scores)]
    return tilted((weight * scores + (1 - weight) * others) / beta, reference)


def soup(seed):
    """The average of the logits of two DPO optima, where a response is one token."""
    del seed
    mdp = toy_mdp(horizon=1)
    reference, others = toy_reference(mdp), OTHER[: len(mdp.scores)]
    members = [dpo_optimum(mdp, reference, preferred(scores), dpo_beta=0.5) for scores in (mdp.scores, others)]
    mixed = mdp.tabular_seq_logprobs(0.4 * members[0] + 0.6 * members[1])
    return Ending(reference, mixed, two_objectives(reference, mdp.scores, 0.5))


def imitation(seed):
    """SFT on texts in unequal numbers."""
    counts = torch.randint(1, 12, (len(SCORES),), generator=torch.Generator().manual_seed(2))
    rows = zip(MDP.tokens, MDP.mask, counts.tolist(), strict=True)
    texts = [
        one
        for ids, kept, count in rows
        for one in [Demonstration(prompt_ids=(0,), response_ids=tuple(ids[kept].tolist()))] * count
    ]
    config = SFTConfig(
        **FLOAT32, learning_rate=1e-2, anneal_lr=True, batch_size=len(texts), total_updates=80, seed=seed
    )
    agent = SFT(tiny_lm(), texts, config, tokenizer=three_words())
    start = every_logprob(agent.policy)
    agent.learn(80)
    return Ending(start, every_logprob(agent.policy), counts.double().log().log_softmax(0))


def best_of(n):
    """The best of n responses, by enumeration of all tuples, beside ``F^n - F_below^n`` of the cumulated F."""

    def ending(seed):
        del seed
        reference, order = toy_reference(MDP), SCORES.argsort()
        tuples = torch.tensor(list(product(range(len(SCORES)), repeat=n)))
        chosen = tuples.gather(1, SCORES[tuples].argmax(1, keepdim=True))[:, 0]
        found = torch.zeros_like(reference).index_add(0, chosen, reference[tuples].sum(1).exp())
        up_to = torch.cat([torch.zeros(1, dtype=torch.float64), reference[order].exp().cumsum(0)])
        formula = torch.empty_like(reference).index_copy(0, order, (up_to[1:] ** n - up_to[:-1] ** n).log())
        return Ending(reference, found.log(), formula)

    return ending


FIRST, SECOND = ordered_pairs(len(SCORES))
RIGHT = preferred(SCORES)
FLIPPED = 0.9 * RIGHT + 0.1 * (1 - RIGHT)
PENALISED = "ref exp(score / kl_coef) / Z"
TARGETS = {
    "score/1": "ref exp(score / 1) / Z",
    "word:b": "ref, given the word",
    "word:b@0.5": "ref exp(lambda b) / Z, E[b] = .5",
    "word:b & score/1": "ref b exp(score / 1) / Z",
}
DPO_FORM, WINS = "ref exp(r / beta) / Z", "ref exp(E P(y beats y') / tau) / Z"
LENGTHS, BOTH = "ref exp(length (r + c) / beta)", "ref exp((w r + (1 - w) r') / beta) / Z"
MARGIN = 0.6 * (OTHER[FIRST] - OTHER[SECOND])


def rows():
    """All rows, in the order of the table."""
    train = "trained on samples"
    critic = {"clip_coef_value": None, "vf_coef": 0.5, "vf_learning_rate": 2e-2, "gae_lambda": 1.0}
    lone = functools.partial(Row, "f-DPG", how=train)
    yield Row("PPO", "sparse credit", PENALISED, train, penalised(PPO, 60, **critic), long=False)
    yield Row(
        "PPO", "sparse credit, two rounds, moved reference", "ref exp(2 score / kl_coef) / Z", train,
        in_rounds(2, 60, **critic), long=False,
    )  # fmt: skip
    yield Row("PPO", "red credit", PENALISED, train, penalised(PPO, 60, credit="red", **critic))
    yield Row(
        "PPO", "attention credit, full return", PENALISED, train,
        penalised(PPO, 60, credit="attention", **critic, estimator="full_return"),
    )  # fmt: skip
    group = {"responses_per_prompt": 64}
    yield Row("RLOO", "", PENALISED, train, penalised(RLOO, 45, **group), long=False)
    for estimator, credit in (("sequence", "sparse"), ("reward_to_go", "sparse"), ("reward_to_go", "red")):
        yield Row(
            "GRPO", f"{estimator}, {credit} credit, no division", PENALISED, train,
            penalised(
                GRPO, credit=credit, estimator=estimator, divide_by_sd=False, **group,
                num_envs=512 if credit == "red" else 256,  # its potentials are noise to a baseline per position
            ),
            bound=0.1 if credit == "red" else SHORT,
        )  # fmt: skip
    yield Row("GRPO", "sequence, divided by the sd", PENALISED, train, penalised(GRPO, **group), 0.15)
    for target, words in TARGETS.items():
        for divergence in ("forward-kl", "reverse-kl", "js", "tv"):
            if divergence == "reverse-kl" and "@" not in target and "word" in target:
                continue  # refused: P is 0 for some responses
            yield lone(
                f"{target}, {divergence}", words, ending=towards(target, divergence),
                long=(target, divergence) != ("score/1", "reverse-kl"),
            )  # fmt: skip
    yield lone("word:b, js, lagged proposal", TARGETS["word:b"], ending=towards("word:b", "js", proposal="lagged"))
    loss = "expected loss minimised"
    yield Row("DPO", "sigmoid", DPO_FORM, train, compared(plain, batch_size=300), long=False)
    yield Row("DPO", "sigmoid", DPO_FORM, loss, minimised(plain), 1e-6, False)
    yield Row("DPO", "IPO", WINS, train, compared(ipo, 0.2, form="ipo"))
    yield Row("DPO", "IPO", WINS, loss, minimised(ipo, 0.3, form="ipo"), 1e-6, False)
    robust, flipped = {"form": "robust", "label_smoothing": 0.1}, "robust, 10% of labels flipped"
    yield Row("DPO", flipped, DPO_FORM, train, compared(plain, wrong=0.1, **robust))
    yield Row("DPO", flipped, DPO_FORM, loss, minimised(plain, chances=FLIPPED, **robust), 1e-6, False)
    lengths = MDP.mask.sum(-1).double()
    yield Row("DPO", "length-normalised", LENGTHS, train, compared(length_normalised, 2.0, length_normalised=True))
    yield Row("DPO", "length-normalised", LENGTHS, loss, minimised(length_normalised, lengths=lengths), 1e-6, False)
    yield Row("MODPO", "w .5", BOTH, train, compared(plain, other=True, objective_weight=0.5))
    yield Row("MODPO", "w .4", BOTH, loss, minimised(two_objectives, margin=MARGIN, objective_weight=0.4), 1e-6, False)
    yield Row("soup", "of two DPO optima, w .4, one token", BOTH, loss, soup, 1e-6, False)
    yield Row("SFT", "", "the distribution of the texts", train, imitation, long=False)
    yield Row("best of n", "n 4", "F^4 - F_below^4", "all tuples enumerated", best_of(4), 1e-9, False)


ROWS = tuple(rows())
