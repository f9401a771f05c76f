"""Every op of the op table called alone on z (N, 4, 6), or (N, 1, 4, 6) where it is one for pictures: by name."""

from collections.abc import Callable

import torch
from torch import Tensor

from attrcli.graph import ops
from attrcli.graph.ops import OpClass

aten = torch.ops.aten
OP = {str(op).removeprefix("aten."): op for op in ops.TABLE}
G = torch.Generator().manual_seed(5)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def positive(z: Tensor) -> Tensor:
    return torch.nn.functional.softplus(z) + 0.1


def other(z: Tensor) -> Tensor:
    """Another tensor of the shape of z that moves with it, and is of neither sign."""
    return z.roll(1, 2).sin() + 0.3


W, V, B = rand(5, 6), rand(6, 5), rand(5)
K, C, D, S = rand(3, 4, 3), rand(4), rand(4, 6), rand(6)
CUBE, THREE = rand(3, 6, 6), rand(3)
SQUARE = rand(6, 6)
IDS = torch.tensor([[0, 2, 1, 3, 5, 4]])


def picture(z: Tensor) -> Tensor:
    return z.unsqueeze(1)


def volume(z: Tensor) -> Tensor:
    return z.unflatten(1, (1, 2, 2))


def mask(z: Tensor) -> Tensor:
    return z > 0.2


def places(z: Tensor) -> Tensor:
    """Indices that move."""
    return z.argsort(2)


def rows(z: Tensor) -> Tensor:
    return z.select(1, 0)


def _on(function: Callable[[Tensor], Tensor], *names: str, given: tuple = ()) -> dict[str, Callable]:
    return {name: lambda z, name=name: OP[name](function(z), *given) for name in names}


def _two(second: Callable[[Tensor], Tensor], *names: str, first: Callable = lambda z: z) -> dict[str, Callable]:
    return {name: lambda z, name=name: OP[name](first(z), second(z)) for name in names}


DOMAIN = {
    "log.default": positive, "log2.default": positive, "log10.default": positive, "log1p.default": positive,
    "sqrt.default": positive, "rsqrt.default": positive, "reciprocal.default": positive, "lgamma.default": positive,
    "digamma.default": positive, "asin.default": lambda z: z.tanh() / 2, "acos.default": lambda z: z.tanh() / 2,
    "atanh.default": lambda z: z.tanh() / 2, "erfinv.default": lambda z: z.tanh() / 2,
    "acosh.default": lambda z: positive(z) + 1, "logit.default": torch.sigmoid, "tan.default": lambda z: z.tanh(),
    "special_entr.default": positive, "special_log_ndtr.default": lambda z: z, "polygamma.default": None,
}  # fmt: skip
ARGS = {
    "leaky_relu.default": (0.1,), "hardtanh.default": (-0.5, 0.5), "clamp.default": (-0.4, 0.7),
    "clamp_min.default": (0.1,), "clamp_max.default": (0.1,), "threshold.default": (0.2, -1.0),
    "clamp.Tensor": (rand(6) - 2, rand(6) + 2), "clamp_min.Tensor": (rand(6),), "clamp_max.Tensor": (rand(6),),
    "copysign.Scalar": (-1.0,), "prelu.default": (rand(4),), "pow.Tensor_Scalar": (3,), "elu.default": (1.2,),
    "round.decimals": (),
}  # fmt: skip

CASES: dict[str, Callable] = {}
for _name in [*ops._NAMES[OpClass.SMOOTH].split(), *ops._NAMES[OpClass.KINKED].split()]:
    CASES |= _on(DOMAIN.get(_name) or (lambda z: z), _name, given=ARGS.get(_name, ()))
CASES |= {
    "pow.Scalar": lambda z: aten.pow.Scalar(2.0, z),
    "polygamma.default": lambda z: aten.polygamma(1, positive(z)),
}

# linear and affine
CASES |= {
    "convolution.default": lambda z: aten.convolution(z, K, None, [1], [1], [1], False, [0], 1),
    "linear.default": lambda z: aten.linear(z, W, B),
    "addmm.default": lambda z: aten.addmm(B, rows(z), V, beta=0.5, alpha=2),
    "avg_pool1d.default": lambda z: aten.avg_pool1d(z, 3, 2, 1, True),
    "avg_pool2d.default": lambda z: aten.avg_pool2d(picture(z), 3, 2, 1, True),
    "avg_pool3d.default": lambda z: aten.avg_pool3d(volume(z), 2),
    "adaptive_avg_pool1d.default": lambda z: aten.adaptive_avg_pool1d(z, [4]),
    "adaptive_avg_pool2d.default": lambda z: aten.adaptive_avg_pool2d(picture(z), [3, 4]),
    "adaptive_avg_pool3d.default": lambda z: aten.adaptive_avg_pool3d(volume(z), [1, 2, 4]),
    "constant_pad_nd.default": lambda z: aten.constant_pad_nd(z, [1, 2], 3.0),
    "col2im.default": lambda z: aten.col2im(z, [3, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    "im2col.default": lambda z: aten.im2col(picture(z), [2, 2], [1, 1], [0, 0], [1, 1]),
    "dropout.default": lambda z: aten.dropout(z, 0.5, False),
    "sum.dim_IntList": lambda z: aten.sum(z, [1], True),
    "mean.dim": lambda z: aten.mean(z, [2]),
    "cumsum.default": lambda z: aten.cumsum(z, 2),
    "diff.default": lambda z: aten.diff(z, 1, 2),
    "neg.default": lambda z: aten.neg(z),
    "batch_norm.default": lambda z: aten.batch_norm(z, C, C, C, C.exp(), False, 0.1, 1e-5, False),
    "add.Tensor": lambda z: aten.add(z, z.sin()[:, :1], alpha=2),
    "sub.Tensor": lambda z: aten.sub(z, z.sin()[:, :, :1], alpha=3),
    "rsub.Tensor": lambda z: aten.rsub(z, z.sin(), alpha=3),
    "add.Scalar": lambda z: aten.add(z, 2.0),
    "sub.Scalar": lambda z: aten.sub(z, 2.0),
    "rsub.Scalar": lambda z: aten.rsub(z, 2.0, 3),
    "mul.Scalar": lambda z: aten.mul(z, -2.0),
    "div.Scalar": lambda z: aten.div(z, -2.0),
    "lerp.Scalar": lambda z: aten.lerp(z, z.sin(), 0.3),
    "lerp.Tensor": lambda z: aten.lerp(z, z.sin(), z.sigmoid()),
}
for _dims, _pads, _to in ((1, [1, 2], lambda z: z), (2, [1, 2, 1, 2], picture), (3, [1] * 6, volume)):
    for _kind in ("reflection", "replication"):
        CASES |= _on(_to, f"{_kind}_pad{_dims}d.default", given=(_pads,))
    _size = [[9], [5, 9], [3, 5, 9]][_dims - 1]
    for _form in ("default", "vec"):
        for _kind in ("upsample_nearest", "_upsample_nearest_exact"):
            CASES |= _on(_to, f"{_kind}{_dims}d.{_form}", given=(_size, *([None] if _form == "vec" else [])))
    _kinds = [["linear1d"], ["bilinear2d", "bicubic2d"], ["trilinear3d"]][_dims - 1]
    for _kind in _kinds:
        CASES |= _on(_to, f"upsample_{_kind}.default", given=(_size, False))
        CASES |= _on(_to, f"upsample_{_kind}.vec", given=(_size, False, None))
for _kind in ("bilinear", "bicubic"):
    CASES |= _on(picture, f"_upsample_{_kind}2d_aa.default", given=([3, 4], False))
    CASES |= _on(picture, f"_upsample_{_kind}2d_aa.vec", given=([3, 4], False, None))

# two operands
CASES |= _two(
    other, "mul.Tensor", "atan2.default", "maximum.default", "minimum.default", "fmax.default", "fmin.default",
    "copysign.Tensor", "logaddexp.default", "logaddexp2.default", "hypot.default")  # fmt: skip
CASES |= _two(lambda z: positive(z.roll(1, 2)), "div.Tensor", "remainder.Tensor", "fmod.Tensor", "xlogy.Tensor")
CASES |= _two(other, "pow.Tensor_Tensor", first=positive)
CASES |= _two(lambda z: z.sin().transpose(1, 2), "matmul.default", "bmm.default")
CASES |= {
    "div.Tensor_mode": lambda z: z + aten.div(z, positive(other(z)), rounding_mode="floor"),
    "baddbmm.default": lambda z: aten.baddbmm(z[:, :, :4], z, z.cos().transpose(1, 2), beta=0.5, alpha=2),
    "einsum.default": lambda z: aten.einsum("nij,nkj,nlj->nikl", [z, z.sin(), z.cos()]),
    "scaled_dot_product_attention.default": lambda z: aten.scaled_dot_product_attention(z, z.sin(), z.cos()),
    "addcmul.default": lambda z: aten.addcmul(z, z.sin(), z.cos(), value=2),
    "addcdiv.default": lambda z: aten.addcdiv(z, z.sin(), positive(z), value=2),
    "prod.dim_int": lambda z: aten.prod(z, 2, True),
    "cumprod.default": lambda z: aten.cumprod(z, 2),
    "remainder.Scalar": lambda z: aten.remainder(z, 0.7),
    "fmod.Scalar": lambda z: aten.fmod(z, 0.7),
    "grid_sampler_2d.default": lambda z: aten.grid_sampler_2d(
        picture(z), z.tanh()[:, None, :, :4].reshape(-1, 2, 4, 2), 0, 0, False
    ),
    "grid_sampler_3d.default": lambda z: aten.grid_sampler_3d(volume(z), z.tanh().reshape(-1, 2, 2, 2, 3), 0, 0, False),
    "linalg_det.default": lambda z: aten.linalg_det(z[:, :, :4])[:, None],
    "bilinear.default": lambda z: aten.bilinear(z, z.sin(), CUBE, THREE),
    "linalg_cross.default": lambda z: aten.linalg_cross(z[:, :, :3], z.sin()[:, :, 3:], dim=2),
    "tensordot.default": lambda z: aten.tensordot(z, SQUARE, [2], [0]),
    "inner.default": lambda z: aten.inner(z, SQUARE),
    "kron.default": lambda z: aten.kron(rows(z), SQUARE[:1]),
    "linalg_multi_dot.default": lambda z: aten.linalg_multi_dot([rows(z), SQUARE, V]),
    "linalg_matrix_power.default": lambda z: aten.linalg_matrix_power(z[:, :, :4], 3),
    "mm.default": lambda z: aten.mm(rows(z), V),
    "mv.default": lambda z: aten.mv(rows(z), V[:, 0])[:, None],
    "addmv.default": lambda z: aten.addmv(z[:, 1, 0], rows(z), V[:, 0])[:, None],
}

# windows and orders
_sizes = ([4], [3, 4], [1, 2, 4])
for _dims, _to in ((1, lambda z: z), (2, picture), (3, volume)):
    _w = [3, 2, 1, 1, True] if _dims < 3 else [2, 1, 0, 1, False]
    CASES[f"max_pool{_dims}d.default"] = lambda z, name=f"max_pool{_dims}d.default", to=_to, w=_w: OP[name](to(z), *w)
    CASES[f"max_pool{_dims}d_with_indices.default"] = (
        lambda z, name=f"max_pool{_dims}d_with_indices.default", to=_to, w=_w: OP[name](to(z), *w)[0]
    )
    CASES[f"adaptive_max_pool{_dims}d.default"] = (
        lambda z, name=f"adaptive_max_pool{_dims}d.default", to=_to, s=_sizes[_dims - 1]: OP[name](to(z), s)[0]
    )
for _name in ("amax", "amin"):
    CASES |= _on(lambda z: z, f"{_name}.default", given=([1, 2], True))
for _name in ("max.dim", "min.dim", "cummax.default", "cummin.default", "median.dim", "nanmedian.dim", "mode.default"):
    CASES[_name] = lambda z, name=_name: OP[name](z, 2)[0]
CASES |= {
    "topk.default": lambda z: aten.topk(z, 2, 1)[0],
    "sort.default": lambda z: aten.sort(z, 1)[0] * torch.arange(4.0)[:, None],
    "sort.stable": lambda z: aten.sort(z, stable=True, dim=1)[0] * torch.arange(4.0)[:, None],
    "kthvalue.default": lambda z: aten.kthvalue(z, 2, 2, True)[0],
    "aminmax.default": lambda z: torch.cat(aten.aminmax(z, dim=2, keepdim=True), 2),
    "scatter_reduce.two": lambda z: aten.scatter_reduce(z, 2, IDS.expand(z.shape[0], 4, 6) // 2, z.sin(), "amax"),
}

# norms
CASES |= {
    "softmax.int": lambda z: aten.softmax(z, 2),
    "_safe_softmax.default": lambda z: aten._safe_softmax(z, 2),
    "log_softmax.int": lambda z: aten.log_softmax(z, 1),
    "layer_norm.default": lambda z: aten.layer_norm(z, [4, 6], D, D),
    "group_norm.default": lambda z: aten.group_norm(z, 2, C, C),
    "instance_norm.default": lambda z: aten.instance_norm(z, C, C, None, None, True, 0.1, 1e-5, False),
    "rms_norm.default": lambda z: aten.rms_norm(z, [6], S),
    "var.correction": lambda z: aten.var(z, [2], correction=0),
    "std.correction": lambda z: aten.std(z, [1, 2], keepdim=True),
    "var_mean.correction": lambda z: torch.cat(aten.var_mean(z, [2]), 1),
    "std_mean.correction": lambda z: torch.cat(aten.std_mean(z, [2]), 1),
    "linalg_vector_norm.default": lambda z: aten.linalg_vector_norm(z, float("inf"), [2], True),
    "linalg_norm.default": lambda z: aten.linalg_norm(z, None, [1, 2], True),
    "linalg_norm.ord_str": lambda z: aten.linalg_norm(z, "fro", [1, 2], True),
    "linalg_matrix_norm.str_ord": lambda z: aten.linalg_matrix_norm(z, "fro")[:, None],
    "linalg_matrix_norm.default": lambda z: aten.linalg_matrix_norm(z, 1.0)[:, None],
    "logsumexp.default": lambda z: aten.logsumexp(z, [1, 2])[:, None],
    "logcumsumexp.default": lambda z: aten.logcumsumexp(z, 2),
    "cdist.default": lambda z: aten.cdist(z, z.sin().roll(1, 2)),
    "pairwise_distance.default": lambda z: aten.pairwise_distance(z, z.sin().roll(1, 2)),
    "nansum.default": lambda z: aten.nansum(z, [2]),
    "nanmean.default": lambda z: aten.nanmean(z, [2]),
    "renorm.default": lambda z: aten.renorm(z, 2, 0, 1.0),
}

# indexing, with what may move moving
CASES |= {
    "select.int": lambda z: aten.select(z, 1, 2),
    "slice.Tensor": lambda z: aten.slice(z, 2, 1, 5, 2),
    "narrow.default": lambda z: aten.narrow(z, 2, 1, 3),
    "index.Tensor": lambda z: aten.index(z, [None, torch.tensor([0, 2, 2])]),
    "index_select.default": lambda z: aten.index_select(z, 1, torch.tensor([0, 2, 2])),
    "gather.default": lambda z: aten.gather(z, 2, places(z)),
    "take_along_dim.default": lambda z: aten.take_along_dim(z, places(z)[:, :, :2], 2),
    "embedding.default": lambda z: aten.embedding(SQUARE, places(z)) + z[:, :, :, None],
    "cat.default": lambda z: aten.cat([z.relu(), mask(z), -z], 1),
    "stack.default": lambda z: aten.stack([z.relu(), z.cos()], 1),
    "where.self": lambda z: aten.where(mask(z), z.sin(), z.cos()),
    "select_scatter.default": lambda z: aten.select_scatter(z, z[:, 0].sin(), 1, 2),
    "slice_scatter.default": lambda z: aten.slice_scatter(z, z[:, :2].sin(), 1, 1, 3),
    "scatter.src": lambda z: aten.scatter(z, 2, places(z), z.sin()),
    "scatter.value": lambda z: aten.scatter(z, 2, places(z)[:, :, :2], 3.0),
    "scatter_add.default": lambda z: aten.scatter_add(z, 2, places(z), z.sin()),
    "index_put.default": lambda z: aten.index_put(z, [None, torch.tensor([1])], z[:, :1].sin()),
    "split.Tensor": lambda z: aten.split(z, 2, 1)[1],
    "split_with_sizes.default": lambda z: aten.split_with_sizes(z, [1, 3], 1)[1],
    "chunk.default": lambda z: aten.chunk(z, 2, 2)[1],
    "unbind.int": lambda z: aten.unbind(z, 1)[1],
    "tensor_split.sections": lambda z: aten.tensor_split(z, 4, 2)[1],
    "tensor_split.indices": lambda z: aten.tensor_split(z, [1, 4], 2)[1],
    "flip.default": lambda z: aten.flip(z, [2]),
    "roll.default": lambda z: aten.roll(z, [1], [2]),
    "repeat.default": lambda z: aten.repeat(z, [1, 2, 1]),
    "repeat_interleave.self_int": lambda z: aten.repeat_interleave(z, 2, 1),
    "masked_fill.Scalar": lambda z: aten.masked_fill(z, mask(z), 2.0),
    "masked_fill.Tensor": lambda z: aten.masked_fill(z, mask(z), torch.tensor(2.0).double()),
    "tril.default": lambda z: aten.tril(z),
    "triu.default": lambda z: aten.triu(z, 1),
    "pixel_shuffle.default": lambda z: aten.pixel_shuffle(z.unsqueeze(3), 2),
    "pixel_unshuffle.default": lambda z: aten.pixel_unshuffle(picture(z), 2),
    "diagonal.default": lambda z: aten.diagonal(z, 0, 1, 2),
    "channel_shuffle.default": lambda z: aten.channel_shuffle(z.unsqueeze(3), 2),
    "embedding_bag.padding_idx": lambda z: (
        z + aten.embedding_bag(SQUARE, places(z)[:, 0].flatten(), torch.arange(z.shape[0]) * 6)[0].unsqueeze(1)
    ),
    "max_unpool2d.default": lambda z: aten.max_unpool2d(*aten.max_pool2d_with_indices(picture(z), 2), [4, 6]),
    "max_unpool3d.default": lambda z: aten.max_unpool3d(
        *aten.max_pool3d_with_indices(volume(z), 2), [2, 2, 6], [2, 2, 2], [0, 0, 0]
    ),
    "diag_embed.default": lambda z: aten.diag_embed(z),
    "rot90.default": lambda z: aten.rot90(z, 1, [1, 2]),
    "index_add.default": lambda z: aten.index_add(z, 1, torch.tensor([0, 0]), z[:, :2].sin(), alpha=2),
    "index_copy.default": lambda z: aten.index_copy(z, 1, torch.tensor([1]), z[:, :1].sin()),
    "index_fill.int_Scalar": lambda z: aten.index_fill(z, 1, torch.tensor([1]), 2.0),
    "index_fill.int_Tensor": lambda z: aten.index_fill(z, 1, torch.tensor([1]), torch.tensor(2.0).double()),
    "diagonal_scatter.default": lambda z: aten.diagonal_scatter(z, z[:, 0, :4].sin(), 0, 1, 2),
}
# shape
CASES |= {
    "reshape.default": lambda z: aten.reshape(z, [-1, 24]),
    "unflatten.int": lambda z: aten.unflatten(z, 2, [2, 3]),
    "permute.default": lambda z: aten.permute(z, [0, 2, 1]),
    "transpose.int": lambda z: aten.transpose(z, 1, 2),
    "mT.default": lambda z: z.mT,
    "movedim.int": lambda z: aten.movedim(z, 1, 2),
    "movedim.intlist": lambda z: aten.movedim(z, [1, 2], [2, 1]),
    "unsqueeze.default": lambda z: aten.unsqueeze(z, 1),
    "squeeze.dims": lambda z: aten.squeeze(z[:, :1], [1]),
    "expand.default": lambda z: aten.expand(z.unsqueeze(1), [-1, 3, -1, -1]),
    "broadcast_to.default": lambda z: aten.broadcast_to(z[:, :1], [-1, 4, 6]),
    "detach.default": lambda z: z + aten.detach(z.sin()),
    "to.dtype": lambda z: z + mask(z).to(torch.float64),
    "unfold.default": lambda z: aten.unfold(z, 2, 3, 2),
}
# what is decided by comparing, added to numbers
_TRUTHS = _two(other, *(n for n in ops._NAMES[OpClass.DISCRETE].split() if n in (
    "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor", "isclose.default",
    "floor_divide.default")))  # fmt: skip
_TRUTHS |= {name: lambda z, name=name: OP[name](z, 0.1) for name in (
    "eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar", "floor_divide.Scalar")}  # fmt: skip
_TRUTHS |= {name: lambda z, name=name: OP[name](z) for name in (
    "floor.default", "ceil.default", "round.default", "trunc.default", "sign.default", "isnan.default",
    "isinf.default", "isfinite.default", "isposinf.default", "isneginf.default", "signbit.default",
    "logical_not.default", "argsort.default")}  # fmt: skip
_TRUTHS |= {name: lambda z, name=name: OP[name](z > 0, z.roll(1, 2) > 0.3) for name in (
    "logical_and.default", "logical_or.default", "logical_xor.default", "bitwise_and.Tensor", "bitwise_or.Tensor",
    "bitwise_xor.Tensor")}  # fmt: skip
_TRUTHS |= {
    "bitwise_not.default": lambda z: aten.bitwise_not(z > 0),
    "argmax.default": lambda z: aten.argmax(z, 2, True),
    "argmin.default": lambda z: aten.argmin(z, 2, True),
    "any.dim": lambda z: aten.any(z > 1, 2, True),
    "all.dim": lambda z: aten.all(z > -1, 2, True),
    "any.dims": lambda z: aten.any(z > 1, [1, 2], True),
    "all.dims": lambda z: aten.all(z > -1, [1, 2], True),
    "one_hot.default": lambda z: aten.one_hot(z.argmax(2), 6),
    "argsort.stable": lambda z: aten.argsort(z, stable=True, dim=2),
    "isin.Tensor_Tensor": lambda z: aten.isin(z.argsort(2), torch.tensor([1, 2])),
    "isin.Tensor_Scalar": lambda z: aten.isin(z.argsort(2), 2),
    "bucketize.Tensor": lambda z: aten.bucketize(z, torch.tensor([-1.0, 0.0, 1.0]).double()),
    "searchsorted.Tensor": lambda z: aten.searchsorted(torch.tensor([-1.0, 0.0, 1.0]).double(), z),
    "count_nonzero.dim_IntList": lambda z: aten.count_nonzero(z > 0, [2]).unsqueeze(2),
    "heaviside.default": lambda z: aten.heaviside(z, torch.tensor(0.5).double()),
    "round.decimals": lambda z: aten.round(z, decimals=1),
    "bitwise_left_shift.Tensor": lambda z: aten.bitwise_left_shift(z.argsort(2), torch.tensor(1)),
    "bitwise_right_shift.Tensor": lambda z: aten.bitwise_right_shift(z.argsort(2), torch.tensor(1)),
}
CASES |= {name: lambda z, f=function: z.sin() + f(z) for name, function in _TRUTHS.items()}

# one operand that moves, on either side, of what has its own rule for two
HALF: dict[str, Callable] = {
    f"{name} {side}": (lambda z, name=name: OP[name](positive(z), positive(SQUARE[:4])))
    if side == "first"
    else (lambda z, name=name: OP[name](positive(SQUARE[:4]), positive(z)))
    for name in (
        "mul.Tensor", "div.Tensor", "atan2.default", "maximum.default", "minimum.default", "fmax.default",
        "fmin.default", "copysign.Tensor", "logaddexp.default", "hypot.default", "remainder.Tensor", "fmod.Tensor",
        "xlogy.Tensor", "pow.Tensor_Tensor", "cdist.default", "pairwise_distance.default",
    )
    for side in ("first", "second")
}  # fmt: skip

ELSEWHERE = {
    "lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input", "lstm_cell.default", "gru_cell.default",
    "rnn_tanh_cell.default", "rnn_relu_cell.default", "affine_grid_generator.default",
}  # fmt: skip
"""Ops that the zoo runs, or test_deeplift.py (cells): they take states, or a size of the batch."""
MIXES = {
    "sum.default", "mean.default", "trace.default", "prod.default", "max.default", "min.default", "median.default",
    "nanmedian.default", "dist.default", "dot.default", "addbmm.default", "addr.default", "put.default", "take.default",
    "masked_scatter.default", "t.default", "numpy_T.default", "any.default", "all.default", "nonzero.default",
    "count_nonzero.default",
}  # fmt: skip
"""Ops that mix the samples of a batch."""
