"""A canonical graph as a TorchScript file with a free batch: its source is written, since a trace fixes the batch."""

import math
import operator
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple  # noqa: F401, UP035  the names that the written source uses

import torch
from torch import fx, nn

from attrcli.errors import ModelError
from attrcli.graph import ops
from attrcli.graph.check import attribute

_INFIX: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.pow: "**",
}
_CALLED: dict[Any, str] = {
    math.ceil: "math.ceil",
    math.floor: "math.floor",
    math.sqrt: "math.sqrt",
    operator.neg: "-",
    min: "min",
    max: "max",
}


def save(module: fx.GraphModule, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a graph, with this text as the archive's extra files. Raises ModelError for what has no spelling."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        stored: dict[str, str] = {}

        class Written(torch.jit.ScriptModule):  # torch wants the tensors registered while it is made
            def __init__(self) -> None:
                super().__init__()
                stored.update(_register(self, module))

        script: Any = Written()
        try:
            script.define(_source(module, stored))
        except RuntimeError as error:
            raise ModelError(f"{path}: the graph cannot be written as TorchScript: {str(error)[:300]}") from error
        script.eval()
        torch.jit.save(script, str(path), _extra_files=dict(metadata))


def _register(script: Any, module: fx.GraphModule) -> dict[str, str]:
    """Hold the graph's tensors in the ScriptModule; return their attribute names by get_attr target."""
    names: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in names:
            name = node.target.replace(".", "_")
            while name in names.values() or hasattr(script, name):
                name += "_"
            tensor = attribute(module, node.target)
            if isinstance(tensor, nn.Parameter):
                script.register_parameter(name, nn.Parameter(tensor.detach().contiguous(), requires_grad=False))
            else:
                script.register_buffer(name, tensor.contiguous())
            names[node.target] = name
    return names


def _source(module: fx.GraphModule, stored: Mapping[str, str]) -> str:
    """The graph as the source of a method `forward`."""
    spelt: dict[fx.Node, str] = {}
    lines, arguments = [], ["self"]
    for number, node in enumerate(module.graph.nodes):
        if node.op == "placeholder":
            spelt[node] = node.target if node.target != "self" else "self_"
            arguments.append(spelt[node])
        elif node.op == "get_attr":
            spelt[node] = f"self.{stored[node.target]}"
        elif node.op == "output":
            lines.append(f"return {_outputs(module.meta['outputs'], [spelt[item] for item in node.args[0]])}")
        else:
            spelt[node] = f"v{number}_"
            lines.append(f"{spelt[node]} = {_call(node, spelt)}")
    return f"def forward({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines)


def _outputs(names: tuple[str, ...], values: list[str]) -> str:
    """What `forward` returns: a tensor, a tuple, or a dictionary where the outputs have names of their own."""
    if names == ("output",):
        return values[0]
    if all(name == f"output_{index}" for index, name in enumerate(names)):
        return f"({', '.join(values)},)"
    return "{" + ", ".join(f"{name!r}: {value}" for name, value in zip(names, values, strict=True)) + "}"


def _call(node: fx.Node, spelt: Mapping[fx.Node, str]) -> str:
    target: Any = node.target
    if target is operator.getitem:
        return f"{_literal(node.args[0], spelt)}[{_literal(node.args[1], spelt)}]"
    if target is ops.SIZE:
        return f"{_literal(node.args[0], spelt)}.size({node.args[1]})"
    if target in _INFIX:
        return f" {_INFIX[target]} ".join(f"({_literal(arg, spelt)})" for arg in node.args)
    if target in _CALLED:
        return f"{_CALLED[target]}({', '.join(_literal(arg, spelt) for arg in node.args)})"
    schema = target._schema.arguments
    kinds = {argument.name: str(argument.type) for argument in schema}
    given = [_literal(arg, spelt, str(schema[i].type)) for i, arg in enumerate(node.args)]
    given += [f"{name}={_literal(value, spelt, kinds[name])}" for name, value in node.kwargs.items()]
    return f"torch.ops.aten.{target._schema.name.split('::')[1]}({', '.join(given)})"


def _literal(value: Any, spelt: Mapping[fx.Node, str], kind: str = "") -> str:
    """An argument as source; `kind` is its type in the operator's schema."""
    if isinstance(value, fx.Node):
        return spelt[value]
    if isinstance(value, (list, tuple)):
        items = f"[{', '.join(_literal(item, spelt) for item in value)}]"
        kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[List") else kind
        plain = value and all(item is not None for item in value)
        return items if plain or not kind.startswith("List[") else f"torch.jit.annotate({kind}, {items})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.device):
        return f"torch.device('{value}')"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.memory_format, torch.layout)):
        return repr(value) if not isinstance(value, (torch.dtype, torch.memory_format, torch.layout)) else str(value)
    raise ModelError(f"an argument of type {type(value).__name__} has no spelling in TorchScript")
