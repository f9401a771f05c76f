"""Attributions of a sequence as letters: each as high as what its position contributes, negative ones below zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock

import numpy as np
import numpy.typing as npt
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw

from attrcli.errors import InputError, NonFiniteError
from attrcli.render import _text
from attrcli.render.overlay import ZERO_NOTE, Map

PER_LINE, LINES = 100, 4
"""Positions of a line, and lines of a logo: what is longer is cropped."""

_MARGIN, _GAP, _LINE = 16, 16, 19
_AXIS = 64  # room for the numbers of the axis
_HALF = 56  # pixels from zero to the end of the scale
_WIDE = (10, 28)  # narrowest and widest letter
_CELL = (320, 40)  # a cell of a grid: width, and half of its height
_NARROW = 0.5  # of the width of H: letters below it, I for one, are not stretched to the width of the others
_FINE = 4  # a letter is drawn so many times larger, then reduced
_COLOURS = {"A": (0, 150, 0), "C": (30, 80, 220), "G": (245, 165, 0), "T": (214, 39, 40), "U": (214, 39, 40)}
_PROTEIN = {"GSTYC": (0, 150, 0), "NQ": (150, 0, 150), "KRH": (30, 80, 220), "DE": (214, 39, 40)}
_LOCK = Lock()  # matplotlib shapes all text with one font object


@dataclass(frozen=True)
class Track:
    """What one row of letters shows: heights (A, L), signed, of the letters of `alphabet` at each position."""

    name: str
    heights: Map
    alphabet: str

    @property
    def reach(self) -> float:
        """How high the highest stack is, or how deep the deepest."""
        up, down = np.maximum(self.heights, 0).sum(0), np.maximum(-self.heights, 0).sum(0)
        return float(max(up.max(), down.max()))


def shown(values: Map) -> slice:
    """The positions of contributions (L,) that a logo shows: all, or the stretch in which they are largest."""
    return _largest(values, PER_LINE * LINES)


def _largest(values: Map, most: int) -> slice:
    if len(values) <= most:
        return slice(0, len(values))
    total = np.concatenate([[0.0], np.abs(values).cumsum(dtype=np.float64)])
    start = int((total[most:] - total[:-most]).argmax())
    return slice(start, start + most)


def logo(
    tracks: Sequence[Track], caption: Sequence[str], scale: float | None = None, within: slice | None = None
) -> Image.Image:
    """Letters over an axis of positions, counted from 0, in lines of 100; `within` says which positions are shown.

    Each track has a scale of its own, the first that of `scale` where it is given; letters beyond are cut.
    Raises InputError for an empty track, NonFiniteError.
    """
    for track in tracks:
        _check(track)
    length = tracks[0].heights.shape[1]
    within = within or slice(0, length)
    count = within.stop - within.start
    if count < length:
        caption = [
            *caption,
            f"positions {within.start} to {within.stop - 1} of {length}: where contributions are largest",
        ]
    if not tracks[0].heights.any():
        caption = [*caption, ZERO_NOTE]
    wide = min(max(1000 // count, _WIDE[0]), _WIDE[1])
    lines = [slice(at, min(at + PER_LINE, within.stop)) for at in range(within.start, within.stop, PER_LINE)]
    block = 2 * _HALF + _GAP
    body = len(lines) * (len(tracks) * block + _LINE + _GAP)
    top = _MARGIN + _LINE * len(caption) + _GAP
    width = max(2 * _MARGIN + _AXIS + min(count, PER_LINE) * wide, 420)
    page = Image.new("RGB", (width, top + body + _MARGIN), _text.PAGE)
    for row, text in enumerate(caption):
        xy = (_MARGIN, _MARGIN + row * _LINE)
        _text.line(page, xy, text, width - 2 * _MARGIN, size=14 if row == 0 else 13, bold=row == 0)
    y = top
    for places in lines:
        for number, track in enumerate(tracks):
            reach = scale if scale is not None and number == 0 else track.reach
            _axis(page, y, reach, (places.stop - places.start) * wide, track.name if len(tracks) > 1 else "")
            _letters(page, track, places, (_MARGIN + _AXIS, y + _HALF), (wide, _HALF), reach)
            y += block
        _positions(page, places, y - _GAP + 2, wide)
        y += _LINE + _GAP
    return page


def logo_cell(track: Track, scale: float, within: slice) -> Image.Image:
    """A logo without axis and text, for a grid; `within` is best from `cell_positions`."""
    _check(track)
    count = within.stop - within.start
    wide = max(1, _CELL[0] // count)
    page = Image.new("RGB", (wide * count, 2 * _CELL[1]), _text.PAGE)
    ImageDraw.Draw(page).line([(0, _CELL[1]), (page.width, _CELL[1])], _text.FRAME)
    _letters(page, track, within, (0, _CELL[1]), (wide, _CELL[1]), scale)
    return page


def cell_positions(values: Map) -> slice:
    """The positions of contributions (L,) that a cell of a grid shows."""
    return _largest(values, _CELL[0] // 5)


def _check(track: Track) -> None:
    if track.heights.ndim != 2 or len(track.alphabet) != len(track.heights) or not track.heights.size:
        raise InputError(f"heights of shape {track.heights.shape} for the letters {track.alphabet}; each needs a row")
    bad = track.heights.size - np.count_nonzero(np.isfinite(track.heights))
    if bad:
        raise NonFiniteError(f"{bad} of {track.heights.size} attributions are NaN or infinite; nothing is drawn")


def _letters(
    page: Image.Image, track: Track, places: slice, origin: tuple[int, int], size: tuple[int, int], reach: float
) -> None:
    """The stacks of some positions, the first at `origin`; `size` is the width of a letter and the height of reach."""
    wide, half = size
    for number, column in enumerate(track.heights[:, places].T):
        x = origin[0] + number * wide
        for sign in (1, -1):
            order = [row for row in np.argsort(np.abs(column), kind="stable") if column[row] * sign > 0]
            done = 0.0  # the smallest next to the axis, the largest at the end
            for row in order:
                start, done = done, done + abs(float(column[row])) / (reach or 1.0) * half
                low, high = round(min(start, half)), round(min(done, half))
                y = origin[1] - high if sign > 0 else origin[1] + 1 + low
                if high > low:
                    mask = glyph(track.alphabet[row], (max(1, wide - 1), high - low))
                    page.paste(colour_of(track.alphabet[row], track.alphabet), (x, y), mask)


def colour_of(letter: str, alphabet: str) -> tuple[int, int, int]:
    """The usual colour of a letter; black where there is none."""
    if set(alphabet) <= {*_COLOURS, "N"}:
        return _COLOURS.get(letter, _text.MUTED)
    return next((colour for group, colour in _PROTEIN.items() if letter in group), _text.INK)


def glyph(letter: str, size: tuple[int, int]) -> Image.Image:
    """A letter's outline stretched over `size` (width, height), as a mask; a narrow letter keeps its width beside H."""
    width, height = size
    mask = Image.new("L", (width * _FINE, height * _FINE), 0)
    draw = ImageDraw.Draw(mask)
    for outline, inked in _outlines(letter):
        draw.polygon([(x * (mask.width - 1), y * (mask.height - 1)) for x, y in outline.tolist()], 255 if inked else 0)
    return mask.resize(size, Image.Resampling.BOX)


@cache
def _outlines(letter: str) -> list[tuple[npt.NDArray[np.float64], bool]]:
    """The closed curves of a letter in the unit square, y downwards, the largest first; and whether ink is inside."""
    curves, low, high = _drawn(letter)
    _, left, right = _drawn("H")
    share = (high - low)[0] / (right - left)[0]
    wide = share if share < _NARROW else 1.0
    unit = [(curve - low) / (high - low) * [wide, -1] + [(1 - wide) / 2, 1] for curve in curves]
    unit.sort(key=lambda curve: -abs(_area(curve)))
    return [(curve, _area(curve) * _area(unit[0]) > 0) for curve in unit]


def _drawn(letter: str) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The closed curves of a letter, y upwards, and the lower left and the upper right corner of what they fill."""
    with _LOCK:
        path = TextPath((0, 0), letter, size=100, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    curves = [np.asarray(curve) for curve in path.to_polygons()]
    return curves, np.concatenate(curves).min(0), np.concatenate(curves).max(0)


def _area(curve: npt.NDArray[np.float64]) -> float:
    x, y = curve.T
    return float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def _axis(page: Image.Image, y: int, reach: float, width: int, name: str) -> None:
    draw, left = ImageDraw.Draw(page), _MARGIN + _AXIS
    draw.line([(left - 4, y + _HALF), (left + width, y + _HALF)], _text.FRAME)
    draw.line([(left - 4, y), (left - 4, y + 2 * _HALF)], _text.FRAME)
    for place, text in ((0, f"{reach:.3g}"), (_HALF, "0"), (2 * _HALF, f"−{reach:.3g}")):
        _text.line(page, (left - 8, y + place), text, _AXIS - 8, size=11, colour=_text.MUTED, anchor="rm")
    if name:
        _text.line(page, (left, y + 2 * _HALF - 2), name, width, size=11, colour=_text.MUTED, anchor="ls")


def _positions(page: Image.Image, places: slice, y: int, wide: int) -> None:
    for place in range(places.start, places.stop):
        if place % 10 == 0:
            x = _MARGIN + _AXIS + (place - places.start) * wide + wide // 2
            ImageDraw.Draw(page).line([(x, y - 3), (x, y)], _text.MUTED)
            _text.line(page, (x, y + 2), str(place), 60, size=11, colour=_text.MUTED, anchor="ma")
