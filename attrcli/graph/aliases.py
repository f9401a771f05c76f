"""Other names of an operation, copying variants of views, and small compositions: each becomes what it stands for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from attrcli.graph.build import Builder

aten = torch.ops.aten

_NAMES = """
    absolute:abs adjoint:mT arccos:acos arccosh:acosh arcsin:asin arcsinh:asinh arctan:atan arctan2:atan2 arctanh:atanh
    clip:clamp concat:cat concatenate:cat det:linalg_det divide:div fix:trunc ger:outer greater:gt
    greater_equal:ge less:lt less_equal:le linalg_matmul:matmul matrix_H:mT matrix_power:linalg_matrix_power mH:mT
    moveaxis:movedim multiply:mul native_channel_shuffle:channel_shuffle negative:neg not_equal:ne _prelu_kernel:prelu
    sgn:sign special_digamma:digamma special_erf:erf special_erfc:erfc special_erfinv:erfinv special_exp2:exp2
    special_expit:sigmoid special_expm1:expm1 special_gammaln:lgamma special_i0:i0 special_log1p:log1p
    special_log_softmax:log_softmax special_logit:logit special_logsumexp:logsumexp special_polygamma:polygamma
    special_psi:digamma special_round:round special_sinc:sinc special_softmax:softmax special_xlogy:xlogy subtract:sub
    swapaxes:transpose swapdims:transpose true_divide:div vdot:dot __and__:bitwise_and __iand__:bitwise_and_
    __ior__:bitwise_or_ __ixor__:bitwise_xor_ __or__:bitwise_or __xor__:bitwise_xor __lshift__:bitwise_left_shift
    __rshift__:bitwise_right_shift __ilshift__:bitwise_left_shift_ __irshift__:bitwise_right_shift_"""

_COPIES = (
    "alias diagonal expand permute select slice split split_with_sizes squeeze t transpose unbind unfold unsqueeze view"
)

_OVERLOADS = {"log_softmax": "int", "softmax": "int", "transpose": "int", "xlogy": "Tensor"}
"""The overload that an alias named 'default' stands for, where that is not 'default' too."""


def _forwarded(op: Any) -> Callable[..., Any]:
    return lambda b, *args, **kwargs: b.call(op, *args, **kwargs)


def _copied(op: Any) -> Callable[..., Any]:
    def rewrite(b: "Builder", *args: Any, **kwargs: Any) -> Any:
        result = b.call(op, *args, **kwargs)
        return [b.fresh(item) for item in result] if isinstance(result, list) else b.fresh(result)

    return rewrite


def _all_aliases() -> dict[Any, Callable[..., Any]]:
    """Every functional overload of every alias."""
    found: dict[Any, Callable[..., Any]] = {}
    for pair in _NAMES.split():
        alias, name = pair.split(":")
        found |= _overloads(alias, name, _forwarded)
    for name in _COPIES.split():
        found |= _overloads(f"{name}_copy", name, _copied)
    for name in ("chunk", "split", "split_with_sizes"):
        found |= _overloads(f"unsafe_{name}", name, _copied)
    return found


def _overloads(alias: str, name: str, make: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    theirs, ours = getattr(aten, alias), getattr(aten, name)
    found = {}
    for overload in theirs.overloads():
        same = _OVERLOADS.get(name, overload) if overload == "default" else overload
        if "out" not in overload and same in ours.overloads():
            found[getattr(theirs, overload)] = make(getattr(ours, same))
    return found


# -- compositions ----------------------------------------------------------------------------------------------------


def _identity(b: "Builder", x: Any) -> Any:
    return x


def _scaled(factor: float) -> Callable[..., Any]:
    return lambda b, x: b.call(aten.mul.Scalar, x, factor)


def _tile(b: "Builder", x: Any, times: Any) -> Any:
    return b.call(aten.repeat.default, x, [1] * (x.rank - len(times)) + list(times))


def _outer(b: "Builder", x: Any, y: Any) -> Any:
    return b.call(aten.mul.Tensor, b.call(aten.unsqueeze.default, x, 1), y)


def _vecdot(b: "Builder", x: Any, y: Any, *, dim: int = -1) -> Any:
    return b.call(aten.sum.dim_IntList, b.call(aten.mul.Tensor, x, y), [dim])


def _cross(b: "Builder", x: Any, y: Any, dim: int | None = None) -> Any:
    if dim is None:
        dim = next(place for place in range(x.rank) if b.size(x, place) == 3)
    return b.call(aten.linalg_cross.default, x, y, dim=dim)


def _split_along(dim: int) -> Callable[..., Any]:
    """hsplit, vsplit and dsplit, by a number of parts or by places."""

    def rewrite(b: "Builder", x: Any, parts: Any) -> Any:
        op = aten.tensor_split.sections if isinstance(parts, int) else aten.tensor_split.indices
        return b.call(op, x, parts, min(dim, x.rank - 1))

    return rewrite


def _at_least(rank: int) -> Callable[..., Any]:
    """A tensor with ones added to its shape: before it, and the third one behind."""

    def one(b: "Builder", x: Any) -> Any:
        for place in range(x.rank, rank):
            x = b.call(aten.unsqueeze.default, x, 2 if place == 2 else 0)
        return x

    return lambda b, x: [one(b, item) for item in x] if isinstance(x, list) else one(b, x)


def _stacked(rank: int, dim: int) -> Callable[..., Any]:
    """hstack, vstack and dstack."""

    def rewrite(b: "Builder", tensors: Any) -> Any:
        tensors = _at_least(rank)(b, tensors)
        return b.call(aten.cat.default, tensors, min(dim, tensors[0].rank - 1))

    return rewrite


def _column_stack(b: "Builder", tensors: Any) -> Any:
    columns = [b.call(aten.unsqueeze.default, x, 1) if x.rank == 1 else x for x in tensors]
    return b.call(aten.cat.default, columns, 1)


def _flipped(dim: int) -> Callable[..., Any]:
    return lambda b, x: b.call(aten.flip.default, x, [dim])


def _diagonal(b: "Builder", x: Any, offset: int = 0) -> Any:
    if x.rank == 1:
        return b.call(aten.diag_embed.default, x, offset)
    return b.fresh(b.call(aten.diagonal.default, x, offset))


def _linalg_diagonal(b: "Builder", x: Any, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    return b.call(aten.diagonal.default, x, offset, dim1, dim2)


def _repeat_rows(b: "Builder", x: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> Any:
    """Each row repeated by a count of its own, which the file must hold."""
    if repeats.data or repeats.probes[0].is_meta:
        b.unsupported("aten.repeat_interleave by counts that are no constants of the model")
    if dim is None:
        x, dim = b.call(aten.reshape.default, x, [-1]), 0
    index = torch.repeat_interleave(repeats.probes[0].expand(x.probes[0].shape[dim]))
    return b.call(aten.index_select.default, x, dim, b.tensor(index, "repeats"))


def _weight_norm(b: "Builder", v: Any, g: Any, dim: int = 0) -> Any:
    dims = None if dim == -1 else [other for other in range(v.rank) if other != dim]
    length = b.call(aten.linalg_vector_norm.default, v, 2, dims, dim != -1)
    return b.call(aten.mul.Tensor, v, b.call(aten.div.Tensor, g, length))


def _bag(b: "Builder", table: Any, ids: Any, starts: Any, *args: Any) -> Any:
    """embedding_bag without an id of padding, or with -1 for none."""
    defaults = (False, 0, False, None, False, -1)
    rest = (*args, *defaults[len(args) :])
    padding = None if rest[5] == -1 else rest[5]
    return b.call(aten.embedding_bag.padding_idx, table, ids, starts, *rest[:5], padding)


def _without(op: Any, outputs: int) -> Callable[..., Any]:
    """An op that returns what only its backward needs beside its result."""
    return lambda b, *args, **kwargs: [b.call(op, *args, **kwargs), *[None] * outputs]


def _broadcast(b: "Builder", tensors: Any) -> Any:
    """All tensors expanded to the shape that they have together."""
    rank = max(x.rank for x in tensors)
    sizes: list[Any] = [1] * rank
    for x in tensors:
        for place, size in enumerate(b.sizes(x), rank - x.rank):
            sizes[place] = sizes[place] if size == 1 else size
    return [b.call(aten.expand.default, x, sizes) for x in tensors]


def _cosine_similarity(b: "Builder", x: Any, y: Any, dim: Any = 1, eps: Any = 1e-8) -> Any:
    def unit(z: Any) -> Any:
        length = b.call(aten.linalg_vector_norm.default, z, 2, [dim], True)
        return b.call(aten.div.Tensor, z, b.call(aten.clamp_min.default, length, eps))

    if x.probes[0].shape != y.probes[0].shape:
        x, y = _broadcast(b, [x, y])
    return b.call(aten.sum.dim_IntList, b.call(aten.mul.Tensor, unit(x), unit(y)), [dim])


def _emptied(op: Any) -> Callable[..., Any]:
    """A tensor that nobody has written to yet, as zeros: whatever reads it then finds the same on every run."""
    return lambda b, *args, memory_format=None, **kwargs: b.call(op, *args, **kwargs)


COMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **_all_aliases(),
    aten.max.other: _forwarded(aten.maximum.default),
    aten.min.other: _forwarded(aten.minimum.default),
    aten.positive.default: _identity,
    aten.resolve_conj.default: _identity,
    aten.resolve_neg.default: _identity,
    aten.conj.default: _identity,
    aten.real.default: _identity,
    aten.deg2rad.default: _scaled(torch.pi / 180),
    aten.rad2deg.default: _scaled(180 / torch.pi),
    aten.tile.default: _tile,
    aten.outer.default: _outer,
    aten.linalg_vecdot.default: _vecdot,
    aten.cross.default: _cross,
    aten.hsplit.int: _split_along(1),
    aten.hsplit.array: _split_along(1),
    aten.vsplit.int: _split_along(0),
    aten.vsplit.array: _split_along(0),
    aten.dsplit.int: _split_along(2),
    aten.dsplit.array: _split_along(2),
    aten.ravel.default: lambda b, x: b.call(aten.reshape.default, x, [-1]),
    aten.atleast_1d.default: _at_least(1),
    aten.atleast_2d.default: _at_least(2),
    aten.atleast_3d.default: _at_least(3),
    aten.atleast_1d.Sequence: _at_least(1),
    aten.atleast_2d.Sequence: _at_least(2),
    aten.atleast_3d.Sequence: _at_least(3),
    aten.hstack.default: _stacked(1, 1),
    aten.vstack.default: _stacked(2, 0),
    aten.row_stack.default: _stacked(2, 0),
    aten.dstack.default: _stacked(3, 2),
    aten.column_stack.default: _column_stack,
    aten.fliplr.default: _flipped(1),
    aten.flipud.default: _flipped(0),
    aten.msort.default: lambda b, x: b.call(aten.sort.default, x, 0)[0],
    aten.diag.default: _diagonal,
    aten.diagflat.default: lambda b, x, offset=0: _diagonal(b, b.call(aten.reshape.default, x, [-1]), offset),
    aten.linalg_diagonal.default: _linalg_diagonal,
    aten.narrow.Tensor: lambda b, x, dim, start, length: b.call(aten.narrow.default, x, dim, b.item(start), length),
    aten.repeat_interleave.self_Tensor: _repeat_rows,
    aten.broadcast_tensors.default: _broadcast,
    aten.cosine_similarity.default: _cosine_similarity,
    aten._weight_norm.default: _weight_norm,
    aten._weight_norm_interface.default: _without(aten._weight_norm.default, 1),
    aten.log_sigmoid_forward.default: _without(aten.log_sigmoid.default, 1),
    aten._fused_rms_norm.default: _without(aten.rms_norm.default, 1),
    aten._cdist_forward.default: _forwarded(aten.cdist.default),
    aten._euclidean_dist.default: _forwarded(aten.cdist.default),
    aten.embedding_bag.default: _bag,
    aten._embedding_bag.default: _bag,
    aten._embedding_bag_forward_only.default: _bag,
    aten.empty.memory_format: _emptied(aten.zeros.default),
    aten.empty_like.default: _emptied(aten.zeros_like.default),
    aten.new_empty.default: _emptied(aten.new_zeros.default),
}
"""Rewrites that say nothing but another spelling; canonical.py joins them with those of its own."""
