"""The gold reward model: a second judge that no policy is trained on, to see where the first one is over-optimised.

It shares the tokenizer and the data with the reward model that a policy sees, and nothing else: Llama layers instead of
GPT-2's (rotary positions, gated units, no biases), its own width, seed and order of the data, and a language model of
its own to start from instead of the policy's backbone. So what fools both is more than one model's blind spot.
"""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification


def llama_config(tokenizer, width: int, layers: int, heads: int) -> LlamaConfig:
    eos = tokenizer.eos_token_id
    return LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=1024, hidden_size=width,
        intermediate_size=64 * round(width * 8 / 3 / 64), num_hidden_layers=layers, num_attention_heads=heads,
        tie_word_embeddings=True,
        bos_token_id=eos, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def from_language_model(model: LlamaForCausalLM) -> LlamaForSequenceClassification:
    """A classifier that starts from the backbone of its own language model."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.num_labels = 2
    config.id2label, config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    config.architectures = ["LlamaForSequenceClassification"]
    classifier = LlamaForSequenceClassification(config)
    classifier.model.load_state_dict(model.model.state_dict())
    return classifier
