"""Integrated gradients and DeepLIFT: completeness, a linear model by hand, and what must make no difference."""

import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import ScoreOnly, episode, of_words
from test_attention_capture import bert, build, gpt2, llama, mistral, random_texts
from test_attention_capture import episode as padded

import tokenmdp.wrappers as single
from tokenmdp.credit import (
    CREDIT_METHODS,
    DeepLiftCredit,
    IncompleteAttribution,
    IntegratedGradientsCredit,
    MissingResource,
    Resources,
    SparseCredit,
    attribution,
    make_credit,
)
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.reward_models import RewardModel, load_reward_model
from tokenmdp.reward_models.base import EmbeddedTexts
from tokenmdp.reward_models.retokenized import RetokenizedRewardModel
from tokenmdp.types import Episode, Outcome, RewardOutput
from tokenmdp.wrappers import vector

METHODS = [IntegratedGradientsCredit, DeepLiftCredit]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
IMDB = "tokenmdp:TextGen-IMDb-v0"


class LinearRewardModel(RewardModel):
    """``score = bias + sum over the text's tokens of table[token] @ weight``; token 0 is worth -3, token k k - 3."""

    provides = frozenset({"gradients"})
    vocabulary, bias = 7, 0.25

    def __init__(self, knows_average=True):
        super().__init__(None)
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(5, generator=generator)
        table = torch.randn(self.vocabulary, 5, generator=generator)
        worth = torch.arange(self.vocabulary) - 3.0
        self.table = table + (worth - table @ self.weight)[:, None] * self.weight / self.weight.square().sum()
        self.knows_average = knows_average

    def evaluate(self, episodes, needs):
        worth = (episodes.input_ids - 3.0) * episodes.attention_mask
        return RewardOutput(self.bias + worth.sum(-1))

    def embedded(self, episodes):
        mask, prompt_slots = episodes.attention_mask, episodes.prompt_slots
        response = torch.cat([torch.zeros_like(mask[:, :prompt_slots]), episodes.response_mask], -1)
        return EmbeddedTexts(
            embeddings=self.table[episodes.input_ids * mask],
            response=response,
            score=lambda changed, index: self.bias + ((changed @ self.weight) * mask[index]).sum(-1),
            to_slots=lambda row: row[:, prompt_slots:] * episodes.response_mask,
            average=(lambda: self.table.mean(0)) if self.knows_average else None,
        )


def outcome(model, texts):
    return Outcome(texts, model(texts), torch.arange(len(texts.input_ids)))


def credit(method, model, texts, tokenizer=None):
    return method(outcome(model, texts), Resources(model, tokenizer))


def of_bundle(*texts, prompt_slots=8, horizon=16, pad=1):
    tokenizer = load_reward_model("imdb-tiny").tokenizer
    return episode(
        *((tokenizer.encode(prompt), tokenizer.encode(response)) for prompt, response in texts),
        prompt_slots=prompt_slots, horizon=horizon, pad=pad,
    )  # fmt: skip


TEXTS = [
    ("A film with a", " great start, terrible ending."),
    ("This", " is wonderful"),
    ("I saw it and", "!"),
    ("The plot is", " boring, but I loved the cast and the music"),
]


# The worth is of what stands in for a response token; the tokens' own, -3 to 3, have the mean 0.
@pytest.mark.parametrize(("baseline", "worth"), [("mean", 0.0), ("zero", 0.0), (5, 2.0)])
@each_method
def test_a_linear_model_is_exact_in_one_step(method, baseline, worth):
    texts = episode(([1, 2], [0, 6, 3, 4]), ([], [2, 2]), ([5], [6]), pad=6)
    options = {"steps": 1} if method is IntegratedGradientsCredit else {}
    token_rewards, report = credit(method(baseline=baseline, **options), LinearRewardModel(), texts)
    lengths = torch.tensor([4.0, 2.0, 1.0])
    prompts = torch.tensor([-3.0, 0.0, 2.0])
    torch.testing.assert_close(report["baseline_score"], 0.25 + prompts + worth * lengths, atol=1e-5, rtol=0)
    assert report["completeness_error"].abs().max() < 1e-5
    expected = torch.zeros(3, 6)
    for row, ids in enumerate([[0, 6, 3, 4], [2, 2], [6]]):
        expected[row, : len(ids)] = torch.tensor(ids) - 3.0 - worth
        expected[row, len(ids) - 1] += report["baseline_score"][row]
    torch.testing.assert_close(token_rewards, expected, atol=1e-5, rtol=0)
    assert token_rewards.dtype == report["baseline_score"].dtype == report["completeness_error"].dtype == torch.float32


@pytest.mark.parametrize("make", [gpt2, bert, llama])
def test_integrated_gradients_are_complete_with_enough_steps(make):
    model, _ = build(make)
    texts = padded(*random_texts(6))
    errors = [
        credit(IntegratedGradientsCredit(steps=steps), model, texts).report["completeness_error"].abs().max().item()
        for steps in (2, 8, 64)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-5


@pytest.mark.parametrize("make", [gpt2, bert, llama, mistral])
def test_deeplift_is_complete_in_one_pass_where_plain_gradients_are_not(make):
    model, _ = build(make)
    texts = padded(*random_texts(6))
    report = credit(DeepLiftCredit(), model, texts).report
    assert report["completeness_error"].abs().max() < 2e-5
    embedded = model.embedded(texts)
    leaf = embedded.embeddings.requires_grad_()
    (gradient,) = torch.autograd.grad(embedded.score(leaf, torch.arange(6)).sum(), leaf)
    change = torch.where(embedded.response[..., None], leaf - model.model.get_input_embeddings().weight.mean(0), 0.0)
    plain = (gradient * change).sum((1, 2)) - (model(texts).score - report["baseline_score"])
    assert plain.abs().max() > 0.1


@each_method
@pytest.mark.parametrize("make", [gpt2, bert])
def test_the_baseline_replaces_the_response_and_leaves_the_prompt(make, method):
    model, eager = build(make)
    prompts, responses = random_texts(4)
    stand_ins = {"zero": lambda table: 0 * table[0], "mean": lambda table: table.mean(0), 9: lambda table: table[9]}
    for baseline, vector_of in stand_ins.items():
        report = credit(method(baseline=baseline), model, padded(prompts, responses)).report
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            table = eager.get_input_embeddings().weight
            embeddings = torch.cat([table[prompt], vector_of(table).expand(len(response), -1)])
            logits = eager(inputs_embeds=embeddings[None], attention_mask=torch.ones(1, len(embeddings))).logits
            if make is gpt2:  # without ids the model cannot find the last token by itself
                hidden = eager.transformer(inputs_embeds=embeddings[None]).last_hidden_state
                logits = eager.score(hidden[:, -1])
            assert report["baseline_score"][row] == pytest.approx((logits[0, 1] - logits[0, 0]).item(), abs=1e-5)


@each_method
def test_signs_differ_and_the_sum_is_the_score(method):
    model = load_reward_model("imdb-tiny")
    texts = of_bundle(*TEXTS)
    token_rewards, report = credit(method(), model, texts, model.tokenizer)
    assert report["completeness_error"].abs().max() < 1e-4
    torch.testing.assert_close(token_rewards.sum(-1), model(texts).score, atol=1e-5, rtol=1e-5)
    assert not token_rewards[~texts.response_mask].any()
    pieces = [model.tokenizer.decode(token) for token in model.tokenizer.encode(TEXTS[0][1])]
    by_piece = dict(zip(pieces, token_rewards[0].tolist(), strict=False))
    assert by_piece[" terrible"] < -0.5 < 0.1 < max(by_piece.values())
    assert by_piece[" terrible"] == min(by_piece.values())
    assert by_piece[" great"] > 0


@each_method
def test_a_model_with_other_tokens_gives_credit_by_characters(method):
    toy = load_tokenizer("toy")
    model = RetokenizedRewardModel(load_reward_model("imdb-tiny"), toy, "Review: {prompt}{response} End.")
    texts = of_words(("the film", "was great but dull"), ("the", "boring"))
    token_rewards, report = credit(method(), model, texts, toy)
    assert report["completeness_error"].abs().max() < 1e-5
    assert token_rewards[0, 1] > 1.0 > -1.0 > token_rewards[0, 3]
    torch.testing.assert_close(token_rewards.sum(-1), model(texts).score, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"baseline='pad' is a token of the policy's.*use 'mean'"):
        credit(method(baseline="pad"), model, texts, toy)


def test_both_follow_what_deleting_a_token_does():
    model = load_reward_model("imdb-tiny")
    texts = of_bundle(TEXTS[3], TEXTS[0])
    dropped = torch.zeros(texts.response_mask.shape)
    for slot in range(texts.response_mask.sum(-1).max()):
        rows = texts.response_mask[:, slot].nonzero()[:, 0]
        kept = texts.attention_mask[rows].clone()
        kept[:, texts.prompt_slots + slot] = False
        without = model(Episode(texts.input_ids[rows], kept, kept[:, texts.prompt_slots :])).score
        dropped[rows, slot] = model(texts).score[rows] - without
    for method in METHODS:
        token_rewards = credit(method(), model, texts).token_rewards
        for row, mask in enumerate(texts.response_mask):
            places = mask.nonzero()[:-1, 0]  # the last one also holds the baseline's score
            pair = torch.stack([token_rewards[row, places], dropped[row, places]])
            assert torch.corrcoef(pair)[0, 1] > 0.8


@each_method
def test_a_batch_is_its_texts_and_padding_cannot_matter(method):
    model = load_reward_model("imdb-tiny")
    method = method(rows_per_forward=3)
    together = credit(method, model, of_bundle(*TEXTS))
    elsewhere = credit(method, model, of_bundle(*TEXTS, prompt_slots=11, horizon=19, pad=77))
    torch.testing.assert_close(together.token_rewards, elsewhere.token_rewards[:, :16], atol=1e-5, rtol=0)
    for row, text in enumerate(TEXTS):
        alone = credit(method, model, of_bundle(text))
        torch.testing.assert_close(together.token_rewards[row], alone.token_rewards[0], atol=1e-5, rtol=0)
        for key, column in together.report.items():
            assert column[row] == pytest.approx(alone.report[key].item(), abs=1e-5)


@each_method
@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_state_of_gradients_is_neither_needed_nor_touched(method, outer, frozen):
    model, _ = build(gpt2)
    model.model.requires_grad_(not frozen)
    texts = padded(*random_texts(3))
    method = method(steps=2) if method is IntegratedGradientsCredit else method()
    expected = credit(method, model, texts).token_rewards
    with outer(), torch.autocast("cpu", dtype=torch.bfloat16):
        copies = Episode(*(part.clone() for part in texts))
        result = method(Outcome(copies, model(texts), torch.arange(3)), Resources(model))
        assert torch.is_grad_enabled() == (outer is torch.enable_grad)
    torch.testing.assert_close(result.token_rewards.sum(-1), expected.sum(-1), atol=0.05, rtol=0)  # a bfloat16 score
    dense = ~(torch.arange(8) == texts.response_mask.sum(-1, keepdim=True) - 1)
    torch.testing.assert_close(result.token_rewards * dense, expected * dense, atol=1e-6, rtol=0)
    assert not result.token_rewards.requires_grad
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert all(parameter.requires_grad != frozen for parameter in model.model.parameters())


@each_method
def test_a_model_in_half_precision_is_integrated_in_single(method):
    model, _ = build(gpt2)
    texts = padded(*random_texts(3))
    exact = credit(method(), model, texts)
    model.model.to(torch.bfloat16)
    half = credit(method(), model, texts)
    assert half.token_rewards.dtype == torch.float32
    torch.testing.assert_close(half.token_rewards, exact.token_rewards, atol=0.2, rtol=0.2)


@each_method
def test_beta_zero_is_sparse_and_beta_mixes(method):
    model, texts = LinearRewardModel(), episode(([1], [0, 6, 4]), ([2], [5, 5]))
    sparse = SparseCredit()(outcome(model, texts), Resources()).token_rewards
    assert torch.equal(credit(method(credit_beta=0.0), model, texts).token_rewards, sparse)
    dense = credit(method(), model, texts).token_rewards
    half = credit(method(credit_beta=0.5), model, texts).token_rewards
    torch.testing.assert_close(half, (dense + sparse) / 2)


@each_method
def test_single_equals_vector_in_the_environment(method):
    method = method(steps=3) if method is IntegratedGradientsCredit else method()
    options = {"max_new_tokens": 6, "prompts": ["The film was", "I saw it and", "This"]}
    envs = vector.CreditReward(gym.make_vec(IMDB, num_envs=3, autoreset_mode="Disabled", **options), method)
    env = single.CreditReward(gym.make(IMDB, **options), method)
    end = env.unwrapped.eos_token_id
    tokens = np.array([[500, 900, end, 4, 4, 4], [end, 4, 4, 4, 4, 4], [800, 300, 700, 200, 600, 100]])
    envs.reset(seed=5)
    found = {}
    for column in tokens.T:
        *_, infos = envs.step(column)
        for row in np.flatnonzero(infos.get("_score", [])):
            found[row] = {key: infos[key][row] for key in infos if key[0] != "_"}
    for row in range(3):
        env.reset(seed=5 + row)
        for token in tokens[row]:
            *_, terminated, _, info = env.step(token)
            if terminated:
                break
        assert set(info) == set(found[row])
        assert {"baseline_score", "completeness_error"} <= set(info)
        for key, value in info.items():
            np.testing.assert_allclose(found[row][key], value, atol=1e-5, err_msg=key)


@each_method
def test_a_model_without_gradients_is_refused_at_binding(method):
    for build_env, module in ((gym.make, single), (gym.make_vec, vector)):
        with pytest.raises(
            ValueError, match=r"does not provide gradients.*a reward model that does, or one of the methods that run"
        ):
            module.CreditReward(build_env("tokenmdp:TextGen-Toy-v0"), method())
    with pytest.raises(ValueError, match="has no embeddings"):
        credit(method(), ScoreOnly(), episode(([1], [2])))
    with pytest.raises(MissingResource, match=f"{method.name} credit differentiates"):
        method()(outcome(LinearRewardModel(), episode(([1], [2]))), Resources())


def test_captum_is_loaded_by_integrated_gradients_only(monkeypatch):
    """That DeepLift does not is in test_import.py."""
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert "integrated-gradients" in CREDIT_METHODS
    with pytest.raises(MissingResource, match=r'captum, which is not installed: pip install "tokenmdp\[attribution\]"'):
        make_credit("integrated-gradients")
    credit(make_credit("deeplift"), LinearRewardModel(), episode(([1], [2])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit_beta": 2}, "credit_beta is 2"),
        ({"baseline": "median"}, "baseline is 'median'; choose 'mean', 'zero', 'pad' or a whole number, at least 0"),
        ({"baseline": -1}, "baseline is -1"),
        ({"baseline": 1.5}, "baseline is 1.5; choose 'mean', 'zero', 'pad' or a whole number"),
        ({"rows_per_forward": "8"}, "rows_per_forward is '8'; choose a whole number, at least 1"),
        ({"credit_beta": "1"}, "credit_beta is '1'; it must be a number"),
        ({"baseline": True}, "baseline is True"),
        ({"rows_per_forward": 0}, "rows_per_forward is 0"),
    ],
)
@each_method
def test_bad_arguments(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_bad_steps_and_impossible_baselines():
    with pytest.raises(ValueError, match=r"steps is 1\.5; choose a whole number, at least 1"):
        IntegratedGradientsCredit(steps=1.5)
    with pytest.raises(ValueError, match="steps is 0"):
        IntegratedGradientsCredit(steps=0)
    texts, tokenizer = of_bundle(TEXTS[1]), load_reward_model("imdb-tiny").tokenizer
    with pytest.raises(ValueError, match="no padding token"):
        credit(DeepLiftCredit(baseline="pad"), load_reward_model("imdb-tiny"), texts)
    with pytest.raises(ValueError, match=r"baseline is 9999, and the tokenizer's ids are 0\.\.4095"):
        credit(DeepLiftCredit(baseline=9999), load_reward_model("imdb-tiny"), texts, tokenizer)
    with pytest.raises(ValueError, match="knows no mean over a vocabulary; use 'zero'"):
        credit(DeepLiftCredit(), LinearRewardModel(knows_average=False), episode(([1], [2])))


def bloom():
    from transformers import BloomConfig, BloomForSequenceClassification

    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2, num_labels=1, pad_token_id=0)
    return BloomForSequenceClassification(config)


def test_attributions_that_miss_part_of_the_score_warn_once(monkeypatch):
    """Bloom's GELU has a gradient written by hand, which no rule replaces."""
    monkeypatch.setattr(attribution, "_warned", set())
    model, _ = build(bloom)
    texts = padded(*random_texts(6))
    with pytest.warns(IncompleteAttribution, match=r"deeplift .* The last token gets .* use integrated-gradients"):
        credit(DeepLiftCredit(), model, texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IncompleteAttribution)
        credit(DeepLiftCredit(), model, texts)
    with pytest.warns(IncompleteAttribution, match="raise steps"):
        credit(IntegratedGradientsCredit(steps=1), model, texts)


@pytest.mark.parametrize("make", [gpt2, bert, llama])
@each_method
def test_complete_attributions_do_not_warn(method, make, monkeypatch):
    monkeypatch.setattr(attribution, "_warned", set())
    model, _ = build(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IncompleteAttribution)
        credit(method(), model, padded(*random_texts(6)))
