"""Reductions over axes, scans along one, and choices of the largest."""

import math
from collections.abc import Callable
from typing import Any

import torch

from attrcli.formats.onnx_ops.base import Known, Node, Result, Table, aten, axis_of, reads
from attrcli.graph.build import Builder, Value


def _axes(b: Builder, n: Node, x: Value, axes: Known | None) -> list[int] | None:
    """Axes to reduce, from attribute or input; None where an empty list means no reduction."""
    given = n.get("axes") if axes is None else axes.list()
    if given:
        return sorted(axis_of(b, axis, x.rank) for axis in given)
    return None if n.get("noop_with_empty_axes", 0) else list(range(x.rank))


def _reduction(
    reduce: Callable[..., Result],
    before: Callable[..., Result] | None = None,
    after: Callable[..., Result] | None = None,
) -> Callable[..., Result]:
    """`after(reduce(before(x), axes, keepdims))`; without axes the element-wise parts alone."""

    def run(b: Builder, n: Node, x: Value, axes: Known | None = None) -> Result:
        along = _axes(b, n, x, axes)
        x = before(b, x) if before else x
        if along is not None and x.rank:
            x = reduce(b, x, along, bool(n.get("keepdims", 1)))
        return after(b, x) if after else x

    return run


def _direct(op: Any) -> Callable[..., Result]:
    return lambda b, x, axes, keep: b.call(op, x, axes, keep)


def _unary(op: Any) -> Callable[..., Result]:
    return lambda b, x: b.call(op, x)


def _sum(b: Builder, x: Value, axes: list[int], keep: bool) -> Result:
    return b.call(aten.sum.dim_IntList, x, axes, keep, dtype=x.dtype)


def _mean(b: Builder, x: Value, axes: list[int], keep: bool) -> Result:
    if x.dtype.is_floating_point:
        return b.call(aten.mean.dim, x, axes, keep)
    count = b.literal(1, x.dtype)
    for axis in axes:
        count = b.call(aten.mul.Tensor, count, b.as_tensor(b.size(x, axis), x.dtype))
    return b.call(aten.div.Tensor_mode, _sum(b, x, axes, keep), count, rounding_mode="trunc")


def _product(b: Builder, x: Value, axes: list[int], keep: bool) -> Result:
    for axis in reversed(axes):
        x = b.call(aten.prod.dim_int, x, axis, keep, dtype=x.dtype)
    return x


def _norm(b: Builder, x: Value, axes: list[int], keep: bool) -> Result:
    if not x.dtype.is_floating_point:
        squares = _sum(b, b.call(aten.mul.Tensor, x, x), axes, keep)
        root = b.call(aten.sqrt.default, b.call(aten.to.dtype, squares, b.dtype))
        return b.call(aten.to.dtype, root, x.dtype)
    return b.call(aten.linalg_vector_norm.default, x, 2, axes, keep)


def _extreme(op: Any) -> Callable[..., Result]:
    """amax or amin; over nothing, the least or the largest number there is."""

    def run(b: Builder, x: Value, axes: list[int], keep: bool) -> Result:
        sizes = b.sizes(x)
        if all(isinstance(sizes[axis], Value) or sizes[axis] for axis in axes):
            return b.call(op, x, axes, keep)
        sizes = [1 if i in axes else size for i, size in enumerate(sizes) if keep or i not in axes]
        bound = -math.inf if op is aten.amax.default else math.inf
        if not x.dtype.is_floating_point:
            least, largest = (False, True) if x.dtype is torch.bool else _range(x.dtype)
            bound = least if bound < 0 else largest
        return b.call(aten.full.default, sizes, bound, dtype=x.dtype)

    return run


def _range(dtype: torch.dtype) -> tuple[int, int]:
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def argument(op: Any) -> Callable[..., Result]:
    """ArgMax or ArgMin; the first or the last of equal ones."""

    def run(b: Builder, n: Node, x: Value) -> Result:
        axis, keep = axis_of(b, n.get("axis", 0), x.rank), bool(n.get("keepdims", 1))
        if not n.get("select_last_index", 0):
            return b.call(op, x, axis, keep)
        last = b.number(lambda size: size - 1, b.size(x, axis))
        found = b.call(op, b.call(aten.flip.default, x, [axis]), axis, keep)
        return b.call(aten.rsub.Scalar, found, last)

    return run


def cumulative(op: Any, neutral: float) -> Callable[..., Result]:
    """CumSum or CumProd; reversed, exclusive."""

    def run(b: Builder, n: Node, x: Value, axis: Known) -> Result:
        along = axis_of(b, axis.list()[0], x.rank)
        if n.get("reverse", 0):
            x = b.call(aten.flip.default, x, [along])
        if n.get("exclusive", 0):
            pads = [0] * 2 * (x.rank - along)
            pads[-2:] = [1, -1]
            x = b.call(aten.constant_pad_nd.default, x, pads, neutral)
        x = b.call(op, x, along, dtype=x.dtype)
        return b.call(aten.flip.default, x, [along]) if n.get("reverse", 0) else x

    return run


def top_k(b: Builder, n: Node, x: Value, k: Known | None = None) -> Result:
    """TopK: values and indices; of equal ones the first, as aten.topk does not promise."""
    count = n.get("k") if k is None else k.list()[0]
    axis = axis_of(b, n.get("axis", -1), x.rank)
    ordered = b.call(aten.sort.stable, x, stable=True, dim=axis, descending=bool(n.get("largest", 1)))
    return [b.call(aten.slice.Tensor, part, axis, 0, count, 1) for part in ordered]


_ROWS: dict[str, Callable[..., Result]] = {
    "ReduceL1": _reduction(_sum, before=_unary(aten.abs.default)),
    "ReduceL2": _reduction(_norm),
    "ReduceLogSum": _reduction(_sum, after=_unary(aten.log.default)),
    "ReduceLogSumExp": _reduction(_direct(aten.logsumexp.default)),
    "ReduceMax": _reduction(_extreme(aten.amax.default)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(_extreme(aten.amin.default)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum, before=_unary(aten.square.default)),
}

REDUCTIONS: Table = {
    **{name: {1: reads(row, 1)} for name, row in _ROWS.items()},
    "ArgMax": {1: argument(aten.argmax.default)},
    "ArgMin": {1: argument(aten.argmin.default)},
    "CumProd": {26: reads(cumulative(aten.cumprod.default, 1.0), 1)},
    "CumSum": {11: reads(cumulative(aten.cumsum.default, 0.0), 1)},
    "TopK": {1: reads(top_k, 1)},
}
