"""Quantised ops: integers held as floating numbers, so that a gradient passes straight through the rounding.

A level is kept in the graph's floating type: in float32 every integer up to 2**24 is exact, and so is what these ops
compute, as ONNX defines it, as long as an accumulator stays below that; in float64 always. Rounding is
x + (round(x) - x) with the bracket detached: its value is the rounded one, its derivative 1. Saturation is a clamp, so
outside the range the derivative is 0. Source: Bengio, Leonard, Courville 2013, section 4 (straight-through estimator).
"""

from collections.abc import Callable
from typing import Any

import torch

from attrcli.formats.onnx_ops.base import (
    Node,
    Op,
    Operand,
    Result,
    Stored,
    Table,
    aten,
    axis_of,
    dtype_of,
    padded,
    tensor,
)
from attrcli.formats.onnx_ops.layers import convolution
from attrcli.graph.build import Builder, Value


def rounded(b: Builder, x: Value) -> Result:
    """Round half to even, with derivative 1."""
    whole = b.call(aten.round.default, x)
    if not x.data:
        return whole
    return b.call(aten.add.Tensor, x, b.call(aten.detach.default, b.call(aten.sub.Tensor, whole, x)))


def levels(b: Builder, x: Operand, zero: Operand = None) -> Result:
    """Quantised numbers as floating ones, their zero point subtracted."""
    value = b.call(aten.to.dtype, tensor(b, x), b.dtype)
    if zero is None or (isinstance(zero, Stored) and not bool(zero.tensor.count_nonzero())):
        return value
    return b.call(aten.sub.Tensor, value, b.call(aten.to.dtype, tensor(b, zero), b.dtype))


def _integer_type(b: Builder, n: Node, zero: Operand) -> torch.dtype:
    """The type that a result saturates to: the zero point's; one that an op of this file computed is uint8."""
    if zero is None:
        code = n.get("output_dtype", 0)
        return dtype_of(b, code) if code else torch.uint8
    dtype: torch.dtype = zero.tensor.dtype if isinstance(zero, Stored) else zero.dtype
    return torch.uint8 if dtype.is_floating_point else dtype


def quantised(b: Builder, n: Node, ratio: Value, zero: Operand) -> Result:
    """A ratio to the scale rounded, moved to the zero point, saturated."""
    dtype = _integer_type(b, n, zero)
    if dtype.is_floating_point:
        b.refuse(f"quantisation to {dtype}")
    result = rounded(b, ratio)
    if zero is not None and not (isinstance(zero, Stored) and not bool(zero.tensor.count_nonzero())):
        result = b.call(aten.add.Tensor, result, b.call(aten.to.dtype, tensor(b, zero), b.dtype))
    bounds = torch.iinfo(dtype)
    return b.call(aten.clamp.default, result, bounds.min, bounds.max)


def _placed(b: Builder, n: Node, item: Operand, x: Value) -> Operand:
    """A scale or zero point shaped so that it broadcasts over x: per tensor, per axis, or per block."""
    if item is None:
        return None
    value = tensor(b, item)
    if value.rank == 0:
        return item
    if list(value.probes[0].shape) == [1]:
        return _reshaped(b, item, [])
    axis, block = axis_of(b, n.get("axis", 1), x.rank), n.get("block_size", 0)
    if value.rank == x.rank and block:
        longer = b.call(aten.repeat_interleave.self_int, value, block, axis)
        return b.call(aten.slice.Tensor, longer, axis, 0, x.probes[0].shape[axis], 1)
    if value.rank != 1:
        b.refuse(f"{n.op} with a scale of shape {tuple(value.probes[0].shape)}")
    return _reshaped(b, item, [-1, *[1] * (x.rank - 1 - axis)])


def _reshaped(b: Builder, item: Operand, shape: list[int]) -> Operand:
    """A scale or zero point in another shape, still of its own type where it is stored."""
    if isinstance(item, Stored):
        return Stored(item.tensor.reshape(shape), item.name)
    return b.call(aten.reshape.default, tensor(b, item), shape)


def quantize_linear(b: Builder, n: Node, x: Operand, scale: Operand, zero: Operand = None) -> Result:
    """QuantizeLinear: saturate(round(x / scale) + zero)."""
    value = b.call(aten.to.dtype, tensor(b, x), b.dtype)
    ratio = b.call(aten.div.Tensor, value, tensor(b, _placed(b, n, scale, value)))
    return quantised(b, n, ratio, _placed(b, n, zero, value))


def dequantize_linear(b: Builder, n: Node, x: Operand, scale: Operand, zero: Operand = None) -> Result:
    """DequantizeLinear: (x - zero) scale."""
    value = tensor(b, x)
    return b.call(aten.mul.Tensor, levels(b, value, _placed(b, n, zero, value)), tensor(b, _placed(b, n, scale, value)))


def dynamic_quantize_linear(b: Builder, n: Node, x: Value) -> Result:
    """DynamicQuantizeLinear to uint8: scale and zero point follow the whole tensor, so that samples of a batch mix.

    Scale and zero point carry no gradient: quantised and dequantised again, x has the derivative 1.
    """
    low = b.call(aten.clamp_max.default, b.call(aten.amin.default, x, list(range(x.rank)), False), 0)
    high = b.call(aten.clamp_min.default, b.call(aten.amax.default, x, list(range(x.rank)), False), 0)
    scale = b.call(aten.div.Scalar, b.call(aten.sub.Tensor, high, low), 255)
    scale = b.call(aten.detach.default, scale)
    zero = b.call(aten.neg.default, b.call(aten.div.Tensor, low, scale))
    zero = b.call(aten.round.default, b.call(aten.clamp.default, zero, 0, 255))
    zero = b.call(aten.detach.default, zero)
    return [quantised(b, n, b.call(aten.div.Tensor, x, scale), zero), scale, zero]


# -- products ----------------------------------------------------------------------------------------------------------


def _per_row(b: Builder, item: Operand) -> Operand:
    """A scale or zero point of the left operand of a product: one number, or one per row."""
    if item is None or tensor(b, item).rank != 1:
        return item
    return _reshaped(b, item, [] if tensor(b, item).probes[0].numel() == 1 else [-1, 1])


def _ratio(b: Builder, x_scale: Operand, y_scale: Operand, scale: Operand) -> Result:
    both = b.call(aten.mul.Tensor, tensor(b, x_scale), tensor(b, y_scale))
    return b.call(aten.div.Tensor, both, tensor(b, scale))


def matmul_integer(
    b: Builder, n: Node, x: Operand, y: Operand, x_zero: Operand = None, y_zero: Operand = None
) -> Result:
    """MatMulInteger."""
    return b.call(aten.matmul.default, levels(b, x, _per_row(b, x_zero)), levels(b, y, y_zero))


def qlinear_matmul(
    b: Builder,
    n: Node,
    x: Operand,
    x_scale: Operand,
    x_zero: Operand,
    y: Operand,
    y_scale: Operand,
    y_zero: Operand,
    scale: Operand,
    zero: Operand,
) -> Result:
    """QLinearMatMul."""
    total = matmul_integer(b, n, x, y, x_zero, y_zero)
    ratio = _ratio(b, _per_row(b, x_scale), y_scale, _per_row(b, scale))
    return quantised(b, n, b.call(aten.mul.Tensor, total, ratio), _per_row(b, zero))


def conv_integer(b: Builder, n: Node, x: Operand, w: Operand, x_zero: Operand = None, w_zero: Operand = None) -> Result:
    """ConvInteger."""
    return convolution(b, n, levels(b, x, x_zero), levels(b, w, _per_channel(b, w_zero, tensor(b, w).rank, 0)))


def _per_channel(b: Builder, item: Operand, rank: int, axis: int) -> Operand:
    """One number, or one per channel at this axis of a tensor of this rank."""
    if item is None or tensor(b, item).rank == 0:
        return item
    return _reshaped(b, item, [-1, *[1] * (rank - 1 - axis)])


def qlinear_conv(
    b: Builder,
    n: Node,
    x: Operand,
    x_scale: Operand,
    x_zero: Operand,
    w: Operand,
    w_scale: Operand,
    w_zero: Operand,
    scale: Operand,
    zero: Operand,
    bias: Operand = None,
) -> Result:
    """QLinearConv; the bias has the scale of the products."""
    total = conv_integer(b, n, x, w, x_zero, w_zero)
    if bias is not None:
        total = b.call(aten.add.Tensor, total, levels(b, _per_channel(b, bias, total.rank, 1)))
    ratio = _ratio(b, x_scale, _per_channel(b, w_scale, total.rank, 1), scale)
    return quantised(b, n, b.call(aten.mul.Tensor, total, ratio), _per_channel(b, zero, total.rank, 1))


# -- ops that ONNX Runtime's quantiser writes: dequantise, compute, quantise -------------------------------------------


def real(b: Builder, x: Operand, scale: Operand, zero: Operand) -> Result:
    """A quantised tensor of one scale as the numbers that it stands for."""
    return b.call(aten.mul.Tensor, levels(b, x, zero), tensor(b, scale))


def requantised(b: Builder, n: Node, value: Value, scale: Operand, zero: Operand) -> Result:
    """Numbers as levels of a scale."""
    return quantised(b, n, b.call(aten.div.Tensor, value, tensor(b, scale)), zero)


def qlinear_binary(op: Any) -> Callable[..., Result]:
    """QLinearAdd, QLinearMul."""

    def run(b: Builder, n: Node, *operands: Operand) -> Result:
        x, y = real(b, *operands[:3]), real(b, *operands[3:6])
        scale, zero = operands[6], operands[7] if len(operands) > 7 else None
        return requantised(b, n, b.call(op, x, y), scale, zero)

    return run


def qlinear_unary(function: Callable[..., Result]) -> Callable[..., Result]:
    """An op of one quantised tensor: input, scale, zero point, then scale and zero point of the result."""

    def run(
        b: Builder, n: Node, x: Operand, x_scale: Operand, x_zero: Operand, scale: Operand, zero: Operand = None
    ) -> Result:
        return requantised(b, n, function(b, n, real(b, x, x_scale, x_zero)), scale, zero)

    return run


def qlinear_concat(b: Builder, n: Node, scale: Operand, zero: Operand, *parts: Operand) -> Result:
    """QLinearConcat: triples of tensor, scale, zero point."""
    values = [real(b, *parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return requantised(b, n, b.call(aten.cat.default, values, n.get("axis")), scale, zero)


def qgemm(b: Builder, n: Node, *operands: Operand) -> Result:
    """QGemm; floating where no scale of the result is given."""
    a, a_scale, a_zero, w, w_scale, w_zero, bias, scale, zero = padded(operands, 9)
    x, y = levels(b, a, a_zero), levels(b, w, w_zero)
    x = b.call(aten.t.default, x) if n.get("transA", 0) else x
    y = b.call(aten.t.default, y) if n.get("transB", 0) else y
    total = b.call(aten.matmul.default, x, y)
    total = total if n.get("alpha", 1.0) == 1 else b.call(aten.mul.Scalar, total, n.get("alpha"))
    total = total if bias is None else b.call(aten.add.Tensor, total, levels(b, bias))
    both = b.call(aten.mul.Tensor, tensor(b, a_scale), tensor(b, w_scale))
    value = b.call(aten.mul.Tensor, total, both)
    return value if scale is None else requantised(b, n, value, scale, zero)


def matmul_integer_to_float(b: Builder, n: Node, *operands: Operand) -> Result:
    """MatMulIntegerToFloat."""
    x, y, x_scale, y_scale, x_zero, y_zero, bias = padded(operands, 7)
    total = matmul_integer(b, n, x, y, x_zero, y_zero)
    value = b.call(aten.mul.Tensor, total, b.call(aten.mul.Tensor, tensor(b, x_scale), tensor(b, y_scale)))
    return value if bias is None else b.call(aten.add.Tensor, value, tensor(b, bias))


def dynamic_quantize_matmul(b: Builder, n: Node, *operands: Operand) -> Result:
    """DynamicQuantizeMatMul: the left operand is quantised as it comes."""
    x, y, y_scale, y_zero, bias = padded(operands, 5)
    level, scale, zero = dynamic_quantize_linear(b, n, tensor(b, x))
    return matmul_integer_to_float(b, n, level, y, scale, y_scale, zero, y_zero, bias)


QUANTISED: Table = {
    "ConvInteger": {10: Op(conv_integer, raw=True)},
    "DequantizeLinear": {10: Op(dequantize_linear, raw=True)},
    "DynamicQuantizeLinear": {11: dynamic_quantize_linear},
    "MatMulInteger": {10: Op(matmul_integer, raw=True)},
    "QLinearConv": {10: Op(qlinear_conv, raw=True)},
    "QLinearMatMul": {10: Op(qlinear_matmul, raw=True)},
    "QuantizeLinear": {10: Op(quantize_linear, raw=True)},
}
