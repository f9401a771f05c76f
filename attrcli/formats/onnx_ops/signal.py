"""Fourier transforms as constant matrices: linear in their input, real and imaginary parts as ONNX lays them out."""

import numpy as np
import torch
from numpy.typing import NDArray

from attrcli.formats.onnx_ops.base import Known, Node, Result, Table, aten, axis_of, modest, objects, reads
from attrcli.graph.build import Builder, Value

_LARGEST_MATRIX = 1 << 24


def _matrix(b: Builder, values: NDArray[np.float64]) -> Value:
    return b.tensor(torch.from_numpy(np.ascontiguousarray(values)), "transform")


def _angles(b: Builder, rows: int, columns: int, length: int) -> NDArray[np.float64]:
    if not 0 < rows * columns <= _LARGEST_MATRIX or length < 1:
        b.refuse(f"a Fourier transform of {columns} to {rows} elements")
    return 2 * np.pi * (np.outer(np.arange(rows), np.arange(columns)) % length) / length


def dft_17(b: Builder, n: Node, x: Value, length: Known | None = None) -> Result:
    """DFT with its axis as an attribute."""
    return _dft(b, n, x, length, n.get("axis", 1))


def dft(b: Builder, n: Node, x: Value, length: Known | None = None, axis: Known | None = None) -> Result:
    """DFT with its axis as an input."""
    return _dft(b, n, x, length, -2 if axis is None else axis.list()[0])


def _dft(b: Builder, n: Node, x: Value, length: Known | None, axis: int) -> Result:
    """Zero padded or cut to `length`; from half a spectrum to real numbers when inverse and one-sided."""
    along, inverse, half = axis_of(b, axis, x.rank), bool(n.get("inverse", 0)), bool(n.get("onesided", 0))
    have = b.size(x, along)
    if not isinstance(have, int):
        b.refuse("DFT of a dimension that depends on the batch size")
    size = length.list()[0] if length is not None else 2 * (have - 1) if inverse and half else have
    used = min(have, size // 2 + 1 if inverse and half else size)
    x = b.call(aten.slice.Tensor, x, along, 0, used, 1) if used < have else x
    parts = [b.call(aten.select.int, x, -1, i) for i in range(x.probes[0].shape[-1])]
    last = x.rank - 2
    parts = [b.call(aten.transpose.int, part, along, last) for part in parts] if along != last else parts
    if inverse and half:
        results = [_real_inverse(b, parts, size, used)]
    else:
        results = _transformed(b, parts, size // 2 + 1 if half else size, used, size, inverse)
    results = [b.call(aten.transpose.int, part, along, last) for part in results] if along != last else results
    return b.call(aten.stack.default, results, -1)


def _transformed(b: Builder, parts: list[Value], rows: int, columns: int, length: int, inverse: bool) -> list[Value]:
    """Real and imaginary part of the transform over the last dimension."""
    angles, sign, scale = _angles(b, rows, columns, length), 1 if inverse else -1, 1 / length if inverse else 1
    cosine, sine = _matrix(b, scale * np.cos(angles)), _matrix(b, sign * scale * np.sin(angles))
    real, imaginary = (b.call(aten.linear.default, parts[0], matrix) for matrix in (cosine, sine))
    if len(parts) == 1:
        return [real, imaginary]
    crossed = [b.call(aten.linear.default, parts[1], matrix) for matrix in (sine, cosine)]
    return [b.call(aten.sub.Tensor, real, crossed[0]), b.call(aten.add.Tensor, imaginary, crossed[1])]


def _real_inverse(b: Builder, parts: list[Value], length: int, columns: int) -> Value:
    """The real sequence that half a spectrum belongs to; what the other half would add is counted twice."""
    angles = _angles(b, length, columns, length)
    twice = np.array([1.0 if k == 0 or 2 * k == length else 2.0 for k in range(columns)]) / length
    real: Value = b.call(aten.linear.default, parts[0], _matrix(b, twice * np.cos(angles)))
    if len(parts) == 1:
        return real
    other: Value = b.call(aten.linear.default, parts[1], _matrix(b, -twice * np.sin(angles)))
    result: Value = b.call(aten.add.Tensor, real, other)
    return result


def stft(
    b: Builder, n: Node, x: Value, step: Known, window: Value | None = None, length: Known | None = None
) -> Result:
    """STFT: windowed frames, each transformed."""
    size = length.list()[0] if length is not None else None if window is None else window.probes[0].shape[0]
    if size is None:
        b.refuse("STFT with neither a window nor a frame length")
    parts = [b.call(aten.select.int, x, -1, i) for i in range(x.probes[0].shape[-1])] if x.rank == 3 else [x]
    parts = [b.call(aten.unfold.default, part, 1, size, step.list()[0]) for part in parts]
    if window is not None:
        parts = [b.call(aten.mul.Tensor, part, window) for part in parts]
    rows = size // 2 + 1 if n.get("onesided", 1) else size
    return b.call(aten.stack.default, _transformed(b, parts, rows, size, size, inverse=False), -1)


def mel_weight_matrix(b: Builder, n: Node, *given: Known) -> Result:
    """MelWeightMatrix, a constant. Source: its specification (ONNX) and reference implementation."""
    bins, length, rate, low, high = (item.list()[0] for item in given)
    rows = length // 2 + 1
    modest(b, rows, bins + 2)
    ends = [2595 * np.log10(1 + hertz / 700) for hertz in (low, high)]
    mels = np.arange(bins + 2) * (ends[1] - ends[0]) / (bins + 2) + ends[0]
    edges = ((length + 1) * (700 * (10 ** (mels / 2595) - 1)) // rate).astype(np.int64)
    weights = np.zeros((rows, bins))
    for i, (left, middle, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        if middle == left:
            weights[middle, i] = 1
        for j in range(left, middle + 1):
            if middle > left:
                weights[j, i] = (j - left) / (middle - left)
        for j in range(middle, right):
            if right > middle:
                weights[j, i] = (right - j) / (right - middle)
    if weights.size <= 64:
        return Known(objects(weights.tolist()), torch.float32)
    return _matrix(b, weights)


SIGNAL: Table = {
    "DFT": {17: reads(dft_17, 1), 20: reads(dft, 1, 2)},
    "MelWeightMatrix": {17: reads(mel_weight_matrix, 0, 1, 2, 3, 4)},
    "STFT": {17: reads(stft, 1, 3)},
}
