"""Bars as SVG, small enough to be read in a diff: a few groups, one colour for each series, a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#8a6d3b", "#b03a48", "#2f6f9f", "#7fb2d6", "#777777")
BAR, GAP, HEIGHT, LEFT, TOP, FOOT = 22, 26, 220, 56, 58, 30


def bars(title: str, unit: str, series: Sequence[str], groups: Mapping[str, Sequence[float | None]]) -> str:
    """`groups`: label -> a value for each series, above 0; None leaves a gap. The scale is logarithmic."""
    values = [value for row in groups.values() for value in row if value]
    low = 10 ** math.floor(math.log10(min(values)))
    high = 10 ** math.ceil(math.log10(max(values) * 1.01))

    def y_of(value: float) -> float:
        return TOP + HEIGHT * (1 - math.log10(value / low) / math.log10(high / low))

    group_width = BAR * len(series) + GAP
    width = LEFT + group_width * len(groups) + 10
    width = max(width, LEFT + 8 * len(title), LEFT + sum(9 * len(name) + 26 for name in series))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{TOP + HEIGHT + FOOT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    at = LEFT
    for name, colour in zip(series, COLOURS, strict=False):
        lines.append(f'<rect x="{at}" y="28" width="11" height="11" fill="{colour}"/>')
        lines.append(f'<text x="{at + 15}" y="38">{escape(name)}</text>')
        at += 9 * len(name) + 26
    mark = low
    while mark <= high:
        y = y_of(mark)
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{width - 6}" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_said(mark)} {escape(unit)}</text>')
        mark *= 10
    for number, (label, row) in enumerate(groups.items()):
        x = LEFT + GAP / 2 + number * group_width
        for place, value in enumerate(row):
            if value:
                y = y_of(value)
                left = x + place * BAR
                lines.append(
                    f'<rect x="{left:.0f}" y="{y:.1f}" width="{BAR - 3}" height="{TOP + HEIGHT - y:.1f}" '
                    f'fill="{COLOURS[place]}"/>'
                )
                middle = left + BAR / 2 - 1
                lines.append(
                    f'<text x="{middle:.0f}" y="{y - 3:.1f}" font-size="9" text-anchor="middle">{_said(value)}</text>'
                )
        middle = x + BAR * len(series) / 2
        lines.append(f'<text x="{middle:.0f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{escape(label)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _said(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}".removesuffix(".0")
