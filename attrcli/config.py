"""What `explain` depends on: flags over a `--config` file over defaults. Free of torch: mistakes show at once."""

import difflib
import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import tomli_w

from attrcli import methods
from attrcli.errors import UsageError


@dataclass(frozen=True)
class Config:
    """All options of a run, as the user gives them; command line and `--config` fill exactly these fields.

    `overlays`, `panel`, `scale` and `max_errors` say what is done with the result; all others make it.
    Raises UsageError for what can be known to be wrong without the model and the inputs.
    """

    model: str
    inputs: tuple[str, ...]
    method: str
    out: str
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str = "predicted"
    score: str = "logit"
    baseline: str | None = None
    background: str | None = None
    preprocess: str | None = None
    labels: str | None = None
    input: str | None = None
    fix: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None
    at: str | None = None
    batch_size: int | str = "auto"
    device: str = "auto"
    precision: str = "float32"
    threads: int | None = None
    seed: int = 0
    length: int | None = None
    reverse_complement: bool = False
    deterministic: bool = False
    limit: int | None = None
    fail_fast: bool = False
    force: bool = False
    trust_model: bool = False
    overlays: str | None = None
    panel: bool = False
    scale: str = "image"
    max_errors: str = "0"

    def __post_init__(self) -> None:
        described = methods.description(self.method)
        for name in self.options:
            if name not in [option.name for option in described.options]:
                raise methods.unknown_option(described, name)
        if self.batch_size != "auto" and not (isinstance(self.batch_size, int) and self.batch_size >= 1):
            raise UsageError(f"--batch-size {self.batch_size}: auto, or a whole number of at least 1")
        for name in ("limit", "threads", "length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name} {value}: a whole number of at least 1")
        for name in ("baseline", "background", "preprocess", "labels", "input", "output", "at", "overlays"):
            if getattr(self, name) == "":
                raise UsageError(f"--{name}: the text is empty; give a value, or leave the option out")
        for name, value in self.fix.items():
            if not value:
                raise UsageError(f"--fix {name}=: the text is empty; write --fix {name}=FILE or --fix {name}=zero")
        if any(len(os.fsencode(part)) > 240 for part in Path(self.out).parts):
            raise UsageError(f"--out {self.out[:60]}...: the name is too long; a file name has at most 240 bytes here")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed {self.seed}: a whole number from 0 to 2^63 - 1")
        if self.scale not in ("image", "run"):
            raise UsageError(f"--scale {self.scale}: image or run")
        self.tolerated(0)

    def tolerated(self, rows: int) -> float:
        """How many failed inputs among `rows` still count as success: `max_errors` is '3' or '5%'."""
        text = self.max_errors.removesuffix("%")
        if not text.replace(".", "", 1).isdecimal() or (text == self.max_errors and "." in text):
            raise UsageError(f"--max-errors {self.max_errors}: a whole number, or a percentage such as 5%")
        if text != self.max_errors and float(text) > 100:
            raise UsageError(f"--max-errors {self.max_errors}: a percentage is at most 100%")
        return float(text) if text == self.max_errors else rows * float(text) / 100


def resolve(given: Mapping[str, Any], file: Path | None) -> Config:
    """Flags that were given (not None) over the file over defaults.

    Raises UsageError for an unreadable file, an unknown key, a wrong type, and for what is missing.
    """
    values = {} if file is None else _read(file)
    for key, value in given.items():
        if isinstance(value, dict) and key in values:
            values[key] = {**values[key], **value}
        elif value is not None:
            values[key] = value
    for key, how in (("model", "MODEL"), ("inputs", "INPUTS"), ("method", "--method"), ("out", "--out")):
        if not values.get(key):
            raise UsageError(f"missing {how}; see attrcli explain --help")
    size = str(values.get("batch_size", "auto"))
    values["batch_size"] = int(size) if size.isdecimal() else size
    return Config(**{**values, "inputs": tuple(values["inputs"])})


def to_toml(config: Config) -> str:
    """All values as a file for `--config`, defaults and the method's own options included."""
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    options = methods.description(config.method).options
    given = {each.name: _typed(config.options.get(each.name, each.default), each.type) for each in options}
    values["options"] = {key: value for key, value in given.items() if value is not None}
    values["inputs"] = list(config.inputs)
    return tomli_w.dumps({key: value for key, value in values.items() if value not in (None, {})})


def _typed(value: Any, kind: str) -> Any:
    """An option's value as a number where the option takes numbers: on the command line all is text."""
    for name, make in (("int", int), ("float", float)):
        if isinstance(value, str) and name in kind:
            with suppress(ValueError):
                return make(value)
    return value


def _read(file: Path) -> dict[str, Any]:
    if file.exists() and not file.is_file():
        raise UsageError(f"--config {file}: not a regular file")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: is not TOML: {error}") from error
    accepted = {name: _toml_types(hint) for name, hint in get_type_hints(Config).items()}
    for key, value in values.items():
        if key not in accepted:
            close = difflib.get_close_matches(key, accepted, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UsageError(f"{file}: unknown key '{key}'{hint}; accepted: {', '.join(accepted)}")
        if type(value) not in accepted[key] or not _texts(key, value):
            names = {
                list: "a list of texts",
                dict: "a table",
                str: "a text",
                int: "a whole number",
                bool: "true or false",
            }
            what = " or ".join(names[kind] for kind in accepted[key])
            raise UsageError(f"{file}: {key} = {value!r} is not possible; accepted: {what}")
    return values


def _toml_types(hint: Any) -> tuple[type, ...]:
    """The types in which TOML gives a field."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    changed = {tuple: list, Mapping: dict}
    return tuple(changed.get(get_origin(kind) or kind, kind) for kind in kinds if kind is not type(None))


def _texts(key: str, value: Any) -> bool:
    """Whether the values inside a list or table are texts, where only texts make sense."""
    inside = {"inputs": value, "fix": value.values() if isinstance(value, dict) else ()}.get(key, ())
    return all(isinstance(each, str) for each in inside)
