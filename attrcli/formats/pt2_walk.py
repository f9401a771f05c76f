"""The walk over an exported program's graph, as the JSON of a `.pt2` archive has it, into a canonical graph.

A target is an ATen op or one of the functions of numbers below; anything else is refused. Assertions about sizes are
left out: attrcli's batch is free wherever the graph allows it.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from attrcli.errors import AttrcliError, ModelError
from attrcli.formats.spec import source_line
from attrcli.graph import ops
from attrcli.graph.build import Builder, Value, is_tensor

aten = torch.ops.aten

DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128,
    12: torch.bool, 13: torch.bfloat16, 28: torch.uint16, 34: torch.uint32, 35: torch.uint64,
}  # fmt: skip
"""The schema's ScalarType by its number."""

_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message on one line, without the rest of a long one: names of the file may hold anything."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def all_nodes(graph: Mapping[str, Any]) -> Iterator[Any]:
    """Every node, those of nested graphs included."""
    for node in graph["nodes"]:
        yield node
        for given in node["inputs"]:
            if "as_graph" in given["arg"]:
                yield from all_nodes(given["arg"]["as_graph"]["graph"])


def _needed(graph: Mapping[str, Any]) -> list[Any]:
    """The nodes that the outputs need or that write in place; assertions about sizes are left out."""
    wanted, nodes = _names(graph["outputs"]), []
    for node in reversed(graph["nodes"]):
        if wanted & _names(node["outputs"]) or _writes(node["target"]):
            nodes.append(node)
            wanted |= _names(node["inputs"])
    return nodes[::-1]


def _names(tree: Any) -> set[str]:
    """The names of all values that arguments mention."""
    if isinstance(tree, list):
        return {name for item in tree for name in _names(item)}
    if not isinstance(tree, dict):
        return set()
    named = {item for key, item in tree.items() if key in ("name", "as_name") and isinstance(item, str)}
    return named.union(*(_names(item) for key, item in tree.items() if key != "as_graph"))


def _writes(target: str) -> bool:
    op = _operator(target)
    return op is not None and bool(op._schema.is_mutable)


def _operator(target: str) -> Any:
    """The ATen overload of this name, None where there is none."""
    if not target.startswith("torch.ops.aten."):
        return None
    name, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
    op = getattr(getattr(aten, name, None), overload or "default", None)
    return op if isinstance(op, torch._ops.OpOverload) else None


_GRADIENTS = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_REGIONS = frozenset((_GRADIENTS, "torch.ops.higher_order.wrap_with_autocast"))
"""Parts of a model that ran in another mode than the rest."""


class Feed:
    """One pass over an exported graph, node by node into the builder; `env` holds the values by name."""

    def __init__(self, builder: Builder) -> None:
        self.b = builder
        self.env: dict[str, Any] = {}

    def run(self, graph: Mapping[str, Any], results: Mapping[str, str]) -> fx.GraphModule:
        """Return the finished graph with these outputs: shown name -> name in the exported graph."""
        self.walk(graph)
        outputs = {shown: self.env[name] for shown, name in results.items()}
        return self.b.finish(outputs)

    def walk(self, graph: Mapping[str, Any]) -> None:
        """Evaluate the nodes in order."""
        for node in _needed(graph):
            outer, self.b.where = self.b.where, _place(node)
            try:
                self.bind(node["outputs"], self.operation(node))
            except AttrcliError:
                raise
            except Exception as error:
                raise ModelError(f"{node['target']} ({self.b.where}): {one_line(error)}") from error
            self.b.where = outer

    def bind(self, outputs: Sequence[Mapping[str, Any]], result: Any) -> None:
        """Enter the results of a node under the names that the file gives them."""
        names: list[str] = []
        for output in outputs:
            ((kind, value),) = output.items()
            if kind == "as_tensors":
                names += [item["name"] for item in value]
            elif kind != "as_none":
                names.append(value.get("name") or value["as_name"])
        single = len(names) == 1 and not isinstance(result, list)
        self.env.update(zip(names, [result] if single else result, strict=True))

    def operation(self, node: Mapping[str, Any]) -> Any:
        """Return what a node returns: a value, or a list of them."""
        target = node["target"]
        if target in _REGIONS:
            return self.region(node)
        given = {item["name"] or str(i): self.argument(item["arg"]) for i, item in enumerate(node["inputs"])}
        if function := _NUMBERS.get(target):
            return function(self.b, *given.values())
        op = _operator(target)
        if op is None:
            self.b.unsupported(f"op {target.removeprefix('torch.ops.')}")
        arguments = op._schema.arguments
        last = max((i for i, a in enumerate(arguments) if a.name in given and not a.kwarg_only), default=-1)
        positional = [given.get(a.name, a.default_value) for a in arguments[: last + 1]]
        keyword = {a.name: given[a.name] for a in arguments if a.kwarg_only and a.name in given}
        return self.b.call(op, *positional, **keyword)

    def region(self, node: Mapping[str, Any]) -> list[Any]:
        """A part of the model that ran with or without gradients: its nodes, detached where it had none.

        Or under autocast, whose casts between floating types leave no trace, as others.
        """
        given = [item["arg"] for item in node["inputs"]]
        place = next(place for place, argument in enumerate(given) if "as_graph" in argument)
        values, graph = given[place + 1 :], given[place]["as_graph"]["graph"]
        self.bind(graph["inputs"], [self.argument(value) for value in values])
        self.walk(graph)
        results = [self.argument(output) for output in graph["outputs"]]
        if node["target"] != _GRADIENTS or self.argument(given[0]):
            return results
        return [self.b.call(aten.detach.default, value) if is_tensor(value) else value for value in results]

    def argument(self, argument: Mapping[str, Any]) -> Any:
        """An argument of a node as the builder takes it."""
        ((kind, value),) = argument.items()
        if kind in _ARGUMENTS:
            return _ARGUMENTS[kind](self.env, value)
        if kind == "as_graph":
            self.b.unsupported("a nested graph, control flow that depends on the input's data,")
        return self.b.refuse(f"an argument of kind {kind}")


def _named(env: Mapping[str, Any], value: Mapping[str, Any]) -> Any:
    """A size by its name, or as it is."""
    return env[value["as_name"]] if "as_name" in value else next(iter(value.values()))


def _optional(env: Mapping[str, Any], value: Mapping[str, Any]) -> Any:
    return env[value["as_tensor"]["name"]] if "as_tensor" in value else None


def _plain(env: Mapping[str, Any], value: Any) -> Any:
    return value


_ARGUMENTS: dict[str, Callable[[Mapping[str, Any], Any], Any]] = {
    "as_none": lambda env, value: None,
    "as_tensor": lambda env, value: env[value["name"]],
    "as_tensors": lambda env, value: [env[item["name"]] for item in value],
    "as_optional_tensor": _optional,
    "as_optional_tensors": lambda env, value: [_optional(env, item) for item in value],
    "as_sym_int": _named,
    "as_sym_float": _named,
    "as_sym_bool": _named,
    "as_sym_ints": lambda env, value: [_named(env, item) for item in value],
    "as_sym_floats": lambda env, value: [_named(env, item) for item in value],
    "as_sym_bools": lambda env, value: [_named(env, item) for item in value],
    "as_int": _plain,
    "as_ints": _plain,
    "as_bool": _plain,
    "as_bools": _plain,
    "as_string": _plain,
    "as_strings": _plain,
    "as_float": lambda env, value: float(value),
    "as_floats": lambda env, value: [float(item) for item in value],
    "as_scalar_type": lambda env, value: DTYPES[value],
    "as_memory_format": lambda env, value: _MEMORY_FORMATS.get(value),
    "as_layout": lambda env, value: None,
    "as_device": lambda env, value: None,
}
"""Arguments by their kind in the schema; infinities and NaN are written as text."""


def _number(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda b, *args: b.number(function, *args)


def _sum(b: Builder, *args: Any) -> Any:
    total, *rest = args[0] if isinstance(args[0], list) else args
    for number in rest:
        total = b.number(operator.add, total, number)
    return total


def _product(b: Builder, sizes: Sequence[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = b.number(operator.mul, total, size)
    return total


def _truncated(b: Builder, number: Any) -> Any:
    """A whole number from a size, which is not negative."""
    return b.number(math.floor, number) if isinstance(number, Value) else math.trunc(number)


_NUMBERS: dict[str, Callable[..., Any]] = {
    **{f"{function.__module__}.{name}": _number(function) for function, name in ops.PYTHON.items()},
    **{f"_operator.{name}": _number(getattr(operator, name)) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "torch.ops.aten.sym_size.int": lambda b, x, dim: b.size(x, dim),
    "torch.ops.aten.sym_numel.default": lambda b, x: _product(b, b.sizes(x)),
    "_operator.getitem": lambda b, items, index: items[index],
    "math.trunc": _truncated,
    "torch.sym_int": _truncated,
    "torch.sym_float": lambda b, number: number,
    "torch.sym_max": _number(max),
    "torch.sym_min": _number(min),
    "torch.sym_sum": _sum,
    "torch._sym_sqrt": _number(math.sqrt),
}
"""Functions of sizes and other numbers, by their names in the file."""


def _place(node: Mapping[str, Any]) -> str:
    """Where a node comes from: its name, with the submodule and the source line as far as the file kept them."""
    name = node.get("name") or next(iter(_names(node["outputs"])), node["target"])
    metadata = node.get("metadata") or {}
    modules = [part.split(",")[1] for part in metadata.get("nn_module_stack", "").split(";") if part.count(",") > 1]
    where = f"node '{name}'" + (f" in '{modules[-1]}'" if modules and modules[-1] else "")
    frames = re.findall(r'File "([^"<\n]+)", line (\d+)[^\n]*\n([^\n]*)', metadata.get("stack_trace", ""))
    if not frames:
        return where
    file, line, code = frames[-1]
    return f"{where}, {file.rsplit('/', 1)[-1]}:{line}: {source_line(code)}"
