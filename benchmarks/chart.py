"""Draws curves over one axis into a PNG file, with Pillow, which TensorBoard brings along."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLORS = ("#3b4a66", "#d97706", "#2a9d8f", "#b5467a", "#6b8e23", "#5b7fd4", "#a3552b")
"""Of the curves, by number."""
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1000, 84, 24, 14, 62
"""Pixels: of the picture, and around a panel."""
SCALE = 2
"""Pictures are drawn so many times as large, and made smaller: smooth lines."""
GREY, FRAME = "#e4e4e4", "#303030"


class Curve(NamedTuple):
    """A line."""

    name: str
    """In the legend; empty: not there."""
    color: str
    """Of COLORS."""
    x: Sequence[float]
    """Rising."""
    y: Sequence[float]
    """As many."""
    points: bool = True
    """Whether its points are marked; a line without them is thin."""


class Panel(NamedTuple):
    """A rectangle of curves."""

    label: str
    """Of its y axis."""
    curves: Sequence[Curve]
    height: int
    """Pixels between its frame's lines."""


def draw(panels: Sequence[Panel], x_label: str, path: Path) -> None:
    """Draw panels below each other, with the same x axis, into a PNG file."""
    height = sum(panel.height + TOP for panel in panels) + BOTTOM
    image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
    xs = [x for panel in panels for curve in panel.curves for x in curve.x]
    top = TOP
    for panel in panels:
        last = panel is panels[-1]
        _Frame(image, panel, (min(xs), max(xs)), top).draw(x_label if last else "")
        top += panel.height + TOP
    image.resize((WIDTH, height), Image.Resampling.LANCZOS).save(path)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about so many round numbers in a range, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """One panel at its place in the picture."""

    def __init__(self, image: Image.Image, panel: Panel, xs: tuple[float, float], top: int) -> None:
        ys = [y for curve in panel.curves for y in curve.y]
        margin = (max(ys) - min(ys) or 1) * 0.06
        self.image, self.pen, self.panel = image, ImageDraw.Draw(image), panel
        self.x_range, self.y_range = xs, (min(ys) - margin, max(ys) + margin)
        self.box = (LEFT, top, WIDTH - RIGHT, top + panel.height)
        self.font = ImageFont.load_default(15 * SCALE)

    def draw(self, x_label: str) -> None:
        """Draw everything; the x axis has numbers where it has a label."""
        left, top, right, bottom = self.box
        for value in ticks(*self.x_range, count=6):
            x = self._x(value)
            self._line([(x, top), (x, bottom)], GREY, 1)
            if x_label:
                self._text((x, bottom + 8), f"{value:,.0f}", "mt")
        for value in ticks(*self.y_range, count=max(2, self.panel.height // 50)):
            y = self._y(value)
            self._line([(left, y), (right, y)], GREY, 1)
            self._text((left - 8, y), f"{value:g}" if abs(value) > 1e-9 else "0", "rm")
        for curve in self.panel.curves:
            self._curve(curve)
        self._line([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], FRAME, 1)
        if x_label:
            self._text(((left + right) / 2, bottom + 34), x_label, "mt")
        self._side_label()
        self._legend()

    def _curve(self, curve: Curve) -> None:
        places = [(self._x(x), self._y(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        self._line(places, curve.color, 2 if curve.points else 1)
        for x, y in places if curve.points else ():
            self.pen.ellipse([SCALE * v for v in (x - 4, y - 4, x + 4, y + 4)], fill=curve.color)

    def _legend(self) -> None:
        named = [curve for curve in self.panel.curves if curve.name]
        if not named:
            return
        wide = max(self.font.getlength(curve.name) for curve in named) / SCALE
        left, top = self.box[2] - wide - 60, self.box[1] + 10
        box = [SCALE * v for v in (left - 8, top - 4, self.box[2] - 8, top + 22 * len(named) + 2)]
        self.pen.rectangle(box, fill="white", outline="#cccccc", width=SCALE)
        for row, curve in enumerate(named):
            y = top + 22 * row + 10
            self._curve_sample(curve, left, y)
            self._text((left + 38, y), curve.name, "lm")

    def _curve_sample(self, curve: Curve, left: float, y: float) -> None:
        self._line([(left, y), (left + 30, y)], curve.color, 2 if curve.points else 1)
        if curve.points:
            self.pen.ellipse([SCALE * v for v in (left + 11, y - 4, left + 19, y + 4)], fill=curve.color)

    def _side_label(self) -> None:
        text = self.panel.label
        box = self.font.getbbox(text)
        picture = Image.new("RGB", (int(box[2]) + 4, int(box[3]) + 8), "white")
        ImageDraw.Draw(picture).text((0, 0), text, fill=FRAME, font=self.font)
        turned = picture.rotate(90, expand=True)
        middle = (self.box[1] + self.box[3]) * SCALE // 2
        self.image.paste(turned, (6 * SCALE, middle - turned.height // 2))

    def _x(self, value: float) -> float:
        low, high = self.x_range
        return self.box[0] + 12 + (value - low) / (high - low) * (self.box[2] - self.box[0] - 24)

    def _y(self, value: float) -> float:
        low, high = self.y_range
        return self.box[3] - (value - low) / (high - low) * (self.box[3] - self.box[1])

    def _line(self, places: Sequence[tuple[float, float]], color: str, width: int) -> None:
        self.pen.line([(x * SCALE, y * SCALE) for x, y in places], fill=color, width=width * SCALE, joint="curve")

    def _text(self, place: tuple[float, float], text: str, anchor: str) -> None:
        self.pen.text((place[0] * SCALE, place[1] * SCALE), text, fill=FRAME, font=self.font, anchor=anchor)
