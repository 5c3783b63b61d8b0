"""Products with packed weights against the layers they stand in for."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tokenmdp import packed
from tokenmdp.policy import CausalLMPolicy

pytestmark = pytest.mark.skipif(not packed.can_pack(torch.device("cpu")), reason="this PyTorch has no oneDNN")

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
        with packed.packed_layers(model, torch.float32, rows=3):
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
    with packed.packed_layers(model, torch.float32, rows=1):
        assert vars(model[0])["forward"] is replaced
    assert vars(model[0])["forward"] is replaced


def test_short_responses_are_not_worth_it():
    policy = policy_of("gpt2")
    with policy.decoding(rows=3, steps=packed.FEWEST_STEPS - 1):
        assert not any("forward" in vars(module) for module in policy.lm.modules())
