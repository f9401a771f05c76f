"""Pixels: an encoded image, or an array that holds one, to (H, W, C) in 0..255."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
_OF_FRAMES = ("PNG", "GIF", "TIFF", "WEBP")  # not JPEG, where a second picture is a thumbnail or a depth map
_UPRIGHT = {  # value of the EXIF orientation tag -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow warns of is of no use here (metadata) or is an error at twice the size (too many pixels). Process-wide,
# since a filter around each decoding would not be safe in a reader thread.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(source: bytes | Path, channels: str) -> npt.NDArray[Any]:
    """Decode the first frame of a PNG, JPEG, BMP, GIF, TIFF or WebP to (H, W, C) in 0..255, upright as EXIF says.

    Raises: whatever Pillow raises for a damaged file; ``read`` turns it into an InputError.
    """
    return decode_and_note(source if isinstance(source, bytes) else source.read_bytes(), channels)[0]


def decode_and_note(data: bytes, channels: str) -> tuple[npt.NDArray[Any], tuple[str, ...]]:
    """As ``decode_image``; also what of the file the pixels leave out, or hold otherwise."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
        notes = (*_left_out(image, data), *_converted(image, channels))
        try:
            turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
        except Exception:  # damaged EXIF data says nothing about the orientation
            turn = None
        return to_channels(image if turn is None else image.transpose(turn), channels), notes


def _left_out(image: Image.Image, data: bytes) -> list[str]:
    found = []
    if image.format in _OF_FRAMES and _has_frames(data):
        found.append("only the first of its frames is read")
    if image.has_transparency_data:
        alpha = image.convert("LA" if image.mode in ("LA", "La") else "RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            found.append("its transparency is dropped: a transparent pixel counts with the colour stored for it")
    return found


def _converted(image: Image.Image, channels: str) -> list[str]:
    """What `to_channels` adds to the pixels of an image, or takes from them."""
    if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"):
        return [] if channels == "L" else [f"it is grey, and the model gets it as {channels}, three equal channels"]
    if channels != "L":
        return []
    colours = to_channels(image, "RGB")
    grey = bool((colours == colours[:, :, :1]).all())
    return [] if grey else ["it has colours, and the model gets their brightness alone"]


def _has_frames(data: bytes) -> bool:
    """Whether an image is one of several; asked of another object, since counting frames moves on to the last."""
    try:
        with Image.open(io.BytesIO(data), formats=_OF_FRAMES) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # damaged behind the first frame, which is all that is read
        return False


def to_channels(image: Image.Image, channels: str) -> npt.NDArray[Any]:
    """Pixels of any Pillow mode as (H, W, C) in 0..255, C = 3 for RGB and BGR, 1 for L.

    16-bit grey is divided by 257 into float32, not cut to 8 bits; a palette gives its colours; alpha is dropped without
    blending, as training pipelines do; CMYK is converted without an ICC profile; L is the luma of ITU-R 601.
    """
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(f"holds pixels of mode {image.mode}, whose range is not known; save 8 or 16 unsigned bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / np.float32(257)
        if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF whose white is 0, which Pillow leaves so in 16 bits
            grey = 255 - grey
        return np.repeat(grey[:, :, None], 1 if channels == "L" else 3, axis=2)
    image.info.pop("transparency", None)  # else Pillow warns, or blends it into the conversion
    if image.mode in ("La", "RGBa", "PA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if channels == "L":
        return np.asarray(image.convert("L"))[:, :, None]
    colours = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(colours[:, :, ::-1]) if channels == "BGR" else colours


def pixels(values: npt.NDArray[Any], channels: str) -> tuple[npt.NDArray[Any], tuple[str, ...]]:
    """An array that holds pixels as (H, W, C), and what these hold otherwise.

    Raises ValueError if it holds anything else.
    """
    shape = values.shape
    if values.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))) or 0 in shape:
        raise ValueError(
            f"holds {values.dtype} of shape {shape}; accepted as pixels: uint8 of shape (H, W), (H, W, 1 or 3), or "
            "several as (N, H, W, 1 or 3); for the model's own input values set kind = 'array' in the sidecar"
        )
    image = Image.fromarray(values[..., 0] if shape[2:] == (1,) else values)
    return to_channels(image, channels), tuple(_converted(image, channels))
