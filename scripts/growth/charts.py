"""Line charts as SVG, with logarithmic axes where asked: small, readable as text, no dependency.

Both themes of a page are served by one file: the colours follow `prefers-color-scheme`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 44, 84
_COLOURS = ("#2f6fb0", "#c2571a", "#2c8a57", "#8a4fb5", "#a08a00")
_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 }
.title { font-size: 15px; font-weight: 600 }
.grid { stroke: #8884; stroke-width: 1 }
.aim { stroke: #999; stroke-width: 1.5; stroke-dasharray: 6 4 }
.line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #ccc } }
"""


@dataclass(frozen=True)
class Series:
    """One line: its name and its (x, y)."""

    name: str
    values: list[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """How one axis is drawn. binary: in powers of two, as sizes from 1 GiB on."""

    title: str
    log: bool = True
    binary: bool = False


def line_chart(
    title: str, x: Axis, y: Axis, series: list[Series], aim: tuple[str, float] | None = None
) -> str:
    """An SVG document. aim: a horizontal line and what it says."""
    xs = [value for line in series for value, _ in line.values]
    ys = [value for line in series for _, value in line.values] + ([aim[1]] if aim else [])
    if not xs:
        raise ValueError(f"{title}: nothing to draw")
    across = _Scale(x, xs, _LEFT, _WIDTH - _RIGHT)
    up = _Scale(y, ys, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<style>{_STYLE}</style>",
        f"<title>{escape(title)}</title>",
        f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for value in across.ticks():
        at = across.place(value)
        parts += [
            f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>',
            _text(at, _HEIGHT - _BOTTOM + 18, across.label(value), "middle"),
        ]
    for value in up.ticks():
        at = up.place(value)
        parts += [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>',
            _text(_LEFT - 8, at + 4, up.label(value), "end"),
        ]
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - _BOTTOM + 38, x.title, "middle"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.title)}</text>"
    )
    if aim:
        at = up.place(aim[1])
        parts += [
            f'<line class="aim" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>',
            _text(_LEFT + 6, at - 6, aim[0]),
        ]
    legend, row = _LEFT, _HEIGHT - 34
    for number, line in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [(across.place(a), up.place(b)) for a, b in sorted(line.values)]
        path = " ".join(f"{a},{b}" for a, b in points)
        parts.append(f'<polyline class="line" stroke="{colour}" points="{path}"/>')
        parts += [f'<circle cx="{a}" cy="{b}" r="3" fill="{colour}"/>' for a, b in points]
        width = 36 + 7 * len(line.name)
        if legend + width > _WIDTH:
            legend, row = _LEFT, row + 18
        parts += [
            f'<rect x="{legend}" y="{row}" width="12" height="12" fill="{colour}"/>',
            _text(legend + 18, row + 11, line.name),
        ]
        legend += width
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


class _Scale:
    def __init__(self, axis: Axis, values: list[float], start: float, end: float) -> None:
        self._axis, self._start, self._end = axis, start, end
        low, high = min(values), max(values)
        if axis.log:
            base = 2 if axis.binary else 10
            positive = min((value for value in values if value > 0), default=1.0)
            self._low = base ** math.floor(math.log(positive, base) + 1e-9)
            self._high = base ** math.ceil(math.log(max(high, positive), base) - 1e-9)
            if self._high <= self._low:
                self._high = self._low * base
        else:
            self._low, self._high = min(0.0, low), high * 1.08 or 1.0

    def place(self, value: float) -> float:
        if self._axis.log:
            value = max(value, self._low)
            share = math.log(value / self._low) / math.log(self._high / self._low)
        else:
            share = (value - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        if not self._axis.log:
            step = 10 ** math.floor(math.log10(self._high - self._low))
            while (self._high - self._low) / step < 4:
                step /= 2
            return [step * n for n in range(int(self._high / step) + 1)]
        base = 2 if self._axis.binary else 10
        count = round(math.log(self._high / self._low, base))
        skip = max(1, -(-count // 9))
        return [self._low * base**power for power in range(0, count + 1, skip)]

    def label(self, value: float) -> str:
        if self._axis.binary and value >= 2**30:
            power = min(3, int(math.log2(value)) // 10 - 3)
            return f"{value / 2 ** (30 + 10 * power):g} {('GiB', 'TiB', 'PiB', 'EiB')[power]}"
        if self._axis.log and value >= 10000:
            return f"10^{round(math.log10(value))}"
        return f"{value:g}"
