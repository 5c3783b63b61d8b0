"""The page on which a person compares pairs, used as a person does: keys, mouse, undo, reload, download."""

import json
import re

import matplotlib.image
import pytest
from chromium import BROWSER, REASON, Chromium

from tokenmdp.preferences import Group, Questionnaire, join, page, read_answers

ODD = (
    " a \"quoted\" 'film' & <b>markup</b>",
    " </script><img src=x onerror=alert(1)>",
    " \u05d0\u05d1\u05d2 \u202eoverride\u202c \u200fmark\u200e",
    " 🎬 👩\u200d👩\u200d👧 é e\u0301",
    "\n\n two  blanks\tand\u2028lines ",
    " {{template}} ${code} \\n \\u0041 %s",
)


def questionnaire(count=200, asked_twice=4):
    """Pairs of odd texts; the first response is the better one."""
    groups = [
        Group(
            prompt=f"{place} <i>I</i> said{ODD[place % 6]}",
            responses=(f"{ODD[place % 6]} good {place}", f"{ODD[(place + 1) % 6]} bad {place}"),
            prompt_ids=(place + 1,),
            responses_ids=((1, place), (2, place)),
        )
        for place in range(count)
    ]
    return Questionnaire.draw(groups, seed=3, asked_twice=asked_twice)


def test_the_page_needs_nothing_else_and_cannot_be_broken_by_a_text(tmp_path):
    asked = questionnaire()
    text = page.html(asked, tmp_path / "deep" / "page.html", title="A < B").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<link|@import|url\(", text)
    assert "innerHTML" not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text
    assert "A &lt; B" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["digest"] == asked.digest
    assert [tuple(one) for one in data["questions"]] == [asked.shown(place) for place in range(204)]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=REASON)
def test_a_person_compares_by_keys_and_mouse(tmp_path):
    asked = questionnaire()
    path = page.html(asked, tmp_path / "page.html", annotator="ann")
    shown = "['prompt', 'left', 'right'].map(id => document.getElementById(id).textContent)"
    done, note = ("document.getElementById('done').textContent", "document.getElementById('note').textContent")
    with Chromium(tmp_path) as browser:
        browser.open(path)
        assert browser.run(done) == "0 of 204 answered"
        assert browser.run("document.getElementById('undo').disabled")
        for key in ("a", "B", "t", "s"):
            browser.key(key)
        browser.key("u")  # the skip
        browser.key("ArrowLeft")
        browser.click("#b")
        browser.click("#skip")
        browser.click("#undo")
        browser.click("#tie")
        assert browser.run(done) == "6 of 204 answered"
        assert "until you download" in browser.run(note)

        browser.reload()
        assert browser.run(done) == "6 of 204 answered"
        assert browser.run(shown) == list(asked.shown(6))

        browser.click("#who")  # keys in the field are letters of a name
        browser.key("b")
        assert browser.run("document.getElementById('who').value").replace("b", "") == "ann"
        browser.key("Enter")
        assert browser.run(done) == "6 of 204 answered"

        # The other pairs: what is shown is what was written, and the better response is chosen by its text.
        texts = browser.run(
            f"(() => {{ const seen = []; for (let n = 6; n < {len(asked.questions)}; n++) {{ const now = {shown};"
            "seen.push(now); const key = now[1].includes(' good ') ? 'a' : 'b';"
            "document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true })); } return seen; })()"
        )
        assert [tuple(one) for one in texts] == [asked.shown(place) for place in range(6, 204)]
        assert browser.run("document.querySelectorAll('#pair img, #pair i, #prompt i').length") == 0
        assert browser.run(done) == "204 of 204 answered"
        assert not browser.run("document.getElementById('end').hidden")
        browser.key("a")  # nothing is open
        browser.key("d")
        answers = read_answers(browser.downloaded("answers-*.json"), asked)
        assert browser.run(note) == "Answers stay in this browser."

    assert answers.annotator.replace("b", "") == "ann"
    assert [answer.choice for answer in answers.answers[:6]] == ["A", "B", "tie", "A", "B", "tie"]
    assert [answer.question for answer in answers.answers] == list(range(204))
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", answer.at) for answer in answers.answers)
    joined = join(asked, [answers])
    later = [one for one in joined.comparisons if one.prompt_ids[0] > 6]
    assert len(later) == 194
    assert all(" good " in one.chosen for one in later)
    assert (joined.ties, joined.with_oneself.pairs) == (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=REASON)
def test_both_themes_and_a_narrow_screen(tmp_path):
    path = page.html(questionnaire(12, 0), tmp_path / "page.html")
    contrast = """(() => {
      const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const clear = element => { const colour = getComputedStyle(element).backgroundColor;
        return element === document.body || !/, 0\\)/.test(colour) ? colour : clear(element.parentElement); };
      return Math.min(...[...document.querySelectorAll("h1, p, kbd, label, button, .answer b, .written")]
        .filter(element => element.offsetParent && !element.disabled && !element.closest(":disabled")).map(element => {
          const [a, b] = [light(getComputedStyle(element).color), light(clear(element))];
          return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }));
    })()"""
    with Chromium(tmp_path) as browser:
        browser.open(path)
        for scheme, width in (("light", 1100), ("dark", 400)):
            browser.reload()  # the button's choice of a theme does not outlive the page
            browser.look(tmp_path / "look.png", scheme, width)
            pixels = matplotlib.image.imread(tmp_path / "look.png")[..., :3]
            assert pixels.mean() > 0.8 if scheme == "light" else pixels.mean() < 0.3
            assert browser.run(contrast) >= 4.5
            browser.click("#theme")
            assert browser.run(contrast) >= 4.5
            browser.click("#theme")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            side_by_side = browser.run(
                "document.getElementById('a').offsetTop == document.getElementById('b').offsetTop"
            )
            assert side_by_side == (width == 1100)
