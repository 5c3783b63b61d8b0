"""The models that a task loads for credit methods: on which device, and with which options."""

import gymnasium as gym
import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from tokenmdp.models.loading import load_tokenizer
from tokenmdp.reward_models import HFRewardModel
from tokenmdp.runs.environments import toy_policy

TOY = "tokenmdp:TextGen-Toy-v0"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    directory = tmp_path_factory.mktemp("three-labels")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=32, n_embd=8, n_layer=1, n_head=1, num_labels=3, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(directory)
    load_tokenizer("toy").save_pretrained(directory)
    return str(directory)


def test_a_loaded_policy_is_where_the_reward_model_is(tmp_path, classifier):
    toy_policy(0).save_pretrained(tmp_path)
    load_tokenizer("toy").save_pretrained(tmp_path)
    named = gym.make(TOY, reward_device="meta").unwrapped.task  # a word list, which has no device
    assert named.load_policy(str(tmp_path)).lm.device.type == "meta"
    model = HFRewardModel(GPT2ForSequenceClassification.from_pretrained(classifier), load_tokenizer("toy"), score=0)
    built = gym.make(TOY, reward_model=model).unwrapped.task
    assert built.load_policy(str(tmp_path)).lm.device == model.device == torch.device("cpu")
    model.model.to("meta")
    assert model.device.type == "meta"


def test_the_tasks_own_model_is_loaded_by_name_with_its_own_score(classifier):
    task = gym.make(TOY, reward_model=classifier, score=2).unwrapped.task
    assert task.load_reward_model(classifier) is task.reward_model
    with pytest.raises(ValueError, match="3 labels"):  # another task says nothing about this model's labels
        gym.make(TOY).unwrapped.task.load_reward_model(classifier)
