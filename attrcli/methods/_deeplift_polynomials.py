"""DeepLIFT's rules for ops that are polynomials of what they are given: averaged on the line, which is exact.

A product of two operands takes one node: the half and half of every other product here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import PLAIN, REFUSE, Rule, Step, Verdict
from attrcli.methods._deeplift_integral import polynomial
from attrcli.methods._deeplift_step import tensors

aten = torch.ops.aten
Found = Callable[[fx.Node, list[bool]], Rule | Verdict]

MOST = 256
"""Factors of a product; beyond, it is no op that one explains."""


def _factors(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """prod, cumprod, det: as many factors as the shape says."""

    def rule(step: Step) -> Any:
        ((_, x, _),) = tensors(step)
        return polynomial(step, x.shape[-1] if node.target is aten.linalg_det.default else x.shape[step.args[1]])

    _, x = node.args[0].meta["shapes"]  # type: ignore[union-attr]
    dim: Any = node.args[1] if len(node.args) > 1 else -1
    return rule if x[dim] <= MOST else REFUSE


def _operands(most: int) -> Found:
    """Linear in each operand: plain where one moves, else as many factors as move."""

    def found(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
        return PLAIN if sum(depends) < 2 else partial(polynomial, degree=most)

    return found


def _power(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    power: Any = node.args[1]
    return partial(polynomial, degree=power) if isinstance(power, int) and 0 < power <= MOST else REFUSE


def _listed(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """einsum and multi_dot, whose operands are a list."""

    def rule(step: Step) -> Any:
        count = len(tensors(step))
        return step.run() if count < 2 else polynomial(step, count)

    return rule


POLYNOMIALS: dict[Any, Found] = {
    aten.prod.dim_int: _factors,
    aten.cumprod.default: _factors,
    aten.linalg_det.default: _factors,
    aten.linalg_matrix_power.default: _power,
    aten.linalg_multi_dot.default: _listed,
    aten.einsum.default: _listed,
    aten.bilinear.default: _operands(3),
} | {
    op: _operands(2)
    for op in (
        aten.addbmm.default,
        aten.addmv.default,
        aten.addr.default,
        aten.linalg_cross.default,
        aten.tensordot.default,
        aten.inner.default,
        aten.kron.default,
    )
}
