"""Where DeepLIFT's sum stops matching: a walk over the graph from the output to the input, node by node.

Each node's rule runs by itself, between its arguments at the input and at the baseline, on what its readers handed
back. At a cut of the graph the sum of multiplier x difference over the values that cross it, plus the remainder so
far, is the difference of the score; where the sum jumps, the node between two cuts has made the jump: its own gap.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attrcli.graph.check import attribute
from attrcli.graph.rules import Remainder, Ruled, Step

Tensor = torch.Tensor


@dataclass(frozen=True)
class Gap:
    """What one node adds to the gap; `relative` is to the sum of absolute contributions of what it reads."""

    node: str
    op: str
    origin: str
    gap: float
    relative: float


@dataclass(frozen=True)
class Walk:
    """All nodes' own gaps in the order of the walk, and what the whole should and does sum to."""

    delta: float
    total: float
    remainder: float
    gaps: tuple[Gap, ...]


def walk(ruled: Ruled, inputs: list[Tensor], references: list[Tensor], gradient: Tensor) -> Walk:
    """Walk a ruled graph at one input with its baseline; `gradient` is that of the score in the logits (1, K, ...)."""
    nodes = ruled.nodes
    env, there = _values(ruled, inputs), _values(ruled, references)
    output: Any = nodes[-1].args[0][0]
    given: dict[tuple[fx.Node, int], Tensor] = {(output, 0): gradient.reshape(env[output].shape)}
    gaps: list[Gap] = []
    left = total = 0.0
    delta = float((given[output, 0] * (env[output] - there[output])).sum())
    for node in reversed(nodes):
        multipliers = {i: given.pop((node, i)) for i in range(_width(env.get(node))) if (node, i) in given}
        if node.op != "call_function" or node not in ruled.varying or not multipliers:
            if node.op == "placeholder" and node in ruled.varying and multipliers:
                total = float((multipliers[0] * (env[node] - there[node])).sum())
            continue
        gap, size, remainder = _own(ruled, node, env, there, multipliers, given)
        left += remainder
        gaps.append(Gap(node.name, str(node.target), str(node.meta.get("origin") or ""), gap, abs(gap) / (size or 1)))
    return Walk(delta, total, left, tuple(gaps))


def _values(ruled: Ruled, inputs: list[Tensor]) -> dict[fx.Node, Any]:
    """The value of every node."""
    left, env = iter(inputs), dict[fx.Node, Any]()
    with torch.no_grad():
        for node in ruled.nodes:
            if node.op == "placeholder":
                env[node] = next(left)
            elif node.op == "get_attr":
                env[node] = attribute(ruled.module, str(node.target))
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
    return env


def _width(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple)) else 1


def _own(
    ruled: Ruled,
    node: fx.Node,
    env: dict[fx.Node, Any],
    there: dict[fx.Node, Any],
    multipliers: dict[int, Tensor],
    given: dict[tuple[fx.Node, int], Tensor],
) -> tuple[float, float, float]:
    """A node's own gap, the sum of |contribution| of what it reads, and its remainder; adds to what those are given."""
    leaves: dict[fx.Node, Any] = {}

    def leaf(item: fx.Node) -> Any:
        if item not in leaves:
            leaves[item] = _leaf(env[item]) if item in ruled.varying else env[item]
        return leaves[item]

    def value_there(item: fx.Node) -> Any:
        return there[item]

    with torch.enable_grad():
        args, kwargs = fx.map_arg((node.args, node.kwargs), leaf)
        remainder = Remainder(1, next(iter(multipliers.values())).device)
        explained = torch.zeros((), dtype=torch.float64, requires_grad=True)
        about: Any = (fx.map_arg(node.args, value_there), there[node], explained, remainder, {}, ruled.varying)
        rule = ruled.rules.get(node)
        made = rule(Step(node, args, kwargs, *about)) if rule else node.target(*args, **kwargs)  # type: ignore[operator]
        values = list(made) if isinstance(made, (list, tuple)) else [made]
        seen = [i for i in multipliers if isinstance(values[i], Tensor) and values[i].requires_grad]
        tensors = [(item, i, t) for item in leaves for i, t in enumerate(_list(leaves[item])) if _moves(t)]
        grads = torch.autograd.grad(
            [values[i] for i in seen], [*(t for _, _, t in tensors), explained], [multipliers[i] for i in seen],
            allow_unused=True,
        ) if seen else ()  # fmt: skip
    left = float(remainder.total.sum())
    before, after = _list(env[node]), _list(there[node])
    wanted = sum(float((m * (before[i] - after[i])).sum()) for i, m in multipliers.items())
    handed = [(item, i, t, g) for (item, i, t), g in zip(tensors, grads, strict=False) if g is not None]
    found, size = _hand_on(handed, there, given)
    return found + left - wanted, size + abs(left), left


def _hand_on(
    handed: list[tuple[fx.Node, int, Tensor, Tensor]], there: dict[fx.Node, Any], given: dict[Any, Tensor]
) -> tuple[float, float]:
    """Add multipliers to what readers have handed back before; their contributions' sum, and that of |contribution|."""
    found = size = 0.0
    for item, i, tensor, grad in handed:
        part = grad * (tensor.detach() - _list(there[item])[i])
        found, size = found + float(part.sum()), size + float(part.abs().sum())
        given[item, i] = given[item, i] + grad if (item, i) in given else grad
    return found, size


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _moves(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _leaf(value: Any) -> Any:
    """A value, or each of several, as the start of a graph of its own."""
    if isinstance(value, (list, tuple)):
        return [_leaf(each) for each in value]
    real = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_(True) if real else value
