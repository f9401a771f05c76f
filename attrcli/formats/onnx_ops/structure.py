"""Ops that make, shape, join and cut tensors without looking at their contents."""

import math
from typing import Any

import numpy as np
import torch

from attrcli.formats.onnx_ops.base import (
    Known,
    Node,
    Op,
    Operand,
    Result,
    Stored,
    Table,
    aten,
    axis_of,
    dtype_of,
    known,
    limit,
    modest,
    objects,
    product,
    reads,
    tensor,
)
from attrcli.graph.build import Builder, Value

# -- constants and sizes -------------------------------------------------------------------------------------------


def constant(b: Builder, n: Node) -> Result:
    """Constant, in any of its attributes."""
    for name, dtype in (
        ("value", None),
        ("sparse_value", None),
        ("value_float", torch.float32),
        ("value_floats", torch.float32),
        ("value_int", torch.int64),
        ("value_ints", torch.int64),
    ):
        if (value := n.get(name)) is not None:
            stored = value if dtype is None else torch.tensor(value, dtype=dtype)
            return Stored(stored, n.outputs[0], stored.is_floating_point() and stored.dim() > 0)
    b.refuse(f"Constant with {', '.join(n.attributes) or 'no value'}")


def identity(b: Builder, n: Node, x: Operand) -> Result:
    """Identity."""
    return x


def dropout(b: Builder, n: Node, x: Operand, ratio: Operand = None, training: Operand = None) -> Result:
    """Dropout as it predicts: the identity; its mask is all true."""
    mode = known(b, training)
    if mode is not None and mode.list()[0] and (ratio is None or known(b, ratio).list()[0]):  # type: ignore[union-attr]
        b.refuse("Dropout in training mode: export the model in evaluation mode")
    if not n.wants(1):
        return x
    return [x, b.call(aten.ones_like.default, tensor(b, x), dtype=torch.bool)]


def shape(b: Builder, n: Node, x: Operand) -> Result:
    """Shape, or a slice of it, as numbers."""
    value = tensor(b, x)
    sizes = b.sizes(value)[n.get("start", 0) : n.get("end")]
    array = np.empty(len(sizes), dtype=object)
    array[:] = sizes
    return Known(array, torch.int64)


def size(b: Builder, n: Node, x: Operand) -> Result:
    """Size as a number."""
    value = tensor(b, x)
    return Known(objects(product(b, b.sizes(value))), torch.int64)


def constant_of_shape(b: Builder, n: Node, sizes: Known) -> Result:
    """ConstantOfShape; sizes may depend on the batch."""
    value = n.get("value")
    limit(b, sizes.list())
    number = 0.0 if value is None else value.item()
    dtype = torch.float32 if value is None else value.dtype
    return b.call(aten.full.default, sizes.list(), number, dtype=dtype)


def range_(b: Builder, n: Node, start: Known, stop: Known, step: Known) -> Result:
    """Range; its end may depend on the batch."""
    first, last, by = (item.list()[0] for item in (start, stop, step))
    if not any(isinstance(item, Value) for item in (first, last, by)):
        limit(b, [max(0, math.ceil((last - first) / by))])
    return b.call(aten.arange.start_step, first, last, by, dtype=start.dtype)


def eye_like(b: Builder, n: Node, x: Value) -> Result:
    """EyeLike."""
    rows, columns = b.sizes(x)
    dtype = dtype_of(b, n.get("dtype")) if n.get("dtype") is not None else x.dtype
    across = b.call(aten.arange.default, columns)
    down = b.call(
        aten.unsqueeze.default, b.call(aten.arange.start, n.get("k", 0), b.number(_plus, rows, n.get("k", 0))), 1
    )
    return b.call(aten.to.dtype, b.call(aten.eq.Tensor, down, across), dtype)


def _plus(first: Any, second: Any) -> Any:
    return first + second


# -- shapes --------------------------------------------------------------------------------------------------------


def reshape(b: Builder, n: Node, x: Value, sizes: Known | None = None) -> Result:
    """Reshape; 0 keeps the size in its place unless allowzero."""
    wanted = list(n.get("shape")) if sizes is None else sizes.list()
    for i, item in enumerate(wanted):
        if isinstance(item, int) and item == 0 and not n.get("allowzero", 0):
            wanted[i] = b.size(x, i)
    return b.call(aten.reshape.default, x, wanted)


def flatten(b: Builder, n: Node, x: Value) -> Result:
    """Flatten into two dimensions, cut before `axis`."""
    axis = n.get("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if axis == 1 and x.rank > 1:
        return b.call(aten.flatten.using_ints, x, 1, -1)
    sizes = b.sizes(x)
    return b.call(aten.reshape.default, x, [product(b, sizes[:axis]), product(b, sizes[axis:])])


def transpose(b: Builder, n: Node, x: Value) -> Result:
    """Transpose."""
    return b.call(aten.permute.default, x, list(n.get("perm", range(x.rank)[::-1])))


def squeeze(b: Builder, n: Node, x: Value, axes: Known | None = None) -> Result:
    """Squeeze given axes, or all of size 1."""
    along = n.get("axes") if axes is None else axes.list()
    if along is None:
        along = [i for i, item in enumerate(b.sizes(x)) if isinstance(item, int) and item == 1]
    along = [axis_of(b, axis, x.rank) for axis in along]
    if any(not isinstance(b.size(x, axis), int) or b.size(x, axis) != 1 for axis in along):
        b.refuse(f"Squeeze of an axis whose size is not 1: axes {along} of {tuple(x.probes[0].shape)}")
    return b.call(aten.squeeze.dims, x, along) if along else x


def unsqueeze(b: Builder, n: Node, x: Value, axes: Known | None = None) -> Result:
    """Unsqueeze; axes count in the result."""
    along = n.get("axes") if axes is None else axes.list()
    for axis in sorted(axis_of(b, axis, x.rank + len(along)) for axis in along):
        x = b.call(aten.unsqueeze.default, x, axis)
    return x


def expand(b: Builder, n: Node, x: Value, sizes: Known) -> Result:
    """Expand: both sides broadcast."""
    wanted = sizes.list()
    missing = x.rank - len(wanted)
    wanted = [1] * max(0, missing) + wanted
    lead = max(0, -missing)
    have = [1] * lead + b.sizes(x)
    target = []
    for i, (item, own) in enumerate(zip(wanted, have, strict=True)):
        target.append((own if i < lead else -1) if _is(item, 1) else item)
    if all(_is(item, -1) for item in target):
        return x
    if not x.data:
        limit(
            b, [own if isinstance(item, int) and item == -1 else item for item, own in zip(target, have, strict=True)]
        )
    return b.call(aten.expand.default, x, target)


def _is(item: Any, number: int) -> bool:
    """Whether a size is this number and does not depend on the batch."""
    return isinstance(item, int) and item == number


def tile(b: Builder, n: Node, x: Value, repeats: Known) -> Result:
    """Tile."""
    if not x.data:
        limit(b, [product(b, [size, times]) for size, times in zip(b.sizes(x), repeats.list(), strict=True)])
    return b.call(aten.repeat.default, x, repeats.list())


def concat(b: Builder, n: Node, *operands: Value) -> Result:
    """Concat."""
    return b.call(aten.cat.default, list(operands), n.get("axis", 1))


def split(b: Builder, n: Node, x: Value, sizes: Known | None = None) -> Result:
    """Split in given sizes, or evenly with a smaller last part."""
    axis = axis_of(b, n.get("axis", 0), x.rank)
    each, whole = n.get("split") if sizes is None else sizes.list(), b.size(x, axis)
    if each is None:
        if isinstance(whole, Value):
            b.refuse("Split of a dimension that depends on the batch size into equal parts")
        count = n.get("num_outputs", len(n.outputs))
        if not 0 < count <= max(len(n.outputs), 1):
            b.refuse(f"Split into {count} parts, for {len(n.outputs)} outputs")
        size_ = -(-whole // count)
        each = [min(size_, whole - i * size_) for i in range(count)]
    return b.call(aten.split_with_sizes.default, x, each, axis)


def slice_1(b: Builder, n: Node, x: Value) -> Result:
    """Slice with attributes."""
    starts, ends = n.get("starts"), n.get("ends")
    for i, axis in enumerate(n.get("axes", range(len(starts)))):
        x = _cut(b, x, axis_of(b, axis, x.rank), starts[i], ends[i], 1)
    return x


def slice_(
    b: Builder, n: Node, x: Value, starts: Known, ends: Known, axes: Known | None = None, steps: Known | None = None
) -> Result:
    """Slice with inputs; negative steps."""
    begin = starts.list()
    along = range(len(begin)) if axes is None else axes.list()
    by = [1] * len(begin) if steps is None else steps.list()
    for i, axis in enumerate(along):
        x = _cut(b, x, axis_of(b, axis, x.rank), begin[i], ends.list()[i], by[i])
    return x


def _cut(b: Builder, x: Value, axis: int, start: Any, end: Any, step: int) -> Result:
    if step > 0:
        if isinstance(start, int) and isinstance(end, int):
            start, end = (max(-(1 << 62), min(item, (1 << 63) - 1)) for item in (start, end))
            if start == 0 and step == 1 and end >= 1 << 31 - 1:
                return x
        return b.call(aten.slice.Tensor, x, axis, start, end, step)
    whole = b.size(x, axis)
    if not all(isinstance(item, int) for item in (whole, start, end)):
        reverse = isinstance(start, int) and (start == -1 or start >= 1 << 30)
        if not reverse or not isinstance(end, int) or end > -(1 << 30):
            b.refuse("Slice with a negative step over a dimension that depends on the batch size")
        return b.call(aten.slice.Tensor, b.call(aten.flip.default, x, [axis]), axis, 0, (1 << 63) - 1, -step)
    taken = range(whole)[slice(start, None if end < -whole else end, step)]
    if not taken:
        return b.call(aten.slice.Tensor, x, axis, 0, 0, 1)
    part = b.call(aten.slice.Tensor, x, axis, taken[-1], taken[0] + 1, -step)
    return b.call(aten.flip.default, part, [axis])


def depth_to_space(b: Builder, n: Node, x: Value) -> Result:
    """DepthToSpace, in depth-column-row or column-row-depth order."""
    size_, (batch, channels, height, width) = n.get("blocksize"), b.sizes(x)
    if n.get("mode", "DCR") == "CRD":
        return b.call(aten.pixel_shuffle.default, x, size_)
    rest = channels // (size_ * size_)
    x = b.call(aten.reshape.default, x, [batch, size_, size_, rest, height, width])
    x = b.call(aten.permute.default, x, [0, 3, 4, 1, 5, 2])
    return b.call(aten.reshape.default, x, [batch, rest, height * size_, width * size_])


def space_to_depth(b: Builder, n: Node, x: Value) -> Result:
    """SpaceToDepth, in depth-column-row or column-row-depth order."""
    size_, (batch, channels, height, width) = n.get("blocksize"), b.sizes(x)
    if n.get("mode", "DCR") == "CRD":
        return b.call(aten.pixel_unshuffle.default, x, size_)
    x = b.call(aten.reshape.default, x, [batch, channels, height // size_, size_, width // size_, size_])
    x = b.call(aten.permute.default, x, [0, 3, 5, 1, 2, 4])
    return b.call(aten.reshape.default, x, [batch, channels * size_ * size_, height // size_, width // size_])


def trilu(b: Builder, n: Node, x: Value, diagonal: Known | None = None) -> Result:
    """Trilu: the upper or lower triangle."""
    k = 0 if diagonal is None else diagonal.list()[0]
    return b.call(aten.triu.default if n.get("upper", 1) else aten.tril.default, x, k)


# -- padding -------------------------------------------------------------------------------------------------------


def pad_2(b: Builder, n: Node, x: Value) -> Result:
    """Pad with attributes."""
    return _padded(b, n, x, n.get("pads", n.get("paddings")), list(range(x.rank)), n.get("value", 0.0))


def pad(b: Builder, n: Node, x: Value, pads: Known, value: Known | None = None, axes: Known | None = None) -> Result:
    """Pad with inputs."""
    along = list(range(x.rank)) if axes is None else [axis_of(b, axis, x.rank) for axis in axes.list()]
    return _padded(b, n, x, pads.list(), along, 0 if value is None else value.list()[0])


def _padded(b: Builder, n: Node, x: Value, pads: list[int], axes: list[int], value: Any) -> Result:
    pairs = [(0, 0)] * x.rank
    for i, axis in enumerate(axes):
        pairs[axis] = (pads[i], pads[i + len(axes)])
    mode = n.get("mode", "constant")
    if mode == "constant":
        first = next((axis for axis, pair in enumerate(pairs) if pair != (0, 0)), x.rank)
        if first == x.rank:
            return x
        flat = [item for pair in reversed(pairs[first:]) for item in pair]
        return b.call(aten.constant_pad_nd.default, x, flat, value)
    if mode not in ("reflect", "edge", "wrap"):
        b.refuse(f"Pad with mode '{mode}'")
    for axis, (before, after) in enumerate(pairs):
        if (before, after) == (0, 0):
            continue
        whole = b.size(x, axis)
        if isinstance(whole, Value):
            b.refuse(f"Pad with mode '{mode}' of a dimension that depends on the batch size")
        modest(b, whole + max(0, before) + max(0, after))
        places = np.arange(whole)[max(0, -before) : whole - max(0, -after)]
        places = np.pad(places, (max(0, before), max(0, after)), mode=mode)
        x = b.call(aten.index_select.default, x, axis, b.literal(places.tolist(), torch.int64))
    return x


STRUCTURE: Table = {
    "Concat": {1: concat},
    "Constant": {1: constant},
    "ConstantOfShape": {9: reads(constant_of_shape, 0)},
    "DepthToSpace": {1: depth_to_space},
    "Dropout": {1: Op(dropout, raw=True)},
    "Expand": {8: reads(expand, 1)},
    "EyeLike": {9: eye_like},
    "Flatten": {1: flatten},
    "Identity": {1: Op(identity, raw=True)},
    "Pad": {1: pad_2, 11: reads(pad, 1, 2, 3)},
    "Range": {11: reads(range_, 0, 1, 2)},
    "Reshape": {1: reads(reshape, 1)},
    "Shape": {1: Op(shape, raw=True)},
    "Size": {1: Op(size, raw=True)},
    "Slice": {1: slice_1, 10: reads(slice_, 1, 2, 3, 4)},
    "SpaceToDepth": {1: space_to_depth},
    "Split": {1: reads(split, 1)},
    "Squeeze": {1: reads(squeeze, 1)},
    "Tile": {6: reads(tile, 1)},
    "Transpose": {1: transpose},
    "Trilu": {14: reads(trilu, 1)},
    "Unsqueeze": {1: reads(unsqueeze, 1)},
}
