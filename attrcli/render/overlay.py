"""Attribution over its picture: colours symmetric about zero, at the picture's own resolution."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attrcli.errors import InputError, NonFiniteError, UsageError
from attrcli.render import _text

Map = npt.NDArray[np.floating[Any]]
Picture = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
Size = tuple[int, int]

DIVERGING = ("bwr", "seismic", "coolwarm", "RdBu", "RdGy", "RdYlBu", "RdYlGn", "PuOr", "PRGn", "PiYG", "BrBG")
ZERO_NOTE = "all attributions are zero"

_ZERO = 127  # index of zero among the 255 colours: an odd number, so that zero has a colour of its own
_WASHED = [round(30 + v * (225 - 30) / 255) for v in range(256)]  # room for a colour to show on black and on white
_DIMMED = [round(0.4 * v) for v in range(256)]
_OUTSIDE = (236, 236, 238)  # heatmap where the model saw nothing


@dataclass(frozen=True)
class Style:
    """How overlays look; a name that ends in _r is the colour map reversed.

    `scale` says what the full colour stands for: the `percentile` of |map| of each image, or of all images of a run.
    Raises `UsageError`.
    """

    colormap: str = "bwr"
    alpha: float = 0.85
    percentile: float = 99.0
    scale: Literal["image", "run"] = "image"
    panel: bool = False

    def __post_init__(self) -> None:
        if self.colormap.removesuffix("_r") not in DIVERGING:
            accepted = ", ".join(DIVERGING)
            raise UsageError(f"colormap '{self.colormap}' is not a diverging colour map; use one of {accepted} (or _r)")
        if not 0 < self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha}; it must be above 0 and at most 1")
        if not 0 < self.percentile <= 100:
            raise UsageError(f"percentile is {self.percentile}; it must be above 0 and at most 100")
        if self.scale not in ("image", "run"):
            raise UsageError(f"scale is '{self.scale}'; it must be 'image' or 'run'")


def reduce_channels(attribution: Map) -> Map:
    """Signed sum over channels, (C, H, W) -> (H, W): the map adds up to what the attribution adds up to."""
    if attribution.ndim != 3:
        raise InputError(f"an attribution of shape {attribution.shape} is not (channels, height, width)")
    total: Map = attribution.sum(axis=0, dtype=np.result_type(attribution.dtype, np.float32))
    return total


def robust_scale(values: Map, percentile: float) -> float:
    """`percentile` of |values|; where that is 0 (a sparse map) the largest |value|; 0 only if all are zero.

    Raises `NonFiniteError`.
    """
    _require_finite(values)
    magnitude = np.abs(values)
    return float(np.percentile(magnitude, percentile)) or float(magnitude.max())


def run_scale(maps: Iterable[Map], percentile: float) -> float:
    """`robust_scale` of all maps together, at most 0.4 % too large, one map in memory at a time, in any order.

    Non-negative float32 sort as their bits do: the upper 16 bits count into a histogram of relative width 2^-8.
    Raises `NonFiniteError`.
    """
    counts = np.zeros(1 << 16, np.int64)
    largest = 0.0
    for values in maps:
        with np.errstate(over="ignore"):
            magnitude = np.abs(values.astype(np.float32))
        _require_finite(magnitude)
        largest = max(largest, float(magnitude.max()))
        counts += np.bincount(magnitude.view(np.uint32).ravel() >> 15, minlength=counts.size)
    running = counts.cumsum()
    rank = math.ceil(percentile / 100 * int(running[-1]))
    cell = int(np.searchsorted(running, rank))
    if cell == 0:
        return largest
    return min(largest, float(np.uint32((cell + 1) << 15).view(np.float32)))


def heatmap(values: Map, scale: float, style: Style) -> Picture:
    """Colours of a map, (H, W) -> (H, W, 3): zero is the neutral colour, -scale and +scale the two ends.

    Raises `NonFiniteError`.
    """
    return _colours(style.colormap)[_indices(_normalised(values, scale))]


def overlay(image: Picture, values: Map, box: Box, scale: float, style: Style) -> Image.Image:
    """`values` over `image` (H, W, 1 or 3), at the image's resolution and in grey, so that colour only ever means sign.

    `box`, (left, top, right, bottom) in pixels of the image, is what the model saw; `values` stretch over it (bilinear
    in the values, not in the colours) and what lies outside is dimmed. Opacity is alpha |value| / scale: around zero
    the picture shows. A map of zeros is stamped as such. Raises `InputError`, `NonFiniteError`.
    """
    picture = composite(image, values, box, scale, style)
    if not values.any():
        _text.stamp(picture, ZERO_NOTE)
    return picture


def composite(image: Picture, values: Map, box: Box, scale: float, style: Style) -> Image.Image:
    """`overlay` without the stamp."""
    grey = as_image(image).convert("L")
    region = seen_pixels(box, grey.size)
    index = _stretched(values, scale, box, region)
    picture = grey.point(_DIMMED)
    picture.paste(grey.crop(region).point(_WASHED), region[:2])
    picture = picture.convert("RGB")
    picture.paste(_painted(index, _strong(style.colormap)), region[:2], index.point(_opacity(style.alpha)))
    return picture


def heat_picture(size: Size, values: Map, box: Box, scale: float, style: Style) -> Image.Image:
    """`heatmap` stretched over `box` of a picture of `size` (width, height); the rest is light grey."""
    region = seen_pixels(box, size)
    picture = Image.new("RGB", size, _OUTSIDE)
    picture.paste(_painted(_stretched(values, scale, box, region), _colours(style.colormap)), region[:2])
    return picture


def shrink(image: Picture, box: Box, longest: int) -> tuple[Picture, Box]:
    """Image and box reduced until no side exceeds `longest` pixels; unchanged where none does."""
    source = as_image(image)
    factor = longest / max(source.size)
    if factor >= 1:
        return image, box
    width, height = (max(1, round(side * factor)) for side in source.size)
    pixels = np.asarray(source.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0))
    sx, sy = width / source.width, height / source.height
    return pixels.reshape(height, width, image.shape[2]), (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)


def describe(values: Map, scale: float, style: Style) -> dict[str, str]:
    """What the colours of an overlay mean, for `save_png`."""
    facts = {
        "scale": repr(float(scale)),
        "scaling": style.scale,
        "percentile": repr(float(style.percentile)),
        "saturated": f"{np.count_nonzero(np.abs(values) > scale) / values.size:.4f}",
        "channels": "signed sum",
        "colormap": style.colormap,
        "alpha": repr(float(style.alpha)),
    }
    return facts if values.any() else {**facts, "note": ZERO_NOTE}


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write a PNG with `metadata` as text chunks; it appears under its name whole, or not at all.

    Raises `UsageError` where `path` exists (unless `overwrite`) or cannot be written.
    """
    if not overwrite and path.exists():
        raise UsageError(f"{path} exists already and is left as it is; choose another folder or remove it")
    info = PngInfo()
    for key, text in metadata.items():
        info.add_text(key, text.replace("\0", "\ufffd").encode("utf-8", "backslashreplace").decode())
    partial = path.with_name(f".{os.urandom(8).hex()}.png.part")
    try:
        with open(partial, "xb") as file:
            image.save(file, "PNG", pnginfo=info, compress_level=1)
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def as_image(image: Picture) -> Image.Image:
    """A Pillow image of a (H, W, 1 or 3) uint8 array. Raises `InputError`."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
        raise InputError(
            f"a picture of shape {image.shape} and type {image.dtype} is not (height, width, 1 or 3) uint8"
        )
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def seen_pixels(box: Box, size: Size) -> tuple[int, int, int, int]:
    """The pixels of a picture of `size` (width, height) whose centre lies in `box`; at least one.

    Raises `InputError` where box and picture have nothing in common.
    """
    (left, top, right, bottom), (width, height) = box, size
    if not (left < right and top < bottom and left < width and top < height and right > 0 and bottom > 0):
        raise InputError(f"the box {box} has no part of a picture of {width}x{height} pixels")
    x0, x1 = _seen_span(left, right, width)
    y0, y1 = _seen_span(top, bottom, height)
    return x0, y0, x1, y1


def _seen_span(start: float, stop: float, length: int) -> tuple[int, int]:
    first = min(max(math.ceil(max(start, 0) - 0.5), 0), length - 1)
    return first, max(math.ceil(min(stop, length) - 0.5), first + 1)


def _require_finite(values: Map) -> None:
    if not values.size:
        raise InputError(f"an attribution map of shape {values.shape} is empty; nothing can be drawn")
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise NonFiniteError(f"{bad} of {values.size} attributions are NaN or infinite; nothing is drawn")


def _normalised(values: Map, scale: float) -> npt.NDArray[np.float32]:
    """Map / scale, clipped to -1..1."""
    _require_finite(values)
    if values.ndim != 2:
        raise InputError(f"an attribution map of shape {values.shape} is not (height, width)")
    if not (scale > 0 or (scale == 0 and not values.any())):
        raise ValueError(f"scale {scale} cannot show a map of up to {np.abs(values).max()}")
    with np.errstate(over="ignore"):  # an outlier over a tiny scale: clipped all the same
        ratio = values.astype(np.float64) / (scale or 1.0)
    return np.clip(ratio, -1, 1).astype(np.float32)


def _stretched(values: Map, scale: float, box: Box, region: tuple[int, int, int, int]) -> Image.Image:
    """Colour indices for the pixels of `region`: the map is clipped, then stretched so that it covers `box`."""
    height, width = values.shape
    left, top, right, bottom = box
    sx, sy = width / (right - left), height / (bottom - top)
    x0, y0, x1, y1 = region
    source = (
        max(0.0, (x0 - left) * sx),
        max(0.0, (y0 - top) * sy),
        min(float(width), (x1 - left) * sx),
        min(float(height), (y1 - top) * sy),
    )
    clipped = Image.fromarray(_normalised(values, scale))
    fine = clipped.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=source)
    return Image.fromarray(_indices(np.asarray(fine)))


def _indices(ratio: npt.NDArray[np.float32]) -> Picture:
    """-1..1 -> 0..254, zero -> 127."""
    scaled = ratio * np.float32(_ZERO)
    scaled += np.float32(_ZERO)
    index: Picture = np.rint(scaled).astype(np.uint8)
    return index


def _painted(index: Image.Image, colours: Picture) -> Image.Image:
    painted = index.copy()
    painted.putpalette(colours.tobytes())
    return painted.convert("RGB")


@cache
def _colours(name: str) -> Picture:
    """255 colours of a matplotlib colour map, the 128th its exact centre."""
    colours: Picture = np.rint(colormaps[name].resampled(255)(np.arange(255))[:, :3] * 255).astype(np.uint8)
    return colours


@cache
def _strong(name: str) -> Picture:
    """The outer half of the colours on either side: opacity tells the magnitude, pale colours would hide the sign."""
    offset = np.arange(255) - _ZERO
    return _colours(name)[_ZERO + np.sign(offset) * (_ZERO // 2 + 1 + abs(offset) // 2)]


def _opacity(alpha: float) -> list[int]:
    return [round(255 * alpha * min(abs(index - _ZERO), _ZERO) / _ZERO) for index in range(256)]
