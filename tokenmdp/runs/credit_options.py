"""Credit methods from the command line's names and options, and the policies that they may read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tokenmdp.credit import CREDIT_METHODS, CreditMethod, FineReward, MissingResource, make_credit
from tokenmdp.credit.options import required_options
from tokenmdp.envs.task import make_task
from tokenmdp.evaluation.credit_quality import PolicyAccess
from tokenmdp.evaluation.credit_quality.counting import NO_POLICY
from tokenmdp.models.tokens import VocabularyMismatch
from tokenmdp.reward_models.lexicon import LexiconRewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenmdp.models.policy import CausalLMPolicy

PAPER_BETA = 0.8
POLICIES = frozenset({"tuned", "reference"})  # the options that name one
EXAMPLES = {"tuned": "DIR", "parts": '[{"reward_model": "lexicon", "density": "token"}]'}


def credit_method(name: str, options: Mapping[str, Any]) -> CreditMethod:
    """The method called ``name``; ``options`` hold what JSON can: the parts of fine-grained credit are dicts.

    Raises:
        ValueError: no such method, no such option, or a required option is missing.
    """
    if name in CREDIT_METHODS and (missing := _missing(name, options)):
        raise ValueError(f"{name} credit has no default for {missing[0]}; pass --credit-option {_example(missing[0])}")
    given = dict(options)
    if name == "fine-grained" and "parts" in given:
        given["parts"] = _parts(given["parts"])
    for option in POLICIES & given.keys():
        if name == "rto" and not isinstance(given[option], str):
            raise ValueError(f"{option} is {given[option]!r}; give the name or directory of a policy")
    return make_credit(name, **given)


def needs_of(name: str) -> list[str]:
    """The needs of the method with its default options.

    >>> needs_of("attention")
    ['attention']
    """
    method: Any = CREDIT_METHODS[name]
    return sorted(method.needs)


def default_beta(name: str) -> float:
    """The method's own credit_beta; the paper's where it has none.

    >>> default_beta("attention"), default_beta("red"), default_beta("sparse")
    (0.8, 1.0, 0.8)
    """
    defaults: dict[str, Any] = {field.name: field.default for field in fields(CREDIT_METHODS[name])}
    return float(defaults.get("credit_beta", PAPER_BETA))


def grouped_options(options: Mapping[str, Any], flag: str) -> dict[str, dict[str, Any]]:
    """``method.option`` keys, given by ``flag``, as one dict per method.

    >>> grouped_options({"rto.tuned": "runs/dpo", "shapley.budget": 64}, "--option")
    {'rto': {'tuned': 'runs/dpo'}, 'shapley': {'budget': 64}}

    Raises:
        ValueError: a key without a dot, or of no method.
    """
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        name, dot, option = key.partition(".")
        if not dot or name not in CREDIT_METHODS:
            raise ValueError(f"{flag} {key!r} does not name a method and its option, such as shapley.budget=64")
        grouped.setdefault(name, {})[option] = value
    return grouped


def credit_methods(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]], credit_beta: float, flag: str
) -> tuple[dict[str, CreditMethod], dict[str, str]]:
    """The methods whose options are complete, and why the others cannot be made; ``flag`` sets options."""
    methods, refused = {}, {}
    for name in names:
        given = options.get(name, {})
        if missing := _missing(name, given):
            refused[name] = f"it has no default for {missing[0]}; pass {flag} {_example(f'{name}.{missing[0]}')}"
            continue
        try:
            methods[name] = credit_method(name, {"credit_beta": credit_beta, **given})
        except MissingResource as error:  # the library that computes it is not installed
            refused[name] = str(error)
    return methods, refused


def policy_access(
    name: str, tokenizer: PreTrainedTokenizerBase, prompt_slots: int, horizon: int, device: str, needs: frozenset[str]
) -> PolicyAccess:
    """The policy called ``name`` as the live one, where it reads these tokens, and a loader of others.

    Nothing is loaded that ``needs``, those of all methods together, do not name.
    """
    if not needs & {"policy_attention", "tuned_policy"}:
        return NO_POLICY
    try:
        task = make_task(
            tokenizer=tokenizer,
            reward_model=LexiconRewardModel(tokenizer, {}),  # a task needs one; it is not used
            prompts=[[0]],
            max_prompt_tokens=prompt_slots,
            max_new_tokens=horizon,
        )
    except ValueError as error:
        return PolicyAccess(refusal=f"no policy writes these tokens: {error}")

    def load(name: str) -> CausalLMPolicy:
        return task.load_policy(name).to(device)

    if "policy_attention" not in needs:
        return PolicyAccess(None, load)
    try:
        return PolicyAccess(load(name), load)
    except VocabularyMismatch:
        return PolicyAccess(None, load, f"the policy {name!r} writes other tokens; choose one with --policy")
    except (ValueError, OSError) as error:
        return PolicyAccess(None, load, str(error))


def _missing(name: str, options: Mapping[str, Any]) -> list[str]:
    return [option for option in required_options(CREDIT_METHODS[name]) if option not in options]


def _example(option: str) -> str:
    value = EXAMPLES.get(option.rpartition(".")[2], "VALUE")
    return shlex.quote(f"{option}={value}")


def declared(name: str, cost: str) -> tuple[str, ...]:
    """A method's declarations and cost, in a few words each; empty for what is not a method.

    >>> declared("red", "1"), declared("reference", "-")
    (('sums to the score', 'causal', 'potential-based', 'cost 1'), ())
    """
    if name not in CREDIT_METHODS:
        return ()
    method: Any = CREDIT_METHODS[name]
    facts = (
        (method.conserves_return, "sums to the score"),
        (method.causal, "causal"),
        (method.potential_based, "potential-based"),
    )
    return (*(fact for holds, fact in facts if holds), f"cost {cost}")


def _parts(parts: Any) -> list[FineReward]:
    if not isinstance(parts, list):
        raise ValueError(f"parts is {parts!r}; give a list such as {EXAMPLES['parts']}")
    known = {field.name for field in fields(FineReward)}
    for part in parts:
        if not isinstance(part, dict) or part.keys() - known:
            raise ValueError(
                f"{part!r} is not a part of fine-grained credit; a part is an object with some of "
                f"{', '.join(sorted(known))}, such as "
                '{"reward_model": "lexicon", "density": "sentence", "weight": 0.5}'
            )
    return [FineReward(**part) for part in parts]
