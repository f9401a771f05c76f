"""One spelling per operation: overloads that mean the same as another become it, when the graph is built."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from attrcli.graph import inplace

if TYPE_CHECKING:
    from attrcli.graph.build import Builder
    from attrcli.graph.value import Value

aten = torch.ops.aten


def _convolution(rank: int) -> Callable[..., Any]:
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


def _same_convolution(rank: int) -> Callable[..., Any]:
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
        return _convolution(rank)(b, x, w, bias, stride, [t // 2 for t in total], dilation, groups)

    return rewrite


def _transposed(rank: int) -> Callable[..., Any]:
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


def _convolution_mode(
    b: "Builder", x: Any, w: Any, bias: Any, stride: Any, padding: str, dilation: Any, groups: Any
) -> Any:
    return _same_convolution(w.rank - 2)(b, x, w, bias, stride, padding, dilation, groups)


def _pad(b: "Builder", x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    if mode == "constant":
        return b.call(aten.constant_pad_nd.default, x, pad, value or 0)
    op = _PADS.get((mode, len(pad) // 2))
    if op is None:
        b.refuse(f"pad of {len(pad) // 2} dimensions in mode {mode}")
    return b.call(op, x, pad)


_PADS: dict[tuple[str, int], Any] = {
    ("reflect", 1): aten.reflection_pad1d.default,
    ("reflect", 2): aten.reflection_pad2d.default,
    ("reflect", 3): aten.reflection_pad3d.default,
    ("replicate", 1): aten.replication_pad1d.default,
    ("replicate", 2): aten.replication_pad2d.default,
    ("replicate", 3): aten.replication_pad3d.default,
}


def _batch_norm(
    b: "Builder", x: Any, w: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: Any, *_: Any
) -> Any:
    if training:
        b.refuse("batch norm in training mode: save the model after model.eval()")
    return b.call(aten.batch_norm.default, x, w, bias, mean, var, False, momentum, eps, False)


def _canonical_batch_norm(
    b: "Builder", x: Any, w: Any, bias: Any, mean: Any, var: Any, training: Any, momentum: Any, eps: Any, *_: Any
) -> Any:
    if training or mean is None or var is None:
        b.refuse("batch norm in training mode: save the model after model.eval()")
    return b.emit(aten.batch_norm.default, x, w, bias, mean, var, False, momentum, eps, False)


def _native_batch_norm(b: "Builder", x: Any, w: Any, bias: Any, mean: Any, var: Any, momentum: Any, eps: Any) -> Any:
    return [_batch_norm(b, x, w, bias, mean, var, False, momentum, eps), None, None]


def _statistics_of_one(b: "Builder", x: Any, w: Any, bias: Any, training: Any, momentum: Any, eps: Any) -> Any:
    """Batch norm without stored statistics: instance norm, which exporters spell so on one row of all channels."""
    if b.size(x, 0) != 1:
        b.refuse("batch norm by the statistics of the batch")
    return [b.emit(aten.instance_norm.default, x, w, bias, None, None, True, momentum, eps, False), None, None]


def _native_group_norm(
    b: "Builder", x: Any, w: Any, bias: Any, n: Any, c: Any, rest: Any, groups: int, eps: float
) -> Any:
    return [b.call(aten.group_norm.default, x, groups, w, bias, eps), None, None]


def _dropout(b: "Builder", x: Any, p: Any = 0.5, train: Any = True, *_: Any) -> Any:
    if train and p:
        b.refuse("dropout in training mode: save the model after model.eval()")
    return x


def _native_dropout(b: "Builder", x: Any, p: Any, train: Any) -> Any:
    return [_dropout(b, x, p, train), None]


def _cast(
    b: "Builder", x: Any, dtype: Any = None, non_blocking: Any = False, copy: Any = False, *_: Any, **__: Any
) -> Any:
    if dtype is not None and dtype.is_floating_point:
        dtype = b.dtype
    if dtype is None or x.dtype == dtype:
        return b.fresh(x) if copy else x
    return b.emit(aten.to.dtype, x, dtype)


def _cast_by_keyword(b: "Builder", x: Any, *, dtype: Any = None, copy: Any = False, **_: Any) -> Any:
    return _cast(b, x, dtype, copy=copy)


def _copying_cast(b: "Builder", x: Any, *, dtype: Any = None, **_: Any) -> Any:
    return _cast(b, x, dtype, copy=True)


def _cast_to_device(b: "Builder", x: Any, device: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    return _cast(b, x, dtype, *args, **kwargs)


def _cast_like(b: "Builder", x: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
    return _cast(b, x, other.dtype, *args, **kwargs)


def _identity(b: "Builder", x: Any, *_: Any, **__: Any) -> Any:
    return x


def _copy(b: "Builder", x: Any, *_: Any, **__: Any) -> Any:
    return b.fresh(x)


def _contiguous(b: "Builder", x: Any, *, memory_format: Any = None) -> Any:
    plain = memory_format in (None, 0, torch.contiguous_format)
    if plain and x.probes[0].is_contiguous() and x.probes[1].is_contiguous():
        return x
    value = b.fresh(x)
    value.probes = (value.probes[0].contiguous(), value.probes[1].contiguous())
    return value


def _reshape(b: "Builder", x: Any, sizes: Any, *_: Any) -> Any:
    return b.call(aten.reshape.default, x, sizes)


def _view_dtype(b: "Builder", x: Any, dtype: Any) -> Any:
    return b.refuse(f"a tensor's memory read as {dtype}")


def _flatten(b: "Builder", x: Any, start: int = 0, end: int = -1) -> Any:
    if x.rank == 0:
        return b.call(aten.reshape.default, x, [1])
    start, end = start % x.rank, end % x.rank
    if start == end:
        return x
    sizes = b.sizes(x)
    if all(isinstance(size, int) for size in sizes[start : end + 1]):
        middle: Any = 1
        for size in sizes[start : end + 1]:
            middle *= size
    else:
        middle = -1
    return b.call(aten.reshape.default, x, [*sizes[:start], middle, *sizes[end + 1 :]])


def _squeeze(b: "Builder", x: Any, dims: Any = None) -> Any:
    """Dimensions of size 1 go; a free batch never is one, though a batch of one sample would be."""
    dims = range(x.rank) if dims is None else [dims] if isinstance(dims, int) else dims
    ones = sorted({dim % x.rank for dim in dims if x.rank and b.size(x, dim) == 1})
    return b.emit(aten.squeeze.dims, x, ones) if ones else x


def _where(b: "Builder", condition: Any, x: Any, y: Any) -> Any:
    return b.emit(aten.where.self, condition, b.as_tensor(x), b.as_tensor(y))


def _instance_norm(
    b: "Builder", x: Any, w: Any, bias: Any, mean: Any, var: Any, use_input: Any, momentum: Any, eps: Any, *_: Any
) -> Any:
    if not use_input:
        return _batch_norm(b, x, w, bias, mean, var, False, momentum, eps)
    return b.emit(aten.instance_norm.default, x, w, bias, None, None, True, momentum, eps, False)


def _rrelu(b: "Builder", x: Any, lower: Any = 1 / 8, upper: Any = 1 / 3, training: Any = False, *_: Any) -> Any:
    if training:
        b.refuse("rrelu in training mode: save the model after model.eval()")
    return b.call(aten.leaky_relu.default, x, (lower + upper) / 2)


def _hardsigmoid(b: "Builder", x: Any) -> Any:
    # aten.hardsigmoid's own backward uses a single-precision 1/6, wrong by 5e-9 in double precision.
    shifted = b.call(aten.add.Scalar, b.call(aten.div.Scalar, x, 6), 0.5)
    return b.call(aten.clamp.default, shifted, 0, 1)


def _relu6(b: "Builder", x: Any) -> Any:
    return b.call(aten.hardtanh.default, x, 0.0, 6.0)


def _with_scalar(op: Any) -> Callable[..., Any]:
    """A tensor op given a number where a tensor is due."""
    return lambda b, x, other, **kwargs: b.emit(op, b.as_tensor(x), b.as_tensor(other), **kwargs)


def _split_sizes(b: "Builder", x: Any, sizes: Any, dim: Any = 0) -> Any:
    return b.call(aten.split_with_sizes.default, x, sizes, dim)


def _chunk(b: "Builder", x: Any, chunks: int, dim: int = 0) -> Any:
    size = b.size(x, dim)
    if not isinstance(size, int):
        return b.emit(aten.chunk.default, x, chunks, dim)
    each = -(-size // chunks)
    return b.call(aten.split_with_sizes.default, x, [min(each, size - i) for i in range(0, size, each)], dim)


def _split(b: "Builder", x: Any, each: Any, dim: int = 0) -> Any:
    size = b.size(x, dim)
    if not isinstance(size, int) or not isinstance(each, int):
        return b.emit(aten.split.Tensor, x, each, dim)
    return b.call(aten.split_with_sizes.default, x, [min(each, size - i) for i in range(0, size, each)], dim)


REWRITES: dict[Any, Callable[..., Any]] = {
    aten.conv1d.default: _convolution(1),
    aten.conv2d.default: _convolution(2),
    aten.conv3d.default: _convolution(3),
    aten.conv1d.padding: _same_convolution(1),
    aten.conv2d.padding: _same_convolution(2),
    aten.conv3d.padding: _same_convolution(3),
    aten.conv_transpose1d.default: _transposed(1),
    aten.conv_transpose2d.input: _transposed(2),
    aten.conv_transpose3d.input: _transposed(3),
    aten._convolution_mode.default: _convolution_mode,
    aten.pad.default: _pad,
    aten._convolution.default: lambda b, *args: b.call(aten.convolution.default, *args[:9]),
    aten._convolution.deprecated: lambda b, *args: b.call(aten.convolution.default, *args[:9]),
    aten.batch_norm.default: _canonical_batch_norm,
    aten._native_batch_norm_legit.no_stats: _statistics_of_one,
    aten.cudnn_batch_norm.default: _batch_norm,
    aten.native_batch_norm.default: lambda b, *args: [_batch_norm(b, *args), None, None],
    aten._native_batch_norm_legit_no_training.default: _native_batch_norm,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.alpha_dropout.default: _dropout,
    aten.feature_alpha_dropout.default: _dropout,
    aten.native_dropout.default: _native_dropout,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast_by_keyword,
    aten.to.device: _cast_to_device,
    aten.to.other: _cast_like,
    aten.to.prim_Device: _cast_to_device,
    aten.to.prim_dtype: _cast,
    aten.type_as.default: _cast_like,
    aten._to_copy.default: _copying_cast,
    aten.alias.default: _identity,
    aten.clone.default: _copy,
    aten.lift_fresh_copy.default: _copy,
    aten.lift_fresh.default: _identity,
    aten.detach_copy.default: lambda b, x: b.fresh(b.call(aten.detach.default, x)),
    aten.contiguous.default: _contiguous,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.view.dtype: _view_dtype,
    aten.view_as.default: lambda b, x, other: b.call(aten.reshape.default, x, b.sizes(other)),
    aten.reshape_as.default: lambda b, x, other: b.call(aten.reshape.default, x, b.sizes(other)),
    aten.expand_as.default: lambda b, x, other: b.call(aten.expand.default, x, b.sizes(other)),
    aten.flatten.using_ints: _flatten,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.where.Scalar: _where,
    aten.where.ScalarSelf: _where,
    aten.where.ScalarOther: _where,
    aten.copy.default: lambda b, x, source, *_: inplace.filled(b, x, source),
    aten.fill.Scalar: inplace.filled,
    aten.fill.Tensor: inplace.filled,
    aten.instance_norm.default: _instance_norm,
    aten.rrelu.default: _rrelu,
    aten.hardsigmoid.default: _hardsigmoid,
    aten.relu6.default: _relu6,
    aten.chunk.default: _chunk,
    aten.split.Tensor: _split,
    aten.split.sizes: _split_sizes,
    aten._softmax.default: lambda b, x, dim, half: b.call(aten.softmax.int, x, dim),
    aten._log_softmax.default: lambda b, x, dim, half: b.call(aten.log_softmax.int, x, dim),
    aten._adaptive_avg_pool2d.default: lambda b, x, size: b.call(aten.adaptive_avg_pool2d.default, x, size),
    aten._adaptive_avg_pool3d.default: lambda b, x, size: b.call(aten.adaptive_avg_pool3d.default, x, size),
    aten.native_group_norm.default: _native_group_norm,
    aten.native_layer_norm.default: lambda b, x, s, w, c, eps: [
        b.call(aten.layer_norm.default, x, s, w, c, eps),
        None,
        None,
    ],
    aten.add.Tensor: _with_scalar(aten.add.Tensor),
    aten.sub.Tensor: _with_scalar(aten.sub.Tensor),
    aten.mul.Tensor: _with_scalar(aten.mul.Tensor),
    aten.div.Tensor: _with_scalar(aten.div.Tensor),
}


def canonical_name(op: Any) -> str:
    """The op's name as people write it: `aten.relu`, with the overload only where it is not the default."""
    name, overload = op._schema.name.split("::")[1], op._schema.overload_name
    return f"aten.{name}" + (f".{overload}" if overload else "")
