"""The one builder behind the three importers: ATen calls on values become a canonical graph with a free batch.

A value carries two concrete probes, made at two batch sizes, and the fx node that computes it. Probes of what depends
on an input live on the meta device, so an import costs no forward pass and needs no data; constants stay real. A
Python number that is the same at every batch size is a constant of the model; one that differs between the probes is a
node; one that the probes alone would take for a constant is refused (graph/value.py). In-place operations become their
functional form (graph/inplace.py).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from typing import Any, NoReturn

import torch
from torch import fx, nn

from attrcli.errors import UnsupportedOp
from attrcli.graph import inplace, ops
from attrcli.graph.canonical import REWRITES, canonical_name
from attrcli.graph.check import check
from attrcli.graph.meta import SHAPED
from attrcli.graph.names import RESERVED, identifier, scopes, submodule
from attrcli.graph.value import (
    Value,
    View,
    beyond,
    computed,
    extrapolated,
    is_tensor,
    leaves,
    probe,
    same,
    tree_map,
    tried,
)

__all__ = ["FREE", "Builder", "Value", "is_tensor", "leaves"]

aten = torch.ops.aten

FREE = (62, 97)
"""Batch sizes of the two probes of a graph with a free batch: large, one even and one odd, so that whatever depends on
the batch differs between them; on the meta device their size costs nothing."""

_IGNORED = ("device", "pin_memory", "layout", "memory_format", "non_blocking")
"""Arguments that say where and how a tensor lies in memory, which the graph leaves open."""


class Builder:
    """Builds one graph; a front end calls it once per operation of the file.

    `dtype` is the floating type of the whole graph: every floating constant, and every cast to a floating type, takes
    it. `where` is set by the front end to the place in the file that is being read; nodes and errors carry it.
    `advice` is what a user may try whose file holds an op that the graph cannot.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, advice: str = "") -> None:
        self.dtype = dtype
        self.advice = advice
        self.where = ""
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.inputs: list[str] = []
        self.batches: tuple[int, ...] = FREE
        self.written: dict[str, str] = {}
        self._stored: dict[int, tuple[torch.Tensor, Value]] = {}
        self._meta: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._paths: set[str] = set()
        self._scopes: set[str] = set()
        self._counts: dict[str, int] = {}

    # -- what a graph starts from --------------------------------------------------------------------------------

    def placeholder(self, name: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Value:
        """Add an input; `shapes` are its shapes at the two probes."""
        dtype = self.dtype if dtype.is_floating_point else dtype
        node = self.graph.placeholder(self._argument(name))
        self.inputs.append(name)
        first, second = (torch.empty(tuple(shape), dtype=dtype, device="meta") for shape in shapes)
        if first.shape != second.shape:
            self.batches = (first.shape[0], second.shape[0])
        node.meta["origin"] = name
        node.meta["shapes"] = (tuple(first.shape), tuple(second.shape))
        return Value((first, second), node, data=True)

    def tensor(self, tensor: torch.Tensor, name: str, *, parameter: bool = False, state: bool = False) -> Value:
        """Add a tensor stored in the file; the same tensor object (a tied weight) is stored once.

        One that is `state` the model may write to only where its output does not depend on what was there before.
        """
        if id(tensor) not in self._stored:
            held = tensor.detach()
            if held.is_floating_point() and held.dtype != self.dtype:
                held = held.to(self.dtype)
            path = self._free_path(name)
            scope, _, leaf = path.rpartition(".")
            module = submodule(self.root, scope)
            if parameter and held.is_floating_point():
                module.register_parameter(leaf, nn.Parameter(held, requires_grad=False))
            else:
                module.register_buffer(leaf, held)
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                node = self.graph.get_attr(path)
            node.meta["origin"] = name
            value = Value((held, held), node, data=False, stored=True, state=path if state else "")
            self._stored[id(tensor)] = (tensor, value)
        return self._stored[id(tensor)][1]

    def literal(self, number: Any, dtype: torch.dtype | None = None) -> Value:
        """Add a small constant given as Python numbers."""
        if dtype is None:
            dtype = torch.tensor(number).dtype
        if dtype.is_floating_point:
            dtype = self.dtype
        return self.tensor(torch.tensor(number, dtype=dtype), "literal")

    def changes(self, value: Value) -> None:
        """Note that the model writes to this tensor: refused in the end where it is state that an output depends on."""
        if value.root.state:
            self.written.setdefault(value.root.state, self.where)

    # -- numbers -------------------------------------------------------------------------------------------------

    def number(self, function: Callable[..., Any], *args: Any) -> Any:
        """Apply a Python function to numbers, some of which may depend on the batch.

        Refused: a result that no node can compute. One that depends on the batch though both probes give the same is a
        doubt: it may be compared with a number, where all batch sizes may agree again, and is refused elsewhere.
        """
        values, name = leaves(args), getattr(function, "__name__", str(function))
        if any(value.is_tensor for value in values):
            self.refuse(f"a Python number computed from a tensor ({name})")
        try:
            first, second = (computed(function, probe(args, index)) for index in (0, 1))
        except OverflowError:
            self.refuse(f"{name}, whose result is a number beyond 63 bits")
        if not values:
            return first
        trials, alike = tried(function, args), same(first, second)
        if alike and trials is not None and all(same(first, trial) for trial in trials):
            return first
        what = f"{name} of a number that depends on the batch size"
        if function not in ops.PYTHON or (alike and trials is None):
            self.refuse(what)
        if alike:
            doubt = next((value.doubt for value in values if value.doubt), self._placed(what))
            return Value((first, second), values[0].node, data=False, trials=trials, doubt=doubt)
        return Value((first, second), self.add(function, tree_map(self.node, args)), data=False, trials=trials)

    def size(self, value: Value, dim: int) -> Any:
        """Return one size of a tensor: a number, or a Value when it depends on the batch."""
        first, second = (tensor.shape[dim] for tensor in value.probes)
        if first == second:
            return first
        node = self.add(ops.SIZE, (self.node(value), dim % value.rank))
        return Value((first, second), node, data=False, trials=extrapolated((first, second), self.batches))

    def sizes(self, value: Value) -> list[Any]:
        """Return all sizes of a tensor."""
        return [self.size(value, dim) for dim in range(value.rank)]

    def item(self, value: Value) -> Any:
        """Return the number in a constant tensor of one element; refuse when it depends on an input or the batch."""
        if not value.is_tensor:
            return value
        if value.data or value.root.data or any(tensor.is_meta for tensor in value.probes):
            self.refuse("a Python number read from the input's data is not supported")
        first, second = (tensor.item() for tensor in value.probes)
        if not same(first, second):
            self.refuse("a number that depends on the batch size, read from a tensor")
        return first

    def as_tensor(self, value: Any, dtype: torch.dtype | None = None) -> Value:
        """Return a tensor for a tensor, a number, a number that depends on the batch, or a list of such numbers."""
        if is_tensor(value):
            return value  # type: ignore[no-any-return]
        if not leaves(value):
            return self.literal(value, dtype)
        if isinstance(value, Value):
            dtype = dtype or torch.tensor(value.probes[0]).dtype
            dtype = self.dtype if dtype.is_floating_point else dtype
            first, second = (torch.tensor(number, dtype=dtype) for number in value.probes)
            node = self.add(aten.scalar_tensor.default, (self.node(value),), {"dtype": dtype})
            return Value((first, second), node, data=False)
        return self.call(aten.stack.default, [self.as_tensor(item, dtype) for item in value])  # type: ignore[no-any-return]

    # -- operations ----------------------------------------------------------------------------------------------

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply an ATen overload; return a Value, a number, or a list of them.

        In-place overloads write through views. Spellings of one operation become one (graph/canonical.py).
        Raises UnsupportedOp for what the op table does not hold.
        """
        if rewrite := REWRITES.get(op):
            return rewrite(self, *args, **kwargs)
        if op._schema.is_mutable:
            return inplace.write(self, op, args, kwargs)
        return self.emit(op, *args, **kwargs)

    def emit(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Add one call of a functional ATen overload as it stands; only rewrites use it directly."""
        schema = op._schema
        if op not in ops.TABLE:
            if schema.name.removeprefix("aten::") in ops.RANDOM:
                self.refuse(f"op {schema.name.replace('::', '.')} draws random numbers: no attribution is repeatable")
            self.unsupported(f"op {schema.name.replace('::', '.')}.{schema.overload_name or 'default'}")
        args, kwargs = self._canonical_arguments(op, args, kwargs)
        nodes = tree_map(self.node, args), tree_map(self.node, kwargs)  # views are replayed before they are looked at
        probes = self._run(op, args, kwargs)
        if self._in_another_float(probes):
            return self._in_own_float(op, args, kwargs)
        node = self.add(op, *nodes)
        data = any(value.data for value in leaves((args, kwargs)))
        if isinstance(probes[0], torch.Tensor):
            return self._made(probes, node, data, op, args, kwargs, None)
        results = []
        for index, pair in enumerate(zip(*probes, strict=True)):
            item = self.add(operator.getitem, (node, index))
            results.append(self._made(pair, item, data, op, args, kwargs, index))
        return results

    def fresh(self, value: Value) -> Value:
        """Return the same tensor with memory of its own, as a copy is; nothing is added to the graph."""
        first, second = (tensor.clone() for tensor in value.probes)
        return Value((first, second), self.node(value), value.data)

    def node(self, value: Value) -> fx.Node:
        """Return the node that holds the value now; a view whose base was written to since is made again."""
        if value.doubt:
            raise UnsupportedOp(value.doubt)
        view, root = value.view, value.root
        if view is not None and value.version != root.version:
            self.node(view.parent)
            value.node = self.add(view.op, tree_map(self.node, view.args), tree_map(self.node, view.kwargs))
            if view.index is not None:
                value.node = self.add(operator.getitem, (value.node, view.index))
            value.version, value.data = root.version, value.data or root.data
        return value.node

    def add(self, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        """Add a node that calls `target`, without running it on the probes."""
        name = target._schema.name.split("::")[1] if hasattr(target, "_schema") else target.__name__
        node = self.graph.create_node("call_function", target, args, kwargs or {}, name=name)
        node.meta["origin"] = self.where
        return node

    def finish(self, outputs: Mapping[str, Value]) -> fx.GraphModule:
        """Close the graph: a tuple of the named outputs.

        Raises ModelError when it is not canonical, UnsupportedOp when it depends on state that the model changes.
        """
        self.graph.output(tuple(self.node(value) for value in outputs.values()))
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target in self.written:
                self.where = self.written[node.target]
                self.refuse(f"the model changes its own state: it writes to '{node.meta['origin']}', and reads it")
        module = fx.GraphModule(self.root, self.graph)
        module.meta["inputs"], module.meta["outputs"] = tuple(self.inputs), tuple(outputs)
        module.meta["output_shapes"] = {
            name: tuple(tuple(tensor.shape) for tensor in value.probes) for name, value in outputs.items()
        }
        module.meta["itemsize"] = self.dtype.itemsize
        check(module)
        return module

    def refuse(self, what: str) -> NoReturn:
        """Raise UnsupportedOp, naming the place in the file."""
        raise UnsupportedOp(self._placed(what))

    def unsupported(self, what: str) -> NoReturn:
        """Raise UnsupportedOp for an op that the graph cannot hold, with the front end's advice."""
        raise UnsupportedOp(self._placed(f"{what} is not supported") + (f"; {self.advice}" if self.advice else ""))

    def _placed(self, what: str) -> str:
        return f"{what} ({self.where})" if self.where else what

    # -- inside --------------------------------------------------------------------------------------------------

    def _argument(self, name: str) -> str:
        """A name for an input that the code of an fx graph can take as its argument."""
        argument = identifier(name)
        taken = {node.target for node in self.graph.nodes if node.op == "placeholder"}
        while argument in taken or not argument.isidentifier() or iskeyword(argument):
            argument = f"_{argument}"
        return argument

    def _free_path(self, name: str) -> str:
        """A path for a stored tensor that is no other's, and neither above nor below another's."""
        parts = [identifier(part) for part in name.split(".") if part]
        path = ".".join(f"{part}_" if part in RESERVED else part for part in parts) or "constant"
        if not self._paths.isdisjoint(scopes(path)):
            path = path.replace(".", "_")  # below another tensor, where nothing can be
        count = self._counts.get(path, 0)
        while (candidate := f"{path}_{count}" if count else path) in self._paths or candidate in self._scopes:
            count += 1
        self._counts[path] = count + 1
        self._paths.add(candidate)
        self._scopes.update(scopes(candidate))
        return candidate

    def _canonical_arguments(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """All positional arguments in place with their defaults; keyword-only ones only when not the default."""
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        for index, argument in enumerate(op._schema.arguments):
            if index < len(args) and not argument.kwarg_only:
                value = args[index]
            elif argument.name in kwargs:
                value = kwargs[argument.name]
            elif argument.has_default_value():
                value = argument.default_value
            else:
                self.refuse(f"{op}: argument '{argument.name}' is missing")
            if argument.name in _IGNORED:
                value = False if argument.name == "non_blocking" else None
            if isinstance(value, torch.dtype) and value.is_floating_point:
                value = self.dtype
            if isinstance(value, tuple):
                value = list(value)
            if beyond(value):
                self.refuse(f"{op}: argument '{argument.name}' is {value}")
            if not argument.kwarg_only:
                positional.append(value)
            elif value is not None and not same(value, argument.default_value):
                keyword[argument.name] = value
        return tuple(positional), keyword

    def _run(self, op: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Run an op on both probes; on the meta device as soon as one tensor is there or a size is free."""
        values = leaves((args, kwargs))
        meta = any(not value.is_tensor or value.probes[0].is_meta for value in values)
        if meta and ops.classify(op) is ops.OpClass.CREATION and any(a.name == "device" for a in op._schema.arguments):
            kwargs = {**kwargs, "device": "meta"}

        def at(index: int) -> Any:
            def concrete(value: Value) -> Any:
                held = value.probes[index]
                return self._on_meta(held) if meta and isinstance(held, torch.Tensor) else held

            run = SHAPED.get(op, op) if meta else op
            return run(*tree_map(concrete, args), **tree_map(concrete, kwargs))

        try:
            with torch.no_grad():
                return at(0), at(1)
        except NotImplementedError:
            if not meta:
                raise
            return self.unsupported(f"op {canonical_name(op)}, whose result has no shape before it has data,")

    def _on_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._meta:
            self._meta[id(tensor)] = (tensor, tensor.to("meta"))
        return self._meta[id(tensor)][1]

    def _in_another_float(self, probes: Any) -> bool:
        """Whether a result is floating, but not in the graph's type: torch's default, from integers."""
        first = probes[0] if isinstance(probes[0], torch.Tensor) else next(iter(probes[0]), None)
        return isinstance(first, torch.Tensor) and first.is_floating_point() and first.dtype != self.dtype

    def _in_own_float(self, op: Any, args: Any, kwargs: Any) -> Any:
        """Call an op again, told or led to give its floating result in the graph's type."""
        if any(argument.name == "dtype" for argument in op._schema.arguments):
            return self.emit(op, *args, **{**kwargs, "dtype": self.dtype})
        integers = [v for v in leaves((args, kwargs)) if v.is_tensor and not v.dtype.is_floating_point]
        if not integers:
            self.refuse(f"{op}: a result in another floating type than its operands")
        casts = {id(value): self.call(aten.to.dtype, value, self.dtype) for value in integers}
        args, kwargs = tree_map(lambda value: casts.get(id(value), value), (args, kwargs))
        return self.emit(op, *args, **kwargs)

    def _made(
        self, probes: Any, node: fx.Node, data: bool, op: Any, args: Any, kwargs: Any, index: int | None
    ) -> Value:
        """The value that a node computes; a view of the argument whose memory it shares."""
        value = Value(tuple(probes), node, data)
        node.meta["shapes"] = tuple(tuple(tensor.shape) for tensor in probes)
        node.meta["fractions"] = probes[0].is_floating_point()
        storage = probes[1].untyped_storage()._cdata
        for parent in leaves((args, kwargs)):
            if parent.is_tensor and parent.probes[1].untyped_storage()._cdata == storage and probes[1].numel():
                value.view = View(parent, op, args, kwargs, index)
                value.version = parent.root.version
                break
        return value
