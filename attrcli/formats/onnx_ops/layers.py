"""Layers with weights: convolutions, matrix products, normalisations, softmax."""

import math
from collections.abc import Sequence
from typing import Any

from attrcli.formats.onnx_ops.base import Node, Op, Operand, Result, Stored, Table, aten, axis_of, product, tensor
from attrcli.graph.build import Builder, Value

# -- windows: what convolutions and poolings share ---------------------------------------------------------------


def spatial(b: Builder, x: Value) -> list[int]:
    """Sizes after batch and channels. Refused when one depends on the batch."""
    sizes = b.sizes(x)[2:]
    if any(isinstance(size, Value) for size in sizes):
        b.refuse("a window over a dimension that depends on the batch size")
    return sizes


def pad_pairs(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Pairs (before, after) per dimension as torch wants them: the last dimension first."""
    return [item for pair in reversed(pairs) for item in pair]


def window_pads(
    b: Builder, n: Node, x: Value, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding (before, after) of each spatial dimension, from `pads` or `auto_pad`."""
    mode, rank = n.get("auto_pad", "NOTSET"), len(kernel)
    if mode == "NOTSET":
        pads = n.get("pads", [0] * 2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * rank
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        b.refuse(f"auto_pad {mode}")
    pairs = []
    for size, k, s, d in zip(spatial(b, x), kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        small, large = total // 2, total - total // 2
        pairs.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return pairs


# -- convolutions --------------------------------------------------------------------------------------------------


def convolution(b: Builder, n: Node, data: Operand, kernels: Operand, shift: Operand = None) -> Result:
    """Conv: padding that differs at the two ends becomes a pad of its own; a constant bias of zeros is none."""
    x, weight = tensor(b, data), tensor(b, kernels)
    zero = isinstance(shift, Stored) and not shift.parameter and not bool(shift.tensor.count_nonzero())
    bias = None if shift is None or zero else tensor(b, shift)
    kernel = list(weight.probes[0].shape[2:])
    ones = [1] * len(kernel)
    strides, dilations = n.get("strides", ones), n.get("dilations", ones)
    pairs = window_pads(b, n, x, kernel, strides, dilations)
    padding = [before for before, _ in pairs]
    if any(before != after for before, after in pairs):
        x = b.call(aten.constant_pad_nd.default, x, pad_pairs(pairs), 0.0)
        padding = [0] * len(kernel)
    zeros, groups = [0] * len(kernel), n.get("group", 1)
    result = b.call(aten.convolution.default, x, weight, bias, strides, padding, dilations, False, zeros, groups)
    return result


def transposed_convolution(b: Builder, n: Node, x: Value, weight: Value, bias: Value | None = None) -> Result:
    """ConvTranspose: pads that differ at the two ends crop the full result."""
    kernel = list(weight.probes[0].shape[2:])
    rank = len(kernel)
    strides, dilations = n.get("strides", [1] * rank), n.get("dilations", [1] * rank)
    extra = list(n.get("output_padding", [0] * rank))
    pairs = _transposed_pads(b, n, x, kernel, strides, dilations, extra)
    for i, (before, after) in enumerate(pairs):
        if after < 0:
            extra[i], pairs[i] = extra[i] - after, (before, 0)
    symmetric = all(before == after for before, after in pairs)
    padding = [before if symmetric else 0 for before, _ in pairs]
    result = b.call(
        aten.convolution.default, x, weight, bias, strides, padding, dilations, True, extra, n.get("group", 1)
    )
    if symmetric:
        return result
    crop = pad_pairs([(-before, -after) for before, after in pairs])
    return b.call(aten.constant_pad_nd.default, result, crop, 0.0)


def _transposed_pads(
    b: Builder,
    n: Node,
    x: Value,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    extra: Sequence[int],
) -> list[tuple[int, int]]:
    mode, rank, shape = n.get("auto_pad", "NOTSET"), len(kernel), n.get("output_shape")
    if shape is None and mode in ("NOTSET", "VALID"):
        pads = n.get("pads", [0] * 2 * rank)
        return list(zip(pads[:rank], pads[rank:], strict=True))
    sizes = spatial(b, x)
    wanted = [size * s for size, s in zip(sizes, strides, strict=True)] if shape is None else list(shape)[-rank:]
    pairs = []
    for i in range(rank):
        full = strides[i] * (sizes[i] - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1
        total = full - wanted[i]
        half = max(total, 0) // 2
        pairs.append(
            (half, total - half) if mode == "SAME_UPPER" else (max(total, 0) - half, total - max(total, 0) + half)
        )
    return pairs


# -- matrix products -----------------------------------------------------------------------------------------------


def matmul(b: Builder, n: Node, x: Value, y: Value) -> Result:
    """MatMul."""
    return b.call(aten.matmul.default, x, y)


def gemm(b: Builder, n: Node, x: Value, weight: Value, bias: Value | None = None) -> Result:
    """Gemm: alpha x @ weight + beta bias; a linear layer where it is one."""
    alpha, beta = n.get("alpha", 1.0), n.get("beta", 1.0)
    if n.get("transA", 0):
        x = b.call(aten.t.default, x)
    rows = weight if n.get("transB", 0) else b.call(aten.t.default, weight)
    plain = bias is not None and beta == 1 and list(bias.probes[0].shape) == [rows.probes[0].shape[0]]
    result = b.call(aten.linear.default, x, rows, bias if plain and alpha == 1 else None)
    if bias is None or (plain and alpha == 1):
        return _scaled(b, result, alpha)
    return b.call(aten.add.Tensor, _scaled(b, result, alpha), _scaled(b, bias, beta))


def _scaled(b: Builder, x: Value, factor: float) -> Result:
    return x if factor == 1 else b.call(aten.mul.Scalar, x, factor)


def einsum(b: Builder, n: Node, *operands: Value) -> Result:
    """Einsum."""
    return b.call(aten.einsum.default, n.get("equation").replace(" ", ""), list(operands))


def determinant(b: Builder, n: Node, x: Value) -> Result:
    """Det."""
    return b.call(aten.linalg_det.default, x)


# -- normalisations ------------------------------------------------------------------------------------------------


def batch_norm(b: Builder, n: Node, x: Value, weight: Value, bias: Value, mean: Value, var: Value) -> Result:
    """BatchNormalization as it predicts; refused in training mode."""
    if n.get("training_mode", 0) or any(n.wants(i) for i in range(1, 5)):
        b.refuse("BatchNormalization in training mode: export the model in evaluation mode")
    if not n.get("spatial", 1):
        b.refuse("BatchNormalization with spatial=0")
    return b.call(aten.batch_norm.default, x, weight, bias, mean, var, False, 0.1, n.get("epsilon", 1e-5), False)


def layer_norm(b: Builder, n: Node, x: Value, weight: Value, bias: Value | None = None) -> Result:
    """LayerNormalization; mean and inverse deviation only where the file uses them."""
    axis, epsilon = axis_of(b, n.get("axis", -1), x.rank), n.get("epsilon", 1e-5)
    sizes = b.sizes(x)[axis:]
    shift = _of_sizes(b, bias, sizes) if bias is not None else None
    result = b.call(aten.layer_norm.default, x, sizes, _of_sizes(b, weight, sizes), shift, epsilon)
    if not n.wants(1) and not n.wants(2):
        return result
    axes = list(range(axis, x.rank))
    mean = b.call(aten.mean.dim, x, axes, True)
    spread = b.call(aten.mean.dim, b.call(aten.square.default, b.call(aten.sub.Tensor, x, mean)), axes, True)
    return [result, mean, b.call(aten.rsqrt.default, b.call(aten.add.Scalar, spread, epsilon))]


def _of_sizes(b: Builder, x: Value, sizes: list[Any]) -> Result:
    if x.rank == len(sizes) and all(
        isinstance(s, int) and s == have for s, have in zip(sizes, b.sizes(x), strict=True)
    ):
        return x
    return b.call(aten.expand.default, x, sizes)


def rms_norm(b: Builder, n: Node, x: Value, weight: Value) -> Result:
    """RMSNormalization."""
    sizes = b.sizes(x)[axis_of(b, n.get("axis", -1), x.rank) :]
    return b.call(aten.rms_norm.default, x, sizes, _of_sizes(b, weight, sizes), n.get("epsilon", 1e-5))


def group_norm(b: Builder, n: Node, x: Value, weight: Value, bias: Value) -> Result:
    """GroupNormalization since 21: scale and bias per channel."""
    return b.call(aten.group_norm.default, x, n.get("num_groups"), weight, bias, n.get("epsilon", 1e-5), False)


def group_norm_18(b: Builder, n: Node, x: Value, weight: Value, bias: Value) -> Result:
    """GroupNormalization of 18: scale and bias per group."""
    groups, channels = n.get("num_groups"), x.probes[0].shape[1]

    def per_channel(item: Value) -> Result:
        column = b.call(aten.expand.default, b.call(aten.reshape.default, item, [groups, 1]), [-1, channels // groups])
        return b.call(aten.reshape.default, column, [channels])

    return group_norm(b, n, x, per_channel(weight), per_channel(bias))


def instance_norm(b: Builder, n: Node, x: Value, weight: Value, bias: Value) -> Result:
    """InstanceNormalization."""
    return b.call(aten.instance_norm.default, x, weight, bias, None, None, True, 0.0, n.get("epsilon", 1e-5), False)


def local_response_norm(b: Builder, n: Node, x: Value) -> Result:
    """LRN: x / (bias + alpha * mean of squares over `size` channels) ** beta."""
    size = n.get("size")
    sizes = b.sizes(x)
    flat = b.call(aten.reshape.default, b.call(aten.square.default, x), [sizes[0], 1, sizes[1], math.prod(sizes[2:])])
    padded = b.call(aten.constant_pad_nd.default, flat, [0, 0, (size - 1) // 2, size // 2], 0.0)
    mean = b.call(aten.avg_pool2d.default, padded, [size, 1], [1, 1])
    mean = b.call(aten.reshape.default, mean, sizes)
    base = b.call(aten.add.Scalar, b.call(aten.mul.Scalar, mean, n.get("alpha", 1e-4)), n.get("bias", 1.0))
    return b.call(aten.div.Tensor, x, b.call(aten.pow.Tensor_Scalar, base, n.get("beta", 0.75)))


def lp_normalization(b: Builder, n: Node, x: Value) -> Result:
    """LpNormalization; zero where the norm is zero."""
    norm = b.call(aten.linalg_vector_norm.default, x, n.get("p", 2), [axis_of(b, n.get("axis", -1), x.rank)], True)
    empty = b.call(aten.eq.Scalar, norm, 0)
    return b.call(aten.div.Tensor, x, b.call(aten.masked_fill.Scalar, norm, empty, 1.0))


def mean_variance_normalization(b: Builder, n: Node, x: Value) -> Result:
    """MeanVarianceNormalization; epsilon as its function body has it."""
    axes = n.get("axes", [0, 2, 3])
    centred = b.call(aten.sub.Tensor, x, b.call(aten.mean.dim, x, axes, True))
    deviation = b.call(aten.sqrt.default, b.call(aten.mean.dim, b.call(aten.square.default, centred), axes, True))
    return b.call(aten.div.Tensor, centred, b.call(aten.add.Scalar, deviation, 1e-9))


# -- softmax -------------------------------------------------------------------------------------------------------


def softmax(b: Builder, n: Node, x: Value) -> Result:
    """Softmax since 13: over one axis."""
    return b.call(aten.softmax.int, x, axis_of(b, n.get("axis", -1), x.rank))


def log_softmax(b: Builder, n: Node, x: Value) -> Result:
    """LogSoftmax since 13: over one axis."""
    return b.call(aten.log_softmax.int, x, axis_of(b, n.get("axis", -1), x.rank))


def hardmax(b: Builder, n: Node, x: Value) -> Result:
    """Hardmax since 13: one at the first largest element of an axis, zero elsewhere."""
    axis = axis_of(b, n.get("axis", -1), x.rank)
    best = b.call(aten.argmax.default, x, axis, True)
    places = b.call(aten.arange.default, b.size(x, axis))
    places = b.call(aten.reshape.default, places, [-1] + [1] * (x.rank - 1 - axis))
    return b.call(aten.to.dtype, b.call(aten.eq.Tensor, best, places), x.dtype)


def over_rest(function: Any) -> Any:
    """Softmax before 13: over all dimensions from `axis` (default 1) on, taken as one."""

    def run(b: Builder, n: Node, x: Value) -> Result:
        axis = axis_of(b, n.get("axis", 1), x.rank)
        last = Node(n.op, {"axis": -1}, n.outputs)
        if axis == x.rank - 1:
            return function(b, last, x)
        sizes = b.sizes(x)
        rest = product(b, sizes[axis:])
        flat = b.call(aten.reshape.default, x, [*sizes[:axis], rest])
        return b.call(aten.reshape.default, function(b, last, flat), sizes)

    return run


LAYERS: Table = {
    "BatchNormalization": {1: batch_norm},
    "Conv": {1: Op(convolution, raw=True)},
    "ConvTranspose": {1: transposed_convolution},
    "Det": {11: determinant},
    "Einsum": {12: einsum},
    "Gemm": {1: gemm},
    "GroupNormalization": {18: group_norm_18, 21: group_norm},
    "Hardmax": {1: over_rest(hardmax), 13: hardmax},
    "InstanceNormalization": {1: instance_norm},
    "LRN": {1: local_response_norm},
    "LayerNormalization": {17: layer_norm},
    "LogSoftmax": {1: over_rest(log_softmax), 13: log_softmax},
    "LpNormalization": {1: lp_normalization},
    "MatMul": {1: matmul},
    "MeanVarianceNormalization": {9: mean_variance_normalization},
    "RMSNormalization": {23: rms_norm},
    "Softmax": {1: over_rest(softmax), 13: softmax},
}
