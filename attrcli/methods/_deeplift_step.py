"""What DeepLIFT's rules read of a step: an argument with its reference, and what autograd cannot see cut off."""

from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import Step, own
from attrcli.methods._contributions import Pair

Tensor = torch.Tensor


def pair(step: Step, place: int) -> Pair:
    """An argument with its reference; one that autograd cannot see through is cut off."""
    x, r = step.args[place], step.reference_args[place]
    if not isinstance(x, Tensor):
        like = next(arg for arg in step.args if isinstance(arg, Tensor))
        x = r = torch.as_tensor(x, dtype=like.dtype, device=like.device)
    return seen(step, step.node.args[place], x, r)


def seen(step: Step, node: Any, x: Tensor, r: Tensor) -> Pair:
    """The value of a node with its reference, cut off where autograd cannot see through it."""
    if isinstance(node, fx.Node) and node in step.varying and not x.requires_grad:
        kind = step.explained.dtype
        x, r = cut(step, node, x.to(kind), r.to(kind)), r.to(kind)
    return Pair(x, r)


def cut(step: Step, node: fx.Node, value: Tensor, there: Tensor) -> Tensor:
    """A value that depends on the input by comparisons alone: what it contributes is booked as remainder."""

    def backward(g: Tensor) -> tuple[Tensor]:
        step.remainder.add(node, g * (held - there))
        return (torch.zeros_like(step.explained),)

    held = value.detach()
    return own(held, [step.explained], backward)  # type: ignore[no-any-return]
