"""Scores, vocabularies, refusals and identity of reward models."""

import copy
import json
import pickle

import huggingface_hub.constants
import pytest
import torch
from doubles import PAD, episode, of_words, words
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from tokenmdp.files import CheckpointError
from tokenmdp.models.names import ModelNotFound
from tokenmdp.models.tokens import toy_tokenizer
from tokenmdp.reward_models import (
    HFRewardModel,
    LexiconRewardModel,
    NonFiniteScore,
    VocabularyMismatch,
    load_reward_model,
    toy_lexicon,
)

EOS = 30
TEXTS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10, 11, EOS]), ([12, 13], [14]), ([15, 16, 17, 18], [19, 20, EOS])]
ATTENTION = frozenset({"attention"})


def gpt2(labels=2, vocab_size=32, pad=PAD, positions=64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=32, n_layer=2, n_head=4, num_labels=labels,
        pad_token_id=pad, eos_token_id=EOS, bos_token_id=EOS, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # scores of order one, so that 1e-5 means something
    return model


def distilbert():
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=32, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4, num_labels=2,
        pad_token_id=PAD,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, max_position_embeddings=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1, pad_token_id=PAD, bos_token_id=EOS,
        eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


@pytest.fixture
def classifier_dir(tmp_path):
    directory = tmp_path / "classifier"
    gpt2().save_pretrained(directory)
    toy_tokenizer().save_pretrained(directory)
    return str(directory)


# --- scores


def test_score_of_one_label_of_two_and_of_an_index():
    batch = episode(*TEXTS)
    one = gpt2(labels=1).eval()
    two = gpt2(labels=2).eval()
    three = gpt2(labels=3).eval()
    prompt, response = TEXTS[1]
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        expected_one = one(ids).logits[0, 0]
        expected_two = two(ids).logits[0, 1] - two(ids).logits[0, 0]
        expected_label = three(ids).logits[0, 2]
    assert HFRewardModel(one, None)(batch).score[1] == pytest.approx(expected_one.item(), abs=1e-5)
    assert HFRewardModel(two, None)(batch).score[1] == pytest.approx(expected_two.item(), abs=1e-5)
    assert HFRewardModel(three, None, score=2)(batch).score[1] == pytest.approx(expected_label.item(), abs=1e-5)
    assert abs(expected_two) > 1e-2


def test_three_labels_ask_for_an_index():
    model = gpt2(labels=3)
    model.config.id2label = {0: "sad", 1: "neutral", 2: "glad"}
    with pytest.raises(ValueError, match=r"3 labels \(0: sad, 1: neutral, 2: glad\).*pass score=INDEX"):
        HFRewardModel(model, None)


@pytest.mark.parametrize("score", [3, -1, "1", True])
def test_score_out_of_range_or_of_another_type(score):
    with pytest.raises(ValueError, match=r"not 'auto' or the index of one of the 3 labels"):
        HFRewardModel(gpt2(labels=3), None, score=score)


@pytest.mark.parametrize("make", [gpt2, llama, distilbert])
def test_score_and_row_do_not_depend_on_batch_padding_side_or_pad_content(make):
    reward_model = HFRewardModel(make(), None)
    reference = reward_model(episode(*TEXTS), needs=ATTENTION)
    for other in (
        episode(*TEXTS, side="right"),
        episode(*TEXTS, pad=5),
        episode(*TEXTS, pad=EOS),
        episode(*TEXTS, prompt_slots=9, horizon=20),
    ):
        output = reward_model(other, needs=ATTENTION)
        torch.testing.assert_close(output.attention[:, :6], reference.attention, atol=1e-5, rtol=0)
        assert torch.equal(output.score, reference.score)  # the same compact rows, so exactly the same numbers
    order = [2, 0, 3, 1]
    shuffled = reward_model(episode(*(TEXTS[index] for index in order)), needs=ATTENTION)
    torch.testing.assert_close(shuffled.score, reference.score[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled.attention, reference.attention[order], atol=1e-5, rtol=0)
    for index, text in enumerate(TEXTS):
        alone = reward_model(episode(text), needs=ATTENTION)
        torch.testing.assert_close(alone.score, reference.score[index : index + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.attention, reference.attention[index : index + 1], atol=1e-5, rtol=0)


def test_response_that_ends_in_eos_is_pooled_there_even_if_pad_is_eos():
    model = gpt2(pad=EOS).eval()
    reward_model = HFRewardModel(model, None)
    prompt, response = [1, 2, 3], [4, 5, EOS]
    batch = episode((prompt, response), ([6], [7, 8, 9, 10, 11, 12]), pad=EOS)
    output = reward_model(batch, needs=ATTENTION)
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([prompt + response])).last_hidden_state
        at_eos, before = (model.score(hidden[0, index]) for index in (-1, -2))
        naive = model(torch.tensor([prompt + response])).logits[0]  # what transformers pools: the token before
    assert output.score[0] == pytest.approx((at_eos[1] - at_eos[0]).item(), abs=1e-5)
    assert (naive - before).abs().max() < 1e-5
    assert abs((at_eos[1] - at_eos[0]) - (before[1] - before[0])) > 1e-2
    assert output.attention[0, 2] > 0  # the pooled token sees itself


def test_dropout_is_off_even_if_the_model_was_put_back_into_training():
    model = gpt2()
    reward_model = HFRewardModel(model, None)
    batch = episode(*TEXTS)
    reference = reward_model(batch).score
    model.train()
    assert torch.equal(reward_model(batch).score, reference)


def test_no_gradient_leaves_and_outputs_are_ordinary_tensors():
    output = HFRewardModel(gpt2(), None)(episode(*TEXTS), needs=ATTENTION)
    assert not output.score.requires_grad
    weight = torch.ones((), requires_grad=True)
    (output.attention * weight).sum().backward()  # inference tensors could not be saved for this
    assert weight.grad is not None


def test_a_head_called_score_on_a_bidirectional_model_is_not_taken_for_causal():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    reward_model = HFRewardModel(model, None)
    assert reward_model.provides == {"gradients"}
    with pytest.raises(ValueError, match=r"does not provide attention .*UniformReward or SparseReward"):
        reward_model(episode(*TEXTS), needs=ATTENTION)


def test_encoder_decoder_is_refused():
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        HFRewardModel(T5ForSequenceClassification(config), None)


def test_encoder_warns_if_the_text_does_not_begin_with_its_pooled_token():
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "the"})
    reward_model = HFRewardModel(distilbert(), tokenizer)
    with pytest.warns(UserWarning, match="pools the first token"):
        reward_model(episode(([1, 2], [3])))


# --- limits and bad episodes


def test_text_longer_than_the_positions_is_refused():
    reward_model = HFRewardModel(gpt2(positions=8), None)
    assert reward_model.max_tokens == 8
    reward_model(episode(([1] * 4, [2] * 4)))
    with pytest.raises(ValueError, match=r"text of 9 tokens exceeds the 8 positions.*shorten it"):
        reward_model(episode(([1] * 4, [2] * 5)))


def test_roberta_positions_leave_out_the_offset():
    config = RobertaConfig(
        vocab_size=32, max_position_embeddings=10, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_labels=1, pad_token_id=1,
    )  # fmt: skip
    reward_model = HFRewardModel(RobertaForSequenceClassification(config), None)
    assert reward_model.max_tokens == 8
    assert torch.isfinite(reward_model(episode(([2] * 4, [3] * 4))).score).all()


def test_empty_response_is_refused():
    with pytest.raises(ValueError, match=r"row 1 has an empty response \(n_tokens 0\)"):
        HFRewardModel(gpt2(), None)(episode(([1], [2]), ([1], [])))


def test_masks_that_disagree_are_refused():
    batch = episode(([1], [2, 3]))
    batch = batch._replace(response_mask=torch.ones_like(batch.response_mask))
    with pytest.raises(ValueError, match="attention_mask and response_mask disagree"):
        HFRewardModel(gpt2(), None)(batch)


def test_score_that_is_not_finite_names_the_text_and_the_row():
    reward_model = HFRewardModel(gpt2(labels=1), toy_tokenizer())
    with torch.no_grad():  # only now: a model that comes with NaN is refused
        reward_model.model.transformer.wte.weight[words("awful")] = float("nan")
    reward_model(of_words(("the plot", "was great")))
    with pytest.raises(NonFiniteScore, match=r"scored nan for row 1 of 2, whose text is 'the plot was awful'"):
        reward_model(of_words(("the film", "was great"), ("the plot", "was awful")))


def test_infinite_score_is_refused_too():
    lexicon = LexiconRewardModel(toy_tokenizer(), {"awful": -float("inf")})
    with pytest.raises(NonFiniteScore, match=r"scored -inf for row 0 of 1, whose text is 'the plot was awful'"):
        lexicon(of_words(("the plot", "was awful")))


def test_not_finite_without_a_tokenizer_names_the_ids():
    reward_model = HFRewardModel(gpt2(labels=1), None)
    with torch.no_grad():
        reward_model.model.score.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteScore, match=r"token ids \[1, 2, 3\]"):
        reward_model(episode(([1, 2], [3])))


# --- vocabularies


def test_same_vocabulary_passes_and_a_padded_one_too():
    HFRewardModel(gpt2(), toy_tokenizer()).check_tokenizer(toy_tokenizer())
    HFRewardModel(gpt2(vocab_size=64), toy_tokenizer()).check_tokenizer(toy_tokenizer())


def test_further_tokens_of_the_reward_model_are_fine_but_not_of_the_environment():
    grown = toy_tokenizer()
    grown.add_tokens(["zebra"])
    HFRewardModel(gpt2(vocab_size=33), grown).check_tokenizer(toy_tokenizer())
    with pytest.raises(VocabularyMismatch, match=r"has 33 tokens and .* has 32; .*id 32: 'zebra'.*'no token'"):
        HFRewardModel(gpt2(vocab_size=33), toy_tokenizer()).check_tokenizer(grown)


def test_another_vocabulary_of_the_same_size_names_the_first_token_that_differs():
    other = toy_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["movie"], vocabulary["film"] = vocabulary["film"], vocabulary["movie"]
    other = type(other)(
        tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)), eos_token="<eos>", pad_token="<pad>"
    )
    with pytest.raises(VocabularyMismatch, match=r"32 tokens .* 32; .*id 5: 'film' .*'movie' in the reward model"):
        toy_lexicon().check_tokenizer(other)
    assert issubclass(VocabularyMismatch, ValueError)


def test_fewer_rows_than_tokens_is_refused():
    with pytest.raises(VocabularyMismatch, match=r"30 embedding rows, fewer than the 32 ids"):
        HFRewardModel(gpt2(vocab_size=30, pad=None), toy_tokenizer())


def test_directory_without_tokenizer_compares_sizes_and_says_so(tmp_path):
    gpt2(vocab_size=40).save_pretrained(tmp_path / "same")
    gpt2(vocab_size=2000).save_pretrained(tmp_path / "larger")
    with pytest.warns(UserWarning, match=r"only the sizes.*32 tokens, 40 rows"):
        load_reward_model(str(tmp_path / "same")).check_tokenizer(toy_tokenizer())
    with pytest.raises(VocabularyMismatch, match=r"32 tokens and .* has 2000 rows: these are different vocabularies"):
        load_reward_model(str(tmp_path / "larger")).check_tokenizer(toy_tokenizer())


# --- loading and identity


def test_named_models_load_once_a_process(classifier_dir):
    reward_model = load_reward_model(classifier_dir)
    assert load_reward_model(classifier_dir) is reward_model
    assert load_reward_model(classifier_dir, score=1) is not reward_model
    assert load_reward_model(classifier_dir, dtype="bfloat16") is not reward_model
    assert load_reward_model("toy-lexicon") is load_reward_model("toy-lexicon", dtype="bfloat16")
    reward_model.check_tokenizer(toy_tokenizer())
    assert reward_model.provides == {"attention", "attention_layers", "prefix_scores", "gradients"}


def test_a_directory_written_anew_is_loaded_anew(classifier_dir):
    first = load_reward_model(classifier_dir)
    gpt2(labels=1).save_pretrained(classifier_dir)
    second = load_reward_model(classifier_dir)
    assert second is not first
    assert second.model.config.num_labels == 1


def test_float32_by_default_also_from_half_precision_files(classifier_dir):
    gpt2().to(torch.bfloat16).save_pretrained(classifier_dir)
    full, half = load_reward_model(classifier_dir), load_reward_model(classifier_dir, dtype="bfloat16")
    assert full.model.dtype == torch.float32
    assert half.model.dtype == torch.bfloat16
    batch = episode(*TEXTS)
    assert half(batch).score.dtype == torch.float32
    torch.testing.assert_close(half(batch).score, full(batch).score, atol=0.2, rtol=0.1)


def test_dtype_and_device_that_do_not_exist(classifier_dir, monkeypatch):
    with pytest.raises(ValueError, match=r"dtype 'int8' is not one of float32, bfloat16, float16"):
        load_reward_model(classifier_dir, dtype="int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'cuda' asks for a GPU and torch sees none"):
        load_reward_model(classifier_dir, device="cuda")


def test_copies_are_the_model_itself(classifier_dir):
    for reward_model in (HFRewardModel(gpt2(), None), load_reward_model(classifier_dir), toy_lexicon()):
        assert copy.deepcopy(reward_model) is reward_model
        assert copy.copy(reward_model) is reward_model
        assert copy.deepcopy({"reward_model": [reward_model]})["reward_model"][0] is reward_model


def test_pickle_of_a_named_model_is_its_name(classifier_dir, tmp_path, monkeypatch):
    reward_model = load_reward_model(classifier_dir, score=0)
    stored = pickle.dumps(reward_model)
    assert len(stored) < 1000
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(stored) is reward_model
    lexicon = load_reward_model("toy-lexicon")
    assert pickle.loads(pickle.dumps(lexicon)) is lexicon


def test_pickle_of_a_relative_directory_opens_from_another_one(classifier_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward_model = load_reward_model("classifier")
    stored = pickle.dumps(reward_model)
    monkeypatch.chdir("/")
    assert pickle.loads(stored) is reward_model


def test_unnamed_models_refuse_json_and_pickle_with_the_remedy():
    reward_model = HFRewardModel(gpt2(), toy_tokenizer())
    with pytest.raises(TypeError, match=r"cannot be pickled.*model.save_pretrained\(DIR\).*pass DIR"):
        pickle.dumps(reward_model)
    with pytest.raises(TypeError, match=r"JSON cannot hold it.*model.save_pretrained\(DIR\).*pass DIR"):
        reward_model.to_json()
    with pytest.raises(TypeError, match="HFRewardModel is not JSON serializable"):
        json.dumps({"reward_model": reward_model})


def test_json_of_a_named_model_rebuilds_it(classifier_dir):
    reward_model = load_reward_model(classifier_dir, score=1)
    assert load_reward_model(**json.loads(json.dumps(reward_model.to_json()))) is reward_model


def test_unnamed_lexicon_pickles_by_value():
    lexicon = LexiconRewardModel(toy_tokenizer(), {"film": 2.0})
    again = pickle.loads(pickle.dumps(lexicon))
    batch = of_words(("the", "film film"))
    assert again is not lexicon
    assert torch.equal(again(batch).score, lexicon(batch).score)


def test_unknown_name_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"hf download some/classifier --local-dir DIR.*toy-lexicon"):
        load_reward_model("some/classifier")


def test_a_name_that_is_a_model_shows_how_to_wrap_it():
    with pytest.raises(TypeError, match=r"not GPT2ForSeq\w+; wrap a model: HFRewardModel\(model, tokenizer\)"):
        load_reward_model(gpt2())


def test_directory_of_a_language_model_is_not_a_trained_classifier(tmp_path):
    GPT2LMHeadModel(gpt2().config).save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match=r"no weights for score.weight, so it is not a trained GPT2ForSeq"):
        load_reward_model(str(tmp_path / "lm"))


def test_corrupt_directory(classifier_dir, tmp_path):
    weights = tmp_path / "classifier" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cannot read .*classifier/model.safetensors: .*restore a copy"):
        load_reward_model(classifier_dir)
