"""Comparisons and rankings: ids exactly, files of this library, annotators in closed form, people's answers."""

import dataclasses
import json
import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from preference_doubles import TOY, answers_of, encode, group, pair, ranked, rollout_of

from tokenmdp.models.loading import load_tokenizer
from tokenmdp.models.tokens import VocabularyMismatch
from tokenmdp.preferences import (
    Annotator,
    GrowingFile,
    Interrupted,
    MissingColumns,
    OtherSettings,
    Questionnaire,
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


def test_groups_of_a_rollout_hold_the_ids_and_leave_out_twins():
    great, dull, ended = list(encode("great")), list(encode("dull")), [*encode("great"), TOY.eos_token_id]
    prompt, other = list(encode("the film was")), list(encode("a"))
    groups = groups_from(rollout_of([prompt] * 3 + [other] * 3, [great, ended, great, dull, dull, dull]), TOY, 3)
    assert groups[0].responses_ids == (tuple(great), tuple(ended))
    assert groups[0].responses == (" great", " great")  # the end-of-text token is no text
    assert groups[1] is None


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
