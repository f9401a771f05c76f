"""DeepLIFT's rules for norms of any axes and for distances: taken apart into differences, squares, sums and a root."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import REFUSE, Rule, Step, Verdict
from attrcli.methods import _contributions as c
from attrcli.methods._contributions import Pair
from attrcli.methods._deeplift_step import pair
from attrcli.methods._deeplift_windows import over

Tensor = torch.Tensor
aten = torch.ops.aten
Found = Callable[[fx.Node, list[bool]], Rule | Verdict]

ORDERS = (1, 2, math.inf, -math.inf)


def norm(x: Pair, order: float, dims: Sequence[int], *, keepdim: bool = False) -> Tensor:
    """Sum of absolute values, root of the sum of squares, or the largest or smallest of the absolute values."""
    dims = sorted(dim % x.x.dim() for dim in dims)
    if order == 2:
        squares = c.mean_square(x, dims, 1)
        made = c.rescale(squares, c.CLOSED[aten.sqrt.default], squares.x.detach().sqrt())
        return made if keepdim else made.squeeze(dims)
    sizes = Pair(c.kinked(x, torch.abs, x.x.detach().abs(), x.r.abs()), x.r.abs())
    if order == 1:
        return sizes.x.sum(dims, keepdim)
    made = over(dims, 1 if order > 0 else -1)(sizes)
    return made.reshape([1 if i in dims else n for i, n in enumerate(x.x.shape)]) if keepdim else made


def _vector_norm(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """A norm over some dimensions, or over all."""

    def rule(step: Step) -> Any:
        x, given = pair(step, 0), step.argument("dim", None)
        dims = [given] if isinstance(given, int) else given or range(x.x.dim())
        return norm(x, order, dims, keepdim=bool(step.argument("keepdim", False)))

    order: Any = node.args[1] if len(node.args) > 1 else 2
    matrix = node.target is aten.linalg_norm.default and order is not None  # of a matrix, but for one dimension
    order = 2 if order is None else order
    dims = node.args[2] if len(node.args) > 2 else None
    one = isinstance(dims, (list, tuple)) and len(dims) == 1
    return rule if order in ORDERS and (one or not matrix) else REFUSE


def _frobenius(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    def rule(step: Step) -> Any:
        dims = list(step.argument("dim", (-2, -1)))
        return norm(pair(step, 0), 2, dims, keepdim=bool(step.argument("keepdim", False)))

    order: Any = node.args[1] if len(node.args) > 1 else "fro"
    return rule if order == "fro" else REFUSE


def _pairwise(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """Norm over the last dimension of a - b + eps."""

    def rule(step: Step) -> Any:
        a, b, eps = pair(step, 0), pair(step, 1), step.argument("eps", 1e-6)
        between = Pair(a.x - b.x + eps, a.r - b.r + eps)
        return norm(between, order, [-1], keepdim=bool(step.argument("keepdim", False)))

    order: Any = node.args[2] if len(node.args) > 2 else 2
    return rule if order in ORDERS else REFUSE


def _cdist(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """Norms of the differences of each row of one and each of the other."""

    def rule(step: Step) -> Any:
        a, b = pair(step, 0), pair(step, 1)
        between = Pair(*(one.unsqueeze(-2) - two.unsqueeze(-3) for one, two in ((a.x, b.x), (a.r, b.r))))
        return norm(between, order, [-1])

    order: Any = node.args[2] if len(node.args) > 2 else 2
    return rule if order in ORDERS else REFUSE


DISTANCES: dict[Any, Found] = {
    aten.linalg_vector_norm.default: _vector_norm,
    aten.linalg_norm.default: _vector_norm,
    aten.linalg_matrix_norm.str_ord: _frobenius,
    aten.linalg_norm.ord_str: _frobenius,
    aten.pairwise_distance.default: _pairwise,
    aten.cdist.default: _cdist,
}
