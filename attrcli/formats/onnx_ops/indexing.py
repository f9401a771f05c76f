"""Ops that pick and place elements by index."""

from typing import Any

import torch

from attrcli.formats.onnx_ops.base import (
    Known,
    Node,
    Op,
    Operand,
    Result,
    Table,
    aten,
    axis_of,
    limit,
    product,
    tensor,
)
from attrcli.formats.onnx_ops.base import constant as constant_number
from attrcli.graph.build import Builder, Value


def _index(b: Builder, index: Value, size: Any) -> Result:
    """Indices as torch wants them: int64, counted from the front; one beyond the end stays there, for an error."""
    index = b.call(aten.to.dtype, index, torch.int64)
    if not index.data and not index.probes[0].is_meta and all(bool((probe >= 0).all()) for probe in index.probes):
        return index
    from_end = b.call(aten.add.Tensor, index, b.as_tensor(size) if isinstance(size, Value) else size)
    return b.call(aten.where.self, b.call(aten.lt.Scalar, index, 0), from_end, index)


def _is_constant(x: Value) -> bool:
    return not x.data and not x.probes[0].is_meta


def gather(b: Builder, n: Node, x: Operand, index: Operand) -> Result:
    """Gather: one slice, rows of a constant matrix (an embedding), or slices in general."""
    value = tensor(b, x)
    axis, place = axis_of(b, n.get("axis", 0), value.rank), constant_number(index)
    places = tensor(b, index)
    if place is not None:
        picked = b.call(aten.select.int, value, axis, place)
        for _ in range(places.rank):
            picked = b.call(aten.unsqueeze.default, picked, axis)
        return picked
    if axis == 0 and value.rank == 2 and _is_constant(value) and places.data:
        return b.call(aten.embedding.default, value, _index(b, places, value.probes[0].shape[0]))
    return b.call(aten.index.Tensor, value, [None] * axis + [_index(b, places, b.size(value, axis))])


def gather_elements(b: Builder, n: Node, x: Value, index: Value) -> Result:
    """GatherElements."""
    axis = axis_of(b, n.get("axis", 0), x.rank)
    return b.call(aten.gather.default, x, axis, _index(b, index, b.size(x, axis)))


def gather_nd(b: Builder, n: Node, x: Value, index: Value) -> Result:
    """GatherND; batch dimensions are indexed by their own positions."""
    batch, places = n.get("batch_dims", 0), []
    for i in range(batch):
        own = b.call(aten.arange.default, b.size(x, i))
        places.append(b.call(aten.reshape.default, own, [-1, *[1] * (index.rank - 2 - i)]))
    return b.call(aten.index.Tensor, x, [*places, *_columns(b, x, index, batch)])


def _columns(b: Builder, x: Value, index: Value, first: int) -> list[Value]:
    """The last dimension of an index tensor as one index per dimension of `x`, from dimension `first` on."""
    count = index.probes[0].shape[-1]
    return [_index(b, b.call(aten.select.int, index, -1, i), b.size(x, first + i)) for i in range(count)]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(b: Builder, n: Node, x: Value, index: Value, updates: Value) -> Result:
    """ScatterElements (Scatter before opset 11), with any reduction."""
    axis, reduction = axis_of(b, n.get("axis", 0), x.rank), n.get("reduction", "none")
    index = _index(b, index, b.size(x, axis))
    if reduction == "none":
        return b.call(aten.scatter.src, x, axis, index, updates)
    if reduction == "add":
        return b.call(aten.scatter_add.default, x, axis, index, updates)
    return b.call(aten.scatter_reduce.two, x, axis, index, updates, _REDUCE[reduction])


def scatter_nd(b: Builder, n: Node, x: Value, index: Value, updates: Value) -> Result:
    """ScatterND; `mul`, `min` and `max` scatter rows at linear indices."""
    reduction, columns = n.get("reduction", "none"), _columns(b, x, index, 0)
    if reduction in ("none", "add"):
        return b.call(aten.index_put.default, x, columns, updates, reduction == "add")
    sizes, count = b.sizes(x), len(columns)
    if any(isinstance(size, Value) for size in sizes[:count]):
        b.refuse(f"ScatterND with reduction '{reduction}' into a dimension that depends on the batch size")
    place = columns[0]
    for column, size in zip(columns[1:], sizes[1:count], strict=True):
        place = b.call(aten.add.Tensor, b.call(aten.mul.Scalar, place, size), column)
    width = product(b, sizes[count:])
    rows = b.call(aten.reshape.default, updates, [-1, width])
    place = b.call(aten.expand.default, b.call(aten.reshape.default, place, [-1, 1]), b.sizes(rows))
    flat = b.call(aten.reshape.default, x, [product(b, sizes[:count]), width])
    flat = b.call(aten.scatter_reduce.two, flat, 0, place, rows, _REDUCE[reduction])
    return b.call(aten.reshape.default, flat, sizes)


def one_hot(b: Builder, n: Node, index: Operand, depth: Operand, values: Operand) -> Result:
    """OneHot; an index outside [-depth, depth) is off everywhere."""
    count = constant_number(depth)
    places, pair = tensor(b, index), tensor(b, values)
    if count is None:
        b.refuse("OneHot whose depth is not a constant")
    count = int(count)
    limit(b, [count])
    axis = axis_of(b, n.get("axis", -1), places.rank + 1)
    places = b.call(aten.to.dtype, places, torch.int64)
    wrapped = b.call(aten.where.self, b.call(aten.lt.Scalar, places, 0), b.call(aten.add.Scalar, places, count), places)
    along = b.call(aten.reshape.default, b.call(aten.arange.default, count), [-1, *[1] * (places.rank - axis)])
    chosen = b.call(aten.eq.Tensor, b.call(aten.unsqueeze.default, wrapped, axis), along)
    off, on = (b.call(aten.select.int, pair, 0, i) for i in (0, 1))
    return b.call(aten.where.self, chosen, on, off)


def compress(b: Builder, n: Node, x: Value, condition: Known) -> Result:
    """Compress by a constant condition."""
    places = [i for i, wanted in enumerate(condition.list()) if wanted]
    axis = n.get("axis")
    if axis is None:
        x, axis = b.call(aten.reshape.default, x, [-1]), 0
    return b.call(aten.index_select.default, x, axis, b.literal(places, torch.int64))


def nonzero(b: Builder, n: Node, x: Value) -> Result:
    """NonZero of a constant."""
    if not _is_constant(x):
        b.refuse("NonZero, whose result has a size that depends on the data")
    return b.call(aten.permute.default, b.call(aten.nonzero.default, x), [1, 0])


def reverse_sequence(b: Builder, n: Node, x: Value, lengths: Value) -> Result:
    """ReverseSequence: element t of a sequence of length l comes from l - 1 - t, beyond l from itself."""
    batch, time = n.get("batch_axis", 1), n.get("time_axis", 0)
    steps = b.call(aten.arange.default, b.size(x, time))
    shape: list[int] = [1] * x.rank
    steps = b.call(aten.reshape.default, steps, [*shape[:time], -1, *shape[time + 1 :]])
    ends = b.call(aten.reshape.default, lengths, [*shape[:batch], -1, *shape[batch + 1 :]])
    back = b.call(aten.sub.Tensor, b.call(aten.sub.Scalar, ends, 1), steps)
    place = b.call(aten.where.self, b.call(aten.ge.Scalar, back, 0), back, steps)
    return b.call(aten.gather.default, x, time, b.call(aten.expand.default, place, b.sizes(x)))


def tensor_scatter(b: Builder, n: Node, x: Value, update: Value, starts: Value | None = None) -> Result:
    """TensorScatter: an update written into a cache from a place of each sample on, around the end if circular."""
    axis = axis_of(b, n.get("axis", -2), x.rank)
    count, size = b.size(update, axis), b.size(x, axis)
    shape: list[int] = [1] * x.rank
    places = b.call(aten.reshape.default, b.call(aten.arange.default, count), [*shape[:axis], -1, *shape[axis + 1 :]])
    if starts is not None:
        first = b.call(aten.reshape.default, starts, [-1, *shape[1:]])
        places = b.call(aten.add.Tensor, places, first)
    if n.get("mode", "linear") == "circular":
        places = b.call(aten.remainder.Scalar, places, size)
    return b.call(aten.scatter.src, x, axis, b.call(aten.expand.default, places, b.sizes(update)), update)


INDEXING: Table = {
    "Compress": {9: Op(compress, reads=(1,))},
    "Gather": {1: Op(gather, raw=True)},
    "GatherElements": {11: gather_elements},
    "GatherND": {11: gather_nd},
    "NonZero": {9: nonzero},
    "OneHot": {9: Op(one_hot, raw=True)},
    "ReverseSequence": {10: reverse_sequence},
    "Scatter": {9: scatter_elements},
    "ScatterElements": {11: scatter_elements},
    "ScatterND": {11: scatter_nd},
    "TensorScatter": {24: tensor_scatter},
}
