"""Preprocessing: what a model's sidecar says, from raw input to model input and back.

Three spaces, one sample at a time (no batch axis):

1. *stored*: what ``data.read`` gives, an image at its own size;
2. *raw*: what the model sees before range, mean and std: pixels 0..255 as (h, w, C) at the model's size, a table row
   (F,), an array as stored; baselines live here;
3. *model input*: ``normalize(raw)``, in the sidecar's layout and dtype.
"""

import difflib
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tomli_w
from PIL import Image

from attrcli.errors import InputError, UsageError

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
}
MAX_PIXELS = 178_956_970  # of a resized image; the limit that Pillow has for a decoded one


@dataclass(frozen=True)
class Preprocess:
    """The keys of a sidecar, as ``from_mapping`` checks and fills them; keys that a kind lacks stay at these defaults.

    ``size`` is (height, width) for an image and the shape of one sample for an array. ``range`` is what 0..255 maps to:
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
    activation: str = "none"
    labels: tuple[str, ...] | None = None

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one model input without its batch axis, or None if the sidecar does not say."""
        if self.kind == "table":
            return None if self.columns is None else (len(self.columns),)
        if self.kind == "array" or self.size is None:
            return self.size
        count = CHANNELS[self.channels]
        return (count, *self.size) if self.layout == "NCHW" else (*self.size, count)

    def fit(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stored values to raw values: an image is resized and cropped to float32, anything else only checked.

        uint8 images are resized in 8 bits, with Pillow's rounding, as torchvision and timm do; others in float32.

        Raises: InputError for a shape that does not fit, naming both shapes.
        """
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
        return _cast(x, np.dtype(self.dtype))

    def denormalize(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The inverse of ``normalize``, to rounding; float64 if x is, else float32."""
        raw = x.astype(np.float64)
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


# One reader per key: it returns the value as the dataclass holds it, or raises ValueError saying what is accepted.


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a number")
    return float(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("a list of numbers")
    return tuple(_number(each) for each in value)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value or not all(type(each) is int and each > 0 for each in value):
        raise ValueError("[height, width] of an image, or the shape of one array: whole numbers above 0")
    return tuple(value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, str) and each for each in value):
        raise ValueError("a list of names")
    return tuple(value)


def _such(read: Callable[[Any], Any], holds: Callable[[Any], bool], accepted: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        found = read(value)
        if not holds(found):
            raise ValueError(accepted)
        return found

    return check


def _one_of(*names: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(", ".join(names) + _suggestion(value, names))
        return value

    return read


def _suggestion(value: Any, names: Any) -> str:
    close = difflib.get_close_matches(str(value), list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


_READERS: dict[str, Callable[[Any], Any]] = {
    "kind": _one_of(*KEYS),
    "size": _sizes,
    "resize": _one_of("exact", "shorter-side", "none"),
    "crop": _such(_number, lambda crop: 0 < crop <= 1, "a number above 0, up to 1"),
    "interpolation": _one_of(*INTERPOLATION),
    "channels": _one_of(*CHANNELS),
    "range": _such(_numbers, lambda to: len(to) == 2 and to[0] != to[1], "two numbers, what 0 and 255 map to"),
    "mean": _numbers,
    "std": _such(_numbers, lambda std: min(std) > 0, "numbers above 0"),
    "layout": _one_of("NCHW", "NHWC"),
    "dtype": _one_of("float32", "float64", "float16", "uint8", "int32", "int64"),
    "columns": _such(_names, lambda names: len(set(names)) == len(names), "a list of different names"),
    "activation": _one_of("none", "softmax", "sigmoid"),
}


def load_sidecar(path: Path) -> Preprocess:
    """Read a sidecar; a labels path in it is relative to its folder.

    Raises: UsageError naming the file, and the key if one is wrong.
    """
    try:
        mapping = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML: {error}") from error
    return from_mapping(mapping, str(path), path.parent)


def from_mapping(mapping: Mapping[str, Any], origin: str, folder: Path | None) -> Preprocess:
    """A Preprocess from the tables ``input`` and ``output``; labels may be a file only where there is a folder.

    Raises: UsageError naming origin and key for an unknown key, a wrong type, an impossible value or combination.
    """
    _refuse_unknown(mapping, ("input", "output"), f"{origin}: table")
    given, output = (_table(mapping, name, origin) for name in ("input", "output"))
    if "kind" not in given:
        raise UsageError(f"{origin}: [input] kind is missing; accepted: {', '.join(KEYS)}")
    kind = _value(origin, "input", "kind", given["kind"])
    _refuse_unknown(given, ("kind", *KEYS[kind]), f"{origin}: [input] key", f" for kind = {kind!r}")
    _refuse_unknown(output, ("activation", "labels"), f"{origin}: [output] key")
    values = {key: _value(origin, "input", key, value) for key, value in given.items()}
    if "activation" in output:
        values["activation"] = _value(origin, "output", "activation", output["activation"])
    if "labels" in output:
        values["labels"] = _labels(output["labels"], origin, folder)
    if kind == "image":
        count = CHANNELS[values.get("channels", "RGB")]
        values = {"range": (0.0, 1.0), "mean": (0.0,) * count, "std": (1.0,) * count} | values
    found = Preprocess(**values)
    problem = _contradiction(found)
    if problem:
        raise UsageError(f"{origin}: [input] {problem}")
    return found


def _contradiction(p: Preprocess) -> str | None:
    """What is wrong between keys that are right by themselves."""
    if p.kind == "image":
        if p.size is not None and len(p.size) != 2:
            return f"size = {list(p.size)}: an image's size is [height, width]"
        if p.resize != "none" and p.size is None:
            return f"resize = {p.resize!r} needs the key size = [height, width]"
        if p.resize == "none" and p.crop != 1:
            return f"crop = {p.crop} needs the key resize = 'shorter-side' or 'exact'"
    count = {"image": CHANNELS[p.channels], "table": len(p.columns or ())}.get(p.kind, 0)
    for key, values in (("mean", p.mean), ("std", p.std)):
        if count and len(values) != count and not (p.kind == "table" and len(values) == 1):
            unit = f"channels of {p.channels}" if p.kind == "image" else "columns"
            return f"{key} has {len(values)} values; accepted: {count}, one for each of the {count} {unit}"
    if p.kind != "image" and 1 not in (len(p.mean), len(p.std)) and len(p.mean) != len(p.std):
        return f"mean has {len(p.mean)} values and std {len(p.std)}; accepted: as many in both"
    whole = p.range == (0.0, 255.0) and set(p.mean) == {0.0} and set(p.std) == {1.0}
    if not p.dtype.startswith("float") and not whole:
        return f"dtype = {p.dtype!r} holds whole numbers: it needs range = [0.0, 255.0] and no mean or std"
    return None


def _refuse_unknown(mapping: Mapping[str, Any], accepted: tuple[str, ...], what: str, where: str = "") -> None:
    for key in mapping:
        if key not in accepted:
            near = _suggestion(key, accepted)
            raise UsageError(f"{what} {key!r} is unknown{where}{near}; accepted: {', '.join(accepted)}")


def _table(mapping: Mapping[str, Any], name: str, origin: str) -> Mapping[str, Any]:
    table = mapping.get(name, {})
    if not isinstance(table, Mapping):
        raise UsageError(f"{origin}: {name} must be a table, [{name}]")
    return table


def _value(origin: str, table: str, key: str, value: Any) -> Any:
    try:
        return _READERS[key](value)
    except ValueError as error:
        raise UsageError(f"{origin}: [{table}] {key} = {value!r} is not possible; accepted: {error}") from error


def _labels(value: Any, origin: str, folder: Path | None) -> tuple[str, ...]:
    where = f"{origin}: [output] labels"
    if isinstance(value, str) and folder is not None:
        try:
            value = (folder / value).read_text(encoding="utf-8-sig").rstrip().splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"{where}: the file {str(folder / value)!r} cannot be read: {error}") from error
        where = f"{where}: its file"
    elif isinstance(value, str):
        raise UsageError(f"{where} = {value!r}: inside a model file the names must stand inline, as a list")
    try:
        return tuple(name.strip() for name in _names(value))
    except ValueError as error:
        raise UsageError(f"{where}: accepted: a file with one name per line and no empty line, or {error}") from error


def preset(name: str, channels: str = "RGB") -> Preprocess:
    """``unit``: pixels to 0..1 at the size they have; ``imagenet``: the usual evaluation transform of ImageNet models.

    Raises: UsageError for another name, or for imagenet without three channels.
    """
    count = CHANNELS[channels]
    unit = Preprocess("image", channels=channels, range=(0.0, 1.0), mean=(0.0,) * count, std=(1.0,) * count)
    if name == "unit":
        return unit
    if name != "imagenet":
        raise UsageError(f"no preset {name!r}{_suggestion(name, ('imagenet', 'unit'))}; accepted: imagenet, unit")
    if channels != "RGB":
        raise UsageError(f"the preset imagenet has RGB channels, not {channels}; write a sidecar, or use unit")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return replace(unit, size=(224, 224), resize="shorter-side", crop=0.875, mean=mean, std=std)


def find(
    model: Path, override: str | None, embedded: Mapping[str, Any] | None, channels: str = "RGB"
) -> Preprocess | None:
    """From ``--preprocess`` (a preset, which takes ``channels``, or a file), else ``<stem>.toml``, else embedded."""
    if override in ("imagenet", "unit"):
        return preset(override, channels)
    if override is not None:
        if not Path(override).is_file():
            near = _suggestion(override, ("imagenet", "unit"))
            raise UsageError(f"--preprocess {override!r}: no such file{near}; accepted: a sidecar file, imagenet, unit")
        return load_sidecar(Path(override))
    sidecar = model.with_suffix(".toml")
    if sidecar.is_file():
        return load_sidecar(sidecar)
    return None if embedded is None else from_mapping(embedded, f"{model} (embedded)", None)


def parse_embedded(text: str | None, origin: str) -> Mapping[str, Any] | None:
    """The sidecar that a model file carries as text, None for none. Raises UsageError if it is not TOML."""
    if text is None:
        return None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin} (embedded attrcli.toml): is not TOML: {error}") from error


def to_toml(preprocess: Preprocess) -> str:
    """The text of a sidecar, labels inline; ``load_sidecar`` gives an equal Preprocess back."""
    return tomli_w.dumps(preprocess.as_dict())
