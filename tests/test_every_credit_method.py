"""Properties of every method of the registry: single == vector, zero outside the response, sums as declared."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch

from tokenmdp.credit import CREDIT_METHODS, make_credit
from tokenmdp.credit.fine_grained import FineReward
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.policy_attention import ForwardAttention
from tokenmdp.wrappers import CreditReward, vector

IMDB = "tokenmdp:TextGen-IMDb-v0"
ONE_PROMPT = {"prompts": ["I saw it."]}  # the bundle's 4096 take half a second, and here the resets name others
OPTIONS = {
    "shapley": {"budget": 40},
    "owen": {"budget": 40},
    "integrated-gradients": {"steps": 4},
    "fine-grained": {"parts": (FineReward("lexicon", density="token"), FineReward(None, "sentence", weight=0.5))},
}  # fmt: skip
TEXTS = [
    ("The acting is", " great. I hated the ending, though."),
    ("I watched it and", " fell asleep"),
    ("This", "!"),
    ("A film about", " a dull, long, awful war. But what a wonderful cast!"),
]


@pytest.fixture(scope="module")
def policy():
    task = gym.make(IMDB, **ONE_PROMPT).unwrapped.task
    return CausalLMPolicy.for_task("imdb-tiny", task)


@pytest.fixture(scope="module")
def tuned(policy, tmp_path_factory):
    """The directory of a policy that is not the reference: rto credit of equal policies is sparse."""
    directory = tmp_path_factory.mktemp("tuned")
    moved, generator = copy.deepcopy(policy), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.lm.parameters():
            parameter += parameter.std() * torch.randn(parameter.shape, generator=generator)
    moved.save_pretrained(directory)
    load_tokenizer("imdb-tiny").save_pretrained(directory)
    return str(directory)


def make(name, tuned):
    options = {"tuned": tuned, "clip": 9.0} if name == "rto" else OPTIONS.get(name, {})
    return make_credit(name, **options)


def test_rto_is_not_sparse_here(tuned):
    env = CreditReward(gym.make(IMDB, **ONE_PROMPT), make("rto", tuned))
    env.reset(options={"prompt": "I saw it."})
    for token in responses(env.unwrapped.tokenizer, env.unwrapped.task.max_new_tokens)[0]:
        *_, terminated, _, info = env.step(token)
        if terminated:
            break
    assert (np.abs(info["token_rewards"][info["token_mask"]]) > 0.01).mean() > 0.8


def responses(tokenizer, horizon):
    """Token ids (4, H): each text and its end-of-text, cut at the horizon; what follows the end is ignored."""
    rows = [[*tokenizer.encode(text), *[tokenizer.eos_token_id] * horizon][:horizon] for _, text in TEXTS]
    return np.array(rows)


@pytest.mark.parametrize("name", CREDIT_METHODS)
def test_single_equals_vector_and_sums_are_as_declared(name, policy, tuned):
    method = make(name, tuned)
    envs = vector.CreditReward(gym.make_vec(IMDB, num_envs=4, autoreset_mode="Disabled", **ONE_PROMPT), method)
    env = CreditReward(gym.make(IMDB, **ONE_PROMPT), method)
    envs.unwrapped.policy_attention = env.unwrapped.policy_attention = ForwardAttention(policy)
    tokens = responses(env.unwrapped.tokenizer, env.unwrapped.task.max_new_tokens)
    envs.reset(seed=0, options={"prompt": [prompt for prompt, _ in TEXTS]})
    together = {}
    for column in tokens.T:
        *_, infos = envs.step(column)
        for row in np.flatnonzero(infos.get("_token_rewards", [])):
            together[int(row)] = {key: infos[key][row] for key in infos if key[0] != "_"}
    for row, (prompt, _) in enumerate(TEXTS):
        env.reset(options={"prompt": prompt})
        for token in tokens[row]:
            *_, terminated, _, info = env.step(token)
            if terminated:
                break
        assert info.keys() == together[row].keys()
        for key, value in info.items():
            np.testing.assert_allclose(together[row][key], value, atol=2e-4, rtol=1e-3, err_msg=key)
        token_rewards, mask = info["token_rewards"], info["token_mask"]
        assert token_rewards.dtype == np.float32
        assert np.isfinite(token_rewards).all()
        assert not token_rewards[~mask].any()
        total = token_rewards.sum(dtype=np.float64)
        if method.conserves_return:
            assert total == pytest.approx(info["score"], abs=1e-5)
            assert "credit_residual" not in info
        else:
            assert info["credit_residual"] == pytest.approx(info["score"] - total, abs=1e-5)


def episode_of(env, text):
    """What the environment says at the end of a text."""
    env.reset(options={"prompt": "I saw it."})
    for token in text:
        *_, terminated, _, info = env.step(token)
        if terminated:
            return info
    raise AssertionError("the text has no end")


def test_position_credit_does_not_depend_on_what_stands_where():
    """The tokens in another order, the last one apart, have the same profile; attention's own row has not."""
    profiles = {}
    for name in ("position", "attention"):
        env = CreditReward(gym.make(IMDB, max_new_tokens=5, **ONE_PROMPT), make_credit(name, credit_beta=1.0))
        tokens = env.unwrapped.tokenizer.encode(" a wonderful film and")[:5]
        tokens += env.unwrapped.tokenizer.encode(" so awful")[: 5 - len(tokens)]
        infos = [episode_of(env, text) for text in (tokens, [*tokens[-2::-1], tokens[-1]])]
        profiles[name] = [info["token_rewards"] / info["score"] for info in infos]
    np.testing.assert_allclose(*profiles["position"], rtol=1e-5)
    assert np.abs(np.subtract(*profiles["attention"])).max() > 0.02
    assert np.ptp(profiles["position"][0]) > 0.01  # nor is it uniform


@pytest.mark.parametrize("name", [name for name, method in CREDIT_METHODS.items() if method.causal])
def test_causal_methods_do_not_look_ahead(name, policy, tuned):
    """The same first tokens get the same rewards, whatever follows."""
    method = make(name, tuned)
    env = CreditReward(gym.make(IMDB, **ONE_PROMPT), method)
    env.unwrapped.policy_attention = ForwardAttention(policy)
    tokenizer, seen = env.unwrapped.tokenizer, []
    start = tokenizer.encode(" good. Then it was")
    for end in (" awful and I left", " a joy."):
        env.reset(options={"prompt": "I saw it."})
        for token in [*start, *tokenizer.encode(end), tokenizer.eos_token_id]:
            *_, terminated, _, info = env.step(token)
            if terminated:
                break
        seen.append(torch.from_numpy(info["token_rewards"][: len(start)]))
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-4)
