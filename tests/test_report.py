"""Learning curves, heat maps and samples."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import token_pieces
from tokenmdp.report import curves, heatmap
from tokenmdp.report.samples import Sample
from tokenmdp.rollouts.samples import samples_from_rollout
from tokenmdp.types import Rollout


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte, so that every accent and emoji is spread over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pieces_of_split_characters_join_to_the_text(byte_tokenizer):
    text = " naïve 🙂 film"
    ids = byte_tokenizer.encode(text)
    prompt, pieces = token_pieces(byte_tokenizer, ids, byte_tokenizer.encode("a"))
    assert len(pieces) == len(ids) == len(text.encode())
    assert prompt == "a"
    assert "".join(pieces) == text
    assert [piece for piece in pieces if "🙂" in piece] == ["🙂"]  # whole, at its last byte
    assert pieces[ids.index(byte_tokenizer.encode("🙂")[0])] == ""


def test_a_character_cut_by_the_prompts_end_belongs_to_the_response(byte_tokenizer):
    ids = byte_tokenizer.encode("é!")
    prompt, pieces = token_pieces(byte_tokenizer, ids[1:], ids[:1])
    assert (prompt, pieces) == ("", ["é", "!"])


def test_bytes_that_never_become_a_character_stay_visible(byte_tokenizer):
    ids = byte_tokenizer.encode("🙂")[:2]
    assert "".join(token_pieces(byte_tokenizer, ids)[1]) == "�"


def test_pieces_keep_the_blanks_between_words():
    tokenizer = load_tokenizer("toy")
    prompt, pieces = token_pieces(tokenizer, tokenizer.encode("was great <eos>"), tokenizer.encode("the film"))
    assert (prompt, pieces) == ("the film", [" was", " great", " <eos>"])


def test_samples_from_rollout_drop_padding_and_sum_kl():
    tokenizer = load_tokenizer("toy")
    the, film, was, great, eos, pad = tokenizer.convert_tokens_to_ids(["the", "film", "was", "great", "<eos>", "<pad>"])
    ids = torch.tensor([[pad, film, great, eos, pad], [the, film, was, great, eos]])
    attended = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    per_token = torch.arange(6.0).reshape(2, 3)
    rollout = Rollout(
        ids, attended, attended[:, 2:], per_token, per_token - 0.5, per_token, per_token, torch.tensor([1.0, -2.0])
    )
    short, long = samples_from_rollout(rollout, tokenizer)
    assert short == Sample("film", [" great", " <eos>"], [0.0, 1.0], 1.0, {"kl": 1.0})
    assert (long.text, long.credits, long.facts) == ("the film was great <eos>", [3.0, 4.0, 5.0], {"kl": 1.5})


def test_terminal_line_tints_by_sign_and_strength():
    line = heatmap.terminal_line([" a", " b", " c"], [2.0, -2.0, 1.0], prompt="p")
    colours = re.findall(r"48;2;(\d+);(\d+);(\d+)m", line)
    assert colours == [("255", "153", "51"), ("92", "173", "255"), ("212", "160", "110")]
    assert re.sub(r"\x1b\[[\d;]*m", "", line) == "p a b c"
    assert line.startswith("p\x1b")  # the prompt carries no colour


def test_terminal_shows_control_characters_instead_of_sending_them():
    assert "\x1b[2J" not in heatmap.terminal_line(["\x1b[2J"], [1.0], prompt="\x1b[H")


def test_common_scale_makes_lines_comparable():
    strong = heatmap.terminal(["a"], [4.0], scale=4.0).spans[0].style
    weak = heatmap.terminal(["a"], [1.0], scale=4.0).spans[0].style
    assert (strong, weak) == ("#101010 on #ff9933", "#101010 on #bea48b")


@pytest.mark.parametrize("draw", [heatmap.terminal, heatmap.terminal_line])
def test_one_credit_a_token_is_required(draw):
    with pytest.raises(ValueError, match="2 tokens and 1 credits"):
        draw(["a", "b"], [1.0])


def test_html_is_one_page_with_numbers_and_both_themes(tmp_path):
    sample = Sample("<b>x</b>", [" go", "\nod", "&"], [1.5, -0.25, 0.0], 1.25, {"kl": 0.5})
    page = heatmap.html({"Before": [sample], "After": [sample]}, tmp_path / "new" / "page.html", title="T & t")
    text = page.read_text(encoding="utf-8")
    assert text.count('data-r="+1.5000"') == 2
    assert 'data-r="-0.2500"' in text
    assert "--own:1.000;--common:1.000" in text
    assert "--own:0.167;--common:0.167" in text  # 0.25 of 1.5
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "<b>x</b>" not in text
    assert "T &amp; t" in text
    assert "score +1.250 · kl 0.500" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?:|<link|src=|@import|url\(", text)  # nothing to fetch


def test_html_offers_each_text_a_scale_of_its_own(tmp_path):
    weak, strong = (Sample("p", [" a", " b"], [credit, 0.0], credit, {}) for credit in (0.5, 2.0))
    text = heatmap.html({"Before": [weak], "After": [strong]}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("--own:1.000") == 2
    assert ("--common:0.250" in text, "--common:1.000" in text) == (True, True)
    assert 'id="scale"' in text
    alone = heatmap.html({"Before": [weak]}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="scale"' not in alone


def test_html_tints_words_without_their_blanks_and_zero_not_at_all(tmp_path):
    sample = Sample("p", ["  good", " ", "ness", "!"], [1.0, 0.5, -0.0, -1e-7], -1e-9, {"kl": -1e-9})
    text = heatmap.html({"": [sample]}, tmp_path / "page.html").read_text(encoding="utf-8")
    spans = re.findall(r'( *)<span class="t (\w*)"[^>]*data-r="([^"]*)">([^<]*)</span>', text)
    assert spans == [
        ("  ", "up", "+1.0000", "good"), ("", "up", "+0.5000", " "), ("", "", "+0.0000", "ness"),
        ("", "down", "+0.0000", "!"),
    ]  # fmt: skip
    assert "score +0.000 · kl 0.000" in text


def records(scores):
    return [{"update": place + 1, "score_mean": score} for place, score in enumerate(scores)]


def test_learning_curves_write_a_png(tmp_path):
    path = curves.plot_learning_curves(
        {"sparse": [records([0, 1, 2]), records([1, 2, 3, 9])], "uniform": [records([0.0, 0.5, 1.0])]},
        tmp_path / "deep" / "curve.png",
        window=3,
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_learning_curves_cut_to_the_shortest_seed_and_keep_update_numbers():
    updates, values = curves._curves("x", [records([0, 1, 2]), records([4, 5])], "score_mean")
    assert updates.tolist() == [1, 2]
    assert values.tolist() == [[0, 1], [4, 5]]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"abc": [[]]}, "'abc' has a run without a single record"),
        ({"abc": []}, "'abc' has a run without a single record"),
        ({"abc": [[{"update": 1, "kl": 2.0}]]}, "'abc' has a record without 'score_mean'; it holds kl, update"),
    ],
)
def test_learning_curves_refuse_what_cannot_be_drawn(runs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        curves.plot_learning_curves(runs, tmp_path / "curve.png")


def test_smoothing_keeps_a_straight_line_and_narrows_at_the_ends():
    line = np.linspace(-3, 5, 9)
    for window in (1, 2, 3, 4, 5, 50):
        np.testing.assert_allclose(curves.smooth(line, window), line, atol=1e-12)
    assert curves.smooth([0, 0, 9, 0, 0], 3).tolist() == [0, 3, 3, 3, 0]
    with pytest.raises(ValueError, match="window is 0"):
        curves.smooth([1.0], 0)


def test_band_is_the_t_interval_of_the_mean():
    mean, half = curves.band(np.array([[1.0], [2.0], [3.0]]))
    assert mean.tolist() == [2.0]
    assert half[0] == pytest.approx(4.302653 / np.sqrt(3), abs=1e-5)  # t(.975, 2) = 4.302653, std 1


def test_read_metrics_forgives_a_cut_last_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"update": 1}) + "\n" + '{"update": 2, "sc', encoding="utf-8")
    assert curves.read_metrics(path) == [{"update": 1}]
    path.write_text('not json\n{"update": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is not a metrics record"):
        curves.read_metrics(path)
