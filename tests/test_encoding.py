"""Texts as their tokenizers mean them: start tokens, seams, chats, several ends of text, vocabularies with gaps."""

import json
import logging

import gymnasium as gym
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import tokenmdp  # noqa: F401  # registers the ids
from tokenmdp.agents.ppo import PPO, PPOConfig
from tokenmdp.envs.token_mdp import legal_tokens
from tokenmdp.evaluation.credit_quality.texts import encode
from tokenmdp.models.encoding import chat_format, continuing_ids, start_ids, vocab_size
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import growing_texts, toy_tokenizer
from tokenmdp.reward_models import HFRewardModel, LexiconRewardModel, RetokenizedRewardModel, VocabularyMismatch
from tokenmdp.types import lay_out
from tokenmdp.wrappers import vector

WORDS = ["the", "film", "was", "great", "user", "assistant", "a"]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def fast(raw, **names):
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **names)


def words(template, *special):
    """Words between blanks, with what ``template`` puts around them."""
    vocabulary = {token: index for index, token in enumerate(["<unk>", *special, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known = [(token, vocabulary[token]) for token in special]
    if template is not None:
        raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    return fast(raw, unk_token="<unk>", **({"eos_token": special[-1]} if special else {}))


def sentence_piece(begin="<s> $A"):
    """As Llama 2: every text begins with a blank, and with <s>."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *[f"▁{word}" for word in WORDS], *"thefilmwasgr.0", "\n"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", word[0]) for word in WORDS]
    for word in WORDS:
        for end in range(1, len(word)):
            merges.append((f"▁{word[:end]}", word[end]))
            vocabulary.setdefault(f"▁{word[: end + 1]}", len(vocabulary))
            vocabulary.setdefault(word[end], len(vocabulary))
        vocabulary.setdefault(f"▁{word[0]}", len(vocabulary))
        vocabulary.setdefault(word[0], len(vocabulary))
    raw = Tokenizer(models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.post_processor = processors.TemplateProcessing(single=begin, special_tokens=[("<s>", 1), ("</s>", 2)])
    return fast(raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


STARTS = {
    "<s> $A": (words("<s> $A", "<s>", "</s>"), 1),
    "<s> $A </s>": (words("<s> $A </s>", "<s>", "</s>"), 1),
    "[gMASK] <sop> $A": (words("[gMASK] <sop> $A", "[gMASK]", "<sop>", "</s>"), 2),
    "$A </s>": (words("$A </s>", "<s>", "</s>"), 0),
    "$A": (words(None, "</s>"), 0),
}


def make(tokenizer, **options):
    options = {
        "prompts": ["the film"],
        "max_prompt_tokens": 6,
        "reward_model": LexiconRewardModel(tokenizer, {}),
    } | options
    return gym.make("tokenmdp:TextGen-v0", tokenizer=tokenizer, **options)


def prompt_of(env, **reset):
    obs, _ = env.reset(seed=0, **reset)
    prompt = slice(env.unwrapped.task.max_prompt_tokens)
    return obs["input_ids"][prompt][obs["attention_mask"][prompt].astype(bool)].tolist()


@pytest.mark.parametrize("name", STARTS)
def test_prompts_begin_as_the_tokenizer_begins_texts(name):
    tokenizer, length = STARTS[name]
    whole = tokenizer("the film")["input_ids"]
    start, text = whole[:length], tokenizer("the film", add_special_tokens=False)["input_ids"]
    assert start_ids(tokenizer) == start
    assert prompt_of(make(tokenizer)) == start + text
    assert prompt_of(make(tokenizer, add_special_tokens=False)) == text
    assert prompt_of(make(tokenizer, prompts=[text])) == text  # ids are taken as they are
    assert prompt_of(make(tokenizer, prompts=[tokenizer.decode(start) + " the film"])) == start + text  # not twice
    assert prompt_of(make(tokenizer), options={"prompt": "was great"})[:length] == start
    cut = make(tokenizer, prompts=["the film was great"], max_prompt_tokens=length + 2, truncate_prompt="left")
    assert prompt_of(cut) == start + tokenizer("was great", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, "was great", "the film").prompt_ids == start + text


def llama(tokenizer, cls=LlamaForSequenceClassification):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_labels=1, pad_token_id=None, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return cls(config).eval()


@pytest.mark.parametrize("name", STARTS)
def test_an_aligned_reward_model_reads_what_its_tokenizer_encodes(name):
    tokenizer, _ = STARTS[name]
    model = llama(tokenizer)
    toy = toy_tokenizer()
    ids = toy("the film was great")["input_ids"]

    def number(**options):
        with torch.no_grad():
            return model(torch.tensor([tokenizer("the film was great", **options)["input_ids"]])).logits.item()

    for adds in (True, False):
        aligned = RetokenizedRewardModel(HFRewardModel(model, tokenizer), toy, add_special_tokens=adds)
        assert aligned(lay_out([ids[:1]], [ids[1:]])).score.item() == pytest.approx(
            number(add_special_tokens=adds), abs=1e-5
        )
    spelled = RetokenizedRewardModel(
        HFRewardModel(model, tokenizer), toy, tokenizer.decode(start_ids(tokenizer)) + " {prompt}{response}"
    )
    assert spelled(lay_out([ids[:1]], [ids[1:]])).score.item() == pytest.approx(number(), abs=1e-5)


def test_a_reward_model_that_reads_start_tokens_warns_where_there_are_none():
    tokenizer = STARTS["<s> $A"][0]
    model, ids = HFRewardModel(llama(tokenizer), tokenizer), tokenizer("the film was")["input_ids"]
    with pytest.warns(UserWarning, match="begin with '<s>'"):
        model(lay_out([ids[1:2]], [ids[2:]]))
    env = make(tokenizer, reward_model=model)
    assert prompt_of(env) == ids[:3]


# --- seams


@pytest.mark.parametrize(("text", "pieces"), [(" was great", ["▁was", "▁great"]), ("as", ["a", "s"]), ("", [])])
def test_a_response_gets_no_blank_of_its_own(text, pieces):
    tokenizer = sentence_piece()
    assert tokenizer.convert_ids_to_tokens(continuing_ids(tokenizer, text)) == pieces
    env = make(tokenizer, prompts=["the film"])
    if text:
        obs, _ = env.reset(options={"prompt": "the film w", "response_prefix": text})
        ids = obs["input_ids"][obs["attention_mask"].astype(bool)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "the film w" + text


@pytest.mark.parametrize(
    "tokenizer", [sentence_piece(), sentence_piece("$A"), toy_tokenizer(), load_tokenizer("imdb-tiny")]
)
def test_prompt_and_text_decode_to_what_was_given(tokenizer):
    text = encode(tokenizer, "was great", "the film")
    assert tokenizer.decode(text.prompt_ids + text.ids, skip_special_tokens=True) == "the film was great"
    assert encode(tokenizer, "the film").ids == tokenizer.encode("the film", add_special_tokens=False)


# --- chats


def chatting(start="<s>"):
    tokenizer = load_tokenizer_copy()
    tokenizer.chat_template = start + CHAT
    return tokenizer


def load_tokenizer_copy():
    import copy

    return copy.deepcopy(load_tokenizer("imdb-tiny"))


MESSAGES = [{"role": "user", "content": "Was it {good}?"}]


def test_prompts_may_be_chats():
    tokenizer = chatting()
    expected = tokenizer.encode("<s><user>Was it {good}?</s><assistant>", add_special_tokens=False)
    options = {"max_prompt_tokens": 64, "prompts": [MESSAGES]}
    assert prompt_of(make(tokenizer, **options)) == expected
    texts = make(tokenizer, **options | {"prompts": ["Was it {good}?"], "prompt_template": "chat"})
    assert prompt_of(texts) == expected
    assert prompt_of(texts, options={"prompt": MESSAGES}) == expected
    begun = [*MESSAGES, {"role": "assistant", "content": "It was"}]
    assert tokenizer.decode(prompt_of(texts, options={"prompt": begun})).endswith("<assistant>It was")
    envs = gym.make_vec(
        "tokenmdp:TextGen-v0",
        num_envs=2,
        tokenizer=tokenizer,
        reward_model=LexiconRewardModel(tokenizer, {}),
        **options,
    )
    for prompts in (MESSAGES, [MESSAGES, begun]):
        assert envs.reset(options={"prompt": prompts})[0]["attention_mask"][0].sum() == len(expected)


def test_chats_that_cannot_be_rendered_are_refused():
    with pytest.raises(ValueError, match="has no chat template"):
        make(load_tokenizer("imdb-tiny"), prompts=[MESSAGES])
    tokenizer = chatting()
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(ValueError, match="no system message"):
        make(tokenizer, prompts=[MESSAGES])
    with pytest.raises(ValueError, match="neither None nor 'chat'"):
        make(load_tokenizer("imdb-tiny"), prompt_template="chatml")


@pytest.mark.parametrize("prompts", [["Was it {good}?"], [MESSAGES]], ids=["text", "chat"])
def test_a_reward_model_reads_its_own_chat_template(prompts):
    reader = STARTS["<s> $A"][0]
    reader.chat_template = "<s> {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    assert chat_format(reader) == "<s> user {prompt} assistant {response} "
    seen = []

    class Reads(LexiconRewardModel):
        def evaluate(self, episodes, needs):
            rows = zip(episodes.input_ids, episodes.attention_mask, strict=True)
            seen.extend(reader.decode(ids[mask.bool()]) for ids, mask in rows)
            return super().evaluate(episodes, needs)

    tokenizer = chatting()
    # The words that the reader knows.
    prompts = [[{"role": "user", "content": "the film"}]] if isinstance(prompts[0], list) else ["the film"]
    template = None if isinstance(prompts[0], list) else "chat"
    env = make(
        tokenizer, prompts=prompts, prompt_template=template, max_prompt_tokens=64, align="offsets",
        reward_template="chat", reward_model=Reads(reader, {}), max_new_tokens=8,
    )  # fmt: skip
    env.reset(seed=0)
    for token in [*tokenizer.encode("was great", add_special_tokens=False), tokenizer.eos_token_id]:
        _, _, terminated, _, _ = env.step(token)
    assert terminated
    assert seen == ["<s> user the film assistant was great"]


# --- several ends of text


def test_any_of_several_ends_ends_an_episode():
    toy = load_tokenizer("toy")
    stop, dot = toy.convert_tokens_to_ids([",", "."])
    env = gym.make("tokenmdp:TextGen-Toy-v0", eos_token_id=[30, dot], min_new_tokens=2)
    env.reset(seed=0)
    assert np.flatnonzero(~env.unwrapped.action_masks()).tolist() == sorted([30, dot])
    with pytest.raises(gym.error.InvalidAction, match="end-of-text"):
        env.step(dot)
    assert [env.step(token)[2] for token in (stop, stop, dot)] == [False, False, True]
    with pytest.raises(ValueError, match="end-of-text token"):
        env.reset(options={"response_prefix": [dot]})
    with pytest.raises(ValueError, match="eos_token_id=32 is not a token"):
        gym.make("tokenmdp:TextGen-Toy-v0", eos_token_id=[30, 32])
    envs = gym.make_vec(
        "tokenmdp:TextGen-Toy-v0", num_envs=16, autoreset_mode="Disabled", eos_token_id=[dot, 30], min_new_tokens=2
    )
    config = GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=30, eos_token_id=30)
    agent = PPO(GPT2LMHeadModel(config), vector.SparseReward(envs), PPOConfig(dtype="float32")).learn(1)
    assert agent.policy.eos_token_ids == (dot, 30)
    assert agent.history[0]["kl"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_of_text_are_read_beside_the_tokenizer(file, tmp_path):
    toy_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps({"eos_token_id": [17, 30], "model_type": "gpt2"}))
    env = gym.make("tokenmdp:TextGen-Toy-v0", tokenizer=str(tmp_path))
    assert env.unwrapped.eos_token_ids == (30, 17)
    assert gym.make("tokenmdp:TextGen-Toy-v0", tokenizer=str(tmp_path), eos_token_id=17).unwrapped.eos_token_ids == (
        17,
    )


def test_a_policy_with_other_ends_than_the_environment_warns(caplog):
    lm = llama(toy_tokenizer(), LlamaForCausalLM)
    lm.generation_config.eos_token_id = [17, 30]
    envs = gym.make_vec("tokenmdp:TextGen-Toy-v0", num_envs=4, autoreset_mode="Disabled")
    with caplog.at_level(logging.WARNING):
        PPO(lm, vector.SparseReward(envs))
    assert "make the environment with eos_token_id=[17, 30]" in caplog.text


def test_legal_tokens_of_one_end_and_of_several():
    from tokenmdp.envs.token_mdp import blank_state, start

    state = start(blank_state(1, 2, 4, 9), [0], [[5]], [[]], [4], 9)
    assert legal_tokens(state, 4, [0, 2], 1).tolist() == [[False, True, False, True]]


# --- vocabularies


def gapped():
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "film": 5, "great": 9, "</s>": 12}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(raw, unk_token="<unk>", eos_token="</s>")


def test_a_vocabulary_with_gaps_has_room_for_its_highest_id():
    tokenizer = gapped()
    assert (len(tokenizer), vocab_size(tokenizer)) == (5, 13)
    env = make(tokenizer, prompts=["the film"])
    assert env.action_space.n == 13
    assert prompt_of(env) == [1, 5]
    assert env.step(7)[2] is False  # an id without a token is an action like any other
    assert env.step(12)[2] is True
    model = BertForSequenceClassification(BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1,
    ))  # fmt: skip
    with pytest.raises(VocabularyMismatch, match="12 embedding rows, fewer than the 13 ids"):
        HFRewardModel(model, tokenizer)


def test_a_token_that_was_added_to_the_tokenizer_only(tmp_path):
    config = GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=30, eos_token_id=30)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([AddedToken("[PAD]", special=True), "submarine"])
    tokenizer.save_pretrained(tmp_path)
    envs = gym.make_vec(
        "tokenmdp:TextGen-v0", num_envs=4, autoreset_mode="Disabled", tokenizer=str(tmp_path), reward_model="lexicon",
        align="offsets", prompts=["the film"],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"32 logits and the environment 34 tokens.*resize_token_embeddings"):
        PPO(str(tmp_path), vector.SparseReward(envs))


def test_tokens_added_to_a_shared_tokenizer_reach_no_other_environment(caplog, tmp_path):
    toy_tokenizer().save_pretrained(tmp_path)
    name = str(tmp_path)
    first = gym.make("tokenmdp:TextGen-Toy-v0", tokenizer=name)
    tokenizer = first.unwrapped.tokenizer
    tokenizer.add_tokens(["submarine"])
    with pytest.raises(ValueError, match="tokens were added to the tokenizer"):
        first.reset(options={"prompt": "the submarine"})
    with caplog.at_level(logging.WARNING):
        second = gym.make("tokenmdp:TextGen-Toy-v0", tokenizer=name)
    assert "was changed after it was loaded" in caplog.text
    assert second.action_space.n == 32
    assert second.unwrapped.tokenizer is not tokenizer
    assert load_tokenizer(name) is second.unwrapped.tokenizer


# --- decoding in linear time


@pytest.mark.parametrize(
    "tokenizer", [load_tokenizer("imdb-tiny"), load_tokenizer("toy"), sentence_piece(), gapped()], ids=str
)
@pytest.mark.parametrize("seed", range(4))
def test_growing_texts_are_the_decoded_prefixes(tokenizer, seed):
    def decode(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(tokenizer), 60).tolist()
    if seed == 3 and vocab_size(tokenizer) > 1000:
        ids = tokenizer.encode("naïve 🙂🙂 café — 你好", add_special_tokens=False) + ids
    for first in (0, 7, len(ids)):
        expected = [decode(ids[:count]) for count in range(first, len(ids) + 1)]
        assert growing_texts(decode, ids, first) == expected


def test_growing_texts_decode_each_token_a_few_times():
    tokenizer, counted = load_tokenizer("imdb-tiny"), []

    def decode(ids):
        counted.append(len(ids))
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids = tokenizer.encode("the film was great and the story so good . " * 90, add_special_tokens=False)
    growing_texts(decode, ids, 10)
    assert sum(counted) < 8 * len(ids)  # decoding every prefix takes len(ids) / 2 times as many
