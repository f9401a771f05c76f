"""The attributions of one table row as bars."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from attrcli.errors import InputError, NonFiniteError
from attrcli.render import _text
from attrcli.render.overlay import ZERO_NOTE, Map, Style, heatmap

_MARGIN, _GAP = 16, 10
_LINE, _ROW, _BAR = 19, 24, 15  # heights: of a line of text, of a row, of its bar
_HALF = 200  # pixels from zero to the longest bar
_NUMBER = 90  # room for a number beyond a bar's end
_NAME = 300  # widest feature name


def bar_chart(
    names: Sequence[str],
    values: Map,
    raw_values: Sequence[float | str] | None,
    caption: Sequence[str],
    top: int = 20,
    style: Style | None = None,
) -> Image.Image:
    """Bars of the `top` features by |value|, largest first, to either side of zero; the others as one sum in grey.

    The longest bar of a feature fills the width; a longer one of the others is cut and shown as broken.
    `values` is (F,); `raw_values` are shown beside the names. Equal magnitudes keep the order of the columns. Colours
    are the two ends of the style's colour map. Raises `InputError`, `NonFiniteError`.
    """
    _check(names, values, raw_values)
    order = np.argsort(-np.abs(values), kind="stable")
    kept, rest = order[:top], order[top:]
    labels = [names[i] if raw_values is None else f"{names[i]} = {_number(raw_values[i])}" for i in kept]
    bars = [float(values[i]) for i in kept]
    if rest.size:
        labels.append(f"{rest.size} others, sum")
        bars.append(float(values[rest].sum(dtype=np.float64)))
    if not values.any():
        caption = [*caption, ZERO_NOTE]
    return _draw(labels, bars, len(kept), caption, style or Style())


def _check(names: Sequence[str], values: Map, raw_values: Sequence[float | str] | None) -> None:
    count = len(names)
    if values.shape != (count,) or count == 0 or (raw_values is not None and len(raw_values) != count):
        raise InputError(f"{count} feature names for attributions of shape {values.shape}; each needs one value")
    bad = count - np.count_nonzero(np.isfinite(values))
    if bad:
        raise NonFiniteError(f"{bad} of {count} attributions are NaN or infinite; nothing is drawn")


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.5g}"


def _draw(
    labels: Sequence[str], bars: Sequence[float], named: int, caption: Sequence[str], style: Style
) -> Image.Image:
    name_width = min(_NAME, _text.widest(labels, 13))
    width = 2 * _MARGIN + name_width + _GAP + 2 * (_HALF + _NUMBER)
    top = _MARGIN + _LINE * len(caption) + (_GAP if caption else 0)
    page = Image.new("RGB", (width, top + _ROW * len(bars) + _MARGIN), _text.PAGE)
    for row, text in enumerate(caption):
        xy = (_MARGIN, _MARGIN + row * _LINE)
        _text.line(page, xy, text, width - 2 * _MARGIN, size=14 if row == 0 else 13, bold=row == 0)
    zero = _MARGIN + name_width + _GAP + _NUMBER + _HALF
    ImageDraw.Draw(page).line([(zero, top), (zero, top + _ROW * len(bars))], _text.FRAME)
    longest = max(abs(value) for value in bars[:named]) or 1.0  # a large sum of the others must not hide the rest
    negative, positive = _ends(style)
    for row, (label, value) in enumerate(zip(labels, bars, strict=True)):
        colour = _text.MUTED if row >= named else positive if value > 0 else negative
        middle = top + row * _ROW + _ROW // 2
        _text.line(page, (_MARGIN + name_width, middle), label, name_width, anchor="rm")
        _bar(page, zero, middle, value / longest, colour)
        _bar_number(page, zero, middle, value, value / longest)
    return page


def _bar(page: Image.Image, zero: int, middle: int, share: float, colour: tuple[int, int, int]) -> None:
    length = min(round(abs(share) * _HALF), _HALF)
    if length:
        start, stop = (zero + 1, zero + length) if share > 0 else (zero - length, zero - 1)
        ImageDraw.Draw(page).rectangle([start, middle - _BAR // 2, stop, middle + _BAR // 2], colour)
    if round(abs(share) * _HALF) > _HALF:  # longer than there is room for: broken
        at = zero + round(0.75 * math.copysign(_HALF, share))
        ImageDraw.Draw(page).polygon(
            [(at - 6, middle + _BAR), (at - 1, middle + _BAR), (at + 6, middle - _BAR), (at + 1, middle - _BAR)],
            _text.PAGE,
        )


def _bar_number(page: Image.Image, zero: int, middle: int, value: float, share: float) -> None:
    """The value beyond the end of its bar, on the side to which the bar points."""
    text, offset = f"{value:+.4g}".replace("-", "−") if value else "0", min(abs(share), 1) * _HALF + 6
    x, anchor = (zero - offset, "rm") if value < 0 else (zero + offset, "lm")
    _text.line(page, (x, middle), text, _NUMBER, size=12, anchor=anchor)


def _ends(style: Style) -> list[tuple[int, int, int]]:
    """Colours for bars on white: near the ends of the scale, where no colour map is black."""
    ends: npt.NDArray[np.uint8] = heatmap(np.array([[-0.8, 0.8]], np.float32), 1.0, style)[0]
    return [(int(r), int(g), int(b)) for r, g, b in ends]
