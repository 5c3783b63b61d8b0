"""The captured row and the score against transformers' eager attention, and the memory it takes."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tokenmdp.models.attention_rows import capture_rows
from tokenmdp.reward_models import HFRewardModel, classifier
from tokenmdp.types import Episode

VOCABULARY, POSITIONS = 32, 64
ATTENTION = frozenset({"attention"})


def gpt2(positions=POSITIONS, **options):
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=positions, n_embd=32, n_layer=2, n_head=4, num_labels=2, pad_token_id=31,
        bos_token_id=30, eos_token_id=30,
        scale_attn_by_inverse_layer_idx=True, **options,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


def llama(positions=POSITIONS, **options):
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=positions, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_labels=2, pad_token_id=31, **options,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def mistral(positions=POSITIONS, **options):
    config = MistralConfig(
        vocab_size=VOCABULARY, max_position_embeddings=positions, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_labels=2, pad_token_id=31,
        sliding_window=4, **options,
    )  # fmt: skip
    return MistralForSequenceClassification(config)


def bert(positions=POSITIONS, **options):
    config = BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=positions, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_labels=2, pad_token_id=31, **options,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def distilbert(positions=POSITIONS, **options):
    config = DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=positions, dim=32, hidden_dim=64, n_layers=2, n_heads=4,
        num_labels=2, pad_token_id=31, **options,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def roberta(positions=POSITIONS, **options):
    config = RobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=positions + 2, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_labels=2, pad_token_id=1, **options,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


ENCODERS = [bert, distilbert, roberta]
CAUSAL = [gpt2, llama, mistral]


def build(make, **options):
    """The same weights twice: one model for us, one whose attention is eager."""
    torch.manual_seed(7)
    ours, eager = make(**options).eval(), make(**options).eval()
    with torch.no_grad():  # at initialisation attention is almost uniform and would hide a wrong row
        for parameter in ours.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    eager.load_state_dict(ours.state_dict())
    eager.set_attn_implementation("eager")
    return HFRewardModel(ours, None), eager


def episode(prompts, responses, prompt_slots=6, horizon=8, side="left", pad=31):
    ids = torch.full((len(prompts), prompt_slots + horizon), pad)
    attention_mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = prompt_slots - len(prompt) if side == "left" else 0
        for first, tokens in ((start, prompt), (prompt_slots, response)):
            ids[row, first : first + len(tokens)] = torch.tensor(tokens)
            attention_mask[row, first : first + len(tokens)] = True
    return Episode(ids, attention_mask, attention_mask[:, prompt_slots:])


def random_texts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(2, 30, (length,), generator=generator).tolist()

    return [tokens(1, 6) for _ in range(count)], [tokens(1, 8) for _ in range(count)]


def eager_score_and_row(model, prompt, response, pooled):
    """One unpadded text through eager attention: the score and the pooled token's row over the response."""
    output = model(torch.tensor([prompt + response]), output_attentions=True)
    row = output.attentions[-1][0, :, pooled, len(prompt) :].mean(0)
    return output.logits[0, 1] - output.logits[0, 0], row


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", CAUSAL + ENCODERS)
@torch.no_grad()
def test_row_and_score_equal_eager(make, side):
    reward_model, eager = build(make)
    prompts, responses = random_texts(12)
    output = reward_model(episode(prompts, responses, side=side), needs=ATTENTION)
    assert output.attention.dtype == output.score.dtype == torch.float32
    spread = 0.0
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        score, row = eager_score_and_row(eager, prompt, response, pooled=0 if make in ENCODERS else -1)
        assert output.score[index] == pytest.approx(score.item(), abs=1e-5, rel=1e-5)
        assert (output.attention[index, : len(response)] - row).abs().max() < 1e-5
        assert (output.attention[index, len(response) :] == 0).all()
        spread = max(spread, (row.max() - row.min()).item())
    assert spread > 0.1, "the rows are almost uniform, so a wrong row would pass"


@pytest.mark.parametrize("make", CAUSAL + ENCODERS)
@torch.no_grad()
def test_padded_eager_batch_agrees_too(make):
    """Against one padded eager batch, not row by row: transformers' own masks and positions."""
    reward_model, eager = build(make)
    prompts, responses = random_texts(6, seed=3)
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    width, pad = max(map(len, texts)), eager.config.pad_token_id
    ids = torch.tensor([text + [pad] * (width - len(text)) for text in texts])
    mask = torch.arange(width) < torch.tensor([len(text) for text in texts])[:, None]
    output = eager(ids, attention_mask=mask.long(), output_attentions=True)
    ours = reward_model(episode(prompts, responses), needs=ATTENTION)
    torch.testing.assert_close(ours.score, output.logits[:, 1] - output.logits[:, 0], atol=1e-5, rtol=1e-5)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        pooled = 0 if make in ENCODERS else len(prompt) + len(response) - 1
        row = output.attentions[-1][index, :, pooled].mean(0)[len(prompt) : len(texts[index])]
        assert (ours.attention[index, : len(response)] - row).abs().max() < 1e-5


@pytest.mark.parametrize("make", CAUSAL + ENCODERS)
@torch.no_grad()
def test_rows_of_every_layer_and_head_equal_eager(make):
    reward_model, eager = build(make)
    prompts, responses = random_texts(6, seed=2)
    output = reward_model(episode(prompts, responses), needs=frozenset({"attention", "attention_layers"}))
    assert output.attention_layers.shape == (6, 2, 4, 8)
    torch.testing.assert_close(output.attention_layers[:, -1].mean(1), output.attention)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        pooled = 0 if make in ENCODERS else -1
        maps = eager(torch.tensor([prompt + response]), output_attentions=True).attentions
        rows = torch.stack([layer[0, :, pooled, len(prompt) :] for layer in maps])  # (layers, heads, T)
        assert (output.attention_layers[index, ..., : len(response)] - rows).abs().max() < 1e-5
        assert not output.attention_layers[index, ..., len(response) :].any()


@pytest.mark.parametrize("make", CAUSAL)
@torch.no_grad()
def test_one_forward_scores_every_prefix(make):
    """Against one forward for each prefix of each text, unpadded, through transformers' own classifier."""
    reward_model, eager = build(make)
    prompts, responses = random_texts(6, seed=4)
    prompts[0] = []  # the empty text scores 0
    output = reward_model(episode(prompts, responses), needs=frozenset({"prefix_scores"}))
    assert output.prefix_scores.shape == (6, 9)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        for length in range(len(response) + 1):
            text = prompt + response[:length]
            logits = eager(torch.tensor([text])).logits[0] if text else torch.zeros(2)
            assert output.prefix_scores[index, length].item() == pytest.approx((logits[1] - logits[0]).item(), abs=2e-5)
        assert output.prefix_scores[index, len(response)] == pytest.approx(output.score[index].item(), abs=1e-6)
        assert not output.prefix_scores[index, len(response) + 1 :].any()


@pytest.mark.parametrize("make", [gpt2, bert])
def test_texts_read_a_part_at_a_time_are_the_same(make, monkeypatch):
    model, _ = build(make)
    needs = frozenset({"attention", "attention_layers"}) | ({"prefix_scores"} & model.provides)
    episodes = episode(*random_texts(7))
    whole = model(episodes, needs=needs)
    monkeypatch.setitem(classifier.SLOTS_AT_ONCE, "cpu", 3 * episodes.input_ids.shape[-1])
    read, seen = model._read, []
    monkeypatch.setattr(model, "_read", lambda part, needs: (seen.append(len(part[0])), read(part, needs))[1])
    torch.testing.assert_close(list(whole), list(model(episodes, needs=needs)))
    assert seen == [3, 3, 1]


@pytest.mark.parametrize("make", ENCODERS)
def test_an_encoder_knows_no_prefixes(make):
    reward_model, _ = build(make)
    with pytest.raises(ValueError, match="does not provide prefix_scores"):
        reward_model(episode([[3]], [[5]]), needs=frozenset({"prefix_scores"}))


@pytest.mark.parametrize("make", [gpt2, bert])
def test_gaps_in_the_masks_read_as_if_the_tokens_had_never_been_there(make):
    reward_model, _ = build(make)
    whole = episode([[3, 4]], [[5, 6, 7, 8]])
    keep = torch.ones_like(whole.attention_mask)
    keep[0, [7, 8]] = False  # drops 6 and 7
    gaps = whole._replace(attention_mask=whole.attention_mask & keep, response_mask=whole.response_mask & keep[:, 6:])
    short = reward_model(episode([[3, 4]], [[5, 8]]), needs=ATTENTION)
    ours = reward_model(gaps, needs=ATTENTION)
    torch.testing.assert_close(ours.score, short.score)
    torch.testing.assert_close(ours.attention[0, [0, 3]], short.attention[0, [0, 1]])
    assert not ours.attention[0, [1, 2]].any()


def test_prompts_alone_are_scored_only_on_request():
    reward_model, _ = build(gpt2)
    batch = episode([[3, 4], []], [[], []])
    with pytest.raises(ValueError, match="row 0 has an empty response"):
        reward_model(batch)
    score = reward_model(batch, empty_responses=True).score
    as_response = reward_model(episode([[]], [[3, 4]])).score
    torch.testing.assert_close(score, torch.tensor([as_response.item(), 0.0]))


@pytest.mark.parametrize("make", CAUSAL + ENCODERS)
def test_asking_for_the_row_does_not_change_the_score(make):
    reward_model, _ = build(make)
    batch = episode(*random_texts(5))
    assert reward_model(batch).attention is None
    assert torch.equal(reward_model(batch).score, reward_model(batch, needs=ATTENTION).score)


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_half_precision_rows_still_sum_to_one(make):
    reward_model, _ = build(make)
    reward_model.model.to(torch.bfloat16)
    prompts, responses = random_texts(4)
    batch = episode([[] for _ in prompts], responses)  # no prompt: the response holds the whole row
    output = reward_model(batch, needs=ATTENTION)
    assert output.attention.dtype == output.score.dtype == torch.float32
    torch.testing.assert_close(output.attention.sum(-1), torch.ones(4), atol=1e-6, rtol=0)


class Sizes(TorchDispatchMode):
    """Records every tensor that an operation returns: the largest, and those with two axes of length ``length``."""

    def __init__(self, length):
        super().__init__()
        self.length, self.largest, self.square = length, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                bytes_held = tensor.untyped_storage().nbytes()  # an expanded view holds only its own storage
                self.largest = max(self.largest, bytes_held)
                if sum(size == self.length for size in tensor.shape) > 1 and bytes_held >= self.length**2:
                    self.square.append((str(function), tuple(tensor.shape)))
        return result


def test_under_autocast_rows_keep_float32_and_no_keys():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 5, 16, generator=generator).bfloat16() for _ in range(2))
    last = torch.full((2, 1), 4)
    with torch.autocast("cpu", torch.bfloat16), capture_rows(last) as capture:
        capture.keep(query, key, None, None, is_causal=True)
        alive = weakref.ref(key)
        exact = (query.double() @ key.double().transpose(-1, -2) / 4).softmax(-1)[:, :, -1:].mean(1)
        del key
    torch.testing.assert_close(capture.rows().double(), exact, atol=1e-6, rtol=0)
    assert alive() is None


def measure(reward_model, length, padded):
    """Operation sizes and peak bytes of one forward with capture over a text of ``length`` tokens."""
    prompts, responses = [[3] * (length // 2)] * 2, [[5] * (length // 2), [5] * (length // 2 - padded)]
    batch = episode(prompts, responses, prompt_slots=length // 2, horizon=length // 2)
    with Sizes(length) as sizes:
        reward_model(batch, needs=ATTENTION)
    with torch.profiler.profile(profile_memory=True) as profile:
        reward_model(batch, needs=ATTENTION)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return sizes, peak


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("make", [gpt2, llama, bert, distilbert])
def test_no_square_map_and_linear_memory(make, padded):
    reward_model = HFRewardModel(make(positions=4096), None)
    (short, short_peak), (long, long_peak) = measure(reward_model, 1022, padded), measure(reward_model, 2044, padded)
    assert not short.square
    assert not long.square
    assert long.largest < 2044 * 2044  # bytes: not even a boolean map of one row fits
    assert long_peak > 0
    assert long_peak < 2.5 * short_peak  # T x T would be 4


def test_the_measure_sees_a_square_map():
    reward_model = HFRewardModel(gpt2(positions=2048), None)
    reward_model.model.set_attn_implementation("eager")
    with Sizes(1022) as sizes:
        reward_model(episode([[3] * 511], [[5] * 511], prompt_slots=511, horizon=511))
    assert sizes.square
    assert sizes.largest >= 4 * 1022 * 1022


def test_a_model_without_interface_calls_provides_no_row():
    reward_model, _ = build(gpt2)
    reward_model.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"cannot be captured; use UniformReward"):
        reward_model(episode([[3]], [[5]]), needs=ATTENTION)
