"""DeepLIFT's rules: each op's multipliers between the input and the baseline, such that they sum to its delta.

A `Pair` is a tensor that depends on the explained input, with what it is at the baseline. Rules for single ops are
primitives over pairs, each with a backward of its own; ops that are several in one (a softmax, a layer norm, an
attention) are written in primitives. References may have one row for all.

Source: Shrikumar et al. 2017, arXiv 1704.02685 (Rescale), for unary ops; the two-player Shapley value of section 3.5.3
for ops of two operands, as Lundberg and Lee 2017 do it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attrcli.errors import InputError
from attrcli.graph.rules import own

Tensor = torch.Tensor
aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """A tensor at the input (in autograd) and at the baseline."""

    x: Tensor
    r: Tensor

    @property
    def delta(self) -> Tensor:
        """Difference of the two, detached."""
        return self.x.detach() - self.r

    def linear(self, op: Callable[[Tensor], Tensor]) -> "Pair":
        """A linear or affine op on it: autograd passes multipliers on as it passes gradients."""
        with torch.no_grad():
            there = op(self.r)
        return Pair(op(self.x), there)


def safe_quotient(change: Tensor, delta: Tensor, otherwise: Tensor) -> Tensor:
    """change / delta, and `otherwise` where delta is zero."""
    zero = delta == 0
    return torch.where(zero, otherwise, change / torch.where(zero, 1, delta))


def near_zero(dtype: torch.dtype) -> float:
    """How small a divisor at the baseline may be, of the one at the input: below, terms cancel to nothing left."""
    return float(torch.finfo(dtype).eps ** 0.4)


def unbroadcast(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Sum over the dimensions that an operand of this shape was expanded along."""
    if gradient.shape == shape:
        return gradient
    return gradient.sum_to_size(shape)


# -- one operand -----------------------------------------------------------------------------------------------------


def rescale(pair: Pair, multiplier: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """y = f(z) with a closed form of (f(z) - f(z0)) / (z - z0); computed when it is needed."""
    z, z0 = pair.x.detach(), pair.r
    return own(y.detach(), [pair.x], lambda g: (g * multiplier(z, z0),))  # type: ignore[no-any-return]


def _expm1_over(d: Tensor) -> Tensor:
    """expm1(d) / d, and 1 at 0."""
    return safe_quotient(torch.expm1(d), d, torch.ones_like(d))


def _log1p_over(u: Tensor) -> Tensor:
    """log1p(u) / u, and 1 at 0."""
    return safe_quotient(torch.log1p(u), u, torch.ones_like(u))


def _sigmoid(z: Tensor, z0: Tensor) -> Tensor:
    # s(z) - s(z0) = expm1(z - z0) s(z0) (1 - s(z)), for the larger of the two as z0 lest expm1 overflow
    low, high = torch.minimum(z, z0), torch.maximum(z, z0)
    return -torch.expm1(low - high) * safe_quotient(
        torch.sigmoid(high) * torch.sigmoid(-low), high - low, torch.zeros_like(z)
    ) + torch.where(z == z0, torch.sigmoid(z) * torch.sigmoid(-z), 0)


CLOSED: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.exp.default: lambda z, z0: torch.exp(torch.maximum(z, z0)) * _expm1_over(-(z - z0).abs()),
    aten.expm1.default: lambda z, z0: torch.exp(torch.maximum(z, z0)) * _expm1_over(-(z - z0).abs()),
    aten.log.default: lambda z, z0: _log1p_over((z - z0) / z0) / z0,
    aten.log1p.default: lambda z, z0: _log1p_over((z - z0) / (1 + z0)) / (1 + z0),
    aten.sqrt.default: lambda z, z0: safe_quotient(torch.ones_like(z), z.sqrt() + z0.sqrt(), torch.zeros_like(z)),
    aten.rsqrt.default: lambda z, z0: -1 / (z.sqrt() * z0.sqrt() * (z.sqrt() + z0.sqrt())),
    aten.reciprocal.default: lambda z, z0: -1 / (z * z0),
    aten.square.default: lambda z, z0: z + z0,
    aten.logit.default: lambda z, z0: _log1p_over((z - z0) / z0) / z0 + _log1p_over((z0 - z) / (1 - z0)) / (1 - z0),
    aten.sigmoid.default: _sigmoid,
    aten.tanh.default: lambda z, z0: 4 * _sigmoid(2 * z, 2 * z0),
}
"""(f(z) - f(z0)) / (z - z0) without a cancelling difference."""


def smooth(pair: Pair, f: Callable[[Tensor], Tensor], y: Tensor, y0: Tensor) -> Tensor:
    """Any differentiable f: the quotient, and the derivative half way where the two are too close for one."""

    def backward(g: Tensor) -> tuple[Tensor]:
        d = z - z0
        close = d.abs() < (1e-6 if z.dtype == torch.float64 else 1e-3)
        middle = ((z + z0) / 2).requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(f(middle).sum(), middle)
        return (g * torch.where(close, slope, (value - y0) / torch.where(close, 1, d)),)

    z, z0, value = pair.x.detach(), pair.r, y.detach()
    return own(value, [pair.x], backward)  # type: ignore[no-any-return]


def kinked(pair: Pair, f: Callable[[Tensor], Tensor], y: Tensor, y0: Tensor) -> Tensor:
    """Piecewise linear f: the quotient, exact in floating point; the derivative only where nothing differs."""

    def backward(g: Tensor) -> tuple[Tensor]:
        d = z - z0
        same = d == 0
        quotient = (value - y0) / torch.where(same, 1, d)
        if bool(same.any()):
            leaf = z.requires_grad_(True)
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(f(leaf).sum(), leaf)
            quotient = torch.where(same, slope, quotient)
        return (g * quotient,)

    z, z0, value = pair.x.detach(), pair.r, y.detach()
    return own(value, [pair.x], backward)  # type: ignore[no-any-return]


def relu(pair: Pair) -> Tensor:
    """Rescale for ReLU, sample by sample into a buffer that stays in the cache; half where nothing differs at a kink.

    (relu(z) - relu(z0)) / (z - z0) is exact but for 0/0, where the derivative is taken: 1 above zero, else 0.
    """

    def backward(g: Tensor) -> tuple[Tensor]:
        out = torch.empty_like(z)
        low = z0.clamp_min(0)
        for i in range(len(z)):
            j = i if len(z0) > 1 else 0
            value = torch.clamp_min(z[i], 0, out=out[i])
            value.sub_(low[j]).div_(z[i] - z0[j])
            if bool((same := value.isnan()).any()):
                value[same] = (z[i][same] > 0).to(value.dtype)
            value.mul_(g[i])
        return (out,)

    z, z0 = pair.x.detach(), pair.r
    if not z.dim() or len(z0) not in (1, len(z)):
        return kinked(pair, torch.relu, z.relu(), z0.relu())
    return own(z.clamp_min(0), [pair.x], backward)  # type: ignore[no-any-return]


# -- two operands ----------------------------------------------------------------------------------------------------


def product(a: Pair, b: Pair) -> Tensor:
    """a b: a b - a0 b0 = da (b + b0)/2 + db (a + a0)/2."""

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        half = g / 2
        return unbroadcast(half * (bx + b.r), ax.shape), unbroadcast(half * (ax + a.r), bx.shape)

    ax, bx = a.x.detach(), b.x.detach()
    return own(ax * bx, [a.x, b.x], backward)  # type: ignore[no-any-return]


def bilinear(op: Callable[[Tensor, Tensor], Tensor], a: Pair, b: Pair) -> Tensor:
    """Any op that is linear in each of two operands: the product's rule, by the op's own derivatives."""

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        leaves = [((pair.x.detach() + pair.r) / 2).requires_grad_(True) for pair in (a, b)]
        with torch.enable_grad():
            grads = torch.autograd.grad(op(*leaves), leaves, g)
        return grads[0], grads[1]

    return own(op(a.x.detach(), b.x.detach()), [a.x, b.x], backward)  # type: ignore[no-any-return]


def matmul(a: Pair, b: Pair) -> Pair:
    """a @ b, by the product's rule."""

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        half = g / 2
        return (
            unbroadcast(half @ (bx + b.r).transpose(-1, -2), ax.shape),
            unbroadcast((ax + a.r).transpose(-1, -2) @ half, bx.shape),
        )

    ax, bx = a.x.detach(), b.x.detach()
    return Pair(own(ax @ bx, [a.x, b.x], backward), a.r @ b.r)


def shapley(h: Callable[[Tensor, Tensor], Tensor], a: Pair, b: Pair, node: str) -> Tensor:
    """An elementwise h(a, b): each operand's change averaged over the other at its two values.

    phi_a = [h(a,b) - h(a0,b) + h(a,b0) - h(a0,b0)] / 2. Raises InputError where one of the four is not finite.
    """

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        both, first, second, none = h(ax, bx), h(ax, b.r), h(a.r, bx), h(a.r, b.r)
        if not bool(torch.isfinite(first + second).all()):
            raise InputError(f"{node}: not finite between the input and the baseline; choose another --baseline")
        one = (both - second + first - none) / 2
        two = (both - first + second - none) / 2
        da, db = a.delta.expand_as(both), b.delta.expand_as(both)
        slopes = _slopes(h, a, b) if bool((da == 0).any() | (db == 0).any()) else [torch.zeros_like(one)] * 2
        return (
            unbroadcast(g * safe_quotient(one, da, slopes[0]), ax.shape),
            unbroadcast(g * safe_quotient(two, db, slopes[1]), bx.shape),
        )

    ax, bx = a.x.detach(), b.x.detach()
    return own(h(ax, bx), [a.x, b.x], backward)  # type: ignore[no-any-return]


def _slopes(h: Callable[[Tensor, Tensor], Tensor], a: Pair, b: Pair) -> list[Tensor]:
    """The derivative in each operand, averaged over the other at its two values."""
    shape = (a.x + b.x).shape
    ends = [[end.detach().expand(shape).clone() for end in (pair.x, pair.r)] for pair in (a, b)]
    first, second = (each[0].requires_grad_(True) for each in ends)
    with torch.enable_grad():
        one = torch.autograd.grad((h(first, second.detach()) + h(first, ends[1][1])).sum(), first)[0]
        two = torch.autograd.grad((h(first.detach(), second) + h(ends[0][1], second)).sum(), second)[0]
    return [one / 2, two / 2]


def quotient(a: Pair, b: Pair, node: str) -> Tensor:
    """a / b as `shapley` has it, in closed form. Raises InputError for a divisor near zero at the baseline."""

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        require_divisor(b, node)
        mean = (1 / bx + 1 / b.r) / 2
        return (
            unbroadcast(g * mean, ax.shape),
            unbroadcast(-g * (ax + a.r) / (2 * bx * b.r), bx.shape),
        )

    ax, bx = a.x.detach(), b.x.detach()
    return own(ax / bx, [a.x, b.x], backward)  # type: ignore[no-any-return]


def require_divisor(b: Pair, node: str) -> None:
    """Raise InputError, naming the node, where a divisor is near zero at the baseline or at the input."""
    if bool(vanishing(b).any()):
        raise InputError(
            f"{node}: it divides by something that nearly vanishes at the baseline, so that contributions of opposite "
            "sign cancel to noise; choose another --baseline, or -o fallback=integrate"
        )


def vanishing(b: Pair) -> Tensor:
    """Where a divisor is near zero at the baseline, or at the input, beside what it is at the other."""
    x, r = b.x.detach().abs(), b.r.abs()
    return torch.minimum(x, r) < near_zero(x.dtype) * torch.maximum(x, r)


# -- the winner of a window ------------------------------------------------------------------------------------------


def winner(pair: Pair, y: Tensor, y0: Tensor, spread: Callable[[Tensor, Tensor], Tensor], at: Any, at0: Any) -> Tensor:
    """A maximum over windows: what was won goes to the two winners, as far as each is above the other.

    With M = max(y, y0), the winner at the input is given m (M - y0), that at the baseline m (y - M), summed where
    windows overlap and divided by the difference there; m itself where one and the same did not change.
    `spread(g, at)` adds up values at the places of winners.
    """

    def backward(g: Tensor) -> tuple[Tensor]:
        top, delta = torch.maximum(value, y0), pair.delta
        total = spread(g * (top - y0), at) + spread(g * (value - top), at0)
        otherwise = torch.zeros_like(total)
        if bool((delta == 0).any()):
            otherwise = spread(torch.where(at == at0, g, 0), at)
        return (safe_quotient(total, delta, otherwise),)

    value = y.detach()
    return own(value, [pair.x], backward)  # type: ignore[no-any-return]


# -- several ops in one ----------------------------------------------------------------------------------------------


def logsumexp(pair: Pair, dims: list[int], *, keepdim: bool = True) -> Pair:
    """log sum exp: each element by the change of its exponential, of the change of the sum's logarithm."""

    def backward(g: Tensor) -> tuple[Tensor]:
        shift = torch.maximum(z.amax(dims, True), z0.amax(dims, True))
        low, high = torch.minimum(z, z0) - shift, torch.maximum(z, z0) - shift
        slope = torch.where(high == -math.inf, 0, high.exp() * _expm1_over(torch.nan_to_num(low - high, nan=0.0)))
        total, total0 = (z - shift).exp().sum(dims, True), (z0 - shift).exp().sum(dims, True)
        change, rise = value - there, total - total0
        near = rise.abs() < 0.5 * torch.minimum(total, total0)
        ratio = torch.where(near, _log1p_over(rise / total0) / total0, change / torch.where(near, 1, rise))
        grown = g if keepdim else _unsqueezed(g, dims, z.dim())
        return (unbroadcast(grown * ratio * slope, z.shape),)

    z, z0 = pair.x.detach(), pair.r
    value, there = torch.logsumexp(z, dims, True), torch.logsumexp(z0, dims, True)
    shown, shown0 = (value, there) if keepdim else (torch.logsumexp(z, dims), torch.logsumexp(z0, dims))
    return Pair(own(shown, [pair.x], backward), shown0)


def _unsqueezed(tensor: Tensor, dims: list[int], rank: int) -> Tensor:
    for dim in sorted(dim % rank for dim in dims):
        tensor = tensor.unsqueeze(dim)
    return tensor


def log_softmax(pair: Pair, dim: int) -> Pair:
    """z - log sum exp z."""
    norm = logsumexp(pair, [dim])
    return Pair(pair.x - norm.x, pair.r - norm.r)


def softmax(pair: Pair, dim: int) -> Pair:
    """exp(log softmax): in log space no sum underflows, however far apart the two are."""
    logs = log_softmax(_masked(pair, dim), dim)
    y = logs.x.detach().exp()
    return Pair(rescale(logs, CLOSED[aten.exp.default], y), logs.r.exp())


def _masked(pair: Pair, dim: int) -> Pair:
    """Minus infinity, which masks write, as a number far enough below the largest that its exponential is zero."""
    if not bool(torch.isinf(pair.r).any() | torch.isinf(pair.x.detach()).any()):
        return pair
    floor = torch.maximum(pair.x.detach().amax(dim, True), pair.r.amax(dim, True)) - 1e5
    return Pair(torch.maximum(pair.x, floor), torch.maximum(pair.r, floor))


def centred(pair: Pair, dims: list[int]) -> Pair:
    """Less the mean over dimensions."""
    return pair.linear(lambda z: z - z.mean(dims, True))


def mean_square(pair: Pair, dims: list[int], divisor: int) -> Pair:
    """Sum of squares over dimensions, divided."""
    y = rescale(pair, CLOSED[aten.square.default], pair.x.detach().square())
    return Pair(y, pair.r.square()).linear(lambda z: z.sum(dims, True) / divisor)


def normalised(pair: Pair, dims: list[int], eps: float, node: str, *, centre: bool = True) -> Pair:
    """(z - mean) / sqrt(var + eps) over dimensions, without the mean where not `centre`d: the core of every norm.

    Raises InputError where the spread nearly vanishes at the baseline.
    """
    z = centred(pair, dims) if centre else pair
    count = math.prod(pair.x.shape[dim] for dim in dims)
    spread = mean_square(z, dims, count).linear(lambda v: v + eps)
    require_divisor(Pair(spread.x.sqrt(), spread.r.sqrt()), node)
    inverse = Pair(rescale(spread, CLOSED[aten.rsqrt.default], spread.x.detach().rsqrt()), spread.r.rsqrt())
    return Pair(product(z, inverse), z.r * inverse.r)
