"""Comparisons and rankings: ids exactly, files of this library and of others, annotators in closed form, bad input."""

import dataclasses
import json
import logging
import math
import os
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import VocabularyMismatch, toy_tokenizer
from tokenmdp.preferences import (
    AllTied,
    Annotator,
    Answer,
    Answers,
    BadPreferences,
    Comparison,
    DifferentPrompts,
    EmptyText,
    Group,
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
    ceiling,
    chances_of,
    function_scores,
    given_ratings,
    join,
    model_scores,
    pairs_of,
    ranking_from,
    read_answers,
    read_groups,
    read_preferences,
    read_records,
    write_records,
)
from tokenmdp.reward_models import toy_lexicon
from tokenmdp.rollouts.groups import groups_from
from tokenmdp.types import Rollout, lay_out

TOY = load_tokenizer("toy")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ; ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def encode(text):
    return tuple(TOY.encode(text, add_special_tokens=False))


def pair(prompt="the film was", chosen=" great", rejected=" dull", **facts):
    ids = {"prompt_ids": encode(prompt), "chosen_ids": encode(chosen), "rejected_ids": encode(rejected)}
    return Comparison(**{"prompt": prompt, "chosen": chosen, "rejected": rejected, **ids, **facts})


def group(prompt="the film was", responses=(" great", " dull"), **facts):
    ids = tuple(map(encode, responses))
    return Group(prompt=prompt, responses=tuple(responses), prompt_ids=encode(prompt), responses_ids=ids, **facts)


def ranked(ranks, responses=(" great", " good", " dull", " bad"), **facts):
    plain = group(responses=responses[: max(2, len(ranks))])
    return Ranking(**{**vars(plain), **facts}, ranks=tuple(ranks))


def lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def chat_tokenizer():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# --- files of this library ---


def test_records_survive_a_file_exactly(tmp_path):
    odd = 'a "quote", <b>markup</b> & \u202eright-to-left\u202c 🎬\u2028\n\ttab'
    records = [
        pair(chosen=odd, chosen_ids=(1, 2), score_chosen=0.1 + 0.2, score_rejected=-1e-300, margin=0.5, kind="open",
             probability=1.0, annotator="ann", annotated_at="2026-01-31T12:00:00Z"),
        pair(),
        ranked((1, 2, 2, 4), scores=(3.0, 1.0, 1.0, -1.0), kind="closed", annotator="ann"),
    ]  # fmt: skip
    write_records(tmp_path / "deep" / "pairs.jsonl", records)
    assert read_records(tmp_path / "deep" / "pairs.jsonl") == records
    rows = [json.loads(line) for line in (tmp_path / "deep" / "pairs.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert rows[0]["chosen"] == odd
    assert rows[0]["chosen_token_ids"] == [1, 2]
    assert "margin" not in rows[1]
    assert rows[2]["responses_token_ids"] == [list(encode(text)) for text in (" great", " good", " dull", " bad")]


def test_groups_without_ranks_are_no_preferences(tmp_path):
    groups = [group(scores=(1.0, 0.0)), group(prompt="a")]
    write_records(tmp_path / "groups.jsonl", groups)
    assert read_groups(tmp_path / "groups.jsonl") == groups
    with pytest.raises(MissingColumns, match=r"groups.jsonl:1 has no ranks"):
        read_records(tmp_path / "groups.jsonl")


def test_trl_reads_the_texts_and_does_not_take_the_ids_for_whole_texts(tmp_path):
    datasets = pytest.importorskip("datasets", reason="run `pip install 'tokenmdp[datasets]'`")
    write_records(tmp_path / "pairs.jsonl", [pair(margin=0.5), pair(prompt="a", margin=1.0)])
    table = datasets.load_dataset(
        "json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table["prompt"][0] + table["chosen"][0] == "the film was great"
    assert list(table["margin"]) == [0.5, 1.0]
    # TRL's reward trainer (1.16) skips tokenizing where both are there, and reads them as prompt and response.
    assert not {"chosen_ids", "rejected_ids"} & set(table.column_names)
    assert {"prompt", "chosen", "rejected"} <= set(table.column_names)


def test_a_growing_file_goes_on_to_the_same_bytes(tmp_path):
    whole, cut = (GrowingFile(tmp_path / name / "pairs.jsonl", {"seed": 1}, 4) for name in ("whole", "cut"))
    batches = [[pair(), pair(prompt="a")], [], [pair(prompt="plot")]]
    with whole.open() as known:
        assert not known
        for number, batch in enumerate(batches):
            whole.append(batch, done=number + 1, counts={"tied": 1})
    with cut.open():
        cut.append(batches[0], done=1, counts={"tied": 1})
    with cut.path.open("a") as stream:
        stream.write('{"prompt": "half a li')
    again = GrowingFile(cut.path, {"seed": 1}, 3)
    with pytest.raises(Interrupted, match="1 of 4 groups"):
        read_preferences(cut.path, TOY)
    with again.open() as known:
        assert known
        assert (again.done, again.counts["tied"]) == (1, 1)
        for number, batch in enumerate(batches[1:], start=1):
            again.append(batch, done=number + 1, counts={"tied": 1})
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert again.counts == whole.counts == {"tied": 3}
    assert len(read_preferences(again.path, TOY)) == 3  # 3 of the 3 that were asked for last
    with pytest.raises(OtherSettings, match="seed is 1, asked 2"), GrowingFile(cut.path, {"seed": 2}, 3).open():
        pass


# --- rankings and pairs ---


def test_a_ranking_is_its_pairs_and_back():
    for ranks in sorted({*permutations((1, 2, 3, 4)), *permutations((1, 1, 3, 4)), *permutations((1, 2, 2, 4))}):
        ranking = ranked(ranks, scores=tuple(-float(rank) for rank in ranks), annotator="ann")
        pairs = ranking.comparisons()
        assert len(pairs) == 6 - sum(a == b for a, b in combinations(ranks, 2))
        assert all(one.score_chosen > one.score_rejected for one in pairs)
        back = ranking_from(pairs)
        for text, rank in zip(ranking.responses, ranks, strict=True):
            assert back.ranks[back.responses.index(text)] == rank
        assert {(one.chosen_ids, one.rejected_ids) for one in back.comparisons()} == {
            (one.chosen_ids, one.rejected_ids) for one in pairs
        }
        assert sorted(back.scores) == sorted(ranking.scores)


# --- annotators ---


@pytest.mark.parametrize("temperature", [0.5, 2.0, math.inf])
@pytest.mark.parametrize("error_rate", [0.0, 0.3])
def test_labels_are_drawn_with_the_stated_probability(temperature, error_rate):
    """Each pair of a ranking of three, against e/2 + (1 - e) sigmoid(T d), within 4.5 standard errors."""
    scores, draws = (0.0, 0.7, -0.4), 2000
    annotator = Annotator("anyone", given_ratings, temperature, error_rate)
    rng = np.random.default_rng(3)
    ranks = np.array([annotator.ranks(scores, rng) for _ in range(draws)])
    for one, other in combinations(range(3), 2):
        gap = temperature * (scores[one] - scores[other])
        expected = error_rate / 2 + (1 - error_rate) * torch.tensor(gap, dtype=torch.float64).sigmoid().item()
        assert annotator.probability(scores[one], scores[other]) == pytest.approx(expected, abs=1e-12)
        share = (ranks[:, one] < ranks[:, other]).mean()
        assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / draws)
    assert {tuple(sorted(row)) for row in ranks.tolist()} == {(1, 2, 3)}


def test_christianos_noise_and_the_ceiling():
    """P = .5 n + (1 - n) sigmoid(sum of r1 - sum of r2), n = .1."""
    annotator = Annotator("ann", given_ratings, temperature=1.0, error_rate=0.1)
    groups = [group(scores=(gap, 0.0)) for gap in np.linspace(-3, 3, 1500)]
    judged = annotator.judge(groups, seed=0)
    chances = chances_of(judged.records, annotator)
    expected = [max(p, 1 - p) for p in (0.05 + 0.9 / (1 + np.exp(-np.linspace(-3, 3, 1500))))]
    assert ceiling(chances) == pytest.approx(np.mean(expected), abs=1e-12)
    agreeing = np.mean([one.score_chosen > one.score_rejected for one in judged.records])
    assert agreeing == pytest.approx(ceiling(chances), abs=4.5 * 0.5 / math.sqrt(1500))
    assert [one.probability for one in judged.records] == pytest.approx(chances)
    assert math.isnan(ceiling([]))


def test_what_is_drawn_about_a_group_does_not_depend_on_the_others():
    annotator = Annotator("ann", given_ratings, temperature=1.0, error_rate=0.2)
    groups = [group(responses=(" great", " good", " dull"), scores=(0.3, 0.1, 0.2)) for _ in range(20)]
    whole = annotator.judge(groups, seed=5).records
    assert whole == annotator.judge(groups[:7], 5).records + annotator.judge(groups[7:], 5, first=7).records
    assert len({one.ranks for one in whole}) > 1
    assert whole != annotator.judge(groups, seed=6).records


def test_equal_scores_stay_tied_and_are_counted():
    annotator = Annotator("length", function_scores(lambda prompt, text: len(text)), temperature=1.0)
    groups = [group(responses=(" good", " dull")), group(responses=(" good", " dull", " great"))]
    judged = annotator.judge(groups, seed=1)
    assert (judged.tied, judged.pairs, len(judged.records)) == (2, 4, 1)
    ranks = judged.records[0].ranks
    assert ranks[0] == ranks[1] != ranks[2]
    assert len(pairs_of(judged.records)) == 2


def test_a_reward_model_reads_the_ids_in_batches():
    groups = [
        group(),
        group(responses=(" great and fun", " awful", " good")),
        group(prompt="a", responses=("bad", "fun")),
    ]
    expected = [(2.0, -1.0), (3.0, -3.0, 1.0), (-2.0, 1.0)]
    for size in (1, 3, 64):
        assert model_scores(toy_lexicon(), TOY, size)(groups) == expected
    with pytest.raises(VocabularyMismatch, match="the first that differs is id 0"):
        model_scores(toy_lexicon(), load_tokenizer("imdb-tiny"))


# --- sampled groups ---


def rollout_of(prompts, responses):
    episode = lay_out(prompts, responses)
    empty = torch.zeros(episode.response_mask.shape)
    return Rollout(*episode, empty, empty, empty, empty, torch.zeros(len(prompts)))


def test_groups_of_a_rollout_hold_the_ids_and_leave_out_twins():
    great, dull, ended = list(encode("great")), list(encode("dull")), [*encode("great"), TOY.eos_token_id]
    prompt, other = list(encode("the film was")), list(encode("a"))
    groups = groups_from(rollout_of([prompt] * 3 + [other] * 3, [great, ended, great, dull, dull, dull]), TOY, 3)
    assert groups[0].responses_ids == (tuple(great), tuple(ended))
    assert groups[0].responses == (" great", " great")  # the end-of-text token is no text
    assert groups[1] is None


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
    ("a number as text", ROW | {"chosen": 3}, BadPreferences, "list of messages|chat"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "kind", "message"), [pytest.param(*rest, id=name) for name, *rest in BAD_ROWS])
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, row, kind, message):
    path = lines(tmp_path / "bad.jsonl", ROW, row)
    with pytest.raises(kind, match=rf"bad\.jsonl:2\b.*{message}"):
        read_preferences(path, TOY)


def answers_of(questionnaire, *choices, digest=None, annotator="ann"):
    given = tuple(Answer(place, choice, "2026-01-31T12:00:00Z") for place, choice in enumerate(choices) if choice)
    return Answers(digest or questionnaire.digest, annotator, given)


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


# --- answers of people ---


def test_answers_join_by_sides_and_agreement_is_counted(tmp_path):
    groups = [group(prompt=prompt) for prompt in ("the film was", "a", "the plot", "it was", "so")]
    asked = Questionnaire.draw(groups, seed=4, asked_twice=5)
    assert [question.group for question in asked.questions] == [0, 1, 2, 3, 4] * 2
    assert len({question.swapped for question in asked.questions}) == 2
    assert asked == Questionnaire.draw(groups, 4, 5)
    assert asked.digest != Questionnaire.draw(groups, 5, 5).digest
    best = ["B" if question.swapped else "A" for question in asked.questions]  # always " great"
    given = [*best[:5], *best[5:7], "tie", "skip", "A" if best[9] == "B" else "B"]
    answers_of(asked, *given).save(tmp_path / "answers.json")
    ann = read_answers(tmp_path / "answers.json", asked)
    bob = answers_of(asked, "tie", best[1], annotator="bob")
    joined = join(asked, [ann, bob])
    assert {one.chosen for one in joined.comparisons} == {" great"}
    assert [(one.prompt, one.annotator) for one in joined.comparisons] == [
        ("the film was", "ann"), ("a", "ann"), ("a", "bob"), ("the plot", "ann"), ("it was", "ann"), ("so", "ann"),
    ]  # fmt: skip
    assert joined.comparisons[0].annotated_at == "2026-01-31T12:00:00Z"
    assert (joined.ties, joined.skipped) == (1, 1)
    assert str(joined.with_oneself) == "2 of 4"
    assert str(joined.with_others) == "2 of 4"
    left = {asked.shown(place)[1] for place, choice in enumerate(best) if choice == "A"}
    assert left == {" great"}


def test_repetitions_come_later_and_once():
    groups = [group(prompt=prompt) for prompt in ("a", "so") * 40]
    order = [question.group for question in Questionnaire.draw(groups, 1, 6).questions]
    assert len(order) == 86
    for place in range(80):
        places = [number for number, one in enumerate(order) if one == place]
        assert len(places) == 1 or places[1] - places[0] >= 10


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair().chosen = " bad"
