"""RevealCancel's two parts of a difference, P + N = y - y0: how linear ops make them, and what passes them on.

A linear op splits the whole difference of its input by sign: P = F(dx+; W+) + F(dx-; W-), N = F(dx+; W-) + F(dx-; W+),
without bias. What scales by a constant below zero swaps the two.

Source: Shrikumar et al. 2017, arXiv 1704.02685, section 3.5.1.
"""

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import Step, own
from attrcli.methods._contributions import Pair
from attrcli.methods._deeplift_step import pair, seen

Tensor = torch.Tensor
aten = torch.ops.aten
Parts = tuple[Any, Any]
"""P and N: a tensor each, or a list of tensors each for an op that returns several."""


def split(x: Pair) -> Parts:
    """The whole difference by sign; where there is none, a multiplier is the mean of those of the two parts."""
    delta = x.delta

    def part(sign: int) -> Tensor:
        def backward(g: Tensor) -> tuple[Tensor]:
            moved = (g * ((sign * delta > 0).to(g.dtype) + (delta == 0).to(g.dtype) / 2)).to(g.dtype)
            return (moved,)

        value = delta.clamp_min(0) if sign > 0 else delta.clamp_max(0)
        return own(value, [x.x], backward)  # type: ignore[no-any-return]

    return part(1), part(-1)


def crossed(op: Callable[[Tensor, Tensor], Any], parts: Parts, weight: Tensor) -> Parts:
    """The parts behind a product with a constant: what a weight below zero takes changes sides."""
    up, down = weight.clamp_min(0), weight.clamp_max(0)
    plus, minus = parts
    return op(plus, up) + op(minus, down), op(plus, down) + op(minus, up)


def linear_parts(step: Step) -> Parts:
    """The parts of a convolution, or of a product with a constant matrix on either side."""
    args, target = step.args, step.node.target
    first = 1 if target is aten.addmm.default else 0
    moves = first if step.depends(first) else first + 1
    parts, weight = split(pair(step, moves)), args[2 * first + 1 - moves]

    def op(x: Tensor, w: Tensor) -> Tensor:
        if target is aten.convolution.default:
            return step.run(x, w, None, *args[3:])  # type: ignore[no-any-return]
        if target is aten.linear.default:
            return torch.nn.functional.linear(x, w)
        return torch.matmul(x, w) if moves == first else torch.matmul(w, x)

    plus, minus = crossed(op, parts, weight)
    if target is aten.addmm.default:
        alpha = step.kwargs.get("alpha", 1)
        plus, minus = (alpha * plus, alpha * minus) if alpha >= 0 else (alpha * minus, alpha * plus)
    return plus, minus


# -- what the parts pass through -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passing:
    """How parts pass a node: `parts(step, given)` from those of its operands that move, in order.

    `operands` is how many of the first arguments may move, 0 for the members of the list that comes first; `most` how
    many of them at once. `adds` says that the op sums elements of one operand.
    """

    parts: Callable[[Step, list[Parts]], Parts]
    operands: int = 1
    most: int = 99
    adds: bool = False

    def fits(self, node: fx.Node, moving: list[fx.Node]) -> bool:
        """Whether what moves is what may."""
        first: Any = node.args[: self.operands] if self.operands else node.args[0]
        return 0 < len(moving) <= self.most and all(item in first for item in moving)

    def sums(self, moving: list[fx.Node]) -> bool:
        """Whether an element of the value is a sum of differences, whose signs may differ."""
        return self.adds or (self.operands == 2 and len(moving) == 2)


def passed(step: Step, carriers: Collection[fx.Node]) -> Parts:
    """The parts of a node from those of its operands; an operand that has none gives its difference, by sign."""
    passing = PASSES[step.node.target]
    sides: list[Any] = [step.node.args, step.args, step.reference_args]
    nodes, values, references = [side[: passing.operands] if passing.operands else side[0] for side in sides]
    moving = [each for each in zip(nodes, values, references, strict=True) if each[0] in step.varying]
    return passing.parts(
        step, [step.beside[node] if node in carriers else split(seen(step, node, x, r)) for node, x, r in moving]
    )


def _each(step: Step, given: list[Parts]) -> Parts:
    """What takes parts as they are, by the op itself."""
    plus, minus = (step.run(part, *step.args[1:]) for part in given[0])
    return plus, minus


def _padded(step: Step, given: list[Parts]) -> Parts:
    plus, minus = (step.run(part, step.args[1]) for part in given[0])
    return plus, minus


def _item(step: Step, given: list[Parts]) -> Parts:
    return given[0][0][step.args[1]], given[0][1][step.args[1]]


def _swapped(parts: Parts) -> Parts:
    return -parts[1], -parts[0]


def _scaled(parts: Parts, factor: float) -> Parts:
    return (factor * parts[0], factor * parts[1]) if factor >= 0 else (factor * parts[1], factor * parts[0])


def _sum(first: int, second: int, scaled: int) -> Callable[[Step, list[Parts]], Parts]:
    """add, sub, rsub: with these signs, the operand at `scaled` times alpha."""

    def parts(step: Step, given: list[Parts]) -> Parts:
        alpha = step.kwargs.get("alpha", step.args[2] if len(step.args) > 2 else 1)
        factors = [first, second]
        factors[scaled] *= alpha
        places = [i for i in (0, 1) if step.depends(i)]
        moved = [_scaled(each, factors[i]) for each, i in zip(given, places, strict=True)]
        other = [arg for i, arg in enumerate(step.args[:2]) if i not in places and isinstance(arg, Tensor)]
        plus, minus = (sum(each[side] for each in moved) for side in (0, 1))
        for constant in other:  # broadcasts with it
            plus, minus = (part + torch.zeros_like(constant) for part in (plus, minus))
        return plus, minus

    return parts


def _product(step: Step, given: list[Parts]) -> Parts:
    """Times a constant, or divided by one."""
    place = 1 if step.depends(0) else 0
    factor: Any = step.args[place]
    tensor = factor if isinstance(factor, Tensor) else torch.as_tensor(factor, dtype=given[0][0].dtype)
    divides = step.node.target in (aten.div.Tensor, aten.div.Scalar)
    return crossed(torch.mul, given[0], 1 / tensor if divides else tensor)


def _batch_norm(step: Step, given: list[Parts]) -> Parts:
    _, gamma, _, _, variance, *rest = step.args
    scale = torch.rsqrt(variance + rest[2]) * (1 if gamma is None else gamma)
    return crossed(torch.mul, given[0], scale.reshape(-1, *[1] * (given[0][0].dim() - 2)))


def _negated(step: Step, given: list[Parts]) -> Parts:
    return _swapped(given[0])


def _joined(step: Step, given: list[Parts]) -> Parts:
    """cat and stack; members that do not move have no difference."""
    left = iter(given)
    moving = [member in step.varying for member in step.node.args[0]]  # type: ignore[union-attr]
    both = [next(left) if moves else (torch.zeros_like(x),) * 2 for moves, x in zip(moving, step.args[0], strict=True)]
    plus, minus = (step.run([parts[side] for parts in both], *step.args[1:]) for side in (0, 1))
    return plus, minus


_AS_THEY_ARE = """
    reshape.default unflatten.int permute.default transpose.int t.default numpy_T.default mT.default movedim.int
    movedim.intlist unsqueeze.default squeeze.dims expand.default broadcast_to.default unfold.default select.int
    slice.Tensor narrow.default flip.default roll.default repeat.default pixel_shuffle.default pixel_unshuffle.default
    split.Tensor split_with_sizes.default chunk.default unbind.int dropout.default
    reflection_pad1d.default reflection_pad2d.default replication_pad1d.default replication_pad2d.default"""
_SUMS = """
    avg_pool1d.default avg_pool2d.default avg_pool3d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
    adaptive_avg_pool3d.default sum.default sum.dim_IntList mean.default mean.dim"""

PASSES: dict[Any, Passing] = {
    getattr(getattr(aten, packet), overload): Passing(_each, adds=names is _SUMS)
    for names in (_AS_THEY_ARE, _SUMS)
    for packet, overload in (name.split(".") for name in names.split())
} | {
    operator.getitem: Passing(_item),
    aten.constant_pad_nd.default: Passing(_padded),
    aten.neg.default: Passing(_negated),
    aten.add.Tensor: Passing(_sum(1, 1, 1), 2),
    aten.sub.Tensor: Passing(_sum(1, -1, 1), 2),
    aten.rsub.Tensor: Passing(_sum(-1, 1, 0), 2),
    aten.add.Scalar: Passing(_sum(1, 1, 1)),
    aten.sub.Scalar: Passing(_sum(1, -1, 1)),
    aten.rsub.Scalar: Passing(_sum(-1, 1, 0)),
    aten.mul.Tensor: Passing(_product, 2, 1),
    aten.div.Tensor: Passing(_product),
    aten.mul.Scalar: Passing(_product),
    aten.div.Scalar: Passing(_product),
    aten.batch_norm.default: Passing(_batch_norm),
    aten.cat.default: Passing(_joined, 0),
    aten.stack.default: Passing(_joined, 0),
}
"""The ops that parts pass on their way from a linear op to an activation."""
