"""The palette, as seen by readers of every kind: colours that are close have other dashes."""

from itertools import combinations

import numpy as np
import pytest

from tokenmdp.report.colours import COLOURS, DARK_COLOURS, DARK_ORDERED, METHODS, ORDERED, looks, ordered_looks

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency" (2009),
# severity 1, on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = TO_XYZ.sum(-1)
BOUND = 12  # CIEDE2000; 1 is what can just be seen side by side
THEMES = {"light": (COLOURS, ORDERED), "dark": (DARK_COLOURS, DARK_ORDERED)}


def lab(colour, eye):
    """CIELAB of an sRGB colour as an eye sees it."""
    parts = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    shares = TO_XYZ @ np.clip(EYES[eye] @ linear, 0, 1) / WHITE
    x, y, z = np.where(shares > 216 / 24389, np.cbrt(shares), (24389 / 27 * shares + 16) / 116)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def ciede2000(one, other):
    """Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula" (2005)."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    chroma7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(chroma7 / (chroma7 + 25**7))
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue, chroma, light = h1 + turn / 2, (c1 + c2) / 2, (l1 + l2) / 2
    waves = ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.2, 4, -63))
    t = 1 + sum(size * np.cos(np.radians(times * hue + shift)) for size, times, shift in waves)
    d_light = (l2 - l1) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2))
    d_chroma = (c2 - c1) / (1 + 0.045 * chroma)
    d_hue = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * chroma * t)
    angle = np.radians(60 * np.exp(-(((hue % 360 - 275) / 25) ** 2)))
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25**7)) * np.sin(angle)
    return float(np.sqrt(d_light**2 + d_chroma**2 + d_hue**2 + rotation * d_chroma * d_hue))


def distance(one, other):
    """The smallest difference between two colours among all eyes."""
    return min(ciede2000(lab(one, eye), lab(other, eye)) for eye in EYES)


@pytest.mark.parametrize(
    ("one", "other", "expected"),  # of the paper's table of test data
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, -1, 2), (50, 0, 0), 2.3669),
        ((50, 2.49, -0.001), (50, -2.49, 0.0011), 7.2195),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_measure_is_the_published_one(one, other, expected):
    assert ciede2000(one, other) == pytest.approx(expected, abs=5e-5)
    assert ciede2000(other, one) == pytest.approx(expected, abs=5e-5)


def test_eyes_without_a_cone_confuse_what_they_are_known_to_confuse():
    red, olive = "#c14f00", "#946500"
    assert ciede2000(lab(red, "all cones"), lab(olive, "all cones")) > 15
    assert ciede2000(lab(red, "deuteranopia"), lab(olive, "deuteranopia")) < 5
    grey = [lab("#808080", eye) for eye in EYES]
    assert np.allclose(grey, grey[0], atol=0.1)


@pytest.mark.parametrize("theme", THEMES)
def test_the_colours_of_a_figure_are_told_apart_by_every_eye(theme):
    for one, other in combinations(THEMES[theme][0], 2):
        assert distance(one, other) >= BOUND, (one, other)


def test_more_methods_than_colours_differ_in_dashes_and_markers():
    for methods in (METHODS, [*METHODS, *"abcdefghij"], [*"abcdefghijklmnop"], ["red", *"abcdefghijk"]):
        for one, other in combinations(looks(methods).values(), 2):
            same = one.colour == other.colour
            assert not same or (one.dashes != other.dashes and one.marker != other.marker), methods


@pytest.mark.parametrize("theme", THEMES)
def test_values_in_order_that_are_close_in_colour_have_other_dashes(theme):
    own = dict(zip(ORDERED, THEMES[theme][1], strict=True))
    for count in range(2, len(ORDERED) + 1):
        drawn = ordered_looks(count)
        assert len({look.marker for look in drawn}) == count
        for one, other in combinations(drawn, 2):
            apart = distance(own[one.colour], own[other.colour])
            assert apart >= (BOUND if one.dashes == other.dashes else BOUND / 2), (one, other)


def test_more_values_than_colours_differ_in_dashes_and_markers():
    for one, other in combinations(ordered_looks(24), 2):
        assert one.colour != other.colour or (one.dashes != other.dashes and one.marker != other.marker)
