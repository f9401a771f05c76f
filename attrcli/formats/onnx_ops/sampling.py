"""Ops that sample an image at computed places, or put windows back into one."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attrcli.formats.onnx_ops.base import (
    Known,
    Node,
    Op,
    Operand,
    Result,
    Stored,
    Table,
    aten,
    limit,
    modest,
    product,
    reads,
    tensor,
)
from attrcli.formats.onnx_ops.layers import spatial, window_pads
from attrcli.graph.build import Builder, Value

_MODES = {"bilinear": 0, "linear": 0, "nearest": 1, "bicubic": 2, "cubic": 2}
_PADDING = {"zeros": 0, "border": 1, "reflection": 2}
_SAMPLERS = {4: aten.grid_sampler_2d.default, 5: aten.grid_sampler_3d.default}
_MOST_REGIONS = 4096


def grid_sample(b: Builder, n: Node, x: Value, grid: Value) -> Result:
    """GridSample."""
    mode, padding = _MODES[n.get("mode", "bilinear")], _PADDING[n.get("padding_mode", "zeros")]
    if x.rank not in _SAMPLERS or (x.rank == 5 and mode == 2):
        b.refuse(f"GridSample with mode '{n.get('mode')}' of a tensor of rank {x.rank}")
    return b.call(_SAMPLERS[x.rank], x, grid, mode, padding, bool(n.get("align_corners", 0)))


def _sampled(b: Builder, x: Value, y_at: Value, x_at: Value, padding: str) -> Result:
    """Linear interpolation of images (N, C, H, W) at pixel places (N, rows, columns)."""
    height, width = spatial(b, x)
    places = []
    for at, size in ((x_at, width), (y_at, height)):
        places.append(b.call(aten.sub.Scalar, b.call(aten.mul.Scalar, b.call(aten.add.Scalar, at, 0.5), 2 / size), 1))
    return b.call(aten.grid_sampler_2d.default, x, b.call(aten.stack.default, places, -1), 0, _PADDING[padding], False)


def deform_conv(
    b: Builder, n: Node, x: Value, weight: Value, offset: Value, bias: Value | None = None, mask: Value | None = None
) -> Result:
    """DeformConv over two dimensions: windows sampled at shifted places, then a product per group."""
    (batch, channels), (height, width) = b.sizes(x)[:2], spatial(b, x)
    if x.rank != 4:
        b.refuse(f"DeformConv over {x.rank - 2} dimensions")
    kernel = list(weight.probes[0].shape[2:])
    strides, dilations = n.get("strides", [1, 1]), n.get("dilations", [1, 1])
    pads = window_pads(b, n, x, kernel, strides, dilations)
    rows, columns = spatial(b, offset)
    groups, taps = n.get("offset_group", 1), math.prod(kernel)
    shifts = b.call(aten.reshape.default, offset, [-1, groups, taps, 2, rows, columns])
    modest(b, taps, rows, columns)
    places = []
    for axis, count in ((0, rows), (1, columns)):
        tap = np.arange(kernel[axis]) * dilations[axis]
        tap = np.repeat(tap, kernel[1]) if axis == 0 else np.tile(tap, kernel[0])
        along = np.arange(count) * strides[axis] - pads[axis][0]
        base = tap[:, None, None] + (along[:, None] if axis == 0 else along[None, :])
        base = np.broadcast_to(base, (taps, rows, columns)).astype(np.float32)
        shift = b.call(aten.select.int, shifts, 3, axis)
        at = b.call(aten.add.Tensor, shift, b.tensor(torch.from_numpy(base.copy()), "positions"))
        places.append(b.call(aten.reshape.default, at, [-1, taps * rows, columns]))
    images = b.call(aten.reshape.default, x, [-1, channels // groups, height, width])
    taken = b.call(
        aten.reshape.default,
        _sampled(b, images, places[0], places[1], "zeros"),
        [batch, groups, -1, taps, rows, columns],
    )
    if mask is not None:
        taken = b.call(
            aten.mul.Tensor, taken, b.call(aten.reshape.default, mask, [batch, groups, 1, taps, rows, columns])
        )
    blocks, outputs = n.get("group", 1), weight.probes[0].shape[0]
    taken = b.call(aten.reshape.default, taken, [batch, blocks, channels // blocks * taps, rows * columns])
    matrix = b.call(aten.reshape.default, weight, [blocks, outputs // blocks, channels // blocks * taps])
    result = b.call(aten.reshape.default, b.call(aten.matmul.default, matrix, taken), [batch, outputs, rows, columns])
    if bias is None:
        return result
    return b.call(aten.add.Tensor, result, b.call(aten.reshape.default, bias, [-1, 1, 1]))


# -- regions of interest -----------------------------------------------------------------------------------------------


def roi_align(b: Builder, n: Node, data: Operand, rois: Operand, indices: Operand) -> Result:
    """RoiAlign: each region's cells are means over points inside them; how many follows from constant regions only."""
    x, regions, index = tensor(b, data), tensor(b, rois), tensor(b, indices)
    half = n.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    rows, columns, ratio = n.get("output_height", 1), n.get("output_width", 1), n.get("sampling_ratio", 0)
    modest(b, rows, columns, max(ratio, 1), max(ratio, 1))
    scaled = b.call(aten.mul.Scalar, regions, n.get("spatial_scale", 1.0))
    scaled = b.call(aten.sub.Scalar, scaled, 0.5) if half else scaled
    images = b.call(aten.index_select.default, x, 0, b.call(aten.to.dtype, index, torch.int64))
    if ratio:
        return _aligned(b, n, images, scaled, half, (rows, columns), (ratio, ratio))
    if not isinstance(rois, Stored) or len(rois.tensor) > _MOST_REGIONS:
        b.refuse("RoiAlign whose number of points per cell depends on the regions (sampling_ratio=0)")
    parts = []
    for i, box in enumerate((rois.tensor.double() * n.get("spatial_scale", 1.0)).tolist()):
        extent = [end - start for start, end in zip(box[:2], box[2:], strict=True)]
        extent = extent if half else [max(size, 1.0) for size in extent]
        points = math.ceil(extent[1] / rows), math.ceil(extent[0] / columns)
        modest(b, rows, columns, *points)
        own = [b.call(aten.slice.Tensor, item, 0, i, i + 1, 1) for item in (images, scaled)]
        parts.append(_aligned(b, n, own[0], own[1], half, (rows, columns), points))
    return b.call(aten.cat.default, parts, 0)


def _aligned(
    b: Builder, n: Node, images: Value, boxes: Value, half: bool, cells: Sequence[int], points: Sequence[int]
) -> Result:
    """Regions (R, 4) of as many images (R, C, H, W), all with the same number of points per cell."""
    sizes, places, inside = spatial(b, images), [], []
    for axis in (0, 1):
        start, end = (b.call(aten.select.int, boxes, 1, i) for i in (1 - axis, 3 - axis))
        extent = b.call(aten.sub.Tensor, end, start)
        extent = extent if half else b.call(aten.clamp_min.default, extent, 1.0)
        count = cells[axis] * points[axis]
        steps = torch.from_numpy(((np.arange(count) + 0.5) / count).astype(np.float64))
        column = [b.call(aten.unsqueeze.default, item, 1) for item in (start, extent)]
        at = b.call(aten.add.Tensor, column[0], b.call(aten.mul.Tensor, column[1], b.tensor(steps, "points")))
        within = [b.call(op, at, bound) for op, bound in ((aten.ge.Scalar, -1), (aten.le.Scalar, sizes[axis]))]
        inside.append(b.call(aten.logical_and.default, *within))
        places.append(at)
    shape = [b.size(images, 0), cells[0] * points[0], cells[1] * points[1]]
    grids = [
        b.call(aten.expand.default, b.call(aten.unsqueeze.default, at, dim), shape)
        for at, dim in zip(places, (2, 1), strict=True)
    ]
    largest = n.get("mode", "avg") == "max"
    taken = (_largest_corner if largest else _bordered)(b, images, grids[0], grids[1])
    held = [b.call(aten.unsqueeze.default, item, dim) for item, dim in zip(inside, (2, 1), strict=True)]
    both = b.call(aten.unsqueeze.default, b.call(aten.logical_and.default, *held), 1)
    taken = b.call(aten.where.self, both, taken, b.call(aten.zeros_like.default, taken))
    if largest:
        return b.call(aten.max_pool2d.default, taken, list(points), list(points), [0, 0], [1, 1], False)
    return b.call(aten.avg_pool2d.default, taken, list(points), list(points))


def _bordered(b: Builder, images: Value, rows: Value, columns: Value) -> Result:
    return _sampled(b, images, rows, columns, "border")


def _largest_corner(b: Builder, images: Value, rows: Value, columns: Value) -> Result:
    """The largest weighted corner around each place: what ONNX's reference and ONNX Runtime take for 'max'."""
    sides = []
    for at, size in zip((rows, columns), spatial(b, images), strict=True):
        inside = b.call(aten.clamp.default, at, 0, size - 1)
        low = b.call(aten.floor.default, inside)
        high = b.call(aten.clamp_max.default, b.call(aten.add.Scalar, low, 1), size - 1)
        part = b.call(aten.sub.Tensor, inside, low)
        sides.append(((low, b.call(aten.rsub.Scalar, part, 1)), (high, part)))
    best: Any = None
    for row, by_row in sides[0]:
        for column, by_column in sides[1]:
            weight = b.call(aten.unsqueeze.default, b.call(aten.mul.Tensor, by_row, by_column), 1)
            corner = b.call(aten.mul.Tensor, _bordered(b, images, row, column), weight)
            best = corner if best is None else b.call(aten.maximum.default, best, corner)
    return best


# -- windows put back --------------------------------------------------------------------------------------------------


def col2im(b: Builder, n: Node, x: Value, image: Known, block: Known) -> Result:
    """Col2Im over any number of dimensions: overlapping blocks add up."""
    sizes, kernel = image.list(), block.list()
    rank, ones = len(sizes), [1] * len(sizes)
    strides, dilations = n.get("strides", ones), n.get("dilations", ones)
    pads = n.get("pads", [0] * 2 * rank)
    padded = [size + pads[i] + pads[i + rank] for i, size in enumerate(sizes)]
    modest(b, *padded, *kernel)
    if rank == 2 and pads[:2] == pads[2:]:
        return b.call(aten.col2im.default, x, sizes, kernel, dilations, pads[:2], strides)
    index: Any = np.zeros((), dtype=np.int64)
    for size, k, s, d in zip(padded, kernel, strides, dilations, strict=True):
        starts = np.arange(0, size - (k - 1) * d, s)
        index = index[..., None, None] * size + (np.arange(k)[:, None] * d + starts)
    index = index.transpose([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).reshape(-1)  # taps first, then blocks
    batch, channels = b.size(x, 0), x.probes[0].shape[1] // math.prod(kernel)
    flat = b.call(aten.reshape.default, x, [batch, channels, len(index)])
    places = b.call(aten.expand.default, b.tensor(torch.from_numpy(index.copy()), "positions"), b.sizes(flat))
    empty = b.call(aten.full.default, [batch, channels, math.prod(padded)], 0.0, dtype=b.dtype)
    whole = b.call(aten.scatter_add.default, empty, 2, places, flat)
    whole = b.call(aten.reshape.default, whole, [batch, channels, *padded])
    crop = [item for i in reversed(range(rank)) for item in (-pads[i], -pads[i + rank])]
    return b.call(aten.constant_pad_nd.default, whole, crop, 0.0)


def max_unpool(b: Builder, n: Node, x: Value, index: Value, shape: Known | None = None) -> Result:
    """MaxUnpool: values to the places that MaxPool took them from, counted over the whole tensor."""
    kernel, rank = n.get("kernel_shape"), x.rank - 2
    strides, pads = n.get("strides", [1] * rank), n.get("pads", [0] * 2 * rank)
    sizes = [(size - 1) * strides[i] - pads[i] - pads[i + rank] + kernel[i] for i, size in enumerate(spatial(b, x))]
    sizes = [*b.sizes(x)[:2], *sizes]
    limit(b, sizes)
    empty = b.call(aten.full.default, [product(b, sizes)], 0.0, dtype=b.dtype)
    flat = [b.call(aten.reshape.default, item, [-1]) for item in (index, x)]
    whole = b.call(aten.reshape.default, b.call(aten.scatter.src, empty, 0, *flat), sizes)
    if shape is None:
        return whole
    wider: list[Any] = [want - have for want, have in zip(shape.list()[2:], sizes[2:], strict=True)]
    return b.call(aten.constant_pad_nd.default, whole, [item for more in reversed(wider) for item in (0, more)], 0.0)


SAMPLING: Table = {
    "Col2Im": {18: reads(col2im, 1, 2)},
    "DeformConv": {19: deform_conv},
    "GridSample": {16: grid_sample},
    "MaxUnpool": {9: reads(max_unpool, 2)},
    "RoiAlign": {10: Op(roi_align, raw=True)},
}
