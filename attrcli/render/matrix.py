"""A square table of shares as a picture."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from PIL import Image, ImageDraw

from attrcli.errors import InputError
from attrcli.render import _text

_MARGIN, _LINE, _SIDE, _NAME = 16, 19, 640, 160


def matrix(values: npt.NDArray[np.floating], groups: Sequence[str], caption: Sequence[str]) -> Image.Image:
    """Cells of `values` (n, n) between 0 and 1, dark for 0; neighbours of one group (n,) share a name and a frame.

    Raises `InputError` for another shape, and for values that are not between 0 and 1.
    """
    count = len(groups)
    if values.shape != (count, count) or count == 0:
        raise InputError(f"{count} rows for a table of shape {values.shape}; it must be square")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise InputError("the table holds values that do not lie between 0 and 1")
    cell = max(1, _SIDE // count)
    side = cell * count
    left, top = _MARGIN + _NAME, _MARGIN + _LINE * len(caption) + 8
    page = Image.new("RGB", (max(left + side + _MARGIN, 480), top + side + _MARGIN), _text.PAGE)
    for row, text in enumerate(caption):
        size = 14 if row == 0 else 13
        _text.line(page, (_MARGIN, _MARGIN + row * _LINE), text, page.width - 2 * _MARGIN, size=size, bold=row == 0)
    colours = (colormaps["viridis"](values)[..., :3] * 255).round().astype(np.uint8)
    page.paste(Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST), (left, top))
    starts = [i for i in range(count) if i == 0 or groups[i] != groups[i - 1]]
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        low, high = start * cell, stop * cell - 1
        ImageDraw.Draw(page).rectangle((left + low, top + low, left + high, top + high), outline=(255, 255, 255))
        middle = top + (low + high) // 2
        _text.line(page, (left - 8, middle), groups[start], _NAME - 8, anchor="rm")
    return page
