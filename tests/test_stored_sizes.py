"""Damaged config.json and tokenizer.json: one error that names the file, at once."""

import json
import shutil

import pytest

from tokenmdp.files import CheckpointError
from tokenmdp.models.loading import load_causal_lm, load_tokenizer
from tokenmdp.models.names import resolve


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(resolve("policy", "imdb-tiny"), tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 64.5}, "n_embd 64.5; it must be a whole number"),
        ({"n_layer": 10**7}, "n_layer 10000000, and model.safetensors holds"),
        ({"n_embd": 10**8}, "n_embd 100000000, and the longest side"),
        ({"vocab_size": 10**9}, "vocab_size 1000000000"),
        ({"n_positions": 10**13}, "no model has so many"),
        ({"n_head": 0}, "n_head 0"),
        ({"n_layer": -1}, "n_layer -1"),
        ({"n_embd": "64"}, 'n_embd "64"'),
        ({"n_head": True}, "n_head true"),
        ({"n_embd": None}, "cannot load a policy"),
        ({"model_type": None}, "cannot load a policy"),
        ({"n_head": 7}, "cannot load a policy"),
        ({"activation_function": 3}, "cannot load a policy"),
    ],
)
def test_sizes(model, changes, message):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message) as raised:
        load_causal_lm(str(model))
    assert str(model) in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000, "\ud7ff\x00"])
def test_configs_that_are_none(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_causal_lm(str(model))


def test_tokenizers(model):
    whole = json.loads((model / "tokenizer.json").read_text())
    for content in (
        "", "{", "[]", "null", '{"version": "1.0"}', "[" * 100_000,
        json.dumps(whole | {"model": {}}), json.dumps(whole | {"model": None}),
        json.dumps(whole | {"added_tokens": [{"id": "x"}]}), json.dumps(whole | {"version": 7}),
    ):  # fmt: skip
        (model / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
            load_tokenizer(str(model))
