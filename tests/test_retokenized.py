"""A policy and a reward model with different tokenizers, from the environment to the policy update."""

import copy
import pickle
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from doubles import HashRewardModel, ScoreOnly, episode
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import tokenmdp
from tokenmdp import cli, wrappers
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.loading import load_tokenizer
from tokenmdp.reward_models import (
    HFRewardModel,
    LexiconRewardModel,
    RetokenizedRewardModel,
    VocabularyMismatch,
    load_reward_model,
    readable_by,
    toy_lexicon,
)
from tokenmdp.reward_models.lexicon import TOY_WEIGHTS
from tokenmdp.task import make_task
from tokenmdp.wrappers import vector

EOS = 30
TOY, IMDB = load_tokenizer("toy"), load_tokenizer("imdb-tiny")
ROWS = frozenset({"attention", "attention_layers"})
TAIL = "Review: {prompt}{response}. {{Good}} or bad?"
SENTENCES = ["the movie was a brilliant story , but this actor is so very boring and the plot was dull ."] * 5


def bpe():
    """Byte-level pieces of words: other tokens than the environments', and characters split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def word_piece():
    """Lower-case letters with [CLS] and [SEP] around them, as BERT reads; blanks are dropped."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*special, "film", "was", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


def gpt2(tokenizer, positions=128):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=2, n_head=4, num_labels=1, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return sharp(GPT2ForSequenceClassification(config))


def bert(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    return sharp(BertForSequenceClassification(config))


def sharp(model):
    """Attention far from uniform and scores of order one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="module")
def causal():
    tokenizer = bpe()
    return HFRewardModel(gpt2(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def encoder():
    tokenizer = word_piece()
    return HFRewardModel(bert(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def causal_dir(tmp_path_factory, causal):
    directory = tmp_path_factory.mktemp("causal")
    causal.tokenizer.save_pretrained(directory)
    gpt2(causal.tokenizer).save_pretrained(directory)
    return str(directory)


def texts(*pairs, tokenizer=TOY, prompt_slots=6, horizon=8):
    """Episodes of (prompt, response) texts; the response's text follows the prompt's without a blank between them."""
    rows = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in pairs]
    return episode(*rows, prompt_slots=prompt_slots, horizon=horizon)


FILMS = texts(
    ("the film was", "great but dull <eos>"), ("this movie", "is so awful"), ("a", "story . a very very good story .")
)
READ = [("the film was", " great but dull"), ("this movie", " is so awful"), ("a", " story . a very very good story .")]


def eager(model, ids, pooled):
    """The score and the pooled token's last row, by transformers alone."""
    fresh = copy.deepcopy(model.model)
    fresh.set_attn_implementation("eager")
    with torch.no_grad():
        output = fresh(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), output_attentions=True)
    return output.logits.item(), output.attentions[-1][0, :, pooled].mean(0).tolist()


def moved_by_hand(row, offsets, pieces, start):
    """E2 character by character; ``pieces`` are our tokens' texts, the first of them at character ``start``."""
    a_character = {}
    for weight, (first, last) in zip(row, offsets, strict=True):
        for place in range(first, last):
            a_character[place] = a_character.get(place, 0.0) + weight / (last - first)
    moved = []
    for piece in pieces:
        moved.append(sum(a_character.get(place, 0.0) for place in range(start, start + len(piece))))
        start += len(piece)
    return moved


def words_of(response):
    return [f" {word}" for word in response.split()]


# --- what the model reads, and what comes back


@pytest.mark.parametrize("template", ["{prompt}{response}", TAIL, "{response}", "{response} <- {prompt}"])
def test_score_and_attention_are_those_of_the_text(causal, template):
    output = RetokenizedRewardModel(causal, TOY, template)(FILMS, needs=ROWS)
    for row, (prompt, response) in enumerate(READ):
        whole = template.format(prompt=prompt, response=response)
        encoded = causal.tokenizer(whole, return_offsets_mapping=True)
        score, attention = eager(causal, encoded["input_ids"], -1)  # the template's last token, not the response's
        before = template.split("{response}")[0].format(prompt=prompt)
        expected = moved_by_hand(attention, encoded["offset_mapping"], words_of(response), len(before))
        assert output.score[row].item() == pytest.approx(score, abs=1e-4)
        assert output.attention[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert not output.attention[row, len(expected) :].any()  # the end-of-text token has no text
        assert 0 < output.attention[row].sum() < 1 + 1e-6
    assert output.attention_layers.shape == (3, 2, 4, 8)
    assert output.attention_layers[:, -1].mean(1).allclose(output.attention, atol=1e-6)


def test_an_encoder_reads_its_special_tokens_and_gives_the_first_tokens_row(encoder):
    model = RetokenizedRewardModel(encoder, TOY)
    output = model(FILMS, needs=ROWS)
    for row, (prompt, response) in enumerate(READ):
        encoded = encoder.tokenizer(prompt + response, return_offsets_mapping=True)
        assert (encoded["input_ids"][0], encoded["input_ids"][-1]) == (2, 3)
        score, attention = eager(encoder, encoded["input_ids"], 0)
        expected = moved_by_hand(attention, encoded["offset_mapping"], words_of(response), len(prompt))
        assert output.score[row].item() == pytest.approx(score, abs=1e-4)
        assert output.attention[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
    assert model.provides == {"attention", "attention_layers", "gradients"}


def test_the_text_does_not_depend_on_case_where_the_tokenizer_lowers_it(encoder):
    upper, lower = (
        texts((text, " Film Was" if text.isupper() else " film was"), tokenizer=IMDB) for text in ("A", "a")
    )
    model = RetokenizedRewardModel(encoder, IMDB)
    assert model(upper).score == model(lower).score
    masses = [model(episodes, needs=ROWS).attention.sum().item() for episodes in (upper, lower)]
    assert masses[0] == pytest.approx(masses[1])


def test_a_shared_tokenizer_reads_the_same_as_without(causal):
    episodes = texts(
        ("the film", " was é😀 bad"), ("so", " dull"), tokenizer=causal.tokenizer, prompt_slots=8, horizon=12
    )
    plain, wrapped = (
        model(episodes, needs=ROWS) for model in (causal, RetokenizedRewardModel(causal, causal.tokenizer))
    )
    assert wrapped.score.allclose(plain.score, atol=1e-5)
    assert wrapped.attention.allclose(plain.attention, atol=1e-6)
    assert wrapped.attention_layers.allclose(plain.attention_layers, atol=1e-6)


def test_a_row_depends_neither_on_the_other_rows_nor_on_the_padding(causal):
    model = RetokenizedRewardModel(causal, TOY, TAIL)
    together = model(FILMS, needs=model.provides - {"gradients"})
    for row in range(3):
        alone = model(type(FILMS)(*(part[row : row + 1] for part in FILMS)), needs=model.provides - {"gradients"})
        for part, other in zip(together, alone, strict=True):
            assert part[row].allclose(other[0], atol=1e-5)


def test_a_character_spelt_by_several_tokens_shares_its_weight_among_them():
    words = {"a": 0, " ": 1, "😀": 2, "b": 3, "?": 4}
    characters = Tokenizer(models.WordLevel(words, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    reader = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="?")
    assert reader("a😀b")["input_ids"] == [0, 2, 3]

    class Places(LexiconRewardModel):
        """Attention 1, 2, 3, .. over the response."""

        def evaluate(self, episodes, needs):
            row = episodes.response_mask.cumsum(-1) * episodes.response_mask
            return super().evaluate(episodes, frozenset())._replace(attention=row.float())

    model = RetokenizedRewardModel(Places(reader, {}), IMDB)
    prompt, response = (IMDB(text)["input_ids"] for text in ("a", "b😀b"))
    assert len(response) == 6  # the second to the fifth are a byte each
    attention = model(episode((prompt, response)), needs=frozenset({"attention"})).attention[0]
    assert attention.tolist() == [1, 0.5, 0.5, 0.5, 0.5, 3]
    cut = episode((prompt + response[:3], response[3:]))  # the prompt ends within the character
    attention = model(cut, needs=frozenset({"attention"})).attention[0]
    assert attention.tolist() == pytest.approx([1 / 3, 1 / 3, 2, 0, 0, 0])  # the prompt, as one token, holds a third


def test_tokens_left_out_by_the_mask_are_not_read(causal):
    model = RetokenizedRewardModel(causal, TOY)
    mask = FILMS.attention_mask.clone()
    mask[:, [7, 8]] = False  # the second and the third response token
    gaps = FILMS._replace(attention_mask=mask, response_mask=mask[:, 6:])
    whole = texts(("the film was", "great <eos>"), ("this movie", "is"), ("a", "story very very good story ."))
    read, expected = model(gaps, needs=ROWS), model(whole, needs=ROWS)
    assert torch.equal(read.score, expected.score)
    assert torch.equal(read.attention[:, [0, 3, 4, 5, 6, 7]], expected.attention[:, :6])
    assert not read.attention[:, [1, 2]].any()


def test_responses_without_text_are_scored_as_the_prompt(causal):
    only_end = texts(("the film", "<eos>"), ("a movie", "is"))
    alone = texts(("the film", ""))
    for template, expected in (("{prompt}{response}", causal.tokenizer("the film")["input_ids"]), ("{response}", None)):
        model = RetokenizedRewardModel(causal, TOY, template)
        output = model(only_end, needs=ROWS)
        assert output.score[0] == model(alone, empty_responses=True).score
        assert output.score[0].item() == pytest.approx(eager(causal, expected, -1)[0] if expected else 0.0, abs=1e-4)
        assert not output.attention[0].any()
        assert output.attention[1].any()
        with pytest.raises(ValueError, match="row 0 has an empty response"):
            model(alone)


@pytest.mark.parametrize("template", ["{prompt}{response}", TAIL, "{response}"])
def test_a_prefix_score_is_the_score_of_the_shorter_response(causal, template):
    model = RetokenizedRewardModel(causal, TOY, template)
    output = model(FILMS, needs=frozenset({"prefix_scores"}))
    for count in range(9):
        mask = FILMS.attention_mask.clone()
        mask[:, 6 + count :] = False
        shorter = model(FILMS._replace(attention_mask=mask, response_mask=mask[:, 6:]), empty_responses=True).score
        running = count <= FILMS.response_mask.sum(-1)
        assert output.prefix_scores[:, count].allclose(shorter * running, atol=1e-5)
    assert torch.equal(output.prefix_scores.gather(-1, FILMS.response_mask.sum(-1)[:, None])[:, 0], output.score)


def test_gradients_are_of_the_response_and_explain_the_score(causal):
    model = RetokenizedRewardModel(causal, TOY, TAIL)
    embedded = model.embedded(FILMS)
    everything = torch.arange(3)
    inputs = embedded.embeddings.clone().requires_grad_()
    score = embedded.score(inputs, everything)
    assert score.allclose(model(FILMS).score, atol=1e-5)
    (gradient,) = torch.autograd.grad(score.sum(), inputs)
    attribution = (gradient * inputs).sum(-1).detach() * embedded.response
    moved = embedded.to_slots(attribution)
    for row, (prompt, response) in enumerate(READ):
        encoded = causal.tokenizer(TAIL.format(prompt=prompt, response=response), return_offsets_mapping=True)
        start = len("Review: " + prompt)
        held = [first < start + len(response) and last > start for first, last in encoded["offset_mapping"]]
        assert embedded.response[row, : len(held)].tolist() == held
        assert not embedded.response[row, len(held) :].any()
        numbers = attribution[row, : len(held)].tolist()
        expected = moved_by_hand(numbers, encoded["offset_mapping"], words_of(response), start)
        assert moved[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
    silent = RetokenizedRewardModel(causal, TOY, "{response}").embedded(texts(("a", "<eos>"), ("a", "film")))
    assert silent.score(silent.embeddings, torch.arange(2))[0] == 0
    assert silent.response.any(-1).tolist() == [False, True]


# --- end to end


def make(reward_model, tokenizer="toy", **options):
    return {
        "id": "tokenmdp:TextGen-v0", "tokenizer": tokenizer, "reward_model": reward_model, "align": "offsets",
        "prompts": ["the film", "a great movie was"], "max_new_tokens": 5, "max_prompt_tokens": 8, **options,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["SparseReward", "UniformReward", "AttentionCreditReward"])
def test_single_equals_vector(causal_dir, name):
    options = make(causal_dir, "imdb-tiny", reward_template=TAIL)
    envs = getattr(vector, name)(gym.make_vec(**options, num_envs=3, autoreset_mode="Disabled"))
    singles = [getattr(wrappers, name)(gym.make(**options)) for _ in range(3)]
    envs.reset(seed=7)
    for row, env in enumerate(singles):
        env.reset(seed=7 + row)
    actions = np.random.default_rng(0).integers(2, len(IMDB), (5, 3))
    for step in actions:
        infos = envs.step(step)[-1]
        each = [env.step(action)[-1] for env, action in zip(singles, step, strict=True)]
    for row, info in enumerate(each):
        np.testing.assert_allclose(infos["token_rewards"][row], info["token_rewards"], atol=1e-5)
        assert info["token_rewards"].sum() == pytest.approx(info["score"], abs=1e-5)
        assert infos["score"][row] == pytest.approx(info["score"], abs=1e-5)


@pytest.mark.parametrize("name", ["causal", "encoder"])
def test_ppo_learns_from_a_reward_model_with_another_tokenizer(request, name):
    options = make(request.getfixturevalue(name))
    envs = vector.AttentionCreditReward(gym.make_vec(**options, num_envs=8, autoreset_mode="Disabled"))
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=EOS, eos_token_id=EOS, **shape))
    agent = PPO(policy, envs, PPOConfig(dtype="float32", device="cpu", num_minibatches=2, update_epochs=1))
    (metrics,) = agent.learn(1).history
    assert all(np.isfinite(value) for value in metrics.values() if isinstance(value, float))
    assert isinstance(envs.unwrapped.task.reward_model, RetokenizedRewardModel)


@pytest.mark.filterwarnings("ignore:.*spec")
def test_the_wrapped_model_is_built_lazily_and_again_from_spec_and_pickle(causal_dir):
    env = gym.make(**make(causal_dir, reward_template=TAIL))
    assert "reward_model" not in vars(env.unwrapped.task)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    copied = pickle.loads(pickle.dumps(env.unwrapped.task))
    scores = []
    for task in (env.unwrapped.task, again.unwrapped.task, copied):
        assert "reward_model" not in vars(task)
        assert task.reward_model.template == TAIL
        assert task.reward_model.inner is load_reward_model(causal_dir)
        scores.append(task.reward_model(FILMS).score)
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    model = RetokenizedRewardModel(load_reward_model(causal_dir), TOY, TAIL)
    assert torch.equal(pickle.loads(pickle.dumps(model))(FILMS).score, scores[0])
    with pytest.raises(TypeError, match=r"JSON cannot hold it.*name with align='offsets'"):
        model.to_json()


def test_models_that_read_the_same_tokens_are_left_as_they_are():
    lexicon = toy_lexicon()
    assert readable_by(lexicon, TOY) is lexicon
    assert make_task(tokenizer="toy", reward_model=lexicon, prompts=["a"], align="offsets").reward_model is lexicon
    assert isinstance(readable_by(lexicon, TOY, "{response} !"), RetokenizedRewardModel)
    other = LexiconRewardModel(IMDB, TOY_WEIGHTS)
    wrapped = readable_by(other, TOY)
    assert torch.equal(wrapped(FILMS).score, lexicon(FILMS).score)


def test_score_reads_a_text_in_another_tokenizers_tokens(capsys, causal_dir):
    arguments = ["score", "was great but dull", "--prompt", "the film", "--device", "cpu", "--reward-model", causal_dir]
    scores = []
    for tokenizer, tokens in ((None, None), ("toy", 4), ("imdb-tiny", len(IMDB(" was great but dull")["input_ids"]))):
        assert cli.main([*arguments, *(["--tokenizer", tokenizer] if tokenizer else [])]) == 0
        output = capsys.readouterr().out
        scores.append(float(output.split("score ")[1].split()[0]))
        if tokens is not None:
            assert sum("%" in line for line in output.splitlines()) == tokens
    assert scores == pytest.approx([scores[0]] * 3, abs=2e-4)


# --- refusals


def test_another_vocabulary_is_refused_with_the_remedy(causal, causal_dir):
    with pytest.raises(VocabularyMismatch, match=r"32 tokens and .* has \d+; .*Pass align='offsets'"):
        gym.make(**make(causal, align=None))
    task = gym.make(**make(causal_dir, align=None)).unwrapped.task
    with pytest.raises(VocabularyMismatch, match="Pass align='offsets'"):
        _ = task.reward_model


def test_bad_arguments(causal):
    with pytest.raises(ValueError, match="align='bytes' is neither None nor 'offsets'"):
        gym.make(**make(causal, align="bytes"))
    with pytest.raises(ValueError, match=r"reward_template='Q: \{response\}' lets .*pass align='offsets' with it"):
        gym.make(**make("toy-lexicon", align=None, reward_template="Q: {response}"))


@pytest.mark.parametrize("template", ["{prompt}", "{response}{response}", "{response!r}", "{response} {answer}", "{}"])
def test_a_template_shows_the_response_once_and_nothing_unknown(causal, template):
    for build in (
        lambda: RetokenizedRewardModel(causal, TOY, template),
        lambda: gym.make(**make(causal, reward_template=template)),
    ):
        with pytest.raises(ValueError, match=r"must have \{response\} once"):
            build()
    with pytest.raises(ValueError, match="is no format string"):
        RetokenizedRewardModel(causal, TOY, "{response")


def test_a_text_beyond_the_positions_is_refused_when_it_is_scored(tmp_path):
    tokenizer = bpe()
    gpt2(tokenizer, positions=20).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = make_task(tokenizer="toy", reward_model=str(tmp_path), prompts=["a"], align="offsets", max_new_tokens=16)
    assert task.reward_model(texts(("a", "film"))).score.shape == (1,)
    longer = texts(("a", "film"), ("a film", "brilliant brilliant brilliant boring"))
    with pytest.raises(ValueError, match=r"text of row 1 has \d\d tokens of HFRewardModel.* has 20 positions; lower"):
        task.reward_model(longer)


def test_a_model_that_cannot_read_text_or_place_it_is_refused(causal):
    model = HFRewardModel(gpt2(causal.tokenizer), None)
    with pytest.raises(ValueError, match="has no tokenizer files, so it cannot read text"):
        RetokenizedRewardModel(model, TOY)
    with pytest.raises(VocabularyMismatch, match="different vocabularies"):
        readable_by(HFRewardModel(gpt2(IMDB), None), TOY)
    slow = HashRewardModel()
    slow.tokenizer = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match=r"SimpleNamespace, a slow tokenizer, which gives no character offsets"):
        RetokenizedRewardModel(slow, IMDB)


def test_needs_that_the_inner_model_cannot_meet_are_refused(encoder):
    env = gym.make(**make(encoder))
    with pytest.raises(ValueError, match="does not provide prefix_scores"):
        wrappers.CreditReward(env, tokenmdp.credit.make_credit("red"))
    with pytest.raises(ValueError, match="does not provide attention"):
        RetokenizedRewardModel(ScoreOnly(), IMDB)(texts(("a", "b"), tokenizer=IMDB), needs=frozenset({"attention"}))
