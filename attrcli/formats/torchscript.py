"""TorchScript archives: checked, loaded, and walked node by node into a canonical graph.

The walk follows `inlined_graph` with concrete Python values for all that is not a tensor: loops unroll and branches
resolve where they depend on constants or shapes, and are refused by source line where they depend on data or on the
batch size. A branch that a *trace* resolved is not in the file, and no importer can see it.
"""

import math
import operator
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attrcli.errors import AttrcliError, ModelError, UnsupportedOp
from attrcli.formats.spec import Sample, TensorSpec
from attrcli.graph.build import Builder, Value, is_tensor, leaves

aten = torch.ops.aten

_FORBIDDEN = {
    r"\bdef\s+__setstate__\b": "__setstate__, which runs while the file is loaded",
    r"\btorch\.save\s*\(": "torch.save, which writes files",
    r"\btorch\.load\s*\(": "torch.load, which unpickles files",
    r"\bfrom_file\s*\(": "from_file, which reads files",
    r"\bops\.(?!(?:aten|prim|prims)\b)\w+\.": "an operator of a library outside torch",
}
"""What TorchScript code may not hold: `torch.jit.load` runs `__setstate__`, and `aten::save` writes any path."""

_SCALAR_TYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32,
    torch.bfloat16,
)  # fmt: skip
"""c10::ScalarType by its number, as TorchScript constants hold it."""


class TorchScript:
    """A checked and loaded TorchScript file.

    It holds no input shapes: `inputs` have names only, and a graph is built per sample shape.
    Raises ModelError when the archive holds code that could act while it is loaded.
    """

    format = "torchscript"

    def __init__(self, path: Path) -> None:
        self.metadata: Mapping[str, str] = _check_archive(path)
        with _quiet():
            try:
                self.module = torch.jit.load(str(path), map_location="cpu")
            except (RuntimeError, ValueError) as error:
                raise ModelError(f"{path}: torch.jit.load failed: {_last_line(error)}") from error
            self.module.eval()
            if not hasattr(self.module, "forward"):
                raise ModelError(f"{path}: the TorchScript module has no forward method")
            graph = self.module.inlined_graph
        self.inputs = tuple(
            TensorSpec(value.debugName().split(".")[0], None, torch.float32) for value in list(graph.inputs())[1:]
        )
        self.outputs: tuple[TensorSpec, ...] | None = None

    def build(self, samples: Mapping[str, Sample], dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
        """Walk `forward` for inputs of these sample shapes. Raises UnsupportedOp, ModelError."""
        with _quiet():
            return _Walk(self.module, samples, Builder(dtype), batches).graph

    def operations(self) -> dict[str, int]:
        """Count the operations of `forward`, by name, without building a graph."""
        with _quiet():
            counts: dict[str, int] = {}
            for node in _all_nodes(self.module):
                counts[node.kind()] = counts.get(node.kind(), 0) + 1
        return counts

    def parameter_count(self) -> int:
        """Number of elements of all parameters; 0 for a frozen file."""
        with _quiet():
            return sum(parameter.numel() for parameter in self.module.parameters())


def _all_nodes(module: Any) -> list[Any]:
    found: list[Any] = []

    def visit(block: Any) -> None:
        for node in block.nodes():
            found.append(node)
            for inner in node.blocks():
                visit(inner)

    visit(module.inlined_graph)
    return found


def _check_archive(path: Path) -> dict[str, str]:
    """Scan the archive's code before anything is loaded; return its extra files, which may hold a sidecar."""
    extra: dict[str, str] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            inner = entry.filename.split("/", 1)[-1]
            if inner.startswith("code/") and inner.endswith(".py"):
                code = archive.read(entry).decode("utf-8", "replace")
                for pattern, what in _FORBIDDEN.items():
                    if re.search(pattern, code):
                        raise ModelError(
                            f"{path}: refused: its code ({inner}) uses {what}; an honest model file does not need it"
                        )
            elif inner.startswith("extra/") and entry.file_size < 1 << 20:
                extra[inner.removeprefix("extra/")] = archive.read(entry).decode("utf-8", "replace")
    return extra


class _quiet(warnings.catch_warnings):  # type: ignore[type-arg]
    """torch.jit warns of its deprecation on every call: said once in the README, not on every run."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class _Walk:
    """One walk over `inlined_graph`: an environment from debug names to Python values, Values and containers."""

    def __init__(self, module: Any, samples: Mapping[str, Sample], builder: Builder, batches: Sequence[int]) -> None:
        self.b = builder
        self.names: dict[int, str] = {}
        self.kept: list[Any] = []
        self.parameters = {id(p) for p in module.parameters()}
        self.kept.append(list(module.parameters()))
        graph = module.inlined_graph
        inputs = list(graph.inputs())
        env: dict[str, Any] = {inputs[0].debugName(): module}
        for value in inputs[1:]:
            name = value.debugName().split(".")[0]
            sample = samples[name]
            shapes = [(batch, *sample.shape) for batch in batches]
            env[value.debugName()] = self.b.placeholder(name, shapes, sample.dtype)
        self.block(graph, env)
        self.graph = self.b.finish(self.outputs([env[value.debugName()] for value in graph.outputs()]))

    def outputs(self, results: list[Any]) -> dict[str, Value]:
        """Name the outputs: 'output', or by position or key when there are several."""
        result = results[0] if len(results) == 1 else tuple(results)
        if isinstance(result, dict):
            named = {str(key): value for key, value in result.items()}
        elif isinstance(result, (list, tuple)):
            named = {f"output_{index}": value for index, value in enumerate(result)}
        else:
            named = {"output": result}
        tensors = {name: value for name, value in named.items() if is_tensor(value)}
        if not tensors:
            raise ModelError("the model returns no tensor")
        return tensors

    def block(self, block: Any, env: dict[str, Any]) -> None:
        """Run the nodes of a block."""
        for node in block.nodes():
            args = [env[value.debugName()] for value in node.inputs()]
            outer, self.b.where = self.b.where, _place(node)
            try:
                result = self.step(node, args, env)
            except AttrcliError:
                raise
            except Exception as error:
                raise ModelError(f"{node.kind()} ({self.b.where}): {_last_line(error)}") from error
            outputs = [value.debugName() for value in node.outputs()]
            if len(outputs) == 1:
                env[outputs[0]] = result
            else:
                env.update(zip(outputs, result or (), strict=True))
            self.b.where = outer

    def step(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """Return what one node returns; a list where it has several outputs."""
        kind = node.kind()
        if kind in _STRUCTURE:
            return _STRUCTURE[kind](self, node, args, env)
        if not kind.startswith("aten::"):
            raise UnsupportedOp(f"{kind} ({self.b.where})")
        name = kind.removeprefix("aten::")
        if name in _CONTAINER and args and isinstance(args[0], (list, tuple, dict, str)):
            return _CONTAINER[name](*args)
        if name in _TENSOR_FACTS and args and is_tensor(args[0]):
            return _TENSOR_FACTS[name](self.b, *args)
        if name in _NUMBERS and self.is_arithmetic(node, name, args):
            numbers = [self.b.item(arg) if is_tensor(arg) else arg for arg in args]
            return _NUMBERS[name](self.b, *numbers)
        return self.operation(node, name, args)

    def is_arithmetic(self, node: Any, name: str, args: list[Any]) -> bool:
        """Whether this is arithmetic on numbers; a trace writes that on sizes as ops on 0-dimensional tensors."""
        tensors = [value for value in leaves(args) if value.is_tensor]
        if not tensors:
            return True
        if name in ("Int", "Float", "Bool", "IntImplicit", "FloatImplicit", "ScalarImplicit", "item"):
            return True
        sizes = [arg for arg in args[:2] if not is_tensor(arg)]
        constant = all(not tensor.data and tensor.rank == 0 for tensor in tensors)
        return bool(sizes) and constant and ".Tensor" in str(node.schema()).split("(")[0]

    def operation(self, node: Any, name: str, args: list[Any]) -> Any:
        """Call the ATen overload that the node's schema names."""
        schema = torch._C.parse_schema(node.schema()) if node.schema() != "(no schema)" else None
        if schema is None:
            raise UnsupportedOp(f"aten::{name} ({self.b.where})")
        op = getattr(getattr(aten, name, None), schema.overload_name or "default", None)
        if op is None:
            raise UnsupportedOp(f"aten::{name} ({self.b.where})")
        positional, keyword = [], {}
        for argument, value in zip(schema.arguments, args, strict=True):
            value = self.convert(argument, value)
            if argument.kwarg_only:
                keyword[argument.name] = value
            else:
                positional.append(value)
        return self.b.call(op, *positional, **keyword)

    def convert(self, argument: Any, value: Any) -> Any:
        """A TorchScript value as the schema's argument type wants it."""
        kind, real = str(argument.type), str(argument.real_type)
        if "ScalarType" in real and isinstance(value, int) and not isinstance(value, bool):
            return _SCALAR_TYPES[value]
        if kind == "Tensor" and not is_tensor(value) and value is not None:
            return self.b.as_tensor(value)
        if kind in ("number", "int", "float", "Optional[number]", "Optional[int]", "Optional[float]", "bool"):
            return self.b.item(value) if is_tensor(value) else value
        if kind.startswith("List[int]") or kind == "Optional[List[int]]":
            return [self.b.item(v) if is_tensor(v) else v for v in value] if isinstance(value, (list, tuple)) else value
        return value

    def lift(self, value: Any, name: str) -> Any:
        """An attribute or constant of the file: tensors become stored tensors, containers are entered."""
        if isinstance(value, torch.Tensor):
            return self.b.tensor(value, name, parameter=id(value) in self.parameters)
        if isinstance(value, (list, tuple)):
            return type(value)(self.lift(item, f"{name}.{index}") for index, item in enumerate(value))
        if isinstance(value, dict):
            return {key: self.lift(item, f"{name}.{key}") for key, item in value.items()}
        return value

    def attribute(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """GetAttr: a submodule, a tensor under its name in the file, or any other attribute."""
        owner, attribute = args[0], node.s("name")
        value = getattr(owner, attribute)
        prefix = self.names.get(id(owner), "")
        name = f"{prefix}.{attribute}" if prefix else attribute
        if isinstance(value, (torch.Tensor, list, tuple, dict)):
            return self.lift(value, name)
        self.kept.append(value)
        self.names[id(value)] = name
        return value

    def constant(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """A constant, or None."""
        return self.lift(node.output().toIValue(), "constant")

    def branch(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """The branch of an If whose condition is known."""
        condition = args[0]
        if isinstance(condition, Value):
            self.b.refuse("an `if` that depends on the input's data")
        taken = list(node.blocks())[0 if condition else 1]
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
            self.b.refuse("a loop whose number of rounds depends on the batch size")
        count = 0
        while count < limit and condition:
            env.update(zip(inputs, (count, *carried), strict=True))
            self.block(body, env)
            condition, *carried = (env[name] for name in outputs)
            if isinstance(condition, Value):
                self.b.refuse("a loop whose condition depends on the input's data")
            count += 1
        return carried[0] if len(carried) == 1 else carried

    def raised(self, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
        """An exception of the model itself, reached with these shapes."""
        raise ModelError(f"the model raises: {args[0]} ({self.b.where})")


def _place(node: Any) -> str:
    """Where a node stands in the model's source: 'file:line: text' as far as the file kept it."""
    text = node.sourceRange()
    file = re.search(r'File "([^"]+)", line (\d+)', text)
    lines = text.splitlines()
    code = next((lines[i - 1].strip() for i, line in enumerate(lines) if "~~~" in line and i), "")
    where = f"{file.group(1).rsplit('/', 1)[-1]}:{file.group(2)}" if file else ""
    return f"{where}: {code[:120]}" if code and where else code[:120] or where


def _tensor(walk: _Walk, node: Any, args: list[Any], env: dict[str, Any]) -> Any:
    return args[0]


_STRUCTURE: dict[str, Callable[[_Walk, Any, list[Any], dict[str, Any]], Any]] = {
    "prim::Constant": _Walk.constant,
    "prim::GetAttr": _Walk.attribute,
    "prim::If": _Walk.branch,
    "prim::Loop": _Walk.loop,
    "prim::RaiseException": _Walk.raised,
    "prim::ListConstruct": lambda w, n, a, e: list(a),
    "prim::TupleConstruct": lambda w, n, a, e: tuple(a),
    "prim::DictConstruct": lambda w, n, a, e: dict(zip(a[::2], a[1::2], strict=True)),
    "prim::ListUnpack": lambda w, n, a, e: list(a[0]) if n.outputsSize() != 1 else a[0][0],
    "prim::TupleUnpack": lambda w, n, a, e: list(a[0]) if n.outputsSize() != 1 else a[0][0],
    "prim::TupleIndex": lambda w, n, a, e: a[0][a[1]],
    "prim::TupleSlice": lambda w, n, a, e: a[0][n.i("beg") : n.i("end")],
    "prim::NumToTensor": _tensor,
    "prim::unchecked_cast": _tensor,
    "prim::unchecked_unwrap_optional": _tensor,
    "aten::_unwrap_optional": _tensor,
    "prim::data": _tensor,
    "prim::Uninitialized": lambda w, n, a, e: None,
    "prim::is_nested": lambda w, n, a, e: False,
    "prim::requires_grad": lambda w, n, a, e: True,
    "aten::is_grad_enabled": lambda w, n, a, e: True,
    "prim::is_cuda": lambda w, n, a, e: False,
    "prim::type": lambda w, n, a, e: a[0].type,
    "prim::dtype": lambda w, n, a, e: _SCALAR_TYPES.index(a[0].dtype),
    "prim::device": lambda w, n, a, e: torch.device("cpu"),
    "prim::layout": lambda w, n, a, e: None,
    "prim::Print": lambda w, n, a, e: None,
    "aten::warn": lambda w, n, a, e: None,
    "prim::min": lambda w, n, a, e: w.b.number(min, *a),
    "prim::max": lambda w, n, a, e: w.b.number(max, *a),
    "aten::tensor": lambda w, n, a, e: w.b.as_tensor(a[0], _SCALAR_TYPES[a[1]] if a[1] is not None else None),
    "aten::scalar_tensor": lambda w, n, a, e: w.b.as_tensor(a[0], _SCALAR_TYPES[a[1]] if a[1] is not None else None),
    "aten::__is__": lambda w, n, a, e: a[0] is a[1],
    "aten::__isnot__": lambda w, n, a, e: a[0] is not a[1],
}
"""Nodes that compute nothing: constants, attributes, containers, control flow, facts about tensors."""


def _set_item(container: Any, key: Any, value: Any) -> Any:
    container[key] = value
    return container


def _mutating(method: str) -> Callable[..., Any]:
    def run(container: Any, *args: Any) -> Any:
        getattr(container, method)(*args)
        return container

    return run


_CONTAINER: dict[str, Callable[..., Any]] = {
    "append": _mutating("append"),
    "extend": _mutating("extend"),
    "insert": _mutating("insert"),
    "reverse": _mutating("reverse"),
    "pop": lambda container, *index: container.pop(*index),
    "_set_item": _set_item,
    "__getitem__": lambda container, key: container[key],
    "__contains__": lambda container, item: item in container,
    "len": len,
    "list": list,
    "copy": lambda container: container.copy(),
    "keys": lambda container: list(container.keys()),
    "values": lambda container: list(container.values()),
    "items": lambda container: list(container.items()),
    "slice": lambda container, start, end, step: container[start:end:step],
    "add": lambda container, other: container + other,
    "add_": lambda container, other: container + other,
    "mul": lambda container, times: container * times,
    "format": lambda text, *args: text.format(*args),
    "eq": lambda container, other: container == other,
    "ne": lambda container, other: container != other,
}
"""aten ops on lists, tuples, dictionaries and strings, by name."""

_TENSOR_FACTS: dict[str, Callable[..., Any]] = {
    "size": lambda b, x, dim=None: b.sizes(x) if dim is None else b.size(x, dim),
    "dim": lambda b, x: x.rank,
    "len": lambda b, x: b.size(x, 0),
    "numel": lambda b, x: _product(b, b.sizes(x)),
    "is_floating_point": lambda b, x: x.dtype.is_floating_point,
    "is_complex": lambda b, x: x.dtype.is_complex,
    "device": lambda b, x: torch.device("cpu"),
}
"""What may be asked of a tensor without reading its contents."""


def _product(b: Builder, numbers: list[Any]) -> Any:
    total: Any = 1
    for number in numbers:
        total = b.number(operator.mul, total, number) if total != 1 else number
    return total


def _scaled(function: Callable[[Any, Any], Any], swap: bool = False) -> Callable[..., Any]:
    """add, sub and rsub with their alpha."""

    def run(b: Builder, first: Any, second: Any, alpha: Any = 1) -> Any:
        if swap:
            first, second = second, first
        if alpha != 1:
            second = b.number(operator.mul, second, alpha)
        return b.number(function, first, second)

    return run


def _divide(b: Builder, first: Any, second: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is None:
        return b.number(operator.truediv, first, second)
    return b.number(operator.floordiv, first, second)  # sizes are not negative: floor and trunc agree


def _to_int(b: Builder, number: Any) -> Any:
    if not isinstance(number, Value):
        return int(number)
    return number if isinstance(number.probes[0], int) else b.number(math.floor, number)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda b, *args: b.number(function, *args)


_NUMBERS: dict[str, Callable[..., Any]] = {
    "add": _scaled(operator.add),
    "sub": _scaled(operator.sub),
    "rsub": _scaled(operator.sub, swap=True),
    "mul": _plain(operator.mul),
    "div": _divide,
    "floordiv": _plain(operator.floordiv),
    "floor_divide": _plain(operator.floordiv),
    "remainder": _plain(operator.mod),
    "neg": _plain(operator.neg),
    "pow": _plain(operator.pow),
    "abs": _plain(abs),
    "sqrt": _plain(math.sqrt),
    "ceil": _plain(math.ceil),
    "floor": _plain(math.floor),
    "eq": _plain(operator.eq),
    "ne": _plain(operator.ne),
    "lt": _plain(operator.lt),
    "le": _plain(operator.le),
    "gt": _plain(operator.gt),
    "ge": _plain(operator.ge),
    "__not__": _plain(operator.not_),
    "__and__": _plain(operator.and_),
    "__or__": _plain(operator.or_),
    "Int": _to_int,
    "IntImplicit": _to_int,
    "Float": lambda b, number: number if isinstance(number, Value) else float(number),
    "FloatImplicit": lambda b, number: number if isinstance(number, Value) else float(number),
    "ScalarImplicit": lambda b, number: number,
    "item": lambda b, number: number,
    "Bool": _plain(bool),
    "min": _plain(min),
    "max": _plain(max),
    "detach": lambda b, number: number,
    "to": lambda b, number, *_: number,
    "__range_length": _plain(lambda low, high, step: len(range(low, high, step))),
    "__derive_index": lambda b, index, start, step: b.number(operator.add, start, b.number(operator.mul, index, step)),
}
"""Arithmetic on numbers; on one that depends on the batch only what graph/ops.py lists as Python functions."""
