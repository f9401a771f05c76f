"""Control flow and sequences: unrolled, since their conditions, trip counts and places are constants of the model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attrcli.formats.onnx_ops.base import Known, Node, Operand, aten, axis_of, dtype_of, known, objects, tensor
from attrcli.graph.build import Value

if TYPE_CHECKING:
    from attrcli.formats.onnx_ops.walk import Walk

Control = Callable[["Walk", Node, Sequence[Any]], list[Any]]

_MOST_PARTS = 1 << 16
"""Most slices that a Scan takes of a tensor, and most tensors that one is split into."""


def _number(w: "Walk", operand: Operand, what: str) -> Any:
    """The one number in an operand. Refused when it depends on the data or on the batch size."""
    if isinstance(operand, Value) and (operand.data or operand.probes[0].is_meta):
        w.b.refuse(f"{what} depends on the input's data")
    held = known(w.b, operand)
    numbers = [] if held is None else held.list()
    if len(numbers) != 1 or isinstance(numbers[0], Value):
        w.b.refuse(f"{what} depends on the batch size" if len(numbers) == 1 else f"{what} is not one number")
    return numbers[0]


def _counter(number: int | bool, dtype: torch.dtype = torch.int64) -> Known:
    return Known(objects(number), dtype)


def if_(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """If: the branch that a constant condition chooses."""
    taken = _number(w, operands[0], "the condition of an If")
    return w.subgraph(n.get("then_branch" if taken else "else_branch"), [])


def loop(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """Loop: while the condition holds, at most a number of times; carried values, then stacked outputs of each step."""
    most, going, *carried = operands
    count = math.inf if most is None else _number(w, most, "the trip count of a Loop")
    alive = True if going is None else bool(_number(w, going, "the condition of a Loop"))
    body, step = n.get("body"), 0
    each: list[list[Any]] = []
    with w.b.loop():
        while alive and step < count:
            condition, *results = w.subgraph(body, [_counter(step), _counter(True, torch.bool), *carried])
            each.append(results[len(carried) :])
            carried = results[: len(carried)]
            alive = bool(_number(w, condition, "the condition of a Loop"))
            step += 1
    stacks = len(body.output) - 1 - len(carried)
    if stacks and not each:
        return [*carried, *(_nothing(w, value) for value in body.output[1 + len(carried) :])]
    return [*carried, *(_stacked(w, [results[i] for results in each], 0) for i in range(stacks))]


def _nothing(w: "Walk", value: Any) -> Any:
    """The stacked output of no steps: its shape is what the body declares."""
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(size.HasField("dim_value") for size in kind.shape.dim):
        w.b.refuse("a Loop of no steps whose outputs have no declared shape")

    sizes = [0, *(size.dim_value for size in kind.shape.dim)]
    return w.b.call(aten.full.default, sizes, 0, dtype=dtype_of(w.b, kind.elem_type))


def _stacked(w: "Walk", items: Sequence[Any], axis: int) -> Any:
    if all(isinstance(item, Known) and item.array.ndim < 2 for item in items) and axis == 0:
        return Known(np.stack([item.array for item in items]), items[0].dtype)
    return w.b.call(aten.stack.default, [tensor(w.b, item) for item in items], axis)


def scan(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """Scan since 9: the body over slices along an axis of each scanned input."""
    body, scanned = n.get("body"), n.get("num_scan_inputs")
    states, inputs = list(operands[:-scanned]), [tensor(w.b, operand) for operand in operands[-scanned:]]
    results = len(body.output) - len(states)
    axes = n.get("scan_input_axes", [0] * scanned)
    axes = [axis_of(w.b, axis, x.rank) for axis, x in zip(axes, inputs, strict=True)]
    backwards = n.get("scan_input_directions", [0] * scanned)
    outputs = _scanned(w, body, states, inputs, axes, backwards)
    turned, along = n.get("scan_output_directions", [0] * results), n.get("scan_output_axes", [0] * results)
    stacks = []
    for items, turn, axis in zip(outputs[len(states) :], turned, along, strict=True):
        stacks.append(_stacked(w, items[::-1] if turn else items, axis))
    return [*outputs[: len(states)], *stacks]


def _scanned(
    w: "Walk", body: Any, states: list[Any], inputs: Sequence[Value], axes: Sequence[int], backwards: Sequence[int]
) -> list[Any]:
    """The last states, then the list of each output of every step."""
    lengths = {_length(w, x, axis) for x, axis in zip(inputs, axes, strict=True)}
    if len(lengths) != 1:
        w.b.refuse(f"Scan over inputs of different lengths: {sorted(lengths)}")
    each: list[list[Any]] = [[] for _ in range(len(body.output) - len(states))]
    (count,) = lengths
    for step in range(count):
        places = [count - 1 - step if back else step for back in backwards]
        slices = [w.b.call(aten.select.int, x, axis, i) for x, axis, i in zip(inputs, axes, places, strict=True)]
        results = w.subgraph(body, [*states, *slices])
        for items, item in zip(each, results[len(states) :], strict=True):
            items.append(item)
        states = results[: len(states)]
    return [*states, *each]


def _length(w: "Walk", x: Value, axis: int) -> int:
    size = w.b.size(x, axis)
    if not isinstance(size, int):
        w.b.refuse("a loop over a dimension that depends on the batch size")
    if size > _MOST_PARTS or size == 0:
        w.b.refuse(f"a loop of {size} steps")
    return size


def scan_8(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """Scan of opset 8: sample by sample over the second axis, so that it needs a fixed batch."""
    lengths, *rest = operands
    if lengths is not None:
        w.b.refuse("Scan of opset 8 with sequence lengths")
    body, scanned = n.get("body"), n.get("num_scan_inputs")
    values = [tensor(w.b, operand) for operand in rest]
    count, backwards = len(values) - scanned, n.get("directions", [0] * scanned)
    samples = []
    for i in range(_length(w, values[0], 0)):
        own = [w.b.call(aten.select.int, value, 0, i) for value in values]
        outputs = _scanned(w, body, list(own[:count]), own[count:], [0] * scanned, backwards)
        samples.append([*outputs[:count], *(_stacked(w, items, 0) for items in outputs[count:])])
    return [_stacked(w, items, 0) for items in zip(*samples, strict=True)]


def _scan(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    return (scan_8 if w.opsets.get("", 1) < 9 else scan)(w, n, operands)


# -- sequences and optionals: Python tuples, None ----------------------------------------------------------------------


def _place(w: "Walk", operand: Any, default: int) -> int:
    return default if operand is None else int(_number(w, operand, "a place in a sequence"))


def _items(w: "Walk", operand: Any) -> tuple[Any, ...]:
    if not isinstance(operand, tuple):
        w.b.refuse("a sequence that is none")
    return operand


def sequence_insert(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """SequenceInsert; at the end unless told where."""
    items, place = list(_items(w, operands[0])), _place(w, operands[2] if len(operands) > 2 else None, 1 << 30)
    items.insert(place, operands[1])
    return [tuple(items)]


def sequence_erase(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """SequenceErase; the last unless told which."""
    items = list(_items(w, operands[0]))
    del items[_place(w, operands[1] if len(operands) > 1 else None, -1)]
    return [tuple(items)]


def sequence_map(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """SequenceMap: the body over the items of sequences; a tensor beside them goes to each."""
    count = len(_items(w, operands[0]))
    rows = [
        w.subgraph(n.get("body"), [item[i] if isinstance(item, tuple) else item for item in operands])
        for i in range(count)
    ]
    return [tuple(row[k] for row in rows) for k in range(len(n.outputs))]


def split_to_sequence(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """SplitToSequence: in parts of given sizes, of one size, or of size 1."""
    x = tensor(w.b, operands[0])
    axis, given = axis_of(w.b, n.get("axis", 0), x.rank), operands[1] if len(operands) > 1 else None
    whole = w.b.size(x, axis)
    sizes = None if given is None else known(w.b, given)
    if sizes is not None and sizes.array.ndim:
        return [tuple(w.b.call(aten.split_with_sizes.default, x, sizes.list(), axis))]
    if not isinstance(whole, int):
        w.b.refuse("SplitToSequence of a dimension that depends on the batch size")
    size = 1 if sizes is None else _number(w, sizes, "the size of a split")
    if size < 1 or whole // size > _MOST_PARTS:
        w.b.refuse(f"SplitToSequence in parts of {size}")
    each = [min(size, whole - start) for start in range(0, whole, size)]
    parts = w.b.call(aten.split_with_sizes.default, x, each, axis)
    if sizes is None and not n.get("keepdims", 1):
        parts = [w.b.call(aten.squeeze.dims, part, [axis]) for part in parts]
    return [tuple(parts)]


def concat_from_sequence(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """ConcatFromSequence; along a new axis if so asked."""
    items = [tensor(w.b, item) for item in _items(w, operands[0])]
    return [w.b.call(aten.stack.default if n.get("new_axis", 0) else aten.cat.default, items, n.get("axis"))]


def _length_of(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    return [_counter(len(_items(w, operands[0])))]


def _at(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    return [_items(w, operands[0])[_place(w, operands[1], 0)]]


def optional(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """Optional: the item itself, or nothing."""
    return [operands[0] if operands else None]


def has_element(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """OptionalHasElement, a constant."""
    return [_counter(bool(operands) and operands[0] is not None, torch.bool)]


def get_element(w: "Walk", n: Node, operands: Sequence[Any]) -> list[Any]:
    """OptionalGetElement."""
    if operands[0] is None:
        w.b.refuse("the element of an optional that has none")
    return [operands[0]]


CONTROL: Mapping[str, Control] = {
    "ConcatFromSequence": concat_from_sequence,
    "If": if_,
    "Loop": loop,
    "Optional": optional,
    "OptionalGetElement": get_element,
    "OptionalHasElement": has_element,
    "Scan": _scan,
    "SequenceAt": _at,
    "SequenceConstruct": lambda w, n, operands: [tuple(operands)],
    "SequenceEmpty": lambda w, n, operands: [()],
    "SequenceErase": sequence_erase,
    "SequenceInsert": sequence_insert,
    "SequenceLength": _length_of,
    "SequenceMap": sequence_map,
    "SplitToSequence": split_to_sequence,
}
"""Ops that hold graphs, or that work on sequences and optionals of tensors."""
