"""DeepLIFT's RevealCancel: a rule on the pair of a linear op and the activation behind it.

Beside its plain output y the linear op computes what the positive and what the negative differences of y come from,
P and N, P + N = y - y0. Both pass through what only rearranges, adds or scales, to the activation, which shares out
its change between the two as between two players; gradients then lead into P and N only. All are autograd tensors that
are zero at the baseline, so that what comes back sums to delta as everywhere else.

Source: Shrikumar et al. 2017, arXiv 1704.02685, sections 3.5.1 and 3.5.3.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from attrcli.graph.rectified import relu
from attrcli.graph.rules import Choice, Rule, Step, Verdict, own
from attrcli.methods._contributions import Pair, safe_quotient, unbroadcast
from attrcli.methods._deeplift_parts import PASSES, Parts, linear_parts, passed
from attrcli.methods._deeplift_rules import moving_of
from attrcli.methods._deeplift_step import pair

Tensor = torch.Tensor
aten = torch.ops.aten

CONVOLUTION = aten.convolution.default
DENSE = frozenset((aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default, aten.mv.default))

_UNARY = """relu leaky_relu prelu elu selu celu gelu silu mish sigmoid tanh softplus log_sigmoid hardtanh hardswish
clamp clamp_min clamp_max abs threshold softshrink hardshrink exp expm1 exp2 square erf erfc sin cos
atan sinh cosh asinh"""
ACTIVATIONS = frozenset(getattr(aten, name).default for name in _UNARY.split())
"""Functions that have a value everywhere, and so at the four points that RevealCancel asks; others (log, sqrt) keep
Rescale."""


@dataclass
class Cancelling:
    """The choice of rules under RevealCancel, over that of `base` for Rescale; resolved for one graph.

    With `genomics`, an activation whose nearest linear op is a convolution keeps Rescale.
    """

    base: Choice
    genomics: bool
    _carriers: set[fx.Node] | None = field(default=None, init=False)
    _activations: dict[fx.Node, int] = field(default_factory=dict, init=False)

    def __call__(self, node: fx.Node, varying: Collection[fx.Node]) -> Rule | Verdict:
        """The rule of a node."""
        if self._carriers is None:
            self._resolve(node.graph, varying)
        verdict, carriers = self.base(node, varying), self._carriers or set()
        if node in self._activations:
            return partial(_activation, self._activations[node])
        if node not in carriers or verdict is Verdict.REFUSE:
            return verdict
        if node.target in PASSES:
            return partial(_carried, verdict, partial(passed, carriers=carriers))
        return partial(_carried, verdict, linear_parts)

    def _resolve(self, graph: fx.Graph, varying: Collection[fx.Node]) -> None:
        self._carriers = set()
        for node in graph.nodes:
            if node in varying and (place := _operand(node, varying)) is not None:
                behind: set[fx.Node] = set()
                cancels = not self.genomics or _after_dense(node, varying)
                if cancels and _mixed(node.args[place], varying, behind):
                    self._carriers |= behind
                    self._activations[node] = place


def _operand(node: fx.Node, varying: Collection[fx.Node]) -> int | None:
    """The place of what an activation is applied to; None for what is none."""
    if (place := relu(node, varying)) is not None:
        return place
    return 0 if node.target in ACTIVATIONS and not moving_of(node.args[1:], varying) else None


def _mixed(node: fx.Node, varying: Collection[fx.Node], carriers: set[fx.Node]) -> bool:
    """Whether a linear op or a sum stands behind a node, or is it, before anything that P and N do not pass.

    Gathers the nodes that carry them. Without any, all differences that reach an element have one sign: Rescale.
    """
    if node in carriers:
        return True
    moving = moving_of(node.args, varying)
    if _is_linear(node, moving):
        carriers.add(node)
        return True
    passing = PASSES.get(node.target)
    if passing is None or not passing.fits(node, moving):
        return False
    behind = [_mixed(item, varying, carriers) for item in moving]
    if any(behind) or passing.sums(moving):
        carriers.add(node)
        return True
    return False


def _after_dense(node: fx.Node, varying: Collection[fx.Node]) -> bool:
    """Whether the nearest linear ops before a node are dense layers, all of them."""
    waiting, seen, nearest = [node], set[fx.Node](), set[fx.Node]()
    while waiting:
        moving = moving_of(waiting.pop().args, varying)
        for item in moving:
            if _is_linear(item, moving_of(item.args, varying)):
                nearest.add(item)
            elif item not in seen:
                seen.add(item)
                waiting.append(item)
    return bool(nearest) and all(item.target is not CONVOLUTION for item in nearest)


def _is_linear(node: fx.Node, moving: list[fx.Node]) -> bool:
    """Whether a node is a convolution or a product with a constant matrix, of one operand that moves."""
    if node.target is CONVOLUTION or node.target is aten.linear.default:
        return moving == [node.args[0]]
    if node.target is aten.addmm.default:
        return len(moving) == 1 and moving[0] is not node.args[0]
    return node.target in DENSE and len(moving) == 1


def _carried(verdict: Rule | Verdict, parts: Callable[[Step], Parts], step: Step) -> Any:
    """The node's own rule, and its parts beside."""
    value = step.run() if isinstance(verdict, Verdict) else verdict(step)
    step.beside[step.node] = parts(step)
    return value


def _activation(place: int, step: Step) -> Tensor:
    """Two players, P and N, in front of a unary function."""
    rectifies = relu(step.node, step.varying) is not None
    f: Callable[[Tensor], Tensor] = torch.relu if rectifies else lambda z: step.run(z, *step.args[1:])
    before: Any = step.node.args[place]
    return share(f, pair(step, place), step.beside[before])


def share(f: Callable[[Tensor], Tensor], z: Pair, parts: Parts) -> Tensor:
    """f(z), its change shared out: dy+ = [f(z0 + P) - f(z0) + f(z0 + N + P) - f(z0 + N)] / 2, and dy- likewise.

    The multipliers are dy+ / P and dy- / N; where P or N is 0, their limit as it comes from above or below; where both
    are, the derivative.
    """
    plus, minus = (part.detach() for part in parts)
    z0 = z.r.expand_as(plus)

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        none, first, second, whole = (f(at) for at in (z0, z0 + plus, z0 + minus, z0 + plus + minus))
        up, down = (first - none + whole - second) / 2, (second - none + whole - first) / 2
        return tuple(  # type: ignore[return-value]
            unbroadcast(g * safe_quotient(change, part, _limit(f, z0, part, other, side)), part.shape)
            for change, part, other, side in ((up, plus, minus, math.inf), (down, minus, plus, -math.inf))
        )

    return own(f(z.x.detach()), list(parts), backward)  # type: ignore[no-any-return]


def _limit(f: Callable[[Tensor], Tensor], z0: Tensor, part: Tensor, other: Tensor, side: float) -> Tensor:
    """The multiplier of a part that is 0: what it tends to from its side, or the derivative where both parts are 0."""
    if not bool((part == 0).any()):
        return torch.zeros_like(part)
    tends = (_slope(f, z0, side) + _slope(f, z0 + other, side)) / 2
    return torch.where(other == 0, _slope(f, z0, z0), tends)


def _slope(f: Callable[[Tensor], Tensor], z: Tensor, beside: Tensor | float) -> Tensor:
    """The derivative at z, or next to it towards `beside`: at a kink the two sides differ."""
    leaf = torch.nextafter(z, torch.as_tensor(beside).to(z)).requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(f(leaf).sum(), leaf)
    return slope
