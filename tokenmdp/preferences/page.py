"""One self-contained HTML page on which a person compares pairs; nothing is loaded and nothing is sent."""

from __future__ import annotations

import html as markup
import json
from pathlib import Path

from tokenmdp.files import write_text
from tokenmdp.preferences.people import FORMAT, Questionnaire
from tokenmdp.report.page import SCRIPT, STYLE

PAGE_STYLE = """
:root { --accent: #2f6fdb; --card: #ffffff; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --accent: #7aa8ff; --card: #1f2125; } }
:root[data-theme=dark] { --accent: #7aa8ff; --card: #1f2125; }
body { max-width: 64rem; min-height: 100vh; display: flex; flex-direction: column; }
main { display: block; margin-top: 1rem; flex: 1; }
label { font-size: .85rem; color: var(--faint); }
input { font: inherit; font-size: .85rem; width: 10rem; padding: .1rem .5rem; color: inherit; background: var(--card);
        border: 1px solid var(--line); border-radius: .4rem; }
.tools { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
.track { height: .4rem; margin: .9rem 0 .3rem; border-radius: .2rem; background: var(--line); overflow: hidden; }
.track div { height: 100%; width: 0; background: var(--accent); transition: width .15s; }
.written { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
#prompt { margin: 1rem 0; padding: .2rem 0 .2rem .9rem; border-left: 3px solid var(--line); color: var(--faint); }
#pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.answer { display: flex; flex-direction: column; text-align: left; font-size: 1rem; line-height: 1.6; padding: 1rem;
          min-height: 9rem; background: var(--card); border: 1px solid var(--line); border-radius: .7rem; }
.answer b { display: block; color: var(--accent); margin-bottom: .3rem; }
.answer:hover, .answer:focus-visible { border-color: var(--accent); outline: 2px solid var(--accent); }
#others { display: flex; flex-wrap: wrap; justify-content: center; gap: .6rem; margin: 1.2rem 0; }
#others button, #save { padding: .3rem 1rem; font-size: .95rem; }
kbd { font: inherit; font-size: .8em; color: var(--faint); border: 1px solid var(--line); border-radius: .25rem;
      padding: 0 .35em; margin-left: .35em; }
#save { border-color: var(--accent); color: var(--accent); }
#end { text-align: center; margin: 4rem 0 1rem; font-size: 1.2rem; }
[hidden] { display: none !important; }
@media (max-width: 40rem) { #pair { grid-template-columns: 1fr; } .answer { min-height: 5rem; }
       body { padding: 1rem; } header { flex-wrap: wrap; } }
"""

PAGE_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id), total = data.questions.length, key = "tokenmdp-" + data.digest;
let answers = [], saved = true, kept = true;
const who = get("who");
who.value = data.annotator;
try {
  const before = JSON.parse(localStorage.getItem(key));
  if (before) { answers = before.answers; who.value = before.annotator; saved = before.saved; }
} catch { kept = false; }
function keep() {
  try { localStorage.setItem(key, JSON.stringify({ answers, annotator: who.value, saved })); kept = true; }
  catch { kept = false; }
}
function show() {
  const answered = new Set(answers.map(answer => answer.question));
  let place = 0;
  while (answered.has(place)) place += 1;
  const open = place < total;
  for (const id of ["pair", "prompt"]) get(id).hidden = !open;
  for (const id of ["tie", "skip"]) get(id).disabled = !open;
  get("end").hidden = open;
  get("undo").disabled = !answers.length;
  if (open) {
    const [prompt, left, right] = data.questions[place];
    get("prompt").textContent = prompt;
    get("left").textContent = left;
    get("right").textContent = right;
  }
  get("done").textContent = `${answers.length} of ${total} answered`;
  get("bar").style.width = `${100 * answers.length / total}%`;
  get("track").setAttribute("aria-valuenow", answers.length);
  get("note").textContent = !kept ? "This browser keeps nothing: download the answers before you leave." :
    saved ? "Answers stay in this browser." : "Answers stay in this browser until you download them.";
  return open ? place : -1;
}
function choose(choice) {
  const question = show();
  if (question < 0) return;
  answers.push({ question, choice, at: new Date().toISOString().slice(0, 19) + "Z" });
  saved = false;
  keep();
  show();
}
function undo() {
  if (!answers.length) return;
  answers.pop();
  saved = false;
  keep();
  show();
}
function download() {
  const annotator = who.value.trim() || "anonymous";
  const content = JSON.stringify({ format: data.format, digest: data.digest, annotator, answers }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = `answers-${annotator.replace(/[^\\p{L}\\p{N}_-]+/gu, "_")}-${data.digest}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  saved = true;
  keep();
  show();
}
const actions = { a: () => choose("A"), b: () => choose("B"), t: () => choose("tie"), s: () => choose("skip"), u: undo,
  arrowleft: () => choose("A"), arrowright: () => choose("B"), backspace: undo, d: download };
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target === who) return;
  const action = actions[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  action();
});
get("a").onclick = actions.a;
get("b").onclick = actions.b;
get("tie").onclick = actions.t;
get("skip").onclick = actions.s;
get("undo").onclick = undo;
get("save").onclick = download;
who.oninput = keep;
who.onkeydown = event => { if (event.key === "Enter") who.blur(); };
addEventListener("beforeunload", event => { if (!saved && !kept) event.preventDefault(); });
show();
"""

BODY = """
<header><h1>{title}</h1><div class="tools"><label>your name <input id="who" autocomplete="off"></label>
<button id="theme" type="button">dark / light</button></div></header>
<div class="track" id="track" role="progressbar" aria-label="answered" aria-valuemin="0" aria-valuemax="{total}">
<div id="bar"></div></div>
<p class="note"><span id="done" role="status"></span> · <span id="note"></span></p>
<main><p class="note">{question}</p><div id="prompt" class="written" dir="auto"></div>
<div id="pair">
<button class="answer" id="a" type="button"><b>A<kbd>&larr;</kbd></b>
<span id="left" class="written" dir="auto"></span></button>
<button class="answer" id="b" type="button"><b>B<kbd>&rarr;</kbd></b>
<span id="right" class="written" dir="auto"></span></button>
</div>
<p id="end" hidden>All pairs are answered. Download the answers.</p>
<div id="others"><button id="tie" type="button">tie<kbd>T</kbd></button>
<button id="skip" type="button">skip<kbd>S</kbd></button>
<button id="undo" type="button">undo<kbd>U</kbd></button>
<button id="save" type="button">download answers<kbd>D</kbd></button></div></main>
"""


def html(
    questionnaire: Questionnaire,
    path: str | Path,
    *,
    annotator: str = "",
    title: str = "Which text is better?",
    question: str = "Read the opening, then choose the better continuation.",
) -> Path:
    """Write the page. Its texts are shown exactly as they are: never as markup, each in its own direction.

    Answers are kept in the browser's storage under the digest of the questionnaire, so a reload or another day goes on
    where it stopped; D downloads the file that `tokenmdp.preferences.read_answers` reads.

    Args:
        questionnaire: What to ask.
        path: The file to write.
        annotator: Stands in the field for the name.
        title: Heading of the page.
        question: One line above the texts.
    """
    content = {
        "format": FORMAT, "digest": questionnaire.digest, "annotator": annotator,
        "questions": [questionnaire.shown(place) for place in range(len(questionnaire.questions))],
    }  # fmt: skip
    data = json.dumps(content).replace("<", "\\u003c")  # "</script>" in a text would end the element
    body = BODY.format(title=markup.escape(title), question=markup.escape(question), total=len(questionnaire.questions))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{markup.escape(title)}</title><style>{STYLE}{PAGE_STYLE}</style></head><body>{body}"
        f'<script type="application/json" id="data">{data}</script><script>{SCRIPT}{PAGE_SCRIPT}</script></body></html>'
    )
    write_text(path, page)
    return Path(path)
