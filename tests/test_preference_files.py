"""Files of comparisons from elsewhere, and bad input: each refused by its kind of error, with file and line."""

import json
import logging
import math
import os

import pytest
from preference_doubles import TOY, answers_of, encode, group, lines, pair, rollout_of
from tokenizers.processors import TemplateProcessing

from tokenmdp.models.tokens import VocabularyMismatch, toy_tokenizer
from tokenmdp.preferences import (
    AllTied,
    Annotator,
    BadPreferences,
    DifferentPrompts,
    EmptyText,
    GrowingFile,
    IdenticalResponses,
    Interrupted,
    MissingColumns,
    NoChatTemplate,
    NonFiniteNumber,
    OtherPairs,
    OtherSettings,
    Questionnaire,
    Ranking,
    UnknownTokenIds,
    WrongRanks,
    function_scores,
    given_ratings,
    join,
    ranking_from,
    read_answers,
    read_preferences,
    write_records,
)
from tokenmdp.rollouts.groups import groups_from

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ; ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def chat_tokenizer():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# --- files of others ---


def test_texts_of_others_get_ids_and_an_end(tmp_path, caplog):
    path = lines(tmp_path / "others.jsonl", {"prompt": "the film was", "chosen": " great", "rejected": " dull <eos>",
                                             "score_chosen": 8, "margin": None})  # fmt: skip
    with caplog.at_level(logging.INFO, logger="tokenmdp.preferences.tables"):
        (record,) = read_preferences(path, TOY)
    eos = TOY.eos_token_id
    assert record.chosen_ids == (*encode("great"), eos)
    assert record.rejected_ids == (*encode("dull"), eos)  # it had one
    assert (record.score_chosen, record.margin) == (8.0, None)
    assert "of 2 responses that came as plain text 1 got an end-of-text token (end='append'" in caplog.text
    (left,) = read_preferences(path, TOY, end="leave")
    assert left.chosen_ids == encode("great")
    write_records(tmp_path / "again.jsonl", [record, left])
    assert read_preferences(tmp_path / "again.jsonl", TOY) == [record, left]


def test_ids_are_taken_as_they_are_under_both_names(tmp_path):
    row = {"prompt": "a", "chosen": " great", "rejected": " dull"}
    ids = {"prompt": encode("a"), "chosen": encode("great"), "rejected": encode("dull")}
    for ending in ("_token_ids", "_ids"):
        path = lines(tmp_path / "ids.jsonl", row | {f"{name}{ending}": list(value) for name, value in ids.items()})
        (record,) = read_preferences(path, TOY)
        assert record.chosen_ids == ids["chosen"]  # no end-of-text token


def test_an_implicit_prompt_is_the_longest_shared_start(tmp_path):
    hh = {"chosen": "Human: the film Assistant: great fun", "rejected": "Human: the film Assistant: dull plot"}
    (record,) = read_preferences(lines(tmp_path / "hh.jsonl", hh), TOY)
    assert (record.prompt, record.chosen, record.rejected) == ("Human: the film Assistant:", " great fun", " dull plot")


def test_chats_are_written_by_the_template(tmp_path, chat_tokenizer):
    def message(role, content):
        return {"role": role, "content": content}

    question, good, bad = message("user", "the film"), message("assistant", "great"), message("assistant", "dull")
    rows = [
        {"prompt": "the film", "chosen": [question, good], "rejected": [question, bad], "score_chosen": 7.5},
        {"chosen": [question, good], "rejected": [question, bad]},
        {"prompt": [question], "chosen": [good], "rejected": [bad]},
        {"prompt": [question], "responses": [[good], [bad]], "ranks": [1, 2]},
    ]
    for row in rows:
        (record,) = read_preferences(lines(tmp_path / "chat.jsonl", row), chat_tokenizer)
        texts = record.responses if isinstance(record, Ranking) else (record.chosen, record.rejected)
        assert (record.prompt, *texts) == ("user : the film ; assistant : ", "great ; ", "dull ; ")
    with pytest.raises(NoChatTemplate, match=r"chat.jsonl:1 .* no chat template"):
        read_preferences(tmp_path / "chat.jsonl", TOY)


def test_ratings_rank(tmp_path):
    row = {"prompt": "the film was", "responses": [" dull", " great", " good"], "scores": [3, 9, 3]}
    (record,) = read_preferences(lines(tmp_path / "rated.jsonl", row), TOY)
    assert record.ranks == (2, 1, 2)
    assert [(one.chosen, one.score_rejected) for one in record.comparisons()] == [(" great", 3.0)] * 2


def test_json_parquet_and_directories(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="run `pip install 'tokenmdp[datasets]'`")
    import pyarrow

    row = {"prompt": "a", "chosen": " great", "rejected": " dull"}
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([row] * 2), tmp_path / "data" / "train-00000-of-00001.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([row] * 3), tmp_path / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "list.json").write_text(json.dumps([row] * 4))
    counts = [
        len(read_preferences(source, TOY, split=split))
        for source, split in (
            (tmp_path / "data", "train"),
            (tmp_path / "data", "test"),
            (tmp_path / "list.json", "train"),
        )
    ]
    assert counts == [2, 3, 4]


@pytest.mark.skipif("HF_HUB_OFFLINE" not in os.environ, reason="asks the Hugging Face hub")
def test_a_name_that_nothing_has():
    with pytest.raises(FileNotFoundError, match="hf download"):
        read_preferences("nobody/has-this", TOY)


# --- bad input ---

ROW = {"prompt": "a", "chosen": " great", "rejected": " dull"}
IDS = {"prompt_token_ids": [1], "chosen_token_ids": [20], "rejected_token_ids": [25]}
RANKED = {"prompt": "a", "responses": [" great", " dull"]}
BAD_ROWS = [
    ("identical responses", ROW | {"rejected": " great"}, IdenticalResponses, "the same 2 tokens"),
    ("empty chosen", ROW | {"chosen": ""}, EmptyText, "is empty .* leave this row out"),
    ("empty chosen ids", ROW | IDS | {"chosen_token_ids": []}, EmptyText, "chosen is empty"),
    ("missing column", {"prompt": "a", "chosen": " great"}, MissingColumns, "no column rejected; it has prompt"),
    ("null", ROW | {"chosen": None}, MissingColumns, "no column chosen; it has prompt, rejected"),
    ("no prompt", {"responses": [" great", " dull"], "ranks": [1, 2]}, MissingColumns, "no column prompt"),
    ("no ranks", RANKED, MissingColumns, "no column ranks"),
    ("no shared start", {"chosen": "great", "rejected": "dull"}, DifferentPrompts, "share no start"),
    ("ids outside", ROW | IDS | {"chosen_token_ids": [32]}, UnknownTokenIds, r"token id 32, .* ids 0\.\.31"),
    ("negative id", ROW | IDS | {"chosen_token_ids": [-1]}, UnknownTokenIds, "not negative"),
    ("ids of another kind", ROW | IDS | {"chosen_token_ids": "great"}, MissingColumns, "a list of token ids"),
    ("other vocabulary", ROW | IDS | {"chosen_token_ids": [3]}, VocabularyMismatch, "reads the token ids of ' great'"),
    ("fewer ranks", RANKED | {"ranks": [1]}, WrongRanks, "1 ranks for 2 responses"),
    ("rank 0", RANKED | {"ranks": [0, 1]}, WrongRanks, "from 1, the best"),
    ("all ties", RANKED | {"ranks": [1, 1]}, AllTied, "nothing is preferred"),
    ("NaN margin", ROW | {"margin": math.nan}, NonFiniteNumber, "margin is nan"),
    ("probability 2", ROW | {"probability": 2.0}, NonFiniteNumber, r"\[0, 1\]"),
    ("a number beside ids", ROW | IDS | {"chosen": 3}, MissingColumns, "3 stands where a text is needed"),
    ("null beside ids", ROW | IDS | {"prompt": None}, MissingColumns, "None stands where a text is needed"),
    ("a text as responses", RANKED | {"responses": "great", "ranks": [1, 2]}, MissingColumns, "is a list of texts"),
    ("a number as responses", RANKED | {"responses": 3, "scores": [1, 2]}, MissingColumns, "is a list of texts"),
    ("ratings that are texts", RANKED | {"scores": ["x", 2]}, MissingColumns, "scores is .* a list of numbers"),
    ("a rating alone", RANKED | {"scores": 3}, MissingColumns, "scores is 3; it is a list of numbers"),
    ("ranks that are texts", RANKED | {"ranks": ["x", 2]}, MissingColumns, "of another kind"),
    ("two margins", ROW | IDS | {"margin": [1.0, 2.0]}, MissingColumns, r"margin is \[1.0, 2.0\]; give one number"),
    ("a margin that is a word", ROW | IDS | {"margin": "3"}, MissingColumns, "margin is '3'; give one number"),
    ("a margin that is true", ROW | IDS | {"margin": True}, MissingColumns, "margin is True; give one number"),
    ("a huge margin", ROW | IDS | {"margin": 10**400}, MissingColumns, "margin is too large"),
    ("half a surrogate pair", ROW | {"chosen": "\ud800"}, MissingColumns, "half of a surrogate pair"),
    ("the same beside ids", ROW | IDS | {"prompt": "a\udc00"}, MissingColumns, "half of a surrogate pair"),
    ("a number as text", ROW | {"chosen": 3}, BadPreferences, "list of messages|chat"),
]  # fmt: skip


BAD_FILES = [
    ("pairs.jsonl", bytes(range(128, 256)), r"line 1 of .*pairs\.jsonl is not UTF-8"),
    ("pairs.jsonl", b'{"prompt": "a"}\n\0\0\n', r"line 2 of .*pairs\.jsonl holds a NUL character"),
    ("pairs.jsonl", b"[" * 5000 + b"\n", r"pairs\.jsonl:1 is nested too deeply"),
    ("pairs.json", b"[" * 5000, r"pairs\.json is nested too deeply"),
    ("pairs.json", b"\xff" * 5, r"line 1 of .*pairs\.json is not UTF-8"),
    ("pairs.parquet", b"PAR1 no table", r"pairs\.parquet is not a parquet file, or a damaged one"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MissingColumns, match=message):
        read_preferences(tmp_path / name, TOY)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, encoding):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW) + "\n", encoding=encoding)
    assert read_preferences(tmp_path / "pairs.jsonl", TOY)[0].chosen == " great"


def test_messages_that_are_none_and_a_template_that_refuses(tmp_path, chat_tokenizer):
    path = lines(tmp_path / "chats.jsonl", {"chosen": ["a", "b"], "rejected": ["a", "c"]})
    with pytest.raises(EmptyText, match=r"chats\.jsonl:1: a chat is a list of messages with role and content"):
        read_preferences(path, chat_tokenizer)
    chat_tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    messages = [[{"role": "user", "content": "a"}, {"role": "x", "content": word}] for word in ("great", "dull")]
    path = lines(tmp_path / "roles.jsonl", {"chosen": messages[0], "rejected": messages[1]})
    with pytest.raises(NoChatTemplate, match=r"roles\.jsonl:1: .* refuses the messages: no such role"):
        read_preferences(path, chat_tokenizer)


@pytest.mark.parametrize(("row", "kind", "message"), [pytest.param(*rest, id=name) for name, *rest in BAD_ROWS])
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, row, kind, message):
    path = lines(tmp_path / "bad.jsonl", ROW, row)
    with pytest.raises(kind, match=rf"bad\.jsonl:2\b.*{message}"):
        read_preferences(path, TOY)


ASKED = Questionnaire.draw([group(), group(prompt="a")], seed=1)


def other_pairs(path):
    answers_of(ASKED, "A", digest="0" * 16).save(path)
    read_answers(path, ASKED)


def half_a_line(path):
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:20])
    read_preferences(path, TOY)


def not_made_here(path):
    path.write_text("mine\n")
    with GrowingFile(path, {}, 1).open():
        pass


BAD_CALLS = [
    ("prompts that differ", lambda path: ranking_from([pair(), pair(prompt="a")]), DifferentPrompts, "one prompt at a"),
    ("rows that differ", lambda path: groups_from(rollout_of([[0], [1]], [[2], [3]]), TOY, 2), DifferentPrompts,
     "have 2 prompts and should have one"),
    ("a circle", lambda path: ranking_from([pair(), pair(chosen=" dull", rejected=" bad"),
                                            pair(chosen=" bad", rejected=" great")]), WrongRanks, "fit no ranking"),
    ("nothing to rank", lambda path: ranking_from([]), BadPreferences, "at least one"),
    ("answers to other pairs", other_pairs, OtherPairs, "answers other pairs"),
    ("all answers ties", lambda path: join(ASKED, [answers_of(ASKED, "tie", "skip")]), AllTied, "1 ties, 1 skipped"),
    ("three to compare", lambda path: Questionnaire.draw([group(responses=(" a", " is", " so"))], 1), BadPreferences,
     "two responses at a time"),
    ("interrupted writing", half_a_line, Interrupted, "ends in the middle of a line"),
    ("another file", not_made_here, OtherSettings, "nothing was touched"),
    ("no ratings", lambda path: given_ratings([group()]), BadPreferences, "have no ratings"),
    ("NaN of a judge", lambda path: Annotator("nan", function_scores(lambda *_: math.nan)).judge([group()], 1),
     NonFiniteNumber, "nan gave the scores"),
    ("NaN of a group", lambda path: group(scores=(1.0, math.inf)), NonFiniteNumber, "a score is inf"),
    ("an empty file", lambda path: read_preferences(lines(path), TOY), BadPreferences, "no comparisons"),
    ("not JSON", lambda path: read_preferences(path.write_text("{]\n") and path, TOY), MissingColumns, "is not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), [pytest.param(*rest, id=name) for name, *rest in BAD_CALLS])
def test_bad_input_is_refused_by_name(tmp_path, call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path / "pairs.jsonl")
    assert isinstance(caught.value, ValueError)


def test_prompts_begin_as_the_environments_prompts_do(tmp_path):
    """A tokenizer that puts a token before every text, as Llama's does."""
    tokenizer = toy_tokenizer()
    start = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.eos_token_id)]
    )
    row = {"prompt": "the film was", "chosen": " great", "rejected": " dull"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (pair,) = read_preferences(tmp_path / "pairs.jsonl", tokenizer, end="leave")
    assert pair.prompt_ids == tuple(tokenizer.encode("the film was"))
    assert pair.prompt_ids[0] == tokenizer.eos_token_id
    assert pair.chosen_ids == tuple(tokenizer.encode(" great", add_special_tokens=False))
