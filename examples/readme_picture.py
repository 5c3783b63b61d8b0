"""README's picture: sampled texts tinted by credit beside the learning curves, from runs of ``tokenmdp train``.

python examples/readme_picture.py runs/quick-attention-seed1 runs/quick-attention-seed2 runs/quick-red-seed1

The texts are the first ones of a run's evaluation after training, not chosen by hand. Runs of one credit method are
averaged; the line below the curves says how many there are and what the band is. Runs may differ in credit and seed
only, since curves of runs with other settings do not belong in one panel.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from tokenmdp.evaluation.policies import load_evaluation
from tokenmdp.report.colours import COLOURS
from tokenmdp.report.curves import band, read_metrics, smooth
from tokenmdp.report.heatmap import credit_scale, printable, tint
from tokenmdp.report.samples import Sample
from tokenmdp.runs.directory import RunDirectory
from tokenmdp.wording import count

INK, FAINT = "#1c1c1e", "#66666b"
PANELS = {"score_mean": "score", "kl": "KL (nats)"}
LINE, NARROWEST_GAP, WIDEST_GAP = 1.35, 0.4, 1.8  # of text, and between two texts, in heights of a letter
MAY_DIFFER = {"credit", "credit_beta", "credit_options", "seed"}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("runs", type=Path, nargs="+", help="run directories of tokenmdp train, finished")
parser.add_argument("--texts", type=Path, help="the run whose texts are shown; default: the first")
parser.add_argument("--num-texts", type=int, default=4)
parser.add_argument("--out", type=Path, default=Path("docs/figures/readme.png"))


def read_runs(paths: Sequence[Path]) -> dict[str, list[list[dict[str, Any]]]]:
    """Credit -> the metrics of its runs.

    Raises:
        ValueError: two runs are the same, or differ in more than credit and seed.
    """
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    seen: dict[tuple[str, int], tuple[Path, dict[str, Any]]] = {}
    for path in paths:
        settings = RunDirectory(path).settings()
        credit, seed = settings["credit"], settings["seed"]
        if (credit, seed) in seen:
            raise ValueError(f"{path} and {seen[credit, seed][0]} are both {credit} credit with seed {seed}; name one")
        for (other_credit, _), (other_path, other) in seen.items():
            free = MAY_DIFFER if credit != other_credit else {"seed"}
            keys = settings.keys() | other.keys()
            differ = sorted(key for key in keys - free if settings.get(key) != other.get(key))
            if differ:
                raise ValueError(f"{path} and {other_path} differ in {', '.join(differ)}; draw them apart")
        seen[credit, seed] = path, settings
        runs.setdefault(credit, []).append(read_metrics(RunDirectory(path).metrics))
    return runs


def wrapped(sample: Sample, width: int) -> list[list[tuple[str, float | None]]]:
    """Lines of (piece, credit) of at most ``width`` letters; the prompt's words have no credit.

    >>> wrapped(Sample("A film", [" of", " rare", " wit"], [0.0, 1.0, 2.0], 3.0), width=13)
    [[('A', None), (' film', None), (' of', 0.0)], [('rare', 1.0), (' wit', 2.0)]]
    """
    words = printable(sample.prompt).split(" ")
    prompt = [word if place == 0 else f" {word}" for place, word in enumerate(words)]
    pieces = [(piece, None) for piece in prompt]
    pieces += [(printable(piece), credit) for piece, credit in zip(sample.tokens, sample.credits, strict=True)]
    lines: list[list[tuple[str, float | None]]] = [[]]
    for piece, credit in pieces:
        if lines[-1] and sum(len(old) for old, _ in lines[-1]) + len(piece) > width:
            lines.append([])
            piece = piece.lstrip(" ") or piece
        lines[-1].append((piece, credit))
    return lines


def draw_texts(figure: SubFigure, samples: Sequence[Sample], title: str, note: str, *, size: float = 13) -> None:
    """One text below another, each token on its tint, the score in a column before it, a key and a note at the bottom.

    Raises:
        ValueError: the texts need more lines than the picture has.
    """
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    canvas = figure.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    font = {"family": "monospace", "size": size}
    ruler = axes.text(0, 0, "m" * 100, **font)
    box, panel = ruler.get_window_extent(canvas.get_renderer()), axes.get_window_extent()
    ruler.remove()
    letter, height = box.width / 100 / panel.width, box.height / panel.height  # in shares of the panel
    left = 8 * letter  # of the texts; the scores stand before it
    scale = credit_scale([sample.credits for sample in samples])
    texts = [wrapped(sample, int((1 - left) / letter)) for sample in samples]
    top, bottom = 1 - 3.6 * height, 3.2 * height
    lines = sum(len(text) for text in texts)
    gap = min((top - bottom - lines * LINE * height) / max(len(texts) - 1, 1), WIDEST_GAP * height)
    if gap < NARROWEST_GAP * height:
        raise ValueError(f"{len(texts)} texts of {lines} lines do not fit; choose a smaller --num-texts")

    axes.text(left, 1 - 1.2 * height, title, va="center", color=INK, size=size, weight="bold")
    axes.text(left - letter, 1 - 1.2 * height, "score", va="center", ha="right", color=FAINT, size=size - 1)
    for sample, text in zip(samples, texts, strict=True):
        score = f"{sample.score:+.1f}".replace("-", "\N{MINUS SIGN}")
        axes.text(left - letter, top, score, va="center_baseline", ha="right", color=INK, weight="bold", **font)
        for line in text:
            x = left
            for piece, credit in line:
                draw_token(axes, x, top, piece, credit, scale, letter, height, font)
                x += len(piece) * letter
            top -= LINE * height
        top -= gap
    draw_key(axes, left, scale, note, letter, height, size)


def draw_token(axes, x, y, piece, credit, scale, letter, height, font) -> None:
    """One token at its place; the blank before a word stays white, as on the samples page."""
    word = piece.lstrip(" ") or piece
    start = x + (len(piece) - len(word)) * letter
    if credit:
        place, shape = (start, y - 0.6 * height), (len(word) * letter, 1.2 * height)
        colour, strength = tint(np.sign(credit)), min(1.0, abs(credit) / scale)
        axes.add_patch(Rectangle(place, *shape, color=colour, alpha=strength, linewidth=0))
    style = {"va": "center_baseline", "ha": "center", "color": FAINT if credit is None else INK, "parse_math": False}
    # Letter by letter at the ruler's width: the renderer rounds a word's width to whole pixels of its own.
    for place, mark in enumerate(word):
        axes.text(start + (place + 0.5) * letter, y, mark, **style, **font)


def draw_key(axes, left, scale, note, letter, height, size) -> None:
    """The key to the tints."""
    y, width, steps = 1.3 * height, 12 * letter, 256
    shares = np.linspace(-1, 1, steps)
    colours = [[*to_rgb(tint(np.sign(share))), abs(share)] for share in shares]
    extent = (left, left + width, y - 0.5 * height, y + 0.5 * height)
    axes.imshow([colours], extent=extent, aspect="auto", interpolation="nearest")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    style = {"va": "center", "color": FAINT, "size": size - 2}
    axes.text(left - letter, y, f"\N{MINUS SIGN}{scale:.2g}", ha="right", **style)
    axes.text(left + width + letter, y, f"+{scale:.2g}   {note}", ha="left", **style)


def draw_curves(figure: SubFigure, runs: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Score above KL against updates: the mean over the runs of a credit and its band, a caption below."""
    axes = dict(zip(PANELS, figure.subplots(2, 1, sharex=True, height_ratios=(1.35, 1)), strict=True))
    figure.subplots_adjust(left=0.15, right=0.97, top=0.97, bottom=0.23, hspace=0.16)
    window = 1
    for place, (credit, records) in enumerate(runs.items()):
        colour = COLOURS[place % len(COLOURS)]
        length = min(len(run) for run in records)
        updates = [record["update"] for record in records[0][:length]]
        window = max(window, 1 + length // 10)
        for key, panel in axes.items():
            curves = np.array([smooth([record[key] for record in run[:length]], window) for run in records])
            mean, half = band(curves)
            panel.fill_between(updates, mean - half, mean + half, color=colour, alpha=0.18, linewidth=0)
            panel.plot(updates, mean, color=colour, linewidth=2.2, label=credit)
    for key, panel in axes.items():
        panel.set_ylabel(PANELS[key], color=INK, size=10.5)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=10)
    figure.align_ylabels()
    axes["kl"].set_xlabel("PPO updates", color=INK, size=10.5)
    axes["kl"].xaxis.get_major_locator().set_params(integer=True)
    axes["score_mean"].legend(frameon=False, fontsize=11, loc="lower right")
    below = "\n".join(textwrap.fill(sentence, 62) for sentence in caption(runs, window).splitlines())
    figure.text(0.55, 0.015, below, ha="center", va="bottom", color=FAINT, size=9)


def caption(runs: dict[str, list[list[dict[str, Any]]]], window: int) -> str:
    r"""How many runs there are, what the band is, and what was smoothed.

    >>> caption({"red": [[], []], "sparse": [[], []]}, window=5)
    'Mean of 2 runs per credit, band: 95% t interval of the mean.\nMoving average over 5 updates.'
    >>> caption({"red": [[], []], "sparse": [[]]}, window=1)
    'Mean of red: 2 runs, sparse: 1 run, band: 95% t interval of the mean where there are several runs.'
    """
    sizes = {credit: len(records) for credit, records in runs.items()}
    if set(sizes.values()) == {1}:
        text = "One run per credit, so there is no band." if len(runs) > 1 else "One run, so there is no band."
    elif len(set(sizes.values())) == 1:
        text = f"Mean of {max(sizes.values())} runs per credit, band: 95% t interval of the mean."
    else:
        each = ", ".join(f"{credit}: {count(size, 'run')}" for credit, size in sizes.items())
        where = " where there are several runs" if 1 in sizes.values() else ""
        text = f"Mean of {each}, band: 95% t interval of the mean{where}."
    return text + (f"\nMoving average over {window} updates." if window > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser.parse_args(arguments)
    runs = read_runs(args.runs)
    shown = RunDirectory(args.texts or args.runs[0])
    samples = load_evaluation(shown.path / "after.json").samples[: args.num_texts]
    figure = Figure(figsize=(12, 4.5))
    FigureCanvasAgg(figure)
    texts, curves = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    settings = shown.settings()
    note = "credit of a token; grey: the prompt"
    if settings["credit"] == "attention" and settings["credit_beta"] < 1:
        note = f"credit of a token; the last one also gets {1 - settings['credit_beta']:.0%} of the score"
    draw_texts(texts, samples, f"written after training with {settings['credit']} credit", note)
    draw_curves(curves, runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150, facecolor="white")
    print("picture:", args.out)


if __name__ == "__main__":
    main()
