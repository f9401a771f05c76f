"""Pooling over windows and over everything."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from attrcli.formats.onnx_ops.base import MODEST, Node, Result, Table, aten, modest, product
from attrcli.formats.onnx_ops.layers import pad_pairs, spatial, window_pads
from attrcli.graph.build import Builder, Value

_MAX = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
_AVERAGE = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}


def _windows(b: Builder, n: Node, x: Value) -> tuple[list[int], list[int], list[int], list[tuple[int, int]], list[int]]:
    """Kernel, strides, dilations, padding pairs, and how far the last window reaches beyond the padding."""
    kernel = list(n.get("kernel_shape"))
    ones = [1] * len(kernel)
    strides, dilations = list(n.get("strides", ones)), list(n.get("dilations", ones))
    pairs = window_pads(b, n, x, kernel, strides, dilations)
    if any(abs(item) > MODEST for item in (*kernel, *strides, *dilations, *(side for pair in pairs for side in pair))):
        b.refuse(f"{n.op} with windows of {kernel}, strides {strides}, dilations {dilations}, pads {pairs}")
    if len(kernel) not in _MAX or x.rank != len(kernel) + 2:
        b.refuse(f"{n.op} over {len(kernel)} dimensions of a tensor of rank {x.rank}")
    beyond = []
    for size, k, s, d, (before, after) in zip(spatial(b, x), kernel, strides, dilations, pairs, strict=True):
        room = size + before + after - (k - 1) * d - 1
        count = room // s + 1
        if n.get("ceil_mode", 0) and room % s and count * s < size + before:  # a window may not start in the padding
            count += 1
        beyond.append((count - 1) * s - room if (count - 1) * s > room else 0)
    return kernel, strides, dilations, pairs, beyond


def _aten_can(kernel: Sequence[int], pairs: Sequence[tuple[int, int]]) -> bool:
    return all(before == after <= k // 2 for k, (before, after) in zip(kernel, pairs, strict=True))


def _lowest(x: Value) -> Any:
    return torch.finfo(x.dtype).min if x.dtype.is_floating_point else torch.iinfo(x.dtype).min


def max_pool(b: Builder, n: Node, x: Value) -> Result:
    """MaxPool; padding that ATen cannot express becomes a pad with the lowest finite number."""
    kernel, strides, dilations, pairs, beyond = _windows(b, n, x)
    ceil = any(beyond)
    if n.wants(1):
        if len(kernel) != 2 or not _aten_can(kernel, pairs):
            b.refuse("MaxPool with its indices as an output, over other than 2 dimensions or with unequal padding")
        return _with_indices(b, n, x, kernel, strides, [before for before, _ in pairs], dilations, ceil)
    if not _aten_can(kernel, pairs):
        wider = [(before, after + more) for (before, after), more in zip(pairs, beyond, strict=True)]
        x = b.call(aten.constant_pad_nd.default, x, pad_pairs(wider), _lowest(x))
        pairs, ceil = [(0, 0)] * len(kernel), False
    padding = [before for before, _ in pairs]
    return b.call(_MAX[len(kernel)], x, kernel, strides, padding, dilations, ceil)


def _with_indices(b: Builder, n: Node, x: Value, *window: Any) -> Result:
    """Values and indices; ATen counts them within one plane, ONNX over the whole tensor."""
    values, place = b.call(aten.max_pool2d_with_indices.default, x, *window)
    batch, channels, height, width = b.sizes(x)
    if n.get("storage_order", 0):
        row = b.call(aten.div.Tensor_mode, place, b.literal(width), rounding_mode="floor")
        place = b.call(
            aten.add.Tensor, b.call(aten.mul.Scalar, b.call(aten.remainder.Scalar, place, width), height), row
        )
    planes = b.call(aten.arange.default, product(b, [batch, channels]))
    first = b.call(aten.mul.Scalar, b.call(aten.reshape.default, planes, [batch, channels, 1, 1]), height * width)
    return [values, b.call(aten.add.Tensor, place, first)]


def average_pool(b: Builder, n: Node, x: Value) -> Result:
    """AveragePool; where ATen cannot express it, sums over padded windows times one over the elements that count."""
    kernel, strides, dilations, pairs, beyond = _windows(b, n, x)
    with_pads = bool(n.get("count_include_pad", 0))
    if _aten_can(kernel, pairs) and all(d == 1 for d in dilations):
        padding = [before for before, _ in pairs]
        return b.call(_AVERAGE[len(kernel)], x, kernel, strides, padding, any(beyond), with_pads)
    wider = [(before, after + more) for (before, after), more in zip(pairs, beyond, strict=True)]
    sizes = spatial(b, x)
    padded = b.call(aten.constant_pad_nd.default, x, pad_pairs(wider), 0.0)
    if all(d == 1 for d in dilations):
        means = b.call(_AVERAGE[len(kernel)], padded, kernel, strides)
    else:
        means = _dilated_mean(b, padded, kernel, strides, dilations)
    for size, k, (before, after), more in zip(sizes, kernel, pairs, beyond, strict=True):
        modest(b, before + size + after + more, k)
    share = np.ones(())
    for size, k, s, d, (before, after), more in zip(sizes, kernel, strides, dilations, pairs, beyond, strict=True):
        inside = np.zeros(before + size + after + more)
        inside[0 if with_pads else before : before + size + (after if with_pads else 0)] = 1
        starts = np.arange(0, len(inside) - (k - 1) * d, s)
        modest(b, share.size, len(starts))
        share = np.multiply.outer(share, inside[starts[:, None] + d * np.arange(k)].sum(1) / k)
    if (share == 1).all():
        return means
    return b.call(aten.mul.Tensor, means, b.literal((1 / np.maximum(share, 1e-30)).tolist(), torch.float32))


def _dilated_mean(b: Builder, x: Value, kernel: list[int], strides: list[int], dilations: list[int]) -> Result:
    """Mean over dilated windows: a convolution of each channel with a constant."""
    sizes, zeros = b.sizes(x), [0] * len(kernel)
    modest(b, sizes[1], *kernel)
    weight = b.literal(np.full((sizes[1], 1, *kernel), 1 / math.prod(kernel)).tolist(), torch.float32)
    return b.call(aten.convolution.default, x, weight, None, strides, zeros, dilations, False, zeros, sizes[1])


def lp_pool(b: Builder, n: Node, x: Value) -> Result:
    """LpPool: the p-norm over windows."""
    p = n.get("p", 2)
    powers = b.call(aten.pow.Tensor_Scalar, b.call(aten.abs.default, x), p)
    whole = Node(n.op, {**n.attributes, "count_include_pad": 1}, n.outputs)
    kernel, _, _, pairs, beyond = _windows(b, n, x)
    if any(beyond):  # the mean would leave out what lies beyond the padding, and so could not be turned into a sum
        pads = [before for before, _ in pairs] + [after + more for (_, after), more in zip(pairs, beyond, strict=True)]
        whole = Node(n.op, {**whole.attributes, "pads": pads, "auto_pad": "NOTSET", "ceil_mode": 0}, n.outputs)
    sums = b.call(aten.mul.Scalar, average_pool(b, whole, powers), math.prod(kernel))
    return b.call(aten.pow.Tensor_Scalar, sums, 1 / p)


def _global(reduce: Any) -> Callable[..., Result]:
    def run(b: Builder, n: Node, x: Value) -> Result:
        return b.call(reduce, x, list(range(2, x.rank)), True)

    return run


def global_lp_pool(b: Builder, n: Node, x: Value) -> Result:
    """GlobalLpPool."""
    return b.call(aten.linalg_vector_norm.default, x, n.get("p", 2), list(range(2, x.rank)), True)


POOLING: Table = {
    "AveragePool": {1: average_pool},
    "GlobalAveragePool": {1: _global(aten.mean.dim)},
    "GlobalLpPool": {2: global_lp_pool},
    "GlobalMaxPool": {1: _global(aten.amax.default)},
    "LpPool": {2: lp_pool},
    "MaxPool": {1: max_pool},
}
