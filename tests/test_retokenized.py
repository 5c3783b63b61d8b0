"""A reward model reads the text behind another tokenizer's tokens: what it sees, and what comes back."""

import copy

import pytest
import torch
from doubles import episode
from other_tokenizers import FILMS, IMDB, TAIL, TOY, causal_model, encoder_model, texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenmdp.reward_models import LexiconRewardModel, RetokenizedRewardModel

ROWS = frozenset({"attention", "attention_layers"})
READ = [("the film was", " great but dull"), ("this movie", " is so awful"), ("a", " story . a very very good story .")]


@pytest.fixture(scope="module")
def causal():
    return causal_model()


@pytest.fixture(scope="module")
def encoder():
    return encoder_model()


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
        for part, other in zip(together[:4], alone[:4], strict=True):  # the last one, spread, is of ensembles
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
        torch.testing.assert_close(
            output.score[:1], model(alone, empty_responses=True).score
        )  # batches add in other orders
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
