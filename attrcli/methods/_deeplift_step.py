"""What DeepLIFT's rules read of a step: an argument with its reference, and what autograd cannot see cut off."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
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


def tensors(step: Step) -> list[tuple[fx.Node, Tensor, Tensor]]:
    """The arguments that move and have fractions, in lists too: node, value and reference."""

    def walk(node: Any, x: Any, r: Any) -> Iterator[tuple[fx.Node, Tensor, Tensor]]:
        if isinstance(node, (list, tuple)):
            for each in zip(node, x, r, strict=True):
                yield from walk(*each)
        elif isinstance(node, fx.Node) and node in step.varying and isinstance(x, Tensor) and x.is_floating_point():
            yield node, x, r

    return list(walk(step.node.args, step.args, step.reference_args))


def replaced(step: Step, values: Sequence[Tensor]) -> Any:
    """The arguments of a step with these in place of its `tensors`."""
    left = iter(values)

    def walk(node: Any, x: Any) -> Any:
        if isinstance(node, (list, tuple)):
            return [walk(*each) for each in zip(node, x, strict=True)]
        moves = isinstance(node, fx.Node) and node in step.varying
        return next(left) if moves and isinstance(x, Tensor) and x.is_floating_point() else x

    return walk(step.node.args, step.args)


def row(step: Step, i: int) -> Step:
    """One row of a step, whose arguments that move lead with the batch."""

    def alone(r: Any) -> Any:
        return r[i : i + 1] if len(r) > 1 else r

    args = replaced(step, [x[i : i + 1] for _, x, _ in tensors(step)])
    there = replaced(replace(step, args=step.reference_args), [alone(r) for _, _, r in tensors(step)])
    told = {"args": tuple(args), "reference_args": tuple(there), "reference": alone(step.reference)}
    return replace(step, **told, remainder=step.remainder.row(i))


def cut(step: Step, node: fx.Node, value: Tensor, there: Tensor) -> Tensor:
    """A value that depends on the input by comparisons alone: what it contributes is booked as remainder."""

    def backward(g: Tensor) -> tuple[Tensor]:
        step.remainder.add(node, g * (held - there))
        return (torch.zeros_like(step.explained),)

    held = value.detach()
    return own(held, [step.explained], backward)  # type: ignore[no-any-return]
