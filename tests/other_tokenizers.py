"""Reward models whose tokenizers are not the environments', and texts for them."""

import torch
from doubles import episode
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tokenmdp.models.loading import load_tokenizer
from tokenmdp.reward_models import HFRewardModel

TOY, IMDB = load_tokenizer("toy"), load_tokenizer("imdb-tiny")
TAIL = "Review: {prompt}{response}. {{Good}} or bad?"  # a template that continues after the response
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


def causal_model():
    tokenizer = bpe()
    return HFRewardModel(gpt2(tokenizer), tokenizer)


def encoder_model():
    tokenizer = word_piece()
    return HFRewardModel(bert(tokenizer), tokenizer)


def texts(*pairs, tokenizer=TOY, prompt_slots=6, horizon=8):
    """Episodes of (prompt, response) texts; the response's text follows the prompt's without a blank between them."""
    rows = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair) for pair in pairs]
    return episode(*rows, prompt_slots=prompt_slots, horizon=horizon)


FILMS = texts(
    ("the film was", "great but dull <eos>"), ("this movie", "is so awful"), ("a", "story . a very very good story .")
)
