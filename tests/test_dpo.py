"""DPO and MODPO: the reference, margins, resumption, adapters, and what is refused."""

import copy
import dataclasses
import json

import pytest
import torch
from data_doubles import (
    BASE,
    PAIRS,
    RANKINGS,
    TEXTS,
    check_resume,
    classifier,
    saved,
    three_words,
)
from preference_doubles import TOY, pair
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from tokenmdp.agents.dpo import DPO, DPOConfig
from tokenmdp.agents.sft import SFT
from tokenmdp.files import CheckpointError
from tokenmdp.preference_losses import dpo_loss
from tokenmdp.preferences import BadPreferences, NonFiniteNumber, UnknownTokenIds
from tokenmdp.reward_models import VocabularyMismatch, load_reward_model
from tokenmdp.runs.environments import toy_policy
from tokenmdp.types import Episode, lay_out


def make(records=PAIRS, policy=None, **options):
    config = DPOConfig(**(BASE | {"batch_size": 3, "total_updates": 8} | options))
    return DPO(policy or toy_policy(seed=0), records, config, tokenizer=TOY)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The name of a reward model that reads the toy words."""
    return saved(classifier(), tmp_path_factory.mktemp("other"))


def hand_loss(agent, pairs, **options):
    """The loss of pairs from one forward each, the reference scored then and there."""
    sums = []
    for one in pairs:
        row = []
        for model in (agent.policy, agent.reference):
            for ids in (one.chosen_ids, one.rejected_ids):
                episode = lay_out([one.prompt_ids], [ids])
                with torch.no_grad():
                    found = model(episode.input_ids, episode.attention_mask, episode.prompt_slots).logprobs
                row.append(found.sum() / (len(ids) if agent.config.length_normalised else 1))
        sums.append(torch.stack(row))
    return dpo_loss(*torch.stack(sums).T, agent.config.dpo_beta, **options)


@pytest.mark.parametrize(
    "options", [{}, {"form": "ipo"}, {"form": "robust", "label_smoothing": 0.1}, {"length_normalised": True}], ids=str
)
def test_the_loss_of_a_batch_is_the_loss_of_its_pairs_with_a_reference_scored_anew(options):
    agent = make(batch_size=len(PAIRS), **options).learn(2)
    own = {name: value for name, value in options.items() if name != "length_normalised"}
    expected = hand_loss(agent, PAIRS, **own)
    assert agent.learn(1).history[-1]["loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert agent.history[0]["loss"] == pytest.approx(0.5**2 * 100 if options.get("form") == "ipo" else 0.6931, abs=1e-4)


def test_order_padding_and_the_size_of_batches_leave_losses_as_they_are():
    agent = make(batch_size=len(PAIRS)).learn(2)
    rows = torch.arange(len(PAIRS)).numpy()
    found = agent.losses(rows, agent.lay_out(agent.examples))
    backwards = rows[::-1].copy()
    singles = [agent.losses(rows[[row]], agent.lay_out([agent.examples[row]])) for row in rows]
    plain = agent.lay_out(agent.examples)
    wide = Episode(
        pad(plain.input_ids, (3, 2), value=7), pad(plain.attention_mask, (3, 2)), pad(plain.response_mask, (0, 2))
    )
    for name, number in found.items():
        ours = [
            agent.losses(backwards, agent.lay_out([agent.examples[row] for row in backwards]))[name],
            agent.losses(rows, wide)[name],
            torch.stack([one[name] for one in singles]).mean(),
        ]
        for one in ours:
            assert one.item() == pytest.approx(number.item(), abs=1e-6), name
    by_twos = make(batch_size=2)
    torch.testing.assert_close(agent.ref_logprobs, by_twos.ref_logprobs, rtol=0, atol=1e-6)


def test_metrics_say_how_both_responses_fare():
    agent = make(dpo_beta=1.0, batch_size=len(PAIRS))
    agent.learn(8)
    first, last = agent.history[0], agent.history[-1]
    assert (first["accuracy"], first["chosen_logratio"], first["rejected_logratio"]) == (0.5, 0.0, 0.0)
    assert last["accuracy"] == 1.0
    assert last["loss"] < first["loss"] - 0.1
    assert last["chosen_logratio"] > last["rejected_logratio"] + 0.2
    assert last["response_tokens"] == sum(len(one.chosen_ids) + len(one.rejected_ids) for one in PAIRS)
    assert not agent.policy.value_head.weight.any()
    assert agent.updates_per_epoch == 1
    assert [metrics["epoch"] for metrics in agent.history] == list(range(8))


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_scores_of_other_pairs_are_the_rewards_that_the_loss_reads(other, weight):
    margin = {"margin": other, "objective_weight": weight} if weight < 1 else {}
    agent = make(PAIRS[:4], dpo_beta=0.7, **margin).learn(3)
    found = agent.score_pairs(PAIRS[4:])
    assert found.shape == (4, 2)
    gaps = found[:, 0] - found[:, 1]
    losses = torch.nn.functional.softplus(-gaps)  # -log sigma: the scores are log-odds of the labels
    again = make(PAIRS[4:], dpo_beta=0.7, batch_size=4, **margin)
    again.policy.load_state_dict(agent.policy.state_dict())
    assert again.learn(1).history[0]["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert gaps.abs().min() > 1e-3


def test_scores_are_calibrated_only_where_they_are_log_odds_of_the_labels():
    shares = [
        ({}, 0.0), ({"form": "robust", "label_smoothing": 0.1}, 0.2), ({"label_smoothing": 0.1}, None),
        ({"form": "ipo"}, None),
    ]  # fmt: skip
    assert [make(PAIRS[:2], **options).coin_flips for options, _ in shares] == [share for _, share in shares]


def test_a_ranking_counts_pair_by_pair():
    agent = make(RANKINGS)
    assert len(agent.examples) == 6 + 3
    assert len(make([*RANKINGS, *PAIRS]).examples) == 9 + len(PAIRS)


def test_a_margin_is_the_other_objectives_weighted_difference_and_the_records_own_is_added(tmp_path, other):
    records = [PAIRS[0], dataclasses.replace(PAIRS[1], margin=0.75)]
    agent = make(records, margin=other, objective_weight=0.4)
    model = load_reward_model(other)
    chosen, rejected = (
        torch.cat([model(lay_out([one.prompt_ids], [getattr(one, name)])).score for one in records])
        for name in ("chosen_ids", "rejected_ids")
    )
    gaps = chosen - rejected
    expected = (0.6 * gaps + torch.tensor([0.0, 0.75])).double()
    torch.testing.assert_close(agent.margins, expected, rtol=0, atol=1e-5)
    assert gaps.abs().min() > 0.01
    loss = agent.learn(1).history[0]["loss"]
    assert loss == pytest.approx(torch.nn.functional.softplus(expected / 0.4).mean().item(), abs=1e-5)  # d = 0 at first
    moved = copied_with(other, tmp_path / "shifted", shift=7.0)
    torch.testing.assert_close(make(records, margin=moved, objective_weight=0.4).margins, expected, rtol=0, atol=1e-5)
    scaled = make(records, margin=copied_with(other, tmp_path / "scaled", scale=2.0), objective_weight=0.4)
    assert (scaled.margins - expected).abs().max() > 0.01


def copied_with(name, directory, **reading):
    """The same model with a reading in its configuration."""
    model = classifier()
    model.config.tokenmdp = reading
    assert torch.equal(model.score.weight, load_reward_model(name).model.score.weight)
    return saved(model, directory)


def test_a_margin_that_reads_other_tokens_is_refused(tmp_path):
    foreign = saved(classifier(vocab_size=3, eos=2), tmp_path / "foreign", three_words())
    with pytest.raises(VocabularyMismatch):
        make(margin=foreign, objective_weight=0.5)


@pytest.mark.parametrize("options", [{}, {"epochs": 4, "total_updates": None}, {"margin": True}], ids=str)
def test_a_resumed_run_continues_bit_for_bit(tmp_path, other, options):
    if options.get("margin"):
        options = {"margin": other, "objective_weight": 0.5}
    agent = check_resume(lambda: make(**options), PAIRS, tmp_path / "run")
    assert agent.updates_per_epoch == 3  # so the parts are cut within a pass over the data


def test_other_data_are_refused_on_resuming(tmp_path):
    make().learn(1).save(tmp_path / "run")
    swapped = dataclasses.replace(PAIRS[0], chosen_ids=PAIRS[0].rejected_ids, rejected_ids=PAIRS[0].chosen_ids)
    told = dataclasses.replace(PAIRS[0], margin=1.0)
    for data in (PAIRS[1:], [swapped, *PAIRS[1:]], [told, *PAIRS[1:]], PAIRS[::-1]):
        with pytest.raises(CheckpointError, match=r"trained on other data: digest .*; pass the same data"):
            DPO.load(tmp_path / "run", data)
    with pytest.raises(CheckpointError, match=r"sft_config.json"):
        SFT.load(tmp_path / "run", TEXTS)
    with pytest.raises(ValueError, match="data_digest, seed cannot change on resuming"):
        DPO.load(tmp_path / "run", PAIRS, seed=2, data_digest="")


def test_adapters_alone_learn_and_the_checkpoint_is_a_whole_model(tmp_path):
    pytest.importorskip("peft", reason="adapters need peft")
    options = {"lora_rank": 2, "learning_rate": 1e-2}
    agent = make(**options)
    before = {name: weight.clone() for name, weight in agent.policy.named_parameters()}
    agent.learn(2)
    changed = {name for name, weight in agent.policy.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    agent.save(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    episode = lay_out([PAIRS[0].prompt_ids], [PAIRS[0].chosen_ids])
    with torch.no_grad():
        theirs = model(episode.input_ids).logits.log_softmax(-1)[0, episode.prompt_slots - 1, PAIRS[0].chosen_ids[0]]
    assert theirs.item() == pytest.approx(agent.logprobs(agent.policy, episode)[0, 0].item(), abs=1e-5)
    check_resume(lambda: make(**options), PAIRS, tmp_path / "parts", updates=4)


def test_a_checkpoint_says_what_made_it(tmp_path):
    agent = make(form="ipo").learn(1)
    agent.save(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "dpo_config.json").read_text())
    assert (record["format"], record["config"]["form"]) == ("tokenmdp-dpo-1", "ipo")
    again = DPO(str(tmp_path / "run"), PAIRS, DPOConfig(**BASE))  # a new run from it, with the tokenizer beside it
    assert again.tokenizer.get_vocab() == TOY.get_vocab()
    assert torch.equal(again.policy.lm.transformer.wte.weight, agent.policy.lm.transformer.wte.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dpo_beta": 0.0}, "dpo_beta"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5; it lies in \[0, 0.5\)"),
        ({"form": "robust"}, "needs label_smoothing, the share of wrong labels"),
        ({"form": "ipo", "label_smoothing": 0.1}, "uses no label_smoothing and no margin"),
        ({"form": "ipo", "margin": "imdb-gold", "objective_weight": 0.5}, "uses no label_smoothing and no margin"),
        ({"objective_weight": 0.5}, "two objectives need both"),
        ({"margin": "imdb-gold"}, "two objectives need both"),
        ({"margin": "imdb-gold", "objective_weight": 0.0}, r"objective_weight is 0.0; it lies in \(0, 1\]"),
        ({"form": "hinge"}, "form"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0}, "epochs"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DPOConfig(**options)


def test_bad_data_are_refused():
    with pytest.raises(ValueError, match="DPO got no examples to learn from"):
        make([])
    beyond = dataclasses.replace(PAIRS[0], chosen_ids=(5, 32))
    with pytest.raises(
        UnknownTokenIds, match=r"record 1 holds the token id 32, and the vocabulary has the ids 0\.\.31"
    ):
        make([PAIRS[1], beyond])
    with pytest.raises(NonFiniteNumber, match="margin is nan"):
        pair(margin=float("nan"))
    with pytest.raises(BadPreferences, match=r"record 1: .* tokens and GPT2LMHeadModel reads 64; leave such records"):
        make([PAIRS[1], dataclasses.replace(PAIRS[0], rejected_ids=(5,) * 70)])
    with pytest.raises(ValueError, match="pass tokenizer= with the tokenizer of the data"):
        DPO(toy_policy(seed=0), PAIRS, DPOConfig(**BASE))
    model = toy_policy(seed=0)
    with pytest.raises(ValueError, match="policy and reference are one model object"):
        DPO(model, PAIRS, DPOConfig(**BASE), reference=model, tokenizer=TOY)
    with pytest.raises(TypeError, match="DPO takes a DPOConfig"):
        DPO(copy.deepcopy(model), PAIRS, SFT.config_class(), tokenizer=TOY)
    with pytest.raises(ValueError, match="8 updates are done and 1 more exceed total_updates=8"):
        make().learn(8).learn(1)


def test_a_nan_stops_the_run_and_names_the_remedy():
    agent = make()
    torch.nn.init.constant_(agent.policy.lm.transformer.ln_f.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        agent.learn(1)
    assert agent.num_updates_done == 0
