"""The environments' views: the prompt, the response so far, and each token tinted by its credit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenmdp.models.tokens import token_pieces
from tokenmdp.report.heatmap import credit_scale, printable, terminal_line, tint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = " |"  # after the prompt, so that the first token can be told from it
INCHES = (8.0, 3.0)  # of an image; one size for the whole episode, as videos need
COLUMNS = 88  # characters of 10-point monospace that fit INCHES[0]
WIDTH = 0.96 / COLUMNS  # of one character, as a share of the image


def ansi_line(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int], credits: Sequence[float] | None
) -> str:
    """One line of terminal text; with ``credits``, one per response token, each token carries its colour."""
    prompt, pieces = token_pieces(tokenizer, ids, prompt_ids)
    if credits is None:
        return printable(prompt) + SEPARATOR + "".join(printable(piece) for piece in pieces)
    return terminal_line(pieces, credits, prompt=prompt + SEPARATOR)


def image(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int], credits: Sequence[float] | None
) -> np.ndarray:
    """The same text as a picture: (height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    prompt, pieces = token_pieces(tokenizer, ids, prompt_ids)
    figure = Figure(figsize=INCHES, dpi=100)
    canvas = FigureCanvasAgg(figure)
    cells = [(character, "white") for character in printable(prompt) + SEPARATOR]
    for index, piece in enumerate(pieces):
        colour = "white" if credits is None else tint(credits[index] / credit_scale([credits]))
        cells += [(character, colour) for character in printable(piece)]
    for position, (character, colour) in enumerate(cells):
        line, column = divmod(position, COLUMNS)
        left, base = 0.02 + WIDTH * column, 0.92 - 0.09 * line
        figure.patches.append(
            Rectangle((left, base - 0.02), WIDTH, 0.08, transform=figure.transFigure, facecolor=colour)
        )
        figure.text(left, base, character, family="monospace", fontsize=10, parse_math=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
