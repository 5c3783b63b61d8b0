"""Adapters of peft from outside: merged where they are loaded, refused where they are handed over unmerged."""

import json

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import tokenmdp  # noqa: F401  # registers the ids
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.files import CheckpointError
from tokenmdp.models.loading import load_causal_lm
from tokenmdp.models.names import ModelNotFound
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.models.soup import write_soup
from tokenmdp.models.tokens import toy_tokenizer
from tokenmdp.reward_models import HFRewardModel, load_reward_model
from tokenmdp.reward_models.learning import start_classifier
from tokenmdp.types import lay_out
from tokenmdp.wrappers import vector

peft = pytest.importorskip("peft", reason="needs the lora extra: pip install 'tokenmdp[lora]'")

EOS = 30
TEXTS = lay_out([[5, 6], [7]], [[20, 21, EOS], [22, 23]])  # the first ends with end-of-text, which is the pad token
TOY = "tokenmdp:TextGen-Toy-v0"


def gpt2(cls=GPT2LMHeadModel, **options):
    torch.manual_seed(0)
    return cls(GPT2Config(
        vocab_size=32, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS,
        pad_token_id=EOS, initializer_range=0.2, **options,
    ))  # fmt: skip


def llama(cls=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    return cls(LlamaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS,
        initializer_range=0.2, **options,
    ))  # fmt: skip


def bert(**options):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2, **options,
    ))  # fmt: skip


LORA = {"r": 4, "init_lora_weights": False}  # B is random, so that the adapter changes something
CAUSAL = {
    "lora of gpt2": (gpt2, lambda: peft.LoraConfig("CAUSAL_LM", target_modules=["c_attn", "c_fc"], **LORA)),
    "dora of llama": (llama, lambda: peft.LoraConfig("CAUSAL_LM", target_modules=["q_proj"], use_dora=True, **LORA)),
    "loha of llama": (
        llama, lambda: peft.LoHaConfig("CAUSAL_LM", r=4, target_modules=["v_proj"], init_weights=False),
    ),
}  # fmt: skip
CLASSIFIERS = {
    "gpt2, a trained head": (
        lambda: gpt2(GPT2ForSequenceClassification, num_labels=1),
        lambda: peft.LoraConfig("SEQ_CLS", target_modules=["c_attn"], **LORA),
    ),
    "bert with two labels": (bert, lambda: peft.LoraConfig("SEQ_CLS", target_modules=["query"], **LORA)),
    "llama and every linear layer": (
        lambda: llama(LlamaForSequenceClassification, num_labels=1),
        lambda: peft.LoraConfig("SEQ_CLS", target_modules="all-linear", modules_to_save=["score"], **LORA),
    ),
}


def saved(tmp_path, base, config):
    """The directories of an adapter and of the same model merged by peft."""
    base.save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    loader = AutoModelForCausalLM if "LM" in type(base).__name__ else AutoModelForSequenceClassification
    model = peft.get_peft_model(loader.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return str(tmp_path / "adapter"), str(tmp_path / "merged")


def envs():
    return vector.SparseReward(gym.make_vec(TOY, num_envs=8, autoreset_mode="Disabled"))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_policy_from_an_adapter_is_the_merged_model_learns_and_is_saved_whole(name, tmp_path):
    make, config = CAUSAL[name]
    adapter, merged = saved(tmp_path, make(), config())
    agent = PPO(adapter, envs(), PPOConfig(learning_rate=0.01, num_minibatches=2))
    assert all(weight.requires_grad for weight in agent.policy.parameters())
    with torch.no_grad():
        logprobs, expected, plain = (
            policy.evaluate(TEXTS.input_ids, TEXTS.attention_mask, 2).logprobs
            for policy in (
                agent.policy, CausalLMPolicy(load_causal_lm(merged), 32, EOS), CausalLMPolicy(make().eval(), 32, EOS)
            )
        )  # fmt: skip
    assert torch.allclose(logprobs, expected, atol=1e-4)
    assert (logprobs - plain).abs().max() > 0.01
    agent.learn(2)
    agent.save(tmp_path / "run")
    again = PPO.load(tmp_path / "run", envs())
    assert torch.equal(again.policy.lm.state_dict()[key := next(iter(again.policy.lm.state_dict()))],
                       agent.policy.lm.state_dict()[key])  # fmt: skip
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_new_adapters_train_beside_a_merged_one_and_their_checkpoint_loads(tmp_path):
    make, config = CAUSAL["lora of gpt2"]
    adapter, _ = saved(tmp_path, make(), config())
    options = PPOConfig(learning_rate=0.01, num_minibatches=2, lora_rank=2)
    agent = PPO(adapter, envs(), options).learn(1)
    agent.save(tmp_path / "run")
    assert PPO.load(tmp_path / "run", envs()).learn(1).num_updates_done == 2


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_reward_model_from_an_adapter_scores_as_its_merged_self(name, tmp_path):
    make, config = CLASSIFIERS[name]
    adapter, merged = saved(tmp_path, make(), config())
    model, whole = load_reward_model(adapter), load_reward_model(merged)
    assert model(TEXTS).score.tolist() == pytest.approx(whole(TEXTS).score.tolist(), abs=1e-5)
    assert model.provides == whole.provides
    assert model.tokenizer.get_vocab() == toy_tokenizer().get_vocab()  # its base model's
    env = gym.make(TOY, reward_model=adapter)  # read by its config.json before the weights are
    env.reset(seed=0)
    assert env.step(EOS)[2]


def test_a_head_trained_with_the_adapter_needs_none_in_the_base(tmp_path):
    llama().save_pretrained(tmp_path / "base")  # a language model: no head, and two labels by its configuration
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    model = peft.get_peft_model(base, peft.LoraConfig("SEQ_CLS", target_modules=["q_proj"], **LORA)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(torch.tensor([[7, 22, 23]])).logits.item()
    assert load_reward_model(str(tmp_path / "adapter"))(TEXTS).score[1].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["lora of gpt2", "dora of llama"])
def test_a_reward_model_starts_from_the_merged_policy_of_an_adapter(name, tmp_path):
    make, config = CAUSAL[name]
    adapter, merged = saved(tmp_path, make(), config())
    toy_tokenizer().save_pretrained(merged)
    (own, _), (whole, _) = (start_classifier(one, seed=1) for one in (adapter, merged))
    assert all(torch.allclose(one, other) for one, other in zip(own.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("base", ["classifier", "language model"])
def test_a_reward_model_goes_on_from_an_adapter_with_a_head(base, tmp_path):
    make, config = CLASSIFIERS["gpt2, a trained head"]
    adapter, _ = saved(tmp_path, make(), config())
    if base == "language model":  # below which most are trained
        gpt2().save_pretrained(tmp_path / "base")
    started, _ = start_classifier(adapter, seed=1)
    learned = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(started.score.weight, learned)


def test_a_soup_of_adapters_from_outside(tmp_path):
    adapter, _ = saved(tmp_path, gpt2(), CAUSAL["lora of gpt2"][1]())
    write_soup([str(tmp_path / "base"), adapter], (0.5, 0.5), tmp_path / "soup")
    states = [load_causal_lm(str(tmp_path / one)).state_dict() for one in ("base", "merged", "soup")]
    for name, weight in states[2].items():
        torch.testing.assert_close(weight, (states[0][name] + states[1][name]) / 2)


def test_an_adapter_trained_with_further_tokens(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    base = gpt2()
    base.resize_token_embeddings(40)
    config = peft.LoraConfig("CAUSAL_LM", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"], **LORA)
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[39, 3, 35]])
    with torch.no_grad():
        expected, logits = model.eval()(ids).logits, load_causal_lm(str(tmp_path / "adapter"))(ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)


def test_a_cache_notices_that_the_base_of_an_adapter_was_replaced(tmp_path):
    make, config = CLASSIFIERS["gpt2, a trained head"]
    adapter, _ = saved(tmp_path, make(), config())
    before = load_reward_model(adapter)(TEXTS).score
    other = make()
    other.transformer.wte.weight.data.mul_(2)
    other.save_pretrained(tmp_path / "base")
    assert not torch.allclose(load_reward_model(adapter)(TEXTS).score, before)


@pytest.mark.parametrize("kind", ["PeftModel", "inside", "added"])
def test_unmerged_adapters_in_a_model_object_are_refused(kind):
    config = CAUSAL["lora of gpt2"][1]()
    model = gpt2()
    if kind == "added":
        model.add_adapter(config)
    else:
        wrapped = peft.get_peft_model(model, config)
        model = wrapped if kind == "PeftModel" else wrapped.base_model.model
    with pytest.raises(ValueError, match=r"merge_and_unload"):
        PPO(model, envs())
    classifier = peft.get_peft_model(gpt2(GPT2ForSequenceClassification, num_labels=1), CLASSIFIERS[
        "gpt2, a trained head"][1]())  # fmt: skip
    with pytest.raises(ValueError, match=r"merge_and_unload"):
        HFRewardModel(classifier, None)


def test_adapters_that_are_no_change_of_the_weights_are_refused(tmp_path):
    adapter, _ = saved_prompts(tmp_path)
    with pytest.raises(CheckpointError, match=r"PROMPT_TUNING.*merge_and_unload"):
        load_causal_lm(adapter)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}, "gives other logits once it is merged"),
        ({}, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, "gives other logits once it is"),
        ({}, {"target_modules": ["q_proj"], "lora_bias": True}, "cannot be merged.*lora_bias"),
        ({}, {"target_modules": ["q_proj"], "alora_invocation_tokens": [20]}, "cannot be merged.*aLoRA"),
    ],
    ids=["tied", "repeated layers", "biases", "activated"],
)
def test_adapters_that_the_weights_cannot_hold_are_refused(options, config, message, tmp_path):
    llama(**options).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig("CAUSAL_LM", **LORA | config))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message):
        load_causal_lm(str(tmp_path / "adapter"))


def saved_prompts(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "adapter"
    )
    return str(tmp_path / "adapter"), None


def test_adapters_that_are_damaged_or_lack_their_base_are_refused_by_name(tmp_path):
    adapter, _ = saved(tmp_path, gpt2(), CAUSAL["lora of gpt2"][1]())
    config = tmp_path / "adapter" / "adapter_config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps(record | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelNotFound, match=r"is an adapter of the model '.*gone'"):
        load_causal_lm(adapter)
    config.write_text(json.dumps(record | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="base_model_name_or_path"):
        load_causal_lm(adapter)
    config.write_text(json.dumps(record))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        load_causal_lm(adapter)
    weights.write_bytes(content)
    config.write_text(json.dumps(record | {"target_modules": ["c_attn", "c_proj", "c_fc"]}))
    with pytest.raises(CheckpointError, match="missing adapter keys"):
        load_causal_lm(adapter)
    config.write_text(json.dumps(record))
    (tmp_path / "adapter" / "model.safetensors").write_bytes((tmp_path / "merged" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="a whole model and an adapter"):
        load_causal_lm(adapter)


def test_a_model_of_which_nothing_learns_is_refused():
    with pytest.raises(ValueError, match=r"no weight of the language model GPT2LMHeadModel learns"):
        PPO(gpt2().requires_grad_(False), envs())


def test_a_directory_that_would_not_load_is_refused_when_it_is_saved(tmp_path, monkeypatch):
    policy = CausalLMPolicy(gpt2(), 32, EOS)
    whole = {f"lm.{name}": weight for name, weight in policy.lm.state_dict().items()}
    del whole["lm.transformer.h.0.ln_1.weight"]
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.ln_1\.weight"):
        policy.save_pretrained(
            tmp_path, whole | {f"value_head.{k}": v for k, v in policy.value_head.state_dict().items()}
        )
