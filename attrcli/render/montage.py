"""Pictures side by side: the panel of one input, and the grid of many inputs under several methods."""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw

from attrcli.errors import UsageError
from attrcli.render import _text
from attrcli.render.overlay import (
    ZERO_NOTE,
    Box,
    Map,
    Picture,
    Style,
    as_image,
    composite,
    heat_picture,
    heatmap,
    shrink,
)

Cell = Image.Image | str | None

_TILE = (200, 400)  # shortest and longest side at which a panel shows a picture
_CELL = (160, 320)  # the same in a grid
_THINNEST = 24  # a picture of one row is drawn at least this thick
_MARGIN, _GAP = 16, 12
_LINE = 19  # from one line of text to the next
_KEY = 100  # width of the colour bar with its numbers
_LABEL = 220  # widest row label
_MOST_PIXELS = 120_000_000


def panel(
    image: Picture, values: Map, box: Box, scale: float, style: Style, caption: Sequence[str] = ()
) -> Image.Image:
    """Input, heatmap, overlay and colour bar in one row, under `caption` (its first line in bold).

    Small pictures are enlarged by a whole factor, pixels staying square; large ones are reduced. Arguments and errors
    as `overlay`.
    """
    image, box = shrink(image, box, _TILE[1])
    source = as_image(image).convert("RGB")
    tiles = {
        "input": source,
        "heatmap": heat_picture(source.size, values, box, scale, style),
        "overlay": composite(image, values, box, scale, style),
    }
    shown = {name: _fit(tile, *_TILE) for name, tile in tiles.items()}
    if not values.any():
        for name in ("heatmap", "overlay"):
            _text.stamp(shown[name], ZERO_NOTE)
    return _lay_out(shown, caption, scale, style)


def _lay_out(tiles: dict[str, Image.Image], caption: Sequence[str], scale: float, style: Style) -> Image.Image:
    width, height = next(iter(tiles.values())).size
    top = _MARGIN + _LINE * len(caption) + (_GAP if caption else 0) + _LINE
    body = max(height, 100)
    page_width = 2 * _MARGIN + len(tiles) * (width + _GAP) + _KEY
    page = Image.new("RGB", (page_width, top + body + _MARGIN), _text.PAGE)
    for row, text in enumerate(caption):
        xy = (_MARGIN, _MARGIN + row * _LINE)
        _text.line(page, xy, text, page_width - 2 * _MARGIN, size=14 if row == 0 else 13, bold=row == 0)
    x = _MARGIN
    for name, tile in tiles.items():
        _text.line(page, (x, top - _LINE + 1), name, width, size=12, colour=_text.MUTED)
        _framed(page, tile, (x, top + (body - height) // 2))
        x += width + _GAP
    _colour_bar(page, (x + 4, top), body, scale, style)
    return page


def _colour_bar(page: Image.Image, xy: tuple[int, int], height: int, scale: float, style: Style) -> None:
    """An upright bar from +scale to -scale, with the numbers; an all-zero picture has just the zero."""
    (x, y), width = xy, 14
    steps = np.linspace(1, -1, height, dtype=np.float32)[:, None].repeat(width, axis=1)
    _framed(page, Image.fromarray(heatmap(steps, 1.0, style)), xy)
    marks = [(y + height // 2, "0", "lm")]
    if scale > 0:
        marks += [(y - 2, f"+{scale:.3g}", "la"), (y + height + 1, f"−{scale:.3g}", "ls")]
    for at, text, anchor in marks:
        _text.line(page, (x + width + 6, at), text, _KEY - width - 6, size=12, anchor=anchor)


def thumbnail(image: Picture) -> Image.Image:
    """A picture at the size in which a grid shows it."""
    return _fit(as_image(image).convert("RGB"), *_CELL)


def cell(image: Picture, values: Map, box: Box, scale: float, style: Style) -> Image.Image:
    """An overlay at the size in which a grid shows it, never larger in memory; arguments and errors as `overlay`."""
    image, box = shrink(image, box, _CELL[1])
    picture = _fit(composite(image, values, box, scale, style), *_CELL)
    if not values.any():
        _text.stamp(picture, ZERO_NOTE)
    return picture


def montage(
    rows: Sequence[Sequence[Cell]],
    row_labels: Sequence[str | Sequence[str]],
    column_labels: Sequence[str],
    title: str | None = None,
    key: tuple[Style, float | None] | None = None,
) -> Image.Image:
    """A grid: one row an input, one column a method. A missing cell is a string, its reason, or None.

    A row label may have several lines. `key` draws the colour bar below: the scale that all cells share, or None where
    each has its own. Raises `UsageError` where the grid is ragged or too large for one picture.
    """
    if len(row_labels) != len(rows) or any(len(row) != len(column_labels) for row in rows) or not column_labels:
        raise UsageError(f"a grid of {len(rows)} rows needs as many labels, and each row one cell per column label")
    cells = [[_fit(cell, *_CELL) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
    widths = [_longest_side(column, 0) for column in zip(*cells, strict=True)] or [_CELL[0]] * len(column_labels)
    heights = [_longest_side(row, 1) for row in cells]
    labels = [[label] if isinstance(label, str) else list(label) for label in row_labels]
    left = min(_LABEL, _text.widest([text for label in labels for text in label], 12)) + _MARGIN + _GAP
    top = _MARGIN + (_LINE + _GAP if title is not None else 0) + _LINE
    xs = list(accumulate(widths, lambda x, width: x + width + _GAP, initial=left))
    ys = list(accumulate(heights, lambda y, height: y + height + _GAP, initial=top))
    page = _page((xs[-1] - _GAP + _MARGIN, ys[-1] - _GAP + _MARGIN + (_LINE + _GAP if key else 0)))
    if title is not None:
        _text.line(page, (_MARGIN, _MARGIN), title, page.width - 2 * _MARGIN, size=14, bold=True)
    for x, width, text in zip(xs, widths, column_labels, strict=False):
        _text.line(page, (x + width / 2, top - _LINE), text, width, bold=True, size=12, anchor="ma")
    for y, row, label, height in zip(ys, cells, labels, heights, strict=False):
        _row_label(page, label, y, height, left - _MARGIN - _GAP)
        for x, width, cell in zip(xs, widths, row, strict=False):
            _place(page, cell, (x, y), (width, height))
    if key:
        _horizontal_key(page, *key)
    return page


def _page(size: tuple[int, int]) -> Image.Image:
    if size[0] * size[1] > _MOST_PIXELS:
        raise UsageError(f"the grid would have {size[0]}x{size[1]} pixels; show fewer inputs in one picture")
    return Image.new("RGB", size, _text.PAGE)


def _longest_side(cells: Sequence[Cell], axis: int) -> int:
    return max((cell.size[axis] for cell in cells if isinstance(cell, Image.Image)), default=_CELL[0])


def _row_label(page: Image.Image, lines: Sequence[str], y: int, height: int, width: int) -> None:
    start = y + (height - (len(lines) - 1) * _LINE) / 2
    for number, text in enumerate(lines):
        colour = _text.INK if number == 0 else _text.MUTED
        _text.line(page, (_MARGIN, start + number * _LINE), text, width, size=12, colour=colour, anchor="lm")


def _place(page: Image.Image, cell: Cell, xy: tuple[int, int], size: tuple[int, int]) -> None:
    """A picture in the middle of its place; for a missing one an empty frame with the reason."""
    (x, y), (width, height) = xy, size
    if isinstance(cell, Image.Image):
        _framed(page, cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
        return
    ImageDraw.Draw(page).rectangle([x, y, x + width - 1, y + height - 1], (246, 246, 247), _text.FRAME)
    words = ["missing"] if cell is None else _text.wrapped(cell, width - 12, 12, max(1, height // _LINE - 1))
    for number, text in enumerate(words):
        middle = (x + width / 2, y + height / 2 + (number - (len(words) - 1) / 2) * _LINE)
        _text.line(page, middle, text, width - 12, size=12, colour=_text.MUTED, anchor="mm")


def _horizontal_key(page: Image.Image, style: Style, scale: float | None) -> None:
    low, high = ("−", "+ (each picture on its own scale)") if scale is None else (f"−{scale:.3g}", f"+{scale:.3g}")
    width, height, space = 120, 12, _text.widest([low], 12) + 6
    x, y = _MARGIN + space, page.height - _MARGIN - height
    steps = np.linspace(-1, 1, width, dtype=np.float32)[None].repeat(height, axis=0)
    _framed(page, Image.fromarray(heatmap(steps, 1.0, style)), (x, y))
    _text.line(page, (_MARGIN, y + height / 2), low, space, size=12, anchor="lm")
    rest = page.width - x - width - 6
    _text.line(page, (x + width + 6, y + height / 2), high, rest, size=12, anchor="lm")


def _framed(page: Image.Image, picture: Image.Image, xy: tuple[int, int]) -> None:
    x, y = xy
    ImageDraw.Draw(page).rectangle([x - 1, y - 1, x + picture.width, y + picture.height], outline=_text.FRAME)
    page.paste(picture, xy)


def _fit(picture: Image.Image, shortest: int, longest: int) -> Image.Image:
    """Enlarged by a whole factor until the longer side has `shortest` pixels, or reduced until it has `longest`."""
    width, height = picture.size
    side = max(width, height)
    if side > longest:
        size = (max(1, width * longest // side), max(1, height * longest // side))
        picture = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
        width, height = size
    factor = max(1, math.ceil(shortest / side))
    across, down = (max(factor, math.ceil(_THINNEST / length)) for length in (width, height))
    return picture.resize((width * across, height * down), Image.Resampling.NEAREST)
