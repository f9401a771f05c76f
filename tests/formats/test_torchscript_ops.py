"""Single operations through both formats of torch: outputs and gradients at several batch sizes are torch's own."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import assert_same, build, save_exported, save_traced
from torch import Tensor, nn

from attrcli import model as models
from attrcli.formats.torchscript_numbers import CONTAINERS

INDEX = torch.tensor([2, 0, 1])
MASK = torch.tensor([[True, False, True, True, False, True]])
TABLE = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)
KERNEL = torch.linspace(-1, 1, 24, dtype=torch.float64)


def places(x: Tensor) -> Tensor:
    """Whole numbers from 0 to 5 that depend on the data."""
    return (x * 10).to(torch.int64).remainder(6)


def in_place(whole: Tensor) -> Tensor:
    """Each operator of bits that writes to its left side."""
    whole &= 6
    whole |= INDEX.repeat(2)
    whole ^= whole + 1
    whole <<= 2
    whole >>= INDEX[1] + 1
    whole <<= INDEX[2]
    whole >>= 1
    return whole.bitwise_xor_(9)


def padded(mode: str, *sizes: int):
    return lambda x: F.pad(x, sizes, mode=mode)


def resized(mode: str, shape: tuple[int, ...], **options: object):
    return lambda x: F.interpolate(x, mode=mode, **options), shape


def attended(shape: tuple[int, ...] = (2, 4, 6), **options: object):
    return lambda x: F.scaled_dot_product_attention(x, x.flip(-2) * 2, x.sin(), **options), shape


OPS = {
    # distances, similarities, norms
    "cdist": (lambda x: torch.cdist(x, x[:, :3] + 1), (4, 6)),
    "cdist, p=1": (lambda x: torch.cdist(x, x[:, :3] * 2, p=1.0), (4, 6)),
    "pairwise_distance": (lambda x: F.pairwise_distance(x, x.flip(1)), (6,)),
    "cosine_similarity, broadcast": (lambda x: F.cosine_similarity(x[:, :1], x.flip(1), dim=1), (4, 6)),
    "cosine_similarity, along what is broadcast": (lambda x: F.cosine_similarity(x[:, :1], x, dim=-2), (4, 6)),
    "rms_norm": (lambda x: F.rms_norm(x, (6,), TABLE[:, 0], eps=1e-5), (4, 6)),
    "rms_norm without epsilon": (lambda x: F.rms_norm(x, (4, 6)), (4, 6)),
    "group_norm": (lambda x: F.group_norm(x, 2, eps=1e-3), (4, 6)),
    "instance_norm": (lambda x: F.instance_norm(x, eps=1e-3), (4, 6)),
    "local_response_norm": (lambda x: F.local_response_norm(x, 3), (4, 5, 6)),
    "renorm": (lambda x: torch.renorm(x, 2, 1, 0.5), (4, 6)),
    "linalg.norm": (lambda x: torch.linalg.norm(x, dim=(1, 2)), (4, 6)),
    "linalg.matrix_norm": (lambda x: torch.linalg.matrix_norm(x), (4, 6)),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), (4, 6)),
    # pads
    "circular pad, 1-d": (padded("circular", 2, 1), (4, 6)),
    "circular pad, 2-d": (padded("circular", 2, 0, 1, 3), (2, 4, 6)),
    "circular pad, 3-d": (padded("circular", 1, 1, 0, 2, 2, 1), (1, 3, 4, 3)),
    "circular pad that cuts": (padded("circular", -1, 2), (4, 6)),
    "circular convolution": (
        lambda x: F.conv1d(F.pad(x, (1, 1), mode="circular"), KERNEL.reshape(2, 4, 3)),
        (4, 6),
    ),
    "reflect pad, 1-d": (padded("reflect", 2, 1), (4, 6)),
    "reflect pad, 2-d": (padded("reflect", 2, 1, 1, 0), (2, 4, 6)),
    "reflect pad, 3-d": (padded("reflect", 1, 1, 0, 1, 1, 1), (1, 3, 4, 3)),
    "replicate pad, 1-d": (padded("replicate", 2, 1), (4, 6)),
    "replicate pad, 2-d": (padded("replicate", 2, 1, 1, 3), (2, 4, 6)),
    "replicate pad, 3-d": (padded("replicate", 1, 2, 0, 1, 1, 1), (1, 3, 4, 3)),
    "constant pad": (padded("constant", 2, -1, 1, 3), (2, 4, 6)),
    # resizing
    "nearest, 1-d": resized("nearest", (4, 6), scale_factor=1.5),
    "nearest, 2-d": resized("nearest", (2, 4, 6), size=(3, 9)),
    "nearest, 3-d": resized("nearest", (2, 3, 2, 4), scale_factor=2.0),
    "nearest-exact, 1-d": resized("nearest-exact", (4, 6), size=9),
    "nearest-exact, 2-d": resized("nearest-exact", (2, 4, 6), scale_factor=1.5),
    "nearest-exact, 3-d": resized("nearest-exact", (2, 3, 2, 4), size=(2, 3, 6)),
    "linear": resized("linear", (4, 6), size=9, align_corners=True),
    "bilinear": resized("bilinear", (2, 4, 6), scale_factor=(1.5, 0.5), align_corners=False),
    "bilinear, with the factor kept": resized(
        "bilinear", (2, 5, 7), scale_factor=1.3, align_corners=False, recompute_scale_factor=False
    ),
    "bilinear, antialiased": resized("bilinear", (2, 8, 8), size=(3, 5), antialias=True),
    "bicubic": resized("bicubic", (2, 4, 6), size=(7, 9), align_corners=True),
    "bicubic, antialiased": resized("bicubic", (2, 8, 8), size=(3, 5), antialias=True),
    "trilinear": resized("trilinear", (2, 3, 4, 2), scale_factor=2.0, align_corners=False),
    "area": resized("area", (2, 4, 6), size=(3, 2)),
    # moving elements
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (8, 2, 3)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (2, 4, 6)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (6, 2, 3)),
    "roll": (lambda x: torch.roll(x, (1, -2), (1, 2)), (4, 6)),
    "roll, flat": (lambda x: torch.roll(x.flatten(1), 2, 1), (4, 6)),
    "rot90": (lambda x: torch.rot90(x, 1, (1, 2)), (4, 6)),
    "unfold": (lambda x: F.unfold(x, (2, 3), dilation=1, padding=1, stride=2), (2, 4, 6)),
    "fold": (lambda x: F.fold(x, (4, 5), (2, 2), stride=1, padding=0), (8, 12)),
    "fold of unfold": (lambda x: F.fold(F.unfold(x, 3, padding=1) ** 2, (4, 6), 3, padding=1), (2, 4, 6)),
    "Tensor.unfold": (lambda x: x.unfold(2, 3, 2).amax(-1), (4, 7)),
    "grid_sample": (
        lambda x: F.grid_sample(x, torch.tanh(x[:, :1].permute(0, 2, 3, 1) * TABLE[0, :2]), align_corners=False),
        (2, 4, 6),
    ),
    "grid_sample, reflected, 3-d": (
        lambda x: F.grid_sample(
            x,
            1.5 * torch.sin(x[:, :1].permute(0, 2, 3, 4, 1) + TABLE[0]),
            padding_mode="reflection",
            align_corners=True,
        ),
        (2, 3, 4, 3),
    ),
    "affine_grid": (
        lambda x: F.grid_sample(
            x,
            F.affine_grid(x.mean((2, 3)).reshape(-1, 2, 3), [x.size(0), 6, 4, 5], align_corners=False),
            align_corners=False,
        ),
        (6, 4, 5),
    ),
    "max_unpool2d": (
        lambda x: torch._C._nn.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [4, 6]),
        (2, 4, 6),
    ),
    "hstack, vstack, dstack": (
        lambda x: torch.dstack([torch.hstack([x, x * 2]), torch.hstack([x.sin(), x.cos()])]),
        (4, 6),
    ),
    "column_stack": (lambda x: torch.column_stack([x[:, 0], x, x.sum(1)]), (6,)),
    "split apart": (lambda x: torch.cat([x.hsplit(2)[1], *x.tensor_split((1, 3), 1), *x.chunk(3, 1)], 1), (6, 2)),
    "tile": (lambda x: x.tile(2, 1, 3) + x.tile(3).repeat(2, 1, 1), (4, 6)),
    "repeat_interleave": (
        lambda x: x.repeat_interleave(2, dim=1) + x.repeat_interleave(INDEX.repeat(2) + 1, dim=2)[:, :1, :1],
        (4, 6),
    ),
    "diag, diag_embed, trace": (lambda x: torch.diag_embed(x).diagonal(1, 1, 2) * torch.trace(TABLE), (6,)),
    "index ops": (
        lambda x: x.index_add(1, INDEX, x[:, :3] * 2).index_fill(1, INDEX[:1], 0.5).index_copy(1, INDEX, x[:, 1:4]),
        (4, 6),
    ),
    "take, put, masked_scatter": (lambda x: x[0].take(places(x)) + x.masked_scatter(MASK, x.flip(1)), (6,)),
    "gather, scatter": (lambda x: x.gather(1, places(x)) + torch.zeros_like(x).scatter_add(1, places(x), x), (6,)),
    "take_along_dim": (lambda x: torch.take_along_dim(x, x.argsort(dim=1), dim=1), (6,)),
    "swapaxes, moveaxis": (lambda x: x.swapaxes(1, 2) @ x.moveaxis(2, 1).swapdims(1, 2), (4, 6)),
    # lookups
    "embedding_bag, mean": (lambda x: F.embedding_bag(places(x), TABLE, mode="mean") + x[:, :3], (5,)),
    "embedding_bag, weighted sum": (
        lambda x: F.embedding_bag(places(x), TABLE, mode="sum", per_sample_weights=x.sigmoid()),
        (5,),
    ),
    "embedding_bag, max": (lambda x: F.embedding_bag(places(x), TABLE, mode="max") + x[:, :3], (5,)),
    "embedding_bag, padded": (lambda x: F.embedding_bag(places(x), TABLE, padding_idx=1) + x[:, :3], (5,)),
    "one_hot": (lambda x: F.one_hot(places(x), 6).to(x.dtype) @ TABLE + x[..., None], (5,)),
    "bucketize, searchsorted": (
        lambda x: x * (torch.bucketize(x, TABLE[:, 0]) + torch.searchsorted(TABLE[:, 1], x)),
        (5,),
    ),
    "isin, isclose": (lambda x: x * torch.isin(places(x), INDEX) + x.isclose(x.abs()) * 2, (5,)),
    # products
    "einsum": (lambda x: torch.einsum("nij,nkj,jm->nikm", x, x.sin(), TABLE), (4, 6)),
    "einsum with an ellipsis": (lambda x: torch.einsum("...ij,...j->...i", x, x[:, 0]), (4, 6)),
    "tensordot": (lambda x: torch.tensordot(x, TABLE, dims=([2], [0])), (4, 6)),
    "baddbmm, addbmm, addmv": (
        lambda x: (
            torch.baddbmm(x, x, x)
            + torch.addbmm(TABLE[:4, :1], x[:, :2].mT, x[:, :2])
            + torch.addmv(x[:, 0, 0], x[:, 1], KERNEL[:4])[:, None, None]
        ),
        (4, 4),
    ),
    "outer, kron, vecdot": (lambda x: torch.outer(x[:, 0], x[0]) + torch.linalg.vecdot(x, x.sin())[:, None], (6,)),
    "bilinear layer": (lambda x: F.bilinear(x, x.cos(), KERNEL.reshape(2, 3, 4)[:, :3, :3], TABLE[0, :2]), (3,)),
    "cross": (lambda x: torch.cross(x, x.roll(1, 2), dim=1) + torch.linalg.cross(x, x.sin(), dim=1), (3, 6)),
    "matrix_power, multi_dot": (lambda x: torch.linalg.matrix_power(x, 3) + torch.linalg.det(x)[:, None, None], (4, 4)),
    "conv_tbc": (
        lambda x: torch.conv_tbc(x.transpose(0, 1).contiguous(), KERNEL.reshape(3, 4, 2), TABLE[0, :2], 1).transpose(
            0, 1
        ),
        (6, 4),
    ),
    "conv, same, even kernel": (lambda x: F.conv1d(x, KERNEL[:16].reshape(2, 4, 2), padding="same"), (4, 6)),
    # attention
    "attention": attended(),
    "attention, causal": attended(is_causal=True),
    "attention, scaled": attended(scale=0.3),
    "attention, masked": attended(attn_mask=torch.tensor([[True, False, True, True]]).expand(4, 4)),
    "attention, biased": attended(attn_mask=TABLE[:4, :1] * 3 + TABLE[:4, 0]),
    "attention, grouped": (
        lambda x: F.scaled_dot_product_attention(x, x[:, :2].sin(), x[:, 2:].cos(), enable_gqa=True),
        (4, 3, 6),
    ),
    # element by element
    "nan_to_num": (
        lambda x: torch.nan_to_num(x.masked_fill(x > 1, torch.inf).masked_fill(x < -1, torch.nan), 0.25, 2.0) * x,
        (6,),
    ),
    "smooth": (
        lambda x: x.exp2() + x.erfc() + (x / 4).erfinv() + x.lgamma() + x.abs().digamma() + x.i0() + x.sinc(),
        (6,),
    ),
    "special": (
        lambda x: (
            torch.special.ndtr(x)
            + torch.special.log_ndtr(x)
            + torch.special.entr(x.abs())
            + torch.special.i1(x)
            + torch.special.expit(x)
            + x.sigmoid().logit()
            + torch.special.erfcx(x)
            + torch.special.xlogy(x, x.abs())
        ),
        (6,),
    ),
    "names of their own": (
        lambda x: (
            x.multiply(2).subtract(1).clip(-1, 2).absolute().negative()
            + x.arctan()
            + x.tanh().arcsin().true_divide(3)
            + torch.concat([x[:, :3], x[:, 3:]], 1).divide(x.exp())
            + x.greater(0) * x
            + torch.positive(x).deg2rad()
        ),
        (6,),
    ),
    "two by two": (
        lambda x: torch.fmax(x, x.flip(1)) + torch.hypot(x, x + 1) + torch.logaddexp(x, -x) + x.copysign(-x) + x.frac(),
        (6,),
    ),
    "gates": (lambda x: F.glu(x, 1) + F.hardswish(x)[:, :3] + F.softsign(x)[:, :3], (6,)),
    # order
    "median, mode, kthvalue": (lambda x: x.median(1)[0] + x.median() + x.kthvalue(2, 1)[0] + x.mode(1)[0], (6,)),
    "cummax, cummin, aminmax": (
        lambda x: x.cummax(1)[0] * x.cummin(1)[0] + torch.stack(x.aminmax(dim=1)).sum(0)[:, None],
        (6,),
    ),
    "msort, argsort": (
        lambda x: x.t().msort().t()[:, x.size(1) - 1 :] + x.gather(1, x.argsort(stable=True, dim=1)),
        (6,),
    ),
    "any, all, count": (
        lambda x: x * (x > 0).any(1, True) + (x > -1).all((1,))[:, None] * (x > 0).count_nonzero(1)[:, None],
        (6,),
    ),
    "statistics": (lambda x: sum(torch.var_mean(x)) + torch.std_mean(x, 1)[0] + x.nansum(1) + x.nanmean(), (6,)),
    "operators on masks": (lambda x: x * ((x > 0) & (x < 1) | MASK ^ (x > 0.5)), (6,)),
    "operators on whole numbers": (
        lambda x: x * ((places(x) & 3) + (places(x) | INDEX.repeat(2)) + (places(x) ^ 5 << 2 >> INDEX[0])),
        (6,),
    ),
    "shifts by a number, and of one": (
        lambda x: x * (torch.bitwise_left_shift(1, places(x)) + (places(x) >> 1) + torch.bitwise_or(2, places(x))),
        (6,),
    ),
    "operators in place": (
        lambda x: x * in_place(places(x)) + x * (x > 0).logical_and_(x < 1).bitwise_not_(),
        (6,),
    ),
    "diff, trapezoid": (lambda x: x.diff(dim=1) + x.diff(n=2, dim=1, prepend=x[:, :1]), (6,)),
}
"""A function of a batch, and the shape of a sample."""


class Op(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", OPS)
def test_an_operation_traced(name, tmp_path):
    function, shape = OPS[name]
    path = save_traced(Op(function), shape, tmp_path / "net.pt", batch=3)
    assert_same(build(path, shape), function, shape, (2, 3, 5))


FIXED = ("take_along_dim", "repeat_interleave", "conv_tbc")
"""What torch.export gives a fixed batch, or does not take."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPS if name not in FIXED])
def test_an_operation_exported(name, tmp_path):
    function, shape = OPS[name]
    path = save_exported(Op(function), shape, tmp_path / "net.pt2")
    assert_same(build(path, shape), function, shape, (2, 3, 5))


@pytest.mark.parametrize("name", ["find", "rfind", "startswith", "endswith", "count"])
def test_a_search_in_a_text_is_torchscripts(name: str) -> None:
    """Its default end is -1, which leaves nothing out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        oracle = torch.jit.CompilationUnit(f"def found(t: str, p: str):\n    return t.{name}(p)\n")
    for text, part in itertools.product(("NLC", "abcabc", "a"), ("NLC", "c", "abc", "b", "a")):
        assert CONTAINERS[name](None, text, part, 0, -1) == oracle.found(text, part), (text, part)


def test_a_branch_on_a_text_is_taken_as_torchscript_takes_it(tmp_path) -> None:
    class Chosen(nn.Module):
        layout: str

        def __init__(self) -> None:
            super().__init__()
            self.layout = "NLC"

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.layout.startswith("NLC") and self.layout.endswith("C") else x * 3

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Chosen()), tmp_path / "m.pt")
    x = torch.randn(2, 3)
    assert torch.equal(models.load(tmp_path / "m.pt")(x), 2 * x)
