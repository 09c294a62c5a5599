"""A drawing made for white paper, in colours that follow the colour scheme of its page or of its reader.

Numbers in coloured cells keep their ink, which fits the cell, on any page.
"""

from __future__ import annotations

import colorsys
import re

from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

PAGE, INK = "#14171b", "#e3e7ec"
"""What white and black are in the dark: `--page` and `--ink` of report.html.jinja."""
CONTRAST = 3.0
"""Of a graphical object with what is behind it, at least (WCAG 2.2, 1.4.11)."""
ON_COLOUR = "on-colour-"
"""How the ids of numbers in coloured cells begin."""
_PAINT = re.compile(r"(fill|stroke): (#[0-9a-f]{6})")


def name_cells(figure: Figure) -> None:
    """Give the numbers in coloured cells their ids; an SVG that is saved afterwards has them."""
    for n, text in enumerate(text for axes in figure.axes if axes.images for text in axes.texts):
        text.set_gid(f"{ON_COLOUR}{n}")


def following(svg: str) -> str:
    """An SVG file of `name_cells`' figure with a style that gives it other colours where its reader's scheme is dark.

    The drawing itself stays as it is: what knows no schemes draws it as for paper.
    """
    colours = sorted(set(_PAINT.findall(svg)))
    rules = [
        f'[style*="{paint}: {of}"]:not([id^="{ON_COLOUR}"] *) {{{paint}: {dark(of)} !important}}'
        for paint, of in colours
    ]
    # letters without a colour are black
    inks = [f"svg {{fill: {INK}}}", f'[id^="{ON_COLOUR}"] {{fill: #000000}}']
    style = "\n".join(["@media screen and (prefers-color-scheme: dark) {", *inks, *rules, "}"])
    return svg.replace("</style>", f"\n{style}\n</style>", 1)


def both(style: str) -> str:
    """An inline style whose colours are those of white paper on a light page, and others on a dark one.

    Where a browser does not know `light-dark`, the colours stay as they are.
    """
    return _PAINT.sub(lambda found: f"{found[0]}; {found[1]}: light-dark({found[2]}, {dark(found[2])})", style)


def dark(colour: str) -> str:
    """The colour for a dark page of what has this one on white paper.

    A grey is as far from the page as it is from white; any other colour keeps its hue, and is lighter where it would
    not be seen.
    """
    rgb = to_rgb(colour)
    if max(rgb) - min(rgb) < 0.01:
        red, green, blue = (
            rgb[0] * page + (1 - rgb[0]) * ink for page, ink in zip(to_rgb(PAGE), to_rgb(INK), strict=True)
        )
        return to_hex((red, green, blue))
    hue, lightness, saturation = colorsys.rgb_to_hls(*rgb)
    while contrast(to_hex(rgb), PAGE) < CONTRAST:
        lightness += 0.01
        rgb = colorsys.hls_to_rgb(hue, lightness, saturation)
    return to_hex(rgb)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
