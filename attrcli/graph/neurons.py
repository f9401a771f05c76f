"""The neurons of a graph: elements of what its ReLUs, or other nonlinearities, output; told by value.

A ReLU written as a clamp, a threshold, a maximum or a choice is a ReLU; one that is called twice is two nodes.
"""

import difflib
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from attrcli.errors import UsageError
from attrcli.graph import ops
from attrcli.graph.check import attribute
from attrcli.graph.ops import OpClass
from attrcli.graph.rules import dependent

aten = torch.ops.aten

_PROBE = torch.tensor([-1e3, -3.0, -1.0, -0.25, 0.0, 0.25, 1.0, 5.0, 7.0, 1e3])
_BY_VALUE = {"relu": _PROBE.clamp_min(0), "relu6": _PROBE.clamp(0, 6)}

_UNARY = (OpClass.SMOOTH, OpClass.KINKED)
_EXTREMES = frozenset((aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default))
_FILLED = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}
_ZEROS = frozenset((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default))
_ABOVE = frozenset((aten.gt.Scalar, aten.ge.Scalar, aten.gt.Tensor, aten.ge.Tensor))


def _name_of(op: Any) -> str:
    name: str = op._schema.name
    return name.removeprefix("aten::")


@cache
def known() -> tuple[str, ...]:
    """The names of nonlinearities, relu first."""
    names = {_name_of(op) for op, kind in ops.TABLE.items() if kind in _UNARY} | {_name_of(op) for op in _EXTREMES}
    return "relu", *sorted((names | set(_BY_VALUE)) - {"relu"})


def parse(text: str, method: str) -> tuple[str, ...]:
    """The names in a comma list. Raises UsageError, with a suggestion, for one that is no nonlinearity."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in known():
            close = difflib.get_close_matches(name, known(), 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UsageError(f"{method}: ops={text}: '{name}' is no nonlinearity{hint}; accepted: {', '.join(known())}")
    return names


def nonlinearities(module: fx.GraphModule, explained: str) -> dict[fx.Node, str]:
    """The nonlinearities on the way from an input, in order, each with its name: relu, relu6, gelu, ..."""
    varying = dependent(module, explained)
    found = {}
    for node in module.graph.nodes:
        if node in varying and node.op == "call_function" and (name := _nonlinearity(module, node, varying)):
            found[node] = name
    return found


def chosen(module: fx.GraphModule, explained: str, names: Sequence[str]) -> list[fx.Node]:
    """The nodes, in order, whose outputs are the neurons."""
    return [node for node, name in nonlinearities(module, explained).items() if name in names]


def _nonlinearity(module: fx.GraphModule, node: fx.Node, varying: Collection[fx.Node]) -> str | None:
    if node.target is aten.where.self and _is_choice(module, node):
        return "relu"
    if node.target is aten.mul.Tensor and _is_silu(node):
        return "silu"
    if ops.classify(node.target) not in _UNARY and node.target not in _EXTREMES:
        return None
    operands = [item for item in node.all_input_nodes if item in varying and _constant(module, item) is None]
    if len(operands) != 1:
        return None
    values: dict[fx.Node, Any] = {operands[0]: _PROBE}
    for item in node.all_input_nodes:
        if item not in values:
            values[item] = _constant(module, item)
    if any(value is None for value in values.values()):
        return None if node.target in _EXTREMES else _name_of(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: torch.as_tensor(values[item]))
    try:
        target: Any = node.target
        value = target(*args, **kwargs)
    except RuntimeError:  # an op that takes no vector of these, such as prelu with weights
        return _name_of(node.target)
    name = next((name for name, expected in _BY_VALUE.items() if torch.equal(value, expected)), None)
    return name or (None if node.target in _EXTREMES else _name_of(node.target))


def _constant(module: fx.GraphModule, node: Any) -> float | None:
    """The number that all elements of a node's value are, None where it is not known or there is no such number."""
    if not isinstance(node, fx.Node):
        return float(node) if isinstance(node, (int, float)) else None
    if node.op == "get_attr":
        tensor = attribute(module, str(node.target))
        if not tensor.is_floating_point() or not tensor.numel() or bool((tensor != tensor.flatten()[0]).any()):
            return None
        return float(tensor.flatten()[0])
    if node.target in _ZEROS:
        return 0.0
    if node.target in _FILLED:
        value = node.args[_FILLED[node.target]]
        return float(value) if isinstance(value, (int, float)) else None
    if node.target in (aten.to.dtype, aten.expand.default, aten.reshape.default):
        return _constant(module, node.args[0])
    return None


def _is_choice(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether this is x where x > 0, else 0."""
    condition, x, other = node.args
    return (
        isinstance(condition, fx.Node)
        and condition.target in _ABOVE
        and condition.args[0] is x
        and _constant(module, condition.args[1]) == 0
        and _constant(module, other) == 0
    )


def _is_silu(node: fx.Node) -> bool:
    """Whether this is x * sigmoid(x)."""
    one, other = node.args
    pairs = ((one, other), (other, one))
    return any(isinstance(s, fx.Node) and s.target is aten.sigmoid.default and s.args[0] is x for x, s in pairs)
