"""Charts as SVG, written by hand: small files that are the same on every machine, so that a test can compare them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

BLUE, ORANGE, GREY, BLACK = "#1f6fb4", "#d1600f", "#8a8a8a", "#222222"
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 46  # margins around the plot, in pixels


class Chart:
    """A plot with two axes; what is added to it is in their units.

    Args:
      title: above the plot.
      x: from where to where the horizontal axis goes.
      y: likewise the vertical one, from below.
      x_ticks: text by position; likewise `y_ticks`, which have a line across the plot.
      x_label: below the axis; likewise `y_label`, beside its axis.
      log_x: whether the horizontal axis is logarithmic; likewise `log_y`.
    """

    def __init__(
        self,
        title: str,
        *,
        x: tuple[float, float],
        y: tuple[float, float],
        x_ticks: Mapping[float, str],
        y_ticks: Mapping[float, str],
        x_label: str,
        y_label: str,
        log_x: bool = False,
        log_y: bool = False,
    ):
        self._x, self._y, self._log_x, self._log_y = x, y, log_x, log_y
        self._elements: list[str] = []
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for at, text in y_ticks.items():
            self._add_path(f"M{LEFT} {self._down(at)}H{right}", "#e4e4e4")
            self._write(LEFT - 6, self._down(at) + 4, text, BLACK, "end")
        for at, text in x_ticks.items():
            self._add_path(f"M{self._across(at)} {bottom}v4", BLACK)
            self._write(self._across(at), bottom + 17, text, BLACK, "middle")
        self._add_path(f"M{LEFT} {TOP}V{bottom}H{right}", BLACK)
        self._write((LEFT + right) / 2, HEIGHT - 8, x_label, BLACK, "middle")
        self._write(LEFT, 20, title, BLACK, "start", "font-weight='bold'")
        middle = (TOP + bottom) / 2
        self._write(14, middle, y_label, BLACK, "middle", f"transform='rotate(-90 14 {middle:g})'")

    def bars(self, xs: Sequence[float], ys: Sequence[float], colour: str, width: float = 1.0) -> None:
        """Vertical lines from the bottom, `width` pixels wide."""
        bottom = HEIGHT - BOTTOM
        lines = (f"M{self._across(x)} {bottom}V{self._down(y)}" for x, y in zip(xs, ys, strict=True))
        self._add_path("".join(lines), colour, f"stroke-width='{width:g}'")

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, *, dashed: bool = False) -> None:
        """A line through points; each point has a dot, unless the line is dashed."""
        points = [(self._across(x), self._down(y)) for x, y in zip(xs, ys, strict=True)]
        dash = " stroke-dasharray='5 4'" if dashed else ""
        self._add_path("M" + "L".join(f"{x} {y}" for x, y in points), colour, f"stroke-width='1.8'{dash}")
        if not dashed:
            self._elements += [f"<circle cx='{x}' cy='{y}' r='3' fill='{colour}'/>" for x, y in points]

    def label(self, x: float, y: float, text: str, colour: str, anchor: str = "start") -> None:
        """A text that begins (`"start"`), has its `"middle"`, or ends (`"end"`) there."""
        self._write(self._across(x), self._down(y), text, colour, anchor)

    def svg(self) -> str:
        """The file's content."""
        opening = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}'"
            " font-family='sans-serif' font-size='12'>"
        )
        background = f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>"
        return "\n".join([opening, background, *self._elements, "</svg>\n"])

    def _across(self, x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * _share(x, self._x, self._log_x), 1)

    def _down(self, y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(y, self._y, self._log_y), 1)

    def _add_path(self, path: str, colour: str, more: str = "") -> None:
        self._elements.append(f"<path d='{path}' fill='none' stroke='{colour}' {more}/>")

    def _write(self, x: float, y: float, text: str, colour: str, anchor: str, more: str = "") -> None:
        at = f"x='{x:g}' y='{y:g}' fill='{colour}' text-anchor='{anchor}' {more}"
        self._elements.append(f"<text {at}>{escape(text)}</text>")


def _share(value: float, axis: tuple[float, float], log: bool) -> float:
    """How far along an axis a value is: 0 at its beginning, 1 at its end; what lies outside is put onto the ends."""
    low, high = axis
    value = min(max(value, low), high)
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)
