"""Reduce the committed PNG figures to 64 colours, a quarter of their size; run it after drawing them anew.

python docs/shrink_figures.py
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from tokenmdp.files import write_bytes

COLOURS = 64
GRADUAL = ("readme.png",)  # with a scale of many tints


def shrink(path: Path) -> None:
    """Write a PNG again with `COLOURS` colours, four times as many in `GRADUAL`, unless that makes it no smaller."""
    small, colours = io.BytesIO(), 4 * COLOURS if path.name in GRADUAL else COLOURS
    Image.open(path).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    if len(small.getvalue()) < path.stat().st_size:
        write_bytes(path, small.getvalue())


if __name__ == "__main__":
    for figure in sorted(Path(__file__).with_name("figures").glob("*.png")):
        shrink(figure)
