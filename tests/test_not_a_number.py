"""NaN anywhere: refused by name where it is loaded, sampled or evaluated, and never averaged away."""

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tokenmdp  # registers the ids
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.models.policy import VALUE_HEAD_FILE, CausalLMPolicy
from tokenmdp.models.soup import write_soup
from tokenmdp.models.tokens import toy_tokenizer
from tokenmdp.reward_models import HFRewardModel
from tokenmdp.reward_models.learning import LearningClassifier, start_classifier
from tokenmdp.rollouts import collect
from tokenmdp.wrappers import vector

IDS = {"bos_token_id": 30, "eos_token_id": 30}


def gpt2(cls=GPT2LMHeadModel, **options):
    torch.manual_seed(0)
    return cls(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, pad_token_id=31, **IDS, **options))


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape, **IDS))


def envs():
    return vector.SparseReward(gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=8, autoreset_mode="Disabled"))


def spoil(model, key, value=float("nan")):
    weight = dict(model.named_parameters())[key]
    with torch.no_grad():
        weight.view(-1)[3] = value
    return model


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (gpt2, "transformer.wte.weight", float("nan")),
        (gpt2, "transformer.h.0.mlp.c_fc.bias", float("inf")),
        (llama, "model.layers.0.self_attn.q_proj.weight", float("nan")),
    ],
)
def test_a_policy_with_one_such_weight_is_refused_by_its_name(make, key, value, tmp_path):
    with pytest.raises(ValueError, match=rf"weight {key} in which 1 of"):
        PPO(spoil(make(), key, value), envs())
    spoil(make(), key, value).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=key):
        CausalLMPolicy.for_task(str(tmp_path), envs().unwrapped.task)


def test_a_reward_model_with_one_such_weight_is_refused():
    model = spoil(gpt2(GPT2ForSequenceClassification, num_labels=1), "transformer.ln_f.weight")
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight"):
        HFRewardModel(model, None)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_members_of_soups_and_starts_of_reward_models_are_named(value, tmp_path):
    directories = [tmp_path / name for name in ("whole", "spoiled")]
    for directory, model in zip(directories, (gpt2(), spoil(gpt2(), "transformer.h.0.ln_1.bias", value)), strict=True):
        model.save_pretrained(directory)
        toy_tokenizer().save_pretrained(directory)
    refused = r"spoiled has a weight transformer\.h\.0\.ln_1\.bias in which 1 of"
    with pytest.raises(ValueError, match=refused):
        write_soup(directories, (0.5, 0.5), tmp_path / "soup")
    with pytest.raises(ValueError, match=refused):
        LearningClassifier(*start_classifier(str(directories[1]), seed=0))


def test_a_value_head_with_nan_is_refused(tmp_path):
    CausalLMPolicy(gpt2(), 32, 30).save_pretrained(tmp_path)
    head = load_file(tmp_path / VALUE_HEAD_FILE)
    head["bias"].fill_(float("nan"))
    save_file(head, tmp_path / VALUE_HEAD_FILE)
    with pytest.raises(ValueError, match=rf"{VALUE_HEAD_FILE}.* bias"):
        CausalLMPolicy.from_pretrained(str(tmp_path), 32, 30)


@pytest.mark.parametrize("which", ["policy", "reference"])
def test_weights_that_become_nan_later_stop_rollouts_and_evaluations(which):
    agent = PPO(gpt2(), envs(), PPOConfig(dtype="float32", num_minibatches=2))
    spoil(getattr(agent, which).lm, "transformer.ln_f.bias")
    with pytest.raises(FloatingPointError, match=f"the {which}'s log-probabilities are NaN or infinite in 8 of 8"):
        agent.learn(1)
    if which == "policy":
        with pytest.raises(FloatingPointError, match="gave logits that are NaN"):
            tokenmdp.evaluate(envs(), agent, episodes=4)


def test_values_and_token_rewards_are_watched_too(monkeypatch):
    agent = PPO(gpt2(), envs(), PPOConfig(dtype="float32", num_minibatches=2))
    spoil(agent.policy.value_head, "weight", float("inf"))
    with pytest.raises(FloatingPointError, match="the values"):
        collect(agent.envs, agent.policy, agent.reference, seed=0)
