import contextlib

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tokenmdp.models.kernels.recompute import recomputing, transformer_layers
from tokenmdp.models.policy import CausalLMPolicy

LAYERS = 4
IDS = torch.randint(0, 30, (6, 24), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(24) >= torch.tensor([0, 3, 1, 0, 2, 0])[:, None]) & (torch.arange(24) < 20)
NAMES = {"vocab_size": 32, "bos_token_id": 30, "eos_token_id": 30}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=32, n_layer=LAYERS, n_head=2, resid_pdrop=0.5, **NAMES))


def llama():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"max_position_embeddings": 32, "attention_dropout": 0.5, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **shape, **NAMES))


def opt():  # its layers themselves ask whether they are in training mode, and then drop out
    shape = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32, "pad_token_id": 0}
    return OPTForCausalLM(
        OPTConfig(num_hidden_layers=LAYERS, max_position_embeddings=32, dropout=0.5, **shape, **NAMES)
    )


def measured_gradients(make_lm, gradient_checkpointing, dtype=torch.float32):
    """Gradients by name, bytes that the forward keeps for the backward, and how often each layer ran."""
    torch.manual_seed(0)
    policy = CausalLMPolicy(
        make_lm(), 32, 30, compute_dtype=dtype, gradient_checkpointing=gradient_checkpointing
    ).train()
    nn.init.normal_(policy.value_head.weight)
    runs = dict.fromkeys(range(LAYERS), 0)
    for index, layer in enumerate(transformer_layers(policy.lm)):
        norm = next(child for child in layer.modules() if "Norm" in type(child).__name__)
        norm.register_forward_pre_hook(lambda *_, index=index: runs.update({index: runs[index] + 1}))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = policy.evaluate(IDS, MASK, 8)
    size = sum(kept.values())
    (result.logprobs * MASK[:, 8:]).sum().sub(result.values.square().sum() + result.entropy.mean()).backward()
    return {name: weight.grad for name, weight in policy.named_parameters()}, size, runs


@pytest.mark.parametrize("make_lm", [gpt2, llama, opt])
def test_gradients_are_the_same_and_the_forward_keeps_less(make_lm):
    gradients, size, runs = measured_gradients(make_lm, False)
    again, smaller, more_runs = measured_gradients(make_lm, True)
    assert gradients.keys() == again.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-6)
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0
    assert set(runs.values()) == {1}
    assert set(more_runs.values()) == {2}
    assert smaller < 0.6 * size


def test_recomputing_keeps_the_precision_of_the_forward():
    gradients, *_ = measured_gradients(gpt2, False, torch.bfloat16)
    again, *_ = measured_gradients(gpt2, True, torch.bfloat16)
    for name, gradient in gradients.items():
        assert torch.equal(again[name], gradient), name


def test_sampling_computes_nothing_twice_and_the_layers_are_left_as_they_were():
    policy = CausalLMPolicy(gpt2(), 32, 30, gradient_checkpointing=True)
    calls = []
    policy.lm.transformer.h[0].register_forward_hook(lambda *_: calls.append(0))
    with torch.no_grad():
        policy.append(policy.prefill(IDS, MASK), IDS[:, 0])
    assert len(calls) == 2
    with contextlib.suppress(ZeroDivisionError), recomputing(policy.lm):
        assert "forward" in vars(policy.lm.transformer.h[0])
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in transformer_layers(policy.lm))


def test_a_forward_that_somebody_else_put_on_a_layer_is_used_and_stays():
    policy = CausalLMPolicy(gpt2(), 32, 30, gradient_checkpointing=True)
    first, calls = policy.lm.transformer.h[0], []
    original = first.forward

    def hooked(*arguments, **options):
        calls.append(0)
        return original(*arguments, **options)

    first.forward = hooked  # as accelerate's hooks do
    for _ in range(2):
        policy.evaluate(IDS, MASK, 8).values.sum().backward()
    assert len(calls) == 4
    assert first.forward is hooked
    assert not any("forward" in vars(layer) for layer in policy.lm.transformer.h[1:])


def test_a_model_without_marked_layers_is_refused():
    with pytest.raises(ValueError, match="Linear marks no layers that can be computed again"):
        transformer_layers(nn.Linear(1, 1))
