"""Rewrites of layers: convolution, padding, normalisation, dropout and pooling, each in its one spelling."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from attrcli.graph.build import Builder
    from attrcli.graph.value import Value

aten = torch.ops.aten


def convolution(rank: int) -> Callable[..., Any]:
    """Convolution of this many spatial dimensions."""

    def rewrite(
        b: "Builder",
        x: Any,
        w: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> Any:
        spread = [_spread(item, rank) for item in (stride, padding, dilation)]
        return _batched(
            b, x, rank + 2, lambda v: b.call(aten.convolution.default, v, w, bias, *spread, False, [0] * rank, groups)
        )

    return rewrite


def same_convolution(rank: int) -> Callable[..., Any]:
    """Convolution with padding given in words: 'valid', or 'same' (stride 1; the odd element goes to the end)."""

    def rewrite(
        b: "Builder",
        x: Any,
        w: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: str = "valid",
        dilation: Any = 1,
        groups: Any = 1,
    ) -> Any:
        dilation = _spread(dilation, rank)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, w.probes[0].shape[2:], strict=True)]
        if any(t % 2 for t in total):
            pads = [p for t in reversed(total) for p in (0, t % 2)]
            x = b.call(aten.constant_pad_nd.default, x, pads, 0)
        return convolution(rank)(b, x, w, bias, stride, [t // 2 for t in total], dilation, groups)

    return rewrite


def transposed(rank: int) -> Callable[..., Any]:
    """Transposed convolution."""

    def rewrite(
        b: "Builder",
        x: Any,
        w: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: Any = 1,
        dilation: Any = 1,
    ) -> Any:
        spread = [_spread(item, rank) for item in (stride, padding, dilation)]
        extra = _spread(output_padding, rank)
        return _batched(
            b, x, rank + 2, lambda v: b.call(aten.convolution.default, v, w, bias, *spread, True, extra, groups)
        )

    return rewrite


def _spread(item: Any, rank: int) -> list[Any]:
    items = list(item) if isinstance(item, Sequence) else [item]
    return items * rank if len(items) == 1 else items


def _batched(b: "Builder", x: "Value", rank: int, run: Callable[["Value"], Any]) -> Any:
    """Run on a batch of one when the input has no batch dimension."""
    if x.rank == rank:
        return run(x)
    return b.call(aten.squeeze.dims, run(b.call(aten.unsqueeze.default, x, 0)), [0])


def convolution_mode(b: "Builder", x: Any, w: Any, *args: Any) -> Any:
    """Convolution with padding given in words, its rank told by the weight."""
    return same_convolution(w.rank - 2)(b, x, w, *args)


def convolution_time_first(b: "Builder", x: Any, w: Any, bias: Any, padding: int = 0) -> Any:
    """1-d convolution of (time, batch, channels) by a weight of (kernel, inputs, outputs)."""
    x, w = b.call(aten.permute.default, x, [1, 2, 0]), b.call(aten.permute.default, w, [2, 1, 0])
    return b.call(aten.permute.default, convolution(1)(b, x, w, bias, 1, padding), [2, 0, 1])


def pad(b: "Builder", x: Any, sizes: Any, mode: str = "constant", value: Any = None) -> Any:
    """Padding, its mode given in words."""
    if mode == "constant":
        return b.call(aten.constant_pad_nd.default, x, sizes, value or 0)
    if mode == "circular":
        return circular_pad(b, x, sizes)
    op = _PADS.get((mode, len(sizes) // 2))
    if op is None:
        b.refuse(f"pad of {len(sizes) // 2} dimensions in mode {mode}")
    return b.call(op, x, sizes)


_PADS: dict[tuple[str, int], Any] = {
    ("reflect", 1): aten.reflection_pad1d.default,
    ("reflect", 2): aten.reflection_pad2d.default,
    ("reflect", 3): aten.reflection_pad3d.default,
    ("replicate", 1): aten.replication_pad1d.default,
    ("replicate", 2): aten.replication_pad2d.default,
    ("replicate", 3): aten.replication_pad3d.default,
}


def circular_pad(b: "Builder", x: Any, sizes: Any) -> Any:
    """Each dimension, from the last on, continued from its other end; a negative number takes elements away."""
    for pair in range(len(sizes) // 2):
        before, after = sizes[2 * pair : 2 * pair + 2]
        dim = x.rank - 1 - pair
        size = b.size(x, dim)
        whole = b.call(aten.slice.Tensor, x, dim, max(0, -before), size - max(0, -after))
        size = b.size(whole, dim)
        if max(before, after) > size:
            b.refuse(f"circular padding of {size} elements by {max(before, after)}")
        head = b.call(aten.slice.Tensor, whole, dim, size - before, size) if before > 0 else None
        tail = b.call(aten.slice.Tensor, whole, dim, 0, after) if after > 0 else None
        parts = [part for part in (head, whole, tail) if part is not None]
        x = b.call(aten.cat.default, parts, dim) if len(parts) > 1 else whole
    return x


def batch_norm(
    b: "Builder", x: Any, w: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: Any, *_: Any
) -> Any:
    """Batch norm by stored statistics; by its own for one row of all channels, as weight standardisation is written."""
    if training and mean is None and b.size(x, 0) == 1:
        return b.emit(aten.instance_norm.default, x, w, bias, None, None, True, momentum, eps, False)
    if training or mean is None or var is None:
        b.refuse("batch norm in training mode: save the model after model.eval()")
    return b.emit(aten.batch_norm.default, x, w, bias, mean, var, False, momentum, eps, False)


def native_batch_norm(b: "Builder", *args: Any) -> Any:
    """Batch norm that returns the statistics of the batch too, which only training uses."""
    return [batch_norm(b, *args), None, None]


def native_batch_norm_inference(b: "Builder", x: Any, *args: Any) -> Any:
    """The same without a `training` argument."""
    *tensors, momentum, eps = args
    return [batch_norm(b, x, *tensors, False, momentum, eps), None, None]


def native_batch_norm_no_stats(b: "Builder", x: Any, w: Any, bias: Any, *args: Any) -> Any:
    """The same without stored statistics: instance norm, which exporters spell as one row of all channels."""
    return [batch_norm(b, x, w, bias, None, None, *args), None, None]


def native_group_norm(
    b: "Builder", x: Any, w: Any, bias: Any, n: Any, c: Any, rest: Any, groups: int, eps: float
) -> Any:
    """Group norm that returns its statistics too."""
    return [b.call(aten.group_norm.default, x, groups, w, bias, eps), None, None]


def dropout(b: "Builder", x: Any, p: Any = 0.5, train: Any = True, *_: Any) -> Any:
    """Dropout of any kind, which in inference does nothing; the node stays for `passes.to_training`."""
    if train and p:
        b.refuse("dropout in training mode: save the model after model.eval()")
    return b.emit(aten.dropout.default, x, p, False) if p else x


def native_dropout(b: "Builder", x: Any, p: Any, train: Any) -> Any:
    """Dropout that returns its mask too."""
    return [dropout(b, x, p, train), None]


def pool_and_indices(values: Any, both: Any) -> Callable[..., Any]:
    """The values by the op that makes nothing else; the indices, where they are read, by the op that makes both."""
    return lambda b, x, *args: [b.call(values, x, *args), b.emit(both, x, *args)[1]]


def instance_norm(
    b: "Builder", x: Any, w: Any, bias: Any, mean: Any, var: Any, use_input: Any, momentum: Any, eps: Any, *_: Any
) -> Any:
    """Instance norm, which by stored statistics is batch norm."""
    if not use_input:
        return batch_norm(b, x, w, bias, mean, var, False, momentum, eps)
    return b.emit(aten.instance_norm.default, x, w, bias, None, None, True, momentum, eps, False)
