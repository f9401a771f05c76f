"""Attention maps in a graph: those of fused attention nodes, and softmaxes between two products."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attrcli.errors import UnsupportedOp
from attrcli.graph import ops
from attrcli.graph.axes import argument, follow_axes
from attrcli.graph.axis import BATCH, UNKNOWN, Axes, Axis
from attrcli.graph.ops import OpClass
from attrcli.graph.rules import PLAIN, Choice, Rule, Step, Verdict
from attrcli.model import Model

Tensor = torch.Tensor
aten = torch.ops.aten
FUSED = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Maps:
    """The nodes that hold or make attention maps, in the graph's order, and the tokens that all of them relate."""

    nodes: tuple[fx.Node, ...]
    tokens: Axis


def find(model: Model, shape: tuple[int, ...], method: str) -> Maps:
    """The self-attentions over all tokens of a grid. Raises UnsupportedOp where there are none, or of another kind."""
    graph = model.engine(shape).run
    axes = follow_axes(graph, model.input, channels_last=model.channels_last_input)
    found: dict[fx.Node, Axis] = {}
    for node in graph.graph.nodes:
        if node in axes and (node.target is FUSED or _is_open(node, axes.keys())):
            found[node] = _tokens(node, axes, f"{model.path}: {method}")
    if not found:
        raise UnsupportedOp(
            f"{model.path}: {method} found no attention in the graph: no fused one, and no softmax over the last axis "
            "of a product of two that is the left operand of another; grad_cam works where there is a grid"
        )
    tokens = next(iter(found.values()))
    if any(other != tokens for other in found.values()):
        raise UnsupportedOp(
            f"{model.path}: {method}: attentions relate {tokens.size} tokens at first and others later (pooled or "
            "merged on the way): their product is not defined"
        )
    return Maps(tuple(found), tokens)


def _tokens(node: fx.Node, axes: dict[fx.Node, Axes], what: str) -> Axis:
    """The tokens that an attention relates. Raises UnsupportedOp, with the reason, for what is no global one."""
    if node.target is FUSED:
        given: Any = node.args
        queries, keys = axes.get(given[0], ()), axes.get(given[1], ())
        if not queries or not keys:
            raise UnsupportedOp(f"{what}: node '{node.name}' attends to or from what does not depend on the input")
        lead, rows, columns = queries[:-2], queries[-2], keys[-2]
    else:
        lead, rows, columns = axes[node][:-2], axes[node][-2], axes[node][-1]
    outside = [kind for axis in lead for kind in axis.kinds]
    if any(isinstance(kind, int) or str(kind).startswith("inside") for kind in outside):
        raise UnsupportedOp(f"{what}: node '{node.name}' attends within windows: no product of maps relates all tokens")
    if rows.size != columns.size or (rows.of_grid and columns.of_grid and rows != columns):
        raise UnsupportedOp(
            f"{what}: node '{node.name}' relates {rows.size} tokens to {columns.size} others (cross-attention, or "
            "pooled keys), and rollout multiplies maps of one set of tokens"
        )
    batched = bool(lead) and [kind for kind, _ in lead[0].factors[:1]] == [BATCH]  # an axis of size 1 has no factors
    if not rows.of_grid or rows != columns or not batched or UNKNOWN in outside:
        raise UnsupportedOp(f"{what}: which of the tokens of node '{node.name}' are places of the input is not known")
    return rows


# -- a softmax between two products ----------------------------------------------------------------------------------

_PRODUCTS = frozenset((aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default))
_SCALES = frozenset(
    (
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.where.self,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
    )
)


_KEEPING = frozenset((aten.dropout.default, aten.where.self, aten.masked_fill.Scalar, aten.mul.Tensor))


def _is_open(node: fx.Node, varying: Collection[fx.Node]) -> bool:
    """Whether a node is a softmax over the last axis between q k' and the product with v."""
    if node.target not in (aten.softmax.int, aten._safe_softmax.default):
        return False
    rank, dim = len(node.meta["shapes"][0]), node.args[1]
    return dim in (-1, rank - 1) and _scores(node.args[0], varying) and _mixes(node, varying)


def _scores(node: Any, varying: Collection[fx.Node]) -> bool:
    """Whether a value is a product of two that depend on the input, scaled, shifted, masked and viewed."""
    if not isinstance(node, fx.Node) or node not in varying:
        return False
    if node.target in _PRODUCTS:
        return sum(item in varying for item in node.all_input_nodes) >= 2
    if node.target in _SCALES or ops.classify(node.target) is OpClass.SHAPE:
        return any(_scores(item, varying) for item in node.all_input_nodes)
    return False


def _mixes(node: fx.Node, varying: Collection[fx.Node]) -> bool:
    """Whether a value, viewed or masked, is the left operand of a product with another that depends on the input."""
    for user in node.users:
        if user.target in _PRODUCTS:
            left = user.target is aten.einsum.default or user.args[0] is node
            if left and sum(item in varying for item in user.all_input_nodes) >= 2:
                return True
        elif (user.target in _KEEPING or ops.classify(user.target) is OpClass.SHAPE) and _mixes(user, varying):
            return True
    return False


# -- their values ----------------------------------------------------------------------------------------------------


def recording(nodes: Collection[str], kept: list[Tensor]) -> Choice:
    """Rules that keep the maps (N, heads, T, T) of nodes, by name, each time that the graph runs."""

    def choose(node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        if node.name not in nodes:
            return PLAIN
        weights: Callable[[Step], Tensor] = _weights if node.target is FUSED else lambda step: step.run()

        def rule(step: Step) -> Any:
            found = weights(step).detach()
            kept.append(found.reshape(len(step.explained), -1, *found.shape[-2:]))
            return step.run()

        return rule

    return choose


def _weights(step: Step) -> Tensor:
    """softmax(q k' scale + mask) of a fused attention."""
    query, key = step.args[:2]
    if key.shape[-3] != query.shape[-3]:  # fewer heads of keys, each for several queries
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = argument(step.node, "scale", 1 / math.sqrt(query.shape[-1]))
    scores = query @ key.transpose(-1, -2) * scale
    mask = step.args[3] if len(step.args) > 3 else None
    if argument(step.node, "is_causal", False):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)
