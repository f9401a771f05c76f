"""One spelling per operation: overloads that mean the same as another become it, when the graph is built."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attrcli.graph import inplace, layers
from attrcli.graph.aliases import COMPOSITIONS
from attrcli.graph.fused import FUSED
from attrcli.graph.value import probe

if TYPE_CHECKING:
    from attrcli.graph.build import Builder

aten = torch.ops.aten


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


def _as_strided(b: "Builder", x: Any, sizes: Any, strides: Any, offset: Any = None) -> Any:
    """Only where each element stays what it is: the memory of a tensor is no part of the graph."""
    for index in (0, 1):
        held = x.probes[index]
        wanted = probe(sizes, index), probe(strides, index)
        kept = tuple(wanted[0]) == tuple(held.shape) and offset in (None, held.storage_offset())
        if not kept or any(
            size > 1 and mine != theirs for size, mine, theirs in zip(*wanted, held.stride(), strict=True)
        ):
            b.unsupported("op aten.as_strided")
    return x


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


def _rrelu(b: "Builder", x: Any, lower: Any = 1 / 8, upper: Any = 1 / 3, training: Any = False, *_: Any) -> Any:
    if training:
        b.refuse("rrelu in training mode: save the model after model.eval()")
    return b.call(aten.leaky_relu.default, x, (lower + upper) / 2)


def _with_correction(op: Any) -> Callable[..., Any]:
    """Variance and deviation, `unbiased` or not."""

    def rewrite(b: "Builder", x: Any, dim: Any = None, unbiased: Any = True, keepdim: Any = False) -> Any:
        return b.call(op, x, dim, correction=1 if unbiased else 0, keepdim=keepdim)

    return rewrite


def _of_all(op: Any) -> Callable[..., Any]:
    return lambda b, x, unbiased=True: b.call(op, x, None, correction=1 if unbiased else 0)


def _norm(b: "Builder", x: Any, p: Any = 2, dim: Any = None, keepdim: Any = False) -> Any:
    return b.call(aten.linalg_vector_norm.default, x, 2 if p is None else p, dim, keepdim)


def _grid_sampler(b: "Builder", x: Any, grid: Any, *args: Any) -> Any:
    op = aten.grid_sampler_2d.default if x.rank == 4 else aten.grid_sampler_3d.default
    return b.call(op, x, grid, *args)


def _glu(b: "Builder", x: Any, dim: Any = -1) -> Any:
    first, second = b.call(aten.chunk.default, x, 2, dim)
    return b.call(aten.mul.Tensor, first, b.call(aten.sigmoid.default, second))


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
    **COMPOSITIONS,
    **FUSED,
    aten.conv1d.default: layers.convolution(1),
    aten.conv2d.default: layers.convolution(2),
    aten.conv3d.default: layers.convolution(3),
    aten.conv1d.padding: layers.same_convolution(1),
    aten.conv2d.padding: layers.same_convolution(2),
    aten.conv3d.padding: layers.same_convolution(3),
    aten.conv_transpose1d.default: layers.transposed(1),
    aten.conv_transpose2d.input: layers.transposed(2),
    aten.conv_transpose3d.input: layers.transposed(3),
    aten._convolution_mode.default: layers.convolution_mode,
    aten.conv_tbc.default: layers.convolution_time_first,
    aten.pad.default: layers.pad,
    aten._pad_circular.default: layers.circular_pad,
    aten._convolution.default: lambda b, *args: b.call(aten.convolution.default, *args[:9]),
    aten._convolution.deprecated: lambda b, *args: b.call(aten.convolution.default, *args[:9]),
    aten.batch_norm.default: layers.batch_norm,
    aten.native_batch_norm.default: layers.native_batch_norm,
    aten._native_batch_norm_legit.default: layers.native_batch_norm,
    aten._native_batch_norm_legit.no_stats: layers.native_batch_norm_no_stats,
    aten._native_batch_norm_legit_no_training.default: layers.native_batch_norm_inference,
    aten.cudnn_batch_norm.default: lambda b, *args: [*layers.native_batch_norm(b, *args), None],
    aten.dropout.default: layers.dropout,
    aten.feature_dropout.default: layers.dropout,
    aten.alpha_dropout.default: layers.dropout,
    aten.feature_alpha_dropout.default: layers.dropout,
    aten.native_dropout.default: layers.native_dropout,
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
    aten.as_strided.default: _as_strided,
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
    aten.instance_norm.default: layers.instance_norm,
    aten.rrelu.default: _rrelu,
    aten.hardsigmoid.default: _hardsigmoid,
    aten.relu6.default: _relu6,
    aten.norm.Scalar: _norm,
    aten.norm.ScalarOpt_dim: _norm,
    aten.grid_sampler.default: _grid_sampler,
    aten.glu.default: _glu,
    aten.max_pool1d_with_indices.default: layers.pool_and_indices(
        aten.max_pool1d.default, aten.max_pool1d_with_indices.default
    ),
    aten.max_pool2d_with_indices.default: layers.pool_and_indices(
        aten.max_pool2d.default, aten.max_pool2d_with_indices.default
    ),
    aten.max_pool3d_with_indices.default: layers.pool_and_indices(
        aten.max_pool3d.default, aten.max_pool3d_with_indices.default
    ),
    aten.var.dim: _with_correction(aten.var.correction),
    aten.std.dim: _with_correction(aten.std.correction),
    aten.var_mean.dim: _with_correction(aten.var_mean.correction),
    aten.std_mean.dim: _with_correction(aten.std_mean.correction),
    aten.var.default: _of_all(aten.var.correction),
    aten.std.default: _of_all(aten.std.correction),
    aten.var_mean.default: _of_all(aten.var_mean.correction),
    aten.std_mean.default: _of_all(aten.std_mean.correction),
    aten.chunk.default: _chunk,
    aten.split.Tensor: _split,
    aten.split.sizes: _split_sizes,
    aten._softmax.default: lambda b, x, dim, half: b.call(aten.softmax.int, x, dim),
    aten._log_softmax.default: lambda b, x, dim, half: b.call(aten.log_softmax.int, x, dim),
    aten._adaptive_avg_pool2d.default: lambda b, x, size: b.call(aten.adaptive_avg_pool2d.default, x, size),
    aten._adaptive_avg_pool3d.default: lambda b, x, size: b.call(aten.adaptive_avg_pool3d.default, x, size),
    aten.native_group_norm.default: layers.native_group_norm,
    aten.native_layer_norm.default: lambda b, x, s, w, c, eps: [
        b.call(aten.layer_norm.default, x, s, w, c, eps),
        None,
        None,
    ],
    aten.add.Tensor: _with_scalar(aten.add.Tensor),
    aten.sub.Tensor: _with_scalar(aten.sub.Tensor),
    aten.mul.Tensor: _with_scalar(aten.mul.Tensor),
    aten.div.Tensor: _with_scalar(aten.div.Tensor),
    aten.bitwise_and.Scalar: _with_scalar(aten.bitwise_and.Tensor),
    aten.bitwise_and.Scalar_Tensor: _with_scalar(aten.bitwise_and.Tensor),
    aten.bitwise_or.Scalar: _with_scalar(aten.bitwise_or.Tensor),
    aten.bitwise_or.Scalar_Tensor: _with_scalar(aten.bitwise_or.Tensor),
    aten.bitwise_xor.Scalar: _with_scalar(aten.bitwise_xor.Tensor),
    aten.bitwise_xor.Scalar_Tensor: _with_scalar(aten.bitwise_xor.Tensor),
    aten.__lshift__.Scalar: _with_scalar(aten.bitwise_left_shift.Tensor),
    aten.__ilshift__.Scalar: lambda b, x, bits: b.call(aten.bitwise_left_shift_.Tensor, x, b.as_tensor(bits)),
    aten.bitwise_left_shift.Tensor_Scalar: _with_scalar(aten.bitwise_left_shift.Tensor),
    aten.bitwise_left_shift.Scalar_Tensor: _with_scalar(aten.bitwise_left_shift.Tensor),
    aten.__rshift__.Scalar: _with_scalar(aten.bitwise_right_shift.Tensor),
    aten.__irshift__.Scalar: lambda b, x, bits: b.call(aten.bitwise_right_shift_.Tensor, x, b.as_tensor(bits)),
    aten.bitwise_right_shift.Tensor_Scalar: _with_scalar(aten.bitwise_right_shift.Tensor),
    aten.bitwise_right_shift.Scalar_Tensor: _with_scalar(aten.bitwise_right_shift.Tensor),
}


def canonical_name(op: Any) -> str:
    """The op's name as people write it: `aten.relu`, with the overload only where it is not the default."""
    name, overload = op._schema.name.split("::")[1], op._schema.overload_name
    return f"aten.{name}" + (f".{overload}" if overload else "")
