"""Reward models from comparisons and rankings: losses, what is read and written, resumption, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_doubles import BASE, PAIRS, RANKINGS, TOY, check_resume, classifier, saved
from preference_doubles import encode
from test_reward_models import distilbert
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from tokenmdp import cli
from tokenmdp.agents.reward_model import RewardModelConfig, RewardModelLearner
from tokenmdp.credit import Resources, make_credit
from tokenmdp.files import CheckpointError
from tokenmdp.preference_losses import bradley_terry_loss, utility_loss
from tokenmdp.preferences import BadPreferences, Comparison, UnknownTokenIds
from tokenmdp.reward_models import load_reward_model
from tokenmdp.runs.data import split_data
from tokenmdp.runs.environments import toy_policy
from tokenmdp.types import Outcome, lay_out

EOS = TOY.eos_token_id
MARGINS = [dataclasses.replace(one, margin=0.3 * place) for place, one in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The name of a language model to start from."""
    return saved(toy_policy(seed=0), tmp_path_factory.mktemp("start") / "lm")


@pytest.fixture
def make(start):
    def of(records=PAIRS, model=start, **options):
        config = RewardModelConfig(**(BASE | {"batch_size": 3, "total_updates": 9} | options))
        return RewardModelLearner(model, records, config)

    return of


def episode(prompt, *responses):
    return lay_out([prompt] * len(responses), responses)


def texts_of(record):
    """The prompt and the responses of a record in tokens."""
    if isinstance(record, Comparison):
        return record.prompt_ids, (record.chosen_ids, record.rejected_ids)
    return record.prompt_ids, record.responses_ids


def raw_scores(learner, record):
    """Each response's logit by transformers alone, from its text without any padding."""
    prompt, responses = texts_of(record)
    with torch.no_grad():
        return torch.cat([learner.model.lm(torch.tensor([[*prompt, *ids]])).logits[0] for ids in responses])


@pytest.mark.parametrize(
    ("records", "options"),
    [
        (PAIRS, {}),
        (MARGINS, {}),
        (PAIRS, {"error_rate": 0.2, "centring": 0.1}),
        ([*RANKINGS, *PAIRS[:2]], {}),
        ([*RANKINGS, *PAIRS[:2]], {"utilities": "log"}),
    ],
    ids=["pairs", "margins", "error rate and centring", "rankings", "utilities"],
)
def test_the_loss_is_the_mean_over_records_of_the_mean_over_their_pairs(make, records, options):
    learner = make(records, batch_size=len(records), learning_rate=1e-2, **options).learn(2)
    every = []
    for one in records:
        scores = raw_scores(learner, one)
        ranks = (1, 2) if isinstance(one, Comparison) else one.ranks
        pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
        better, worse = scores[[i for i, _ in pairs]], scores[[j for _, j in pairs]]
        if "utilities" in options:
            every.append(utility_loss(better, worse, "log"))
        else:
            own = {"margin": getattr(one, "margin", None) or 0.0, **options}
            every.append(bradley_terry_loss(better, worse, **own))
    assert learner.learn(1).history[-1]["loss"] == pytest.approx(torch.stack(every).mean().item(), abs=1e-5)


def test_each_response_of_a_ranking_is_read_once(make):
    learner, rows = make(RANKINGS, batch_size=2), []
    learner.model.lm.base_model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    learner.learn(1)
    assert sum(rows) == 4 + 3  # for nine pairs
    assert len(rows) == 1


def test_utilities_by_kind_take_the_utility_of_the_kind(make):
    records = [dataclasses.replace(PAIRS[0], kind="closed"), dataclasses.replace(PAIRS[1], kind="open")]
    learner = make(records, utilities="closed=x,open=-1/x")
    scores = [raw_scores(learner, one) for one in records]
    expected = (utility_loss(*scores[0], "x") + utility_loss(*scores[1], "-1/x")) / 2
    assert learner.learn(1).history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
    make(records, utilities="closed=x,log")  # log for all other kinds
    with pytest.raises(BadPreferences, match=r"record 1 has the kind 'open', and utilities has none for it"):
        make(records, utilities="closed=x")
    with pytest.raises(BadPreferences, match="record 1 has a margin, which only Bradley-Terry uses"):
        make([PAIRS[0], dataclasses.replace(PAIRS[1], margin=0.5)], utilities="x")


def counting(seed, size):
    """Comparisons in which the response with more of one word wins."""
    rng, word, records = np.random.default_rng(seed), encode("good")[0], []
    while len(records) < size:
        one, other = (tuple(map(int, rng.choice([word, *encode("the film was bad")], 6))) for _ in range(2))
        if (difference := one.count(word) - other.count(word)) != 0:
            chosen, rejected = (one, other) if difference > 0 else (other, one)
            texts = {"prompt": "", "chosen": "", "rejected": ""}
            records.append(Comparison(**texts, prompt_ids=encode("it is"), chosen_ids=chosen, rejected_ids=rejected))
    return records


def test_a_simple_rule_is_learned_and_holds_for_new_pairs(make):
    learner = make(counting(0, 256), batch_size=32, total_updates=40, learning_rate=3e-3).learn(40)
    assert learner.history[0]["accuracy"] < 0.85
    assert np.mean([metrics["accuracy"] for metrics in learner.history[-5:]]) > 0.9
    assert learner.history[-1]["loss"] < 0.5 * learner.history[0]["loss"]
    assert learner.history[-1]["score_gap"] > 1
    scores = learner.score_pairs(counting(1, 64))
    assert (scores[:, 0] > scores[:, 1]).float().mean() > 0.85


@pytest.fixture
def run(make, tmp_path):
    """A learner after three updates, and what it saved."""
    learner = make(learning_rate=1e-2, unit_scale=True).learn(3)
    learner.save(tmp_path / "run")
    return learner, tmp_path / "run"


def test_a_checkpoint_is_a_reward_model_for_everybody(run, capsys):
    learner, directory = run
    raw = torch.stack([raw_scores(learner, one) for one in PAIRS])
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    ids = torch.tensor([[*PAIRS[0].prompt_ids, *PAIRS[0].chosen_ids]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0], raw[0, :1], rtol=0, atol=1e-5)
    assert (model.config.num_labels, model.config.id2label) == (1, {0: "reward"})
    reading = model.config.tokenmdp
    assert reading["shift"] == pytest.approx(raw.mean().item(), abs=1e-5)
    assert reading["scale"] == pytest.approx(1 / raw.std(correction=0).item(), rel=1e-4)
    ours = load_reward_model(str(directory))
    found = torch.stack([ours(episode(*texts_of(one)[:1], *texts_of(one)[1])).score for one in PAIRS])
    torch.testing.assert_close(found, (raw - reading["shift"]) * reading["scale"], rtol=0, atol=1e-4)
    assert found.mean().item() == pytest.approx(0, abs=1e-4)
    assert found.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert "logit[reward]" in ours.meaning
    assert AutoTokenizer.from_pretrained(directory).get_vocab() == TOY.get_vocab()
    command = ["score", "great", "--prompt", PAIRS[0].prompt, "--reward-model", str(directory), "--device", "cpu"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert float(printed.split("score ")[1].split()[0]) == pytest.approx(found[0, 0].item(), abs=1e-4)


def test_the_shift_is_the_mean_score_and_log_odds_keep_their_unit(make, tmp_path):
    learner = make(RANKINGS, learning_rate=1e-2).learn(2)
    learner.save(tmp_path / "run")
    reading = json.loads((tmp_path / "run" / "config.json").read_text())["tokenmdp"]
    every = torch.cat([raw_scores(learner, one) for one in RANKINGS])
    assert reading == {"append_eos": False, "shift": pytest.approx(every.mean().item(), abs=1e-5), "scale": 1.0}


def test_an_end_behind_every_text_is_saved_with_the_model_which_then_reads_it(make, tmp_path):
    make(append_eos=True, learning_rate=1e-2).learn(3).save(tmp_path / "run")
    model = load_reward_model(str(tmp_path / "run"))
    prompt, response = encode("the film was"), encode("great fun .")
    both = model(episode(prompt, response, (*response, EOS), encode("bad")), needs=frozenset({"attention"}))
    assert both.score[0].item() == pytest.approx(both.score[1].item(), abs=1e-5)
    with torch.no_grad():
        logit = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")(
            torch.tensor([[*prompt, *response, EOS]])
        ).logits.item()
    shift = json.loads((tmp_path / "run" / "config.json").read_text())["tokenmdp"]["shift"]
    assert both.score[0].item() == pytest.approx(logit - shift, abs=1e-4)
    assert model.provides == {"gradients", "attention", "attention_layers"}
    episodes = episode(prompt, response, (*response, EOS), encode("bad"))
    credit = make_credit("attention")(Outcome(episodes, both, torch.arange(3)), Resources(model, TOY))
    torch.testing.assert_close(credit.token_rewards.sum(-1), both.score, rtol=0, atol=1e-5)
    assert not credit.token_rewards[~episodes.response_mask].any()
    assert (both.attention[0, :3] > 0).all()
    texts = model.embedded(episodes)  # what attributions by gradients read
    assert texts.response.sum(-1).tolist() == [len(response), len(response) + 1, 1]
    torch.testing.assert_close(texts.score(texts.embeddings, torch.arange(3)).detach(), both.score, rtol=0, atol=1e-5)
    plain = make(learning_rate=1e-2).learn(3)
    plain.save(tmp_path / "plain")
    apart = load_reward_model(str(tmp_path / "plain"))
    assert "prefix_scores" in apart.provides
    scores = apart(episode(prompt, response, (*response, EOS))).score
    assert (scores[0] - scores[1]).abs() > 1e-3


@pytest.mark.parametrize(("pad", "reading"), [(0, {"append_eos": True}), (EOS, None)], ids=["own pad", "pad is end"])
def test_a_model_of_others_that_always_read_an_end_can_be_read_as_it_learned(tmp_path, pad, reading):
    model = classifier().eval()
    model.config.pad_token_id = pad
    saved(model, tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text()) | {"tokenmdp": reading}
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    prompt, response = encode("the film was"), encode("so fun")
    with torch.no_grad():
        logit = model(torch.tensor([[*prompt, *response, EOS]])).logits.item()  # of EOS, or before it where that is pad
    found = load_reward_model(str(tmp_path / "rm"))(lay_out([prompt] * 2, [response, (*response, EOS)])).score
    assert found[0].item() == pytest.approx(logit, abs=1e-5)
    assert (abs(found[1].item() - logit) < 1e-5) == (pad != EOS)


@pytest.mark.parametrize(
    "record",
    ["yes", {"append_eos": 1}, {"scale": 0.0}, {"scale": float("nan")}, {"shift": "0"}, {"end": True}, []],
    ids=str,
)
def test_a_damaged_reading_is_refused(tmp_path, record):
    model = saved(classifier(), tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text()) | {"tokenmdp": record}
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"rm has 'tokenmdp': .* in its config.json; it holds append_eos"):
        load_reward_model(model)


@pytest.mark.parametrize("data", [PAIRS, RANKINGS], ids=["pairs", "rankings"])
@pytest.mark.parametrize("options", [{}, {"utilities": "log", "append_eos": True}], ids=str)
def test_a_resumed_run_continues_bit_for_bit(make, tmp_path, data, options):
    check_resume(lambda: make(data, **options), data, tmp_path / "run")


def test_other_data_are_refused_on_resuming(make, tmp_path):
    make(RANKINGS).learn(1).save(tmp_path / "run")
    other = dataclasses.replace(RANKINGS[0], ranks=(2, 1, 3, 4))  # the same tokens in another order of preference
    for data in (RANKINGS[::-1], [other, RANKINGS[1]], PAIRS):
        with pytest.raises(CheckpointError, match="trained on other data"):
            RewardModelLearner.load(tmp_path / "run", data)


def test_adapters_and_the_head_alone_learn(make, tmp_path):
    pytest.importorskip("peft", reason="adapters need peft")
    options = {"lora_rank": 2, "learning_rate": 1e-2}
    learner = make(**options)
    before = {name: weight.clone() for name, weight in learner.model.named_parameters()}
    learner.learn(2)
    changed = {name for name, weight in learner.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lora_" in name for name in changed)
    assert {name for name in changed if "lora_" not in name} == {"lm.score.weight"}
    learner.save(tmp_path / "run")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert not [name for name in model.state_dict() if "lora" in name]
    whole = SimpleNamespace(model=SimpleNamespace(lm=model))
    torch.testing.assert_close(raw_scores(whole, PAIRS[1]), raw_scores(learner, PAIRS[1]), rtol=0, atol=1e-5)
    check_resume(lambda: make(**options), PAIRS, tmp_path / "parts", updates=4)


def test_it_starts_from_language_models_encoders_and_one_label_classifiers(make, tmp_path, caplog):
    heads = [make(seed=seed).model.lm.score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    one = classifier()
    assert torch.equal(make(model=saved(one, tmp_path / "one")).model.lm.score.weight, one.score.weight)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    roberta = RobertaModel(RobertaConfig(vocab_size=32, pad_token_id=31, max_position_embeddings=96, **shape))
    for name, encoder in (("distilbert", distilbert().distilbert), ("roberta", roberta)):
        learner = make(model=saved(encoder, tmp_path / name))
        own = dict(encoder.named_parameters())
        kept = {key: weight for key, weight in learner.model.lm.base_model.named_parameters() if key in own}
        assert kept
        assert all(torch.equal(weight, own[key]) for key, weight in kept.items())
        assert learner.learn(1).history[0]["loss"] > 0
    for name, kind, config in (("bert", BertForMaskedLM, BertConfig), ("mlm", RobertaForMaskedLM, RobertaConfig)):
        masked = kind(config(vocab_size=32, pad_token_id=31, max_position_embeddings=96, **shape))
        model = saved(masked, tmp_path / name)
        own = dict(masked.base_model.named_parameters())
        heads = []
        for seed in (1, 1, 2):
            found = dict(make(model=model, seed=seed).model.lm.named_parameters())
            kept = {key: found.pop(f"{name if name == 'bert' else 'roberta'}.{key}") for key in own}
            assert all(torch.equal(weight, own[key]) for key, weight in kept.items())
            heads.append(found)  # what the file has no weights for: the head, and BERT's pooler
        assert any("pooler" in key for key in heads[0]) == (name == "bert")
        assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
        assert any(not torch.equal(heads[0][key], heads[2][key]) for key in heads[0] if "weight" in key)
        assert not [line for line in caplog.messages if "does not use" in line]
    with pytest.raises(ValueError, match=r"GPT2ForSequenceClassification has 2 labels and a reward model learns one"):
        make(model=saved(classifier(labels=2), tmp_path / "two"))


def test_bad_data_are_refused(make):
    with pytest.raises(ValueError, match="RewardModelLearner got no examples"):
        make([])
    with pytest.raises(UnknownTokenIds, match="record 1 holds the token id 32"):
        make([PAIRS[0], dataclasses.replace(PAIRS[1], rejected_ids=(3, 32))])
    long = dataclasses.replace(PAIRS[0], chosen_ids=(5,) * 61)
    assert make([long]).learn(1).num_updates_done == 1
    with pytest.raises(BadPreferences, match=r"a prompt with its longest response has 64 tokens and .* reads 63"):
        make([long], append_eos=True)
    with pytest.raises(BadPreferences, match=r"has 67 tokens and .* reads 64; leave such records out"):
        make([dataclasses.replace(PAIRS[0], chosen_ids=(5,) * 64)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_rate": 1.0}, "error_rate is 1.0; it is a share of labels below 1"),
        ({"error_rate": -0.1}, "error_rate is -0.1"),
        ({"centring": -1.0}, "centring"),
        ({"utilities": "sqrt"}, r"utilities has 'sqrt'; a utility is one of x, log, -1/x, log-sigmoid"),
        ({"utilities": "open=cube,x"}, "utilities has 'open=cube'"),
        ({"utilities": "x", "error_rate": 0.1}, "belong to Bradley-Terry; leave them out with utilities"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig(**options)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_held_out_prompts_are_no_part_of_what_is_learned(share):
    records = [SimpleNamespace(prompt_ids=(prompt % 40,)) for prompt in range(200)]
    learning, held_out = split_data(records, share)
    prompts = [{one.prompt_ids for one in part} for part in (learning, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(learning) + len(held_out) == 200
    assert len(prompts[1]) == pytest.approx(40 * share)
    assert split_data(records, 0) == (records, [])
    for bad in (1, -0.1):
        with pytest.raises(ValueError, match="it is a share of the prompts"):
            split_data(records, bad)
    with pytest.raises(ValueError, match=r"3 records answer one prompt, so none can be held out; pass --held-out 0"):
        split_data(records[:1] * 3, 0.5)
