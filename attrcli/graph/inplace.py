"""Writing into a tensor, made functional: the result replaces the tensor, and every tensor that it is a view of.

A write through a view is scattered up the chain to the tensor that owns the memory, whose version then goes up; a
view with an older version is replayed when it is read (`Builder.node`).
"""

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attrcli.graph.value import Value, View, is_tensor, leaves, probe, tree_map

if TYPE_CHECKING:
    from attrcli.graph.build import Builder

aten = torch.ops.aten

_FILLS = ("copy_", "fill_", "zero_")
_RESHAPES = ("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "resize_", "as_strided_", "set_")


def write(b: "Builder", op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Value:
    """Apply an in-place overload; return its target, which now holds the result.

    Refused: what changes the target's shape or strides, and overloads with an `out` argument.
    """
    name = op._schema.name.split("::")[1]
    target: Value = args[0]
    b.changes(target)
    known = _is_known(target, leaves((args, kwargs)))
    new = filled(b, target, args[1] if len(args) > 1 else 0) if name in _FILLS else _functional(b, op, args, kwargs)
    if new.dtype != target.dtype:
        new = b.call(aten.to.dtype, new, target.dtype)
    if known:
        with torch.no_grad():
            for index in (0, 1):
                op(*probe(args, index), **probe(kwargs, index))
    _replace(b, target, b.node(new), data=not known)
    return target


def _is_known(target: Value, values: Sequence[Value]) -> bool:
    """Whether the write can be done on the real probes too: all is constant, and the target no tensor of the file."""
    constant = not any(value.data or value.root.data for value in values)
    real = all(value.is_tensor and not value.probes[0].is_meta for value in values)
    return constant and real and not target.root.stored


def _functional(b: "Builder", op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Value:
    name, overload = op._schema.name.split("::")[1], op._schema.overload_name or "default"
    packet = getattr(aten, name.removesuffix("_"), None)
    if packet is None or not name.endswith("_"):
        b.unsupported(f"op aten.{name}")
    functional = getattr(packet, overload if overload in packet.overloads() else "default", None)
    if functional is None or name in _RESHAPES:
        b.refuse(f"op aten.{name}: a tensor whose shape changes in place")
    new: Value = b.call(functional, *args, **kwargs)
    return new


def filled(b: "Builder", target: Value, source: Any) -> Value:
    """What `target` holds after copy_, fill_ or zero_, functionally: aten.copy itself has no derivative."""
    source = b.as_tensor(source, target.dtype if not is_tensor(source) else None)
    if source.dtype != target.dtype:
        source = b.call(aten.to.dtype, source, target.dtype)
    filled: Value = b.call(aten.expand.default, source, b.sizes(target))
    return filled


def _replace(b: "Builder", target: Value, new: fx.Node, *, data: bool) -> None:
    """Make `new` the contents of `target` and scatter it into every tensor that `target` is a view of."""
    root = target.root
    b.node(target)
    chain: list[Value] = []
    value = target
    while value.view is not None:
        chain.append(value)
        value = value.view.parent
    child = new
    for value in chain:
        assert value.view is not None
        child = _scatter(b, value, value.view, child)
        value.view.parent.node = child
    target.node = new
    root.version += 1
    for value in (*chain, root):
        value.version = root.version
        value.data = value.data or data


def _scatter(b: "Builder", value: Value, view: View, child: fx.Node) -> fx.Node:
    """The parent of a view with `child` written where the view lies."""
    parent = b.node(view.parent)
    mine, base = value.probes[0], view.parent.probes[0]
    if mine.shape == base.shape and mine.stride() == base.stride():
        return child
    rest = tree_map(b.node, view.args[1:])
    if view.op is aten.select.int:
        return b.add(aten.select_scatter.default, (parent, child, *rest))
    if view.op is aten.slice.Tensor:
        return b.add(aten.slice_scatter.default, (parent, child, *rest))
    # Any other view: where each of its elements lies, found by applying the view to the positions themselves.
    sizes = [size.node if isinstance(size, Value) else size for size in b.sizes(view.parent)]
    count: Any = 1
    for size in sizes:
        symbolic = isinstance(size, fx.Node) or isinstance(count, fx.Node)
        count = b.add(operator.mul, (count, size)) if symbolic else count * size
    positions = b.add(aten.arange.default, (count,))
    positions = b.add(aten.reshape.default, (positions, sizes))
    args = tuple(positions if arg is view.parent else tree_map(b.node, arg) for arg in view.args)
    index = b.add(view.op, args, tree_map(b.node, dict(view.kwargs)))
    if view.index is not None:
        index = b.add(operator.getitem, (index, view.index))
    flat = [b.add(aten.reshape.default, (node, [-1])) for node in (parent, index, child)]
    written = b.add(aten.scatter.src, (flat[0], 0, flat[1], flat[2]))
    return b.add(aten.reshape.default, (written, sizes))
