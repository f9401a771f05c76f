"""Sidecars: the TOML beside a model, or inside it, that says how its inputs are prepared; presets in place of one."""

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from attrcli.errors import UsageError
from attrcli.letters import UNKNOWN
from attrcli.preprocess import CHANNELS, INTERPOLATION, KEYS, Preprocess

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
        accepted = "[height, width] of an image, [length] of a sequence, or the shape of one array"
        raise ValueError(f"{accepted}: whole numbers above 0")
    return tuple(value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(each, str) and each for each in value):
        raise ValueError("a list of names")
    return tuple(value)


def _alphabet(value: Any) -> str:
    if not isinstance(value, str) or re.fullmatch(r"[A-Z*-]{2,}", value) is None or len(set(value)) != len(value):
        raise ValueError('different capital letters, * or -, in the order of the channels, such as "ACGT"')
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


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
    "layout": _one_of("NCHW", "NHWC", "NCL", "NLC"),
    "alphabet": _alphabet,
    "lengths": _one_of("equal", "fit"),
    "unknown": _one_of(*UNKNOWN),
    "lowercase": _one_of("accept", "refuse"),
    "flat": _flag,
    "dtype": _one_of("float32", "float64", "float16", "uint8", "int32", "int64"),
    "columns": _such(_names, lambda names: len(set(names)) == len(names), "a list of different names"),
    "activation": _one_of("none", "softmax", "sigmoid"),
}


def load_sidecar(path: Path) -> Preprocess:
    """Read a sidecar; a labels path in it is relative to its folder.

    Raises: UsageError naming the file, and the key if one is wrong.
    """
    try:
        mapping = tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
    if kind == "sequence":
        values = {"layout": "NCL"} | values
    found = Preprocess(**values)
    problem = _contradiction(found)
    if problem:
        raise UsageError(f"{origin}: [input] {problem}")
    return found


def _contradiction(p: Preprocess) -> str | None:
    """What is wrong between keys that are right by themselves."""
    layouts = ("NCL", "NLC") if p.kind == "sequence" else ("NCHW", "NHWC")
    if p.layout not in layouts:
        return f"layout = {p.layout!r} is not possible for kind = {p.kind!r}; accepted: {', '.join(layouts)}"
    if p.kind == "sequence":
        if not p.alphabet:
            return 'alphabet is missing: the letters in the order of the channels, such as alphabet = "ACGT"'
        if p.size is not None and len(p.size) != 1:
            return f"size = {list(p.size)}: a sequence's size is [length]"
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
    whole = p.kind == "sequence" or (p.range == (0.0, 255.0) and set(p.mean) == {0.0} and set(p.std) == {1.0})
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
        return tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin} (embedded attrcli.toml): is not TOML: {error}") from error


def to_toml(preprocess: Preprocess) -> str:
    """The text of a sidecar, labels inline; ``load_sidecar`` gives an equal Preprocess back."""
    return tomli_w.dumps(preprocess.as_dict())
