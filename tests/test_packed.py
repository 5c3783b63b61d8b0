"""Products with packed weights against the layers they stand in for."""

import contextlib
import copy

import gymnasium as gym
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tokenmdp.models.kernels import packed_weights
from tokenmdp.models.lora import WithoutAdapters, add_adapters
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.rollouts import collect
from tokenmdp.rollouts.continuations import monte_carlo_values
from tokenmdp.runs.environments import toy_policy
from tokenmdp.wrappers import vector

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not packed_weights.can_pack(CPU, torch.float32), reason="this PyTorch has no oneDNN")

SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 24, "n_head": 2, "n_positions": 32},
    "llama": {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2},
}


def policy_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config, model = {"gpt2": (GPT2Config, GPT2LMHeadModel), "llama": (LlamaConfig, LlamaForCausalLM)}[kind]
    lm = model(config(vocab_size=50, bos_token_id=0, eos_token_id=0, **SIZES[kind]))
    return CausalLMPolicy(lm, vocab_size=50, eos_token_id=0, compute_dtype=dtype)


def written(policy, contexts):
    """Logits of six decoding steps with given tokens."""
    prompts = torch.arange(12).view(3, 4)
    with torch.no_grad(), contexts:
        state = policy.prefill(prompts, torch.ones_like(prompts))
        logits = [state.logits]
        for step in range(6):
            state = policy.append(state, torch.tensor([step, 7, 9]))
            logits.append(state.logits)
    return torch.stack(logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_decoding_gives_the_logits_of_the_plain_layers(kind, dtype, tolerance):
    if not packed_weights.can_pack(CPU, dtype):
        pytest.skip("oneDNN packs no bfloat16 on this processor")
    policy = policy_of(kind, dtype)
    plain = written(policy, policy.autocast())
    torch.testing.assert_close(written(policy, policy.decoding(rows=3, steps=8)), plain, rtol=0, atol=tolerance)
    assert plain.std() > 5 * tolerance  # else any logits would pass


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), Conv1D(7, 5)])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_every_kind_of_layer_and_number_of_rows(layer, rows):
    model, inputs = nn.Sequential(copy.deepcopy(layer)), torch.randn(rows, 2, 5)
    with torch.no_grad():
        plain = model(inputs)
        with packed_weights.packed_layers(model, torch.float32, rows=3):
            assert "forward" in vars(model[0])
            torch.testing.assert_close(model(inputs), plain)


def test_the_layers_are_their_own_again_after_an_error_and_see_new_weights():
    policy = policy_of("gpt2")
    before = written(policy, policy.autocast())
    with contextlib.suppress(KeyError), policy.decoding(rows=3, steps=8):
        assert any("forward" in vars(module) for module in policy.lm.modules())
        raise KeyError("in the middle of a rollout")
    assert not any("forward" in vars(module) for module in policy.lm.modules())
    with torch.no_grad():
        policy.lm.transformer.h[0].mlp.c_fc.weight.mul_(2)
    changed = written(policy, policy.autocast())
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(written(policy, policy.decoding(rows=3, steps=8)), changed, rtol=0, atol=1e-5)


def test_a_forward_that_something_else_replaced_stays():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].forward = replaced = lambda inputs: inputs * 0
    with packed_weights.packed_layers(model, torch.float32, rows=1):
        assert vars(model[0])["forward"] is replaced
    assert vars(model[0])["forward"] is replaced


def test_short_responses_are_not_worth_it():
    policy = policy_of("gpt2")
    with policy.decoding(rows=3, steps=packed_weights.FEWEST_STEPS - 1):
        assert not any("forward" in vars(module) for module in policy.lm.modules())


def test_weights_of_other_dtypes_stay():
    model = nn.Sequential(nn.Linear(2, 2)).double()
    with packed_weights.packed_layers(model, torch.float32, rows=1):
        assert "forward" not in vars(model[0])


@pytest.mark.parametrize("active", [True, False])
def test_adapters_are_packed_with_what_they_adapt(active):
    policy = policy_of("gpt2")
    add_adapters(policy, 2, 4.0, "all-linear", seed=0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
    reader = policy if active else WithoutAdapters(policy)
    plain = written(reader, policy.autocast())
    torch.testing.assert_close(written(reader, reader.decoding(rows=3, steps=8)), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["collect", "vine"])
def test_rollouts_are_decoded_with_packed_weights(part, monkeypatch):
    envs = gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=4, autoreset_mode="Disabled", max_new_tokens=8)
    envs = vector.SparseReward(envs)
    policy = CausalLMPolicy.for_task(toy_policy(0), envs.unwrapped.task)
    rollout, _ = collect(envs, policy, policy, seed=1)
    calls, pack = [], packed_weights.packed_layers
    monkeypatch.setattr(
        packed_weights, "packed_layers", lambda model, dtype, rows: calls.append(rows) or pack(model, dtype, rows)
    )
    if part == "collect":
        again, _ = collect(envs, policy, policy, seed=1)
        assert calls == [4]
        assert again.input_ids.shape[0] == 4
    else:
        monte_carlo_values(envs, policy, rollout, 2)
        assert calls == [8]
