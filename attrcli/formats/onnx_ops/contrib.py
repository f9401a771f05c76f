"""com.microsoft: the fused ops that ONNX Runtime's optimiser and quantiser write."""

from collections.abc import Callable
from typing import Any

import torch

from attrcli.formats.onnx_ops import quantised
from attrcli.formats.onnx_ops.attention import CONTRIB_ATTENTION
from attrcli.formats.onnx_ops.base import Node, Op, Operand, Result, Table, aten, axis_of, padded, tensor
from attrcli.formats.onnx_ops.elementwise import hard_sigmoid, leaky_relu
from attrcli.formats.onnx_ops.layers import convolution, gemm, layer_norm, rms_norm, softmax
from attrcli.formats.onnx_ops.pooling import average_pool
from attrcli.graph.build import Builder, Value

# -- activations -------------------------------------------------------------------------------------------------------


def _activated(b: Builder, n: Node, x: Value, params: list[float]) -> Result:
    """The activation that a fused op names."""
    match n.get("activation", ""):
        case "":
            return x
        case "Relu":
            return b.call(aten.relu.default, x)
        case "Tanh":
            return b.call(aten.tanh.default, x)
        case "Sigmoid":
            return b.call(aten.sigmoid.default, x)
        case "LeakyRelu":
            return leaky_relu(b, Node(n.op, {"alpha": params[0]} if params else {}), x)
        case "Clip":
            return b.call(aten.hardtanh.default, x, *params[:2])
        case "HardSigmoid":
            return hard_sigmoid(b, Node(n.op, dict(zip(("alpha", "beta"), params, strict=False))), x)
        case other:
            b.refuse(f"{n.op} with activation '{other}'")


def gelu(b: Builder, n: Node, x: Value) -> Result:
    """Gelu."""
    return b.call(aten.gelu.default, x)


def fast_gelu(b: Builder, n: Node, x: Value, bias: Value | None = None) -> Result:
    """FastGelu: by tanh, of a sum."""
    return b.call(aten.gelu.default, _plus(b, x, bias), approximate="tanh")


def bias_gelu(b: Builder, n: Node, x: Value, bias: Value) -> Result:
    """BiasGelu."""
    return b.call(aten.gelu.default, _plus(b, x, bias))


def quick_gelu(b: Builder, n: Node, x: Value) -> Result:
    """QuickGelu: x sigmoid(alpha x)."""
    inner = b.call(aten.mul.Scalar, x, n.get("alpha", 1.702))
    return b.call(aten.mul.Tensor, x, b.call(aten.sigmoid.default, inner))


def _plus(b: Builder, x: Value, *others: Value | None) -> Any:
    for other in others:
        x = x if other is None else b.call(aten.add.Tensor, x, other)
    return x


def bias_softmax(b: Builder, n: Node, x: Value, bias: Value) -> Result:
    """BiasSoftmax, where the bias broadcasts as tensors do."""
    if not n.get("is_inner_broadcast", 1):
        missing = x.rank - bias.rank
        bias = b.call(aten.reshape.default, bias, [*b.sizes(bias)[:1], *[1] * missing, *b.sizes(bias)[1:]])
    return softmax(b, Node(n.op, {"axis": n.get("axis", -1)}), _plus(b, x, bias))


def bias_dropout(b: Builder, n: Node, *operands: Operand) -> Result:
    """BiasDropout as it predicts: data, bias and a residual added."""
    data, bias, residual, *_ = padded(operands, 3)
    if n.wants(1):
        b.refuse("BiasDropout with its mask as an output")
    return _plus(b, tensor(b, data), *(None if item is None else tensor(b, item) for item in (bias, residual)))


# -- products ----------------------------------------------------------------------------------------------------------


def fused_conv(b: Builder, n: Node, x: Operand, weight: Operand, bias: Operand = None, added: Operand = None) -> Result:
    """FusedConv: convolution, a sum, an activation."""
    result = convolution(b, n, x, weight, bias)
    result = _plus(b, result, None if added is None else tensor(b, added))
    return _activated(b, n, result, list(n.get("activation_params", [])))


def fused_gemm(b: Builder, n: Node, x: Value, weight: Value, bias: Value | None = None) -> Result:
    """FusedGemm: Gemm and an activation."""
    params = [n.get(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    return _activated(b, n, gemm(b, n, x, weight, bias), [item for item in params if item is not None])


def fused_matmul(b: Builder, n: Node, x: Value, y: Value) -> Result:
    """FusedMatMul: operands transposed, the product scaled."""
    sides = []
    for item, side in ((x, "A"), (y, "B")):
        if n.get(f"transBatch{side}", 0):
            order = [*range(1, item.rank - 1), 0, item.rank - 1]
            item = b.call(aten.permute.default, item, order)
        sides.append(b.call(aten.transpose.int, item, -2, -1) if n.get(f"trans{side}", 0) and item.rank > 1 else item)
    result = b.call(aten.matmul.default, *sides)
    return result if n.get("alpha", 1.0) == 1 else b.call(aten.mul.Scalar, result, n.get("alpha"))


# -- normalisations ----------------------------------------------------------------------------------------------------


def skip_layer_norm(
    b: Builder, n: Node, x: Value, skip: Value, weight: Value, shift: Value | None = None, bias: Value | None = None
) -> Result:
    """SkipLayerNormalization: the layer norm of a sum; the sum as fourth output."""
    total = _plus(b, x, skip, bias)
    normal = layer_norm(b, Node(n.op, {"epsilon": n.get("epsilon", 1e-12)}, n.outputs[:3]), total, weight, shift)
    parts = normal if isinstance(normal, list) else [normal, None, None]
    return [*parts, total]


def skip_rms_norm(b: Builder, n: Node, x: Value, skip: Value, weight: Value, bias: Value | None = None) -> Result:
    """SkipSimplifiedLayerNormalization: the root-mean-square norm of a sum; the sum as fourth output."""
    total = _plus(b, x, skip, bias)
    if n.wants(1) or n.wants(2):
        b.refuse(f"{n.op} with its statistics as outputs")
    return [rms_norm(b, Node(n.op, {"epsilon": n.get("epsilon", 1e-12)}), total, weight), None, None, total]


def simplified_layer_norm(b: Builder, n: Node, x: Value, weight: Value) -> Result:
    """SimplifiedLayerNormalization: RMSNormalization; one over the root as second output."""
    result = rms_norm(b, n, x, weight)
    if not n.wants(1):
        return result
    axes = list(range(axis_of(b, n.get("axis", -1), x.rank), x.rank))
    squares = b.call(aten.mean.dim, b.call(aten.square.default, x), axes, True)
    return [result, b.call(aten.rsqrt.default, b.call(aten.add.Scalar, squares, n.get("epsilon", 1e-5)))]


def embed_layer_norm(b: Builder, n: Node, *operands: Operand) -> Result:
    """EmbedLayerNormalization: embeddings of words, places and segments added, then normalised."""
    words, segments, word_table, place_table, segment_table, weight, shift, mask, places = padded(operands, 9)
    ids = tensor(b, words)
    total = _embedded(b, word_table, ids)
    if places is None:
        at = b.call(aten.slice.Tensor, tensor(b, place_table), 0, 0, b.size(ids, 1), 1)
        total = _plus(b, total, b.call(aten.unsqueeze.default, at, 0))
    else:
        total = _plus(b, total, _embedded(b, place_table, tensor(b, places)))
    if segments is not None:
        total = _plus(b, total, _embedded(b, segment_table, tensor(b, segments)))
    normal = layer_norm(
        b, Node(n.op, {"epsilon": n.get("epsilon", 1e-12)}, n.outputs[:1]), total, tensor(b, weight), tensor(b, shift)
    )
    lengths = None
    if n.wants(1):
        kept = tensor(b, mask) if mask is not None else b.call(aten.zeros_like.default, ids, dtype=torch.int32)
        lengths = b.call(aten.to.dtype, b.call(aten.sum.dim_IntList, kept, [1], False), torch.int32)
    return [normal, lengths, total]


def _embedded(b: Builder, table: Operand, ids: Value) -> Any:
    return b.call(aten.embedding.default, tensor(b, table), b.call(aten.to.dtype, ids, torch.int64))


def group_norm(b: Builder, n: Node, x: Value, weight: Value, bias: Value) -> Result:
    """GroupNorm: channels last unless told otherwise, with SiLU if so asked."""
    last = bool(n.get("channels_last", 1))
    x = b.call(aten.permute.default, x, [0, 3, 1, 2]) if last else x
    x = b.call(aten.group_norm.default, x, n.get("groups"), weight, bias, n.get("epsilon", 1e-5), False)
    x = b.call(aten.silu.default, x) if n.get("activation", 0) else x
    return b.call(aten.permute.default, x, [0, 2, 3, 1]) if last else x


# -- quantised ---------------------------------------------------------------------------------------------------------


def _sigmoid(b: Builder, n: Node, x: Value) -> Result:
    return b.call(aten.sigmoid.default, x)


def _softmax(b: Builder, n: Node, x: Value) -> Result:
    if n.get("opset", 13) < 13 and axis_of(b, n.get("axis", 1), x.rank) != x.rank - 1:
        b.refuse("QLinearSoftmax over several dimensions")
    return softmax(b, n, x)


def _channels_first(function: Callable[..., Result]) -> Callable[..., Result]:
    """A pooling that `channels_last` may tell to work on images with their channels at the end."""

    def run(b: Builder, n: Node, x: Value) -> Result:
        if not n.get("channels_last", 0):
            return function(b, n, x)
        inner = [0, x.rank - 1, *range(1, x.rank - 1)]
        result = function(b, n, b.call(aten.permute.default, x, inner))
        return b.call(aten.permute.default, result, [0, *range(2, x.rank), 1])

    return run


def _global_average(b: Builder, n: Node, x: Value) -> Result:
    return b.call(aten.mean.dim, x, list(range(2, x.rank)), True)


def _raw(function: Callable[..., Result]) -> dict[int, Op]:
    return {1: Op(function, raw=True)}


_QUANTISED: Table = {
    "DequantizeLinear": _raw(quantised.dequantize_linear),
    "DynamicQuantizeMatMul": _raw(quantised.dynamic_quantize_matmul),
    "MatMulIntegerToFloat": _raw(quantised.matmul_integer_to_float),
    "QGemm": _raw(quantised.qgemm),
    "QLinearAdd": _raw(quantised.qlinear_binary(aten.add.Tensor)),
    "QLinearAveragePool": _raw(quantised.qlinear_unary(_channels_first(average_pool))),
    "QLinearConcat": _raw(quantised.qlinear_concat),
    "QLinearGlobalAveragePool": _raw(quantised.qlinear_unary(_channels_first(_global_average))),
    "QLinearLeakyRelu": _raw(quantised.qlinear_unary(leaky_relu)),
    "QLinearMul": _raw(quantised.qlinear_binary(aten.mul.Tensor)),
    "QLinearSigmoid": _raw(quantised.qlinear_unary(_sigmoid)),
    "QLinearSoftmax": _raw(quantised.qlinear_unary(_softmax)),
    "QuantizeLinear": _raw(quantised.quantize_linear),
}

CONTRIB: Table = {
    **CONTRIB_ATTENTION,
    **_QUANTISED,
    "BiasDropout": _raw(bias_dropout),
    "BiasGelu": {1: bias_gelu},
    "BiasSoftmax": {1: bias_softmax},
    "EmbedLayerNormalization": _raw(embed_layer_norm),
    "FastGelu": {1: fast_gelu},
    "FusedConv": _raw(fused_conv),
    "FusedGemm": {1: fused_gemm},
    "FusedMatMul": {1: fused_matmul},
    "Gelu": {1: gelu},
    "GroupNorm": {1: group_norm},
    "QuickGelu": {1: quick_gelu},
    "SkipLayerNormalization": {1: skip_layer_norm},
    "SkipSimplifiedLayerNormalization": {1: skip_rms_norm},
    "TransposeMatMul": {1: fused_matmul},
}

UNDER_STANDARD: Table = {
    "LayerNormalization": {1: layer_norm},
    "SimplifiedLayerNormalization": {1: simplified_layer_norm},
}
"""Ops that ONNX Runtime files under the standard's domain, where the standard does not know them (yet)."""
