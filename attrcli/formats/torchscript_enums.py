"""Enumerations of a TorchScript archive: read from its source, since the Python classes are not there.

torch hands a constant of an enumeration to Python as a member of the class that its code was compiled from. Nothing is
imported: a class of the archive's own text stands in for it while the file is read.
"""

import re
from ast import literal_eval
from dataclasses import dataclass
from types import SimpleNamespace

_CLASS = re.compile(r"^class (\w+)\(Enum\):\n((?:  .*\n?)*)", re.MULTILINE)
_MEMBER = re.compile(r'^  ([^\W_]\w*) = (-?\d[\w.+-]*|"[^"\\\n]*")$', re.MULTILINE)
"""A whole number, a float or a text without escapes: other values of members no model was seen to have."""


@dataclass(frozen=True)
class Member:
    """A constant of an enumeration; equal are those of one name in one class, as in TorchScript."""

    kind: str
    name: str
    value: int | float | str


def enumerations(file: str, source: str) -> dict[str, SimpleNamespace]:
    """The enumerations that a source file of an archive (code/__torch__/a/b.py) defines, by their full names."""
    module = file.removeprefix("code/").removesuffix(".py").replace("/", ".")
    found = {}
    for name, body in _CLASS.findall(source):
        kind = f"{module}.{name}"
        members = {member: Member(kind, member, literal_eval(value)) for member, value in _MEMBER.findall(body)}
        found[kind] = SimpleNamespace(**members)
    return found
