"""Where the axes of every node come from, followed through the graph: one function for each way in which ops move them.

Sizes are those of the graph's second probe. What is not followed is an axis UNKNOWN, never a guess.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attrcli.graph import ops
from attrcli.graph.axis import BATCH, CHANNEL, INPUT_CHANNEL, UNKNOWN, Axes, Axis, better, plain, reshaped, resized
from attrcli.graph.check import attribute
from attrcli.graph.ops import OpClass

aten = torch.ops.aten

Found = Mapping[fx.Node, Axes]
Shape = tuple[int, ...]


def follow_axes(module: fx.GraphModule, name: str, *, channels_last: bool) -> dict[fx.Node, Axes]:
    """The axes of all nodes with a shape that depend on an input, which is (N, C, ...), or (N, ..., C) in the graph."""
    names = iter(module.meta["inputs"])
    found: dict[fx.Node, Axes] = {}
    for node in module.graph.nodes:
        shape = shape_of(node)
        if node.op == "placeholder":
            if next(names) == name and shape is not None:
                found[node] = _input(shape, channels_last)
        elif (
            node.op == "call_function"
            and node.target is not ops.SIZE
            and not found.keys().isdisjoint(node.all_input_nodes)
        ):
            found[node] = _of(node, found, shape)
    return found


def shape_of(node: fx.Node) -> Shape | None:
    """A node's shape at the second probe; None for sizes and for what returns several tensors."""
    if node.op == "get_attr" and node.graph.owning_module is not None:
        return tuple(attribute(node.graph.owning_module, str(node.target)).shape)
    shapes = node.meta.get("shapes")
    return None if shapes is None else tuple(shapes[1])


def _input(shape: Shape, channels_last: bool) -> Axes:
    grid = [plain(i, size) for i, size in enumerate(shape[1:-1] if channels_last else shape[2:])]
    channel = [plain(INPUT_CHANNEL, shape[-1 if channels_last else 1])] if len(shape) > 1 else []
    return (plain(BATCH, shape[0]), *(grid + channel if channels_last else channel + grid))


def _of(node: fx.Node, found: Found, shape: Shape | None) -> Axes:
    """The axes of one node; all UNKNOWN but the batch where they cannot be followed."""
    if shape is None:
        return ()
    op: Any = node
    if ops.classify(node.target) is OpClass.SHAPE and node.target in ops.PYTHON:
        op = node.args[0]  # one of the tensors that an op returns
    how = _HOW.get(op.target) or (_same if ops.classify(op.target) in _ELEMENTWISE else _lost)
    axes = how(op, found, shape)
    return axes if tuple(axis.size for axis in axes) == shape else _lost(op, found, shape)


def _operand(node: fx.Node, found: Found, place: int = 0) -> Axes | None:
    arg = node.args[place]
    return found.get(arg) or None if isinstance(arg, fx.Node) else None


def _lost(node: fx.Node, found: Found, shape: Shape) -> Axes:
    """Nothing known but a batch in front, where an operand has it there."""
    lead = [axes[0] for item in node.all_input_nodes if (axes := found.get(item))]
    first = bool(shape) and plain(BATCH, shape[0]) in lead
    return tuple(plain(BATCH if first and i == 0 else UNKNOWN, size) for i, size in enumerate(shape))


def _same(node: fx.Node, found: Found, shape: Shape) -> Axes:
    """Element by element: each axis from the operands that have it, aligned at the end as they broadcast."""
    axes = [plain(UNKNOWN, size) for size in shape]
    for item in node.all_input_nodes:
        for back, axis in enumerate(reversed(found.get(item, ())), 1):
            if back <= len(shape) and axis.size == shape[-back]:
                axes[-back] = better(axes[-back], axis)
    return tuple(axes)


# -- layers ----------------------------------------------------------------------------------------------------------


def _windows(dims: int, *, mixes: bool = False) -> Callable[[fx.Node, Found, Shape], Axes]:
    """Windows over the last `dims` axes; a convolution also mixes the axis before them into channels."""

    def how(node: fx.Node, found: Found, shape: Shape) -> Axes:
        given = _operand(node, found)
        if given is None or len(given) != len(shape):
            return _lost(node, found, shape)
        lead = len(shape) - dims
        axes = [*given[:lead], *(resized(axis, size) for axis, size in zip(given[lead:], shape[lead:], strict=True))]
        if mixes:
            axes[lead - 1] = plain(CHANNEL, shape[lead - 1])
        elif given[lead - 1].size != shape[lead - 1]:
            axes[lead - 1] = plain(CHANNEL, shape[lead - 1])  # a pixel shuffle
        return tuple(axes)

    return how


def _padded(node: fx.Node, found: Found, shape: Shape) -> Axes:
    given = _operand(node, found) or _lost(node, found, shape)
    return tuple(resized(axis, size) for axis, size in zip(given, shape, strict=True))


def _convolution(node: fx.Node, found: Found, shape: Shape) -> Axes:
    return _windows(len(shape) - 2, mixes=True)(node, found, shape)


def _linear(node: fx.Node, found: Found, shape: Shape) -> Axes:
    given = _operand(node, found, 1 if node.target is aten.addmm.default else 0)
    return (*given[:-1], plain(CHANNEL, shape[-1])) if given else _lost(node, found, shape)


def _matmul(node: fx.Node, found: Found, shape: Shape) -> Axes:
    """Rows from the left, columns from the right operand: both may be tokens, as in an attention."""
    first = 1 if node.target is aten.baddbmm.default else 0
    left, right = (_operand(node, found, first + i) for i in (0, 1))
    if len(shape) < 2 or not (left or right):
        return _lost(node, found, shape)
    if right is None or len(right) < 2:
        whole = left is not None and len(left) == len(shape)
        return (*left[:-1], plain(CHANNEL, shape[-1])) if left and whole else _lost(node, found, shape)
    rows = left[-2] if left and len(left) > 1 else plain(UNKNOWN, shape[-2])
    lead = _same(node, {n: axes[:-2] for n, axes in found.items() if n in node.args}, shape[:-2])
    return (*lead, rows, right[-1])


def _attention(node: fx.Node, found: Found, shape: Shape) -> Axes:
    given = _operand(node, found)
    return (*given[:-1], plain(CHANNEL, shape[-1])) if given else _lost(node, found, shape)


def _einsum(node: fx.Node, found: Found, shape: Shape) -> Axes:
    """Letter by letter; one that only a constant has is a channel."""
    given, _, made = str(node.args[0]).replace(" ", "").partition("->")
    operands: Any = node.args[1]
    letters: dict[str, Axis] = {}
    for word, item in zip(given.split(","), operands, strict=True):
        for letter, axis in zip(word, found.get(item, ()), strict=False):
            letters[letter] = better(letters.get(letter, axis), axis)
    if "." in given or not made or len(made) != len(shape):
        return _lost(node, found, shape)
    return tuple(letters.get(letter, plain(CHANNEL, size)) for letter, size in zip(made, shape, strict=True))


def _embedding(node: fx.Node, found: Found, shape: Shape) -> Axes:
    given = _operand(node, found, 1)
    return (*given, plain(CHANNEL, shape[-1])) if given else _lost(node, found, shape)


# -- reductions, permutations ----------------------------------------------------------------------------------------


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a node by its name in the op's schema."""
    target: Any = node.target
    for place, known in enumerate(target._schema.arguments):
        if known.name == name:
            value = node.args[place] if place < len(node.args) else node.kwargs.get(name)
            return default if value is None else value
    return default


def _reduced(node: fx.Node, found: Found, shape: Shape) -> Axes:
    given, dims = _operand(node, found), argument(node, "dim", [])
    if given is None or len(given) == len(shape):
        return _same(node, found, shape)
    gone = {dim % len(given) for dim in ([dims] if isinstance(dims, int) else dims)}
    return tuple(axis for i, axis in enumerate(given) if i not in gone)


def _permuted(node: fx.Node, found: Found, shape: Shape) -> Axes:
    given = _operand(node, found)
    if given is None:
        return _lost(node, found, shape)
    order, args = list(range(len(given))), list[Any](node.args)
    if node.target is aten.permute.default:
        order = [dim % len(given) for dim in args[1]]
    elif node.target is aten.transpose.int:
        one, two = (dim % len(given) for dim in args[1:3])
        order[one], order[two] = two, one
    elif node.target in (aten.movedim.int, aten.movedim.intlist):
        order = list(torch.empty(*order, device="meta").movedim(args[1], args[2]).shape)
    elif node.target is aten.mT.default:
        order[-2:] = reversed(order[-2:])
    else:
        order.reverse()
    return tuple(given[i] for i in order)


# -- reshapes --------------------------------------------------------------------------------------------------------


def _reshaped(node: fx.Node, found: Found, shape: Shape) -> Axes:
    given = _operand(node, found)
    return (reshaped(given, shape) if given is not None else None) or _lost(node, found, shape)


# -- cutting and joining ---------------------------------------------------------------------------------------------


def _joined_along(node: fx.Node, found: Found, shape: Shape) -> Axes:
    """cat: tokens before and after those of a grid; channels beside channels."""
    items: Any = node.args[0]
    dim = int(argument(node, "dim", 0)) % len(shape)
    rest = _same(node, {n: axes for n, axes in found.items() if n in items and len(axes) == len(shape)}, shape)
    along = [
        found[item][dim] if item in found and len(found[item]) == len(shape) else plain(UNKNOWN, size[dim])
        for item in items
        if (size := shape_of(item)) is not None
    ]
    made = plain(UNKNOWN, shape[dim])
    grid = [i for i, axis in enumerate(along) if axis.of_grid]
    if len(along) == len(items) and len(grid) == 1:
        axis = along[grid[0]]
        before, after = (sum(a.size for a in part) for part in (along[: grid[0]], along[grid[0] + 1 :]))
        made = replace(axis, before=axis.before + before, after=axis.after + after)
    elif not grid and all(axis.kinds <= {CHANNEL, INPUT_CHANNEL} for axis in along):
        made = plain(CHANNEL, shape[dim])
    return (*rest[:dim], made, *rest[dim + 1 :])


def _selected(node: fx.Node, found: Found, shape: Shape) -> Axes:
    given = _operand(node, found)
    if given is None:
        return _lost(node, found, shape)
    dim = int(argument(node, "dim", 0)) % len(given)
    return (*given[:dim], *given[dim + 1 :])


def _sliced(node: fx.Node, found: Found, shape: Shape) -> Axes:
    """Every k-th row of a grid is a coarser grid; of tokens, those beside the grid's may be left out."""
    given = _operand(node, found)
    if given is None:
        return _lost(node, found, shape)
    dim = int(argument(node, "dim", 0)) % len(given)
    axis, size = given[dim], shape[dim]
    start, step = argument(node, "start", 0), argument(node, "step", 1)
    made = plain(UNKNOWN, size)
    if axis.size == size:
        made = axis
    elif axis.kinds <= {CHANNEL, INPUT_CHANNEL}:
        made = plain(CHANNEL, size)
    elif axis.of_grid and all(isinstance(number, int) for number in (start, step)):
        start = start + axis.size if start < 0 else start
        if step == 1:
            before = axis.before - start
            after = size - before - (axis.size - axis.before - axis.after)
            made = replace(axis, before=before, after=after) if before >= 0 and after >= 0 else made
        elif start < step and size == -(-(axis.size - start) // step) and not axis.before and not axis.after:
            made = resized(axis, size)
    return (*given[:dim], made, *given[dim + 1 :])


def _divided(node: fx.Node, found: Found, shape: Shape) -> Axes:
    """split and chunk: parts of channels are channels."""
    given = _operand(node, found)
    if given is None or len(given) != len(shape):
        return _lost(node, found, shape)
    cut = {CHANNEL, INPUT_CHANNEL}
    return tuple(
        axis if axis.size == size else plain(CHANNEL if axis.kinds <= cut else UNKNOWN, size)
        for axis, size in zip(given, shape, strict=True)
    )


_ELEMENTWISE = frozenset(
    (OpClass.AFFINE, OpClass.SMOOTH, OpClass.KINKED, OpClass.DISCRETE, OpClass.NORMALISATION, OpClass.CREATION)
)
"""Classes whose ops keep an axis that comes out as long as it went in, where nothing else is said here."""


def _named(names: str) -> list[Any]:
    return [op for op in ops.TABLE if str(op).removeprefix("aten.") in names.split()]


_HOW: dict[Any, Callable[[fx.Node, Found, Shape], Axes]] = (
    {op: _windows(1) for op in ops.TABLE if "pool1d" in str(op) or "1d." in str(op)}
    | {op: _windows(2) for op in ops.TABLE if "2d." in str(op) or "pool2d" in str(op) or "2d_aa" in str(op)}
    | {op: _windows(3) for op in ops.TABLE if "pool3d" in str(op) or "3d." in str(op)}
    | dict.fromkeys(_named("pixel_shuffle.default pixel_unshuffle.default channel_shuffle.default"), _windows(2))
    | dict.fromkeys(
        _named(
            "mul.Tensor div.Tensor pow.Tensor_Tensor addcmul.default addcdiv.default maximum.default minimum.default "
            "fmax.default fmin.default where.self masked_fill.Scalar masked_fill.Tensor expand.default "
            "broadcast_to.default to.dtype detach.default dropout.default neg.default"
        ),
        _same,
    )
    | dict.fromkeys(
        _named(
            "sum.default sum.dim_IntList mean.default mean.dim amax.default amin.default max.dim min.dim "
            "logsumexp.default var.correction std.correction var_mean.correction std_mean.correction "
            "linalg_vector_norm.default argmax.default argmin.default any.dim all.dim nansum.default prod.dim_int"
        ),
        _reduced,
    )
    | dict.fromkeys(
        _named("permute.default transpose.int t.default numpy_T.default mT.default movedim.int movedim.intlist"),
        _permuted,
    )
    | dict.fromkeys(_named("reshape.default unflatten.int unsqueeze.default squeeze.dims"), _reshaped)
    | dict.fromkeys(_named("matmul.default mm.default bmm.default baddbmm.default"), _matmul)
    | dict.fromkeys(_named("linear.default addmm.default"), _linear)
    | dict.fromkeys(_named("split.Tensor split_with_sizes.default chunk.default"), _divided)
    | dict.fromkeys(_named("select.int unbind.int"), _selected)
    | {
        aten.convolution.default: _convolution,
        aten.constant_pad_nd.default: _padded,
        aten.grid_sampler_2d.default: _lost,
        aten.scaled_dot_product_attention.default: _attention,
        aten.einsum.default: _einsum,
        aten.embedding.default: _embedding,
        aten.cat.default: _joined_along,
        aten.slice.Tensor: _sliced,
    }
)
