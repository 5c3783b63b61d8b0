"""The report of a study: what the page holds and leaves out, its figures, and how a real browser shows it."""

import html as markup
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.image
import pytest
from study_doubles import figures_not_drawn, paper_like, quality_record, synthetic_study

from tokenmdp.study.directory import load_study
from tokenmdp.study.outcomes import by_setting
from tokenmdp.study.report.page import write_report
from tokenmdp.study.report.parts import Section, main_grids, typeset
from tokenmdp.study.report.protocol import protocol, shared_settings
from tokenmdp.study.report.quality import correlations
from tokenmdp.study.tables import METHOD_HEADINGS, method_table, method_texts
from tokenmdp.study.tuning import rates_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DARK, LIGHT = 0, 1  # Chromium's preferredColorScheme
FIGURES = ("curves", "beta", "length", "kl", "critic", "gold", "quality", "diversity", "diagnostics")
VOID = {"meta", "br", "use", "path", "rect"}


class Outline(HTMLParser):
    """Identifiers, references and text of a page; fails where an element is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.targets, self.words = [], [], [], []
        self.unfilled = []  # texts of figures without a colour of their own
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "text" and "fill:" not in given.get("style", ""):
            self.unfilled.append(given)
        self.ids += [given["id"]] if "id" in given else []
        self.targets += [value[1:] for key, value in attributes if key in ("href", "xlink:href")]
        self.targets += re.findall(r"url\(#([^)]*)\)", " ".join(str(value) for value in given.values()))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A study of every grid, with its report."""
    path = synthetic_study(tmp_path_factory.mktemp("study"), seeds=3, updates=30)
    study = load_study(path)
    write_report(study, path / "report")
    return study


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """A study of one small grid with a crash and a gap, with its report."""

    def without_gold(result):
        kept = {key: column for key, column in result.evaluations.items() if key != "gold"}
        return replace(result, evaluations=kept)

    path = synthetic_study(
        tmp_path_factory.mktemp("partial"), grids=("quick",), seeds=2, updates=8, quality=(), change=without_gold,
        keep=lambda cell: (cell.method, cell.seed) != ("uniform", 2),
        crashed=lambda cell: (cell.method, cell.seed) == ("red", 1),
    )  # fmt: skip
    study = load_study(path)
    with figures_not_drawn():
        write_report(study, path / "report")
    return study


@pytest.fixture(scope="module")
def page(full):
    return (full.path / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page)


def test_the_page_needs_nothing_else(page, outline):
    assert not re.search(r"https?:|<link|\bsrc=|@import|url\((?!#)", page)
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.targets) <= set(outline.ids)
    assert not outline.unfilled  # their black would not be seen on the dark page
    assert "prefers-color-scheme: dark" in page
    assert "I saw &lt;b&gt;it&lt;/b&gt; &amp;" in page
    assert len(page) < 3_000_000


def test_the_navigation_names_every_section(page, outline):
    links = re.findall(r'<a href="#(\w+)">(.*?)</a>', page)
    assert links == re.findall(r'<section id="(\w+)"><h2>(.*?)</h2>', page)
    assert {id for id, _ in links} == {*FIGURES, "samples", "unfinished", "how"}


def test_every_section_has_its_figure_as_png_and_svg(full, outline):
    figures = full.path / "report" / "figures"
    names = {file.stem for file in figures.iterdir()}
    assert {name.split("-")[0] for name in names} == set(FIGURES)
    assert len(names) == len(FIGURES) + 1  # critics have two
    for name in names:
        pixels = matplotlib.image.imread(figures / f"{name}.png")
        assert pixels[..., :3].std() > 0.02
        svg = (figures / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.startswith("<?xml")
        assert "<text" in svg
    assert "Not in this study" not in " ".join(outline.words)


def test_the_numbers_are_those_of_the_tables(full, page, outline):
    numbers = re.findall(r"<td>(.*?)</td>", page)
    for row in method_table(full, "imdb"):
        texts = method_texts(row)
        assert len(texts) == len(METHOD_HEADINGS)
        assert typeset(texts[3]).replace(" [", "<small>[") + "</small>" in numbers
    tables = (full.path / "report" / "tables.md").read_text()
    assert all(f"## {grid}\n" in tables for grid in full.grids)


def test_what_is_not_there_is_left_out_and_said(partial):
    text = (partial.path / "report" / "index.html").read_text(encoding="utf-8")
    words = " ".join(Outline(text).words)
    assert text.count("Not in this study") == 6  # beta, length, kl, critic, gold, quality
    assert "needs several lengths: --lengths" in words
    assert "MemoryError: 8.0 GiB for the <logits>" in words
    assert "uniform: seed 2" in words
    assert "The search for learning rates" not in words
    drawn = {file.name for file in (partial.path / "report" / "figures").iterdir()}
    assert drawn == {
        f"{name}-quick.{kind}" for name in ("curves", "diversity", "diagnostics") for kind in ("png", "svg")
    }


def test_a_study_of_the_readers_own_meets_no_paper(partial):
    text = (partial.path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<h1>Credit methods compared</h1>" in text
    assert "in different ways: sparse, uniform, ABC, RED." in text
    assert not re.search("claim|reproduced|Chan et al", text)


@figures_not_drawn()
def test_sections_and_words_of_the_readers_own_come_first(partial, tmp_path):
    mine = Section("mine", "A < B", html="<p>my table</p>", markdown="| mine |\n")
    text = write_report(partial, tmp_path, title="C & D", intro="<p>Why.</p>", first=[mine]).read_text(encoding="utf-8")
    assert "<h1>C &amp; D</h1>" in text
    assert "<p>Why.</p>" in text
    assert '<main><section id="mine"><h2>A &lt; B</h2><p>my table</p></section><section id="curves">' in text
    assert "## A < B\n\n| mine |\n" in (tmp_path / "tables.md").read_text(encoding="utf-8")


def test_the_same_study_gives_the_same_bytes_and_stale_figures_go(partial, tmp_path):
    stale = tmp_path / "second" / "figures" / "kl.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    pages = [write_report(partial, tmp_path / "first"), write_report(partial, tmp_path / "second")]
    files = [{file.relative_to(page.parent): file.read_bytes() for file in page.parent.rglob("*.*")} for page in pages]
    assert files[0] == files[1]
    assert not stale.exists()


def moved(study, folder):
    """The same study, with every model in a directory of this machine."""

    def move(cell):
        there = replace(cell.settings, reward_model=f"{folder}/{cell.settings.reward_model}", policy=f"{folder}/mine")
        return replace(cell, settings=there, gold=f"{folder}/{cell.gold}")

    ids = {id: move(cell).id for id, cell in study.cells.items()}
    return replace(
        study,
        grids={grid: [ids[id] for id in held] for grid, held in study.grids.items()},
        cells={ids[id]: move(cell) for id, cell in study.cells.items()},
        results={ids[id]: replace(result, cell=move(result.cell)) for id, result in study.results.items()},
        errors={ids[id]: f"OSError: no file named {folder}/imdb-tiny/model.safetensors" for id in study.errors},
        labels={grid: {ids[id]: label for id, label in held.items()} for grid, held in study.labels.items()},
        commands={grid: [f"tokenmdp ablate --gold {folder}/imdb-gold"] for grid in study.grids},
        quality={f"{folder}/{model}": quality_record(f"{folder}/{model}") for model in ("imdb-tiny", "imdb-plain")},
    )


def test_no_directory_of_this_machine_is_in_any_file(tmp_path):
    folder = "/home/someone/models"
    path = synthetic_study(
        tmp_path / "study", grids=("faithful", "quick"), seeds=1, updates=4, quality=(),
        crashed=lambda cell: cell.method == "uniform",
    )  # fmt: skip
    study = moved(load_study(path), folder)
    write_report(study, tmp_path / "report")
    files = [file for file in (tmp_path / "report").rglob("*.*") if file.is_file()]
    assert {file.stem.partition("-")[0] for file in files} >= {"index", "tables", "quality", "gold"}
    for file in files:
        assert "someone" not in file.name
        assert b"someone" not in file.read_bytes(), file.name
    words = " ".join(Outline((tmp_path / "report" / "index.html").read_text(encoding="utf-8")).words)
    assert "no file named model.safetensors" in words
    assert "second reward model: imdb-gold" in words
    assert "tokenmdp ablate --gold imdb-gold" in words


@figures_not_drawn()
def test_runs_that_broke_are_named_below_the_curves(tmp_path):
    def course(cell):
        return replace(paper_like(cell), collapse=0.5 if (cell.method, cell.seed) == ("sparse", 2) else 2.0)

    path = synthetic_study(tmp_path, grids=("quick",), seeds=3, updates=40, course=course, quality=())
    text = write_report(load_study(path), tmp_path / "report").read_text(encoding="utf-8")
    assert "Crosses: runs that lost more than half of what they had gained (1 of 3 of sparse&#x27;s)." in text


@figures_not_drawn()
def test_a_notice_stands_above_everything_and_is_no_markup(partial, tmp_path):
    study = replace(partial, notice="First <b>line</b> &\nsecond.\n \nA paragraph.")
    page = write_report(study, tmp_path).read_text(encoding="utf-8")
    first, second = "First &lt;b&gt;line&lt;/b&gt; &amp; second.", "A paragraph."
    shown = f'<body><aside class="notice"><p>{first}</p><p>{second}</p></aside><header><h1>'
    without = (partial.path / "report" / "index.html").read_text(encoding="utf-8")
    assert page == without.replace("<body><header><h1>", shown)
    assert page != without
    tables, before = ((path / "tables.md").read_text() for path in (tmp_path, partial.path / "report"))
    assert tables == before.replace("# Study\n", f"# Study\n\n> {first}\n\n> {second}\n", 1)


def test_the_page_shows_versions_settings_rates_and_the_search_for_them(partial, tmp_path):
    entries = [{"method": "sparse", "learning_rate": rate, "setting": "8-16 tokens", "areas": {"101": mean},
                "mean": mean, "crashed": [102] * (rate == 3e-4), "not_run": []}
               for rate, mean in ((1e-4, 2.25), (3e-4, 3.5))]  # fmt: skip
    found = {"learning_rates": {"sparse": 1e-4}, "at_the_edge_of_the_search": ["sparse"], "search": entries,
             "limited_by_kl": ["sparse"], "with_other_bounds": {"18.7": {}, "25": {"sparse": 3e-4}}}  # fmt: skip
    (tmp_path / "learning_rates.json").write_text(json.dumps(found))
    cells = {id: replace(cell, settings=replace(cell.settings, config=cell.settings.config | {"learning_rate": 5e-4}))
             if cell.method == "red" else cell for id, cell in partial.cells.items()}  # fmt: skip
    study = replace(partial, path=tmp_path, version="7.8.9", packages={"torch": "6.5.4"}, cells=cells)
    assert rates_of(study.declared("quick")) == {1e-4: ["sparse", "uniform", "attention"], 5e-4: ["red"]}
    text = protocol(study)
    words = " ".join(Outline(text).words)
    assert "tokenmdp 7.8.9" in words
    assert "torch 6.5.4" in words
    assert "<b>0.0001</b> sparse, uniform, ABC; <b>0.0005</b> RED" in text
    assert "<td><b>2.25</b></td><td>3.50<small>1 crashed</small></td>" in text
    assert "may be better: sparse (0.0001)" in words
    assert "a better mean score: sparse (0.0001)" in words
    assert "A bound of 25 nats would choose otherwise for sparse (0.0003)" in words
    assert "kl_target: 6" in words
    assert "Not the same in all runs: credit, credit_beta, learning_rate, seed" in words


def test_credit_quality_goes_by_what_a_method_is_not_by_its_label(full):
    groups = {"mine": by_setting(full, "imdb")["8-16 tokens"]["attention"]}
    assert correlations(full, "imdb-tiny", groups)["mine"][0] == pytest.approx(0.57)
    assert correlations(full, "other", groups) == {}


def test_shared_settings_leave_out_what_varies(full):
    shared = shared_settings(full.declared("kl"))
    assert shared["reward_model"] == "imdb-tiny"
    assert shared["learning_rate"] == 1e-4
    assert shared["kl_target"] is None
    assert not shared.keys() & {"seed", "credit", "ppo", "kl_coef"}


PROBE = """
<script>{
const rgba = text => text.match(/[\\d.]+/g).map(Number);
const light = colour => colour.slice(0, 3).map(c => c / 255)
  .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const contrast = (element, key) => {
  const [a, b] = [getComputedStyle(document.body).backgroundColor, getComputedStyle(element)[key]].map(rgba).map(light);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
};
const lowest = (query, key) => Math.min(...[...document.querySelectorAll(query)].map(e => contrast(e, key)));
const both = () => [lowest("p, td, th, small, h2, summary, figcaption, a, button, .verdict", "color"),
                    lowest("figure svg text", "fill")];
const facts = { dark: matchMedia("(prefers-color-scheme: dark)").matches, contrast: both(),
  width: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth,
  figures: [...document.querySelectorAll("figure svg")].filter(svg => svg.getBoundingClientRect().height > 100).length,
  inner: Math.max(...[...document.querySelectorAll(".scroll")].map(box => box.scrollWidth - box.clientWidth)) };
document.getElementById("theme").click();
facts.other = both();
document.getElementById("theme").click();
document.body.dataset.facts = JSON.stringify(facts);
}</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path, so no page can be looked at")
@pytest.mark.parametrize(("scheme", "width"), [(LIGHT, 1280), (DARK, 400)], ids=["light", "dark and narrow"])
def test_a_browser_shows_it(page, tmp_path, scheme, width):
    collect = "document.body.dataset.facts = frame.contentDocument.body.dataset.facts"  # a window has at least 500
    whole = page.replace("</body>", PROBE)
    (tmp_path / "frame.html").write_text(
        f'<!doctype html><body style="margin:0"><iframe id="frame" style="border:0;width:{width}px;height:900px" '
        f'onload="{collect}" srcdoc="{markup.escape(whole)}"></iframe></body>', encoding="utf-8",
    )  # fmt: skip
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    options += [f"--window-size={max(width, 500)},900", "--dump-dom"]
    command = [BROWSER, *options, (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<body[^>]*data-facts="([^"]*)"', done.stdout)
    assert found, f"the page's script failed: {done.stderr[-2000:]}"
    facts = json.loads(markup.unescape(found[1]))
    assert facts["dark"] == (scheme == DARK)
    assert facts["figures"] == len(FIGURES) + 1
    assert facts["scroll"] <= facts["width"] == width  # the body does not scroll sideways
    assert (facts["inner"] > 0) == (width == 400)  # figures and tables do, where they must
    assert min(facts["contrast"] + facts["other"]) >= 4.5


def test_the_main_grid_compares_methods_at_one_setting(full):
    assert main_grids(full) == ["imdb"]
    assert main_grids(replace(full, grids={"length": full.grids["length"], "tune": full.grids["imdb"]})) == ["length"]
