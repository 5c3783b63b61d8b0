"""Texts as people have them: encodings, line ends, rows of every kind, tables, data sets; errors name file and row."""

import json

import gymnasium as gym
import numpy as np
import pytest

from tokenmdp.cli import main
from tokenmdp.envs.prompts import Encoder, NoPrompt, prompt_source
from tokenmdp.envs.text_rows import read_rows
from tokenmdp.envs.text_sets import name_split_column, rows_of_object
from tokenmdp.models.tokens import toy_tokenizer

DATASETS = "needs the datasets extra: pip install 'tokenmdp[datasets]'"
TWO = ["the film", "a movie"]


@pytest.fixture
def encoder():
    tokenizer = toy_tokenizer()
    return Encoder(tokenizer, len(tokenizer), max_prompt_tokens=4)


def encoded(source, encoder):
    given = prompt_source(source, encoder, (1, 2))
    return [encoder.tokenizer.decode(ids) for ids in given.encoded]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "the film\r\n\r\na movie"),
        ("p.txt", "the film\ra movie\r"),
        ("p.jsonl", '"the film"\n{"prompt": "a movie"}'),
        ("p.json", '["the film", {"prompt": "a movie"}]'),
        ("p.csv", "id,prompt\r\n1,the film\r\n2,a movie\r\n"),
        ("p.csv", "prompt;id\nthe film;1\na movie;2\n"),
        ("p.csv", '"prompt";"id"\n"the film";"1"\n"a movie";"2"\n'),
        ("p.csv", '"id"\t"prompt"\n1\t"the film"\n2\ta movie\n'),
    ],
)
def test_encodings_and_line_ends(name, content, encoding, tmp_path):
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert read_rows(tmp_path / name) == TWO


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1e"])
def test_marks_inside_a_line_do_not_end_it(mark, tmp_path):
    (tmp_path / "p.txt").write_text(f"the{mark}film\na movie\n", encoding="utf-8")
    assert read_rows(tmp_path / "p.txt") == [f"the{mark}film", "a movie"]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in (f"the{mark}film", "a movie")),
        encoding="utf-8",
    )
    assert read_rows(tmp_path / "p.jsonl") == [f"the{mark}film", "a movie"]


def test_files_put_one_behind_the_other_have_marks_inside(tmp_path):
    (tmp_path / "p.txt").write_bytes("the film\n".encode("utf-8-sig") + "a movie\n".encode("utf-8-sig"))
    assert read_rows(tmp_path / "p.txt") == TWO


DEEP = "[" * 100_000
BAD_FILES = {
    "p.txt": [
        ("the film\nthe caf\xe9".encode("latin-1"), "line 2 of .*p.txt is not UTF-8 .*0xe9"),
        ("the film".encode("utf-16-le"), "line 1 of .*NUL character"),
        (b"\xff\xfet\x00h\x00", None),  # UTF-16 with its mark
        (b"\xff\xfet\x00h\x00x", "line 1 of .*p.txt is not UTF-16"),
        (b"the film\n\x00\x01", "line 2 of .*NUL"),
    ],
    "p.jsonl": [
        (b'"the film"\n{"prompt": null}', "line 2 of .*p.jsonl is null"),
        (b'"the film"\n\n7', "line 3 of .* is a int \\(7\\)"),
        (b'{"prompt": 1.5}', "line 1 of .* is a float"),
        (b'{"prompt": true}', "line 1 of .* is a truth value"),
        (b'{"prompt": {"a": "b"}}', "line 1 of .* is an object"),
        (b'{"prompt": ["the film", "a movie"]}', "line 1 of .* is a list of a str"),
        (b'{"role": "user", "content": "the film"}', "line 1 of .* is a message of a chat"),
        (b'{"prompt": [1, 2.5]}', "line 1 of .* 2.5 among its token ids"),
        (b'{"prompt": [1, null]}', "line 1 of .* None among its token ids"),
        (b'{"question": "the film"}', "line 1 of .* has the columns 'question'.*'prompt'"),
        (b'"the film"\n"half \\ud83d of a pair"', "line 2 of .* holds '.ud83d' at character 5"),
        (b'"the film"\n{"prompt": ', "line 2 of .* is not JSON"),
        (b'"the film"\n' + DEEP.encode(), "line 2 of .* nested too deeply"),
        (b'{"text": "the film"}\n"a movie"', "p.jsonl mixes rows"),
    ],
    "p.json": [
        (b"{}", "p.json holds an object"),
        (b'{"data": ["the film"], "x": 1}', "with the keys 'data', 'x'; a list of prompts"),
        (b"null", "p.json holds null"),
        (b"3", "p.json holds a int \\(3\\)"),
        (b'"the film"', "p.json holds a str"),
        (b'["the film", null]', "row 2 of .*p.json is null"),
        (b'["the film", {"prompt": 3}]', "row 2 of .* is a int"),
        (DEEP.encode(), "p.json is nested too deeply"),
        (b'["the film",', "p.json is not JSON"),
    ],
    "p.csv": [
        (b'prompt\n"the film\na movie\n', r"line 2 of .*p.csv is not CSV \(unexpected end of data\)"),
        (b"prompt\nthe film, was\n", r"line 2 of .*p.csv has 2 fields and the first line names 1; put texts that hold"),
        (b"prompt;prompt\na;b\n", "p.csv has the column 'prompt' twice; rename one of them"),
        (b"", "p.csv has the columns none"),
        (b"question,answer\nthe film,good\n", "columns 'question', 'answer'; 'prompt'"),
        (b"id,prompt\n1\n2,the film\n", "line 2 of .* is null"),
    ],
    "p.parquet": [(b"PAR1 and no more", "p.parquet is not a parquet file")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *case) for name, cases in BAD_FILES.items() for case in cases]
)
def test_bad_rows_are_named(name, content, message, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason=DATASETS)
    (tmp_path / name).write_bytes(content)
    if message is None:
        assert read_rows(tmp_path / name)
        return
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("row", ['{"prompt": %s}', '{"messages": %s}', "%s"])
def test_a_chat_in_a_file_is_a_prompt_where_the_tokenizer_has_a_template(row, tmp_path, encoder):
    chat = [{"role": "user", "content": "the film"}]
    (tmp_path / "p.jsonl").write_text(row % json.dumps(chat))
    assert read_rows(tmp_path / "p.jsonl") == [chat]
    with pytest.raises(ValueError, match=r"line 1 of .*p.jsonl is a chat and .* has no chat template"):
        prompt_source(str(tmp_path / "p.jsonl"), encoder, (1, 2))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["the film", None], "prompt 1 is null"),
        (["the film", float("nan")], "prompt 1 is nan"),
        ([b"the film"], "prompt 0 is bytes"),
        (["the \ud800 film"], "prompt 0 holds"),
        ([[{"role": "user", "content": "the film"}]], "prompt 0 is a chat"),
        ([["the film"]], "prompt 0 is a list of a str"),
        ([True], "prompt 0 is a truth value"),
        ([[1, True]], "prompt 0 holds True among its token ids"),
        (np.array(["the film", None], dtype=object), "prompt 1 is null"),
    ],
)
def test_bad_rows_of_lists_are_named(source, message, encoder):
    with pytest.raises(ValueError, match=message):
        prompt_source(source, encoder, (1, 2))


@pytest.mark.parametrize("source", [b"the film", {"the film"}, iter(["the film"]), 7, None, np.zeros(3), np.array("a")])
def test_sources_that_are_none(source, encoder):
    with pytest.raises(TypeError, match="prompts is"):
        prompt_source(source, encoder, (1, 2))


@pytest.mark.parametrize(
    "source",
    [
        tuple(TWO),
        np.array(TWO),
        np.array(TWO, dtype=object),
        [{"prompt": "the film"}, {"prompt": "a movie", "id": 3}],
    ],
    ids=["tuple", "array", "array of objects", "dicts"],
)
def test_sources_in_memory(source, encoder):
    assert encoded(source, encoder) == TWO
    assert encoded(np.array([[0, 6], [1, 5]]), encoder) == TWO


def test_tables_in_memory(encoder):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    pandas = pytest.importorskip("pandas")
    table = datasets.Dataset.from_dict({"prompt": TWO, "label": [0, 1]})
    frame = pandas.DataFrame({"prompt": TWO, "label": [0, 1]}, index=[7, 3])
    sources = (
        table,
        table["prompt"],
        datasets.DatasetDict(train=table),
        frame,
        frame["prompt"],
        table.with_format("torch"),
    )
    for source in sources:
        assert encoded(source, encoder) == TWO
    missing = frame["prompt"].astype("string").where([True, False])
    for source, error, message in (
        (missing, ValueError, "prompt 1 is <NA>"),
        (table.to_iterable_dataset(), TypeError, "is a stream"),
        (datasets.DatasetDict(test=table), OSError, "has the splits 'test' and no 'train'"),
        (table.remove_columns("prompt"), ValueError, "the Dataset has the columns 'label'"),
        (datasets.Dataset.from_dict({"text": ["the film", None]}), ValueError, "row 2 of the Dataset is null"),
    ):
        with pytest.raises(error, match=message):
            prompt_source(source, encoder, (1, 2))


def test_tables_on_disk(tmp_path, encoder):
    datasets = pytest.importorskip("datasets", reason=DATASETS)
    table = datasets.Dataset.from_dict({"prompt": TWO, "question": TWO[::-1]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "train.parquet")
    table.to_json(tmp_path / "files" / "test.jsonl")
    table.to_csv(tmp_path / "files" / "other.csv")
    for name in ("one", "splits", "files", "files:train", "files:test", "files/train.parquet", "files/other.csv"):
        assert encoded(f"{tmp_path}/{name}", encoder) == TWO
    for name in (
        "one:train:question",
        "files:test:question",
        "files/train.parquet:question",
        "files/other.csv:question",
    ):
        assert encoded(f"{tmp_path}/{name}", encoder) == TWO[::-1]
    assert encoded(f"{tmp_path}/splits:test", encoder) == TWO[:1]
    for name, message in (
        ("splits:dev", "has the splits 'train', 'test' and no 'dev'"),
        ("files:dev", "no dev.parquet"),
        ("one:test", "without splits"),
        ("files/train.parquet:answer", "columns 'prompt', 'question'; 'answer' is needed"),
        ("one:train:answer", "'answer' is needed"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            prompt_source(f"{tmp_path}/{name}", encoder, (1, 2))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a saved data set"):
        prompt_source(f"{tmp_path}/one", encoder, (1, 2))


def test_names_in_their_parts(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert name_split_column(f"{tmp_path}/a:b") == (f"{tmp_path}/a:b", "train", None)
    assert name_split_column(f"{tmp_path}/a:b:test") == (f"{tmp_path}/a:b", "test", None)
    assert name_split_column("owner/name") == ("owner/name", "train", None)


def test_reset_options_are_checked_alike():
    env = gym.make("tokenmdp:TextGen-Toy-v0")
    for prompt in (3.5, {"role": "user"}, "half \udcff"):
        with pytest.raises(ValueError, match="options\\['prompt'\\]"):
            env.reset(options={"prompt": prompt})
    with pytest.raises(NoPrompt):
        env.reset(options={"response_prefix": 3})
    with pytest.raises(ValueError, match=r"options\['response_prefix'\] holds '.udcff'"):
        env.reset(options={"response_prefix": "half \udcff"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": null}', "line 1 of"),
        ("p.jsonl", b'{"prompt": [{"role": "user", "content": "hi"}]}', "a chat"),
        ("p.json", DEEP.encode(), "nested too deeply"),
        ("p.txt", b"caf\xe9", "line 1 of"),
        ("p.json", b'["half \\ud83d"]', "row 1 of"),
    ],
)
def test_the_command_says_so_in_one_line(name, content, message, tmp_path, capsys):
    file = tmp_path / name
    file.write_bytes(content)
    run = ["train", "--preset", "smoke", "--no-reexec", "--updates", "1", "--out", str(tmp_path / "run")]
    for arguments in (
        [*run, "--prompts", str(file)],
        ["quality", "--texts", str(file), "--reward-model", "toy-lexicon"],
    ):
        assert main(arguments) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert message in said
        assert str(file) in said
        assert "please report" not in said
    assert not (tmp_path / "run").exists()


def test_an_object_given_twice_stays_itself():
    rows = rows_of_object(TWO)
    assert rows_of_object(rows) is rows
    assert rows.part([1]).places == ["prompt 1"]
