"""How relevance passes a node: LRP's rules in terms of the op itself and its vector-Jacobian product.

What a node is given and does not hand on is booked in the remainder, row by row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.node import map_aggregate

from attrcli.graph.rules import Rule, Step, own
from attrcli.methods._contributions import unbroadcast

Tensor = torch.Tensor


def divided(relevance: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """R / (z + epsilon sgn(z)), never by zero: sgn(0) is 1, and that of minus zero, a sum of nothing, -1."""
    z = z.detach()
    stabilised = torch.copysign(z.new_tensor(epsilon), z).add_(z)
    return torch.div(relevance, stabilised, out=stabilised)


def booked(step: Step, value: Tensor, inputs: Sequence[Tensor], spread: Callable[[Tensor], Sequence[Tensor]]) -> Any:
    """A value whose relevance is spread over inputs; what is lost on the way is booked."""

    def backward(relevance: Tensor) -> Sequence[Tensor]:
        parts = spread(relevance)
        book = step.remainder
        book.add(step.node, book.by_row(relevance) - sum(book.by_row(part) for part in parts))
        return parts

    return own(value.detach(), inputs, backward)


def in_proportion(
    step: Step, op: Callable[..., Tensor], inputs: Sequence[Tensor], epsilon: float, share: int = 1
) -> Any:
    """R_i = a_i V(R / st(share z)), z = op(a): each input as far as it makes z, for an op that is linear in each."""
    leaves = [x.detach().requires_grad_(True) for x in inputs]
    with torch.enable_grad():
        value = op(*leaves)

    def spread(relevance: Tensor) -> Sequence[Tensor]:
        z = value if share == 1 else share * value.detach()
        grads = torch.autograd.grad(value, leaves, divided(relevance, z, epsilon))
        return [leaf.detach() * grad for leaf, grad in zip(leaves, grads, strict=True)]

    return booked(step, value, inputs, spread)


def moving(step: Step) -> list[Tensor]:
    """The arguments that depend on the explained input by more than comparisons, lists of them opened."""
    found: list[Tensor] = []
    map_aggregate(step.args, lambda arg: found.append(arg) if isinstance(arg, Tensor) and arg.requires_grad else None)
    return found


def call(step: Step) -> Callable[..., Any]:
    """The op as a function of its moving arguments."""

    def op(*values: Tensor) -> Any:
        rest = iter(values)
        args: Any = map_aggregate(
            step.args, lambda arg: next(rest) if isinstance(arg, Tensor) and arg.requires_grad else arg
        )
        return step.run(*args)

    return op


def proportional(epsilon: float, share: int = 1) -> Rule:
    """The op's own fixed weights: sums, averages, residual additions, affine maps; with share 2, products."""
    return lambda step: in_proportion(step, call(step), moving(step), epsilon, share)


def routed(step: Step) -> Any:
    """Each element to where it was copied from; what constants fill is booked."""
    inputs = moving(step)
    leaves = [x.detach().requires_grad_(True) for x in inputs]
    with torch.enable_grad():
        value = call(step)(*leaves)
    return booked(step, value, inputs, lambda relevance: torch.autograd.grad(value, leaves, relevance))


def passed(step: Step) -> Any:
    """All to the one argument that moves, as it is."""
    (x,) = moving(step)
    return to(step, x)


def to(step: Step, x: Tensor) -> Any:
    """All to one argument, summed where it was expanded."""
    with torch.no_grad():
        value = step.run()
    return own(value, [x], lambda relevance: (unbroadcast(relevance, x.shape),))


def cut(step: Step) -> Any:
    """A value that is decided by comparing; whoever reads it treats it as a constant."""
    with torch.no_grad():
        return step.run()
