"""DeepLIFT's rules for maxima, minima and orders."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import Rule, Step, Verdict, own
from attrcli.methods import _contributions as c
from attrcli.methods._contributions import Pair
from attrcli.methods._deeplift_step import pair

Tensor = torch.Tensor
aten = torch.ops.aten
Found = Callable[[fx.Node, list[bool]], Rule | Verdict]

_POOLS = {
    aten.max_pool1d.default: (aten.max_pool1d_with_indices.default, 1, False),
    aten.max_pool2d.default: (aten.max_pool2d_with_indices.default, 2, False),
    aten.max_pool3d.default: (aten.max_pool3d_with_indices.default, 3, False),
    aten.max_pool1d_with_indices.default: (aten.max_pool1d_with_indices.default, 1, True),
    aten.max_pool2d_with_indices.default: (aten.max_pool2d_with_indices.default, 2, True),
    aten.max_pool3d_with_indices.default: (aten.max_pool3d_with_indices.default, 3, True),
    aten.adaptive_max_pool1d.default: (aten.adaptive_max_pool1d.default, 1, True),
    aten.adaptive_max_pool2d.default: (aten.adaptive_max_pool2d.default, 2, True),
    aten.adaptive_max_pool3d.default: (aten.adaptive_max_pool3d.default, 3, True),
}
"""Each max pool with the op that also tells the winners, its number of dimensions, and whether it returns both."""


def _pool(indexed: Any, dims: int, both: bool) -> Found:
    def rule(step: Step) -> Any:
        x = pair(step, 0)
        with torch.no_grad():
            value, at = indexed(x.x.detach(), *step.args[1:])
            there, at0 = indexed(x.r, *step.args[1:])
            at0 = _tied(_read(x, at, dims), value, there, at, at0)
        made = c.winner(x, value, there, _scattered(x.x.shape, dims), at, at0)
        return (made, at) if both else made

    return lambda node, depends: rule


def _tied(held: Tensor, value: Tensor, there: Tensor, at: Tensor, at0: Tensor) -> Tensor:
    """The winners at the baseline: where those at the input tie with them, these.

    A flat baseline ties everywhere, but for rounding: by less than a thousandth of the change. `held` is what the
    baseline is at the winners at the input.
    """
    return torch.where(there - held <= 1e-3 * (there - value), at, at0)


def _read(x: Pair, at: Tensor, dims: int) -> Tensor:
    """The baseline's values at flat places of the last `dims` dimensions."""
    lead = at.shape[:-dims]
    return x.r.flatten(-dims).expand(*lead, -1).gather(-1, at.reshape(*lead, -1)).reshape(at.shape)


def _scattered(shape: torch.Size, dims: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Adds up values at flat places of the last `dims` dimensions."""

    def spread(values: Tensor, at: Tensor) -> Tensor:
        lead = values.shape[:-dims]
        total = values.new_zeros(*lead, math.prod(shape[-dims:]))
        places = at.expand_as(values).reshape(*lead, -1)
        return total.scatter_add(-1, places, values.reshape(*lead, -1)).reshape(shape)

    return spread


def _maximum(x: Pair) -> Tensor:
    """Maximum over the last dimension."""
    value, at = x.x.detach().max(-1, keepdim=True)
    there, at0 = x.r.max(-1, keepdim=True)
    at0 = _tied(_read(x, at, 1), value, there, at, at0)
    return c.winner(x, value, there, _scattered(x.x.shape, 1), at, at0).squeeze(-1)


def over(dims: list[int], sign: int) -> Callable[[Pair], Tensor]:
    """Maximum (sign 1) or minimum (sign -1) over dimensions, which go."""

    def made(x: Pair) -> Tensor:
        kept = [dim for dim in range(x.x.dim()) if dim not in dims]

        def gathered(z: Tensor) -> Tensor:
            return sign * z.permute(*kept, *dims).flatten(len(kept))

        return sign * _maximum(x.linear(gathered))

    return made


def _reduction(sign: int, *, pairs: bool) -> Found:
    """amax and amin; max and min over one dimension (`pairs` with places) or over all."""

    def rule(step: Step) -> Any:
        x = pair(step, 0)
        given = step.args[1] if len(step.args) > 1 else []
        dims = [dim % x.x.dim() for dim in ([given] if isinstance(given, int) else given)] or list(range(x.x.dim()))
        made = over(dims, sign)(x)
        if len(step.args) > 2 and step.args[2]:
            made = made.reshape([1 if i in dims else size for i, size in enumerate(x.x.shape)])
        if not pairs:
            return made
        places = x.x.detach().argmax(dims[0], bool(step.args[2])) if sign > 0 else None
        return made, places if places is not None else x.x.detach().argmin(dims[0], bool(step.args[2]))

    return lambda node, depends: rule


def _ordered(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """topk and sort: each place is half what stood there at the input, half what did at the baseline.

    y - y0 = [(x - x0)[i] + (x - x0)[i0]] / 2 + [(x + x0)[i] - (x + x0)[i0]] / 2, of which the second is remainder.
    """

    def rule(step: Step) -> Any:
        x = pair(step, 0)
        with torch.no_grad():
            values, at = step.run(x.x.detach(), *step.args[1:])
            _, at0 = step.run(x.r, *step.args[1:])
        dim = _dimension(step) % values.dim()
        ordered: Any = step.node.args[0]

        def backward(g: Tensor) -> tuple[Tensor]:
            there = at0.expand_as(at)
            both = x.x.detach() + x.r
            step.remainder.add(ordered, g * (both.gather(dim, at) - both.gather(dim, there)) / 2)
            total = torch.zeros_like(both)
            return (total.scatter_add(dim, at, g / 2).scatter_add(dim, there, g / 2),)

        return own(values, [x.x], backward), at

    return rule


def _running(sign: int) -> Found:
    """cummax (sign 1) or cummin (sign -1): windows that begin at the first element."""

    def rule(step: Step) -> Any:
        x, dim = pair(step, 0), step.args[1]
        with torch.no_grad():
            (value, at), (there, at0) = (torch.cummax(sign * z, dim) for z in (x.x.detach(), x.r))
            at0 = _tied(sign * x.r.expand_as(x.x).gather(dim, at), value, there, at, at0)

        def spread(values: Tensor, places: Tensor) -> Tensor:
            return torch.zeros_like(values).scatter_add(dim, places.expand_as(values), values)

        return sign * c.winner(x.linear(lambda z: sign * z), value, there, spread, at, at0), at

    return lambda node, depends: rule


def _both(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """aminmax over one dimension, or over all."""

    def rule(step: Step) -> Any:
        x, dim, keep = pair(step, 0), step.kwargs.get("dim"), step.kwargs.get("keepdim", False)
        dims = list(range(x.x.dim())) if dim is None else [dim % x.x.dim()]
        made = [over(dims, sign)(x) for sign in (-1, 1)]
        kept = [1 if i in dims else size for i, size in enumerate(x.x.shape)]
        return [each.reshape(kept) for each in made] if keep else made

    return rule


def _statistic(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """median, kthvalue and mode over one dimension: one place of an order, as `_ordered` has it."""

    def rule(step: Step) -> Any:
        x, names = pair(step, 0), [item.name for item in node.target._schema.arguments]  # type: ignore[union-attr]
        dim, keep = (_given(step, names, name, default) for name, default in (("dim", -1), ("keepdim", False)))
        with torch.no_grad():
            value, at = step.run(x.x.detach(), *step.args[1:])
            _, at0 = step.run(x.r, *step.args[1:])
        ordered: Any = node.args[0]

        def backward(g: Tensor) -> tuple[Tensor]:
            g, here, there = (t if keep else t.unsqueeze(dim) for t in (g, at, at0.expand_as(at)))
            both = x.x.detach() + x.r
            step.remainder.add(ordered, g * (both.gather(dim, here) - both.gather(dim, there)) / 2)
            return (torch.zeros_like(both).scatter_add(dim, here, g / 2).scatter_add(dim, there, g / 2),)

        return own(value, [x.x], backward), at

    return rule


def _given(step: Step, names: list[str], name: str, default: Any) -> Any:
    place = names.index(name)
    return step.args[place] if place < len(step.args) else step.kwargs.get(name, default)


def _dimension(step: Step) -> int:
    """The dimension that topk or sort orders."""
    names = [argument.name for argument in step.node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index("dim")
    given = step.args[place] if place < len(step.args) else step.kwargs.get("dim", -1)
    return int(given)


WINDOWS: dict[Any, Found] = {op: _pool(*facts) for op, facts in _POOLS.items()} | {
    aten.amax.default: _reduction(1, pairs=False),
    aten.amin.default: _reduction(-1, pairs=False),
    aten.max.default: _reduction(1, pairs=False),
    aten.min.default: _reduction(-1, pairs=False),
    aten.max.dim: _reduction(1, pairs=True),
    aten.min.dim: _reduction(-1, pairs=True),
    aten.topk.default: _ordered,
    aten.sort.default: _ordered,
    aten.sort.stable: _ordered,
    aten.cummax.default: _running(1),
    aten.cummin.default: _running(-1),
    aten.aminmax.default: _both,
    aten.median.dim: _statistic,
    aten.nanmedian.dim: _statistic,
    aten.kthvalue.default: _statistic,
    aten.mode.default: _statistic,
}
