"""Text in pictures: foreign strings made harmless, cut to fit, in the font that matplotlib brings along."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

INK = (28, 28, 30)
MUTED = (110, 110, 116)
FRAME = (205, 205, 210)
PAGE = (255, 255, 255)

_LONGEST = 500  # characters that are measured at all; no line of a picture holds more
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # controls, direction marks, lone surrogates, ...


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans at `size` pixels, laid out alike on every machine (no optional shaping library)."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(get_data_path(), "fonts", "ttf", name)
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def clean(text: str) -> str:
    """One printable line: white space becomes a blank, anything that controls rather than prints becomes U+FFFD."""
    return "".join(_printable(char) for char in text)


def _printable(char: str) -> str:
    if char.isspace():
        return " "
    return "\ufffd" if unicodedata.category(char) in _UNPRINTABLE else char


def fitted(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """`text` cleaned and, where it is wider than `width` pixels, cut in the middle: both ends of a path matter."""
    if len(text) > _LONGEST:
        text = text[: _LONGEST // 2] + "…" + text[-_LONGEST // 2 :]
    text = clean(text)
    if face.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # the longest cut that fits, by bisection: `low` characters fit, `high` do not
    while high - low > 1:
        kept = (low + high) // 2
        low, high = (kept, high) if face.getlength(_cut(text, kept)) <= width else (low, kept)
    return _cut(text, low)


def _cut(text: str, kept: int) -> str:
    tail = kept // 2
    return text[: kept - tail] + "…" + text[len(text) - tail :]


def wrapped(text: str, width: float, size: int, most: int) -> list[str]:
    """`text` over at most `most` lines of `width` pixels, broken at blanks; what is left over is cut in the last."""
    face = font(size)
    lines: list[str] = []
    for word in clean(text[:_LONGEST]).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and (len(lines) == most or face.getlength(longer) <= width):
            lines[-1] = longer
        else:
            lines.append(word)
    return [fitted(text, face, width) for text in lines]


def line(
    picture: Image.Image,
    xy: tuple[float, float],
    text: str,
    width: float,
    *,
    size: int = 13,
    bold: bool = False,
    colour: tuple[int, int, int] = INK,
    anchor: str = "la",
) -> None:
    """Write `text` at `xy`, at most `width` pixels wide; `anchor` as in Pillow."""
    face = font(size, bold)
    ImageDraw.Draw(picture).text(xy, fitted(text, face, width), colour, face, anchor)


def widest(texts: Sequence[str], size: int, bold: bool = False) -> int:
    """Pixels that the widest of `texts` takes."""
    face = font(size, bold)
    return max((int(face.getlength(clean(text[:_LONGEST]))) + 1 for text in texts), default=0)


def stamp(picture: Image.Image, text: str) -> None:
    """Mark a picture with `text` on a dark band, or with a cross where the picture is too small for letters."""
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    size = min(int(16 * 0.9 * width / widest([text], 16)), height // 3, max(14, width // 24))
    if size < 8:
        draw.line([(0, 0), (width - 1, height - 1)], (255, 200, 0))
        draw.line([(0, height - 1), (width - 1, 0)], (255, 200, 0))
        return
    middle = height // 2
    draw.rectangle([0, middle - size, width - 1, middle + size], (20, 20, 20))
    draw.text((width / 2, middle), text, (255, 200, 0), font(size), "mm")
