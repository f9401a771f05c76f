"""Excitation backpropagation's rules: how a mass p at a node's value is shared among what it was computed from.

A linear op gives each input a share a+ w+ of each output's mass; all else that is monotone passes it on.

Source: Zhang et al. 2016, arXiv 1608.00507, equations 3 to 6 and section 3.3; batch norm and activations as TorchRay.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from attrcli.graph import ops
from attrcli.graph.ops import OpClass
from attrcli.graph.rules import PLAIN, REFUSE, Choice, Rule, Step, Verdict, own

Tensor = torch.Tensor
aten = torch.ops.aten


def choice(*, contrastive: bool) -> Choice:
    """The rules; `contrastive`, the last weights' negatives take away what excites all else."""
    last: dict[fx.Graph, set[fx.Node]] = {}

    def choose(node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        depends = [isinstance(arg, fx.Node) and arg in varying for arg in node.args]
        if node.target in _WEIGHTED:
            if node.graph not in last:
                last[node.graph] = _last_weighted(node.graph)
            return _weighted(node, depends, contrastive=contrastive and node in last[node.graph])
        if node.target in _SUMS:
            return REFUSE if any(depends[1:]) else _sum
        if node.target in _RULES:
            return _RULES[node.target](node, depends)
        if node.target in _MONOTONE:
            return REFUSE if any(depends[1:]) else _pass
        kind = ops.classify(node.target)
        if kind in (OpClass.DISCRETE, OpClass.CREATION) or node.target in _WINNERS:
            return PLAIN
        if kind in (OpClass.SHAPE, OpClass.INDEXING):
            return PLAIN if node.target not in (aten.scatter_add.default, aten.index_add.default) else REFUSE
        return REFUSE

    return choose


_WEIGHTED: dict[Any, tuple[int, int, int | None]] = {
    aten.linear.default: (0, 1, 2),
    aten.convolution.default: (0, 1, 2),
    aten.addmm.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
    aten.matmul.default: (0, 1, None),
    aten.mm.default: (0, 1, None),
    aten.bmm.default: (0, 1, None),
}
"""Products, with the places of their two operands and of what is added."""


def _last_weighted(graph: fx.Graph) -> set[fx.Node]:
    """The products from which none other follows."""
    followed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in followed or user.target in _WEIGHTED for user in node.users):
            followed.add(node)
    return {node for node in graph.nodes if node.target in _WEIGHTED and node not in followed}


def _weighted(node: fx.Node, depends: list[bool], *, contrastive: bool) -> Rule | Verdict:
    one, two, added = _WEIGHTED[node.target]
    if depends[one] == depends[two] or (added is not None and len(depends) > added and depends[added]):
        return REFUSE
    place, other = (one, two) if depends[one] else (two, one)

    def rule(step: Step) -> Any:
        def product(weight: Tensor) -> Callable[[Tensor], Tensor]:
            def op(x: Tensor) -> Any:
                pair = (x, weight) if place == one else (weight, x)
                return step.run(*pair, None, *step.args[3:]) if added == 2 else torch.matmul(*pair)

            return op

        weight = step.args[other].detach()
        ways = [(1, product(weight.clamp_min(0)))]
        if contrastive:
            ways.append((-1, product((-weight).clamp_min(0))))
        return _shared(step, [place], ways)

    return rule


def _shared(step: Step, places: list[int], ways: list[tuple[int, Callable[..., Tensor]]]) -> Any:
    """The node's value; backward, each operand's part of each output's mass, summed over ways with their signs.

    p_i = a_i d/da_i sum_j z_j p_j / z_j for z of operands cut off at 0. Where z_j is 0 nothing excites j: the mass goes
    to the remainder.
    """
    operands = [step.args[place] for place in places]

    def backward(mass: Tensor) -> list[Tensor]:
        parts, dropped = [torch.zeros_like(a) for a in operands], torch.zeros_like(mass)
        for sign, op in ways:
            leaves = [a.detach().clamp_min(0).requires_grad_(True) for a in operands]
            with torch.enable_grad():
                z = op(*leaves)
                dead = z == 0
                quotient = torch.where(dead, 0, mass / torch.where(dead, 1, z))
                found = torch.autograd.grad(z, leaves, quotient)
            dropped += sign * torch.where(dead, mass, 0)
            parts = [p + sign * leaf.detach() * g for p, leaf, g in zip(parts, leaves, found, strict=True)]
        if bool(dropped.any()):
            step.remainder.add(step.node, dropped)
        return parts

    return own(step.run().detach(), operands, backward)


# -- everything else -------------------------------------------------------------------------------------------------


def _passed_to(step: Step, place: int) -> Any:
    """All mass to one operand."""
    x = step.args[place]
    return own(step.run().detach(), [x], lambda mass: (mass.sum_to_size(x.shape),))


def _pass(step: Step) -> Any:
    return _passed_to(step, 0) if step.args[0].requires_grad else step.run()


def _sum(step: Step) -> Any:
    return _shared(step, [0], [(1, lambda x: step.run(x, *step.args[1:]))])


def _add(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """Two that depend share by what they add; a constant takes nothing."""
    scale: Any = node.kwargs.get("alpha", 1)
    if all(depends[:2]) and scale > 0:
        return lambda step: _shared(step, [0, 1], [(1, lambda a, b: step.run(a, b))])
    return (lambda step: _passed_to(step, 0 if depends[0] else 1)) if scale > 0 and not all(depends[:2]) else REFUSE


def _less(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """x - c passes; what is taken away from a constant, or from another, does not excite."""
    return _pass if depends[0] and not any(depends[1:]) else REFUSE


def _times(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """A factor between 0 and 1 that gates another leaves it the mass; two others have half each."""

    def rule(step: Step) -> Any:
        moving = [i for i in (0, 1) if depends[i] and step.args[i].requires_grad]
        if len(moving) < 2:
            return _passed_to(step, moving[0]) if moving else step.run()
        gates = [i for i in (0, 1) if _is_gate(node.args[i])]
        if len(gates) == 1:
            return _passed_to(step, 1 - gates[0])
        a, b = step.args[:2]
        return own(
            step.run().detach(), [a, b], lambda mass: ((mass / 2).sum_to_size(a.shape), (mass / 2).sum_to_size(b.shape))
        )

    return rule


def _is_gate(node: Any) -> bool:
    """Whether a value is that of a sigmoid or a tanh, but for views of it."""
    while isinstance(node, fx.Node) and ops.classify(node.target) in (OpClass.SHAPE, OpClass.INDEXING):
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    hard = node.target is aten.clamp.default and tuple(node.args[1:3]) == (0, 1)
    return hard or node.target in (aten.sigmoid.default, aten.tanh.default)


_SUMS = frozenset(
    op
    for op in ops.TABLE
    if any(word in str(op) for word in ("avg_pool", "aten.mean.", "aten.sum.", "upsample_nearest"))
    or any(word in str(op) for word in ("upsample_linear", "upsample_bilinear", "upsample_trilinear"))
)
"""Sums with weights that are not negative."""

_MONOTONE = frozenset(
    (
        aten.relu.default,
        aten.leaky_relu.default,
        aten.prelu.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.threshold.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.softplus.default,
        aten.elu.default,
        aten.selu.default,
        aten.celu.default,
        aten.batch_norm.default,
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.dropout.default,
    )
)
"""Ops of one operand that pass all mass on."""

_WINNERS = frozenset(
    op
    for op in ops.TABLE
    if any(word in str(op) for word in ("max_pool", "aten.amax.", "aten.max.", "aten.maximum", "aten.topk"))
) | {aten.constant_pad_nd.default}

_RULES: dict[Any, Callable[[fx.Node, list[bool]], Rule | Verdict]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _less,
    aten.mul.Tensor: _times,
    aten.div.Tensor: _less,
}
