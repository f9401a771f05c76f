"""The op table: every ATen overload that a canonical graph may hold, by class.

What is not in this table is refused at import: neither a front end nor a pass ever runs it. The class says what a rule
needs to know about an op; it says nothing about a node, which may be linear only because one operand is constant.
"""

import math
import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

aten = torch.ops.aten


class OpClass(Enum):
    """What an op is, to a method that propagates through it."""

    LINEAR = "linear"
    AFFINE = "affine"
    SMOOTH = "smooth unary nonlinearity"
    KINKED = "kinked unary nonlinearity"
    BILINEAR = "bilinear"
    POOLING = "pooling"
    NORMALISATION = "normalisation"
    RECURRENT = "recurrent layer"
    INDEXING = "indexing"
    SHAPE = "shape"
    CREATION = "creation"
    DISCRETE = "discrete"


_NAMES = {
    OpClass.LINEAR: """
        dropout.default
        convolution.default linear.default addmm.default sum.default sum.dim_IntList mean.default mean.dim neg.default
        avg_pool1d.default avg_pool2d.default avg_pool3d.default adaptive_avg_pool1d.default
        adaptive_avg_pool2d.default adaptive_avg_pool3d.default constant_pad_nd.default reflection_pad1d.default
        reflection_pad2d.default reflection_pad3d.default replication_pad1d.default replication_pad2d.default
        replication_pad3d.default upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec
        upsample_linear1d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec upsample_trilinear3d.vec
        upsample_nearest1d.default upsample_nearest2d.default upsample_nearest3d.default upsample_linear1d.default
        upsample_bilinear2d.default upsample_bicubic2d.default upsample_trilinear3d.default
        _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec _upsample_nearest_exact3d.vec
        _upsample_nearest_exact1d.default _upsample_nearest_exact2d.default _upsample_nearest_exact3d.default
        _upsample_bilinear2d_aa.vec _upsample_bilinear2d_aa.default _upsample_bicubic2d_aa.vec
        _upsample_bicubic2d_aa.default cumsum.default im2col.default col2im.default affine_grid_generator.default
        trace.default diff.default""",
    OpClass.AFFINE: """
        add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor mul.Scalar div.Scalar batch_norm.default
        lerp.Scalar lerp.Tensor""",
    OpClass.SMOOTH: """
        sigmoid.default tanh.default gelu.default silu.default mish.default softplus.default elu.default selu.default
        celu.default log_sigmoid.default exp.default expm1.default log.default log2.default log10.default log1p.default
        sqrt.default rsqrt.default reciprocal.default square.default erf.default sin.default cos.default tan.default
        asin.default acos.default atan.default sinh.default cosh.default asinh.default acosh.default atanh.default
        pow.Tensor_Scalar pow.Scalar exp2.default erfc.default erfinv.default lgamma.default digamma.default i0.default
        sinc.default logit.default polygamma.default special_entr.default special_ndtr.default special_log_ndtr.default
        special_erfcx.default special_i0e.default special_i1.default special_i1e.default""",
    OpClass.KINKED: """
        relu.default leaky_relu.default prelu.default hardtanh.default hardswish.default clamp.default
        clamp.Tensor clamp_min.default clamp_max.default clamp_min.Tensor clamp_max.Tensor abs.default
        threshold.default softshrink.default hardshrink.default nan_to_num.default frac.default copysign.Scalar""",
    OpClass.BILINEAR: """
        mul.Tensor div.Tensor div.Tensor_mode matmul.default mm.default bmm.default mv.default dot.default
        baddbmm.default einsum.default pow.Tensor_Tensor scaled_dot_product_attention.default addcmul.default
        addcdiv.default prod.default prod.dim_int remainder.Tensor remainder.Scalar fmod.Tensor fmod.Scalar
        atan2.default cumprod.default grid_sampler_2d.default grid_sampler_3d.default linalg_det.default addbmm.default
        addmv.default addr.default bilinear.default linalg_cross.default tensordot.default inner.default kron.default
        linalg_multi_dot.default linalg_matrix_power.default copysign.Tensor xlogy.Tensor logaddexp.default
        logaddexp2.default hypot.default""",
    OpClass.POOLING: """
        max_pool1d.default max_pool2d.default max_pool3d.default max_pool1d_with_indices.default
        max_pool2d_with_indices.default max_pool3d_with_indices.default
        adaptive_max_pool1d.default adaptive_max_pool2d.default adaptive_max_pool3d.default amax.default amin.default
        max.default min.default max.dim min.dim maximum.default minimum.default fmax.default fmin.default topk.default
        sort.default sort.stable scatter_reduce.two median.default median.dim nanmedian.default nanmedian.dim
        kthvalue.default mode.default cummax.default cummin.default aminmax.default""",
    OpClass.NORMALISATION: """
        softmax.int log_softmax.int layer_norm.default group_norm.default instance_norm.default rms_norm.default
        var.correction std.correction linalg_vector_norm.default
        var_mean.correction std_mean.correction logsumexp.default logcumsumexp.default _safe_softmax.default
        cdist.default pairwise_distance.default dist.default linalg_norm.default
        linalg_norm.ord_str linalg_matrix_norm.default linalg_matrix_norm.str_ord nansum.default
        nanmean.default renorm.default""",
    OpClass.RECURRENT: """
        lstm.input gru.input rnn_tanh.input rnn_relu.input lstm_cell.default gru_cell.default rnn_tanh_cell.default
        rnn_relu_cell.default""",
    OpClass.INDEXING: """
        select.int slice.Tensor narrow.default index.Tensor index_select.default gather.default take_along_dim.default
        embedding.default cat.default stack.default where.self select_scatter.default slice_scatter.default scatter.src
        scatter.value scatter_add.default index_put.default split.Tensor split_with_sizes.default chunk.default
        unbind.int tensor_split.sections tensor_split.indices flip.default roll.default repeat.default
        repeat_interleave.self_int masked_fill.Scalar masked_fill.Tensor tril.default triu.default pixel_shuffle.default
        pixel_unshuffle.default diagonal.default channel_shuffle.default embedding_bag.padding_idx max_unpool2d.default
        max_unpool3d.default diag_embed.default rot90.default index_add.default index_copy.default
        index_fill.int_Scalar index_fill.int_Tensor masked_scatter.default put.default take.default
        diagonal_scatter.default""",
    OpClass.SHAPE: """
        reshape.default unflatten.int permute.default transpose.int t.default numpy_T.default mT.default movedim.int
        movedim.intlist unsqueeze.default squeeze.dims expand.default broadcast_to.default detach.default to.dtype
        unfold.default""",
    OpClass.CREATION: """
        arange.default arange.start arange.start_step full.default zeros.default ones.default
        scalar_tensor.default zeros_like.default ones_like.default full_like.default new_zeros.default
        new_ones.default new_full.default eye.default eye.m linspace.default meshgrid.default meshgrid.indexing""",
    OpClass.DISCRETE: """
        eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor
        ge.Scalar logical_and.default logical_or.default logical_not.default logical_xor.default bitwise_and.Tensor
        bitwise_or.Tensor bitwise_not.default bitwise_xor.Tensor bitwise_left_shift.Tensor bitwise_right_shift.Tensor
        argmax.default argmin.default floor.default
        ceil.default round.default trunc.default sign.default isnan.default isinf.default isfinite.default any.default
        any.dim all.default all.dim floor_divide.default floor_divide.Scalar one_hot.default argsort.default
        nonzero.default argsort.stable any.dims all.dims isin.Tensor_Tensor isin.Tensor_Scalar bucketize.Tensor
        searchsorted.Tensor isclose.default isposinf.default isneginf.default count_nonzero.default
        count_nonzero.dim_IntList heaviside.default signbit.default round.decimals""",
}


def _resolve(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(aten, packet, None), overload, None)


TABLE: dict[Any, OpClass] = {
    op: kind for kind, names in _NAMES.items() for name in names.split() if (op := _resolve(name)) is not None
}

PYTHON: dict[Callable[..., Any], str] = {
    operator.getitem: "getitem",
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.floordiv: "floordiv",
    operator.truediv: "truediv",
    operator.mod: "mod",
    operator.neg: "neg",
    operator.pow: "pow",
    math.ceil: "ceil",
    math.floor: "floor",
    math.sqrt: "sqrt",
    min: "min",
    max: "max",
}
"""Python functions on sizes that a graph may call: all that arithmetic on a free batch needs."""

SIZE = aten.sym_size.int
LIKE = frozenset(
    (
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
    )
)
"""Ops that read of a tensor its size alone, as SIZE does."""

_RANDOM = """rand rand_like randn randn_like randint randint_like randperm normal normal_ uniform uniform_ bernoulli
    bernoulli_ multinomial poisson exponential exponential_ rrelu"""
RANDOM = frozenset(_RANDOM.split())
"""Names of ops that draw random numbers: with one, no attribution would be repeatable."""


def classify(op: Any) -> OpClass | None:
    """Return the class of an ATen overload, SHAPE for size arithmetic, None for what the table does not hold."""
    if op is SIZE or op in PYTHON:
        return OpClass.SHAPE
    return TABLE.get(op)
