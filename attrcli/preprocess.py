"""Preprocessing, from raw input to model input and back; sidecar.py reads what it should be.

Three spaces, one sample at a time (no batch axis):

1. *stored*: what ``data.read`` gives, an image at its own size;
2. *raw*: what the model sees before range, mean and std: pixels 0..255 as (h, w, C) at the model's size, a table row
   (F,), an array as stored, a sequence one-hot (A, L) for an alphabet of A letters; baselines live here;
3. *model input*: ``normalize(raw)``, in the sidecar's layout and dtype.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from attrcli import letters
from attrcli.errors import InputError

CHANNELS = {"RGB": 3, "BGR": 3, "L": 1}
INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
KEYS = {
    "image": ("size", "resize", "crop", "interpolation", "channels", "range", "mean", "std", "layout", "dtype"),
    "array": ("size", "range", "mean", "std", "layout", "dtype"),
    "table": ("columns", "range", "mean", "std", "dtype"),
    "sequence": ("alphabet", "size", "lengths", "unknown", "lowercase", "layout", "flat", "dtype"),
}
MAX_PIXELS = 178_956_970  # of a resized image; the limit that Pillow has for a decoded one


@dataclass(frozen=True)
class Preprocess:
    """The keys of a sidecar, as ``from_mapping`` checks and fills them; keys that a kind lacks stay at these defaults.

    ``size`` is (height, width) for an image, the shape of one sample for an array, (length,) for a sequence; ``flat``
    means that the model takes a sequence as one vector, in the order of its layout. ``range`` is what 0..255 maps to:
    (0, 255) leaves values as they are. ``mean`` and ``std`` have one value for all, or one per channel or column.
    """

    kind: str
    size: tuple[int, ...] | None = None
    resize: str = "none"
    crop: float = 1.0
    interpolation: str = "bilinear"
    channels: str = "RGB"
    range: tuple[float, float] = (0.0, 255.0)
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "NCHW"
    dtype: str = "float32"
    columns: tuple[str, ...] | None = None
    alphabet: str = ""
    lengths: str = "equal"
    unknown: str = "uniform"
    lowercase: str = "accept"
    flat: bool = False
    activation: str = "none"
    labels: tuple[str, ...] | None = None

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one model input without its batch axis, or None if the sidecar does not say."""
        if self.kind == "table":
            return None if self.columns is None else (len(self.columns),)
        if self.kind == "array" or self.size is None:
            return self.size
        if self.kind == "sequence":
            return self._stored_shape(self.size[0])
        count = CHANNELS[self.channels]
        return (count, *self.size) if self.layout == "NCHW" else (*self.size, count)

    def _stored_shape(self, length: int) -> tuple[int, ...]:
        count = len(self.alphabet)
        if self.flat:
            return (count * length,)
        return (count, length) if self.layout == "NCL" else (length, count)

    @property
    def sample_rank(self) -> int | None:
        """Dimensions of one stored array, or None if the sidecar does not say."""
        ranks = {"table": 1, "sequence": 1 if self.flat else 2}
        return ranks.get(self.kind, None if self.size is None else len(self.size))

    @property
    def channels_last(self) -> bool:
        """Whether the model takes the channels behind the places; inside attrcli they always come first."""
        return (self.kind, self.layout) in (("image", "NHWC"), ("sequence", "NLC"))

    def channels_first(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one model input as attrcli computes with it, channels first."""
        if self.kind == "sequence" and self.flat:
            return (len(self.alphabet), shape[0] // len(self.alphabet))
        return (shape[-1], *shape[:-1]) if self.channels_last else shape

    def fit(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stored values to raw values: an image is resized and cropped to float32, anything else only checked.

        A sequence becomes one-hot; with lengths = 'fit' it is cropped or padded to the size, at both ends.

        uint8 images are resized in 8 bits, with Pillow's rounding, as torchvision and timm do; others in float32.

        Raises: InputError for a shape that does not fit, naming both shapes.
        """
        if self.kind == "sequence":
            return self._columns(values)
        if self.kind != "image":
            shape = self.sample_shape
            if shape is not None and values.shape != shape:
                raise InputError(f"the shape is {values.shape}; the model's preprocessing expects {shape}")
            return values
        if values.ndim != 3 or values.shape[2] != CHANNELS[self.channels]:
            expected = f"(height, width, {CHANNELS[self.channels]}) for {self.channels}"
            raise InputError(f"the image has the shape {values.shape}; the model's preprocessing expects {expected}")
        height, width = values.shape[:2]
        if self.resize == "none":
            if self.size is not None and self.size != (height, width):
                what = (
                    f"the image is {height} x {width} (height x width), the model takes {self.size[0]} x {self.size[1]}"
                )
                raise InputError(f"{what}, and the sidecar has resize = 'none'; accepted too: 'exact', 'shorter-side'")
            return values.astype(np.float32)
        tall, wide, rows, columns = self._resized(height, width)
        return _resize(values, tall, wide, INTERPOLATION[self.interpolation])[rows, columns].astype(np.float32)

    def _columns(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A sequence, letters (L,) or the model's own numbers, as columns (A, L)."""
        if values.dtype.kind == "S":
            columns = letters.one_hot(values, self.alphabet, self.unknown, self.lowercase)
        else:
            columns = letters.checked(self._turned(values))
        length = columns.shape[1] if self.size is None else self.size[0]
        if self.lengths == "fit":
            return letters.resized(columns, length)
        if columns.shape[1] != length:
            raise InputError(
                f"the sequence has {columns.shape[1]} letters, the model's preprocessing expects {length}; --length "
                f"{length} crops or pads around the middle"
            )
        return columns

    def _turned(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Numbers in the layout of the model as (A, L)."""
        count = len(self.alphabet)
        if values.size == 0 or values.size % count or values.shape != self._stored_shape(values.size // count):
            expected = self._stored_shape(self.size[0] if self.size else max(1, values.size // count))
            raise InputError(f"the shape is {values.shape}; the model's preprocessing expects {expected}")
        if self.layout == "NCL":
            return values.reshape(count, -1)
        return values.reshape(-1, count).T

    def seen_box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part (left, top, right, bottom) of an image that the model sees, in the image's own pixels."""
        if self.resize == "none":
            return (0.0, 0.0, float(width), float(height))
        tall, wide, rows, columns = self._resized(height, width)
        x, y = width / wide, height / tall
        return (columns.start * x, rows.start * y, columns.stop * x, rows.stop * y)

    def _resized(self, height: int, width: int) -> tuple[int, int, slice, slice]:
        """Size after the resize, and rows and columns of the centre crop; rounded as in torchvision and timm."""
        assert self.size is not None
        tall, wide = (math.floor(side / self.crop) for side in self.size)
        if self.resize == "shorter-side":
            if height * wide >= width * tall:  # the width decides
                tall = wide * height // width
            else:
                wide = tall * width // height
        if tall * wide > MAX_PIXELS:
            raise InputError(f"an image of {height} x {width} would be resized to {tall} x {wide}, which is too large")
        top, left = round((tall - self.size[0]) / 2), round((wide - self.size[1]) / 2)
        return tall, wide, slice(top, top + self.size[0]), slice(left, left + self.size[1])

    def normalize(self, raw: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Raw values to model input: (raw / 255 * (high - low) + low - mean) / std, in float64, then cast to dtype.

        Raises: InputError if mean and std are for another number of channels, or dtype cannot hold the values.
        """
        if self.range == (0.0, 255.0) and set(self.mean) == {0.0} and set(self.std) == {1.0}:
            x = raw
        else:
            scale, shift = self._affine(raw)
            x = raw * scale + shift
        if self.kind == "image" and self.layout == "NCHW":
            x = x.transpose(2, 0, 1)
        if self.kind == "sequence":
            x = (x if self.layout == "NCL" else x.T).reshape(self._stored_shape(x.shape[1]))
        return _cast(x, np.dtype(self.dtype))

    def denormalize(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The inverse of ``normalize``, to rounding; float64 if x is, else float32."""
        raw = self._turned(x.astype(np.float64)) if self.kind == "sequence" else x.astype(np.float64)
        if self.kind == "image" and self.layout == "NCHW":
            raw = raw.transpose(1, 2, 0)
        scale, shift = self._affine(raw)
        return np.ascontiguousarray((raw - shift) / scale, dtype=np.float64 if x.dtype == np.float64 else np.float32)

    def encode(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stored values straight to model input."""
        return self.normalize(self.fit(stored))

    def _affine(self, raw: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Factor and offset, shaped to broadcast along the channel axis of raw values."""
        low, high = self.range
        mean, std = np.array(self.mean), np.array(self.std)
        if 1 not in (len(mean), len(std)) and len(mean) != len(std):
            raise InputError(f"mean has {len(mean)} values and std {len(std)}; accepted: as many in both")
        scale, shift = (high - low) / 255 / std, (low - mean) / std
        axis = 0 if self.kind != "image" and self.layout == "NCHW" else -1
        count = max(len(scale), len(shift))
        if count > 1 and (raw.ndim == 0 or raw.shape[axis] != count):
            raise InputError(f"the shape is {raw.shape}; mean and std have {count} values for axis {axis}")
        if axis == 0 and raw.ndim > 1:
            scale, shift = (each.reshape(-1, *(1,) * (raw.ndim - 1)) for each in (scale, shift))
        return scale, shift

    def as_dict(self) -> dict[str, Any]:
        """The sidecar as plain lists and strings, labels inline; ``from_mapping`` gives an equal Preprocess back."""

        def plain(value: Any) -> Any:
            return list(value) if isinstance(value, tuple) else value

        default = Preprocess(self.kind)
        keys = [key for key in KEYS[self.kind] if self.kind == "image" or getattr(self, key) != getattr(default, key)]
        given = {key: plain(getattr(self, key)) for key in keys if getattr(self, key) is not None}
        output = {"activation": self.activation} | ({} if self.labels is None else {"labels": list(self.labels)})
        return {"input": {"kind": self.kind} | given, "output": output}


def _resize(values: npt.NDArray[Any], tall: int, wide: int, how: Image.Resampling) -> npt.NDArray[Any]:
    if values.shape[:2] == (tall, wide):
        return values
    planes = [values] if values.dtype == np.uint8 and values.shape[2] == 3 else np.moveaxis(values, 2, 0)
    if values.dtype != np.uint8:
        planes = [plane.astype(np.float32) for plane in planes]
    resized = [np.asarray(Image.fromarray(plane).resize((wide, tall), how)) for plane in planes]
    joined = resized[0] if resized[0].ndim == 3 else np.stack(resized, axis=2)
    return joined.clip(0, 255)  # bicubic overshoots in float


def _cast(x: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """x as a fresh contiguous array, unless values would be lost."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.array(x, dtype=dtype, order="C")
    if dtype.kind == "f" and x.dtype != dtype and not np.isfinite(result).all():
        raise InputError(f"values up to {np.abs(x).max():g} do not fit dtype {dtype}")
    if dtype.kind != "f" and not np.array_equal(result, x):
        raise InputError(f"values from {x.min():g} to {x.max():g} are not whole numbers of dtype {dtype}")
    return result
