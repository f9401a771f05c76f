"""The tensors that a pickle of a TorchScript archive describes, told from its opcodes: nothing is unpickled.

torch makes a tensor of any shape over the bytes of a storage, however few these are, and crashes when it reads it.
"""

import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attrcli.errors import ModelError

_BYTES = {
    "Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8,
    "Double": 8, "ComplexHalf": 4, "ComplexFloat": 8, "ComplexDouble": 16,
}  # fmt: skip
"""Bytes of an element, by the name of the storage's class."""

_TENSOR = "torch._utils _rebuild_tensor_v2"


_KNOWN = ("__torch__", "torch ", "torch.", "collections ")
"""How the names begin that torch writes into its pickles: classes of the archive's own code, tensors, containers."""


class _Foreign(Exception):
    """A class or function that no archive of torch names."""


@dataclass(frozen=True)
class _Global:
    name: str


class _Machine:
    """The stack of a pickle, with objects that are never made; `tensors` are the arguments of every tensor."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[str, Any] = {}
        self.tensors: list[tuple[Any, ...]] = []

    def run(self, data: bytes) -> None:
        """Follow the opcodes. Raises ValueError for one that torch does not write, IndexError, KeyError, TypeError."""
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "GLOBAL" and not str(argument).startswith(_KNOWN):
                raise _Foreign(".".join(str(argument).split())[:80])
            if name in _PUSHED:
                self.stack.append(_PUSHED[name](argument))
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[str(argument)] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[str(argument)])
            elif name == "MARK":
                self.marks.append(len(self.stack))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                self.stack.append(tuple(self.taken(int(name[-1]))))
            elif name == "TUPLE":
                self.stack.append(tuple(self.since_mark()))
            elif name in ("APPENDS", "SETITEMS"):
                self.since_mark()
            elif name in ("APPEND", "SETITEM", "BUILD"):
                self.taken(2 if name == "SETITEM" else 1)
            elif name in ("REDUCE", "NEWOBJ"):
                self.made(*self.taken(2))
            elif name not in ("PROTO", "BINPERSID", "STOP"):
                raise ValueError(f"opcode {name}")

    def taken(self, count: int) -> list[Any]:
        """The topmost items, off the stack."""
        if len(self.stack) < count:
            raise IndexError("stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def since_mark(self) -> list[Any]:
        """The items above the last mark, off the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def made(self, function: Any, arguments: Any) -> None:
        """Instead of an object, None; a tensor is noted."""
        if function == _Global(_TENSOR):
            self.tensors.append(arguments)
        self.stack.append(None)


_PUSHED: dict[str, Any] = {
    "GLOBAL": _Global,
    "EMPTY_TUPLE": lambda argument: (),
    "EMPTY_LIST": lambda argument: None,
    "EMPTY_DICT": lambda argument: None,
    "NONE": lambda argument: None,
    "NEWTRUE": lambda argument: True,
    "NEWFALSE": lambda argument: False,
    **{
        name: lambda argument: argument
        for name in ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "BINSTRING")
    },
}


def check_tensors(name: str, data: bytes, sizes: Mapping[str, int]) -> None:
    """Raise ModelError unless every tensor of a pickle lies within its storage, and this within the archive's bytes.

    `sizes` are those of the archive's entries.
    """
    machine = _Machine()
    try:
        machine.run(data)
    except _Foreign as error:
        raise ModelError(
            f"refused: {name} names {str(error)!r}, a class or function outside torch, which loading it would call"
        ) from error
    except Exception as error:
        raise ModelError(f"a damaged TorchScript archive: {name} is no pickle that torch writes") from error
    folder = name.removesuffix(".pkl")
    for tensor in machine.tensors:
        if not _lies_within(tensor, folder, sizes):
            raise ModelError(
                f"a damaged TorchScript archive: {name} describes a tensor beyond the bytes it is stored in"
            )


def _lies_within(tensor: tuple[Any, ...], folder: str, sizes: Mapping[str, int]) -> bool:
    try:
        (_, kind, key, _, count), offset, shape, strides = tensor[:4]
        width = _BYTES[kind.name.removeprefix("torch ").removesuffix("Storage")]
        held = sizes[f"{folder}/{key}"]
        if len(shape) != len(strides) or min((count, offset, *shape, *strides)) < 0:
            return False
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    except (ValueError, TypeError, AttributeError, KeyError):
        return False
    return bool(count * width <= held and (0 in shape or last < count))
