"""Each pass: what goes in comes out again, in float64, and the graph that went in is as it was."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from nets import Residual, assert_close, build, quiet, ready, save_exported, save_scripted, save_traced
from torch import fx, nn

from attrcli.errors import ModelError, UnsupportedOp, UsageError
from attrcli.graph import passes
from attrcli.graph.build import FREE, Builder
from attrcli.graph.check import check

aten = torch.ops.aten


def built(function, shape=(3, 5, 5), batches=FREE, names=None):
    """The graph of function(builder, x), which returns a value or several, with names."""
    b = Builder(torch.float64)
    x = b.placeholder("x", [(batch, *shape) for batch in batches], torch.float32)
    result = function(b, x)
    values = result if isinstance(result, tuple) else (result,)
    return b.finish(dict(zip(names or [f"output_{i}" for i in range(len(values))], values, strict=True)))


def stored(b, *shape, seed=0, positive=False):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return b.tensor(tensor.abs() + 0.5 if positive else tensor, f"t{seed}", parameter=True)


def norm(b, x, channels, seed, affine=True):
    scale, shift = (stored(b, channels, seed=seed + i) if affine else None for i in (1, 2))
    mean, var = stored(b, channels, seed=seed + 3), stored(b, channels, seed=seed + 4, positive=True)
    return b.call(aten.batch_norm.default, x, scale, shift, mean, var, False, 0.1, 1e-3, False)


def conv(b, x, weight, bias=None, transposed=False, groups=1):
    return b.call(aten.convolution.default, x, weight, bias, [1, 1], [1, 1], [1, 1], transposed, [0, 0], groups)


def inputs(shape=(3, 5, 5), batch=4):
    return torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def operations(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def state(graph):
    """All that a pass must leave alone."""
    tensors = {name: (tensor, tensor.clone()) for name, tensor in (*graph.named_parameters(), *graph.named_buffers())}
    return graph.code, dict(graph.meta), tensors


def assert_untouched(graph, before):
    code, meta, tensors = before
    assert (graph.code, dict(graph.meta)) == (code, meta)
    now = dict((*graph.named_parameters(), *graph.named_buffers()))
    assert now.keys() == tensors.keys()
    for name, (tensor, values) in tensors.items():
        assert now[name] is tensor
        assert torch.equal(tensor, values)


# --- constants, dead code, masks


def test_what_depends_on_no_input_is_computed_once():
    def net(b, x):
        weight = stored(b, 4, 3, 3, 3, seed=1)
        centred = b.call(aten.sub.Tensor, weight, b.call(aten.mean.dim, weight, [1, 2, 3], True))
        positions = b.call(aten.mul.Scalar, b.call(aten.arange.default, 5), 0.5)
        return b.call(aten.add.Tensor, conv(b, x, centred), positions)

    graph = built(net)
    before = state(graph)
    folded = passes.fold_constants(graph)
    assert_untouched(graph, before)
    assert operations(folded) == ["aten.convolution.default", "aten.add.Tensor"]
    x = inputs()
    assert torch.equal(folded(x)[0], graph(x)[0])


def test_a_constant_computed_from_another_that_is_read_too():
    def net(b, x):
        half = b.call(aten.mul.Scalar, stored(b, 5, seed=1), 0.5)
        return b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, half), b.call(aten.neg.default, half))

    graph = built(net, shape=(3, 5))
    folded = passes.fold_constants(graph)
    assert sorted(operations(folded)) == ["aten.add.Tensor", "aten.mul.Tensor"]
    assert torch.equal(folded(inputs((3, 5)))[0], graph(inputs((3, 5)))[0])


def test_what_would_grow_large_is_not_held():
    def net(b, x):
        table = b.call(aten.mul.Scalar, b.call(aten.expand.default, stored(b, 1, seed=1), [3, 1 << 18]), 2.0)
        return b.call(aten.add.Tensor, x, b.call(aten.slice.Tensor, table, 1, 0, 5, 1))

    graph = built(net, shape=(3, 5))
    folded = passes.fold_constants(graph)
    assert all(tensor.numel() <= 15 for tensor in folded.buffers())
    assert torch.equal(folded(inputs((3, 5)))[0], graph(inputs((3, 5)))[0])


def test_what_nobody_reads_is_left_out():
    def net(b, x):
        b.call(aten.relu.default, x)
        return b.call(aten.neg.default, x)

    assert operations(built(net)) == ["aten.neg.default"]


def test_a_masked_node_is_masked_for_all_who_read_it():
    def net(b, x):
        y = b.call(aten.relu.default, x)
        return b.call(aten.add.Tensor, y, b.call(aten.neg.default, b.call(aten.mul.Scalar, y, 3.0)))

    graph = built(net)
    name = next(node.name for node in graph.graph.nodes if node.target is aten.relu.default)
    kept = torch.arange(75).reshape(1, 3, 5, 5) % 2 == 1
    masked = passes.mask(graph, {name: kept})
    assert_close(masked(inputs())[0], -2 * inputs().relu().where(kept, 0), 1e-14)
    with pytest.raises(UsageError, match="no node 'rleu' in the graph; did you mean 'relu'"):
        passes.mask(graph, {"rleu": kept})


# --- batch norm


def tied(b, x):
    weight = stored(b, 3, 3, 3, 3)
    return norm(b, conv(b, norm(b, conv(b, x, weight), 3, 10), weight), 3, 20)


FOLDED = {
    "convolution": lambda b, x: norm(b, conv(b, x, stored(b, 4, 3, 3, 3)), 4, 10),
    "with bias": lambda b, x: norm(b, conv(b, x, stored(b, 4, 3, 3, 3), stored(b, 4, seed=1)), 4, 10),
    "grouped": lambda b, x: norm(b, conv(b, x, stored(b, 6, 1, 3, 3), groups=3), 6, 10),
    "not affine": lambda b, x: norm(b, conv(b, x, stored(b, 4, 3, 3, 3)), 4, 10, affine=False),
    "linear": lambda b, x: norm(
        b, b.call(aten.linear.default, b.call(aten.reshape.default, x, [-1, 75]), stored(b, 4, 75), None), 4, 10
    ),
    "tied weight": tied,
}


@pytest.mark.parametrize("name", FOLDED)
def test_batch_norm_is_folded(name):
    graph = built(FOLDED[name])
    before = state(graph)
    folded = passes.fold_batch_norm(graph)
    assert "aten.batch_norm.default" not in operations(folded)
    assert_close(folded(inputs())[0], graph(inputs())[0], 1e-13)
    assert_untouched(graph, before)


def shared(b, x):
    y = conv(b, x, stored(b, 4, 3, 3, 3))
    return b.call(aten.add.Tensor, norm(b, y, 4, 10), y)


NOT_FOLDED = {
    "shared producer": shared,
    "transposed": lambda b, x: norm(b, conv(b, x, stored(b, 3, 4, 3, 3), transposed=True), 4, 10),
    "another producer": lambda b, x: norm(b, b.call(aten.relu.default, x), 3, 10),
    "input": lambda b, x: norm(b, x, 3, 10),
    "computed weight": lambda b, x: norm(b, conv(b, x, b.call(aten.mul.Scalar, stored(b, 4, 3, 3, 3), 2)), 4, 10),
    # a linear op on (N, L, F) makes the last dimension, batch norm scales the second: as long, by bad luck
    "linear over length": lambda b, x: norm(
        b, b.call(aten.linear.default, b.call(aten.reshape.default, x, [-1, 3, 25]), stored(b, 3, 25), None), 3, 10
    ),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_batch_norm_is_not_folded_where_it_would_be_wrong(name):
    graph = built(NOT_FOLDED[name])
    folded = passes.fold_batch_norm(graph)
    assert "aten.batch_norm.default" in operations(folded)
    assert torch.equal(folded(inputs())[0], graph(inputs())[0])


# --- the head


def logits(b, x, classes=4):
    return b.call(aten.linear.default, b.call(aten.reshape.default, x, [-1, 75]), stored(b, classes, 75), None)


HEADS = {
    "softmax": ("softmax", lambda b, x: b.call(aten.softmax.int, logits(b, x), 1), F.softmax),
    "negative dimension": ("softmax", lambda b, x: b.call(aten.softmax.int, logits(b, x), -1), F.softmax),
    "log_softmax": ("log_softmax", lambda b, x: b.call(aten.log_softmax.int, logits(b, x), 1), F.log_softmax),
    "sigmoid": ("sigmoid", lambda b, x: b.call(aten.sigmoid.default, logits(b, x)), lambda z, dim: z.sigmoid()),
    "one sigmoid, squeezed": (
        "sigmoid",
        lambda b, x: b.call(aten.squeeze.dim, b.call(aten.sigmoid.default, logits(b, x, 1)), 1),
        lambda z, dim: z.sigmoid(),
    ),
    "over channels, then flattened": (
        "softmax",
        lambda b, x: b.call(aten.reshape.default, b.call(aten.softmax.int, x, 1), [-1, 3, 25]),
        F.softmax,
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_stepped_over(name):
    head, make, function = HEADS[name]
    graph = built(make)
    before = state(graph)
    stripped, found = passes.strip_head(graph)
    assert found == head
    assert_close(function(stripped(inputs())[0], dim=1), graph(inputs())[0], 1e-15)
    assert_untouched(graph, before)


def read_twice(b, x):
    y = b.call(aten.softmax.int, logits(b, x), 1)
    return y, b.call(aten.mul.Scalar, y, 2)


LEFT = {
    "none": logits,
    "a second consumer": read_twice,
    "in the middle": lambda b, x: b.call(aten.mul.Scalar, b.call(aten.softmax.int, logits(b, x), 1), 2),
    "over another dimension": lambda b, x: b.call(aten.softmax.int, x, 2),
    "classes no longer second": lambda b, x: b.call(aten.reshape.default, b.call(aten.softmax.int, x, 1), [-1, 75]),
    "the input itself": lambda b, x: x,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_head_is_left(name):
    graph = built(LEFT[name])
    stripped, found = passes.strip_head(graph)
    assert found == "none"
    assert torch.equal(stripped(inputs())[0], graph(inputs())[0])


# --- parts of a graph


def several(b, x):
    y = b.call(aten.relu.default, x)
    return b.call(aten.mul.Scalar, y, 2), b.call(aten.sum.dim_IntList, logits(b, y), [1])


def test_one_output_and_what_it_needs():
    graph = built(several, names=["doubled", "total"])
    before = state(graph)
    for index, name in enumerate(("doubled", "total")):
        one = passes.only_output(graph, name)
        assert one.meta["outputs"] == (name,)
        assert torch.equal(one(inputs())[0], graph(inputs())[index])
    assert "aten.linear.default" not in operations(passes.only_output(graph, "doubled"))
    assert_untouched(graph, before)


def test_until_and_from_a_node_make_the_whole():
    graph = built(lambda b, x: b.call(aten.tanh.default, logits(b, b.call(aten.relu.default, x))))
    before = state(graph)
    for name in ("relu", "linear", "tanh"):
        first, second = passes.until(graph, name), passes.cut(graph, name)
        assert first.meta["outputs"] == (name,)
        assert second.meta["inputs"] == (name, "x")
        value = first(inputs())[0]
        assert torch.equal(second(value, inputs())[0], graph(inputs())[0])
    assert "aten.linear.default" not in operations(passes.until(graph, "relu"))
    assert_untouched(graph, before)


def test_a_node_that_does_not_exist_is_refused_with_a_suggestion():
    graph = built(lambda b, x: b.call(aten.relu.default, x))
    for make in (passes.until, passes.cut):
        with pytest.raises(UsageError, match="no node 'relv' in the graph; did you mean 'relu'"):
            make(graph, "relv")
        with pytest.raises(UsageError, match="no node 'x' in the graph"):
            make(graph, "x")


@pytest.mark.parametrize("channels_last", [False, True])
def test_place_moves_and_lays_out_copies(channels_last):
    graph = built(lambda b, x: norm(b, conv(b, x, stored(b, 4, 3, 3, 3)), 4, 10))
    before = state(graph)
    placed = passes.place(graph, torch.device("cpu"), channels_last=channels_last)
    kernel = placed.get_parameter("t0")
    assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert not any(parameter.requires_grad for parameter in placed.parameters())
    assert_close(placed(inputs())[0], graph(inputs())[0], 1e-14)
    assert_untouched(graph, before)


def test_place_tells_what_makes_tensors_where():
    def function(b, x):
        grid = b.call(aten.meshgrid.default, [b.call(aten.arange.default, 5), b.call(aten.arange.default, 5)])
        like = b.call(aten.ones_like.default, x)
        return b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, grid[0]), like)

    placed = passes.place(built(function), torch.device("meta"), channels_last=False)
    devices = {node.name: node.kwargs.get("device") for node in placed.graph.nodes}
    assert devices["arange"] == torch.device("meta")
    assert devices["meshgrid"] is devices["ones_like"] is None
    assert placed(inputs().to("meta"))[0].device.type == "meta"


# --- check


def test_check_names_what_is_not_canonical():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.linalg.inv, (x,))
    graph.output((y,))
    with pytest.raises(UnsupportedOp, match=r"node 'linalg_inv' calls .*inv.* not in the op table"):
        check(fx.GraphModule(nn.Module(), graph))
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    with pytest.raises(ModelError, match="not a tuple"):
        check(fx.GraphModule(nn.Module(), graph))
    graph = fx.Graph()
    graph.output((graph.call_method("relu", (graph.placeholder("x"),)),))
    with pytest.raises(ModelError, match="node 'relu' is a call_method"):
        check(fx.GraphModule(nn.Module(), graph))
    graph = fx.Graph()
    root = nn.Module()
    root.name = "text"
    graph.output((graph.get_attr("name"),))
    with pytest.raises(ModelError, match="'name' is not a tensor"):
        check(fx.GraphModule(root, graph))


def test_check_finds_nan_after_a_pass():
    graph = built(lambda b, x: norm(b, conv(b, x, stored(b, 4, 3, 3, 3)), 4, 10))
    broken = copy.deepcopy(graph)
    broken.t14.data[2] = -1.0  # a negative variance
    with pytest.raises(ModelError, match="stored tensor 'convolution_folded_weight' holds NaN"):
        passes.fold_batch_norm(broken)
    assert not math.isnan(float(graph(inputs())[0].sum()))


def test_a_graph_of_an_importer_goes_through_all_passes(tmp_path):
    from nets import build, save_exported

    module = ready(Residual())
    graph = build(save_exported(module, (3, 6, 6), tmp_path / "net.pt2"), (3, 6, 6))
    x = inputs((3, 6, 6))
    whole, head = passes.strip_head(passes.only_output(graph, "output"))
    assert head == "none"
    run = passes.place(passes.fold_batch_norm(whole), torch.device("cpu"), channels_last=True)
    assert_close(run(x)[0], module(x), 1e-13)


# --- back to training


class Trains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.4)
        self.last = nn.Linear(36, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.norm(self.conv(x)).relu())
        return self.last(y.flatten(1)) + F.dropout(x, 0.2, self.training).mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("save", [save_scripted, save_traced, save_exported])
def test_back_to_training_it_is_the_module_in_training(save, tmp_path):
    module = ready(Trains())
    shape = () if save is save_scripted else ((3, 5, 5),)
    graph = build(save(module, *shape, tmp_path / "net.pt"), (3, 5, 5))
    before = state(graph)
    trained = passes.to_training(graph)
    x = inputs(batch=6)
    assert_close(graph(x)[0], module(x), 1e-12)
    module.train()
    for step in range(3):
        torch.manual_seed(step)
        mine = trained(x + step)[0]
        torch.manual_seed(step)
        assert_close(mine, module(x + step), 1e-12)
    for name in ("running_mean", "running_var"):
        (gathered,) = (buffer for path, buffer in trained.named_buffers() if path.endswith(name))
        assert_close(gathered, getattr(module.norm, name), 1e-12)
    assert_untouched(graph, before)


def test_a_frozen_file_cannot_be_trained(tmp_path):
    with quiet():
        frozen = torch.jit.freeze(torch.jit.script(ready(Trains())))
        torch.jit.save(frozen, tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"no parameters .it was frozen, its dropout and batch norm folded"):
        passes.to_training(build(tmp_path / "net.pt", (3, 5, 5)))


def test_dropout_is_left_out_of_what_predicts(tmp_path):
    graph = build(save_traced(ready(Trains()), (3, 5, 5), tmp_path / "net.pt"), (3, 5, 5))
    plain = passes.without_dropout(graph)
    assert operations(graph).count("aten.dropout.default") == 2
    assert "aten.dropout.default" not in operations(plain)
    assert torch.equal(plain(inputs())[0], graph(inputs())[0])
