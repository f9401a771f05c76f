"""What a method says of itself, read from its source without importing it: importing a method imports torch."""

import ast
import difflib
import importlib.util
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attrcli.errors import UsageError


@dataclass(frozen=True)
class Option:
    """One option: its type (`int | auto`), its default, and the line that explains it."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class Description:
    """A method: `needs`, `gives` and `axioms` as `Method` has them, `cost` in passes per sample."""

    name: str
    summary: str
    text: str
    paper: str
    cost: str
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    axioms: tuple[str, ...]
    options: tuple[Option, ...]


def unknown(kind: str, name: str, known: Sequence[str]) -> UsageError:
    """The error for a name that is not in a list, with the nearest one that is."""
    close = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return UsageError(f"unknown {kind} '{name}'{hint}; choose from: {', '.join(known)}")


def unknown_option(description: Description, name: str) -> UsageError:
    """The error for an option that a method does not have, with those that it has."""
    close = difflib.get_close_matches(name, [option.name for option in description.options], 1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    listed = ", ".join(f"{option.name}={option.default}" for option in description.options) or "none"
    return UsageError(f"{description.name} has no option '{name}'{hint}; its options: {listed}")


def describe(registry: Mapping[str, tuple[str, str]], name: str) -> Description:
    """Describe an entry of a registry. Raises UsageError for a name that is not there."""
    if name not in registry:
        raise unknown("method", name, sorted(registry))
    return _read(name, *registry[name])


@cache
def _read(name: str, path: str, summary: str) -> Description:
    module, _, cls = path.partition(":")
    package, _, leaf = module.rpartition(".")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    source = (Path((spec.submodule_search_locations or [""])[0]) / f"{leaf}.py").read_text()
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == cls)
    facts: dict[str, Any] = {}
    options: list[Option] = []
    for position, item in enumerate(node.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name) or item.value is None:
            continue
        kind = ast.unparse(item.annotation)
        if kind.startswith("ClassVar"):
            facts[item.target.id] = _literal(item.value)
            continue
        following = node.body[position + 1] if position + 1 < len(node.body) else None
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        options.append(Option(item.target.id, _readable(kind), ast.literal_eval(item.value), text))
    return Description(
        name=name,
        summary=summary,
        text=ast.get_docstring(node) or "",
        paper=facts["paper"],
        cost=facts["cost"],
        needs=tuple(sorted(facts["needs"])),
        gives=tuple(sorted(facts["gives"])),
        axioms=tuple(sorted(facts["axioms"])),
        options=tuple(options),
    )


def _readable(annotation: str) -> str:
    """A type for people: the choices of a Literal without its name and quotes."""
    return re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), annotation)


def _literal(node: ast.expr) -> Any:
    """A literal; `frozenset({...})` counts as one."""
    if isinstance(node, ast.Call):
        return ast.literal_eval(node.args[0]) if node.args else set()
    return ast.literal_eval(node)


def convert(kind: type, name: str, description: Description, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check option names and convert text to each option's type. Raises UsageError with the method's options."""
    hints = get_type_hints(kind)
    known = {option.name: option for option in description.options}
    values = {}
    for key, value in options.items():
        if key not in known:
            raise unknown_option(description, key)
        try:
            values[key] = _convert(value, hints[key])
        except (ValueError, TypeError):
            why = ": it is not a finite number" if _is_endless(value) else ""
            raise UsageError(f"{name}: option {key}={value!r} does not fit its type, {known[key].type}{why}") from None
    return values


def _is_endless(value: Any) -> bool:
    """Whether a value is NaN or an infinity, as a number or as text."""
    try:
        return not math.isfinite(float(value))
    except (ValueError, TypeError):
        return False


def _convert(value: Any, kind: Any) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        for choice in get_args(kind):
            try:
                return _convert(value, choice)
            except (ValueError, TypeError):
                continue
        raise ValueError
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise ValueError
    if kind is bool:
        words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if str(value).lower() not in words:
            raise ValueError
        return words[str(value).lower()]
    if kind is type(None):
        if str(value).lower() == "none":
            return None
        raise ValueError
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise ValueError
    converted = kind(value)
    if kind is float and not math.isfinite(converted):
        raise ValueError
    return converted
