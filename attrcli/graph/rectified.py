"""What is a ReLU, told by what a node computes and not by its name; and which activations a graph holds.

`slope(x, ...)` of an activation is its derivative, 0 at a ReLU's kink. What is written in several nodes is recognised
where its last node is: max(x, 0), where(x > 0, x, 0), x * (x > 0).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attrcli.graph.check import attribute

Tensor = torch.Tensor
aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An activation: the place among the node's arguments of what it is applied to, and its derivative there."""

    place: int
    slope: Callable[[Tensor], Tensor]


def rectifier(node: fx.Node, varying: Collection[fx.Node]) -> Activation | None:
    """A node that is a ReLU, a ReLU with a ceiling, or a leaky one of slopes that are not negative; else None."""
    find = _RECTIFIERS.get(node.target)
    found = find(node) if find is not None else None
    return found if found is not None and node.args[found.place] in varying else None


_PROBE = torch.tensor([-1e3, -1.0, 0.0, 0.25, 5.0, 7.0, 1e3])


def relu(node: fx.Node, varying: Collection[fx.Node]) -> int | None:
    """The place among its arguments of what a plain ReLU, however it is written, is applied to; None for all else."""
    found = rectifier(node, varying)
    if found is None or node.target is aten.prelu.default:  # whose slopes are a channel's
        return None
    return found.place if torch.equal(found.slope(_PROBE), (_PROBE > 0).to(_PROBE.dtype)) else None


def activation(node: fx.Node, varying: Collection[fx.Node]) -> Activation | None:
    """Any elementwise activation of one operand, those of `rectifier` included; else None."""
    found = rectifier(node, varying)
    if found is not None or node.target not in ACTIVATIONS or node.args[0] not in varying:
        return found
    if any(arg in varying for arg in node.args[1:] if isinstance(arg, fx.Node)):
        return None
    return Activation(0, _derivative(node))


def _derivative(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The derivative of an op by autograd."""
    target: Any = node.target
    args = [constant(arg) if isinstance(arg, fx.Node) else arg for arg in node.args[1:]]

    def slope(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            (found,) = torch.autograd.grad(target(leaf, *args, **node.kwargs).sum(), leaf)
        return found

    return slope


ACTIVATIONS = frozenset(
    (
        aten.relu.default,
        aten.leaky_relu.default,
        aten.prelu.default,
        aten.hardtanh.default,
        aten.hardswish.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.threshold.default,
        aten.softshrink.default,
        aten.hardshrink.default,
        aten.sigmoid.default,
        aten.log_sigmoid.default,
        aten.tanh.default,
        aten.gelu.default,
        aten.silu.default,
        aten.mish.default,
        aten.softplus.default,
        aten.elu.default,
        aten.selu.default,
        aten.celu.default,
    )
)
"""What networks put between their layers, each in one node."""


# -- the rectifiers --------------------------------------------------------------------------------------------------


def _above(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _relu(node: fx.Node) -> Activation:
    return Activation(0, _above)


def _between(low: Any, high: Any) -> Activation | None:
    """x held between 0 and something positive, or nothing."""
    if low is None or not _is(low, 0):
        return None
    top = math.inf if high is None else _number(high)
    if top is None or top <= 0:
        return None
    return Activation(0, lambda x: ((x > 0) & (x < top)).to(x.dtype))


def _clamp(node: fx.Node) -> Activation | None:
    low, high = [*node.args[1:], None, None][:2]
    return _between(low, high)


def _threshold(node: fx.Node) -> Activation | None:
    return Activation(0, _above) if _is(node.args[1], 0) and _is(node.args[2], 0) else None


def _maximum(node: fx.Node) -> Activation | None:
    place = next((i for i in (0, 1) if _is(node.args[1 - i], 0)), None)
    return None if place is None else Activation(place, _above)


def _leaky(node: fx.Node) -> Activation | None:
    leak = _number(node.args[1] if len(node.args) > 1 else 0.01)
    if leak is None or leak < 0:
        return None
    return Activation(0, lambda x: torch.where(x > 0, torch.ones_like(x), torch.full_like(x, leak)))


def _prelu(node: fx.Node) -> Activation | None:
    weight = constant(node.args[1])
    if weight is None or bool((weight < 0).any()):
        return None

    def slope(x: Tensor) -> Tensor:
        leak = weight.reshape(1, -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else weight
        return torch.where(x > 0, torch.ones_like(x), leak.to(x))

    return Activation(0, slope)


def _where(node: fx.Node) -> Activation | None:
    """where(x > 0, x, 0), or where(x < 0, 0, x)."""
    condition, *choices = node.args
    for place, signs in ((0, _POSITIVE), (1, _NEGATIVE)):
        if _compares(condition, choices[place], signs) and _is(choices[1 - place], 0):
            return Activation(1 + place, _above)
    return None


def _masked(node: fx.Node) -> Activation | None:
    """masked_fill(x, x < 0, 0)."""
    found = _compares(node.args[1], node.args[0], _NEGATIVE) and _is(node.args[2], 0)
    return Activation(0, _above) if found else None


def _product(node: fx.Node) -> Activation | None:
    """x * (x > 0)."""
    for place in (0, 1):
        other: Any = node.args[1 - place]
        if isinstance(other, fx.Node) and other.target is aten.to.dtype:
            other = other.args[0]
        if _compares(other, node.args[place], _POSITIVE):
            return Activation(place, _above)
    return None


_POSITIVE = frozenset((aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor))
_NEGATIVE = frozenset((aten.lt.Scalar, aten.lt.Tensor, aten.le.Scalar, aten.le.Tensor))


def _compares(condition: Any, x: Any, signs: Collection[Any]) -> bool:
    """Whether a node is the comparison of x with 0 in one of some ways."""
    if not isinstance(condition, fx.Node) or condition.target not in signs:
        return False
    return condition.args[0] is x and _is(condition.args[1], 0)


_RECTIFIERS: dict[Any, Callable[[fx.Node], Activation | None]] = {
    aten.relu.default: _relu,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_min.Tensor: _clamp,
    aten.hardtanh.default: _clamp,
    aten.threshold.default: _threshold,
    aten.maximum.default: _maximum,
    aten.fmax.default: _maximum,
    aten.leaky_relu.default: _leaky,
    aten.prelu.default: _prelu,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked,
    aten.masked_fill.Tensor: _masked,
    aten.mul.Tensor: _product,
}


# -- constants -------------------------------------------------------------------------------------------------------

_ZEROS = frozenset((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default))
_FULL = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0}
_THROUGH = frozenset((aten.expand.default, aten.reshape.default, aten.to.dtype, aten.unsqueeze.default))


def constant(value: Any) -> Tensor | None:
    """The tensor that a node stores; None for what is computed, or is no node."""
    if not isinstance(value, fx.Node) or value.op != "get_attr" or value.graph.owning_module is None:
        return None
    return attribute(value.graph.owning_module, str(value.target))


def _number(value: Any) -> float | None:
    """The one number that an argument is everywhere; None where it is not known to be one."""
    while isinstance(value, fx.Node) and value.target in _THROUGH:
        value = value.args[0]
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node) and value.target in _ZEROS:
        return 0.0
    if isinstance(value, fx.Node) and value.target in _FULL:
        return _number(value.args[_FULL[value.target]])
    held = constant(value)
    if held is None or not held.numel() or held.dtype == torch.bool:
        return None
    first = held.reshape(-1)[0]
    return float(first) if bool((held == first).all()) else None


def _is(value: Any, number: float) -> bool:
    return _number(value) == number
