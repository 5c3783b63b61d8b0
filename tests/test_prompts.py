import json
import logging
import sys

import gymnasium as gym
import numpy as np
import pytest

from tokenmdp.envs.prompts import Encoder, clean_text, prompt_source, unknown_words
from tokenmdp.envs.text_rows import PromptsNotFound, read_rows
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import toy_tokenizer

WORDS = "the film was good but the plot is dull and the actor is fun"
DATASETS = "needs the datasets extra: pip install 'tokenmdp[datasets]'"  # why a test is skipped
TEXTS = [" ".join([WORDS] * 6), "a movie " * 40, "too short"]


@pytest.fixture
def encoder():
    tokenizer = load_tokenizer("toy")
    return Encoder(tokenizer, len(tokenizer), max_prompt_tokens=4)


def decode(encoder, ids):
    return encoder.tokenizer.decode(ids)


def drawn(source, encoder, count=100, seed=0):
    rng = np.random.default_rng(seed)
    return [decode(encoder, source.draw(rng)) for _ in range(count)]


@pytest.fixture
def reviews(tmp_path):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    (tmp_path / "plain_text").mkdir()
    for split, texts in (("train", TEXTS), ("test", ["it was great . " * 20])):
        datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)}).to_parquet(
            tmp_path / "plain_text" / f"{split}-00000-of-00001.parquet"
        )
    return tmp_path


def test_given_prompts_are_used_whole_and_alike(encoder):
    prompts = drawn(prompt_source(["the film was", "a", [4, 5]], encoder, (1, 1)), encoder, count=300)
    assert set(prompts) == {"the film was", "a", "i movie"}
    assert all(prompts.count(prompt) > 60 for prompt in set(prompts))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "the film\n\na movie\n"),
        ("p.json", json.dumps(["the film", "a movie"])),
        ("q.json", json.dumps({"prompts": ["the film", "a movie"]})),
        ("p.jsonl", '"the film"\n{"prompt": "a movie"}\n'),
    ],
)
def test_files_hold_prompts(name, content, tmp_path, encoder):
    path = tmp_path / name
    path.write_text(content)
    assert set(drawn(prompt_source(str(path), encoder, (1, 1)), encoder)) == {"the film", "a movie"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", "{"),
        ("p.json", '{"texts": []}'),
        ("p.json", "3"),
        ("p.jsonl", '{"question": "a"}'),
        ("p.jsonl", "a film"),
        ("README.md", "the film"),
    ],
)
def test_other_files_are_refused_by_name(name, content, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=name):
        read_rows(path)


def test_a_missing_or_empty_file_is_refused(tmp_path, encoder):
    with pytest.raises(PromptsNotFound, match=r"no file .*none\.txt; give an existing"):
        prompt_source(str(tmp_path / "none.txt"), encoder, (1, 1))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.txt holds no prompts"):
        prompt_source(str(tmp_path / "empty.txt"), encoder, (1, 1))


def test_a_file_of_another_kind_is_no_data_set(tmp_path, encoder):
    (tmp_path / "README.md").write_text("the film")
    with pytest.raises(
        ValueError, match=r"README.md is a file, but only .txt, .json, .jsonl, .csv, .parquet files are read"
    ):
        prompt_source(str(tmp_path / "README.md"), encoder, (1, 1))


def test_long_prompts_are_refused_without_noise_of_the_tokenizer(monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger("transformers.tokenization_utils_base"), "callHandlers", said.append)
    tokenizer = toy_tokenizer()
    tokenizer.model_max_length = 4
    with pytest.raises(ValueError, match=r"14 tokens.*--max-prompt-tokens and --truncate-prompt"):
        Encoder(tokenizer, len(tokenizer), max_prompt_tokens=4)(WORDS)
    assert said == []


def test_unknown_words_are_those_that_decode_to_the_unknown_token():
    tokenizer = toy_tokenizer()
    text = "I watched the <unk> film"
    unknown = unknown_words(tokenizer, text)
    assert unknown == ["I", "watched"]
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.unk_token_id) == len(unknown) + 1  # the last is written out


def test_openings_are_the_first_tokens_of_long_texts(reviews, encoder):
    prompts = drawn(prompt_source(str(reviews), encoder, (2, 4)), encoder, count=400)
    assert set(prompts) == {"the film", "the film was", "the film was good", "a movie", "a movie a", "a movie a movie"}
    lengths = [len(prompt.split()) for prompt in prompts]
    assert all(lengths.count(length) > 90 for length in (2, 3, 4))
    assert set(drawn(prompt_source(f"{reviews}:test", encoder, (1, 2)), encoder)) == {"it", "it was"}


def test_the_same_random_numbers_draw_the_same_openings(reviews, encoder):
    source = prompt_source(str(reviews), encoder, (1, 4))
    assert drawn(source, encoder, seed=5) == drawn(source, encoder, seed=5)


def test_openings_must_fit_their_slots(reviews, encoder):
    with pytest.raises(ValueError, match=r"prompt_tokens \(2, 8\) does not fit max_prompt_tokens=4"):
        prompt_source(str(reviews), encoder, (2, 8))
    with pytest.raises(ValueError, match=r"1 <= least <= most"):
        prompt_source(str(reviews), encoder, (3, 2))
    cut = Encoder(encoder.tokenizer, encoder.vocab_size, 4, truncate="left")
    assert "actor is fun the" in drawn(prompt_source(str(reviews), cut, (15, 15)), cut)


def test_a_directory_without_the_split_or_the_column_says_so(reviews, encoder):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    with pytest.raises(PromptsNotFound, match=r"no dev.parquet, dev-\*.parquet, dev.jsonl"):
        prompt_source(f"{reviews}:dev", encoder, (1, 2))
    datasets.Dataset.from_dict({"review": ["a"]}).to_parquet(reviews / "other-0.parquet")
    with pytest.raises(ValueError, match=r"columns 'review'; 'prompt' .* or 'text' .* is needed"):
        prompt_source(f"{reviews}:other", encoder, (1, 2))
    datasets.Dataset.from_dict({"text": ["the film", "a movie"]}).to_parquet(reviews / "tiny-0.parquet")
    with pytest.warns(UserWarning, match="no text of .* longer than 200 characters, so each of the 2 is a prompt"):
        assert set(drawn(prompt_source(f"{reviews}:tiny", encoder, (1, 2)), encoder)) == {"the film", "a movie"}


def test_an_unknown_name_says_how_to_download(encoder, monkeypatch):
    datasets = pytest.importorskip("datasets", reason=DATASETS)

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        PromptsNotFound, match=r"hf download stanfordnlp/imdb --repo-type dataset --local-dir DIR"
    ) as info:
        prompt_source("stanfordnlp/imdb:test", encoder, (1, 2))
    assert "no network" in str(info.value)
    assert "split 'test'" in str(info.value)


def test_without_the_datasets_package_the_extra_is_named(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(gym.error.DependencyNotInstalled, match=r"pip install 'tokenmdp\[datasets\]'"):
        prompt_source("stanfordnlp/imdb", encoder, (1, 2))


def test_line_breaks_become_one_newline():
    assert clean_text("A.<br /><br />B.<br>C") == "A.\nB.\nC"
