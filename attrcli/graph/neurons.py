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
from attrcli.graph.ops import OpClass
from attrcli.graph.rectified import rectifier
from attrcli.graph.rules import dependent

aten = torch.ops.aten

_PROBE = torch.tensor([-1e3, -3.0, -1.0, -0.25, 0.0, 0.25, 1.0, 5.0, 7.0, 1e3])
_BY_SLOPE = {"relu": _PROBE > 0, "relu6": (_PROBE > 0) & (_PROBE < 6)}
_UNARY = (OpClass.SMOOTH, OpClass.KINKED)


def _name_of(op: Any) -> str:
    name: str = op._schema.name
    return name.removeprefix("aten::")


@cache
def known() -> tuple[str, ...]:
    """The names of nonlinearities, relu first."""
    names = {_name_of(op) for op, kind in ops.TABLE.items() if kind in _UNARY}
    return "relu", *sorted((names | set(_BY_SLOPE)) - {"relu"})


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
        if node in varying and node.op == "call_function" and (name := _nonlinearity(node, varying)):
            found[node] = name
    return found


def chosen(module: fx.GraphModule, explained: str, names: Sequence[str]) -> list[fx.Node]:
    """The nodes, in order, whose outputs are the neurons."""
    return [node for node, name in nonlinearities(module, explained).items() if name in names]


def _nonlinearity(node: fx.Node, varying: Collection[fx.Node]) -> str | None:
    found = rectifier(node, varying)
    if found is not None and node.target is not aten.prelu.default:  # whose slopes are a channel's
        slope = found.slope(_PROBE)
        for name, expected in _BY_SLOPE.items():
            if torch.equal(slope, expected.to(slope.dtype)):
                return name
    if node.target is aten.mul.Tensor and _is_silu(node):
        return "silu"
    if ops.classify(node.target) not in _UNARY or sum(item in varying for item in node.all_input_nodes) != 1:
        return None
    return _name_of(node.target)


def _is_silu(node: fx.Node) -> bool:
    """Whether this is x * sigmoid(x)."""
    one, other = node.args
    pairs = ((one, other), (other, one))
    return any(isinstance(s, fx.Node) and s.target is aten.sigmoid.default and s.args[0] is x for x, s in pairs)
