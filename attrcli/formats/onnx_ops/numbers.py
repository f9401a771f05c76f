"""Arithmetic on shapes: ops whose operands are all known numbers never enter the graph.

Each function takes and returns Known; elements that depend on the batch stay symbolic, so that a graph with a free
batch comes out of `Shape -> Gather -> Concat -> Reshape` chains. None means: take the tensor op instead.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from attrcli.formats.onnx_ops.base import SMALL, Known, Node, dtype_of, objects
from attrcli.graph.build import Builder, Value

NumberOp = Callable[..., Known | list[Known] | None]


def _elementwise(function: Callable[..., Any], dtype: torch.dtype | None = None) -> NumberOp:
    """A Python function of one or two numbers over broadcast arrays."""

    def run(b: Builder, n: Node, *operands: Known) -> Known:
        apply = np.frompyfunc(lambda *items: function(b, *items), len(operands), 1)
        return Known(objects(apply(*(operand.array for operand in operands))), dtype or operands[0].dtype)

    return run


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda b, *items: b.number(function, *items)


def _variadic(function: Callable[..., Any]) -> NumberOp:
    def run(b: Builder, n: Node, *operands: Known) -> Known:
        result = operands[0].array
        apply = np.frompyfunc(lambda x, y: b.number(function, x, y), 2, 1)
        for operand in operands[1:]:
            result = objects(apply(result, operand.array))
        return Known(result, operands[0].dtype)

    return run


def _add(b: Builder, x: Any, y: Any) -> Any:
    if isinstance(y, int) and y == 0:
        return x
    return y if isinstance(x, int) and x == 0 else b.number(operator.add, x, y)


def _multiply(b: Builder, x: Any, y: Any) -> Any:
    if isinstance(y, int) and y == 1:
        return x
    return y if isinstance(x, int) and x == 1 else b.number(operator.mul, x, y)


def _integer_quotient(b: Builder, x: Any, y: Any) -> Any:
    if not isinstance(x, Value) and not isinstance(y, Value):
        quotient = abs(x) // abs(y)
        return quotient if (x < 0) == (y < 0) else -quotient
    if isinstance(y, int) and y == 1:
        return x
    if any(item < 0 for side in (x, y) for item in (side.probes if isinstance(side, Value) else (side,))):
        b.refuse("division of a negative number that depends on the batch size")
    return b.number(operator.floordiv, x, y)


def _divide(b: Builder, n: Node, x: Known, y: Known) -> Known | None:
    function = _plain(operator.truediv) if x.dtype.is_floating_point else _integer_quotient
    return _elementwise(function)(b, n, x, y)  # type: ignore[return-value]


def _modulo(b: Builder, n: Node, x: Known, y: Known) -> Known | None:
    if n.get("fmod", 0):
        return None
    return _elementwise(_plain(operator.mod))(b, n, x, y)  # type: ignore[return-value]


def _choose(b: Builder, condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


def where(b: Builder, n: Node, condition: Known, x: Known, y: Known) -> Known:
    """Where: the conditions are constants, since comparing refuses what depends on the batch."""
    apply = np.frompyfunc(lambda *items: _choose(b, *items), 3, 1)
    return Known(objects(apply(condition.array, x.array, y.array)), x.dtype)


def cast(b: Builder, n: Node, x: Known) -> Known:
    """Cast; towards zero where a float becomes an integer, which for sizes is down."""
    dtype = dtype_of(b, n.get("to"))

    def convert(b: Builder, number: Any) -> Any:
        if dtype is torch.bool:
            return b.number(operator.ne, number, 0)
        if isinstance(number, Value):
            return b.number(math.floor, number) if x.dtype.is_floating_point and not dtype.is_floating_point else number
        return float(number) if dtype.is_floating_point else int(number)

    return _elementwise(convert, dtype)(b, n, x)  # type: ignore[return-value]


def _shaped(items: list[Any], shape: tuple[int, ...], dtype: torch.dtype) -> Known:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return Known(array.reshape(shape), dtype)


def gather(b: Builder, n: Node, x: Known, index: Known) -> Known | None:
    """Gather with constant indices."""
    if any(isinstance(item, Value) for item in index.list()):
        return None
    taken = np.take(x.array, index.array.astype(np.int64), axis=n.get("axis", 0))
    return Known(objects(taken) if not isinstance(taken, np.ndarray) else taken, x.dtype)


def concat(b: Builder, n: Node, *operands: Known) -> Known:
    """Concat."""
    return Known(np.concatenate([operand.array for operand in operands], axis=n.get("axis", 0)), operands[0].dtype)


def slice_(
    b: Builder,
    n: Node,
    x: Known,
    starts: Known | None = None,
    ends: Known | None = None,
    axes: Known | None = None,
    steps: Known | None = None,
) -> Known | None:
    """Slice, attributes (opset 1) or inputs (opset 10)."""
    begin, end = (
        n.get(name) if given is None else given.list() for name, given in (("starts", starts), ("ends", ends))
    )
    along = n.get("axes", list(range(len(begin)))) if axes is None else axes.list()
    step = [1] * len(begin) if steps is None else steps.list()
    if any(isinstance(item, Value) for item in (*begin, *end, *along, *step)):
        return None
    selection = [slice(None)] * x.array.ndim
    for axis, *parts in zip(along, begin, end, step, strict=True):
        selection[axis] = _python_slice(*parts)
    return Known(x.array[tuple(selection)], x.dtype)


def _python_slice(start: int, end: int, step: int) -> slice:
    """ONNX ends before the first element with a large negative number where Python has None."""
    return slice(start, None if step < 0 and end < -(1 << 30) else end, step)


def squeeze(b: Builder, n: Node, x: Known, axes: Known | None = None) -> Known:
    """Squeeze."""
    along = n.get("axes") if axes is None else axes.list()
    return Known(np.squeeze(x.array, axis=None if along is None else tuple(along)), x.dtype)


def unsqueeze(b: Builder, n: Node, x: Known, axes: Known | None = None) -> Known:
    """Unsqueeze."""
    along = n.get("axes") if axes is None else axes.list()
    return Known(np.expand_dims(x.array, tuple(along)), x.dtype)


def reshape(b: Builder, n: Node, x: Known, shape: Known | None = None) -> Known | None:
    """Reshape."""
    sizes = n.get("shape") if shape is None else shape.list()
    if any(isinstance(size, Value) for size in sizes):
        return None
    if not n.get("allowzero", 0):
        sizes = [x.array.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return Known(x.array.reshape(sizes), x.dtype)


def transpose(b: Builder, n: Node, x: Known) -> Known:
    """Transpose."""
    return Known(np.transpose(x.array, n.get("perm")), x.dtype)


def expand(b: Builder, n: Node, x: Known, shape: Known) -> Known | None:
    """Expand to a constant shape."""
    sizes = shape.list()
    if any(isinstance(size, Value) or size < 0 for size in sizes) or math.prod(sizes) * x.array.size > SMALL:
        return None
    return Known(x.array * np.ones(sizes, dtype=object) if not _symbolic(x) else _broadcast(x, sizes), x.dtype)


def _symbolic(x: Known) -> bool:
    return any(isinstance(number, Value) for number in x.list())


def _broadcast(x: Known, sizes: list[int]) -> Any:
    return np.broadcast_to(x.array, np.broadcast_shapes(x.array.shape, tuple(sizes)))


def constant_of_shape(b: Builder, n: Node, shape: Known) -> Known | None:
    """A small integer constant; anything else is a tensor."""
    value = n.get("value")
    sizes = shape.list()
    if value is None or value.dtype.is_floating_point or any(isinstance(size, Value) for size in sizes):
        return None
    if any(size < 0 for size in sizes) or math.prod(sizes) > SMALL:
        return None
    return Known(np.full(sizes, value.item(), dtype=object), value.dtype)


def range_(b: Builder, n: Node, start: Known, stop: Known, step: Known) -> Known | None:
    """A short integer range."""
    ends = [item.array.reshape(-1)[0] for item in (start, stop, step)]
    if not all(type(end) is int for end in ends) or ends[2] == 0 or len(range(*ends)) > SMALL:
        return None
    return _shaped(list(range(*ends)), (len(range(*ends)),), start.dtype)


def _reduce(function: Callable[..., Any]) -> NumberOp:
    """A reduction of one axis or of all."""

    def run(b: Builder, n: Node, x: Known, axes: Known | None = None) -> Known | None:
        along = n.get("axes") if axes is None else axes.list()
        if x.array.ndim > 1 or x.array.size == 0 or (not along and n.get("noop_with_empty_axes", 0)):
            return None
        result = x.list()[0]
        for number in x.list()[1:]:
            result = b.number(function, result, number)
        return _shaped([result], (1,) * x.array.ndim if n.get("keepdims", 1) else (), x.dtype)

    return run


def tile(b: Builder, n: Node, x: Known, repeats: Known) -> Known | None:
    """Tile a constant number of times."""
    if _symbolic(repeats) or math.prod(repeats.list()) * x.array.size > SMALL:
        return None
    return Known(np.tile(x.array, repeats.list()), x.dtype)


def split(b: Builder, n: Node, x: Known, sizes: Known | None = None) -> list[Known] | None:
    """Split along an axis, evenly or in given sizes."""
    axis, count = n.get("axis", 0), len(n.outputs)
    each = n.get("split") if sizes is None else sizes.list()
    if each is None:
        size = -(-x.array.shape[axis] // count)
        each = [min(size, x.array.shape[axis] - i * size) for i in range(count)]
    return [Known(part, x.dtype) for part in np.split(x.array, np.cumsum(each)[:-1].tolist(), axis=axis)]


def shape(b: Builder, n: Node, x: Known) -> Known:
    """Shape of known numbers."""
    sizes = list(x.array.shape)[n.get("start", 0) : n.get("end")]
    return _shaped(sizes, (len(sizes),), torch.int64)


ON_NUMBERS: dict[str, NumberOp] = {
    "Abs": _elementwise(_plain(abs)),
    "Add": _elementwise(_add),
    "And": _elementwise(_plain(lambda x, y: x and y)),
    "Cast": cast,
    "Ceil": _elementwise(_plain(math.ceil)),
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Div": _divide,
    "Equal": _elementwise(_plain(operator.eq), torch.bool),
    "Expand": expand,
    "Floor": _elementwise(_plain(math.floor)),
    "Gather": gather,
    "Greater": _elementwise(_plain(operator.gt), torch.bool),
    "GreaterOrEqual": _elementwise(_plain(operator.ge), torch.bool),
    "Identity": lambda b, n, x: x,
    "Less": _elementwise(_plain(operator.lt), torch.bool),
    "LessOrEqual": _elementwise(_plain(operator.le), torch.bool),
    "Max": _variadic(max),
    "Min": _variadic(min),
    "Mod": _modulo,
    "Mul": _elementwise(_multiply),
    "Neg": _elementwise(_plain(operator.neg)),
    "Not": _elementwise(_plain(operator.not_)),
    "Or": _elementwise(_plain(lambda x, y: x or y)),
    "Range": range_,
    "ReduceMax": _reduce(max),
    "ReduceMin": _reduce(min),
    "ReduceProd": _reduce(operator.mul),
    "ReduceSum": _reduce(operator.add),
    "Reshape": reshape,
    "Shape": shape,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Sub": _elementwise(_plain(operator.sub)),
    "Sum": _variadic(operator.add),
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Where": where,
}
