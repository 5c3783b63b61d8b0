"""The page that compares credit methods: its numbers, and how a real browser shows it."""

import html as markup
import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from tokenmdp.report.comparison import COLUMNS, Comparison, MethodRow, html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DARK, LIGHT = 0, 1  # Chromium's preferredColorScheme
FACTS = ("sums to the score", "causal", "cost 1 + 1 policy")

# Runs inside the page, after its own script, and leaves what it found in an attribute.
PROBE = """
<script>{
const rgba = text => text.match(/[\\d.]+/g).map(Number);
const over = (top, under) => top.slice(0, 3).map((c, i) => c * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
const light = colour => colour.map(c => c / 255).map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const contrast = element => {
  const page = rgba(getComputedStyle(document.body).backgroundColor), style = getComputedStyle(element);
  const [a, b] = [over(rgba(style.backgroundColor), page), rgba(style.color)].map(light);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
};
const lowest = () => Math.min(...[...document.querySelectorAll("td, th, p, small, h2, button")].map(contrast));
const cells = [...document.querySelectorAll("td")];
const key = (cell, name) => cell.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const background = cell => rgba(getComputedStyle(cell).backgroundColor);
const facts = { cells: cells.length, painted: cells.filter(cell => background(cell)[3] !== 0).length,
  tabStops: document.querySelectorAll('td[tabindex="0"]').length,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  contrast: lowest(), width: document.documentElement.clientWidth,
  scroll: document.documentElement.scrollWidth,
  inner: Math.max(...[...document.querySelectorAll(".scroll")].map(box => box.scrollWidth - box.clientWidth)) };
const tip = document.getElementById("tip");
const strength = cell => background(cell)[3] ?? 1;
cells[0].focus();
facts.focused = tip.hidden ? null : tip.textContent;
key(cells[0], "ArrowRight");
facts.right = tip.textContent;
key(document.activeElement, "ArrowDown");
facts.down = tip.textContent;
key(document.activeElement, "ArrowLeft");
key(document.activeElement, "ArrowLeft");
facts.name = tip.textContent;
const box = tip.getBoundingClientRect();
facts.inside = box.left >= 0 && box.right <= innerWidth && box.top >= 0;
key(document.activeElement, "Escape");
facts.escaped = tip.hidden;
facts.own = strength(cells[16]);
document.getElementById("scale").click();
facts.common = strength(cells[16]);
facts.note = document.getElementById("scale-note").textContent;
document.getElementById("theme").click();
facts.otherContrast = lowest();
document.getElementById("theme").click();
document.getElementById("scale").click();
document.activeElement.blur();
document.body.dataset.facts = JSON.stringify(facts);
}</script></body>"""


def page(path, tokens=24):
    """Two methods over a text that needs two grids, with a strong and a weak row; a blank, markup and a long token."""
    pieces = [" good", " <b>not</b>", "\n", " unbelievably-extraordinarily-long-winded"]
    pieces += [" film"] * (tokens - len(pieces))
    waves = np.sin(np.arange(tokens))
    rows = [
        MethodRow("strong", (4 * waves).tolist(), FACTS),
        MethodRow("weak", (0.1 * np.cos(np.arange(tokens))).tolist()),
    ]
    texts = [Comparison("It was", pieces, 2.5, rows, "first", {"rto": "no policy"}),
             Comparison("", [" bad"], -1.0, [MethodRow("strong", [-1.0]), MethodRow("weak", [0.0])])]  # fmt: skip
    return html(texts, path, title="T & t", note="a note")


def test_the_page_needs_nothing_else_and_says_every_number(tmp_path):
    text = page(tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<link|src=|@import|url\(", text)
    assert "&lt;b&gt;not&lt;/b&gt;" in text
    assert "<b>not</b>" not in text
    labels = [markup.unescape(label) for label in re.findall(r'<td[^>]*aria-label="([^"]*)"', text)]
    assert len(labels) == 2 * 24 + 2
    assert "strong, “<b>not</b>”: +3.3659, 134.6% of the score" in labels
    assert "weak, “bad”: +0.0000, 0.0% of the score" in labels or "weak, “bad”: +0.0000, -0.0% of the score" in labels
    assert "rto: not available: no policy" in text
    assert text.count("<table") == 24 // COLUMNS + 1 + 1
    assert "prefers-color-scheme: dark" in text
    assert "T &amp; t" in text


def test_scales_are_per_row_and_common(tmp_path):
    text = page(tmp_path / "page.html").read_text(encoding="utf-8")
    cells = re.findall(r'style="--own:([\d.]+);--common:([\d.]+)" aria-label="(\w+), ', text)[: 2 * COLUMNS]
    strong, weak = ([(float(own), float(common)) for own, common, name in cells if name == which]
                    for which in ("strong", "weak"))  # fmt: skip
    assert all(own == common for own, common in strong)
    assert max(own for own, _ in strong) == pytest.approx(1, abs=0.001)
    assert max(own for own, _ in weak) == pytest.approx(1, abs=0.01)
    assert max(common for _, common in weak) < 0.03


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="red has 1 credits for 2 tokens"):
        html([Comparison("", ["a", "b"], 1.0, [MethodRow("red", [1.0])])], tmp_path / "page.html")
    with pytest.raises(ValueError, match="no texts"):
        html([], tmp_path / "page.html")


def browse(tmp_path, scheme, width):
    """The page in a frame of ``width`` pixels: what the probe found, and the pixels of a screenshot."""
    whole = page(tmp_path / "page.html").read_text(encoding="utf-8").replace("</body>", PROBE)
    collect = "document.body.dataset.facts = frame.contentDocument.body.dataset.facts"  # a window has at least 500
    (tmp_path / "frame.html").write_text(
        f'<!doctype html><body style="margin:0"><iframe id="frame" style="border:0;width:{width}px;height:900px" '
        f'onload="{collect}" srcdoc="{markup.escape(whole)}"></iframe></body>', encoding="utf-8",
    )  # fmt: skip
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    options += [f"--window-size={max(width, 500)},900", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom"]
    command = [BROWSER, *options, (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found = re.search(r'<body[^>]*data-facts="([^"]*)"', done.stdout)
    assert found, f"the page's script failed: {done.stderr[-2000:]}"
    pixels = matplotlib.image.imread(tmp_path / "page.png")[:, :width, :3]
    return json.loads(markup.unescape(found[1])), pixels


def hues(pixels):
    """Shares of clearly orange and clearly blue pixels."""
    red, _, blue = np.moveaxis(pixels, -1, 0)
    return (red - blue > 0.35).mean(), (blue - red > 0.35).mean()


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path, so no page can be looked at")
@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(tmp_path, scheme, width):
    facts, pixels = browse(tmp_path, scheme, width)
    assert facts["dark"] == (scheme == DARK)
    assert facts["cells"] == 2 * 24 + 2
    assert facts["painted"] == facts["cells"] - 3  # those that show 0
    assert facts["tabStops"] == 3  # one per grid; the arrow keys do the rest
    assert facts["scroll"] <= facts["width"] == width  # the body does not scroll sideways
    assert (facts["inner"] > 0) == (width == 400)  # the grids do, where they must
    assert facts["contrast"] >= 4.5
    assert facts["otherContrast"] >= 4.5
    assert facts["focused"].startswith("strong, “good”: +0.0000")
    assert facts["right"].startswith("strong, “<b>not</b>”: +3.3659")
    assert facts["down"].startswith("weak, “<b>not</b>”: +0.0540")
    assert facts["name"] == "weak"
    assert facts["inside"]
    assert facts["escaped"]
    assert facts["own"] > 0.9  # a cell of the weak row
    assert facts["common"] < 0.05
    assert "all methods" in facts["note"]
    assert pixels.std() > 0.05
    assert pixels.mean() < 0.4 if scheme == DARK else pixels.mean() > 0.6
    orange, blue = hues(pixels)
    assert orange > 0.002
    assert blue > 0.002
