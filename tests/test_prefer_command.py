"""`tokenmdp prefer`: a model or a person compares, an interruption costs nothing, and ids survive."""

import json
import re

import pytest

from tokenmdp import cli
from tokenmdp.models.loading import load_tokenizer
from tokenmdp.preferences import Answer, Answers, Ranking, read_groups, read_preferences, read_records
from tokenmdp.preferences.people import Questionnaire
from tokenmdp.runs import comparisons
from tokenmdp.runs.environments import toy_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A random policy of the toy tokenizer, and a file of prompts."""
    folder = tmp_path_factory.mktemp("policy")
    toy_policy(0).save_pretrained(folder)
    load_tokenizer("toy").save_pretrained(folder)
    (folder / "prompts.txt").write_text("the film was\nthis movie is so\nthe plot\na very\n")
    return folder


@pytest.fixture
def run(policy, capsys):
    """Runs the command with the toy policy; returns its exit status and what it printed."""

    def call(out, *more, **options):
        given = {"policy": policy, "judge": "toy-lexicon", "prompts": policy / "prompts.txt", "pairs": 70,
                 "max_new_tokens": 5, "device": "cpu", "out": out} | options  # fmt: skip
        flags = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        capsys.readouterr()
        status = cli.main(["prefer", *flags, *more])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def test_a_model_compares_and_an_interruption_costs_nothing(run, tmp_path, monkeypatch):
    status, printed = run(tmp_path / "whole.jsonl")
    assert status == 0
    whole = read_records(tmp_path / "whole.jsonl")
    tied, pairs = map(int, re.search(r"(\d+) of (\d+) pairs tied and dropped", printed).groups())
    assert len(whole) == pairs - tied
    assert tied > 0
    gaps = [abs(one.score_chosen - one.score_rejected) for one in whole]
    expected = [max(one.probability, 1 - one.probability) for one in whole]
    assert min(gaps) > 0
    assert f"ceiling: {sum(expected) / len(expected):.3f}" in printed
    assert {one.annotator for one in whole} == {"toy-lexicon"}

    def stop(*arguments, batch, **options):
        if batch == 1:
            raise KeyboardInterrupt
        return sample(*arguments, batch=batch, **options)

    sample = comparisons.sample_groups
    monkeypatch.setattr(comparisons, "sample_groups", stop)
    status, printed = run(tmp_path / "cut.jsonl")
    assert status == 130
    assert "run the same command to go on" in printed
    kept = (tmp_path / "cut.jsonl").read_bytes()
    assert kept.endswith(b"\n")
    assert (tmp_path / "whole.jsonl").read_bytes().startswith(kept)
    monkeypatch.undo()
    (tmp_path / "cut.jsonl").write_bytes(kept + b'{"prompt": "kil')  # as after kill -9
    status, printed = run(tmp_path / "cut.jsonl")
    assert status == 0
    assert "has 32 of 70" in printed
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    short = tmp_path / "short.jsonl"
    assert run(short, pairs=11)[0] == 0
    assert run(short, pairs=70)[0] == 0  # a whole file may be made longer
    assert short.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    status, printed = run(short, error_rate=0.1)
    assert status == 2
    assert "error_rate is 0.0, asked 0.1" in printed
    assert "choose another --out" in printed


def test_more_responses_make_rankings(run, tmp_path):
    assert run(tmp_path / "ranked.jsonl", responses=4, temperature="inf", pairs=20)[0] == 0
    records = read_records(tmp_path / "ranked.jsonl")
    assert all(isinstance(one, Ranking) for one in records)
    assert all(one.score_chosen > one.score_rejected for ranking in records for one in ranking.comparisons())
    assert max(len(one.responses) for one in records) == 4


def test_a_page_is_written_and_its_answers_join(run, tmp_path):
    out = tmp_path / "people.jsonl"
    status, printed = run(out, judge="page", pairs=12, ask_twice=3, annotator="ann")
    assert status == 0
    assert f"tokenmdp prefer --labels FILE --out {out}" in printed
    groups = read_groups(tmp_path / "people.groups.jsonl")
    asked = Questionnaire.draw(groups, 1, 3)
    assert f'"digest": "{asked.digest}"' in (tmp_path / "people.html").read_text()
    given = [Answer(place, "A", "2026-01-31T12:00:00Z") for place in range(len(asked.questions))]
    for who, digest in (("ann", asked.digest), ("wrong", "0" * 16)):
        Answers(digest, who, tuple(given)).save(tmp_path / f"{who}.json")
    status, printed = run(out, "--labels", str(tmp_path / "ann.json"))
    assert status == 0
    assert f"0 of {len(groups)} answered pairs tied" in printed
    assert re.search(r"asked twice, the same person agreed on \d of 3 pairs", printed)
    records = read_records(out)
    assert {(one.annotator, one.annotated_at) for one in records} == {("ann", "2026-01-31T12:00:00Z")}
    first = {question.group: place for place, question in reversed(list(enumerate(asked.questions)))}
    assert [one.chosen for one in records] == [asked.shown(first[group])[1] for group in range(len(groups))]
    for options, message in ((["--labels", str(tmp_path / "wrong.json")], "answers other pairs"),):
        status, printed = run(out, *options)
        assert status == 2
        assert message in printed
    status, printed = run(tmp_path / "elsewhere.jsonl", "--labels", str(tmp_path / "ann.json"))
    assert status == 2
    assert "pass the --out of the command that wrote the page" in printed


def test_a_person_compares_in_the_terminal_and_goes_on_later(run, tmp_path, monkeypatch):
    out, keys = tmp_path / "people.jsonl", iter(["a", "b", "t", "u", "x", "s", "q"])
    monkeypatch.setattr("builtins.input", lambda *_: next(keys))
    options = {"judge": "terminal", "pairs": 6, "annotator": "ann"}
    status, printed = run(out, **options)
    assert status == 0
    assert "1 of " in printed
    kept = json.loads((tmp_path / "people.answers.json").read_text())
    assert [one["choice"] for one in kept["answers"]] == ["A", "B", "skip"]
    assert len(read_records(out)) == 2
    rest = len(read_groups(tmp_path / "people.groups.jsonl")) - 3
    keys = iter([*"a" * rest, ""])
    status, printed = run(out, **options)
    assert status == 0
    assert len(read_records(out)) == 2 + rest
    assert "1 skipped" in printed
    status, printed = run(out, **options | {"annotator": "bob"})
    assert status == 2
    assert "the answers of 'ann', not of 'bob'" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "pairs.json"}, "ends in .jsonl"),
        ({"pairs": 0}, "--pairs is 0; it must be at least 1"),
        ({"judge": "page", "responses": 3}, "compares two responses"),
        ({"judge": "imdb-gold"}, "the first that differs is id 0"),  # a model of another vocabulary
        ({"error_rate": 1.5}, "error_rate is 1.5"),
        ({"temperature": 0}, "temperature is 0.0"),
        ({"prompts": "nothing.txt"}, "no file"),
    ],
)
def test_what_cannot_be_is_refused(run, tmp_path, options, message):
    status, printed = run(**{"out": tmp_path / "pairs.jsonl"} | options)
    assert status == 2
    assert message in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ids_of_the_bundled_policy_survive(tmp_path, monkeypatch, capsys):
    sampled = []

    def recorded(*arguments, **options):
        groups = sample(*arguments, **options)
        sampled.extend(groups)
        return groups

    sample, out = comparisons.sample_groups, tmp_path / "pairs.jsonl"
    monkeypatch.setattr(comparisons, "sample_groups", recorded)
    assert cli.main(["prefer", "--pairs", "128", "--error-rate", "0.2", "--device", "cpu", "--out", str(out)]) == 0
    tokenizer = load_tokenizer("imdb-tiny")
    records = read_preferences(out, tokenizer)  # checks every text against its ids
    assert records == read_records(out)
    written = [{(one.prompt_ids, ids) for ids in (one.chosen_ids, one.rejected_ids)} for one in records]
    assert written == [{(one.prompt_ids, ids) for ids in one.responses_ids} for one in sampled]
    changed = sum(
        tuple(tokenizer.encode(text, add_special_tokens=False)) != ids
        for one in records
        for text, ids in ((one.chosen, one.chosen_ids), (one.rejected, one.rejected_ids))
    )
    assert changed > 0  # which is why the file has ids
