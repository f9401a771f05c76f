"""Axes followed through a graph: what is said of an axis holds of the elements that lie along it."""

import math

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import fx

from attrcli.graph.axes import follow_axes
from attrcli.graph.axis import BATCH, CHANNEL, INPUT_CHANNEL, UNKNOWN, Axis, plain, reshaped
from attrcli.graph.build import FREE, Builder

aten = torch.ops.aten
ROWS = FREE[1]
"""The batch whose sizes axes have."""


def followed(function, shape, *, channels_last=False):
    """The graph of function(builder, x), and the axes of its nodes by name."""
    b = Builder(torch.float64)
    x = b.placeholder("x", [(batch, *shape) for batch in FREE], torch.float32)
    graph = b.finish({"output": function(b, x)})
    return graph, {
        node.name: axes for node, axes in follow_axes(graph, "x", channels_last=channels_last).items() if axes
    }


# -- moved elements keep their place in the input --------------------------------------------------------------------

IMAGE = (4, 6, 12)


def divisors(size):
    return [i for i in range(2, size) if size % i == 0]


@st.composite
def moves(draw):
    """Ops that move elements: (op, arguments) one after the other, each for the shape that the one before it leaves.

    The batch's own size is -1.
    """
    shape, found = [-1, *IMAGE], []
    for _ in range(draw(st.integers(1, 7))):
        own = [i for i, size in enumerate(shape) if size > 1]
        kind = draw(st.sampled_from(["merge", "split", "swap", "select", "slice", "token"]))
        dim = draw(st.sampled_from(own)) if own else 0
        if kind == "merge" and dim + 1 in own:
            shape[dim : dim + 2] = [shape[dim] * shape[dim + 1]]
            found.append((aten.reshape.default, [list(shape)]))
        elif kind == "split" and own and divisors(shape[dim]):
            outer = draw(st.sampled_from(divisors(shape[dim])))
            shape[dim : dim + 1] = [outer, shape[dim] // outer]
            found.append((aten.reshape.default, [list(shape)]))
        elif kind == "swap":
            one, two = (draw(st.integers(0, len(shape) - 1)) for _ in range(2))
            shape[one], shape[two] = shape[two], shape[one]
            found.append((aten.transpose.int, [one, two]))
        elif kind == "select" and len(own) > 2:
            found.append((aten.select.int, [dim, draw(st.integers(0, shape.pop(dim) - 1))]))
        elif kind == "slice" and own:
            start, step = draw(st.integers(0, 2)), draw(st.sampled_from([1, 1, 2, 3]))
            if size := len(range(start, shape[dim], step)):
                found.append((aten.slice.Tensor, [dim, start, shape[dim], step]))
                shape[dim] = size
        elif kind == "token" and own:
            found.append(("token", [dim, draw(st.booleans())]))
            shape[dim] += 1
    return found


def apply(b, x, op, args):
    """One op; a token, which is -1, is put before or after what lies along an axis."""
    if op != "token":
        return b.call(op, x, *args)
    dim, before = args
    token = b.call(aten.full_like.default, b.call(aten.slice.Tensor, x, dim, 0, 1), -1)
    return b.call(aten.cat.default, [token, x] if before else [x, token], dim)


class Values(fx.Interpreter):
    """Runs a graph and keeps the value of each node, by name."""

    def __init__(self, module):
        super().__init__(module)
        self.kept = {}

    def run_node(self, n):
        self.kept[n.name] = super().run_node(n)
        return self.kept[n.name]


def assert_lies_as_said(axis, value, dim):
    """Each element's place in the input, which its value tells, is the one that its place on the axis stands for."""
    along = value.movedim(dim, 0).flatten(1)
    assert len(along) == axis.size
    along = along[axis.before : len(along) - axis.after]
    place = torch.arange(len(along))
    for kind, size in reversed(axis.factors):
        digit, place = place % size, place // size
        if kind == BATCH or isinstance(kind, int):
            which = 0 if kind == BATCH else kind + 2
            whole = (ROWS, *IMAGE)[which]
            source = along.long() // math.prod((ROWS, *IMAGE)[which + 1 :]) % whole
            assert ((source // -(-whole // size) == digit[:, None]) | (along < 0)).all()


@given(moves())
@settings(max_examples=60, deadline=None)
def test_an_axis_of_the_grid_is_where_its_elements_come_from(steps):
    def function(b, x):
        for op, args in steps:
            x = apply(b, x, op, args)
        return x

    graph, found = followed(function, IMAGE)
    values = Values(graph)
    values.run(torch.arange(ROWS * math.prod(IMAGE), dtype=torch.float64).reshape(ROWS, *IMAGE))
    for name, axes in found.items():
        if name.startswith("full_like"):
            continue
        assert tuple(axis.size for axis in axes) == tuple(values.kept[name].shape)
        for dim, axis in enumerate(axes):
            assert_lies_as_said(axis, values.kept[name], dim)
    event(f"known at the end: {any(axis.of_grid for axis in axes)}")


# -- what is known where ---------------------------------------------------------------------------------------------

N = plain(BATCH, ROWS)


def test_the_patches_of_a_transformer():
    def function(b, x):
        weight = b.tensor(torch.ones(8, 3, 2, 2), "patches.weight")
        patches = b.call(aten.convolution.default, x, weight, None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)
        tokens = b.call(aten.transpose.int, b.call(aten.reshape.default, patches, [-1, 8, 24]), 1, 2)
        extra = b.call(aten.expand.default, b.tensor(torch.ones(1, 1, 8), "token"), [b.size(x, 0), -1, -1])
        joined = b.call(aten.layer_norm.default, b.call(aten.cat.default, [extra, tokens], 1), [8])
        projected = b.call(aten.linear.default, joined, b.tensor(torch.ones(10, 8), "weight"))
        scores = b.call(aten.softmax.int, b.call(aten.matmul.default, joined, b.call(aten.mT.default, joined)), -1)
        mixed = b.call(aten.matmul.default, scores, projected)
        return b.call(aten.select.int, b.call(aten.slice.Tensor, mixed, 1, 1), 1, 0)

    _, found = followed(function, (3, 8, 12))
    grid = Axis(((0, 4), (1, 6)))
    tokens = Axis(((0, 4), (1, 6)), before=1)
    wide, narrow = plain(CHANNEL, 10), plain(CHANNEL, 8)
    assert found["x"] == (N, plain(INPUT_CHANNEL, 3), plain(0, 8), plain(1, 12))
    assert found["convolution"] == (N, narrow, plain(0, 4), plain(1, 6))
    assert found["transpose"] == (N, grid, narrow)
    assert found["layer_norm"] == found["cat"] == (N, tokens, narrow)
    assert found["linear"] == found["matmul_1"] == (N, tokens, wide)
    assert found["softmax"] == found["matmul"] == (N, tokens, tokens)
    assert found["slice_1"] == (N, grid, wide)
    assert found["select"] == (N, wide)


def test_channels_last():
    _, found = followed(lambda b, x: b.call(aten.mean.dim, x, [1, 2]), (8, 12, 3), channels_last=True)
    assert found["x"] == (N, plain(0, 8), plain(1, 12), plain(INPUT_CHANNEL, 3))
    assert found["mean"] == (N, plain(INPUT_CHANNEL, 3))


@pytest.mark.parametrize(
    "op",
    [
        lambda b, x: b.call(aten.flip.default, x, [2]),
        lambda b, x: b.call(aten.cumsum.default, b.call(aten.roll.default, x, [1], [3]), 2),
        lambda b, x: b.call(aten.gather.default, x, 2, b.call(aten.argsort.default, x, 2)),
    ],
)
def test_what_is_not_followed_is_unknown(op):
    graph, found = followed(op, IMAGE)
    last = next(iter(reversed(graph.graph.nodes))).all_input_nodes[0]
    assert found[last.name] == (N, *(plain(UNKNOWN, size) for size in IMAGE))


def test_a_constant_has_no_axes():
    _, found = followed(lambda b, x: b.call(aten.add.Tensor, x, b.tensor(torch.ones(6, 1), "w")), IMAGE)
    assert set(found) == {"x", "add"}
    assert found["add"] == found["x"]


def test_windows_of_a_grid_and_back():
    grid = (N, plain(CHANNEL, 2), plain(0, 6), plain(1, 12))
    windows = reshaped(grid, (ROWS, 2, 3, 2, 4, 3))
    assert windows == (N, plain(CHANNEL, 2), plain(0, 3), plain("inside 0", 2), plain(1, 4), plain("inside 1", 3))
    assert reshaped(windows, (ROWS, 2, 6, 12)) == grid
    assert reshaped(grid, (ROWS, 2, 8, 9)) is None
