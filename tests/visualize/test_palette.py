"""Contrast of the palettes."""

import pytest

from vicinal.visualize.palette import DARK, LIGHT, Palette


def luminance(color: str) -> float:
    """Relative luminance, as in the Web Content Accessibility Guidelines 2.1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_colors_have_contrast(palette: Palette) -> None:
    for text in (palette.text, palette.muted):
        assert min(contrast(text, palette.surface), contrast(text, palette.outside)) > 4.5
    for line in (palette.window, palette.query, palette.weights[-1]):
        assert contrast(line, palette.surface) > 3
    steps = [luminance(palette.surface), *map(luminance, palette.weights)]
    if palette is LIGHT:
        steps = [-step for step in steps]
    assert steps == sorted(steps)  # lightness alone tells weights apart
