"""Ops that work element by element: arithmetic, comparisons, logic, activations, casts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attrcli.formats.onnx_ops.base import Node, Op, Operand, Result, Table, aten, constant, dtype_of, tensor
from attrcli.graph.build import Builder, Value

UNARY = {
    "Abs": aten.abs, "Acos": aten.acos, "Acosh": aten.acosh, "Asin": aten.asin, "Asinh": aten.asinh, "Atan": aten.atan,
    "Atanh": aten.atanh, "BitwiseNot": aten.bitwise_not, "Ceil": aten.ceil, "Cos": aten.cos, "Cosh": aten.cosh,
    "Erf": aten.erf, "Exp": aten.exp, "Floor": aten.floor, "HardSwish": aten.hardswish, "IsNaN": aten.isnan,
    "Log": aten.log, "Mish": aten.mish, "Neg": aten.neg, "Not": aten.logical_not, "Reciprocal": aten.reciprocal,
    "Relu": aten.relu, "Round": aten.round, "Sigmoid": aten.sigmoid, "Sign": aten.sign, "Sin": aten.sin,
    "Sinh": aten.sinh, "Softplus": aten.softplus, "Sqrt": aten.sqrt, "Tan": aten.tan, "Tanh": aten.tanh,
}  # fmt: skip
"""Ops of one input and no attributes that ATen has under the same meaning."""

BINARY = {
    "Add": aten.add.Tensor, "And": aten.logical_and.default, "BitwiseAnd": aten.bitwise_and.Tensor,
    "BitwiseOr": aten.bitwise_or.Tensor, "BitwiseXor": aten.bitwise_xor.Tensor, "Equal": aten.eq.Tensor,
    "Greater": aten.gt.Tensor, "GreaterOrEqual": aten.ge.Tensor, "Less": aten.lt.Tensor,
    "LessOrEqual": aten.le.Tensor, "Mul": aten.mul.Tensor, "Or": aten.logical_or.default, "Sub": aten.sub.Tensor,
    "Xor": aten.logical_xor.default,
}  # fmt: skip
"""Ops of two inputs that ATen has under the same meaning."""


def _unary(op: Any) -> Callable[..., Result]:
    return widened(lambda b, n, x: b.call(op.default, x))


def _binary(op: Any) -> Callable[..., Result]:
    return widened(lambda b, n, x, y: b.call(op, x, y))


def aligned(function: Callable[..., Result]) -> Callable[..., Result]:
    """A binary op before opset 7: the second operand is placed at `axis` of the first, if `broadcast` says so."""

    def run(b: Builder, n: Node, x: Value, y: Value) -> Result:
        if n.get("broadcast", 0) and n.get("axis") is not None:
            missing = x.rank - n.get("axis") % max(x.rank, 1) - y.rank
            y = b.call(aten.reshape.default, y, [*b.sizes(y), *[1] * missing])
        elif not n.get("broadcast", 0) and x.probes[0].shape != y.probes[0].shape:
            b.refuse(f"{n.op} of unequal shapes without broadcast=1, as opset 6 wants it")
        return function(b, n, x, y)

    return run


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Types that ATen stores but does not compute with."""


def widened(function: Callable[..., Result]) -> Callable[..., Result]:
    """An integer op that computes with wide unsigned numbers as int64, and wraps the result as they do."""

    def run(b: Builder, n: Node, *operands: Value) -> Result:
        dtype = operands[0].dtype
        if dtype not in _UNSIGNED:
            return function(b, n, *operands)
        result = function(b, n, *(b.call(aten.to.dtype, operand, torch.int64) for operand in operands))
        return b.call(aten.to.dtype, result, dtype) if result.dtype is torch.int64 else result

    return run


def divide(b: Builder, n: Node, x: Value, y: Value) -> Result:
    """Div; integers towards zero."""
    if x.dtype.is_floating_point:
        return b.call(aten.div.Tensor, x, y)
    return b.call(aten.div.Tensor_mode, x, y, rounding_mode="trunc")


def modulo(b: Builder, n: Node, x: Value, y: Value) -> Result:
    """Mod; the sign is the divisor's, or the dividend's with fmod."""
    return b.call(aten.fmod.Tensor if n.get("fmod", 0) else aten.remainder.Tensor, x, y)


def power(b: Builder, n: Node, x: Operand, y: Operand) -> Result:
    """Pow; the result has the base's type. A constant exponent keeps the op unary."""
    base, exponent = tensor(b, x), constant(y)
    if exponent is not None:
        exponent = int(exponent) if float(exponent).is_integer() else exponent
        if exponent == 1:
            return base
        if base.dtype.is_floating_point or (isinstance(exponent, int) and exponent >= 0):
            return b.call(aten.pow.Tensor_Scalar, base, exponent)
    return b.call(aten.to.dtype, b.call(aten.pow.Tensor_Tensor, base, tensor(b, y)), base.dtype)


def bit_shift(b: Builder, n: Node, x: Value, y: Value) -> Result:
    """BitShift."""
    left = n.get("direction") == "LEFT"
    return b.call(aten.bitwise_left_shift.Tensor if left else aten.bitwise_right_shift.Tensor, x, y)


def _variadic(op: Any) -> Callable[..., Result]:
    """Max, Min, Sum of any number of inputs."""

    def run(b: Builder, n: Node, first: Value, *rest: Value) -> Result:
        for operand in rest:
            first = b.call(op, first, operand)
        return first

    return widened(run)


def mean(b: Builder, n: Node, *operands: Value) -> Result:
    """Mean of any number of inputs."""
    return b.call(aten.div.Scalar, _variadic(aten.add.Tensor)(b, n, *operands), len(operands))


def where(b: Builder, n: Node, condition: Value, x: Value, y: Value) -> Result:
    """Where."""
    return b.call(aten.where.self, condition, x, y)


def cast(b: Builder, n: Node, x: Value) -> Result:
    """Cast. Floating types become the graph's own."""
    dtype = dtype_of(b, n.get("to"))
    if dtype is torch.bool and x.dtype is not torch.bool:
        return b.call(aten.ne.Scalar, x, 0)
    return b.call(aten.to.dtype, x, dtype)


def cast_like(b: Builder, n: Node, x: Value, like: Value) -> Result:
    """CastLike."""
    return b.call(aten.to.dtype, x, like.dtype)


def is_inf(b: Builder, n: Node, x: Value) -> Result:
    """IsInf; of one sign only if so asked."""
    signs = [sign for name, sign in (("detect_negative", -math.inf), ("detect_positive", math.inf)) if n.get(name, 1)]
    found = [b.call(aten.eq.Scalar, x, sign) for sign in signs]
    if not found:
        return b.call(aten.ne.Tensor, x, x)
    return found[0] if len(found) == 1 else b.call(aten.logical_or.default, *found)


# -- activations ---------------------------------------------------------------------------------------------------


def clip_6(b: Builder, n: Node, x: Value) -> Result:
    """Clip with its bounds as attributes."""
    return _clamped(b, x, n.get("min"), n.get("max"))


def clip(b: Builder, n: Node, x: Operand, low: Operand = None, high: Operand = None) -> Result:
    """Clip with its bounds as inputs; computed bounds stay tensors."""
    value = tensor(b, x)
    bounds = [constant(low), constant(high)]
    if any(bound is None and given is not None for bound, given in zip(bounds, (low, high), strict=True)):
        for op, given in ((aten.maximum.default, low), (aten.minimum.default, high)):
            value = b.call(op, value, tensor(b, given)) if given is not None else value
        return value
    return _clamped(b, value, *bounds)


def _clamped(b: Builder, x: Value, low: Any, high: Any) -> Result:
    widest = torch.finfo(torch.float32).max if x.dtype.is_floating_point else math.inf
    low, high = (None if bound is None or abs(bound) >= widest else bound for bound in (low, high))
    if low is None and high is None:
        return x
    if low == 0 and high is None:
        return b.call(aten.relu.default, x)
    if x.dtype.is_floating_point and low is not None and high is not None and low <= high:
        return b.call(aten.hardtanh.default, x, low, high)
    return b.call(aten.clamp.default, x, low, high)


def leaky_relu(b: Builder, n: Node, x: Value) -> Result:
    """LeakyRelu."""
    return b.call(aten.leaky_relu.default, x, n.get("alpha", 0.01))


def prelu(b: Builder, n: Node, x: Value, slope: Value) -> Result:
    """PRelu; one slope, or one per channel, is ATen's own, any other shape is spelled out."""
    shape = list(slope.probes[0].shape)
    shape = [1] * (x.rank - len(shape)) + shape
    if math.prod(shape) == 1 or (x.rank > 1 and math.prod(shape) == shape[1] == x.probes[0].shape[1]):
        return b.call(aten.prelu.default, x, b.call(aten.reshape.default, slope, [math.prod(shape)]))
    return b.call(aten.where.self, b.call(aten.lt.Scalar, x, 0), b.call(aten.mul.Tensor, x, slope), x)


def prelu_6(b: Builder, n: Node, x: Value, slope: Value) -> Result:
    """PRelu before opset 7: a slope of rank 1 is per channel."""
    if slope.rank == 1 and x.rank > 1:
        slope = b.call(aten.reshape.default, slope, [*slope.probes[0].shape, *[1] * (x.rank - 2)])
    return prelu(b, n, x, slope)


def elu(b: Builder, n: Node, x: Value) -> Result:
    """Elu."""
    return b.call(aten.elu.default, x, n.get("alpha", 1.0))


def selu(b: Builder, n: Node, x: Value) -> Result:
    """Selu; with its usual constants ATen's own."""
    alpha, gamma = n.get("alpha", 1.6732632), n.get("gamma", 1.050701)
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.050701) < 1e-6:
        return b.call(aten.selu.default, x)
    return b.call(aten.elu.default, x, alpha, gamma)


def celu(b: Builder, n: Node, x: Value) -> Result:
    """Celu."""
    return b.call(aten.celu.default, x, n.get("alpha", 1.0))


def gelu(b: Builder, n: Node, x: Value) -> Result:
    """Gelu."""
    return b.call(aten.gelu.default, x, approximate=n.get("approximate", "none"))


def hard_sigmoid(b: Builder, n: Node, x: Value) -> Result:
    """HardSigmoid: clamp(alpha x + beta, 0, 1)."""
    alpha, beta = n.get("alpha", 0.2), n.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return b.call(aten.hardsigmoid.default, x)
    return b.call(aten.clamp.default, b.call(aten.add.Scalar, b.call(aten.mul.Scalar, x, alpha), beta), 0, 1)


def softsign(b: Builder, n: Node, x: Value) -> Result:
    """Softsign: x / (1 + |x|)."""
    return b.call(aten.div.Tensor, x, b.call(aten.add.Scalar, b.call(aten.abs.default, x), 1))


def thresholded_relu(b: Builder, n: Node, x: Value) -> Result:
    """ThresholdedRelu."""
    return b.call(aten.threshold.default, x, n.get("alpha", 1.0), 0)


def shrink(b: Builder, n: Node, x: Value) -> Result:
    """Shrink: towards zero by `bias` outside [-lambd, lambd], zero inside."""
    edge, bias = n.get("lambd", 0.5), n.get("bias", 0.0)
    if x.dtype.is_floating_point and bias in (0, edge):
        return b.call(aten.softshrink.default if bias else aten.hardshrink.default, x, edge)
    zero = b.call(aten.zeros_like.default, x)
    low = b.call(aten.where.self, b.call(aten.lt.Scalar, x, -edge), b.call(aten.add.Scalar, x, bias), zero)
    shrunk = b.call(aten.where.self, b.call(aten.gt.Scalar, x, edge), b.call(aten.sub.Scalar, x, bias), low)
    return b.call(aten.to.dtype, shrunk, x.dtype)


def swish(b: Builder, n: Node, x: Value) -> Result:
    """Swish: x sigmoid(alpha x)."""
    alpha = n.get("alpha", 1.0)
    if alpha == 1:
        return b.call(aten.silu.default, x)
    return b.call(aten.mul.Tensor, x, b.call(aten.sigmoid.default, b.call(aten.mul.Scalar, x, alpha)))


def _old_arithmetic(names: Sequence[str]) -> dict[str, dict[int, Callable[..., Result]]]:
    return {name: {1: aligned(_binary(BINARY[name])), 7: _binary(BINARY[name])} for name in names}


ELEMENTWISE: Table = {
    **{name: {1: _unary(op)} for name, op in UNARY.items()},
    **{name: {1: _binary(op)} for name, op in BINARY.items()},
    **_old_arithmetic(["Add", "And", "Equal", "Greater", "Less", "Mul", "Or", "Sub", "Xor"]),
    "BitShift": {11: widened(bit_shift)},
    "Cast": {6: cast},
    "CastLike": {15: cast_like},
    "Celu": {12: celu},
    "Clip": {6: clip_6, 11: Op(clip, raw=True)},
    "Div": {1: aligned(divide), 7: widened(divide)},
    "Elu": {1: elu},
    "Gelu": {20: gelu},
    "HardSigmoid": {1: hard_sigmoid},
    "IsInf": {10: is_inf},
    "LeakyRelu": {1: leaky_relu},
    "Max": {1: _variadic(aten.maximum.default)},
    "Mean": {1: mean},
    "Min": {1: _variadic(aten.minimum.default)},
    "Mod": {10: widened(modulo)},
    "PRelu": {1: prelu_6, 7: prelu},
    "Pow": {1: aligned(lambda b, n, x, y: power(b, n, x, y)), 7: Op(power, raw=True)},
    "Selu": {1: selu},
    "Shrink": {9: shrink},
    "Softsign": {1: softsign},
    "Sum": {1: _variadic(aten.add.Tensor)},
    "Swish": {24: swish},
    "ThresholdedRelu": {10: thresholded_relu},
    "Where": {9: where},
}
