"""A text's numbers do not depend on the texts beside it: tried for architectures that read padding, or refused."""

import copy

import gymnasium as gym
import pytest
import torch
import transformers as hf

import tokenmdp  # noqa: F401  # registers the ids
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.credit import make_credit
from tokenmdp.credit.base import Resources
from tokenmdp.credit.rescale import PathDependsOnInput
from tokenmdp.models.policy import CausalLMPolicy
from tokenmdp.reward_models import HFRewardModel
from tokenmdp.types import Outcome, lay_out
from tokenmdp.wrappers import vector

SHORT, OTHER, LONG = ([2, 5], [30, 7, 8]), ([9, 4], [33, 12, 2]), ([2], list(range(20, 55)))
EOS = 30
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1}
WIDE = SMALL | {"intermediate_size": 64, "pad_token_id": 1, "max_position_embeddings": 128}
READ_PADDING = {
    "fnet": hf.FNetConfig(**WIDE),
    "convbert": hf.ConvBertConfig(**WIDE, embedding_size=32),
    "nystromformer": hf.NystromformerConfig(**WIDE),
    "mobilebert": hf.MobileBertConfig(**WIDE, embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32),
    "xlnet": hf.XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=64, num_labels=1, pad_token_id=1),
}
DO_NOT = {
    "bert": hf.BertConfig(**WIDE),
    "gpt2": hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, num_labels=1, pad_token_id=1),
    "mixtral": hf.MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
}


def rough(model):
    """Weights so large that a wrong number shows."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight) * (weight.dim() > 1))
    return model.eval()


def classifier(config):
    torch.manual_seed(0)
    return HFRewardModel(rough(hf.AutoModelForSequenceClassification.from_config(copy.deepcopy(config))), None)


def policy_model(config):
    torch.manual_seed(0)
    return rough(hf.AutoModelForCausalLM.from_config(copy.deepcopy(config)))


def score(model, *texts):
    return model(lay_out(*zip(*texts, strict=True))).score.tolist()


def credit(model, method, *texts):
    episode = lay_out(*zip(*texts, strict=True))
    outcome = Outcome(episode, model(episode), torch.arange(len(texts)))
    return make_credit(method)(outcome, Resources(reward_model=model)).token_rewards[0, :3].tolist()


@pytest.mark.parametrize("name", READ_PADDING | DO_NOT)
def test_a_score_is_the_same_alone_and_beside_a_longer_text(name):
    model = classifier((READ_PADDING | DO_NOT)[name])
    assert model.by_length == (name in READ_PADDING)
    assert ("attention" in model.provides) == (name in DO_NOT)
    alone = [score(model, text)[0] for text in (SHORT, LONG, OTHER)]
    assert score(model, SHORT, LONG, OTHER) == pytest.approx(alone, abs=1e-4)
    assert max(alone) - min(alone) > 1e-3


@pytest.mark.parametrize("method", ["integrated-gradients", "deeplift"])
@pytest.mark.parametrize("name", ["fnet", "convbert", "bert"])
def test_a_texts_credit_is_the_same_alone_and_beside_a_longer_text(name, method):
    model = classifier((READ_PADDING | DO_NOT)[name])
    assert credit(model, method, SHORT, LONG) == pytest.approx(credit(model, method, SHORT), abs=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        DO_NOT["mixtral"],
        hf.Qwen2MoeConfig(
            **WIDE, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        hf.JetMoeConfig(**WIDE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    ],
    ids=lambda config: config.model_type,
)
def test_deeplift_refuses_experts_that_the_text_picks(config):
    model = classifier(config)
    with pytest.raises(PathDependsOnInput, match="use integrated-gradients"):
        credit(model, "deeplift", SHORT, LONG)
    alone = credit(model, "integrated-gradients", SHORT)
    assert credit(model, "integrated-gradients", SHORT, LONG) == pytest.approx(alone, abs=1e-3)


def phi3(**options):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    return hf.Phi3Config(
        **WIDE, num_key_value_heads=2, original_max_position_embeddings=16, rope_parameters=rope, **options
    )


def test_longrope_ends_where_it_switches():
    model = classifier(phi3())
    assert model.max_tokens == 16
    alone = score(model, SHORT)[0]
    assert score(model, SHORT, ([2], list(range(20, 35))))[0] == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ValueError, match=r"17 tokens exceeds the 16 positions \(of 128: with LongRoPE"):
        score(model, SHORT, ([2], list(range(20, 36))))
    policy = CausalLMPolicy(policy_model(phi3()), 60, EOS)
    policy.check_positions(16)
    with pytest.raises(ValueError, match="LongRoPE"):
        policy.check_positions(17)


def test_a_model_that_mixes_texts_of_one_length_is_refused():
    class Mixing(hf.BertForSequenceClassification):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            output.logits = output.logits - output.logits.mean(0, keepdim=True)
            return output

    with pytest.raises(ValueError, match="its scores would depend on the batch"):
        HFRewardModel(rough(Mixing(DO_NOT["bert"])), None)


def test_sparse_attention_drawn_at_random_is_refused():
    config = hf.BigBirdConfig(**WIDE)
    with pytest.raises(ValueError, match="original_full"):
        classifier(config)
    config.attention_type = "original_full"
    classifier(config)


# --- policies

IDS = {"bos_token_id": EOS, "eos_token_id": EOS}
TINY = {"vocab_size": 32, "hidden_size": 32} | IDS
LAYERS = TINY | {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 31}
GROUPED = LAYERS | {"num_key_value_heads": 2, "head_dim": 8}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
POLICIES = {
    "opt-350m": hf.OPTConfig(
        **TINY, word_embed_proj_dim=16, do_layer_norm_before=False, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=64, max_position_embeddings=64, pad_token_id=31,
    ),
    "bloom": hf.BloomConfig(**TINY, n_layer=2, n_head=4),
    "mpt": hf.MptConfig(vocab_size=32, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, **IDS),
    "mamba": hf.MambaConfig(**TINY, num_hidden_layers=2, state_size=8),
    "falcon-mamba": hf.FalconMambaConfig(**TINY, num_hidden_layers=2, state_size=8),
    "multimodal gemma 3": hf.Gemma3Config(text_config=GROUPED, vision_config=VISION),
    "gemma 2 with soft caps": hf.Gemma2Config(**GROUPED, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
}  # fmt: skip


def envs(**options):
    options = {"num_envs": 8, "autoreset_mode": "Disabled", "max_new_tokens": 6} | options
    return vector.SparseReward(gym.make_vec("tokenmdp:TextGen-Toy-v0", **options))


@pytest.mark.parametrize("name", POLICIES)
def test_sizes_come_from_the_layers_and_sampling_is_scored_as_it_was(name):
    agent = PPO(policy_model(POLICIES[name]), envs(), PPOConfig(dtype="float32", num_minibatches=2))
    assert agent.policy.value_head.in_features == agent.policy.lm.get_output_embeddings().weight.shape[1]
    agent.learn(1)
    first = agent.history[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-3)  # sampled through the cache, scored in whole texts
    limit = {"opt-350m": 64, "mpt": 64, "gemma 2 with soft caps": 8192, "multimodal gemma 3": 131072}.get(name)
    if limit is None:
        agent.policy.check_positions(10**9)
    else:
        agent.policy.check_positions(limit)
        with pytest.raises(ValueError, match=f"has {limit} positions"):
            agent.policy.check_positions(limit + 1)


@pytest.mark.parametrize("cap", [2.0, 30.0])
@pytest.mark.parametrize("config", [hf.Gemma2Config, hf.Gemma3TextConfig], ids=["gemma2", "gemma3"])
def test_capped_logits_are_the_models_own(config, cap):
    lm = policy_model(config(**GROUPED, final_logit_softcapping=cap))
    ids = torch.arange(9)[None] % 30
    with torch.no_grad():
        eager = policy_model(config(**GROUPED, final_logit_softcapping=cap))
        eager.set_attn_implementation("eager")
        expected = eager(ids).logits.log_softmax(-1)[0, 3:8].gather(-1, ids[0, 4:, None])[:, 0]
        got = CausalLMPolicy(lm, 32, EOS).evaluate(ids, torch.ones_like(ids).bool(), 4).logprobs[0]
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_change_of_the_logits_that_shows_only_when_they_grow_is_refused():
    class Late(hf.GPT2LMHeadModel):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            output.logits = output.logits.clamp(max=50.0)
            return output

    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        CausalLMPolicy(Late(hf.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2)).eval(), 32, EOS)


@pytest.mark.parametrize(
    "config",
    [
        hf.OpenAIGPTConfig(vocab_size=32, n_embd=32, n_layer=2, n_head=4),
        hf.RwkvConfig(**TINY, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_models_without_a_cache_are_refused(config):
    with pytest.raises(ValueError, match="keeps no cache"):
        CausalLMPolicy(policy_model(config), 32, EOS)


def test_a_policy_that_reads_padding_needs_prompts_of_one_length():
    config = hf.RecurrentGemmaConfig(
        **TINY, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, lru_width=32,
        attention_window_size=16, pad_token_id=31,
    )  # fmt: skip
    lm = policy_model(config)
    agent = PPO(lm, envs(prompts=["the film was", "this movie is"]), PPOConfig(dtype="float32", num_minibatches=2))
    agent.learn(1)
    assert agent.history[0]["kl"] == pytest.approx(0.0, abs=1e-3)
    agent = PPO(policy_model(config), envs(prompts=["the film was", "this"]), PPOConfig(dtype="float32"))
    with pytest.raises(ValueError, match=r"RecurrentGemma.* reads the padding before a prompt"):
        agent.learn(3)


def test_a_wrong_cache_is_refused():
    class Forgetful(hf.GPT2Model):
        def forward(self, input_ids=None, past_key_values=None, position_ids=None, **options):
            return super().forward(input_ids)

    lm = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2))
    lm.transformer = Forgetful(lm.config)
    with pytest.raises(ValueError, match="token by token through its cache"):
        CausalLMPolicy(rough(lm), 32, EOS)
