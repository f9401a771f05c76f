"""What an ONNX op function works with: the node it stands for, and operands that may not be in the graph yet."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attrcli.graph.bounded import LARGEST
from attrcli.graph.build import Builder, Value, is_tensor

aten = torch.ops.aten

SMALL = 64
"""Most elements that a constant may have to take part in arithmetic on shapes."""

MODEST = 1 << 24
"""Most elements of a table that an importer writes out in Python: positions of windows, weights of a resize."""


@dataclass(frozen=True, eq=False)
class Known:
    """An ONNX tensor of numbers that are constants or depend on the batch only, kept out of the graph.

    `array` has dtype object: Python numbers, or Values that are numbers.
    """

    array: NDArray[np.object_]
    dtype: torch.dtype

    def list(self) -> list[Any]:
        """The numbers in order."""
        return list(self.array.reshape(-1))


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of the file that no op of the graph has read yet."""

    tensor: torch.Tensor
    name: str
    parameter: bool = False


Operand = Any
"""Value | Known | Stored | None where the file leaves it out | a tuple of operands: a sequence."""

Result = Any
"""What an op function returns: one output (an Operand), a list of them, or NotImplemented: take ONNX's own body."""


@dataclass(frozen=True)
class Node:
    """A node of the file: its op, its attributes as Python values, the names of its outputs ('' where not wanted)."""

    op: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] = ()

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default where the file does not give it."""
        return self.attributes.get(name, default)

    def wants(self, index: int) -> bool:
        """Whether the file uses this output."""
        return index < len(self.outputs) and bool(self.outputs[index])


@dataclass(frozen=True)
class Op:
    """A row of the op table: `function(builder, node, *inputs)` returns the output, or a list of them.

    Inputs come as tensors; those at the positions in `reads` as Known; all of them as they are when `raw`.
    """

    function: Callable[..., Any]
    reads: tuple[int, ...] = ()
    raw: bool = False


def reads(function: Callable[..., Any], *positions: int) -> Op:
    """A row whose inputs at these positions are numbers: a shape, axes, sizes."""
    return Op(function, positions)


Table = Mapping[str, Mapping[int, Callable[..., Any] | Op]]
"""Op type -> version of the operator set since which it means this -> its row."""


def objects(items: Any) -> NDArray[np.object_]:
    """An object array of a number, or of a (nested) list of numbers."""
    return np.array(items, dtype=object)


def padded(operands: Sequence[Operand], count: int) -> list[Operand]:
    """The inputs of a node with those that the file leaves out at the end."""
    return [*operands, *[None] * (count - len(operands))]


def tensor(b: Builder, operand: Operand) -> Value:
    """The operand as a tensor of the graph. Refused when the file leaves it out."""
    if operand is None:
        b.refuse("an input that must be given is missing")
    if isinstance(operand, Stored):
        return b.tensor(operand.tensor, operand.name, parameter=operand.parameter)
    if isinstance(operand, tuple):
        b.refuse("a sequence where a tensor is wanted")
    if not isinstance(operand, Known):
        value: Value = operand
        return value
    numbers = operand.list()
    if not any(isinstance(number, Value) for number in numbers):
        return b.literal(operand.array.tolist(), operand.dtype)
    scalars = [b.as_tensor(number, operand.dtype) for number in numbers]
    if operand.array.ndim == 0:
        return scalars[0]
    stacked: Value = b.call(aten.stack.default, scalars, 0)
    return stacked if operand.array.ndim == 1 else b.call(aten.reshape.default, stacked, list(operand.array.shape))


def known(b: Builder, operand: Operand) -> Known | None:
    """The operand as numbers; refused when they depend on an input's data."""
    if operand is None or isinstance(operand, Known):
        return operand
    if isinstance(operand, tuple):
        b.refuse("a sequence where numbers are wanted")
    if isinstance(operand, Stored):
        return Known(objects(operand.tensor.tolist()).reshape(operand.tensor.shape), operand.tensor.dtype)
    if operand.data or operand.probes[0].is_meta:
        b.refuse("a shape or index computed from the input's data")
    first, second = (probe.tolist() for probe in operand.probes)
    if first != second:
        b.refuse("a shape or index that depends on the batch size in a way that cannot be followed")
    return Known(objects(first).reshape(operand.probes[0].shape), operand.dtype)


def constant(operand: Operand) -> Any:
    """The number in an operand of one element, when it is a constant; None otherwise."""
    if isinstance(operand, Known):
        numbers = operand.list()
        return numbers[0] if len(numbers) == 1 and not isinstance(numbers[0], Value) else None
    if isinstance(operand, Stored):
        return operand.tensor.item() if operand.tensor.numel() == 1 else None
    if operand is None or not is_tensor(operand) or operand.data or operand.probes[0].is_meta:
        return None
    first, second = operand.probes
    return first.item() if first.numel() == 1 and bool((first == second).all()) else None


def axis_of(b: Builder, axis: int, rank: int) -> int:
    """An axis counted from the front. Refused outside the rank."""
    if not -rank <= axis < max(rank, 1):
        b.refuse(f"axis {axis} of a tensor of rank {rank}")
    return axis % rank if rank else 0


def product(b: Builder, numbers: Sequence[Any]) -> Any:
    """Product of sizes, some of which may depend on the batch."""
    fixed, free = 1, [number for number in numbers if isinstance(number, Value)]
    for number in numbers:
        fixed *= 1 if isinstance(number, Value) else number
    result: Any = fixed
    for number in free:
        result = number if isinstance(result, int) and result == 1 else b.number(operator.mul, result, number)
    return result


def modest(b: Builder, *sizes: int) -> None:
    """Refuse to write out a table of this shape when it is absurdly large."""
    limit(b, sizes, MODEST)


def limit(b: Builder, sizes: Sequence[Any], most: int = LARGEST) -> None:
    """Refuse a shape with a negative size or an absurd number of elements, before it is allocated."""
    count = 1
    for size in sizes:
        number = size.probes[1] if isinstance(size, Value) else size
        if number < 0:
            b.refuse(f"a negative size: {number}")
        count *= number
    if count > most:
        b.refuse(f"a tensor of {count} elements made from constants")


DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip
"""onnx.TensorProto.DataType by its number; strings, complex numbers and types below 8 bits are not here."""


def dtype_of(b: Builder, number: int) -> torch.dtype:
    """The torch dtype of an ONNX data type."""
    if number not in DTYPES:
        b.refuse(f"data type {number}")
    return DTYPES[number]
