"""Where in a graph the grid of the input can be read: the default node of CAM methods, its positions, upsampling."""

import math
import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from attrcli.errors import ModelError, UsageError
from attrcli.graph import ops
from attrcli.graph.axes import follow_axes
from attrcli.graph.axis import BATCH, CHANNEL, UNKNOWN, Axes, Axis, plain
from attrcli.graph.passes import named
from attrcli.graph.rectified import rectifier
from attrcli.graph.rules import leads_with_batch
from attrcli.model import Model

Tensor = torch.Tensor
aten = torch.ops.aten

FEWEST = 4
"""Positions below which a grid tells nothing of where."""


@dataclass(frozen=True)
class Grid:
    """A node whose value has one cell for each place of the input: `sizes` along each axis of the input's grid."""

    node: str
    axes: Axes
    sizes: tuple[int, ...]

    @property
    def cells(self) -> int:
        """How many positions there are."""
        return math.prod(self.sizes)

    @property
    def tokens(self) -> int | None:
        """The axis on which the grid lies flattened; None where it has axes of its own."""
        flat = [i for i, axis in enumerate(self.axes) if axis.of_grid and (axis.before or len(axis.factors) > 1)]
        return flat[0] if flat else None

    def cut(self, value: Tensor) -> Tensor:
        """A value of the node (N, ...) as (N, K, *sizes), in the input's order, without the tokens beside the grid."""
        for dim, axis in enumerate(self.axes):
            if axis.before or axis.after:
                value = value.narrow(dim, axis.before, axis.size - axis.before - axis.after)
        factors = [factor for axis in self.axes[1:] for factor in axis.factors]
        split = value.reshape(len(value), *(size for _, size in factors))
        places = {kind: i for i, (kind, _) in enumerate(factors, 1) if isinstance(kind, int)}
        others = [i for i, (kind, _) in enumerate(factors, 1) if not isinstance(kind, int)]
        ordered = split.permute(0, *others, *(places[kind] for kind in sorted(places)))
        return ordered.reshape(len(value), -1, *self.sizes)

    def __str__(self) -> str:
        shape = "x".join(["N", *(str(axis.size) for axis in self.axes[1:])])
        flat = self.tokens
        beside = self.axes[flat].before + self.axes[flat].after if flat is not None else 0
        without = f" without {beside} tokens" if beside else ""
        return f"node {self.node}, {shape}, grid {'x'.join(map(str, self.sizes))}{without}"


def upsampled(cells: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cells (N, *sizes) to (N, 1, *grid of a sample of this shape), linearly between the cells' centres."""
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    given = cells[:, None]
    return torch.nn.functional.interpolate(given, shape[1:], mode=modes[len(shape) - 1], align_corners=False)


def grids(model: Model, shape: tuple[int, ...]) -> dict[fx.Node, Grid]:
    """All nodes of the graph of the logits with one value per channel and place, in the graph's order.

    Raises ModelError for samples without a grid: tables, vectors.
    """
    _require_places(shape)
    graph = model.engine(shape).logits
    axes = follow_axes(graph, model.input, channels_last=model.channels_last_input)
    found = {}
    for node, each in axes.items():
        if node.op == "call_function" and (grid := _read(node, each, len(shape) - 1)) is not None:
            found[node] = grid
    return found


def _require_places(shape: tuple[int, ...]) -> None:
    if not 2 <= len(shape) <= 4:
        what = "one channel axis and one to three of a grid: images, volumes, sequences"
        raise ModelError(f"a sample of {'x'.join(map(str, shape))} has no grid of positions; accepted: {what}")


def _read(node: fx.Node, axes: Axes, dims: int) -> Grid | None:
    """The grid of a node's value; None where the batch is not in front, or what is what is not known."""
    if not axes or axes[0].kinds != {BATCH} or not leads_with_batch(node):
        return None
    if ops.classify(node.target) in (ops.OpClass.DISCRETE, ops.OpClass.CREATION):
        return None
    channels = [axis for axis in axes[1:] if axis.factors and not axis.of_grid]
    lie = [axis for axis in axes[1:] if axis.of_grid]
    kinds = [factor for axis in lie for factor in axis.factors]
    if len(channels) != 1 or len(kinds) != len(dict(kinds)) or not _are_channels(channels[0]):
        return None
    sizes = dict(kinds)
    return Grid(node.name, axes, tuple(sizes.get(i, 1) for i in range(dims))) if lie else None


def _are_channels(axis: Axis) -> bool:
    """Whether an axis holds what was computed, or parts of patches: not the input's own channels, not unknowns."""
    return all(kind == CHANNEL or str(kind).startswith("inside") for kind in axis.kinds)


# -- the default node ------------------------------------------------------------------------------------------------

_CHOSEN: "WeakKeyDictionary[fx.GraphModule, dict[Any, Grid]]" = WeakKeyDictionary()


def located(
    model: Model, shape: tuple[int, ...], node: str, grid: str, method: str, *, coarse: int | None = None
) -> Grid:
    """The grid of a node that is named, or of the default one (auto); `grid` is told by hand, as 14x14, or auto.

    The default one is at most `coarse` times coarser than the input. Raises ModelError where the model has none;
    UsageError where the node must be named, for another name, and where what is what at the node is not known.
    """
    if node == "auto" and grid != "auto":
        raise UsageError(f"{method}: -o grid={grid} says what lies at a node that is named: give --at NODE, too")
    known = _CHOSEN.setdefault(model.engine(shape).logits, {})
    key = (model.input, node, grid, coarse)
    if key not in known:
        try:
            known[key] = _default(model, shape, coarse) if node == "auto" else _at(model, shape, node, grid)
        except (UsageError, ModelError) as error:
            raise type(error)(f"{model.path}: {method}: {error}") from error
    return known[key]


def _at(model: Model, shape: tuple[int, ...], name: str, grid: str) -> Grid:
    _require_places(shape)
    node = named(model.engine(shape).logits, name)
    size = "x".join(["N", *map(str, node.meta["shapes"][1][1:])])
    if not leads_with_batch(node):
        raise UsageError(f"node '{name}' ({size}) does not have the batch in front; {_ADVICE}")
    if grid != "auto":
        return _told(node, grid, len(shape) - 1)
    found = grids(model, shape).get(node)
    if found is None:
        raise UsageError(
            f"it is not known which axes of node '{name}' ({size}) are the input's grid: say -o grid=HxW for tokens, "
            f"N x tokens x channels, of which the last HxW are the grid's; or {_ADVICE}"
        )
    return found


_ADVICE = "choose another with --at NODE (attrcli inspect MODEL --json lists them)"


def _told(node: fx.Node, grid: str, dims: int) -> Grid:
    """A grid that the user gives: the last tokens of (N, T, C), or the axes of (N, C, H, W)."""
    shape, words = node.meta["shapes"][1], grid.split("x")
    if len(words) != dims or not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"-o grid={grid}: give {dims} sizes, as in {'x'.join(['14'] * dims)}, or auto")
    sizes = tuple(map(int, words))
    factors = tuple(enumerate(sizes))
    count, batch = math.prod(sizes), Axis(((BATCH, shape[0]),))
    if len(shape) == 3 and shape[1] >= count and not (dims == 1 and shape[2] == count):
        return Grid(node.name, (batch, Axis(factors, before=shape[1] - count), plain(CHANNEL, shape[2])), sizes)
    if tuple(shape[2:]) == sizes:
        along = (plain(i, size) for i, size in factors)
        return Grid(node.name, (batch, plain(CHANNEL, shape[1]), *along), sizes)
    said = "x".join(["N", *map(str, shape[1:])])
    accepted = f"N x tokens x channels, or N x channels x {grid}"
    raise UsageError(f"-o grid={grid}: node '{node.name}' is {said}; accepted: {accepted}")


def _default(model: Model, shape: tuple[int, ...], coarse: int | None) -> Grid:
    """The last node with a grid at which the score's gradient is felt in two places or more.

    In a transformer with a class token the last blocks' patches lead nowhere, and a block's own projections (queries,
    keys, values) are no place for a map: that leaves the last norm before an attention.
    """
    found = {node: grid for node, grid in grids(model, shape).items() if grid.cells >= FEWEST}
    graph = model.engine(shape).logits
    output: Any = next(iter(reversed(graph.graph.nodes))).args[0]
    if output[0] in found:
        raise UsageError(f"the output itself has a grid, so that no node is the last before it goes; {_NAME_ONE}")
    if coarse is not None:
        found = {
            node: grid
            for node, grid in found.items()
            if all(coarse * size >= whole for size, whole in zip(grid.sizes, shape[1:], strict=True))
        }
    gradients = felt(model, shape, [*found])
    for node in reversed(found):
        grid = found[node]
        if grid.tokens is not None and _is_projection(node):
            continue
        gradient = gradients.get(node)
        if gradient is not None and int((grid.cut(gradient).abs().amax(1) > 0).flatten(1).sum(1).max()) > 1:
            _require_followed(model, shape, node)
            return found[_after(node, found)]
    fine = f" and no coarser than 1/{coarse}" if coarse else ""
    raise ModelError(f"no node has channels and a grid of {FEWEST} places of the input or more{fine}; {_NAME_ONE}")


def _require_followed(model: Model, shape: tuple[int, ...], chosen: fx.Node) -> None:
    """Raise UsageError where the grid is lost sight of after a node, so that a later one may have it."""
    axes = follow_axes(model.engine(shape).logits, model.input, channels_last=model.channels_last_input)
    order = list(axes)
    for node in order[order.index(chosen) + 1 :]:
        given = [axis for item in node.all_input_nodes for axis in axes.get(item, ())]
        lost = any(UNKNOWN in axis.kinds for axis in axes[node]) and not any(UNKNOWN in axis.kinds for axis in given)
        recurrent = isinstance(node.args[0], fx.Node) and ops.classify(node.args[0].target) is ops.OpClass.RECURRENT
        if lost and not recurrent and any(axis.of_grid for axis in given):
            raise UsageError(f"the grid is lost sight of at node '{node.name}' ({node.target}); {_NAME_ONE}")


_NAME_ONE = "if one has, name it with --at NODE (attrcli inspect MODEL --json lists them)"


def _after(node: fx.Node, found: dict[fx.Node, Grid]) -> fx.Node:
    """Forward over a batch norm and a ReLU directly after a node."""
    while True:
        users = [user for user in node.users if user.target is not ops.SIZE]
        if len(users) != 1 or users[0] not in found:
            return node
        if users[0].target is not aten.batch_norm.default and rectifier(users[0], found.keys()) is None:
            return node
        node = users[0]


_PRODUCTS = frozenset(
    (
        aten.linear.default,
        aten.addmm.default,
        aten.mm.default,
        aten.bmm.default,
        aten.matmul.default,
        aten.baddbmm.default,
        aten.einsum.default,
        aten.scaled_dot_product_attention.default,
    )
)


def _is_projection(node: fx.Node) -> bool:
    """Whether a node is a matrix product, but for a constant added, and views or parts of it."""
    kinds = (ops.OpClass.SHAPE, ops.OpClass.INDEXING)
    while node.target not in _PRODUCTS:
        operands = [item for item in node.all_input_nodes if item.op == "call_function" and "shapes" in item.meta]
        shifted = node.target in (aten.add.Tensor, aten.mul.Tensor, aten.mul.Scalar) and len(operands) == 1
        parent: Any = node.args[0]
        if node.target in ops.PYTHON and isinstance(parent, fx.Node) and parent.op == "call_function":
            node = parent
        elif operands and (shifted or ops.classify(node.target) in kinds):
            node = operands[0]
        else:
            return False
    return True


def felt(model: Model, shape: tuple[int, ...], nodes: list[fx.Node]) -> dict[fx.Node, Tensor]:
    """The gradients at nodes of a fixed mix of all outputs, for inputs of fixed noise: where they are not zero.

    One forward and one backward pass, whatever the samples are, so that what is read of it is the graph's alone.
    """
    ready = model.engine(shape)
    generator = torch.Generator().manual_seed(0)
    rows = ready.batch or 2
    kind = model.input_dtype or model.dtype
    noise = torch.randn(rows, *shape, generator=generator, dtype=torch.float64).to(model.dtype)
    if not kind.is_floating_point:
        raise ModelError(f"input '{model.input}' holds whole numbers ({kind}) and has no gradient")
    arguments = [tensor.cpu() for tensor in model.arguments(noise.to(model.device).requires_grad_(True)).values()]
    kept = _Kept(ready.logits, set(nodes))
    with torch.enable_grad(), warnings.catch_warnings():
        logits = kept.run(*arguments)[0]
        mix = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)
        wanted = {node: value for node, value in kept.values.items() if value.requires_grad}
        if not wanted or not logits.requires_grad:
            return {}
        found = torch.autograd.grad((logits * mix).sum(), [*wanted.values()], allow_unused=True)
    return {node: gradient for node, gradient in zip(wanted, found, strict=True) if gradient is not None}


class _Kept(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(module)
        self.nodes, self.values = nodes, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        value = super().run_node(n)
        if n in self.nodes:
            self.values[n] = value
        return value
