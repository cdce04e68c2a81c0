"""Charts as SVG, in the colours of the page, so that one drawing suits light and dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 10, 38
COLORS, DASHES = 5, ("", "6 3", "2 3", "9 3 2 3")
MOST_MARKED = 30  # up to this many points, each point of a line has a mark


@dataclass(frozen=True)
class Series:
    """One line of a chart, or single points.

    Args:
        name: Its name in the legend.
        x, y: Its points; a `y` that is NaN is not drawn.
        number: Selects its colour, mark and dash; a setting has the same number in all charts.
        low, high: The ends of each point's bar; empty: no bars.
        is_line: Whether the points are joined.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    number: int = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    is_line: bool = True

    @property
    def mark(self) -> Markup:
        """The line's sample in the legend."""
        line = _path([(1, 7), (27, 7)], self.number) if self.is_line else ""
        return Markup('<svg class="key" viewBox="0 0 28 14" aria-hidden="true">{}{}</svg>').format(
            line, _mark(14, 7, self.number)
        )


@dataclass(frozen=True)
class Chart:
    """A chart with its title and caption.

    Args:
        title, caption: What it shows, and how to read it.
        svg: The drawing.
        series: The lines that the legend names; empty if there is only one.
    """

    title: str
    caption: str
    svg: Markup
    series: tuple[Series, ...] = field(default=())


def draw(
    title: str,
    caption: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    is_log: bool = False,
    from_zero: bool = False,
    whole_x: bool = True,
    breaks: Sequence[float] = (),
) -> Chart | None:
    """Draw lines over one pair of axes.

    Args:
        title, caption: See `Chart`.
        series: The lines.
        x_label, y_label: The axes' labels.
        is_log: Whether the vertical axis is logarithmic; values that are not above zero are left out.
        from_zero: Whether the vertical axis begins at zero.
        whole_x: Whether the horizontal axis has ticks at whole numbers only.
        breaks: The positions of vertical lines that divide the chart.

    Returns:
        The chart; None if there is no point to draw.
    """
    points = [
        (x, y)
        for one in series
        for x, y in zip(one.x, one.y, strict=True)
        if math.isfinite(y) and (y > 0 or not is_log)
    ]
    if not points:
        return None
    ends = [v for one in series for v in (*one.low, *one.high) if math.isfinite(v) and (v > 0 or not is_log)]
    ys = [y for _, y in points] + ends
    y_ticks = _log_ticks(min(ys), max(ys)) if is_log else _ticks(0 if from_zero else min(ys), max(ys))
    low, high = (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    pad = 0.5 if whole_x and x_high - x_low < 2 else 0.04 * (x_high - x_low) or 1
    x_low, x_high = x_low - pad, x_high + pad
    x_ticks = [t for t in _ticks(x_low, x_high, whole=whole_x) if x_low <= t <= x_high]

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        share = (math.log(y / low) / math.log(high / low)) if is_log else (y - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        Markup('<path class="grid" d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT, up(tick), WIDTH - RIGHT, LEFT - 6, up(tick) + 4, _number(tick)
        )
        for tick in y_ticks
    ]
    parts += [
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            across(tick), HEIGHT - BOTTOM + 15, _number(tick)
        )
        for tick in x_ticks
    ]
    parts += [
        Markup('<path class="break" d="M{:.1f} {}V{}"/>').format(across(x), TOP, HEIGHT - BOTTOM) for x in breaks
    ]
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label
        )
    )
    parts.append(
        Markup('<text transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (TOP + HEIGHT - BOTTOM) / 2, y_label
        )
    )
    for one in series:
        bars = zip(one.x, one.low, one.high, strict=True) if len(one.low) else ()
        for x, bottom, top in bars:
            if math.isfinite(bottom) and math.isfinite(top) and (bottom > 0 or not is_log):
                parts.append(
                    Markup('<path class="line c{}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
                        one.number % COLORS, across(x), up(bottom), up(top)
                    )
                )
        places = [
            (across(x), up(y)) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y) and (y > 0 or not is_log)
        ]
        if one.is_line:
            parts.append(_path(places, one.number))
        if len(places) <= MOST_MARKED or not one.is_line:
            parts += [_mark(x, y, one.number) for x, y in places]
    drawing = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{title}. {caption}", Markup("").join(parts)
    )
    return Chart(title, caption, drawing, tuple(series) if len(series) > 1 else ())


def _path(places: Sequence[tuple[float, float]], number: int) -> Markup:
    points = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = DASHES[number % len(DASHES)]
    return Markup('<path class="line c{}" d="M{}"{}/>').format(
        number % COLORS, points, Markup(' stroke-dasharray="{}"').format(dash) if dash else ""
    )


def _mark(x: float, y: float, number: int) -> Markup:
    """A circle, a square, a diamond or a triangle."""
    shape = number % 4
    if shape == 0:
        return Markup('<circle class="mark c{}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(number % COLORS, x, y)
    outline = ("", "m-3.3-3.3h6.6v6.6h-6.6z", "m0-4.6l4.6 4.6l-4.6 4.6l-4.6-4.6z", "m0-4.4l4.3 7.6h-8.6z")[shape]
    return Markup('<path class="mark c{}" d="M{:.1f} {:.1f}{}"/>').format(number % COLORS, x, y, outline)


def _ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Round numbers from one below `low` to one above `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) <= most)
    step = max(1.0, round(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [tick * step for tick in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    step = math.ceil((last - first) / 5)
    return [10.0**power for power in range(first, last + step, step)]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, power = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(power)}"
    return f"{round(value, 6):g}"
