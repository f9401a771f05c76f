"""DeepLIFT's rules where an op takes what autograd cannot see: masks added to numbers, and indices that move.

What an op does with its numbers is attributed to them, at the indices of the input and at those of the baseline, half
and half; what other indices alone change is remainder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import Step, own
from attrcli.methods._deeplift_step import cut, seen, tensors

Tensor = torch.Tensor


def seeing(step: Step) -> Any:
    """The op itself, with its operands of whole numbers and truth values cut off."""

    def walk(node: Any, x: Any, r: Any) -> Any:
        if isinstance(node, (list, tuple)):
            return [walk(*each) for each in zip(node, x, r, strict=True)]
        return seen(step, node, x, r).x if isinstance(x, Tensor) else x

    return step.run(*walk(step.node.args, step.args, step.reference_args))


def selected(step: Step) -> Any:
    """h(x, i), linear in x: [h(x, i) - h(x0, i) + h(x, i0) - h(x0, i0)] / 2 is x's; the like of i is remainder."""
    moving = [(seen(step, node, x, r), r) for node, x, r in tensors(step)]
    if not moving:
        return cut(step, step.node, step.run(), step.reference)
    there = _rows(step)

    def run(data: Sequence[Tensor], at: Any) -> Tensor:
        return _run(step, data, at)  # type: ignore[no-any-return]

    xs, rs = [each.x.detach() for each, _ in moving], [r.expand_as(each.x) for each, r in moving]
    with torch.no_grad():
        value = run(xs, step.args)

    def backward(g: Tensor) -> list[Tensor]:
        with torch.no_grad():
            by_index = (value - run(xs, there) + run(rs, step.args) - run(rs, there)) / 2
        step.remainder.add(step.node, g * by_index)
        leaves = [x.requires_grad_(True) for x in xs]
        with torch.enable_grad():
            both = run(leaves, step.args) + run(leaves, there)
            return [s / 2 for s in torch.autograd.grad(both, leaves, g)]

    return own(value, [each.x for each, _ in moving], backward)


def _run(step: Step, data: Sequence[Tensor], at: Any) -> Any:
    left = iter(data)

    def walk(node: Any, x: Any, other: Any) -> Any:
        if isinstance(node, (list, tuple)):
            return [walk(*each) for each in zip(node, x, other, strict=True)]
        moves = isinstance(node, fx.Node) and node in step.varying and isinstance(x, Tensor)
        return next(left) if moves and x.is_floating_point() else other

    return step.run(*walk(step.node.args, step.args, at))


def _rows(step: Step) -> Any:
    """The arguments at the baseline, a row for each of the input."""

    def walk(x: Any, r: Any) -> Any:
        if isinstance(r, (list, tuple)):
            return [walk(*each) for each in zip(x, r, strict=True)]
        return r.expand_as(x) if isinstance(r, Tensor) and r.shape != x.shape else r

    return walk(step.args, step.reference_args)
