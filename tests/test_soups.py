"""Soups: ends are the members bit for bit, unequal models are refused, adapters count merged, the front is drawn."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tokenmdp import cli
from tokenmdp.agents.sft import SFT, SFTConfig
from tokenmdp.files import CheckpointError
from tokenmdp.models.loading import load_causal_lm, load_tokenizer
from tokenmdp.models.soup import UnequalModels, weighted_sum, write_soup
from tokenmdp.preferences import Demonstration
from tokenmdp.runs.environments import toy_policy
from tokenmdp.runs.soups import Point, above_chord, weights_of


def train(start, words, out, **options):
    tokenizer = load_tokenizer("toy")
    prompt, response = (tuple(tokenizer.encode(text)) for text in ("the film was", words))
    data = [Demonstration(prompt_ids=prompt, response_ids=response)] * 4
    learner = SFT(str(start), data, SFTConfig(learning_rate=1e-2, total_updates=3, dtype="float32", **options))
    learner.learn(3)
    with torch.no_grad():
        learner.policy.value_head.weight.add_(len(words))
    learner.save(out)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A start, two policies trained from it, and one of another start."""
    place = tmp_path_factory.mktemp("soup")
    for name, seed in (("start", 1), ("other-start", 2)):
        toy_policy(seed).save_pretrained(place / name)
        load_tokenizer("toy").save_pretrained(place / name)
    train(place / "start", "great", place / "a")
    train(place / "start", "dull", place / "b")
    train(place / "other-start", "dull", place / "c")
    return place


def weights_in(directory):
    return load_file(directory / "model.safetensors"), load_file(directory / "value_head.safetensors")


@pytest.mark.parametrize(("weights", "member"), [((1.0, 0.0), "a"), ((0.0, 1.0), "b")])
def test_the_ends_are_the_members_bit_for_bit(place, tmp_path, weights, member):
    write_soup([place / "a", place / "b"], weights, tmp_path / "soup")
    for soup, own in zip(weights_in(tmp_path / "soup"), weights_in(place / member), strict=True):
        assert soup.keys() == own.keys()
        assert all(torch.equal(soup[name].view(torch.int32), own[name].view(torch.int32)) for name in own)


def test_a_soup_is_the_weighted_sum_and_loads_like_any_model(place, tmp_path):
    write_soup([place / "a", place / "b"], (0.25, 0.75), tmp_path / "soup")
    a, b, soup = (load_causal_lm(str(one)).state_dict() for one in (place / "a", place / "b", tmp_path / "soup"))
    for name in a:
        torch.testing.assert_close(soup[name], 0.25 * a[name] + 0.75 * b[name])
    assert any(not torch.equal(a[name], b[name]) for name in a)
    heads = [
        load_file(one / "value_head.safetensors")["weight"] for one in (place / "a", place / "b", tmp_path / "soup")
    ]
    torch.testing.assert_close(heads[2], 0.25 * heads[0] + 0.75 * heads[1])


def test_a_soup_of_adapters_is_the_soup_of_their_merged_weights(place, tmp_path):
    pytest.importorskip("peft", reason="adapters need peft")
    runs = [train(place / "start", words, tmp_path / words, lora_rank=2) for words in ("great", "dull")]
    write_soup(runs, (0.5, 0.5), tmp_path / "soup")
    one, other, soup = (load_file(run / "model.safetensors") for run in (*runs, tmp_path / "soup"))
    assert not any("lora" in name for name in soup)
    for name in one:
        torch.testing.assert_close(soup[name], (one[name] + other[name]) / 2)


def test_what_cannot_be_averaged_is_refused(place, tmp_path):
    with pytest.raises(UnequalModels, match="were trained from other starts"):
        write_soup([place / "a", place / "c"], (0.5, 0.5), tmp_path / "soup")
    wide = load_causal_lm(str(place / "a"))
    wide.config.layer_norm_epsilon = 1e-3
    wide.save_pretrained(tmp_path / "wide")
    load_tokenizer("toy").save_pretrained(tmp_path / "wide")
    with pytest.raises(UnequalModels, match=r"layer_norm_epsilon = 1e-05 and .* 0.001"):
        write_soup([place / "a", tmp_path / "wide"], (0.5, 0.5), tmp_path / "soup")
    for weights, message in (((0.5, 0.6), "must sum to 1"), ((1.0,), "1 weights for 2"), ((float("nan"), 1), "sum to")):
        with pytest.raises(ValueError, match=message):
            write_soup([place / "a", place / "b"], weights, tmp_path / "soup")
    with pytest.raises(ValueError, match="a soup of 1 model"):
        write_soup([place / "a"], (1.0,), tmp_path / "soup")
    with pytest.raises(UnequalModels, match="differ in 1 weights, such as w"):
        weighted_sum([{"w": torch.ones(1)}, {"w": torch.ones(2)}], (0.5, 0.5))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files"):
        write_soup([place / "a", place / "b"], (0.5, 0.5), tmp_path / "mine")
    assert not (tmp_path / "soup").exists()


def test_the_chord_is_compared_prompt_by_prompt():
    scores = {0.0: [0.0, 2.0], 0.5: [2.0, 4.0], 1.0: [2.0, 4.0]}
    points = [Point(weight, "", {"x": values}, [0.0, 0.0]) for weight, values in scores.items()]
    ends = above_chord(points, "x")
    assert [gain.value for gain in ends] == [0.0, 1.0, 0.0]
    assert ends[1].low == ends[1].high == 1.0  # both prompts gain the same
    assert above_chord(points[:2], "x") == [None, None]


@pytest.mark.parametrize("text", ["0:1:0", "1:0:0.5", "a", "0:1"])
def test_weights_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="give FIRST:LAST:STEP"):
        weights_of(text)


def test_the_command_evaluates_every_soup_on_every_objective_and_goes_on(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("the film\nthis movie\n")
    run = ["train", "sft", "--preset", "smoke", "--data", str(tmp_path / "data.jsonl"), "--no-reexec",
           "--eval-samples", "4", "--prompts", "prompts.txt"]  # fmt: skip
    row = {"prompt": "the film was", "completion": " great"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main([*run, "--policy", str(place / "start"), "--out", "one"]) == 0
    assert cli.main([*run, "--policy", str(place / "start"), "--learning-rate", "0.01", "--out", "two"]) == 0
    soup = ["soup", "one", "two", "--weights", "0:1:0.5", "--samples", "4", "--reward-model", "toy-lexicon",
            "--reward-model", "restraint:toy", "--out", "soup"]  # fmt: skip
    capsys.readouterr()
    assert cli.main(soup) == 0
    assert (tmp_path / "soup" / "front.png").stat().st_size > 1000
    records = [json.loads((tmp_path / "soup" / f"soup-{weight}.json").read_text()) for weight in ("0", "0.5", "1")]
    assert all(len(record["scores"]) == 2 and len(record["kls"]) == 4 for record in records)
    before = (tmp_path / "soup" / "soup-0.5.json").stat().st_mtime_ns
    assert cli.main(soup) == 0
    assert (tmp_path / "soup" / "soup-0.5.json").stat().st_mtime_ns == before
    assert cli.main(["soup", "one", "one/checkpoint", "--out", "twice"]) == 2
    assert "both members of the soup are" in capsys.readouterr().err
    assert cli.main([*soup, "--samples", "6"]) == 2
    assert "holds soups with other settings (samples is 4, asked 6)" in capsys.readouterr().err
