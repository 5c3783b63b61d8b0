"""The checks for third-party credit methods: they pass methods that keep their promises and name what others break."""

import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tokenmdp.credit import CREDIT_METHODS, MissingResource, Resources, make_credit
from tokenmdp.credit.fine_grained import FineReward
from tokenmdp.credit.score_only import SparseCredit
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.testing import CreditPropertyError, ToyMDP, check_credit_method, toy_outcome
from tokenmdp.types import Credit

PARTS = (FineReward(None, density="token"), FineReward(None, density="text", weight=0.5))
OPTIONS = {"integrated-gradients": {"steps": 4}, "fine-grained": {"parts": PARTS}}


def small_policy(seed):
    torch.manual_seed(seed)
    shape = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1, "initializer_range": 0.5}
    return CausalLMPolicy(GPT2LMHeadModel(GPT2Config(vocab_size=3, bos_token_id=2, eos_token_id=2, **shape)), 3, 2)


@pytest.mark.parametrize("name", CREDIT_METHODS)
def test_the_registry_keeps_its_word(name):
    tuned = {"tuned": small_policy(0), "reference": small_policy(1)} if name == "rto" else {}
    check_credit_method(make_credit(name, **OPTIONS.get(name, tuned)))


@pytest.mark.parametrize("options", [{"layer": 0}, {"heads": "max"}, {"heads": 1}, {"credit_beta": 0.0}], ids=str)
def test_options_keep_it_too(options):
    check_credit_method(make_credit("attention", **options))


@dataclasses.dataclass(frozen=True)
class Faulty(SparseCredit):
    """Sparse credit with a fault."""

    fault: str = ""

    def __call__(self, outcome, resources):
        rewards = super().__call__(outcome, resources).token_rewards
        mask, report = outcome.episode.response_mask, {}
        if self.fault == "sum":
            rewards = rewards * 1.01
        elif self.fault == "looks ahead":
            rewards = rewards.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True) * mask
        elif self.fault == "shifted":  # causal and conserving, but no potential: it pays for the second token
            second = torch.nn.functional.one_hot(torch.tensor(1), 3) * mask * (mask.sum(-1) > 2)[:, None]
            paid = second * (outcome.episode.input_ids[:, -2:-1] == 0)
            last = torch.nn.functional.one_hot(mask.sum(-1) - 1, 3)
            rewards = rewards + paid - paid.sum(-1, keepdim=True) * last
        elif self.fault == "nan":
            rewards = rewards.clone()
            rewards[3, 0] = torch.nan
        elif self.fault == "padding":
            rewards = rewards + ~mask
        elif self.fault == "batch":
            rewards = rewards - rewards.mean(0) * mask
        elif self.fault == "prompt slots":
            rewards = rewards + (outcome.episode.prompt_slots - 1) * mask
        elif self.fault == "shape":
            rewards = rewards[:, :2]
        elif self.fault == "dtype":
            rewards = rewards.float()
        elif self.fault == "report":
            report = {"weights": rewards}
        return Credit(rewards, report)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("sum", r"declares conserves_return, but the token rewards of response \[.*\] sum to .* and its score is"),
        ("looks ahead", r"declares causal, but token 0 gets .* in response \[0, .*\] and .* in response \[0"),
        ("nan", r"gave \[nan, .*\] for response"),
        ("padding", r"credits padding: .* for response \[.*\]; multiply by the mask"),
        ("batch", "depends on the batch or on padding"),
        ("prompt slots", "depends on the batch or on padding"),
        ("shape", r"token rewards \(27, 2\) of torch.float64 for a response mask \(27, 3\)"),
        ("dtype", r"of torch.float32 for a response mask \(27, 3\) and scores of torch.float64"),
        ("report", r"reports weights of shape \(27, 3\)"),
    ],
)
def test_each_fault_is_named_with_numbers(fault, message):
    with pytest.raises(CreditPropertyError, match=f"sparse .*{message}"):
        check_credit_method(Faulty(fault=fault))


def test_any_causal_conserving_credit_is_a_potential():
    """The payment for a prefix is a function of it, and the end settles the rest: shaping, whatever the payments."""
    check_credit_method(Faulty(fault="shifted"))


def test_a_wrong_gradient_is_named():
    class Uniform(CREDIT_METHODS["uniform"]):
        potential_based = True

    with pytest.raises(CreditPropertyError, match=r"its reward-to-go gradient is off by \d.* largest entry is"):
        check_credit_method(Uniform())


def test_unknown_needs_and_missing_resources_are_named():
    class Hungry(SparseCredit):
        needs = frozenset({"oracle"})

    with pytest.raises(CreditPropertyError, match="sparse needs oracle; choose among"):
        check_credit_method(Hungry())
    with pytest.raises(MissingResource, match="live policy's attention"):
        check_credit_method(make_credit("abc-d"), resources=lambda mdp: Resources())


def test_a_world_of_ones_own():
    mdp = ToyMDP.random(vocab_size=2, horizon=5, eos_token_id=0, seed=3)
    check_credit_method(make_credit("red"), mdp=mdp)
    assert toy_outcome(mdp).episode.response_mask.shape == (len(mdp.tokens), 5)
