"""ONNX files written without empty channels, run by ONNX Runtime against the masked module; or left whole."""

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import quiet
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import ints, normal
from torch import nn
from torch.nn import functional as F

from attrcli import formats
from attrcli.errors import ModelError
from attrcli.formats.spec import Sample
from attrcli.graph import passes
from attrcli.graph.build import FREE
from attrcli.graph.check import attribute
from attrcli.graph.shrink import shrink

SAMPLES = Path(__file__).parents[2] / "sample_models"
SHAPE = (2, 8, 8)
EMPTY = [1, 3]
SMALL, WHOLE = [(4, 2), (3, 4), (5, 12), (3, 5)], [(4, 2), (5, 4), (5, 20), (3, 5)]
"""Channels out and in of each layer: all emptied channels gone, or those of the flattened layer kept."""


class Net(nn.Module):
    """conv, bn, relu, pool, conv, relu, flatten in one of several ways, linear, relu, linear."""

    def __init__(self, flatten, masks=None):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)
        self.three, self.four = nn.Linear(20, 7), nn.Linear(7, 3)
        for tensor in (self.norm.running_mean, self.norm.bias, self.norm.weight):
            nn.init.normal_(tensor)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # an exporter stores equal tensors once
        self.flatten, self.masks = flatten, masks

    def kept(self, place, x):
        return x if self.masks is None else x * self.masks[place]

    def forward(self, x):
        h = F.max_pool2d(self.kept(0, F.relu(self.norm(self.one(x)))), 2)
        h = self.kept(1, F.relu(self.two(h)))
        return self.four(self.kept(2, F.relu(self.three(self.flatten(h)))))


FLATTENINGS = {
    "flatten": lambda h: h.flatten(1),
    "view": lambda h: h.view(h.size(0), -1),
    "numbers": lambda h: h.view(-1, 20),
    "computed": lambda h: h.reshape(h.shape[0], h.shape[1] * h.shape[2] * h.shape[3]),
    "twice": lambda h: h.flatten(2).flatten(1),
}


def dynamo(net, path, optimize):
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    free = ({0: torch.export.Dim("batch", min=1)},)
    with quiet():
        torch.onnx.export(
            net, (torch.zeros(2, *SHAPE),), path, dynamo=True, optimize=optimize, dynamic_shapes=free, verbose=False
        )
    logging.disable(level)


def legacy(net, path, opset):
    axes = {"x": {0: "batch"}}
    with quiet():
        torch.onnx.export(
            net,
            (torch.zeros(2, *SHAPE),),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["x"],
            dynamic_axes=axes,
            do_constant_folding=False,
        )


EXPORTERS = {
    "dynamo": lambda net, path: dynamo(net, path, True),
    "dynamo-plain": lambda net, path: dynamo(net, path, False),
    "legacy-20": lambda net, path: legacy(net, path, 20),
    "legacy-13": lambda net, path: legacy(net, path, 13),
    "legacy-9": lambda net, path: legacy(net, path, 9),
}


def graph_of(path, shape):
    source = formats.load(path)
    samples = {source.inputs[0].name: Sample(shape, torch.float32)}
    return source, samples, source.build(samples, torch.float32, FREE)


def emptied(graph):
    """Masks of all ReLUs: two channels of each, and of images a few elements besides."""
    masks = {}
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            generator = torch.Generator().manual_seed(len(masks))
            mask = torch.rand(1, *(shape := node.meta["shapes"][0])[1:], generator=generator) > 0.2 * (len(shape) > 2)
            mask[:, EMPTY] = False
            masks[node.name] = mask
    return masks


def written(path, tmp_path, shape=SHAPE):
    """The file masked and shrunk: its path, and the masks."""
    source, samples, graph = graph_of(path, shape)
    masks = emptied(graph)
    small = shrink(passes.mask(graph, masks), formats.resizable(source))
    formats.save(source, small, samples, tmp_path / "small.onnx")
    return tmp_path / "small.onnx", list(masks.values())


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def sizes(path):
    """Channels out and in of the convolutions and linear layers, in order."""
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    held = {entry.name: entry.dims for entry in proto.graph.initializer}
    return [tuple(held[n.input[1]][:2]) for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]


@pytest.mark.parametrize("how", FLATTENINGS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_files_of_both_exporters_shrink_and_give_what_the_masked_module_gives(exporter, how, tmp_path):
    EXPORTERS[exporter](Net(FLATTENINGS[how]).eval(), tmp_path / "net.onnx")
    path, masks = written(tmp_path / "net.onnx", tmp_path)
    for batch in (1, 2, 7):
        x = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = Net(FLATTENINGS[how], masks).eval()(x).numpy()
            whole = Net(FLATTENINGS[how]).eval()(x).numpy()
        np.testing.assert_allclose(run(path, x), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        assert np.abs(whole - expected).max() > 1e-2
    joined = how != "twice" or exporter == "dynamo"  # whose optimiser makes two reshapes one
    assert sizes(path) == (SMALL if joined else WHOLE)


def chain(nodes, constants, *, opset=18, ir=10, end=("Identity", "l"), listed=False, half=False):
    """conv, relu, what makes f of r, linear, relu, linear, and an end, as a file written by hand."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        *nodes,
        helper.make_node("Gemm", ["f", "w2", "b2"], ["g"], transB=1),
        helper.make_node("Relu", ["g"], ["h"]),
        helper.make_node("Gemm", ["h", "w3", "b3"], ["l"], transB=1),
        helper.make_node(end[0], [*end[1:]], ["y"]),
    ]
    held = {"w1": normal(5, 2, 3, 3), "b1": normal(5), "w2": normal(7, 20), "b2": normal(7)}
    held |= {"w3": normal(3, 7), "b3": normal(3), **constants}
    if half:
        held = {name: array.astype(np.float16) if array.dtype.kind == "f" else array for name, array in held.items()}
    stored = [numpy_helper.from_array(array, name) for name, array in held.items()]
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, ("N", 2, 4, 4))]
    if listed:
        inputs += [helper.make_tensor_value_info(entry.name, entry.data_type, entry.dims) for entry in stored]
    outputs = [helper.make_tensor_value_info("y", kind, ("N", 3))]
    graph = helper.make_graph(nodes, "net", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def by_hand(proto, masks, x):
    """What the masked chain gives before its end, in float64."""
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    w = {name: torch.from_numpy(array.copy()).double() for name, array in arrays.items()}
    h = F.relu(F.conv2d(x.double(), w["w1"], w["b1"])) * masks[0]
    return F.linear(F.relu(F.linear(h.flatten(1), w["w2"], w["b2"])) * masks[1], w["w3"], w["b3"])


def require(proto, tmp_path, expected_sizes, end=lambda y, x: y):
    """Write a chain without its empty channels; its sizes, and that ONNX Runtime gives what the masked chain does."""
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    path, masks = written(tmp_path / "net.onnx", tmp_path, (2, 4, 4))
    assert sizes(path) == expected_sizes
    for batch in (1, 2, 7):
        x = torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(batch))
        expected = end(by_hand(proto, masks, x), x.double()).numpy()
        np.testing.assert_allclose(run(path, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


CHAIN_SMALL, CHAIN_WHOLE = [(3, 2), (5, 12), (3, 5)], [(5, 2), (5, 20), (3, 5)]


def reshaped(name, *before, **attributes):
    return [*before, helper.make_node("Reshape", ["r", name], ["f"], **attributes)]


SIZES = helper.make_node("Shape", ["r"], ["s"])
TO_ROW = helper.make_node("Concat", ["rows", "n"], ["t"], axis=0)
SHAPES = {
    "flatten": ([helper.make_node("Flatten", ["r"], ["f"])], {}),
    "flatten from the end": ([helper.make_node("Flatten", ["r"], ["f"], axis=-3)], {}),
    "minus one last": (reshaped("n"), {"n": ints(0, -1)}),
    "minus one first": (reshaped("n"), {"n": ints(-1, 20)}),
    "no zeros allowed": (reshaped("n", allowzero=1), {"n": ints(-1, 20)}),
    "batch and number": (
        reshaped("t", SIZES, helper.make_node("Gather", ["s", "first"], ["rows"]), TO_ROW),
        {"first": ints(0), "n": ints(20)},
    ),
    "slice and minus one": (
        reshaped("t", SIZES, helper.make_node("Slice", ["s", "first", "end"], ["rows"]), TO_ROW),
        {"first": ints(0), "end": ints(1), "n": ints(-1)},
    ),
    "product of sizes": (
        reshaped(
            "t",
            SIZES,
            helper.make_node("Slice", ["s", "second", "end"], ["rest"]),
            helper.make_node("ReduceProd", ["rest"], ["all"], keepdims=1),
            helper.make_node("Concat", ["n", "all"], ["t"], axis=0),
        ),
        {"second": ints(1), "end": ints(4), "n": ints(-1)},
    ),
}


@pytest.mark.parametrize("how", SHAPES)
def test_however_a_reshape_learns_its_shape(how, tmp_path):
    require(chain(*SHAPES[how]), tmp_path, CHAIN_SMALL)


def test_a_shape_that_another_reshape_shares_stays_for_that_one(tmp_path):
    nodes = [
        helper.make_node("Flatten", ["x"], ["k"]),
        helper.make_node("Gather", ["k", "some"], ["twenty"], axis=1),
        helper.make_node("Reshape", ["twenty", "n"], ["again"]),
        helper.make_node("ReduceMean", ["again", "second"], ["m"], keepdims=1),
    ]
    constants = {"n": ints(-1, 20), "some": np.arange(20), "second": ints(1)}
    proto = chain(reshaped("n", *nodes), constants, end=("Add", "l", "m"))
    require(proto, tmp_path, CHAIN_SMALL, lambda y, x: y + x.flatten(1)[:, :20].mean(1, keepdim=True))


@pytest.mark.parametrize("alias", [[], [helper.make_node("Identity", ["r"], ["i"])]])
@pytest.mark.parametrize(("which", "expected"), [(1, CHAIN_WHOLE), (0, CHAIN_SMALL)])
def test_a_size_with_which_the_file_computes_stays(which, expected, alias, tmp_path):
    nodes = [
        *alias,
        helper.make_node("Shape", ["i" if alias else "r"], ["s"]),
        helper.make_node("Gather", ["s", "which"], ["size"]),
        helper.make_node("Cast", ["size"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["r"], ["f"]),
    ]
    proto = chain(nodes, {"which": ints(which)}, end=("Mul", "l", "factor"))
    require(proto, tmp_path, expected, lambda y, x: y * (5 if which else len(x)))


def test_a_weight_that_is_no_initializer_or_is_read_twice_stays(tmp_path):
    flat = helper.make_node("Flatten", ["r"], ["f"])
    proto = chain([flat], {"w": normal(7, 20)})
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["wc"], value=proto.graph.initializer[-1]))
    next(node for node in proto.graph.node if node.output[0] == "g").input[1] = "wc"
    proto.graph.initializer[2].CopyFrom(proto.graph.initializer[-1])  # by_hand reads it as w2
    proto.graph.initializer[2].name = "w2"
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    path, masks = written(tmp_path / "net.onnx", tmp_path, (2, 4, 4))
    x = torch.randn(3, 2, 4, 4)
    np.testing.assert_allclose(run(path, x), by_hand(proto, masks, x).numpy(), rtol=1e-4, atol=1e-4)
    nodes = [flat, helper.make_node("ReduceSum", ["w1"], ["sum"], keepdims=0)]
    proto = chain(nodes, {}, end=("Add", "l", "sum"))
    total = float(numpy_helper.to_array(proto.graph.initializer[0]).sum())
    require(proto, tmp_path, CHAIN_WHOLE, lambda y, x: y + total)


BIASES = {
    "from its weight": [
        helper.make_node("Shape", ["w1"], ["size"], start=0, end=1),
        helper.make_node("CastLike", ["zero", "x"], ["like"]),
        helper.make_node("Expand", ["like", "size"], ["none"]),
    ],
    "by itself": [helper.make_node("ConstantOfShape", ["five"], ["none"])],
}


@pytest.mark.parametrize("how", BIASES)
def test_a_bias_of_zeros_that_the_file_computes(how, tmp_path):
    proto = chain(reshaped("n"), {"n": ints(0, -1), "zero": np.array(0, np.float32), "five": ints(5)})
    for node in reversed(BIASES[how]):
        proto.graph.node.insert(0, node)
    next(node for node in proto.graph.node if node.op_type == "Conv").input[2] = "none"
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.zeros(5, np.float32), "b1"))
    require(proto, tmp_path, CHAIN_SMALL)


def test_the_size_of_a_weight_with_which_the_file_computes_stays(tmp_path):
    nodes = [
        helper.make_node("Shape", ["w1"], ["s"], start=0, end=1),
        helper.make_node("Cast", ["s"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["r"], ["f"]),
    ]
    require(chain(nodes, {}, end=("Mul", "l", "factor")), tmp_path, CHAIN_WHOLE, lambda y, x: y * 5)


def element_types(path):
    return {value.name: value.type.tensor_type.elem_type for value in onnx.load(path).graph.value_info}


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx"])
def test_the_sample_cnn_shrinks_in_every_format(suffix, tmp_path):
    source, samples, graph = graph_of(SAMPLES / f"fashion_cnn{suffix}", (1, 28, 28))
    masked = passes.mask(graph, emptied(graph))
    small = shrink(masked, formats.resizable(source))
    formats.save(source, small, samples, tmp_path / f"small{suffix}")
    _, _, again = graph_of(tmp_path / f"small{suffix}", (1, 28, 28))
    kernels = [
        tuple(attribute(again, node.args[1].target).shape[:2])
        for node in again.graph.nodes
        if node.target is torch.ops.aten.convolution.default
    ]
    assert kernels == [(30, 1), (48, 30), (46, 48), (48, 46), (62, 48)]
    if suffix == ".onnx":  # without the types ONNX Runtime would be told less, and fuse no batch norm
        assert element_types(tmp_path / "small.onnx") == element_types(SAMPLES / "fashion_cnn.onnx")
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = masked(x)[0].numpy()
    ran = run(tmp_path / "small.onnx", x) if suffix == ".onnx" else again(x)[0].numpy()
    np.testing.assert_allclose(ran, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_file_of_an_old_version_that_lists_its_initializers_as_inputs(tmp_path):
    require(chain(reshaped("n"), {"n": ints(-1, 20)}, opset=7, ir=3, listed=True), tmp_path, CHAIN_SMALL)


def test_a_file_in_half_precision(tmp_path):
    proto = chain(reshaped("n"), {"n": ints(-1, 20)}, half=True)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    path, masks = written(tmp_path / "net.onnx", tmp_path, (2, 4, 4))
    assert sizes(path) == CHAIN_SMALL
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    expected = by_hand(proto, masks, x).numpy()
    np.testing.assert_allclose(run(path, x), expected, rtol=0, atol=5e-3 * np.abs(expected).max())


def test_an_opset_whose_products_do_not_broadcast_is_refused(tmp_path):
    proto = chain(reshaped("n"), {"n": ints(-1, 20)}, opset=6)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="opset 6 is older than 7"):
        written(tmp_path / "net.onnx", tmp_path, (2, 4, 4))
