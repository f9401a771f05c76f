"""The one builder behind the three importers: ATen calls on values become a canonical graph with a free batch.

A value carries two concrete probes, made at batch 2 and batch 3, and the fx node that computes it. Probes of what
depends on an input live on the meta device, so an import costs no forward pass and needs no data; constants stay
real. A Python number equal in both probes is a constant of the model, one that differs depends on the batch and is a
node. In-place operations become their functional form: views are replayed, and a write into a view is scattered into
the tensor it belongs to.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, NoReturn

import torch
from torch import fx, nn

from attrcli.errors import UnsupportedOp
from attrcli.graph import ops
from attrcli.graph.canonical import REWRITES
from attrcli.graph.check import check

aten = torch.ops.aten

FREE = (2, 3)
"""Batch sizes of the two probes of a graph with a free batch."""


_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
"""Names that a module needs for itself, so that no stored tensor can have them: 'half', 'graph', 'training', ..."""


@dataclass(frozen=True)
class _View:
    """How a value was made from the tensor whose memory it shares."""

    parent: "Value"
    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None


@dataclass(eq=False, slots=True)
class Value:
    """A tensor, or a number that depends on the batch: two probes, a node, and whether the contents are data.

    `data` is true when the contents depend on an input, so that no number may be read from them at import.
    """

    probes: tuple[Any, Any]
    node: fx.Node
    data: bool
    view: _View | None = None
    version: int = 0
    stored: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether this is a tensor, not a number."""
        return isinstance(self.probes[0], torch.Tensor)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.probes[0].dtype  # type: ignore[no-any-return]

    @property
    def rank(self) -> int:
        """The tensor's number of dimensions."""
        return self.probes[0].dim()  # type: ignore[no-any-return]


def is_tensor(value: Any) -> bool:
    """Whether a front end's value is a tensor."""
    return isinstance(value, Value) and value.is_tensor


def tree_map(function: Callable[[Value], Any], tree: Any) -> Any:
    """Apply a function to every Value in nested lists, tuples and dicts."""
    if isinstance(tree, Value):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(function, item) for item in tree)
    if isinstance(tree, dict):
        return {key: tree_map(function, item) for key, item in tree.items()}
    return tree


def leaves(tree: Any) -> list[Value]:
    """Every Value in nested lists, tuples and dicts."""
    found: list[Value] = []
    tree_map(found.append, tree)
    return found


class Builder:
    """Builds one graph; a front end calls it once per operation of the file.

    `dtype` is the floating type of the whole graph: every floating constant, and every cast to a floating type, takes
    it. `where` is set by the front end to the place in the file that is being read; nodes and errors carry it.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.where = ""
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.inputs: list[str] = []
        self._stored: dict[int, tuple[torch.Tensor, Value]] = {}
        self._meta: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # -- what a graph starts from --------------------------------------------------------------------------------

    def placeholder(self, name: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Value:
        """Add an input; `shapes` are its shapes at the two probes."""
        dtype = self.dtype if dtype.is_floating_point else dtype
        node = self.graph.placeholder(self._argument(name))
        self.inputs.append(name)
        first, second = (torch.empty(tuple(shape), dtype=dtype, device="meta") for shape in shapes)
        node.meta["origin"] = name
        node.meta["shapes"] = (tuple(first.shape), tuple(second.shape))
        return Value((first, second), node, data=True)

    def tensor(self, tensor: torch.Tensor, name: str, *, parameter: bool = False) -> Value:
        """Add a tensor stored in the file; the same tensor object (a tied weight) is stored once."""
        if id(tensor) not in self._stored:
            held = tensor.detach()
            if held.is_floating_point() and held.dtype != self.dtype:
                held = held.to(self.dtype)
            path = self._free_path(name)
            module = self.root
            *scopes, leaf = path.split(".")
            for scope in scopes:
                if scope not in module._modules:
                    module.add_module(scope, nn.Module())
                module = module._modules[scope]  # type: ignore[assignment]
            if parameter and held.is_floating_point():
                module.register_parameter(leaf, nn.Parameter(held, requires_grad=False))
            else:
                module.register_buffer(leaf, held)
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                node = self.graph.get_attr(path)
            node.meta["origin"] = name
            self._stored[id(tensor)] = (tensor, Value((held, held), node, data=False, stored=True))
        return self._stored[id(tensor)][1]

    def literal(self, number: Any, dtype: torch.dtype | None = None) -> Value:
        """Add a small constant given as Python numbers."""
        if dtype is None:
            dtype = torch.tensor(number).dtype
        if dtype.is_floating_point:
            dtype = self.dtype
        return self.tensor(torch.tensor(number, dtype=dtype), "literal")

    # -- numbers -------------------------------------------------------------------------------------------------

    def number(self, function: Callable[..., Any], *args: Any) -> Any:
        """Apply a Python function to numbers, some of which may depend on the batch."""
        values = leaves(args)
        if any(value.is_tensor for value in values):
            self.refuse(f"a Python number computed from a tensor ({getattr(function, '__name__', function)})")
        first, second = (function(*tree_map(lambda v, k=k: v.probes[k], args)) for k in (0, 1))  # type: ignore[misc]
        if not values or _same(first, second):
            return first
        if function not in ops.PYTHON:
            self.refuse(f"{getattr(function, '__name__', function)} of a number that depends on the batch size")
        return Value((first, second), self._add(function, tree_map(self.node, args), {}), data=False)

    def size(self, value: Value, dim: int) -> Any:
        """Return one size of a tensor: a number, or a Value when it depends on the batch."""
        first, second = (probe.shape[dim] for probe in value.probes)
        if first == second:
            return first
        return Value((first, second), self._add(ops.SIZE, (self.node(value), dim % value.rank), {}), data=False)

    def sizes(self, value: Value) -> list[Any]:
        """Return all sizes of a tensor."""
        return [self.size(value, dim) for dim in range(value.rank)]

    def item(self, value: Value) -> Any:
        """Return the number in a constant tensor of one element; refuse when it depends on an input or the batch."""
        if not value.is_tensor:
            return value
        if value.data or any(probe.is_meta for probe in value.probes):
            self.refuse("a Python number read from the input's data")
        first, second = (probe.item() for probe in value.probes)
        if not _same(first, second):
            self.refuse("a number that depends on the batch size, read from a tensor")
        return first

    def as_tensor(self, value: Any, dtype: torch.dtype | None = None) -> Value:
        """Return a tensor for a tensor, a number, or a number that depends on the batch."""
        if is_tensor(value):
            return value  # type: ignore[no-any-return]
        if not isinstance(value, Value):
            return self.literal(value, dtype)
        dtype = dtype or torch.tensor(value.probes[0]).dtype
        first, second = (torch.tensor(number, dtype=dtype) for number in value.probes)
        node = self._add(aten.scalar_tensor.default, (value.node,), {"dtype": dtype})
        return Value((first, second), node, data=False)

    # -- operations ----------------------------------------------------------------------------------------------

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply an ATen overload; return a Value, a number, or a list of them.

        In-place overloads write through views. Spellings of one operation become one (graph/canonical.py).
        Raises UnsupportedOp for what the op table does not hold.
        """
        if rewrite := REWRITES.get(op):
            return rewrite(self, *args, **kwargs)
        if op._schema.is_mutable:
            return self._in_place(op, args, kwargs)
        return self.emit(op, *args, **kwargs)

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Add one call of a functional ATen overload as it stands; only rewrites use it directly."""
        schema = op._schema
        if op not in ops.TABLE:
            self.refuse(f"op {schema.name.replace('::', '.')}.{schema.overload_name or 'default'}")
        args, kwargs = self._canonical_arguments(op, args, kwargs)
        values = leaves((args, kwargs))
        probes = self._run(op, args, kwargs)
        data = any(value.data for value in values)
        node = self._add(op, tree_map(self.node, args), tree_map(self.node, kwargs))
        if isinstance(probes[0], torch.Tensor):
            return self._made(probes, node, data, op, args, kwargs, None)
        results = []
        for index, pair in enumerate(zip(*probes, strict=True)):
            item = self._add(operator.getitem, (node, index), {})
            results.append(self._made(pair, item, data, op, args, kwargs, index))
        return results

    def fresh(self, value: Value) -> Value:
        """Return the same tensor with memory of its own, as a copy is; nothing is added to the graph."""
        first, second = (probe.clone() for probe in value.probes)
        return Value((first, second), self.node(value), value.data)

    def node(self, value: Value) -> fx.Node:
        """Return the node that holds the value now; a view whose base was written to since is made again."""
        if value.view is not None:
            root = _root(value)
            if value.version != root.version:
                view = value.view
                self.node(view.parent)
                value.node = self._add(view.op, tree_map(self.node, view.args), tree_map(self.node, view.kwargs))
                if view.index is not None:
                    value.node = self._add(operator.getitem, (value.node, view.index), {})
                value.version, value.data = root.version, value.data or root.data
        return value.node

    def finish(self, outputs: Mapping[str, Value]) -> fx.GraphModule:
        """Close the graph: a tuple of the named outputs. Raises ModelError when it is not canonical."""
        self.graph.output(tuple(self.node(value) for value in outputs.values()))
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(self.root, self.graph)
        module.meta["inputs"], module.meta["outputs"] = tuple(self.inputs), tuple(outputs)
        module.meta["output_shapes"] = {
            name: tuple(tuple(probe.shape) for probe in value.probes) for name, value in outputs.items()
        }
        module.meta["itemsize"] = self.dtype.itemsize
        check(module)
        return module

    def refuse(self, what: str) -> NoReturn:
        """Raise UnsupportedOp, naming the place in the file."""
        raise UnsupportedOp(f"{what}{f' ({self.where})' if self.where else ''}")

    # -- inside --------------------------------------------------------------------------------------------------

    def _add(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        name = target._schema.name.split("::")[1] if hasattr(target, "_schema") else target.__name__
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["origin"] = self.where
        return node

    def _argument(self, name: str) -> str:
        """A name for an input that the code of an fx graph can take as its argument."""
        argument = _identifier(name)
        taken = {node.target for node in self.graph.nodes if node.op == "placeholder"}
        while argument in taken or not argument.isidentifier() or iskeyword(argument):
            argument = f"_{argument}"
        return argument

    def _free_path(self, name: str) -> str:
        parts = [_identifier(part) for part in name.split(".") if part]
        path = ".".join(f"{part}_" if part in _RESERVED else part for part in parts) or "constant"
        taken, candidate, count = {entry.target for entry in self.graph.nodes if entry.op == "get_attr"}, path, 0
        while any(candidate == t or str(t).startswith(candidate + ".") or candidate.startswith(f"{t}.") for t in taken):
            count += 1
            candidate = f"{path}_{count}"
        return candidate

    def _canonical_arguments(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """All positional arguments in place with their defaults; keyword-only ones only when not the default."""
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        given = {**kwargs}
        for index, argument in enumerate(op._schema.arguments):
            if index < len(args) and not argument.kwarg_only:
                value = args[index]
            elif argument.name in given:
                value = given[argument.name]
            elif argument.has_default_value():
                value = argument.default_value
            else:
                self.refuse(f"{op}: argument '{argument.name}' is missing")
            if argument.name in ("device", "pin_memory", "layout", "memory_format", "non_blocking"):
                value = False if argument.name == "non_blocking" else None
            if isinstance(value, torch.dtype) and value.is_floating_point:
                value = self.dtype
            if isinstance(value, tuple):
                value = list(value)
            if not argument.kwarg_only:
                positional.append(value)
            elif value is not None and not _same(value, argument.default_value):
                keyword[argument.name] = value
        return tuple(positional), keyword

    def _run(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Run an op on both probes; on the meta device as soon as one tensor is there."""
        values = leaves((args, kwargs))
        meta = any(value.is_tensor and value.probes[0].is_meta for value in values)

        def pick(index: int) -> Callable[[Value], Any]:
            def probe(value: Value) -> Any:
                concrete = value.probes[index]
                return self._on_meta(concrete) if meta and isinstance(concrete, torch.Tensor) else concrete

            return probe

        with torch.no_grad():
            first, second = (op(*tree_map(pick(k), args), **tree_map(pick(k), kwargs)) for k in (0, 1))
        return first, second

    def _on_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._meta:
            self._meta[id(tensor)] = (tensor, tensor.to("meta"))
        return self._meta[id(tensor)][1]

    def _made(
        self, probes: Any, node: fx.Node, data: bool, op: Any, args: Any, kwargs: Any, index: int | None
    ) -> Value:
        value = Value(tuple(probes), node, data)
        node.meta["shapes"] = tuple(tuple(probe.shape) for probe in probes)
        storage = probes[1].untyped_storage()._cdata
        for parent in leaves((args, kwargs)):
            if parent.is_tensor and parent.probes[1].untyped_storage()._cdata == storage and probes[1].numel():
                value.view = _View(parent, op, args, kwargs, index)
                value.version = _root(parent).version
                break
        return value

    def _in_place(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Value:
        name = op._schema.name.split("::")[1]
        target: Value = args[0]
        values = leaves((args, kwargs))
        known = all(not v.data and not (v.is_tensor and v.probes[0].is_meta) for v in values)
        known = known and not _root(target).stored
        if name in ("copy_", "fill_", "zero_"):
            new = self._filled(target, args[1] if len(args) > 1 else 0)
        else:
            packet = getattr(aten, name.removesuffix("_"), None)
            if packet is None or not name.endswith("_"):
                self.refuse(f"op aten.{name}")
            overload = op._schema.overload_name or "default"
            functional = getattr(packet, overload if overload in packet.overloads() else "default")
            new = self.call(functional, *args, **kwargs)
        if new.dtype != target.dtype:
            new = self.call(aten.to.dtype, new, target.dtype)
        if known:
            with torch.no_grad():
                for k in (0, 1):
                    op(*tree_map(lambda v, k=k: v.probes[k], args), **tree_map(lambda v, k=k: v.probes[k], kwargs))  # type: ignore[misc]
        self._write(target, self.node(new), data=not known)
        return target

    def _filled(self, target: Value, source: Any) -> Value:
        """The value that `target` holds after copy_, fill_ or zero_: aten.copy itself has no derivative."""
        source = self.as_tensor(source, target.dtype if not is_tensor(source) else None)
        if source.dtype != target.dtype:
            source = self.call(aten.to.dtype, source, target.dtype)
        return self.call(aten.expand.default, source, self.sizes(target))  # type: ignore[no-any-return]

    def _write(self, target: Value, new: fx.Node, *, data: bool) -> None:
        """Make `new` the contents of `target` and scatter it into every tensor that `target` is a view of."""
        root = _root(target)
        self.node(target)
        chain: list[Value] = []
        value = target
        while value.view is not None:
            chain.append(value)
            value = value.view.parent
        child = new
        for value in chain:
            assert value.view is not None
            child = self._scatter(value, value.view, child)
            value.view.parent.node = child
        target.node = new
        root.version += 1
        for value in (*chain, root):
            value.version = root.version
            value.data = value.data or data

    def _scatter(self, value: Value, view: _View, child: fx.Node) -> fx.Node:
        parent = self.node(view.parent)
        mine, base = value.probes[0], view.parent.probes[0]
        if mine.shape == base.shape and mine.stride() == base.stride():
            return child
        rest = tree_map(self.node, view.args[1:])
        if view.op is aten.select.int:
            return self._add(aten.select_scatter.default, (parent, child, *rest), {})
        if view.op is aten.slice.Tensor:
            return self._add(aten.slice_scatter.default, (parent, child, *rest), {})
        # Any other view: where each of its elements lies, found by applying the view to the positions themselves.
        sizes = [size.node if isinstance(size, Value) else size for size in self.sizes(view.parent)]
        count: Any = 1
        for size in sizes:
            count = (
                self._add(operator.mul, (count, size), {})
                if isinstance(size, fx.Node) or isinstance(count, fx.Node)
                else count * size
            )
        positions = self._add(aten.arange.default, (count,), {})
        positions = self._add(aten.reshape.default, (positions, sizes), {})
        args = tuple(positions if arg is view.parent else tree_map(self.node, arg) for arg in view.args)
        index = self._add(view.op, args, tree_map(self.node, dict(view.kwargs)))
        if view.index is not None:
            index = self._add(operator.getitem, (index, view.index), {})
        flat = [self._add(aten.reshape.default, (node, [-1]), {}) for node in (parent, index, child)]
        written = self._add(aten.scatter.src, (flat[0], 0, flat[1], flat[2]), {})
        return self._add(aten.reshape.default, (written, sizes), {})


def _root(value: Value) -> Value:
    while value.view is not None:
        value = value.view.parent
    return value


def _same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(first == second)


def _identifier(name: str) -> str:
    cleaned = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"_{cleaned}" if not cleaned.isdigit() else cleaned
