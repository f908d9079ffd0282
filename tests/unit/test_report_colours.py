"""Colours of arms can be told apart and seen: in light and dark, with full sight and without one kind of cones."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from patterning_dist.report import figures

CSS = (Path(figures.__file__).parent / "figures.css").read_text()
# Machado, Oliveira, Fernandes 2009, severity 1: what linear RGB looks like without one kind of cones.
SIGHT = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = XYZ.sum(axis=1)
APART = 15.0  # CIE 1976; a just noticeable difference is 2.3


def colours(theme: int) -> dict[str, str]:
    """0: light, 1: dark."""
    return dict(re.findall(r"--([\w-]+): (#\w{6});", re.findall(r":root \{(.*?)\}", CSS, re.S)[theme]))


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(XYZ @ rgb / WHITE)  # none of the colours is dark enough for the linear part
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def apart(first: str, second: str) -> float:
    """The distance to the eye that sees the least of it."""
    pairs = (tuple(lab(np.clip(matrix @ linear(c), 1e-3, 1)) for c in (first, second)) for matrix in SIGHT.values())
    return min(float(np.linalg.norm(a - b)) for a, b in pairs)


@pytest.mark.parametrize("theme", [0, 1])
def test_other_arms_are_told_apart_from_each_other_and_from_the_known_ones(theme: int) -> None:
    found = colours(theme)
    others = [found[f"other-{number + 1}"] for number in range(figures.NUM_OTHERS)]
    known = [found[arm] for arm in figures.KNOWN_ARMS]
    assert f"other-{figures.NUM_OTHERS + 1}" not in found
    pairs = [*itertools.combinations(others, 2), *itertools.product(others, known)]
    assert min(apart(*pair) for pair in pairs) > APART
    assert apart("#0a6cb0", "#0a6cb8") < APART < apart("#000000", "#ffffff")  # the measure itself
    luminances = {colour: float(XYZ[1] @ linear(colour)) for colour in (*others, found["paper"])}
    for colour in others:  # WCAG 2.1, 1.4.11: graphical objects
        low, high = sorted((luminances[colour], luminances[found["paper"]]))
        assert (high + 0.05) / (low + 0.05) > 3


def test_every_arm_of_a_page_has_its_own_colour_and_a_dash_once_they_are_used_up() -> None:
    arms = ["plus", "oracle", "ablation", "mine.parquet", "a", "b", "oracle"]
    rules = figures.own_colours(" ".join(f'<span class="{figures.arm_style(arm)}">' for arm in arms)).splitlines()
    assert rules == [
        ".arm-own-oracle { --arm: var(--other-1); }",
        ".arm-own-ablation { --arm: var(--other-2); }",
        ".arm-own-mine_parquet { --arm: var(--other-3); }",
        ".arm-own-a { --arm: var(--other-4); }",
        ".arm-own-b { --arm: var(--other-1); --dashes: 2 4; --line: dotted; }",
    ]
    assert figures.arm_style('x"><b>') == "arm-other arm-own-x___b_"
