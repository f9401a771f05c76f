"""Resize and Upsample: ATen's own interpolation where it means the same, a constant matrix per axis otherwise."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attrcli.formats.onnx_ops.base import Known, Node, Result, Table, aten, axis_of, reads
from attrcli.graph.build import Builder, Value

_LARGEST_MATRIX = 1 << 24
"""Most elements of the matrix that resizes one axis: 4096 to 4096."""

_MOST_ROWS = 1 << 15
"""Most elements of an axis after the resize."""

_NEAREST = {3: aten.upsample_nearest1d.vec, 4: aten.upsample_nearest2d.vec, 5: aten.upsample_nearest3d.vec}
_LINEAR = {3: aten.upsample_linear1d.vec, 4: aten.upsample_bilinear2d.vec, 5: aten.upsample_trilinear3d.vec}


def upsample(b: Builder, n: Node, x: Value, scales: Known | None = None) -> Result:
    """Upsample (7, 9) and Resize of opset 10: coordinates divided by the scale, nearest rounded down."""
    factors = n.get("scales") if scales is None else scales.list()
    plain = {"mode": n.get("mode", "nearest"), "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return _resized(b, Node(n.op, plain), x, list(range(x.rank)), factors, None, None)


def resize(
    b: Builder, n: Node, x: Value, roi: Known | None = None, scales: Known | None = None, sizes: Known | None = None
) -> Result:
    """Resize since opset 11."""
    given = n.get("axes")
    axes = list(range(x.rank)) if given is None else [axis_of(b, axis, x.rank) for axis in given]
    factors = scales.list() if scales is not None and scales.list() else None
    wanted = sizes.list() if sizes is not None and sizes.list() else None
    return _resized(b, n, x, axes, factors, wanted, roi.list() if roi is not None and roi.list() else None)


def _resized(
    b: Builder,
    n: Node,
    x: Value,
    axes: Sequence[int],
    scales: Sequence[float] | None,
    sizes: Sequence[Any] | None,
    roi: Sequence[float] | None,
) -> Result:
    have = [b.size(x, axis) for axis in axes]
    plans = _plans(b, n, have, scales, sizes)
    changed: list[tuple[int, NDArray[np.float64]]] = []
    outside: list[tuple[int, NDArray[np.bool_]]] = []
    for i, (axis, (count, scale)) in enumerate(zip(axes, plans, strict=True)):
        if count is None:
            continue
        if have[i] * count > _LARGEST_MATRIX or count > _MOST_ROWS or count < 0:
            b.refuse(f"Resize of {have[i]} elements to {count}")
        ends = (0.0, 1.0) if roi is None else (roi[i], roi[i + len(axes)])
        weights = interpolation(n, have[i], count, scale, ends)
        if weights.shape[0] != weights.shape[1] or not np.array_equal(weights, np.eye(count)):
            changed.append((axis, weights))
        empty = np.all(weights == 0, axis=1, keepdims=True)
        if empty.any():
            outside.append((axis, empty[:, 0]))
    native = _native(b, n, x, changed)
    if native is not None:
        return native
    for axis, weights in changed:
        x = _along(b, x, axis, weights)
    for axis, rows in outside if n.get("extrapolation_value", 0.0) else ():
        mask = b.literal(rows.reshape([-1] + [1] * (x.rank - 1 - axis)).tolist(), torch.bool)
        x = b.call(aten.masked_fill.Scalar, x, mask, n.get("extrapolation_value"))
    return x


def _plans(
    b: Builder, n: Node, have: Sequence[Any], scales: Sequence[float] | None, sizes: Sequence[Any] | None
) -> list[tuple[int | None, float]]:
    """The new size and the scale of each axis; None for one that stays, which one that depends on the batch must."""
    policy = n.get("keep_aspect_ratio_policy", "stretch")
    if sizes is not None and policy != "stretch":
        choose = min if policy == "not_larger" else max
        factor = choose(size / own for size, own in zip(sizes, have, strict=True))
        return [(math.floor(factor * own + 0.5), factor) for own in have]
    plans: list[tuple[int | None, float]] = []
    for i, own in enumerate(have):
        wanted: Any = sizes[i] if sizes is not None else own if scales is None or scales[i] == 1 else None
        if isinstance(own, Value) or isinstance(wanted, Value):
            same = isinstance(own, Value) and isinstance(wanted, Value) and own.probes == wanted.probes
            if not same:
                b.refuse("Resize of a dimension that depends on the batch size")
            plans.append((None, 1.0))
        elif sizes is not None:
            plans.append((int(wanted), wanted / own))
        else:
            scale = scales[i] if scales is not None else 1.0
            plans.append((math.floor(own * scale), scale))
    return plans


def _native(b: Builder, n: Node, x: Value, changed: list[tuple[int, NDArray[np.float64]]]) -> Result:
    """ATen's own nearest or linear interpolation, where it has these matrices; None where it has not."""
    mode, matrices = n.get("mode", "nearest"), [weights for _, weights in changed]
    if mode not in ("nearest", "linear") or [axis for axis, _ in changed] != list(range(2, x.rank)) or x.rank > 5:
        return None
    counts = [len(weights) for weights in matrices]
    if mode == "nearest" and all(np.array_equal(weights, _aten(weights.shape, "nearest")) for weights in matrices):
        return b.call(_NEAREST[x.rank], x, counts, None)
    for align in (False, True) if mode == "linear" else ():
        if all(np.allclose(weights, _aten(weights.shape, "linear", align), atol=1e-12) for weights in matrices):
            return b.call(_LINEAR[x.rank], x, counts, align, None)
    return None


def _aten(shape: tuple[int, ...], mode: str, align: bool | None = None) -> NDArray[np.float64]:
    """The matrix by which ATen resizes one axis."""
    unit = torch.eye(shape[1], dtype=torch.float64)[None]
    return torch.nn.functional.interpolate(unit, shape[0], mode=mode, align_corners=align)[0].T.numpy()


def _along(b: Builder, x: Value, axis: int, weights: NDArray[np.float64]) -> Result:
    """Multiply one axis by a matrix; one that only picks elements is an index."""
    if ((weights == 1).sum(1) == 1).all() and ((weights == 0).sum(1) == weights.shape[1] - 1).all():
        return b.call(aten.index_select.default, x, axis, b.literal(weights.argmax(1).tolist(), torch.int64))
    matrix = b.tensor(torch.from_numpy(weights), "weights")
    if axis == x.rank - 1:
        return b.call(aten.linear.default, x, matrix)
    moved = b.call(aten.linear.default, b.call(aten.transpose.int, x, axis, -1), matrix)
    return b.call(aten.transpose.int, moved, axis, -1)


# -- the matrix of one axis ------------------------------------------------------------------------------------------


def interpolation(n: Node, size: int, count: int, scale: float, roi: tuple[float, float]) -> NDArray[np.float64]:
    """The (count, size) matrix that resizes one axis; rows of tf_crop_and_resize that lie outside stay zero.

    Source: the Resize operator's specification (ONNX) and its reference implementation.
    """
    transform = n.get("coordinate_transformation_mode", "half_pixel")
    places = np.array([_source(transform, i, size, count, scale, roi) for i in range(count)])
    mode = n.get("mode", "nearest")
    weights = np.zeros((count, size))
    for i, place in enumerate(places):
        if transform == "tf_crop_and_resize" and not 0 <= place <= size - 1:
            continue
        if mode == "nearest":
            taken = {_nearest(n.get("nearest_mode", "round_prefer_floor"), place): 1.0}
        else:
            taken = _taps(n, mode, place, size, scale)
        for position, weight in taken.items():
            weights[i, min(max(position, 0), size - 1)] += weight
    return weights


def _source(transform: str, i: int, size: int, count: int, scale: float, roi: tuple[float, float]) -> float:
    """Where output element `i` lies in the input."""
    length = scale * size
    match transform:
        case "half_pixel":
            return (i + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            adjustment = count / length
            return size / 2 * (1 - adjustment) + (i + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5 if count > 1 else -0.5
        case "align_corners":
            return i * (size - 1) / (length - 1) if length != 1 else 0.0
        case "asymmetric":
            return i / scale
        case "tf_half_pixel_for_nn":
            return (i + 0.5) / scale
        case "tf_crop_and_resize":
            start, end = roi
            if count > 1:
                return start * (size - 1) + i * (end - start) * (size - 1) / (count - 1)
            return 0.5 * (start + end) * (size - 1)
    raise ValueError(f"coordinate_transformation_mode '{transform}'")


def _nearest(mode: str, place: float) -> int:
    match mode:
        case "round_prefer_floor":
            return math.ceil(place - 0.5)
        case "round_prefer_ceil":
            return math.floor(place + 0.5)
        case "floor":
            return math.floor(place)
        case "ceil":
            return math.ceil(place)
    raise ValueError(f"nearest_mode '{mode}'")


def _taps(n: Node, mode: str, place: float, size: int, scale: float) -> dict[int, float]:
    """The input elements that one output element mixes, with weights that add to one."""
    shrink = min(scale, 1.0) if n.get("antialias", 0) else 1.0
    support = 1 if mode == "linear" else 2
    if mode not in ("linear", "cubic"):
        raise ValueError(f"mode '{mode}'")
    coefficient = n.get("cubic_coeff_a", -0.75)
    first, last = math.floor(place - support / shrink), math.ceil(place + support / shrink)
    taken: dict[int, float] = {}
    for position in range(first, last + 1):
        distance = abs(place - position) * shrink
        weight = max(0.0, 1 - distance) if mode == "linear" else _cubic(distance, coefficient)
        if weight and not (n.get("exclude_outside", 0) and not 0 <= position < size):
            taken[position] = weight
    total = sum(taken.values())
    return {position: weight / total for position, weight in taken.items()}


def _cubic(distance: float, a: float) -> float:
    """Keys' cubic kernel."""
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance * distance + 1
    return ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a if distance < 2 else 0.0


RESIZE: Table = {
    "Resize": {10: reads(upsample, 1), 11: reads(resize, 1, 2, 3)},
    "Upsample": {7: reads(upsample, 1)},
}
