"""The walk over a TorchScript graph: node by node into a canonical graph.

It follows `inlined_graph` with concrete Python values for all that is not a tensor: loops unroll and branches resolve
where they depend on constants or shapes, and are refused by source line where they depend on data or on the batch
size. A branch that a *trace* resolved is not in the file, and no importer can see it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from attrcli.errors import AttrcliError, ModelError
from attrcli.formats.spec import Sample, named, source_line
from attrcli.formats.torchscript_numbers import CONTAINERS, NUMBERS, READS, TENSOR_FACTS, is_instance
from attrcli.graph.bounded import BoundedBuilder
from attrcli.graph.build import Value, is_tensor, leaves
from attrcli.graph.value import tree_map

aten = torch.ops.aten

_SCALAR_TYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32,
    torch.bfloat16,
)  # fmt: skip
"""c10::ScalarType by its number, as TorchScript constants hold it."""


@dataclass(frozen=True)
class Argument:
    """An argument of `forward`: an input of the model, or else always its default."""

    name: str
    is_input: bool
    default: Any = None


@dataclass(eq=False)
class _Object:
    """An instance of a class of the file; `Walk.set` holds its attributes."""

    kind: str


_NO_GRAD = "__torch__.torch.autograd.grad_mode.no_grad"


class Walk:
    """One walk over `inlined_graph`: an environment from debug names to Python values, Values and containers."""

    def __init__(self, module: Any, builder: BoundedBuilder) -> None:
        self.b = builder
        self.module = module
        self.names: dict[int, str] = {}
        self.unwatched = 0
        self.read: set[tuple[int, str]] = set()
        self.set: dict[tuple[int, str], Any] = {}
        parameters = list(module.named_parameters())
        self.parameters = {id(tensor): name for name, tensor in parameters}
        self.kept: list[Any] = [parameters]

    def run(
        self, arguments: Sequence[Argument], samples: Mapping[str, Sample], batches: Sequence[int]
    ) -> fx.GraphModule:
        """Return the finished graph for inputs of these sample shapes."""
        graph = self.module.inlined_graph
        first, *inputs = graph.inputs()
        env: dict[str, Any] = {first.debugName(): self.module}
        for value, argument in zip(inputs, arguments, strict=True):
            if argument.is_input:
                sample = samples[argument.name]
                shapes = [(batch, *sample.shape) for batch in batches]
                env[value.debugName()] = self.b.placeholder(argument.name, shapes, sample.dtype)
            else:
                env[value.debugName()] = self.lift(argument.default, argument.name)
        self.block(graph, env)
        return self.b.finish(_outputs([env[value.debugName()] for value in graph.outputs()]))

    def block(self, block: Any, env: dict[str, Any]) -> None:
        """Run the nodes of a block."""
        for node in block.nodes():
            outer, self.b.where = self.b.where, _place(node)
            self.b.step()
            try:
                result = self.step(node, [env[value.debugName()] for value in node.inputs()], env)
                outputs = [value.debugName() for value in node.outputs()]
                if outputs:
                    env.update(zip(outputs, [result] if len(outputs) == 1 else result, strict=True))
            except AttrcliError:
                raise
            except Exception as error:
                raise ModelError(f"{node.kind()} ({self.b.where}): {last_line(error)}") from error
            self.b.where = outer

    def step(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """Return what one node returns; a list where it has several outputs."""
        kind = node.kind()
        if kind in _STRUCTURE:
            return _STRUCTURE[kind](self, node, args, env)
        if not kind.startswith("aten::"):
            self.b.unsupported(_UNSUPPORTED.get(kind, f"op {kind.replace('::', '.')}"))
        name = kind.removeprefix("aten::")
        if name in CONTAINERS and args and isinstance(args[0], (list, tuple, dict, str)):
            return CONTAINERS[name](self.b, *args)
        if name in TENSOR_FACTS and args and is_tensor(args[0]):
            return TENSOR_FACTS[name](self.b, *args)
        if name in NUMBERS and _is_arithmetic(node, name, args):
            return NUMBERS[name](self.b, *(self.b.item(arg) if is_tensor(arg) else arg for arg in args))
        return self.operation(node, name, args)

    def operation(self, node: Any, name: str, args: list[Any]) -> Any:
        """Call the ATen overload that the node's schema names."""
        schema = torch._C.parse_schema(node.schema()) if node.schema() != "(no schema)" else None
        op = getattr(getattr(aten, name, None), (schema.overload_name or "default") if schema else "", None)
        if schema is None or op is None:
            self.b.unsupported(f"op aten.{name}")
        if self.unwatched and op._schema.is_mutable:
            self.b.unsupported(f"op aten.{name} under torch.no_grad()")
        positional, keyword = [], {}
        for argument, value in zip(schema.arguments, args, strict=True):
            value = self.convert(argument, value)
            if argument.kwarg_only:
                keyword[argument.name] = value
            else:
                positional.append(value)
        result = self.b.call(op, *positional, **keyword)
        return tree_map(self.unfollowed, result) if self.unwatched else result

    def unfollowed(self, value: Value) -> Any:
        """A tensor that was made under `torch.no_grad()`: no gradient goes through it."""
        return self.b.call(aten.detach.default, value) if value.is_tensor else value

    def convert(self, argument: Any, value: Any) -> Any:
        """A TorchScript value as the schema's argument type wants it."""
        kind, real = str(argument.type), str(argument.real_type)
        if "ScalarType" in real and isinstance(value, int) and not isinstance(value, bool):
            return _SCALAR_TYPES[value]
        if kind == "Tensor" and value is not None:
            return self.b.as_tensor(value)
        if kind == "List[Tensor]":
            return [self.b.as_tensor(item) for item in value]
        if kind.removeprefix("Optional[").rstrip("]") in ("number", "int", "float", "bool"):
            return self.b.item(value) if is_tensor(value) else value
        if "List[int]" in kind and isinstance(value, (list, tuple)):
            return [self.b.item(item) if is_tensor(item) else item for item in value]
        return value

    def lift(self, value: Any, name: str, *, state: bool = False) -> Any:
        """An attribute or constant of the file: tensors become stored tensors, containers are entered."""
        if isinstance(value, torch.Tensor):
            known = self.parameters.get(id(value))
            return self.b.tensor(value, known or name, parameter=known is not None, state=state)
        if isinstance(value, (list, tuple)):
            return type(value)(self.lift(item, f"{name}.{index}", state=state) for index, item in enumerate(value))
        if isinstance(value, dict):
            return {key: self.lift(item, f"{name}.{key}", state=state) for key, item in value.items()}
        return value

    def attribute(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """GetAttr: a submodule, a tensor under its name in the file, or any other attribute."""
        owner, attribute = args[0], node.s("name")
        key = (id(owner), attribute)
        if key in self.set:
            return self.set[key]
        self.read.add(key)
        value = getattr(owner, attribute)
        name = self.name(owner, attribute)
        if isinstance(value, (torch.Tensor, list, tuple, dict)):
            return self.lift(value, name, state=True)
        self.kept.append(value)
        self.names[id(value)] = name
        return value

    def name(self, owner: Any, attribute: str) -> str:
        """The name of an attribute, from the model down."""
        prefix = self.names.get(id(owner), "")
        return f"{prefix}.{attribute}" if prefix else attribute

    def constant(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """A constant, or None."""
        return self.lift(node.output().toIValue(), "constant", state=True)

    def branch(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """The branch of an If whose condition is known."""
        if isinstance(args[0], Value):
            self.b.refuse("an `if` that depends on the input's data or on the batch size is not supported")
        taken = list(node.blocks())[0 if args[0] else 1]
        self.block(taken, env)
        results = [env[value.debugName()] for value in taken.outputs()]
        return results[0] if len(results) == 1 else results

    def loop(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """Unroll a Loop whose trip count and condition are known."""
        body = next(iter(node.blocks()))
        inputs = [value.debugName() for value in body.inputs()]
        outputs = [value.debugName() for value in body.outputs()]
        limit, condition, *carried = args
        if isinstance(limit, Value):
            self.b.refuse("a loop whose number of rounds depends on the batch size is not supported")
        count = 0
        with self.b.loop():
            while count < limit and condition:
                self.b.step()
                env.update(zip(inputs, (count, *carried), strict=True))
                self.block(body, env)
                condition, *carried = (env[name] for name in outputs)
                if isinstance(condition, Value):
                    self.b.refuse("a loop whose end depends on the input's data or on the batch size is not supported")
                count += 1
        return carried[0] if len(carried) == 1 else carried

    def fork(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """What runs beside the rest, here in its place."""
        graph = node.g("Subgraph")
        inner = dict(zip((value.debugName() for value in graph.inputs()), args, strict=True))
        self.block(graph, inner)
        results = [inner[value.debugName()] for value in graph.outputs()]
        return results[0] if len(results) == 1 else tuple(results)

    def changed(self, node: Any, args: list[Any], env: dict[str, Any]) -> None:
        """SetAttr: refused where what a call computes depends on the calls before it."""
        key = (id(args[0]), node.s("name"))
        if key in self.read or not isinstance(args[0], (_Object, nn.Module)):
            name = self.name(args[0], node.s("name"))
            self.b.refuse(f"prim.SetAttr: the model changes its own state: it reads '{name}', and sets it")
        self.set[key] = args[1]

    def create(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """CreateObject: its attributes are set before they are read."""
        made = _Object(node.output().type().str())
        self.kept.append(made)
        return made

    def enter(self, node: Any, args: list[Any], env: dict[str, Any]) -> None:
        """Enter: the only context that means something here is `torch.no_grad()`."""
        if not isinstance(args[0], _Object) or args[0].kind != _NO_GRAD:
            self.b.unsupported("prim.Enter: a `with` statement")
        self.unwatched += 1

    def leave(self, node: Any, args: list[Any], env: dict[str, Any]) -> None:
        """Exit: gradients are followed again."""
        self.unwatched -= 1

    def raised(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """An exception of the model itself, reached with these shapes."""
        raise ModelError(f"the model raises: {args[0]} ({self.b.where})")

    def tensor(self, node: Any, args: list[Any], env: dict[str, Any]) -> Value:
        """A tensor made of numbers, which may depend on the batch."""
        return self.b.as_tensor(args[0], _SCALAR_TYPES[args[1]] if args[1] is not None else None)


def all_nodes(graph: Any) -> list[Any]:
    """Every node of a graph, those of nested blocks included."""
    found: list[Any] = []

    def visit(block: Any) -> None:
        for node in block.nodes():
            found.append(node)
            for inner in node.blocks():
                visit(inner)

    visit(graph)
    return found


def last_line(error: BaseException) -> str:
    """The last line of an error's message: torch puts the reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _is_arithmetic(node: Any, name: str, args: list[Any]) -> bool:
    """Whether this is arithmetic on numbers; a trace writes that on sizes as ops on 0-dimensional tensors."""
    tensors = [value for value in leaves(args) if value.is_tensor]
    if not tensors or name in READS:
        return True
    sizes = [arg for arg in args[:2] if not is_tensor(arg)]
    constant = all(not tensor.data and tensor.rank == 0 for tensor in tensors)
    return bool(sizes) and constant and ".Tensor" in str(node.schema()).split("(")[0]


def _outputs(results: list[Any]) -> dict[str, Value]:
    """Name the tensors that are returned: 'output', or by their keys and positions when there are several."""
    found = named("output", results[0] if len(results) == 1 else tuple(results))
    tensors = {name: value for name, value in found.items() if is_tensor(value)}
    if not tensors:
        raise ModelError("the model returns no tensor")
    return tensors


def _place(node: Any) -> str:
    """Where a node stands in the code that the archive holds: 'file:line: text'."""
    text = node.sourceRange()
    file = re.search(r'File "([^"]+)", line (\d+)', text)
    lines = text.splitlines()
    code = next((lines[i - 1].strip() for i, line in enumerate(lines) if "~~~" in line and i), "")
    where = f"{file.group(1).rsplit('/', 1)[-1]}:{file.group(2)}" if file else ""
    return ": ".join(part for part in (where, source_line(code)) if part)


def _first(walk: Walk, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
    return args[0]


def _unpack(walk: Walk, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
    return list(args[0]) if node.outputsSize() != 1 else args[0][0]


_UNSUPPORTED = {
    "prim::CallFunction": "prim.CallFunction, a function that is called by reference,",
    "prim::CallMethod": "prim.CallMethod, a method of a class that is not known before the call,",
    "prim::PythonOp": "prim.PythonOp, a Python function, which the file does not hold,",
}

_STRUCTURE: dict[str, Callable[[Walk, Any, list[Any], dict[str, Any]], Any]] = {
    "prim::Constant": Walk.constant,
    "prim::GetAttr": Walk.attribute,
    "prim::SetAttr": Walk.changed,
    "prim::CreateObject": Walk.create,
    "prim::fork": Walk.fork,
    "aten::wait": _first,
    "prim::Enter": Walk.enter,
    "prim::Exit": Walk.leave,
    "prim::If": Walk.branch,
    "prim::Loop": Walk.loop,
    "prim::RaiseException": Walk.raised,
    "prim::ListConstruct": lambda w, n, a, e: list(a),
    "prim::TupleConstruct": lambda w, n, a, e: tuple(a),
    "prim::DictConstruct": lambda w, n, a, e: dict(zip(a[::2], a[1::2], strict=True)),
    "prim::ListUnpack": _unpack,
    "prim::TupleUnpack": _unpack,
    "prim::TupleIndex": lambda w, n, a, e: a[0][a[1]],
    "prim::TupleSlice": lambda w, n, a, e: a[0][n.i("beg") : n.i("end")],
    "prim::NumToTensor": _first,
    "prim::unchecked_cast": _first,
    "prim::unchecked_unwrap_optional": _first,
    "aten::_unwrap_optional": _first,
    "prim::data": _first,
    "prim::Uninitialized": lambda w, n, a, e: None,
    "prim::isinstance": lambda w, n, a, e: is_instance(w.b, a[0], [str(kind) for kind in n.tys("types")]),
    "prim::is_nested": lambda w, n, a, e: False,
    "aten::_nested_tensor_from_mask_left_aligned": lambda w, n, a, e: False,
    "prim::requires_grad": lambda w, n, a, e: True,
    "aten::is_grad_enabled": lambda w, n, a, e: True,
    "aten::is_autocast_enabled": lambda w, n, a, e: False,
    "aten::is_autocast_cpu_enabled": lambda w, n, a, e: False,
    **{
        f"prim::is_{kind}": lambda w, n, a, e: False
        for kind in ("cuda", "sparse", "mkldnn", "quantized", "mps", "xpu", "meta", "vulkan", "ipu", "sparse_csr")
    },
    "prim::is_cpu": lambda w, n, a, e: True,
    "prim::abs": lambda w, n, a, e: w.b.number(abs, *a),
    "prim::EnumName": lambda w, n, a, e: a[0].name,
    "prim::EnumValue": lambda w, n, a, e: a[0].value,
    "prim::type": lambda w, n, a, e: a[0].type,
    "prim::dtype": lambda w, n, a, e: _SCALAR_TYPES.index(a[0].dtype),
    "prim::device": lambda w, n, a, e: torch.device("cpu"),
    "prim::layout": lambda w, n, a, e: None,
    "prim::Print": lambda w, n, a, e: None,
    "aten::warn": lambda w, n, a, e: None,
    "prim::min": lambda w, n, a, e: w.b.number(min, *a),
    "prim::max": lambda w, n, a, e: w.b.number(max, *a),
    "aten::tensor": Walk.tensor,
    "aten::scalar_tensor": Walk.tensor,
    "aten::__is__": lambda w, n, a, e: a[0] is a[1],
    "aten::__isnot__": lambda w, n, a, e: a[0] is not a[1],
}
"""Nodes that compute nothing: constants, attributes, containers, control flow, facts about tensors."""
