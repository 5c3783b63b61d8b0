"""README's picture from run directories made by hand."""

import json

import pytest
import readme_picture

TEXTS = [
    {"prompt": "A film", "tokens": [" of", " rare", " wit", "."], "credits": [0.0, 1.0, 2.0, -0.5], "score": 2.5},
    {"prompt": "", "tokens": ["$x$", "\n", "&<"], "credits": [-1.0, 0.0, 0.0], "score": -1.0},
]


@pytest.fixture
def make_run(tmp_path):
    def make(credit, seed, updates=12, **settings):
        run = tmp_path / f"{credit}-{seed}"
        run.mkdir()
        record = {"credit": credit, "credit_beta": 0.8, "seed": seed, "config": {}, **settings}
        (run / "run.json").write_text(json.dumps({"format": "tokenmdp-run", "settings": record}))
        metrics = [{"update": place + 1, "score_mean": place + seed, "kl": place / 2} for place in range(updates)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        evaluation = {"scores": [2.5, -1.0], "kls": [0.1, 0.2], "lengths": [4, 3], "samples": TEXTS}
        (run / "after.json").write_text(json.dumps(evaluation))
        return run

    return make


def test_picture_of_several_credits_and_seeds(make_run, tmp_path):
    runs = [make_run(credit, seed) for credit in ("attention", "red") for seed in (1, 2)]
    picture = tmp_path / "figures" / "readme.png"
    readme_picture.main([*map(str, runs), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    grouped = readme_picture.read_runs(runs)
    assert {credit: len(records) for credit, records in grouped.items()} == {"attention": 2, "red": 2}
    assert "2 runs per credit, band: 95% t interval" in readme_picture.caption(grouped, window=2)


def test_runs_that_do_not_belong_in_one_panel_are_refused(make_run, tmp_path):
    run = make_run("red", 1)
    with pytest.raises(ValueError, match="both red credit with seed 1; name one"):
        readme_picture.read_runs([run, run])
    for other in (make_run("red", 2, config={"kl_coef": 0.5}), make_run("sparse", 2, config={"kl_coef": 0.5})):
        with pytest.raises(ValueError, match="differ in config; draw them apart"):
            readme_picture.read_runs([run, other])
    with pytest.raises(ValueError, match="differ in credit_beta"):
        readme_picture.read_runs([run, make_run("red", 3, credit_beta=0.5)])


def test_texts_that_do_not_fit_are_refused(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(TEXTS[0], "tokens", [f" token{place}" for place in range(200)])
    monkeypatch.setitem(TEXTS[0], "credits", [1.0] * 200)
    with pytest.raises(ValueError, match="do not fit; choose a smaller --num-texts"):
        readme_picture.main([str(make_run("red", 1)), "--out", str(tmp_path / "readme.png")])
