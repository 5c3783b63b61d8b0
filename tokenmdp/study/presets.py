"""The grids that have a name, and the protocol that they and every plan start from.

The protocol is Chan et al. (ICML 2024), section 5.1: 16 episodes per update, 4 epochs, gamma 1, lambda .95, clip .2,
vf_coef .1, an adaptive KL coefficient from .2 towards 6 nats, credit_beta .8, lengths 8 to 15 with no end of text
before the eighth token. It leaves the number of minibatches open; here every epoch is one step on all episodes, which
takes three fifths of the time of four minibatches and stays closer to the reference. Learning rates are the bundled
policy's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenmdp.runs.settings import TOY_POLICY, RunSettings

LEARNING_RATE = 1e-4  # of the bundled policy: what a search chose for every method, with the first edition's critic

PAPER_CONFIG: dict[str, Any] = {
    "update_epochs": 4,
    "num_minibatches": 1,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "clip_coef": 0.2,
    "vf_coef": 0.1,
    "kl_coef": 0.2,
    "kl_target": 6.0,
}
BUNDLED = RunSettings(
    env="TextGen-IMDb-v0",
    policy="imdb-tiny",
    tokenizer="imdb-tiny",
    reward_model="imdb-tiny",
    prompts="imdb-tiny",
    eval_prompts=None,
    max_new_tokens=15,
    min_new_tokens=8,
    horizon_range=(8, 15),
    num_envs=16,
    config=PAPER_CONFIG,
)


@dataclass(frozen=True)
class Plan:
    """A grid before it is expanded: the product of all that varies."""

    name: str
    methods: tuple[str, ...]  # NAME or NAME:option=value,option=value
    seeds: tuple[int, ...]
    updates: int
    base: RunSettings = BUNDLED
    lengths: tuple[str, ...] = ("8-16",)  # upper end exclusive, as the paper counts
    credit_betas: tuple[float, ...] = ()  # of the methods that have one; none: each method's own
    kl_coefs: tuple[float, ...] = ()  # fixed ones, without a target; none: base's
    reward_models: tuple[str, ...] = ()  # none: base's
    gae_lambdas: tuple[float, ...] = ()  # none: base's
    estimators: tuple[str, ...] = ()  # of advantages; none: base's
    critics: tuple[str, ...] = ()  # names of `tokenmdp.study.grid.CRITICS`; none: base's
    tried_rates: tuple[float, ...] = ()  # every method with each of these; none: its own
    gold: str | None = "imdb-gold"
    eval_every: int = 25
    eval_samples: int = 64


def _seeds(count: int) -> tuple[int, ...]:
    return tuple(range(1, 1 + count))


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan("quick", ("sparse", "uniform", "attention", "red"), _seeds(3), updates=40, eval_every=10),
        Plan(
            "tune",
            ("sparse", "uniform", "attention", "abc-d", "abc-d2", "red"),
            (101, 102),
            updates=100,
            tried_rates=(3e-5, 1e-4, 3e-4, 1e-3),
            gold=None,
            eval_every=100,
        ),
        Plan("custom", (), _seeds(3), updates=150),
        Plan(
            "smoke",
            ("sparse", "attention"),
            (1, 2),
            updates=3,
            base=RunSettings(
                env="TextGen-Toy-v0",
                policy=TOY_POLICY,
                tokenizer="toy",
                reward_model="toy-lexicon",
                prompts=None,
                eval_prompts=None,
                max_new_tokens=7,
                num_envs=4,
                config=PAPER_CONFIG | {"learning_rate": 3e-3, "dtype": "float32"},
            ),
            lengths=("4-8",),
            gold=None,
            eval_every=2,
            eval_samples=8,
        ),
    )
}
