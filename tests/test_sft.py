"""Supervised fine-tuning: its loss, the end of texts, resumption; and every source of demonstrations."""

import dataclasses
import json
import math

import pytest
import torch
from data_doubles import BASE, PAIRS, TEXTS, check_resume, small_lm, three_words
from other_tokenizers import word_piece
from preference_doubles import TOY, encode, lines
from transformers import AutoModelForCausalLM

from tokenmdp.agents.sft import SFT, SFTConfig
from tokenmdp.files import CheckpointError
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import VocabularyMismatch
from tokenmdp.preferences import (
    BadPreferences,
    Demonstration,
    EmptyText,
    MissingColumns,
    UnknownTokenIds,
    read_demonstrations,
    write_records,
)
from tokenmdp.runs.environments import toy_policy

EOS = TOY.eos_token_id


def make(texts=TEXTS, **options):
    config = SFTConfig(**(BASE | {"batch_size": 3, "total_updates": 8} | options))
    return SFT(toy_policy(seed=0), texts, config, tokenizer=TOY)


def token_logprobs(model, one):
    """Of each response token of a demonstration, from transformers alone."""
    ids = torch.tensor([[*one.prompt_ids, *one.response_ids]])
    with torch.no_grad():
        rows = model.eval()(ids).logits.log_softmax(-1)[0]
    return [rows[place - 1, ids[0, place]].item() for place in range(len(one.prompt_ids), ids.shape[1])]


def test_the_loss_is_the_mean_over_all_response_tokens_of_the_batch():
    lengths = {len(one.response_ids) for one in TEXTS}
    assert len(lengths) > 1  # else a mean of means would do
    every = [number for one in TEXTS for number in token_logprobs(toy_policy(seed=0), one)]
    agent = make(batch_size=len(TEXTS)).learn(1)
    assert agent.history[0]["loss"] == pytest.approx(-sum(every) / len(every), abs=1e-5)
    assert agent.history[0]["response_tokens"] == len(every)


def test_the_gradient_is_that_of_the_whole_batch_however_it_is_split_by_length():
    texts = [Demonstration(prompt_ids=(5,), response_ids=(7,) * n) for n in (40, *[2] * 30)]
    rows = torch.arange(len(texts)).numpy()
    agent = make(texts, max_grad_norm=1e6)
    assert len(list(agent._parts(rows, 1.0))) == 2  # the long text by itself
    found = agent.gradient(agent._parts(rows, 1.0))
    weight = agent.policy.lm.transformer.wpe.weight
    loss = agent.losses(rows, agent.lay_out(agent.examples))["loss"]
    torch.testing.assert_close(weight.grad, torch.autograd.grad(loss, weight)[0], rtol=1e-4, atol=1e-6)
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-5)


def test_texts_are_learned_and_so_is_their_end_where_padding_has_the_same_id():
    tokenizer = three_words()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    texts = [Demonstration(prompt_ids=(0,), response_ids=ids) for ids in ((1, 2), (1, 2), (1, 0, 1, 2))]
    config = SFTConfig(**(BASE | {"learning_rate": 1e-2}), batch_size=3, total_updates=40)
    agent = SFT(small_lm(), texts, config, tokenizer=tokenizer).learn(40)
    assert math.exp(token_logprobs(agent.policy.lm, texts[0])[1]) == pytest.approx(2 / 3, abs=0.1)  # the end
    assert math.exp(token_logprobs(agent.policy.lm, texts[2])[3]) > 0.9
    assert agent.history[-1]["loss"] < agent.history[0]["loss"] / 2


@pytest.mark.parametrize("options", [{}, {"total_updates": None, "epochs": 2}], ids=str)
def test_a_resumed_run_continues_bit_for_bit(tmp_path, options):
    agent = check_resume(lambda: make(**options), TEXTS, tmp_path / "run")
    assert agent.updates_per_epoch == 3


def test_a_pass_sees_every_text_once_in_an_order_of_its_own():
    agent = make()
    passes = [torch.cat([agent._batch(3 * epoch + place) for place in range(3)]).tolist() for epoch in range(2)]
    assert [sorted(rows) for rows in passes] == [list(range(8))] * 2
    assert passes[0] != passes[1]
    assert make(epochs=5, total_updates=None).config.total_updates == 15
    assert make(seed=2)._batch(0).tolist() != agent._batch(0).tolist()


def test_other_data_are_refused_on_resuming(tmp_path):
    make().learn(1).save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="trained on other data"):
        SFT.load(tmp_path / "run", [*TEXTS[:-1], dataclasses.replace(TEXTS[-1], response_ids=(1,))])


def test_adapters_alone_learn_and_the_checkpoint_is_a_whole_model(tmp_path):
    pytest.importorskip("peft", reason="adapters need peft")
    agent = check_resume(lambda: make(lora_rank=2, learning_rate=1e-2), TEXTS, tmp_path / "run", updates=3)
    base = toy_policy(seed=0).state_dict()
    for name, weight in agent.policy.lm.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, base[name.replace(".base_layer", "")]), name
    agent.save(tmp_path / "whole")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert token_logprobs(merged, TEXTS[0]) == pytest.approx(token_logprobs(agent.policy.lm, TEXTS[0]), abs=1e-5)
    assert token_logprobs(merged, TEXTS[0]) != pytest.approx(token_logprobs(toy_policy(seed=0), TEXTS[0]), abs=1e-3)


def test_bad_data_are_refused():
    with pytest.raises(ValueError, match="SFT got no examples"):
        make([])
    with pytest.raises(UnknownTokenIds, match="record 0 holds the token id 99"):
        make([Demonstration(prompt_ids=(1,), response_ids=(99,))])
    with pytest.raises(EmptyText, match="the response is empty"):
        Demonstration(prompt_ids=(1,), response_ids=())
    with pytest.raises(BadPreferences, match=r"record 1: .* has 70 tokens and GPT2LMHeadModel reads 64; leave such"):
        make([*TEXTS[:1], Demonstration(prompt_ids=(1,) * 40, response_ids=(2,) * 30)])
    with pytest.raises(ValueError, match=r"up to 80 slots and the policy has 64 positions"):  # side by side
        make([Demonstration(prompt_ids=(1,) * one, response_ids=(2,) * other) for one, other in ((40, 2), (2, 40))])


# Where demonstrations come from. The toy tokenizer has no start token; its end is <eos>.


def read(path, **options):
    return [(one.prompt_ids, one.response_ids) for one in read_demonstrations(path, TOY, **options)]


def test_texts_follow_their_own_first_token_and_get_an_end(tmp_path):
    rows = lines(tmp_path / "texts.jsonl", {"text": "the film was great"}, {"text": "a dull plot"})
    expected = [(encode("the"), (*encode("film was great"), EOS)), (encode("a"), (*encode("dull plot"), EOS))]
    assert read(rows) == expected
    (tmp_path / "texts.txt").write_text("the film was great\n\na dull plot\n", encoding="utf-8")
    assert read(tmp_path / "texts.txt") == expected
    assert read(rows, end="leave")[0] == (encode("the"), encode("film was great"))


def test_prompts_with_a_completion_or_the_better_half_of_comparisons(tmp_path):
    ids = [(encode("the film was"), (*encode("great"), EOS))]
    for answer in ("completion", "response", "chosen"):
        rows = lines(tmp_path / f"{answer}.jsonl", {"prompt": "the film was", answer: " great", "rejected": " bad"})
        assert read(rows) == ids
    write_records(tmp_path / "pairs.jsonl", PAIRS)  # with token ids, which are taken exactly: no end is added
    assert read(tmp_path / "pairs.jsonl") == [(one.prompt_ids, one.chosen_ids) for one in PAIRS]


def test_token_ids_are_the_truth_where_the_text_would_give_others(tmp_path):
    tokenizer = load_tokenizer("imdb-tiny")
    texts = {"prompt": "the film", "chosen": " was great"}
    ids = {name: [one for letter in text for one in tokenizer.encode(letter)] for name, text in texts.items()}
    row = texts | {f"{name}_token_ids": value for name, value in ids.items()}
    (found,) = read_demonstrations(lines(tmp_path / "ids.jsonl", row), tokenizer)
    assert [found.prompt_ids, found.response_ids] == [tuple(value) for value in ids.values()]
    assert len(found.response_ids) > len(tokenizer.encode(texts["chosen"])) + 1


@pytest.mark.parametrize("wrong", [{"prompt_token_ids": [3, 4]}, {"chosen_token_ids": [9, 9, 7]}])
def test_token_ids_of_another_tokenizer_are_refused(wrong, tmp_path):
    row = {"prompt": "the film", "chosen": "was great"}
    ids = {f"{name}_token_ids": list(encode(text)) for name, text in row.items()}
    assert len(read(lines(tmp_path / "own.jsonl", row | ids))) == 1
    with pytest.raises(VocabularyMismatch, match=r"wrong\.jsonl:1: this tokenizer reads the token ids of"):
        read(lines(tmp_path / "wrong.jsonl", row | ids | wrong))


@pytest.mark.parametrize("max_tokens", [2, 3, 4, 7, 100])
def test_of_a_long_text_every_token_is_predicted_once(tmp_path, max_tokens):
    words = "the film was great . but the plot was so dull and the actor is fun"
    ids = (*encode(words), EOS)
    pieces = read(lines(tmp_path / "long.jsonl", {"text": words}), max_tokens=max_tokens)
    assert [token for _, response in pieces for token in response] == list(ids[1:])
    assert all(1 <= len(response) <= max_tokens for _, response in pieces)
    assert [prompt for prompt, _ in pieces] == [ids[:1], *(response[-1:] for _, response in pieces[:-1])]


def test_with_a_start_token_that_is_the_prompt(tmp_path):
    tokenizer = word_piece()
    tokenizer.bos_token = "[CLS]"
    (one,) = read_demonstrations(lines(tmp_path / "texts.jsonl", {"text": "film was"}), tokenizer)
    assert one == Demonstration(
        prompt_ids=(tokenizer.cls_token_id,), response_ids=tuple(tokenizer.convert_tokens_to_ids(["film", "was"]))
    )


def test_a_completion_that_is_too_long_is_cut_and_teaches_no_end(tmp_path):
    rows = lines(tmp_path / "long.jsonl", {"prompt": "the film", "completion": " was great and fun"})
    assert read(rows, max_tokens=3) == [(encode("the film"), encode("was great and"))]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"title": "a film"}, MissingColumns, "has the columns title; a demonstration has text; prompt and completion"),
        ({"text": "\ud800"}, MissingColumns, "half of a surrogate pair"),
        ({"prompt": "a", "completion": "\udc00"}, MissingColumns, "half of a surrogate pair"),
        ({"text": 3}, MissingColumns, "has the columns text"),
        ({"prompt": "a", "completion": ""}, EmptyText, "prompt and completion are texts that are not empty"),
        ({"prompt": "", "completion": "a"}, EmptyText, "prompt and completion are texts that are not empty"),
        ({"prompt": "a", "chosen": "b", "prompt_token_ids": [1], "chosen_token_ids": [99]}, UnknownTokenIds, "id 99"),
        ({"prompt": "a", "chosen": "b", "prompt_token_ids": [1], "chosen_token_ids": [-1]}, UnknownTokenIds, "id -1"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_used_are_named_by_file_and_line(tmp_path, row, error, message):
    path = lines(tmp_path / "rows.jsonl", {"text": "a film"}, row)
    with pytest.raises(error, match=message) as caught:
        read(path)
    assert f"{path}:2" in str(caught.value)


def test_sources_without_a_text_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(EmptyText, match=r"empty.txt holds no texts; give at least one"):
        read(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"the film\ncaf\xe9\n")
    with pytest.raises(MissingColumns, match=r"line 2 of .*latin.txt is not UTF-8"):
        read(tmp_path / "latin.txt")
    with pytest.raises(MissingColumns, match="the source of the data is ''; give a file"):
        read("")
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="max_tokens is 1; a text needs at least 2"):
        read(tmp_path / "empty.txt", max_tokens=1)
    (tmp_path / "list.json").write_text(json.dumps([{"text": "the film was great"}]))
    assert len(read(tmp_path / "list.json")) == 1
