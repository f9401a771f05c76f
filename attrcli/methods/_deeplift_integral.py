"""DeepLIFT's way out where an op has no rule: the op's own derivative, averaged on the line between its arguments.

Complete up to quadrature. What is integrated is marked for each sample, with what the op's own sum misses.

Source: Sundararajan et al. 2017, arXiv 1703.01365, applied to one op between its arguments at baseline and input.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from attrcli.errors import InputError
from attrcli.graph.rules import Rule, Step, leads_with_batch, own, place_of
from attrcli.methods import _contributions as c
from attrcli.methods._contributions import Pair
from attrcli.methods._deeplift_step import pair, replaced, row, seen, tensors

Tensor = torch.Tensor

_NODES = (8, 16, 32, 64, 128, 256, 512)
"""Numbers of nodes tried in turn, until the op's own sum is right."""


def tolerance(dtype: torch.dtype) -> float:
    """What an op's own sum may miss, of the sum of absolute values."""
    return 1e-10 if dtype == torch.float64 else 1e-5


def noted(marks: Mapping[str, float]) -> str:
    """What a sample's note says of the nodes that were integrated, each with what its own sum misses."""
    told = [f"{name} ({missed:.0e} missed)" if missed > 1e-5 else name for name, missed in marks.items()]
    return f"integrated numerically: {', '.join(told)}" if told else ""


@cache
def _line(count: int, graded: bool) -> tuple[list[float], list[float]]:
    """Gauss-Legendre nodes and weights on [0, 1]; graded, crowded at both ends, where a divisor may nearly vanish."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    u, w = (nodes + 1) / 2, weights / 2
    if graded:  # t = u^4 (35 - 84 u + 70 u^2 - 20 u^3)
        w = w * 140 * u**3 * (1 - u) ** 3
        u = u**4 * (35 - 84 * u + 70 * u**2 - 20 * u**3)
    return u.tolist(), w.tolist()


def integrated(step: Step) -> Any:
    """Any op, by its derivative between its arguments at the baseline and at the input."""
    rows = step.remainder.rows if leads_with_batch(step.node) else 1
    step.remainder.mark(step.node, torch.zeros(rows, dtype=torch.float64))

    def settled(shares: _Shares) -> bool:
        return bool((shares.missed <= tolerance(shares.dtype)).all())

    def backward(along: "_Line", gradients: Sequence[Tensor]) -> list[Tensor]:
        best = along.shares(_NODES[0], gradients, rows)
        for count in _NODES[1:]:
            if settled(best):
                break
            best = best.or_else(along.shares(count, gradients, rows), tolerance(best.dtype))
        step.remainder.mark(step.node, best.missed)
        return best.values

    return _along(step, backward)


def polynomial(step: Step, degree: int) -> Any:
    """A polynomial of its arguments, of this degree: exact with half as many nodes; half and half for a product."""

    def backward(along: "_Line", gradients: Sequence[Tensor]) -> list[Tensor]:
        return along.shares(max(1, (degree + 1) // 2), gradients, 1, graded=False).values

    return _along(step, backward)


class _Shares:
    """Mean derivatives for each argument that moves, and what their sum misses of the change, row by row."""

    def __init__(self, values: list[Tensor], deltas: list[Tensor], change: Tensor, rows: int) -> None:
        self.values, self.dtype = values, values[0].dtype
        parts = [(value * delta).reshape(rows, -1).double() for value, delta in zip(values, deltas, strict=True)]
        size = torch.stack([part.abs().sum(1) for part in parts]).sum(0)
        gap = (torch.stack([part.sum(1) for part in parts]).sum(0) - change).abs()
        self.missed = torch.where(gap == 0, 0, gap / size.clamp_min(1e-300))

    def or_else(self, finer: "_Shares", enough: float) -> "_Shares":
        """These in the rows that miss no more than is `enough`, the finer ones in the others."""
        keep = self.missed <= enough
        self.values = [
            torch.where(keep.reshape(-1, *[1] * (old.dim() - 1)) if len(keep) > 1 else keep.all(), old, new)
            for old, new in zip(self.values, finer.values, strict=True)
        ]
        self.missed = torch.where(keep, self.missed, finer.missed)
        return self


class _Line:
    """An op between two sets of arguments; `pairs` are those that move, `outputs` which of them are real."""

    def __init__(self, step: Step, pairs: list[Pair], outputs: list[int], values: list[Tensor]) -> None:
        self.step, self.pairs, self.outputs, self.values = step, pairs, outputs, values

    def shares(self, count: int, gradients: Sequence[Tensor], rows: int, *, graded: bool = True) -> _Shares:
        """The mean of the derivative over the line, with this many nodes."""
        deltas = [each.delta for each in self.pairs]
        total = [torch.zeros_like(delta) for delta in deltas]
        for place, weight in zip(*_line(count, graded), strict=True):
            leaves = [
                (each.r + place * delta).requires_grad_(True) for each, delta in zip(self.pairs, deltas, strict=True)
            ]
            with torch.enable_grad():
                made = _listed(self.step.run(*replaced(self.step, leaves)))
                slopes = torch.autograd.grad([made[i] for i in self.outputs], leaves, gradients, allow_unused=True)
            for sum_, slope in zip(total, slopes, strict=True):
                if slope is not None:
                    sum_ += weight * slope
        there = _listed(self.step.reference)
        changes = [g * (self.values[i] - there[i]) for g, i in zip(gradients, self.outputs, strict=True)]
        change = torch.stack([each.reshape(rows, -1).sum(1, dtype=torch.float64) for each in changes]).sum(0)
        return _Shares(total, deltas, change, rows)


def _along(step: Step, backward: Any) -> Any:
    """The op's value, with a backward of the line: (line, gradients of its real outputs) -> one for each argument."""
    pairs = [seen(step, node, x, r) for node, x, r in tensors(step)]
    with torch.no_grad():
        result = step.run(*replaced(step, [each.x.detach() for each in pairs]))
    values = _listed(result)
    real = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.is_floating_point()]
    line = _Line(step, pairs, real, values)
    made = own(tuple(values[i] for i in real), [each.x for each in pairs], lambda *g: backward(line, g))
    for i, value in zip(real, made, strict=True):
        values[i] = value
    return values if isinstance(result, (list, tuple)) else values[0]


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


# -- divisors that nearly vanish -------------------------------------------------------------------------------------


def divided(step: Step) -> Tensor:
    """a / b; where b nearly vanishes at one end, the integral in closed form, whose terms grow as a logarithm does.

    On the line, a's share is da L, L = log(b / b0) / (b - b0), and b's is the rest of the change. Raises InputError
    where b changes its sign.
    """
    a, b = pair(step, 0), pair(step, 1)
    near = c.vanishing(b)
    if not bool(near.any()):
        return c.quotient(a, b, place_of(step.node))
    ax, bx = a.x.detach(), b.x.detach()
    value, there = ax / bx, a.r / b.r
    if bool((bx * b.r <= 0)[near].any()):
        raise InputError(
            f"{place_of(step.node)}: it divides by something that changes its sign, or is zero, between the baseline "
            "and the input; choose another --baseline"
        )
    near = near.expand_as(value)
    _mark_rows(step, near)

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        slope = (bx.abs().log() - b.r.abs().log()) / torch.where(near, bx - b.r, 1)
        rest = (value - there - (ax - a.r) * slope) / torch.where(near, bx - b.r, 1)
        first = torch.where(near, slope, (1 / bx + 1 / b.r) / 2)
        second = torch.where(near, rest, -(ax + a.r) / (2 * bx * b.r))
        return c.unbroadcast(g * first, ax.shape), c.unbroadcast(g * second, bx.shape)

    return own(value, [a.x, b.x], backward)  # type: ignore[no-any-return]


def _mark_rows(step: Step, where: Tensor) -> None:
    """Mark the rows in which something is true."""
    if not leads_with_batch(step.node):
        step.remainder.mark(step.node, torch.zeros(1, dtype=torch.float64))
        return
    found = where.reshape(len(where), -1).any(1)
    step.remainder.mark(step.node, torch.where(found, 0.0, float("nan")).double())


def guarded(rule: Rule, step: Step) -> Any:
    """A rule of one operand, that of a norm; integrated in the rows where it raises InputError."""
    try:
        return rule(step)
    except InputError:
        if not leads_with_batch(step.node):
            return integrated(step)
    return torch.cat([_row(rule, step, i) for i in range(step.remainder.rows)])


def _row(rule: Rule, step: Step, i: int) -> Tensor:
    alone = row(step, i)
    try:
        return rule(alone)  # type: ignore[no-any-return]
    except InputError:
        return integrated(alone)  # type: ignore[no-any-return]
