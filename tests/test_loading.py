"""Names, caches and the errors for a name that resolves to nothing."""

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from tokenmdp.files import CheckpointError
from tokenmdp.models import hub, loading
from tokenmdp.models.hub import from_pretrained
from tokenmdp.models.loading import load_causal_lm, load_tokenizer
from tokenmdp.models.names import ALIASES, ModelNotFound, resolve
from tokenmdp.models.tokens import toy_tokenizer
from tokenmdp.reward_models import LexiconRewardModel, load_reward_model

CONFIG = GPT2Config(vocab_size=32, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=30, bos_token_id=30)


@pytest.fixture
def policy_dir(tmp_path):
    directory = tmp_path / "policy"
    GPT2LMHeadModel(CONFIG).save_pretrained(directory)
    toy_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def noise(monkeypatch):
    """What transformers itself says about weights."""
    records = []
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "callHandlers", records.append)
    return records


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_resolve_goes_alias_then_directory_then_hub(tmp_path, monkeypatch):
    assert Path(resolve("reward_model", "imdb-tiny")).parts[-3:] == ("assets", "imdb", "reward_model")
    assert resolve("tokenizer", "imdb-tiny") == resolve("policy", "imdb-tiny")
    assert resolve("prompts", "imdb-tiny").endswith("prompts.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imdb-tiny").mkdir()
    (tmp_path / "mine").mkdir()
    assert Path(resolve("policy", "imdb-tiny")).parent.name == "imdb"  # the alias wins over a directory
    assert resolve("policy", "mine") == str((tmp_path / "mine").resolve())
    assert resolve("policy", "owner/name") == "owner/name"
    assert resolve("policy", "toy") == "toy"  # "toy" is a tokenizer only


@pytest.mark.parametrize("kind", ["policy", "reward_model", "tokenizer"])
def test_the_directory_of_a_run_stands_for_its_checkpoint(kind, policy_dir, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    assert resolve(kind, str(run)) == str(run)
    Path(policy_dir).rename(run / "checkpoint.previous")  # the swap was interrupted
    assert resolve(kind, str(run)) == str(run / "checkpoint")
    (run / "config.json").write_text("{}")  # a model of its own
    assert resolve(kind, str(run)) == str(run)


def test_the_model_of_a_run_is_loaded(policy_dir, tmp_path):
    (tmp_path / "run").mkdir()
    Path(policy_dir).rename(tmp_path / "run" / "checkpoint")
    assert load_causal_lm(str(tmp_path / "run")).config.model_type == "gpt2"


def test_resolve_puts_back_a_directory_whose_swap_was_interrupted(tmp_path):
    (tmp_path / "run.previous").mkdir()
    assert resolve("policy", str(tmp_path / "run")) == str((tmp_path / "run").resolve())
    assert (tmp_path / "run").is_dir()


def test_toy_tokenizer_round_trips_every_word():
    tokenizer = toy_tokenizer()
    assert len(tokenizer) == 32
    assert 0 not in tokenizer.all_special_ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = list(range(29))
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert tokenizer("the submarine")["input_ids"] == [0, tokenizer.unk_token_id]


def test_tokenizers_are_cached_and_a_rewritten_directory_is_noticed(policy_dir):
    first = load_tokenizer(str(policy_dir))
    assert load_tokenizer(str(policy_dir)) is first
    assert load_tokenizer("toy") is load_tokenizer("toy")
    grown = toy_tokenizer()
    grown.add_tokens(["zebra"])
    grown.save_pretrained(policy_dir)
    os.utime(policy_dir / "tokenizer.json", ns=(1, 1))  # a clock too coarse to see the rewrite must not matter here
    assert len(load_tokenizer(str(policy_dir))) == 33


def test_causal_lm_is_fresh_in_eval_mode_and_in_the_dtype_asked(policy_dir):
    first, second = load_causal_lm(str(policy_dir)), load_causal_lm(str(policy_dir), dtype=torch.bfloat16)
    assert first is not second
    assert first.dtype == torch.float32
    assert second.dtype == torch.bfloat16
    assert not first.training
    GPT2LMHeadModel(CONFIG).to(torch.bfloat16).save_pretrained(policy_dir)
    assert load_causal_lm(str(policy_dir)).dtype == torch.float32  # stored as bf16, as the bundle is


@pytest.mark.parametrize("load", [load_tokenizer, load_causal_lm])
def test_unknown_name_offline_fails_fast_and_says_what_to_do(load, offline):
    started = time.monotonic()
    with pytest.raises(ModelNotFound) as raised:
        load("no-such-owner/no-such-model")
    assert time.monotonic() - started < 10  # transformers' own retries take 25 s
    message = str(raised.value)
    assert "no-such-owner/no-such-model" in message
    assert "hf download no-such-owner/no-such-model --local-dir DIR" in message
    assert "pass DIR" in message
    assert "imdb-tiny" in message
    assert "HF_HUB_OFFLINE" in message
    assert isinstance(raised.value, OSError)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(ModelNotFound, match=r"http://127.0.0.1:9 did not answer"):
        load_tokenizer("no-such-owner/no-such-model")
    assert time.monotonic() - started < 10


def test_a_missing_path_is_not_sought_on_the_hub(tmp_path):
    for name in (str(tmp_path / "nowhere" / "model"), "./nowhere", "a/b/c"):
        with pytest.raises(ModelNotFound, match="no such directory") as raised:
            load_causal_lm(name)
        assert "hf download" not in str(raised.value)


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_causal_lm, "toy", "'toy' is a bundled tokenizer and no policy; only `tokenmdp train"),
        (load_reward_model, "toy", r"'toy' is a bundled tokenizer and no reward model\. Bundled: imdb-tiny"),
        (load_tokenizer, "lexicon", r"'lexicon' is a bundled reward model and no tokenizer\. Bundled: imdb-tiny, toy"),
    ],
)
def test_a_bundled_name_of_another_kind_is_not_sought_on_the_hub(load, name, message, monkeypatch):
    monkeypatch.setattr(hub, "_check_hub_answers", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ModelNotFound, match=message):
        load(name)


def test_missing_bundle_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(ALIASES, "imdb-tiny", {"policy": tmp_path / "gone"})
    with pytest.raises(ModelNotFound, match=r"bundled 'imdb-tiny'.*reinstall tokenmdp"):
        load_causal_lm("imdb-tiny")


def test_a_model_of_the_study_is_not_in_the_wheel(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "STUDY_MODELS", tmp_path)
    monkeypatch.setitem(ALIASES, "imdb-plain", {"reward_model": tmp_path / "imdb-plain"})
    with pytest.raises(
        ModelNotFound, match=r"not in the wheel: it lies in examples/abc_study/models/imdb-plain of the"
    ):
        load_reward_model("imdb-plain")
    with pytest.raises(ModelNotFound, match=r"Bundled: imdb-tiny, imdb-gold, imdb-uniform, lexicon"):
        load_reward_model("./nowhere")


def test_an_alias_of_a_reward_model_is_no_policy():
    with pytest.raises(
        ModelNotFound, match=r"'imdb-gold' is bundled as reward_model only; as policy there is imdb-tiny"
    ):
        load_causal_lm("imdb-gold")


def _truncate(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def _break_config(directory):
    (directory / "config.json").write_text('{"model_type": ')


def _foreign_config(directory):
    (directory / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))


def _remove_weights(directory):
    (directory / "model.safetensors").unlink()


def _other_shapes(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"n_embd": 64}))


@pytest.mark.parametrize("damage", [_truncate, _break_config, _foreign_config, _remove_weights, _other_shapes])
def test_corrupt_model_directory_is_named(policy_dir, damage, noise):
    damage(policy_dir)
    with pytest.raises(CheckpointError, match=r"restore a copy or save (it|the model) again") as raised:
        load_causal_lm(str(policy_dir))
    assert str(policy_dir) in str(raised.value)
    assert noise == []


def test_weights_that_are_missing_are_refused_not_invented(policy_dir, noise):
    GPT2ForSequenceClassification(CONFIG).save_pretrained(policy_dir)
    model = load_causal_lm(str(policy_dir))  # the language model's weights are all there, tied to the embedding
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    three_layers = json.loads((policy_dir / "config.json").read_text()) | {"n_layer": 3}
    (policy_dir / "config.json").write_text(json.dumps(three_layers))
    with pytest.raises(CheckpointError, match=r"no weights for .*h\.2\."):
        load_causal_lm(str(policy_dir))
    assert noise == []


def test_weights_that_the_model_does_not_use_are_told(policy_dir, noise, caplog):
    load_causal_lm(str(policy_dir))
    assert caplog.text == ""
    one_layer = json.loads((policy_dir / "config.json").read_text()) | {"n_layer": 1}
    (policy_dir / "config.json").write_text(json.dumps(one_layer))
    load_causal_lm(str(policy_dir))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{policy_dir} holds weights that a GPT2LMHeadModel does not use, such as transformer.h.1." in caplog.text
    assert "restore a copy" in caplog.text
    assert noise == []


def test_directory_without_or_with_a_damaged_tokenizer(policy_dir):
    (policy_dir / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load a tokenizer"):
        load_tokenizer(str(policy_dir))
    (policy_dir / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer files.*save_pretrained"):
        load_tokenizer(str(policy_dir))


def test_names_answered_by_code_win_over_directories_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "toy-lexicon", "lexicon"):
        (tmp_path / name).mkdir()
    assert load_tokenizer("toy").get_vocab() == toy_tokenizer().get_vocab()
    assert isinstance(load_reward_model("toy-lexicon"), LexiconRewardModel)


def test_code_of_a_repository_is_refused_and_never_asked_about(policy_dir, monkeypatch):
    config = {"model_type": "no-such-type", "auto_map": {"AutoConfig": "custom.Custom"}}
    (policy_dir / "config.json").write_text(json.dumps(config))
    (policy_dir / "custom.py").write_text(f"open({str(policy_dir / 'ran')!r}, 'w')\nclass Custom: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # the question that transformers would ask
    with pytest.raises(CheckpointError, match="custom code"):
        from_pretrained(AutoConfig.from_pretrained, "reward_model", str(policy_dir))
    assert not (policy_dir / "ran").exists()


@pytest.fixture
def three_threads(monkeypatch):
    """A process that was given three threads by PyTorch itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(loading, "_THREADS_AT_IMPORT", 3)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    yield
    torch.set_num_threads(before)


def in_worker(monkeypatch):
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True, name="Worker-7"))


def test_loading_a_model_in_a_worker_leaves_the_cores_to_the_others(three_threads, policy_dir, monkeypatch, caplog):
    in_worker(monkeypatch)
    load_tokenizer(str(policy_dir))
    load_reward_model("toy-lexicon")
    assert torch.get_num_threads() == 3  # nothing that computes has been loaded
    with caplog.at_level(logging.INFO, "tokenmdp.models.loading"):
        load_causal_lm(str(policy_dir))
    assert torch.get_num_threads() == 1
    assert "Worker-7: PyTorch uses 1 thread instead of 3; set OMP_NUM_THREADS" in caplog.text
    torch.set_num_threads(2)
    load_causal_lm(str(policy_dir))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_of_threads_from_the_environment_stands(three_threads, policy_dir, monkeypatch, variable):
    in_worker(monkeypatch)
    monkeypatch.setenv(variable, "3")
    load_causal_lm(str(policy_dir))
    assert torch.get_num_threads() == 3


def test_a_process_that_is_no_worker_keeps_its_threads(three_threads, policy_dir):
    load_causal_lm(str(policy_dir))
    assert torch.get_num_threads() == 3
